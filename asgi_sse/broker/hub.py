"""Who subscribes to what, in this process, and the log that they all read."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from .._eventloop import EventLoop, current_loop, running_loop
from ..errors import BrokerError, InvalidEventError, shown
from ..event import ServerSentEvent, as_event
from ..log import Entry, EventLog, is_pattern, pattern_test
from ..routing import HTTPError

if TYPE_CHECKING:
    from collections.abc import Callable

clock: Final = time.monotonic

_RETRY_AFTER: Final = 5
"""Seconds after which a client may try again that has found a channel full."""


def unnumbered(item: Any) -> ServerSentEvent:
    """The event that is to be published.

    Raises:
        InvalidEventError: It is none, or has an id of its own.
    """
    event = as_event(item)
    if event.id is not None:
        raise InvalidEventError(f"id={shown(event.id)}: a broker numbers its events itself; leave the id out")
    return event


class Reader(Protocol):
    """What the hub needs of a subscription."""

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

    def wake(self) -> None:
        """There is something to read. Called in its event loop."""
        ...

    def broker_closes(self) -> None:
        """The server stops. From any thread."""
        ...


class FullError(BrokerError, HTTPError):
    """A channel has as many subscribers as it may. As the answer to a request: 503."""

    def __init__(self, channel: str, number: int) -> None:
        detail = f"{channel} has {number} subscribers already, the most there may be"
        super().__init__(503, detail, {"retry-after": str(_RETRY_AFTER)})


class Ending(Protocol):
    """What the hub needs of a channel that ends: see `run.Run`."""

    final: int | None


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
        self.channels = {channel for channel in log.channels if test(channel)}
        self.readers: set[Reader] = set()
        self._log = log
        self._bound = 0
        self.prune()

    def add(self, channel: str) -> None:
        """`channel` is known, maybe again."""
        self.channels.add(channel)
        if len(self.channels) > self._bound:
            self.prune()

    def prune(self) -> None:
        """Let go of the channels of which nothing is known any more."""
        self.channels = {channel for channel in self.channels if channel in self._log}
        self._bound = 2 * len(self.channels) + 100


class Hub:
    """Appends to a log from any thread, and wakes who reads it.

    Attributes:
        log: The log. Read and written with `lock` held.
        lock: Never held across anything that waits, nor while another one's code runs.
        max_subscribers: How many may read a channel by its name.
    """

    def __init__(self, log: EventLog, *, max_subscribers: int | None = None) -> None:
        self.log = log
        self.lock = threading.Lock()
        self.max_subscribers = max_subscribers
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
            channels: dict[str, None] = {}
            for name in reader.names:
                if is_pattern(name):
                    pattern = self._pattern(name)
                    pattern.readers.add(reader)
                    channels.update(dict.fromkeys(pattern.channels))
                else:
                    self._exact.setdefault(name, set()).add(reader)
                    channels[name] = None
            reader.begun(list(channels))

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

    def publish(self, channel: str, event: ServerSentEvent, *, ends: Ending | None = None) -> Entry:
        """Append an event, the last one of `ends`, and wake those who read its channel."""
        running = running_loop()
        here: list[Reader] = []
        there: list[_Group] = []
        with self.lock:
            entry = self.log.append(channel, event, clock())
            if ends is not None:
                ends.final = entry.number
            before = entry.number - 1
            matching = self._by_pattern(channel)
            for pattern in matching:
                pattern.add(channel)
            for readers in (self._exact.get(channel, ()), *(pattern.readers for pattern in matching)):
                for reader in readers:
                    if not reader.published(channel, before):
                        continue
                    group = self._groups[reader]
                    if group.loop is running:
                        here.append(reader)
                    else:
                        if not group.pending:
                            there.append(group)
                        group.pending.add(reader)
        for reader in here:
            reader.wake()
        for group in there:
            group.loop.call_threadsafe(partial(self._wake, group))
        return entry

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
