"""``data_sender_callable`` of the drop-in for sse-starlette: a coroutine that runs beside the stream."""

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from drop_in_sources import body_of, forever, items

from asgi_sse import StreamRegistry
from asgi_sse.adapters.sse_starlette import EventSourceResponse
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def feed(channel: Any, *values: Any, then: Callable[[], Any] = lambda: None) -> None:
    async with channel:
        for value in values:
            await channel.send(value)
        then()


async def test_sender_feeds_the_stream_and_may_end_first() -> None:
    send, receive = anyio.create_memory_object_stream[Any](10)
    response = EventSourceResponse(receive, data_sender_callable=partial(feed, send, "a", "b"))
    assert await body_of(response) == b"data: a\r\n\r\ndata: b\r\n\r\n"


async def test_sender_ends_with_the_stream() -> None:
    seen: list[str] = []

    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("end of the sender")

    await body_of(EventSourceResponse(items("a"), data_sender_callable=sender))
    assert seen == ["end of the sender"]


async def test_error_of_the_sender_fails_the_stream_after_its_events() -> None:
    send, receive = anyio.create_memory_object_stream[Any]()

    def fail() -> None:
        raise ZeroDivisionError("the sender failed")

    keep = receive.clone()  # keeps the stream open when the sender ends
    response = EventSourceResponse(keep, data_sender_callable=partial(feed, send.clone(), "a", "b", then=fail))
    stream: Any = None
    with pytest.raises(ZeroDivisionError, match="the sender failed"):
        async with open_stream(response) as stream:
            assert await stream.read() == b"data: a\r\n\r\n"
            assert await stream.read() == b"data: b\r\n\r\n"
            await stream.read()
    assert not stream.complete
    send.close()
    receive.close()


async def test_sender_does_not_start_while_the_server_stops() -> None:
    seen: list[str] = []

    async def sender() -> None:
        seen.append("sender")

    registry = StreamRegistry()
    registry.begin_drain()
    response = EventSourceResponse(forever(), data_sender_callable=sender, registry=registry)
    with anyio.fail_after(5):
        body = await body_of(response)
    assert body.startswith(b"retry: ")
    assert seen == []


@pytest.mark.parametrize("waits", ["for its client", "for its sender"])
async def test_sender_is_not_an_error_when_the_client_leaves(waits: str) -> None:
    ends: list[str] = []
    send, receive = anyio.create_memory_object_stream[Any]()

    async def sender() -> None:
        try:
            async with send:
                for number in range(1000):
                    await send.send(number)
        finally:
            ends.append("sender")

    async def source() -> AsyncIterator[Any]:
        try:
            async with receive:
                async for item in receive:
                    yield item
                    if waits == "for its sender":
                        await anyio.sleep(1)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.1)
            ends.append("source")

    async with open_stream(EventSourceResponse(source(), data_sender_callable=sender), capacity=1) as stream:
        await stream.read()
        await anyio.sleep(0.5)
        await stream.disconnect()
    assert sorted(ends) == ["sender", "source"]


async def test_cleanup_error_of_the_sender_is_raised() -> None:
    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_stream(EventSourceResponse(forever(), data_sender_callable=sender)) as stream:
            await stream.read()
            await stream.disconnect()


async def test_sender_that_finds_its_stream_closed_is_not_an_error_in_a_task_group() -> None:
    send, receive = anyio.create_memory_object_stream[Any]()

    async def put() -> None:
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.1)
            await send.send("too late")

    async def sender() -> None:
        async with send, anyio.create_task_group() as tasks:
            tasks.start_soon(put)

    async with open_stream(EventSourceResponse(receive, data_sender_callable=sender)) as stream:
        await stream.disconnect()


async def test_drain_report_counts_each_stream_once() -> None:
    """The source ends by itself in its grace period, while its sender ignores its cancellation."""
    event, left, registry = anyio.Event(), anyio.Event(), StreamRegistry()

    async def source() -> AsyncIterator[str]:
        yield "first"
        await event.wait()
        yield "bye"

    async def sender() -> None:
        while not left.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await left.wait()

    response = EventSourceResponse(
        source(), data_sender_callable=sender, registry=registry, cleanup_timeout=0.2, shutdown_event=event,
        shutdown_grace_period=3,
    )  # fmt: skip
    async with open_stream(response) as stream:
        await stream.read()
        report = await registry.drain(5)
    assert (report.finished, report.closed, report.cancelled, report.abandoned) == (0, 0, 0, 1)
    left.set()
    await anyio.sleep(1)


async def test_sender_that_does_not_end_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    left = anyio.Event()

    async def sender() -> None:
        while not left.is_set():
            with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                await left.wait()

    response = EventSourceResponse(forever(), data_sender_callable=sender, cleanup_timeout=1)
    async with open_stream(response) as stream:
        await stream.read()
        await stream.disconnect()
    assert "was not cleaned up within 1 s" in caplog.text
    left.set()
    await anyio.sleep(1)


async def test_source_with_a_sender_behaves_like_any_other() -> None:
    seen: list[str] = []

    async def sender() -> None:
        await anyio.sleep_forever()

    async def source() -> AsyncIterator[Any]:
        try:
            yield {"data": "a", "id": "1\n2"}
        except ValueError:
            seen.append("refused")
        try:
            yield "b"
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            seen.append("cancelled")
            raise

    async with open_stream(EventSourceResponse(source(), data_sender_callable=sender)) as stream:
        assert await stream.read() == b"data: b\r\n\r\n"
        await stream.disconnect()
    assert seen == ["refused", "cancelled"]
    with pytest.raises(TypeError, match="put it in a list"):
        await body_of(EventSourceResponse("text", data_sender_callable=sender))


async def test_failing_source_stops_its_sender() -> None:
    seen: list[str] = []

    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("end of the sender")

    async def failing() -> AsyncIterator[str]:
        yield "a"
        await anyio.sleep(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body_of(EventSourceResponse(failing(), data_sender_callable=sender))
    assert seen == ["end of the sender"]
