"""examples/tail.py: where a client starts, and which events it gets for the lines of a log."""

import itertools
import tracemalloc
from pathlib import Path

import pytest
from tail_log import MIB, OpenTail, append, data_of, poll, resets_of


def test_without_an_id_the_client_starts_at_the_end_and_gets_an_id(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    (opening,) = tail.read()
    assert (opening.data, opening.id) == (None, tail.id)
    assert poll(tail) == []
    append(log, b"a\nb\n")
    assert data_of(tail.read()) == ["a", "b"]
    assert data_of(open_tail(opening.id).read()) == ["a", "b"]


def test_incomplete_line_is_sent_once_it_is_complete(log: Path, open_tail: OpenTail) -> None:
    append(log, b"be")
    tail = open_tail()
    assert data_of(tail.read()) == []
    append(log, b"gin")
    assert data_of(tail.read()) == []
    append(log, b"ning\n")
    assert data_of(tail.read()) == ["beginning"]


def test_client_starts_within_a_very_long_line(log: Path, open_tail: OpenTail) -> None:
    append(log, b"x" * MIB)
    tail = open_tail()
    assert data_of(tail.read()) == []
    append(log, b"\na\n")
    first, second = data_of(tail.read())
    assert first is not None
    assert (set(first), second) == ({"x"}, "a")


def test_from_start_begins_with_the_first_line(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail(from_start=True)
    assert data_of(tail.read()) == ["old"]
    assert data_of(tail.read()) == []


def test_every_id_resumes_at_the_next_line(log: Path, open_tail: OpenTail) -> None:
    lines = [f"line {number} " + "x" * (number % 90) for number in range(300)]
    log.write_text("".join(f"{line}\n" for line in lines))
    for number, event in enumerate(open_tail(from_start=True).read()):  # the first id is before the first line
        assert data_of(open_tail(event.id).read()) == lines[number:]


@pytest.mark.parametrize(
    "last_event_id",
    [
        "", "abc", "1-2", "1-2-", "-1-2-00000000", "1--2-00000000", "0-0-0", "1-2-0000000g", "1-1-00000000\n", "\0",
        "\u0661-1-00000000", "9" * 5000, f"{'9' * 30}-1-00000000", f"{'9' * 20}-{'9' * 18}-00000000",
        "{inode}-1-00000000", "{inode}-{huge}-00000000",
    ],
)  # fmt: skip
def test_invalid_id_sends_reset_and_the_file_from_its_start(log: Path, open_tail: OpenTail, last_event_id: str) -> None:
    invalid_id = last_event_id.replace("{inode}", str(log.stat().st_ino)).replace("{huge}", "9" * 18)
    tail = open_tail(invalid_id)
    events = list(tail.read())
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["old"]
    resumed = list(open_tail(events[0].id).read())  # the connection was cut right after the reset
    assert data_of(resumed) == ["old"]


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (b"a\r\n", "a"),
        (b"\r\n", ""),
        (b"\n", ""),
        (b"a\r\r\n", "a\n"),
        (b"50%\r100%\n", "50%\n100%"),
        (b"caf\xc3\xa9 \xff\xfe\n", "caf\u00e9 \ufffd\ufffd"),
        (b" \0\t id: 1\n", " \0\t id: 1"),
        ("\u2028\x85\x0b\n".encode(), "\u2028\x85\x0b"),
    ],
)
def test_event_has_the_line_without_its_line_end(log: Path, open_tail: OpenTail, written: bytes, line: str) -> None:
    tail = open_tail()
    list(tail.read())
    append(log, written, b"next\n")
    events = list(tail.read())
    assert data_of(events) == [line, "next"]
    assert data_of(open_tail(events[0].id).read()) == ["next"]


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, MIB - 1])
def test_long_line_is_one_event(log: Path, open_tail: OpenTail, size: int) -> None:
    tail = open_tail()
    list(tail.read())
    append(log, b"before\n", b"x" * size)
    assert data_of(tail.read()) == ["before"]
    append(log, b"\n", b"after\n" * 1000)
    assert data_of(tail.read()) == ["x" * size, *["after"] * 1000]


def test_line_above_one_mebibyte_is_sent_in_parts(log: Path, open_tail: OpenTail) -> None:
    line = "\u20ac" * (4 * MIB // 3)  # no part ends within a character
    tail = open_tail()
    list(tail.read())
    append(log, line.encode(), b"\r\nafter\n")
    events = list(tail.read())
    assert [event.event for event in events] == ["part"] * (len(events) - 2) + [None, None]
    assert "".join(event.data or "" for event in events[:-1]) == line
    assert events[-1].data == "after"
    resumed = list(open_tail(events[1].id).read())
    assert resumed == events[2:]


def test_memory_is_bounded_while_the_client_stops_reading(log: Path, open_tail: OpenTail) -> None:
    append(log, b"x" * 20 * MIB, b"\n", b"\n" * MIB, b"short line\n" * MIB)
    events = open_tail(from_start=True).read()
    tracemalloc.start()
    try:
        count = sum(1 for _ in itertools.islice(events, 20_000))  # then the client stops reading
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 12 * MIB
