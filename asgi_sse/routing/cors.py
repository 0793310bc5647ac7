"""`CORS`: the origins that may read event streams, by the rules of the Fetch standard."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import Message, Scope, Send

_PREFLIGHT_MAX_AGE_S: Final = 600
_OWN_HEADERS: Final = (b"access-control-allow-origin", b"access-control-allow-credentials")
"""Headers that a browser rejects if they occur twice."""


@dataclass(frozen=True, slots=True)
class CORS:
    """The other origins that may read the streams.

    Args:
        origins: One origin such as ``"https://example.com"``, several origins, ``"*"`` for all, or a function that is
            called with an origin and returns whether it may read.
        credentials: Whether requests may carry cookies (``EventSource(url, {withCredentials: true})``).
        headers: Request headers that scripts may set, besides ``Last-Event-ID`` and those that need no permission. The
            default includes ``Content-Type``, which ``fetch`` needs to send JSON.

    Raises:
        TypeError: `origins` is neither of these.
        ValueError: An origin is invalid, or ``"*"`` is combined with `credentials`, which browsers reject.
    """

    origins: str | Iterable[str] | Callable[[str], bool]
    credentials: bool = False
    headers: tuple[str, ...] = ("Authorization", "Content-Type")
    _allowed: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        """Validate the origins."""
        if callable(self.origins):
            return
        if not isinstance(self.origins, Iterable):
            raise TypeError(
                f"CORS origins must be a str, an iterable of str or a function, got {short_repr(self.origins)}; "
                "pass origins such as 'https://example.com', or '*'"
            )
        allowed = frozenset([self.origins] if isinstance(self.origins, str) else self.origins)
        for origin in allowed - {"*", "null"}:
            scheme, found, host = origin.partition("://") if isinstance(origin, str) else ("", "", "")
            if not found or not scheme or not host or set("/?#* \t") & set(origin.replace("://", "", 1)):
                raise ValueError(
                    f"a CORS origin must be a scheme, a host and a port, got {short_repr(origin)}; "
                    "pass one such as 'https://example.com'"
                )
            if (scheme.lower(), host.rpartition(":")[2]) in (("https", "443"), ("http", "80")):
                raise ValueError(
                    f"a CORS origin must not name the default port, got {short_repr(origin)}; "
                    "leave the port out, as browsers do"
                )
        if "*" in allowed and self.credentials:
            raise ValueError(
                "CORS origins must not be '*' with credentials, which browsers reject; "
                "name the origins, or pass a function"
            )
        object.__setattr__(self, "_allowed", frozenset(origin.lower() for origin in allowed))

    def allows(self, origin: str) -> bool:
        """Return whether `origin` may read the streams."""
        if callable(self.origins):
            return bool(self.origins(origin))
        return "*" in self._allowed or origin.lower() in self._allowed

    def response_headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the headers that a response to this request needs."""
        origin = _header(scope, b"origin")
        any_origin = "*" in self._allowed
        headers = [] if any_origin else [(b"vary", b"Origin")]
        if origin and self.allows(origin.decode("latin-1")):
            headers.append((b"access-control-allow-origin", b"*" if any_origin else origin))
            if self.credentials:
                headers.append((b"access-control-allow-credentials", b"true"))
        return headers

    def wrap(self, scope: Scope, send: Send) -> Send:
        """Return a `send` that adds these headers to the response start."""
        headers = self.response_headers(scope)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if not pair[0].lower().startswith(_OWN_HEADERS)]
                message = {**message, "headers": [*kept, *headers]}
            await send(message)

        return send_with_cors

    async def answer_preflight(self, scope: Scope, send: Send, methods: str) -> None:
        """Answer a preflight request with what a script may request.

        Args:
            scope: The scope of the preflight request.
            send: The ``send`` of the request.
            methods: The allowed methods, separated by commas.
        """
        headers = self.response_headers(scope)
        if len(headers) > ("*" not in self._allowed):
            names = ", ".join(dict.fromkeys(("Last-Event-ID", *self.headers)))
            headers += [
                (b"access-control-allow-methods", methods.encode()),
                (b"access-control-allow-headers", names.encode()),
                (b"access-control-max-age", str(_PREFLIGHT_MAX_AGE_S).encode()),
            ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def is_preflight(scope: Scope) -> bool:
    """Return whether the request asks for permission on behalf of a script."""
    return (
        scope["method"] == "OPTIONS"
        and _header(scope, b"origin") != b""
        and _header(scope, b"access-control-request-method") != b""
    )


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")
