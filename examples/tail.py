r"""Stream a log file over HTTP as it grows, one event per line: ``tail -F`` that loses no line.

    python examples/tail.py app.log                        # or --server hypercorn
    curl -N http://127.0.0.1:8000/events                   # new lines only; ?from=start: from the first line

A client that reconnects with ``Last-Event-ID``, as EventSource does by itself, continues with the next line. This
works across rotated files (``app.log.1``, ``app.log-20240131``), as long as they exist and are not compressed. If the
client's position no longer exists, it gets a ``reset`` event with the reason, and then the current file from its start.

A line is sent once its line end is written. A line of more than 1 MiB is sent in pieces, and all pieces except the last
one are events of the type ``part``.

Three losses cannot be detected and cause no ``reset``: a file that appears and disappears between two polls; the first
lines of a log that is truncated before they were read; and lines that a process still writes to a rotated file more
than one poll after another process began to write to the new one.
"""

import argparse
import asyncio
import codecs
import os
import re
import stat
import sys
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import anyio

from asgi_sse import HTTPError, Request, ServerSentEvent, SSEMiddleware, StreamRegistry, create_app

CHUNK_BYTES = 65_536
MAX_LINE_BYTES = 1_048_576
# The bytes before a position identify it. A single line would not: many lines of a log differ in their time only.
WINDOW_BYTES = 1024
POSITION = re.compile(r"([0-9]{1,20})-([0-9]{1,18})-([0-9a-f]{8})")
ROTATED = r"[.-](?:old|[0-9][0-9.:+TZ_-]*)"  # a number or a time; app.log.1.gz and app.log.swp do not match


class LogFile(NamedTuple):
    """A file of the log, from a listing of its directory. Files sort from the oldest to the current one."""

    is_current: bool
    mtime: int
    rank: int  # orders files with the same mtime: app.log.2 is older than app.log.1
    path: Path
    inode: int
    size: int


class RewrittenError(Exception):
    """The file no longer contains what was read from it: it was truncated or rewritten."""


class LogTail:
    """One client's position in a log.

    An event id is ``inode-offset-crc``: the byte offset after a line, and the CRC-32 of the bytes before it. The inode
    number alone is not enough: a new file can get the same number, and a truncated file keeps it. The file stays open,
    so that a rotation cannot remove unread lines. Nothing is buffered besides the file itself.

    Args:
        path: The log that is being written.
        last_event_id: The event to continue after; ``None``: start at the end of the log.
        from_start: Without an id, start with the first line.
    """

    def __init__(self, path: Path, last_event_id: str | None = None, *, from_start: bool = False) -> None:
        self._path = path
        self._resume_id = last_event_id
        self._from_start = from_start
        self._names = re.compile(f"{re.escape(path.name)}(?:{ROTATED})?")
        self._file: FileIO | None = None
        self._successor_inode = 0  # of the file that probably follows this one
        self._inode = self._offset = 0
        self._before = b""  # the last bytes before the offset

    @property
    def id(self) -> str:
        """The id of the last event, which is the current position."""
        return f"{self._inode}-{self._offset}-{zlib.crc32(self._before):08x}"

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def read(self) -> Iterator[ServerSentEvent]:
        """Yield the events that are available. Call this again after a poll interval."""
        with suppress(FileNotFoundError):  # a rotation is renaming files; the next call sees the result
            if self._file is None:
                yield from self._begin()
            while self._file is not None:
                try:
                    yield from self._lines(self._file)
                    newer = self._successor(self._file)
                    if newer is None or newer.inode != self._successor_inode:
                        # Read this file once more after the next interval, because a process may still write to it.
                        self._successor_inode = 0 if newer is None else newer.inode
                        return
                    yield from self._lines(self._file, final=True)
                    self._enter(self._open(newer))
                except RewrittenError:
                    self._resume_id = self.id
                    self.close()
                    yield from self._begin()

    def _lines(self, file: FileIO, *, final: bool = False) -> Iterator[ServerSentEvent]:
        size = CHUNK_BYTES
        while True:
            # Reads the last bytes again, to check that this is still the same content.
            data = os.pread(file.fileno(), len(self._before) + size, self._offset - len(self._before))
            if not data.startswith(self._before):
                raise RewrittenError
            # A larger read only takes the long line: splitting the rest into a million short lines costs memory.
            *lines, rest = data[len(self._before) :].split(b"\n", -1 if size == CHUNK_BYTES else 1)
            for line in lines:
                yield self._event(line + b"\n")
            if lines:
                size = CHUNK_BYTES
            elif len(rest) < size:
                if rest and final:  # this line will get no line end
                    yield self._event(rest)
                return
            elif size < MAX_LINE_BYTES:
                size = MAX_LINE_BYTES
            else:
                yield self._event(rest[: codecs.utf_8_decode(rest, "replace", False)[1]], "part")  # noqa: FBT003

    def _event(self, line: bytes, kind: str | None = None) -> ServerSentEvent:
        self._offset += len(line)
        self._before = (self._before + line)[-WINDOW_BYTES:]
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")
        return ServerSentEvent(text, event=kind, id=self.id)

    def _begin(self) -> Iterator[ServerSentEvent]:
        files = self._list()
        if not files:
            return
        if self._resume_id is None:
            file = self._open(next(filter(self._has_lines, reversed(files)), files[-1]))
            self._enter(file, 0 if self._from_start else _end_of_lines(file))
            yield ServerSentEvent(id=self.id)  # lets a client resume that is cut before its first line
        elif reason := self._resume(files, self._resume_id):
            self._enter(self._open(files[-1]))
            yield ServerSentEvent({"reason": reason}, event="reset", id=self.id)

    def _resume(self, files: list[LogFile], event_id: str) -> str | None:
        """Open the file of an event id at its position; return the reason if that is impossible."""
        position = POSITION.fullmatch(event_id)
        if position is None:
            return "the id does not belong to this log"
        inode, offset, crc = int(position[1]), int(position[2]), int(position[3], 16)
        found = [file for file in files if file.inode == inode]
        if not found:
            return "the file was deleted or compressed, or is not readable"
        # Also tries the other files: copytruncate of logrotate copies a file and then truncates it.
        for candidate in [*found, *reversed(files)]:
            file = self._open(candidate)
            before = _bytes_before(file, offset)
            if before is not None and zlib.crc32(before) == crc:
                self._enter(file, offset)
                return None
            file.close()
        return "the file was truncated or rewritten"

    def _successor(self, file: FileIO) -> LogFile | None:
        """Return the next newer file if the log was rotated."""
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                return None
        files = self._list()
        ours = [index for index, other in enumerate(files) if other.inode == self._inode]
        if ours:
            files = files[ours[-1] + 1 :]
        else:  # this file was deleted or compressed
            mtime = os.fstat(file.fileno()).st_mtime_ns
            files = [other for other in files if other.is_current or other.mtime >= mtime]
        return next(filter(self._has_lines, files), None)

    def _has_lines(self, file: LogFile) -> bool:
        """Return whether a position in the file can be identified; the current file needs a complete line for that."""
        if not file.is_current:
            return file.size > 0
        with self._open(file) as current:
            return _end_of_lines(current) > 0

    def _enter(self, file: FileIO, offset: int = 0) -> None:
        if self._file is not None:
            self._file.close()
        self._file = file
        self._inode, self._offset = os.fstat(file.fileno()).st_ino, offset
        self._before = _bytes_before(file, offset) or b""

    def _open(self, found: LogFile) -> FileIO:
        file = FileIO(found.path)
        if os.fstat(file.fileno()).st_ino != found.inode:
            file.close()
            raise FileNotFoundError(found.path)
        return file

    def _list(self) -> list[LogFile]:
        files = sorted(self._scan())
        # A listing can miss a file that is renamed at that moment. Two equal listings are complete.
        if {(file.path, file.inode) for file in files} != {(file.path, file.inode) for file in self._scan()}:
            raise FileNotFoundError(self._path)
        return files

    def _scan(self) -> Iterator[LogFile]:
        for path in self._path.parent.iterdir():
            if self._names.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    about = path.stat()
                    if stat.S_ISREG(about.st_mode) and os.access(path, os.R_OK):
                        number = re.search(r"\.([0-9]{1,3})$", path.name)
                        rank = -int(number[1]) if number else 0
                        yield LogFile(path == self._path, about.st_mtime_ns, rank, path, about.st_ino, about.st_size)


def _bytes_before(file: FileIO, offset: int) -> bytes | None:
    if offset > os.fstat(file.fileno()).st_size:
        return None
    start = max(0, offset - WINDOW_BYTES)
    return os.pread(file.fileno(), offset - start, start)


def _end_of_lines(file: FileIO) -> int:
    """Return the offset after the last complete line, or one within the line if it is very long."""
    start = max(0, os.fstat(file.fileno()).st_size - CHUNK_BYTES)
    return start + os.pread(file.fileno(), CHUNK_BYTES, start).rfind(b"\n") + 1


def tail_app(path: str | Path, *, interval: float = 0.1) -> SSEMiddleware:
    """Create the ASGI app that streams a log.

    Args:
        path: The log.
        interval: Seconds between two polls.
    """
    log = Path(path).absolute()

    async def events(request: Request) -> AsyncIterator[ServerSentEvent]:
        with closing(LogTail(log, request.last_event_id, from_start=request.query.get("from") == "start")) as tail:
            while True:
                # Not in a thread: that would take longer than reading 64 KiB of a local file.
                for event in tail.read():
                    yield event
                await anyio.sleep(interval)

    async def index(request: Request) -> None:
        raise HTTPError(200, f"curl -N http://{request.headers.get('host', 'HOST')}/events\n")

    registry = StreamRegistry(drain_timeout=0.5)  # seconds for clients that do not read at shutdown
    return create_app({"/": index, "/events": events}, registry=registry)


def serve_uvicorn(app: SSEMiddleware, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn  # noqa: PLC0415 (only one of the two servers has to be installed)

    with suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        uvicorn.run(app, host=host, port=port)


def serve_hypercorn(app: SSEMiddleware, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from hypercorn.asyncio import serve  # noqa: PLC0415
    from hypercorn.config import Config  # noqa: PLC0415

    config = Config()
    config.bind = [f"{host}:{port}"]
    asyncio.run(serve(app, config))  # type: ignore[arg-type]  # its types are narrower than ASGI's


def main() -> None:
    """Parse the command line and serve the log."""
    parser = argparse.ArgumentParser(description="Stream a log file as it grows, one event per line, at /events.")
    parser.add_argument("file", type=Path, metavar="FILE", help="log file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--server", choices=["uvicorn", "hypercorn"], default="uvicorn", help="server to run (default: %(default)s)"
    )
    args = parser.parse_args()
    if not (args.file.is_file() and os.access(args.file, os.R_OK)):
        parser.error(f"FILE must be a readable regular file, got {args.file}")
    serve = serve_hypercorn if args.server == "hypercorn" else serve_uvicorn
    try:
        serve(tail_app(args.file), args.host, args.port)
    except (OSError, ImportError) as exc:
        sys.exit(f"{parser.prog}: {exc}")


if __name__ == "__main__":
    main()
