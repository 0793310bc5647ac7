"""examples/mcp: the MCP SDK on our response, with the SDK's client, on every transport, and during shutdown."""

import json
import re
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import HERE, ROOT
from stopping import TERM, Row, Run, hypercorn, starting, uvicorn

SERVERS: dict[str, Row] = {"uvicorn": uvicorn(app="mcp_app:app"), "hypercorn": hypercorn(app="mcp_app:app")}
TIMEOUT_S = 30.0  # for any one step on a slow machine; a passing test never waits that long
FAREWELL = re.compile(rb"retry: \d+(\r?\n)\1\r\n0\r\n\r\n\Z")  # and the end of the chunked body


ACCEPT = {"accept": "application/json, text/event-stream"}
OUTPUT = """\
protocol 2026-07-28
tools: add, count
1 + 2 = {'result': 3}
progress 1/3: 1 of 3
progress 2/3: 2 of 3
progress 3/3: 3 of 3
{'result': 'counted to 3'}
"""


class Proxy:
    """A TCP proxy that records both directions of each connection and can cut all connections."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.requests: dict[socket.socket, bytearray] = {}
        self.responses: dict[socket.socket, bytearray] = {}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # close() ends accept()
            while True:
                client = self._listener.accept()[0]
                try:
                    server = socket.create_connection(("127.0.0.1", self._target))
                except OSError:  # the server has stopped
                    client.close()
                    continue
                self.requests[client], self.responses[client] = bytearray(), bytearray()
                threading.Thread(target=self._pass, args=(client, server), daemon=True).start()

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        targets = {client: (server, self.requests[client]), server: (client, self.responses[client])}
        with client, server, suppress(OSError):
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(65_536)
                    if not data:
                        return
                    targets[source][1].extend(data)
                    targets[source][0].sendall(data)

    def cut(self) -> None:
        """Cut all connections and clear the records."""
        for client in list(self.requests):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        self.requests.clear()
        self.responses.clear()

    def streams(self) -> list[tuple[str, bytes]]:
        """Return the request line and the response of each connection whose last response is an event stream."""
        found = []
        for requests, responses in zip(self.requests.values(), self.responses.values(), strict=True):
            response = bytes(responses[max(responses.rfind(b"HTTP/1.1 "), 0) :])
            if b"text/event-stream" in response.partition(b"\r\n\r\n")[0].lower():
                found.append((re.findall(rb"(\w+ \S+) HTTP/1.1\r\n", requests)[-1].decode(), response))
        return sorted(found)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would leave the thread in accept()
        self._listener.close()
        self.cut()


class SDKClient:
    """mcp_client.py in a separate process, so that the SDK's warnings do not fail our tests."""

    def __init__(self, port: int, errors: Path) -> None:
        self._errors = errors
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "mcp_client.py"), f"http://127.0.0.1:{port}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
            )  # fmt: skip
        self._reports: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._reports.append(json.loads(line))

    def wait_for(self, what: str, **values: Any) -> dict[str, Any]:
        """Wait for a report with these values, and return it."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            for report in self._reports:
                if {"what": what, **values}.items() <= report.items():
                    return report
            if time.monotonic() > deadline or not self._thread.is_alive():
                pytest.fail(f"no {what!r} {values} in {self._reports}\n{self._errors.read_text()}")
            time.sleep(0.01)

    def resume(self) -> None:
        """Send the line that the client waits for."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(TIMEOUT_S)
        self._thread.join(TIMEOUT_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def statistics(run: Run) -> Any:
    return httpx.get(f"http://127.0.0.1:{run.port}/statistics", timeout=TIMEOUT_S).json()


@pytest.mark.parametrize("server", SERVERS)
def test_every_transport_works_resumes_and_ends_at_shutdown(server: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        run = stack.enter_context(starting(tmp_path))(SERVERS[server])
        proxy = stack.enter_context(closing(Proxy(run.port)))
        client = stack.enter_context(closing(SDKClient(proxy.port, tmp_path / "client.log")))

        results = {
            "tools": ["add", "count"],
            "add": {"result": 3},
            "count": {"result": "counted to 3"},
            "steps": [1, 2, 3],
        }
        for name in ("legacy", "auto", "sse legacy", "sse auto"):
            protocol = "2025-11-25" if "legacy" in name else "2026-07-28"
            assert client.wait_for(name) == {"what": name, "protocol": protocol, **results}

        # The connections are cut. The client resumes with Last-Event-ID and misses no step.
        client.wait_for("ready to be cut")
        proxy.cut()
        client.resume()
        steps = client.wait_for("resumed")["steps"]
        assert steps == list(range(1, len(steps) + 1))
        assert any(b"last-event-id: " in bytes(request).lower() for request in list(proxy.requests.values()))

        client.wait_for("all open")
        run.wait_until(lambda: len(statistics(run)["all"]) == 6, TIMEOUT_S, "not all streams are open")
        # The adapter sends two POST responses (one of them resumed with a GET), the session's GET and /sse. With the
        # newest protocol, the SDK itself sends a POST response and a subscription, and SSEMiddleware adopts them.
        assert statistics(run) == {"all": ["/mcp"] * 5 + ["/sse"], "by the adapter": 4, "sessions": 1}

        began = time.monotonic()
        TERM(run)
        status = run.process.wait(TIMEOUT_S)
        assert time.monotonic() - began < 10
        assert status == SERVERS[server].status
        streams = proxy.streams()
        assert [request.partition("?")[0] for request, _ in streams] == ["GET /mcp"] * 2 + ["GET /sse"] + [
            "POST /mcp"
        ] * 3
        for request, response in streams:
            assert FAREWELL.search(response), (request, response[-300:])
            assert b"x-accel-buffering: no" in response.partition(b"\r\n\r\n")[0].lower()
        # The client gives up calls that cannot be resumed at once, and retries the others after the reconnection time.
        for name in ("sse", "modern", "listen"):
            client.wait_for("ended", name=name)
        log = run.log.read_text()
        assert not re.search(r"ERROR|Traceback|exception was never", log), log[-3000:]
        assert not re.search("Error parsing|Unknown SSE event", (tmp_path / "client.log").read_text())


def test_session_gets_no_events_of_another_session(tmp_path: Path) -> None:
    with starting(tmp_path) as start:
        run = start(SERVERS["uvicorn"])
        with httpx.Client(base_url=f"http://127.0.0.1:{run.port}", headers=ACCEPT, timeout=TIMEOUT_S) as http:
            info = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
            sessions = []
            for _ in range(2):
                opening = http.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": info})
                sessions.append(
                    {"mcp-session-id": opening.headers["mcp-session-id"], "mcp-protocol-version": "2025-11-25"}
                )
                http.post("/mcp", headers=sessions[-1], json={"jsonrpc": "2.0", "method": "notifications/initialized"})
            answers = []
            for number, session in enumerate(sessions):
                call = {"name": "add", "arguments": {"a": 100, "b": number}}
                request = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
                answers.append(http.post("/mcp", headers=session, json=request).text)
            assert statistics(run)["sessions"] == 2
            for number, (session, answer) in enumerate(zip(sessions, answers, strict=True)):
                first = re.findall(r"id: (\d+)", answer)[0]
                with http.stream("GET", "/mcp", headers={**session, "last-event-id": first}) as replay:
                    text = ""
                    for part in replay.iter_text():  # a chunk may be a part of an event
                        text += part
                        if '"result":' in text:
                            break
                assert f'"result":{100 + number}' in text
                assert f'"result":{101 - number}' not in text
            for session in sessions:
                http.delete("/mcp", headers=session)
        run.wait_until(
            lambda: statistics(run)["sessions"] == 0, TIMEOUT_S, "the events of a closed session are still kept"
        )


def test_client_of_the_example_calls_every_tool(tmp_path: Path) -> None:
    with starting(tmp_path) as start:
        run = start(SERVERS["uvicorn"])
        example = str(ROOT / "examples" / "mcp" / "client.py")
        processes = [
            subprocess.Popen([sys.executable, example, f"http://127.0.0.1:{run.port}{path}"], stdout=subprocess.PIPE)
            for path in ("/mcp", "/sse")
        ]
        for process in processes:
            assert process.communicate(timeout=TIMEOUT_S)[0].decode() == OUTPUT
            assert process.returncode == 0
