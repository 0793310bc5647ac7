"""`uvicorn --workers 2` with the one URL that makes of them one broker; and publishing from outside of them."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from engines import ENGINES, Engine
from serving import HERE, environment, free_port, serving

from asgi_sse import EventDecoder, ServerSentEvent
from asgi_sse.cli.main import main

PATIENCE = 20


class Client:
    """Reads a stream in this thread."""

    def __init__(self, stack: ExitStack, url: str, last_event_id: str = "") -> None:
        # A connection of its own each: the workers take what comes in turns of their own.
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=PATIENCE))
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self.response = stack.enter_context(client.stream("GET", url, headers=headers))
        self.decoder = EventDecoder()
        self._events = (event for chunk in self.response.iter_raw() for event in self.decoder.feed(chunk))

    def take(self, number: int) -> list[ServerSentEvent]:
        return [next(self._events) for _ in range(number)]


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    if not request.param.available():
        pytest.skip(f"{request.param.name} is not installed")
    with request.param(tmp_path, sync=False) as engine:
        yield engine


def test_all_workers_have_what_one_of_them_publishes(engine: Engine, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [
        sys.executable, "-m", "uvicorn", "--workers=2", f"--port={port}", f"--app-dir={HERE}",
        "workers_app:app",
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        server = stack.enter_context(serving(arguments, port, log, variables={"BROKER_URL": engine.url}))
        clients: dict[str, list[Client]] = {}
        deadline = time.monotonic() + PATIENCE
        while len(clients) < 2 or min(map(len, clients.values())) < 2:
            assert time.monotonic() < deadline, log.read_text()
            client = Client(stack, f"{url}/news")
            (state,) = client.take(1)
            clients.setdefault(str(state.data), []).append(client)
        ids = [httpx.post(f"{url}/publish", content=text, trust_env=False).text for text in ("one", "two", "three")]
        command = [sys.executable, "-m", "asgi_sse", "publish", engine.url, "news", "--prefix=workers"]
        ids += [
            subprocess.run(
                command, input=b"four\n", env=environment(), stdout=subprocess.PIPE, check=True
            ).stdout.decode()
        ]
        everybody = [client for those in clients.values() for client in those]
        for client in everybody:
            events = client.take(4)
            assert [event.data for event in events] == ["one", "two", "three", "four"]
            assert [event.id for event in events] == [event_id.strip() for event_id in ids]
        # Of a run that one has begun, all of them give the whole, and who has all of it gets a 204.
        runs = [Client(stack, f"{url}/runs/r") for _ in range(6)]
        contents = {tuple(event.data for event in run.take(4)) for run in runs}
        assert len(contents) == 1
        for _ in range(6):
            assert Client(stack, f"{url}/runs/r", runs[0].decoder.last_event_id).response.status_code == 204
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        for client in everybody:
            assert next(client._events, None) is None
            assert client.decoder.retry is not None
        server.wait(PATIENCE)
        assert time.monotonic() - began < 10
    assert "Traceback" not in log.read_text()


# The command


def command(engine: Engine, *arguments: str) -> list[str]:
    return ["publish", engine.url, *arguments]


def test_the_command_says_what_is_wrong(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(engine, "a.b", "hello", "--event=greeting", "--key=k")) == 0
    first = capsys.readouterr().out
    assert main(command(engine, "a.b", "hello again", "--event=greeting", "--key=k")) == 0
    assert capsys.readouterr().out == first != ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    for arguments, said in (
        (command(engine, "a b", "x"), "channel must be 1 to 200 of"),
        (command(engine, "a", "x", "--event=a\nb"), "has a line end"),
        (command(engine, "a"), "is not UTF-8"),
        (["publish", "memory://", "a", "x"], "in its own process"),
        (["publish", "ftp://x", "a", "x"], "is no broker that is known"),
        (["publish", f"{engine.scheme}://127.0.0.1:{free_port()}", "a", "x"], "cannot connect to"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("asgi-sse: error: ")
        assert said in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("scheme", "extra"), [("redis", "redis"), ("nats", "nats")])
def test_a_client_that_is_not_installed(scheme: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{extra!r}] = None; from asgi_sse.cli.main import main; "
        f"sys.exit(main(['publish', '{scheme}://127.0.0.1', 'a', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    said = f'asgi-sse: error: the client of {extra} is not installed: pip install "asgi-sse[{extra}]"\n'
    assert (done.returncode, done.stderr) == (1, said)
