"""`BrokerEndpoint`: answers requests with channels, for those who may read them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.protocol.validation import check_number
from asgi_sse.routing.endpoint import RequestHandler
from asgi_sse.routing.request import HTTPError
from asgi_sse.stream.response import EventSourceResponse

from .channel import Channel, come_back
from .checks import name_of
from .dispatcher import UnavailableError
from .patterns import check_name, check_pattern, is_pattern, pattern_test

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asgi_sse.protocol.asgi import Scope, Send
    from asgi_sse.protocol.event import ServerSentEvent
    from asgi_sse.routing.request import Request
    from asgi_sse.runtime.server import Server
    from asgi_sse.stream.draining import DrainingEvent
    from asgi_sse.stream.receiver import RequestReceiver

    from .broker import Broker
    from .subscription import Subscription

MAX_CHANNELS: Final = 100
"""Channels that one request may name: each costs a look at every read."""

_PATIENCE: Final = 10.0
"""Seconds that an authorizer has at least, when it is asked again."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a client may read, and until when.

    Attributes:
        channels: Names, patterns of names, or `Channel` objects. Of a name that has parts from somebody else, give
            ``broker.channel(f"user.{name}")``: that takes no pattern.
        expires_at: The Unix time at which the stream ends, as a token's ``exp``; ``None``: never.
    """

    channels: Iterable[str | Channel] | str | Channel
    expires_at: float | None = None

    def __post_init__(self) -> None:
        """Take a copy of the channels: they are looked at more than once."""
        given = self.channels
        names = (given,) if isinstance(given, str | Channel) else tuple(given)
        object.__setattr__(self, "channels", tuple(name_of(name) for name in names if name != ""))
        if self.expires_at is not None and not isinstance(self.expires_at, int | float):
            raise TypeError(f"expires_at={short_repr(self.expires_at)}; give a Unix time in seconds, or None")
        if self.expires_at is not None and math.isnan(self.expires_at):
            raise ValueError("expires_at=nan is no time; give a Unix time in seconds, or None")

    def covers(self, name: str) -> bool:
        """Whether all that `name`, which may be a pattern, stands for is among its channels."""
        return name in self.names or any(is_pattern(own) and _covers(own, name) for own in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The channels, as they were found valid."""
        return cast("tuple[str, ...]", self.channels)


def _covers(own: str, name: str) -> bool:
    if is_pattern(name):
        return own == "**" or (own.endswith(".**") and name.startswith(own.removesuffix("**")))
    return pattern_test(own)(name)


Granted: TypeAlias = "Access | Iterable[str | Channel] | str | Channel | bool | None"
Authorize: TypeAlias = "Callable[[Request], Granted | Awaitable[Granted]]"


class BrokerEndpoint(RequestHandler):
    """An endpoint for a route such as ``"/events/{channel}"``. Made by `Broker.endpoint`, which says what it takes."""

    def __init__(
        self,
        broker: Broker,
        channels: tuple[str | Channel, ...],
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
                raise TypeError(f"{name}={short_repr(value)} is not callable; give a function, or None")
        if recheck is not None and authorize is None:
            raise ValueError("recheck= is of no use without authorize=; give both, or neither")
        check_number("recheck", recheck, optional=True, positive=True)
        if runs and (snapshot is not None or len(channels) > 1):
            raise ValueError("runs=True: a stream carries one run, from its first event on, without a snapshot")
        self._broker = broker
        self._channels = tuple(map(name_of, channels))
        self._authorize = authorize
        self._recheck = recheck
        self._snapshot = snapshot
        self._filter = filter
        self._checkpoint = checkpoint
        self._runs = runs

    async def answer(self, request: Request) -> EventSourceResponse:
        """What to answer a request with.

        Raises:
            HTTPError: 400, it names no channel, or one that cannot be; 403, it may not read them; 404, there is no such
                run; 204, it has all of that run.
        """
        asked = self._asked(request)
        access = await self._access_of(request)
        names = self._allowed(asked, access)
        if not names:
            raise HTTPError(400, "name the channels: as {channel} in the route, or as ?channel=NAME")
        if self._runs and len(names) > 1:
            raise HTTPError(400, f"{len(names)} runs; one stream carries one")
        try:
            run = await self._broker.find_run(names[0]) if len(names) == 1 and not is_pattern(names[0]) else None
        except UnavailableError:
            return EventSourceResponse(come_back())
        if run is None and self._runs:
            raise HTTPError(404, f"no run is called {', '.join(names)}: it has not begun, or its end is long past")
        if run is not None and run.was_seen_by(request.last_event_id):
            raise HTTPError(204)
        arguments: dict[str, Any] = {
            "last_event_id": request.last_event_id,
            "filter": None if self._filter is None else partial(self._filter, request),
            "snapshot": None if self._snapshot is None or run is not None else partial(self._snapshot, request),
            "checkpoint": self._checkpoint,
            "info": request,
        }
        subscription = self._broker.subscribe(*names, **arguments) if run is None else run.subscribe(**arguments)
        response = _LimitedResponse(subscription)
        response.limit(access)
        if self._recheck is not None:
            response.feeder = partial(self._keep_checking, response, request, names)
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
            # A mapping is iterable too: {"channels": ["a"]} would grant a channel that is called channels.
            if isinstance(granted, Mapping) or not isinstance(granted, Iterable | Channel):
                raise TypeError(
                    f"authorize gave {short_repr(granted)}; give channels, an Access, True for all that is asked for, or "
                    "None for none"
                )
            granted = Access(granted)
        access: Access = granted
        if not access.names or (access.expires_at is not None and access.expires_at <= time.time()):
            raise HTTPError(403)
        return access

    def _allowed(self, asked: tuple[str, ...], access: Access | None) -> tuple[str, ...]:
        if access is None:
            for name in asked:
                # Whoever asks for no more than a name has not thought of patterns, of which one is all there is.
                if self._authorize is not None and not self._channels and is_pattern(name):
                    raise HTTPError(403, f"no access to {name}: a pattern must be granted")
            return asked
        if not asked:
            return tuple(dict.fromkeys(access.names))
        for name in asked:
            if not access.covers(name):
                raise HTTPError(403, f"no access to {name}")
        return asked

    async def _keep_checking(self, response: _LimitedResponse, request: Request, names: tuple[str, ...]) -> None:
        """End the stream when its client may not read its channels any more."""
        recheck = self._recheck or 0
        allowed = True
        while allowed:
            await anyio.sleep(recheck)
            allowed = False
            with anyio.move_on_after(max(recheck, _PATIENCE)):  # who does not answer does not grant
                try:
                    access = await self._access_of(request)
                except HTTPError:
                    break
                allowed = access is None or all(map(access.covers, names))
                response.limit(access)
        if response.stream is not None:
            response.stream.close("expired")  # its client comes back, and is told


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

    def serve(
        self, scope: Scope, receiver: RequestReceiver, send: Send, server: Server, draining: DrainingEvent
    ) -> Awaitable[None]:
        """See `EventSourceResponse`."""
        answer = super().serve(scope, receiver, send, server, draining)
        if self.stream is not None and self._expires_at < math.inf:
            self.stream.expire_in(self._expires_at - time.time())
        return answer
