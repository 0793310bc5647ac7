"""Fuzz targets: functions that take any bytes and raise if a promise is broken.

test_hostile_input.py feeds them with hypothesis, fuzz/run.py with atheris.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

from asgi_sse import EventDecoder, InvalidEventError, Request, ServerSentEvent
from asgi_sse.broker.backends import codec as wire
from asgi_sse.broker.endpoint import Access
from asgi_sse.broker.log import EventLog
from asgi_sse.broker.patterns import check_name, check_pattern, is_pattern, pattern_test
from asgi_sse.broker.publishing import check_idempotency_key
from asgi_sse.errors import printable, short_repr
from asgi_sse.middleware.responder import _without_accept_encoding
from asgi_sse.protocol.event import encode_item
from asgi_sse.routing.cors import CORS, is_preflight
from asgi_sse.routing.routes import RouteTable
from asgi_sse.runtime.compressors import encoding_of
from asgi_sse.stream.buffer import SendBuffer
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.receiver import RequestReceiver

SEPARATORS: Final = ("\n", "\r\n", "\r")


def text(data: bytes) -> str:
    """Decode to text, with lone surrogates where `data` is not UTF-8."""
    return data.decode("utf-8", "surrogateescape")


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut `data` after its first byte into pieces, whose sizes the data decides."""
    start, size = 1, data[0] % 7 + 1
    while start < len(data):
        yield data[start : start + size]
        start, size = start + size, data[start] % 7 + 1


def seen(events: list[ServerSentEvent]) -> list[tuple[Any, ...]]:
    """Reduce events to what a client sees."""
    return [(event.data, event.event, event.id) for event in events]


def refused(kind: type[Exception], call: Callable[[], object]) -> str:
    """Return the message of the error that `call` raises, or ``""``."""
    try:
        call()
    except kind as exc:
        return str(exc)
    return ""


def decoder(data: bytes) -> None:
    """Bytes in any chunking decode to the same events, ids and reconnection time as in one piece."""
    whole, cut = EventDecoder(), EventDecoder()
    events = whole.feed(data[1:])
    assert seen([event for chunk in pieces(data) for event in cut.feed(chunk)]) == seen(events)
    assert (cut.last_event_id, cut.retry) == (whole.last_event_id, whole.retry)
    assert all("\r" not in (event.data or "") for event in events)


def decoder_limit(data: bytes) -> None:
    """A limit yields a prefix of the events in any chunking, and then the documented error for ever."""
    events = seen(EventDecoder().feed(data[1:]))
    outcomes = []
    for chunks in ([data[1:]], pieces(data)):
        limited = EventDecoder(max_event_bytes=data[0] + 1)
        got: list[ServerSentEvent] = []
        with suppress(InvalidEventError):
            for chunk in (*chunks, b""):  # the empty chunk raises an error that came after events
                got += limited.feed(chunk)
        error = refused(InvalidEventError, partial(limited.feed, b""))
        assert seen(got) == (events[: len(got)] if error else events)
        outcomes.append((seen(got), error))
    assert outcomes[0] == outcomes[1]


def round_trip(data: bytes) -> None:
    """An event that can be built decodes to itself with each line end. Any other raises the documented error."""
    parts = [text(part) for part in data.split(b"|", 4)]
    names = ("data", "event", "id", "comment", "retry")
    fields: dict[str, Any] = dict(zip(names, parts, strict=False))
    if "retry" in fields:
        fields["retry"] = len(fields["retry"])
    if why := refused(InvalidEventError, lambda: ServerSentEvent(**fields)):
        assert why.isprintable()
        assert len(why) < 1000
        return
    event = ServerSentEvent(**fields)
    for sep in SEPARATORS:
        reader = EventDecoder()
        (got,) = reader.feed(event.encode(sep))
        assert (got.data, got.event, got.id) == (event.data, event.event or "message", event.id or "")
        assert reader.retry == event.retry
    assert encode_item(fields) == event.encode() == encode_item(event)


def item(data: bytes) -> None:
    """The fast path for common items encodes to the same bytes as a `ServerSentEvent`."""
    head, _, rest = data.partition(b"|")
    ident, _, kind = rest.partition(b"|")
    for value in (text(head), {"data": text(head)}, {"data": text(head), "id": text(ident), "event": text(kind)}):
        arguments: dict[str, Any] = value if isinstance(value, dict) else {"data": value}
        if refused(InvalidEventError, partial(ServerSentEvent, **arguments)):
            assert refused(InvalidEventError, partial(encode_item, value))
        else:
            assert encode_item(value) == ServerSentEvent(**arguments).encode()


class _Nobody:
    def resume(self, source: Any) -> None:
        raise AssertionError("no source waits")


def boundary(data: bytes) -> None:
    """A comment inserted where a buffer reports an event boundary does not change the events."""
    buffer = SendBuffer(_Nobody())  # type: ignore[arg-type]
    sent = b""
    for chunk in pieces(data):
        if buffer.at_boundary and sent:  # before the first byte there may be a byte order mark
            sent += b": ping\n\n"
        buffer.push(chunk)
        sent += buffer.take(1_000_000)
    assert seen(EventDecoder().feed(sent)) == seen(EventDecoder().feed(data[1:]))


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def request(data: bytes) -> None:
    """Any path, query and headers give values or an `HTTPError`."""
    first, _, rest = data.partition(b"|")
    second, _, third = rest.partition(b"|")
    scope = {
        "type": "http",
        "method": "GET",
        "path": first.decode("utf-8", "replace"),
        "root_path": text(third[:5]),
        "query_string": second,
        "headers": [(b"cookie", third), (b"last-event-id", first), (b"content-length", second), (third, b"")],
    }
    made = Request(scope, RequestReceiver(_nothing), None, DrainingEvent())  # type: ignore[arg-type]
    assert made.path
    assert all(isinstance(value, str) for value in (*made.query.values(), *made.cookies.values()))
    assert all(made.headers[name] is not None for name in made.headers)
    assert made.last_event_id is None or made.last_event_id
    if made.last_event_id:
        made.last_event_id.encode()  # so that it may be sent back
    for value in (*made.query.values(), *made.cookies.values()):
        value.encode()


async def _endpoint() -> None: ...


_TABLE: Final = RouteTable(dict.fromkeys(("/", "/a", "/a/{b}", "/{a}/b", "/{a}/{b}/c", "/a/{b}/"), _endpoint))


def route(data: bytes) -> None:
    """A route parameter is one whole, non-empty segment."""
    path = text(data)
    found = _TABLE.find(path)
    if found is not None:
        assert path.startswith("/")
        assert all(value and "/" not in value for value in found[1].values())
        assert len(path.split("/")) <= 4
    elif path.startswith("/"):
        segments = path.split("/")[1:]
        assert path not in ("/", "/a")
        assert not (len(segments) == 2 and segments[0] == "a" and segments[1])


def names(data: bytes) -> None:
    """Text is a valid name or pattern, or raises `ValueError`. Patterns match by segments."""
    first, _, second = data.partition(b"|")
    pattern, name = text(first), text(second) or "a.b"
    if why := refused(ValueError, lambda: (check_pattern(pattern), check_name(name))):
        assert why.isprintable()
        return
    assert pattern.isascii()
    assert pattern.isprintable()
    assert " " not in pattern
    parts, segments = pattern.split("."), name.split(".")
    if parts[-1] == "**":
        matches = len(segments) >= len(parts)
        parts.pop()
        segments = segments[: len(parts)]
    else:
        matches = len(segments) == len(parts)
    matches = matches and all(part in ("*", segment) for part, segment in zip(parts, segments, strict=True))
    assert pattern_test(pattern)(name) == matches == Access(pattern).covers(name)
    if is_pattern(pattern):
        assert Access("**").covers(pattern)
        assert not Access(name).covers(pattern)


def ids(data: bytes) -> None:
    """An id of this log parses to an offset, any other text to a reason."""
    log = EventLog(epoch="e")
    for number in range(data[0] % 5):
        log.append("a", ServerSentEvent("x"), float(number))
    for given in (text(data[1:]), "e-" + text(data[1:]), text(data[1:]) + "-1"):
        place = log.parse(given)
        if isinstance(place, int):
            assert 0 <= place <= log.last_offset
            assert log.id_of(place) == given
        else:
            assert place in ("unknown", "epoch")
    with suppress(ValueError):
        key = check_idempotency_key(text(data))
        assert key is not None
        assert key.encode()


def wire_format(data: bytes) -> None:
    """A payload from a backend is an event or raises the documented error."""
    for payload in (
        data,
        b'{"data":' + data + b"}",
        b'{"data":"x","event":"' + data + b'"}',
        b'{"retry":' + data + b"}",
    ):
        if why := refused(InvalidEventError, partial(wire.load, payload)):
            assert len(why) < 2000
            continue
        event, end = wire.load(payload)
        EventDecoder().feed(event.encode())
        if end is None or not any("\ud800" <= char <= "\udfff" for char in end):
            assert wire.load(wire.dump(event, end)) == (event, end)


_ONE: Final = CORS(["https://example.com", "null"], credentials=True)
_ANY: Final = CORS("*")


def cors(data: bytes) -> None:
    """An origin is allowed as a whole or not at all, and the response repeats it unchanged."""
    scope = {"method": "OPTIONS", "headers": [(b"Origin", data), (b"access-control-request-method", data)]}
    allowed = dict(_ONE.response_headers(scope)).get(b"access-control-allow-origin")
    assert (allowed == data) == (data.lower() in (b"https://example.com", b"null"))
    assert allowed in (None, data)
    assert dict(_ANY.response_headers(scope)).get(b"access-control-allow-origin") == (b"*" if data else None)
    assert is_preflight(scope) == bool(data)


def accept(data: bytes) -> None:
    """A request that accepts event streams loses its Accept-Encoding. Any other stays unchanged."""
    first, _, second = data.partition(b"|")
    headers = [(b"accept", first), (b"accept-encoding", second), (first, second), (b"content-encoding", second)]
    found = list(_without_accept_encoding(headers))
    if b"text/event-stream" in first:
        assert b"accept-encoding" not in dict(found)
    else:
        assert found == headers
    assert encoding_of(headers) == "" or second.lower() != b"identity"


def logged(data: bytes) -> None:
    """Text of a client is shown as one short line."""
    for line in (
        printable(text(data)),
        short_repr(text(data)),
        short_repr(data),
        short_repr({text(data): [text(data)] * 9}),
    ):
        assert line.isprintable()
        assert len(line) < 2000


ALL: Final[list[Callable[[bytes], None]]] = [
    decoder, decoder_limit, round_trip, item, boundary, request, route, names, ids, wire_format, cors, accept, logged,
]  # fmt: skip
