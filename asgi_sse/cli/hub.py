"""The hub: a broker with an HTTP interface, so that apps in any language publish and browsers subscribe."""

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
PUBLISH_TOKEN: Final = "ASGI_SSE_PUBLISH_TOKEN"  # noqa: S105 (the name of a variable)
SUBSCRIBE_TOKEN: Final = "ASGI_SSE_SUBSCRIBE_TOKEN"  # noqa: S105

COOKIE: Final = "asgi_sse_token"
"""Cookie with the subscribe token. EventSource cannot set headers, and a token in a URL would be visible."""

MAX_BODY_BYTES: Final = 1_048_576  # the default of Request.body too

_RETRY_AFTER_S: Final = "5"
"""About the time that a backend needs to restart and the broker to reconnect."""

_CHANNEL_MISSING: Final = "channel is missing; use /channels/NAME or ?channel=NAME"
_REALM: Final = 'Bearer realm="asgi-sse"'
_FIELDS: Final = frozenset({"channel", "data", "event", "retry", "idempotency_key"})
_CORS_HEADERS: Final = ("Authorization", "Content-Type", "Idempotency-Key", "X-SSE-Event")


def create_hub(
    broker: Broker | None = None,
    *,
    publish_tokens: Collection[str] | None = None,
    subscribe_tokens: Collection[str] | None = None,
    insecure_publish: bool = False,
    patterns: bool = False,
    cors: str | Iterable[str] = (),
    max_body: int = MAX_BODY_BYTES,
    metrics: bool = True,
    registry: StreamRegistry | None = None,
    **options: Any,
) -> SSEMiddleware:
    """Create the app of ``asgi-sse serve``, for any ASGI server.

    Without arguments, environment variables configure the hub: ``uvicorn --factory asgi_sse.cli.hub:create_hub``.
    Several processes can share their channels if the broker has a backend.

    Args:
        broker: The broker. Default: a broker with the URL in ``ASGI_SSE_BROKER``, or one in memory.
        publish_tokens: The tokens that allow a client to publish, sent as ``Authorization: Bearer …``. Default: the
            tokens in ``ASGI_SSE_PUBLISH_TOKEN``, separated by spaces. Without tokens, publishing is off.
        subscribe_tokens: The tokens that allow a client to subscribe, sent as ``Authorization: Bearer …``, as
            ``?token=`` or in the cookie ``asgi_sse_token``. Default: the tokens in ``ASGI_SSE_SUBSCRIBE_TOKEN``,
            separated by spaces. Without tokens, anyone may subscribe.
        insecure_publish: Let anyone publish if there are no `publish_tokens`, except pages from origins not in `cors`.
        patterns: Let clients subscribe to patterns such as ``orders.*``.
        cors: The origins whose pages may use the hub, or ``"*"`` for any origin.
        max_body: The largest body of a POST, in bytes.
        metrics: Serve ``/metrics`` for Prometheus if ``prometheus_client`` is installed.
        registry: The registry of the streams. Default: a new one.
        **options: Options of `create_app`, such as ``ping``.

    Returns:
        The ASGI app.

    Raises:
        ModuleNotFoundError: The client library of the broker's backend is not installed.
        TypeError: The tokens are one string instead of a list.
        ValueError: A token, an origin or the broker's URL is invalid.
    """
    if broker is None:
        broker = Broker(os.environ.get(BROKER) or "memory://")
    if registry is None:
        registry = StreamRegistry()
    shared = None
    if origins := (cors,) if isinstance(cors, str) else tuple(cors):
        # Browsers send cookies across origins only if the response names the origin, so not with "*".
        shared = CORS(origins, credentials="*" not in origins, headers=_CORS_HEADERS)
    publish = _Tokens(tokens_in(PUBLISH_TOKEN) if publish_tokens is None else publish_tokens)
    subscribe = _Tokens(tokens_in(SUBSCRIBE_TOKEN) if subscribe_tokens is None else subscribe_tokens)
    hub = _Hub(broker, publish, subscribe, insecure=insecure_publish, patterns=patterns, cors=shared, max_body=max_body)
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
    """Return the tokens in an environment variable, which are separated by spaces."""
    return os.environ.get(variable, "").split()


def metrics_endpoint() -> Callable[..., ASGIApp] | None:
    """Return the class that serves metrics, or ``None`` if ``prometheus_client`` is not installed."""
    try:
        from asgi_sse.metrics.prometheus import MetricsEndpoint  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError:
        return None
    return MetricsEndpoint


class _Tokens:
    """The tokens for one action, publishing or subscribing."""

    def __init__(self, tokens: Collection[str]) -> None:
        if isinstance(tokens, str):
            raise TypeError("tokens must be a list of strings, got a string; pass [token]")
        for token in tokens:
            # A header carries no other characters unchanged. RFC 6750, 2.1, allows even fewer.
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError("each token must be printable ASCII without spaces, and not empty; choose another one")
        self._tokens = [token.encode() for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def require(self, token: str | None, other: _Tokens, action: str) -> None:
        """Raise unless `token` allows the action.

        Args:
            token: The token that the client sent, or ``None``.
            other: The tokens for the other action.
            action: The verb for the error message.

        Raises:
            HTTPError: 401, the token is missing or unknown; 403, the token is for the other action.
        """
        if token is None:
            raise HTTPError(401, "token is missing; send Authorization: Bearer TOKEN", {"www-authenticate": _REALM})
        if self.contains(token):
            return
        # RFC 6750, 3.1, defines these statuses and error codes.
        if other.contains(token):
            challenge = f'{_REALM}, error="insufficient_scope"'
            raise HTTPError(403, f"this token may not {action}", {"www-authenticate": challenge})
        challenge = f'{_REALM}, error="invalid_token"'
        raise HTTPError(401, "this token is unknown", {"www-authenticate": challenge})

    def contains(self, token: str) -> bool:
        """Return whether `token` is one of the tokens."""
        # Each token is compared to its end, so that the time reveals nothing about them.
        found = [hmac.compare_digest(token.encode("utf-8", "replace"), known) for known in self._tokens]
        return any(found)


def _bearer(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class _Hub:
    """Publishes and subscribes for clients.

    Args:
        broker: The broker.
        publish: The tokens that allow publishing.
        subscribe: The tokens that allow subscribing.
        insecure: Whether publishing without a token is allowed if `publish` is empty.
        patterns: Whether clients may subscribe to patterns.
        cors: The origins that may use the hub.
        max_body: The largest body of a POST, in bytes.
    """

    def __init__(
        self,
        broker: Broker,
        publish: _Tokens,
        subscribe: _Tokens,
        *,
        insecure: bool,
        patterns: bool,
        cors: CORS | None,
        max_body: int,
    ) -> None:
        self._broker = broker
        self._publish = publish
        self._subscribe = subscribe
        self._insecure = insecure
        self._patterns = patterns
        self._cors = cors
        self._max_body = max_body
        self._subscriptions = broker.endpoint(authorize=self._authorize)

    async def answer(self, request: Request) -> BrokerEndpoint | _Published:
        """Publish on POST, subscribe on GET."""
        if request.method != "POST":
            return self._subscriptions
        self._require_publisher(request)
        channel, event, key = await self._publication(request)
        try:
            event_id = await self._broker.publish(channel, event, idempotency_key=key)
        except ValueError as exc:  # the channel's name, the event or the key is invalid
            raise HTTPError(400, str(exc)) from None
        except BrokerError as exc:
            if isinstance(exc, HTTPError):  # it has a status of its own: the event is too large for the backend
                raise
            raise HTTPError(503, str(exc), {"retry-after": _RETRY_AFTER_S}) from None
        return _Published(event_id)

    def _authorize(self, request: Request) -> list[str] | bool:
        if self._subscribe:
            token = _bearer(request) or request.query.get("token") or request.cookies.get(COOKIE)
            self._subscribe.require(token, self._publish, "subscribe")
        if "channel" not in request.path_params and "channel" not in request.query:
            raise HTTPError(400, _CHANNEL_MISSING)  # a subscription to all channels must name "**"
        return ["**"] if self._patterns else True

    def _require_publisher(self, request: Request) -> None:
        """Raise unless the client may publish."""
        if self._publish:
            self._publish.require(_bearer(request), self._subscribe, "publish")
            return
        if not self._insecure:
            raise HTTPError(
                403, "publishing is off; start the hub with --publish-token or --insecure-publish to turn it on"
            )
        # A page of any site can make a browser POST without a preflight. Comparing the origin with Host does not help:
        # a site can point its own name at this address (DNS rebinding).
        origin = request.headers.get("origin")
        if origin and not (self._cors and self._cors.allows(origin)):
            raise HTTPError(
                403, f"pages from {origin} may not publish; start the hub with --cors {origin} or --publish-token"
            )

    async def _publication(self, request: Request) -> tuple[str, Any, str | None]:
        """Return the channel, the event and the idempotency key of a POST."""
        path, query = request.path_params.get("channel"), request.query
        names = [path] if path is not None else query.getlist("channel")
        body = await request.body(self._max_body)
        event = _header_or_query(request, "x-sse-event", "event")
        key = _header_or_query(request, "idempotency-key", "idempotency_key")
        if not names:
            return self._json_publication(body, event, key)
        if len(names) > 1:
            raise HTTPError(400, f"channel must be given once, got {len(names)}; publish to one channel at a time")
        try:
            return names[0], ServerSentEvent(body, event=event), key
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None

    @staticmethod
    def _json_publication(body: bytes, event: str | None, key: str | None) -> tuple[str, Any, str | None]:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise HTTPError(400, f"{_CHANNEL_MISSING}, or send a JSON object ({exc})") from None
        given: dict[str, Any] = fields if isinstance(fields, dict) else {}
        unknown = next((f"{short_repr(name)} is an unknown field; " for name in given if name not in _FIELDS), "")
        if unknown or "channel" not in given:
            known = ", ".join(sorted(_FIELDS))
            raise HTTPError(400, f"{unknown}the body must be a JSON object with a channel; its fields may be {known}")
        fields = {"event": event, "idempotency_key": key, **fields}
        channel, key = fields.pop("channel"), fields.pop("idempotency_key")
        if not isinstance(channel, str):
            raise HTTPError(400, f"channel must be a string, got {short_repr(channel)}")
        try:
            return channel, ServerSentEvent(**fields), key
        except ValueError as exc:
            raise HTTPError(400, str(exc)) from None


def _header_or_query(request: Request, header: str, parameter: str) -> str | None:
    """Return a header, or else a query parameter; an empty string counts as missing."""
    if value := request.headers.get(header):
        try:
            return value.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise HTTPError(400, f"{header} must be UTF-8") from None
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
    """The response to a POST whose event was published."""

    def __init__(self, event_id: str) -> None:
        self._event_id = event_id

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        await _send_json(scope, send, 201, {"id": self._event_id})


class _Health:
    """A health check: 200 if healthy, else 503.

    Args:
        check: Returns the response's JSON object.
        key: The field of that object that says whether the hub is healthy.
    """

    def __init__(self, check: Callable[[], dict[str, Any]], key: str) -> None:
        self._check = check
        self._key = key

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
            return
        result = self._check()
        await _send_json(scope, send, 200 if result[self._key] else 503, result)


def _readiness(broker: Broker, registry: StreamRegistry) -> dict[str, Any]:
    state, draining = broker.statistics().state, registry.draining
    return {"ready": state in {"local", "connected"} and not draining, "broker": state, "draining": draining}
