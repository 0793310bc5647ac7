"""The adapter for Django on ASGI: a response for its views, and endpoints that use its ORM outside of its URLconf."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any, Unpack

from asgiref.sync import ThreadSensitiveContext

from asgi_sse.errors import raise_missing_extra
from asgi_sse.routing.endpoint import make_endpoint
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import ResponseArguments
from asgi_sse.stream.source import check_content

from .body import Body

try:
    from django.core.handlers.asgi import ASGIHandler
    from django.core.signals import request_finished, request_started
    from django.db import connections
    from django.http import StreamingHttpResponse
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "django", "Django", "django")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from asgi_sse.protocol.asgi import ASGIApp, Receive, Scope, Send
    from asgi_sse.protocol.headers import Headers

__all__ = ["EventSourceResponse", "endpoint"]


class EventSourceResponse(StreamingHttpResponse):
    """An event stream to return from a Django view, async or sync.

    Wrap the app of ``asgi.py`` in `asgi_sse.SSEMiddleware`. Without it, Django's ``GZipMiddleware`` holds the events
    back, and a stuck client cannot be dropped, because Django waits in its own send.

    Args:
        content: The source of the events, as for `asgi_sse.EventSourceResponse`. Database connections of a synchronous
            source are closed when it ends; those of an async source are closed like those of any request.
        status_code: The status. Default: 200.
        headers: More response headers, or other values for the headers of an event stream.
        **options: The stream arguments of `asgi_sse.EventSourceResponse`, such as ``ping`` and ``send_timeout``.

    Raises:
        TypeError: `content` is not a source of events, an argument has a wrong type, or the app is served by WSGI.
        ValueError: An argument is out of range, or a header is invalid.
    """

    # Attributes of Django's response that its type stubs do not declare
    _iterator: Any
    _resource_closers: list[Callable[[], object]]

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        **options: Unpack[ResponseArguments],
    ) -> None:
        check_content(content)
        if not isinstance(content, AsyncIterable):
            content = _closing_connections(content)
        response = PlainResponse(content, status_code=status_code, headers=headers, **options)
        self._body = Body(response)
        pairs = {name.decode(): value.decode("latin-1") for name, value in response.raw_headers}
        super().__init__(self._body, status=status_code, headers=pairs)

    def __iter__(self) -> Iterator[bytes]:
        raise TypeError(
            "an event stream needs ASGI, but Django serves this request by WSGI; serve the app of asgi.py with uvicorn "
            "or hypercorn"
        )

    def __aiter__(self) -> Any:
        # Django does not pass the request to a response, but it does pass the request's close method.
        for closer in self._resource_closers:
            scope = getattr(getattr(closer, "__self__", None), "scope", None)
            if scope is not None:
                self._body.set_scope(scope)
        # Django would wrap the body in generators, and closes only the outermost one when the client leaves.
        return self._body if self._iterator is self._body else super().__aiter__()


def _closing_connections(content: Iterable[Any]) -> Iterator[Any]:
    """Yield the events of a synchronous source, then close the database connections of the thread that it ran in."""
    try:
        yield from content
    finally:
        connections.close_all()


class endpoint:  # noqa: N801 (a decorator)
    """A decorator for endpoints of `asgi_sse.SSEMiddleware` that use Django's ORM and signals as a view does.

    Without it, all endpoints share one thread for ``sync_to_async``, and their database connections stay open.

    Args:
        function: The endpoint: an async or sync generator function, or a coroutine function.

    Raises:
        TypeError: `function` is not an endpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self._app: ASGIApp = make_endpoint(getattr(function, "__qualname__", repr(function)), _in_own_thread(function))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request between Django's signals ``request_started`` and ``request_finished``."""
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
        return _closing_connections(function(*args))

    return generate
