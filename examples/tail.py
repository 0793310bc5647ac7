r"""Streams a log file as it grows, one event a line: ``tail -F`` over HTTP, that loses no line.

    python examples/tail.py app.log                        # or --server hypercorn
    curl -N http://127.0.0.1:8000/events                   # from now on; ?from=start: from the first line

A client that returns with the ``Last-Event-ID`` it has, as a browser's EventSource does by itself, goes on
with the very next line, through rotated files (``app.log.1``, ``app.log-20240131``) as long as they are
there and not compressed. Where its place is gone, it gets an event ``reset``, whose data tells why, and the
current file from its start.

A line goes out when its line end is there. A line of more than 1 MiB goes out in pieces, all but the last
as events ``part``. What cannot be seen, and is lost without a ``reset``: a file that comes and goes between
two polls; the first lines of a log, if they are truncated away before they were read; and what a writer
adds to a file when another one has written into the next file for longer than one poll.
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

CHUNK = 65_536
MAX_LINE = 1_048_576
WINDOW = 1024  # bytes before a place by which it is known again: lines often differ in nothing but their time
POSITION = re.compile(r"([0-9]{1,20})-([0-9]{1,18})-([0-9a-f]{8})")
ROTATED = r"[.-](?:old|[0-9][0-9.:+TZ_-]*)"  # by number or time; so app.log.1.gz and app.log.swp are none


class LogFile(NamedTuple):
    """A file of the log, as a listing of its directory found it."""

    is_current: bool  # as a tuple, they sort from the oldest to the current one
    mtime: int
    rank: int  # of two that were written within one tick of the file system's clock, app.log.2 is older
    path: Path
    inode: int
    size: int


class RewrittenError(Exception):
    """The file no longer has what was read from it: it was truncated, or written anew."""


class LogTail:
    """One client's place in a log: what came behind it, and the id by which the client finds it again.

    An id is ``inode-offset-crc``: the byte offset just past a line, and the CRC-32 of the bytes before it,
    since an inode number alone comes back, in the next file or in the same one after a truncation. The open
    file is held, so that a rotation takes nothing away. Its only buffer is the file itself.

    Args:
        path: The log that is being written.
        last_event_id: Where to go on; ``None``: at the end of the log.
        from_start: Without an id, begin with the first line.
    """

    def __init__(self, path: Path, last_event_id: str | None = None, *, from_start: bool = False) -> None:
        self._path = path
        self._wanted = last_event_id
        self._from_start = from_start
        self._names = re.compile(f"{re.escape(path.name)}(?:{ROTATED})?")
        self._file: FileIO | None = None
        self._next = 0  # the inode of the file that seems to come behind this one
        self._inode = self._offset = 0
        self._before = b""  # the last bytes before the offset

    @property
    def id(self) -> str:
        """The place behind the last event."""
        return f"{self._inode}-{self._offset}-{zlib.crc32(self._before):08x}"

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def read(self) -> Iterator[ServerSentEvent]:
        """The events that are due. Then wait for one poll interval, and call again."""
        with suppress(FileNotFoundError):  # a rotation is renaming files right now: the next call sees its end
            if self._file is None:
                yield from self._begin()
            while self._file is not None:
                try:
                    yield from self._lines(self._file)
                    newer = self._successor(self._file)
                    if newer is None or newer.inode != self._next:
                        # Stay here for one interval more, since the writer may still hold the old file.
                        self._next = 0 if newer is None else newer.inode
                        return
                    yield from self._lines(self._file, final=True)
                    self._enter(self._open(newer))
                except RewrittenError:
                    self._wanted = self.id
                    self.close()
                    yield from self._begin()

    def _lines(self, file: FileIO, *, final: bool = False) -> Iterator[ServerSentEvent]:
        size = CHUNK
        while True:
            # What was read last is read again, and tells whether this is still the same file.
            data = os.pread(file.fileno(), len(self._before) + size, self._offset - len(self._before))
            if not data.startswith(self._before):
                raise RewrittenError
            # Of more than a chunk only the long line is taken: a split into a million short ones costs memory.
            *lines, rest = data[len(self._before) :].split(b"\n", -1 if size == CHUNK else 1)
            for line in lines:
                yield self._event(line + b"\n")
            if lines:
                size = CHUNK
            elif len(rest) < size:
                if rest and final:  # its end will never come
                    yield self._event(rest)
                return
            elif size < MAX_LINE:
                size = MAX_LINE
            else:
                yield self._event(rest[: codecs.utf_8_decode(rest, "replace", False)[1]], "part")  # noqa: FBT003

    def _event(self, line: bytes, kind: str | None = None) -> ServerSentEvent:
        self._offset += len(line)
        self._before = (self._before + line)[-WINDOW:]
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode(errors="replace")
        return ServerSentEvent(text, event=kind, id=self.id)

    def _begin(self) -> Iterator[ServerSentEvent]:
        files = self._list()
        if not files:
            return
        if self._wanted is None:
            file = self._open(next(filter(self._has_begun, reversed(files)), files[-1]))
            self._enter(file, 0 if self._from_start else _end_of_lines(file))
            yield ServerSentEvent(id=self.id)  # so that a client resumes that is dropped before its first line
        elif reason := self._resume(files, self._wanted):
            self._enter(self._open(files[-1]))
            yield ServerSentEvent({"reason": reason}, event="reset", id=self.id)

    def _resume(self, files: list[LogFile], wanted: str) -> str | None:
        position = POSITION.fullmatch(wanted)
        if position is None:
            return "the id is none of this log"
        inode, offset, crc = int(position[1]), int(position[2]), int(position[3], 16)
        found = [file for file in files if file.inode == inode]
        if not found:
            return "the file is gone, compressed, or not readable"
        # Or else in a copy: logrotate's copytruncate copies the file, then truncates it.
        for candidate in [*found, *reversed(files)]:
            file = self._open(candidate)
            before = _bytes_before(file, offset)
            if before is not None and zlib.crc32(before) == crc:
                self._enter(file, offset)
                return None
            file.close()
        return "the file was truncated, or written anew"

    def _successor(self, file: FileIO) -> LogFile | None:
        """The next newer file, if the log was rotated."""
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                return None
        files = self._list()
        ours = [index for index, other in enumerate(files) if other.inode == self._inode]
        if ours:
            files = files[ours[-1] + 1 :]
        else:  # deleted by now, or compressed
            mtime = os.fstat(file.fileno()).st_mtime_ns
            files = [other for other in files if other.is_current or other.mtime >= mtime]
        return next(filter(self._has_begun, files), None)

    def _has_begun(self, file: LogFile) -> bool:
        """Whether a place in it can be found again: the start of a file that may be truncated cannot."""
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
        # A file that is renamed while its directory is read may be missed: twice the same is the truth.
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
    start = max(0, offset - WINDOW)
    return os.pread(file.fileno(), offset - start, start)


def _end_of_lines(file: FileIO) -> int:
    """Behind the last whole line; of an endless line, somewhere in it."""
    start = max(0, os.fstat(file.fileno()).st_size - CHUNK)
    return start + os.pread(file.fileno(), CHUNK, start).rfind(b"\n") + 1


def tail_app(path: str | Path, *, interval: float = 0.1) -> SSEMiddleware:
    """The ASGI app that streams a log.

    Args:
        path: The log.
        interval: Seconds between two looks at it.
    """
    log = Path(path).absolute()

    async def events(request: Request) -> AsyncIterator[ServerSentEvent]:
        with closing(LogTail(log, request.last_event_id, from_start=request.query.get("from") == "start")) as tail:
            while True:
                # Read right here: a thread would cost more than 64 KiB of a local file do.
                for event in tail.read():
                    yield event
                await anyio.sleep(interval)

    async def index(request: Request) -> None:
        raise HTTPError(200, f"curl -N http://{request.headers.get('host', 'HOST')}/events\n")

    registry = StreamRegistry(drain_timeout=0.5)  # until a client that does not read is dropped when the server stops
    return create_app({"/": index, "/events": events}, registry=registry)


def serve_uvicorn(app: SSEMiddleware, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    import uvicorn  # noqa: PLC0415 (one of the two servers is enough)

    with suppress(KeyboardInterrupt):  # raised once more behind the shutdown
        uvicorn.run(app, host=host, port=port)


def serve_hypercorn(app: SSEMiddleware, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from hypercorn.asyncio import serve  # noqa: PLC0415
    from hypercorn.config import Config  # noqa: PLC0415

    config = Config()
    config.bind = [f"{host}:{port}"]
    asyncio.run(serve(app, config))  # type: ignore[arg-type]  # its types are narrower than ASGI's


def main() -> None:
    """Parse the command line, and serve."""
    parser = argparse.ArgumentParser(description="Stream a log file as it grows, one event a line, at /events.")
    parser.add_argument("file", type=Path, metavar="FILE", help="the log")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--server", choices=["uvicorn", "hypercorn"], default="uvicorn", help="default: %(default)s")
    args = parser.parse_args()
    if not (args.file.is_file() and os.access(args.file, os.R_OK)):
        parser.error(f"{args.file} is no file that can be read")
    serve = serve_hypercorn if args.server == "hypercorn" else serve_uvicorn
    try:
        serve(tail_app(args.file), args.host, args.port)
    except (OSError, ImportError) as exc:
        sys.exit(f"{parser.prog}: {exc}")


if __name__ == "__main__":
    main()
