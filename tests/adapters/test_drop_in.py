"""The drop-in for sse-starlette: what its own tests do not look at, or differently."""

import gc
import logging
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from starlette.background import BackgroundTask

import asgi_sse
from asgi_sse import SSEMiddleware, StreamRegistry
from asgi_sse.adapters.sse_starlette import (
    AppStatus,
    EventSourceEndpoint,
    EventSourceResponse,
    JSONServerSentEvent,
    SendTimeoutError,
    ServerSentEvent,
    ensure_bytes,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def as_at_the_start() -> Iterator[None]:
    yield
    AppStatus.should_exit = False
    AppStatus.original_handler = None
    AppStatus.enable_automatic_graceful_drain_mode()


async def items(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        yield value


async def forever(first: Any = "first", on_end: Callable[[], Any] = lambda: None) -> AsyncIterator[Any]:
    try:
        yield first
        await anyio.sleep_forever()
    finally:
        on_end()


async def body_of(response: Any, **request: Any) -> bytes:
    async with open_stream(response, **request) as stream:
        body = b""
        while chunk := await stream.read(timeout=100_000):
            body += chunk
        assert stream.complete
    return body


# Events


@pytest.mark.parametrize(
    ("fields", "encoded"),
    [
        ({"data": {"a": 1}}, b"data: {'a': 1}\r\n\r\n"),
        ({"data": True, "id": 7}, b"id: 7\r\ndata: True\r\n\r\n"),
        ({"data": "a\u2028b\nc\rd"}, "data: a\u2028b\r\ndata: c\r\ndata: d\r\n\r\n".encode()),
        ({"data": ""}, b"data: \r\n\r\n"),
        ({"event": "end"}, b"event: end\r\n\r\n"),
        ({"comment": "a\nb", "sep": "\n"}, b": a\n: b\n\n"),
        ({}, b"\r\n"),
    ],
)
def test_an_event_is_encoded_as_sse_starlette_does(fields: dict[str, Any], encoded: bytes) -> None:
    assert ServerSentEvent(**fields).encode() == encoded


@pytest.mark.parametrize(
    "fields",
    [{"id": "a\nid: b"}, {"event": "a\rdata: b"}, {"id": "a\0"}, {"data": "\ud800"}, {"retry": -1}, {"sep": "|"}],
)
def test_what_would_inject_or_is_ignored_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"line end|NUL|UTF-8|retry must .* got -1"):
        ServerSentEvent(**fields).encode()


def test_an_event_can_be_looked_at_and_changed() -> None:
    event = ServerSentEvent("a", event="b", id="c", retry=1, comment="d")
    event.data = "e"
    assert (event.data, event.event, event.id, event.retry, event.comment) == ("e", "b", "c", 1, "d")
    assert repr(event) == "ServerSentEvent(data='e', event='b', id='c', retry=1, comment='d')"


def test_json_events() -> None:
    assert JSONServerSentEvent({"a": "ä"}, event="b").encode() == 'event: b\r\ndata: {"a":"ä"}\r\n\r\n'.encode()
    assert JSONServerSentEvent(None, comment="c").encode() == b": c\r\n\r\n"
    with pytest.raises(ValueError, match="JSON"):
        JSONServerSentEvent(float("nan"))


def test_ensure_bytes_takes_anything() -> None:
    assert ensure_bytes(None, "\n") == b"data: None\n\n"
    assert ensure_bytes(bytearray(b"raw"), "\n") == b"raw"
    assert ensure_bytes(asgi_sse.ServerSentEvent("a"), "\r") == b"data: a\r\r"
    assert ensure_bytes(ServerSentEvent("a"), "\n") == b"data: a\r\n\r\n"  # an event's own line end counts


# What is sent


async def test_there_is_nothing_before_the_first_event() -> None:
    response = EventSourceResponse(items("a", {"data": 2, "event": "b"}, 3))
    assert await body_of(response) == b"data: a\r\n\r\nevent: b\r\ndata: 2\r\n\r\ndata: 3\r\n\r\n"


async def test_each_item_is_a_message_and_the_source_waits_for_it() -> None:
    asked = 0

    async def source() -> AsyncIterator[str]:
        nonlocal asked
        for _ in range(10):
            asked += 1
            yield "x"

    async with open_stream(EventSourceResponse(source()), capacity=2) as stream:
        await anyio.sleep(1)
        assert asked == 3  # two are with the server, which takes no third
        chunks = [await stream.read() for _ in range(10)]
        assert chunks == [b"data: x\r\n\r\n"] * 10
        assert await stream.read() == b""
        assert stream.complete


@pytest.mark.real_time
async def test_a_synchronous_source_waits_for_it_too() -> None:
    acknowledged: list[int] = []

    def jobs() -> Iterator[str]:
        for number in range(100):
            yield f"job {number}"
            acknowledged.append(number)

    async with open_stream(EventSourceResponse(jobs()), capacity=2) as stream:
        for number in range(10):
            assert (await stream.receive(10)).data == f"job {number}"
        await anyio.sleep(0.1)
        assert 9 <= len(acknowledged) <= 12  # up to two are with the server
        await stream.disconnect()
    assert len(acknowledged) <= 13  # a server's send returns when its client has left


@pytest.mark.real_time
async def test_a_synchronous_source_that_was_wrapped_is_closed_all_the_same() -> None:
    seen: list[str] = []

    def source() -> Iterator[str]:
        try:
            for _ in range(1000):
                yield "x"
        finally:
            seen.append("finally")

    async def louder(events: Any) -> AsyncIterator[str]:
        async for event in events:
            yield f"{event}!"

    response = EventSourceResponse(source())
    response.body_iterator = louder(response.body_iterator)
    async with open_stream(response, capacity=1) as stream:
        await stream.receive(10)
        await stream.disconnect()
    assert seen == ["finally"]


@pytest.mark.parametrize("slow", [False, True])
async def test_an_empty_item_is_no_end(slow: bool) -> None:
    body = b""

    async def send(message: Any) -> None:
        nonlocal body
        if slow:
            await anyio.sleep(1)
        body += message.get("body", b"")

    async def receive() -> Any:
        await anyio.sleep_forever()

    response = EventSourceResponse(items(b"", "a", b"", b"", "b"), ping=0)
    with anyio.fail_after(20):
        await response({"type": "http", "method": "GET", "headers": []}, receive, send)
    assert body == b"data: a\r\n\r\ndata: b\r\n\r\n"


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_is_lost_whatever_comes_between(seed: int) -> None:
    """Sends, pings and the source take random times."""
    chance = random.Random(seed)
    sent: list[bytes] = []
    sending = False

    async def source() -> AsyncIterator[str]:
        for number in range(200):
            yield str(number)
            if chance.random() < 0.3:
                await anyio.sleep(chance.choice([0, 0.5, 1, 3]))

    async def send(message: Any) -> None:
        nonlocal sending
        assert not sending
        sending = True
        if chance.random() < 0.3:
            await anyio.sleep(chance.choice([0, 0.5, 1, 3]))
        sending = False
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await anyio.sleep_forever()

    response = EventSourceResponse(source(), ping=1, ping_message_factory=lambda: ServerSentEvent(comment="x"))
    await response({"type": "http", "method": "GET", "headers": []}, receive, send)
    events = [chunk for chunk in b"".join(sent).split(b"\r\n\r\n") if chunk.startswith(b"data")]
    assert events == [b"data: %d" % number for number in range(200)]
    assert b": x\r\n\r\n" in b"".join(sent)


async def test_a_source_that_never_waits_lets_others_run() -> None:
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        assert len(await body_of(EventSourceResponse(items(*["x" * 1000] * 1000)), capacity=10_000)) == 1_010_000
        tasks.cancel_scope.cancel()
    assert others >= 50


@pytest.mark.real_time  # a thread takes time
async def test_sync_sources_and_memory_streams() -> None:
    assert await body_of(EventSourceResponse(range(3))) == b"data: 0\r\n\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n"
    send, receive = anyio.create_memory_object_stream[str](3)
    send.send_nowait("a")
    send.close()
    assert await body_of(EventSourceResponse(receive)) == b"data: a\r\n\r\n"


@pytest.mark.real_time
async def test_the_body_can_be_wrapped() -> None:
    async def louder(events: Any) -> AsyncIterator[str]:
        async for event in events:
            yield f"{event}!"

    for content in (items("a"), ["a"]):
        response = EventSourceResponse(content)
        response.body_iterator = louder(response.body_iterator)
        assert await body_of(response) == b"data: a!\r\n\r\n"


async def test_pings_come_when_it_is_idle() -> None:
    async with open_stream(EventSourceResponse(forever(), ping=5)) as stream:
        assert await stream.read() == b"data: first\r\n\r\n"
        ping = await stream.read(timeout=6)
        assert ping.startswith(b": ping - 2")
        assert ping.endswith(b"\r\n\r\n")
    response = EventSourceResponse(forever(), ping_message_factory=lambda: {"data": "alive"}, sep="\n")
    response.ping_interval = 2
    async with open_stream(response) as stream:
        assert await stream.read() == b"data: first\n\n"
        assert await stream.read(timeout=3) == b"data: alive\n\n"


async def test_the_defaults_of_the_app_around_it_hold() -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), ping=3, registry=registry)) as stream:
        assert len(registry) == 1
        await stream.read()
        assert (await stream.read(timeout=4)).startswith(b": ping")


class Slower(EventSourceResponse):
    DEFAULT_PING_INTERVAL = 40
    DEFAULT_SEPARATOR = "\n"


async def test_a_subclass_has_its_own_defaults() -> None:
    response = Slower(forever())
    assert response.ping_interval == 40
    async with open_stream(response) as stream:
        assert await stream.read() == b"data: first\n\n"
        with pytest.raises(TimeoutError):
            await stream.read(timeout=39)
        assert (await stream.read(timeout=2)).startswith(b": ping")


async def test_headers_can_be_changed_until_it_is_sent() -> None:
    response = EventSourceResponse(items(), 201, {"X-One": "1"}, None)
    response.headers["x-two"] = "2"
    response.set_cookie("a", "b")
    response.status_code = 202
    async with open_stream(response) as stream:
        assert stream.status == 202
        headers = stream.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert (headers["x-one"], headers["x-two"], headers["connection"]) == ("1", "2", "keep-alive")
    assert headers["set-cookie"].startswith("a=b")


async def test_http2_has_no_connection_header() -> None:
    async with open_stream(EventSourceResponse(items()), scope={"http_version": "2"}) as stream:
        assert "connection" not in stream.headers


async def test_another_media_type_is_sent_as_given() -> None:
    async with open_stream(EventSourceResponse(items(), media_type="text/plain")) as stream:
        assert stream.headers["content-type"] == "text/plain; charset=utf-8"


# How it ends


async def test_the_background_runs_last_but_not_after_an_error() -> None:
    seen: list[str] = []
    note = BackgroundTask(lambda: seen.append("background"))
    async with open_stream(EventSourceResponse(forever(on_end=lambda: seen.append("end")), background=note)) as stream:
        await stream.read()
        await stream.disconnect()
    assert seen == ["end", "background"]

    async def failing() -> AsyncIterator[str]:
        yield "a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body_of(EventSourceResponse(failing(), background=note))
    assert seen == ["end", "background"]


async def test_active_until_it_is_over() -> None:
    response = EventSourceResponse(forever())
    async with open_stream(response) as stream:
        assert response.active
        await stream.disconnect()
    assert not response.active


async def test_the_close_handler_is_told_before_the_source_ends() -> None:
    seen: list[Any] = []

    async def left(message: Any) -> None:
        seen.append(message["type"])
        await anyio.lowlevel.checkpoint()

    async with open_stream(
        EventSourceResponse(forever(on_end=lambda: seen.append("end")), client_close_handler_callable=left)
    ) as stream:
        await stream.read()
        await stream.disconnect()
    assert seen == ["http.disconnect", "end"]


async def test_the_close_handler_is_told_of_a_client_that_a_send_found_gone() -> None:
    seen: list[str] = []

    async def left(message: Any) -> None:
        seen.append(message["type"])

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    response = EventSourceResponse(forever(), client_close_handler_callable=left)
    await response({"type": "http", "method": "GET", "headers": []}, receive, send)
    assert seen == ["http.disconnect"]


async def test_the_close_handler_is_not_told_of_any_other_end() -> None:
    seen: list[Any] = []

    async def left(message: Any) -> None:
        seen.append(message)

    await body_of(EventSourceResponse(items("a"), client_close_handler_callable=left))
    assert seen == []


async def test_what_the_close_handler_raises_is_raised() -> None:
    async def left(message: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_stream(EventSourceResponse(forever(), client_close_handler_callable=left)) as stream:
            await stream.read()


async def test_a_frozen_client_is_dropped() -> None:
    with pytest.raises(SendTimeoutError):
        async with open_stream(EventSourceResponse(items(*"abcd"), send_timeout=5), capacity=1):
            await anyio.sleep(6)


async def test_clean_up_may_take_any_time() -> None:
    seen: list[str] = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1000)
            seen.append("clean")

    async with open_stream(EventSourceResponse(source(), cleanup_timeout=None)) as stream:
        await stream.read()
        await stream.disconnect()
    assert seen == ["clean"]


# A sender beside the stream


async def feed(channel: Any, *values: Any, then: Callable[[], Any] = lambda: None) -> None:
    async with channel:
        for value in values:
            await channel.send(value)
        then()


async def test_a_sender_feeds_the_stream_and_may_end_before_it() -> None:
    send, receive = anyio.create_memory_object_stream[Any](10)
    response = EventSourceResponse(receive, data_sender_callable=partial(feed, send, "a", "b"))
    assert await body_of(response) == b"data: a\r\n\r\ndata: b\r\n\r\n"


async def test_a_sender_ends_with_the_stream() -> None:
    seen: list[str] = []

    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("end of the sender")

    await body_of(EventSourceResponse(items("a"), data_sender_callable=sender))
    assert seen == ["end of the sender"]


async def test_what_a_sender_raises_fails_the_stream_behind_what_it_gave() -> None:
    send, receive = anyio.create_memory_object_stream[Any]()

    def fail() -> None:
        raise ZeroDivisionError("the sender failed")

    keep = receive.clone()  # so that the stream does not end with its sender
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


async def test_no_sender_is_begun_when_the_server_stops_already() -> None:
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
async def test_a_sender_is_no_error_when_its_client_leaves(waits: str) -> None:
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


async def test_what_a_sender_raises_in_its_clean_up_is_raised() -> None:
    async def sender() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_stream(EventSourceResponse(forever(), data_sender_callable=sender)) as stream:
            await stream.read()
            await stream.disconnect()


async def test_a_sender_that_finds_no_stream_is_no_error_in_a_task_group_either() -> None:
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


async def test_a_report_counts_each_stream_once() -> None:
    """A source says farewell, and its sender does not heed its cancellation."""
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


async def test_a_sender_that_does_not_end_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
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


async def test_a_source_beside_a_sender_is_a_source_like_any_other() -> None:
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


async def test_a_failing_source_stops_its_sender() -> None:
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


# The server's end


async def farewell(event: anyio.Event, seen: list[str]) -> AsyncIterator[str]:
    try:
        yield "first"
        await event.wait()
        yield "bye"
    except BaseException:
        seen.append("cut short")
        raise


async def the_end_of(stream: Any) -> bytes:
    body = b""
    while chunk := await stream.read(timeout=60):
        body += chunk
    assert stream.complete
    return body


async def test_a_source_says_farewell_in_its_grace() -> None:
    event, registry = anyio.Event(), StreamRegistry()
    seen: list[str] = []
    response = EventSourceResponse(farewell(event, seen), shutdown_event=event, shutdown_grace_period=5)
    async with open_stream(SSEMiddleware(response, registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        body = await the_end_of(stream)
    assert body.startswith(b"data: bye\r\n\r\nretry: ")
    assert seen == []


@pytest.mark.parametrize(("grace", "within"), [(0.0, 0.0), (3.0, 3.0), (30.0, 30.0)])
async def test_its_grace_is_its_own_whatever_the_drain_has(grace: float, within: float) -> None:
    event, registry = anyio.Event(), StreamRegistry(drain_timeout=10)
    response = EventSourceResponse(forever(), ping=0, shutdown_event=event, shutdown_grace_period=grace)
    async with open_stream(SSEMiddleware(response, registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        began = anyio.current_time()
        body = await the_end_of(stream)
        assert anyio.current_time() - began == pytest.approx(within, abs=0.2)
        assert body.startswith(b"retry: ")
        assert event.is_set()


async def test_should_exit_ends_all_streams_and_new_ones_until_it_is_reset() -> None:
    registry = StreamRegistry()
    async with (
        open_stream(EventSourceResponse(forever())) as one,
        open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as other,
        open_stream(asgi_sse.EventSourceResponse(forever())) as plain,
    ):
        for stream in (one, other, plain):
            await stream.receive()
        assert not AppStatus.should_exit
        AppStatus.should_exit = True
        assert AppStatus.should_exit
        for stream in (one, other):
            assert (await the_end_of(stream)).startswith(b"retry: ")
        async with open_stream(EventSourceResponse(forever())) as late:
            assert b"retry: " in await the_end_of(late)
        AppStatus.should_exit = False
        async with open_stream(EventSourceResponse(forever())) as later:
            await later.receive()
            with pytest.raises(TimeoutError):
                await later.read(timeout=5)


@pytest.mark.real_time  # the virtual clock is past any timeout while a thread begins
async def test_should_exit_may_be_set_in_another_thread() -> None:
    async with open_stream(EventSourceResponse(forever())) as stream:
        await stream.read(10)
        thread = threading.Thread(target=setattr, args=(AppStatus, "should_exit", True))
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        await the_end_of(stream)


async def test_should_exit_tells_that_a_server_stops() -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as stream:
        await stream.read()
        assert not AppStatus.should_exit
        registry.begin_drain()
        assert AppStatus.should_exit
        await the_end_of(stream)
    assert not AppStatus.should_exit  # nor is a later server of this process stopped by it


async def test_without_the_automatic_drain_only_should_exit_ends_it() -> None:
    AppStatus.disable_automatic_graceful_drain()
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        AppStatus.handle_exit()
        with pytest.raises(TimeoutError):
            await stream.read(timeout=5)
        AppStatus.should_exit = True
        await the_end_of(stream)


def test_handle_exit_goes_on_to_the_handler_before_it() -> None:
    seen: list[Any] = []
    AppStatus.original_handler = lambda *args: seen.append(args)
    AppStatus.handle_exit(15, None)
    assert seen == [(15, None)]
    assert AppStatus.should_exit


async def test_nothing_holds_a_response_that_was_sent() -> None:
    response = EventSourceResponse(items("a"))
    await body_of(response)
    reference = weakref.ref(response)
    del response
    await anyio.sleep(2)  # until its head was looked at
    gc.collect()
    assert reference() is None


# A refused websocket


async def test_a_websocket_is_denied_with_a_stream() -> None:
    sent: list[Any] = []
    left = anyio.Event()

    messages = [{"type": "websocket.connect"}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "websocket.disconnect", "code": 1006}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "websocket.http.response.body":
            left.set()

    seen: list[str] = []
    scope = {"type": "websocket", "path": "/", "headers": []}
    await EventSourceResponse(forever(on_end=lambda: seen.append("end")))(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert seen == ["end"]


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sep": "|"}, ValueError, "sep must be one of"),
        ({"ping": "ten"}, TypeError, "ping interval must be int"),
        ({"ping": -1}, ValueError, "ping interval must be >= 0"),
        ({"send_timeout": -1}, ValueError, "send_timeout must be at least 0 or None, got -1"),
        ({"shutdown_grace_period": float("nan")}, ValueError, "shutdown_grace_period must be >= 0"),
        ({"max_lifetime": "long"}, TypeError, "max_lifetime must be a number or None, got 'long'"),
        ({"on_error": 1}, TypeError, "on_error=1 is not callable"),
        ({"headers": {"x": "a\r\ny: b"}}, ValueError, "would inject headers"),
        ({"registry": True}, TypeError, "registry must be a StreamRegistry, got True"),
    ],
)
def test_a_wrong_argument_is_told_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EventSourceResponse(items(), **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (0, "not iterable"),
        ("text", "put it in a list"),
        ({"data": "a"}, "put it in a list"),
        (items, "call it: items"),
    ],
)
async def test_what_is_no_source_is_an_error_of_its_own(content: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        await body_of(EventSourceResponse(content))


async def test_a_line_end_in_an_id_is_raised_at_the_yield() -> None:
    caught: list[str] = []

    async def source() -> AsyncIterator[Any]:
        try:
            yield {"data": "a", "id": "1\nretry: 0"}
        except ValueError as exc:
            caught.append(str(exc))
        yield "b"

    assert await body_of(EventSourceResponse(source())) == b"data: b\r\n\r\n"
    assert "must have no line end" in caught[0]


async def test_what_is_raised_in_a_clean_up_behind_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def source() -> AsyncIterator[Any]:
        try:
            yield {"unknown": "field"}
        finally:
            raise ZeroDivisionError("in the clean-up")

    with caplog.at_level(logging.ERROR), pytest.raises(TypeError, match="unknown"):
        await body_of(EventSourceResponse(source()))
    assert "raised again, in its clean-up" in caplog.text
    assert "ZeroDivisionError: in the clean-up" in caplog.text


async def test_an_endpoint_class_without_events_says_so() -> None:
    class Empty(EventSourceEndpoint):
        pass

    scope = {"type": "http", "method": "GET", "headers": [], "path": "/", "query_string": b""}
    with pytest.raises(NotImplementedError, match=r"Empty.events.* is missing"):
        await Empty(scope, anyio.sleep_forever, anyio.sleep_forever)  # type: ignore[arg-type]
