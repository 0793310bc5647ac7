"""`Broker`: publishes events to channels and makes subscriptions, endpoints and runs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import BrokerError, short_repr
from asgi_sse.protocol.validation import check_number
from asgi_sse.runtime.current import current_loop
from asgi_sse.stream.flusher import current_flusher
from asgi_sse.stream.source import check_content

from .backends.base import Publication
from .backends.factory import backend_of
from .backends.memory import MemoryBackend
from .channel import Channel, name_or_pattern
from .dispatcher import Dispatcher
from .endpoint import Authorize, BrokerEndpoint
from .log import EventLog
from .patterns import check_name
from .presence import Presence
from .publishing import check_idempotency_key, event_to_publish
from .runs.manager import RunManager
from .runs.run import Run
from .subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Self

    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.routing.request import Request
    from asgi_sse.runtime.base import EventLoop

    from .backends.base import BrokerStatistics, RunLease
    from .cursor import Overflow
    from .runs.publisher import Outcome

_BURST_EVENTS: Final = 64
"""Events after which a publisher waits for the streams of its event loop to read."""

_FINAL_EVENT_S: Final = 1.0
"""Seconds before the end of their streams at which runs are ended, so that clients still get the final event."""


class Broker:
    """Channels of events. Each channel keeps its last events, so that a client which reconnects misses nothing.

    All channels share one sequence, so one ``Last-Event-ID`` resumes any mix of them.

    A broker in memory works at once. With any other URL, open it first: pass it to `create_app` or `SSEMiddleware`, or
    use ``async with``.

    Args:
        url: Where the events are kept. ``memory://`` keeps them in this process. ``redis://…``, ``rediss://…`` and
            ``unix://…``, also with ``+cluster`` or ``+sentinel``, use Redis 6.2 or Valkey (the extra ``redis``).
            ``nats://…`` and ``tls://…`` use NATS with JetStream (the extra ``nats``). All but memory need asyncio.
        history: How many events each channel keeps.
        max_bytes: Memory in bytes that the events of each channel may take, about. The newest event is kept whatever
            its size is.
        max_age: Seconds for which events are kept; ``None`` for no limit.
        max_channels: How many channels are kept. To keep a new one, the broker forgets the one that was published to
            least recently.
        max_subscribers: How many subscribers may read a channel by its name. The next one is answered with 503.
            ``None`` for no limit.
        overflow: What happens to a subscriber that is so slow that the log dropped events it had not read. ``reset``
            sends an event of that type, and the subscription continues with new events. ``close`` ends the stream.
        on_join: Called with each `Subscription` when it is first read, in its event loop. Sync or async. An error is
            logged.
        on_leave: Called with each `Subscription` when it has ended, after `on_join` has returned. Sync or async.
        max_runs: How many runs may be running in this process at once, and how many are kept after their end.
        run_grace: Seconds for which runs may continue when the server stops or the broker is closed.
        prefix: The prefix of the keys on the server, or the name of the stream. Brokers with the same prefix share
            their channels. Up to 64 of A-Z a-z 0-9 _ -.
        publish_timeout: Seconds that publishing, and beginning or finding a run, may wait for the server. ``None``:
            no limit for publishing, and 5 seconds for runs.

    Raises:
        ModuleNotFoundError: The client library of the backend is not installed.
        TypeError: An argument has a wrong type.
        ValueError: A limit is out of range, or the URL or the prefix is invalid.
    """

    def __init__(
        self,
        url: str = "memory://",
        *,
        history: int = 1000,
        max_bytes: int = 16 * 1024 * 1024,
        max_age: float | None = None,
        max_channels: int = 10_000,
        max_subscribers: int | None = None,
        overflow: Overflow = "reset",
        on_join: Callable[[Subscription], Any] | None = None,
        on_leave: Callable[[Subscription], Any] | None = None,
        max_runs: int = 1000,
        run_grace: float = 10.0,
        prefix: str = "asgi_sse",
        publish_timeout: float | None = 5.0,
    ) -> None:
        if overflow not in {"reset", "close"}:
            raise ValueError(f"overflow must be 'reset' or 'close', got {short_repr(overflow)}")
        check_number("max_subscribers", max_subscribers, optional=True, positive=True)
        check_number("max_age", max_age, optional=True, positive=True)
        check_number("max_runs", max_runs, positive=True)
        check_number("run_grace", run_grace)
        check_number("publish_timeout", publish_timeout, optional=True, positive=True)
        _check_function("on_join", on_join)
        _check_function("on_leave", on_leave)
        log = EventLog(history=history, max_bytes=max_bytes, max_age=max_age, max_channels=max_channels)
        self._dispatcher = Dispatcher(log, max_subscribers=max_subscribers)
        # A publisher that never pauses must let subscribers read before the log drops unread events.
        self._burst = max(1, min(_BURST_EVENTS, history // 4))
        self._published = 0
        self._backend = backend_of(
            url,
            self._dispatcher,
            prefix=prefix,
            timeout=publish_timeout,
            burst=self._burst,
            history=history,
            max_channels=max_channels,
            max_age=max_age,
        )
        self._max_bytes = max_bytes
        self._presence = Presence(on_join, on_leave) if on_join or on_leave else None
        self._subscribe = partial(Subscription, self._dispatcher, overflow=overflow, presence=self._presence)
        self._runs = RunManager(self._backend, max_runs)
        self._run_grace = run_grace
        self._tokens: list[object] = []  # of ``async with``
        self._is_open = False
        self._opening: tuple[EventLoop, anyio.Lock] | None = None
        self._openers: set[object] = set()
        self._closing: set[object] = set()  # the openers that have called `begin_close`

    async def __aenter__(self) -> Self:
        token = object()
        self._tokens.append(token)
        await self.open(token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the broker as `close` does."""
        await self.close(self._tokens.pop())

    async def open(self, by: object) -> None:
        """Open the broker on behalf of `by`.

        The broker stays open until every caller has called `close` with the object that it passed here.

        Args:
            by: Any hashable object that identifies the caller.

        Raises:
            BrokerError: The backend could not be reached.
        """
        async with self._opening_lock():  # a caller that comes during a close opens the broker again
            if not self._is_open:
                await self._backend.open()
                self._is_open = True
            self._openers.add(by)
            self._runs.reopen()

    async def close(self, by: object) -> None:
        """Release one `open`. The last one ends the runs after `run_grace`, waits for the hooks and disconnects.

        Args:
            by: The object that was passed to `open`.
        """
        self._openers.discard(by)
        self._closing.discard(by)
        lock = self._opening_lock()
        with anyio.CancelScope(shield=True):  # in a cancelled scope, the backend would never be closed
            await lock.acquire()
        try:
            if not self._openers:
                await self._close()
        finally:
            lock.release()

    async def _close(self) -> None:
        self._dispatcher.close()
        try:
            await self._runs.close(self._run_grace)
            if self._presence is not None:
                await self._presence.wait()
        finally:
            self._is_open = False
            with anyio.CancelScope(shield=True):
                await self._backend.close()

    def _opening_lock(self) -> anyio.Lock:
        """Return the lock that serialises `open` and `close` within one event loop."""
        loop = current_loop()
        if self._opening is None or self._opening[0] is not loop:
            self._opening = loop, anyio.Lock()
        return self._opening[1]

    def begin_close(self, within: float, by: object) -> None:
        """Announce that a server stops. May be called from any thread, and repeatedly.

        When all openers have announced it, the broker ends its runs early enough for their clients to get the final
        event. It also ends the loops that iterate over a subscription. Responses are ended by their registry.

        Args:
            within: Seconds until the streams of the server end.
            by: The object that was passed to `open`.
        """
        if by in self._openers:
            self._closing.add(by)
        if self._openers <= self._closing:
            self._runs.begin_close(min(self._run_grace, max(within - _FINAL_EVENT_S, within / 2)))
            self._dispatcher.close()

    @property
    def runs(self) -> Mapping[str, Run]:
        """The runs by name: those that are running, and those that ended within their ``ttl``.

        A run of another process is in it once `find_run` or a request has found it.
        """
        return self._runs

    def channel(self, name: str) -> Channel:
        """Return the channel `name`. It need not exist, and `name` is never a pattern.

        Raises:
            TypeError: `name` is not a ``str``.
            ValueError: `name` is invalid.
        """
        return Channel(self, self._dispatcher, check_name(name))

    async def publish(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event and return its id.

        A caller that publishes many events waits from time to time, so that the streams of this event loop can read.

        Args:
            channel: The name of the channel.
            event: A `ServerSentEvent` without an id, a ``dict`` of its arguments, or ``str``, ``int`` or ``float``.
            idempotency_key: Publishing the same key to the same channel again within two minutes adds no event, and
                returns the id of the first one. 1 to 200 characters; ``None`` for no key.

        Raises:
            BrokerError: The server refused the event, or did not acknowledge it within `publish_timeout`. The message
                says whether the event may have been published. If so, publishing it again with the same key is safe.
                In memory: more than a million keys were used within two minutes.
            InvalidEventError: The event cannot be sent, or has an id.
            ValueError: The name of the channel or the key is invalid.
        """
        event_id = await self._backend.publish(self._publication(channel, event, idempotency_key))
        await self._pace()
        return event_id

    def _publication(self, channel: str, event: Any, key: str | None) -> Publication:
        check_name(channel)
        run = self._runs.get(channel)
        keep_after = None if run is None or run.outcome is not None else run.start
        return Publication(channel, event_to_publish(event), check_idempotency_key(key), keep_after=keep_after)

    async def _pace(self) -> None:
        self._published += 1
        if self._published >= self._burst:
            self._published = 0
            await current_flusher().turn()

    def publish_nowait(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event without waiting and return its id. Only for ``memory://``.

        May be called from any thread and any event loop. If a caller publishes more than `history` events without a
        pause, the log drops some of them before any subscriber can read them.

        Args:
            channel: The name of the channel.
            event: The event, as for `publish`.
            idempotency_key: The key, as for `publish`.

        Raises:
            BrokerError: The broker is not in memory, or more than a million keys were used within two minutes.
            InvalidEventError: The event cannot be sent, or has an id.
            ValueError: The name of the channel or the key is invalid.
        """
        if not isinstance(self._backend, MemoryBackend):
            raise BrokerError("publish_nowait() works in memory only; await publish(), which waits for the server")
        return self._backend.publish_nowait(self._publication(channel, event, idempotency_key))

    def statistics(self) -> BrokerStatistics:
        """Return the state and the counters of the broker in this process. May be called from any thread."""
        return self._backend.statistics()

    def subscribe(
        self,
        *channels: str | Channel,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (named after the built-in function)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """Return a subscription, to be read by an ``async for`` loop or by an `EventSourceResponse`.

        Args:
            *channels: Names; patterns, in which ``*`` stands for one segment and ``**`` at the end for one or more; or
                `Channel` objects, which are never patterns. Use these if a part of a name comes from a client.
            last_event_id: The id of the last event that was read. ``None`` or ``""``: only events published from now
                on.
            filter: Returns whether an event is to be read.
            checkpoint: Whether keep-alives carry an id instead of a comment: the id up to which the client has
                everything. A client of quiet channels in a busy broker can then resume after any time. Browsers
                dispatch no event for it; httpx-sse does.
            snapshot: Returns the current state as one event or several, sync or async, or is an async generator
                function. The subscriber gets it first if it has no id to resume from, and after each ``reset``.
            info: Any object, for `on_join` and `on_leave`.

        Raises:
            BrokerError: The broker is not open.
            TypeError: No channel was passed, or an argument has a wrong type.
            ValueError: A name or pattern is invalid.
        """
        if not channels:
            raise TypeError("channels must be at least one name, got none; pass the names to subscribe to")
        _check_function("snapshot", snapshot)
        _check_function("filter", filter)
        if last_event_id is not None and not isinstance(last_event_id, str):
            raise TypeError(
                f"last_event_id must be a str or None, got {short_repr(last_event_id)} ({type(last_event_id).__name__})"
            )
        self._backend.check_open()
        return self._subscribe(
            tuple(dict.fromkeys(map(name_or_pattern, channels))),
            last_event_id=last_event_id,
            filter=filter,
            checkpoint=checkpoint,
            snapshot=snapshot,
            info=info,
        )

    def endpoint(
        self,
        *channels: str | Channel,
        authorize: Authorize | None = None,
        recheck: float | None = None,
        snapshot: Callable[[Request], Any] | None = None,
        filter: Callable[[Request, ServerSentEvent], bool] | None = None,  # noqa: A002
        checkpoint: bool = False,
        runs: bool = False,
    ) -> BrokerEndpoint:
        """Return an endpoint that streams channels to clients that may read them.

        The endpoint is an ASGI app too, so it can be a route of `create_app`, `SSEMiddleware` or Starlette.

        The stream carries `channels`, if there are any. Otherwise it carries the ``{channel}`` of the route, such as
        ``"/events/{channel}"``, or each ``channel`` of the query, or everything that `authorize` grants. If the only
        channel is a run, the client gets the run.

        Args:
            *channels: Names, patterns or `Channel` objects.
            authorize: Called with each `Request` before the response begins. Returns the channels that the client may
                read, as names or patterns, or an `Access`, which also says until when. ``True`` grants every channel
                that is requested by its name. ``None`` grants nothing. A request for more than is granted is answered
                with 403. May be async, and may raise an `HTTPError`, such as a 401. Without `authorize`, every channel
                is granted by its name.
            recheck: Seconds after which to call `authorize` again, repeatedly. The stream ends if it does not grant
                the channels any more, or does not return within `recheck` or 10 seconds, whichever is longer. Any
                other error that it raises cuts the stream. A new `Access` moves the end.
            snapshot: As for `subscribe`, but called with the `Request`.
            filter: As for `subscribe`, but called with the `Request` and the event.
            checkpoint: As for `subscribe`.
            runs: Whether the channels are runs. A stream then carries one run. If there is no run of the name, the
                answer is 404. Without `runs`, a request for several channels reads runs like any other channels.

        Raises:
            TypeError: An argument has a wrong type.
            ValueError: A name is invalid, or an argument is out of range.
        """
        return BrokerEndpoint(
            self,
            channels,
            authorize=authorize,
            recheck=recheck,
            snapshot=snapshot,
            filter=filter,
            checkpoint=checkpoint,
            runs=runs,
        )

    async def run(
        self,
        name: str,
        source: AsyncIterable[Any] | Iterable[Any],
        *,
        ttl: float = 300.0,
        max_lifetime: float | None = None,
        max_bytes: int | None = None,
        join: bool = False,
        on_end: Callable[[Outcome, BaseException | None], Any] | None = None,
    ) -> Run:
        """Publish the events of a source to a channel until the source ends, with or without subscribers.

        A final event of the type ``end`` follows the last one. Its data is ``{"reason": …}`` with ``finished``,
        ``failed``, ``cancelled``, ``expired``, ``drained``, or ``lost`` if the process of the run is gone.

        Args:
            name: The name of the channel.
            source: An async generator, any async iterable, or an iterable. An iterable runs in a thread of its own
                unless it is a list or a tuple. The items are events as for `publish`.
            ttl: Seconds for which clients can read the run after its end.
            max_lifetime: Seconds after which the run is ended; ``None`` for no limit.
            max_bytes: Memory in bytes that the events may take, about. If they take more, the first are dropped,
                and clients that come late get a ``reset``. Default: the `max_bytes` of the broker.
            join: Whether to return an existing run of this name, in any process, that is running or ended within its
                `ttl`. If there is one, `source` is closed without having begun.
            on_end: Returns the final event; called with the outcome and the exception that the source raised, or
                ``None``. Sync or async.

        Raises:
            BrokerError: A run of this name is running, `max_runs` are running, the broker was closed, or the server
                does not answer. A request that gets the last error is answered with 503.
            TypeError: `source` is not iterable, or an argument has a wrong type.
            ValueError: The name is invalid, or an argument is out of range.
        """
        check_name(name)
        check_content(source)
        check_number("ttl", ttl)
        check_number("max_lifetime", max_lifetime, optional=True, positive=True)
        check_number("max_bytes", max_bytes, optional=True, positive=True)
        _check_function("on_end", on_end)
        return await self._runs.begin(
            name,
            source,
            make=self._make_run,
            ttl=ttl,
            max_lifetime=max_lifetime,
            max_bytes=self._max_bytes if max_bytes is None else max_bytes,
            join=join,
            on_end=on_end,
        )

    async def find_run(self, name: str) -> Run | None:
        """Return the run `name` of any process if it is running or ended within its ``ttl``, and otherwise ``None``.

        Raises:
            BrokerError: The server does not answer. A request that gets this error is answered with 503.
            TypeError: `name` is not a ``str``.
            ValueError: `name` is invalid.
        """
        return await self._runs.find(check_name(name), self._make_run)

    def _make_run(self, name: str, lease: RunLease, give_up: Callable[[Run, Outcome], None]) -> Run:
        return Run(
            self,
            self._dispatcher,
            name,
            lease,
            backend=self._backend,
            subscribe=self._subscribe,
            pace=self._pace,
            give_up=give_up,
        )

    def subscribers(self, channel: str) -> int:
        """Return how many subscribers of this process read `channel` now, by its name or by a pattern.

        Raises:
            TypeError: `channel` is not a ``str``.
            ValueError: `channel` is invalid.
        """
        return self._dispatcher.subscribers(check_name(channel))


def _check_function(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {short_repr(value)}")
