"""Bytes of an event stream, in any chunking, to events. No I/O.

Rules: WHATWG HTML, 9.2.6 "Interpreting an event stream"; the steps below keep its order.
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

    At the end of the stream just drop the decoder: a block without its closing blank line is
    discarded, its id too. For the next connection make a new one, and carry `last_event_id` over.

    Args:
        max_event_bytes: How many bytes one event may hold: its data, event and id lines without
            line ends, and any one line. Default: no limit.

    Attributes:
        last_event_id: What to send as ``Last-Event-ID`` on reconnecting; ``""`` if nothing.
        retry: The reconnection time in milliseconds that the stream asked for last, if any.
    """

    __slots__ = (
        "_at_start", "_data", "_error", "_event", "_held", "_id", "_limit", "_partial", "_skip_lf",
        "last_event_id", "retry",
    )  # fmt: skip

    def __init__(self, *, max_event_bytes: int | None = None) -> None:
        if max_event_bytes is not None and max_event_bytes < 1:
            raise ValueError(f"max_event_bytes={max_event_bytes!r} would refuse every event; give 1 or more, or None")
        self.last_event_id = ""
        self.retry: int | None = None
        self._limit = max_event_bytes
        self._at_start = True
        self._skip_lf = False
        # Of a line whose end has not come. It grows in place: a list of its pieces would take 50 times what they hold,
        # where they come two by two.
        self._partial = bytearray()
        self._data: list[bytes] = []
        self._event = b""
        self._id: str | None = None  # None: as committed, since an id outlives its block
        self._held = 0
        self._error: InvalidEventError | None = None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes, and give the events that they complete.

        Each event has ``data``, ``event`` (``"message"`` if it had none) and ``id``, the last event
        id as of that event.

        Raises:
            InvalidEventError: An event exceeds ``max_event_bytes``. The events before it are given
                first; from then on every call raises. Reconnecting with `last_event_id` loses nothing.
        """
        if self._error is not None:
            raise self._error
        if not isinstance(chunk, bytes | bytearray | memoryview):
            raise TypeError(f"feed() takes the bytes of a stream, not {type(chunk).__name__}; do not decode them first")
        chunk = bytes(chunk)
        events: list[ServerSentEvent] = []
        try:
            for line in self._lines(chunk):
                if line:
                    self._field(line)
                elif (event := self._dispatch()) is not None:
                    events.append(event)
            if not self._at_start:  # what may become a byte order mark is of no line
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
                self._partial += chunk  # one BOM is dropped, even one that comes in pieces
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
            # Of bytes: ASCII digits. More than so many int() refuses where the process has set its least limit.
            if value.isdigit() and len(value) <= sys.int_info.str_digits_check_threshold:
                self.retry = int(value)
            return
        else:
            return  # a comment (its name is empty) or an unknown field
        self._held += len(line)

    def _dispatch(self) -> ServerSentEvent | None:
        # The id is committed first, even where no event is dispatched.
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
                f"an event exceeds max_event_bytes={self._limit}; raise the limit if such large events are meant"
            )
