"""The backend on NATS: its stream, servers that are killed, paused, emptied or rolled back, and leases of runs."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("nats")

import nats
from backend_helpers import renewed_already, wait_until
from backend_servers import Nats

from asgi_sse import Broker, BrokerError, ServerSentEvent
from asgi_sse.broker.backends import jetstream, nats_runs
from asgi_sse.broker.backends import nats as nats_backend
from asgi_sse.broker.backends.base import Publication
from asgi_sse.broker.backends.jetstream import redact_server, split_servers
from asgi_sse.broker.backends.nats import NatsBackend
from asgi_sse.cli.hub import create_hub
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from asgi_sse import Subscription
    from asgi_sse.broker.backends.base import RunLease

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Nats.available(), reason="NATS is not installed"),
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nats]:
    with Nats(tmp_path, sync=False) as server:
        yield server


@asynccontextmanager
async def jetstream_client(server: Nats) -> AsyncIterator[Any]:
    """A JetStream client of another program."""
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        yield client.jetstream()
    finally:
        await client.close()


def backend_of(broker: Broker) -> NatsBackend:
    found = broker._backend
    assert isinstance(found, NatsBackend)
    return found


async def acquire(backend: NatsBackend, name: str, *, replace_ended: bool = False) -> tuple[RunLease, bool]:
    return await backend.acquire_lease(name, 100, 60, replace_ended=replace_ended, ended_start=-1)


async def read(subscription: Subscription, until: str) -> list[str]:
    """Return the data of the events up to `until`. A reset is "reset" and its reason."""
    found: list[str] = []
    async with asyncio.timeout(30):
        while True:
            event = await anext(subscription)
            data = str(event.data)
            found.append(f"reset {json.loads(data)['reason']}" if event.event == "reset" else data)
            if found[-1] == until:
                return found


async def sync(broker: Broker) -> None:
    async with asyncio.timeout(20):
        await backend_of(broker).sync()


# The stream


async def test_stream_is_created_with_the_limits_of_the_broker(server: Nats) -> None:
    async with Broker(server.url, prefix="p", history=2000, max_age=600) as broker, jetstream_client(server) as js:
        first = await broker.publish("a.b:c/@+=,~-_", "x")
        info = await js.stream_info("SSE_p")
        assert info.config.subjects == ["sse.p.>"]
        assert (info.config.max_msgs, info.config.max_age, info.config.duplicate_window) == (20_000, 600, 120)
        assert info.state.last_seq == 1
        assert first == f"{broker._dispatcher.log.epoch}-1"


async def test_existing_stream_keeps_its_limits(server: Nats) -> None:
    async with jetstream_client(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=5)
        async with Broker(server.url, prefix="p") as broker:
            ids = [await broker.publish("a", str(number)) for number in range(10)]
            assert (await js.stream_info("SSE_p")).config.max_msgs == 5
        async with Broker(server.url, prefix="p") as broker:
            assert await read(broker.subscribe("a", last_event_id=ids[4]), "9") == ["5", "6", "7", "8", "9"]
            old = broker.subscribe("a", last_event_id=ids[3])
            assert await read(old, "reset expired") == ["reset expired"]


async def test_new_process_loads_the_whole_stream_without_channel_limits(server: Nats) -> None:
    async with Broker(server.url, history=3) as one:
        ids = [await one.publish("a", str(number)) for number in range(20)]
        async with Broker(server.url, history=3) as two:
            assert two._dispatcher.log.last_offset == 20
            assert await read(two.subscribe("a", last_event_id=ids[0]), "19") == [str(n) for n in range(1, 20)]
            assert await two.publish("a", "x", idempotency_key="k") == await one.publish("a", "y", idempotency_key="k")


async def test_memory_limit_counts_all_channels_together(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(nats_backend, "_MAX_EVENTS", 10)
    monkeypatch.setattr(nats_backend, "_CHECK_S", 0.05)
    async with Broker(server.url) as broker:
        ids = [await broker.publish(f"c{number % 3}", str(number)) for number in range(50)]
        log = broker._dispatcher.log
        await wait_until(lambda: sum(len(log.ring(f"c{n}") or ()) for n in range(3)) == 10)
        assert await read(broker.subscribe("c0", "c1", last_event_id=ids[39]), "49") == [
            str(number) for number in range(40, 50) if number % 3 != 2
        ]
        assert await read(broker.subscribe("c0", last_event_id=ids[38]), "reset expired") == ["reset expired"]
    async with Broker(server.url) as broker:
        assert await read(broker.subscribe("c1", last_event_id=ids[39]), "49") == ["40", "43", "46", "49"]


async def test_purge_of_read_events_resets_only_a_resume(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(nats_backend, "_CHECK_S", 0.05)
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        ids = [await broker.publish("a", str(number)) for number in range(3)]
        assert await read(subscription, "2") == ["0", "1", "2"]
        await js.purge_stream("SSE_p")
        await wait_until(lambda: broker._dispatcher.log._floor == 3)
        await broker.publish("a", "3")
        assert await read(subscription, "3") == ["3"]
        assert await read(broker.subscribe("a", last_event_id=ids[0]), "reset expired") == ["reset expired"]


async def test_events_dropped_before_they_were_read_cause_a_reset(server: Nats, monkeypatch: Any) -> None:
    async with jetstream_client(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=5)
        async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two:
            subscription = two.subscribe("a")
            await one.publish("a", "first")
            assert await read(subscription, "first") == ["first"]
            connect, allowed = jetstream.JetStream.connect, asyncio.Event()

            async def wait_and_connect(servers: list[str]) -> jetstream.JetStream:
                await allowed.wait()
                return await connect(servers)

            monkeypatch.setattr(jetstream.JetStream, "connect", wait_and_connect)
            await backend_of(two)._jetstream.close()
            for number in range(10):
                await one.publish("a", str(number))
            allowed.set()
            assert await read(subscription, "9") == ["reset expired", "5", "6", "7", "8", "9"]
            assert two.statistics().restarts == 1
            assert two.statistics().reconnects == 1


async def test_deleted_messages_cause_no_reset(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(nats_backend, "_CHECK_S", 0.05)
    async with jetstream_client(server) as js:
        async with Broker(server.url, prefix="p") as broker:
            ids = [await broker.publish("a", str(number)) for number in range(10)]
        for number in (2, 3, 7, 10):
            await js.delete_msg("SSE_p", number)
        async with Broker(server.url, prefix="p") as broker:
            assert broker._dispatcher.log.last_offset == 10
            assert await read(broker.subscribe("a", last_event_id=ids[0]), "8") == ["3", "4", "5", "7", "8"]
            backend = backend_of(broker)
            await backend._jetstream.close()
            await js.publish("sse.p.a", b'{"data":"deleted"}')
            await js.delete_msg("SSE_p", 11)
            await sync(broker)
            assert broker._dispatcher.log.last_offset == 11
            assert broker.statistics().restarts == 0


async def test_many_holes_need_few_requests(server: Nats, monkeypatch: Any) -> None:
    async with jetstream_client(server) as js:
        async with Broker(server.url, prefix="p") as broker:
            first = await broker.publish("a", "0")
            await asyncio.gather(*(broker.publish("a", str(number)) for number in range(1, 400)))
        await asyncio.gather(*(js.delete_msg("SSE_p", number) for number in range(2, 400, 2)))
        verify_hole, verified = NatsBackend._verify_hole, []

        async def count_and_verify(self: NatsBackend, offset: int) -> bool:
            verified.append(offset)
            return await verify_hole(self, offset)

        monkeypatch.setattr(NatsBackend, "_verify_hole", count_and_verify)
        async with Broker(server.url, prefix="p") as broker:
            found = await read(broker.subscribe("a", last_event_id=first), "399")
            assert len(found) == 200
            assert len(verified) < 50


async def test_deleted_stream_is_created_again_in_a_new_epoch(server: Nats) -> None:
    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        jetstream_client(server) as js,
    ):
        readers = [one.subscribe("a"), two.subscribe("a")]
        old = await one.publish("a", "before")
        for reader in readers:
            assert await read(reader, "before") == ["before"]
        await js.delete_stream("SSE_p")
        new = await two.publish("a", "after")
        assert new.partition("-")[0] != old.partition("-")[0]
        for reader in readers:
            assert await read(reader, "after") == ["reset epoch", "after"]
        assert await read(one.subscribe("a", last_event_id=old), "reset epoch") == ["reset epoch"]


# Servers that fail


async def test_rolled_back_stream_gets_a_new_epoch(server: Nats) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:
        readers = [one.subscribe("a"), two.subscribe("a")]
        kept = await one.publish("a", "kept")
        server.save()
        lost = await one.publish("a", "lost")
        for reader in readers:
            assert await read(reader, "lost") == ["kept", "lost"]
        await asyncio.to_thread(server.restart, saved=True)
        new = await one.publish("a", "new")
        assert new.partition("-")[0] != lost.partition("-")[0]
        for reader in readers:
            found = await read(reader, "new")
            assert found[-2:] == ["reset epoch", "new"]
            assert set(found) == {"reset epoch", "new"}
        await wait_until(lambda: one._dispatcher.log.epoch == two._dispatcher.log.epoch)
        for stale in (kept, lost):
            assert (await read(two.subscribe("a", last_event_id=stale), "reset epoch"))[0] == "reset epoch"
    async with Broker(server.url) as three:
        assert await read(three.subscribe("a", last_event_id=f"{three._dispatcher.log.epoch}-1"), "new") == ["new"]


async def test_rollback_is_noticed_although_as_many_events_followed(server: Nats) -> None:
    async with Broker(server.url) as one:
        subscription = one.subscribe("a")
        await one.publish("a", "kept")
        server.save()
        await one.publish("a", "lost")
        assert await read(subscription, "lost") == ["kept", "lost"]
        await asyncio.to_thread(server.restart, saved=True)
        async with jetstream_client(server) as js:
            for number in range(3):
                await js.publish("sse.asgi_sse.a", json.dumps({"data": str(number)}).encode())
        await one.publish("a", "new")
        assert (await read(subscription, "new"))[0] == "reset epoch"


async def test_killed_server_causes_no_gap_and_no_duplicate(server: Nats) -> None:
    async with Broker(server.url, publish_timeout=30) as one, Broker(server.url) as two:
        subscription = two.subscribe("**")

        async def publish(channel: str) -> None:
            for number in range(300):
                await one.publish(channel, f"{channel} {number}")

        async def kill() -> None:
            await wait_until(lambda: one.statistics().published > 150)
            await asyncio.to_thread(server.restart)

        await asyncio.gather(*(publish(f"c{number}") for number in range(4)), kill())
        await one.publish("end", "end")
        found = await read(subscription, "end")
        for number in range(4):
            received = [each for each in found if each.startswith(f"c{number} ")]
            assert received == [f"c{number} {count}" for count in range(300)]
        assert not any(each.startswith("reset") for each in found)
        assert two.statistics().reconnects == 1


async def test_emptied_server_causes_a_reset(server: Nats) -> None:
    async with Broker(server.url, publish_timeout=30) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "before")
        assert await read(subscription, "before") == ["before"]
        await asyncio.to_thread(server.restart, empty=True)
        await broker.publish("a", "after")
        assert await read(subscription, "after") == ["reset epoch", "after"]


async def test_paused_server_loses_nothing(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url, publish_timeout=30) as one, Broker(server.url) as two:
        subscription = two.subscribe("a")
        await one.publish("a", "0")
        server.pause()
        try:
            with monkeypatch.context() as patch:  # only while no request can succeed
                patch.setattr(jetstream, "REQUEST_TIMEOUT_S", 0.5)
                patch.setattr(nats_backend, "REQUEST_TIMEOUT_S", 0.5)
                patch.setattr(nats_backend, "_SILENCE_S", 1.5)
                publishing = [asyncio.ensure_future(one.publish("a", str(number))) for number in range(1, 10)]
                await wait_until(lambda: one.statistics().state == two.statistics().state == "disconnected")
        finally:
            server.resume()
        await asyncio.gather(*publishing)
        await one.publish("a", "end")
        assert await read(subscription, "end") == [*map(str, range(10)), "end"]


async def test_broker_on_nats_closes_while_the_server_is_paused(server: Nats) -> None:
    broker = Broker(server.url, publish_timeout=None)
    async with broker:
        await broker.publish("a", "x")
        server.pause()
        publishing = [asyncio.ensure_future(broker.publish("a", "x" * 500_000)) for _ in range(30)]
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        closed = loop.time()
    assert loop.time() - closed < 5
    server.resume()
    for result in await asyncio.gather(*publishing, return_exceptions=True):
        assert isinstance(result, BrokerError)
    assert broker.statistics().state == "closed"
    async with broker:
        await broker.publish("a", "x")


async def test_deleted_consumer_is_replaced(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        for consumer in await js.consumers_info("SSE_p"):
            await js.delete_consumer("SSE_p", consumer.name)
        await broker.publish("a", "x")
        assert await read(subscription, "x") == ["x"]
        assert broker.statistics().state == "connected"
        assert broker.statistics().reconnects == broker.statistics().restarts == 0


async def test_lost_acknowledgement_causes_no_second_event_after_the_duplicate_window(
    server: Nats, monkeypatch: Any
) -> None:
    monkeypatch.setattr(nats_backend, "_DUPLICATE_WINDOW_S", 0.2)
    monkeypatch.setattr(nats_backend, "REQUEST_TIMEOUT_S", 0.3)
    async with jetstream_client(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], duplicate_window=0.1)
        async with Broker(server.url, prefix="p") as broker:
            subscription = broker.subscribe("a")
            send_request, deaf = jetstream.JetStream.send_request, [True]

            async def lose_first_answer(self: Any, subject: str, *rest: Any) -> Any:
                answer = await send_request(self, subject, *rest)
                if subject.startswith("sse.") and deaf and deaf.pop():
                    return asyncio.get_running_loop().create_future()
                return answer

            monkeypatch.setattr(jetstream.JetStream, "send_request", lose_first_answer)
            assert (await broker.publish("a", "once")).endswith("-1")
            await broker.publish("a", "end")
            assert await read(subscription, "end") == ["once", "end"]


# Messages of other programs, and messages that the server refuses


async def test_invalid_messages_are_skipped_and_logged(server: Nats, caplog: Any) -> None:
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("**")
        for payload in (
            b"",
            b"\xff",
            b"[]",
            b'{"data":[],"end":1}',
            b'{"x":1}',
            b'{"data":"a","event":"a\\nb"}',
            b"[" * 100_000,
        ):
            await js.publish("sse.p.a", payload)
        await js.publish("sse.p.!control", b'{"data":"x"}')
        await js.publish("sse.p.sch\u00f6n", b'{"data":"x"}')
        await js.publish("sse.p.a", b'{"data":"good"}', headers={"Status": "100", "Nats-Last-Consumer": "9"})
        assert await read(subscription, "good") == ["good"]
        assert broker.statistics().reconnects == 0
    assert len([record for record in caplog.records if record.message.startswith("skipped invalid event")]) == 8


async def test_too_large_event_is_refused_alone(tmp_path: Path) -> None:
    server = Nats(tmp_path, settings="max_payload: 2000")
    await asyncio.to_thread(server.start)
    try:
        async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
            subscription = broker.subscribe("a")
            sizes = [10, 1500, *range(1800, 2000, 5), 3000, 100_000, 20]
            results = await asyncio.gather(*(broker.publish("a", "x" * size) for size in sizes), return_exceptions=True)
            refused = [size for size, result in zip(sizes, results, strict=True) if isinstance(result, BrokerError)]
            assert {3000, 100_000} < set(refused)
            assert min(refused) > 1800
            hub = create_hub(broker, insecure_publish=True)
            async with open_stream(hub, "/channels/b", method="POST", body=b"x" * 3000) as answer:
                assert answer.status == 413
                assert b"2000" in await answer.read(10)
            assert all(isinstance(result, str | BrokerError) for result in results)
            await broker.publish("a", "end")
            found = await read(subscription, "end")
            assert [len(each) for each in found[:-1]] == [size for size in sizes if size not in refused]
            assert broker.statistics().published == len(found)
            assert broker.statistics().reconnects == 0
            await js.update_stream(name="SSE_p", subjects=["sse.p.>"], max_msg_size=500)
            results = await asyncio.gather(
                *(broker.publish("a", "x" * size) for size in (10, 1000, 20)), return_exceptions=True
            )
            assert [type(result) for result in results] == [str, BrokerError, str]
    finally:
        server.kill()


async def test_open_fails_without_a_server(tmp_path: Path) -> None:
    server = Nats(tmp_path)
    with pytest.raises(BrokerError, match=r"cannot connect to nats://127\.0\.0\.1:"):
        await Broker(server.url).open(object())


async def test_open_fails_if_the_stream_cannot_be_created(server: Nats) -> None:
    async with jetstream_client(server) as js:
        await js.add_stream(name="other", subjects=["sse.>"])
        with pytest.raises(BrokerError, match=r"refused to create the stream SSE_p: .*overlap"):
            await Broker(server.url, prefix="p").open(object())


async def test_url_with_a_password_and_several_servers(tmp_path: Path) -> None:
    server = Nats(tmp_path)
    server.login = "me:secret"
    await asyncio.to_thread(server.start)
    try:
        address, dead = f"127.0.0.1:{server.port}", "127.0.0.1:1"
        for _ in range(4):
            async with Broker(f"nats://me:secret@{dead},{address}") as broker:
                await broker.publish("a", "x")
                assert "secret" not in backend_of(broker).url
        with pytest.raises(BrokerError, match=r"(?i)authorization"):
            await Broker(f"nats://me:wrong@{address}").open(object())
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("url", "servers", "shown"),
    [
        ("nats://a", ["nats://a"], ["nats://a"]),
        ("tls://u:p@a:1,b:2", ["tls://u:p@a:1", "tls://u:p@b:2"], ["tls://u:***@a:1", "tls://u:***@b:2"]),
        ("nats://token@a, nats://b", ["nats://token@a", "nats://token@b"], ["nats://***@a", "nats://***@b"]),
        ("ws://a:1,wss://x:y@b", ["ws://a:1", "wss://x:y@b"], ["ws://a:1", "wss://x:***@b"]),
    ],
)
async def test_url_is_split_into_servers_and_redacted(url: str, servers: list[str], shown: list[str]) -> None:
    assert split_servers(url) == servers
    assert [redact_server(server) for server in servers] == shown


async def test_url_without_a_server_is_refused() -> None:
    with pytest.raises(ValueError, match="must name a server"):
        Broker("nats://")


# Leases of runs


async def test_one_process_holds_the_lease_of_a_run(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:
        first, second = backend_of(one), backend_of(two)
        assert await second.find_lease("r") is None
        await one.publish("other", "x")
        results = await asyncio.gather(*(acquire(backend, "r", replace_ended=True) for backend in (first, second) * 3))
        assert sum(new for _, new in results) == 1
        lease = results[0][0]
        assert {each.holder for each, _ in results} == {lease.holder}
        assert (lease.start, lease.epoch, lease.outcome) == (1, one._dispatcher.log.epoch, "")
        holder, other = (first, second) if lease.holder == first._holder else (second, first)
        assert await holder.renew_lease("r", lease)
        assert not await other.renew_lease("r", lease)
        found = await other.find_lease("r")
        assert found == lease

        ended = await holder.publish(Publication("r", ServerSentEvent("x"), end="finished", ttl=60))
        found = await other.find_lease("r")
        assert found is not None
        assert (found.outcome, found.final) == ("finished", int(ended.partition("-")[2]))
        assert (await acquire(other, "r")) == (found, False)
        lease, new = await acquire(other, "r", replace_ended=True)
        assert new
        assert (lease.holder, lease.start) == (other._holder, found.final)

        monkeypatch.setattr(nats_runs, "_LEASE_S", -1)
        assert await holder.find_lease("r") is None
        lease, new = await acquire(holder, "r")
        assert new
        assert lease.holder == holder._holder
        # The lease has expired, so another process takes it over to end the run.
        assert await other.renew_lease("r", lease)
        monkeypatch.undo()
        assert not await holder.renew_lease("r", lease)


async def test_lease_is_acquired_although_the_answer_was_lost(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url) as broker:
        backend = backend_of(broker)
        write, failing = backend._leases.write, [True]

        async def write_and_fail(*arguments: Any) -> bool:
            written = await write(*arguments)
            if failing.pop():
                raise TimeoutError
            return written

        monkeypatch.setattr(backend._leases, "write", write_and_fail)
        lease, new = await acquire(backend, "r")
        assert new
        assert lease.holder == backend._holder


async def test_run_that_ends_during_a_renewal_stays_ended(server: Nats) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:
        backend = backend_of(one)
        for number in range(5):
            name = f"r{number}"
            lease, _ = await acquire(backend, name)
            end = Publication(name, ServerSentEvent("x"), end="finished", ttl=60)
            await asyncio.gather(*(backend.renew_lease(name, lease) for _ in range(5)), backend.publish(end))
            found = await backend_of(two).find_lease(name)
            assert found is not None
            assert found.outcome == "finished"


async def test_run_is_read_and_cancelled_from_another_process(server: Nats) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:

        async def source() -> AsyncIterator[str]:
            yield "0"
            yield "1"
            await asyncio.Event().wait()

        run = await one.run("r", source())
        other = await two.find_run("r")
        assert other is not None
        reader = other.subscribe()
        assert await read(reader, "1") == ["0", "1"]
        other.cancel()
        async with asyncio.timeout(10):
            assert await other.wait() == await run.wait() == "cancelled"


@pytest.mark.parametrize("joins", [False, True])
async def test_late_subscriber_of_a_run_that_began_in_a_deleted_stream_gets_a_reset(
    server: Nats, monkeypatch: pytest.MonkeyPatch, *, joins: bool
) -> None:
    """Leases are in a stream of their own, which has the old lease until the holder renews it."""
    release = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "before"
        await release.wait()
        yield "after"

    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        jetstream_client(server) as js,
    ):
        run = await one.run("r", source())
        assert await read(run.subscribe(), "before") == ["before"]
        monkeypatch.setattr(backend_of(one), "renew_lease", renewed_already)
        await js.delete_stream("SSE_p")
        await two.publish("a", "x")
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        found = await two.run("r", source(), join=True) if joins else await two.find_run("r")
        assert found is not None
        late = found.subscribe()
        release.set()
        assert await read(late, "after") == ["reset expired", "after"]
        async with asyncio.timeout(20):
            assert await found.wait() == "finished"
        third = await two.find_run("r")
        assert third is not None
        assert await read(third.subscribe(), "after") == ["reset expired", "after"]


async def test_run_name_is_reusable_after_its_stream_was_deleted(server: Nats) -> None:
    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        jetstream_client(server) as js,
    ):
        run = await one.run("r", ["before"])
        async with asyncio.timeout(20):
            assert await run.wait() == "finished"
        assert await two.find_run("r") is not None
        await js.delete_stream("SSE_p")
        await two.publish("a", "x")
        await wait_until(lambda: two.statistics().restarts == 1)
        assert await two.find_run("r") is None
        again = await two.run("r", ["again"], join=True)
        assert await read(again.subscribe(), "again") == ["again"]


async def test_end_in_a_deleted_stream_is_not_recorded_for_the_next_epoch(server: Nats) -> None:
    """A subscriber would wait for the offset of that end."""
    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        jetstream_client(server) as js,
    ):
        backend = backend_of(one)
        for _ in range(5):
            await one.publish("a", "x")
        await acquire(backend, "r")
        await js.delete_stream("SSE_p")
        await wait_until(lambda: one.statistics().restarts == 1)
        await backend._record_run_end(Publication("r", ServerSentEvent("x"), end="finished", ttl=60), 6)
        found = await backend_of(two).find_lease("r")
        assert found is not None
        assert (found.outcome, found.whole) == ("", False)


async def test_run_is_found_although_the_stream_was_deleted_twice(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sync_nothing() -> None:
        """Return although the stream was deleted since."""

    async with Broker(server.url, prefix="p") as one, jetstream_client(server) as js:
        backend = backend_of(one)
        await acquire(backend, "r")
        await js.delete_stream("SSE_p")
        await wait_until(lambda: one.statistics().restarts == 1)
        monkeypatch.setattr(backend, "_sync", sync_nothing)
        await js.delete_stream("SSE_p")
        found = await backend.find_lease("r")
        assert found is not None
        assert not found.whole
