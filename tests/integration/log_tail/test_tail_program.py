"""examples/tail.py as an app and as a program, with clients and servers that are killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from serving import ROOT
from tail_log import SCRIPT, append, example
from tail_program import Client, Writer, running

from asgi_sse import EventDecoder, ServerSentEvent


@pytest.mark.anyio
@pytest.mark.parametrize("last_event_id", [None, "", "abc"])
async def test_app_streams_new_lines(log: Path, last_event_id: str | None) -> None:
    app = example.tail_app(log, interval=0.01)
    sending, sent = anyio.create_memory_object_stream[bytes](100)
    disconnected = anyio.Event()
    requested = False

    async def receive() -> dict[str, Any]:
        nonlocal requested
        if requested:
            await disconnected.wait()
            return {"type": "http.disconnect"}
        requested = True
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        await sending.send(message.get("body", b""))

    headers = [] if last_event_id is None else [(b"last-event-id", last_event_id.encode())]
    scope = {
        "type": "http", "method": "GET", "path": "/events", "query_string": b"", "headers": headers,
        "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
    }  # fmt: skip
    decoder = EventDecoder()
    events: list[ServerSentEvent] = []
    with sending, sent, anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(app, scope, receive, send)
            while not decoder.last_event_id:
                events += decoder.feed(await sent.receive())
            append(log, b"new\n")
            while not events or events[-1].data != "new":
                events += decoder.feed(await sent.receive())
            disconnected.set()
    assert [event.event for event in events] == (["reset", "message", "message"] if last_event_id else ["message"])


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_every_line_arrives_once_while_client_and_server_are_killed(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "app.log"
    log.touch()
    writer = Writer(log, random.Random(1))
    with running(log, kind) as server:
        client = Client(server.url, writer, random.Random(2))
        writer.start()
        client.run(until=Writer.LINES // 2)
        while not writer.settled.acquire(blocking=False):  # the server does not start without a file
            client.run(until=len(client.lines) + 100)
        server.kill()
        server.start()
        server.wait()
        writer.settled.release()
        client.run(until=Writer.LINES + 2, stopping=lambda: server.process.send_signal(signal.SIGINT))
        writer.join(10)
        server.process.wait(10)
        assert "Traceback" not in server.output
    assert client.lines == [*(f"{number:06}" for number in range(Writer.LINES)), "end"]
    assert client.others == []
    assert client.connections >= 20
    assert writer.rotations >= 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_signal_stops_the_server_at_once(log: Path, kind: str, number: signal.Signals) -> None:
    with running(log, kind) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        assert client.get("/").text == f"curl -N {server.url}/events\n"
        with client.stream("GET", "/events") as response:
            chunks = response.iter_raw()
            assert b"opened" in next(chunks)
            began = time.monotonic()
            server.process.send_signal(number)
            assert b"retry:" in b"".join(chunks)  # the body is complete
        assert server.process.wait(20) in (0, -number)
        assert time.monotonic() - began < 10
        assert "Traceback" not in server.output


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo"])
def test_unreadable_log_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    monkeypatch.setattr(sys, "argv", ["tail.py", str(path)])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert f"error: FILE must be a readable regular file, got {path}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["uvicorn", "hypercorn"])
def test_port_in_use_is_reported_without_a_traceback(log: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, str(SCRIPT), str(log), "--server", kind, "--port", str(other.getsockname()[1])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode != 0
    assert "address already in use" in ended.stderr.lower()
    assert "Traceback" not in ended.stderr
