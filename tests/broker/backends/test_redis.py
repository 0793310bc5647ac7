"""The backend on Redis and Valkey: connections, URLs, errors of the server, opening and closing."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import trustme
from backend_helpers import data, endless, take, wait_until
from backend_servers import TIMEOUT_S, Valkey
from serving import free_port

import asgi_sse.broker
from asgi_sse import Broker, BrokerError, HTTPError, ServerSentEvent
from asgi_sse.broker.backends.redis_client import RedisURL, redact_url
from asgi_sse.testing import open_stream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
    pytest.mark.usefixtures("short_block"),
]


# Connections


async def test_lost_connection_is_reported_and_restored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    with Valkey(tmp_path) as server:
        async with (
            Broker(server.url, publish_timeout=0.3) as broker,
            Broker(server.url, publish_timeout=None) as waiting,
        ):
            subscription = broker.subscribe("a")
            await waiting.publish("a", "0")  # 0.3 s may be too short for a publish that has to succeed
            server.kill()
            await wait_until(lambda: broker.statistics().state == waiting.statistics().state == "disconnected")
            await wait_until(lambda: "127.0.0.1" in broker.statistics().error)  # "Error 111 connecting to ..."
            # The last read may have used a connection that was closed without notice.
            error = r"within 0.3 s: redis://127.0.0.1:\d+ is disconnected \(.*(failed|refused|closed by)"
            with pytest.raises(BrokerError, match=error):
                await broker.publish("a", "lost")
            publishing = asyncio.ensure_future(waiting.publish("a", "1"))
            await wait_until(lambda: waiting.statistics().round_trip > 0.1)
            await asyncio.to_thread(server.start)
            event_id = await asyncio.wait_for(publishing, TIMEOUT_S)
            await wait_until(lambda: broker.statistics().state == waiting.statistics().state == "connected")
            assert (broker.statistics().reconnects, broker.statistics().restarts) == (1, 0)
            seen = data(await take(subscription, 2))
            assert seen == ["0", "1"] or [*seen, *data(await take(subscription, 1))] == ["0", "lost", "1"]
            assert subscription.last_event_id == event_id
    records = [record for record in caplog.records if record.name == "asgi_sse.broker.backends.remote"]
    assert {vars(record)["sse_backend"] for record in records} == {server.url.removesuffix("/0")}
    messages = [record.getMessage() for record in records]
    assert sum(message.startswith("lost the connection") for message in messages) == 2  # once for each broker
    assert sum(message.startswith("reconnected") for message in messages) == 2


async def test_open_fails_if_the_server_is_down_or_refuses_the_password(tmp_path: Path) -> None:
    with Valkey(tmp_path, options=["--requirepass", "secret"]) as server:
        async with Broker(server.url.replace("//", "//:secret@")) as broker:
            await broker.publish("a", "x")
        with pytest.raises(BrokerError, match=r"cannot connect to redis://:\*\*\*@127") as refused:
            await Broker(server.url.replace("//", "//:wrong@")).open("me")
        assert "wrong" not in str(refused.value)
    with pytest.raises(BrokerError, match=r"cannot connect to redis://127"):
        await Broker(server.url).open("me")
    with pytest.raises(BrokerError, match="cannot connect"):
        await asyncio.to_thread(asgi_sse.broker.publish, server.url, "a", "x")


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://h:1",
        "redis://",
        "redis://:hun/ter2@h",
        "redis://h:port",
        "foo://x",
        "localhost",
        "memory:///",
        "nats:x",
    ],
)
def test_invalid_url_is_refused_without_its_password(url: str) -> None:
    if url == "redis://":
        Broker(url)  # redis-py connects to localhost
        return
    with pytest.raises(ValueError, match=r"^url must .*; pass one like ") as refused:
        Broker(url)
    assert "hun" not in str(refused.value)


async def test_refused_event_raises_with_the_reason_of_the_server(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        with valkey.client() as client:
            client.config_set("maxmemory", "100kb")
            try:
                with pytest.raises(BrokerError, match=r"refused the event: .*memory"):
                    await broker.publish("a", "x")
            finally:
                client.config_set("maxmemory", "0")
        await broker.publish("a", "x")


async def test_prefixes_separate_brokers(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix + "-other") as other:
        subscription = other.subscribe("**")
        await one.publish("a", "to one")
        await other.publish("a", "to the other")
        assert data(await take(subscription, 1)) == ["to the other"]
    for wrong in ("", "a b", "{x}", "x" * 65, None):
        with pytest.raises(ValueError, match="prefix"):
            Broker(valkey.url, prefix=wrong)  # type: ignore[arg-type]


async def test_cancelled_publisher_does_not_affect_others(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        tasks = [asyncio.ensure_future(broker.publish("a", str(number))) for number in range(200)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        last = await broker.publish("a", "last")
        seen: list[ServerSentEvent] = []
        while not seen or seen[-1].id != last:
            seen += await take(subscription, 1)
        numbers = [int(event.data or "") for event in seen[:-1]]
        assert numbers == sorted(set(numbers))
        assert set(range(1, 200, 2)) <= set(numbers)


async def test_many_subscribers_and_events_need_few_commands(valkey: Valkey, prefix: str) -> None:
    """One reader serves all subscribers, and one script call publishes a batch."""
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscriptions = [broker.subscribe("a", f"b{number}") for number in range(50)]
        with valkey.client() as client:
            client.config_resetstat()
            await asyncio.gather(*(broker.publish("a", "x") for _ in range(640)))
            for subscription in subscriptions:
                await take(subscription, 640)
            used = {name: figures["calls"] for name, figures in client.info("commandstats").items()}
        assert used["cmdstat_evalsha"] < 30
        assert used["cmdstat_xread"] <= 60
        assert "cmdstat_xrange" not in used


async def test_broker_closes_in_a_cancelled_scope(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    with anyio.move_on_after(0.1):
        async with broker:
            await anyio.sleep(TIMEOUT_S)
    assert broker.statistics().state == "closed"
    async with broker:
        assert await broker.publish("a", "1")


async def test_concurrent_openers_share_one_open_broker(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix, run_grace=0.3)

    async def one(name: str) -> str:
        await broker.open(name)
        try:
            return await broker.publish("a", name)
        finally:
            await broker.close(name)

    assert len(set(await asyncio.gather(*map(one, "abc")))) == 3
    await broker.open("d")
    await broker.run("r", endless())
    closing = asyncio.create_task(broker.close("d"))
    await asyncio.sleep(0.1)
    assert await one("e")
    await closing
    assert broker.statistics().state == "closed"


async def test_broker_closes_soon_while_the_server_is_paused(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix, run_grace=0)
    try:
        async with broker:
            run = await broker.run("r", endless())
            await wait_until(lambda: broker.statistics().received == 1)
            valkey.pause()
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 6
        assert run.outcome == "drained"
    finally:
        valkey.resume()


async def test_requests_are_asked_to_reconnect_while_the_server_is_paused(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix, publish_timeout=0.3) as broker:
        valkey.pause()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(BrokerError, match=r"did not answer within 0\.3 s") as error:
                    await broker.find_run("a")
                assert isinstance(error.value, HTTPError)
                with pytest.raises(BrokerError, match="did not answer"):
                    await broker.run("a", endless())
                for app in (broker.channel("a"), broker.endpoint("a"), broker.endpoint("a", runs=True)):
                    async with open_stream(
                        app
                    ) as stream:  # a stream without an end would keep its server from stopping
                        assert [event async for event in stream] == []
                        assert stream.retry is not None
        finally:
            valkey.resume()


async def test_many_queries_need_few_connections(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        await asyncio.gather(*(broker.find_run(f"r{number}") for number in range(500)))
        with valkey.client() as client:
            assert int(client.info("clients")["connected_clients"]) < 30


# URLs


async def test_redacted_url_has_no_password() -> None:
    url = "redis+sentinel://:one@a,b/mymaster/0?sentinel_password=two"
    assert redact_url(url) == "redis+sentinel://:***@a,b/mymaster/0"


async def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with Valkey(tmp_path, options=["--unixsocket", str(path)]):
        async with Broker(f"unix://{path}?db=0") as broker:
            await round_trip(broker)


async def test_open_fails_if_the_user_may_not_read(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "half", "on", ">x", "~*", "+@all", "-xread")
        with pytest.raises(BrokerError, match=r"cannot connect to redis://half.*xread"):
            await Broker(server.url.replace("//", "//half:x@")).open("me")


async def test_user_who_may_not_run_info_loses_nothing_at_a_reconnect(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "half", "on", ">x", "~*", "&*", "+@all", "-info")
        async with Broker(server.url.replace("//", "//half:x@")) as broker:
            subscription = broker.subscribe("a")
            await broker.publish("a", "0")
            assert data(await take(subscription, 1)) == ["0"]
            with server.client() as client:
                client.execute_command("CLIENT", "KILL", "USER", "half")
            await broker.publish("a", "1")
            assert data(await take(subscription, 1)) == ["1"]
            assert broker.statistics().restarts == 0


async def test_protocol_of_the_client_is_an_option_of_the_url(valkey: Valkey, prefix: str) -> None:
    for protocol in (2, 3):
        async with Broker(f"{valkey.url}?protocol={protocol}", prefix=f"{prefix}-{protocol}") as broker:
            await round_trip(broker)
            first = await broker.publish("a", "0")
            await broker.publish("a", "1")
        async with Broker(f"{valkey.url}?protocol={protocol}", prefix=f"{prefix}-{protocol}") as cold:
            assert data(await take(cold.subscribe("a", last_event_id=first), 1)) == ["1"]


async def test_user_and_password_in_a_url_of_sentinels_are_those_of_the_master() -> None:
    url = "redis+sentinel://me:p%40ss@127.0.0.1:1,127.0.0.1/mymaster/2?sentinel_username=s&sentinel_password=t"
    client, clients = RedisURL(url).connect()
    options = client.connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("me", "p@ss", 2)
    sentinels = [each.connection_pool.connection_kwargs for each in clients[1:]]
    assert [(each["port"], each["username"], each["password"]) for each in sentinels] == [
        (1, "s", "t"),
        (26379, "s", "t"),
    ]


@asynccontextmanager
async def tls_proxy(server: Valkey, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Accept TLS for a server that was built without it."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(forward(reader, there[1]), forward(there[0], writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as listener:
        yield listener.sockets[0].getsockname()[1]
        listener.close()


async def test_tls(valkey: Valkey, prefix: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with tls_proxy(valkey, context) as port:
        async with Broker(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}", prefix=prefix) as broker:
            await round_trip(broker)
        with pytest.raises(BrokerError, match=r"cannot connect to rediss.*certificate"):
            await Broker(f"rediss://localhost:{port}").open("me")


async def round_trip(broker: Broker) -> None:
    """Publish an event twice with one key, and receive it once."""
    subscription = broker.subscribe("a.b")
    event_id = await broker.publish("a.b", "x", idempotency_key="k")
    assert await broker.publish("a.b", "x", idempotency_key="k") == event_id
    assert [event.id for event in await take(subscription, 1)] == [event_id]


async def test_cluster(tmp_path: Path) -> None:
    with Valkey(tmp_path, options=["--cluster-enabled", "yes", "--cluster-port", str(free_port())]) as server:
        with server.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            await wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        url = server.url.replace("redis://", "redis+cluster://")
        async with Broker(url) as one, Broker(url) as two:
            await round_trip(one)
            first = await one.publish("b", "0")
            run = await one.run("r", endless())
            found = await two.find_run("r")
            assert found is not None
            found.cancel()
            async with asyncio.timeout(TIMEOUT_S):
                assert await run.wait() == await found.wait() == "cancelled"
            await asyncio.to_thread(asgi_sse.broker.publish, url, "b", "1")
            async with Broker(url) as cold:
                assert data(await take(cold.subscribe("**", last_event_id=first), 3)) == [
                    "first", '{"reason":"cancelled"}', "1",
                ]  # fmt: skip


async def test_sentinels_and_failover(tmp_path: Path) -> None:
    master_options = ["--repl-diskless-sync-delay", "0"]
    with (
        Valkey(tmp_path / "one", options=master_options) as master,
        Valkey(tmp_path / "two", options=["--replicaof", f"127.0.0.1 {master.port}"]) as replica,
    ):
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor here 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds here 60000\n"
            "sentinel failover-timeout here 2000\n"
        )
        with _Sentinel(tmp_path / "three", options=[str(config), "--sentinel"]) as sentinel:
            with replica.client() as client, sentinel.client() as watch:
                await wait_until(lambda: client.info("replication")["master_link_status"] == "up")
                await wait_until(lambda: watch.execute_command("SENTINEL REPLICAS here") != [])
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/here/0"
            async with Broker(url, publish_timeout=None) as broker:
                subscription = broker.subscribe("a")
                await broker.publish("a", "before")
                assert data(await take(subscription, 1)) == ["before"]
                with master.client() as client:
                    client.wait(1, 5000)
                await asyncio.to_thread(master.kill)
                with sentinel.client() as watch:  # only now, or a slow master would be taken for dead
                    watch.execute_command("SENTINEL SET here down-after-milliseconds 500")
                after = await asyncio.wait_for(broker.publish("a", "after"), TIMEOUT_S)
                seen = await take(subscription, 1)
                if seen[0].event == "reset":  # the replica may not have the entry to compare
                    seen = await take(subscription, 1)
                assert [event.id for event in seen] == [after]
    with pytest.raises(ValueError, match="name the sentinels and the service"):
        Broker("redis+sentinel://127.0.0.1:1")


class _Sentinel(Valkey):
    def _arguments(self) -> list[str]:
        return []

    def start(self) -> None:
        self._options = [*self._options, "--port", str(self.port), "--bind", "127.0.0.1"]
        super().start()
