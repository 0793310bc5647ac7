"""The shutdown of the drop-in for sse-starlette: grace periods and `AppStatus`."""

import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from drop_in_sources import forever, read_to_end

import asgi_sse
from asgi_sse import SSEMiddleware, StreamRegistry
from asgi_sse.adapters.sse_starlette import AppStatus, EventSourceResponse
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def reset_app_status() -> Iterator[None]:
    yield
    AppStatus.should_exit = False
    AppStatus.original_handler = None
    AppStatus.enable_automatic_graceful_drain_mode()


async def ends_by_itself(event: anyio.Event, seen: list[str]) -> AsyncIterator[str]:
    try:
        yield "first"
        await event.wait()
        yield "bye"
    except BaseException:
        seen.append("cut short")
        raise


async def test_source_may_end_by_itself_in_its_grace_period() -> None:
    event, registry = anyio.Event(), StreamRegistry()
    seen: list[str] = []
    response = EventSourceResponse(ends_by_itself(event, seen), shutdown_event=event, shutdown_grace_period=5)
    async with open_stream(SSEMiddleware(response, registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        body = await read_to_end(stream)
    assert body.startswith(b"data: bye\r\n\r\nretry: ")
    assert seen == []


@pytest.mark.parametrize(("grace", "within"), [(0.0, 0.0), (3.0, 3.0), (30.0, 30.0)])
async def test_grace_period_does_not_depend_on_the_drain_timeout(grace: float, within: float) -> None:
    event, registry = anyio.Event(), StreamRegistry(drain_timeout=10)
    response = EventSourceResponse(forever(), ping=0, shutdown_event=event, shutdown_grace_period=grace)
    async with open_stream(SSEMiddleware(response, registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        began = anyio.current_time()
        body = await read_to_end(stream)
        assert anyio.current_time() - began == pytest.approx(within, abs=0.2)
        assert body.startswith(b"retry: ")
        assert event.is_set()


async def test_should_exit_ends_running_and_new_streams_until_reset() -> None:
    registry = StreamRegistry()
    async with (
        open_stream(EventSourceResponse(forever())) as one,
        open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as other,
        open_stream(asgi_sse.EventSourceResponse(forever())) as plain,
    ):
        for stream in (one, other, plain):
            await stream.receive()
        assert not AppStatus.should_exit
        AppStatus.should_exit = True
        assert AppStatus.should_exit
        for stream in (one, other):
            assert (await read_to_end(stream)).startswith(b"retry: ")
        async with open_stream(EventSourceResponse(forever())) as late:
            assert b"retry: " in await read_to_end(late)
        AppStatus.should_exit = False
        async with open_stream(EventSourceResponse(forever())) as later:
            await later.receive()
            with pytest.raises(TimeoutError):
                await later.read(timeout=5)


@pytest.mark.real_time  # virtual time passes every timeout while a thread starts
async def test_should_exit_may_be_set_from_another_thread() -> None:
    async with open_stream(EventSourceResponse(forever())) as stream:
        await stream.read(10)
        thread = threading.Thread(target=setattr, args=(AppStatus, "should_exit", True))
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        await read_to_end(stream)


async def test_should_exit_is_true_while_a_server_stops() -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as stream:
        await stream.read()
        assert not AppStatus.should_exit
        registry.begin_drain()
        assert AppStatus.should_exit
        await read_to_end(stream)
    assert not AppStatus.should_exit  # so it does not stop a later server in this process


async def test_without_automatic_drain_only_should_exit_ends_a_stream() -> None:
    AppStatus.disable_automatic_graceful_drain()
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(EventSourceResponse(forever()), registry=registry)) as stream:
        await stream.read()
        registry.begin_drain()
        AppStatus.handle_exit()
        with pytest.raises(TimeoutError):
            await stream.read(timeout=5)
        AppStatus.should_exit = True
        await read_to_end(stream)


def test_handle_exit_calls_the_original_handler() -> None:
    seen: list[Any] = []
    AppStatus.original_handler = lambda *args: seen.append(args)
    AppStatus.handle_exit(15, None)
    assert seen == [(15, None)]
    assert AppStatus.should_exit
