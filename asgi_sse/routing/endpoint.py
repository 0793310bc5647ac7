"""What an app has beside its streams: `Request`, `HTTPError`, and the table of routes."""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import parse_qsl, unquote

from asgiref.compatibility import double_to_single_callable

from asgi_sse.errors import StreamClosedError, printable, short_repr
from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
from asgi_sse.protocol.headers import encode_header
from asgi_sse.runtime.server import Server, server_of
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.receiver import RequestReceiver
from asgi_sse.stream.response import RESPONDER_KEY, SCOPE_KEY, AppContext, EventSourceResponse

METHODS: Final = ("GET", "HEAD", "POST")  # POST since prompts are too large for a URL
_PARSED_BYTES: Final = 65_536
"""Of a query, or of cookies, that are parsed: what most servers let a whole head have. uvicorn's httptools has no limit
of headers: 200,000 cookies held the event loop for 0.4 s, a million parameters for 0.9 s."""

_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}
_PARAMETER: Final = re.compile(r"\{([^{}]*)\}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):  # 1e999 is JSON, but the infinity that it would become is none
        raise ValueError("a number is too large")
    return number


_json: Final = json.JSONDecoder(parse_float=_finite, parse_constant=_no_number)
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")  # one, or half of a pair: a pair is fine


class HTTPError(Exception):
    """Answers the request with a status, when an endpoint raises it before its first event.

    Args:
        status: 200 to 599; 204 tells an EventSource to stop for good.
        detail: The body, as plain text. Default: the status's phrase.
        headers: More headers; a ``content-type`` takes the place of plain text.

    Raises:
        TypeError: `detail` is no text, or `headers` no mapping.
        ValueError: The status or a header cannot be sent.
    """

    def __init__(self, status: int, detail: str = "", headers: Mapping[str, str] | None = None) -> None:
        if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599:
            raise ValueError(f"status={status!r} is no final status of HTTP; give a number from 200 to 599")
        if not detail and status in _PHRASES:
            detail = _PHRASES[status]
        if not isinstance(detail, str):
            raise TypeError(f"detail={short_repr(detail)} is {type(detail).__name__}; give a str")
        super().__init__(status, detail)
        self.status = int(status)
        self.detail = detail
        if not isinstance(headers or {}, Mapping):
            raise TypeError(f"headers={short_repr(headers)}: give a mapping")
        self.headers = [encode_header(name, value) for name, value in (headers or {}).items()]
        for name, _ in self.headers:
            if name in (b"content-length", b"transfer-encoding"):
                raise ValueError(f"headers: {name.decode()!r} frames the body, whose size is known; remove it")

    def __str__(self) -> str:
        return f"{self.status} {self.detail}"


class Values(Mapping[str, str]):
    """Names with one or more values each: headers, or a query.

    ``values[name]`` is the last one, of headers all of them joined by a comma (RFC 9110, 5.3).
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
        """All values of `name`, in order."""
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
    """What an endpoint sees of its request.

    Attributes:
        scope: The ASGI scope.
    """

    __slots__ = ("_draining", "_headers", "_query", "_receiver", "_server", "scope")

    def __init__(self, scope: Scope, receiver: RequestReceiver, server: Server) -> None:
        self.scope = scope
        self._receiver = receiver
        self._server = server
        self._draining = DrainingEvent()
        self._headers: Values | None = None
        self._query: Values | None = None

    def __repr__(self) -> str:
        return f"<Request {self.method} {printable(self.path)}>"

    @property
    def method(self) -> str:
        """``"GET"``, ``"POST"``; upper case."""
        return cast("str", self.scope["method"])

    @property
    def path(self) -> str:
        """The path as the client asked for it, decoded, below ``root_path``."""
        return route_path(self.scope)

    @property
    def path_params(self) -> dict[str, str]:
        """What stood in the place of each ``{name}`` of the route."""
        return cast("dict[str, str]", self.scope.get("path_params", {}))

    @property
    def query(self) -> Values:
        """The query's parameters, decoded.

        Raises:
            HTTPError: 414, it has more than 64 KiB.
        """
        if self._query is None:
            if len(self.scope.get("query_string", b"")) > _PARSED_BYTES:
                raise HTTPError(414, f"the query has more than {_PARSED_BYTES} bytes")
            text = self.scope.get("query_string", b"").decode("latin-1")
            self._query = Values(parse_qsl(text, keep_blank_values=True))
        return self._query

    @property
    def headers(self) -> Values:
        """The headers; names in any case."""
        if self._headers is None:
            pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.scope["headers"])
            self._headers = Values(pairs, fold=True, join=", ".join)
        return self._headers

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies, by name.

        Raises:
            HTTPError: 431, they have more than 64 KiB.
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
        """The client's address and port, if the server knows them."""
        client = self.scope.get("client")
        return None if client is None else (client[0], client[1])

    @property
    def state(self) -> dict[str, Any]:
        """What the lifespan left for requests."""
        return cast("dict[str, Any]", self.scope.setdefault("state", {}))

    @property
    def last_event_id(self) -> str | None:
        """The id that the client saw last: its ``Last-Event-ID``, else ``last_event_id`` of the query.

        The query serves a first connection, on which a browser's EventSource sends no such header.

        Raises:
            HTTPError: 414, as `query`, which is not looked at where there is the header.
        """
        # Browsers send the header's value as UTF-8 (WHATWG HTML, 9.2.3); ASGI hands out bytes.
        values = [value for name, value in self.scope["headers"] if name.lower() == b"last-event-id"]
        header: str = values[-1].decode("utf-8", "replace") if values else ""
        return header or self.query.get("last_event_id") or None

    @property
    def draining(self) -> DrainingEvent:
        """Set when the server is about to stop (``is_set()``, ``await wait()``).

        An endpoint that looks at it has the registry's ``drain_timeout`` to end by itself; any other
        is ended at once.
        """
        self._draining.watched = True
        defaults: AppContext | None = self.scope.get(SCOPE_KEY)
        if defaults is not None and defaults.registry.is_draining(self._server):
            self._draining.set()
        return self._draining

    async def body(self, limit: int = 1_048_576) -> bytes:
        """The body. Read it before the first event: from then on the rest of it is discarded.

        Args:
            limit: The most bytes that it may have.

        Raises:
            HTTPError: 413, it has more than `limit` bytes.
            StreamClosedError: The client left before its end, or it was discarded.
        """
        if not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit={limit!r} is no size; give bytes, at least 0")
        if self._receiver.discarded:
            raise StreamClosedError("the body was discarded, as too large or at the first event; read it before")
        length = self.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            raise self._too_large(limit)
        if self.method in ("GET", "HEAD") and not length and "transfer-encoding" not in self.headers:
            return b""  # uvicorn's zttp over HTTP/2 never reports the end of a body that is not there
        body = await self._receiver.body(limit)
        if body is None:
            if self._receiver.disconnected:
                raise StreamClosedError("the client left before the end of its request's body")
            if not self._receiver.exceeds(limit):
                raise StreamClosedError("the body was discarded at the first event; read it before")
            raise self._too_large(limit)
        return body

    async def json(self, limit: int = 1_048_576) -> Any:
        """The body, parsed as JSON: UTF-8, as RFC 8259 has it, and so that it can be sent on in an event.

        Raises:
            HTTPError: 400, it is no JSON, or too deep; has a lone surrogate, a number of over 4,300 digits, or one that
                no float holds; 413, it has more than `limit` bytes.
            StreamClosedError: As `body`.
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


def route_path(scope: Scope) -> str:
    """The path below ``root_path``: servers and mounts put the prefix before it, or do not."""
    path, root = cast("str", scope["path"]), cast("str", scope.get("root_path", "")).rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        path = path[len(root) :]
    return path or "/"


class RouteTable:
    """Finds the endpoint for a path. A literal segment goes before a parameter.

    Args:
        routes: Patterns such as ``"/users/{name}/events"``, each with its endpoint.

    Raises:
        TypeError: An endpoint is none.
        ValueError: A pattern cannot be parsed, or two match the same paths.
    """

    def __init__(self, routes: Mapping[str, Any]) -> None:
        if not isinstance(routes, Mapping):
            raise TypeError(f"routes={short_repr(routes)} is no mapping; give {{'/path': endpoint}}")
        shapes: dict[tuple[str, ...], str] = {}
        table: list[tuple[tuple[str | None, ...], tuple[str, ...], ASGIApp]] = []
        for pattern, target in routes.items():
            literals, names = _parse(pattern)
            shape = tuple("{}" if literal is None else f"/{literal}" for literal in literals)
            if shape in shapes:
                raise ValueError(f"routes {shapes[shape]!r} and {pattern!r} match the same paths; remove one")
            shapes[shape] = pattern
            table.append((literals, names, make_endpoint(pattern, target)))
        # What is literal as a whole comes first, at the price of one look; then what is literal further to the left.
        self._literal = {"/" + "/".join(map(str, literals)): app for literals, names, app in table if not names}
        table = [row for row in table if row[1]]
        self._table = sorted(table, key=lambda row: [literal is None for literal in row[0]])
        self._most = max((len(row[0]) for row in table), default=0)

    def find(self, path: str) -> tuple[ASGIApp, dict[str, str]] | None:
        """The endpoint for `path` and its parameters, if there is one."""
        literal = self._literal.get(path)
        if literal is not None:
            return literal, {}
        if not self._table:
            return None
        # Into one more than any route has: then none matches, however many there are.
        before, *segments = path.split("/", self._most + 1)
        if before:  # h11 takes any target: "x/items/1" is no "/items/1", which a proxy may have closed
            return None
        for literals, names, app in self._table:
            if len(literals) == len(segments) and all(
                bool(segment) if literal is None else literal == segment
                for literal, segment in zip(literals, segments, strict=True)
            ):
                found = (segment for literal, segment in zip(literals, segments, strict=True) if literal is None)
                return app, dict(zip(names, found, strict=True)) if names else {}
        return None


def _parse(pattern: str) -> tuple[tuple[str | None, ...], tuple[str, ...]]:
    if not isinstance(pattern, str) or not pattern.startswith("/"):
        raise ValueError(f"route {pattern!r} does not start with '/'; give a path such as '/events/{{name}}'")
    if "?" in pattern or "#" in pattern:
        raise ValueError(f"route {pattern!r} has a query or fragment, which no path has; read request.query instead")
    literals: list[str | None] = []
    names: list[str] = []
    for segment in pattern.split("/")[1:]:
        match = _PARAMETER.fullmatch(segment)
        if match is None:
            if not {*"{}<>"}.isdisjoint(segment):  # other frameworks have <name>, which no path is likely to be
                raise ValueError(
                    f"route {pattern!r}: a parameter is a whole segment, such as '/{{name}}', not {segment!r}"
                )
            literals.append(segment)
            continue
        name = match[1]
        if not name.isidentifier() or name in names:
            raise ValueError(
                f"route {pattern!r}: {{{name}}} needs a name of its own, of letters, digits and '_'; "
                "there are no converters, every parameter is a str"
            )
        literals.append(None)
        names.append(name)
    return tuple(literals), tuple(names)


def make_endpoint(pattern: str, target: Any) -> ASGIApp:
    """The ASGI app that answers with what `target`, an endpoint, gives.

    Raises:
        TypeError: `target` is no endpoint.
    """
    if not callable(target):
        hint = ""
        if inspect.iscoroutine(target):
            target.close()
        if inspect.iscoroutine(target) or inspect.isasyncgen(target) or inspect.isgenerator(target):
            hint = "; give the function itself, it is called for each request"
        raise TypeError(f"route {pattern!r}: {short_repr(target)} is no endpoint{hint}")
    if isinstance(target, type):
        if _arity(target) == 1 and _arity(getattr(target, "__call__", None)) == 3:  # noqa: B004 (self, receive, send)
            return cast("ASGIApp", double_to_single_callable(target))  # type: ignore[no-untyped-call]  # of ASGI 2
        raise TypeError(
            f"route {pattern!r}: {target!r} is a class; give a function, or an instance that is an ASGI app"
        )
    if isinstance(target, Answering):
        return Endpoint(pattern, target.answer, takes_request=True)
    if isinstance(target, EventSourceResponse):
        raise TypeError(f"route {pattern!r}: an EventSourceResponse serves one request; give a function that makes it")
    required = _arity(target)
    if required is None or required == 3:
        return cast("ASGIApp", target)
    if required > 1:
        raise TypeError(
            f"route {pattern!r}: {target!r} takes {required} arguments; an endpoint takes a Request or none"
        )
    return Endpoint(pattern, target, takes_request=required == 1 or bool(_positional(target)))


def _positional(function: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _arity(function: Any) -> int | None:
    """How many positional arguments `function` needs; ``None`` if it takes just any, or does not say."""
    try:
        positional = _positional(function)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None  # built in C
    if not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty for p in positional)


class Endpoint:
    """Runs an endpoint for one request after another."""

    def __init__(self, pattern: str, function: Callable[..., Any], *, takes_request: bool) -> None:
        self._pattern = pattern
        self._function = function
        self._takes_request = takes_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] not in METHODS:
            await send_text(scope, send, HTTPError(405, headers={"allow": ", ".join(METHODS)}))
            return
        receiver = RequestReceiver(receive)
        responder = scope.get(RESPONDER_KEY)
        server = server_of(send) if responder is None else responder.server
        request = Request(scope, receiver, server)
        response: EventSourceResponse | None = None
        try:
            result = self._function(request) if self._takes_request else self._function()
            if inspect.isawaitable(result):
                result = await result
            if isinstance(result, Answering):
                result = await result.answer(request)
            if isinstance(result, EventSourceResponse) or not callable(result):
                response = result if isinstance(result, EventSourceResponse) else self._respond(result)
                draining = request._draining  # noqa: SLF001 (looking would ask for grace)
                await response.serve(scope, receiver, send, server, draining)
                return
        except StreamClosedError:
            if not receiver.disconnected:
                raise
            return
        except HTTPError as exc:
            if response is not None and response.opened:
                raise
            await send_text(scope, send, exc)
            return
        await cast("ASGIApp", result)(scope, receiver.replay, send)

    def _respond(self, result: Any) -> EventSourceResponse:
        try:
            return EventSourceResponse(result)
        except TypeError as exc:
            raise TypeError(f"the endpoint of {self._pattern!r} returned no events: {exc}") from exc


class Answering:
    """What answers requests by a method: an endpoint, an ASGI app, and what an endpoint may return."""

    __slots__ = ()

    async def answer(self, request: Request) -> Any:
        """What an endpoint would return."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await Endpoint(repr(self), self.answer, takes_request=True)(scope, receive, send)


async def send_text(scope: Scope, send: Send, error: HTTPError) -> None:
    """Answer with a status and its detail, complete."""
    body = b"" if error.status in (204, 205, 304) else error.detail.encode("utf-8", "replace")
    headers = [*error.headers, (b"content-length", str(len(body)).encode())]
    if body and all(name != b"content-type" for name, _ in error.headers):
        headers.insert(0, (b"content-type", b"text/plain; charset=utf-8"))
    if error.status in (204, 304):
        headers.pop()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False})
