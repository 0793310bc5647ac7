"""Every compressor that is installed, inside of `SSEMiddleware` and around it, over a real server.

Whether it compresses an event stream is found out first, from the same app with ``compressors="off"``.
"""

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from compressor_apps import AROUND, EVENTS, OWN
from stopping import TERM, Row, Run, uvicorn

FULL = os.environ.get("ASGI_SSE_COMPRESSORS") == "full"
MODULES = {  # what has to be installed
    "starlette_gzip": "starlette", "brotli_asgi": "brotli_asgi", "starlette_compress": "starlette_compress",
    "asgi_gzip": "asgi_gzip", "zstd_asgi": "zstd_asgi", "asgi_compression": "asgi_compression", "litestar": "litestar",
    "django_gzip": "django", "django_http_compression": "django_http_compression", "quart_compress": "quart_compress",
    "django_compression_middleware": "compression_middleware",
    "blacksheep": "blacksheep",
}  # fmt: skip
CLASSES = {
    "starlette_gzip": "starlette.middleware.gzip.GZipMiddleware", "brotli_asgi": "brotli_asgi.BrotliMiddleware",
    "starlette_compress": "starlette_compress.CompressMiddleware", "asgi_gzip": "GZipMiddleware",
    "zstd_asgi": "zstd_asgi.ZstdMiddleware", "litestar": "CompressionMiddleware",
    "django_gzip": "django.middleware.gzip.GZipMiddleware",
    "django_http_compression": "django_http_compression.middleware.HttpCompressionMiddleware",
    "django_compression_middleware": "compression_middleware.middleware.CompressionMiddleware",
}  # fmt: skip
INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
SAMPLE = [name for name in ("starlette_gzip", "brotli_asgi") if name in INSTALLED]
NAMES = INSTALLED if FULL else SAMPLE
ENOUGH = 20.0  # seconds for what comes at once, unless it is held
ASKS = {"accept": "text/event-stream", "accept-encoding": "gzip, br, zstd"}


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    with ExitStack() as stack:

        def start(app: str, name: str, mode: str = "") -> Run:
            monkeypatch.setenv("COMPRESSOR", name)
            monkeypatch.setenv("COMPRESSION", mode)
            directory = tmp_path / f"{app}-{mode}"
            directory.mkdir()
            if mode == "bypass":
                (directory / "seen").touch()
            monkeypatch.setenv("COMPRESSOR_SEEN", str(directory / "seen"))
            row: Row = uvicorn("--factory", trigger=TERM, app=f"compressor_apps:{app}")
            run = Run(row, directory)
            stack.callback(run.close)
            return run

        yield start


def head_of(run: Run, path: str) -> httpx.Headers:
    with httpx.stream("GET", f"http://127.0.0.1:{run.port}{path}", headers=ASKS, timeout=ENOUGH) as response:
        return response.headers


def delays(run: Run, path: str) -> list[float]:
    """How long each event of the stream took to the client, who lets the app make the next one when it has come."""
    found: list[float] = []
    with (
        socket.create_connection(("127.0.0.1", run.port), timeout=ENOUGH) as sock,
        (run.directory / "seen").open("a") as seen,
    ):
        lines = "".join(f"{name}: {value}\r\n" for name, value in ASKS.items())
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
        data = b""
        while chunk := sock.recv(65_536):
            data += chunk
            events = [line for line in data.split(b"\n") if line.startswith(b"data: ") and b"." * 600 in line]
            for line in events[len(found) :]:
                made = line.split()[1].decode()
                found.append(time.time() - float(made))
                print(made, file=seen, flush=True)
    assert b"content-encoding" not in data.lower()
    return found


def warnings(run: Run) -> list[str]:
    return [line for line in run.log.read_text().splitlines() if "event stream" in line]


def stream_paths(name: str) -> list[str]:
    return ["/foreign"] if name in [builder.__name__ for builder in OWN] else ["/foreign", "/ours"]


@pytest.mark.parametrize("name", NAMES)
def test_inside(name: str, serve: Callable[..., Run]) -> None:
    unguarded = serve("inside", name, "off")
    paths = stream_paths(name)
    encodes = {path: head_of(unguarded, path).get("content-encoding", "") for path in paths}
    bypass = serve("inside", name, "bypass")
    refuse = serve("inside", name, "refuse")
    for path in paths:
        took = delays(bypass, path)
        assert len(took) == EVENTS  # none is held until the next one is made
        response = httpx.get(f"http://127.0.0.1:{refuse.port}{path}", headers=ASKS, timeout=ENOUGH)
        if encodes[path]:
            assert response.status_code == 500
            assert CLASSES[name] in response.text
            assert int(response.headers["content-length"]) == len(response.content)
        else:
            assert response.status_code == 200
            assert response.text.count("data: ") == EVENTS
    with httpx.stream(
        "GET", f"http://127.0.0.1:{bypass.port}/page", headers={"accept-encoding": "gzip, br, zstd"}
    ) as page:
        assert "content-encoding" in page.headers  # other responses are compressed as before
    late = f"{max(took):.2f}"
    print(f"{name:26} inside: {encodes}; bypassed: the slowest event {late} s late; refused: {response.status_code}")
    for run in (bypass, refuse):
        if any(encodes.values()):
            run.wait_until(lambda run=run: bool(warnings(run)), ENOUGH, "nothing was told")  # type: ignore[misc]
        warned = warnings(run)
        assert bool(warned) == any(encodes.values()), warned
        assert all(CLASSES[name] in line for line in warned)


@pytest.mark.parametrize("name", [name for name in NAMES if name in [builder.__name__ for builder in AROUND]])
def test_around(name: str, serve: Callable[..., Run]) -> None:
    run = serve("around", name)
    encodes = {path: head_of(run, path).get("content-encoding", "") for path in ("/route", "/ours", "/foreign")}
    identity = head_of(run, "/identity").get("content-encoding", "")
    assert identity in ("", "identity") or name in ("starlette_compress", "asgi_gzip", "zstd_asgi")  # some versions
    if any(encodes.values()):
        run.wait_until(lambda: bool(warnings(run)), ENOUGH, "nothing was told")
    else:
        time.sleep(1.5)  # past the second look at the heads
    warned = warnings(run)
    print(f"{name:26} around: {encodes}; with identity: {identity}; warned: {bool(warned)}")
    assert bool(warned) == any(encodes.values()), warned
