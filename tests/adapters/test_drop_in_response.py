"""The response of the drop-in for sse-starlette, where sse-starlette's own tests do not look or differ."""

import gc
import logging
import random
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from drop_in_sources import body_of, forever, items
from starlette.background import BackgroundTask

from asgi_sse import SSEMiddleware, StreamRegistry
from asgi_sse.adapters.sse_starlette import EventSourceEndpoint, EventSourceResponse, SendTimeoutError, ServerSentEvent
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


# What is sent


async def test_nothing_is_sent_before_the_first_event() -> None:
    response = EventSourceResponse(items("a", {"data": 2, "event": "b"}, 3))
    assert await body_of(response) == b"data: a\r\n\r\nevent: b\r\ndata: 2\r\n\r\ndata: 3\r\n\r\n"


async def test_source_waits_until_each_event_is_sent() -> None:
    asked = 0

    async def source() -> AsyncIterator[str]:
        nonlocal asked
        for _ in range(10):
            asked += 1
            yield "x"

    async with open_stream(EventSourceResponse(source()), capacity=2) as stream:
        await anyio.sleep(1)
        assert asked == 3  # the server has two messages and accepts no third
        chunks = [await stream.read() for _ in range(10)]
        assert chunks == [b"data: x\r\n\r\n"] * 10
        assert await stream.read() == b""
        assert stream.complete


@pytest.mark.real_time
async def test_synchronous_source_waits_until_each_event_is_sent() -> None:
    acknowledged: list[int] = []

    def jobs() -> Iterator[str]:
        for number in range(100):
            yield f"job {number}"
            acknowledged.append(number)

    async with open_stream(EventSourceResponse(jobs()), capacity=2) as stream:
        for number in range(10):
            assert (await stream.receive(10)).data == f"job {number}"
        await anyio.sleep(0.1)
        assert 9 <= len(acknowledged) <= 12  # the server has up to two messages
        await stream.disconnect()
    assert len(acknowledged) <= 13  # the send of a server returns after its client has left


@pytest.mark.real_time
async def test_wrapped_synchronous_source_is_closed() -> None:
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
async def test_empty_bytes_do_not_end_the_body(slow: bool) -> None:
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
async def test_no_event_is_lost_at_random_times(seed: int) -> None:
    """The sends and the source take random times, and keep-alives come in between."""
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


async def test_source_that_never_waits_lets_other_tasks_run() -> None:
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
async def test_synchronous_sources_and_memory_streams_are_accepted() -> None:
    assert await body_of(EventSourceResponse(range(3))) == b"data: 0\r\n\r\ndata: 1\r\n\r\ndata: 2\r\n\r\n"
    send, receive = anyio.create_memory_object_stream[str](3)
    send.send_nowait("a")
    send.close()
    assert await body_of(EventSourceResponse(receive)) == b"data: a\r\n\r\n"


@pytest.mark.real_time
async def test_body_iterator_can_be_wrapped() -> None:
    async def louder(events: Any) -> AsyncIterator[str]:
        async for event in events:
            yield f"{event}!"

    for content in (items("a"), ["a"]):
        response = EventSourceResponse(content)
        response.body_iterator = louder(response.body_iterator)
        assert await body_of(response) == b"data: a!\r\n\r\n"


async def test_idle_stream_is_sent_keep_alives() -> None:
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


async def test_defaults_of_the_middleware_apply() -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), ping=3, registry=registry)) as stream:
        assert len(registry) == 1
        await stream.read()
        assert (await stream.read(timeout=4)).startswith(b": ping")


class Slower(EventSourceResponse):
    DEFAULT_PING_INTERVAL = 40
    DEFAULT_SEPARATOR = "\n"


async def test_subclass_has_its_own_defaults() -> None:
    response = Slower(forever())
    assert response.ping_interval == 40
    async with open_stream(response) as stream:
        assert await stream.read() == b"data: first\n\n"
        with pytest.raises(TimeoutError):
            await stream.read(timeout=39)
        assert (await stream.read(timeout=2)).startswith(b": ping")


async def test_headers_can_be_changed_before_the_response_is_sent() -> None:
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


async def test_http2_response_has_no_connection_header() -> None:
    async with open_stream(EventSourceResponse(items()), scope={"http_version": "2"}) as stream:
        assert "connection" not in stream.headers


async def test_media_type_is_sent_as_given() -> None:
    async with open_stream(EventSourceResponse(items(), media_type="text/plain")) as stream:
        assert stream.headers["content-type"] == "text/plain; charset=utf-8"


async def test_websocket_is_denied_with_a_stream() -> None:
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


# How it ends


async def test_background_runs_last_and_not_after_an_error() -> None:
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


async def test_response_is_active_until_it_is_over() -> None:
    response = EventSourceResponse(forever())
    async with open_stream(response) as stream:
        assert response.active
        await stream.disconnect()
    assert not response.active


async def test_close_handler_is_called_before_the_source_ends() -> None:
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


async def test_close_handler_is_called_if_a_send_finds_the_client_gone() -> None:
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


async def test_close_handler_is_not_called_for_another_end() -> None:
    seen: list[Any] = []

    async def left(message: Any) -> None:
        seen.append(message)

    await body_of(EventSourceResponse(items("a"), client_close_handler_callable=left))
    assert seen == []


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_on_close_is_called_with_the_reason(asynchronous: bool) -> None:
    """It is an argument that sse-starlette does not have."""
    reasons = []

    async def later(reason: str) -> None:
        await anyio.sleep(1)
        reasons.append(reason)

    on_close = later if asynchronous else reasons.append
    assert await body_of(EventSourceResponse(items("a"), on_close=on_close)) == b"data: a\r\n\r\n"
    async with open_stream(EventSourceResponse(forever(), ping=1, on_close=on_close)) as stream:
        await stream.read(timeout=5)
        await stream.disconnect()
    assert reasons == ["finished", "disconnected"]


async def test_error_of_the_close_handler_is_raised() -> None:
    async def left(message: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_stream(EventSourceResponse(forever(), client_close_handler_callable=left)) as stream:
            await stream.read()


async def test_frozen_client_is_dropped() -> None:
    with pytest.raises(SendTimeoutError):
        async with open_stream(EventSourceResponse(items(*"abcd"), send_timeout=5), capacity=1):
            await anyio.sleep(6)


async def test_cleanup_without_a_timeout_may_take_any_time() -> None:
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


async def test_sent_response_is_garbage_collected() -> None:
    response = EventSourceResponse(items("a"))
    await body_of(response)
    reference = weakref.ref(response)
    del response
    await anyio.sleep(2)  # until the search for compressors has seen its headers
    gc.collect()
    assert reference() is None


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sep": "|"}, ValueError, "sep must be one of"),
        ({"ping": "ten"}, TypeError, "ping interval must be int"),
        ({"ping": -1}, ValueError, "ping interval must be >= 0"),
        ({"send_timeout": -1}, ValueError, "send_timeout must be at least 0 or None, got -1"),
        ({"shutdown_grace_period": float("nan")}, ValueError, "shutdown_grace_period must be >= 0"),
        (
            {"cleanup_timeout": -1},
            ValueError,
            "cleanup_timeout must be >= 0, got -1; give seconds, or None for no limit",
        ),
        ({"max_lifetime": "long"}, TypeError, "max_lifetime must be a number or None, got 'long'"),
        ({"on_error": 1}, TypeError, "on_error must be callable or None, got 1"),
        ({"headers": {"x": "a\r\ny: b"}}, ValueError, "would inject headers"),
        ({"registry": True}, TypeError, "registry must be a StreamRegistry, got True"),
        ({"json_dumps": str}, TypeError, "unexpected keyword argument 'json_dumps'"),
    ],
)
def test_invalid_argument_is_refused_at_once(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EventSourceResponse(items(), **arguments)


def test_compression_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Compression is not supported for SSE streams"):
        EventSourceResponse(items()).enable_compression()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (0, "content must be iterable, got 0"),
        ("text", "put it in a list"),
        ({"data": "a"}, "put it in a list"),
        (items, "call it: items"),
    ],
)
async def test_invalid_source_is_refused_when_the_response_is_sent(content: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        await body_of(EventSourceResponse(content))


async def test_invalid_id_is_raised_at_the_yield() -> None:
    caught: list[str] = []

    async def source() -> AsyncIterator[Any]:
        try:
            yield {"data": "a", "id": "1\nretry: 0"}
        except ValueError as exc:
            caught.append(str(exc))
        yield "b"

    assert await body_of(EventSourceResponse(source())) == b"data: b\r\n\r\n"
    assert "must have no line end" in caught[0]


async def test_cleanup_error_after_an_encoding_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def source() -> AsyncIterator[Any]:
        try:
            yield {"unknown": "field"}
        finally:
            raise ZeroDivisionError("in the clean-up")

    with caplog.at_level(logging.ERROR), pytest.raises(TypeError, match="unknown"):
        await body_of(EventSourceResponse(source()))
    assert "raised again, in its clean-up" in caplog.text
    assert "ZeroDivisionError: in the clean-up" in caplog.text


async def test_endpoint_class_without_events_is_refused() -> None:
    class Empty(EventSourceEndpoint):
        pass

    scope = {"type": "http", "method": "GET", "headers": [], "path": "/", "query_string": b""}
    with pytest.raises(NotImplementedError, match=r"Empty must define events\(self, request\)"):
        await Empty(scope, anyio.sleep_forever, anyio.sleep_forever)  # type: ignore[arg-type]
