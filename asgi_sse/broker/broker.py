"""`Broker` and `Channel`: the names by which events are published and subscribed to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from ..errors import BrokerError, InvalidEventError, shown
from ..event import ServerSentEvent, as_event
from ..log import EventLog, check_name, check_pattern
from .hub import Hub, clock
from .subscription import Subscription

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ..routing import Request
    from .subscription import Overflow

_IDEMPOTENCY_WINDOW: Final = 120.0
"""Seconds for which a key is known: as long as NATS JetStream does by default."""

_IDEMPOTENCY_KEYS: Final = 100_000


class Broker:
    """Channels of events, each kept for those who come back.

    Everything that is published gets a number of one sequence, so that one ``Last-Event-ID`` tells how far a client
    has come, whichever channels its stream carries.

    Args:
        url: ``memory://``: in this process.
        history: Events that each channel keeps.
        max_bytes: Bytes of events that each channel keeps; the newest one is kept whatever its size.
        max_age: Seconds after which nobody gets them any more; ``None``: until there are too many.
        max_channels: Channels that are kept. Beyond, the one that was published to least recently is forgotten.
        max_subscribers: Subscribers that a channel may have; ``None``: any number.
        overflow: What becomes of a subscriber that is so slow that events it has not read were dropped: ``reset``
            tells it so, by an event of that type, and goes on with what is new; ``close`` ends its stream.

    Raises:
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
    ) -> None:
        if url != "memory://":
            raise ValueError(f"url={url!r}: there is 'memory://'")
        if overflow not in {"reset", "close"}:
            raise ValueError(f"overflow={overflow!r}; give 'reset' or 'close'")
        if max_subscribers is not None and max_subscribers < 1:
            raise ValueError(f"max_subscribers={max_subscribers!r}; give a number of at least 1, or None for any")
        log = EventLog(history=history, max_bytes=max_bytes, max_age=max_age, max_channels=max_channels)
        self._hub = Hub(log, max_subscribers=max_subscribers)
        self._overflow: Overflow = overflow
        self._keys_lock = threading.Lock()
        self._keys: OrderedDict[str, tuple[float, str]] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to close in memory."""

    def channel(self, name: str) -> Channel:
        """The channel `name`; it need not be made before.

        Raises:
            ValueError: The name is none.
        """
        return Channel(self, check_name(name))

    async def publish(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event, and give its id.

        Args:
            channel: The channel's name.
            event: A `ServerSentEvent` without an id, a ``dict`` of its arguments, or ``str``, ``int``, ``float``.
            idempotency_key: Publishing the same key again, within two minutes, gives the first one's id and does
                nothing.

        Raises:
            InvalidEventError: The event cannot be sent as meant, or has an id of its own.
            ValueError: The channel's name is none.
        """
        return self.publish_nowait(channel, event, idempotency_key=idempotency_key)

    def publish_nowait(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """As `publish`, from any thread and from any event loop, without waiting. In memory only."""
        check_name(channel)
        made = as_event(event)
        if made.id is not None:
            raise InvalidEventError(f"id={shown(made.id)}: a broker numbers its events itself; leave the id out")
        if idempotency_key is None:
            return self._append(channel, made)
        with self._keys_lock:
            now = clock()
            while self._keys and next(iter(self._keys.values()))[0] <= now - _IDEMPOTENCY_WINDOW:
                self._keys.popitem(last=False)
            known = self._keys.get(idempotency_key)
            if known is not None:
                return known[1]
            if len(self._keys) >= _IDEMPOTENCY_KEYS:
                raise BrokerError(
                    f"more than {_IDEMPOTENCY_KEYS} idempotency keys within {_IDEMPOTENCY_WINDOW:g} s: publish without"
                )
            event_id = self._append(channel, made)
            self._keys[idempotency_key] = now, event_id
            return event_id

    def _append(self, channel: str, event: ServerSentEvent) -> str:
        return self._hub.log.id_of(self._hub.publish(channel, event).number)

    def subscribe(
        self,
        *channels: str,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (as the built-in function)
    ) -> Subscription:
        """A place in the log, from which to read.

        Args:
            *channels: Names; or patterns, where ``*`` stands for one segment and ``**`` at the end for the rest.
            last_event_id: The id of the last event that was read. ``None`` or ``""``: what is published from now on.
            filter: Which events to read.

        Raises:
            TypeError: There is no channel.
            ValueError: A name is none.
        """
        if not channels:
            raise TypeError("subscribe() needs the name of a channel")
        names = tuple(dict.fromkeys(check_pattern(name) for name in channels))
        return Subscription(self._hub, names, last_event_id=last_event_id, filter=filter, overflow=self._overflow)

    def subscribers(self, channel: str) -> int:
        """How many read `channel` now, by its name or by a pattern."""
        return self._hub.subscribers(check_name(channel))


class Channel:
    """One channel of a broker. As an endpoint of `create_app` or `SSEMiddleware` it streams its events.

    Attributes:
        name: Its name.
    """

    __slots__ = ("_broker", "name")

    def __init__(self, broker: Broker, name: str) -> None:
        self._broker = broker
        self.name = name

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"

    async def publish(self, event: Any, *, idempotency_key: str | None = None) -> str:
        """See `Broker.publish`."""
        return await self._broker.publish(self.name, event, idempotency_key=idempotency_key)

    def publish_nowait(self, event: Any, *, idempotency_key: str | None = None) -> str:
        """See `Broker.publish_nowait`."""
        return self._broker.publish_nowait(self.name, event, idempotency_key=idempotency_key)

    def subscribe(
        self,
        *,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002
    ) -> Subscription:
        """See `Broker.subscribe`."""
        return self._broker.subscribe(self.name, last_event_id=last_event_id, filter=filter)

    @property
    def subscribers(self) -> int:
        """How many read it now."""
        return self._broker.subscribers(self.name)

    async def __call__(self, request: Request) -> Subscription:
        """Answer a request with its events, behind the ``Last-Event-ID`` header or else that query parameter."""
        return self.subscribe(last_event_id=request.last_event_id or request.query.get("last_event_id"))
