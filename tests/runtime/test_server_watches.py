"""Servers with several registries, and servers whose hooks cannot be removed: each stream ends in an orderly way."""

import gc
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import hypercorn.asyncio
import hypercorn.trio
import pytest
import uvicorn
from anyio.abc import SocketStream
from serving import free_port

from asgi_sse import EventSourceResponse, StreamRegistry

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

TIMEOUT_S = 60  # for a slow machine


async def idle() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep_forever()


class AppOfRegistries:
    """An app whose parts have a registry each: request number n belongs to part n."""

    def __init__(self, number: int) -> None:
        self.registries = [StreamRegistry(drain_retry=(1000 + n, 1000 + n)) for n in range(number)]
        self.requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        registry = self.registries[self.requests]
        self.requests += 1
        await EventSourceResponse(idle(), registry=registry)(scope, receive, send)


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[SocketStream]:
    """Request a stream and wait for its first event."""
    with anyio.fail_after(TIMEOUT_S):
        while True:
            try:
                stream = await anyio.connect_tcp("127.0.0.1", port)
                break
            except OSError:  # it does not listen yet
                await anyio.sleep(0.02)
        async with stream:
            await stream.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            data = b""
            while b"data: first" not in data:
                data += await stream.receive()
            yield stream


async def reconnection_time(stream: SocketStream) -> int:
    """Read the stream to the end of its body and return the reconnection time in it."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += await stream.receive()
    (found,) = re.findall(rb"retry: (\d+)\n\n", data)
    return int(found)


async def serve_with_uvicorn(
    app: Any, port: int, stop: anyio.Event, kind: type[uvicorn.Server] = uvicorn.Server
) -> None:
    server = kind(uvicorn.Config(app, port=port, log_level="critical"))

    async def wait_for_stop() -> None:
        await stop.wait()
        server.should_exit = True

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for_stop)
        await server.serve()
    assert ("shutdown" in vars(server)) == (kind is not uvicorn.Server)  # our hook is removed, if it can be


async def serve_with_hypercorn(app: Any, port: int, stop: anyio.Event, backend: str) -> None:
    config = hypercorn.Config()
    config.bind = [f"127.0.0.1:{port}"]
    config.errorlog = None
    serve: Any = hypercorn.trio.serve if backend == "trio" else hypercorn.asyncio.serve
    await serve(app, config, shutdown_trigger=stop.wait)


@pytest.mark.parametrize("server", ["uvicorn", "hypercorn"])
async def test_each_registry_of_a_server_ends_its_streams_at_the_shutdown(server: str, anyio_backend_name: str) -> None:
    if (server, anyio_backend_name) == ("uvicorn", "trio"):
        pytest.skip("uvicorn runs on asyncio only")
    app, port, stop = AppOfRegistries(3), free_port(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        if server == "hypercorn":
            tasks.start_soon(serve_with_hypercorn, app, port, stop, anyio_backend_name)
        else:
            tasks.start_soon(serve_with_uvicorn, app, port, stop)
        async with connection(port) as one, connection(port) as two, connection(port) as three:
            stop.set()
            assert [await reconnection_time(stream) for stream in (one, two, three)] == [1000, 1001, 1002]
    assert [registry.statistics().closed for registry in app.registries] == [{"drained": 1}] * 3


async def test_registry_that_has_gone_does_not_end_the_watch_of_another(anyio_backend_name: str) -> None:
    app, port, stop = AppOfRegistries(2), free_port(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_with_hypercorn, app, port, stop, anyio_backend_name)
        async with connection(port):
            pass
        while len(app.registries[0]):
            await anyio.sleep(0.01)
        app.registries[0] = app.registries[1]
        gc.collect()
        async with connection(port) as other:
            stop.set()
            assert await reconnection_time(other) == 1001


async def test_server_that_keeps_the_hook_is_logged_and_no_error(
    anyio_backend_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("uvicorn runs on asyncio only")
    caplog.set_level(logging.DEBUG, "asgi_sse.runtime.shutdown")

    class Keeping(uvicorn.Server):
        def __delattr__(self, name: str) -> None:
            raise AttributeError(name)

    app, port, stop = AppOfRegistries(1), free_port(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_with_uvicorn, app, port, stop, Keeping)
        async with connection(port) as stream:
            stop.set()
            assert await reconnection_time(stream) == 1000
    assert "cannot restore the server's shutdown and the signal handlers" in caplog.text
