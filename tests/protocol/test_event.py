"""`ServerSentEvent` and `JSONServerSentEvent`: what is built, what is refused, what goes on the wire."""

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
def test_vector(vector: dict[str, Any], sep: str) -> None:
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


class Colour(str, enum.Enum):  # noqa: UP042 (the older kind is the harder one)
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
def test_data(data: Any, text: str) -> None:
    event = ServerSentEvent(data)
    assert event.data == text
    assert decode(event.encode()) == [ServerSentEvent(text, event="message", id="")]


def test_json() -> None:
    assert JSONServerSentEvent("text").data == '"text"'
    assert JSONServerSentEvent(None).data == "null"
    assert JSONServerSentEvent({"a": 1}, event="e", id=1, retry=2, comment="c").encode() == (
        b': c\nid: 1\nevent: e\ndata: {"a":1}\nretry: 2\n\n'
    )


def test_fields_are_text() -> None:
    event = ServerSentEvent("x", id=Level.HIGH, event=Colour.RED, retry=0, comment="c\r\nd")
    assert (event.id, event.event, event.retry, event.comment) == ("3", "red", 0, "c\nd")
    assert ServerSentEvent("x", event="").event is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"data": "x", "id": "a\nb"}, "id="),
        ({"data": "x", "id": "a\rb"}, "id="),
        ({"data": "x", "id": "a\0b"}, "NUL"),
        ({"data": "x", "id": "\ud800"}, "surrogate"),
        ({"data": "x", "id": 1.5}, "id=1.5"),
        ({"data": "x", "id": True}, "id=True"),
        ({"data": "x", "id": b"1"}, "id=b'1'"),
        ({"data": "x", "event": "a\nb"}, "event="),
        ({"data": "x", "event": 3}, "event=3"),
        ({"data": "x", "event": "\udfff"}, "surrogate"),
        ({"data": "x", "retry": -1}, "retry=-1"),
        ({"data": "x", "retry": True}, "retry=True"),
        ({"data": "x", "retry": 1.5}, "retry=1.5"),
        ({"data": "x", "retry": "5"}, "retry='5'"),
        ({"data": "x", "comment": 5}, "comment=5"),
        ({"data": "x", "comment": "\ud800"}, "surrogate"),
        ({"data": "\ud800"}, "surrogate"),
        ({"data": b"\xff"}, "UTF-8"),
        ({"data": float("nan")}, "nan"),
        ({"data": {"a": float("inf")}}, "JSON"),
        ({"data": {"a": object()}}, "JSON"),
        ({"data": {1, 2}}, "JSON"),
        ({"data": object()}, "JSON"),
        ({"data": 10**5000}, "JSON"),
        ({"event": "done"}, "data=''"),
        ({}, "nothing to send"),
    ],
)
def test_refused_when_built(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidEventError) as caught:
        ServerSentEvent(**arguments)
    assert named in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SSEError)


def test_refused_json() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidEventError, match="JSON"):
        JSONServerSentEvent(loop)


@pytest.mark.parametrize("sep", ["", "\n\n", "x", "\u2028"])
def test_bad_separator(sep: str) -> None:
    with pytest.raises(ValueError, match="sep="):
        ServerSentEvent("x").encode(sep)


def test_immutable_value() -> None:
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
def test_what_is_encoded_is_decoded(
    data: str, event: str | None, id_: str | None, retry: int | None, comment: str | None, sep: str
) -> None:
    built = ServerSentEvent(data, event=event, id=id_, retry=retry, comment=comment)
    decoder = EventDecoder()
    assert decoder.feed(built.encode(sep)) == [
        ServerSentEvent(built.data, event=built.event or "message", id=built.id or "")
    ]
    assert decoder.retry == retry


@given(st.binary())
def test_no_field_injects_another(junk: bytes) -> None:
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
def test_an_item_is_the_event_that_it_stands_for(items: list[Any]) -> None:
    """Byte for byte, and refused alike, whichever way through the encoder it takes."""
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
