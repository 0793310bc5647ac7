"""The backend on NATS when deliveries are lost, streams change while they are read, and leases cannot be written."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("nats")

import nats
import nats.js.errors
from backend_helpers import endless, reset_reason, two_parts, wait_until
from backend_servers import TIMEOUT_S, Nats

from asgi_sse import Broker, BrokerError, HTTPError, ServerSentEvent
from asgi_sse.broker.backends import jetstream
from asgi_sse.broker.backends import nats as nats_backend
from asgi_sse.broker.backends.base import Publication
from asgi_sse.broker.backends.jetstream import Consumer, JetStream
from asgi_sse.broker.backends.nats import NatsBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from nats.aio.msg import Msg

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


async def limit_messages(js: Any, stream: str, limit: int) -> None:
    """Let `stream` take no message of more bytes. Old clients do not know all options, and would reset the others."""
    info = await js._api_request(f"$JS.API.STREAM.INFO.{stream}")
    request = json.dumps({**info["config"], "max_msg_size": limit}).encode()
    await js._api_request(f"$JS.API.STREAM.UPDATE.{stream}", request)


def backend_of(broker: Broker) -> NatsBackend:
    found = broker._backend
    assert isinstance(found, NatsBackend)
    return found


async def read(subscription: Subscription, until: str) -> list[str]:
    """Return the data of the events up to `until`. A reset is "reset" and its reason."""
    found: list[str] = []
    async with asyncio.timeout(TIMEOUT_S):
        while not found or found[-1] != until:
            event = await anext(subscription)
            found.append(f"reset {reset_reason(event)}" if event.event == "reset" else str(event.data))
    return found


def before_consuming(monkeypatch: pytest.MonkeyPatch, step: Callable[[], Awaitable[Any]]) -> None:
    """Call `step` once, when the next consumer is about to be created."""
    consume = JetStream.consume

    async def step_and_consume(self: JetStream, stream: str, start: int) -> Consumer:
        monkeypatch.setattr(JetStream, "consume", consume)
        await step()
        return await consume(self, stream, start)

    monkeypatch.setattr(JetStream, "consume", step_and_consume)


def drop_deliveries(monkeypatch: pytest.MonkeyPatch, drops: Callable[[Msg], bool]) -> list[str]:
    """Lose the messages on the way from the server for which `drops` is true; return the list of their subjects."""
    on_message, dropped = Consumer.on_message, []

    async def drop_or_receive(self: Consumer, message: Msg) -> None:
        if drops(message):
            dropped.append(message.subject)
        else:
            await on_message(self, message)

    monkeypatch.setattr(Consumer, "on_message", drop_or_receive)
    return dropped


# Lost deliveries


@pytest.mark.parametrize("lost", [{"1"}, {"3"}, {"1", "2", "3"}])
async def test_lost_deliveries_are_delivered_again(
    server: Nats, monkeypatch: pytest.MonkeyPatch, lost: set[str]
) -> None:
    """The next delivery shows the loss, or the next heartbeat if the last deliveries were lost."""
    left = set(lost)

    def drops(message: Msg) -> bool:
        text = json.loads(message.data)["data"] if message.data else ""
        if text in left:
            left.discard(text)
            return True
        return False

    dropped = drop_deliveries(monkeypatch, drops)
    async with Broker(server.url, prefix="p") as broker:
        subscription = broker.subscribe("a")
        for number in range(4):
            await broker.publish("a", str(number))
        assert await read(subscription, "3") == ["0", "1", "2", "3"]
        assert len(dropped) == len(lost)
        assert (broker.statistics().reconnects, broker.statistics().restarts) == (0, 0)


async def test_lost_last_delivery_is_noticed_before_the_next_heartbeat(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checks in a row find an event on the server that was not delivered."""
    monkeypatch.setattr(nats_backend, "_CHECK_S", 0)
    monkeypatch.setattr(jetstream, "HEARTBEAT_S", 1000)
    broker = Broker(server.url, prefix="p")
    lost: list[Consumer] = []

    def drops(message: Msg) -> bool:
        consumer = backend_of(broker)._consumer
        if message.data != b'{"data":"1"}' or consumer is None or (lost and consumer not in lost):
            return False
        lost.append(consumer)
        return True

    def wake_and_look() -> bool:
        lost[0].wake()
        return backend_of(broker)._consumer is not lost[0]

    drop_deliveries(monkeypatch, drops)
    async with broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        assert await read(subscription, "0") == ["0"]
        await broker.publish("a", "1")
        await wait_until(lambda: bool(lost))
        await wait_until(wake_and_look)
        assert await read(subscription, "1") == ["1"]
        assert (broker.statistics().reconnects, broker.statistics().restarts) == (0, 0)


async def test_silent_consumer_is_replaced(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither events nor heartbeats arrive, although the connection works."""
    monkeypatch.setattr(nats_backend, "_CHECK_S", 1000)
    monkeypatch.setattr(nats_backend, "_SILENCE_S", 0.5)
    monkeypatch.setattr(jetstream, "HEARTBEAT_S", 0.2)
    broker = Broker(server.url, prefix="p")
    silent: list[Consumer] = []
    drop_deliveries(monkeypatch, lambda _: backend_of(broker)._consumer in silent)
    async with broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        assert await read(subscription, "0") == ["0"]
        consumer = backend_of(broker)._consumer
        assert consumer is not None
        silent.append(consumer)
        await broker.publish("a", "1")
        assert await read(subscription, "1") == ["1"]
        assert (broker.statistics().reconnects, broker.statistics().restarts) == (0, 0)


async def test_consumer_that_the_server_ends_is_replaced(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        assert await read(subscription, "0") == ["0"]
        (consumer,) = await js.consumers_info("SSE_p")
        first = backend_of(broker)._consumer
        await js._nc.publish(consumer.config.deliver_subject, b"", headers={"Status": "409", "Description": "Ended"})
        await wait_until(lambda: backend_of(broker)._consumer not in {first, None})
        await broker.publish("a", "1")
        assert await read(subscription, "1") == ["1"]
        assert (broker.statistics().reconnects, broker.statistics().restarts) == (0, 0)


async def test_flow_control_of_the_server_is_answered(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    replied: list[str] = []
    reply = JetStream.reply

    async def note_and_reply(self: JetStream, subject: str) -> None:
        replied.append(subject)
        await reply(self, subject)

    async with Broker(server.url, prefix="p") as one:
        first = await one.publish("a", "0")
        await asyncio.gather(*(one.publish("a", "x" * 5000) for _ in range(500)), one.publish("a", "end"))
        monkeypatch.setattr(JetStream, "reply", note_and_reply)
        async with Broker(server.url, prefix="p") as two:
            assert len(await read(two.subscribe("a", last_event_id=first), "end")) == 501
    assert {subject.startswith("$JS.FC.") for subject in replied} == {True}


# Streams that change while they are read


async def test_event_of_another_subject_is_skipped_and_logged(server: Nats, caplog: pytest.LogCaptureFixture) -> None:
    async with jetstream_client(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>", "others.>"])
        async with Broker(server.url, prefix="p") as broker:
            subscription = broker.subscribe("**")
            await js.publish("others.x", b'{"data":"x"}')
            await broker.publish("a", "y")
            assert await read(subscription, "y") == ["y"]
    (record,) = [record for record in caplog.records if record.getMessage().startswith("skipped invalid event")]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "subject must begin with sse.p., got 'others.x'"


async def test_events_that_the_limits_drop_before_they_are_delivered_cause_a_reset(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with jetstream_client(server) as js:
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=5)
        async with Broker(server.url, prefix="p") as broker:
            subscription = broker.subscribe("a")
            await broker.publish("a", "first")
            assert await read(subscription, "first") == ["first"]

            async def publish_many() -> None:
                for number in range(10):
                    await js.publish("sse.p.a", json.dumps({"data": str(number)}).encode())

            before_consuming(monkeypatch, publish_many)
            backend_of(broker)._consumer.sequence = 1000  # type: ignore[union-attr]
            await broker.publish("a", "dropped too")
            assert await read(subscription, "9") == ["reset expired", "5", "6", "7", "8", "9"]
            assert (broker.statistics().reconnects, broker.statistics().restarts) == (0, 1)


async def test_stream_that_is_replaced_before_it_is_followed_begins_a_new_epoch(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        await broker.publish("a", "first")
        assert await read(subscription, "first") == ["first"]

        async def replace_stream() -> None:
            await js.delete_stream("SSE_p")
            await js.add_stream(name="SSE_p", subjects=["sse.p.>"])
            for number in range(5):
                await js.publish("sse.p.a", json.dumps({"data": str(number)}).encode())
            for number in (2, 3):
                await js.delete_msg("SSE_p", number)

        before_consuming(monkeypatch, replace_stream)
        backend_of(broker)._consumer.sequence = 1000  # type: ignore[union-attr]
        await broker.publish("a", "lost")
        assert await read(subscription, "4") == ["reset epoch", "0", "3", "4"]
        assert broker.statistics().restarts == 1


async def test_publisher_notices_that_the_stream_was_replaced(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id is of the new stream, and readers check the stream at once."""
    monkeypatch.setattr(nats_backend, "_CHECK_S", 1000)
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        old = [await broker.publish("a", str(number)) for number in range(3)]
        assert await read(subscription, "2") == ["0", "1", "2"]
        await js.delete_stream("SSE_p")
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"])
        new = await broker.publish("a", "new")
        assert new.endswith("-1")
        assert new.partition("-")[0] != old[0].partition("-")[0]
        assert await read(subscription, "new") == ["reset epoch", "new"]
        assert subscription.last_event_id == new


async def test_id_of_a_stream_that_this_process_does_not_know_yet_is_resumed(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_backend, "_CHECK_S", 1000)
    async with Broker(server.url, prefix="p") as one, jetstream_client(server) as js:
        await one.publish("a", "old")
        await backend_of(one).sync()
        await js.delete_stream("SSE_p")
        await js.add_stream(name="SSE_p", subjects=["sse.p.>"])
        for number in range(2):
            await js.publish("sse.p.a", json.dumps({"data": str(number)}).encode())
        async with Broker(server.url, prefix="p") as two:
            epoch = two.statistics().last_event_id.partition("-")[0]
        assert await read(one.subscribe("a", last_event_id=f"{epoch}-1"), "1") == ["1"]
        assert one.statistics().restarts == 1


async def test_stream_that_cannot_be_created_at_once_is_created_later(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster that elects a leader refuses for a moment."""
    create, errors = JetStream.create_stream, [nats.js.errors.ServiceUnavailableError(code=503)]

    async def fail_and_create(self: JetStream, config: dict[str, Any]) -> None:
        if errors:
            raise errors.pop()
        await create(self, config)

    async with Broker(server.url, prefix="p", publish_timeout=TIMEOUT_S) as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        assert await read(subscription, "0") == ["0"]
        monkeypatch.setattr(JetStream, "create_stream", fail_and_create)
        await js.delete_stream("SSE_p")
        await broker.publish("a", "1")
        assert await read(subscription, "1") == ["reset epoch", "1"]
        assert errors == []


async def test_epoch_that_several_processes_replace_is_replaced_once(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker:
        await broker.publish("a", "x")
        connection = backend_of(broker)._jetstream
        epochs = [(await connection.stream_info("SSE_p")).epoch]
        for _ in range(2):
            await connection.begin_epoch("SSE_p", instead_of=epochs[0])
            epochs.append((await connection.stream_info("SSE_p")).epoch)
        assert epochs[0] != epochs[1] == epochs[2]


async def test_message_that_was_read_last_and_deleted_causes_no_reset(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        subscription = broker.subscribe("a")
        for number in range(4):
            await broker.publish("a", str(number))
        assert await read(subscription, "3") == ["0", "1", "2", "3"]
        for number in (3, 4):
            await js.delete_msg("SSE_p", number)
        await backend_of(broker)._jetstream.close()
        await wait_until(lambda: broker.statistics().reconnects == 1)
        await broker.publish("a", "4")
        assert await read(subscription, "4") == ["4"]
        assert broker.statistics().restarts == 0


async def test_new_process_opens_although_the_newest_messages_were_deleted(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_backend, "_MAX_EVENTS", 2)
    async with jetstream_client(server) as js:
        async with Broker(server.url, prefix="p") as one:
            ids = [await one.publish("a", str(number)) for number in range(5)]
        for number in (4, 5):
            await js.delete_msg("SSE_p", number)
        async with Broker(server.url, prefix="p") as two:
            subscription = two.subscribe("a", last_event_id=ids[-1])
            assert await two.publish("a", "5") == f"{ids[0].partition('-')[0]}-6"
            assert await read(subscription, "5") == ["5"]


@pytest.mark.parametrize("fault", ["connection", "delivery", "stream"])
async def test_open_fails_if_a_fault_interrupts_the_first_reading(
    server: Nats, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async with Broker(server.url, prefix="p") as one:
        for number in range(3):
            await one.publish("a", str(number))
    two = Broker(server.url, prefix="p")
    consume = JetStream.consume

    async def consume_and_fail(self: JetStream, stream: str, start: int) -> Consumer:
        consumer = await consume(self, stream, start)
        if fault == "connection":
            await self.close()
        elif fault == "stream":
            await wait_until(lambda: len(consumer.messages) == 3)
            consumer.messages.clear()
            consumer.pending = 0
            await self.request(f"$JS.API.STREAM.DELETE.{stream}", {})
        return consumer

    with monkeypatch.context() as patch:
        if fault == "delivery":
            drop_deliveries(patch, lambda message: message.data == b'{"data":"1"}')
        else:
            patch.setattr(JetStream, "consume", consume_and_fail)
        error = {
            "connection": r"nats: connection closed",
            "delivery": "deliveries were lost while the stream was read for the first time",
            "stream": "the stream was replaced while it was read for the first time",
        }[fault]
        with pytest.raises(BrokerError, match=rf"^cannot connect to {server.url}: {error}"):
            await two.open("me")
    assert two.statistics().state == "closed"
    async with two:
        assert await two.publish("a", "x")


async def test_stream_that_another_process_creates_at_the_same_time_is_used_as_it_is(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = JetStream.create_stream
    async with jetstream_client(server) as js:

        async def create_second(self: JetStream, config: dict[str, Any]) -> None:
            if config["name"] == "SSE_p":
                await js.add_stream(name="SSE_p", subjects=["sse.p.>"], max_msgs=7)
            await create(self, config)

        monkeypatch.setattr(JetStream, "create_stream", create_second)
        async with Broker(server.url, prefix="p") as broker:
            assert (await broker.publish("a", "x")).endswith("-1")
            assert (await js.stream_info("SSE_p")).config.max_msgs == 7


# Connections


async def test_requests_are_asked_to_reconnect_while_the_server_is_down(server: Nats) -> None:
    async with Broker(server.url, prefix="p", publish_timeout=0.3) as broker:
        await asyncio.to_thread(server.kill)
        await wait_until(lambda: broker.statistics().state == "disconnected")
        with pytest.raises(BrokerError, match=rf"{server.url} did not answer within 0\.3 s \(.+\)") as error:
            await broker.find_run("r")
        assert isinstance(error.value, HTTPError)
        with pytest.raises(BrokerError, match=r"within 0\.3 s: nats://.* is disconnected"):
            await broker.publish("a", "x")


async def test_cancelled_open_leaves_no_connection(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    connected, connections = asyncio.Event(), []
    open_connection = JetStream._open

    async def open_and_wait(self: JetStream, url: str) -> None:
        connections.append(self)
        await open_connection(self, url)
        connected.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(JetStream, "_open", open_and_wait)
    broker = Broker(server.url, prefix="p")
    opening = asyncio.ensure_future(broker.open("me"))
    await asyncio.wait_for(connected.wait(), TIMEOUT_S)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert [connection.is_lost for connection in connections] == [True]
    assert broker.statistics().state == "closed"


async def test_error_while_a_connection_is_closed_is_logged_at_debug(
    server: Nats, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")
    broker = Broker(server.url, prefix="p")
    await broker.open("me")
    client = backend_of(broker)._jetstream._client
    close = client.close

    async def close_and_fail() -> None:
        await close()
        raise OSError("broken pipe")

    monkeypatch.setattr(client, "close", close_and_fail)
    await broker.close("me")
    assert broker.statistics().state == "closed"
    assert "closing the connection failed: broken pipe" in caplog.messages


async def test_request_that_cannot_be_sent_is_not_waited_for(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Broker(server.url, prefix="p", publish_timeout=None) as broker:
        connection = backend_of(broker)._jetstream
        publish, errors = connection._client.publish, [ConnectionResetError("reset by the server")]

        async def fail_and_publish(*arguments: Any, **options: Any) -> None:
            if errors:
                raise errors.pop()
            await publish(*arguments, **options)

        monkeypatch.setattr(connection._client, "publish", fail_and_publish)
        subscription = broker.subscribe("a")
        async with asyncio.timeout(TIMEOUT_S):
            assert (await broker.publish("a", "once")).endswith("-1")
        await broker.publish("a", "end")
        assert await read(subscription, "end") == ["once", "end"]
        assert errors == []


# Leases of runs


async def test_lease_is_released_if_the_caller_leaves_after_it_was_written(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two:
        backend = backend_of(one)
        write, written = backend._leases.write, asyncio.Event()

        async def write_and_wait(*arguments: Any) -> bool:
            answer = await write(*arguments)
            if not written.is_set():
                written.set()
                await asyncio.Event().wait()
            return answer

        monkeypatch.setattr(backend._leases, "write", write_and_wait)
        beginning = asyncio.ensure_future(one.run("r", endless()))
        await asyncio.wait_for(written.wait(), TIMEOUT_S)
        found = await two.find_run("r")
        assert found is not None
        assert found.outcome is None
        beginning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        async with asyncio.timeout(TIMEOUT_S):
            while (stored := await backend_of(two)._leases.get("r")) is None or not stored.lease.outcome:
                await asyncio.sleep(0.01)
        assert stored.lease.outcome == "cancelled"
        assert await two.find_run("new") is None
        assert one.runs.get("r") is None


async def test_run_works_in_a_bucket_whose_server_deletes_no_leases(server: Nats) -> None:
    """As servers before 2.11 do."""
    async with jetstream_client(server) as js:
        await js.add_stream(name="KV_SSE_p_runs", subjects=["$KV.SSE_p_runs.>"], max_msgs_per_subject=1)
        async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two:
            run = await one.run("r", ["x"])
            assert await asyncio.wait_for(run.wait(), TIMEOUT_S) == "finished"
            await wait_until(lambda: one.statistics().received == 2)
            found = await two.find_run("r")
            assert found is not None
            assert [event.data async for event in found.subscribe()] == ["x", '{"reason":"finished"}']
            message = await js.get_last_msg("KV_SSE_p_runs", "$KV.SSE_p_runs.>")
            assert "Nats-TTL" not in (message.headers or {})


async def test_run_ends_although_its_lease_is_gone(server: Nats) -> None:
    release = asyncio.Event()
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        run = await broker.run("r", two_parts(release))
        subscription = run.subscribe()
        assert await read(subscription, "before") == ["before"]
        await js.delete_stream("KV_SSE_p_runs")
        release.set()
        assert await read(subscription, '{"reason":"finished"}') == ["after", '{"reason":"finished"}']
        assert await asyncio.wait_for(run.wait(), TIMEOUT_S) == "finished"


async def test_run_ends_although_its_end_cannot_be_recorded(server: Nats, caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()
    async with Broker(server.url, prefix="p") as broker, jetstream_client(server) as js:
        run = await broker.run("r", two_parts(release))
        subscription = run.subscribe()
        assert await read(subscription, "before") == ["before"]
        await limit_messages(js, "KV_SSE_p_runs", 10)
        release.set()
        assert await read(subscription, '{"reason":"finished"}') == ["after", '{"reason":"finished"}']
        assert await asyncio.wait_for(run.wait(), TIMEOUT_S) == "finished"
        await wait_until(lambda: "could not be recorded" in caplog.text)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"the end of run r could not be recorded on {server.url}"
    assert (vars(record)["sse_run"], vars(record)["sse_backend"]) == ("r", server.url)


async def test_end_whose_record_was_not_acknowledged_is_recorded_again(
    server: Nats, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(server.url, prefix="p") as one, Broker(server.url, prefix="p") as two:
        write = backend_of(one)._leases.write
        failed: list[str] = []

        async def write_or_fail(name: str, lease: RunLease, token: str, revision: int) -> bool:
            if lease.outcome and not failed:
                failed.append(name)
                raise TimeoutError
            return await write(name, lease, token, revision)

        monkeypatch.setattr(backend_of(one)._leases, "write", write_or_fail)
        run = await one.run("r", ["x"])
        assert await asyncio.wait_for(run.wait(), TIMEOUT_S) == "finished"
        await one.publish("a", "after the batch of the end")
        assert failed == ["r"]
        found = await two.find_run("r")
        assert found is not None
        assert found.outcome == "finished"
        assert [event.data async for event in found.subscribe()] == ["x", '{"reason":"finished"}']
        assert (await two.publish("a", "x")).endswith("-4")  # the end is in the log once


async def test_end_of_an_earlier_run_is_not_recorded_for_a_later_one(server: Nats) -> None:
    async with Broker(server.url, prefix="p") as broker:
        for _ in range(3):
            await broker.publish("a", "x")
        backend = backend_of(broker)
        lease, _ = await backend.acquire_lease("r", 100, 60, replace_ended=False, ended_start=-1)
        assert lease.start == 3
        await backend._record_run_end(Publication("r", ServerSentEvent("x"), end="finished", ttl=60), 2)
        assert await backend.find_lease("r") == lease
        await backend._record_run_end(Publication("r", ServerSentEvent("x"), end="finished", ttl=60), 4)
        found = await backend.find_lease("r")
        assert found is not None
        assert (found.outcome, found.final) == ("finished", 4)


async def test_renewal_after_an_epoch_change_tells_others_that_the_run_lost_its_beginning(server: Nats) -> None:
    async with (
        Broker(server.url, prefix="p") as one,
        Broker(server.url, prefix="p") as two,
        jetstream_client(server) as js,
    ):
        run = await one.run("r", endless())
        assert await read(run.subscribe(), "first") == ["first"]
        await js.delete_stream("SSE_p")
        await wait_until(lambda: one.statistics().restarts == two.statistics().restarts == 1)
        epoch = one.statistics().last_event_id.partition("-")[0]
        async with asyncio.timeout(TIMEOUT_S):
            while (stored := await backend_of(two)._leases.get("r")) is None or stored.lease.epoch != epoch:
                await asyncio.sleep(0.01)
        assert (stored.lease.holder, stored.lease.whole) == (backend_of(one)._holder, False)
        run.cancel()
        assert await asyncio.wait_for(run.wait(), TIMEOUT_S) == "cancelled"
