"""`EventSourceResponse`: what it sends, and what it refuses."""

import re
from collections.abc import AsyncIterator, Callable
from types import MappingProxyType
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from stream_sources import OPENING, Reasons, body_of, forever, items

from asgi_sse import (
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    SendTimeoutError,
    ServerSentEvent,
    StreamClosedError,
)
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def test_response_start_and_opening_block() -> None:
    async with open_stream(EventSourceResponse(items("a"))) as stream:
        assert stream.status == 200
        assert stream.headers == {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store, no-transform",
            "x-accel-buffering": "no",
        }
        assert await stream.read() == OPENING + b"data: a\n\n"
        assert await stream.read() == b""
        assert stream.complete


async def test_items_of_every_kind_are_encoded() -> None:
    source = items(
        "text", 5, 1.5, ServerSentEvent("event", id=1), {"data": {"a": 1}, "event": "json"}, b"data: encoded\n\n",
        bytearray(b"data: array\n\n"), "", {"comment": "only"}, "two\nlines",
    )  # fmt: skip
    assert (await body_of(EventSourceResponse(source))).removeprefix(OPENING) == (
        b'data: text\n\ndata: 5\n\ndata: 1.5\n\nid: 1\ndata: event\n\nevent: json\ndata: {"a":1}\n\n'
        b"data: encoded\n\ndata: array\n\ndata: \n\n: only\n\ndata: two\ndata: lines\n\n"
    )  # fmt: skip


@pytest.mark.parametrize("sep", ["\n", "\r\n", "\r"])
async def test_separator_applies_to_everything_sent(sep: str) -> None:
    body = await body_of(EventSourceResponse(items("a", {"data": "b\nc"}, ServerSentEvent("d")), sep=sep))
    expected = OPENING + b"data: a\n\ndata: b\ndata: c\n\ndata: d\n\n"
    assert body == expected.replace(b"\n", sep.encode())


async def test_opening_block_can_be_turned_off() -> None:
    assert await body_of(EventSourceResponse(items("a"), retry=None, opening_comment=False)) == b"data: a\n\n"
    assert await body_of(EventSourceResponse(items("a"), retry=0, opening_comment=False)) == b"retry: 0\n\ndata: a\n\n"


async def test_empty_source_gives_an_empty_stream() -> None:
    assert await body_of(EventSourceResponse(items())) == OPENING


async def test_any_iterable_is_a_source() -> None:
    send, receive = anyio.create_memory_object_stream[str](2)
    async with send:
        await send.send("from a stream")
    assert (await body_of(EventSourceResponse(receive))).endswith(b"data: from a stream\n\n")
    with pytest.raises(anyio.ClosedResourceError):
        receive.receive_nowait()  # it was given away: the response has closed it

    class Iterable:
        def __aiter__(self) -> AsyncIterator[str]:
            return items("from an iterable")

    assert (await body_of(EventSourceResponse(Iterable()))).endswith(b"data: from an iterable\n\n")


async def test_headers_can_be_replaced_and_added() -> None:
    headers = {"Cache-Control": "public, max-age=29", "X-Two": "ü "}
    async with open_stream(EventSourceResponse(items(), headers=headers, status_code=203)) as stream:
        assert stream.status == 203
        assert stream.headers["cache-control"] == "public, max-age=29"
        assert stream.headers["x-two"] == "ü"
        assert stream.headers["x-accel-buffering"] == "no"


async def test_header_given_as_pairs_may_be_repeated() -> None:
    async with open_stream(EventSourceResponse(items(), headers=[("X-One", "a"), ["x-one", "b"]])) as stream:  # type: ignore[list-item]
        assert [value for name, value in stream.raw_headers if name == b"x-one"] == [b"a", b"b"]


async def test_head_request_starts_no_source() -> None:
    started = []

    async def source() -> AsyncIterator[str]:
        started.append(True)
        yield "x"

    async with open_stream(EventSourceResponse(source()), method="HEAD") as stream:
        assert stream.status == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert await stream.read() == b""
        assert stream.complete
    assert not started


class BareIterator:
    """An async iterator that has nothing to close."""

    def __aiter__(self) -> "BareIterator":
        return self

    async def __anext__(self) -> str:
        raise StopAsyncIteration


@pytest.mark.parametrize("content", [["a"], iter("a"), BareIterator()], ids=["list", "iterator", "async iterator"])
async def test_head_request_needs_no_source_that_can_be_closed(content: Any) -> None:
    async with open_stream(EventSourceResponse(content), method="HEAD") as stream:
        assert stream.status == 200
        assert await stream.read() == b""
        assert stream.complete


async def test_stuck_client_of_a_head_request_is_given_up_after_send_timeout() -> None:
    async def stuck(message: Any) -> None:
        await anyio.sleep_forever()

    scope = {"type": "http", "method": "HEAD", "path": "/", "headers": []}
    began = anyio.current_time()
    with pytest.raises(SendTimeoutError, match="the client read nothing for 7 s"):
        await EventSourceResponse(items("a"), send_timeout=7)(scope, anyio.sleep_forever, stuck)  # type: ignore[arg-type]
    assert 7 <= anyio.current_time() - began < 8


async def test_burst_is_one_message() -> None:
    """Coalescing: what a source yields without waiting leaves in one send."""
    async with open_stream(EventSourceResponse(items(*range(100)))) as stream:
        assert (await stream.read()).count(b"data:") == 100


async def test_keep_alives_go_only_to_idle_streams() -> None:
    async def source() -> AsyncIterator[str]:
        for _ in range(5):
            await anyio.sleep(9)
            yield "busy"
        await anyio.sleep(25)
        yield "idle"

    body = await body_of(EventSourceResponse(source(), ping=10))
    assert body == OPENING + b"data: busy\n\n" * 5 + b": ping\n\n" * 2 + b"data: idle\n\n"


@pytest.mark.parametrize("ping", [0, None])
async def test_keep_alives_can_be_turned_off(ping: float | None) -> None:
    async def source() -> AsyncIterator[str]:
        await anyio.sleep(86_400)
        yield "x"

    assert await body_of(EventSourceResponse(source(), ping=ping)) == OPENING + b"data: x\n\n"


async def test_ping_message_factory_makes_the_keep_alive() -> None:
    count = iter(range(10))

    async def source() -> AsyncIterator[str]:
        await anyio.sleep(3.5)
        yield "x"

    response = EventSourceResponse(
        source(), ping=1, ping_message_factory=lambda: ServerSentEvent(comment=f"n {next(count)}"), sep="\r\n"
    )
    assert (await body_of(response)).endswith(b": n 0\r\n\r\n: n 1\r\n\r\n: n 2\r\n\r\ndata: x\r\n\r\n")


async def test_ping_message_factory_that_raises_ends_the_stream() -> None:
    def factory() -> ServerSentEvent:
        raise LookupError("no ping")

    reasons = Reasons()
    response = EventSourceResponse(forever(), ping=1, ping_message_factory=factory, on_close=reasons)
    with pytest.raises(LookupError, match="no ping"):
        async with open_stream(response) as stream:
            await stream.read()
            await stream.read(timeout=5)
    assert reasons == ["failed"]


async def test_keep_alive_never_splits_an_event() -> None:
    async def source() -> AsyncIterator[bytes]:
        yield b"data: one"
        await anyio.sleep(35)
        yield b"\n\n"
        await anyio.sleep(15)
        yield b"data: two\r"
        await anyio.sleep(35)
        yield b"\n\r\n"

    body = await body_of(EventSourceResponse(source(), ping=10))
    assert body == OPENING + b"data: one\n\n: ping\n\ndata: two\r\n\r\n"


async def test_large_event_is_not_split() -> None:
    async with open_stream(EventSourceResponse(items("a", "x" * 200_000, "b", "y" * 60_000, "z" * 60_000))) as stream:
        sizes = []
        while chunk := await stream.read():
            assert chunk.endswith(b"\n\n")
            sizes.append(len(chunk))
        assert max(sizes) == 200_000 + len(b"data: \n\n")


async def test_json_dumps_serialises_data() -> None:
    response = EventSourceResponse(
        items({"data": {1, 2}}, {"data": "text"}, {"data": True}), json_dumps=lambda value: repr(value).encode()
    )
    assert (await body_of(response)).endswith(b"data: {1, 2}\n\ndata: text\n\ndata: True\n\n")


async def bare(*values: Any, **options: Any) -> bytes:
    """Return the body of a stream of these items, without the opening block."""
    return await body_of(EventSourceResponse(items(*values), opening_comment=False, retry=None, **options))


async def test_mapping_of_another_type_is_sent_as_a_dict_is() -> None:
    item = {"data": {"a": 1}, "id": "7"}
    assert await bare(MappingProxyType(item)) == await bare(item) == b'id: 7\ndata: {"a":1}\n\n'
    with pytest.raises(InvalidEventError, match="unknown key 'dta'"):
        await bare(MappingProxyType({"dta": 1}))


@pytest.mark.parametrize("data", ["text", 5, 1.5, b"bytes", bytearray(b"array"), None])
async def test_json_dumps_is_not_asked_for_data_that_is_text_already(data: Any) -> None:
    def never(_: Any) -> str:
        raise AssertionError("called for text")

    item = {"data": data, "comment": "c"}
    assert await bare(item, json_dumps=never) == await bare(item)


@pytest.mark.parametrize("data", [True, [1], {"a": None}])
async def test_json_dumps_is_asked_for_other_data(data: Any) -> None:
    sent = await bare({"data": data, "id": "1"}, json_dumps=lambda value: f"<{value}>")
    assert sent == f"id: 1\ndata: <{data}>\n\n".encode()


async def test_empty_item_does_not_hold_up_a_large_event() -> None:
    assert await bare(b"", "x" * 200_000) == b"data: " + b"x" * 200_000 + b"\n\n"


async def test_empty_items_do_not_stop_a_stream() -> None:
    large = b"data: " + b"x" * 70_000 + b"\n\n"
    body = await body_of(EventSourceResponse(items(b"", large, b"", b"", "end"), ping=0))
    assert body == OPENING + large + b"data: end\n\n"


async def test_source_of_empty_items_starves_nobody() -> None:
    async def source() -> AsyncIterator[bytes]:
        while True:
            yield b""

    async with open_stream(EventSourceResponse(source())) as stream:
        assert await stream.read() == OPENING
        await stream.disconnect()


async def test_sends_never_overlap() -> None:
    in_flight = 0
    most = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            nonlocal in_flight, most
            in_flight += 1
            most = max(most, in_flight)
            await anyio.sleep(0.3)
            in_flight -= 1
            await send(message)

        async def source() -> AsyncIterator[int]:
            for i in range(50):
                yield i
                await anyio.sleep(0.1)

        await EventSourceResponse(source(), ping=0.1)(scope, receive, counting)

    async with open_stream(app) as stream:
        assert [event.data async for event in stream] == [str(i) for i in range(50)]
    assert most == 1


async def test_response_serves_one_request() -> None:
    response = EventSourceResponse(items("a"))
    await body_of(response)
    with pytest.raises(StreamClosedError, match="new one for each request"):
        await body_of(response)


async def test_other_scopes_are_refused() -> None:
    with pytest.raises(TypeError, match="'websocket'"):
        await EventSourceResponse([])({"type": "websocket"}, None, None)  # type: ignore[arg-type]


async def a_coroutine() -> list[str]:
    return []


async def a_generator() -> AsyncIterator[str]:
    yield ""


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: EventSourceResponse(a_coroutine()), TypeError, "await it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(a_generator), TypeError, "call it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(None), TypeError, "content must be iterable"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(5), TypeError, "content must be iterable, got 5"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse("text"), TypeError, "put it in a list"),
        (lambda: EventSourceResponse(b"bytes"), TypeError, "put it in a list"),
        (lambda: EventSourceResponse({"data": 1}), TypeError, "put it in a list"),
        (
            lambda: EventSourceResponse([], sep="x"),
            ValueError,
            "sep must be a line end, '\\n', '\\r\\n' or '\\r', got 'x'",
        ),
        (lambda: EventSourceResponse([], ping=-1), ValueError, "ping must be at least 0 or None, got -1"),
        (lambda: EventSourceResponse([], ping="5"), TypeError, "ping must be a number or None, got '5'"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], ping=True), TypeError, "ping must be a number or None, got True"),
        (lambda: EventSourceResponse([], ping=float("nan")), ValueError, "ping must be at least 0 or None, got nan"),
        (
            lambda: EventSourceResponse([], send_timeout=-1),
            ValueError,
            "send_timeout must be at least 0 or None, got -1",
        ),
        (
            lambda: EventSourceResponse([], max_lifetime=-1),
            ValueError,
            "max_lifetime must be at least 0 or None, got -1",
        ),
        (lambda: EventSourceResponse([], cleanup_timeout=-1), ValueError, "cleanup_timeout must be at least 0, got -1"),
        (
            lambda: EventSourceResponse([], cleanup_timeout=None),  # type: ignore[arg-type]
            TypeError,
            "cleanup_timeout must be a number, got None",
        ),
        (lambda: EventSourceResponse([], open_timeout=-1), ValueError, "open_timeout must be at least 0, got -1"),
        (
            lambda: EventSourceResponse([], retry=-1),
            ValueError,
            "retry must be a whole number of milliseconds, at least 0, got -1",
        ),
        (
            lambda: EventSourceResponse([], retry=1.5),  # type: ignore[arg-type]
            ValueError,
            "retry must be a whole number of milliseconds, at least 0, got 1.5",
        ),
        (lambda: EventSourceResponse([], on_close="x"), TypeError, "on_close must be callable or None, got 'x'"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], headers={"x": "a\r\nb"}), ValueError, "inject"),
        (lambda: EventSourceResponse([], headers={"x y": "a"}), ValueError, "'x y'"),
        (lambda: EventSourceResponse([], headers={"": "a"}), ValueError, "name"),
        (lambda: EventSourceResponse([], headers={"x": "✓"}), ValueError, "✓"),
        (lambda: EventSourceResponse([], headers={"x": 1}), TypeError, "two str"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], headers={"Content-Length": "5"}), ValueError, "content-length"),
        (lambda: EventSourceResponse([], headers={"Content-Type": "text/html"}), ValueError, "text/html"),
        (
            lambda: EventSourceResponse([], headers="X-A: b"),  # type: ignore[arg-type]
            TypeError,
            "headers must be a mapping or pairs (name, value), got 'X-A: b'",
        ),
        (
            lambda: EventSourceResponse([], headers=["a: b"]),  # type: ignore[list-item]
            TypeError,
            "headers must be a mapping or pairs (name, value), got ['a: b']",
        ),
        (
            lambda: EventSourceResponse([], headers=["ab"]),  # type: ignore[list-item]
            TypeError,
            "headers must be a mapping or pairs (name, value), got ['ab']",
        ),
        (lambda: EventSourceResponse([], headers=[("a",)]), TypeError, "pairs (name, value)"),  # type: ignore[list-item]
        (
            lambda: EventSourceResponse([], headers=5),  # type: ignore[arg-type]
            TypeError,
            "headers must be a mapping or pairs (name, value), got 5",
        ),
        (
            lambda: EventSourceResponse([], pnig=5),  # type: ignore[call-arg]
            TypeError,
            "unknown option 'pnig'; the options are status_code, headers, registry, ping, ",
        ),
        (lambda: EventSourceResponse([], registry=True), TypeError, "registry must be a StreamRegistry, got True"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse(HTTPError(404)), TypeError, "raise the HTTPError instead of returning it"),  # type: ignore[arg-type]
        (lambda: EventSourceResponse([], status_code=204), ValueError, "with a body, got 204"),
        (lambda: EventSourceResponse([], status_code=99), ValueError, "with a body, got 99"),
    ],
)
def test_invalid_input_is_refused_before_anything_is_sent(
    make: Callable[[], EventSourceResponse], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=re.escape(named)):
        make()
