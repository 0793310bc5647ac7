"""`Channel`: one name of a broker."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.routing.endpoint import RequestHandler

from .dispatcher import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.routing.request import Request

    from .broker import Broker
    from .dispatcher import Dispatcher
    from .subscription import Subscription


_COME_BACK: Final = (2000, 8000)
"""Milliseconds after which a client comes back that could not be answered: at random, so that not all do at once."""


class Channel(RequestHandler):
    """One channel of a broker; and an ASGI app that streams it: a route of `create_app`, `SSEMiddleware` or Starlette.

    Attributes:
        name: Its name.
    """

    __slots__ = ("_broker", "_dispatcher", "name")

    def __init__(self, broker: Broker, dispatcher: Dispatcher, name: str) -> None:
        self._broker = broker
        self._dispatcher = dispatcher
        self.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

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
        filter: Callable[[ServerSentEvent], bool] | None = None,  # noqa: A002 (as of Broker.subscribe)
        checkpoint: bool = False,
        snapshot: Callable[[], Any] | None = None,
        info: Any = None,
    ) -> Subscription:
        """See `Broker.subscribe`."""
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
        """How many read it now."""
        return self._broker.subscribers(self.name)

    async def answer(self, request: Request) -> Subscription | list[ServerSentEvent]:
        """What to answer a request with: its events behind the ``Last-Event-ID``; while it is that of a run, the run.

        While the engine does not say which: that the client is to come back.

        Raises:
            HTTPError: 204, see `Run`.
        """
        try:
            run = await self._broker.find_run(self.name)
        except UnavailableError:
            return come_back()
        if run is not None:
            return await run.answer(request)
        return self.subscribe(last_event_id=request.last_event_id, info=request)


def come_back() -> list[ServerSentEvent]:
    """A stream that ends, for who is to ask again: a 503 would stop a browser's EventSource for good."""
    return [ServerSentEvent(retry=random.randint(*_COME_BACK))]  # noqa: S311 (it spreads load, it guards nothing)
