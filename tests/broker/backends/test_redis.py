"""What is special to Redis and Valkey: connections, what may happen to the server's keys, its ways to be reached."""

import asyncio
import json
import logging
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import anyio
import pytest
import redis.exceptions
import trustme
from engines import PATIENCE, Valkey
from serving import environment, free_port

import asgi_sse.broker
from asgi_sse import Broker, BrokerError, HTTPError, ServerSentEvent, Subscription
from asgi_sse.broker.backends import redis as redis_backend
from asgi_sse.broker.backends import redis_client
from asgi_sse.broker.backends.base import Publication, RunLease
from asgi_sse.broker.backends.redis import RedisBackend
from asgi_sse.broker.runs import manager
from asgi_sse.broker.runs.publisher import final_event
from asgi_sse.testing import open_stream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
]

_prefixes = (f"r{number}" for number in count())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey"), sync=False) as engine:
        yield engine


@pytest.fixture(autouse=True)
def wakeful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads and gets nothing looks ten times a second whether the log is another one, not once: to save time."""
    monkeypatch.setattr(redis_backend, "_BLOCK_MS", 100)


@pytest.fixture
def prefix() -> str:
    return next(_prefixes)


async def take(subscription: Subscription, number: int) -> list[ServerSentEvent]:
    async with asyncio.timeout(PATIENCE):
        return [await subscription.__anext__() for _ in range(number)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def data(events: list[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events]


def reason(event: ServerSentEvent) -> str:
    assert event.event == "reset"
    return str(json.loads(event.data or "")["reason"])


# Connections


async def test_a_lost_connection_is_seen_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    with Valkey(tmp_path) as engine:
        async with (
            Broker(engine.url, publish_timeout=0.3) as broker,
            Broker(engine.url, publish_timeout=None) as patient,
        ):
            subscription = broker.subscribe("a")
            await patient.publish("a", "0")  # who would not wait longer than 0.3 s is for where it must not succeed
            engine.kill()
            await until(lambda: broker.statistics().state == patient.statistics().state == "disconnected")
            await until(lambda: "127.0.0.1" in broker.statistics().error)  # Error 111 connecting to …
            # The last attempt to read may have been with a connection of which nobody had seen that it is closed.
            told = r"within 0.3 s: redis://127.0.0.1:\d+ is disconnected \(.*(failed|refused|closed by)"
            with pytest.raises(BrokerError, match=told):
                await broker.publish("a", "lost")
            waiting = asyncio.ensure_future(patient.publish("a", "1"))
            await until(lambda: patient.statistics().round_trip > 0.1)  # and grows
            await asyncio.to_thread(engine.start)
            place = await asyncio.wait_for(waiting, PATIENCE)
            await until(lambda: broker.statistics().state == patient.statistics().state == "connected")
            assert (broker.statistics().reconnects, broker.statistics().restarts) == (1, 0)
            seen = data(await take(subscription, 2))
            assert seen == ["0", "1"] or [*seen, *data(await take(subscription, 1))] == ["0", "lost", "1"]
            assert subscription.last_event_id == place
    records = [record for record in caplog.records if record.name == "asgi_sse.broker.backends.remote"]
    assert {vars(record)["sse_engine"] for record in records} == {engine.url.removesuffix("/0")}
    said = [record.getMessage() for record in records]
    assert sum("is lost, and is tried again" in message for message in said) == 2  # each of them once
    assert sum("again" in message and message.startswith("connected") for message in said) == 2


async def test_an_engine_that_is_not_there_or_does_not_let_us_in(tmp_path: Path) -> None:
    with Valkey(tmp_path, options=["--requirepass", "secret"]) as engine:
        async with Broker(engine.url.replace("//", "//:secret@")) as broker:
            await broker.publish("a", "x")
        with pytest.raises(BrokerError, match=r"cannot connect to redis://:\*\*\*@127") as refused:
            await Broker(engine.url.replace("//", "//:wrong@")).open("me")
        assert "wrong" not in str(refused.value)
    with pytest.raises(BrokerError, match=r"cannot connect to redis://127"):
        await Broker(engine.url).open("me")
    with pytest.raises(BrokerError, match="cannot connect"):
        await asyncio.to_thread(asgi_sse.broker.publish, engine.url, "a", "x")


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
def test_urls_that_are_none(url: str) -> None:
    if url == "redis://":
        Broker(url)  # localhost, as of redis-py
        return
    with pytest.raises(ValueError, match="give") as refused:
        Broker(url)
    assert "hun" not in str(refused.value)


async def test_what_the_server_refuses_is_told(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        with valkey.client() as client:
            client.config_set("maxmemory", "100kb")
            try:
                with pytest.raises(BrokerError, match=r"did not take it: .*memory"):
                    await broker.publish("a", "x")
            finally:
                client.config_set("maxmemory", "0")
        await broker.publish("a", "x")


async def test_prefixes_are_apart(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix + "-other") as other:
        subscription = other.subscribe("**")
        await one.publish("a", "of one")
        await other.publish("a", "of the other")
        assert data(await take(subscription, 1)) == ["of the other"]
    for wrong in ("", "a b", "{x}", "x" * 65, None):
        with pytest.raises(ValueError, match="prefix"):
            Broker(valkey.url, prefix=wrong)  # type: ignore[arg-type]


async def test_a_cancelled_publisher_leaves_the_others_alone(valkey: Valkey, prefix: str) -> None:
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


async def test_commands_are_few(valkey: Valkey, prefix: str) -> None:
    """One reader, however many subscribers; one script for each batch of events."""
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


# What may happen to keys


def in_thread(call: Callable[[], Any]) -> None:
    """Do something while the event loop stands still."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(PATIENCE)


async def test_a_log_that_was_trimmed_past_us_is_filled_from_the_channels(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        by_name, by_pattern, both, hurt = (
            broker.subscribe(*names) for names in (("a",), ("b.*",), ("a", "b.x"), ("gone", "a"))
        )
        first = await broker.publish("a", "first")
        await broker.publish("b.x", "first")
        for subscription, number in ((by_name, 1), (by_pattern, 1), (both, 2), (hurt, 1)):
            await take(subscription, number)

        def happens() -> None:
            for number in range(5):
                for channel in ("a", "b.x", "unread", "gone"):
                    asgi_sse.broker.publish(valkey.url, channel, f"{channel} {number}", prefix=prefix)
            with valkey.client() as client:
                client.xtrim(f"{{{prefix}}}:log", maxlen=0, approximate=False)
                client.xtrim(f"{{{prefix}}}:c:gone", maxlen=2, approximate=False)

        in_thread(happens)
        assert data(await take(by_name, 5)) == [f"a {number}" for number in range(5)]
        assert data(await take(by_pattern, 5)) == [f"b.x {number}" for number in range(5)]
        seen = data(await take(both, 10))
        assert seen == [f"{channel} {number}" for number in range(5) for channel in ("a", "b.x")]
        while (told := (await take(hurt, 1))[0]).event is None:
            pass  # the first of them may have come
        assert reason(told) == "overflow"
        last = await broker.publish("unread", "last")
        cold = broker.subscribe("unread", "a", last_event_id=first)  # what nobody read is still to be had
        seen = data(await take(cold, 11))
        assert seen[-1] == "last"
        assert [text for text in seen if (text or "").startswith("unread")] == [f"unread {n}" for n in range(5)]
        assert cold.last_event_id == last
        assert broker.statistics().restarts == 0


@pytest.mark.parametrize("keys", [("meta",), ("last",), ("meta", "log", "last"), ("*",)])
async def test_keys_that_are_gone_make_another_log(valkey: Valkey, prefix: str, keys: tuple[str, ...]) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        subscriptions = [node.subscribe("a") for node in (one, two)]
        ids = [await one.publish("a", str(number)) for number in range(5)]
        for subscription in subscriptions:
            await take(subscription, 5)
        with valkey.client() as client:
            names = [f"{{{prefix}}}:{key}" for key in keys]
            client.delete(*(client.keys(names[0].replace("{", "\\{")) if keys == ("*",) else names))
        after = await two.publish("a", "after")  # at once, or when the idle look finds it
        assert after.partition("-")[0] != ids[0].partition("-")[0]
        for subscription in subscriptions:
            told, event = await take(subscription, 2)
            assert reason(told) == "epoch"
            assert (event.data, event.id) == ("after", after)
        for node in (one, two):
            (told,) = await take(node.subscribe("a", last_event_id=ids[2]), 1)
            assert reason(told) == "epoch"
            assert node.statistics().restarts == 1


async def test_an_idle_look_finds_that_all_is_gone(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "x")
        await take(subscription, 1)
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:meta")
        assert reason((await take(subscription, 1))[0]) == "epoch"


async def test_a_lost_log_or_channel_is_told_or_not_missed(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        first = await broker.publish("a", "0")
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:log")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:c:a")
        last = await broker.publish("a", "2")
        assert data(await take(subscription, 1)) == ["2"]
        async with Broker(valkey.url, prefix=prefix) as cold:
            (told,) = await take(cold.subscribe("a", last_event_id=first), 1)
            assert (reason(told), told.id) == ("expired", last)


async def test_a_server_that_has_lost_what_it_acknowledged_gets_another_epoch(tmp_path: Path) -> None:
    with Valkey(tmp_path) as engine:
        async with Broker(engine.url) as one, Broker(engine.url) as two:
            subscriptions = [node.subscribe("a") for node in (one, two)]
            kept = [await one.publish("a", str(number), idempotency_key=str(number)) for number in range(3)]
            await asyncio.to_thread(engine.save)
            lost = [await one.publish("a", f"lost {number}") for number in range(3)]
            for subscription in subscriptions:
                await take(subscription, 6)
            await asyncio.to_thread(engine.restart, saved=True)
            ids = [await two.publish("a", f"new {number}") for number in range(4)]  # as many as were lost, and more
            assert not {ids[0].partition("-")[0]} & {kept[0].partition("-")[0]}
            for node, subscription in zip((one, two), subscriptions, strict=True):
                told, *events = await take(subscription, 5)
                assert reason(told) == "epoch"
                assert [event.id for event in events] == ids
                (told,) = await take(node.subscribe("a", last_event_id=lost[1]), 1)
                assert reason(told) == "epoch"
            again = await one.publish("a", "2", idempotency_key="2")  # it was not lost, and stands there once
            assert again.partition("-")[::2] == (ids[0].partition("-")[0], kept[2].partition("-")[2])


async def test_what_is_no_event_is_left_out(valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        with valkey.client() as client:
            for payload in (
                b"no JSON",
                b"[1]",
                b'{"id": "7", "data": "x"}',
                b'{"data": "x", "event": "a\\nb"}',
                b"\xff",
            ):
                meta = f"{{{prefix}}}:meta"
                number = client.hincrby(meta, "n", 1)
                fields = {"c": "a", "e": payload, "l": number - 1, "t": 0, "x": client.hget(meta, "epoch")}
                client.xadd(f"{{{prefix}}}:log", fields, id=f"{number}-0")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
    left_out = [record for record in caplog.records if "is left out" in record.getMessage()]
    assert [vars(record)["sse_engine"] for record in left_out] == [valkey.url] * 5
    assert not any(what in caplog.text for what in ("no JSON'", "[1]", "a\\nb"))  # of what was published


async def test_a_broker_is_closed_within_a_scope_that_was_cancelled(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    with anyio.move_on_after(0.1):
        async with broker:
            await anyio.sleep(PATIENCE)
    assert broker.statistics().state == "closed"
    async with broker:
        assert await broker.publish("a", "1")


async def test_those_who_open_a_broker_at_once_all_find_it_open(valkey: Valkey, prefix: str) -> None:
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


async def test_a_broker_is_closed_soon_while_its_server_stands_still(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix, run_grace=0)
    try:
        async with broker:
            run = await broker.run("r", endless())
            await until(lambda: broker.statistics().received == 1)
            valkey.pause()
            begun = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begun < 6
        assert run.outcome == "drained"
    finally:
        valkey.resume()


async def test_a_url_is_shown_without_its_passwords() -> None:
    url = "redis+sentinel://:one@a,b/mymaster/0?sentinel_password=two"
    assert redis_client.shown_url(url) == "redis+sentinel://:***@a,b/mymaster/0"


# Runs whose process is gone


async def endless() -> AsyncIterator[str]:
    yield "first"
    await asyncio.Event().wait()


async def in_two_parts(release: asyncio.Event) -> AsyncIterator[str]:
    yield "before"
    await release.wait()
    yield "after"


async def test_who_asks_for_a_channel_while_the_server_stands_still_is_told_to_come_back(
    valkey: Valkey, prefix: str
) -> None:
    async with Broker(valkey.url, prefix=prefix, publish_timeout=0.3) as broker:
        valkey.pause()
        try:
            async with asyncio.timeout(PATIENCE):
                with pytest.raises(BrokerError, match=r"did not answer within 0\.3 s") as told:
                    await broker.find_run("a")
                assert isinstance(told.value, HTTPError)
                with pytest.raises(BrokerError, match="did not answer"):
                    await broker.run("a", endless())
                for app in (broker.channel("a"), broker.endpoint("a"), broker.endpoint("a", runs=True)):
                    async with open_stream(app) as stream:  # not for ever, or its server could not stop
                        assert [event async for event in stream] == []
                        assert stream.retry is not None
        finally:
            valkey.resume()


async def test_as_many_requests_as_there_may_be_take_few_connections(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        await asyncio.gather(*(broker.find_run(f"r{number}") for number in range(500)))
        with valkey.client() as client:
            assert int(client.info("clients")["connected_clients"]) < 30


@pytest.mark.usefixtures("hurried")
async def test_runs_are_renewed_whatever_went_wrong_once(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        renew = RedisBackend.renew
        failed: list[object] = []

        async def fail_once(self: RedisBackend, name: str, lease: Any) -> bool:
            if not failed:
                failed.append(name)
                raise redis.exceptions.ResponseError("NOPERM")
            return await renew(self, name, lease)

        monkeypatch.setattr(RedisBackend, "renew", fail_once)
        with valkey.client() as client:
            client.pexpire(f"{{{prefix}}}:r:r", FEW_MS)
            await until(lambda: bool(failed) and renewed(client, prefix))
        assert await two.find_run("r") is not None
        run.cancel()


FEW_MS = 15_000  # of a lease of 30 s: more than any machine stands still for


def renewed(client: Any, prefix: str) -> bool:
    """Whether the lease of the run ``r``, of which `FEW_MS` were left, has been renewed."""
    left: int = client.pttl(f"{{{prefix}}}:r:r")
    return left > FEW_MS


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes look at runs often. Leases are as long as ever, not to be over when the machine is busy."""
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.05)


OWNER = """
import asyncio, sys
from asgi_sse import Broker


async def source():
    yield "first"
    print("begun", flush=True)
    await asyncio.Event().wait()


async def main():
    async with Broker(sys.argv[1], prefix=sys.argv[2]) as broker:
        await (await broker.run("r", source())).wait()


asyncio.run(main())
"""


@pytest.mark.usefixtures("hurried")
async def test_a_run_whose_process_is_gone_is_ended_by_another_one(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as two, Broker(valkey.url, prefix=prefix) as three:
        owner = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OWNER, valkey.url, prefix, env=environment(), stdout=asyncio.subprocess.PIPE
        )
        assert owner.stdout is not None
        assert await asyncio.wait_for(owner.stdout.readline(), PATIENCE) == b"begun\n"
        found = [await node.find_run("r") for node in (two, three)]
        owner.kill()
        await owner.wait()
        with valkey.client() as client:
            assert 0 < client.pttl(f"{{{prefix}}}:r:r") <= 30_000
            client.pexpire(f"{{{prefix}}}:r:r", 1)  # its lease is over
        for run in found:
            assert run is not None
            async with asyncio.timeout(PATIENCE):
                assert await run.wait() == "lost"
                seen = [event async for event in run.subscribe()]
            assert data(seen) == ["first", '{"reason":"lost"}']
        async with Broker(valkey.url, prefix=prefix) as cold:
            late = await cold.find_run("r")
            assert late is not None
            assert data(await take(late.subscribe(), 2)) == ["first", '{"reason":"lost"}']
        async with asyncio.timeout(PATIENCE):
            again = await three.run("r", endless())
        assert again.outcome is None
        again.cancel()
        await again.wait()


@pytest.mark.usefixtures("hurried")
async def test_a_run_goes_on_as_long_as_its_process_does(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        found = await two.find_run("r")
        assert found is not None
        with valkey.client() as client:
            for _ in range(3):
                client.pexpire(f"{{{prefix}}}:r:r", FEW_MS)
                await until(lambda: renewed(client, prefix))
            client.delete(f"{{{prefix}}}:r:r")
            await until(lambda: bool(client.exists(f"{{{prefix}}}:r:r")))  # it is put back
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await found.wait()
        with valkey.client() as client:
            client.hset(f"{{{prefix}}}:r:r", "holder", "another")
            await until(lambda: run.publisher is None)  # its process leaves it to that one
            client.pexpire(f"{{{prefix}}}:r:r", 1)  # of which nothing is heard
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == "lost"
        found.cancel()
        run.cancel()


async def test_a_run_that_another_process_has_taken_ends_where_that_says_so(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.05)
    stopped = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "0"
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        reader = run.subscribe()
        assert data(await take(reader, 1)) == ["0"]
        with valkey.client() as client:
            client.hset(f"{{{prefix}}}:r:r", "holder", "another")
        async with asyncio.timeout(PATIENCE):
            await stopped.wait()
            await two.publish("r", "1")  # which was under way
            await two._backend.publish(Publication("r", final_event("lost"), end="lost", keep_after=0, ttl=60))
            assert data([event async for event in reader]) == ["1", '{"reason":"lost"}']
            assert await run.wait() == "lost"


async def test_a_run_goes_on_in_a_log_that_is_another_one(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", in_two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        readers = [run.subscribe(), found.subscribe()]
        for reader in readers:
            assert data(await take(reader, 1)) == ["before"]
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        release.set()
        for reader in readers:
            told, after, end = await take(reader, 3)
            assert reason(told) == "epoch"
            assert (after.data, end.event) == ("after", "end")
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == await found.wait() == "finished"


@pytest.mark.usefixtures("hurried")
async def test_a_run_that_goes_on_is_not_taken_for_lost_since_the_log_is_another_one(
    valkey: Valkey, prefix: str
) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        for _ in range(20):
            await one.publish("a", "x")  # so that the run begins behind where the next log ends
        run = await one.run("r", in_two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        await asyncio.sleep(0.5)  # ten looks
        assert found.outcome is None
        async with Broker(valkey.url, prefix=prefix) as three:
            late = await three.find_run("r")
            assert late is not None
            release.set()
            async with asyncio.timeout(PATIENCE):
                told, *rest = [event async for event in late.subscribe()]
                assert reason(told) == "expired"  # its beginning is lost
                assert data(rest) == ["after", '{"reason":"finished"}']
                assert await run.wait() == await found.wait() == "finished"


async def test_who_begins_one_run_at_once_in_a_process_gets_one(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        for number in range(50):
            runs_ = await asyncio.gather(*(broker.run(f"r{number}", ["x"], join=True) for _ in range(5)))
            assert len(set(map(id, runs_))) == 1
            async with asyncio.timeout(PATIENCE):
                await runs_[0].wait()


async def test_a_run_stays_whole_when_its_process_has_missed_what_others_published(valkey: Valkey, prefix: str) -> None:
    events: asyncio.Queue[str] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        while True:
            yield await events.get()

    async with Broker(valkey.url, prefix=prefix, run_grace=0) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        for number in range(400):
            events.put_nowait(str(number))
        await until(lambda: two.statistics().received == 400)
        reads, held, xread = asyncio.Event(), asyncio.Event(), one._backend._client.xread  # type: ignore[attr-defined]

        async def wait_and_read(*args: Any, **options: Any) -> Any:
            reads.set()
            await held.wait()
            return await xread(*args, **options)

        one._backend._client.xread = wait_and_read  # type: ignore[attr-defined]
        await asyncio.wait_for(reads.wait(), PATIENCE)  # the read that was under way is over
        for _ in range(30):
            await asyncio.gather(*(two.publish("a", "x") for _ in range(64)))
        held.set()
        await until(lambda: one.statistics().last_event_id == two.statistics().last_event_id)
        events.put_nowait("400")
        await until(lambda: two.statistics().received == 400 + 30 * 64 + 1)
        with valkey.client() as client:
            assert client.xlen(f"{{{prefix}}}:c:r") == 401
        run.cancel()


@pytest.mark.usefixtures("hurried")
async def test_a_run_that_has_lost_its_beginning_says_so(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", in_two_parts(release))
        await take(run.subscribe(), 1)
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        release.set()
        async with asyncio.timeout(PATIENCE):
            while (found := await two.find_run("r")) is None:
                await asyncio.sleep(0.01)  # until its process says so again
        for late in (run, found):
            told, *rest = [event async for event in late.subscribe()]
            assert reason(told) == "expired"
            assert [event.event for event in rest][-1] == "end"
            assert "before" not in data(rest)


async def said_already(_name: str, _lease: RunLease) -> bool:
    return True


@pytest.mark.parametrize("joins", [False, True])
async def test_a_run_of_which_the_engine_does_not_know_that_its_beginning_is_lost_says_so(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch, *, joins: bool
) -> None:
    """Its process has said that it goes on in the moment in which the log was another one already."""
    release = asyncio.Event()
    key = f"{{{prefix}}}:r:r"
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", in_two_parts(release))
        await take(run.subscribe(), 1)
        monkeypatch.setattr(one._backend, "renew", said_already)
        with valkey.client() as client:
            said = client.hgetall(key)
            pipeline = client.pipeline()
            pipeline.delete(*client.keys(f"\\{{{prefix}}}:*"))
            pipeline.hset(key, mapping=said)
            pipeline.execute()
        await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        found = await two.run("r", endless(), join=True) if joins else await two.find_run("r")
        assert found is not None
        late = found.subscribe()
        release.set()
        told, *rest = [event async for event in late]
        assert reason(told) == "expired"
        assert data(rest)[:1] == ["after"]
        assert rest[-1].event == "end"


async def test_a_run_that_has_ended_in_a_log_that_there_is_no_more_can_be_begun_again(
    valkey: Valkey, prefix: str
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", ["before"])
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == "finished"
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:meta", f"{{{prefix}}}:log", f"{{{prefix}}}:last", f"{{{prefix}}}:c:r")
        await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        assert await two.find_run("r") is None
        again = await two.run("r", ["again"], join=True)
        assert data([event async for event in again.subscribe()])[0] == "again"


async def lose_all(valkey: Valkey, prefix: str, *brokers: Broker) -> None:
    """Delete all keys, and wait until the brokers know."""
    with valkey.client() as client:
        client.delete(*client.keys(f"\\{{{prefix}}}:*"))
    await until(lambda: all(broker.statistics().restarts == 1 for broker in brokers))


async def test_a_run_is_found_again_as_soon_as_the_log_is_another_one(valkey: Valkey, prefix: str) -> None:
    """To a client, a 404 would be the end; and another process would begin it once more."""
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", endless())
        await lose_all(valkey, prefix, one, two)
        async with asyncio.timeout(manager._WATCH_INTERVAL_S / 2):
            while await two.find_run("r") is None:
                await asyncio.sleep(0.01)
        run.cancel()


async def test_a_run_that_ends_before_the_loss_of_the_log_is_known_does_not_go_on_to_others(
    valkey: Valkey, prefix: str
) -> None:
    """Nor is its end followed by that of a run which is lost."""
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", in_two_parts(release))
        for _ in range(20):
            await one.publish("a", "x")  # so that nothing comes of the next log, until that is looked at
        await until(lambda: one.statistics().received == 21)
        await asyncio.sleep(0.1)
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        release.set()
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == "finished"
        await asyncio.sleep(0.2)  # in which it would have been renewed
        assert await two.find_run("r") is None


async def test_the_last_event_of_a_run_that_the_log_has_lost_is_published_again(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was acknowledged, but had come to nobody when the log became another one."""
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.5)
    release = asyncio.Event()
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", in_two_parts(release))
        found = await two.find_run("r")
        assert found is not None
        readers = [run.subscribe(), found.subscribe()]
        for reader in readers:
            assert data(await take(reader, 1)) == ["before"]
        back = one._backend
        assert isinstance(back, RedisBackend)
        send, lost = back._send, False

        async def send_and_lose(items: Any, attempt: int) -> list[str]:
            nonlocal lost
            if lost or items[0].publication.end is None:
                return await send(items, attempt)
            lost = True
            await lose_all(valkey, prefix, one, two)
            return [f"{'0' * 8}-3"]

        monkeypatch.setattr(back, "_send", send_and_lose)
        release.set()
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == await found.wait() == "finished"
            for reader in readers:
                seen = [event async for event in reader]
                assert seen[-1].event == "end"
                assert "reset" in [event.event for event in seen]


async def test_a_run_that_is_begun_while_the_log_becomes_another_one_begins_with_that(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        for _ in range(20):
            await one.publish("a", "x")  # so that it would begin behind its own end
        back = one._backend
        assert isinstance(back, RedisBackend)
        lease = back._lease_script

        async def claim_and_lose(**arguments: Any) -> Any:
            answer = await lease(**arguments)
            await lose_all(valkey, prefix, one, two)
            return answer

        monkeypatch.setattr(back, "_lease_script", claim_and_lose)
        run = await one.run("r", ["0", "1"])
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == "finished"
            seen = [event async for event in run.subscribe()]
        assert data(seen)[-3:] == ["0", "1", '{"reason":"finished"}']


async def test_who_was_told_of_a_run_before_the_log_became_another_one_has_that_which_others_have(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        await one.publish("a", "x")
        run = await one.run("r", endless())
        find, told, go_on = two._backend.find, asyncio.Event(), asyncio.Event()

        async def find_and_wait(name: str) -> Any:
            lease = await find(name)
            told.set()
            await go_on.wait()
            return lease

        monkeypatch.setattr(two._backend, "find", find_and_wait)
        late = asyncio.ensure_future(two.find_run("r"))
        await told.wait()
        monkeypatch.undo()
        found = await two.find_run("r")
        assert found is not None
        await lose_all(valkey, prefix, one, two)
        go_on.set()
        assert await late is found
        run.cancel()
        async with asyncio.timeout(PATIENCE):
            assert await found.wait() == "cancelled"


async def test_a_run_of_which_an_engine_has_lost_the_middle_begins_behind_that(tmp_path: Path) -> None:
    """What is left of its beginning is followed by a hole, at which nobody would be told."""
    items: asyncio.Queue[str] = asyncio.Queue()

    async def source() -> AsyncIterator[str]:
        while (item := await items.get()) != "":
            yield item

    with Valkey(tmp_path) as engine:
        async with Broker(engine.url) as one, Broker(engine.url) as two:
            run = await one.run("r", source())
            pull_source = run.subscribe()
            items.put_nowait("kept")
            await take(pull_source, 1)
            await asyncio.to_thread(engine.save)
            items.put_nowait("lost")
            await take(pull_source, 1)
            await asyncio.to_thread(engine.restart, saved=True)
            await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
            found = await two.find_run("r")
            assert found is not None
            readers = [pull_source, run.subscribe(), found.subscribe()]
            items.put_nowait("after")
            items.put_nowait("")
            for reader in readers:
                async with asyncio.timeout(PATIENCE):
                    told, *rest = [event async for event in reader]
                assert told.event == "reset"
                assert data(rest) == ["after", '{"reason":"finished"}']


@pytest.mark.parametrize("owner", [0, 1])
async def test_an_engine_that_comes_back_with_an_earlier_run_of_that_name_does_not_end_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int
) -> None:
    """Neither before it is known that it has lost events, nor after."""
    monkeypatch.setattr(manager, "_WATCH_INTERVAL_S", 0.2)
    release = asyncio.Event()
    with Valkey(tmp_path) as engine:
        async with Broker(engine.url) as one, Broker(engine.url) as two:
            earlier = await (one, two)[owner].run("r", ["x"])
            async with asyncio.timeout(PATIENCE):
                assert await earlier.wait() == "finished"
            with engine.client() as client:
                ended = client.hgetall("{asgi_sse}:r:r")
            await asyncio.to_thread(engine.save)
            await one.publish("a", "x")
            run = await one.run("r", in_two_parts(release))
            found = await two.find_run("r")
            assert found is not None
            readers = [run.subscribe(), found.subscribe()]
            for reader in readers:
                await take(reader, 1)
            with engine.client() as client:  # as it is on an engine that has come back, and is not found out yet
                client.hset("{asgi_sse}:r:r", mapping=ended)
            await manager.RunManager._look_after(two._runs, "r", found, set())
            await manager.RunManager._look_after(one._runs, "r", run, set())
            assert found.outcome is run.outcome is None
            with engine.client() as client:
                assert client.hget("{asgi_sse}:r:r", "outcome") == b""  # its process has put it back
            await asyncio.to_thread(engine.restart, saved=True)
            await until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
            async with asyncio.timeout(PATIENCE):
                while await two.find_run("r") is None:
                    await asyncio.sleep(0.01)
            release.set()
            for reader in readers:
                async with asyncio.timeout(PATIENCE):
                    seen = [event async for event in reader]
                assert reason(seen[0]) == "epoch"
                assert data(seen[1:]) == ["after", '{"reason":"finished"}']


async def test_a_run_that_ends_where_nobody_knows_of_it(valkey: Valkey, prefix: str) -> None:
    release = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        await release.wait()
        yield "x"

    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        run = await one.run("r", source())
        with valkey.client() as client:
            client.delete(*client.keys(f"\\{{{prefix}}}:*"))
        release.set()
        async with asyncio.timeout(PATIENCE):
            assert await run.wait() == "finished"
        assert await two.find_run("r") is None


# The ways to it


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    with Valkey(tmp_path, options=["--unixsocket", str(path)]):
        async with Broker(f"unix://{path}?db=0") as broker:
            await round_trip(broker)


async def test_a_user_who_may_not_read_is_told_at_once(tmp_path: Path) -> None:
    with Valkey(tmp_path) as engine:
        with engine.client() as client:
            client.execute_command("ACL", "SETUSER", "half", "on", ">x", "~*", "+@all", "-xread")
        with pytest.raises(BrokerError, match=r"cannot connect to redis://half.*xread"):
            await Broker(engine.url.replace("//", "//half:x@")).open("me")


@asynccontextmanager
async def tls_in_front_of(engine: Valkey, context: ssl.SSLContext) -> AsyncIterator[int]:
    """What Valkey here was built without."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            writer.write(chunk)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", engine.port)
        await asyncio.gather(relay(reader, there[1]), relay(there[0], writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]
        server.close()


async def test_tls(valkey: Valkey, prefix: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with tls_in_front_of(valkey, context) as port:
        async with Broker(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}", prefix=prefix) as broker:
            await round_trip(broker)
        with pytest.raises(BrokerError, match=r"cannot connect to rediss.*certificate"):
            await Broker(f"rediss://localhost:{port}").open("me")


async def round_trip(broker: Broker) -> None:
    subscription = broker.subscribe("a.b")
    place = await broker.publish("a.b", "x", idempotency_key="k")
    assert await broker.publish("a.b", "x", idempotency_key="k") == place
    assert [event.id for event in await take(subscription, 1)] == [place]


async def test_a_cluster(tmp_path: Path) -> None:
    with Valkey(tmp_path, options=["--cluster-enabled", "yes", "--cluster-port", str(free_port())]) as engine:
        with engine.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
            await until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
        url = engine.url.replace("redis://", "redis+cluster://")
        async with Broker(url) as one, Broker(url) as two:
            await round_trip(one)
            first = await one.publish("b", "0")
            run = await one.run("r", endless())
            found = await two.find_run("r")
            assert found is not None
            found.cancel()
            async with asyncio.timeout(PATIENCE):
                assert await run.wait() == await found.wait() == "cancelled"
            await asyncio.to_thread(asgi_sse.broker.publish, url, "b", "1")
            async with Broker(url) as cold:
                assert data(await take(cold.subscribe("**", last_event_id=first), 3)) == [
                    "first", '{"reason":"cancelled"}', "1",
                ]  # fmt: skip


async def test_a_master_by_its_sentinels_and_a_failover(tmp_path: Path) -> None:
    replica_of = ["--repl-diskless-sync-delay", "0"]
    with (
        Valkey(tmp_path / "one", options=replica_of) as master,
        Valkey(tmp_path / "two", options=["--replicaof", f"127.0.0.1 {master.port}"]) as replica,
    ):
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"sentinel monitor here 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds here 60000\n"
            "sentinel failover-timeout here 2000\n"
        )
        with _Sentinel(tmp_path / "three", options=[str(config), "--sentinel"]) as sentinel:
            with replica.client() as client, sentinel.client() as watch:
                await until(lambda: client.info("replication")["master_link_status"] == "up")
                await until(lambda: watch.execute_command("SENTINEL REPLICAS here") != [])
            url = f"redis+sentinel://127.0.0.1:{sentinel.port}/here/0"
            async with Broker(url, publish_timeout=None) as broker:
                subscription = broker.subscribe("a")
                await broker.publish("a", "before")
                assert data(await take(subscription, 1)) == ["before"]
                with master.client() as client:
                    client.wait(1, 5000)
                await asyncio.to_thread(master.kill)
                with sentinel.client() as watch:  # not before: a master that is slow for once would be taken for dead
                    watch.execute_command("SENTINEL SET here down-after-milliseconds 500")
                after = await asyncio.wait_for(broker.publish("a", "after"), PATIENCE)
                seen = await take(subscription, 1)
                if seen[0].event == "reset":  # that of a run id which is another one, and nothing to compare
                    seen = await take(subscription, 1)
                assert [event.id for event in seen] == [after]
    with pytest.raises(ValueError, match="name of the service"):
        Broker("redis+sentinel://127.0.0.1:1")


class _Sentinel(Valkey):
    def _arguments(self) -> list[str]:
        return []

    def start(self) -> None:
        self._options = [*self._options, "--port", str(self.port), "--bind", "127.0.0.1"]
        super().start()
