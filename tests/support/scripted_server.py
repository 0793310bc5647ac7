"""A server with prepared responses, and what the commands print about them."""

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
CHUNKED_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@contextmanager
def scripted_server(*responses: bytes) -> Iterator[tuple[str, list[str]]]:
    """Serve one response per connection, in order; the last response repeats.

    Yields the server's URL and the list of the requests that it received.
    """
    requests: list[str] = []
    left = list(responses)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data = b""
            while b"\r\n\r\n" not in data:
                chunk = self.request.recv(65_536)
                if not chunk:
                    return  # the client closed the connection without a request
                data += chunk
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            while length and len(body) < int(length[1]):
                body += self.request.recv(65_536)
            requests.append((head + b"\r\n\r\n" + body).decode(errors="replace"))
            response = left.pop(0) if len(left) > 1 else left[0]
            # Without this header a client may send the next request on a connection that is closing.
            self.request.sendall(response.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    with serving_with(Handler) as url:
        yield url, requests


@contextmanager
def serving_with(handler: type[socketserver.BaseRequestHandler]) -> Iterator[str]:
    """Serve with `handler` in a thread per connection; yield the server's URL without a slash at its end."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def header_of(request: str, name: str) -> str | None:
    """Return the value of a header of a recorded request, or ``None``."""
    found = re.search(rf"^{name}: *(.*?)\r$", request, re.IGNORECASE | re.MULTILINE)
    return found and found[1]


def last_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line of the standard error so far."""
    return capsys.readouterr().err.splitlines()[-1]
