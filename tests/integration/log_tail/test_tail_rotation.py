"""examples/tail.py: a client continues through rotated files, and gets a reset after a truncation."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tail_log import LogTail, OpenTail, append, copytruncate, data_of, last_id, poll, resets_of, rotate, rotated


def test_client_continues_with_the_new_file_after_a_rotation(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    list(tail.read())
    append(log, b"a\n")
    rotate(log)
    append(rotated(log, 1), b"b\n")  # its writer has not noticed the rotation yet
    log.write_bytes(b"c\n")
    events = poll(tail)
    append(log, b"d\n")
    events += poll(tail)
    assert data_of(events) == ["a", "b", "c", "d"]
    for number, event in enumerate(events):
        assert data_of(poll(open_tail(event.id))) == ["b", "c", "d"][number:]


def test_old_file_is_read_once_more_after_a_rotation(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    list(tail.read())
    append(log, b"half")
    rotate(log)
    assert poll(tail) == []  # FILE does not exist
    log.write_bytes(b"")
    assert poll(tail) == []  # FILE is still empty
    append(rotated(log, 1), b" and")
    append(log, b"new\n")
    assert list(tail.read()) == []
    append(rotated(log, 1), b" whole\nlast")  # by a process that still has it open
    events = poll(tail)
    assert data_of(events) == ["half and whole", "last", "new"]  # "last" will never get its line end
    assert data_of(poll(open_tail(events[0].id))) == ["last", "new"]
    assert data_of(poll(open_tail(events[1].id))) == ["new"]


def test_several_rotations_between_two_polls_lose_nothing(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    (opening,) = tail.read()
    expected = []
    for number in range(5):
        rotate(log)
        if number != 2:
            expected.append(f"{number}")
        log.write_text("".join(f"{line}\n" for line in expected[-1:] if number != 2))
    assert data_of(poll(tail, 20)) == expected
    assert data_of(poll(open_tail(opening.id), 20)) == expected


def test_files_with_equal_times_are_ordered_by_number(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    for number in range(12):
        rotate(log)
        log.write_text(f"{number}\n")
    for path in log.parent.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert data_of(poll(open_tail(opening.id), 30)) == [str(number) for number in range(12)]


def test_files_with_equal_times_are_ordered_by_date(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    for number, date in enumerate(("-20231230", "-20231231", ".2024-01-01", ".2024-01-01_12-00")):
        log.rename(log.with_name(log.name + date))
        log.write_text(f"{number}\n")
    for path in log.parent.iterdir():
        if path.name <= "app.log-20231231":
            os.utime(path, ns=(10**18, 10**18))
    assert data_of(poll(open_tail(opening.id), 20)) == ["0", "1", "2", "3"]


def test_other_files_of_the_directory_are_ignored(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    rotate(log)
    for name in ("app.log.3.gz", "app.log.swp", "app.log-notes", "app.logs", "app.log.2~", "my-app.log.2", "app.log2"):
        log.with_name(name).write_text("never\n")
    log.with_name("app.log.2").mkdir()
    log.with_name("app.log.4").symlink_to("nowhere")
    log.write_bytes(b"new\n")
    assert data_of(poll(open_tail(opening.id))) == ["new"]


def test_deleted_file_is_read_to_its_end(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    (opening,) = tail.read()
    with log.open("ab") as writer:
        log.unlink()
        writer.write(b"a\n")
    log.write_bytes(b"b\n")
    rotate(log)
    log.write_bytes(b"c\n")
    assert data_of(poll(tail)) == ["a", "b", "c"]
    events = poll(open_tail(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["c"]


def test_compressed_file_causes_a_reset(log: Path, open_tail: OpenTail) -> None:
    append(log, b"a\n")
    events = list(open_tail(from_start=True).read())
    rotate(log)
    rotated(log, 1).rename(log.with_name("app.log.1.gz"))
    log.write_bytes(b"b\n")
    resumed = list(open_tail(events[1].id).read())
    assert resets_of(resumed) == ["the file was deleted or compressed, or is not readable"]
    assert data_of(resumed)[1:] == ["b"]


def test_unreadable_file_causes_a_reset(log: Path, open_tail: OpenTail, monkeypatch: pytest.MonkeyPatch) -> None:
    (opening,) = open_tail().read()
    rotate(log)
    log.write_bytes(b"new\n")
    monkeypatch.setattr(os, "access", lambda path, mode: path == log)
    events = poll(open_tail(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["new"]


def test_client_waits_while_there_is_no_file(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    saved = log.rename(log.with_name("elsewhere"))
    fresh, resumed = open_tail(), open_tail(opening.id)
    assert poll(fresh) == poll(resumed) == []
    saved.rename(log)
    append(log, b"a\n")
    assert poll(fresh)[-1].data is None
    assert data_of(poll(resumed)) == ["a"]


def test_client_waits_between_rename_and_creation(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    append(log, b"a\n")
    rotate(log)
    fresh, resumed = open_tail(), open_tail(opening.id)
    assert data_of(poll(fresh)) == []
    assert data_of(poll(resumed)) == ["a"]
    log.write_bytes(b"b\n")
    assert data_of(poll(fresh)) == data_of(poll(resumed)) == ["b"]


def test_rotation_during_the_listing_loses_nothing(
    log: Path, open_tail: OpenTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    (opening,) = open_tail().read()
    append(log, b"a\n")
    inode = log.stat().st_ino
    scan = LogTail._scan
    rotations = iter(range(3))

    def scan_during_a_rotation(self: Any) -> Iterator[Any]:
        missed = 0
        if next(rotations, None) is not None:
            rotate(log)
            log.write_bytes(b"b\n")
            missed = inode  # it was renamed during the listing
        yield from (file for file in scan(self) if file.inode != missed)

    monkeypatch.setattr(LogTail, "_scan", scan_during_a_rotation)
    assert data_of(poll(open_tail(opening.id), 20)) == ["a", "b", "b", "b"]


def test_rotation_between_listing_and_opening_loses_nothing(
    log: Path, open_tail: OpenTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    (opening,) = open_tail().read()
    append(log, b"a\n")
    listed = LogTail._list
    rotations = iter(range(3))

    def list_before_a_rotation(self: Any) -> Any:
        found = listed(self)
        if next(rotations, None) is not None:
            rotate(log)
            log.write_bytes(b"b\n")
        return found

    monkeypatch.setattr(LogTail, "_list", list_before_a_rotation)
    assert data_of(poll(open_tail(opening.id), 20)) == ["a", "b", "b", "b"]


def test_copytruncate_loses_nothing(log: Path, open_tail: OpenTail) -> None:
    tail = open_tail()
    events = list(tail.read())
    append(log, b"a\n")
    events += poll(tail)
    append(log, b"b\n")
    copytruncate(log)
    events += poll(tail)  # the file now ends before the position of this client
    append(log, b"c\n")
    copytruncate(log)
    append(log, b"something longer\n")  # the file now ends after the position of this client
    events += poll(tail)
    expected = ["a", "b", "c", "something longer"]
    assert data_of(events) == expected
    for number, event in enumerate(events):
        assert data_of(poll(open_tail(event.id))) == expected[number:]


@pytest.mark.parametrize("content", [b"", b"n\n", b"new\n", b"new line that goes further than the old ones\n"])
def test_truncation_causes_a_reset(log: Path, open_tail: OpenTail, content: bytes) -> None:
    tail = open_tail()
    append(log, b"a\n")
    (opening,) = tail.read()
    log.write_bytes(content)
    for events in (poll(tail), poll(open_tail(opening.id))):
        assert resets_of(events) == ["the file was truncated or rewritten"]
        assert data_of(events)[1:] == content.decode().splitlines()
        assert data_of(poll(open_tail(last_id(events)))) == []


def test_lines_that_only_differ_in_their_time_are_distinguished(log: Path, open_tail: OpenTail) -> None:
    def lines(minute: int) -> bytes:
        return b"".join(b"12:%02d:%02d %s\n" % (minute, second, b"GET /health " * 30) for second in range(60))

    log.write_bytes(lines(1))
    tail = open_tail()
    (opening,) = tail.read()
    log.write_bytes(lines(2))
    assert len(resets_of(poll(tail))) == len(resets_of(poll(open_tail(opening.id)))) == 1


def test_reused_inode_number_causes_a_reset(log: Path, open_tail: OpenTail) -> None:
    append(log, b"a\n")
    (opening,) = open_tail().read()
    _, offset, crc = (opening.id or "").split("-")
    rotate(log)
    log.write_bytes(b"b\nb\nb\nb\n")
    reused_id = f"{log.stat().st_ino}-{offset}-{crc}"  # as if the file system had reused the inode number
    rotated(log, 1).unlink()
    events = poll(open_tail(reused_id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["b", "b", "b", "b"]


def test_rewritten_rotated_file_causes_a_reset(log: Path, open_tail: OpenTail) -> None:
    (opening,) = open_tail().read()
    rotate(log)
    log.write_bytes(b"a\n")
    rotated(log, 1).write_bytes(b"something else\n")
    events = poll(open_tail(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["a"]
