"""A NATS server of a test's own: a process with a directory, that can be killed, paused and begun again."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def find_server() -> str | None:
    """Where the program is: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / "nats-server"
    return str(beside) if beside.exists() else shutil.which("nats-server")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class NatsServer:
    """One server with JetStream. Its port and its data stay the same when it is begun again."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self.data = directory / "data"
        self._log = directory / "nats-server.log"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin it, and wait until it answers."""
        program = find_server()
        assert program is not None, "there is no nats-server"
        address = ["-a", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(
            [program, *address, "-js", "-sd", str(self.data), "-l", str(self._log), *self._options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                if probe.recv(4) == b"INFO":
                    return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End it at once: nothing is put in order."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """It keeps its connections, and does nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def restart(self) -> None:
        """Kill it, and begin it with its data."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Take its data; it is not to run."""
        shutil.rmtree(self.data, ignore_errors=True)

    def save(self, directory: Path) -> None:
        """Copy its data while it stands still."""
        self.pause()
        try:
            shutil.copytree(self.data, directory)
        finally:
            self.resume()

    def restore(self, directory: Path) -> None:
        """Give it the data that were saved; it is not to run."""
        self.wipe()
        shutil.copytree(directory, self.data)
