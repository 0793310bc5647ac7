"""``asgi-sse bench``."""

import json
import os
import pty
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from hub_process import ENVIRONMENT, TIMEOUT_S, command
from scripted_server import CHUNKED_STREAM, STREAM, last_error_line, scripted_server, serving_with

from asgi_sse.cli.main import main


def test_bench_reports_connections_events_and_times(hub_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{hub_url}/channels/bench"
    options = ["--connections", "30", "--rate", "1000", "--duration", "0.5"]
    publishing = ["--publish-rate", "20", "--publish", "secret"]
    assert main(["bench", url, *options, *publishing, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["connections"] == {"asked": 30, "begun": 30, "opened": 30, "failed": 0}
    assert result["errors"] == {}
    published = result["published"]
    assert 1 <= published <= 20 * result["seconds"] + 2
    assert result["delivered"] == result["expected"] == published * 30
    assert 0 < result["events"] <= published * 30
    assert result["bytes"] > result["events"] * 50
    times = result["milliseconds"]
    assert set(times) == {"head", "first_event", "spread", "delivery", "publish_answer"}
    for summary in times.values():
        assert 0 < summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["max"] < 1000 * TIMEOUT_S
    assert times["spread"]["max"] < times["delivery"]["max"]

    assert main(["bench", url, *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("connections     30 of 30 opened, 0 failed\n")
    assert "\nhead " in out
    assert "of a core" in out


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (b"", "cut by the server"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "answered 503"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", "not an event stream: text/html"),
        (STREAM.replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1), "encoded as gzip"),
        (STREAM + b"data: x\n\n", "ended by the server"),
        (CHUNKED_STREAM + b"5\r\nda", "cut by the server"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "invalid HTTP"),
    ],
)
def test_bench_counts_errors_by_kind(response: bytes, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(response) as (url, _):
        assert main(["bench", url, "--connections", "3", "--duration", "0.2", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["connections"]["failed"] == 3
    ((error, number),) = result["errors"].items()
    assert (error.startswith(kind), number) == (True, 3)


def test_bench_reports_failures_of_every_kind(hub_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:1/", "--connections", "3", "--duration", "60"]) == 1
    assert "failed          3: connection refused\n" in capsys.readouterr().out
    assert main(["bench", "http://a..b/"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: cannot resolve a..b: ")
    assert main(["bench", "http://127.0.0.1:1/", "-H", "a b: c"]) == 1
    assert last_error_line(capsys) == "asgi-sse: error: cannot send the request: Illegal header name b'a b'"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert main(["bench", url, "--connections", "2", "--duration", "60", "--timeout", "0.2"]) == 1
    assert "failed          2: timed out\n" in capsys.readouterr().out
    url = f"{hub_url}/channels/bench"
    options = ["--connections", "1", "--duration", "0.3", "--publish", "wrong", "--publish-rate", "5"]
    assert main(["bench", url, *options]) == 1
    out = capsys.readouterr().out
    assert "1 of 1 opened, 0 failed" in out
    assert "publishing: answered 401" in out
    assert main(["bench", url, "--connections", "100000000"]) == 1
    assert re.search(r"100000000 connections need 100000100 open files, but .*ulimit", last_error_line(capsys))


def test_bench_shows_progress_and_stops_at_ctrl_c(hub_url: str) -> None:
    our_end, terminal_end = pty.openpty()
    argv = [sys.executable, "-m", "asgi_sse", "bench", f"{hub_url}/channels/bench", "--connections", "2", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=terminal_end, env=ENVIRONMENT, text=True) as process:
        os.close(terminal_end)
        try:
            shown = b""
            while b"2 of 2 open" not in shown:
                shown += os.read(our_end, 4096)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
            os.close(our_end)
    assert process.returncode == 130
    assert json.loads(out)["connections"]["opened"] == 2
    assert b"[#" in shown or b"[-" in shown


def test_bench_counts_the_failures_of_tls(capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            """Answer without TLS."""
            self.request.recv(65_536)
            self.request.sendall(STREAM)

    with serving_with(Handler) as url:
        options = ["--connections", "2", "--duration", "60", "--json"]
        assert main(["bench", url.replace("http:", "https:"), *options]) == 1
    ((error, number),) = json.loads(capsys.readouterr().out)["errors"].items()
    assert "SSL" in error
    assert number == 2


def test_bench_skips_events_while_too_many_posts_are_unanswered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asgi_sse.cli.load._IN_FLIGHT", 2)  # a slow machine may not reach 64

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            """Open a stream without events; never answer a POST."""
            if not self.request.recv(65_536).startswith(b"POST"):
                self.request.sendall(STREAM)
            with suppress(ConnectionError):
                while self.request.recv(65_536):
                    pass

    options = ["--connections", "1", "--duration", "1.5", "--publish-rate", "5000", "--timeout", "2"]
    with serving_with(Handler) as url:
        assert main(["bench", url, *options]) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^published +0, delivered 0 of 0; [\d,]+ not sent because too many POSTs were unanswered$", out, re.MULTILINE
    )
    assert re.search(r"^failed +\d+: publishing: \w+Timeout$", out, re.MULTILINE)


@pytest.mark.parametrize(
    "options",
    [
        ["--connections", "2", "--rate", "0.01"],  # waits for the next connection
        ["--connections", "1", "--publish-rate", "50", "--timeout", "600"],  # waits for an answer that never comes
    ],
)
def test_bench_ends_at_ctrl_c_while_it_waits(options: list[str]) -> None:
    waiting = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            """Open a stream without events; never answer a POST."""
            posted = self.request.recv(65_536).startswith(b"POST")
            if not posted:
                self.request.sendall(STREAM)
            if posted == ("--publish-rate" in options):
                waiting.set()
            while self.request.recv(65_536):
                pass

    with (
        serving_with(Handler) as url,
        command("bench", f"{url}/", "--duration", "600", "--json", *options) as process,
    ):
        assert waiting.wait(TIMEOUT_S), process.communicate()
        process.send_signal(signal.SIGINT)
        out, error = process.communicate()
    assert (process.returncode, error) == (130, "")
    result = json.loads(out)
    assert result["seconds"] < TIMEOUT_S
    assert list(result["errors"]) == ["publishing: not answered before the end"] * ("--publish-rate" in options)
