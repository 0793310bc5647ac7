"""`ServerSentEvent` and `JSONServerSentEvent`: their values, their errors and their bytes."""

import copy
import enum
import json
import pickle
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sse import (
    EventDecoder,
    EventSourceResponse,
    InvalidEventError,
    JSONServerSentEvent,
    ServerSentEvent,
    SSEError,
)

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["vectors"]


def decode(data: bytes) -> list[ServerSentEvent]:
    return EventDecoder().feed(data)


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["kind"] == "encode"], ids=lambda v: v["id"])
@pytest.mark.parametrize("sep", ["\n", "\r\n", "\r"])
def test_encoding_follows_the_vectors(vector: dict[str, Any], sep: str) -> None:
    arguments = dict(vector["input"])
    if vector["id"] == "encode/lone-surrogate":
        arguments["data"] = "\ud800"
    expected = vector["expect"]
    if expected.get("error"):
        with pytest.raises(InvalidEventError):
            ServerSentEvent(**arguments)
        return
    decoder = EventDecoder()
    events = decoder.feed(ServerSentEvent(**arguments).encode(sep))
    assert [{"type": e.event, "data": e.data, "last_event_id": e.id} for e in events] == expected["round_trip"]
    assert decoder.last_event_id == expected.get("last_event_id", decoder.last_event_id)


def test_wire_format() -> None:
    event = ServerSentEvent("a\nb", event="tick", id=7, retry=10, comment="why\nnot")
    assert event.encode() == b": why\n: not\nid: 7\nevent: tick\ndata: a\ndata: b\nretry: 10\n\n"
    assert event.encode("\r\n") == event.encode().replace(b"\n", b"\r\n")
    assert event.encode("\r") == event.encode().replace(b"\n", b"\r")


class Colour(str, enum.Enum):  # noqa: UP042 (str() of this older kind gives the name, so it is the harder one)
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ("ünïcode ✓", "ünïcode ✓"),
        (b"bytes \xe2\x9c\x93", "bytes ✓"),
        (bytearray(b"bytes"), "bytes"),
        (memoryview(b"bytes"), "bytes"),
        (0, "0"),
        (10**30, "1" + "0" * 30),
        (1.5, "1.5"),
        (True, "true"),
        ({"a": [1, None, "ü"]}, '{"a":[1,null,"ü"]}'),
        ([1, "x\ny"], '[1,"x\\ny"]'),
        ((1, 2), "[1,2]"),
        (Colour.RED, "red"),
        (Level.HIGH, "3"),
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
    ],
)
def test_data_becomes_text(data: Any, text: str) -> None:
    event = ServerSentEvent(data)
    assert event.data == text
    assert decode(event.encode()) == [ServerSentEvent(text, event="message", id="")]


def test_json_event_always_encodes_json() -> None:
    assert JSONServerSentEvent("text").data == '"text"'
    assert JSONServerSentEvent(None).data == "null"
    assert JSONServerSentEvent({"a": 1}, event="e", id=1, retry=2, comment="c").encode() == (
        b': c\nid: 1\nevent: e\ndata: {"a":1}\nretry: 2\n\n'
    )


def test_fields_become_text() -> None:
    event = ServerSentEvent("x", id=Level.HIGH, event=Colour.RED, retry=0, comment="c\r\nd")
    assert (event.id, event.event, event.retry, event.comment) == ("3", "red", 0, "c\nd")
    assert ServerSentEvent("x", event="").event is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "x", "id": "a\nb"}, "id must have no line end"),
        ({"data": "x", "id": "a\rb"}, "id must have no line end"),
        ({"data": "x", "id": "a\0b"}, "id must have no NUL"),
        ({"data": "x", "id": "\ud800"}, "surrogate"),
        ({"data": "x", "id": 1.5}, "id must be a str or int, got 1.5"),
        ({"data": "x", "id": True}, "id must be a str or int, got True"),
        ({"data": "x", "id": b"1"}, "id must be a str or int, got b'1'"),
        ({"data": "x", "event": "a\nb"}, "event must have no line end"),
        ({"data": "x", "event": 3}, "event must be a str, got 3"),
        ({"data": "x", "event": "\udfff"}, "surrogate"),
        ({"data": "x", "retry": -1}, "at least 0, got -1"),
        ({"data": "x", "retry": True}, "at least 0, got True"),
        ({"data": "x", "retry": 1.5}, "at least 0, got 1.5"),
        ({"data": "x", "retry": "5"}, "at least 0, got '5'"),
        ({"data": "x", "comment": 5}, "comment must be a str, got 5"),
        ({"data": "x", "comment": "\ud800"}, "surrogate"),
        ({"data": "\ud800"}, "surrogate"),
        ({"data": b"\xff"}, "UTF-8"),
        ({"data": float("nan")}, "nan"),
        ({"data": {"a": float("inf")}}, "JSON"),
        ({"data": {"a": object()}}, "JSON"),
        ({"data": {1, 2}}, "JSON"),
        ({"data": object()}, "JSON"),
        ({"data": 10**5000}, "JSON"),
        ({"event": "done"}, "pass data=''"),
        ({}, "nothing to send"),
    ],
)
def test_constructor_refuses_what_no_client_can_read(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        ServerSentEvent(**arguments)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SSEError)


def test_json_event_refuses_a_circular_value() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidEventError, match="JSON"):
        JSONServerSentEvent(loop)


@pytest.mark.parametrize("sep", ["", "\n\n", "x", "\u2028"])
def test_encode_refuses_another_separator(sep: str) -> None:
    with pytest.raises(ValueError, match="sep must be a line end"):
        ServerSentEvent("x").encode(sep)


def test_event_is_an_immutable_value() -> None:
    event = ServerSentEvent("x", id=1)
    with pytest.raises(AttributeError):
        event.data = "y"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        event.other = 1  # type: ignore[attr-defined]
    same = ServerSentEvent("x", id="1")
    assert event == same
    assert hash(event) == hash(same)
    assert event != ServerSentEvent("x", id=2)
    assert event != "x"
    assert copy.deepcopy(event) == pickle.loads(pickle.dumps(event)) == event
    assert repr(event) == "ServerSentEvent(data='x', id='1')"
    assert repr(JSONServerSentEvent(1)) == "JSONServerSentEvent(data='1')"


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"))


@given(
    data=TEXT,
    event=st.none() | LINE,
    id_=st.none() | LINE,
    retry=st.none() | st.integers(0, 10**9),
    comment=st.none() | TEXT,
    sep=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_decoder_returns_what_was_encoded(
    data: str, event: str | None, id_: str | None, retry: int | None, comment: str | None, sep: str
) -> None:
    built = ServerSentEvent(data, event=event, id=id_, retry=retry, comment=comment)
    decoder = EventDecoder()
    assert decoder.feed(built.encode(sep)) == [
        ServerSentEvent(built.data, event=built.event or "message", id=built.id or "")
    ]
    assert decoder.retry == retry


@given(st.binary())
def test_no_field_injects_another_field(junk: bytes) -> None:
    text = junk.decode("latin-1")
    for name in ("id", "event"):
        try:
            event = ServerSentEvent("x", **{name: text})  # type: ignore[arg-type]
        except InvalidEventError:
            continue
        assert len(decode(event.encode())) == 1
    assert [e.data for e in decode(ServerSentEvent("x", comment=text).encode())] == ["x"]


_lines = st.text(st.sampled_from("ab \x00\n\r\x1b\x7f-é\u2028\ud800"), max_size=4)


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "data": st.none() | _lines | st.integers() | st.booleans(),
                "event": st.none() | _lines,
                "id": st.none() | _lines | st.integers(),
                "retry": st.none() | st.integers(0, 9),
                "comment": st.none() | _lines,
                "other": st.none(),
            },
        )
        | _lines
    )
)
def test_item_is_sent_as_the_event_it_describes(items: list[Any]) -> None:
    """The short way through the encoder gives the same bytes and the same refusals as the long one."""
    expected = b""
    for item in items:
        with suppress(InvalidEventError, TypeError):
            expected += (ServerSentEvent(**item) if isinstance(item, dict) else ServerSentEvent(item)).encode()

    async def source() -> AsyncIterator[Any]:
        for item in items:
            with suppress(InvalidEventError):
                yield item

    sent = bytearray()

    async def send(message: Any) -> None:
        sent.extend(message.get("body", b""))

    response = EventSourceResponse(source(), retry=None, opening_comment=False)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}

    async def receive() -> Any:
        await anyio.sleep_forever()

    anyio.run(response, scope, receive, send)
    assert sent == expected
