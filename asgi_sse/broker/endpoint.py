"""`BrokerEndpoint`: answers requests with the events of channels, for clients that may read them."""

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

from .channel import Channel, name_or_pattern, reconnect_later
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

    from .channel import ChannelSource
    from .subscription import Subscription

MAX_CHANNELS: Final = 100
"""Channels that one request may name, since every read looks at each of them."""

_MIN_RECHECK_TIMEOUT_S: Final = 10.0
"""Seconds that `authorize` has at least, when it is called again during a stream."""


@dataclass(frozen=True, slots=True)
class Access:
    """The channels that a client may read, and until when. `authorize` of `Broker.endpoint` may return it.

    Attributes:
        channels: Names, patterns of names, or `Channel` objects. If a part of a name comes from a client, pass
            ``broker.channel(f"user.{name}")``, which accepts no pattern.
        expires_at: The Unix time in seconds at which the stream ends, such as the ``exp`` of a token; ``None`` for no
            end.

    Raises:
        TypeError: An attribute has a wrong type.
        ValueError: A name is invalid, or `expires_at` is not a number.
    """

    channels: Iterable[str | Channel] | str | Channel
    expires_at: float | None = None

    def __post_init__(self) -> None:
        """Validate the values, and copy the channels, which are read more than once."""
        given = self.channels
        names = (given,) if isinstance(given, str | Channel) else tuple(given)
        object.__setattr__(self, "channels", tuple(name_or_pattern(name) for name in names if name != ""))
        if self.expires_at is not None and not isinstance(self.expires_at, int | float):
            raise TypeError(f"expires_at must be a Unix time in seconds or None, got {short_repr(self.expires_at)}")
        if self.expires_at is not None and math.isnan(self.expires_at):
            raise ValueError("expires_at must be a Unix time in seconds or None, got nan")

    def covers(self, name: str) -> bool:
        """Return whether the channels include `name`, or all names that match it if it is a pattern."""
        return name in self.names or any(is_pattern(granted) and _covers(granted, name) for granted in self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The valid names and patterns of the channels."""
        return cast("tuple[str, ...]", self.channels)


def _covers(granted: str, name: str) -> bool:
    if is_pattern(name):
        return granted == "**" or (granted.endswith(".**") and name.startswith(granted.removesuffix("**")))
    return pattern_test(granted)(name)


Granted: TypeAlias = "Access | Iterable[str | Channel] | str | Channel | bool | None"
Authorize: TypeAlias = "Callable[[Request], Granted | Awaitable[Granted]]"


class BrokerEndpoint(RequestHandler):
    """An endpoint, and an ASGI app, for a route such as ``"/events/{channel}"``.

    Made by `Broker.endpoint`, which documents the arguments and their errors.
    """

    def __init__(
        self,
        broker: ChannelSource,
        channels: tuple[str | Channel, ...],
        *,
        authorize: Authorize | None,
        recheck: float | None,
        snapshot: Callable[[Request], Any] | None,
        filter: Callable[[Request, ServerSentEvent], bool] | None,  # noqa: A002 (named after that of `Broker.subscribe`)
        checkpoint: bool,
        runs: bool,
    ) -> None:
        for name, value in (("authorize", authorize), ("snapshot", snapshot), ("filter", filter)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a function or None, got {short_repr(value)}")
        if recheck is not None and authorize is None:
            raise ValueError(f"recheck must be None without authorize, got {recheck!r}; pass both, or neither")
        check_number("recheck", recheck, optional=True, positive=True)
        if runs and snapshot is not None:
            raise ValueError("snapshot must be None with runs=True, because a run is read from its first event on")
        if runs and len(channels) > 1:
            raise ValueError(
                f"channels must be at most one with runs=True, got {len(channels)}; a stream carries one run"
            )
        self._broker = broker
        self._channels = tuple(map(name_or_pattern, channels))
        self._authorize = authorize
        self._recheck = recheck
        self._snapshot = snapshot
        self._filter = filter
        self._checkpoint = checkpoint
        self._runs = runs

    async def answer(self, request: Request) -> EventSourceResponse:
        """Return the response to a request.

        Raises:
            HTTPError: 400, because the request names no channel or an invalid one. 403, because the client may not
                read a channel. 404, because there is no such run. 204, because the client has all events of the run.
        """
        requested = self._requested(request)
        access = await self._access_of(request)
        names = self._allowed(requested, access)
        if not names:
            raise HTTPError(400, "name a channel, as {channel} in the route or as ?channel=NAME")
        if self._runs and len(names) > 1:
            raise HTTPError(400, f"the request names {len(names)} runs; a stream carries one run")
        try:
            run = await self._broker.find_run(names[0]) if len(names) == 1 and not is_pattern(names[0]) else None
        except UnavailableError:
            return EventSourceResponse(reconnect_later())
        if run is None and self._runs:
            raise HTTPError(404, f"no run {', '.join(names)}: it has not begun, or its ttl is over")
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

    def _requested(self, request: Request) -> tuple[str, ...]:
        if self._channels:
            return self._channels
        of_path = request.path_params.get("channel")
        names = [of_path] if of_path is not None else request.query.getlist("channel")
        if len(names) > MAX_CHANNELS:
            raise HTTPError(400, f"the request names {len(names)} channels; a stream carries at most {MAX_CHANNELS}")
        try:
            # A pattern must be granted. Without `authorize`, the app has granted names only.
            return tuple(dict.fromkeys(map(check_name if self._authorize is None else check_pattern, names)))
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None

    async def _access_of(self, request: Request) -> Access | None:
        """Return what `request` may read; ``None`` for everything that it names."""
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
            # A mapping is iterable too: {"channels": ["a"]} would grant a channel with the name "channels".
            if isinstance(granted, Mapping) or not isinstance(granted, Iterable | Channel):
                raise TypeError(
                    "authorize must return channels, an Access, True for all channels that were requested, or None for "
                    f"no access, got {short_repr(granted)}"
                )
            granted = Access(granted)
        access: Access = granted
        if not access.names or (access.expires_at is not None and access.expires_at <= time.time()):
            raise HTTPError(403)
        return access

    def _allowed(self, requested: tuple[str, ...], access: Access | None) -> tuple[str, ...]:
        if access is None:
            for name in requested:
                # `True` may come from a check of names only, so a pattern needs an explicit grant: "**" is everything.
                if self._authorize is not None and not self._channels and is_pattern(name):
                    raise HTTPError(403, f"no access to {name}: a pattern must be granted")
            return requested
        if not requested:
            return tuple(dict.fromkeys(access.names))
        for name in requested:
            if not access.covers(name):
                raise HTTPError(403, f"no access to {name}")
        return requested

    async def _keep_checking(self, response: _LimitedResponse, request: Request, names: tuple[str, ...]) -> None:
        """End the stream when its client may not read its channels any more."""
        recheck = self._recheck or 0
        allowed = True
        while allowed:
            await anyio.sleep(recheck)
            allowed = False
            with anyio.move_on_after(max(recheck, _MIN_RECHECK_TIMEOUT_S)):  # no answer means no access
                try:
                    access = await self._access_of(request)
                except HTTPError:
                    break
                allowed = access is None or all(map(access.covers, names))
                response.limit(access)
        if response.stream is not None:
            response.stream.close("expired")  # the client reconnects, and is then refused with a status


class _LimitedResponse(EventSourceResponse):
    """A response that ends when the access of its client expires."""

    __slots__ = ("_expires_at",)

    def __init__(self, subscription: Subscription) -> None:
        super().__init__(subscription)
        self._expires_at = math.inf

    def limit(self, access: Access | None) -> None:
        """End the stream when `access` expires, and not before."""
        self._expires_at = math.inf if access is None or access.expires_at is None else access.expires_at
        if self.stream is not None:
            self.stream.expire_in(self._expires_at - time.time())

    def serve(
        self, scope: Scope, receiver: RequestReceiver, send: Send, server: Server, draining: DrainingEvent
    ) -> Awaitable[None]:
        """Begin the response, and limit its stream."""
        answer = super().serve(scope, receiver, send, server, draining)
        if self.stream is not None and self._expires_at < math.inf:
            self.stream.expire_in(self._expires_at - time.time())
        return answer
