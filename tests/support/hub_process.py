"""Run ``asgi-sse`` and its hub as processes."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

TIMEOUT_S = 60.0  # for any one step on a slow machine; a passing test never waits that long
HUB_VARIABLES = ("ASGI_SSE_BROKER", "ASGI_SSE_PUBLISH_TOKEN", "ASGI_SSE_SUBSCRIBE_TOKEN")

# Without the hub's variables, so that each test sets the ones it needs.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in HUB_VARIABLES}
ENVIRONMENT["PYTHONUNBUFFERED"] = "1"


@contextmanager
def command(
    *arguments: str,
    stdout: int = subprocess.PIPE,
    variables: Mapping[str, str] | None = None,
    time_limit: float = TIMEOUT_S,
) -> Iterator[subprocess.Popen[str]]:
    """Run ``asgi-sse`` with `arguments`; kill the process after `time_limit` seconds."""
    argv = [sys.executable, "-m", "asgi_sse", *arguments]
    pipe = subprocess.PIPE
    env = {**ENVIRONMENT, **(variables or {})}
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=pipe, text=True, env=env) as process:
        watchdog = threading.Timer(time_limit, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


@contextmanager
def hub(
    *options: str, port: int = 0, time_limit: float = TIMEOUT_S, **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a hub; yield its process and its URL."""
    with command("serve", "--port", str(port), *options, variables=variables, time_limit=time_limit) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"The hub runs at (http://127.0.0.1:\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found, (line, process.communicate())
        yield process, found[1]
