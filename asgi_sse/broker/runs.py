"""`Runs`: the runs of a broker, how many there may be, and when each of them ends or is forgotten."""

from __future__ import annotations

import heapq
import math
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import anyio

from ..errors import BrokerError
from .hub import clock
from .run import Outcome, Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator

    from .._eventloop import EventLoop
    from .broker import Broker
    from .hub import Hub
    from .subscription import Subscription

_CLOSING: Final = 11.0
"""Seconds that runs which were told to stop have to come to their end: their clean-up, and being left behind."""


class _Alarms:
    """Deadlines of many runs, with one timer of their event loop at a time: none of those can be cancelled."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._next = math.inf

    def set(self, seconds: float, call: Callable[[], None]) -> None:
        """Call in so many seconds. Called in the event loop."""
        heapq.heappush(self._calls, (self._loop.time() + seconds, next(self._numbers), call))
        self._set_timer()

    def _set_timer(self) -> None:
        if self._calls and self._calls[0][0] < self._next:
            self._next = self._calls[0][0]
            self._loop.call_at(self._next, partial(self._ring, self._next))

    def _ring(self, when: float) -> None:
        if when == self._next:
            self._next = math.inf
        try:
            while self._calls and self._calls[0][0] <= max(when, self._loop.time()):
                heapq.heappop(self._calls)[2]()
        finally:
            self._set_timer()


class Runs(Mapping[str, Run]):
    """The runs by name: those that go on, and those that ended less than their ``ttl`` ago."""

    def __init__(self, hub: Hub, max_runs: int) -> None:
        self._hub = hub
        self._max_runs = max_runs
        self._lock = threading.Lock()
        self._all: dict[str, Run] = {}
        self._over: dict[str, None] = {}  # those that have ended, the first one first
        self._alarms: dict[EventLoop, _Alarms] = {}
        self._closed = False

    def __getitem__(self, name: str) -> Run:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all))

    def __len__(self) -> int:
        return len(self._all)

    def begin(
        self,
        broker: Broker,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        *,
        subscription: Callable[..., Subscription],
        pace: Callable[[], Awaitable[None]],
        ttl: float,
        max_lifetime: float | None,
        max_bytes: int,
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
    ) -> Run:
        """Begin one.

        Raises:
            BrokerError: One of that name goes on, there are as many as there may be, or the broker is closed.
        """
        self._end_those_of_closed_loops()
        ended = partial(self._ended, ttl)
        run = Run(broker, self._hub, name, source, subscription=subscription, pace=pace, on_end=on_end, ended=ended)
        with self._lock:
            if self._closed:
                raise BrokerError("the broker is closed: begin runs while its server serves")
            known = self._all.get(name)
            if known is not None and known.outcome is None:
                raise BrokerError(f"run {name} goes on: read it by runs[{name!r}], or cancel it and wait for its end")
            if len(self._all) - len(self._over) >= self._max_runs:
                raise BrokerError(f"{self._max_runs} runs go on, the most there may be (max_runs)")
            with self._hub.lock:
                self._hub.log.keep(name, max_bytes)
                run.start = self._hub.log.tail
            self._all[name] = run
            self._over.pop(name, None)
        run.begin()
        if max_lifetime is not None:
            self._alarms_of(run.loop).set(max_lifetime, partial(_stop, weakref.ref(run), "expired"))
        return run

    def reopen(self) -> None:
        """New ones may begin."""
        self._closed = False

    def begin_close(self, grace: float) -> None:
        """End those that still go on in so many seconds, or as they were told before. From any thread."""
        for run in self._running():
            if run.told_at is None:
                run.told_at = clock()
            run.loop.call_threadsafe(partial(self._stop_in, grace, run))

    async def close(self, grace: float) -> None:
        """Wait so many seconds for those that go on, from when they were told, then end them; no new one may begin."""
        self._closed = True
        self._end_those_of_closed_loops()
        running = self._running()
        told = max((clock() if run.told_at is None else run.told_at for run in running), default=0.0)
        try:
            with anyio.move_on_after(max(0.0, told + grace - clock())):
                for run in running:
                    await run.wait()
        finally:
            for run in running:
                if run.outcome is None:
                    run.stop("drained")
        with anyio.move_on_after(_CLOSING):
            for run in running:
                await run.wait()

    def _running(self) -> list[Run]:
        return [run for run in list(self._all.values()) if run.outcome is None]

    def _stop_in(self, seconds: float, run: Run) -> None:
        self._alarms_of(run.loop).set(seconds, partial(_stop, weakref.ref(run), "drained"))

    def _alarms_of(self, loop: EventLoop) -> _Alarms:
        alarms = self._alarms.get(loop)
        if alarms is None:
            self._alarms = {known: other for known, other in self._alarms.items() if not known.closed}
            alarms = self._alarms[loop] = _Alarms(loop)
        return alarms

    def _ended(self, ttl: float, run: Run) -> None:
        with self._lock:
            if self._all.get(run.name) is run:
                self._over[run.name] = None
                while len(self._over) > self._max_runs:
                    self._release(next(iter(self._over)))
        if not run.loop.closed:
            self._alarms_of(run.loop).set(ttl, partial(_forget, weakref.ref(self), weakref.ref(run)))

    def forget(self, run: Run) -> None:
        """Its time is over."""
        with self._lock:
            if self._all.get(run.name) is run and run.name in self._over:
                self._release(run.name)

    def _release(self, name: str) -> None:
        del self._over[name], self._all[name]
        with self._hub.lock:
            self._hub.log.release(name)

    def _end_those_of_closed_loops(self) -> None:
        for loop in {run.loop for run in list(self._all.values())}:
            if loop.closed:
                for run in list(self._all.values()):
                    if run.loop is loop:
                        if run.outcome is None:
                            run.stop("cancelled")
                        self.forget(run)


def _stop(run: weakref.ref[Run], outcome: Outcome) -> None:
    alive = run()
    if alive is not None:
        alive.stop(outcome)


def _forget(runs: weakref.ref[Runs], run: weakref.ref[Run]) -> None:
    keeper, ended = runs(), run()
    if keeper is not None and ended is not None:
        keeper.forget(ended)
