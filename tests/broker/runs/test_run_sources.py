"""The sources of runs: their types, their ends, and the final event."""

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from run_clients import app_of, data_of, words, words_and_end

from asgi_sse import Broker, Run
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


# Sources


async def test_iterable_runs_in_a_thread() -> None:
    broker = Broker()
    threads: list[threading.Thread] = []

    def blocking() -> Iterator[dict[str, str]]:
        threads.append(threading.current_thread())
        yield {"event": "part", "data": "1"}
        yield {"event": "part", "data": "2"}

    run = await broker.run("chat", blocking())
    assert [(event.event, event.data) async for event in run.subscribe()] == [
        ("part", "1"),
        ("part", "2"),
        ("end", '{"reason":"finished"}'),
    ]
    assert threads != [threading.current_thread()]
    run = await broker.run("list", ["a", "b"])
    assert await run.wait() == "finished"


@pytest.mark.parametrize("has_next", [True, False])
async def test_source_iterator_needs_only_anext(has_next: bool) -> None:
    class Words:
        left = 2

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return "word"

    class Source:
        def __aiter__(self) -> Any:
            return Words() if has_next else object()

    run = await Broker().run("chat", Source())
    assert await run.wait() == ("finished" if has_next else "failed")
    assert has_next or isinstance(run.error, AttributeError)


@pytest.mark.parametrize("source", ["publishes", "raises"])
async def test_source_is_iterated_without_the_lock(source: str) -> None:
    broker = Broker()

    class Source:
        def __aiter__(self) -> AsyncIterator[str]:
            if source == "raises":
                raise LookupError
            broker.publish_nowait("other", "x")
            return words()

    if source == "raises":
        with pytest.raises(LookupError):
            await broker.run("chat", Source())
        assert len(broker.runs) == 0
    else:
        assert await (await broker.run("chat", Source())).wait() == "finished"


@pytest.mark.parametrize("catches", [False, True])
async def test_invalid_event_raises_at_the_yield(catches: bool, caplog: pytest.LogCaptureFixture) -> None:
    caught: list[str] = []

    async def source() -> AsyncIterator[Any]:
        yield "word 0"
        for bad in (b"data: x\n\n", {"data": "x", "id": 7}, object()):
            try:
                yield bad
            except ValueError as exc:
                caught.append(str(exc))
                if not catches:
                    raise
        await anyio.sleep(1)

    broker = Broker()
    run = await broker.run("chat", source())
    assert [event.data async for event in run.subscribe()] == words_and_end(1, "finished" if catches else "failed")
    assert len(caught) == (3 if catches else 1)
    assert "an event must be a ServerSentEvent" in caught[0]

    class Plain:
        def __aiter__(self) -> "Plain":
            return self

        async def __anext__(self) -> object:
            return object()

    run = await broker.run("chat", Plain())
    assert await run.wait() == "failed"


async def test_source_that_catches_every_error_yields_to_others() -> None:
    async def source() -> AsyncIterator[Any]:
        while True:
            with suppress(ValueError):
                yield b"bytes"

    broker = Broker()
    run = await broker.run("chat", source())
    await anyio.lowlevel.checkpoint()
    run.cancel()
    assert await run.wait() == "cancelled"


async def test_failing_source_ends_the_run_as_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> AsyncIterator[str]:
        yield "word 0"
        await anyio.lowlevel.checkpoint()
        raise LookupError("no such model")

    broker = Broker()
    run = await broker.run("chat", fails())
    async with open_stream(app_of(broker), "/runs/chat") as stream:
        assert await data_of(stream) == words_and_end(1, "failed")  # clients do not learn what went wrong
    assert run.outcome == "failed"
    assert isinstance(run.error, LookupError)
    assert "the source of run chat raised" in caplog.text
    assert "no such model" in caplog.text


@pytest.mark.parametrize("error", [GeneratorExit, KeyboardInterrupt])
async def test_base_exceptions_of_a_source_fail_the_run(error: type[BaseException]) -> None:
    async def source() -> AsyncIterator[str]:
        yield "word 0"
        raise error

    run = await Broker().run("chat", source())
    assert [event.data async for event in run.subscribe()] == words_and_end(1, "failed")
    assert isinstance(run.error, error)


async def test_source_that_raises_a_cancellation_itself_has_failed() -> None:
    async def source() -> AsyncIterator[str]:
        yield "word 0"
        raise anyio.get_cancelled_exc_class() if sniffed() == "asyncio" else LookupError

    def sniffed() -> str:
        return anyio.get_cancelled_exc_class().__module__.partition(".")[0]

    run = await Broker().run("chat", source())
    assert await run.wait() == "failed"


# Cancellation


@pytest.mark.parametrize("waits", ["for long", "at a yield", "not yet"])
async def test_cancel_ends_a_run_once(waits: str) -> None:
    cleaned: list[str] = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            if waits == "for long":
                await anyio.sleep(3600)
            while True:
                yield "x" * 1000
        finally:
            await anyio.sleep(1)
            cleaned.append("up")

    broker = Broker(history=5)
    run = await broker.run("chat", source())
    if waits != "not yet":
        await anyio.sleep(0.1) if waits == "for long" else await anyio.lowlevel.checkpoint()
    run.cancel()
    run.cancel()
    assert await run.wait() == "cancelled"
    if waits != "not yet":  # otherwise the source may not have begun
        assert cleaned == ["up"]
    events = [event async for event in run.subscribe()]
    assert events[-1].data == '{"reason":"cancelled"}'
    run.cancel()
    assert await run.wait() == "cancelled"


async def test_source_that_swallows_its_cancellation_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def swallows() -> AsyncIterator[str]:
        while True:
            try:
                await anyio.sleep(3600)
            except anyio.get_cancelled_exc_class():
                yield "no"

    broker = Broker()
    run = await broker.run("chat", swallows())
    await anyio.sleep(1)
    run.cancel()
    assert await run.wait() == "cancelled"
    assert [event.data async for event in run.subscribe()] == ['{"reason":"cancelled"}']


async def test_source_whose_clean_up_hangs_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    released = anyio.Event()

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            await anyio.sleep(3600)
        finally:
            with anyio.CancelScope(shield=True):
                await released.wait()

    broker = Broker()
    run = await broker.run("chat", source())
    await anyio.sleep(1)
    began = anyio.current_time()
    run.cancel()
    assert await run.wait() == "cancelled"
    assert anyio.current_time() - began == pytest.approx(10, abs=0.2)
    assert "was not cleaned up within 10 s" in caplog.text
    released.set()
    await anyio.sleep(1)
    assert [event.data async for event in run.subscribe()] == words_and_end(1, "cancelled")


def test_run_of_a_closed_event_loop_can_be_cancelled() -> None:
    broker = Broker()
    runs: list[Run] = []

    async def begin() -> None:
        runs.append(await broker.run("chat", words(1000)))
        await anyio.lowlevel.checkpoint()

    anyio.run(begin)
    runs[0].cancel()
    assert runs[0].outcome == "cancelled"


def test_run_of_a_loop_that_closed_during_the_clean_up_ends() -> None:
    broker = Broker()

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(100)

    async def begin_and_cancel() -> Run:
        run = await broker.run("chat", source())
        await anyio.wait_all_tasks_blocked()
        run.cancel()
        await anyio.wait_all_tasks_blocked()
        return run

    loop = asyncio.new_event_loop()
    run = loop.run_until_complete(begin_and_cancel())
    loop.close()

    async def begin_another() -> None:
        async with broker:
            other = await broker.run("other", words(1, 0))
            assert await other.wait() == "finished"

    anyio.run(begin_another)
    assert run.outcome == "cancelled"


@pytest.mark.parametrize("cancels", [True, False])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_loop_that_ends_during_the_clean_up_lets_it_finish(backend: str, cancels: bool) -> None:
    broker = Broker()
    done: list[str] = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "word 0"
            await anyio.sleep_forever()
        finally:
            for _ in range(20):
                with suppress(anyio.get_cancelled_exc_class()):
                    await anyio.lowlevel.checkpoint()
            done.append("cleaned up")

    async def begin() -> Run:
        run = await broker.run("chat", source(), on_end=lambda outcome, error: f"the end: {outcome}")
        await anyio.wait_all_tasks_blocked()
        if cancels:
            run.cancel()
        return run

    run = anyio.run(begin, backend=backend)

    async def read() -> list[Any]:
        return [event.data async for event in run.subscribe()]

    assert anyio.run(read) == ["word 0", "the end: cancelled"]
    assert (done, run.outcome) == (["cleaned up"], "cancelled")


async def test_cancelled_run_does_not_keep_its_event_loop() -> None:
    broker = Broker()
    runs: list[Run] = []
    loops: list[Any] = []

    async def run_and_cancel() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        runs.append(await broker.run("chat", words(100)))
        await anyio.wait_all_tasks_blocked()
        runs[0].cancel()
        await runs[0].wait()

    thread = threading.Thread(target=asyncio.run, args=(run_and_cancel(),))
    thread.start()
    thread.join()
    gc.collect()
    assert loops[0]() is None


def test_unreferenced_run_is_collected_silently(caplog: pytest.LogCaptureFixture) -> None:
    async def source() -> AsyncIterator[str]:
        yield "x"
        began.set()
        await asyncio.Event().wait()

    async def main() -> None:
        broker = Broker()
        await broker.run("chat", source(), on_end=lambda outcome, error: ends.append(outcome))
        await began.wait()
        del broker
        for _ in range(3):
            gc.collect()
            await asyncio.sleep(0)

    ends: list[str] = []
    began = asyncio.Event()
    asyncio.run(main())
    assert ends == []
    assert {record.name for record in caplog.records} <= {"asyncio"}


# The final event


async def test_on_end_makes_the_final_event() -> None:
    broker = Broker()

    def on_end(outcome: str, error: BaseException | None) -> dict[str, Any]:
        return {"event": "done", "data": f"{outcome} {error}"}

    run = await broker.run("chat", ["a"], on_end=on_end)
    assert [(event.event, event.data) async for event in run.subscribe()][-1] == ("done", "finished None")
    for broken in (lambda outcome, error: 1 / 0, lambda outcome, error: {"data": 1, "id": 2}):
        run = await broker.run("chat", ["a"], on_end=broken)
        assert [event.data async for event in run.subscribe()] == ["a", '{"reason":"finished"}']


async def test_on_end_may_be_async_and_runs_take_no_snapshot() -> None:
    async def on_end(outcome: str, error: BaseException | None) -> str:
        await anyio.sleep(1)
        return f"run {outcome}"

    run = await Broker().run("chat", ["a"], on_end=on_end)
    assert [event.data async for event in run.subscribe()] == ["a", "run finished"]
    run = await Broker().run("chat", ["a"], on_end=lambda outcome, error: anyio.sleep(10_000))
    assert [event.data async for event in run.subscribe()] == ["a", '{"reason":"finished"}']
    with pytest.raises(TypeError, match=r"snapshot must be None, got .*; run chat is read from its first event on"):
        run.subscribe(snapshot=lambda: "x")


async def test_source_is_released_while_on_end_runs() -> None:
    class Source:
        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> str:
            raise StopAsyncIteration

    async def on_end(outcome: str, error: BaseException | None) -> str:
        await anyio.sleep(1)
        gc.collect()
        kept.append(reference())
        return "end"

    kept: list[object] = []
    source = Source()
    reference = weakref.ref(source)
    run = await Broker().run("chat", source, on_end=on_end)
    del source
    assert await run.wait() == "finished"
    assert kept == [None]
