"""Who subscribes to what, in this process, and the log that they all read."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from .._eventloop import EventLoop, current_loop
from ..errors import BrokerError, InvalidEventError, shown
from ..event import ServerSentEvent, as_event
from ..log import Entry, EventLog, is_pattern, pattern_test

if TYPE_CHECKING:
    from collections.abc import Callable

clock: Final = time.monotonic


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

    def published(self, channel: str, before: int) -> bool:
        """`channel` has an event behind a number. Called with the lock held, from any thread.

        Returns:
            Whether to wake it: it had read all there was, and would not look again by itself.
        """
        ...

    def wake(self) -> None:
        """There is something to read. Called in its event loop."""
        ...


class Ending(Protocol):
    """What the hub needs of a channel that ends: see `run.Run`."""

    final: int | None


class _Group:
    """The readers of one event loop."""

    __slots__ = ("loop", "pending", "readers", "thread")

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.thread = threading.get_ident()
        self.readers: set[Reader] = set()
        self.pending: set[Reader] = set()  # to be woken by a call that is under way to another thread


class Hub:
    """Appends to a log from any thread, and wakes who reads it.

    Attributes:
        log: The log. Read and written with `lock` held.
        lock: Held for microseconds, and never across anything that waits.
    """

    def __init__(self, log: EventLog, *, max_subscribers: int | None = None) -> None:
        self.log = log
        self.lock = threading.Lock()
        self.max_subscribers = max_subscribers
        self._groups: dict[Reader, _Group] = {}
        self._loops: dict[EventLoop, _Group] = {}
        self._exact: dict[str, set[Reader]] = {}
        self._patterns: dict[Reader, list[Callable[[str], bool]]] = {}
        self._matching: dict[str, list[Reader]] = {}  # by patterns

    def full(self, names: tuple[str, ...]) -> str | None:
        """The first of `names` that has as many subscribers as it may."""
        if self.max_subscribers is not None:
            for name in names:
                if len(self._exact.get(name, ())) >= self.max_subscribers:
                    return name
        return None

    def join(self, reader: Reader) -> list[str]:
        """`reader` is to be woken from now on, in the event loop of the caller.

        Returns:
            The channels that it reads: its names, and all that is known of what its patterns match.

        Raises:
            BrokerError: One of its channels has as many subscribers as it may.
        """
        loop = current_loop()
        with self.lock:
            self.log.expire(clock())  # a channel that nobody publishes to has nobody else who looks at its age
            name = self.full(reader.names)
            if name is not None:
                raise BrokerError(f"{name} has {self.max_subscribers} subscribers already, the most there may be")
            group = self._loops.get(loop)
            if group is None:
                group = self._loops[loop] = _Group(loop)
            group.readers.add(reader)
            self._groups[reader] = group
            channels = [name for name in reader.names if not is_pattern(name)]
            for name in channels:
                self._exact.setdefault(name, set()).add(reader)
            tests = [pattern_test(name) for name in reader.names if is_pattern(name)]
            if tests:
                self._patterns[reader] = tests
                self._matching.clear()
                channels += [
                    name for name in self.log.channels if name not in channels and any(test(name) for test in tests)
                ]
            return channels

    def leave(self, reader: Reader) -> bool:
        """`reader` is not to be woken any more. False: it had not joined."""
        with self.lock:
            group = self._groups.pop(reader, None)
            if group is None:
                return False
            group.readers.discard(reader)
            group.pending.discard(reader)
            if not group.readers:
                self._loops.pop(group.loop, None)
            for name in reader.names:
                readers = self._exact.get(name)
                if readers is not None:
                    readers.discard(reader)
                    if not readers:
                        del self._exact[name]
            if self._patterns.pop(reader, None) is not None:
                self._matching.clear()
            return True

    def subscribers(self, channel: str) -> int:
        """How many read `channel` now, by its name or by a pattern."""
        with self.lock:
            return len({*self._exact.get(channel, ()), *self._by_pattern(channel)})

    def publish(self, channel: str, event: ServerSentEvent, *, ends: Ending | None = None) -> Entry:
        """Append an event, the last one of `ends`, and wake those who read its channel."""
        thread = threading.get_ident()
        here: list[Reader] = []
        there: list[_Group] = []
        with self.lock:
            entry = self.log.append(channel, event, clock())
            if ends is not None:
                ends.final = entry.number
            before = entry.number - 1
            exact = self._exact.get(channel, ())
            for reader in (*exact, *(r for r in self._by_pattern(channel) if r not in exact)):
                if not reader.published(channel, before):
                    continue
                group = self._groups[reader]
                if group.loop.closed:
                    continue  # and its readers with it
                if group.thread == thread:
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

    def _by_pattern(self, channel: str) -> list[Reader]:
        if not self._patterns:
            return []
        readers = self._matching.get(channel)
        if readers is None:
            readers = [reader for reader, tests in self._patterns.items() if any(test(channel) for test in tests)]
            if len(self._matching) > 10_000:  # as many channels as a log keeps by default
                self._matching.clear()
            self._matching[channel] = readers
        return readers

    def _wake(self, group: _Group) -> None:
        with self.lock:
            pending, group.pending = group.pending, set()
        for reader in pending:
            reader.wake()
