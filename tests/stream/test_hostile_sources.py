"""Sources that misbehave: each ends once, with its reason, in time, on asyncio and trio.

The parameters state what is promised. Each test prints what happened, for ``pytest -rP``.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from asgi_sse import EventSourceResponse, InvalidEventError, StreamRegistry
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio

CLEANUP_TIMEOUT = 1.0
LAST_CALL = 0.1  # what is added where a source ignores its second cancellation too


@dataclass
class Log:
    """What a source has seen."""

    finals: int = 0
    seen: list[str] = field(default_factory=list)
    stop: bool = False


Source = Callable[[Log], AsyncIterator[Any]]


async def awaits_in_finally(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        for _ in range(5):
            await anyio.sleep(0.1)
        log.finals += 1


async def holds_a_scope_across_yields(log: Log) -> AsyncIterator[Any]:
    try:
        with anyio.CancelScope():
            yield "first"
            await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def holds_a_task_group_across_yields(log: Log) -> AsyncIterator[Any]:
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield "first"
            await anyio.sleep_forever()
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def waits_for_its_task_group(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def holds_an_asyncio_timeout_across_yields(log: Log) -> AsyncIterator[Any]:
    try:
        async with asyncio.timeout(3600):
            yield "first"
            await asyncio.sleep(3600)
    finally:
        await asyncio.sleep(0.5)
        log.finals += 1


async def swallows_once_and_waits(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        log.seen.append("swallowed")
        await anyio.sleep_forever()
    finally:
        log.finals += 1


async def swallows_once_and_yields(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        with suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        while True:
            yield "more"
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def swallows_for_ever(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        while not log.stop:
            with suppress(BaseException):
                await anyio.sleep(0.3)
    finally:
        log.finals += 1


async def never_waits(log: Log) -> AsyncIterator[Any]:
    try:
        while True:
            yield "first"
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def never_waits_and_swallows(log: Log) -> AsyncIterator[Any]:
    try:
        while True:
            with suppress(anyio.get_cancelled_exc_class()):
                yield "first"
    finally:
        log.finals += 1


async def raises_in_finally(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        await anyio.sleep_forever()
    finally:
        log.finals += 1
        raise LookupError("in finally")


async def raises_between_yields(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        await anyio.sleep(0.2)
        raise LookupError("between")
    finally:
        await anyio.sleep(0.5)
        log.finals += 1


async def raises_a_group(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        raise ExceptionGroup("several", [LookupError("one"), ValueError("two")])
    finally:
        log.finals += 1


async def raises_generator_exit(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        raise GeneratorExit
    finally:
        log.finals += 1


async def is_cancelled_by_what_it_awaits(log: Log) -> AsyncIterator[Any]:
    try:
        yield "first"
        task = asyncio.ensure_future(asyncio.sleep(3600))
        task.cancel()
        await task
    finally:
        log.finals += 1


@pytest.mark.parametrize(
    ("source", "finals", "reason", "seconds", "error"),
    [
        (awaits_in_finally, 1, "disconnected", 0.5, None),
        (holds_a_scope_across_yields, 1, "disconnected", 0.5, None),
        (holds_a_task_group_across_yields, 1, "disconnected", 0.5, None),
        (waits_for_its_task_group, 1, "disconnected", 0.5, None),
        (holds_an_asyncio_timeout_across_yields, 1, "disconnected", 0.5, None),
        (swallows_once_and_waits, 1, "disconnected", CLEANUP_TIMEOUT, None),
        (swallows_once_and_yields, 1, "disconnected", 0.5, None),
        (swallows_for_ever, 0, "disconnected", CLEANUP_TIMEOUT + LAST_CALL, None),
        (never_waits, 1, "disconnected", 0.5, None),
        (never_waits_and_swallows, 1, "disconnected", 0, None),
        (raises_in_finally, 1, "disconnected", 0, LookupError),
        (raises_between_yields, 1, "failed", 0.7, LookupError),
        (raises_a_group, 1, "failed", 0, ExceptionGroup),
        (raises_generator_exit, 1, "failed", 0, GeneratorExit),
        (is_cancelled_by_what_it_awaits, 1, "failed", 0, asyncio.CancelledError),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_hostile_source_ends_once_and_in_time(
    source: Source,
    finals: int,
    reason: str,
    seconds: float,
    error: type[BaseException] | None,
    anyio_backend_name: str,
    request: pytest.FixtureRequest,
) -> None:
    if "asyncio" in source.__code__.co_names and anyio_backend_name == "trio":
        pytest.skip("it uses asyncio itself")
    log, reasons, registry = Log(), list[str](), StreamRegistry()
    raised: BaseException | None = None
    generator: Any = None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal raised
        nonlocal generator
        generator = source(log)
        response = EventSourceResponse(
            generator, registry=registry, on_close=reasons.append, cleanup_timeout=CLEANUP_TIMEOUT
        )
        try:
            await response(scope, receive, send)
        except BaseException as exc:
            raised = exc

    async with open_stream(app) as stream:
        assert (await stream.receive()).data == "first"
        began = anyio.current_time()
        if reason == "disconnected":
            await stream.disconnect()
        else:
            while await stream.read(timeout=5):
                pass
            assert not stream.complete
        took = anyio.current_time() - began
    outcome = "left behind" if registry.statistics().abandoned else f"finally {log.finals} x"
    backend = request.node.callspec.params["anyio_backend"]
    print(f"{source.__name__:40} {backend:14} {outcome:12} {','.join(reasons):12} {took:5.2f} s")
    assert (log.finals, reasons) == (finals, [reason])
    assert seconds <= took < seconds + 0.05
    assert raised is None if error is None else type(raised) is error
    assert len(registry) == 0
    log.stop = True
    while registry.statistics().abandoned:
        await anyio.sleep(0.1)
    await generator.aclose()
    assert log.finals == 1  # what was abandoned has come to its end as well, and once


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_source_that_ignores_generator_exit_raises() -> None:
    """Python gives up on it, and the author gets the error."""
    ignore = True

    async def source() -> AsyncIterator[str]:
        while ignore:
            with suppress(GeneratorExit, anyio.get_cancelled_exc_class()):
                yield "first"

    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        async with open_stream(EventSourceResponse(source())) as stream:
            await stream.receive()
            await stream.disconnect()
    ignore = False
    gc.collect()  # Python complains about it once more here


@pytest.mark.parametrize("kind", ["anyio", "asyncio"])
async def test_timeout_of_a_source_fires_at_its_yield(kind: str, anyio_backend_name: str) -> None:
    """While a slow client holds the source at a yield, the source's own timeout goes off: it is told there."""
    if kind == "asyncio" and anyio_backend_name == "trio":
        pytest.skip("it uses asyncio itself")
    seen = []

    async def source() -> AsyncIterator[str]:
        try:
            if kind == "anyio":
                with anyio.fail_after(1):
                    while True:
                        yield "x" * 1000
            else:
                async with asyncio.timeout(1):
                    while True:
                        yield "x" * 1000
        except TimeoutError:
            seen.append(anyio.current_time() - began)
        yield "too slow"

    began = anyio.current_time()
    async with open_stream(EventSourceResponse(source()), capacity=1) as stream:
        await anyio.sleep(3)
        last = [event.data async for event in stream][-1]
        assert last == "too slow"
        assert stream.complete
    assert len(seen) == 1
    assert 1 <= seen[0] < 1.1


async def test_source_that_catches_its_errors_starves_nobody() -> None:
    async def source() -> AsyncIterator[Any]:
        while True:
            with suppress(InvalidEventError):
                yield {"wrong": True}

    async with open_stream(EventSourceResponse(source())) as stream:
        assert b"opened" in await stream.read()
        with anyio.fail_after(5):
            await stream.disconnect()


async def test_stuck_stream_does_not_hold_up_others() -> None:
    async def flood() -> AsyncIterator[str]:
        while True:
            yield "x" * 5000

    async def counts() -> AsyncIterator[int]:
        for number in range(100):
            yield number
            await anyio.sleep(0.01)

    stuck = open_stream(EventSourceResponse(flood(), send_timeout=None), capacity=1)
    async with stuck, open_stream(EventSourceResponse(counts())) as stream:
        assert [event.data async for event in stream] == [str(number) for number in range(100)]


async def test_sources_at_full_speed_share_the_loop() -> None:
    """The run queue: at most a few sources go on in one turn, each for 16 KiB."""
    counts = [0] * 50

    async def flood(number: int) -> AsyncIterator[str]:
        while True:
            counts[number] += 1
            yield "x" * 1000

    async def newcomer() -> AsyncIterator[str]:
        yield "here"

    async with anyio.create_task_group() as tasks:

        async def client(number: int) -> None:
            async with open_stream(EventSourceResponse(flood(number))) as stream:
                while True:
                    await stream.read()

        for number in range(50):
            tasks.start_soon(client, number)
        while min(counts) < 500:
            await anyio.lowlevel.checkpoint()
        assert max(counts) < 2 * min(counts)
        before = sum(counts)
        async with open_stream(EventSourceResponse(newcomer())) as stream:
            assert (await stream.receive()).data == "here"
        # Of 16 events of 1 kB a source: what four of them add in a few turns, not what fifty do.
        assert sum(counts) - before < 25 * 4 * 16
        tasks.cancel_scope.cancel()
