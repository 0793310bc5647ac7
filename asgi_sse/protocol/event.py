"""One event: validated and normalised when it is built, immutable after, encoded on demand.

Rules: WHATWG HTML, 9.2.5 "Parsing an event stream" and 9.2.6 "Interpreting an event stream".
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from asgi_sse.errors import InvalidEventError, short_repr

JSONDumps: TypeAlias = Callable[[Any], str | bytes]
ItemEncoder: TypeAlias = Callable[[Any, str, JSONDumps | None], bytes]

SEPARATORS: Final = ("\n", "\r\n", "\r")
"""The only line ends of an event stream (9.2.5); U+2028 and the like are data."""

_FIELDS: Final = frozenset({"data", "event", "id", "retry", "comment"})
_PLAIN: Final = (str, int, float)
_LARGE: Final = 10**100  # Python refuses to write out an int of over 4,300 digits
_ENCODED: Final = (bytes, bytearray, memoryview)

# NaN and Infinity are not JSON: JSON.parse in the browser would throw on them.
_compact_json: JSONDumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class ServerSentEvent:
    """One block of an event stream.

    Attributes read back what a client will see: ``data`` is text with its line ends
    normalised to LF, ``id`` and ``event`` are ``str``.

    Args:
        data: ``str`` or number, sent as text; UTF-8 ``bytes``; ``None``, no data; or any other JSON
            value (``dict``, ``list``, ``tuple``, ``bool``), sent as compact JSON.
        event: The event's type. ``None`` or ``""`` mean ``message``. Needs data, since a client
            dispatches nothing for a block without data (9.2.6).
        id: What the client sends back as ``Last-Event-ID``; ``""`` makes it forget its last one.
        retry: The client's reconnection time from now on, in milliseconds.
        comment: Text that clients ignore, one comment line for each of its lines.

    Raises:
        InvalidEventError: A field cannot be sent as meant: CR or LF in ``event`` or ``id``, NUL in
            ``id``, a ``retry`` that is no whole number of at least 0, text that is not UTF-8, data
            that is not JSON, an event without data, or nothing at all to send.
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
            # The way of nearly every event, in three cheap tests: plain text without line ends to normalise.
            if type(data) is not str or not data.isascii() or "\r" in data:
                data = _text(_data_text(data), "data")
        elif event:
            raise InvalidEventError(
                f"event={short_repr(event)} without data: a client dispatches nothing for it; "
                "give data, data='' if there is nothing to say"
            )
        elif id is None and retry is None and comment is None:
            raise InvalidEventError("nothing to send: give data, id, retry or comment")
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
        r"""The block as bytes, its closing blank line included.

        Args:
            sep: The line end: ``"\n"``, ``"\r\n"`` or ``"\r"``.

        Raises:
            ValueError: ``sep`` is none of the three.
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
            # The space is part of the format, not of the value: without it, a value that starts
            # with a space would lose it.
            text += f"data: {data}\n" if "\n" not in data else f"data: {_fold(data, 'data: ')}\n"
        if self._retry is not None:
            text += f"retry: {self._retry}\n"
        text += "\n"
        if sep != "\n":
            # No field holds a CR by now, so that each LF is a line end.
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
    """An event whose data is always JSON: a ``str`` is quoted, ``None`` is ``null``.

    Args:
        data: Any JSON value.
        event: As in `ServerSentEvent`.
        id: As in `ServerSentEvent`.
        retry: As in `ServerSentEvent`.
        comment: As in `ServerSentEvent`.

    Raises:
        InvalidEventError: As `ServerSentEvent`.
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
    """An event as a decoder found it, whose fields are valid by the format itself."""
    self = ServerSentEvent.__new__(ServerSentEvent)
    self._data, self._event, self._id, self._retry, self._comment = data, event, last_event_id, None, None
    return self


def event_with_id(event: ServerSentEvent, id: str) -> ServerSentEvent:  # noqa: A002 (the field's name in the standard)
    """The same event with another id, one that needs no check."""
    self = ServerSentEvent.__new__(ServerSentEvent)
    self._data, self._event, _, self._retry, self._comment = event._fields()
    self._id = id
    return self


def as_event(item: Any) -> ServerSentEvent:
    """The event that an item stands for, as `encode_item` has it; encoded bytes are none.

    Raises:
        InvalidEventError: It stands for none, or a field of it cannot be sent as meant.
    """
    if isinstance(item, ServerSentEvent):
        return item
    if isinstance(item, Mapping):
        return _event_of(item, None)
    if isinstance(item, _PLAIN):
        return ServerSentEvent(item)
    raise InvalidEventError(
        f"{short_repr(item)} is no event: give a ServerSentEvent, a dict of its arguments, str, int or float"
    )


def encode_item(item: Any, sep: str = "\n", json_dumps: JSONDumps | None = None) -> bytes:
    """What a source yielded, as bytes of the stream.

    Args:
        item: A `ServerSentEvent`; a mapping of its arguments; a ``str`` or number, which becomes the
            data; or bytes, which are sent as they are.
        sep: The line end.
        json_dumps: Serialises the JSON value of a mapping's ``data``. Default: compact JSON.

    Raises:
        InvalidEventError: The item, or a field of it, cannot be sent as meant.
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
        f"a source yielded {short_repr(item)}: yield a ServerSentEvent, a dict of its arguments, str, int, float "
        "or encoded bytes; for a JSON value yield ServerSentEvent(value)"
    )


def _plain_block(item: Any) -> bytes | None:
    """The block of an item that needs no look at its parts but this one; ``None`` for any other.

    Half of what the way over a `ServerSentEvent` costs, for what sources yield most: one line of
    ASCII, alone or in a ``dict`` with an id or a type.
    """
    head = ""
    if type(item) is dict:
        data, id_, event = item.get("data"), item.get("id"), item.get("event")
        fields = 1
        if id_ is not None:
            if type(id_) is not str or not id_.isprintable():
                return None
            head = f"id: {id_}\n"
            fields = 2
        if event is not None:
            if type(event) is not str or not event.isprintable() or not event:
                return None
            head += f"event: {event}\n"
            fields += 1
        if fields != len(item):
            return None
    else:
        data = item
    if type(data) is not str or not data.isascii() or "\n" in data or "\r" in data:
        return None
    return f"{head}data: {data}\n\n".encode()


def json_text(value: Any, dumps: JSONDumps | None = None) -> str:
    """A value as JSON text, or `InvalidEventError` if it is no JSON value."""
    try:
        text = (dumps or _compact_json)(value)
        return text if isinstance(text, str) else str(text, "utf-8")
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidEventError(
            f"data={short_repr(value)} is not a JSON value ({exc}); convert it first, or yield a dict and give "
            "the response a json_dumps that knows its types"
        ) from exc


def check_separator(sep: str) -> str:
    """`sep` itself, or `ValueError` if no event stream may use it."""
    if sep not in SEPARATORS:
        raise ValueError(f"sep={sep!r} is no line end of an event stream; use '\\n', '\\r\\n' or '\\r'")
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
            f"unknown key {unknown[0]!r} in {short_repr(item)}: an event has data, event, id, retry and comment; "
            "to send a dict as JSON, yield ServerSentEvent(the_dict) or {'data': the_dict}"
        ) from None


def _data_text(data: Any) -> str:
    if isinstance(data, str):
        return str.__str__(data)  # of an Enum, its value
    if isinstance(data, _ENCODED):
        try:
            return str(data, "utf-8")
        except UnicodeDecodeError as exc:
            raise InvalidEventError(
                f"data={short_repr(data)} is not UTF-8 ({exc}); encode binary data, as base64"
            ) from exc
    if isinstance(data, float) and not math.isfinite(data):
        raise InvalidEventError(f"data={data!r} is no number that JSON knows; send it as text, or something else")
    return json_text(data)


def id_text(value: str | int) -> str:
    """An id as it is sent, or `InvalidEventError`."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _LARGE:
        return int.__repr__(value)  # of an IntEnum, its number
    text = one_line(value, "id")
    if "\0" in text:
        raise InvalidEventError(
            f"id={short_repr(value)} has a NUL: clients ignore such an id, and could not resume; remove it"
        )
    return text


def one_line(value: object, name: str) -> str:
    """The text of the field `name` without line ends, or `InvalidEventError`."""
    if not isinstance(value, str):
        raise InvalidEventError(
            f"{name}={short_repr(value)} is {type(value).__name__}; give a str{' or int' * (name == 'id')}"
        )
    if "\n" in value or "\r" in value:
        raise InvalidEventError(f"{name}={short_repr(value)} has a line end, which would inject fields; remove it")
    return _text(value, name)


def _text(value: str, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidEventError(f"{name}={short_repr(value)} is {type(value).__name__}; give a str")
    if "\r" in value:
        value = value.replace("\r\n", "\n").replace("\r", "\n")
    if not value.isascii():  # O(1): CPython keeps it with the string
        try:
            value.encode()
        except UnicodeEncodeError as exc:
            raise InvalidEventError(
                f"{name}={short_repr(value)} has a lone surrogate at {exc.start}, which UTF-8 cannot carry; "
                "decode its source with errors='replace'"
            ) from exc
    return str.__str__(value)


def milliseconds(value: int) -> int:
    """A reconnection time, or `InvalidEventError`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGE:
        raise InvalidEventError(
            f"retry={short_repr(value)} is no reconnection time; give whole milliseconds of at least 0"
        )
    return int(value)


def _fold(text: str, prefix: str) -> str:
    return text.replace("\n", "\n" + prefix)
