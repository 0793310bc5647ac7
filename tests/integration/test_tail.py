"""examples/tail.py: every line once and in order, whatever becomes of the file, the client and the server."""

import importlib.util
import itertools
import json
import logging
import logging.handlers
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from serving import free_port

from asgi_sse import EventDecoder, ServerSentEvent

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "tail.py"
MIB = 1 << 20


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("tail_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()
Open = Callable[..., Any]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of one line."""
    path = tmp_path / "app.log"
    path.write_bytes(b"old\n")
    return path


@pytest.fixture
def follow(log: Path) -> Iterator[Open]:
    """Opens the log; what it opened is closed at the end."""
    with ExitStack() as stack:

        def opened(last_event_id: str | None = None, **options: Any) -> Any:
            tail = example.LogTail(log, last_event_id, **options)
            stack.callback(tail.close)
            return tail

        yield opened


def append(path: Path, *data: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(data))


def rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def rotate(path: Path) -> None:
    """Shift FILE.1 to FILE.2 and so on, and FILE to FILE.1, as logrotate and RotatingFileHandler do."""
    count = next(number for number in itertools.count(1) if not rotated(path, number).exists())
    for number in range(count, 1, -1):
        rotated(path, number - 1).rename(rotated(path, number))
    path.rename(rotated(path, 1))


def polls(tail: Any, count: int = 8) -> list[ServerSentEvent]:
    """The events of a few polls, enough to come through a few files."""
    return [event for _ in range(count) for event in tail.read()]


def data_of(events: Iterable[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events if event.data is not None]


def resets_of(events: Iterable[ServerSentEvent]) -> list[str]:
    return [json.loads(event.data or "")["reason"] for event in events if event.event == "reset"]


def last_id(events: list[ServerSentEvent]) -> str:
    assert events[-1].id is not None
    return events[-1].id


# Where a client begins


def test_without_an_id_it_begins_at_the_end_and_says_where(log: Path, follow: Open) -> None:
    tail = follow()
    (opening,) = tail.read()
    assert (opening.data, opening.id) == (None, tail.id)
    assert polls(tail) == []
    append(log, b"a\nb\n")
    assert data_of(tail.read()) == ["a", "b"]
    assert data_of(follow(opening.id).read()) == ["a", "b"]


def test_a_line_that_is_half_written_comes_whole(log: Path, follow: Open) -> None:
    append(log, b"be")
    tail = follow()
    assert data_of(tail.read()) == []
    append(log, b"gin")
    assert data_of(tail.read()) == []
    append(log, b"ning\n")
    assert data_of(tail.read()) == ["beginning"]


def test_in_an_endless_line_it_begins_somewhere(log: Path, follow: Open) -> None:
    append(log, b"x" * MIB)
    tail = follow()
    assert data_of(tail.read()) == []
    append(log, b"\na\n")
    first, second = data_of(tail.read())
    assert first is not None
    assert (set(first), second) == ({"x"}, "a")


def test_it_begins_with_the_first_line_on_request(log: Path, follow: Open) -> None:
    tail = follow(from_start=True)
    assert data_of(tail.read()) == ["old"]
    assert data_of(tail.read()) == []


def test_every_id_leads_to_the_very_next_line(log: Path, follow: Open) -> None:
    lines = [f"line {number} " + "x" * (number % 90) for number in range(300)]
    log.write_text("".join(f"{line}\n" for line in lines))
    for number, event in enumerate(follow(from_start=True).read()):  # the first one is before the first line
        assert data_of(follow(event.id).read()) == lines[number:]


@pytest.mark.parametrize(
    "last_event_id",
    [
        "", "abc", "1-2", "1-2-", "-1-2-00000000", "1--2-00000000", "0-0-0", "1-2-0000000g", "1-1-00000000\n", "\0",
        "\u0661-1-00000000", "9" * 5000, f"{'9' * 30}-1-00000000", f"{'9' * 20}-{'9' * 18}-00000000",
        "{inode}-1-00000000", "{inode}-{huge}-00000000",
    ],
)  # fmt: skip
def test_an_id_that_leads_nowhere_resets_to_the_start(log: Path, follow: Open, last_event_id: str) -> None:
    bad = last_event_id.replace("{inode}", str(log.stat().st_ino)).replace("{huge}", "9" * 18)
    tail = follow(bad)
    events = list(tail.read())
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["old"]
    resumed = list(follow(events[0].id).read())  # dropped right behind the reset
    assert data_of(resumed) == ["old"]


# Lines


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
def test_a_line_is_what_stands_before_its_line_end(log: Path, follow: Open, written: bytes, line: str) -> None:
    tail = follow()
    list(tail.read())
    append(log, written, b"next\n")
    events = list(tail.read())
    assert data_of(events) == [line, "next"]
    assert data_of(follow(events[0].id).read()) == ["next"]


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, MIB - 1])
def test_a_long_line_comes_whole(log: Path, follow: Open, size: int) -> None:
    tail = follow()
    list(tail.read())
    append(log, b"before\n", b"x" * size)
    assert data_of(tail.read()) == ["before"]
    append(log, b"\n", b"after\n" * 1000)
    assert data_of(tail.read()) == ["x" * size, *["after"] * 1000]


def test_a_longer_line_comes_in_pieces(log: Path, follow: Open) -> None:
    line = "\u20ac" * (4 * MIB // 3)  # no piece ends in the middle of a character
    tail = follow()
    list(tail.read())
    append(log, line.encode(), b"\r\nafter\n")
    events = list(tail.read())
    assert [event.event for event in events] == ["part"] * (len(events) - 2) + [None, None]
    assert "".join(event.data or "" for event in events[:-1]) == line
    assert events[-1].data == "after"
    resumed = list(follow(events[1].id).read())
    assert resumed == events[2:]


def test_memory_is_bounded(log: Path, follow: Open) -> None:
    append(log, b"x" * 20 * MIB, b"\n", b"\n" * MIB, b"short line\n" * MIB)
    events = follow(from_start=True).read()
    tracemalloc.start()
    try:
        count = sum(1 for _ in itertools.islice(events, 20_000))  # and then the client takes no more
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < 12 * MIB


# Rotation


def test_a_rotation_goes_on_with_the_new_file(log: Path, follow: Open) -> None:
    tail = follow()
    list(tail.read())
    append(log, b"a\n")
    rotate(log)
    append(rotated(log, 1), b"b\n")  # its writer has not seen it yet
    log.write_bytes(b"c\n")
    events = polls(tail)
    append(log, b"d\n")
    events += polls(tail)
    assert data_of(events) == ["a", "b", "c", "d"]
    for number, event in enumerate(events):
        assert data_of(polls(follow(event.id))) == ["b", "c", "d"][number:]


def test_after_a_rotation_the_old_file_is_read_once_more(log: Path, follow: Open) -> None:
    tail = follow()
    list(tail.read())
    append(log, b"half")
    rotate(log)
    assert polls(tail) == []  # FILE is missing
    log.write_bytes(b"")
    assert polls(tail) == []  # nobody writes into it yet
    append(rotated(log, 1), b" and")
    append(log, b"new\n")
    assert list(tail.read()) == []
    append(rotated(log, 1), b" whole\nlast")  # by a writer who still holds it
    events = polls(tail)
    assert data_of(events) == ["half and whole", "last", "new"]  # the line end of the second will never come
    assert data_of(polls(follow(events[0].id))) == ["last", "new"]
    assert data_of(polls(follow(events[1].id))) == ["new"]


def test_several_rotations_between_two_polls(log: Path, follow: Open) -> None:
    tail = follow()
    (opening,) = tail.read()
    expected = []
    for number in range(5):
        rotate(log)
        if number != 2:
            expected.append(f"{number}")
        log.write_text("".join(f"{line}\n" for line in expected[-1:] if number != 2))
    assert data_of(polls(tail, 20)) == expected
    assert data_of(polls(follow(opening.id), 20)) == expected


def test_files_of_one_clock_tick_are_told_apart_by_their_numbers(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    for number in range(12):
        rotate(log)
        log.write_text(f"{number}\n")
    for path in log.parent.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert data_of(polls(follow(opening.id), 30)) == [str(number) for number in range(12)]


def test_files_are_told_apart_by_dates(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    for number, date in enumerate(("-20231230", "-20231231", ".2024-01-01", ".2024-01-01_12-00")):
        log.rename(log.with_name(log.name + date))
        log.write_text(f"{number}\n")
    for path in log.parent.iterdir():
        if path.name <= "app.log-20231231":
            os.utime(path, ns=(10**18, 10**18))
    assert data_of(polls(follow(opening.id), 20)) == ["0", "1", "2", "3"]


def test_what_is_no_rotated_file_is_left_alone(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    rotate(log)
    for name in ("app.log.3.gz", "app.log.swp", "app.log-notes", "app.logs", "app.log.2~", "my-app.log.2", "app.log2"):
        log.with_name(name).write_text("never\n")
    log.with_name("app.log.2").mkdir()
    log.with_name("app.log.4").symlink_to("nowhere")
    log.write_bytes(b"new\n")
    assert data_of(polls(follow(opening.id))) == ["new"]


def test_a_deleted_file_is_read_to_its_end(log: Path, follow: Open) -> None:
    tail = follow()
    (opening,) = tail.read()
    with log.open("ab") as writer:
        log.unlink()
        writer.write(b"a\n")
    log.write_bytes(b"b\n")
    rotate(log)
    log.write_bytes(b"c\n")
    assert data_of(polls(tail)) == ["a", "b", "c"]
    events = polls(follow(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["c"]


def test_a_compressed_file_resets(log: Path, follow: Open) -> None:
    append(log, b"a\n")
    events = list(follow(from_start=True).read())
    rotate(log)
    rotated(log, 1).rename(log.with_name("app.log.1.gz"))
    log.write_bytes(b"b\n")
    resumed = list(follow(events[1].id).read())
    assert resets_of(resumed) == ["the file is gone, compressed, or not readable"]
    assert data_of(resumed)[1:] == ["b"]


def test_a_file_that_may_not_be_read_resets(log: Path, follow: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    (opening,) = follow().read()
    rotate(log)
    log.write_bytes(b"new\n")
    monkeypatch.setattr(os, "access", lambda path, mode: path == log)
    events = polls(follow(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["new"]


def test_a_moment_without_any_file(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    saved = log.rename(log.with_name("elsewhere"))
    fresh, resumed = follow(), follow(opening.id)
    assert polls(fresh) == polls(resumed) == []
    saved.rename(log)
    append(log, b"a\n")
    assert polls(fresh)[-1].data is None
    assert data_of(polls(resumed)) == ["a"]


def test_a_moment_between_rename_and_creation(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    append(log, b"a\n")
    rotate(log)
    fresh, resumed = follow(), follow(opening.id)
    assert data_of(polls(fresh)) == []
    assert data_of(polls(resumed)) == ["a"]
    log.write_bytes(b"b\n")
    assert data_of(polls(fresh)) == data_of(polls(resumed)) == ["b"]


def test_a_rotation_while_the_directory_is_read(log: Path, follow: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    (opening,) = follow().read()
    append(log, b"a\n")
    inode = log.stat().st_ino
    scan = example.LogTail._scan
    rotations = iter(range(3))

    def scan_in_a_bad_moment(self: Any) -> Iterator[Any]:
        missed = 0
        if next(rotations, None) is not None:
            rotate(log)
            log.write_bytes(b"b\n")
            missed = inode  # since it was renamed in between
        yield from (file for file in scan(self) if file.inode != missed)

    monkeypatch.setattr(example.LogTail, "_scan", scan_in_a_bad_moment)
    assert data_of(polls(follow(opening.id), 20)) == ["a", "b", "b", "b"]


def test_a_rotation_between_the_listing_and_the_opening(
    log: Path, follow: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    (opening,) = follow().read()
    append(log, b"a\n")
    listed = example.LogTail._list
    rotations = iter(range(3))

    def list_too_early(self: Any) -> Any:
        found = listed(self)
        if next(rotations, None) is not None:
            rotate(log)
            log.write_bytes(b"b\n")
        return found

    monkeypatch.setattr(example.LogTail, "_list", list_too_early)
    assert data_of(polls(follow(opening.id), 20)) == ["a", "b", "b", "b"]


# Truncation


def copytruncate(path: Path) -> None:
    """Move the content on as logrotate's copytruncate does: FILE stays the same file."""
    path.rename(held := path.with_name("held"))
    path.write_bytes(b"")
    rotate(path)
    rotated(path, 1).write_bytes(held.read_bytes())
    held.rename(path)
    os.truncate(path, 0)


def test_copytruncate_loses_nothing(log: Path, follow: Open) -> None:
    tail = follow()
    events = list(tail.read())
    append(log, b"a\n")
    events += polls(tail)
    append(log, b"b\n")
    copytruncate(log)
    events += polls(tail)  # the new end is before the place of this one
    append(log, b"c\n")
    copytruncate(log)
    append(log, b"something longer\n")  # and here behind it
    events += polls(tail)
    expected = ["a", "b", "c", "something longer"]
    assert data_of(events) == expected
    for number, event in enumerate(events):
        assert data_of(polls(follow(event.id))) == expected[number:]


@pytest.mark.parametrize("content", [b"", b"n\n", b"new\n", b"new line that goes further than the old ones\n"])
def test_a_truncation_resets(log: Path, follow: Open, content: bytes) -> None:
    tail = follow()
    append(log, b"a\n")
    (opening,) = tail.read()
    log.write_bytes(content)
    for events in (polls(tail), polls(follow(opening.id))):
        assert resets_of(events) == ["the file was truncated, or written anew"]
        assert data_of(events)[1:] == content.decode().splitlines()
        assert data_of(polls(follow(last_id(events)))) == []


def test_lines_that_differ_in_their_time_alone_are_told_apart(log: Path, follow: Open) -> None:
    def lines(minute: int) -> bytes:
        return b"".join(b"12:%02d:%02d %s\n" % (minute, second, b"GET /health " * 30) for second in range(60))

    log.write_bytes(lines(1))
    tail = follow()
    (opening,) = tail.read()
    log.write_bytes(lines(2))
    assert len(resets_of(polls(tail))) == len(resets_of(polls(follow(opening.id)))) == 1


def test_an_inode_number_that_was_used_again_resets(log: Path, follow: Open) -> None:
    append(log, b"a\n")
    (opening,) = follow().read()
    _, offset, crc = (opening.id or "").split("-")
    rotate(log)
    log.write_bytes(b"b\nb\nb\nb\n")
    again = f"{log.stat().st_ino}-{offset}-{crc}"  # that id, had the file system given its number to the new file
    rotated(log, 1).unlink()
    events = polls(follow(again))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["b", "b", "b", "b"]


def test_a_rotated_file_that_was_written_anew_resets(log: Path, follow: Open) -> None:
    (opening,) = follow().read()
    rotate(log)
    log.write_bytes(b"a\n")
    rotated(log, 1).write_bytes(b"something else\n")
    events = polls(follow(opening.id))
    assert len(resets_of(events)) == 1
    assert data_of(events)[1:] == ["a"]


# All of it at random


@pytest.mark.parametrize("seed", range(25))
def test_every_line_once_whatever_happens(log: Path, follow: Open, seed: int) -> None:
    rng = random.Random(seed)
    tail = follow()
    seen = list(tail.read())
    count = 0

    def write() -> None:
        nonlocal count
        for _ in range(rng.randrange(6)):
            append(log, f"{count} ".encode())
            if rng.random() < 0.1:
                read()
            append(log, b"%s\n" % (b"x" * rng.randrange(80)))
            count += 1

    def reconnect() -> None:
        nonlocal tail
        tail.close()
        tail = follow(last_id(seen))

    def read() -> None:
        events = tail.read()
        seen.extend(itertools.islice(events, rng.choice([1, 3, 1000])))
        if next(events, None) is not None:
            reconnect()

    def rename() -> None:
        rotate(log)
        read()
        log.touch()

    def copy() -> None:
        copytruncate(log)

    steps = [write, write, write, read, read, read, reconnect, rename, copy]
    for _ in range(150):
        rng.choice(steps)()
    append(log, b"last\n")
    while seen[-1].data != "last":
        before = len(seen)
        seen += polls(tail, 3)
        assert len(seen) > before
    assert resets_of(seen) == []
    assert [data.split()[0] for data in data_of(seen) if data] == [*map(str, range(count)), "last"]


def test_a_rotating_file_handler(log: Path, follow: Open) -> None:
    rng = random.Random(1)
    handler = logging.handlers.RotatingFileHandler(log, maxBytes=2000, backupCount=500)
    tail = follow()
    seen = list(tail.read())
    try:
        for number in range(5000):
            handler.emit(logging.LogRecord("test", logging.INFO, "", 0, f"{number}", None, None))
            if rng.random() < 0.02:
                seen += tail.read()
    finally:
        handler.close()
    seen += polls(tail, 100)
    assert data_of(seen) == [f"{number}" for number in range(5000)]


# The app


@pytest.mark.anyio
@pytest.mark.parametrize("last_event_id", [None, "", "abc"])
async def test_the_app_streams(log: Path, last_event_id: str | None) -> None:
    app = example.tail_app(log, interval=0.01)
    sending, sent = anyio.create_memory_object_stream[bytes](100)
    left = anyio.Event()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await left.wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        await sending.send(message.get("body", b""))

    headers = [] if last_event_id is None else [(b"last-event-id", last_event_id.encode())]
    scope = {
        "type": "http", "method": "GET", "path": "/events", "query_string": b"", "headers": headers,
        "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
    }  # fmt: skip
    decoder = EventDecoder()
    events: list[ServerSentEvent] = []
    with sending, sent, anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, receive, send)
            while not decoder.last_event_id:
                events += decoder.feed(await sent.receive())
            append(log, b"new\n")
            while not events or events[-1].data != "new":
                events += decoder.feed(await sent.receive())
            left.set()
    assert [event.event for event in events] == (["reset", "message", "message"] if last_event_id else ["message"])


# The program


class Server:
    """The program as a user starts it."""

    def __init__(self, log: Path, kind: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, str(SCRIPT), str(log), "--server", kind, "--port", str(self.port)]
        self._output = log.with_name("server.output")
        self.start()

    def start(self) -> None:
        with self._output.open("ab") as output:
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.process = subprocess.Popen(self._command, env=environment, stdout=output, stderr=output)

    def wait(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{self.output}")
                time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    @property
    def output(self) -> str:
        return self._output.read_text()


@contextmanager
def running(log: Path, kind: str) -> Iterator[Server]:
    server = Server(log, kind)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


class Writer(threading.Thread):
    """Writes numbered lines in bursts and rotates the log; at most `AHEAD` lines ahead of its reader."""

    LINES = 100_000
    AHEAD = 6_000

    def __init__(self, log: Path, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self._log = log
        self._rng = rng
        self._changed = threading.Condition()
        self._read = 0
        self._written = 0
        self.rotations = 0
        self.rotating = threading.Event()  # a rotation waits for the reader to be killed in the middle of it
        self.killed = threading.Event()
        self.settled = threading.Lock()  # held during a rotation, when there may be no file

    def reader_has(self, count: int) -> None:
        with self._changed:
            self._read = count
            self._changed.notify()

    def run(self) -> None:
        file = self._log.open("ab", buffering=0)
        for burst in itertools.count(1):
            self._write(file, self._rng.randrange(500, 3000))
            if self._written == self.LINES:
                break
            if burst % 5 == 0 and self._written < self.LINES - 2000:  # while there are lines for the rotation
                with self.settled, file as old:
                    file = self._rotate(old)
        with file:
            file.write(b"end\n")

    def _write(self, file: Any, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._written - self._read < self.AHEAD, timeout=30)
        numbers = range(self._written, min(self._written + count, self.LINES))
        data = b"".join(b"%06d %s\n" % (number, b"x" * self._rng.randrange(60)) for number in numbers)
        cut = self._rng.randrange(len(data))  # mostly within a line
        file.write(data[:cut])
        file.write(data[cut:])
        self._written = numbers.stop

    def _rotate(self, old: Any) -> Any:
        rotate(self._log)
        self.rotations += 1
        if self.rotations % 3 == 1:  # the reader is killed while there is no file
            self.killed.clear()
            self.rotating.set()
            self._write(old, 10)
            assert self.killed.wait(20)
        elif self.rotations % 3 == 2:  # the new file is there before the writer knows
            self._log.touch()
            self._write(old, 1000)
        return self._log.open("ab", buffering=0)


class Reader:
    """A client that is killed again and again, and returns with the id that it has."""

    def __init__(self, url: str, writer: Writer, rng: random.Random) -> None:
        self._url = url
        self._writer = writer
        self._rng = rng
        self._id = ""
        self.lines: list[str] = []
        self.others: list[ServerSentEvent] = []
        self.connections = 0

    def run(self, until: int, stopping: Callable[[], None] | None = None) -> None:
        """Read until that many lines are there; or call `stopping` at the log's last one, and read to the end."""
        deadline = time.monotonic() + 60
        while len(self.lines) < until:
            assert time.monotonic() < deadline
            try:
                if self._connect(min(until, len(self.lines) + self._rng.randrange(2000, 6000)), stopping):
                    return
            except httpx.TransportError:  # the server was killed
                time.sleep(0.01)

    def _connect(self, until: int, stopping: Callable[[], None] | None) -> bool:
        headers = {"last-event-id": self._id} if self._id else {}
        decoder = EventDecoder()
        decoder.last_event_id = self._id
        with httpx.stream("GET", f"{self._url}/events?from=start", headers=headers, timeout=10) as response:
            assert response.status_code == 200
            self.connections += 1
            for chunk in response.iter_raw():
                rotating = self._writer.rotating.is_set()
                kill = rotating or (len(self.lines) >= until and self.lines[-1] != "end")
                # What was killed has read a part of it, and may have been in the middle of an event.
                self._take(decoder, chunk[: self._rng.randrange(len(chunk))] if kill else chunk)
                if kill:
                    break
                if stopping is not None and self.lines[-1:] == ["end"]:
                    stopping()
                    stopping = None
            else:
                return True  # the server has ended the stream, in order
        if rotating:
            self._writer.rotating.clear()
            self._writer.killed.set()
        return False

    def _take(self, decoder: EventDecoder, chunk: bytes) -> None:
        for event in decoder.feed(chunk):
            (
                self.lines.append((event.data or "").split()[0])
                if event.event == "message"
                else self.others.append(event)
            )
        self._id = decoder.last_event_id
        self._writer.reader_has(len(self.lines))


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_every_line_once_though_client_and_server_are_killed(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "app.log"
    log.touch()
    writer = Writer(log, random.Random(1))
    with running(log, kind) as server:
        reader = Reader(server.url, writer, random.Random(2))
        writer.start()
        reader.run(until=Writer.LINES // 2)
        while not writer.settled.acquire(blocking=False):  # without a file, no server starts
            reader.run(until=len(reader.lines) + 100)
        server.kill()
        server.start()
        server.wait()
        writer.settled.release()
        reader.run(until=Writer.LINES + 2, stopping=lambda: server.process.send_signal(signal.SIGINT))
        writer.join(10)
        server.process.wait(10)
        assert "Traceback" not in server.output
    assert reader.lines == [*(f"{number:06}" for number in range(Writer.LINES)), "end"]
    assert reader.others == []
    assert reader.connections >= 20
    assert writer.rotations >= 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_a_signal_ends_it_at_once(log: Path, kind: str, number: signal.Signals) -> None:
    with running(log, kind) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert client.get("/").text == f"curl -N {server.url}/events\n"
        with client.stream("GET", "/events") as response:
            chunks = response.iter_raw()
            assert b"opened" in next(chunks)
            began = time.monotonic()
            server.process.send_signal(number)
            assert b"retry:" in b"".join(chunks)  # the body comes to its end
        assert server.process.wait(20) in (0, -number)
        assert time.monotonic() - began < 10
        assert "Traceback" not in server.output


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_what_is_no_log_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    monkeypatch.setattr(sys, "argv", ["tail.py", str(path)])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert f"error: {path} is no file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_a_port_that_is_taken_is_told_in_one_line(log: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, str(SCRIPT), str(log), "--server", kind, "--port", str(other.getsockname()[1])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode != 0
    assert "address already in use" in ended.stderr.lower()
    assert "Traceback" not in ended.stderr
