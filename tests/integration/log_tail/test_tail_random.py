"""examples/tail.py: every line arrives once after random writes, reads, reconnects and rotations."""

import itertools
import logging
import logging.handlers
import random
from pathlib import Path

import pytest
from tail_log import OpenTail, append, copytruncate, data_of, last_id, poll, resets_of, rotate


@pytest.mark.parametrize("seed", range(25))
def test_every_line_arrives_once_after_random_steps(log: Path, open_tail: OpenTail, seed: int) -> None:
    rng = random.Random(seed)
    tail = open_tail()
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
        tail = open_tail(last_id(seen))

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
        seen += poll(tail, 3)
        assert len(seen) > before
    assert resets_of(seen) == []
    assert [data.split()[0] for data in data_of(seen) if data] == [*map(str, range(count)), "last"]


def test_every_line_of_a_rotating_file_handler_arrives_once(log: Path, open_tail: OpenTail) -> None:
    rng = random.Random(1)
    handler = logging.handlers.RotatingFileHandler(log, maxBytes=2000, backupCount=500)
    tail = open_tail()
    seen = list(tail.read())
    try:
        for number in range(5000):
            handler.emit(logging.LogRecord("test", logging.INFO, "", 0, f"{number}", None, None))
            if rng.random() < 0.02:
                seen += tail.read()
    finally:
        handler.close()
    seen += poll(tail, 100)
    assert data_of(seen) == [f"{number}" for number in range(5000)]
