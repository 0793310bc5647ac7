"""`Runs`: the runs of a broker, how many there may be, and when each of them ends or is forgotten."""

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

logger = logging.getLogger(__name__)

_WATCH: Final = 10.0
"""Seconds between two looks at the runs of other processes, and two renewals of our own."""

_CLOSING: Final = 11.0
"""Seconds that runs which were told to stop have to come to their end: their clean-up, and being left behind."""


class Runs(Mapping[str, Run]):
    """The runs by name: those that go on, and those that ended less than their ``ttl`` ago, as far as is known here.

    Those of other processes are looked for by `find`.
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
        self._over: dict[str, None] = {}  # those that have ended, the first one first
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
        """Begin one, or find the one that there is.

        Raises:
            BrokerError: One of that name goes on, there are as many as there may be, or the broker is closed.
        """
        self._end_those_of_closed_loops()
        if self._closed:
            raise BrokerError("the broker is closed: begin runs while its server serves")
        iterator = iterate(source)  # before anything is claimed for it
        known = self._all.get(name)
        if known is None or (known.outcome is not None and not join):
            if self._going_on() >= self._max_runs:
                raise BrokerError(f"{self._max_runs} runs go on, the most there may be (max_runs)")
            over = -1 if known is None else known.start
            lease, new = await self._backend.acquire_lease(
                name, max_bytes, ttl, replace_ended=not join, ended_start=over
            )
            if new:
                with self._dispatcher.lock:
                    run = self._joined(name, lease) or self._made(name, lease, make)
                    run.publisher = RunPublisher(iterator, run, on_end)
                    run.loop = run.publisher.loop
                    self._add(run)
                run.publisher.start()
                if max_lifetime is not None:
                    _call_later(run, max_lifetime, partial(_stop, weakref.ref(run), "expired"))
                return run
            known = self._found(name, lease, make)
        if not join:
            raise BrokerError(f"run {name} goes on: read it by runs[{name!r}], or cancel it and wait for its end")
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
        return known

    async def find(self, name: str, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]) -> Run | None:
        """The run of that name, in whichever process it runs."""
        known = self._all.get(name)
        if known is not None and known.outcome is None:
            return known
        if self._backend.is_alone:
            return known
        lease = await self._backend.find_lease(name)
        return None if lease is None or lease.is_gone(self._dispatcher.log.epoch) else self._found(name, lease, make)

    def _found(
        self, name: str, lease: RunLease, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]
    ) -> Run:
        with self._dispatcher.lock:
            run = self._all.get(name)
            if run is None or (self._is_later(lease, run) if run.outcome is None else run.start != lease.start):
                run = self._made(name, lease, make)
                self._add(run)
                last = self._dispatcher.log.last(name)
                if last is not None and run.is_ended_by(last):
                    self._set_ended(run, last.offset, last.end or "lost")
            known = lease.epoch == self._dispatcher.log.epoch and not self._is_earlier(lease, run)
            if run.outcome is None and lease.outcome and known:
                self._set_ended(run, lease.final, lease.outcome)
        return run

    def _made(
        self, name: str, lease: RunLease, make: Callable[[str, RunLease, Callable[[Run, Outcome], None]], Run]
    ) -> Run:
        run = make(name, lease, self._given_up)
        if lease.epoch != self._dispatcher.log.epoch:  # the log has become another one since it was asked for
            run.start = 0
            run.lease.whole = False
        return run

    def _is_later(self, lease: RunLease, run: Run) -> bool:
        """Whether a lease is that of a later run of that name: what began in an earlier log may begin anywhere."""
        return lease.whole and lease.start > run.start and lease.epoch == self._dispatcher.log.epoch

    def _is_earlier(self, lease: RunLease, run: Run) -> bool:
        """Whether it is that of an earlier one, of an engine that has lost events, which is not known here yet."""
        return lease.whole and lease.start < run.start and lease.epoch == self._dispatcher.log.epoch

    def _joined(self, name: str, lease: RunLease) -> Run | None:
        """The run of a lease of ours, where another task was told of it before we were."""
        run = self._all.get(name)
        if run is None or run.publisher is not None or run.outcome is not None or run.start != lease.start:
            return None
        return run

    def _add(self, run: Run) -> None:
        before = self._all.get(run.name)
        if before is not None and before is not run and before.outcome is None:  # nobody else would end it
            self._set_ended(before, run.start, "lost")
            before.loop.call_threadsafe(partial(self._dispatcher.look_again, run.name))
        self._dispatcher.log.keep(run.name, run.lease.max_bytes)
        self._all[run.name] = run
        self._over.pop(run.name, None)

    def _going_on(self) -> int:
        return sum(run.publisher is not None and run.outcome is None for run in list(self._all.values()))

    # The end of one; with the dispatcher's lock held

    def _on_end(self, entry: Entry) -> None:
        run = self._all.get(entry.channel)
        if run is not None and run.is_ended_by(entry):
            self._set_ended(run, entry.offset, entry.end or "lost")

    def _set_ended(self, run: Run, final: int, outcome: str) -> None:
        run.ended(final, outcome)
        self._over[run.name] = None
        while len(self._over) > self._max_runs:
            self._release(next(iter(self._over)))
        forget = partial(_forget, weakref.ref(self), weakref.ref(run))
        run.loop.call_threadsafe(partial(_call_later, run, run.lease.ttl, forget))
        if run.publisher is not None:  # if it was another process that has ended it: else it has stopped already
            run.loop.call_threadsafe(partial(_stop, weakref.ref(run), "lost"))

    def _release(self, name: str) -> None:
        self._over.pop(name, None)
        del self._all[name]
        self._dispatcher.log.release(name)

    def _on_restart(self, last_offset: int) -> None:
        """The log is another one: what has ended is not in it, and the others begin with it.

        What has the numbers before that may be left of an earlier one, with a hole behind it.
        """
        epoch = self._dispatcher.log.epoch
        for name, run in list(self._all.items()):
            if run.lease.epoch != epoch:
                run.start = run.lease.start = last_offset  # which its process tells the engine
                run.lease.epoch, run.lease.whole = epoch, False
            if run.outcome is not None:
                run.final = run.start  # or who reads it would wait for a number of the log before
                self._release(name)
        if self._watch_loop is not None:
            self._watch_loop.call_threadsafe(self._look_now)

    def _given_up(self, run: Run, outcome: Outcome) -> None:
        with self._dispatcher.lock:
            if outcome == "lost" and run.publisher is not None:
                run.publisher = None  # it is as another process's, which says so behind all that ours has published
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
        self._dispatcher.look_again(run.name)

    def forget(self, run: Run) -> None:
        """Its time is over."""
        with self._dispatcher.lock:
            if self._all.get(run.name) is run and run.name in self._over:
                self._release(run.name)

    # Other processes

    def _on_cancel(self, name: str) -> None:
        run = self._all.get(name)
        if run is not None and run.publisher is not None:
            run.stop("cancelled")

    async def _watch_others(self) -> None:
        """See that who has a run says so, and that who has not said so for long has it no more."""
        missing: set[Run] = set()
        event = self._restarted = anyio.Event()
        due = anyio.current_time() + _WATCH
        while True:
            with anyio.move_on_after(max(0.0, due - anyio.current_time())):
                await event.wait()
            restarted = event.is_set()
            if restarted:  # until the engine is told of our own again, nobody finds them
                event = self._restarted = anyio.Event()
            else:
                due = anyio.current_time() + _WATCH
            missing.intersection_update(self._all.values())
            for name, run in list(self._all.items()):
                if run.outcome is not None or (restarted and run.publisher is None):
                    continue
                try:
                    if restarted:
                        await self._catch_up()
                    if run.outcome is None:  # else it would go on again, to those who find it
                        await self._look_after(name, run, missing)
                except BrokerError as exc:
                    logger.debug(
                        "run %s could not be looked after, and is again: %s", name, exc, extra={"sse_run": name}
                    )
                except Exception:
                    logger.exception("run %s could not be looked after, and is again", name, extra={"sse_run": name})

    def _look_now(self) -> None:
        if self._restarted is not None:
            self._restarted.set()

    async def _look_after(self, name: str, run: Run, missing: set[Run]) -> None:
        if run.publisher is not None or run.last_word is not None:
            await self._look_after_own(name, run)
            return
        lease = await self._backend.find_lease(name)
        if (lease is None or lease.is_gone(self._dispatcher.log.epoch)) and run not in missing:
            missing.add(run)  # who has it may have been cut off, as we were
            return
        if lease is not None and self._is_earlier(lease, run):
            return
        missing.discard(run)
        if lease is None:
            await self._bury(name, run)
        elif lease.is_gone(self._dispatcher.log.epoch):
            self._given_up(run, cast("Outcome", lease.outcome))
        elif lease.outcome or self._is_later(lease, run):
            self._end_without_event(run, lease.final or lease.start, lease.outcome or "lost")

    async def _look_after_own(self, name: str, run: Run) -> None:
        if run.last_word is not None:
            await self._repeat_last_word(run, *run.last_word)
        elif run.publisher is not None and not await self._backend.renew_lease(name, run.lease):
            logger.warning("run %s is ended: another process has taken it for lost", name, extra={"sse_run": name})
            run.publisher.stop("lost")

    async def _repeat_last_word(self, run: Run, event: ServerSentEvent, outcome: Outcome) -> None:
        """The last event was acknowledged, and may have been lost with the log before it came to anybody."""
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
        """Know of the epoch, and of all that has ended by now."""
        if self._dispatcher.upstream is not None:
            await self._dispatcher.upstream.sync()

    async def _bury(self, name: str, run: Run) -> None:
        await self._catch_up()
        if run.outcome is not None:  # its end came when the engine had forgotten it
            return
        if await self._backend.renew_lease(name, run.lease):  # as ours; another process may have been faster
            logger.warning("run %s is ended: its process has not been heard of for long", name, extra={"sse_run": name})
            await run.put(final_event("lost"), "lost")

    # The broker's life

    def reopen(self) -> None:
        """New ones may begin."""
        self._closed = False
        if not self._backend.is_alone and self._watch is None:
            self._watch_loop = current_loop()
            self._watch = self._watch_loop.spawn(self._keep_watching, "asgi_sse runs")

    async def _keep_watching(self) -> None:
        try:
            await self._watch_others()
        except GeneratorExit:  # its event loop was closed under it
            raise
        except anyio.get_cancelled_exc_class():
            pass
        except BaseException:
            logger.exception("the runs of other processes are not watched any more")

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
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for run in list(self._all.values()):
            if run.outcome is None and run.publisher is None:
                run.leave()
                with self._dispatcher.lock:
                    self._release(run.name)  # whoever opens the broker again looks for it again

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


def _forget(runs: weakref.ref[Runs], run: weakref.ref[Run]) -> None:
    host, ended = runs(), run()
    if host is not None and ended is not None:
        host.forget(ended)
