"""Bytes, text and messages that nobody meant to send: an answer, or the error that is documented."""

import inspect
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import fuzz_targets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asgi_sse import (
    Broker,
    BrokerError,
    EventDecoder,
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    Request,
    ServerSentEvent,
    SSEMiddleware,
    create_app,
)
from asgi_sse.broker import endpoint as broker_endpoint
from asgi_sse.broker import publishing
from asgi_sse.broker.backends import memory
from asgi_sse.broker.dispatcher import UnavailableError
from asgi_sse.broker.endpoint import MAX_CHANNELS, Access
from asgi_sse.broker.patterns import MAX_NAME
from asgi_sse.middleware import adoption
from asgi_sse.routing import endpoint
from asgi_sse.stream import buffer, receiver, writer
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.source import MAX_THREADS
from asgi_sse.testing import open_stream

FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# The targets of tests/fuzz, on what hypothesis thinks of.

ALPHABET = [
    b"data",
    b"event",
    b"id",
    b"retry",
    b":",
    b" ",
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff",
    b"7",
    b"*",
]
pieces = st.lists(st.sampled_from(ALPHABET) | st.binary(max_size=3), max_size=40).map(b"".join)


@pytest.mark.parametrize("target", fuzz_targets.ALL, ids=lambda target: target.__name__)
def test_target(target: Callable[[bytes], None]) -> None:
    @FUZZ
    @given(st.binary(min_size=1, max_size=8), pieces | st.binary(max_size=200))
    def run(seed: bytes, data: bytes) -> None:
        target(seed + data)

    run()


# Bounds


def test_a_decoder_holds_what_it_may_hold_however_it_comes() -> None:
    limit = 20_000
    for first, piece in (
        (b"data: ", b"ab"),
        (b"", b"data:ab\n"),
        (b"", b"event: a\n"),
        (b"", b"data\n"),
        (b": ", b"ab"),
    ):
        decoder = EventDecoder(max_event_bytes=limit)
        decoder.feed(first)
        tracemalloc.start()
        try:
            with pytest.raises(InvalidEventError, match="max_event_bytes=20000"):
                for _ in range(limit):
                    decoder.feed(bytes(bytearray(piece)))  # one of its own each time
            assert tracemalloc.get_traced_memory()[1] < 12 * limit
        finally:
            tracemalloc.stop()


def test_a_retry_of_many_digits_is_ignored_before_python_refuses_it() -> None:
    """The least limit that a process may set for its ints is 640 digits."""
    decoder = EventDecoder()
    decoder.feed(b"retry: " + b"9" * 641 + b"\n\n")
    assert decoder.retry is None
    decoder.feed(b"retry: " + b"0" * 639 + b"5\n\n")
    assert decoder.retry == 5


@pytest.mark.anyio
async def test_a_query_is_parsed_up_to_64_kib() -> None:
    async def endpoint(request: Request) -> AsyncIterator[str]:
        yield str(len(request.query))

    app = create_app({"/": endpoint})
    async with open_stream(app, "/?" + "&".join(f"n{number}=" for number in range(8000))) as stream:
        assert (await stream.receive()).data == "8000"
    async with open_stream(app, "/?" + "a" * 65_536) as stream:
        assert stream.status == 200
    async with open_stream(app, "/?" + "a" * 65_537) as stream:
        assert stream.status == 414
        assert await stream.read() == b"the query has more than 65536 bytes"


@pytest.mark.anyio
async def test_cookies_are_parsed_up_to_64_kib() -> None:
    async def endpoint(request: Request) -> AsyncIterator[str]:
        yield str(len(request.cookies))

    app = create_app({"/": endpoint})
    async with open_stream(app, headers=[("cookie", f"n{number}=%41") for number in range(5000)]) as stream:
        assert (await stream.receive()).data == "5000"
    async with open_stream(app, headers={"cookie": "a=" + "a" * 65_535}) as stream:
        assert stream.status == 431
        assert await stream.read() == b"the cookies have more than 65536 bytes"


@pytest.mark.anyio
async def test_a_request_names_100_channels_at_the_most() -> None:
    assert MAX_CHANNELS == 100
    app = create_app({"/": Broker().endpoint()})
    for number, status in ((100, 200), (101, 400)):
        async with open_stream(app, "/?" + "&".join(f"channel=c{n}" for n in range(number))) as stream:
            assert stream.status == status


def test_many_grants_cost_a_look_each() -> None:
    """A pattern was made of each: 100 names of a request among 1,000 granted ones held the event loop for 2 s."""
    access = Access([f"user.{number}" for number in range(2000)])
    began = time.process_time()
    assert not any(access.covers(f"other.{number}") for number in range(100))
    assert time.process_time() - began < 1


def test_a_pattern_of_many_segments_is_tested_in_linear_time() -> None:
    access = Access([".".join("*" * 100), ".".join("*" * 50) + ".**"])
    began = time.process_time()
    for _ in range(100):
        assert not access.covers("a" * 200)
        assert not access.covers(".".join("a" * 49) + ".")
        assert access.covers(".".join("a" * 100))
    assert time.process_time() - began < 1


def test_a_path_of_a_million_segments_is_not_taken_apart() -> None:
    from asgi_sse.routing.endpoint import RouteTable

    async def endpoint() -> None: ...

    table = RouteTable({"/a/{b}/c": endpoint, "/{a}": endpoint})
    path = "/a" * 1_000_000
    tracemalloc.start()
    try:
        assert table.find(path) is None
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # a copy of what is behind, and nothing of each segment
    finally:
        tracemalloc.stop()
    found = table.find("/a/b/c")
    assert found is not None
    assert found[1] == {"b": "b"}
    assert table.find("/a/b/c/d") is None
    assert table.find("x/a/b/c") is None
    assert table.find("/a/b/c/") is None


# JSON


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000, b"9" * 5000, b"NaN", b'{"a": -Infinity}', b"[1e999]", b"-1e400", b"9" * 400 + b".0",
        b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"',
        b'{"\\uDC00": 1}', b'"\\ude00\\ud83d"', "1".encode("utf-16"), b"", b"\xef\xbb\xbf\xef\xbb\xbf1",
    ],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
async def test_what_is_no_json_is_answered_400(body: bytes) -> None:
    async def endpoint(request: Request) -> AsyncIterator[Any]:
        yield ServerSentEvent({"got": await request.json()})

    async with open_stream(create_app({"/": endpoint}), method="POST", body=body) as stream:
        assert stream.status == 400
        text = await stream.read()
    assert text.startswith(b"the body is not JSON: ")
    assert len(text) < 300


@pytest.mark.anyio
@given(
    value=st.recursive(
        st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists
    )
)
@settings(parent=FUZZ, max_examples=20)
async def test_what_is_json_is_what_was_sent(value: Any) -> None:
    got = []

    async def endpoint(request: Request) -> None:
        got.append(await request.json())
        raise HTTPError(204)

    for body in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        async with open_stream(create_app({"/": endpoint}), method="POST", body=body.encode()) as stream:
            assert stream.status == 204
    assert got == [value, value]


# What others get to see


FORGED = "/a\r\n2026-01-01 ERROR forged"


@pytest.mark.anyio
async def test_a_path_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Nor does it fill the log, nor fail to be written: a path may have what no encoding carries."""

    async def fails(request: Request) -> AsyncIterator[str]:
        yield "first"
        raise LookupError

    def on_error(error: Exception) -> ServerSentEvent:
        raise ValueError

    app = create_app({"/{name}": fails}, on_error=on_error)
    for path in (FORGED, "/" + "a" * 10_000, "/\u2028\x1b[31m", "/\udcff"):
        with suppress(LookupError):
            async with open_stream(app, scope={"path": path}) as stream:
                while await stream.read():
                    pass
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 300 for line in lines)


@pytest.mark.anyio
async def test_an_id_forges_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def on_join(subscription: Any) -> None:
        raise LookupError

    broker = Broker(on_join=on_join)
    app = create_app({"/": broker.channel("news")})
    async with open_stream(app, "/?last_event_id=a%0D%0Aforged") as stream:
        await stream.receive()
    (record,) = caplog.records
    assert record.message.isprintable()  # as it was written: what it says of itself changes


@pytest.mark.anyio
async def test_names_of_channels_fill_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A request may name a hundred, of 200 characters each."""

    def on_join(subscription: Any) -> None:
        raise LookupError

    broker = Broker(on_join=on_join)
    query = "&".join(f"channel=c{number:03}{'x' * 190}" for number in range(MAX_CHANNELS))
    async with open_stream(create_app({"/": broker.endpoint()}), f"/?{query}") as stream:
        assert stream.status == 200
        await stream.read()
    (record,) = caplog.records
    assert len(record.message) < 300
    assert len(vars(record)["sse_channel"]) <= 200
    assert len(repr(broker.subscribe(*(f"c{number}" for number in range(1000))))) < 300


@pytest.mark.anyio
async def test_who_cannot_be_answered_is_not_told_where_the_engine_is() -> None:
    async def endpoint() -> None:
        raise UnavailableError("redis://user:***@10.0.0.7:6379/0 did not answer within 5 s (Connection refused)")

    async with open_stream(create_app({"/": endpoint})) as stream:
        assert (stream.status, stream.headers["retry-after"]) == (503, "5")
        assert await stream.read() == b"Service Unavailable"
    assert "10.0.0.7" in str(UnavailableError("redis://10.0.0.7:6379/0 did not answer"))


@pytest.mark.parametrize("url", ["redis://:secret@h:port/0", "nats://secret@", "redis+sentinel://u:secret@"])
def test_a_url_that_is_none_keeps_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis|nats") as raised:
        Broker(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["location", "set-cookie"])
@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0b", "a\rb", "\u2028", "x" * 10_000 + "\n"])
def test_a_header_that_would_inject_another_is_refused(name: str, value: str) -> None:
    for make in (
        lambda: HTTPError(302, headers={name: value}),
        lambda: EventSourceResponse([], headers={name: value}),
        lambda: HTTPError(302, headers={value: name}),
    ):
        with pytest.raises(ValueError, match="headers: ") as raised:
            make()
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding"])
def test_the_frame_of_an_error_is_not_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="frames the body"):
        HTTPError(400, headers={name: "1"})


def test_the_headers_of_an_error_are_a_mapping() -> None:
    pairs: Any = [("allow", "POST")]
    with pytest.raises(TypeError, match=r"headers=\[\('allow', 'POST'\)\]: give a mapping"):
        HTTPError(405, headers=pairs)


@pytest.mark.anyio
async def test_an_error_has_one_content_type() -> None:
    async def endpoint() -> None:
        raise HTTPError(400, '{"why": "so"}', {"Content-Type": "application/json"})

    async with open_stream(create_app({"/": endpoint})) as stream:
        assert stream.headers["content-type"] == "application/json"

    seen: list[Any] = []

    async def send(message: Any) -> None:
        seen.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await create_app({"/": endpoint})(scope, receive, send)
    assert [name for name, _ in seen[0]["headers"]].count(b"content-type") == 1


def test_an_idempotency_key_is_text_that_can_be_sent() -> None:
    broker = Broker()
    for key in ("", "x" * 201, "\ud800", 5, b"x"):
        with pytest.raises(ValueError, match="idempotency_key must be "):
            broker.publish_nowait("news", "x", idempotency_key=key)  # type: ignore[arg-type]
    assert broker.publish_nowait("news", "x", idempotency_key="x" * 200)


# Apps around which the middleware is


MESSAGES = st.sampled_from(
    [
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]},
        {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream; x")]},
        {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]},
        {"type": "http.response.start", "status": 500},
        {"type": "http.response.start", "status": 200, "trailers": True, "headers": []},
        {"type": "http.response.body"},
        {"type": "http.response.body", "body": b"data: x\n\n", "more_body": True},
        {"type": "http.response.body", "body": b"data: x\r", "more_body": True},
        {"type": "http.response.body", "body": b"", "more_body": True},
        {"type": "http.response.body", "body": bytearray(b"\n"), "more_body": True},
        {"type": "http.response.body", "body": b"\n", "more_body": False},
        {"type": "http.response.trailers", "headers": []},
        {"type": "http.response.pathsend", "path": "/nowhere"},
        {"type": "http.response.debug", "info": {}},
        {"type": "http.disconnect"},
        {"type": ""},
        "receive",
        "raise",
    ]
)


class RefusedError(Exception):
    """What a server says of a message out of order."""


class StrictServer:
    """Takes what ASGI allows, and raises at anything else."""

    def __init__(self) -> None:
        self.state = "start"
        self.asked = 0

    async def receive(self) -> Any:
        self.asked += 1
        if self.asked == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        if self.state != "over":
            await anyio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        kind = message["type"]
        if self.state == "start" and kind == "http.response.start":
            self.state = "body"
        elif self.state == "body" and kind == "http.response.body":
            bytes(message.get("body", b""))
            self.state = "body" if message.get("more_body", False) else "over"
        elif self.state == "body" and kind == "http.response.pathsend":
            self.state = "over"
        else:
            raise RefusedError(f"{kind!r} in {self.state}")


@pytest.mark.anyio
@given(messages=st.lists(MESSAGES, max_size=8))
@settings(parent=FUZZ, max_examples=150)
async def test_an_app_that_sends_anything_in_any_order(messages: list[Any]) -> None:
    """It ends, and raises nothing but what the app or the server raised."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            if message == "receive":
                with anyio.move_on_after(0.1):
                    await receive()
            elif message == "raise":
                raise LookupError
            else:
                await send(message)

    wrapped, server = SSEMiddleware(app), StrictServer()
    scope = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    with anyio.fail_after(60), suppress(LookupError, RefusedError):
        await wrapped(scope, server.receive, server.send)
    assert len(wrapped.registry) == 0


# SECURITY.md


def default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


@pytest.mark.parametrize(
    ("of", "limit", "value"),
    [
        ("a request's body", "1 MiB", default(Request.body, "limit") == default(Request.json, "limit") == 2**20),
        ("a body that nobody reads", "64 KiB", receiver._AHEAD == adoption._AHEAD == 2**16),
        ("a query", "64 KiB", endpoint._PARSED_BYTES == 2**16),
        ("channels that one request names", "100", MAX_CHANNELS == 100),
        ("a channel's name", "200", MAX_NAME == 200),
        ("what is sent to one client", "64 KiB", writer.MESSAGE_BYTES == 2**16),
        ("what a source may be ahead", "16 KiB", buffer.TURN_BYTES == 2**14),
        ("how long a client may take", "30 s", StreamOptions().send_timeout == 30),
        ("synchronous sources", "256", MAX_THREADS == 256),
        ("events that a channel keeps", "1,000", default(Broker, "history") == 1000),
        ("memory that they take", "16 MiB", default(Broker, "max_bytes") == 2**24),
        ("channels that are kept", "10,000", default(Broker, "max_channels") == 10_000),
        ("runs that go on", "1,000", default(Broker, "max_runs") == 1000),
        ("an idempotency key", "200", publishing._MAX_KEY == 200),
        ("such keys", "1,000,000 in 120 s", (memory._IDEMPOTENCY_KEYS, memory._IDEMPOTENCY_WINDOW) == (10**6, 120)),
        ("readers of a channel", "none", default(Broker, "max_subscribers") is None),
        ("how long a stream lasts", "none", StreamOptions().max_lifetime is None),
        ("what an `EventDecoder` holds", "none", default(EventDecoder, "max_event_bytes") is None),
        ("how long `authorize` has", "10 s", broker_endpoint._MIN_RECHECK_TIMEOUT_S == 10),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 12 else "",
)
def test_the_numbers_of_security_md(of: str, limit: str, value: bool) -> None:
    text = Path(__file__).parents[2].joinpath("SECURITY.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {of}")]
    assert limit in row[1]
    assert value


@pytest.mark.anyio
async def test_a_body_that_nobody_reads_is_not_read_for_them() -> None:
    taken, ahead = 0, []

    async def receive() -> Any:
        nonlocal taken
        await anyio.lowlevel.checkpoint()
        taken += 4096
        return {"type": "http.request", "body": b"x" * 4096, "more_body": True}

    async def send(message: Any) -> None: ...

    async def endpoint() -> AsyncIterator[str]:
        await anyio.sleep(0.5)
        ahead.append(taken)
        if ahead:
            raise HTTPError(204)
        yield "never"

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await create_app({"/": endpoint})(scope, receive, send)
    assert 0 < ahead[0] <= 65_536 + 4096


def test_a_flood_of_idempotency_keys_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_IDEMPOTENCY_KEYS", 3)
    broker = Broker()
    ids = [broker.publish_nowait("news", "x", idempotency_key=f"{number}") for number in range(3)]
    with pytest.raises(BrokerError, match="more than 3 idempotency keys within 120 s"):
        broker.publish_nowait("news", "x", idempotency_key="3")
    assert broker.publish_nowait("news", "x", idempotency_key="0") == ids[0]
