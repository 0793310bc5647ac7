"""`EventDecoder`: the WHATWG algorithm, with the stream cut anywhere."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_sse import EventDecoder, InvalidEventError, ServerSentEvent

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())["vectors"]


def expand(value: Any) -> str:
    """Return the text that a vector describes: a string, a repetition, or a list of these."""
    if isinstance(value, list):
        return "".join(map(expand, value))
    text: str = value["repeat"] * value["times"] if isinstance(value, dict) else value
    return text


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def decode(chunks: list[bytes]) -> tuple[list[ServerSentEvent], str, int | None]:
    decoder = EventDecoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events, decoder.last_event_id, decoder.retry


@pytest.mark.parametrize("vector", [v for v in VECTORS if v["kind"] == "parse"], ids=lambda v: v["id"])
@pytest.mark.parametrize("cut", ["as given", "whole", 1, 2, 3])
def test_decoding_follows_the_vectors(vector: dict[str, Any], cut: str | int) -> None:
    chunks = [expand(chunk).encode("latin-1") for chunk in vector["chunks"]]
    if cut != "as given":
        whole = b"".join(chunks)
        # Large vectors are cut into pieces of about 100 bytes, which meet as many kinds of places and save seconds.
        chunks = [whole] if isinstance(cut, str) else pieces(whole, cut if len(whole) < 100_000 else cut + 100)
    events, last_event_id, retry = decode(chunks)
    expected = vector["expect"]
    assert [(e.event, e.data, e.id) for e in events] == [
        (e["type"], expand(e["data"]), e["last_event_id"]) for e in expected["events"]
    ]
    assert last_event_id == expected["last_event_id"]
    assert retry == expected["retry_ms"]


STREAM = st.lists(
    st.sampled_from(
        [b"data", b"id", b"event", b"retry", b"x", b":", b": ", b"\n", b"\r", b"\r\n", b"\0", b"1", "é✓".encode(),
         b"\xff", b"\xe2\x9c", b"\xef\xbb\xbf", b"\xef"]
    )
    | st.binary(max_size=3)
).map(b"".join)  # fmt: skip


@given(STREAM, st.lists(st.integers(0, 60), max_size=8))
def test_chunking_does_not_change_the_events(stream: bytes, cuts: list[int]) -> None:
    marks = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(marks)]
    assert decode([stream]) == decode(chunks) == decode(pieces(stream, 1))


@given(STREAM, st.integers(1, 20))
def test_chunking_does_not_change_the_limit(stream: bytes, limit: int) -> None:
    def outcome(chunks: list[bytes]) -> tuple[list[ServerSentEvent], bool]:
        decoder = EventDecoder(max_event_bytes=limit)
        events: list[ServerSentEvent] = []
        try:
            for chunk in [*chunks, b""]:
                events += decoder.feed(chunk)
        except InvalidEventError:
            return events, True
        return events, False

    assert outcome([stream]) == outcome(pieces(stream, 1)) == outcome(pieces(stream, 3))


def test_decoder_keeps_raising_after_the_limit() -> None:
    decoder = EventDecoder(max_event_bytes=10)
    assert [e.data for e in decoder.feed(b"data: 1234\n\n")] == ["1234"]
    with pytest.raises(InvalidEventError, match="max_event_bytes=10"):
        decoder.feed(b"data: 12345")
    with pytest.raises(InvalidEventError, match="max_event_bytes=10"):
        decoder.feed(b"\n\n")


def test_events_before_the_limit_are_returned_first() -> None:
    """A client that resumes from `last_event_id` then misses nothing."""
    decoder = EventDecoder(max_event_bytes=20)
    assert [e.data for e in decoder.feed(b"id: 1\ndata: a\n\ndata: " + b"x" * 30 + b"\n\n")] == ["a"]
    assert decoder.last_event_id == "1"
    with pytest.raises(InvalidEventError):
        decoder.feed(b"")


def test_comments_do_not_add_up_to_the_limit() -> None:
    decoder = EventDecoder(max_event_bytes=20)
    for _ in range(100):
        assert decoder.feed(b": ping\n") == []
    assert [e.data for e in decoder.feed(b"data: x\n\n")] == ["x"]


def test_feed_refuses_text() -> None:
    with pytest.raises(TypeError, match="chunk must be bytes, got str"):
        EventDecoder().feed("data: x\n\n")  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_at_least_1(limit: int) -> None:
    with pytest.raises(ValueError, match=f"max_event_bytes must be at least 1, got {limit}"):
        EventDecoder(max_event_bytes=limit)


def test_last_event_id_can_be_copied_to_the_next_decoder() -> None:
    decoder = EventDecoder()
    decoder.last_event_id = "41"
    assert decoder.feed(b"data: x\n\n") == [ServerSentEvent("x", event="message", id="41")]


def test_cr_ends_a_line_at_once() -> None:
    """The decoder does not wait for an LF that may follow the CR."""
    decoder = EventDecoder()
    assert [e.data for e in decoder.feed(b"data: x\r\r")] == ["x"]
    assert decoder.feed(b"\n") == []
    assert [e.data for e in decoder.feed(b"data: y\n\n")] == ["y"]


def test_long_event_in_small_pieces_takes_linear_time() -> None:
    """The pieces are joined once. Joining with every piece would copy 10 GB for these 20,000 pieces."""
    decoder = EventDecoder()
    for chunk in [b"data: ", *([b"x" * 50] * 20_000)]:
        assert decoder.feed(chunk) == []
    (event,) = decoder.feed(b"\n\n")
    assert event.data == "x" * 1_000_000


def test_retry_of_absurd_length_is_ignored() -> None:
    decoder = EventDecoder()
    decoder.feed(b"retry: " + b"9" * 5000 + b"\n\n")
    assert decoder.retry is None
