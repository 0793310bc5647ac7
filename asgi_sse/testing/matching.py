"""`assert_event`, and the comparison of an event with what a test expects."""

import json
from types import EllipsisType
from typing import Any

from asgi_sse.errors import short_repr
from asgi_sse.protocol.event import ServerSentEvent


def assert_event(
    received: ServerSentEvent,
    data: Any = ...,
    *,
    event: str | EllipsisType = ...,
    id: str | int | EllipsisType = ...,  # noqa: A002 (the field's name in the standard)
) -> None:
    """Check an event that came from any decoder. What you leave out may have any value.

    Args:
        received: The event.
        data: Its data. A ``str`` is compared as text, any other value as JSON.
        event: Its type, which is ``"message"`` for an event without one.
        id: The last event id after the event.

    Raises:
        AssertionError: The event differs.
    """
    field = differing_field(received, data, event, id)
    if field:
        raise AssertionError(f"expected {describe_expected(data, event, id)}; {received!r} came: its {field} differs")


def describe_expected(data: Any, event: Any, id: Any) -> str:  # noqa: A002
    """Return the given values as text for a failure."""
    given = (("data", data), ("event", event), ("id", id))
    return ", ".join(f"{name}={short_repr(value)}" for name, value in given if value is not ...) or "an event"


def differing_field(received: ServerSentEvent, data: Any, event: Any, id: Any) -> str:  # noqa: A002
    """Return the name of the first field that differs, or an empty string."""
    if data is not ... and not _has_data(received.data or "", data):
        return "data"
    if event is not ... and received.event != event:
        return "type"
    return "id" if id is not ... and (received.id or "") != str(id) else ""


def _has_data(text: str, data: Any) -> bool:
    if isinstance(data, str):
        return text == data
    try:
        return bool(json.loads(text) == data)
    except ValueError:
        return False
