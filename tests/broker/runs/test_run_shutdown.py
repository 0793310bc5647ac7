"""Runs when a server drains or their broker closes."""

from typing import Any

import anyio
import pytest
from run_clients import app_of, data_of, words, words_and_end

from asgi_sse import Broker, BrokerError, SSEMiddleware, StreamRegistry, create_app
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


# Drains


async def test_drain_gives_a_run_time_to_end() -> None:
    broker, registry = Broker(), StreamRegistry(drain_timeout=10)
    await broker.run("chat", words(5))
    async with open_stream(app_of(broker, registry=registry), "/runs/chat") as stream:
        assert (await stream.receive()).data == "word 0"
        registry.begin_drain()
        assert await data_of(stream) == words_and_end(5)[1:]
        assert 1000 <= (stream.retry or 0) <= 5000


async def test_drain_ends_the_stream_of_a_run_but_not_the_run() -> None:
    broker, registry = Broker(), StreamRegistry(drain_timeout=3)
    run = await broker.run("chat", words(20))
    async with open_stream(app_of(broker, registry=registry), "/runs/chat") as stream:
        report = await registry.drain()
        seen = await data_of(stream)
        assert seen == words_and_end(20)[: len(seen)]
        assert 3 <= len(seen) <= 5
    assert report.abandoned == 0
    assert run.outcome is None  # another server of this process may have clients of the run
    run.cancel()
    await run.wait()


@pytest.mark.parametrize(("grace", "words_seen"), [(2.5, 4), (100, 13)])
async def test_drain_ends_the_runs_of_its_broker_before_their_streams(grace: float, words_seen: int) -> None:
    broker, registry = Broker(run_grace=grace), StreamRegistry(drain_timeout=10)
    run = await broker.run("chat", words(100, 0.7))
    app = create_app({"/chat": broker.channel("chat")}, registry=registry, broker=broker)
    async with open_stream(app, "/chat") as stream:
        registry.begin_drain()
        registry.begin_drain()
        assert await data_of(stream) == words_and_end(words_seen, "drained")
    assert run.outcome == "drained"


async def test_second_drain_ends_new_runs() -> None:
    broker = Broker(run_grace=1)
    for _ in range(2):
        registry = StreamRegistry()
        app = create_app({"/chat": broker.channel("chat")}, registry=registry, broker=broker)
        await broker.run("chat", words(100, 0.3))
        async with open_stream(app, "/chat") as stream:
            registry.begin_drain()
            assert (await data_of(stream))[-1] == '{"reason":"drained"}'


# Closing


async def test_close_gives_runs_their_grace() -> None:
    async with Broker(run_grace=3.5) as broker:
        short = await broker.run("short", words(3))
        long = await broker.run("long", words(300))
        began = anyio.current_time()
    assert anyio.current_time() - began == pytest.approx(3.5, abs=0.1)
    assert (short.outcome, long.outcome) == ("finished", "drained")
    assert [event.data async for event in long.subscribe()] == words_and_end(4, "drained")


async def test_loop_reads_a_run_to_its_end_while_the_broker_closes() -> None:
    async with anyio.create_task_group() as tasks, Broker(run_grace=20) as broker:
        run = await broker.run("chat", words(5))
        seen: list[Any] = []

        async def read() -> None:
            seen.extend([event.data async for event in run.subscribe()])

        tasks.start_soon(read)
        await anyio.sleep(0.5)
    assert seen == words_and_end(5)


async def test_servers_that_come_and_go_do_not_close_a_shared_broker() -> None:
    async with Broker(run_grace=0) as broker:
        run = await broker.run("chat", words(5))
        for name in ("one", "other"):
            await broker.open(name)
            broker.begin_close(10, name)
            broker.begin_close(10, "never opened it")
            await broker.close(name)
        await anyio.sleep(1)
        assert run.outcome is None
    assert run.outcome == "drained"


async def test_drain_of_one_server_does_not_close_a_shared_broker() -> None:
    broker, registry = Broker(run_grace=0), StreamRegistry()
    create_app({}, registry=registry, broker=broker)
    async with broker:
        async with broker:
            run = await broker.run("chat", words(5))
            registry.begin_drain()
        await anyio.sleep(2)
        assert run.outcome is None
    assert run.outcome == "drained"


async def test_closed_broker_begins_no_run() -> None:
    async with Broker() as broker:
        pass
    with pytest.raises(BrokerError, match="the broker is closed; begin runs while the broker is open"):
        await broker.run("chat", words())
    async with broker:
        await (await broker.run("chat", words())).wait()


# Apps


async def test_app_shutdown_closes_the_broker() -> None:
    broker = Broker(run_grace=1)
    app = create_app({"/chat": broker.channel("chat")}, broker=broker)
    messages: list[dict[str, Any]] = []
    to_app, from_server = anyio.create_memory_object_stream[dict[str, Any]](2)

    async def send(message: Any) -> None:
        messages.append(message)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(app, {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, from_server.receive, send)
        await to_app.send({"type": "lifespan.startup"})
        run = await broker.run("chat", words(100))
        await anyio.sleep(2)
        await to_app.send({"type": "lifespan.shutdown"})
    assert [message["type"] for message in messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert run.outcome == "drained"
    to_app.close()
    from_server.close()


async def test_broker_that_cannot_open_fails_the_startup(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(self: Broker, by: object) -> None:
        raise BrokerError("no answer")

    monkeypatch.setattr(Broker, "open", fails)
    for reports in (False, True):

        async def app(scope: Any, receive: Any, send: Any, reports: bool = reports) -> None:
            if not reports:
                raise RuntimeError("no lifespan")
            try:
                await receive()
            except Exception:
                await send({"type": "lifespan.startup.failed", "message": "a traceback"})
                raise

        messages: list[Any] = []

        async def receive() -> Any:
            return {"type": "lifespan.startup"}

        async def send(message: Any, messages: list[Any] = messages) -> None:
            messages.append(message)

        with pytest.raises(BrokerError):
            await SSEMiddleware(app, broker=Broker())({"type": "lifespan"}, receive, send)
        assert messages == [{"type": "lifespan.startup.failed", "message": "BrokerError: no answer"}]


async def test_failed_startup_closes_the_broker() -> None:
    broker = Broker()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await broker.run("chat", words(100))
        raise LookupError

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        pytest.fail("the app has sent nothing, so nothing may be sent for it")

    with pytest.raises(LookupError):
        await SSEMiddleware(app, broker=broker)({"type": "lifespan"}, receive, send)
    assert broker.runs["chat"].outcome == "drained"
