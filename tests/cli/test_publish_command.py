"""``asgi-sse publish``."""

import io
import socket
import sys

import httpx
import pytest
from hub_process import TIMEOUT_S
from scripted_server import last_error_line, scripted_server

from asgi_sse.cli.main import main


def test_publish_sends_the_event_to_a_hub(
    hub_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASGI_SSE_PUBLISH_TOKEN", "secret")
    assert main(["publish", hub_url, "a/b", "ö", "--event", "c d", "--key", "1"]) == 0
    first = capsys.readouterr().out
    assert main(["publish", f"{hub_url}/", "a/b", "ö", "--key", "1", "--token", "other"]) == 0
    assert capsys.readouterr().out == first
    with httpx.stream(
        "GET", f"{hub_url}/channels?channel=a/b&last_event_id={first.strip()[:-1]}0", timeout=TIMEOUT_S, trust_env=False
    ) as stream:
        body = ""
        for text in stream.iter_text():
            body += text
            if "data: " in body:
                break
    assert "event: c d\ndata: ö\n" in body
    assert main(["publish", hub_url, "a b", "x"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: the hub answered 400: channel must be 1 to 200 ")
    assert main(["publish", hub_url, "a", "x", "--token", "wrong"]) == 1
    assert last_error_line(capsys) == "asgi-sse: error: the hub answered 401: this token is unknown"
    assert main(["publish", f"{hub_url}/channels/news", "a", "x"]) == 1
    assert last_error_line(capsys) == (
        "asgi-sse: error: the hub answered 404: Not Found; give the URL of the hub only, http://HOST:PORT, "
        "and the channel as the next argument"
    )
    assert main(["publish", "http://127.0.0.1:1", "a", "x"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: not published: cannot connect to http://127.0.0.1:1: ")


def test_publish_refuses_invalid_broker_urls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\n")))
    assert main(["publish", "memory://", "a"]) == 1
    assert "of the app in its own process" in last_error_line(capsys)
    assert main(["publish", "127.0.0.1:8041", "a"]) == 2  # without reading the standard input
    expected = "URL must start with redis://, nats:// or http://, got '127.0.0.1:8041'; for a hub give http://HOST:PORT"
    assert last_error_line(capsys) == f"asgi-sse: error: {expected}"
    assert main(["publish", "redis://127.0.0.1:1/0", "a b", "x"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: channel must be 1 to 200 ")
    assert main(["publish", "redis://127.0.0.1:1/0", "a", "x", "--timeout", "0.2"]) == 1
    assert "redis://127.0.0.1:1/0" in last_error_line(capsys)


@pytest.mark.parametrize("body", ["hi", "[]", "{}", "[" * 100_000])
def test_publish_reports_a_server_that_is_not_a_hub(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    response = f"HTTP/1.1 201 Created\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    with scripted_server(response.encode()) as (url, _):
        assert main(["publish", url, "a", "x"]) == 1
        assert (
            last_error_line(capsys)
            == f"asgi-sse: error: {url} must be the URL of a hub, but its 201 answer has no event id"
        )


def test_publish_escapes_control_characters_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b'{"id": "\\u001b[2Jx"}'
    with scripted_server(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)) as (url, _):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["publish", url, "a", "x"]) == 0
    assert capsys.readouterr().out == "\\u001b[2Jx\n"


def test_publish_reports_that_nothing_was_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("http://[::g/", "http://a..b/", "http://"):
        assert main(["publish", url, "a", "x"]) == 1
        assert last_error_line(capsys).startswith("asgi-sse: error: not published: cannot send the request: ")
    with socket.socket() as taken:  # its backlog is full after one connection
        taken.bind(("127.0.0.1", 0))
        taken.listen(0)
        address = taken.getsockname()
        with socket.create_connection(address):
            assert main(["publish", f"http://127.0.0.1:{address[1]}", "a", "x", "--timeout", "0.2"]) == 1
    assert last_error_line(capsys).startswith(
        f"asgi-sse: error: not published: cannot connect to http://127.0.0.1:{address[1]}: "
    )
    monkeypatch.setenv("HTTP_PROXY", "foo://bar")
    assert main(["publish", "http://127.0.0.1:1", "a", "x"]) == 1
    assert last_error_line(capsys).startswith("asgi-sse: error: not published: cannot send the request: ")


def test_publish_reports_an_unknown_outcome(capsys: pytest.CaptureFixture[str]) -> None:
    with scripted_server(b"") as (url, _):
        assert main(["publish", url, "a", "x"]) == 1
    assert "the event may have been published" in last_error_line(capsys)
