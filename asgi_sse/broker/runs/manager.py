"""`RunManager`: begins, finds and ends the runs of a broker, and forgets them after their ``ttl``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import anyio

from asgi_sse.broker.dispatcher import clock
from asgi_sse.errors import BrokerError
from asgi_sse.runtime.current import current_loop
from asgi_sse.runtime.deadlines import current_deadlines
from asgi_sse.stream.source import iterate

from .publisher import Outcome, RunPublisher, final_event
from .run import Run

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Iterator

    from asgi_sse.broker.backends.base import Backend, RunLease
    from asgi_sse.broker.ring import Entry
    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.runtime.base import Child, EventLoop

logger: Final = logging.getLogger(__name__)

_WATCH_INTERVAL_S: Final = 10.0
"""Seconds between two renewals of the leases of this process, and between two checks of the runs of other processes."""

_END_WAIT_S: Final = 11.0
"""Seconds that `RunManager.close` waits for the runs that it stops. After 10 s of clean-up, they are abandoned."""


class RunManager(Mapping[str, Run]):
    """The runs by name: those that are running, and those that ended within their ``ttl``.

    A run of another process is in it once `find` has found it.

    Args:
        backend: The backend of the broker.
        max_runs: How many runs may be running in this process at once, and how many are kept after their end.
    """

    def __init__(self, backend: Backend, max_runs: int) -> None:
        self._backend = backend
        self._dispatcher = backend.dispatcher
        self._dispatcher.on_end = self._on_end
        self._dispatcher.on_restart = self._on_restart
        backend.on_cancel = self._on_cancel
        self._max_runs = max_runs
        # With the dispatcher's lock held:
        self._all: dict[str, Run] = {}
        self._ended: dict[str, None] = {}  # the names of runs that have ended, the first one first
        self._closed = False
        self._watch: Child | None = None
        self._watch_loop: EventLoop | None = None
        self._restarted: anyio.Event | None = None

    def __getitem__(self, name: str) -> Run:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._all))

    def __len__(self) -> int:
        return len(self._all)

    async def begin(
        self,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        *,
        make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run],
        ttl: float,
        max_lifetime: float | None,
        max_bytes: int,
        join: bool,
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
    ) -> Run:
        """Begin a run; or return the existing one if `join` is true. See `Broker.run`.

        Raises:
            BrokerError: A run of this name is running, `max_runs` are running, or the broker is closed.
        """
        self._end_those_of_closed_loops()
        if self._closed:
            raise BrokerError("the broker is closed; begin runs while the broker is open")
        iterator = iterate(source)  # if this raises, no lease must have been acquired
        known = self._all.get(name)
        if known is None or (known.outcome is not None and not join):
            if self._count_running() >= self._max_runs:
                raise BrokerError(
                    f"at most {self._max_runs} runs may be running (max_runs); wait until one ends, or raise max_runs"
                )
            over = -1 if known is None else known.start
            lease, new = await self._backend.acquire_lease(
                name, max_bytes, ttl, replace_ended=not join, ended_start=over
            )
            if new:
                with self._dispatcher.lock:
                    run = self._found_before(name, lease) or self._make(name, lease, make)
                    run.publisher = RunPublisher(iterator, run, on_end)
                    run.loop = run.publisher.loop
                    self._add(run)
                run.publisher.start()
                if max_lifetime is not None:
                    _call_later(run, max_lifetime, partial(_stop, weakref.ref(run), "expired"))
                return run
            known = self._update(name, lease, make)
        if not join:
            raise BrokerError(
                f"run {name} is running already; read it by runs[{name!r}], or cancel it and wait for its end"
            )
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
        return known

    async def find(self, name: str, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]) -> Run | None:
        """Return the run `name` of any process. See `Broker.find_run`."""
        known = self._all.get(name)
        if known is not None and known.outcome is None:
            return known
        if self._backend.is_alone:
            return known
        lease = await self._backend.find_lease(name)
        return None if lease is None or lease.is_gone(self._dispatcher.log.epoch) else self._update(name, lease, make)

    def _update(
        self, name: str, lease: RunLease, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]
    ) -> Run:
        """Return the run of a lease, and end it if the lease says that it has ended."""
        with self._dispatcher.lock:
            run = self._all.get(name)
            if run is None or (self._is_later(lease, run) if run.outcome is None else run.start != lease.start):
                run = self._make(name, lease, make)
                self._add(run)
                last = self._dispatcher.log.last(name)
                if last is not None and run.is_ended_by(last):
                    self._set_ended(run, last.offset, last.end or "lost")
            applies = lease.epoch == self._dispatcher.log.epoch and not self._is_earlier(lease, run)
            if run.outcome is None and lease.outcome and applies:
                self._set_ended(run, lease.final, lease.outcome)
        return run

    def _make(
        self, name: str, lease: RunLease, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]
    ) -> Run:
        run = make(name, lease, self._give_up)
        if lease.epoch != self._dispatcher.log.epoch:  # the log was replaced since the lease was asked for
            run.start = 0
            run.lease.whole = False
        return run

    def _is_later(self, lease: RunLease, run: Run) -> bool:
        """Return whether a lease belongs to a later run of the same name.

        The start of a run that began in an earlier epoch says nothing, since it may be any offset.
        """
        return lease.whole and lease.start > run.start and lease.epoch == self._dispatcher.log.epoch

    def _is_earlier(self, lease: RunLease, run: Run) -> bool:
        """Return whether a lease belongs to an earlier run: the server was rolled back, and does not know `run` yet."""
        return lease.whole and lease.start < run.start and lease.epoch == self._dispatcher.log.epoch

    def _found_before(self, name: str, lease: RunLease) -> Run | None:
        """Return the run of a new lease of this process if `find` in another task has found it already."""
        run = self._all.get(name)
        if run is None or run.publisher is not None or run.outcome is not None or run.start != lease.start:
            return None
        return run

    def _add(self, run: Run) -> None:
        replaced = self._all.get(run.name)
        if replaced is not None and replaced is not run and replaced.outcome is None:  # nothing else would end it
            self._set_ended(replaced, run.start, "lost")
            replaced.loop.call_threadsafe(partial(self._dispatcher.wake, run.name))
        self._dispatcher.log.keep(run.name, run.lease.max_bytes)
        self._all[run.name] = run
        self._ended.pop(run.name, None)

    def _count_running(self) -> int:
        return sum(run.publisher is not None and run.outcome is None for run in list(self._all.values()))

    # The end of a run; with the dispatcher's lock held

    def _on_end(self, entry: Entry) -> None:
        run = self._all.get(entry.channel)
        if run is not None and run.is_ended_by(entry):
            self._set_ended(run, entry.offset, entry.end or "lost")

    def _set_ended(self, run: Run, final: int, outcome: str) -> None:
        run.set_ended(final, outcome)
        self._ended[run.name] = None
        while len(self._ended) > self._max_runs:
            self._release(next(iter(self._ended)))
        forget = partial(_forget, weakref.ref(self), weakref.ref(run))
        run.loop.call_threadsafe(partial(_call_later, run, run.lease.ttl, forget))
        if run.publisher is not None:  # if another process has ended the run, the source must stop; else it has stopped
            run.loop.call_threadsafe(partial(_stop, weakref.ref(run), "lost"))

    def _release(self, name: str) -> None:
        self._ended.pop(name, None)
        del self._all[name]
        self._dispatcher.log.release(name)

    def _on_restart(self, last_offset: int) -> None:
        """Drop runs that have ended, and let running ones continue at the start of the new log.

        Events of an earlier epoch may be in the new log too, but there may be a gap after them.
        """
        epoch = self._dispatcher.log.epoch
        for name, run in list(self._all.items()):
            if run.lease.epoch != epoch:
                run.start = run.lease.start = last_offset  # the process of the run tells the server
                run.lease.epoch, run.lease.whole = epoch, False
            if run.outcome is not None:
                run.final = run.start  # its subscribers would wait for an offset of the old log
                self._release(name)
        if self._watch_loop is not None:
            self._watch_loop.call_threadsafe(self._watch_now)

    def _give_up(self, run: Run, outcome: Outcome) -> None:
        with self._dispatcher.lock:
            if outcome == "lost" and run.publisher is not None:
                # The run belongs to another process now, which publishes the end after all events of this process.
                run.publisher = None
                return
            ring = self._dispatcher.log.ring(run.name)
            final = run.start if ring is None else max(run.start, ring.newest)
            if self._all.get(run.name) is not run:
                return
        self._end_without_event(run, final, outcome)

    def _end_without_event(self, run: Run, final: int, outcome: str) -> None:
        with self._dispatcher.lock:
            if run.outcome is not None:
                return
            self._set_ended(run, final, outcome)
        self._dispatcher.wake(run.name)

    def forget(self, run: Run) -> None:
        """Forget a run whose ``ttl`` is over."""
        with self._dispatcher.lock:
            if self._all.get(run.name) is run and run.name in self._ended:
                self._release(run.name)

    # Other processes

    def _on_cancel(self, name: str) -> None:
        run = self._all.get(name)
        if run is not None and run.publisher is not None:
            run.stop("cancelled")

    async def _watch_runs(self) -> None:
        """Renew the leases of this process, and end the runs of others whose lease has expired."""
        missing: set[Run] = set()  # runs without a lease at the last check
        event = self._restarted = anyio.Event()
        due = anyio.current_time() + _WATCH_INTERVAL_S
        while True:
            with anyio.move_on_after(max(0.0, due - anyio.current_time())):
                await event.wait()
            restarted = event.is_set()
            if restarted:  # other processes cannot find the runs of this one until the server has their leases again
                event = self._restarted = anyio.Event()
            else:
                due = anyio.current_time() + _WATCH_INTERVAL_S
            missing.intersection_update(self._all.values())
            for name, run in list(self._all.items()):
                if run.outcome is not None or (restarted and run.publisher is None):
                    continue
                try:
                    if restarted:
                        await self._catch_up()
                    if run.outcome is None:  # renewing the lease of a run that has ended would revive it
                        await self._look_after(name, run, missing)
                except BrokerError as exc:
                    logger.debug("run %s could not be checked; the next check follows: %s", name, exc,
                                 extra={"sse_run": name})  # fmt: skip
                except Exception:
                    logger.exception("run %s could not be checked; the next check follows", name,
                                     extra={"sse_run": name})  # fmt: skip

    def _watch_now(self) -> None:
        if self._restarted is not None:
            self._restarted.set()

    async def _look_after(self, name: str, run: Run, missing: set[Run]) -> None:
        if run.publisher is not None or run.acknowledged_end is not None:
            await self._look_after_own(name, run)
            return
        lease = await self._backend.find_lease(name)
        if (lease is None or lease.is_gone(self._dispatcher.log.epoch)) and run not in missing:
            missing.add(run)  # the holder may have been disconnected, as this process was
            return
        if lease is not None and self._is_earlier(lease, run):
            return
        missing.discard(run)
        if lease is None:
            await self._end_lost(name, run)
        elif lease.is_gone(self._dispatcher.log.epoch):
            self._give_up(run, cast("Outcome", lease.outcome))
        elif lease.outcome or self._is_later(lease, run):
            self._end_without_event(run, lease.final or lease.start, lease.outcome or "lost")

    async def _look_after_own(self, name: str, run: Run) -> None:
        if run.acknowledged_end is not None:
            await self._repeat_end(run, *run.acknowledged_end)
        elif run.publisher is not None and not await self._backend.renew_lease(name, run.lease):
            logger.warning(
                "run %s is stopped here: its lease expired and another process has taken it over", name,
                extra={"sse_run": name},
            )  # fmt: skip
            run.publisher.stop("lost")

    async def _repeat_end(self, run: Run, event: ServerSentEvent, outcome: Outcome) -> None:
        """Publish the last event again: the log was replaced after its acknowledgement, before this process got it."""
        await self._catch_up()
        lease = await self._backend.find_lease(run.name)
        if run.outcome is not None:
            return
        if (
            lease is not None
            and not (lease.is_gone(self._dispatcher.log.epoch) or self._is_earlier(lease, run))
            and (lease.outcome or self._is_later(lease, run))
        ):
            self._end_without_event(run, lease.final or lease.start, lease.outcome or "lost")
        else:
            await run.put(event, outcome)

    async def _catch_up(self) -> None:
        """Wait until this process knows the epoch, and all runs that have ended by now."""
        if self._dispatcher.upstream is not None:
            await self._dispatcher.upstream.sync()

    async def _end_lost(self, name: str, run: Run) -> None:
        """End a run of another process whose lease has expired."""
        await self._catch_up()
        if run.outcome is not None:  # its last event came after the server had forgotten the lease
            return
        if await self._backend.renew_lease(name, run.lease):  # False if another process was faster
            logger.warning(
                "run %s is ended as lost: its process did not renew the lease", name, extra={"sse_run": name}
            )
            await run.put(final_event("lost"), "lost")

    # The broker's life

    def reopen(self) -> None:
        """Allow new runs, and begin to watch the runs of other processes."""
        self._closed = False
        if not self._backend.is_alone and self._watch is None:
            self._watch_loop = current_loop()
            self._watch = self._watch_loop.spawn(self._keep_watching, "asgi_sse runs")

    async def _keep_watching(self) -> None:
        try:
            await self._watch_runs()
        except GeneratorExit:  # the event loop was closed before the broker
            raise
        except anyio.get_cancelled_exc_class():
            pass
        except BaseException:
            logger.exception("the runs of other processes are not watched any more")

    def begin_close(self, grace: float) -> None:
        """End the running runs in `grace` seconds, unless an earlier call has begun that. From any thread."""
        for run in self._running():
            if run.closing_since is None:
                run.closing_since = clock()
            run.loop.call_threadsafe(partial(self._stop_in, grace, run))

    async def close(self, grace: float) -> None:
        """Wait for the running runs, and end those that are left. No new run may begin.

        Args:
            grace: Seconds to wait, since `begin_close` if that was called.
        """
        self._closed = True
        self._end_those_of_closed_loops()
        running = self._running()
        since = max((clock() if run.closing_since is None else run.closing_since for run in running), default=0.0)
        try:
            with anyio.move_on_after(max(0.0, since + grace - clock())):
                for run in running:
                    await run.wait()
        finally:
            for run in running:
                if run.outcome is None:
                    run.stop("drained")
        with anyio.move_on_after(_END_WAIT_S):
            for run in running:
                await run.wait()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for run in list(self._all.values()):
            if run.outcome is None and run.publisher is None:
                run.broker_closed()
                with self._dispatcher.lock:
                    self._release(run.name)  # it is looked for again when the broker is opened again

    def _running(self) -> list[Run]:
        return [run for run in list(self._all.values()) if run.outcome is None and run.publisher is not None]

    def _stop_in(self, seconds: float, run: Run) -> None:
        _call_later(run, seconds, partial(_stop, weakref.ref(run), "drained"))

    def _end_those_of_closed_loops(self) -> None:
        for run in list(self._all.values()):
            if run.loop.closed:
                if run.outcome is None and run.publisher is not None:
                    run.stop("cancelled")
                self.forget(run)


def _call_later(run: Run, seconds: float, callback: Callable[[], None]) -> None:
    """Call `callback` in the event loop of `run`, which is the caller's. Nothing holds `run` until then."""
    current_deadlines().call_later(seconds, callback, sse_run=run.name)


def _stop(run: weakref.ref[Run], outcome: Outcome) -> None:
    alive = run()
    if alive is not None:
        alive.stop(outcome)


def _forget(manager: weakref.ref[RunManager], run: weakref.ref[Run]) -> None:
    alive, ended = manager(), run()
    if alive is not None and ended is not None:
        alive.forget(ended)
