"""`Run`: a source that goes on when its clients leave, and a channel that ends when its source does."""

from __future__ import annotations

import logging
import math
import threading
import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import anyio
import anyio.lowlevel

from .._eventloop import Child, EventLoop, current_loop
from ..errors import BrokerError, InvalidEventError
from ..event import ServerSentEvent
from ..routing import HTTPError
from ..source import iterate
from .channel import Channel
from .endpoint import check_room
from .hub import clock, unnumbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from ..routing import Request
    from .broker import Broker
    from .hub import Hub
    from .subscription import Subscription

logger = logging.getLogger(__name__)

Outcome: TypeAlias = Literal[
    "finished",
    "failed",  # its source raised
    "cancelled",
    "expired",  # its max_lifetime is over
    "drained",  # the broker was closed
]

_CLEANUP: Final = 10.0
"""Seconds that a source which was told to stop has for its clean-up; as a stream's by default."""

_LAST_CALL: Final = 0.1
"""Seconds that it has to obey its second cancellation, before it is left behind."""

_TURN_BYTES: Final = 16_384
"""What a source may publish before others have a turn; as a stream's may."""


class Run(Channel):
    """A source that is published to a channel, whoever reads it; and that channel, until some time after its end.

    A client that comes late gets it from its first event on, one that comes back from where it was. Behind the final
    event their streams end; who has that one already is answered 204, at which an EventSource stops. From an endpoint:
    ``return await run(request)``.

    Attributes:
        name: The channel's name.
        loop: The event loop that its source runs in.
        start: The number behind which its events are.
        final: The number of its last one, once there is one.
        outcome: ``finished``, ``failed``, ``cancelled``, ``expired`` or ``drained``; ``None``: it goes on.
        error: What its source raised.
    """

    __slots__ = (
        "__weakref__", "_child", "_ended", "_ending", "_on_end", "_open", "_pumping", "_source", "_stopped",
        "_waiters", "error", "final", "loop", "outcome", "start",
    )  # fmt: skip

    def __init__(
        self,
        broker: Broker,
        hub: Hub,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        subscription: Callable[..., Subscription],
        *,
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
        ended: Callable[[Run], None],
    ) -> None:
        super().__init__(broker, hub, name)
        self.start = hub.log.tail
        self.final: int | None = None
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._source: AsyncIterator[Any] | None = iterate(source)
        self._open = subscription
        self._on_end = on_end
        self._ended = ended
        self.loop: EventLoop = current_loop()
        self._child: Child | None = None
        self._pumping = False
        self._stopped: Outcome | None = None  # why it was told to stop
        self._ending = False
        self._waiters: list[tuple[EventLoop, anyio.Event]] = []

    def begin(self, max_lifetime: float | None) -> None:
        """Let the source run."""
        self._child = self.loop.spawn(self._pump, "asgi_sse run")
        if max_lifetime is not None:
            self.loop.call_at(self.loop.time() + max_lifetime, partial(_stop, weakref.ref(self), "expired"))

    def cancel(self) -> None:
        """End it early: its source sees one cancellation, and its clients get the final event. From any thread."""
        self.stop("cancelled")

    async def wait(self) -> Outcome:
        """Wait until it has ended, and give how."""
        while self.outcome is None:
            waiter = current_loop(), anyio.Event()
            with self._hub.lock:
                self._waiters.append(waiter)
            if self.outcome is None:  # else who ended it may not have seen us
                await waiter[1].wait()
        return self.outcome

    def subscribe(
        self,
        *,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (as of Broker.subscribe)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,  # noqa: ARG002
        info: Any = None,
    ) -> Subscription:
        """A place in it: behind an id, or at its first event, so that there is no use for a snapshot."""
        return self._open(
            (self.name,),
            last_event_id=last_event_id,
            filter=filter,
            checkpoint=checkpoint,
            snapshot=None,
            info=info,
            run=self,
        )

    def was_seen_by(self, last_event_id: str | None) -> bool:
        """Whether a client that has this id has all of it."""
        with self._hub.lock:
            place = self._hub.log.parse(last_event_id or "")
            return self.final is not None and isinstance(place, int) and place >= self.final

    async def __call__(self, request: Request) -> Subscription:
        """Answer a request with it.

        Raises:
            HTTPError: 204, the client has all of it; 503, it has as many subscribers as it may.
        """
        if self.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        check_room(self._hub, (self.name,))
        return self.subscribe(last_event_id=request.last_event_id, info=request)

    def stop(self, outcome: Outcome) -> None:
        """End it early, and say so. From any thread."""
        if not self.loop.call_threadsafe(partial(self._stop, outcome)):
            self._end(outcome)  # its event loop was closed under it

    def stop_in(self, seconds: float) -> None:
        """Stop it for the server's sake, in so many seconds. Called in its event loop."""
        if self.outcome is None:
            self.loop.call_at(self.loop.time() + seconds, partial(_stop, weakref.ref(self), "drained"))

    def _stop(self, outcome: Outcome) -> None:
        if self._stopped is None and not self._ending:
            self._stopped = outcome
            if self._child is not None and self._pumping:  # else its first step finds that it is to close the source
                self._child.cancel()
            self.loop.call_at(self.loop.time() + _CLEANUP, self._insist)

    def _insist(self) -> None:
        if not self._ending and self._child is not None:
            logger.warning("the source of run %s was not cleaned up within %g s: %r", self.name, _CLEANUP, self._source)
            self._child.cancel_again()
            self.loop.call_at(self.loop.time() + _LAST_CALL, self._leave_behind)

    def _leave_behind(self) -> None:
        if not self._ending and self._stopped is not None:
            self._end(self._stopped)

    # The source's task

    async def _pump(self) -> None:
        outcome: Outcome = "finished"
        self._pumping = True
        try:
            if self._stopped is None:
                await self._publish()
        except BaseException as exc:
            outcome = self._raised(exc)
        if self._child is not None:
            self._child.spare()
        try:
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()
        except BaseException as exc:
            outcome = self._raised(exc)
        self._source = None
        self._end(self._stopped or outcome)

    async def _publish(self) -> None:
        source: Any = self._source
        interrupt = anyio.get_cancelled_exc_class()
        throw = getattr(source, "athrow", None)
        step: Awaitable[Any] = source.__anext__()
        size = 0
        while True:
            try:
                item = await step
            except StopAsyncIteration:
                return
            if self._stopped is not None:
                return  # it swallowed its cancellation, and yielded
            try:
                size += len(self._hub.publish(self.name, unnumbered(item)).chunk)
                if size >= _TURN_BYTES:
                    size = 0
                    await anyio.lowlevel.checkpoint()
            except (InvalidEventError, interrupt) as exc:  # raised at its yield, so that the traceback names the line
                if throw is None:
                    raise
                size += _TURN_BYTES  # or a source that catches each would starve the loop
                step = throw(exc)
            else:
                step = source.__anext__()

    def _raised(self, exc: BaseException) -> Outcome:
        if isinstance(exc, anyio.get_cancelled_exc_class()):
            return "cancelled"  # by us, or because the event loop ends
        self.error = self.error or exc
        logger.error("the source of run %s raised", self.name, exc_info=exc)
        return "failed"

    # The end

    def _end(self, outcome: Outcome) -> None:
        if self._ending:
            return  # it came out of its clean-up after all
        self._ending = True
        event = ServerSentEvent({"reason": outcome}, event="end")
        if self._on_end is not None:
            try:
                event = unnumbered(self._on_end(outcome, self.error))
            except Exception:
                logger.exception("on_end of run %s raised", self.name)
        self._hub.publish(self.name, event, ends=self)
        self.outcome = outcome
        self._child = None
        with self._hub.lock:
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            loop.call_threadsafe(waiter.set)
        self._ended(self)


def _stop(run: weakref.ref[Run], outcome: Outcome) -> None:
    alive = run()
    if alive is not None:
        alive.stop(outcome)


class Runs(Mapping[str, Run]):
    """The runs of a broker by name: those that go on, and those that ended less than their `ttl` ago."""

    def __init__(self, hub: Hub, max_runs: int) -> None:
        self._hub = hub
        self._max_runs = max_runs
        self._lock = threading.Lock()
        self._all: dict[str, Run] = {}
        self._closes_at = math.inf
        self._until: dict[str, float] = {}  # those that have ended; who ended first is first

    def __getitem__(self, name: str) -> Run:
        self.purge()
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        self.purge()
        return iter(list(self._all))

    def __len__(self) -> int:
        self.purge()
        return len(self._all)

    def begin(
        self,
        broker: Broker,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        subscription: Callable[..., Subscription],
        *,
        ttl: float,
        max_lifetime: float | None,
        max_bytes: int,
        on_end: Callable[[Outcome, BaseException | None], Any] | None,
    ) -> Run:
        """Begin one.

        Raises:
            BrokerError: One of that name goes on, or there are as many as there may be.
        """
        self.purge()
        with self._lock:
            known = self._all.get(name)
            if known is not None and known.outcome is None:
                raise BrokerError(f"run {name} goes on: read it by runs[{name!r}], or cancel it and wait for its end")
            if len(self._all) - len(self._until) >= self._max_runs:
                raise BrokerError(f"{self._max_runs} runs go on, the most there may be (max_runs)")
            with self._hub.lock:
                self._hub.log.keep(name, max_bytes)
                run = Run(broker, self._hub, name, source, subscription, on_end=on_end, ended=partial(self._ended, ttl))
            self._all[name] = run
            self._until.pop(name, None)
        run.begin(max_lifetime)
        return run

    def reopen(self) -> None:
        """What `begin_close` has begun is over."""
        self._closes_at = math.inf

    def begin_close(self, grace: float) -> None:
        """End those that still go on in so many seconds, unless that was asked for before. From any thread."""
        if self._closes_at == math.inf:
            self._closes_at = clock() + grace
            for run in list(self._all.values()):
                run.loop.call_threadsafe(partial(run.stop_in, grace))

    async def close(self, grace: float) -> None:
        """Wait so many seconds, from `begin_close` on, for those that go on, then end them."""
        running = [run for run in self._all.values() if run.outcome is None]
        try:
            with anyio.move_on_after(min(grace, max(0, self._closes_at - clock()))):
                for run in running:
                    await run.wait()
        finally:
            for run in running:
                if run.outcome is None:
                    run.stop("drained")
        with anyio.move_on_after(_CLEANUP + 2 * _LAST_CALL):
            for run in running:
                await run.wait()

    def release(self, run: Run) -> None:
        """Let go of `run`."""
        with self._lock:
            if self._all.get(run.name) is run and run.name in self._until:
                self._release(run.name)

    def purge(self) -> None:
        """Let go of those whose time is over, in an event loop that was closed meanwhile."""
        now = clock()
        with self._lock:
            for name in [name for name, until in self._until.items() if until <= now]:
                self._release(name)

    def _ended(self, ttl: float, run: Run) -> None:
        with self._lock:
            if self._all.get(run.name) is run:
                self._until[run.name] = clock() + ttl
                while len(self._until) > self._max_runs:
                    self._release(next(iter(self._until)))
        if not run.loop.closed:
            run.loop.call_at(run.loop.time() + ttl, partial(_release, weakref.ref(self), weakref.ref(run)))

    def _release(self, name: str) -> None:
        del self._until[name], self._all[name]
        with self._hub.lock:
            self._hub.log.release(name)


def _release(runs: weakref.ref[Runs], run: weakref.ref[Run]) -> None:
    manager, ended = runs(), run()
    if manager is not None and ended is not None:
        manager.release(ended)
