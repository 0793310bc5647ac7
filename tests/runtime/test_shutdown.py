"""How a registry learns that its server is stopping, and that nothing remains of the watch afterwards."""

import asyncio
import gc
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
import pytest
import uvicorn
from serving import free_port, read_until
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route

from asgi_sse import EventSourceResponse, Request, SSEMiddleware, StreamRegistry, create_app
from asgi_sse.testing import open_stream, running

pytestmark = pytest.mark.anyio


async def idle() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep_forever()


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Install a handler for SIGTERM as a server does; return the list of the signals that it receives."""
    numbers: list[int] = []

    def handle(number: int, frame: Any) -> None:
        numbers.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    yield numbers
    signal.signal(signal.SIGTERM, before)


async def read_to_end(stream: Any) -> bytes:
    body = b""
    while chunk := await stream.read(timeout=60):
        body += chunk
    return body


# Signals


async def test_signal_drains_and_reaches_the_previous_handler(
    handled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    app = create_app({"/": idle})
    async with open_stream(app) as stream, open_stream(app) as other:
        await stream.receive()
        await other.receive()
        signal.raise_signal(signal.SIGTERM)
        assert b"retry: " in await read_to_end(stream)
        assert b"retry: " in await read_to_end(other)
        assert stream.complete
        assert other.complete
    assert handled == [signal.SIGTERM]
    assert app.registry.statistics().closed == {"drained": 2}
    await anyio.sleep(0.1)
    (line,) = [record.getMessage() for record in caplog.records if "drained" in record.getMessage()]
    assert "drained 2 streams (SIGTERM)" in line


async def test_signal_drains_a_response_without_an_app(handled: list[int]) -> None:
    async with open_stream(EventSourceResponse(idle())) as stream:
        await stream.receive()
        signal.raise_signal(signal.SIGTERM)
        assert b"retry: " in await read_to_end(stream)
        assert stream.complete
    async with open_stream(EventSourceResponse(idle())) as stream:  # the server is still expected to stop
        assert b"data" not in await read_to_end(stream)
    assert handled


async def test_signal_that_stops_no_server_expires(handled: list[int]) -> None:
    app = create_app({"/": idle}, registry=StreamRegistry(drain_timeout=2))
    async with open_stream(app) as stream:
        await stream.receive()
        signal.raise_signal(signal.SIGTERM)
        await read_to_end(stream)
    assert handled
    async with open_stream(app) as stream:
        assert b"data" not in await read_to_end(stream)
    await anyio.sleep(8)
    async with open_stream(app) as stream:
        assert (await stream.receive()).data == "first"
        signal.raise_signal(signal.SIGTERM)  # the next signal counts again
        await read_to_end(stream)
        assert stream.complete


async def test_server_that_starts_after_the_signal_accepts_streams_at_once(handled: list[int]) -> None:
    """A reload may begin with a signal: the streams of its new server are not those that should end."""
    app = create_app({"/": idle})
    async with open_stream(app) as stream:
        await stream.receive()
        signal.raise_signal(signal.SIGTERM)
        await read_to_end(stream)
    assert handled
    async with running(app) as server, open_stream(server) as stream:
        assert (await stream.receive()).data == "first"
        await anyio.sleep(1)
        assert not stream.complete


async def test_signals_false_leaves_the_handlers_alone(handled: list[int]) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    app = create_app({"/": idle}, signals=False)
    async with open_stream(app) as stream:
        await stream.receive()
        assert signal.getsignal(signal.SIGTERM) is handler
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await stream.read(timeout=5)
    assert handled


async def test_default_handlers_of_python_stay(anyio_backend_name: str) -> None:
    """This includes the handlers of asyncio.Runner and trio for Ctrl-C, which only raise KeyboardInterrupt."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with open_stream(create_app({"/": idle})) as stream:
        await stream.receive()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_handler_that_was_set_over_ours_stays(handled: list[int]) -> None:
    def theirs(number: int, frame: Any) -> None:
        """Handle nothing; this handler is set after ours."""

    async def main() -> None:
        app = create_app({"/": idle})
        async with open_stream(app) as stream:
            await stream.receive()
            ours = signal.signal(signal.SIGTERM, theirs)
        del app
        gc.collect()
        assert signal.signal(signal.SIGTERM, ours) is theirs

    anyio.run(main)
    gc.collect()


def test_short_lived_apps_leave_no_objects_and_no_handlers(handled: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    apps: list[weakref.ref[Any]] = []

    async def use() -> None:
        for _ in range(15):
            app = create_app({"/": idle})
            async with open_stream(app) as stream:
                await stream.receive()
            apps.append(weakref.ref(app.registry))

    for _ in range(100):
        anyio.run(use)
    gc.collect()
    assert len(apps) == 1500
    assert not any(ref() for ref in apps)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


# Several servers


class Served:
    """A uvicorn server in a thread of this process."""

    def __init__(self, app: Any, kind: type[uvicorn.Server] = uvicorn.Server) -> None:
        self.port = free_port()
        self.server = kind(uvicorn.Config(app, port=self.port, log_level="critical", lifespan="auto"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return sock

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive(), "the server hangs"


def bare_app() -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await EventSourceResponse(idle())(scope, receive, send)

    return app


def closure_app() -> Any:
    """An app that wraps ``send`` in a function, as the middlewares of Starlette do."""
    inner = bare_app()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped_send(message: Any) -> None:
            await send(message)

        await inner(scope, receive, wrapped_send)

    return app


@contextmanager
def two_servers(app: Any) -> Iterator[tuple[Served, Served]]:
    with ExitStack() as stack:
        servers = Served(app), Served(app)
        for server in servers:
            stack.callback(server.stop)
        yield servers


@pytest.mark.parametrize("make", [lambda: create_app({"/": idle}), bare_app, closure_app])
def test_stopping_one_of_two_servers_in_a_process_keeps_the_other(make: Callable[[], Any]) -> None:
    with two_servers(make()) as (first, second):
        with first.connect() as doomed, second.connect() as other:
            read_until(doomed, b"data: first")
            read_until(other, b"data: first")
            first.stop()
            assert read_until(doomed, b"0\r\n\r\n").count(b"retry: ") == 1
            other.settimeout(0.3)
            with pytest.raises(TimeoutError):
                other.recv(1)
            with second.connect() as newcomer:
                read_until(newcomer, b"data: first")
            other.settimeout(60)
            second.stop()
            read_until(other, b"0\r\n\r\n")
        third = Served(make())
        with third.connect() as after:
            read_until(after, b"data: first")
            third.stop()


def base_http_app() -> Any:
    """A middleware that hides ``send`` behind a queue."""

    async def dispatch(request: Any, call_next: Any) -> Any:
        return await call_next(request)

    async def endpoint(request: Any) -> Any:
        return EventSourceResponse(idle())

    return Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(BaseHTTPMiddleware, dispatch=dispatch)])


def wrapped_base_http_app() -> Any:
    return SSEMiddleware(base_http_app())


class Holder:
    """An app that can be referred to weakly."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


async def serve_once(config: uvicorn.Config) -> bytes:
    """Serve in this event loop, stop the server when one client has received an event, and return the client's body."""
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", config.port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    body = await reader.readuntil(b"data: first\n\n")
    server.should_exit = True
    body += await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    await asyncio.wait_for(serving, 60)
    return body


@pytest.mark.parametrize("same_config", [True, False])
@pytest.mark.parametrize("make", [lambda: create_app({"/": idle}), bare_app, base_http_app, wrapped_base_http_app])
def test_consecutive_servers_in_one_event_loop_each_drain(make: Callable[[], Any], same_config: bool) -> None:
    async def main() -> None:
        app = make()
        configs = [uvicorn.Config(app, port=free_port(), log_level="critical") for _ in range(3)]
        for config in [configs[0]] * 3 if same_config else configs:
            async with asyncio.timeout(60):
                assert (await serve_once(config)).count(b"retry: ") == 2

    asyncio.run(main())


@pytest.mark.parametrize("make", [lambda: create_app({"/": idle}), bare_app])
def test_stopped_servers_leave_no_app_and_no_event_loop(make: Callable[[], Any]) -> None:
    apps: list[weakref.ref[Any]] = []
    loops: list[weakref.ref[Any]] = []

    async def serve(times: int) -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        for _ in range(times):
            app = Holder(make())
            apps.append(weakref.ref(app))
            await serve_once(uvicorn.Config(app, port=free_port(), log_level="critical"))

    for times in (1, 1, 3):
        asyncio.run(serve(times))
    gc.collect()
    assert not any(ref() for ref in apps)
    assert not any(ref() for ref in loops)


def test_app_serves_again_after_its_server_has_stopped() -> None:
    app = create_app({"/": idle})
    for _ in range(3):
        server = Served(app)
        with server.connect() as sock:
            read_until(sock, b"data: first")
            server.stop()
            read_until(sock, b"0\r\n\r\n")
        assert not app.registry.draining
        assert "shutdown" not in vars(server.server)  # our hook is removed


def test_shutdown_replaced_by_other_code_is_called_and_restored() -> None:
    called = []
    server = Served(create_app({"/": idle}))
    original = server.server.shutdown

    async def theirs(*args: Any, **kwargs: Any) -> None:
        called.append(True)
        await original(*args, **kwargs)

    server.server.shutdown = theirs  # type: ignore[method-assign]
    with server.connect() as sock:
        read_until(sock, b"data: first")
        server.stop()
        read_until(sock, b"0\r\n\r\n")
    assert called == [True]
    assert server.server.shutdown is theirs


def test_unknown_server_is_logged_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Signals and the lifespan still report its shutdown."""
    caplog.set_level(logging.DEBUG, "asgi_sse")

    async def main() -> None:
        async with open_stream(create_app({"/": idle})) as stream:
            await stream.receive()

    anyio.run(main)
    assert "found 0 servers to watch" in caplog.text


def test_server_that_refuses_the_hook_is_logged_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")

    class Frozen(uvicorn.Server):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "shutdown":
                raise AttributeError(name)
            super().__setattr__(name, value)

    server = Served(create_app({"/": idle}), Frozen)
    with server.connect() as sock:
        read_until(sock, b"data: first")
    server.stop()
    assert "cannot watch all of the server's shutdown" in caplog.text


# The lifespan


async def run_lifespan(app: Any, between: Callable[[], Any] = lambda: None) -> list[str]:
    """Start and stop `app`; return the types of its answers."""
    answers: list[str] = []
    messages = iter(["lifespan.startup", "lifespan.shutdown"])
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}

    async def receive() -> Any:
        kind = next(messages, None)
        if kind is None:
            await anyio.sleep_forever()
        if kind == "lifespan.shutdown":
            result = between()
            if result is not None:
                await result
        return {"type": kind}

    async def send(message: Any) -> None:
        answers.append(message["type"])

    await app(scope, receive, send)
    return answers


COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_app_shuts_down_after_the_streams_have_ended() -> None:
    order: list[Any] = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(1)
            order.append("the source is cleaned up")

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["pool"] = "open"
        assert (await receive())["type"] == "lifespan.startup"
        await send({"type": "lifespan.startup.complete"})
        assert (await receive())["type"] == "lifespan.shutdown"
        order.append("the app closes its pool")
        await send({"type": "lifespan.shutdown.complete"})

    app = SSEMiddleware(inner, {"/": source})
    async with anyio.create_task_group() as tasks:

        async def client() -> None:
            async with open_stream(app) as stream:
                await stream.receive()
                opened.set()
                await read_to_end(stream)

        opened = anyio.Event()
        tasks.start_soon(client)
        assert await run_lifespan(app, opened.wait) == COMPLETE
    assert order == ["the source is cleaned up", "the app closes its pool"]


async def raises(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("only HTTP")


async def returns(scope: Any, receive: Any, send: Any) -> None:
    """Return without an answer."""


async def returns_after_start(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})


async def receives_and_returns(scope: Any, receive: Any, send: Any) -> None:
    await receive()


@pytest.mark.parametrize("inner", [raises, returns, returns_after_start, receives_and_returns])
async def test_middleware_answers_for_an_app_without_lifespan_support(inner: Any) -> None:
    assert await run_lifespan(SSEMiddleware(inner, {"/": idle})) == COMPLETE


@pytest.mark.parametrize(("inner", "answers"), [(returns, []), (returns_after_start, COMPLETE[:1])])
async def test_strict_lifespan_leaves_the_answers_to_the_app(inner: Any, answers: list[str]) -> None:
    assert await run_lifespan(SSEMiddleware(inner, strict_lifespan=True)) == answers
    with pytest.raises(ValueError, match="only HTTP"):
        await run_lifespan(SSEMiddleware(raises, strict_lifespan=True))


async def test_failed_start_up_stays_fatal() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    assert await run_lifespan(SSEMiddleware(fails)) == ["lifespan.startup.failed"]

    async def breaks(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        raise LookupError("no database")

    with pytest.raises(LookupError, match="no database"):
        await run_lifespan(SSEMiddleware(breaks))


async def test_other_paths_reach_the_app() -> None:
    seen = []

    async def source() -> AsyncIterator[
        str
    ]:  # a generator, because virtual time does not wait for the thread of a list
        yield "of the app"

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], scope["path"]))
        await EventSourceResponse(source())(scope, receive, send)

    app = SSEMiddleware(inner, {"/ours": idle}, retry=77)
    async with open_stream(app, "/theirs") as stream:
        assert await read_to_end(stream) == b": stream opened\nretry: 77\n\ndata: of the app\n\n"
    async with open_stream(app, "/ours") as stream:
        assert (await stream.receive()).data == "first"
    assert seen == [("http", "/theirs")]
    assert app.registry.statistics().opened == 2


def test_middleware_refuses_bad_arguments() -> None:
    with pytest.raises(TypeError, match="app must be an ASGI app"):
        SSEMiddleware({"/": idle})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unknown option 'pong'"):
        SSEMiddleware(raises, pong=5)  # type: ignore[call-arg]


async def test_drain_refuses_a_negative_timeout() -> None:
    with pytest.raises(ValueError, match="timeout must be at least 0 or None, got -1"):
        await StreamRegistry().drain(-1)


# What an endpoint sees of a drain


async def test_request_during_a_shutdown_sees_draining_at_once(handled: list[int]) -> None:
    seen = []

    async def looks(request: Request) -> AsyncIterator[str]:
        seen.append(bool(request.draining))
        yield "x"

    app = create_app({"/": looks, "/idle": idle})
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
        signal.raise_signal(signal.SIGTERM)
        await read_to_end(stream)

    def endpoint(request: Request) -> Any:
        seen.append(bool(request.draining))
        return idle()

    app = create_app({"/": endpoint}, registry=app.registry)
    async with open_stream(app) as stream:
        assert b"data" not in await read_to_end(stream)
    assert seen == [True]
    assert handled


async def test_shutdown_shortens_a_running_drain(handled: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")

    async def long_farewell(request: Request) -> AsyncIterator[str]:
        yield "first"
        await request.draining.wait()
        await anyio.sleep(100)

    app = create_app({"/": long_farewell}, registry=StreamRegistry(drain_timeout=1))
    async with open_stream(app) as stream, anyio.create_task_group() as tasks:
        await stream.receive()
        tasks.start_soon(app.registry.drain, 60)
        await anyio.sleep(0.5)
        began = anyio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await read_to_end(stream)
        assert stream.complete
        assert 1 <= anyio.current_time() - began < 1.2
    (line,) = [record.getMessage() for record in caplog.records if "drained" in record.getMessage()]
    assert line.startswith("drained 1 stream (drain()): ")
    assert handled


def test_streams_of_a_closed_event_loop_do_not_delay_a_drain() -> None:
    registry = StreamRegistry()
    reasons: list[str | None] = []
    registry.when_ended(lambda stream: reasons.append(stream.reason))
    loop = asyncio.new_event_loop()
    stream = open_stream(EventSourceResponse(idle(), registry=registry))
    opened = loop.run_until_complete(stream.__aenter__())
    loop.run_until_complete(opened.receive())  # or Python 3.11 warns about a send that was never awaited
    tasks = asyncio.all_tasks(loop)
    loop.close()
    assert len(registry) == 1
    assert anyio.run(registry.drain, 60.0).seconds < 30
    assert len(registry) == 0
    assert reasons == list(registry.statistics().closed) == ["disconnected"]
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    del registry, stream, opened, tasks, task
    gc.collect()  # pytest fails if this warns


async def test_closing_a_waiting_request_ends_its_source() -> None:
    """The coroutine is closed with GeneratorExit, so it cannot await anything more."""
    begun, ended = anyio.Event(), anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            begun.set()
            await anyio.sleep_forever()
            yield "never"
        finally:
            ended.set()

    class Never:
        def __await__(self) -> Any:
            yield

    async def receive() -> Any:
        await Never()

    async def send(message: Any) -> None:
        pass

    registry = StreamRegistry()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    request: Any = EventSourceResponse(source(), registry=registry)(scope, receive, send)
    request.send(None)  # runs until the request waits for its client to disconnect
    assert len(registry) == 1
    await begun.wait()
    request.close()
    await ended.wait()
    assert len(registry) == 0
    assert registry.statistics().closed == {"disconnected": 1}


async def test_drain_deadline_ends_a_longer_clean_up() -> None:
    """The deadline of the drain holds even if ``cleanup_timeout`` allows more."""

    async def slow() -> AsyncIterator[str]:
        try:
            yield "first"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(100)

    registry = StreamRegistry(drain_timeout=3)
    async with open_stream(EventSourceResponse(slow(), registry=registry, cleanup_timeout=50)) as stream:
        await stream.receive()
        report = await registry.drain()
        assert b"retry: " in await read_to_end(stream)
        assert stream.complete
    assert 3 <= report.seconds < 3.3
    assert report.cancelled == 1


def test_import_sets_no_signal_handler() -> None:
    code = "import signal; b = [signal.getsignal(s) for s in signal.valid_signals()]; import asgi_sse; "
    code += "assert b == [signal.getsignal(s) for s in signal.valid_signals()]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
