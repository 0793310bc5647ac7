"""`DeadlineQueue` and `LoopLocal`: one timer for many objects, and one value per event loop."""

import logging
import math
from functools import partial
from typing import Any

import anyio
import pytest

from asgi_sse.runtime.base import EventLoop
from asgi_sse.runtime.current import LoopLocal, current_loop
from asgi_sse.runtime.deadlines import DeadlineQueue, current_deadlines

pytestmark = pytest.mark.anyio


class Periodic:
    """An object that is woken every `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.ticks: list[float] = []
        self.check_at = math.inf
        self.deadline_entry: list[Any] = []
        self.log_fields = {"sse_path": "/periodic"}

    def tick(self) -> float:
        self.ticks.append(current_loop().time())
        if self.interval == 0:
            raise ValueError("no interval")
        return self.ticks[-1] + self.interval

    def __repr__(self) -> str:
        return "<Periodic>"


async def test_items_are_woken_when_they_asked() -> None:
    queue = DeadlineQueue(current_loop())
    began = current_loop().time()
    items = [Periodic(interval) for interval in (1, 2, 5)]
    for item in items:
        queue.arm(item, began + item.interval)
    await anyio.sleep(10.5)
    for item in items:
        expected = [item.interval * (number + 1) for number in range(int(10 / item.interval))]
        assert [when - began for when in item.ticks] == pytest.approx(expected, abs=0.01)
        queue.forget(item)
    await anyio.sleep(10)
    assert [len(item.ticks) for item in items] == [10, 5, 2]


async def test_only_an_earlier_time_moves_an_item() -> None:
    queue = DeadlineQueue(current_loop())
    began = current_loop().time()
    item = Periodic(100)
    for seconds in (5, 2, 7):
        queue.arm(item, began + seconds)
    await anyio.sleep(10)
    assert [when - began for when in item.ticks] == pytest.approx([2], abs=0.01)


async def test_callbacks_run_in_order_of_their_time() -> None:
    called: list[int] = []
    for seconds in (3, 1, 2):
        current_deadlines().call_later(seconds, partial(called.append, seconds))
    await anyio.sleep(2.5)
    assert called == [1, 2]
    await anyio.sleep(1)
    assert called == [1, 2, 3]


async def test_an_exception_is_logged_and_other_deadlines_remain(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("no use")

    queue = DeadlineQueue(current_loop())
    called: list[str] = []
    failing = Periodic(0)
    queue.arm(failing, current_loop().time() + 1)
    queue.call_later(1, fail, sse_run="job")
    queue.call_later(1, lambda: called.append("next"))
    queue.call_later(2, lambda: called.append("later"))
    await anyio.sleep(3)
    assert called == ["next", "later"]
    assert len(failing.ticks) == 1
    first, second = [record for record in caplog.records if record.name == "asgi_sse.runtime.deadlines"]
    assert first.getMessage() == "<Periodic> raised at its deadline and will not be woken again"
    assert vars(first)["sse_path"] == "/periodic"
    assert vars(second)["sse_run"] == "job"
    assert first.levelno == second.levelno == logging.ERROR
    assert second.exc_info is not None


def test_loop_local_has_one_value_per_event_loop() -> None:
    made: list[EventLoop] = []

    def make(loop: EventLoop) -> object:
        made.append(loop)
        return object()

    local = LoopLocal(make)

    async def twice() -> tuple[object, object]:
        return local.get(), local.of(current_loop())

    values: set[object] = set()
    for backend in ("asyncio", "trio", "asyncio", "trio"):
        first, second = anyio.run(twice, backend=backend)
        assert first is second
        values.add(first)
    assert len(values) == len(made) == 4
    with pytest.raises(RuntimeError):
        local.get()
