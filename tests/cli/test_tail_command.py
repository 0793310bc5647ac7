"""``asgi-sse tail``."""

import io
import json
import os
import pty
import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hub_process import TIMEOUT_S, command
from scripted_server import CHUNKED_STREAM, NO_CONTENT, STREAM, header_of, last_error_line, scripted_server

from asgi_sse.cli.main import main


def test_tail_resumes_like_an_eventsource(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(
        STREAM + b"retry: 10\nid: 1\ndata: one\n\nid: 2\nevent: add\ndata: two\ndata: 2\n\nid: 3\ndata: lost",
        CHUNKED_STREAM + b"8\r\nid: \xc3\xb6\n\n\r\n5\r\ndata",
        b"",
        STREAM + b"id\n\ndata: three\n\n",
        STREAM + b"id: 4\n\n",
        NO_CONTENT,
    ) as (url, requests):
        assert main(["tail", url, "--since", "\u00fc"]) == 0
    out, error = capsys.readouterr()
    assert out == "one\n[add] two\n2\nthree\n"
    assert [header_of(request, "last-event-id") for request in requests] == ["ü", "2", "ö", "ö", None, "4"]
    assert all(header_of(request, "accept") == "text/event-stream" for request in requests)
    lines = error.splitlines()
    assert [line.partition(" reconnecting")[0].partition(": ")[2][:19] for line in lines] == [
        "the stream ended;",
        "the connection fail",
        "the connection fail",
        "the stream ended;",
        "the stream ended;",
        "the server answered",
    ]


def test_tail_waits_longer_after_each_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("asgi_sse.cli.follow.time.sleep", pauses.append)
    forever = STREAM + b"retry: " + b"9" * 400 + b"\n\n"
    with scripted_server(STREAM + b"retry: 1000\n\n", *[b""] * 9, STREAM + b"data: x\n\n", forever, NO_CONTENT) as (
        url,
        _,
    ):
        assert main(["tail", url]) == 0
    assert pauses.pop() == 86_400
    assert pauses[0] == pauses[-1] == 1
    for number, pause in enumerate(pauses[1:-1]):
        longest = min(60, 2**number)
        assert longest / 2 <= pause <= longest
    assert len(pauses) == 11


def test_tail_waits_at_least_100_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("asgi_sse.cli.follow.time.sleep", pauses.append)
    with scripted_server(STREAM + b"retry: 0\n\n", STREAM, NO_CONTENT) as (url, _):
        assert main(["tail", url]) == 0
    assert pauses == [0.1, 0.1]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 10\r\n\r\nfull\x1b[2Jxx",
            "the server answered 503 Service Unavailable: full\\u001b[2Jxx",
        ),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answered 404 Not Found"),
        (
            b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n",
            "the server answered 404 Not Found",
        ),  # the body is cut
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 0\r\n\r\n",
            "Content-Type must be text/event-stream, got 'text/html'",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "Content-Type must be text/event-stream, got ''",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "cannot send the request: Exceeded"),
    ],
)
def test_tail_stops_at_a_response_that_is_not_a_stream(
    response: bytes, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with scripted_server(response) as (url, requests):
        assert main(["tail", url]) == 1
    assert last_error_line(capsys).startswith(f"asgi-sse: error: {expected}")
    assert "302" in response.decode() or len(requests) == 1


def test_tail_does_not_wait_for_the_body_of_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("asgi_sse.cli.follow._REASON_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:

        def respond() -> socket.socket:
            connection, _ = listener.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\n\r\n")
            return connection

        responded = pool.submit(respond)
        assert main(["tail", f"http://127.0.0.1:{listener.getsockname()[1]}/"]) == 1
        responded.result(TIMEOUT_S).close()
    assert last_error_line(capsys) == "asgi-sse: error: the server answered 404 Not Found"


def test_tail_reports_an_invalid_proxy_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "foo://bar")
    assert main(["tail", "http://127.0.0.1:1/"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: cannot send the request: ")


def test_tail_without_reconnecting_ends_with_the_connection(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(STREAM + b"data: x\n\n", b"") as (url, _):
        assert main(["tail", url, "--no-reconnect"]) == 0
        assert capsys.readouterr() == ("x\n", "")
        assert main(["tail", url, "--no-reconnect"]) == 1
        assert last_error_line(capsys).startswith("asgi-sse: error: the connection failed: ")
        assert main(["tail", url, "-H", "a b: c"]) == 1
        assert last_error_line(capsys).startswith("asgi-sse: error: cannot send the request: ")
    assert main(["tail", "http://a..b/"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: cannot send the request: ")


def test_tail_sends_an_id_that_is_not_utf8_until_the_first_event(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(STREAM + b"retry: 1\nid: 7\ndata: x\n\n", NO_CONTENT) as (url, requests):
        # \udcff is how Python passes a byte of the shell that is not UTF-8. The id of -H ends with the first event.
        assert main(["tail", url, "--since", "\udcff", "-H", "Last-Event-ID: 5"]) == 0
        assert requests[0].count("last-event-id") == requests[1].count("last-event-id") == 1
        assert header_of(requests[1], "last-event-id") == "7"
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize(
    ("option", "expected"),
    [("--no-reconnect", "\\xf6\\u2713\\U0001f600\n"), ("--json", '"\\u00f6\\u2713\\ud83d\\ude00"}\n')],
)
def test_tail_escapes_what_the_output_encoding_lacks(option: str, expected: str) -> None:
    with (
        scripted_server(STREAM + "data: \u00f6\u2713\U0001f600\n\n".encode()) as (url, _),
        command("tail", url, "--count", "1", option, variables={"PYTHONIOENCODING": "ascii"}) as process,
    ):
        out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert out.endswith(expected)


def test_tail_times_out_on_a_silent_connection(hub_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", f"{hub_url}/channels/quiet", "--timeout", "0.1", "--no-reconnect"]) == 1
    assert last_error_line(capsys) == "asgi-sse: error: the connection failed: timed out"


def test_tail_prints_json_and_filters_by_type(capsys: pytest.CaptureFixture[str]) -> None:
    events = b"id: 1\ndata: {}\n\nevent: b\ndata: \xc3\xb6\ndata: \x1b\n\nevent: c\ndata: 3\n\nevent: b\ndata: 4\n\n"
    with scripted_server(STREAM + events) as (url, _):
        assert main(["tail", url, "--json", "--count", "4"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines == [
            {"id": "1", "event": "message", "data": "{}"},
            {"id": "1", "event": "b", "data": "ö\n\x1b"},
            {"id": "1", "event": "c", "data": "3"},
            {"id": "1", "event": "b", "data": "4"},
        ]
        assert main(["tail", url, "--event", "c", "--event", "b", "--count", "3"]) == 0
        assert capsys.readouterr().out == "[b] ö\n\x1b\n[c] 3\n[b] 4\n"


def test_tail_sends_the_body_of_a_post_and_its_content_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("hello")
    with scripted_server(STREAM + b"data: hi\n\n") as (url, requests):
        assert main(["tail", url, "--data", '{"a": 1}', "-H", "X-A: ö", "-H", "x-a: 2"]) == 0
        assert main(["tail", url, "--data", f"@{prompt}"]) == 0
        assert main(["tail", url, "--data", "x", "-H", "content-type: a/b", "--method", "put"]) == 0
        assert main(["tail", url, "--data", f"@{tmp_path}/none"]) == 1
    assert last_error_line(capsys).endswith("none: No such file or directory")
    assert [request.partition(" ")[0] for request in requests] == ["POST", "POST", "PUT"]
    assert [request.partition("\r\n\r\n")[2] for request in requests] == ['{"a": 1}', "hello", "x"]
    content_types = [header_of(request, "content-type") for request in requests]
    assert content_types == ["application/json", "text/plain; charset=utf-8", "a/b"]
    assert re.findall(r"x-a: *(.*?)\r", requests[0], re.IGNORECASE) == ["ö", "2"]


def test_tail_sends_what_it_reads_from_the_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [b"\xff raw", b"[1]"]
    with scripted_server(STREAM + b"data: hi\n\n") as (url, requests):
        for body in bodies:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
            assert main(["tail", url, "--data", "@-"]) == 0
    assert [header_of(request, "content-type") for request in requests] == [
        "text/plain; charset=utf-8",
        "application/json",
    ]
    assert [request.partition("\r\n\r\n")[2] for request in requests] == ["\ufffd raw", "[1]"]


def test_tail_repeats_a_post_with_reconnect(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(STREAM + b"retry: 1\ndata: hi\n\n", NO_CONTENT) as (url, requests):
        assert main(["tail", url, "--data", "x", "--reconnect"]) == 0
    assert len(requests) == 2
    assert capsys.readouterr().out == "hi\n"


def test_tail_does_not_send_authorization_to_another_origin() -> None:
    with scripted_server(STREAM + b"data: x\n\n") as (other, other_requests):
        moved = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {other}/there\r\nContent-Length: 0\r\n\r\n".encode()
        with scripted_server(moved) as (url, requests):
            assert main(["tail", url, "-H", "Authorization: Bearer secret", "--count", "1"]) == 0
    assert header_of(requests[0], "authorization") == "Bearer secret"
    assert other_requests[0].startswith("GET /there ")
    assert "secret" not in other_requests[0]


def test_tail_verbose_prints_connections_comments_and_retry(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(STREAM + b": \x1b[2Jhi\r\nretry: 5\r\ndata: :x\r\n\r\n") as (url, _):
        assert main(["tail", url, "-v", "--no-reconnect"]) == 0
    out, error = capsys.readouterr()
    assert out == ":x\n"
    notes = [line.removeprefix("asgi-sse: ") for line in error.splitlines()]
    assert notes == [f"connected to {url}", ": \\u001b[2Jhi", "retry: 5", "the stream ended"]


def test_tail_escapes_control_characters_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = b"event: \x1b]0;owned\x07\ndata: a\tb\x1b[2J\xc2\x9b31m\xe2\x80\xae\x00\n\n"
    with scripted_server(STREAM + hostile) as (url, _):
        text = first_line_on_a_terminal("tail", url, "--count", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["tail", url, "--json", "--count", "1"]) == 0
        line = capsys.readouterr().out.encode()
    for shown in (text, line):
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80\xae", shown)
    assert text.decode() == "[\\u001b]0;owned\\u0007] a\tb\\u001b[2J\\u009b31m\\u202e\\u0000\r\n"
    assert json.loads(line)["data"] == "a\tb\x1b[2J\x9b31m\u202e\0"


def first_line_on_a_terminal(*arguments: str) -> bytes:
    """Return the first line that ``asgi-sse`` prints on a terminal."""
    our_end, terminal_end = pty.openpty()
    shown = b""
    try:
        with command(*arguments, stdout=terminal_end) as process:
            os.close(terminal_end)
            while not shown.endswith(b"\n"):
                shown += os.read(our_end, 4096)
            assert process.wait(TIMEOUT_S) == 0
    finally:
        os.close(our_end)
    return shown


def test_tail_ends_with_its_pipe_or_at_ctrl_c(hub_url: str) -> None:
    def publish(data: str) -> None:
        headers = {"authorization": "Bearer secret"}
        url = f"{hub_url}/channels/pipe"
        assert httpx.post(url, content=data, headers=headers, trust_env=False, timeout=TIMEOUT_S).is_success

    arguments = ("tail", "-v", f"{hub_url}/channels/pipe")
    with command(*arguments) as process, command(*arguments) as interrupted:
        for one in (process, interrupted):
            assert one.stderr is not None
            assert "connected" in one.stderr.readline()
        publish("one")
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        publish("two")
        assert process.wait(TIMEOUT_S) == 141
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(TIMEOUT_S) == 130
        for one in (process, interrupted):
            assert one.stderr is not None
            assert re.sub("asgi-sse: .*\n", "", one.stderr.read()) == ""
