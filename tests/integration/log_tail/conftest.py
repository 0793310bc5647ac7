"""A log file, and readers of it that are closed after the test."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tail_log import LogTail, OpenTail


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log with one line."""
    path = tmp_path / "app.log"
    path.write_bytes(b"old\n")
    return path


@pytest.fixture
def open_tail(log: Path) -> Iterator[OpenTail]:
    """Open the log with ``open_tail(last_event_id)``."""
    with ExitStack() as stack:

        def opened(last_event_id: str | None = None, **options: Any) -> Any:
            tail = LogTail(log, last_event_id, **options)
            stack.callback(tail.close)
            return tail

        yield opened
