"""What is special to NATS: real servers, that are killed, paused, emptied and rolled back under brokers that go on."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("nats")

import nats
from engines import Nats

from asgi_sse import Broker, BrokerError, ServerSentEvent
from asgi_sse.broker.backends import jetstream, nats_runs
from asgi_sse.broker.backends import nats as back_end
from asgi_sse.broker.backends.base import Publication, RunLease
from asgi_sse.broker.backends.jetstream import servers_of, shown_server
from asgi_sse.broker.backends.nats import NatsBackend
from asgi_sse.cli.hub import create_hub
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from asgi_sse import Subscription

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Nats.available(), reason="NATS is not installed"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Nats]:
    with Nats(tmp_path, sync=False) as server:
        yield server


@asynccontextmanager
async def raw(server: Nats) -> AsyncIterator[Any]:
    """JetStream, as anybody else has it."""
    client = await nats.connect(server.url, allow_reconnect=False)
    try:
        yield client.jetstream()
    finally:
        await client.close()


def back_end_of(broker: Broker) -> NatsBackend:
    found = broker._backend
    assert isinstance(found, NatsBackend)
    return found


async def read(subscription: Subscription, until: str) -> list[str]:
    """The data of events up to one, and the reasons of resets."""
    found: list[str] = []
    async with asyncio.timeout(30):
        while True:
            event = await anext(subscription)
            data = str(event.data)
            found.append(f"reset {json.loads(data)['reason']}" if event.event == "reset" else data)
            if found[-1] == until:
                return found


async def eventually(test: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not test():
            await asyncio.sleep(0.01)


async def synced(broker: Broker) -> None:
    async with asyncio.timeout(20):
        await back_end_of(broker).sync()


# The stream


async def test_the_stream_is_made_with_the_limits_of_the_broker(server: Nats) -> None:
    async with Broker(server.url, prefix="p", history=2000, max_age=600) as broker, raw(server) as js:
        first = await broker.publish("a.b:c/@+=,~-_", "x")
        info = await js.stream_info("SSE_p")
        assert info.config.subjects == ["sse.p.>"]
        assert (info.config.max_msgs, info.config.max_age, info.config.duplicate_window) == (20_000, 600, 120)
        assert info.state.last_seq == 1
        assert first == f"{broker._dispatcher.log.epoch}-1"


async def test_a_stream_that_is_there_has_its_own_limits(server: Nats) -> None:
    async with raw(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=5)
        async with Broker(server.url, prefix="p") as broker:
            ids = [await broker.publish("a", str(number)) for number in range(10)]
            assert (await js.stream_info("SSE_p")).config.max_msgs == 5
        async with Broker(server.url, prefix="p") as broker:
            assert await read(broker.subscribe("a", last_event_id=ids[4]), "9") == ["5", "6", "7", "8", "9"]
            old = broker.subscribe("a", last_event_id=ids[3])
            assert await read(old, "reset expired") == ["reset expired"]


async def test_a_later_process_has_all_at_once_and_no_limit_of_a_channel(server: Nats) -> None:
    async with Broker(server.url, history=3) as one:
        ids = [await one.publish("a", str(number)) for number in range(20)]
        async with Broker(server.url, history=3) as two:
            assert two._dispatcher.log.last_offset == 20
            assert await read(two.subscribe("a", last_event_id=ids[0]), "19") == [str(n) for n in range(1, 20)]
            assert await two.publish("a", "x", idempotency_key="k") == await one.publish("a", "y", idempotency_key="k")


async def test_memory_is_bounded_by_what_all_channels_have(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(back_end, "_LIMIT", 10)
    monkeypatch.setattr(back_end, "_CHECK", 0.05)
    async with Broker(server.url) as broker:
        ids = [await broker.publish(f"c{number % 3}", str(number)) for number in range(50)]
        log = broker._dispatcher.log
        await eventually(lambda: sum(len(log.ring(f"c{n}") or ()) for n in range(3)) == 10)
        assert await read(broker.subscribe("c0", "c1", last_event_id=ids[39]), "49") == [
            str(number) for number in range(40, 50) if number % 3 != 2
        ]
        assert await read(broker.subscribe("c0", last_event_id=ids[38]), "reset expired") == ["reset expired"]
    async with Broker(server.url) as broker:
        assert await read(broker.subscribe("c1", last_event_id=ids[39]), "49") == ["40", "43", "46", "49"]


async def test_a_purge_takes_what_was_read_from_those_who_come_back(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(back_end, "_CHECK", 0.05)
    async with Broker(server.url, prefix="p") as broker, raw(server) as js:
        pull_source = broker.subscribe("a")
        ids = [await broker.publish("a", str(number)) for number in range(3)]
        assert await read(pull_source, "2") == ["0", "1", "2"]
        await js.purge_stream("SSE_p")
        await eventually(lambda: broker._dispatcher.log._floor == 3)
        await broker.publish("a", "3")
        assert await read(pull_source, "3") == ["3"]
        assert await read(broker.subscribe("a", last_event_id=ids[0]), "reset expired") == ["reset expired"]


async def test_what_the_limits_took_before_it_was_read_is_told(server: Nats, monkeypatch: Any) -> None:
    async with raw(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=5)
        async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two:
            pull_source = two.subscribe("a")
            await one.publish("a", "first")
            assert await read(pull_source, "first") == ["first"]
            connect, allowed = jetstream.JetStream.connect, asyncio.Event()

            async def wait_and_connect(servers: list[str]) -> jetstream.JetStream:
                await allowed.wait()
                return await connect(servers)

            monkeypatch.setattr(jetstream.JetStream, "connect", wait_and_connect)
            await back_end_of(two)._js.close()
            for number in range(10):
                await one.publish("a", str(number))
            allowed.set()
            assert await read(pull_source, "9") == ["reset expired", "5", "6", "7", "8", "9"]
            assert two.statistics().restarts == 1
            assert two.statistics().reconnects == 1


async def test_deleted_messages_are_no_gap(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(back_end, "_CHECK", 0.05)
    async with raw(server) as js:
        async with Broker(server.url, prefix="p") as broker:
            ids = [await broker.publish("a", str(number)) for number in range(10)]
        for number in (2, 3, 7, 10):
            await js.delete_msg("SSE_p", number)
        async with Broker(server.url, prefix="p") as broker:
            assert broker._dispatcher.log.last_offset == 10
            assert await read(broker.subscribe("a", last_event_id=ids[0]), "8") == ["3", "4", "5", "7", "8"]
            back = back_end_of(broker)
            await back._js.close()
            await js.publish("sse.p.a", b'{"data":"deleted"}')
            await js.delete_msg("SSE_p", 11)
            await synced(broker)
            assert broker._dispatcher.log.last_offset == 11
            assert broker.statistics().restarts == 0


async def test_many_deleted_messages_are_asked_for_together(server: Nats, monkeypatch: Any) -> None:
    async with raw(server) as js:
        async with Broker(server.url, prefix="p") as broker:
            first = await broker.publish("a", "0")
            await asyncio.gather(*(broker.publish("a", str(number)) for number in range(1, 400)))
        await asyncio.gather(*(js.delete_msg("SSE_p", number) for number in range(2, 400, 2)))
        jump, jumps = NatsBackend._jump, []

        async def count_and_jump(self: NatsBackend, number: int) -> bool:
            jumps.append(number)
            return await jump(self, number)

        monkeypatch.setattr(NatsBackend, "_jump", count_and_jump)
        async with Broker(server.url, prefix="p") as broker:
            found = await read(broker.subscribe("a", last_event_id=first), "399")
            assert len(found) == 200
            assert len(jumps) < 50


async def test_a_deleted_stream_is_made_anew_and_readers_are_told(server: Nats) -> None:
    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        raw(server) as js,
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


async def test_a_server_that_came_back_with_less_gets_another_epoch(server: Nats) -> None:
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
        await eventually(lambda: one._dispatcher.log.epoch == two._dispatcher.log.epoch)
        for stale in (kept, lost):
            assert (await read(two.subscribe("a", last_event_id=stale), "reset epoch"))[0] == "reset epoch"
    async with Broker(server.url) as three:
        assert await read(three.subscribe("a", last_event_id=f"{three._dispatcher.log.epoch}-1"), "new") == ["new"]


async def test_what_was_lost_is_missed_even_if_as_much_came_since(server: Nats) -> None:
    async with Broker(server.url) as one:
        pull_source = one.subscribe("a")
        await one.publish("a", "kept")
        server.save()
        await one.publish("a", "lost")
        assert await read(pull_source, "lost") == ["kept", "lost"]
        await asyncio.to_thread(server.restart, saved=True)
        async with raw(server) as js:
            for number in range(3):
                await js.publish("sse.asgi_sse.a", json.dumps({"data": str(number)}).encode())
        await one.publish("a", "new")
        assert (await read(pull_source, "new"))[0] == "reset epoch"


async def test_a_server_that_was_killed_goes_on_without_gap_or_duplicate(server: Nats) -> None:
    async with Broker(server.url, publish_timeout=30) as one, Broker(server.url) as two:
        pull_source = two.subscribe("**")

        async def publish(channel: str) -> None:
            for number in range(300):
                await one.publish(channel, f"{channel} {number}")

        async def kill() -> None:
            await eventually(lambda: one.statistics().published > 150)
            await asyncio.to_thread(server.restart)

        await asyncio.gather(*(publish(f"c{number}") for number in range(4)), kill())
        await one.publish("end", "end")
        found = await read(pull_source, "end")
        for number in range(4):
            mine = [each for each in found if each.startswith(f"c{number} ")]
            assert mine == [f"c{number} {place}" for place in range(300)]
        assert not any(each.startswith("reset") for each in found)
        assert two.statistics().reconnects == 1


async def test_a_server_that_was_emptied_tells_readers(server: Nats) -> None:
    async with Broker(server.url, publish_timeout=30) as broker:
        pull_source = broker.subscribe("a")
        await broker.publish("a", "before")
        assert await read(pull_source, "before") == ["before"]
        await asyncio.to_thread(server.restart, empty=True)
        await broker.publish("a", "after")
        assert await read(pull_source, "after") == ["reset epoch", "after"]


async def test_a_paused_server_loses_nothing(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url, publish_timeout=30) as one, Broker(server.url) as two:
        pull_source = two.subscribe("a")
        await one.publish("a", "0")
        server.pause()
        try:
            with monkeypatch.context() as hurried:  # while nothing is to succeed
                hurried.setattr(jetstream, "ANSWER", 0.5)
                hurried.setattr(back_end, "ANSWER", 0.5)
                hurried.setattr(back_end, "_SILENCE", 1.5)
                publishing = [asyncio.ensure_future(one.publish("a", str(number))) for number in range(1, 10)]
                await eventually(lambda: one.statistics().state == two.statistics().state == "disconnected")
        finally:
            server.resume()
        await asyncio.gather(*publishing)
        await one.publish("a", "end")
        assert await read(pull_source, "end") == [*map(str, range(10)), "end"]


async def test_a_broker_is_closed_while_its_server_is_paused(server: Nats) -> None:
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


async def test_a_consumer_that_is_gone_is_made_anew(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker, raw(server) as js:
        pull_source = broker.subscribe("a")
        for consumer in await js.consumers_info("SSE_p"):
            await js.delete_consumer("SSE_p", consumer.name)
        await broker.publish("a", "x")
        assert await read(pull_source, "x") == ["x"]
        assert broker.statistics().state == "connected"
        assert broker.statistics().reconnects == broker.statistics().restarts == 0


async def test_an_acknowledgement_that_was_lost_for_long_makes_no_second_event(server: Nats, monkeypatch: Any) -> None:
    monkeypatch.setattr(back_end, "_WINDOW", 0.2)
    monkeypatch.setattr(back_end, "ANSWER", 0.3)
    async with raw(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], duplicate_window=0.1)
        async with Broker(server.url, prefix="p") as broker:
            pull_source = broker.subscribe("a")
            ask, deaf = jetstream.JetStream.ask, [True]

            async def ask_and_hear_nothing(self: Any, subject: str, *rest: Any) -> Any:
                answer = await ask(self, subject, *rest)
                if subject.startswith("sse.") and deaf and deaf.pop():
                    return asyncio.get_running_loop().create_future()
                return answer

            monkeypatch.setattr(jetstream.JetStream, "ask", ask_and_hear_nothing)
            assert (await broker.publish("a", "once")).endswith("-1")
            await broker.publish("a", "end")
            assert await read(pull_source, "end") == ["once", "end"]


# What others write, and what the server refuses


async def test_what_is_no_event_of_a_broker_is_left_out(server: Nats, caplog: Any) -> None:
    async with Broker(server.url, prefix="p") as broker, raw(server) as js:
        pull_source = broker.subscribe("**")
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
        assert await read(pull_source, "good") == ["good"]
        assert broker.statistics().reconnects == 0
    assert len([record for record in caplog.records if "left out" in record.message]) == 8


async def test_what_is_too_large_is_refused_alone(tmp_path: Path) -> None:
    server = Nats(tmp_path, settings="max_payload: 2000")
    await asyncio.to_thread(server.start)
    try:
        async with Broker(server.url, prefix="p") as broker, raw(server) as js:
            pull_source = broker.subscribe("a")
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
            found = await read(pull_source, "end")
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


async def test_nobody_answers(tmp_path: Path) -> None:
    server = Nats(tmp_path)
    with pytest.raises(BrokerError, match=r"cannot connect to nats://127\.0\.0\.1:"):
        await Broker(server.url).open(object())


async def test_a_stream_that_cannot_be_made(server: Nats) -> None:
    async with raw(server) as js:
        await js.add_stream(name="other", subjects=["sse.>"])
        with pytest.raises(BrokerError, match=r"does not make the stream SSE_p: .*overlap"):
            await Broker(server.url, prefix="p").open(object())


async def test_passwords_and_several_servers(tmp_path: Path) -> None:
    server = Nats(tmp_path)
    server.login = "me:secret"
    await asyncio.to_thread(server.start)
    try:
        place, dead = f"127.0.0.1:{server.port}", "127.0.0.1:1"
        for _ in range(4):
            async with Broker(f"nats://me:secret@{dead},{place}") as broker:
                await broker.publish("a", "x")
                assert "secret" not in back_end_of(broker).url
        with pytest.raises(BrokerError, match=r"(?i)authorization"):
            await Broker(f"nats://me:wrong@{place}").open(object())
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
async def test_urls(url: str, servers: list[str], shown: list[str]) -> None:
    assert servers_of(url) == servers
    assert [shown_server(server) for server in servers] == shown


async def test_a_url_without_a_server() -> None:
    with pytest.raises(ValueError, match="names no server"):
        Broker("nats://")


# Runs


async def test_a_run_is_that_of_one_process(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:
        first, second = back_end_of(one), back_end_of(two)
        assert await second.find("r") is None
        await one.publish("other", "x")
        results = await asyncio.gather(*(back.lease("r", 100, 60, again=True, over=-1) for back in (first, second) * 3))
        assert sum(new for _, new in results) == 1
        lease = results[0][0]
        assert {each.holder for each, _ in results} == {lease.holder}
        assert (lease.start, lease.epoch, lease.outcome) == (1, one._dispatcher.log.epoch, "")
        owner, other = (first, second) if lease.holder == first._holder else (second, first)
        assert await owner.renew("r", lease)
        assert not await other.renew("r", lease)
        found = await other.find("r")
        assert found == lease

        ended = await owner.publish(Publication("r", ServerSentEvent("x"), end="finished", ttl=60))
        found = await other.find("r")
        assert found is not None
        assert (found.outcome, found.final) == ("finished", int(ended.partition("-")[2]))
        assert (await other.lease("r", 100, 60, again=False, over=-1)) == (found, False)
        lease, new = await other.lease("r", 100, 60, again=True, over=-1)
        assert new
        assert (lease.holder, lease.start) == (other._holder, found.final)

        monkeypatch.setattr(nats_runs, "_LEASE", -1)
        assert await owner.find("r") is None
        lease, new = await owner.lease("r", 100, 60, again=False, over=-1)
        assert new
        assert lease.holder == owner._holder
        assert await other.renew("r", lease)  # its time is over: another process takes it, to end it
        monkeypatch.undo()
        assert not await owner.renew("r", lease)


async def test_who_has_got_no_answer_to_a_claim_has_it_all_the_same(server: Nats, monkeypatch: Any) -> None:
    async with Broker(server.url) as broker:
        back = back_end_of(broker)
        write, failing = back._runs.write, [True]

        async def write_and_fail(*arguments: Any) -> bool:
            written = await write(*arguments)
            if failing.pop():
                raise TimeoutError
            return written

        monkeypatch.setattr(back._runs, "write", write_and_fail)
        lease, new = await back.lease("r", 100, 60, again=False, over=-1)
        assert new
        assert lease.holder == back._holder


async def test_a_run_that_ends_while_it_is_renewed_has_ended(server: Nats) -> None:
    async with Broker(server.url) as one, Broker(server.url) as two:
        back = back_end_of(one)
        for number in range(5):
            name = f"r{number}"
            lease, _ = await back.lease(name, 100, 60, again=False, over=-1)
            end = Publication(name, ServerSentEvent("x"), end="finished", ttl=60)
            await asyncio.gather(*(back.renew(name, lease) for _ in range(5)), back.publish(end))
            found = await back_end_of(two).find(name)
            assert found is not None
            assert found.outcome == "finished"


async def test_a_run_is_read_and_cancelled_from_another_process(server: Nats) -> None:
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


async def said_already(_name: str, _lease: RunLease) -> bool:
    return True


@pytest.mark.parametrize("joins", [False, True])
async def test_a_run_whose_beginning_went_with_the_stream_says_so(
    server: Nats, monkeypatch: pytest.MonkeyPatch, *, joins: bool
) -> None:
    """Runs are in a stream of their own, which tells of it as before until its process has looked after it again."""
    release = asyncio.Event()

    async def source() -> AsyncIterator[str]:
        yield "before"
        await release.wait()
        yield "after"

    async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two, raw(server) as js:
        run = await one.run("r", source())
        assert await read(run.subscribe(), "before") == ["before"]
        monkeypatch.setattr(back_end_of(one), "renew", said_already)
        await js.delete_stream("SSE_p")
        await two.publish("a", "x")
        await eventually(lambda: one.statistics().restarts == two.statistics().restarts == 1)
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


async def test_a_run_that_ended_in_a_stream_that_is_gone_can_be_begun_again(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two, raw(server) as js:
        run = await one.run("r", ["before"])
        async with asyncio.timeout(20):
            assert await run.wait() == "finished"
        assert await two.find_run("r") is not None
        await js.delete_stream("SSE_p")
        await two.publish("a", "x")
        await eventually(lambda: two.statistics().restarts == 1)
        assert await two.find_run("r") is None
        again = await two.run("r", ["again"], join=True)
        assert await read(again.subscribe(), "again") == ["again"]


async def test_the_end_of_a_run_that_went_with_the_stream_is_none_of_the_next_one(server: Nats) -> None:
    """Who reads it would wait for that number."""
    async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two, raw(server) as js:
        back = back_end_of(one)
        for _ in range(5):
            await one.publish("a", "x")
        await back.lease("r", 100, 60, again=False, over=-1)
        await js.delete_stream("SSE_p")
        await eventually(lambda: one.statistics().restarts == 1)
        await back._end_run(Publication("r", ServerSentEvent("x"), end="finished", ttl=60), 6)
        found = await back_end_of(two).find("r")
        assert found is not None
        assert (found.outcome, found.whole) == ("", False)


async def test_a_run_is_looked_for_again_where_the_stream_is_gone_a_second_time(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing() -> None:
        """The stream has gone behind it."""

    async with Broker(server.url, prefix="p") as one, raw(server) as js:
        back = back_end_of(one)
        await back.lease("r", 100, 60, again=False, over=-1)
        await js.delete_stream("SSE_p")
        await eventually(lambda: one.statistics().restarts == 1)
        monkeypatch.setattr(back, "_sync", nothing)
        await js.delete_stream("SSE_p")
        found = await back.find("r")
        assert found is not None
        assert not found.whole
