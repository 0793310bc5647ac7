"""Runs ``asgi-sse`` and its hub as processes."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

ENOUGH = 60.0  # seconds for any of these, on a slow machine; none of them waits for it to pass
OWN = {**os.environ, "PYTHONUNBUFFERED": "1"}  # of processes; what the hub reads from it is each test's
for name in ("ASGI_SSE_BROKER", "ASGI_SSE_PUBLISH_TOKEN", "ASGI_SSE_SUBSCRIBE_TOKEN"):
    OWN.pop(name, None)


@contextmanager
def command(
    *arguments: str,
    stdout: int = subprocess.PIPE,
    variables: Mapping[str, str] | None = None,
    patience: float = ENOUGH,
) -> Iterator[subprocess.Popen[str]]:
    """The command's process. It is killed when it has had long enough."""
    given = [sys.executable, "-m", "asgi_sse", *arguments]
    pipe = subprocess.PIPE
    env = {**OWN, **(variables or {})}
    with subprocess.Popen(given, stdin=subprocess.DEVNULL, stdout=stdout, stderr=pipe, text=True, env=env) as process:
        watchdog = threading.Timer(patience, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


@contextmanager
def hub(
    *options: str, port: int = 0, patience: float = ENOUGH, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A hub's process, and its URL."""
    with command("serve", "--port", str(port), *options, variables=variables, patience=patience) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"The hub runs at (http://127.0.0.1:\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found, (line, process.communicate())
        yield process, found[1]
