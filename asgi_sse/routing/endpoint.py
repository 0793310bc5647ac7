"""`Endpoint`, which answers requests with the events or the response that a function returns."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from asgiref.compatibility import double_to_single_callable

from asgi_sse.errors import StreamClosedError, short_repr
from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
from asgi_sse.runtime.server import server_of
from asgi_sse.stream.draining import DrainingEvent
from asgi_sse.stream.receiver import RequestReceiver
from asgi_sse.stream.response import RESPONDER_KEY, EventSourceResponse

from .request import HTTPError, Request
from .routes import RouteTable

METHODS: Final = ("GET", "HEAD", "POST")
"""The methods that an endpoint answers. POST is among them because a prompt can be too long for a URL."""


class RequestHandler:
    """Base class of objects that answer requests with a method.

    An instance is an endpoint, an ASGI app, and a valid return value of an endpoint.
    """

    __slots__ = ()

    async def answer(self, request: Request) -> Any:
        """Return what an endpoint may return for `request`: events, a response or an ASGI app."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await Endpoint(repr(self), self.answer, takes_request=True)(scope, receive, send)


class Endpoint:
    """The ASGI app of one endpoint function.

    Args:
        pattern: The route of the endpoint, for error messages.
        function: The endpoint function, which returns events, a response or an ASGI app.
        takes_request: Whether `function` takes the `Request`.
    """

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
        draining = DrainingEvent()
        request = Request(scope, receiver, server, draining)
        response: EventSourceResponse | None = None
        try:
            result = self._function(request) if self._takes_request else self._function()
            if inspect.isawaitable(result):
                result = await result
            if isinstance(result, RequestHandler):
                result = await result.answer(request)
            if isinstance(result, EventSourceResponse) or not callable(result):
                response = result if isinstance(result, EventSourceResponse) else self._respond(result)
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
            raise TypeError(
                f"the endpoint of {self._pattern!r} must return events, a response or an ASGI app: {exc}"
            ) from exc


def make_endpoint(pattern: str, target: Any) -> ASGIApp:
    """Return the ASGI app for `target`, the endpoint of a route.

    Args:
        pattern: The route of the endpoint, for error messages.
        target: A function that takes a `Request` or no argument, a `RequestHandler`, or an ASGI app.

    Raises:
        TypeError: `target` is not an endpoint.
    """
    if not callable(target):
        hint = "pass a function or an ASGI app"
        if inspect.iscoroutine(target):
            target.close()
        if inspect.iscoroutine(target) or inspect.isasyncgen(target) or inspect.isgenerator(target):
            hint = "pass the function itself, which is called for each request"
        raise TypeError(f"the endpoint of {pattern!r} must be callable, got {short_repr(target)}; {hint}")
    if isinstance(target, type):
        if _arity(target) == 1 and _arity(getattr(target, "__call__", None)) == 3:  # noqa: B004 (self, receive, send)
            return cast("ASGIApp", double_to_single_callable(target))  # type: ignore[no-untyped-call]  # of ASGI 2
        raise TypeError(
            f"the endpoint of {pattern!r} must be a function or an ASGI app, got {target!r}, which is a class; "
            "pass an instance"
        )
    if isinstance(target, RequestHandler):
        return Endpoint(pattern, target.answer, takes_request=True)
    if isinstance(target, EventSourceResponse):
        raise TypeError(
            f"the endpoint of {pattern!r} must be a function or an ASGI app, got an EventSourceResponse, which answers "
            "one request; pass a function that returns it"
        )
    required = _arity(target)
    if required is None or required == 3:
        return cast("ASGIApp", target)
    if required > 1:
        raise TypeError(
            f"the endpoint of {pattern!r} must take a Request or nothing, got {target!r}, which takes {required} "
            "arguments; bind the other arguments with functools.partial"
        )
    return Endpoint(pattern, target, takes_request=required == 1 or bool(_positional(target)))


def make_route_table(routes: Mapping[str, Any]) -> RouteTable[ASGIApp]:
    """Return the table of `routes`, with an ASGI app for each endpoint.

    Raises:
        TypeError: `routes` is not a mapping, or a value is not an endpoint.
        ValueError: A pattern is invalid, or two patterns match the same paths.
    """
    if not isinstance(routes, Mapping):
        raise TypeError(f"routes must be a mapping, got {short_repr(routes)}; pass {{'/path': endpoint}}")
    return RouteTable({pattern: make_endpoint(pattern, target) for pattern, target in routes.items()})


def _positional(function: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _arity(function: Any) -> int | None:
    """Return the number of required positional arguments; ``None`` if `function` takes any number or is opaque."""
    try:
        positional = _positional(function)
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None  # a function written in C may have no signature
    if not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.default is p.empty for p in positional)


async def send_text(scope: Scope, send: Send, error: HTTPError) -> None:
    """Send a complete response with the status and the detail of `error`."""
    body = b"" if error.status in (204, 205, 304) else error.detail.encode("utf-8", "replace")
    headers = [*error.headers, (b"content-length", str(len(body)).encode())]
    if body and all(name != b"content-type" for name, _ in error.headers):
        headers.insert(0, (b"content-type", b"text/plain; charset=utf-8"))
    if error.status in (204, 304):
        headers.pop()
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False})
