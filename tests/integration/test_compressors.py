"""Every installed compressor, inside `SSEMiddleware` and around it, on a real server.

A first run with ``compressors="off"`` shows whether the compressor encodes event streams at all.
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
MODULES = {  # the module that must be installed
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
TIMEOUT = 20.0  # seconds; a response that is not held back arrives at once
REQUEST_HEADERS = {"accept": "text/event-stream", "accept-encoding": "gzip, br, zstd"}


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


def response_headers(run: Run, path: str) -> httpx.Headers:
    with httpx.stream(
        "GET", f"http://127.0.0.1:{run.port}{path}", headers=REQUEST_HEADERS, timeout=TIMEOUT
    ) as response:
        return response.headers


def delays(run: Run, path: str) -> list[float]:
    """Return the delay of each event in seconds. The client reports each event, and the app then sends the next one."""
    found: list[float] = []
    with (
        socket.create_connection(("127.0.0.1", run.port), timeout=TIMEOUT) as sock,
        (run.directory / "seen").open("a") as seen,
    ):
        lines = "".join(f"{name}: {value}\r\n" for name, value in REQUEST_HEADERS.items())
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
        data = b""
        while chunk := sock.recv(65_536):
            data += chunk
            events = [line for line in data.split(b"\n") if line.startswith(b"data: ") and b"." * 600 in line]
            for line in events[len(found) :]:
                sent_at = line.split()[1].decode()
                found.append(time.time() - float(sent_at))
                print(sent_at, file=seen, flush=True)
    assert b"content-encoding" not in data.lower()
    return found


def warnings(run: Run) -> list[str]:
    return [line for line in run.log.read_text().splitlines() if "event stream" in line]


def stream_paths(name: str) -> list[str]:
    return ["/foreign"] if name in [builder.__name__ for builder in OWN] else ["/foreign", "/ours"]


@pytest.mark.parametrize("name", NAMES)
def test_compressor_inside_is_bypassed_or_refused(name: str, serve: Callable[..., Run]) -> None:
    unguarded = serve("inside", name, "off")
    paths = stream_paths(name)
    encodes = {path: response_headers(unguarded, path).get("content-encoding", "") for path in paths}
    bypass = serve("inside", name, "bypass")
    refuse = serve("inside", name, "refuse")
    for path in paths:
        took = delays(bypass, path)
        assert len(took) == EVENTS  # no event waits for the next one
        response = httpx.get(f"http://127.0.0.1:{refuse.port}{path}", headers=REQUEST_HEADERS, timeout=TIMEOUT)
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
        assert "content-encoding" in page.headers  # other responses are still compressed
    late = f"{max(took):.2f}"
    print(f"{name:26} inside: {encodes}; bypassed: the slowest event {late} s late; refused: {response.status_code}")
    for run in (bypass, refuse):
        if any(encodes.values()):
            run.wait_until(lambda run=run: bool(warnings(run)), TIMEOUT, "no warning was logged")  # type: ignore[misc]
        warned = warnings(run)
        assert bool(warned) == any(encodes.values()), warned
        assert all(CLASSES[name] in line for line in warned)


@pytest.mark.parametrize("name", [name for name in NAMES if name in [builder.__name__ for builder in AROUND]])
def test_compressor_around_is_reported(name: str, serve: Callable[..., Run]) -> None:
    run = serve("around", name)
    encodes = {
        path: response_headers(run, path).get("content-encoding", "") for path in ("/route", "/ours", "/foreign")
    }
    identity = response_headers(run, "/identity").get("content-encoding", "")
    assert identity in ("", "identity") or name in ("starlette_compress", "asgi_gzip", "zstd_asgi")  # some versions
    if any(encodes.values()):
        run.wait_until(lambda: bool(warnings(run)), TIMEOUT, "no warning was logged")
    else:
        time.sleep(1.5)  # until the response headers are checked again
    warned = warnings(run)
    print(f"{name:26} around: {encodes}; with identity: {identity}; warned: {bool(warned)}")
    assert bool(warned) == any(encodes.values()), warned
