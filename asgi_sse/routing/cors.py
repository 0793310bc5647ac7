"""Cross-origin requests for event streams, as the Fetch standard has them: which origins may read them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from asgi_sse.protocol.asgi import Message, Scope, Send

_PREFLIGHT_SECONDS: Final = 600
_OWN: Final = (b"access-control-allow-origin", b"access-control-allow-credentials")  # twice, browsers refuse them


@dataclass(frozen=True, slots=True)
class CORS:
    """Which other origins may read the streams.

    Args:
        origins: The origins, such as ``"https://example.com"``; ``"*"`` for all; or a function that is asked
            of each.
        credentials: Whether requests may carry cookies (``EventSource(url, {withCredentials: true})``).
        headers: Request headers that scripts may set, beside those that need no permission and
            ``Last-Event-ID``. ``fetch`` with JSON needs ``Content-Type``, which is in the default.

    Raises:
        TypeError: `origins` is none of these.
        ValueError: An origin is none, or ``"*"`` stands beside `credentials`, which browsers refuse.
    """

    origins: str | Iterable[str] | Callable[[str], bool]
    credentials: bool = False
    headers: tuple[str, ...] = ("Authorization", "Content-Type")
    _allowed: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        """Check the origins."""
        if callable(self.origins):
            return
        if not isinstance(self.origins, Iterable):
            raise TypeError(f"cors: origins={self.origins!r}; give origins, '*', or a function that is asked of each")
        allowed = frozenset([self.origins] if isinstance(self.origins, str) else self.origins)
        for origin in allowed - {"*", "null"}:
            scheme, found, host = origin.partition("://") if isinstance(origin, str) else ("", "", "")
            if not found or not scheme or not host or set("/?#* \t") & set(origin.replace("://", "", 1)):
                raise ValueError(f"cors: {origin!r} is no origin; give scheme, host and port: 'https://example.com'")
            if (scheme.lower(), host.rpartition(":")[2]) in (("https", "443"), ("http", "80")):
                raise ValueError(f"cors: browsers leave the default port out of {origin!r}; do so too")
        if "*" in allowed and self.credentials:
            raise ValueError("cors: browsers refuse '*' with credentials; name the origins, or give a function")
        object.__setattr__(self, "_allowed", frozenset(origin.lower() for origin in allowed))

    def allows(self, origin: str) -> bool:
        """Whether `origin` may read the streams."""
        if callable(self.origins):
            return bool(self.origins(origin))
        return "*" in self._allowed or origin.lower() in self._allowed

    def response_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What a response to this request needs."""
        origin = _header(scope, b"origin")
        any_origin = "*" in self._allowed
        headers = [] if any_origin else [(b"vary", b"Origin")]
        if origin and self.allows(origin.decode("latin-1")):
            headers.append((b"access-control-allow-origin", b"*" if any_origin else origin))
            if self.credentials:
                headers.append((b"access-control-allow-credentials", b"true"))
        return headers

    def wrap(self, scope: Scope, send: Send) -> Send:
        """`send`, with those headers in the head of the response."""
        headers = self.response_headers(scope)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [pair for pair in message.get("headers", ()) if not pair[0].lower().startswith(_OWN)]
                message = {**message, "headers": [*own, *headers]}
            await send(message)

        return send_with_cors

    async def answer_preflight(self, scope: Scope, send: Send, methods: str) -> None:
        """Say what a script may ask for."""
        headers = self.response_headers(scope)
        if len(headers) > ("*" not in self._allowed):
            names = ", ".join(dict.fromkeys(("Last-Event-ID", *self.headers)))
            headers += [
                (b"access-control-allow-methods", methods.encode()),
                (b"access-control-allow-headers", names.encode()),
                (b"access-control-max-age", str(_PREFLIGHT_SECONDS).encode()),
            ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks for permission, before a request that needs it."""
    return (
        scope["method"] == "OPTIONS"
        and _header(scope, b"origin") != b""
        and _header(scope, b"access-control-request-method") != b""
    )


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")
