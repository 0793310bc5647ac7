"""`Request`, which an endpoint receives, and `HTTPError`, which it raises to refuse one."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote

from asgi_sse.errors import StreamClosedError, printable, short_repr
from asgi_sse.protocol.asgi import Scope
from asgi_sse.protocol.headers import encode_header
from asgi_sse.runtime.server import Server
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.receiver import RequestReceiver
from asgi_sse.stream.response import SCOPE_KEY, AppContext

from .routes import route_path

_PARSED_BYTES: Final = 65_536
"""The largest query, or set of cookies, that is parsed: what most servers allow for all request headers together.
uvicorn's httptools has no limit of headers: 200,000 cookies held the event loop for 0.4 s, a million parameters for
0.9 s."""

_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999 is valid JSON, but its value as a float, infinity, is not
        raise ValueError("a number is too large")
    return number


_json: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_reject_constant)
_SURROGATE: Final = re.compile(
    r"\\u[dD][89a-fA-F]"
)  # a lone surrogate, or half of a pair; only the lone one is invalid


class HTTPError(Exception):
    """Answers the request with a status when an endpoint raises it before its first event.

    Args:
        status: The status, from 200 to 599. A 204 stops an EventSource for good.
        detail: The body, as plain text. Default: the reason phrase of the status.
        headers: More headers. A ``content-type`` replaces that of plain text.

    Attributes:
        status: The status.
        detail: The body.
        headers: The headers as they are sent: pairs of lower-case name and value, both bytes.

    Raises:
        TypeError: `detail` is not a str, or `headers` is not a mapping.
        ValueError: The status or a header cannot be sent.
    """

    def __init__(self, status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> None:
        if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599:
            raise ValueError(
                f"status must be an int from 200 to 599, got {short_repr(status)}; pass a final status of HTTP"
            )
        if not detail and status in _PHRASES:
            detail = _PHRASES[status]
        if not isinstance(detail, str):
            raise TypeError(f"detail must be a str, got {short_repr(detail)}; pass the text of the body")
        super().__init__(status, detail)
        self.status: int = int(status)
        self.detail = detail
        if not isinstance(headers or {}, Mapping):
            raise TypeError(f"headers must be a mapping, got {short_repr(headers)}; pass {{name: value}}")
        self.headers: list[tuple[bytes, bytes]] = [
            encode_header(name, value) for name, value in (headers or {}).items()
        ]
        for name, _ in self.headers:
            if name in (b"content-length", b"transfer-encoding"):
                raise ValueError(f"headers must not contain one that frames the body, got {name.decode()!r}; remove it")

    def __str__(self) -> str:
        return f"{self.status} {self.detail}"


class Values(Mapping[str, str]):
    """Names with one or more values each: request headers, or the parameters of a query.

    ``values[name]`` is the last value of a parameter. Headers of one name are joined by a comma (RFC 9110, 5.3).
    """

    __slots__ = ("_fold", "_join", "_values")

    def __init__(
        self, pairs: Iterable[tuple[str, str]], *, fold: bool = False, join: Callable[[list[str]], str] | None = None
    ) -> None:
        self._fold = fold
        self._join = join
        self._values: dict[str, list[str]] = {}
        for name, value in pairs:
            self._values.setdefault(name.lower() if fold else name, []).append(value)

    def getlist(self, name: str) -> list[str]:
        """Return all values of `name`, in order; an empty list if there are none."""
        return list(self._values.get(name.lower() if self._fold else name, ()))

    def __getitem__(self, name: str) -> str:
        values = self._values[name.lower() if self._fold else name]
        return self._join(values) if self._join is not None else values[-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


class Request:
    """The HTTP request that an endpoint answers.

    Attributes:
        scope: The ASGI scope.
    """

    __slots__ = ("_draining", "_headers", "_query", "_receiver", "_server", "scope")

    def __init__(self, scope: Scope, receiver: RequestReceiver, server: Server, draining: DrainingEvent) -> None:
        self.scope: Scope = scope
        self._receiver = receiver
        self._server = server
        self._draining = draining
        self._headers: Values | None = None
        self._query: Values | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {printable(self.path)}>"

    @property
    def method(self) -> str:
        """The method in upper case: ``"GET"``, ``"POST"``."""
        return cast("str", self.scope["method"])

    @property
    def path(self) -> str:
        """The decoded path that the client requested, below ``root_path``."""
        return route_path(self.scope)

    @property
    def path_params(self) -> dict[str, str]:
        """The value of each ``{name}`` of the route."""
        return cast("dict[str, str]", self.scope.get("path_params", {}))

    @property
    def query(self) -> Values:
        """The decoded parameters of the query.

        Raises:
            HTTPError: 414, the query has more than 64 KiB.
        """
        if self._query is None:
            if len(self.scope.get("query_string", b"")) > _PARSED_BYTES:
                raise HTTPError(414, f"the query has more than {_PARSED_BYTES} bytes")
            text = self.scope.get("query_string", b"").decode("latin-1")
            self._query = Values(parse_qsl(text, keep_blank_values=True))
        return self._query

    @property
    def headers(self) -> Values:
        """The request headers. Their names are case-insensitive."""
        if self._headers is None:
            pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.scope["headers"])
            self._headers = Values(pairs, fold=True, join=", ".join)
        return self._headers

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies, by name.

        Raises:
            HTTPError: 431, the cookies have more than 64 KiB.
        """
        text = "; ".join(self.headers.getlist("cookie"))
        if len(text) > _PARSED_BYTES:
            raise HTTPError(431, f"the cookies have more than {_PARSED_BYTES} bytes")
        cookies = {}
        for pair in text.split(";"):
            name, found, value = pair.strip().partition("=")
            if found:
                cookies[name.strip()] = unquote(value.strip().strip('"'))
        return cookies

    @property
    def client(self) -> tuple[str, int] | None:
        """The client's address and port; ``None`` if the server does not know them."""
        client = self.scope.get("client")
        return None if client is None else (client[0], client[1])

    @property
    def state(self) -> dict[str, Any]:
        """The state that the app's lifespan shares with its requests."""
        return cast("dict[str, Any]", self.scope.setdefault("state", {}))

    @property
    def last_event_id(self) -> str | None:
        """The id of the last event that the client received; ``None`` if it sent no id.

        The ``Last-Event-ID`` header takes precedence over the query parameter ``last_event_id``. The parameter serves
        the first connection, where a browser's EventSource sends no such header.

        Raises:
            HTTPError: 414, the query has more than 64 KiB. With the header, the query is not read.
        """
        # Browsers encode the value as UTF-8 (WHATWG HTML, 9.2.3), so it is decoded from the bytes of the scope.
        values = [value for name, value in self.scope["headers"] if name.lower() == b"last-event-id"]
        header: str = values[-1].decode("utf-8", "replace") if values else ""
        return header or self.query.get("last_event_id") or None

    @property
    def draining(self) -> DrainingEvent:
        """An event that is set when the server is about to stop: ``is_set()``, ``await wait()``.

        An endpoint that reads this property has the registry's ``drain_timeout`` to end by itself. The stream of any
        other endpoint is ended at once.
        """
        self._draining.watched = True
        defaults: AppContext | None = self.scope.get(SCOPE_KEY)
        if defaults is not None and defaults.registry.is_draining(self._server):
            self._draining.set()
        return self._draining

    async def body(self, limit: int = 1_048_576) -> bytes:
        """Read the request body. Call this before the first event, which discards the unread rest of the body.

        Args:
            limit: The largest accepted body, in bytes.

        Returns:
            The whole body.

        Raises:
            HTTPError: 413, the body has more than `limit` bytes.
            StreamClosedError: The client left before the end of the body, or the body was discarded.
            ValueError: `limit` is negative or not an int.
        """
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit must be an int of at least 0 bytes, got {short_repr(limit)}; pass a size in bytes")
        if self._receiver.discarded:
            raise StreamClosedError(
                "the request body was discarded, because it was too large or the first event was sent; "
                "read it before the first event"
            )
        length = self.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise self._too_large(limit)
        if self.method in ("GET", "HEAD") and not length and "transfer-encoding" not in self.headers:
            return b""  # over HTTP/2, uvicorn's zttp never reports the end of a body that does not exist
        body = await self._receiver.body(limit)
        if body is None:
            if self._receiver.disconnected:
                raise StreamClosedError("the client left before the end of its request body")
            raise self._too_large(limit)
        return body

    async def json(self, limit: int = 1_048_576) -> Any:
        """Read the request body and parse it as JSON.

        The body must be UTF-8 (RFC 8259). The value is one that an event can carry.

        Args:
            limit: The largest accepted body, in bytes.

        Returns:
            The parsed value.

        Raises:
            HTTPError: 413, the body has more than `limit` bytes. 400, the body is not JSON, is nested too deeply,
                contains a lone surrogate, a number of more than 4,300 digits, or a number beyond the range of a float.
            StreamClosedError: The client left before the end of the body, or the body was discarded.
            ValueError: `limit` is negative or not an int.
        """
        body = await self.body(limit)
        try:
            text = str(body, "utf-8-sig")
            value = _json.decode(text)
            if _SURROGATE.search(text):
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as exc:
            raise HTTPError(400, f"the body is not JSON: {exc}") from exc
        return value

    @staticmethod
    def _too_large(limit: int) -> HTTPError:
        return HTTPError(413, f"the body has more than {limit} bytes")
