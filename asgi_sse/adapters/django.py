"""For Django, served by ASGI: a response of its own that streams events, and endpoints beside it that use its ORM."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any, Unpack

from asgiref.sync import ThreadSensitiveContext

from asgi_sse.errors import raise_missing_extra
from asgi_sse.routing.endpoint import make_endpoint
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import StreamArguments
from asgi_sse.stream.source import check_content

from .body import Body

try:
    from django.core.handlers.asgi import ASGIHandler
    from django.core.signals import request_finished, request_started
    from django.db import connections
    from django.http import StreamingHttpResponse
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "django", "Django", "django")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
    from asgi_sse.protocol.headers import Headers

__all__ = ["EventSourceResponse", "endpoint"]


class EventSourceResponse(StreamingHttpResponse):
    """Return it from a view, async or not.

    Put `asgi_sse.SSEMiddleware` around the app in ``asgi.py``: without it, ``GZipMiddleware`` holds the events back,
    and a stuck client cannot be dropped, since Django waits in its own send.

    Args:
        content: Where the events come from, as in `asgi_sse.EventSourceResponse`. The database connections of a
            synchronous one are closed at its end; those of an async one as at the end of any request.
        status_code: The status.
        headers: More headers.
        **options: What `asgi_sse.EventSourceResponse` takes about the stream.

    Raises:
        TypeError: As there; or it is sent by WSGI.
        ValueError: As there.
    """

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        **options: Unpack[StreamArguments],
    ) -> None:
        check_content(content)
        if not isinstance(content, AsyncIterable):
            content = closing_connections(content)
        response = PlainResponse(content, status_code=status_code, headers=headers, **options)
        self._body = Body(response)
        pairs = {name.decode(): value.decode("latin-1") for name, value in response.raw_headers}
        super().__init__(self._body, status=status_code, headers=pairs)

    def __iter__(self) -> Iterator[bytes]:
        raise TypeError("an event stream needs ASGI: serve the app of asgi.py, by uvicorn or hypercorn, not by WSGI")

    def __aiter__(self) -> Any:  # Django's is a generator; what uses it needs an async iterator with an ``aclose``
        for closer in self._resource_closers:  # the request is not handed to its response, but to be closed with it
            scope = getattr(getattr(closer, "__self__", None), "scope", None)
            if scope is not None:
                self._body.begin(scope)
        # Django would wrap it in generators, of which only the outermost is closed when the client leaves.
        return self._body if self._iterator is self._body else super().__aiter__()


def closing_connections(content: Iterable[Any]) -> Iterator[Any]:
    """The items, run in a thread whose database connections are closed with it: they belong to that thread."""
    try:
        yield from content
    finally:
        connections.close_all()


class endpoint:  # noqa: N801 (a decorator)
    """Makes an endpoint of `asgi_sse.SSEMiddleware` one that may use Django's ORM and its signals, as a view does.

    Without, all endpoints share one thread for ``sync_to_async``, and nobody closes their database connections.

    Args:
        function: The endpoint: an async or sync generator function, or a coroutine function.

    Raises:
        TypeError: It is no endpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self._app: ASGIApp = make_endpoint(getattr(function, "__qualname__", repr(function)), _in_own_thread(function))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        async with ThreadSensitiveContext():
            await request_started.asend(sender=ASGIHandler, scope=scope)
            try:
                await self._app(scope, receive, send)
            finally:
                await request_finished.asend(sender=ASGIHandler)


def _in_own_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    if not inspect.isgeneratorfunction(function):
        return function

    @functools.wraps(function)
    def generate(*args: Any) -> Iterator[Any]:
        return closing_connections(function(*args))

    return generate
