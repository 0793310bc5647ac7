"""The events of the drop-in for sse-starlette."""

from typing import Any

import pytest

import asgi_sse
from asgi_sse.adapters.sse_starlette import JSONServerSentEvent, ServerSentEvent, ensure_bytes


@pytest.mark.parametrize(
    ("fields", "encoded"),
    [
        ({"data": {"a": 1}}, b"data: {'a': 1}\r\n\r\n"),
        ({"data": True, "id": 7}, b"id: 7\r\ndata: True\r\n\r\n"),
        ({"data": "a\u2028b\nc\rd"}, "data: a\u2028b\r\ndata: c\r\ndata: d\r\n\r\n".encode()),
        ({"data": ""}, b"data: \r\n\r\n"),
        ({"event": "end"}, b"event: end\r\n\r\n"),
        ({"comment": "a\nb", "sep": "\n"}, b": a\n: b\n\n"),
        ({}, b"\r\n"),
    ],
)
def test_event_has_the_bytes_of_sse_starlette(fields: dict[str, Any], encoded: bytes) -> None:
    assert ServerSentEvent(**fields).encode() == encoded


@pytest.mark.parametrize(
    "fields",
    [{"id": "a\nid: b"}, {"event": "a\rdata: b"}, {"id": "a\0"}, {"data": "\ud800"}, {"retry": -1}, {"sep": "|"}],
)
def test_invalid_field_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"line end|NUL|UTF-8|retry must .* got -1"):
        ServerSentEvent(**fields).encode()


def test_fields_can_be_read_and_changed() -> None:
    event = ServerSentEvent("a", event="b", id="c", retry=1, comment="d")
    event.data = "e"
    assert (event.data, event.event, event.id, event.retry, event.comment) == ("e", "b", "c", 1, "d")
    assert repr(event) == "ServerSentEvent(data='e', event='b', id='c', retry=1, comment='d')"


def test_json_event_encodes_its_data() -> None:
    assert JSONServerSentEvent({"a": "ä"}, event="b").encode() == 'event: b\r\ndata: {"a":"ä"}\r\n\r\n'.encode()
    assert JSONServerSentEvent(None, comment="c").encode() == b": c\r\n\r\n"
    with pytest.raises(ValueError, match="JSON"):
        JSONServerSentEvent(float("nan"))


def test_ensure_bytes_accepts_any_value() -> None:
    assert ensure_bytes(None, "\n") == b"data: None\n\n"
    assert ensure_bytes(bytearray(b"raw"), "\n") == b"raw"
    assert ensure_bytes(asgi_sse.ServerSentEvent("a"), "\r") == b"data: a\r\r"
    assert ensure_bytes(ServerSentEvent("a"), "\n") == b"data: a\r\n\r\n"  # an event keeps its own line end
