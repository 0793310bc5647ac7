"""Who subscribes to what, in this process, and the log that they all read."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from asgi_sse.errors import BrokerError, InvalidEventError, short_repr
from asgi_sse.protocol.event import ServerSentEvent, as_event
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.current import current_loop, running_loop

from .patterns import is_pattern, pattern_test

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from asgi_sse.runtime.base import EventLoop

    from .log import EventLog
    from .ring import Entry

clock: Final = time.monotonic

_RETRY_AFTER: Final = 5
"""Seconds after which a client may try again that has found a channel full, or the engine silent."""


def unnumbered(item: Any) -> ServerSentEvent:
    """The event that is to be published.

    Raises:
        InvalidEventError: It is none, or has an id of its own.
    """
    event = as_event(item)
    if event.id is not None:
        raise InvalidEventError(f"id={short_repr(event.id)}: a broker numbers its events itself; leave the id out")
    return event


class Reader(Protocol):
    """What the dispatcher needs of a subscription."""

    names: tuple[str, ...]

    def begun(self, channels: list[str]) -> None:
        """It is in, and reads `channels`: its names, and all known ones that its patterns match. With the lock held."""
        ...

    def published(self, channel: str, before: int) -> bool:
        """`channel` has an event behind a number. Called with the lock held, from any thread.

        Returns:
            Whether to wake it: it had read all there was, and would not look again by itself.
        """
        ...

    def missed(self, channel: str) -> bool:
        """`channel` had events that are not here; as `published`."""
        ...

    def restarted(self, channels: list[str], *, same: bool) -> bool:
        """The log is empty, and another one unless it is the `same`; as `begun` and `published`."""
        ...

    def unread(self, beyond: int) -> int:
        """How many events it has not read, about; or 0, if there are no more than `beyond`. With the lock held."""
        ...

    def wake(self) -> None:
        """There is something to read. Called in its event loop."""
        ...

    def broker_closes(self) -> None:
        """The server stops. From any thread."""
        ...


class FullError(BrokerError, HTTPError):
    """A channel has as many subscribers as it may. As the answer to a request: 503."""

    def __init__(self, channel: str, offset: int) -> None:
        detail = f"{channel} has {offset} subscribers already, the most there may be"
        super().__init__(503, detail, {"retry-after": str(_RETRY_AFTER)})


class UnavailableError(BrokerError, HTTPError):
    """The engine does not say what has to be known first. As the answer to a request: 503.

    Who is answered is not told why: that names the engine, and what is wrong with it.
    """

    def __init__(self, why: str) -> None:
        super().__init__(503, headers={"retry-after": str(_RETRY_AFTER)})
        self._why = why

    def __str__(self) -> str:
        return f"{self.status} {self._why}"


class TooLargeError(BrokerError, HTTPError):
    """The engine takes no event of that size, however often it is tried. As the answer to a request: 413."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__(413, f"the event has {size} bytes as it is sent to the engine, which takes {most}")


class Upstream(Protocol):
    """The log of which that of a dispatcher is a part."""

    async def sync(self) -> None:
        """Return when all is here that it had at the time of the call."""
        ...

    async def recall(self, channels: list[str]) -> None:
        """Fill in what it has of these channels and the dispatcher's log has not."""
        ...


class _Group:
    """The readers of one event loop."""

    __slots__ = ("loop", "pending", "readers")

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.readers: set[Reader] = set()
        self.pending: set[Reader] = set()  # to be woken by a call that is under way to another thread


class _Pattern:
    """Who reads by one pattern, and what it matches of what is known."""

    __slots__ = ("_bound", "_log", "channels", "readers", "test")

    def __init__(self, test: Callable[[str], bool], log: EventLog) -> None:
        self.test = test
        self.readers: set[Reader] = set()
        self._log = log
        self.begin()

    def begin(self) -> None:
        """Look at all that is known."""
        self.channels = {channel for channel in self._log.channels if self.test(channel)}
        self._bound = 2 * len(self.channels) + 100

    def add(self, channel: str) -> None:
        """`channel` is known, maybe again."""
        self.channels.add(channel)
        if len(self.channels) > self._bound:
            self.prune()

    def prune(self) -> None:
        """Let go of the channels of which nothing is known any more."""
        self.channels = {channel for channel in self.channels if channel in self._log}
        self._bound = 2 * len(self.channels) + 100


class Dispatcher:
    """Appends to a log from any thread, and wakes who reads it.

    Attributes:
        log: The log. Read and written with `lock` held.
        lock: Never held across anything that waits, nor while another one's code runs.
        max_subscribers: How many may read a channel by its name.
        upstream: The log of which this one is a part, if it is one.
        on_end: Called with the last event of each run. With the lock held, from any thread.
        on_restart: Called with the tail of a log that is another one from now on; as `on_end`.
    """

    def __init__(self, log: EventLog, *, max_subscribers: int | None = None) -> None:
        self.log = log
        self.lock = threading.Lock()
        self.max_subscribers = max_subscribers
        self.upstream: Upstream | None = None
        self.on_end: Callable[[Entry], None] = _nothing
        self.on_restart: Callable[[int], None] = _nothing
        self._groups: dict[Reader, _Group] = {}
        self._loops: dict[EventLoop, _Group] = {}
        self._exact: dict[str, set[Reader]] = {}
        self._patterns: dict[str, _Pattern] = {}
        self._matching: dict[str, list[_Pattern]] = {}  # by channel; cleared when a pattern comes or goes

    def join(self, reader: Reader) -> None:
        """`reader` is to be woken from now on, in the event loop of the caller.

        Raises:
            FullError: One of its channels has as many subscribers as it may.
        """
        loop = current_loop()
        with self.lock:
            self._bury()
            self.log.expire(clock())  # channels that nobody publishes to have nobody else who looks at their age
            if self.max_subscribers is not None:
                for name in reader.names:
                    if len(self._exact.get(name, ())) >= self.max_subscribers:
                        raise FullError(name, self.max_subscribers)
            group = self._loops.setdefault(loop, _Group(loop))
            group.readers.add(reader)
            self._groups[reader] = group
            for name in reader.names:
                if is_pattern(name):
                    self._pattern(name).readers.add(reader)
                else:
                    self._exact.setdefault(name, set()).add(reader)
            reader.begun(self._channels_of(reader))

    @property
    def readers(self) -> int:
        """How many there are."""
        return len(self._groups)

    @property
    def lag(self) -> int:
        """How many events the reader has not read, about, that has the most of them to read."""
        lag = 0
        with self.lock:
            for reader in self._groups:
                lag = max(lag, reader.unread(lag))
        return lag

    def close(self) -> None:
        """Tell all readers that the server stops. Without the lock: who says so may be a signal's handler."""
        for reader in list(self._groups):
            reader.broker_closes()

    def leave(self, reader: Reader) -> bool:
        """`reader` is not to be woken any more. False: it had not joined."""
        with self.lock:
            return self._leave(reader)

    def subscribers(self, channel: str) -> int:
        """How many read `channel` now, by its name or by a pattern."""
        with self.lock:
            self._bury()
            readers = set(self._exact.get(channel, ()))
            return len(readers.union(*(pattern.readers for pattern in self._by_pattern(channel))))

    def publish(
        self,
        channel: str,
        event: ServerSentEvent,
        *,
        offset: int | None = None,
        time: float | None = None,
        end: str | None = None,
    ) -> Entry:
        """Append an event, and wake those who read its channel.

        Args:
            channel: The channel.
            event: The event.
            offset: Its number, if somebody else has numbered it.
            time: When it was published, by `clock`. Default: now.
            end: How the run ended of which it is the last one.
        """
        with self.lock:
            entry = self.log.append(channel, event, clock() if time is None else time, offset=offset, end=end)
            if end is not None:
                self.on_end(entry)
            before = entry.offset - 1
            groups = self._readers_of(channel, new=True)
            to_wake = [reader for readers in groups for reader in readers if reader.published(channel, before)]
            here, there = self._by_loop(to_wake)
        self._wake_all(here, there)
        return entry

    def is_wanted(self, channel: str) -> bool:
        """Whether anybody reads `channel`, or all of it is kept."""
        with self.lock:
            return self.log.is_kept(channel) or any(self._readers_of(channel))

    def miss(self, channel: str, offset: int) -> None:
        """`channel` had events up to a number that are not here."""
        with self.lock:
            self.log.miss(channel, offset)
            groups = self._readers_of(channel, new=True)  # of a pattern, who comes later is to know of it
            to_wake = [reader for readers in groups for reader in readers if reader.missed(channel)]
            here, there = self._by_loop(to_wake)
        self._wake_all(here, there)

    def look_again(self, channel: str) -> None:
        """Have those who read `channel` see what has changed without an event."""
        with self.lock:
            groups = self._readers_of(channel)
            to_wake = [reader for readers in groups for reader in readers if reader.missed(channel)]
            here, there = self._by_loop(to_wake)
        self._wake_all(here, there)

    def restart(self, epoch: str, last_offset: int, known: Iterable[tuple[str, int]] = (), *, floor: int) -> None:
        """The log is another one from now on, or has lost events of nobody knows which channels.

        Args:
            epoch: As of `EventLog.restart`.
            last_offset: See there.
            known: See there.
            floor: See there.
        """
        with self.lock:
            same = epoch == self.log.epoch
            self.log.restart(epoch, last_offset, known, floor)
            for pattern in self._patterns.values():
                pattern.begin()
            if not same:
                self.on_restart(last_offset)
            lost = [reader for reader in self._groups if reader.restarted(self._channels_of(reader), same=same)]
            here, there = self._by_loop(lost)
        self._wake_all(here, there)

    def _readers_of(self, channel: str, *, new: bool = False) -> list[Collection[Reader]]:
        """Those by its name, and those by each pattern: whoever publishes goes through them all."""
        matching = self._by_pattern(channel)
        if new:
            for pattern in matching:
                pattern.add(channel)
        return [self._exact.get(channel, ()), *(pattern.readers for pattern in matching)]

    def _by_loop(self, readers: Iterable[Reader]) -> tuple[list[Reader], list[_Group]]:
        """Who is to be woken here, and which other event loops are to be told. With the lock held."""
        running = running_loop()
        here: list[Reader] = []
        there: list[_Group] = []
        for reader in readers:
            group = self._groups[reader]
            if group.loop is running:
                here.append(reader)
            else:
                if not group.pending:
                    there.append(group)
                group.pending.add(reader)
        return here, there

    def _wake_all(self, here: list[Reader], there: list[_Group]) -> None:
        for reader in here:
            reader.wake()
        for group in there:
            group.loop.call_threadsafe(partial(self._wake, group))

    def _channels_of(self, reader: Reader) -> list[str]:
        """Its names, and all known ones that its patterns match."""
        channels: dict[str, None] = {}
        for name in reader.names:
            channels.update(dict.fromkeys(self._patterns[name].channels) if is_pattern(name) else {name: None})
        return list(channels)

    def _pattern(self, name: str) -> _Pattern:
        pattern = self._patterns.get(name)
        if pattern is None:
            pattern = self._patterns[name] = _Pattern(pattern_test(name), self.log)
            self._matching.clear()
        else:
            pattern.prune()
        return pattern

    def _by_pattern(self, channel: str) -> list[_Pattern]:
        if not self._patterns:
            return []
        patterns = self._matching.get(channel)
        if patterns is None:
            patterns = [pattern for pattern in self._patterns.values() if pattern.test(channel)]
            if len(self._matching) > 10_000:  # as many channels as a log keeps by default
                self._matching.clear()
            self._matching[channel] = patterns
        return patterns

    def _leave(self, reader: Reader) -> bool:
        group = self._groups.pop(reader, None)
        if group is None:
            return False
        group.readers.discard(reader)
        group.pending.discard(reader)
        if not group.readers:
            self._loops.pop(group.loop, None)
        for name in reader.names:
            if is_pattern(name):
                pattern = self._patterns[name]
                pattern.readers.discard(reader)
                if not pattern.readers:
                    del self._patterns[name]
                    self._matching.clear()
            else:
                self._exact[name].discard(reader)
                if not self._exact[name]:
                    del self._exact[name]
        return True

    def _bury(self) -> None:
        """Let go of the readers of event loops that were closed under them."""
        for group in list(self._loops.values()):
            if group.loop.closed:
                for reader in list(group.readers):
                    self._leave(reader)

    def _wake(self, group: _Group) -> None:
        with self.lock:
            pending, group.pending = group.pending, set()
        for reader in pending:
            reader.wake()


def _nothing(_: object) -> None:
    """Nobody asks."""
