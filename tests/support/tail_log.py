"""The module examples/tail.py, what can happen to a log file, and what a reader of it received."""

import importlib.util
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from serving import ROOT

from asgi_sse import ServerSentEvent

SCRIPT = ROOT / "examples" / "tail.py"
MIB = 1 << 20


def load_example() -> Any:
    """Import examples/tail.py, which is not on the path."""
    spec = importlib.util.spec_from_file_location("tail_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()
LogTail = example.LogTail
OpenTail = Callable[..., Any]


def append(path: Path, *data: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(data))


def rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def rotate(path: Path) -> None:
    """Rename FILE.1 to FILE.2 and so on, and FILE to FILE.1, as logrotate and RotatingFileHandler do."""
    count = next(number for number in itertools.count(1) if not rotated(path, number).exists())
    for number in range(count, 1, -1):
        rotated(path, number - 1).rename(rotated(path, number))
    path.rename(rotated(path, 1))


def copytruncate(path: Path) -> None:
    """Copy the content to FILE.1 and truncate FILE, as logrotate's copytruncate does: the inode of FILE stays."""
    path.rename(held := path.with_name("held"))
    path.write_bytes(b"")
    rotate(path)
    rotated(path, 1).write_bytes(held.read_bytes())
    held.rename(path)
    os.truncate(path, 0)


def poll(tail: Any, count: int = 8) -> list[ServerSentEvent]:
    """Return the events of some polls, which are enough to pass several files."""
    return [event for _ in range(count) for event in tail.read()]


def data_of(events: Iterable[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events if event.data is not None]


def resets_of(events: Iterable[ServerSentEvent]) -> list[str]:
    return [json.loads(event.data or "")["reason"] for event in events if event.event == "reset"]


def last_id(events: list[ServerSentEvent]) -> str:
    assert events[-1].id is not None
    return events[-1].id
