"""Two uvicorn workers that share a broker by its URL, and the command that publishes to it."""

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
from backend_servers import SERVERS, BackendServer
from serving import HERE, environment, free_port, serving

from asgi_sse import EventDecoder, ServerSentEvent
from asgi_sse.cli.main import main

TIMEOUT_S = 20


class Client:
    """Reads a stream, blocking."""

    def __init__(self, stack: ExitStack, url: str, last_event_id: str = "") -> None:
        # Each client has a connection of its own, so that both workers get some.
        client = stack.enter_context(httpx.Client(trust_env=False, timeout=TIMEOUT_S))
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        self.response = stack.enter_context(client.stream("GET", url, headers=headers))
        self.decoder = EventDecoder()
        self._events = (event for chunk in self.response.iter_raw() for event in self.decoder.feed(chunk))

    def take(self, number: int) -> list[ServerSentEvent]:
        return [next(self._events) for _ in range(number)]


@pytest.fixture(params=SERVERS, ids=lambda kind: kind.name)
def backend_server(request: pytest.FixtureRequest, tmp_path: Path):  # type: ignore[no-untyped-def]
    if not request.param.available():
        pytest.skip(f"{request.param.name} is not installed")
    with request.param(tmp_path, sync=False) as running:
        yield running


def test_all_workers_deliver_what_one_of_them_publishes(backend_server: BackendServer, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [
        sys.executable, "-m", "uvicorn", "--workers=2", f"--port={port}", f"--app-dir={HERE}",
        "workers_app:app",
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with ExitStack() as stack:
        server = stack.enter_context(serving(arguments, port, log, variables={"BROKER_URL": backend_server.url}))
        clients: dict[str, list[Client]] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(clients) < 2 or min(map(len, clients.values())) < 2:
            assert time.monotonic() < deadline, log.read_text()
            client = Client(stack, f"{url}/news")
            (state,) = client.take(1)
            clients.setdefault(str(state.data), []).append(client)
        ids = [httpx.post(f"{url}/publish", content=text, trust_env=False).text for text in ("one", "two", "three")]
        command = [sys.executable, "-m", "asgi_sse", "publish", backend_server.url, "news", "--prefix=workers"]
        ids += [
            subprocess.run(
                command, input=b"four\n", env=environment(), stdout=subprocess.PIPE, check=True
            ).stdout.decode()
        ]
        subscribers = [client for those in clients.values() for client in those]
        for client in subscribers:
            events = client.take(4)
            assert [event.data for event in events] == ["one", "two", "three", "four"]
            assert [event.id for event in events] == [event_id.strip() for event_id in ids]
        # Both workers deliver a run that one of them runs. A client that has the end of the run gets a 204.
        runs = [Client(stack, f"{url}/runs/r") for _ in range(6)]
        contents = {tuple(event.data for event in run.take(4)) for run in runs}
        assert len(contents) == 1
        for _ in range(6):
            assert Client(stack, f"{url}/runs/r", runs[0].decoder.last_event_id).response.status_code == 204
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        for client in subscribers:
            assert next(client._events, None) is None
            assert client.decoder.retry is not None
        server.wait(TIMEOUT_S)
        assert time.monotonic() - began < 10
    assert "Traceback" not in log.read_text()


# The command


def command(server: BackendServer, *arguments: str) -> list[str]:
    return ["publish", server.url, *arguments]


def test_publish_command_reports_errors_in_one_line(
    backend_server: BackendServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(backend_server, "a.b", "hello", "--event=greeting", "--key=k")) == 0
    first = capsys.readouterr().out
    assert main(command(backend_server, "a.b", "hello again", "--event=greeting", "--key=k")) == 0
    assert capsys.readouterr().out == first != ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    for arguments, expected in (
        (command(backend_server, "a b", "x"), "channel must be 1 to 200 of"),
        (command(backend_server, "a", "x", "--event=a\nb"), "event must have no line end"),
        (command(backend_server, "a"), "data must be UTF-8"),
        (["publish", "memory://", "a", "x"], "in its own process"),
        (
            ["publish", "ftp://x", "a", "x"],
            "url must be memory://, or start with redis://, rediss://, unix:// or nats://, got 'ftp://...'",
        ),
        (["publish", f"{backend_server.scheme}://127.0.0.1:{free_port()}", "a", "x"], "cannot connect to"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("asgi-sse: error: ")
        assert expected in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("scheme", "extra"), [("redis", "redis"), ("nats", "nats")])
def test_publish_command_names_the_missing_package(scheme: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{extra!r}] = None; from asgi_sse.cli.main import main; "
        f"sys.exit(main(['publish', '{scheme}://127.0.0.1', 'a', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    expected = f'asgi-sse: error: the client of {extra} is not installed: pip install "asgi-sse[{extra}]"\n'
    assert (done.returncode, done.stderr) == (1, expected)
