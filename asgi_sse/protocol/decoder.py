"""A decoder of event streams: takes bytes in chunks of any size, and returns events. No I/O.

The rules are those of WHATWG HTML, 9.2.6 "Interpreting an event stream", in the order of that section.
"""

import re
import sys
from typing import Final

from asgi_sse.errors import InvalidEventError

from .event import ServerSentEvent, decoded_event

_BOM: Final = b"\xef\xbb\xbf"
_LINE_END: Final = re.compile(rb"\r\n|\r|\n")


class EventDecoder:
    """Decodes one event stream, exactly as browsers do.

    When the stream ends, discard the decoder: a block without its closing blank line does not count, and
    neither does its id. For the next connection, create a new decoder and copy `last_event_id` to it.

    Args:
        max_event_bytes: The most bytes that an event may have. The data, event and id lines of the event
            count together, without line ends, and each line counts alone. Default: no limit.

    Attributes:
        last_event_id: The ``Last-Event-ID`` to send when reconnecting; ``""`` for none.
        retry: The last reconnection time that the stream sent, in milliseconds; ``None`` if it sent none.

    Raises:
        ValueError: `max_event_bytes` is less than 1.
    """

    __slots__ = (
        "_at_start", "_data", "_error", "_event", "_held", "_id", "_limit", "_partial", "_skip_lf",
        "last_event_id", "retry",
    )  # fmt: skip

    def __init__(self, *, max_event_bytes: int | None = None) -> None:
        if max_event_bytes is not None and max_event_bytes < 1:
            raise ValueError(f"max_event_bytes must be at least 1, got {max_event_bytes!r}; pass None for no limit")
        self.last_event_id: str = ""
        self.retry: int | None = None
        self._limit = max_event_bytes
        self._at_start = True
        self._skip_lf = False
        # The beginning of a line whose end has not arrived. The bytearray grows in place. A list of chunks of two bytes
        # would take 50 times the memory of the bytes.
        self._partial = bytearray()
        self._data: list[bytes] = []
        self._event = b""
        self._id: str | None = None  # None: the block has no id line, and the last id stays valid
        self._held = 0
        self._error: InvalidEventError | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Decode the next bytes of the stream.

        Args:
            chunk: The bytes, cut anywhere.

        Returns:
            The events that `chunk` completes. Each has ``data``, ``event`` (``"message"`` if the stream named
            no type) and ``id``, the last event id at that point of the stream.

        Raises:
            InvalidEventError: An event exceeds ``max_event_bytes``. The events before it are returned first,
                and each later call raises. A client that reconnects with `last_event_id` misses nothing.
            TypeError: `chunk` is not bytes.
        """
        if self._error is not None:
            raise self._error
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise TypeError(f"chunk must be bytes, got {type(chunk).__name__}; pass the bytes of the stream undecoded")
        chunk = bytes(chunk)
        events: list[ServerSentEvent] = []
        try:
            for line in self._lines(chunk):
                if line:
                    self._field(line)
                elif (event := self._dispatch()) is not None:
                    events.append(event)
            if not self._at_start:  # the beginning of a byte order mark does not count
                self._hold(len(self._partial))
        except InvalidEventError as exc:
            self._error = exc
            if not events:
                raise
        return events

    def _lines(self, chunk: bytes) -> list[bytes]:
        if self._at_start:
            chunk = bytes(self._partial) + chunk
            self._partial.clear()
            if len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._partial += chunk  # the start of a BOM; a whole one is dropped
                return []
            self._at_start = False
            chunk = chunk.removeprefix(_BOM)
        if not chunk:
            return []
        if self._skip_lf and chunk.startswith(b"\n"):
            chunk = chunk[1:]  # the second half of a CRLF whose CR ended the last chunk
        self._skip_lf = chunk.endswith(b"\r")
        lines = chunk.split(b"\n") if b"\r" not in chunk else _LINE_END.split(chunk)
        if len(lines) > 1 and self._partial:
            self._partial += lines[0]
            lines[0] = bytes(self._partial)
            self._partial.clear()
        if rest := lines.pop():
            self._partial += rest
        return lines

    def _field(self, line: bytes) -> None:
        self._hold(len(line))
        name, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event = value
        elif name == b"id":
            if b"\0" in value:
                return
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry":
            # isdigit() of bytes accepts ASCII digits only. The length limit is the lowest that a process can set for
            # int(), so int() never raises here.
            if value.isdigit() and len(value) <= sys.int_info.str_digits_check_threshold:
                self.retry = int(value)
            return
        else:
            return  # a comment, whose name is empty, or an unknown field
        self._held += len(line)

    def _dispatch(self) -> ServerSentEvent | None:
        # The id is committed first, even if the block dispatches no event.
        if self._id is not None:
            self.last_event_id = self._id
        self._held = 0
        data, kind = self._data, self._event
        self._event = b""
        if not data:
            return None
        self._data = []
        return decoded_event(
            b"\n".join(data).decode("utf-8", "replace"),
            kind.decode("utf-8", "replace") if kind else "message",
            self.last_event_id,
        )

    def _hold(self, more: int) -> None:
        if self._limit is not None and self._held + more > self._limit:
            raise InvalidEventError(
                f"an event must have at most max_event_bytes={self._limit}, got more; raise the limit to accept it"
            )
