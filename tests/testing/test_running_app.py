"""`running`: start-up, requests, stop and shutdown of an app."""

from collections.abc import AsyncIterator
from contextlib import nullcontext
from itertools import count
from typing import Any

import anyio
import pytest
from adapter_apps import APPS
from testing_apps import START, make_app

from asgi_sse import Broker, EventSourceResponse, Request, ServerSentEvent, SSEMiddleware, create_app
from asgi_sse.testing import open_stream, running

on_both = pytest.mark.anyio


@on_both
async def test_stop_ends_open_streams() -> None:
    app = make_app()
    async with running(app) as server, open_stream(server, "/ticks") as stream:
        await stream.expect()
        await server.stop()
        await stream.expect_end()
        assert stream.retry is not None
        assert 1000 <= stream.retry <= 5000
        await server.stop()
        with pytest.raises(RuntimeError, match="/three: this server has stopped"):
            async with open_stream(server, "/three"):
                pass
    assert app.registry.statistics().closed == {"drained": 1}
    async with running(app) as server, open_stream(server, "/ticks") as stream:
        await stream.expect()


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """An app without a middleware and without lifespan support."""
    assert scope["type"] == "http"

    async def source() -> AsyncIterator[ServerSentEvent]:
        for number in count(1):
            yield ServerSentEvent(number, id=number)
            await anyio.sleep(1)

    await EventSourceResponse(source())(scope, receive, send)


@on_both
@pytest.mark.parametrize("app", [bare, make_app()], ids=["bare", "middleware"])
async def test_servers_in_one_loop_do_not_end_each_others_streams(app: Any) -> None:
    async with running(app) as one, running(app) as other:
        async with open_stream(one, "/ticks") as ending, open_stream(other, "/ticks") as stream:
            await ending.expect()
            await stream.expect()
            began = anyio.current_time()
            await one.stop()
            assert anyio.current_time() - began < 0.5
            await ending.expect_end()
            await stream.expect(id=2, timeout=2)
        async with open_stream(other, "/ticks") as stream:
            await stream.expect()


@on_both
async def test_stop_waits_for_a_source_that_ends_by_itself() -> None:
    async def source(request: Request) -> AsyncIterator[str]:
        yield "first"
        await request.draining.wait()
        await anyio.sleep(3)
        yield "last words"

    async with running(create_app({"/": source})) as server, open_stream(server) as stream:
        await stream.expect("first")
        await server.stop()
        await stream.expect("last words")
        await stream.expect_end()


@on_both
async def test_client_that_does_not_read_during_stop_is_dropped() -> None:
    async def source() -> AsyncIterator[str]:
        while True:
            yield "x"
            await anyio.sleep(0.1)

    dropped = "200 returned, dropped while it had as many unread messages as capacity=4 allows>"
    for capacity in (4, 1000):
        app = create_app({"/": source})
        async with running(app) as server, open_stream(server, capacity=capacity) as stream:
            await stream.expect("x")
            await anyio.sleep(2)
            await server.stop()
            if capacity == 4:
                with pytest.raises(AssertionError, match=f"4 of 100 events came: .*{dropped}"):
                    await stream.collect(100)
            else:
                assert {event.data async for event in stream} == {"x"}
                assert stream.complete


@on_both
async def test_stop_fails_for_a_response_that_goes_on() -> None:
    async def foreign(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        await send(START)
        await receive()
        await receive()

    with pytest.raises(AssertionError, match=r"GET /foreign: still running 0.2 s after .* A deploy hangs here"):
        async with running(foreign) as server, open_stream(server, "/foreign"):
            await server.stop(timeout=0.2)
    async with running(SSEMiddleware(foreign)) as server, open_stream(server, "/foreign") as stream:
        await server.stop()
        await stream.expect_end()


async def state_events(state: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield what the request finds in the state. Not a list, which a thread would read: virtual time does not wait."""
    yield state["pool"]
    yield len(state)


def with_lifespan(*, startup: Any = None, shutdown: Any = None, answer: str = "complete") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await EventSourceResponse(state_events(scope["state"]))(scope, receive, send)
            scope["state"]["mine"] = True
            return
        scope["state"]["pool"] = "open"
        for phase, error in (("startup", startup), ("shutdown", shutdown)):
            await receive()
            if error is not None and answer == "complete":
                raise error
            await send({"type": f"lifespan.{phase}.{'complete' if error is None else answer}", "message": "no pool"})
            if error is not None:
                raise error

    return app


@on_both
async def test_each_request_gets_a_copy_of_the_state() -> None:
    async with running(with_lifespan()) as server:
        assert server.state == {"pool": "open"}
        for _ in range(2):
            async with open_stream(server) as stream:
                await stream.expect("open")
                await stream.expect("1")
        async with open_stream(server, scope={"state": {"more": 1}}) as stream:
            await stream.expect("open")
            await stream.expect("2")


@on_both
@pytest.mark.parametrize("answer", ["complete", "failed"])
@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_failed_lifespan_is_raised(phase: str, answer: str) -> None:
    entered = []
    errors: dict[str, Any] = {phase: ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        async with running(with_lifespan(answer=answer, **errors)):
            entered.append(True)
    assert bool(entered) == (phase == "shutdown")


@on_both
async def test_failed_startup_without_an_exception_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no pool"})

    with pytest.raises(RuntimeError, match="the startup failed: no pool"):
        async with running(app):
            pass


@on_both
@pytest.mark.parametrize("phase", ["startup", "shutdown"])
async def test_hanging_lifespan_times_out(phase: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == f"lifespan.{phase}":
                await anyio.sleep_forever()
            await send({"type": f"{message['type']}.complete"})

    with pytest.raises(TimeoutError, match=r"has not completed within 0.05 s"):
        async with running(app, timeout=0.05):
            pass


@on_both
async def test_error_of_the_test_comes_before_that_of_the_shutdown() -> None:
    with pytest.raises(LookupError) as caught:
        async with running(with_lifespan(shutdown=ZeroDivisionError("pool"))):
            raise LookupError
    assert caught.value.__notes__ == ["While stopping the app: ZeroDivisionError: pool"]


@on_both
@pytest.mark.parametrize(
    ("way", "expected"), [("cancelled", None), ("late", TimeoutError), ("failed", RuntimeError), ("complete", None)]
)
async def test_lifespan_task_ends_with_the_block(way: str, expected: type[Exception] | None) -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await receive()
            if way == "failed":
                await send({"type": "lifespan.startup.failed", "message": "no"})
            if way == "complete":
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await send({"type": "lifespan.shutdown.complete"})
            await anyio.sleep_forever()
        finally:
            ended.append(way)

    with anyio.move_on_after(0.1 if way == "cancelled" else float("inf")):
        with pytest.raises(expected) if expected else nullcontext():
            async with running(app, timeout=0.05 if way == "late" else 15):
                assert way == "complete"
    assert ended == [way]


@on_both
async def test_stop_ends_runs_of_a_broker() -> None:
    broker = Broker()

    async def answers() -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep_forever()

    async def ask() -> Any:
        return await broker.run("answer", answers(), join=True)

    async with running(create_app({"/ask": ask}, broker=broker)) as server, open_stream(server, "/ask") as stream:
        await stream.expect("first")
        await server.stop(timeout=20)
        await stream.expect({"reason": "drained"}, event="end")
        await stream.expect_end()


@on_both
@pytest.mark.parametrize("framework", ["starlette", "fastapi", "django", "quart", "litestar"])
async def test_stop_ends_streams_of_each_framework(framework: str, anyio_backend_name: str) -> None:
    if framework in ("quart", "django") and anyio_backend_name == "trio":
        pytest.skip(f"{framework} runs on asyncio alone")
    async with running(APPS[framework]()) as server, open_stream(server, "/async") as stream:
        await stream.expect("0", id=0)
        await stream.expect("1", id=1)
        await server.stop()
        assert [event async for event in stream] == []
        assert stream.complete
        assert stream.retry is not None
