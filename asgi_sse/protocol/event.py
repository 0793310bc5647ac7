"""One event: validated and normalised when it is built, immutable afterwards, encoded on demand.

The rules are those of WHATWG HTML, 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event stream".
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from asgi_sse.errors import InvalidEventError, short_repr

JSONDumps: TypeAlias = Callable[[Any], str | bytes]
ItemEncoder: TypeAlias = Callable[[Any, str, JSONDumps | None], bytes]

SEPARATORS: Final = ("\n", "\r\n", "\r")
"""The only line ends of an event stream (9.2.5). U+2028 and similar characters are data."""

_FIELDS: Final = frozenset({"data", "event", "id", "retry", "comment"})
_PLAIN: Final = (str, int, float)
_INT_LIMIT: Final = 10**100  # Python refuses to convert an int of over 4,300 digits to text
_ENCODED: Final = (bytes, bytearray, memoryview)

# NaN and Infinity are not JSON, and JSON.parse in a browser throws on them.
_compact_json: JSONDumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class ServerSentEvent:
    """One event of an event stream.

    The attributes hold what a client will see: ``data`` is text with its line ends normalised to LF, and
    ``id`` and ``event`` are ``str``.

    Args:
        data: The data. A ``str`` or a number is sent as text, ``bytes`` as UTF-8, and any other JSON value
            (``dict``, ``list``, ``tuple``, ``bool``) as compact JSON. ``None`` sends no data.
        event: The event's type. ``None`` and ``""`` mean ``message``. A type requires data, because a client
            dispatches nothing for a block without data (9.2.6).
        id: The event's id, which the client sends back as ``Last-Event-ID``. ``""`` makes the client forget
            its last id.
        retry: The client's reconnection time from now on, in milliseconds.
        comment: Text that clients ignore. Each of its lines becomes a comment line.

    Raises:
        InvalidEventError: A client could not read the event as meant: CR or LF in ``event`` or ``id``, NUL in
            ``id``, a ``retry`` that is not a whole number of at least 0, text that is not UTF-8, data that is
            not JSON, a type without data, or no field at all.
    """

    __slots__ = ("_comment", "_data", "_event", "_id", "_retry")
    __match_args__ = ("data", "event", "id")

    def __init__(
        self,
        data: Any = None,
        *,
        event: str | None = None,
        id: str | int | None = None,  # noqa: A002 (the field's name in the standard)
        retry: int | None = None,
        comment: str | None = None,
    ) -> None:
        if data is not None:
            # Nearly every event takes the short way: ASCII text without line ends to normalise. Three cheap tests.
            if type(data) is not str or not data.isascii() or "\r" in data:
                data = _text(_data_text(data), "data")
        elif event:
            raise InvalidEventError(
                f"event must come with data, or a client dispatches nothing, got event={short_repr(event)} alone; "
                "pass data='' if there is nothing to say"
            )
        elif id is None and retry is None and comment is None:
            raise InvalidEventError("an event must have a field, got nothing to send; pass data, id, retry or comment")
        self._data: str | None = data
        self._event = None if event is None else one_line(event, "event") or None
        self._id = id if id is None or (type(id) is str and id.isascii() and id.isalnum()) else id_text(id)
        self._retry = None if retry is None else milliseconds(retry)
        self._comment = None if comment is None else _text(comment, "comment")

    @property
    def data(self) -> str | None:
        """The text of the data lines, joined by LF."""
        return self._data

    @property
    def event(self) -> str | None:
        """The event's type."""
        return self._event

    @property
    def id(self) -> str | None:
        """The event's id."""
        return self._id

    @property
    def retry(self) -> int | None:
        """The reconnection time in milliseconds."""
        return self._retry

    @property
    def comment(self) -> str | None:
        """The text of the comment lines, joined by LF."""
        return self._comment

    def encode(self, sep: str = "\n") -> bytes:
        r"""Return the event as bytes, with the closing blank line.

        Args:
            sep: The line end: ``"\n"``, ``"\r\n"`` or ``"\r"``.

        Raises:
            ValueError: ``sep`` is not one of the three.
        """
        text = ""
        if self._comment is not None:
            text = f": {_fold(self._comment, ': ')}\n"
        if self._id is not None:
            text += f"id: {self._id}\n"
        if self._event is not None:
            text += f"event: {self._event}\n"
        data = self._data
        if data is not None:
            # Clients remove one space after the colon, so a value that starts with a space needs another one.
            text += f"data: {data}\n" if "\n" not in data else f"data: {_fold(data, 'data: ')}\n"
        if self._retry is not None:
            text += f"retry: {self._retry}\n"
        text += "\n"
        if sep != "\n":
            # No field holds a CR, and each LF is a line end.
            text = text.replace("\n", check_separator(sep))
        return text.encode()

    def _fields(self) -> tuple[str | None, str | None, str | None, int | None, str | None]:
        return self._data, self._event, self._id, self._retry, self._comment

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if isinstance(other, ServerSentEvent) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        names = ("data", "event", "id", "retry", "comment")
        given = (
            f"{name}={short_repr(value)}"
            for name, value in zip(names, self._fields(), strict=True)
            if value is not None
        )
        return f"{type(self).__name__}({', '.join(given)})"


class JSONServerSentEvent(ServerSentEvent):
    """An event whose data is always JSON: a ``str`` is quoted, and ``None`` becomes ``null``.

    Args:
        data: Any JSON value.
        event: The event's type.
        id: The event's id.
        retry: The client's reconnection time, in milliseconds.
        comment: Text that clients ignore.

    Raises:
        InvalidEventError: `data` is not a JSON value, or a client could not read another field as meant.
    """

    __slots__ = ()

    def __init__(
        self,
        data: Any,
        *,
        event: str | None = None,
        id: str | int | None = None,  # noqa: A002
        retry: int | None = None,
        comment: str | None = None,
    ) -> None:
        super().__init__(json_text(data), event=event, id=id, retry=retry, comment=comment)


def decoded_event(data: str, event: str, last_event_id: str) -> ServerSentEvent:
    """Return an event with the fields that a decoder read. The format guarantees that they are valid."""
    self = ServerSentEvent.__new__(ServerSentEvent)
    self._data, self._event, self._id, self._retry, self._comment = data, event, last_event_id, None, None
    return self


def event_with_id(event: ServerSentEvent, id: str) -> ServerSentEvent:  # noqa: A002 (the field's name in the standard)
    """Return a copy of `event` with another id, which is not checked."""
    self = ServerSentEvent.__new__(ServerSentEvent)
    self._data, self._event, _, self._retry, self._comment = event._fields()
    self._id = id
    return self


def as_event(item: Any) -> ServerSentEvent:
    """Return `item` as an event. Takes what `encode_item` takes, except encoded bytes.

    Raises:
        InvalidEventError: `item` has another type, or a client could not read one of its fields as meant.
    """
    if isinstance(item, ServerSentEvent):
        return item
    if isinstance(item, Mapping):
        return _event_of(item, None)
    if isinstance(item, _PLAIN):
        return ServerSentEvent(item)
    raise InvalidEventError(
        f"an event must be a ServerSentEvent, a dict of its arguments, str, int or float, got {short_repr(item)}"
    )


def encode_item(item: Any, sep: str = "\n", json_dumps: JSONDumps | None = None) -> bytes:
    """Return an item of a source as bytes of the stream.

    Args:
        item: A `ServerSentEvent`; a mapping of its arguments; a ``str`` or number, which becomes the data; or
            encoded bytes, which are sent unchanged.
        sep: The line end.
        json_dumps: Serialises the JSON value in the ``data`` of a mapping. Default: compact JSON.

    Raises:
        InvalidEventError: `item` has another type, or a client could not read one of its fields as meant.
    """
    if isinstance(item, ServerSentEvent):
        return item.encode(sep)
    if sep == "\n" and (block := _plain_block(item)) is not None:
        return block
    if isinstance(item, dict):
        return _event_of(item, json_dumps).encode(sep)
    if isinstance(item, _PLAIN):
        return ServerSentEvent(item).encode(sep)
    if isinstance(item, _ENCODED):
        return bytes(item)
    if isinstance(item, Mapping):
        return _event_of(item, json_dumps).encode(sep)
    raise InvalidEventError(
        f"cannot encode {short_repr(item)}: yield a ServerSentEvent, a dict of its arguments, str, int, float or "
        "encoded bytes; to send a JSON value, yield ServerSentEvent(value)"
    )


def _plain_block(item: Any) -> bytes | None:
    """Return the encoded event for an item that needs no normalising, or ``None`` for any other item.

    Sources mostly yield one line of ASCII, alone or in a ``dict`` with an id or a type. For that, this takes
    half the time of building a `ServerSentEvent`.
    """
    id_and_event = ""
    if type(item) is dict:
        data, id_, event = item.get("data"), item.get("id"), item.get("event")
        fields = 1
        if id_ is not None:
            if type(id_) is not str or not id_.isprintable():
                return None
            id_and_event = f"id: {id_}\n"
            fields = 2
        if event is not None:
            if type(event) is not str or not event.isprintable() or not event:
                return None
            id_and_event += f"event: {event}\n"
            fields += 1
        if fields != len(item):
            return None
    else:
        data = item
    if type(data) is not str or not data.isascii() or "\n" in data or "\r" in data:
        return None
    return f"{id_and_event}data: {data}\n\n".encode()


def json_text(value: Any, dumps: JSONDumps | None = None) -> str:
    """Return `value` as JSON text.

    Args:
        value: The value.
        dumps: Serialises it. Default: compact JSON.

    Raises:
        InvalidEventError: `value` is not a JSON value.
    """
    try:
        text = (dumps or _compact_json)(value)
        return text if isinstance(text, str) else str(text, "utf-8")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidEventError(
            f"data must be a JSON value, got {short_repr(value)} ({exc}); convert it first, or yield a dict and pass "
            "the response a json_dumps that knows its types"
        ) from exc


def check_separator(sep: str) -> str:
    """Return `sep`.

    Raises:
        ValueError: `sep` is not a line end of event streams.
    """
    if sep not in SEPARATORS:
        raise ValueError(f"sep must be a line end, '\\n', '\\r\\n' or '\\r', got {sep!r}")
    return sep


def _event_of(item: Mapping[str, Any], json_dumps: JSONDumps | None) -> ServerSentEvent:
    try:
        if json_dumps is not None:
            data = item.get("data")
            if isinstance(data, bool) or not (data is None or isinstance(data, _PLAIN + _ENCODED)):
                return ServerSentEvent(**{**item, "data": json_text(data, json_dumps)})
        return ServerSentEvent(**item)
    except TypeError:
        unknown = [key for key in item if key not in _FIELDS]
        if not unknown:
            raise
        raise InvalidEventError(
            f"a dict must have the keys data, event, id, retry and comment only, got the unknown key {unknown[0]!r} in "
            f"{short_repr(item)}; to send a dict as JSON, yield ServerSentEvent(the_dict) or {{'data': the_dict}}"
        ) from None


def _data_text(data: Any) -> str:
    if isinstance(data, str):
        return str.__str__(data)  # for an Enum, its value
    if isinstance(data, _ENCODED):
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidEventError(
                f"data must be UTF-8, got {short_repr(data)} ({exc}); encode binary data, for example with base64"
            ) from exc
    if isinstance(data, float) and not math.isfinite(data):
        raise InvalidEventError(f"data must be a number that JSON has, got {data!r}; send it as text")
    return json_text(data)


def id_text(value: str | int) -> str:
    """Return an id as text.

    Raises:
        InvalidEventError: A client could not send `value` back as its last event id.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _INT_LIMIT:
        return int.__repr__(value)  # for an IntEnum, its number
    text = one_line(value, "id")
    if "\0" in text:
        raise InvalidEventError(
            f"id must have no NUL, or clients ignore the id and cannot resume, got {short_repr(value)}; remove it"
        )
    return text


def one_line(value: object, name: str) -> str:
    """Return `value`, the text of the field `name`.

    Raises:
        InvalidEventError: `value` is not a ``str``, has a line end, or is not UTF-8.
    """
    if not isinstance(value, str):
        raise InvalidEventError(
            f"{name} must be a str{' or int' * (name == 'id')}, got {short_repr(value)} of type {type(value).__name__}"
        )
    if "\n" in value or "\r" in value:
        raise InvalidEventError(
            f"{name} must have no line end, which would inject fields, got {short_repr(value)}; remove it"
        )
    return _text(value, name)


def _text(value: str, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidEventError(f"{name} must be a str, got {short_repr(value)} of type {type(value).__name__}")
    if "\r" in value:
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    if not value.isascii():  # O(1): CPython stores this with the string
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidEventError(
                f"{name} must be valid UTF-8, got {short_repr(value)} with a lone surrogate at {exc.start}; decode the "
                "original bytes with errors='replace'"
            ) from exc
    return str.__str__(value)


def milliseconds(value: int) -> int:
    """Return a reconnection time in milliseconds.

    Raises:
        InvalidEventError: `value` is not a whole number of at least 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _INT_LIMIT:
        raise InvalidEventError(f"retry must be a whole number of milliseconds, at least 0, got {short_repr(value)}")
    return int(value)


def _fold(text: str, prefix: str) -> str:
    return text.replace("\n", "\n" + prefix)
