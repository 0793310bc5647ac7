"""`Broker`: by which events are published, and subscribed to."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from asgi_sse.errors import BrokerError
from asgi_sse.protocol.validation import check_number
from asgi_sse.runtime.current import current_loop
from asgi_sse.stream.flusher import current_flusher
from asgi_sse.stream.source import check_content

from .backends.base import Publication
from .backends.factory import backend_of
from .backends.memory import MemoryBackend
from .channel import Channel
from .checks import check_key, name_of
from .dispatcher import Dispatcher, unnumbered
from .endpoint import Authorize, BrokerEndpoint
from .log import EventLog
from .patterns import check_name
from .presence import Presence
from .runs.manager import Runs
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

_BURST: Final = 64
"""Events after which a publisher waits for its turn."""

_FAREWELL: Final = 1.0
"""Seconds before the end of their streams at which runs are ended, so that the final event still gets there."""


class Broker:
    """Channels of events, each kept for those who come back.

    Everything that is published gets a number of one sequence, so that one ``Last-Event-ID`` tells how far a client
    has come, whichever channels its stream carries.

    Args:
        url: The engine that brings events to all processes. ``memory://``: there is but this one. ``redis://…``,
            ``rediss://…``, ``unix://…``, with ``+cluster`` or ``+sentinel``: Redis 6.2 or Valkey (the extra ``redis``).
            ``nats://…``, ``tls://…``: NATS with JetStream (the extra ``nats``). These need asyncio, and to be open.
        history: Events that each channel keeps.
        max_bytes: Memory that the events of each channel may take, about; the newest one is kept whatever its size.
        max_age: Seconds after which nobody gets them any more; ``None``: until there are too many.
        max_channels: Channels that are kept. Beyond, the one that was published to least recently is forgotten.
        max_subscribers: Subscribers that a channel may have by its name, the next one is answered 503; ``None``: any
            number.
        overflow: What becomes of a subscriber that is so slow that events it has not read were dropped, once it takes
            more: ``reset`` tells it so, by an event of that type, and goes on with what is new; ``close`` ends its
            stream.
        on_join: Called with each `Subscription` that begins to be read, in its event loop. Sync or async; what it
            raises is logged.
        on_leave: Called with each that is not read any more, after what `on_join` did for it.
        max_runs: Runs that may go on at once; and those that are kept after their end.
        run_grace: Seconds for which runs may go on when the server stops, or the broker is closed.
        prefix: Of the engine's keys, or its stream: brokers with the same one share their channels.
        publish_timeout: Seconds that publishing, and to begin or find a run, may wait for the engine, before it raises;
            ``None``: publishing as long as it takes, runs five.

    Raises:
        ModuleNotFoundError: The engine's client is not installed.
        ValueError: A limit is out of range, or the URL is none that is known.
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
            raise ValueError(f"overflow={overflow!r}; give 'reset' or 'close'")
        check_number("max_subscribers", max_subscribers, optional=True, positive=True)
        check_number("max_age", max_age, optional=True, positive=True)
        check_number("max_runs", max_runs, positive=True)
        check_number("run_grace", run_grace)
        check_number("publish_timeout", publish_timeout, optional=True, positive=True)
        for name, hook in (("on_join", on_join), ("on_leave", on_leave)):
            if hook is not None and not callable(hook):
                raise TypeError(f"{name}={hook!r} is not callable; give a function, or None")
        log = EventLog(history=history, max_bytes=max_bytes, max_age=max_age, max_channels=max_channels)
        self._dispatcher = Dispatcher(log, max_subscribers=max_subscribers)
        # Who publishes without pause lets others go on before they have missed anything.
        self._burst = max(1, min(_BURST, history // 4))
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
        self._open = partial(Subscription, self._dispatcher, overflow=overflow, presence=self._presence)
        self._runs = Runs(self._backend, max_runs)
        self._run_grace = run_grace
        self._entered: list[object] = []
        self._is_open = False
        self._turn: tuple[EventLoop, anyio.Lock] | None = None
        self._openers: set[object] = set()
        self._closing: set[object] = set()  # which of them have said that they stop

    async def __aenter__(self) -> Self:
        token = object()
        self._entered.append(token)
        await self.open(token)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give runs their grace and end them, and wait for the hooks; unless others have it open as well."""
        await self.close(self._entered.pop())

    async def open(self, by: object) -> None:
        """As ``async with``, for one of several; what it is given, `close` is to be given too."""
        turn = self._own_turn()
        async with turn:  # who comes while another one opens or closes it finds it open, or opens it anew
            if not self._is_open:
                await self._backend.open()
                self._is_open = True
            self._openers.add(by)
            self._runs.reopen()

    async def close(self, by: object) -> None:
        """The end of what `open` has begun."""
        self._openers.discard(by)
        self._closing.discard(by)
        turn = self._own_turn()
        with anyio.CancelScope(shield=True):  # within a scope that was cancelled, nothing would be let go of
            await turn.acquire()
        try:
            if not self._openers:
                await self._close()
        finally:
            turn.release()

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

    def _own_turn(self) -> anyio.Lock:
        """By which those of one event loop open and close it one after the other."""
        loop = current_loop()
        if self._turn is None or self._turn[0] is not loop:
            self._turn = loop, anyio.Lock()
        return self._turn[1]

    def begin_close(self, within: float, by: object) -> None:
        """A server stops, and its streams end in so many seconds. From any thread, and as often as may be.

        When all that have the broker open have said so, its runs end early enough for their clients to see it, and so
        do the loops that read its channels without a response.

        Args:
            within: Seconds.
            by: Who says so.
        """
        if by in self._openers:
            self._closing.add(by)
        if self._openers <= self._closing:
            self._runs.begin_close(min(self._run_grace, max(within - _FAREWELL, within / 2)))
            self._dispatcher.close()

    @property
    def runs(self) -> Mapping[str, Run]:
        """The runs by name: those that go on, and those that ended less than their ``ttl`` ago.

        Those of other processes are among them once `find_run` has found them, or a request for them was answered.
        """
        return self._runs

    def channel(self, name: str) -> Channel:
        """The channel `name`; it need not be made before.

        Raises:
            ValueError: The name is none.
        """
        return Channel(self, self._dispatcher, check_name(name))

    async def publish(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event, and give its id.

        Now and then it waits until the streams of this event loop have taken what they can.

        Args:
            channel: The channel's name.
            event: A `ServerSentEvent` without an id, a ``dict`` of its arguments, or ``str``, ``int``, ``float``.
            idempotency_key: Publishing the same key to that channel again, within two minutes, gives the first one's
                id and does nothing.

        Raises:
            BrokerError: The engine has not acknowledged it within `publish_timeout`; the message says whether it may
                have been published all the same, and then the same key makes it safe to publish it again. Or it has
                refused it. In memory: there were more than a million keys within two minutes.
            InvalidEventError: The event cannot be sent as meant, or has an id of its own.
            ValueError: The channel's name is none.
        """
        event_id = await self._backend.publish(self._publication(channel, event, idempotency_key))
        await self._pace()
        return event_id

    def _publication(self, channel: str, event: Any, key: str | None) -> Publication:
        check_name(channel)
        run = self._runs.get(channel)
        keep_after = None if run is None or run.outcome is not None else run.start
        return Publication(channel, unnumbered(event), check_key(key), keep_after=keep_after)

    async def _pace(self) -> None:
        self._published += 1
        if self._published >= self._burst:
            self._published = 0
            await current_flusher().turn()

    def publish_nowait(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """As `publish`, from any thread and from any event loop, without waiting. In memory only.

        Who publishes many at once without a pause has more of them dropped than `history` before anybody could read.
        """
        if not isinstance(self._backend, MemoryBackend):
            raise BrokerError("publish_nowait is of memory:// alone: await publish(), which waits for the engine")
        return self._backend.publish_nowait(self._publication(channel, event, idempotency_key))

    def statistics(self) -> BrokerStatistics:
        """How it is connected, and what came and went, as this process sees it."""
        return self._backend.statistics()

    def subscribe(
        self,
        *channels: str | Channel,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (as the built-in function)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """A place in the log, from which to read.

        Args:
            *channels: Names; or patterns, where ``*`` stands for one segment and ``**`` at the end for one or more; or
                `Channel` objects, which are never patterns: for names of which a part comes from somebody else.
            last_event_id: The id of the last event that was read. ``None`` or ``""``: what is published from now on.
            filter: Which events to read.
            checkpoint: Whether a keep-alive of its stream, in place of a comment, tells the client the id up to which
                there was nothing for it: then a client of quiet channels in a busy broker can resume however long it
                was quiet. A browser gives no event for it; a client that does is httpx-sse.
            snapshot: Gives the state as of now, in an event or several: sent first where there is no id to resume
                from, and after each ``reset``. Sync or async, or an async generator function.
            info: Anything, for `on_join` and `on_leave` to see.

        Raises:
            TypeError: There is no channel.
            ValueError: A name is none.
        """
        if not channels:
            raise TypeError("subscribe() needs the name of a channel")
        for what, function in (("snapshot", snapshot), ("filter", filter)):
            if function is not None and not callable(function):
                raise TypeError(f"{what}={function!r} is not callable; give a function, or None")
        if last_event_id is not None and not isinstance(last_event_id, str):
            raise TypeError(f"last_event_id={last_event_id!r} is {type(last_event_id).__name__}; give a str, or None")
        self._backend.check_open()
        return self._open(
            tuple(dict.fromkeys(map(name_of, channels))),
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
        """Streams channels to those who may read them: an endpoint, and an ASGI app, as for a ``Route`` of Starlette.

        Which ones: `channels`; else what the route has in the place of ``{channel}``, as in ``"/events/{channel}"``;
        else each ``channel`` of the query; else all that `authorize` grants. One that is a run is answered as such.

        Args:
            *channels: Names, patterns or `Channel` objects.
            authorize: Asked with each `Request` before the response begins. Gives the channels that may be read, or
                patterns of them, or an `Access`, which says until when as well; ``True``: any channel that is asked for
                by its name; ``None``: nothing, which is answered with 403, as is what is asked for beyond. It may be
                async, and raise an `HTTPError` of its own, such as a 401. Without: any channel by its name.
            recheck: Seconds after which to ask it again, and again; a stream that it does not grant any more, or not
                in that time (or 10 s), is ended. What else it raises then cuts the stream. A new `Access` puts its end
                off.
            snapshot: As of `subscribe`, but called with the `Request`.
            filter: As of `subscribe`, but called with the `Request` and the event.
            checkpoint: As of `subscribe`.
            runs: Whether there are runs alone, of which a stream carries one: where there is none of that name, the
                answer is 404. Without, several channels are read as such, the runs among them.

        Raises:
            TypeError: An argument is of a wrong kind.
            ValueError: A name is none, or an argument is out of range.
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
        """Publish what a source gives to a channel until it ends, whether or not anybody reads.

        Behind its last event comes a final one: of the type ``end``, with the data ``{"reason": …}``, one of
        ``finished``, ``failed``, ``cancelled``, ``expired``, ``drained``, and ``lost``, of one whose process is gone.

        Args:
            name: The channel's name.
            source: An async generator, any async iterable, or an iterable, which is run in a thread of its own unless
                it is a list or a tuple. Its items are as of `publish`.
            ttl: Seconds for which clients can get it after its end.
            max_lifetime: Seconds after which it is ended; ``None``: never.
            max_bytes: Memory that its events may take, about. Its first events beyond are lost to clients that come
                late, who are told by a ``reset``. Default: as of any channel.
            join: Where there is a run of that name, in whichever process, that goes on or has ended less than its
                `ttl` ago: give that one, and close `source` without having begun it.
            on_end: Makes the final event, of how it ended and what the source raised. Sync or async.

        Raises:
            BrokerError: A run of that name goes on, there are as many as there may be, the broker was closed, or the
                engine does not answer (as an answer to a request: 503).
            TypeError: `source` is none, or an argument is of a wrong kind.
            ValueError: The name is none, or an argument is out of range.
        """
        check_name(name)
        check_content(source)
        check_number("ttl", ttl)
        check_number("max_lifetime", max_lifetime, optional=True, positive=True)
        check_number("max_bytes", max_bytes, optional=True, positive=True)
        if on_end is not None and not callable(on_end):
            raise TypeError(f"on_end={on_end!r} is not callable; give a function, or None")
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
        """The run of that name, in whichever process: it goes on, or has ended less than its ``ttl`` ago.

        Raises:
            BrokerError: The engine does not answer (as an answer to a request: 503).
            ValueError: The name is none.
        """
        return await self._runs.find(check_name(name), self._make_run)

    def _make_run(self, name: str, lease: RunLease, given_up: Callable[[Run, Outcome], None]) -> Run:
        return Run(
            self,
            self._dispatcher,
            name,
            lease,
            backend=self._backend,
            subscription=self._open,
            pace=self._pace,
            given_up=given_up,
        )

    def subscribers(self, channel: str) -> int:
        """How many read `channel` now, by its name or by a pattern."""
        return self._dispatcher.subscribers(check_name(channel))
