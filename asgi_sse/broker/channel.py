"""`Channel`: one channel of a broker, as an object and as an ASGI app."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from asgi_sse.errors import short_repr
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.routing.endpoint import RequestHandler

from .dispatcher import UnavailableError
from .patterns import check_pattern

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.routing.request import Request

    from .dispatcher import Dispatcher
    from .subscription import Subscription


_RETRY_MS: Final = (2000, 8000)
"""Range of the reconnection time, in milliseconds, while the backend does not answer. It is random, so that clients do
not all return at once."""


class RunChannel(Protocol):
    """What the answer to a request needs of a run."""

    def was_seen_by(self, last_event_id: str | None) -> bool:
        """Return whether a client with this id has all events of the run."""
        ...

    def subscribe(
        self,
        *,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (named after that of `Broker.subscribe`)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """Return a subscription that ends with the run."""
        ...

    async def answer(self, request: Request) -> Subscription:
        """Return what to answer a request with."""
        ...


class ChannelSource(Protocol):
    """What channels and endpoints need of their broker."""

    async def publish(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event and return its id."""
        ...

    def publish_nowait(self, channel: str, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event without waiting and return its id."""
        ...

    def subscribe(
        self,
        *channels: str | Channel,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (named after that of `Broker.subscribe`)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """Return a subscription of `channels`."""
        ...

    def subscribers(self, channel: str) -> int:
        """Return how many subscribers read `channel`."""
        ...

    async def find_run(self, name: str) -> RunChannel | None:
        """Return the run `name` if it is running, or has ended within its ``ttl``."""
        ...


class Channel(RequestHandler):
    """One channel of a broker, made by `Broker.channel`.

    It is an ASGI app that streams the channel, so it can be a route of `create_app`, `SSEMiddleware` or Starlette.

    Attributes:
        name: The name of the channel.
    """

    __slots__ = ("_broker", "_dispatcher", "name")

    def __init__(self, broker: ChannelSource, dispatcher: Dispatcher, name: str) -> None:
        self._broker = broker
        self._dispatcher = dispatcher
        self.name: str = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    async def publish(self, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event to this channel and return its id.

        The arguments and errors are those of `Broker.publish`.
        """
        return await self._broker.publish(self.name, event, idempotency_key=idempotency_key)

    def publish_nowait(self, event: Any, *, idempotency_key: str | None = None) -> str:
        """Publish an event to this channel from any thread and return its id.

        The arguments and errors are those of `Broker.publish_nowait`.
        """
        return self._broker.publish_nowait(self.name, event, idempotency_key=idempotency_key)

    def subscribe(
        self,
        *,
        last_event_id: str | None = None,
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (named after that of `Broker.subscribe`)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """Return a subscription of this channel. The arguments and errors are those of `Broker.subscribe`."""
        return self._broker.subscribe(
            self.name,
            last_event_id=last_event_id,
            filter=filter,
            checkpoint=checkpoint,
            snapshot=snapshot,
            info=info,
        )

    @property
    def subscribers(self) -> int:
        """The number of subscribers that read this channel now, by its name or by a pattern."""
        return self._broker.subscribers(self.name)

    async def answer(self, request: Request) -> Subscription | list[ServerSentEvent]:
        """Return what to answer a request with.

        This is the run of this name if there is one, and otherwise the events after the ``Last-Event-ID``. If the
        backend does not say which, it is an empty stream with a reconnection time.

        Raises:
            HTTPError: 204, because the client has all events of the run.
        """
        try:
            run = await self._broker.find_run(self.name)
        except UnavailableError:
            return reconnect_later()
        if run is not None:
            return await run.answer(request)
        return self.subscribe(last_event_id=request.last_event_id, info=request)


def reconnect_later() -> list[ServerSentEvent]:
    """Return an empty stream with a reconnection time; a 503 would stop a browser's EventSource for good."""
    return [ServerSentEvent(retry=random.randint(*_RETRY_MS))]  # noqa: S311 (it spreads load and guards nothing)


def name_or_pattern(channel: object) -> str:
    """Return the name of a `Channel`, or a valid name or pattern as it is.

    Raises:
        TypeError: `channel` is neither a `Channel` nor a ``str``.
        ValueError: `channel` is not a valid name or pattern.
    """
    if isinstance(channel, list | tuple | set | frozenset):
        raise TypeError(
            f"channel must be one name, got {short_repr(channel)} ({type(channel).__name__}); "
            "pass several names as arguments: 'a', 'b'"
        )
    return channel.name if isinstance(channel, Channel) else check_pattern(cast("str", channel))
