"""The running streams: their figures, and their end when the server stops."""

import logging
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import anyio

from asgi_sse.errors import printable, short_repr
from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.protocol.validation import check_number
from asgi_sse.runtime.base import EventLoop
from asgi_sse.runtime.current import LoopLocal, current_loop
from asgi_sse.runtime.deadlines import DeadlineQueue, current_deadlines
from asgi_sse.runtime.server import Server
from asgi_sse.runtime.shutdown import ShutdownWatch

from .counters import ProcessTotals, StreamCounters
from .observer import Observer, Observers, Told
from .stream import Stream

logger = logging.getLogger(__name__)

_AFTER_DEADLINE: Final = 2.5
"""Seconds past its deadline for which `drain` waits for streams that it has cancelled by then: one each for the end of
a body that nobody takes and for the server to report the end of its connection."""

_DOUBT: Final = 5.0
"""Seconds past the drain's deadline after which a server that was said to stop by a signal alone is taken to run on."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the streams that were running when a drain began.

    Attributes:
        finished: Ended by themselves, as those that said farewell within their grace.
        closed: Ended by the drain, with a complete body.
        cancelled: Still running at the deadline, and cut.
        abandoned: Their sources had not come to an end when the drain gave up.
        seconds: How long the drain took.
    """

    finished: int
    closed: int
    cancelled: int
    abandoned: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RegistryStatistics:
    """Instruments of a registry, since it was made.

    Attributes:
        open: Streams running now.
        opened: Streams ever begun.
        closed: Streams ended, by reason.
        abandoned: Sampler left behind that still run.
        events: Items that sources have given.
        bytes: Bytes of body handed to the server.
        longest_wait: Seconds for which the slowest client has not taken its message.
        drains: Drains that have ended, of streams of which there was at least one.
        compressed: Streams that a middleware has ``encoded``, ``held`` or ``buffered``, by which.
        seconds: For which the streams that have ended had lasted, all together.
        durations: How many of them by how long that was, see `counters.StreamCounters`.
        draining: As of the registry.
    """

    open: int
    opened: int
    closed: Mapping[CloseReason, int]
    abandoned: int
    events: int
    bytes: int
    longest_wait: float
    drains: int
    compressed: Mapping[str, int]
    seconds: float
    durations: Sequence[int]
    draining: bool


class _Drain:
    """A drain under way: the streams that it waits for."""

    __slots__ = ("emptied", "loop", "remaining")

    def __init__(self, loop: EventLoop, streams: Iterable[Stream]) -> None:
        self.loop = loop
        self.remaining = set(streams)
        self.emptied = anyio.Event()

    def discard(self, stream: Stream) -> None:
        if stream in self.remaining:
            self.remaining.discard(stream)
            if not self.remaining:
                self.loop.call_threadsafe(self.emptied.set)


class StreamRegistry:
    """The running streams of one app, and how they end when its server stops.

    Iterating gives the running streams, ``len()`` counts them. One registry may serve several servers in
    one process: when one of them stops, the streams of the others go on.

    Args:
        drain_timeout: Seconds that streams have to end when the server stops.
        drain_retry: The range in milliseconds of which each client is told a random value, so that
            they do not all come back at once.

    Raises:
        TypeError: `drain_timeout` is no number.
        ValueError: A value is out of range.
    """

    def __init__(self, *, drain_timeout: float = 10.0, drain_retry: tuple[int, int] = (1000, 5000)) -> None:
        match drain_retry:
            case (int(low), int(high)) if 0 <= low <= high and bool not in map(type, drain_retry):
                self._drain_retry = (low, high)
            case _:
                raise ValueError(
                    f"drain_retry={short_repr(drain_retry)} is no range; give two whole milliseconds, the lower first, as "
                    "(1000, 5000)"
                )
        check_number("drain_timeout", drain_timeout)
        self._drain_timeout = drain_timeout
        self._streams: dict[Stream, DeadlineQueue] = {}
        self._abandoned: set[Stream] = set()  # kept, or asyncio could collect a task that still runs
        self._draining = False  # as a whole
        # Servers that stop, each with the time of its loop from when on it does not any more.
        # Both are replaced as a whole, and never changed: servers in other threads look at them.
        self._stopping: dict[Server, float] = {}
        self._watches: dict[Server, ShutdownWatch] = {}
        self._lock = threading.Lock()  # for who replaces them
        self._drains: list[_Drain] = []
        self._told: list[Callable[[Server | None, float], object]] = []
        self._observers = Observers()
        self._counters = StreamCounters()
        _process_totals.enter(self, self._counters)

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams))

    @property
    def draining(self) -> bool:
        """Whether a server is stopping, or `begin_drain` or `drain` was called: who comes is told to return."""
        return self._draining or any(
            not server.loop.closed and server.loop.time() < until for server, until in self._stopping.items()
        )

    def statistics(self) -> RegistryStatistics:
        """The figures as of now. From any thread."""
        return _statistics([self], StreamCounters())

    def when_ended(self, told: Callable[[Stream], object]) -> Callable[[], None]:
        """Call `told` with each stream that has ended, and whose ``reason`` says why.

        In the task and the context of its request, as `Observer.ended`. What it raises is logged.

        Returns:
            What undoes that.
        """
        return self._observers.add(Told(told))

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Tell `observer` of each stream, as `when_ended` does of its end alone; gives what undoes that."""
        return self._observers.add(observer)

    def farewell_retry(self) -> int:
        """A reconnection time in milliseconds, at random out of the range."""
        return random.randint(*self._drain_retry)  # noqa: S311 (it spreads load, it guards nothing)

    def begin_drain(self) -> None:
        """Ask every stream to end; give those that watch ``Request.draining`` time for it.

        Safe from any thread, and from a handler of a signal. Idempotent. Lasts until a server starts with
        this registry.
        """
        self._draining = True
        self._tell(None, self._drain_timeout)
        self._begin(list(self._streams), self._drain_timeout)

    def end(self, streams: Iterable[Stream]) -> None:
        """Do to `streams` what `begin_drain` does to all, but take who comes back again at once.

        Safe from any thread. ``registry.end(registry)`` sends all clients away, each for a time of its own.
        """
        self._begin(list(streams), self._drain_timeout)

    async def drain(self, timeout: float | None = None) -> DrainReport:
        """End every stream, and wait for it. Lasts until a server starts with this registry.

        Args:
            timeout: Seconds for it; ``None``: ``drain_timeout``.

        Returns:
            What became of the streams.

        Raises:
            TypeError: `timeout` is no number.
            ValueError: It is out of range.
        """
        check_number("timeout", timeout, optional=True)
        within = self._drain_timeout if timeout is None else timeout
        self._draining = True
        self._tell(None, within)
        return await self._drain(list(self._streams), within, "by call")

    def _begin(self, streams: list[Stream], within: float) -> None:
        """Ask `streams` to end, each in its own loop. One that is draining already keeps the earlier deadline."""
        loops: dict[EventLoop, list[Stream]] = {}
        for stream in streams:
            loops.setdefault(stream.loop, []).append(stream)
        for loop, those in loops.items():
            if not loop.call_threadsafe(partial(self._drain_streams, those, within)):
                for stream in those:  # of an event loop that was closed under them
                    self.discard(stream)

    def _drain_streams(self, streams: list[Stream], within: float) -> None:
        for stream in streams:
            stream.drain(self.farewell_retry(), within)

    async def _drain(self, streams: list[Stream], within: float, cause: str) -> DrainReport:
        loop = current_loop()
        began = loop.time()
        drain = _Drain(loop, streams)
        # Each stream is in the log once, however many ask for its end.
        new = [stream for stream in streams if not any(stream in other.remaining for other in self._drains)]
        self._drains.append(drain)
        self._begin(streams, within)
        try:
            with anyio.move_on_after(within + _AFTER_DEADLINE):
                if drain.remaining:
                    await drain.emptied.wait()
        finally:
            self._drains.remove(drain)
            seconds = loop.time() - began
            if new:
                self._counters.drained()
                report = self._report(new, drain, seconds)
                logger.info(
                    "drained %d stream%s (%s): %s", len(new), "s" * (len(new) != 1), cause, report,
                    extra={"sse_streams": len(new), "sse_cause": cause, "sse_seconds": seconds},
                )  # fmt: skip
        return self._report(streams, drain, seconds)

    @staticmethod
    def _report(streams: list[Stream], drain: _Drain, seconds: float) -> DrainReport:
        left = drain.remaining
        abandoned = sum(stream in left or stream.abandoned for stream in streams)
        cancelled = sum(stream.forced and not (stream in left or stream.abandoned) for stream in streams)
        finished = sum(
            stream.ended_itself and not (stream.forced or stream.abandoned or stream in left) for stream in streams
        )
        return DrainReport(
            finished=finished,
            closed=len(streams) - finished - cancelled - abandoned,
            cancelled=cancelled,
            abandoned=abandoned,
            seconds=seconds,
        )

    # What a server's requests and lifespan need (response, middleware)

    def when_draining(self, told: Callable[[Server | None, float], object]) -> None:
        """Whenever streams are to end, call `told` with their server (``None``: all) and the seconds that they have.

        More than once for one server, and from any thread.
        """
        self._told.append(told)

    def _tell(self, server: Server | None, within: float) -> None:
        for told in self._told:
            told(server, within)

    def watch(self, server: Server) -> None:
        """Learn from `server` itself that it stops, before its lifespan tells. Called in its event loop."""
        if server not in self._watches:
            watch = ShutdownWatch(server, self._server_stops, self._forget)
            with self._lock:
                alive = {known: other for known, other in self._watches.items() if other.alive}
                self._watches = {**alive, server: watch}

    def is_draining(self, server: Server) -> bool:
        """Whether streams that come through `server` now are told to return later."""
        if self._draining or not self._stopping:
            return self._draining
        now = server.loop.time()
        return any(stops.covers(server) and now < until for stops, until in self._stopping.items())

    def start(self, server: Server) -> None:
        """`server` starts with this registry: what an earlier one left is over."""
        self._draining = False
        for stopped in self._stopping:
            if stopped.covers(server):
                self._forget(stopped)

    async def stop(self, server: Server) -> None:
        """`server` says that it stops: end its streams, wait for it, and forget it."""
        self._mark(server, math.inf)
        self._tell(server, self._drain_timeout)
        streams = self._streams_of(server)
        self._drain_streams(streams, self._drain_timeout)
        try:
            await self._drain(streams, self._patience(streams), "lifespan.shutdown")
        finally:
            for known in {*self._stopping, *self._watches}:
                if known.covers(server):
                    self._forget(known)

    def _mark(self, server: Server, until: float) -> None:
        with self._lock:
            self._stopping = {**self._stopping, server: max(until, self._stopping.get(server, 0.0))}

    def _forget(self, server: Server) -> None:
        """`server` has stopped: another one may follow in its place."""
        with self._lock:
            self._stopping = {known: until for known, until in self._stopping.items() if known is not server}
            watch = self._watches.get(server)
            self._watches = {known: other for known, other in self._watches.items() if known is not server}
        if watch is not None:
            watch.close()

    def count_compressed(self, kind: str) -> None:
        """A middleware has encoded, held or buffered a stream."""
        self._counters.was_compressed(kind)

    def _server_stops(self, server: Server, cause: str, certain: bool) -> None:  # noqa: FBT001
        known = self.is_draining(server)
        self._mark(server, math.inf if certain else server.loop.time() + self._drain_timeout + _DOUBT)
        self._tell(server, self._drain_timeout)
        streams = self._streams_of(server)
        self._drain_streams(streams, self._drain_timeout)  # in this turn: daphne cancels what is left in the next one
        if not known:

            async def report() -> None:
                await self._drain(streams, self._patience(streams), cause)

            server.loop.spawn(report, "asgi_sse drain")

    def _patience(self, streams: list[Stream]) -> float:
        return max([self._drain_timeout, *(stream.grace for stream in streams)])

    def _streams_of(self, server: Server) -> list[Stream]:
        return [stream for stream in list(self._streams) if server.covers(stream.server)]

    # What a stream needs (stream.StreamObserverHost)

    def add(self, stream: Stream) -> None:
        """See `stream.StreamObserverHost`."""
        self._streams[stream] = current_deadlines()
        self._counters.began()
        self._observers.tell("begun", stream)
        if self.is_draining(stream.server):  # by another thread, since the response looked
            self._drain_streams([stream], self._drain_timeout)

    def arm(self, stream: Stream, when: float) -> None:
        """See `stream.StreamObserverHost`."""
        deadlines = self._streams.get(stream)
        if deadlines is not None:
            deadlines.arm(stream, when)

    def ending(self, stream: Stream) -> None:
        """See `stream.StreamObserverHost`."""
        self._observers.tell("ending", stream)

    def discard(self, stream: Stream) -> None:
        """See `stream.StreamObserverHost`."""
        if stream.abandoned:
            self._abandoned.add(stream)
        else:
            self._abandoned.discard(stream)
        deadlines = self._streams.pop(stream, None)
        if deadlines is None:
            return
        deadlines.forget(stream)
        if stream.reason is None:  # its event loop was closed under it
            stream.reason = "disconnected"
        reason, seconds = stream.reason, stream.age
        self._counters.ended(reason, seconds, stream.events, stream.bytes_sent)
        if logger.isEnabledFor(logging.DEBUG):
            _log_end(stream, reason, seconds)
        for drain in list(self._drains):
            drain.discard(stream)
        self._observers.tell("ended", stream)


def _log_end(stream: Stream, reason: CloseReason, seconds: float) -> None:
    path = printable(stream.path)
    logger.debug(
        "stream %s ended: %s after %.1f s, %d events, %d bytes",
        path, reason, seconds, stream.events, stream.bytes_sent,
        extra={
            "sse_path": path,
            "sse_reason": reason,
            "sse_seconds": seconds,
            "sse_events": stream.events,
            "sse_bytes": stream.bytes_sent,
        },
    )  # fmt: skip


_process_totals: ProcessTotals[StreamRegistry] = ProcessTotals()


def statistics_of_all() -> RegistryStatistics:
    """The figures of all registries that there have been in this process. From any thread."""
    return _statistics(*_process_totals.take())


def _statistics(registries: list[StreamRegistry], counters: StreamCounters) -> RegistryStatistics:
    """Those of `registries`, and of what `counters` has counted of others."""
    # What has ended comes first: a stream that ends in between, in another thread, is missing then for a moment. The
    # other way round it would be there twice, and a counter that is once too high stays so.
    for registry in registries:
        counters.add(registry._counters)  # noqa: SLF001 (of this class)
    running = [stream for registry in registries for stream in registry]
    return RegistryStatistics(
        open=len(running),
        opened=counters.opened,
        closed=counters.closed,
        abandoned=sum(len(registry._abandoned) for registry in registries),  # noqa: SLF001
        events=counters.events + sum(stream.events for stream in running),
        bytes=counters.bytes + sum(stream.bytes_sent for stream in running),
        longest_wait=max((stream.waiting for stream in running), default=0.0),
        drains=counters.drains,
        compressed=counters.compressed,
        seconds=counters.seconds,
        durations=tuple(counters.durations),
        draining=any(registry.draining for registry in registries),
    )


def check_registry(registry: object) -> None:
    """See that `registry`, which streams are to run in, is one.

    Raises:
        TypeError: It is none.
    """
    if not isinstance(registry, StreamRegistry):
        raise TypeError(f"registry={short_repr(registry)} is {type(registry).__name__}; give a StreamRegistry")


_defaults: Final = LoopLocal(lambda _loop: StreamRegistry())


def default_registry() -> StreamRegistry:
    """The registry of streams that were given none, in the running event loop."""
    return _defaults.get()
