"""What an event is between processes: a JSON object of the arguments of `ServerSentEvent`, and of what a broker adds.

Of any publisher that knows it, in any language: ``{"data": "…", "event": "…", "retry": …, "comment": "…"}``. What is
read is looked at as what a source yields, since it may have been written by anybody who may write to the engine. What
is wrong with it is told without its content: nobody but a log is told, and what was published is not for that.
"""

from __future__ import annotations

import json
from typing import Any, Final

from asgi_sse.errors import InvalidEventError
from asgi_sse.protocol.event import ServerSentEvent

_dumps: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_FIELDS: Final = frozenset({"data", "event", "retry", "comment", "end"})


def dump(event: ServerSentEvent, end: str | None = None) -> bytes:
    """An event, and how the run ended of which it is the last one."""
    fields = {"data": event.data, "event": event.event, "retry": event.retry, "comment": event.comment, "end": end}
    return _dumps({name: value for name, value in fields.items() if value is not None}).encode()


def load(payload: bytes) -> tuple[ServerSentEvent, str | None]:
    """What `dump` was given.

    Raises:
        InvalidEventError: It is something else.
    """
    what = f"a publication of {len(payload)} bytes is no event of a broker"
    try:
        fields: Any = json.loads(payload)
    except (ValueError, RecursionError) as exc:
        raise InvalidEventError(f"{what}: it is no JSON ({type(exc).__name__})") from None
    if not isinstance(fields, dict) or not _FIELDS.issuperset(fields):
        raise InvalidEventError(f"{what}: give an object of data, event, retry, comment")
    end = fields.pop("end", None)
    if end is not None and not isinstance(end, str):
        raise InvalidEventError(f"{what}: its end is {type(end).__name__}; give a str")
    try:
        return ServerSentEvent(**fields), end
    except InvalidEventError:
        pass
    for name, value in fields.items():  # which one it was
        try:
            ServerSentEvent(**{"data": "", name: value})
        except InvalidEventError:
            raise InvalidEventError(f"{what}: ServerSentEvent takes no such {name}") from None
    raise InvalidEventError(f"{what}: ServerSentEvent takes no such fields together")
