"""Hostile clients on real sockets get a clear answer or a closed connection, and other clients do not notice.

The tables state what is promised. After each attack an existing client receives its next event, the process has not
grown, and its log has no traceback. ``ASGI_SSE_HOSTILE=full`` runs every attack on every server, else a sample
runs.
"""

import gzip
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from serving import read_until, running

from asgi_sse import EventDecoder

FULL = os.environ.get("ASGI_SSE_HOSTILE") == "full"
SAMPLE = ["uvicorn-h11-asyncio", "uvicorn-httptools-uvloop", "hypercorn-asyncio"]
MANY = 500 if FULL else 60
GROWTH = 48_000_000
"""Bytes that a process may grow in an attack. That covers pools and arenas, but none of the data that was sent."""

CLOSED = 0
TOO_MUCH = {400, 404, 414, 431, CLOSED}  # the server chooses where the limit is its own


@dataclass
class Answer:
    status: int
    head: bytes = b""
    body: bytes = b""

    @property
    def data(self) -> Any:
        """Parse the data of the first event as JSON."""
        event, *_ = EventDecoder().feed(self.body)
        return json.loads(event.data or "")


class Server:
    """A server under attack, and a client that connected before."""

    def __init__(self, name: str, port: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        self.number = 0
        self.healthy = self.connect()
        self.healthy.sendall(b"GET /healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        read_until(self.healthy, b"id: ")
        self.check()
        self.size = self.figures()["bytes"]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def send(self, data: bytes) -> Answer:
        """Send everything, even if the server stops reading, and read the whole answer."""
        with self.connect() as sock:
            with suppress(ConnectionError, TimeoutError):
                sock.sendall(data)
            return read_answer(sock)

    def get(self, target: str | bytes, *headers: str, method: str = "GET", body: bytes = b"") -> Answer:
        raw = target if isinstance(target, bytes) else target.encode("latin-1")
        length = [f"Content-Length: {len(body)}"] if method == "POST" else []
        head = "\r\n".join(["", "Host: x", "Connection: close", *length, *headers, "", ""]).encode("latin-1")
        return self.send(method.encode() + b" " + raw + b" HTTP/1.1" + head + body)

    def figures(self) -> Any:
        return self.get("/figures").data

    def wait_for(self, wanted: Callable[[Any], bool]) -> None:
        deadline = time.monotonic() + 60
        while not wanted(figures := self.figures()):
            assert time.monotonic() < deadline, figures
            time.sleep(0.05)

    def check(self) -> None:
        """Check that the earlier client is still served."""
        self.number += 1
        assert self.get(f"/publish?data=still-well-{self.number}.").status == 204
        read_until(self.healthy, f"data: still-well-{self.number}.\n\n".encode())

    def check_all(self) -> None:
        self.check()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()[-3000:]
        self.wait_for(lambda figures: figures["bytes"] < self.size + GROWTH)


def read_answer(sock: socket.socket) -> Answer:
    """Read until the connection closes, or until the answer has its full length or its first event."""
    data = b""
    with suppress(ConnectionError, TimeoutError):
        while chunk := sock.recv(65_536):
            data += chunk
            head, found, body = data.partition(b"\r\n\r\n")
            if found and b"text/event-stream" in head and body.count(b"\n\n") >= 2 and b"data: " in body:
                break
            if found and b"content-length: " in head.lower():
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
                if len(body) >= length:
                    break
    if not data:
        return Answer(CLOSED)
    head, _, body = data.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = unchunked(body)
    return Answer(int(head.split(b" ")[1]), head, body)


def unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        length = int(size or b"0", 16)
        whole += rest[:length]
        body = rest[length + 2 :] if length else b""
    return whole


@pytest.fixture(scope="module", params=[*SAMPLE, *(["uvicorn-zttp", "hypercorn-trio", "granian"] if FULL else [])])
def running_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "server.log"
    with running(request.param, "hostile_app:app", log=log) as port:
        server = Server(request.param, port, log)
        with server.healthy:
            yield server


@pytest.fixture
def server(running_server: Server) -> Iterator[Server]:
    yield running_server
    running_server.check_all()


PATHS: dict[str, set[int]] = {
    "/../healthy": {404},
    "//healthy": {404},
    "/healthy/": {404},
    "/./healthy": {404},
    "/%2e%2e/healthy": {404},
    "/items/%2e%2e": {200},
    "/healthy%00": {404},
    "/healthy%0d%0aX-Injected:%20yes": {404},
    "/healthy;jsessionid=1": {404},
    "/items/a%2Fb": {404},
    "/items/": {404},
    "/items/%C0%AF": {200},
    "/items/%ff%fe": {200},
    "/items/%ED%A0%80": {200},
    "/items/%": {200},
    "/items/%zz": {200},
    "/items/%0d%0aX-Injected:%20yes": {200},
    "/items/%00": {200},
    "/items/..;": {200},
    "http://elsewhere/nothing": {404, 400},
    "x/items/1": {404, 400, CLOSED},
    "*": {404, 400, CLOSED},
    "nothing": {404, 400, CLOSED},
    "/events/a..b": {400},
    "/events/**": {400},
    "/events/%2a": {400},
    "/events/" + "a" * 201: {400},
    "/events/a%0ab": {400},
    "/events/%3Cscript%3E": {400},
    "/events": {400},
    "/events?" + "&".join(["channel=a"] * 101): {400},
    "/events?channel=*": {400},
    "/granted?channel=a.**.b": {400},
    "/granted?" + "&".join(f"channel={'.'.join('*' * 90)}.x{n}" for n in range(101)): {400, *TOO_MUCH},
    "/" + "a" * 100_000: TOO_MUCH,
    "/" * 100_000: TOO_MUCH,
    "/seen?" + "a" * 1_000_000: TOO_MUCH,
    "/seen?" + "a&" * 500_000: TOO_MUCH,
    "/seen?last_event_id=" + "1" * 1_000_000: TOO_MUCH,
    "/events?" + "channel=a&" * 1_000_000: TOO_MUCH,
    "/seen?%ff=%fe&a=%00&b=%0d%0a&=&&;": {200},
}


@pytest.mark.parametrize("target", PATHS, ids=lambda target: target[:40])
def test_request_target_gets_its_promised_status(server: Server, target: str) -> None:
    answer = server.get(target)
    assert answer.status in PATHS[target]
    assert b"injected" not in answer.head.lower()
    if answer.status == 400 and b"channel" in answer.body:
        assert b"text/plain" in answer.head
        assert len(answer.body) < 1000


def test_route_parameter_is_one_segment_with_any_content(server: Server) -> None:
    """It has no slash, so a path built from it climbs at most one step. Apps must not trust its text."""
    assert server.get("/items/%2e%2e").data[0] == ".."
    assert server.get("/items/%00%0d%0a").data[0] == "\0\r\n"
    assert server.get("/items/%C0%AF").data[0] == "\ufffd\ufffd"


HEADERS: dict[str, tuple[bytes, set[int]]] = {
    "a long id": (b"Last-Event-ID: " + b"9" * 15_000, {200}),
    "a huge id": (b"Last-Event-ID: " + b"9" * 1_000_000, {200, 400, 431, CLOSED}),
    "two ids": (b"Last-Event-ID: a\r\nLast-Event-ID: b", {200}),
    "a NUL in an id": (b"Last-Event-ID: a\0b", {200, 400, CLOSED}),
    "a bare CR in an id": (b"Last-Event-ID: a\rX-Injected: yes", {200, 400, CLOSED}),
    "an id that is not UTF-8": (b"Last-Event-ID: \xff\xfe", {200}),
    "10,000 headers": (b"\r\n".join(b"X-%d: y" % n for n in range(10_000)), {200, 400, 431, CLOSED}),
    "5,000 of one name": (b"\r\n".join([b"Cookie: a=b"] * 5_000), {200, 400, 431, CLOSED}),
    "a huge cookie": (b"Cookie: " + b"a=%41;" * 200_000, {400, 431, CLOSED}),
    "a header without a name": (b": x", {200, 400, CLOSED}),
    "a folded header": (b"X-A: b\r\n c", {200, 400, CLOSED}),
    "an absurd length": (b"Content-Length: 99999999999999999999999", {200, 400, 413, CLOSED}),
    "a negative length": (b"Content-Length: -1", {200, 400, 413, CLOSED}),
    "an odd accept": (b"Accept: text/event-stream;q=\xff, */*\r\nAccept-Encoding: gzip;q=\xff,*,,;", {200}),
    "an unknown expectation": (b"Expect: nothing", {200, 400, 417, CLOSED}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_header_gets_its_promised_status(server: Server, name: str) -> None:
    header, statuses = HEADERS[name]
    for target in (b"/seen", b"/events/some"):
        with server.connect() as sock:
            with suppress(ConnectionError):
                sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n\r\n" % (target, header))
            sock.settimeout(1 if name == "an absurd length" else 20)
            answer = read_answer(sock) if target == b"/seen" else Answer(status_of(sock))
        assert answer.status in statuses or (
            name == "a huge cookie" and target != b"/seen"
        )  # this endpoint does not read cookies
        assert b"injected" not in answer.head.lower()


def status_of(sock: socket.socket) -> int:
    data = b""
    with suppress(ConnectionError, TimeoutError):
        while b"\r\n" not in data and (chunk := sock.recv(65_536)):
            data += chunk
    return int(data.split(b" ")[1]) if data else CLOSED


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example\x7f", "null", "a" * 5000, "https://a\tb", "\xff", "https://a, https://b", '"<script>'],
)
def test_origin_is_reflected_unchanged_or_not_at_all(server: Server, origin: str) -> None:
    answer = server.get("/seen", f"Origin: {origin}")
    lines = [line for line in answer.head.split(b"\r\n") if line.lower().startswith(b"access-control-allow-origin:")]
    assert answer.status == CLOSED or len(lines) == (answer.status == 200)
    assert all(line.partition(b": ")[2] == origin.encode("latin-1") for line in lines)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("id=a%0Adata: forged", 422),
        ("id=a%0Ddata: forged", 422),
        ("id=a%00", 422),
        ("event=a%0D%0Adata: forged", 422),
        ("retry=1%0Adata: forged", 422),
        ("comment=a%0Adata: forged%0A%0Adata: forged", 200),
        ("data=a%0D%0A%0D%0Adata: forged%0Aid: 7%0A%0A", 200),
        ("data=a%E2%80%A8data: forged%C2%85data: forged", 200),
        ("data=%ED%A0%80", 200),
        ("header=a%0D%0AX-Injected: yes", 422),
        ("header=a%0AX-Injected: yes", 422),
        ("header=a%00b", 422),
        ("header=%E2%80%A8", 422),
        ("header=/somewhere&detail=%0D%0A%0D%0AX-Injected: yes", 302),
        ("detail=%3Cscript%3Ealert(1)%3C/script%3E", 400),
        ("detail=%0D%0AX-Injected: yes", 400),
    ],
)
def test_client_data_cannot_leave_its_field(server: Server, query: str, status: int) -> None:
    answer = server.get("/inject?" + query.replace(" ", "%20"))
    assert answer.status == status
    assert b"injected" not in answer.head.lower()
    if status == 200:
        (event,) = EventDecoder().feed(answer.body)
        assert "forged" not in (event.event or "") + (event.id or "")
        assert b"\ndata: forged\n\n" not in answer.body.replace(b"data: data: forged", b"")
    else:
        assert b"content-type: text/plain; charset=utf-8" in answer.head.lower()


BODIES: dict[str, tuple[bytes, int]] = {
    "deep": (b"[" * 500_000, 400),
    "deep and whole": (b"[" * 100_000 + b"]" * 100_000, 400),
    "a huge number": (b"9" * 100_000, 400),
    "NaN": (b'{"a": NaN}', 400),
    "infinity": (b"[-Infinity]", 400),
    "a number that becomes infinity": (b"[-1e999]", 400),
    "not UTF-8": (b'{"a": "\xff"}', 400),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', 400),
    "a lone surrogate": (b'"\\ud800"', 400),
    "a lone surrogate as a name": (b'{"\\uDFFF": 1}', 400),
    "a pair": (b'"\\ud83d\\ude00"', 200),
    "a name twice": (b'{"a": 1, "a": 2}', 200),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), 400),
    "compressed": (gzip.compress(b"0" * 1000), 400),
    "nothing": (b"", 400),
    "2 MB": (b" " * 2_000_000, 413),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_json_body_gets_its_promised_status(server: Server, name: str) -> None:
    body, status = BODIES[name]
    answer = server.get("/json", "Content-Type: application/json", method="POST", body=body)
    assert answer.status == status or (
        status == 413 and answer.status == CLOSED
    )  # the connection is reset while the client still sends
    assert answer.status == 200 or b"text/plain" in answer.head or answer.status == CLOSED


def test_endless_body_is_refused(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with suppress(ConnectionError, TimeoutError):
            sock.settimeout(5)
            while sent < 50_000_000:
                sock.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                sent += 65_536
                sock.setblocking(False)
                with suppress(BlockingIOError):
                    if not sock.recv(65_536, socket.MSG_PEEK):
                        break
                    break
                sock.settimeout(5)
        sock.settimeout(5)
        assert read_answer(sock).status in (413, CLOSED)
    assert sent < 50_000_000


def test_body_with_a_too_large_length_is_refused_at_once(server: Server) -> None:
    with server.connect() as sock:
        sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\nx")
        assert read_answer(sock).status == 413


def test_clients_that_send_byte_by_byte_hold_up_nobody(server: Server) -> None:
    """The server's own timeouts end them."""
    with ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(20)]
        for sock in slow[:10]:
            sock.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
        for number, byte in enumerate(b"hello"):
            for sock in slow[:10]:
                sock.sendall(bytes((byte,)))
            for sock in slow[10:]:
                sock.sendall(b"GET /seen HTTP/1.1\r\n"[number * 4 : number * 4 + 4])
            server.check()
        for sock in slow[:10]:
            assert read_until(sock, b"data: 5\n\n")
        for sock in slow[10:]:
            sock.sendall(b"Host: x\r\n\r\n")
            assert read_until(sock, b"data: {")


def test_clients_that_never_read_are_dropped(server: Server) -> None:
    """Each holds one send and its socket buffers until `send_timeout`."""
    before = server.figures()["closed"].get("flood", 0)
    with ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(server.connect())
            sock.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        server.check()
        if server.name == "hypercorn-trio":
            return  # this server does not release a send, as SECURITY.md says
        server.wait_for(lambda figures: figures["closed"].get("flood", 0) == before + 20)


def test_clients_that_read_byte_by_byte_hold_up_nobody(server: Server) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(server.connect()) for _ in range(10)]
        for sock in slow:
            sock.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(10):
            for sock in slow:
                with suppress(ConnectionError):
                    sock.recv(1)
            server.check()


def test_many_connections_leave_nothing_behind(server: Server) -> None:
    """Half of them send nothing, half subscribe to a channel of their own."""
    with ExitStack() as stack:
        for number in range(MANY):
            stack.enter_context(server.connect())
            sock = stack.enter_context(server.connect())
            sock.sendall(f"GET /events/flood.{number} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        server.wait_for(lambda figures: figures["readers"] >= MANY + 1)
        server.check()
    server.wait_for(lambda figures: figures["readers"] == 1)


def test_many_channel_names_leave_nothing_behind(server: Server) -> None:
    for number in range(5 * MANY):
        sock = server.connect()
        sock.sendall(f"GET /events/{quote(f'one:{number}')} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert status_of(sock) == 200
        sock.close()
    server.wait_for(lambda figures: figures["readers"] == 1)


def test_full_channel_answers_503(server: Server) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(server.connect())
            sock.sendall(b"GET /crowded HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(sock, b"id: ")
        answer = server.get("/crowded")
        assert (answer.status, b"retry-after: 5" in answer.head.lower()) == (503, True)


def test_hanging_snapshot_ends_with_its_client(server: Server) -> None:
    before = server.figures()["streams"]
    with ExitStack() as stack:
        for _ in range(10):
            sock = stack.enter_context(server.connect())
            sock.sendall(b"GET /hangs HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_for(lambda figures: figures["streams"] == before + 10)
    server.wait_for(lambda figures: figures["streams"] == before)


def test_huge_event_is_kept_only_until_the_next_one(server: Server) -> None:
    """The log keeps the newest event of any size. A client that does not read it is dropped."""
    size = 100_000_000 if FULL else 4_000_000
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(server.connect())
            sock.sendall(b"GET /bombs HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(sock, b"id: ")
        assert server.get(f"/bomb?bytes={size}").status == 204
        server.check()
        got = 0
        while got < size:  # the client that reads receives all of it
            got += len(sock.recv(1_000_000))
    assert server.get("/bomb?bytes=1").status == 204
    server.wait_for(lambda figures: figures["readers"] == 1)


@pytest.mark.parametrize("method", ["DELETE", "PUT", "TRACE", "CONNECT", "OPTIONS", "PROPFIND", "A" * 1000])
def test_unsupported_method_is_refused(server: Server, method: str) -> None:
    assert server.get("/healthy", method=method).status in {405, 400, 404, 501, CLOSED}
