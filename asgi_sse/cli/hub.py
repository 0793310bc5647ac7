"""`create_hub`: a broker behind HTTP, for apps in any language: they publish by POST, and browsers read by GET."""

from __future__ import annotations

import hmac
import json
import os
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.broker import Broker
from asgi_sse.errors import BrokerError, short_repr
from asgi_sse.middleware.app import create_app
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.routing.cors import CORS
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError, Request
from asgi_sse.stream.registry import StreamRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from asgi_sse.broker.endpoint import BrokerEndpoint
    from asgi_sse.middleware.middleware import SSEMiddleware
    from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send

BROKER: Final = "ASGI_SSE_BROKER"
PUBLISH_TOKEN: Final = "ASGI_SSE_PUBLISH_TOKEN"  # noqa: S105 (names of variables)
SUBSCRIBE_TOKEN: Final = "ASGI_SSE_SUBSCRIBE_TOKEN"  # noqa: S105

COOKIE: Final = "asgi_sse_token"
"""By which a browser's EventSource, that can set no header, brings its token without showing it in a URL."""

MAX_BODY: Final = 1_048_576  # what Request.body takes too

_RETRY_AFTER: Final = "5"
"""Seconds: about what an engine needs to come back, and then its broker to it."""

_CHANNEL: Final = "name the channel, as /channels/NAME or ?channel=NAME"
_REALM: Final = 'Bearer realm="asgi-sse"'
_FIELDS: Final = frozenset({"channel", "data", "event", "retry", "idempotency_key"})
_HEADERS: Final = ("Authorization", "Content-Type", "Idempotency-Key", "X-SSE-Event")


def create_hub(
    broker: Broker | None = None,
    *,
    publish_tokens: Collection[str] | None = None,
    subscribe_tokens: Collection[str] | None = None,
    insecure_publish: bool = False,
    patterns: bool = False,
    cors: str | Iterable[str] = (),
    max_body: int = MAX_BODY,
    metrics: bool = True,
    registry: StreamRegistry | None = None,
    **options: Any,
) -> SSEMiddleware:
    """The app of ``asgi-sse serve``, for any ASGI server; without arguments, from the environment.

    As ``uvicorn --factory asgi_sse.cli.hub:create_hub``, of which there may be several processes if the broker has an
    engine.

    Args:
        broker: The broker. Default: one of the URL in ``ASGI_SSE_BROKER``, else in memory.
        publish_tokens: Who sends one of them as ``Authorization: Bearer …`` may publish. Default: those in
            ``ASGI_SSE_PUBLISH_TOKEN``, between spaces. Without any, nobody may.
        subscribe_tokens: Who sends one of them, or has it in the query as ``token`` or in the cookie
            ``asgi_sse_token``, may read. Default: those in ``ASGI_SSE_SUBSCRIBE_TOKEN``. Without any, everybody may.
        insecure_publish: Whether everybody may publish, where there are no `publish_tokens`; but for pages of origins
            that are not in `cors`.
        patterns: Whether who may read may do so by patterns, such as ``orders.*``.
        cors: Origins whose pages may use it, or ``"*"``.
        max_body: The most bytes that a POST may have.
        metrics: Whether ``/metrics`` is for Prometheus, if its client is installed.
        registry: Where the streams run. Default: a new one.
        **options: As of `create_app`, such as ``ping``.

    Raises:
        ModuleNotFoundError: As `Broker`.
        ValueError: A token or an origin is none, or as `Broker`.
    """
    if broker is None:
        broker = Broker(os.environ.get(BROKER) or "memory://")
    if registry is None:
        registry = StreamRegistry()
    shared = None
    if origins := (cors,) if isinstance(cors, str) else tuple(cors):
        # Cookies cross origins only where each origin is named.
        shared = CORS(origins, credentials="*" not in origins, headers=_HEADERS)
    publishers = _Tokens(tokens_in(PUBLISH_TOKEN) if publish_tokens is None else publish_tokens)
    readers = _Tokens(tokens_in(SUBSCRIBE_TOKEN) if subscribe_tokens is None else subscribe_tokens)
    hub = _Hub(broker, publishers, readers, insecure=insecure_publish, patterns=patterns, cors=shared, limit=max_body)
    routes: dict[str, Any] = {
        "/channels": hub.answer,
        "/channels/{channel}": hub.answer,
        "/health/live": _Health(lambda: {"live": True}, "live"),
        "/health/ready": _Health(lambda: _readiness(broker, registry), "ready"),
    }
    if metrics and (endpoint := metrics_endpoint()) is not None:
        routes["/metrics"] = endpoint(registry, broker=broker)
    return create_app(routes, broker=broker, registry=registry, cors=shared, **options)


def tokens_in(variable: str) -> list[str]:
    """The tokens in an environment variable, between spaces."""
    return os.environ.get(variable, "").split()


def metrics_endpoint() -> Callable[..., ASGIApp] | None:
    """What answers Prometheus; ``None``: its client is not installed."""
    try:
        from asgi_sse.metrics.prometheus import MetricsEndpoint  # noqa: PLC0415 (of an extra)
    except ModuleNotFoundError:
        return None
    return MetricsEndpoint


class _Tokens:
    """Secrets of which a client has to know one."""

    def __init__(self, tokens: Collection[str]) -> None:
        if isinstance(tokens, str):
            raise TypeError("tokens are a list; give [token]")
        for token in tokens:
            # RFC 6750, 2.1, has no more than these; a header could not carry others unchanged.
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError("a token is empty, or has other than printable ASCII without spaces; give another one")
        self._tokens = [token.encode() for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def check(self, given: str | None, others: _Tokens, what: str) -> None:
        """See that `given` is one of them.

        Args:
            given: What the client has sent.
            others: Those that are for something else.
            what: They are for.

        Raises:
            HTTPError: 401, it is none; 403, it is one of the others.
        """
        if given is None:
            raise HTTPError(401, "this needs a token: Authorization: Bearer TOKEN", {"www-authenticate": _REALM})
        if self.know(given):
            return
        # RFC 6750, 3.1, has the statuses and the errors.
        if others.know(given):
            challenge = f'{_REALM}, error="insufficient_scope"'
            raise HTTPError(403, f"that token may not {what}", {"www-authenticate": challenge})
        challenge = f'{_REALM}, error="invalid_token"'
        raise HTTPError(401, "that token is not known", {"www-authenticate": challenge})

    def know(self, given: str) -> bool:
        """Whether `given` is one of them."""
        # In a time that tells nothing of them: all are compared, each to its end.
        found = [hmac.compare_digest(given.encode("utf-8", "replace"), token) for token in self._tokens]
        return any(found)


def _bearer(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else None


class _Hub:
    """Answers for channels."""

    def __init__(
        self,
        broker: Broker,
        publishers: _Tokens,
        readers: _Tokens,
        *,
        insecure: bool,
        patterns: bool,
        cors: CORS | None,
        limit: int,
    ) -> None:
        self._broker = broker
        self._publishers = publishers
        self._readers = readers
        self._insecure = insecure
        self._patterns = patterns
        self._cors = cors
        self._limit = limit
        self._subscriptions = broker.endpoint(authorize=self._may_read)

    async def answer(self, request: Request) -> BrokerEndpoint | _Published:
        """GET subscribes, POST publishes."""
        if request.method != "POST":
            return self._subscriptions
        self._check_publisher(request)
        channel, event, key = await self._publication(request)
        try:
            event_id = await self._broker.publish(channel, event, idempotency_key=key)
        except ValueError as exc:  # of the channel's name, the event, or the key
            raise HTTPError(400, str(exc)) from None
        except BrokerError as exc:
            if isinstance(exc, HTTPError):  # with a status of its own: it is too large for the engine
                raise
            raise HTTPError(503, str(exc), {"retry-after": _RETRY_AFTER}) from None
        return _Published(event_id)

    def _may_read(self, request: Request) -> list[str] | bool:
        if self._readers:
            token = _bearer(request) or request.query.get("token") or request.cookies.get(COOKIE)
            self._readers.check(token, self._publishers, "read")
        if "channel" not in request.path_params and "channel" not in request.query:
            raise HTTPError(400, _CHANNEL)  # to read all of them is to be asked for
        return ["**"] if self._patterns else True

    def _check_publisher(self, request: Request) -> None:
        if self._publishers:
            self._publishers.check(_bearer(request), self._readers, "publish")
            return
        if not self._insecure:
            raise HTTPError(403, "publishing is off: this hub was given no token for it")
        # A page of any site may make a browser POST, without asking first. That the host is the hub's tells nothing: a
        # name can be pointed at an address of somebody else's network.
        origin = request.headers.get("origin")
        if origin and not (self._cors and self._cors.allows(origin)):
            raise HTTPError(403, f"pages of {origin} may not publish here: give --cors, or a token for publishing")

    async def _publication(self, request: Request) -> tuple[str, Any, str | None]:
        """The channel, the event and the idempotency key."""
        path, query = request.path_params.get("channel"), request.query
        names = [path] if path is not None else query.getlist("channel")
        body = await request.body(self._limit)
        event = _text(request, "x-sse-event", "event")
        key = _text(request, "idempotency-key", "idempotency_key")
        if not names:
            return self._of_json(body, event, key)
        if len(names) > 1:
            raise HTTPError(400, f"{len(names)} channels; publish to one at a time")
        try:
            return names[0], ServerSentEvent(body, event=event), key
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None

    @staticmethod
    def _of_json(body: bytes, event: str | None, key: str | None) -> tuple[str, Any, str | None]:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise HTTPError(400, f"{_CHANNEL}; else the body is a JSON object ({exc})") from None
        given: dict[str, Any] = fields if isinstance(fields, dict) else {}
        wrong = next((f"{short_repr(name)} is no field; " for name in given if name not in _FIELDS), "")
        if wrong or "channel" not in given:
            known = ", ".join(sorted(_FIELDS))
            raise HTTPError(400, f"{wrong}give a JSON object with a channel, and of {known} no more")
        fields = {"event": event, "idempotency_key": key, **fields}
        channel, key = fields.pop("channel"), fields.pop("idempotency_key")
        if not isinstance(channel, str):
            raise HTTPError(400, f"channel {short_repr(channel)} is no name; give a string")
        try:
            return channel, ServerSentEvent(**fields), key
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None


def _text(request: Request, header: str, parameter: str) -> str | None:
    """What a header says, else the query; the empty string is none."""
    if value := request.headers.get(header):
        try:
            return value.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise HTTPError(400, f"{header} is not UTF-8") from None
    return request.query.get(parameter) or None


async def _send_json(scope: Scope, send: Send, status: int, value: Mapping[str, Any]) -> None:
    body = json.dumps(value).encode() + b"\n"
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False})


class _Published:
    """The answer to an event that was published."""

    def __init__(self, event_id: str) -> None:
        self._id = event_id

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await _send_json(scope, send, 201, {"id": self._id})


class _Health:
    """Says how it is: 200 if it is well, else 503."""

    def __init__(self, look: Any, key: str) -> None:
        self._look = look
        self._key = key

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
            return
        found = self._look()
        await _send_json(scope, send, 200 if found[self._key] else 503, found)


def _readiness(broker: Broker, registry: StreamRegistry) -> dict[str, Any]:
    state, draining = broker.statistics().state, registry.draining
    return {"ready": state in {"local", "connected"} and not draining, "broker": state, "draining": draining}
