"""`StreamRegistry`: the running streams of an app, their statistics, and their end when the server stops."""

import logging
import math
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from asgi_sse.errors import printable, short_repr
from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.protocol.validation import check_number
from asgi_sse.runtime.current import LoopLocal, current_loop
from asgi_sse.runtime.deadlines import DeadlineQueue, current_deadlines
from asgi_sse.runtime.server import Server
from asgi_sse.runtime.shutdown import ShutdownWatch

from .counters import ProcessTotals, RegistryStatistics, StreamCounters
from .drain import Drain, DrainReport
from .observer import EndedCallback, Observer, ObserverList
from .stream import Stream

if TYPE_CHECKING:
    from asgi_sse.runtime.base import EventLoop

logger: Final = logging.getLogger(__name__)

_FORCED_END_S: Final = 2.5
"""Seconds that a drain waits beyond its deadline for the streams that it cancelled there. The end of a body that the
client does not read takes up to 1 s, and so does the server's report that the connection has ended."""

_SIGNAL_EXPIRY_S: Final = 5.0
"""Seconds beyond the drain timeout after which a server counts as running again, if only a signal announced its stop.
The handler of a signal may let the server run on."""


class StreamRegistry:
    """The running streams of one app, and how they end when its server stops.

    Iterating yields the running streams, ``len()`` counts them. Several servers in one process may share a registry.
    When one of them stops, the streams of the others continue.

    Args:
        drain_timeout: Seconds that streams have to end when the server stops.
        drain_retry: Lowest and highest reconnection time, in milliseconds. Each drained client receives a random value
            of this range, so that the clients do not all reconnect at the same moment.

    Raises:
        TypeError: `drain_timeout` is not a number.
        ValueError: A value is out of range.
    """

    def __init__(self, *, drain_timeout: float = 10.0, drain_retry: tuple[int, int] = (1000, 5000)) -> None:
        match drain_retry:
            case (int(low), int(high)) if 0 <= low <= high and bool not in map(type, drain_retry):
                self._drain_retry = (low, high)
            case _:
                raise ValueError(
                    "drain_retry must be two whole numbers of milliseconds, the lower first, got "
                    f"{short_repr(drain_retry)}; pass a range such as (1000, 5000)"
                )
        check_number("drain_timeout", drain_timeout)
        self._drain_timeout = drain_timeout
        self._streams: dict[Stream, DeadlineQueue] = {}
        self._abandoned: set[Stream] = set()  # held, or asyncio could collect a task that still runs
        self._draining = False  # set for all servers by `begin_drain` and `drain`
        # The servers that are stopping, each with the time of its loop at which that expires. This dict and the next
        # are replaced, never changed, since servers in other threads read them.
        self._stopping: dict[Server, float] = {}
        self._watches: dict[Server, ShutdownWatch] = {}
        self._lock = threading.Lock()  # held while they are replaced
        self._drains: list[Drain] = []
        self._draining_callbacks: list[Callable[[Server | None, float], object]] = []
        self._observers = ObserverList()
        self._counters = StreamCounters()
        _process_totals.register(self, self._counters)

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(list(self._streams))

    @property
    def draining(self) -> bool:
        """Whether a server is stopping, or `begin_drain` or `drain` was called. New clients are told to reconnect."""
        return self._draining or any(
            not server.loop.closed and server.loop.time() < expires for server, expires in self._stopping.items()
        )

    def statistics(self) -> RegistryStatistics:
        """Return the current statistics. Safe from any thread and from a signal handler."""
        return _statistics([self], StreamCounters())

    def when_ended(self, callback: Callable[[Stream], object]) -> Callable[[], None]:
        """Call `callback` with each stream that ends; ``stream.reason`` says why it did.

        The callback runs in the task and the context of the stream's request, as `Observer.ended` does. Its exceptions
        are logged.

        Args:
            callback: A function of the stream.

        Returns:
            A function that removes the callback.
        """
        return self._observers.add(EndedCallback(callback))

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Call the hooks of `observer` for each stream.

        Args:
            observer: An instance of `Observer`.

        Returns:
            A function that removes the observer.
        """
        return self._observers.add(observer)

    def reconnection_time(self) -> int:
        """Return a random reconnection time of the range, in milliseconds."""
        return random.randint(*self._drain_retry)  # noqa: S311 (it spreads load and protects nothing)

    def begin_drain(self) -> None:
        """Ask every stream to end. Streams that watch ``Request.draining`` have the grace period for it.

        Safe from any thread and from a signal handler. Idempotent. The registry keeps draining until a server starts
        with it.
        """
        self._draining = True
        self._call_draining(None, self._drain_timeout)
        self._drain_in_loops(list(self._streams), self._drain_timeout)

    def end(self, streams: Iterable[Stream]) -> None:
        """Drain `streams` only. Their clients are accepted again at once.

        Safe from any thread. ``registry.end(registry)`` sends all clients away, each with its own reconnection time.

        Args:
            streams: Running streams. A stream that has ended is ignored.
        """
        self._drain_in_loops(list(streams), self._drain_timeout)

    async def drain(self, timeout: float | None = None) -> DrainReport:
        """Ask every stream to end, and wait until all have ended.

        The registry keeps draining until a server starts with it.

        Args:
            timeout: Seconds that the streams have to end. ``None`` means ``drain_timeout``.

        Returns:
            How the streams have ended.

        Raises:
            TypeError: `timeout` is not a number.
            ValueError: `timeout` is negative.
        """
        check_number("timeout", timeout, optional=True)
        seconds = self._drain_timeout if timeout is None else timeout
        self._draining = True
        self._call_draining(None, seconds)
        return await self._drain(list(self._streams), seconds, "drain()")

    def _drain_in_loops(self, streams: list[Stream], seconds: float) -> None:
        """Ask `streams` to end, each in its own event loop. A stream that is draining keeps an earlier deadline."""
        loops: dict[EventLoop, list[Stream]] = {}
        for stream in streams:
            loops.setdefault(stream.loop, []).append(stream)
        for loop, streams_of_loop in loops.items():
            if not loop.call_threadsafe(partial(self._drain_here, streams_of_loop, seconds)):
                for stream in streams_of_loop:  # the loop was closed under its streams
                    self.discard(stream)

    def _drain_here(self, streams: list[Stream], seconds: float) -> None:
        """Ask `streams` to end, in their event loop."""
        for stream in streams:
            stream.drain(self.reconnection_time(), seconds)

    async def _drain(self, streams: list[Stream], seconds: float, cause: str) -> DrainReport:
        drain = Drain(current_loop(), streams)
        # Several drains may wait for one stream. Only the first one counts and logs it.
        new = [stream for stream in streams if not any(stream in other for other in self._drains)]
        self._drains.append(drain)
        self._drain_in_loops(streams, seconds)
        try:
            await drain.wait(seconds + _FORCED_END_S)
        finally:
            self._drains.remove(drain)
            if new:
                self._counters.count_drain()
                report = drain.report(new)
                logger.info(
                    "drained %d stream%s (%s): %s", len(new), "s" * (len(new) != 1), cause, report,
                    extra={"sse_streams": len(new), "sse_cause": cause, "sse_seconds": report.seconds},
                )  # fmt: skip
        return drain.report(streams)

    # Called by responses and by the middleware

    def when_draining(self, callback: Callable[[Server | None, float], object]) -> None:
        """Call `callback` whenever streams are to end.

        Args:
            callback: Called with the server that stops, or ``None`` for all servers, and with the seconds that streams
                have to end. It may be called more than once for a server, and from any thread.
        """
        self._draining_callbacks.append(callback)

    def _call_draining(self, server: Server | None, seconds: float) -> None:
        for callback in self._draining_callbacks:
            callback(server, seconds)

    def watch(self, server: Server) -> None:
        """Watch `server` for its shutdown, which its lifespan reports too late. Call this in its event loop."""
        if server not in self._watches:
            watch = ShutdownWatch(server, self._server_stopping, self._forget_server)
            with self._lock:
                alive = {known: other for known, other in self._watches.items() if other.alive}
                self._watches = {**alive, server: watch}

    def is_draining(self, server: Server) -> bool:
        """Return whether a new stream through `server` is to end at once."""
        if self._draining or not self._stopping:
            return self._draining
        now = server.loop.time()
        return any(stopping.covers(server) and now < expires for stopping, expires in self._stopping.items())

    def start(self, server: Server) -> None:
        """Stop draining, because `server` starts with this registry."""
        self._draining = False
        for stopped in self._stopping:
            if stopped.covers(server):
                self._forget_server(stopped)

    async def stop(self, server: Server) -> None:
        """End the streams of `server`, wait for them, and forget the server, whose lifespan shuts down."""
        self._mark_stopping(server, math.inf)
        self._call_draining(server, self._drain_timeout)
        streams = self._streams_of(server)
        self._drain_here(streams, self._drain_timeout)
        try:
            await self._drain(streams, self._longest_grace(streams), "lifespan.shutdown")
        finally:
            for known in {*self._stopping, *self._watches}:
                if known.covers(server):
                    self._forget_server(known)

    def _mark_stopping(self, server: Server, expires: float) -> None:
        with self._lock:
            self._stopping = {**self._stopping, server: max(expires, self._stopping.get(server, 0.0))}

    def _forget_server(self, server: Server) -> None:
        """Forget `server`, which has stopped. Another one may start in its place."""
        with self._lock:
            self._stopping = {known: expires for known, expires in self._stopping.items() if known is not server}
            watch = self._watches.get(server)
            self._watches = {known: other for known, other in self._watches.items() if known is not server}
        if watch is not None:
            watch.close()

    def count_compressed(self, kind: str) -> None:
        """Count a stream that a middleware has ``"encoded"``, ``"held"`` or ``"buffered"``."""
        self._counters.count_compressed(kind)

    def _server_stopping(self, server: Server, cause: str, certain: bool) -> None:  # noqa: FBT001
        known = self.is_draining(server)
        expires = math.inf if certain else server.loop.time() + self._drain_timeout + _SIGNAL_EXPIRY_S
        self._mark_stopping(server, expires)
        self._call_draining(server, self._drain_timeout)
        streams = self._streams_of(server)
        self._drain_here(streams, self._drain_timeout)  # in this turn, since daphne cancels its requests in the next
        if not known:

            async def wait() -> None:
                await self._drain(streams, self._longest_grace(streams), cause)

            server.loop.spawn(wait, "asgi_sse drain")

    def _longest_grace(self, streams: list[Stream]) -> float:
        return max([self._drain_timeout, *(stream.grace for stream in streams)])

    def _streams_of(self, server: Server) -> list[Stream]:
        return [stream for stream in list(self._streams) if server.covers(stream.server)]

    # Called by streams (`stream.StreamObserverHost`)

    def add(self, stream: Stream) -> None:
        """Add `stream`, which begins."""
        self._streams[stream] = current_deadlines()
        self._counters.count_opened()
        self._observers.call("begun", stream)
        if self.is_draining(stream.server):  # another thread may have begun a drain since the response checked
            self._drain_here([stream], self._drain_timeout)

    def arm(self, stream: Stream, when: float) -> None:
        """Call `stream.tick` at a time of its event loop, at the latest."""
        deadlines = self._streams.get(stream)
        if deadlines is not None:
            deadlines.arm(stream, when)

    def ending(self, stream: Stream) -> None:
        """Call the observers before the last message of `stream` is sent."""
        self._observers.call("ending", stream)

    def discard(self, stream: Stream) -> None:
        """Remove `stream`, which has ended. If its source is abandoned, hold it until a second call."""
        if stream.abandoned:
            self._abandoned.add(stream)
        else:
            self._abandoned.discard(stream)
        deadlines = self._streams.pop(stream, None)
        if deadlines is None:
            return
        deadlines.forget(stream)
        if stream.reason is None:  # the event loop was closed under the stream
            stream.reason = "disconnected"
        reason, seconds = stream.reason, stream.age
        self._counters.count_closed(reason, seconds, stream.events, stream.bytes_sent)
        if logger.isEnabledFor(logging.DEBUG):
            _log_end(stream, reason, seconds)
        for drain in list(self._drains):
            drain.discard(stream)
        self._observers.call("ended", stream)


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
    """Return the summed statistics of all registries of this process. Safe from any thread and a signal handler."""
    return _statistics(*_process_totals.read())


def _statistics(registries: list[StreamRegistry], counters: StreamCounters) -> RegistryStatistics:
    """Return the summed statistics of `registries`, added to the counts in `counters`."""
    # Ended streams are counted before the running ones. A stream that another thread ends in between is missing for a
    # moment. In the other order it would be counted twice, and a counter that has been too high cannot go back.
    for registry in registries:
        counters.add(registry._counters)  # noqa: SLF001 (of this class)
    running = [stream for registry in registries for stream in registry]
    counters.events += sum(stream.events for stream in running)
    counters.bytes += sum(stream.bytes_sent for stream in running)
    return RegistryStatistics(
        **counters.snapshot(),
        open=len(running),
        abandoned=sum(len(registry._abandoned) for registry in registries),  # noqa: SLF001
        longest_wait=max((stream.waiting for stream in running), default=0.0),
        draining=any(registry.draining for registry in registries),
    )


def check_registry(registry: object) -> None:
    """Raise if `registry` is not a `StreamRegistry`.

    Raises:
        TypeError: `registry` is something else.
    """
    if not isinstance(registry, StreamRegistry):
        raise TypeError(f"registry must be a StreamRegistry, got {short_repr(registry)}; pass an instance or None")


_defaults: Final = LoopLocal(lambda _loop: StreamRegistry())


def default_registry() -> StreamRegistry:
    """Return the registry of the running event loop, for streams that were given none."""
    return _defaults.get()
