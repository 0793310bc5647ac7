"""`Dispatcher`: wakes the subscribers of this process when events are added to the log that they all read."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from asgi_sse.errors import BrokerError
from asgi_sse.routing.request import HTTPError
from asgi_sse.runtime.current import current_loop, running_loop

from .patterns import is_pattern, pattern_test

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.runtime.base import EventLoop

    from .log import EventLog
    from .ring import Entry

clock: Final = time.monotonic

_RETRY_AFTER_S: Final = 5
"""Seconds after which a client may retry when a channel was full or the backend did not answer."""

_MAX_MATCHING: Final = 10_000
"""Channels whose matching patterns are remembered: as many as a log keeps by default."""


class Subscriber(Protocol):
    """What the dispatcher needs of a subscription. All methods are called with the lock held, except where they say so.

    Attributes:
        names: The channels, and patterns of channels.
    """

    names: tuple[str, ...]

    def started(self, channels: list[str]) -> None:
        """Begin to receive notifications.

        Args:
            channels: The names, and all known channels that match the patterns.
        """
        ...

    def published(self, channel: str, before: int) -> bool:
        """Note that `channel` has an event after the offset `before`. Called from any thread.

        Returns:
            Whether to wake the subscriber. It is woken if it had read everything, because it does not look again by
            itself.
        """
        ...

    def missed(self, channel: str) -> bool:
        """Note that events of `channel` were lost, or that its run has ended; as `published`."""
        ...

    def log_restarted(self, channels: list[str], *, same_epoch: bool) -> bool:
        """Note that the log is empty now; as `started` and `published`.

        Args:
            channels: As for `started`.
            same_epoch: Whether it is still the same log. If not, earlier ids have no meaning any more.
        """
        ...

    def unread(self, above: int) -> int:
        """Return about how many events are unread, or 0 if it is not more than `above`."""
        ...

    def wake(self) -> None:
        """Read, because there is something to read. Called in the subscriber's event loop, without the lock."""
        ...

    def broker_closing(self) -> None:
        """End if nothing else ends the subscriber. Called from any thread, without the lock."""
        ...


class FullError(BrokerError, HTTPError):
    """A channel has as many subscribers as `max_subscribers` allows. A request is answered with 503.

    Args:
        channel: The name of the channel.
        most: How many subscribers are allowed.
    """

    def __init__(self, channel: str, most: int) -> None:
        detail = f"channel {channel} is full (max_subscribers={most}); try again later"
        super().__init__(503, detail, {"retry-after": str(_RETRY_AFTER_S)})


class UnavailableError(BrokerError, HTTPError):
    """The backend did not give an answer that is needed first. A request is answered with 503.

    The response does not have the reason, because the reason names the server and its fault.

    Args:
        reason: The reason, for logs.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(503, headers={"retry-after": str(_RETRY_AFTER_S)})
        self._reason = reason

    def __str__(self) -> str:
        return f"{self.status} {self._reason}"


class TooLargeError(BrokerError, HTTPError):
    """The backend never accepts an event of this size. A request is answered with 413.

    Args:
        size: The encoded size of the event in bytes.
        most: The most bytes that the backend accepts.
    """

    def __init__(self, size: int, most: int) -> None:
        super().__init__(
            413, f"event must have at most {most} bytes in the encoding of the backend, got {size}; publish less data"
        )


class Upstream(Protocol):
    """The complete log on a server. The dispatcher's log is a part of it."""

    async def sync(self) -> None:
        """Wait until this process has everything that the server had when `sync` was called."""
        ...

    async def recall(self, channels: list[str]) -> None:
        """Fetch the events of `channels` that the server has and the dispatcher's log has not."""
        ...


class _Group:
    """The subscribers of one event loop."""

    __slots__ = ("loop", "pending", "subscribers")

    def __init__(self, loop: EventLoop) -> None:
        self.loop = loop
        self.subscribers: set[Subscriber] = set()
        self.pending: set[Subscriber] = set()  # woken by a call that is on its way to another thread


class _Pattern:
    """The subscribers of one pattern, and the known channels that match it."""

    __slots__ = ("_limit", "_log", "channels", "matches", "subscribers")

    def __init__(self, matches: Callable[[str], bool], log: EventLog) -> None:
        self.matches = matches
        self.subscribers: set[Subscriber] = set()
        self._log = log
        self.find_channels()

    def find_channels(self) -> None:
        """Find the matching channels among all that the log knows."""
        self.channels = {channel for channel in self._log.channels if self.matches(channel)}
        self._limit = 2 * len(self.channels) + 100

    def add(self, channel: str) -> None:
        """Add `channel`, which may be there already."""
        self.channels.add(channel)
        if len(self.channels) > self._limit:
            self.prune()

    def prune(self) -> None:
        """Remove the channels that the log does not know any more."""
        self.channels = {channel for channel in self.channels if channel in self._log}
        self._limit = 2 * len(self.channels) + 100


class Dispatcher:
    """Appends events to a log from any thread, and wakes the subscribers of their channels.

    Args:
        log: The log.
        max_subscribers: How many subscribers may read a channel by its name; ``None`` for any number.

    Attributes:
        log: The log. Hold `lock` to read or write it.
        lock: Never held across an ``await``, nor while the code of an app runs.
        max_subscribers: How many subscribers may read a channel by its name; ``None`` for any number.
        upstream: The log on a server, if there is one.
        on_end: Called with the last event of each run, from any thread, with the lock held.
        on_restart: Called with the last offset when the log gets another epoch, from any thread, with the lock held.
    """

    def __init__(self, log: EventLog, *, max_subscribers: int | None = None) -> None:
        self.log = log
        self.lock: threading.Lock = threading.Lock()
        self.max_subscribers = max_subscribers
        self.upstream: Upstream | None = None
        self.on_end: Callable[[Entry], None] = _ignore
        self.on_restart: Callable[[int], None] = _ignore
        self._groups: dict[Subscriber, _Group] = {}
        self._loops: dict[EventLoop, _Group] = {}
        self._exact: dict[str, set[Subscriber]] = {}
        self._patterns: dict[str, _Pattern] = {}
        self._matching: dict[str, list[_Pattern]] = {}  # by channel; cleared when a pattern is added or removed

    # Subscribers

    def add(self, subscriber: Subscriber) -> None:
        """Wake `subscriber` from now on, in the event loop of the caller.

        Raises:
            FullError: One of its channels has as many subscribers as `max_subscribers` allows.
        """
        loop = current_loop()
        with self.lock:
            self._remove_closed_loops()
            self.log.expire(clock())  # nothing else looks at the age of a channel without publications
            if self.max_subscribers is not None:
                for name in subscriber.names:
                    if len(self._exact.get(name, ())) >= self.max_subscribers:
                        raise FullError(name, self.max_subscribers)
            group = self._loops.setdefault(loop, _Group(loop))
            group.subscribers.add(subscriber)
            self._groups[subscriber] = group
            for name in subscriber.names:
                if is_pattern(name):
                    self._pattern(name).subscribers.add(subscriber)
                else:
                    self._exact.setdefault(name, set()).add(subscriber)
            subscriber.started(self._channels_of(subscriber))

    def remove(self, subscriber: Subscriber) -> bool:
        """Stop waking `subscriber`; return False if it was not there."""
        with self.lock:
            return self._remove(subscriber)

    def close(self) -> None:
        """Tell all subscribers that the broker closes. A signal handler may call it, so it takes no lock."""
        for subscriber in list(self._groups):
            subscriber.broker_closing()

    @property
    def subscriber_count(self) -> int:
        """The number of subscribers."""
        return len(self._groups)

    @property
    def lag(self) -> int:
        """About how many events the slowest subscriber has not read."""
        lag = 0
        with self.lock:
            for subscriber in self._groups:
                lag = max(lag, subscriber.unread(lag))
        return lag

    def subscribers(self, channel: str) -> int:
        """Return how many subscribers read `channel`, by its name or by a pattern."""
        with self.lock:
            self._remove_closed_loops()
            subscribers = set(self._exact.get(channel, ()))
            return len(subscribers.union(*(pattern.subscribers for pattern in self._matching_patterns(channel))))

    # Events

    def publish(
        self,
        channel: str,
        event: ServerSentEvent,
        *,
        offset: int | None = None,
        time: float | None = None,
        end: str | None = None,
    ) -> Entry:
        """Append an event and wake the subscribers of its channel.

        Args:
            channel: The name of the channel.
            event: The event, without an id.
            offset: The offset, if a backend has assigned one. Default: the next one.
            time: When the event was published, by `clock`. Default: now.
            end: On the last event of a run: how the run ended.
        """
        with self.lock:
            entry = self.log.append(channel, event, clock() if time is None else time, offset=offset, end=end)
            if end is not None:
                self.on_end(entry)
            before = entry.offset - 1
            groups = self._subscribers_of(channel, add_channel=True)
            to_wake = [subscriber for group in groups for subscriber in group if subscriber.published(channel, before)]
            here, elsewhere = self._by_loop(to_wake)
        self._wake_all(here, elsewhere)
        return entry

    def is_wanted(self, channel: str) -> bool:
        """Return whether `channel` has subscribers, or keeps all its events."""
        with self.lock:
            return self.log.is_kept(channel) or any(self._subscribers_of(channel))

    def miss(self, channel: str, offset: int) -> None:
        """Note that events of `channel` up to `offset` exist, or existed, but are not in the log."""
        with self.lock:
            self.log.miss(channel, offset)
            # A pattern remembers the channel, because a later subscriber must learn of the loss too.
            here, elsewhere = self._missed(channel, add_channel=True)
        self._wake_all(here, elsewhere)

    def wake(self, channel: str) -> None:
        """Wake the subscribers of `channel` because something changed without an event."""
        with self.lock:
            here, elsewhere = self._missed(channel)
        self._wake_all(here, elsewhere)

    def restart(self, epoch: str, last_offset: int, known: Iterable[tuple[str, int]] = (), *, floor: int) -> None:
        """Empty the log, because it was replaced or because events of unknown channels were lost.

        Args:
            epoch: The epoch of the log. If it is still the same, events were lost.
            last_offset: The offset of the last event.
            known: The known channels, each with its last offset; the one that was published to least recently first.
            floor: The last offset of all channels that are not known any more.
        """
        with self.lock:
            same_epoch = epoch == self.log.epoch
            self.log.restart(epoch, last_offset, known, floor)
            for pattern in self._patterns.values():
                pattern.find_channels()
            if not same_epoch:
                self.on_restart(last_offset)
            to_wake = [
                subscriber
                for subscriber in self._groups
                if subscriber.log_restarted(self._channels_of(subscriber), same_epoch=same_epoch)
            ]
            here, elsewhere = self._by_loop(to_wake)
        self._wake_all(here, elsewhere)

    def _missed(self, channel: str, *, add_channel: bool = False) -> tuple[list[Subscriber], list[_Group]]:
        groups = self._subscribers_of(channel, add_channel=add_channel)
        return self._by_loop([subscriber for group in groups for subscriber in group if subscriber.missed(channel)])

    def _subscribers_of(self, channel: str, *, add_channel: bool = False) -> list[Collection[Subscriber]]:
        """Return the subscribers of a channel by its name, and those by each matching pattern."""
        matching = self._matching_patterns(channel)
        if add_channel:
            for pattern in matching:
                pattern.add(channel)
        return [self._exact.get(channel, ()), *(pattern.subscribers for pattern in matching)]

    # Wakes

    def _by_loop(self, subscribers: Iterable[Subscriber]) -> tuple[list[Subscriber], list[_Group]]:
        """Return the subscribers of the running event loop, and the groups of other loops that must be called."""
        running = running_loop()
        here: list[Subscriber] = []
        elsewhere: list[_Group] = []
        for subscriber in subscribers:
            group = self._groups[subscriber]
            if group.loop is running:
                here.append(subscriber)
            else:
                if not group.pending:
                    elsewhere.append(group)
                group.pending.add(subscriber)
        return here, elsewhere

    def _wake_all(self, here: list[Subscriber], elsewhere: list[_Group]) -> None:
        for subscriber in here:
            subscriber.wake()
        for group in elsewhere:
            group.loop.call_threadsafe(partial(self._wake_group, group))

    def _wake_group(self, group: _Group) -> None:
        with self.lock:
            pending, group.pending = group.pending, set()
        for subscriber in pending:
            subscriber.wake()

    # Bookkeeping, with the lock held

    def _channels_of(self, subscriber: Subscriber) -> list[str]:
        """Return the names of a subscriber, and all known channels that match its patterns."""
        channels: dict[str, None] = {}
        for name in subscriber.names:
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

    def _matching_patterns(self, channel: str) -> list[_Pattern]:
        if not self._patterns:
            return []
        patterns = self._matching.get(channel)
        if patterns is None:
            patterns = [pattern for pattern in self._patterns.values() if pattern.matches(channel)]
            if len(self._matching) > _MAX_MATCHING:
                self._matching.clear()
            self._matching[channel] = patterns
        return patterns

    def _remove(self, subscriber: Subscriber) -> bool:
        group = self._groups.pop(subscriber, None)
        if group is None:
            return False
        group.subscribers.discard(subscriber)
        group.pending.discard(subscriber)
        if not group.subscribers:
            self._loops.pop(group.loop, None)
        for name in subscriber.names:
            if is_pattern(name):
                pattern = self._patterns[name]
                pattern.subscribers.discard(subscriber)
                if not pattern.subscribers:
                    del self._patterns[name]
                    self._matching.clear()
            else:
                self._exact[name].discard(subscriber)
                if not self._exact[name]:
                    del self._exact[name]
        return True

    def _remove_closed_loops(self) -> None:
        """Remove subscribers whose event loop was closed before they ended."""
        for group in list(self._loops.values()):
            if group.loop.closed:
                for subscriber in list(group.subscribers):
                    self._remove(subscriber)


def _ignore(_: object) -> None:
    """Do nothing: no run is known."""
