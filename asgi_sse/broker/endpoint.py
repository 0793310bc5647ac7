"""`BrokerEndpoint`: answers requests with channels, for those who may read them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import anyio

from ..errors import shown
from ..log import check_name, check_pattern, is_pattern, pattern_test
from ..response import EventSourceResponse
from ..routing import HTTPError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .._types import Scope, Send
    from ..event import ServerSentEvent
    from ..inbox import Inbox
    from ..routing import Request
    from ..server import Server
    from ..stream import DrainingEvent
    from .broker import Broker
    from .hub import Hub
    from .subscription import Subscription

MAX_CHANNELS: Final = 100
"""Channels that one request may name: each costs a look at every read."""

_RETRY_AFTER: Final = 5


@dataclass(frozen=True, slots=True)
class Access:
    """What a client may read, and until when.

    Attributes:
        channels: Names, or patterns of names.
        expires_at: The Unix time at which the stream ends, as a token's ``exp``; ``None``: never.
    """

    channels: Iterable[str]
    expires_at: float | None = None

    def __post_init__(self) -> None:
        """Take a copy of the channels: they are looked at more than once."""
        names = (self.channels,) if isinstance(self.channels, str) else tuple(self.channels)
        object.__setattr__(self, "channels", tuple(check_pattern(name) for name in names))
        if self.expires_at is not None and (
            isinstance(self.expires_at, bool) or not isinstance(self.expires_at, int | float)
        ):
            raise TypeError(f"expires_at={shown(self.expires_at)}; give a Unix time in seconds, or None")

    def covers(self, name: str) -> bool:
        """Whether all that `name`, which may be a pattern, stands for is among its channels."""
        return any(name == own or _covers(own, name) for own in self.channels)


def _covers(own: str, name: str) -> bool:
    if is_pattern(name):
        return own == "**" or (own.endswith(".**") and name.startswith(own.removesuffix("**")))
    return pattern_test(own)(name)


Granted: TypeAlias = "Access | Iterable[str] | bool | None"
Authorize: TypeAlias = "Callable[[Request], Granted | Awaitable[Granted]]"


class BrokerEndpoint:
    """An endpoint for a route such as ``"/events/{channel}"``. Made by `Broker.endpoint`, which says what it takes."""

    def __init__(
        self,
        broker: Broker,
        hub: Hub,
        channels: tuple[str, ...],
        *,
        authorize: Authorize | None,
        recheck: float | None,
        snapshot: Callable[[Request], Any] | None,
        filter: Callable[[Request, ServerSentEvent], bool] | None,  # noqa: A002 (as of Broker.subscribe)
        checkpoint: bool,
        runs: bool,
    ) -> None:
        for name, value in (("authorize", authorize), ("snapshot", snapshot), ("filter", filter)):
            if value is not None and not callable(value):
                raise TypeError(f"{name}={shown(value)} is not callable; give a function, or None")
        if recheck is not None and authorize is None:
            raise ValueError("recheck= is of no use without authorize=; give both, or neither")
        if recheck is not None and not recheck > 0:
            raise ValueError(f"recheck={recheck!r} is no interval; give seconds, or None for never")
        self._broker = broker
        self._hub = hub
        self._channels = tuple(check_pattern(name) for name in channels)
        self._authorize = authorize
        self._recheck = recheck
        self._snapshot = snapshot
        self._filter = filter
        self._checkpoint = checkpoint
        self._runs = runs

    async def __call__(self, request: Request) -> EventSourceResponse:
        """Answer a request.

        Raises:
            HTTPError: 400, it names no channel, or one that cannot be; 403, it may not read them; 404, there is no such
                run; 204, it has all of that run; 503, a channel has as many subscribers as it may.
        """
        asked = self._asked(request)
        access = await self._access_of(request)
        names = self._allowed(asked, access)
        if not names:
            raise HTTPError(400, "name the channels to read, as in ?channel=NAME")
        run = self._broker.runs.get(names[0]) if len(names) == 1 else None
        if run is None and self._runs:
            raise HTTPError(404, f"no run is called {', '.join(names)}: it has not begun, or its end is long past")
        if run is not None and run.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        check_room(self._hub, names)
        arguments: dict[str, Any] = {
            "last_event_id": request.last_event_id,
            "filter": None if self._filter is None else partial(self._filter, request),
            "snapshot": None if self._snapshot is None or run is not None else partial(self._snapshot, request),
            "checkpoint": self._checkpoint,
            "info": request,
        }
        subscription = self._broker.subscribe(*names, **arguments) if run is None else run.subscribe(**arguments)
        await subscription.prepare()
        check_room(self._hub, names)  # others may have come meanwhile
        response = _LimitedResponse(subscription)
        response.limit(access)
        if self._recheck is not None:
            response.feeder = partial(self._keep_checking, response, request, asked, names)
        return response

    def _asked(self, request: Request) -> tuple[str, ...]:
        if self._channels:
            return self._channels
        of_path = request.path_params.get("channel")
        names = [of_path] if of_path is not None else request.query.getlist("channel")
        if len(names) > MAX_CHANNELS:
            raise HTTPError(400, f"{len(names)} channels; one stream carries {MAX_CHANNELS} at the most")
        try:
            # To read by a pattern must be granted: else nobody would have thought of it.
            return tuple(dict.fromkeys(map(check_name if self._authorize is None else check_pattern, names)))
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None

    async def _access_of(self, request: Request) -> Access | None:
        """What `request` may read; ``None``: all that it asks for."""
        if self._authorize is None:
            return None
        granted: Any = self._authorize(request)
        if isawaitable(granted):
            granted = await granted
        if granted is True:
            return None
        if granted is None or granted is False:
            raise HTTPError(403)
        if not isinstance(granted, Access):
            if not isinstance(granted, Iterable):
                raise TypeError(
                    f"authorize gave {shown(granted)}; give channels, an Access, True for all that is asked for, or "
                    "None for none"
                )
            granted = Access(granted)
        access: Access = granted
        if not access.channels or (access.expires_at is not None and access.expires_at <= time.time()):
            raise HTTPError(403)
        return access

    def _allowed(self, asked: tuple[str, ...], access: Access | None) -> tuple[str, ...]:
        if access is None:
            return asked
        if not asked:
            return tuple(dict.fromkeys(access.channels))
        for name in asked:
            if not access.covers(name):
                raise HTTPError(403, f"no access to {name}")
        return asked

    async def _keep_checking(
        self, response: _LimitedResponse, request: Request, asked: tuple[str, ...], names: tuple[str, ...]
    ) -> None:
        """End the stream when its client may not read its channels any more."""
        recheck = self._recheck or 0
        while True:
            await anyio.sleep(recheck)
            try:
                access = await self._access_of(request)
                allowed = self._allowed(asked, access)
            except HTTPError:
                break
            if not set(names) <= set(allowed):
                break
            response.limit(access)
        if response.stream is not None:
            response.stream.close("expired")  # its client comes back, and is told


def check_room(hub: Hub, names: tuple[str, ...]) -> None:
    """Refuse one more subscriber where there are as many as there may be.

    Raises:
        HTTPError: 503.
    """
    full = hub.full(names)
    if full is not None:
        raise HTTPError(503, f"{full} has as many subscribers as it may", {"retry-after": str(_RETRY_AFTER)})


class _LimitedResponse(EventSourceResponse):
    """Ends when the access of its client does."""

    __slots__ = ("_expires_at",)

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(subscription)
        self._expires_at = math.inf

    def limit(self, access: Access | None) -> None:
        """The client may read on until then."""
        self._expires_at = math.inf if access is None or access.expires_at is None else access.expires_at
        if self.stream is not None:
            self.stream.expire_in(self._expires_at - time.time())

    def serve(self, scope: Scope, inbox: Inbox, send: Send, server: Server, draining: DrainingEvent) -> Awaitable[None]:
        """See `EventSourceResponse`."""
        answer = super().serve(scope, inbox, send, server, draining)
        if self.stream is not None and self._expires_at < math.inf:
            self.stream.expire_in(self._expires_at - time.time())
        return answer
