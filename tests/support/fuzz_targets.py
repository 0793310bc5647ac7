"""What is fuzzed: functions of any bytes, which raise where a promise is broken.

test_hostile_input.py gives them what hypothesis thinks of, and fuzz/run.py what atheris finds by coverage.
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
from asgi_sse.routing.endpoint import RouteTable
from asgi_sse.runtime.compressors import encoding_of
from asgi_sse.stream.buffer import SendBuffer
from asgi_sse.stream.receiver import RequestReceiver

SEPARATORS: Final = ("\n", "\r\n", "\r")


def text(data: bytes) -> str:
    """Any text, with lone surrogates where `data` is not UTF-8."""
    return data.decode("utf-8", "surrogateescape")


def pieces(data: bytes) -> Iterator[bytes]:
    """`data` behind its first byte, cut into pieces by that."""
    start, size = 1, data[0] % 7 + 1
    while start < len(data):
        yield data[start : start + size]
        start, size = start + size, data[start] % 7 + 1


def told(events: list[ServerSentEvent]) -> list[tuple[Any, ...]]:
    """The events as a client sees them."""
    return [(event.data, event.event, event.id) for event in events]


def refused(kind: type[Exception], call: Callable[[], object]) -> str:
    """What an error of that kind says; ``""``: there is none."""
    try:
        call()
    except kind as exc:
        return str(exc)
    return ""


def decoder(data: bytes) -> None:
    """Any bytes in any chunking: the same events, ids and time as in one piece."""
    whole, cut = EventDecoder(), EventDecoder()
    events = whole.feed(data[1:])
    assert told([event for chunk in pieces(data) for event in cut.feed(chunk)]) == told(events)
    assert (cut.last_event_id, cut.retry) == (whole.last_event_id, whole.retry)
    assert all("\r" not in (event.data or "") for event in events)


def decoder_limit(data: bytes) -> None:
    """With a limit: the first events of those without, in any chunking; and the documented error, for ever after."""
    events = told(EventDecoder().feed(data[1:]))
    outcomes = []
    for chunks in ([data[1:]], pieces(data)):
        limited = EventDecoder(max_event_bytes=data[0] + 1)
        got: list[ServerSentEvent] = []
        with suppress(InvalidEventError):
            for chunk in (*chunks, b""):  # the last one tells of an error behind events
                got += limited.feed(chunk)
        error = refused(InvalidEventError, partial(limited.feed, b""))
        assert told(got) == (events[: len(got)] if error else events)
        outcomes.append((told(got), error))
    assert outcomes[0] == outcomes[1]


def round_trip(data: bytes) -> None:
    """What can be built is what is decoded, by each line end; what cannot is refused by the documented error."""
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
    """The short way of what sources yield most gives the bytes of the long one."""
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
        raise AssertionError("nobody waits")


def boundary(data: bytes) -> None:
    """A comment between what is taken of foreign bytes, where that is said to be between events, changes none."""
    buffer = SendBuffer(_Nobody())  # type: ignore[arg-type]
    sent = b""
    for chunk in pieces(data):
        if buffer.at_boundary and sent:  # before the first byte there may be a byte order mark
            sent += b": ping\n\n"
        buffer.push(chunk)
        sent += buffer.take(1_000_000)
    assert told(EventDecoder().feed(sent)) == told(EventDecoder().feed(data[1:]))


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


def request(data: bytes) -> None:
    """Any path, query and headers: values, or an `HTTPError`."""
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
    made = Request(scope, RequestReceiver(_nothing), None)  # type: ignore[arg-type]
    assert made.path
    assert all(isinstance(value, str) for value in (*made.query.values(), *made.cookies.values()))
    assert all(made.headers[name] is not None for name in made.headers)
    assert made.last_event_id is None or made.last_event_id
    if made.last_event_id:
        made.last_event_id.encode()  # and so it may stand in an answer
    for value in (*made.query.values(), *made.cookies.values()):
        value.encode()


async def _endpoint() -> None: ...


_TABLE: Final = RouteTable(dict.fromkeys(("/", "/a", "/a/{b}", "/{a}/b", "/{a}/{b}/c", "/a/{b}/"), _endpoint))


def route(data: bytes) -> None:
    """A parameter is one whole segment, which has something in it."""
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
    """A name or pattern is one, or refused by a `ValueError`; and matches by segments."""
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
    """An id of this log is a place in it; any other text is a reason."""
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
    """What an engine delivers is an event, or refused by the documented error."""
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
    """An origin is allowed as a whole or not at all, and what stands in the answer is what was sent."""
    scope = {"method": "OPTIONS", "headers": [(b"Origin", data), (b"access-control-request-method", data)]}
    allowed = dict(_ONE.response_headers(scope)).get(b"access-control-allow-origin")
    assert (allowed == data) == (data.lower() in (b"https://example.com", b"null"))
    assert allowed in (None, data)
    assert dict(_ANY.response_headers(scope)).get(b"access-control-allow-origin") == (b"*" if data else None)
    assert is_preflight(scope) == bool(data)


def accept(data: bytes) -> None:
    """A request that accepts events is as one that knows no compression; any other is as it came."""
    first, _, second = data.partition(b"|")
    headers = [(b"accept", first), (b"accept-encoding", second), (first, second), (b"content-encoding", second)]
    found = list(_without_accept_encoding(headers))
    if b"text/event-stream" in first:
        assert b"accept-encoding" not in dict(found)
    else:
        assert found == headers
    assert encoding_of(headers) == "" or second.lower() != b"identity"


def logged(data: bytes) -> None:
    """What is shown of a client's text is one short line."""
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
