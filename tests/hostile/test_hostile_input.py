"""Bytes, text and messages that no honest peer sends: they get an answer, or the documented error."""

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
from asgi_sse.routing import request as routing_request
from asgi_sse.stream import buffer, receiver, writer
from asgi_sse.stream.options import StreamOptions
from asgi_sse.stream.source import MAX_THREADS
from asgi_sse.testing import open_stream

FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


# Hypothesis feeds the targets that tests/fuzz feeds with atheris.

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
def test_fuzz_target_holds(target: Callable[[bytes], None]) -> None:
    @FUZZ
    @given(st.binary(min_size=1, max_size=8), pieces | st.binary(max_size=200))
    def run(seed: bytes, data: bytes) -> None:
        target(seed + data)

    run()


# Bounds


def test_decoder_memory_is_bounded_in_any_chunking() -> None:
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
                    decoder.feed(bytes(bytearray(piece)))  # a new object each time
            assert tracemalloc.get_traced_memory()[1] < 12 * limit
        finally:
            tracemalloc.stop()


def test_retry_with_too_many_digits_is_ignored() -> None:
    """A process may limit its ints to 640 digits, and int() raises beyond that."""
    decoder = EventDecoder()
    decoder.feed(b"retry: " + b"9" * 641 + b"\n\n")
    assert decoder.retry is None
    decoder.feed(b"retry: " + b"0" * 639 + b"5\n\n")
    assert decoder.retry == 5


@pytest.mark.anyio
async def test_query_over_64_kib_is_refused() -> None:
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
async def test_cookies_over_64_kib_are_refused() -> None:
    async def endpoint(request: Request) -> AsyncIterator[str]:
        yield str(len(request.cookies))

    app = create_app({"/": endpoint})
    async with open_stream(app, headers=[("cookie", f"n{number}=%41") for number in range(5000)]) as stream:
        assert (await stream.receive()).data == "5000"
    async with open_stream(app, headers={"cookie": "a=" + "a" * 65_535}) as stream:
        assert stream.status == 431
        assert await stream.read() == b"the cookies have more than 65536 bytes"


@pytest.mark.anyio
async def test_request_for_more_than_100_channels_is_refused() -> None:
    assert MAX_CHANNELS == 100
    app = create_app({"/": Broker().endpoint()})
    for number, status in ((100, 200), (101, 400)):
        async with open_stream(app, "/?" + "&".join(f"channel=c{n}" for n in range(number))) as stream:
            assert stream.status == status


def test_access_checks_many_grants_in_linear_time() -> None:
    """With a pattern per grant, 100 requested among 1,000 granted names once blocked the event loop for 2 s."""
    access = Access([f"user.{number}" for number in range(2000)])
    began = time.process_time()
    assert not any(access.covers(f"other.{number}") for number in range(100))
    assert time.process_time() - began < 1


def test_long_pattern_is_matched_in_linear_time() -> None:
    access = Access([".".join("*" * 100), ".".join("*" * 50) + ".**"])
    began = time.process_time()
    for _ in range(100):
        assert not access.covers("a" * 200)
        assert not access.covers(".".join("a" * 49) + ".")
        assert access.covers(".".join("a" * 100))
    assert time.process_time() - began < 1


def test_path_with_a_million_segments_is_not_split() -> None:
    from asgi_sse.routing.routes import RouteTable

    async def endpoint() -> None: ...

    table = RouteTable({"/a/{b}/c": endpoint, "/{a}": endpoint})
    path = "/a" * 1_000_000
    tracemalloc.start()
    try:
        assert table.find(path) is None
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # one copy of the rest, and no object per segment
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
async def test_invalid_json_is_answered_400(body: bytes) -> None:
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
async def test_json_body_round_trips(value: Any) -> None:
    got = []

    async def endpoint(request: Request) -> None:
        got.append(await request.json())
        raise HTTPError(204)

    for body in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        async with open_stream(create_app({"/": endpoint}), method="POST", body=body.encode()) as stream:
            assert stream.status == 204
    assert got == [value, value]


# What clients and logs may show


FORGED = "/a\r\n2026-01-01 ERROR forged"


@pytest.mark.anyio
async def test_path_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """It also cannot fill the log, and a path that no encoding carries is still written."""

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
async def test_id_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    def on_join(subscription: Any) -> None:
        raise LookupError

    broker = Broker(on_join=on_join)
    app = create_app({"/": broker.channel("news")})
    async with open_stream(app, "/?last_event_id=a%0D%0Aforged") as stream:
        await stream.receive()
    (record,) = caplog.records
    assert record.message.isprintable()  # the text as it was written, since the repr of a subscription changes


@pytest.mark.anyio
async def test_channel_names_cannot_fill_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    """A request may name a hundred channels of 200 characters each."""

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
async def test_client_is_not_told_the_address_of_the_backend() -> None:
    async def endpoint() -> None:
        raise UnavailableError("redis://user:***@10.0.0.7:6379/0 did not answer within 5 s (Connection refused)")

    async with open_stream(create_app({"/": endpoint})) as stream:
        assert (stream.status, stream.headers["retry-after"]) == (503, "5")
        assert await stream.read() == b"Service Unavailable"
    assert "10.0.0.7" in str(UnavailableError("redis://10.0.0.7:6379/0 did not answer"))


@pytest.mark.parametrize("url", ["redis://:secret@h:port/0", "nats://secret@", "redis+sentinel://u:secret@"])
def test_error_about_a_bad_url_hides_its_password(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis|nats") as raised:
        Broker(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["location", "set-cookie"])
@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0b", "a\rb", "\u2028", "x" * 10_000 + "\n"])
def test_header_with_a_line_end_is_refused(name: str, value: str) -> None:
    for make in (
        lambda: HTTPError(302, headers={name: value}),
        lambda: EventSourceResponse([], headers={name: value}),
        lambda: HTTPError(302, headers={value: name}),
    ):
        with pytest.raises(ValueError, match="headers: ") as raised:
            make()
        assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", ["Content-Length", "Transfer-Encoding"])
def test_http_error_cannot_set_framing_headers(name: str) -> None:
    with pytest.raises(ValueError, match="frames the body"):
        HTTPError(400, headers={name: "1"})


def test_http_error_headers_must_be_a_mapping() -> None:
    pairs: Any = [("allow", "POST")]
    with pytest.raises(TypeError, match=r"headers must be a mapping, got \[\('allow', 'POST'\)\]"):
        HTTPError(405, headers=pairs)


@pytest.mark.anyio
async def test_http_error_has_one_content_type() -> None:
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


def test_idempotency_key_must_be_encodable_text() -> None:
    broker = Broker()
    for key in ("", "x" * 201, "\ud800", 5, b"x"):
        with pytest.raises(ValueError, match="idempotency_key must be"):
            broker.publish_nowait("news", "x", idempotency_key=key)  # type: ignore[arg-type]
    assert broker.publish_nowait("news", "x", idempotency_key="x" * 200)


# Apps inside the middleware


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
    """A server raises this for a message that ASGI does not allow here."""


class StrictServer:
    """A server that accepts what ASGI allows and raises at anything else."""

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
        ("a request body read", "1 MiB", default(Request.body, "limit") == default(Request.json, "limit") == 2**20),
        (
            "a request body that nobody reads",
            "64 KiB",
            receiver._READ_AHEAD_BYTES == adoption._READ_AHEAD_BYTES == 2**16,
        ),
        ("a query", "64 KiB", routing_request._PARSED_BYTES == 2**16),
        ("channels named in one request", "100", MAX_CHANNELS == 100),
        ("a channel name", "200", MAX_NAME == 200),
        ("bytes in one message", "64 KiB", writer.MESSAGE_BYTES == 2**16),
        ("bytes that a source may run ahead", "16 KiB", buffer.TURN_BYTES == 2**14),
        ("time for a client to take one message", "30 s", StreamOptions().send_timeout == 30),
        ("sync sources", "256", MAX_THREADS == 256),
        ("events kept in a channel", "1,000", default(Broker, "history") == 1000),
        ("memory for the events", "16 MiB", default(Broker, "max_bytes") == 2**24),
        ("channels kept", "10,000", default(Broker, "max_channels") == 10_000),
        ("active runs", "1,000", default(Broker, "max_runs") == 1000),
        ("an idempotency key", "200", publishing._MAX_KEY == 200),
        (
            "idempotency keys",
            "1,000,000 in 120 s",
            (memory._MAX_IDEMPOTENCY_KEYS, memory._IDEMPOTENCY_WINDOW_S) == (10**6, 120),
        ),
        ("subscribers of one channel", "none", default(Broker, "max_subscribers") is None),
        ("lifetime of a stream", "none", StreamOptions().max_lifetime is None),
        ("bytes that an `EventDecoder` holds", "none", default(EventDecoder, "max_event_bytes") is None),
        ("time for a repeated `authorize`", "10 s", broker_endpoint._MIN_RECHECK_TIMEOUT_S == 10),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) > 12 else "",
)
def test_security_md_states_the_limits_of_the_code(of: str, limit: str, value: bool) -> None:
    text = Path(__file__).parents[2].joinpath("SECURITY.md").read_text()
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {of}")]
    assert limit in row[1]
    assert value


@pytest.mark.anyio
async def test_unread_request_body_is_read_ahead_only_a_little() -> None:
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


def test_too_many_idempotency_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MAX_IDEMPOTENCY_KEYS", 3)
    broker = Broker()
    ids = [broker.publish_nowait("news", "x", idempotency_key=f"{number}") for number in range(3)]
    with pytest.raises(BrokerError, match="at most 3 idempotency keys within 120 s"):
        broker.publish_nowait("news", "x", idempotency_key="3")
    assert broker.publish_nowait("news", "x", idempotency_key="0") == ids[0]
