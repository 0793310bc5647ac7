"""The JSON format in which backends exchange events.

An event is a JSON object of the arguments of `ServerSentEvent`: ``{"data": "…", "event": "…", "retry": …,
"comment": "…"}``. The last event of a run also has ``end``. Publishers in any language may write this format.

Anyone who can write to the server can write a payload, so `load` validates it like an event of a source. Errors omit
the payload, because they end up in logs.
"""

from __future__ import annotations

import json
from typing import Any, Final

from asgi_sse.errors import InvalidEventError
from asgi_sse.protocol.event import ServerSentEvent

_dumps: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_FIELDS: Final = frozenset({"data", "event", "retry", "comment", "end"})


def dump(event: ServerSentEvent, end: str | None = None) -> bytes:
    """Encode an event.

    Args:
        event: The event; its id is not encoded.
        end: How the run ended, on the last event of a run.
    """
    fields = {"data": event.data, "event": event.event, "retry": event.retry, "comment": event.comment, "end": end}
    return _dumps({name: value for name, value in fields.items() if value is not None}).encode()


def load(payload: bytes) -> tuple[ServerSentEvent, str | None]:
    """Decode a payload of `dump` and return the event and its ``end``.

    Raises:
        InvalidEventError: The payload is not a valid event.
    """
    what = f"payload of {len(payload)} bytes"
    try:
        fields: Any = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise InvalidEventError(f"{what} must be JSON, got {type(exc).__name__}; publish a JSON object") from None
    if not isinstance(fields, dict) or not _FIELDS.issuperset(fields):
        raise InvalidEventError(f"{what} must be a JSON object with no fields but data, event, retry and comment")
    end = fields.pop("end", None)
    if end is not None and not isinstance(end, str):
        raise InvalidEventError(f"{what}: end must be a string, got {type(end).__name__}")
    try:
        return ServerSentEvent(**fields), end
    except InvalidEventError:
        pass
    for name, value in fields.items():  # the error names the field
        try:
            ServerSentEvent(**{"data": "", name: value})
        except InvalidEventError:
            raise InvalidEventError(f"{what}: ServerSentEvent does not accept this value of {name}") from None
    raise InvalidEventError(f"{what}: ServerSentEvent does not accept these fields together")
