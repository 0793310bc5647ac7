"""What all backends on a server share: opening, closing, queues and queries. The server here is Valkey."""

import asyncio
import logging
import socket
from typing import Any

import anyio
import pytest
import redis.exceptions
from backend_helpers import data, endless, take, wait_until
from backend_servers import TIMEOUT_S, Valkey

import asgi_sse.broker
from asgi_sse import Broker, BrokerError, HTTPError, ServerSentEvent
from asgi_sse.broker.backends.base import Publication, RunLease
from asgi_sse.broker.backends.redis import RedisBackend

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
    pytest.mark.usefixtures("short_block"),
]


def backend_of(broker: Broker) -> RedisBackend:
    found = broker._backend
    assert isinstance(found, RedisBackend)
    return found


class Gate:
    """Holds the calls of a method back until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.open = asyncio.Event(), asyncio.Event()
        self.calls = 0
        method = getattr(owner, name)

        async def wait_and_call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.reached.set()
            await self.open.wait()
            return await method(*arguments, **options)

        monkeypatch.setattr(owner, name, wait_and_call)


# Opening


def test_broker_on_a_server_needs_asyncio(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    with pytest.raises(BrokerError, match=rf"the broker on {valkey.url} needs asyncio, which its client is written"):
        anyio.run(broker.open, "me", backend="trio")
    assert broker.statistics().state == "closed"


async def test_open_waits_while_the_server_loads_its_data(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    backend = backend_of(broker)
    catch_up, states = backend._catch_up, []

    async def load_and_catch_up(*, first: bool) -> None:
        states.append(broker.statistics().state)
        if len(states) < 3:
            raise redis.exceptions.BusyLoadingError("LOADING the dataset is in memory")
        await catch_up(first=first)

    monkeypatch.setattr(backend, "_catch_up", load_and_catch_up)
    async with broker:
        assert states == ["connecting"] * 3
        assert broker.statistics().state == "connected"
        assert (await broker.publish("a", "x")).endswith("-1")


async def test_publishing_without_an_event_loop_fails_in_time_if_the_server_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(BrokerError, match=rf"not published: {url} did not answer within 0\.2 s"):
            await asyncio.to_thread(asgi_sse.broker.publish, url, "a", "x", timeout=0.2)


async def test_run_needs_an_open_broker(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    with pytest.raises(BrokerError, match=r"is not open; pass it to the app as broker=\.\.\., or use 'async with"):
        await broker.run("r", ["x"])
    async with broker:  # nothing is left of the attempt
        assert await (await broker.run("r", ["x"])).wait() == "finished"


# Closing


def test_broker_whose_event_loop_is_gone_can_be_closed_and_opened_again(valkey: Valkey, prefix: str) -> None:
    broker = Broker(valkey.url, prefix=prefix)

    async def open_and_leave() -> str:
        await broker.open("me")
        event_id = await broker.publish("a", "x")
        for client in backend_of(broker)._clients:  # the sockets would be left to the garbage collector
            await client.aclose()
        return event_id

    async def open_again() -> None:
        await broker.close("me")
        assert broker.statistics().state == "closed"
        async with broker:
            assert (await broker.publish("a", "y")).endswith("-2")
            assert data(await take(broker.subscribe("a", last_event_id=first), 1)) == ["y"]

    first = asyncio.run(open_and_leave())
    with pytest.raises(BrokerError, match="is not open"):
        broker.subscribe("a")
    asyncio.run(open_again())


async def test_error_while_connections_are_closed_is_logged_at_debug(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")
    broker = Broker(valkey.url, prefix=prefix)
    await broker.open("me")
    (client,) = backend_of(broker)._clients
    close = client.aclose

    async def close_and_fail() -> None:
        await close()
        raise OSError("broken pipe")

    monkeypatch.setattr(client, "aclose", close_and_fail)
    await broker.close("me")
    assert broker.statistics().state == "closed"
    assert f"closing {valkey.url} failed: broken pipe" in caplog.messages


async def test_close_ends_a_subscriber_that_waits_for_its_position(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an id from another process, and this process has not read that event yet."""
    async with Broker(valkey.url, prefix=prefix) as one:
        two = Broker(valkey.url, prefix=prefix)
        await two.open("me")
        gate = Gate(monkeypatch, backend_of(two)._client, "xread")
        await gate.reached.wait()
        event_id = await one.publish("a", "x")
        waiting = asyncio.ensure_future(backend_of(two).sync())
        await asyncio.sleep(0)
        subscription = two.subscribe("a", last_event_id=event_id)
        resolving = asyncio.ensure_future(anext(subscription))
        await wait_until(lambda: two.statistics().subscriptions == 1)
        await wait_until(lambda: backend_of(two)._seen_end[1] == 1)
        await two.close("me")
        for task in (waiting, resolving):
            with pytest.raises(BrokerError, match=rf"the broker on {valkey.url} was closed"):
                await asyncio.wait_for(task, TIMEOUT_S)


async def test_close_that_is_cancelled_leaves_no_task(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    await broker.open("me")
    backend = backend_of(broker)
    gate = Gate(monkeypatch, backend, "_send")
    publishing = asyncio.ensure_future(broker.publish("a", "x"))
    await gate.reached.wait()
    tasks = list(backend._tasks)
    closing = asyncio.ensure_future(broker.close("me"))
    await wait_until(lambda: not backend._tasks)  # now it waits for the event to be acknowledged
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(BrokerError, match="was closed; the event may have been published"):
        await publishing
    await asyncio.wait(tasks, timeout=TIMEOUT_S)
    assert [task.cancelled() for task in tasks] == [True, True]
    assert broker.statistics().state == "closed"
    await backend._disconnect()


async def test_close_ends_a_query_that_is_repeated(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(valkey.url, prefix=prefix)
    await broker.open("me")
    backend = backend_of(broker)
    failed = asyncio.Event()

    async def fail(*_: object) -> bool:
        failed.set()
        raise ConnectionError

    monkeypatch.setattr(backend, "_renew_lease", fail)
    renewing = asyncio.ensure_future(backend.renew_lease("r", RunLease("me", "0", 0, 100, 60)))
    await failed.wait()
    await broker.close("me")
    with pytest.raises(BrokerError, match="was closed"):
        await asyncio.wait_for(renewing, TIMEOUT_S)


async def test_cancel_of_another_process_run_is_ignored_after_close(
    valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one:
        run = await one.run("r", endless())
        async with Broker(valkey.url, prefix=prefix) as two:
            found = await two.find_run("r")
            assert found is not None
        found.cancel()
        await one.publish("a", "x")
        assert (run.outcome, caplog.messages) == (None, [])
        run.cancel()
        assert await run.wait() == "cancelled"


async def test_request_to_cancel_that_comes_while_the_broker_closes_is_logged(
    valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one:
        run = await one.run("r", endless())
        two = Broker(valkey.url, prefix=prefix)
        await two.open("me")
        found = await two.find_run("r")
        assert found is not None
        closing = asyncio.ensure_future(two._backend.close())
        found.cancel()
        await closing
        await two.close("me")
        run.cancel()
    (record,) = [record for record in caplog.records if "was not published" in record.getMessage()]
    assert record.getMessage() == (
        f"an event of channel !control was not published: the broker on {valkey.url} was closed"
    )
    assert (vars(record)["sse_backend"], vars(record)["sse_channel"]) == (valkey.url, "!control")


# Publishing


async def test_event_that_was_never_sent_is_not_published_later(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix, publish_timeout=0.2) as broker:
        backend = backend_of(broker)
        gate = Gate(monkeypatch, backend, "_send")
        first = asyncio.ensure_future(backend.publish(Publication("a", ServerSentEvent("first")), wait=True))
        await gate.reached.wait()
        error = rf"the event was not published within 0\.2 s: {valkey.url} is connected$"
        with pytest.raises(BrokerError, match=error):
            await broker.publish("a", "never sent")
        gate.open.set()
        await first
        backend._timeout = TIMEOUT_S
        await broker.publish("a", "last")
        subscription = broker.subscribe("a", last_event_id=(await first).replace("-1", "-0"))
        assert data(await take(subscription, 2)) == ["first", "last"]


async def test_batch_that_a_later_one_overtook_is_refused(valkey: Valkey, prefix: str) -> None:
    """The server executed it late, on a connection that this process had given up."""
    async with Broker(valkey.url, prefix=prefix) as broker:
        await broker.publish("a", "0")
        with valkey.client() as client:
            client.hset(f"{{{prefix}}}:w:{backend_of(broker)._holder}", "attempt", 10**6)
        with pytest.raises(BrokerError, match="refused the event: a later batch of this process was published first"):
            await broker.publish("a", "1")
        with valkey.client() as client:
            assert client.xlen(f"{{{prefix}}}:log") == 1


# Reading and queries


async def test_error_of_the_reader_is_logged_and_the_reader_continues(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        assert data(await take(subscription, 1)) == ["0"]
        xread, errors = backend_of(broker)._client.xread, [redis.exceptions.ResponseError("NOPERM")]

        async def fail_and_read(*arguments: Any, **options: Any) -> Any:
            if errors:
                raise errors.pop()
            return await xread(*arguments, **options)

        monkeypatch.setattr(backend_of(broker)._client, "xread", fail_and_read)
        await broker.publish("a", "1")
        assert data(await take(subscription, 1)) == ["1"]
        await wait_until(lambda: broker.statistics().reconnects == 1)
        assert (broker.statistics().state, broker.statistics().restarts) == ("connected", 0)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.getMessage() == f"reading from {valkey.url} failed; trying again"
    assert record.exc_info is not None


async def test_channel_that_many_subscribers_resume_is_fetched_once(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Broker(valkey.url, prefix=prefix) as one:
        ids = [await one.publish(name, name) for name in "aab"]
        async with Broker(valkey.url, prefix=prefix) as cold:
            gate = Gate(monkeypatch, backend_of(cold), "_load_channels")
            readers = [
                asyncio.ensure_future(take(cold.subscribe(*names, last_event_id=ids[0]), number))
                for names, number in (("a", 1), ("a", 1), ("ab", 2))
            ]
            await wait_until(lambda: cold.statistics().subscriptions == 3)
            await gate.reached.wait()
            gate.open.set()
            assert [data(events) for events in await asyncio.gather(*readers)] == [["a"], ["a"], ["a", "b"]]
            assert gate.calls == 2  # one for a, and one for b


async def test_query_ends_in_time_although_its_cancellation_was_lost(
    valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it happens to redis-py on Python 3.11."""
    async with Broker(valkey.url, prefix=prefix, publish_timeout=0.2) as broker:
        calls: list[str] = []

        async def swallow_cancellation(name: str) -> RunLease | None:
            calls.append(name)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ConnectionError from None
            return None

        monkeypatch.setattr(backend_of(broker), "_fetch_lease", swallow_cancellation)
        with pytest.raises(BrokerError, match=rf"{valkey.url} did not answer within 0\.2 s$") as unavailable:
            await broker.find_run("r")
        assert isinstance(unavailable.value, HTTPError)
        assert calls == ["r"]
