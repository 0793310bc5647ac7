"""The adapter for Litestar: a response for its route handlers, and `mount` for apps of this library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, cast

from asgi_sse.errors import raise_missing_extra
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import ResponseArguments

try:
    from litestar import asgi
    from litestar.response import Response
    from litestar.response.base import ASGIResponse
    from litestar.types import Receive, Scope, Send  # noqa: TC002 (Litestar reads the annotations at run time)
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "litestar", "Litestar", "litestar")

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from litestar import Litestar, Request
    from litestar.background_tasks import BackgroundTask, BackgroundTasks
    from litestar.handlers import ASGIRouteHandler
    from litestar.types import ResponseCookies

    from asgi_sse.protocol.asgi import ASGIApp
    from asgi_sse.protocol.headers import Headers

__all__ = ["EventSourceResponse", "mount"]


def mount(path: str, app: ASGIApp) -> ASGIRouteHandler:
    """Return a route handler that mounts an app of this library, such as one from `asgi_sse.create_app`.

    Litestar adds a slash to the path that a mounted app sees; the handler removes it again.

    Args:
        path: The path to mount the app at.
        app: The app.

    Returns:
        A handler for the ``route_handlers`` of a Litestar app.
    """

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        app_scope = cast("dict[str, Any]", scope)
        raw_path = app_scope.get("raw_path") or b"/"
        if app_scope["path"] != "/" and not raw_path.endswith(b"/"):
            app_scope["path"] = app_scope["path"].removesuffix("/")
        await app(app_scope, receive, send)  # type: ignore[arg-type]  # Litestar has TypedDicts, this library mappings

    return asgi(path, is_mount=True, copy_scope=True)(mounted)


class EventSourceResponse(Response[Any]):
    """An event stream to return from a Litestar route handler, annotated ``-> EventSourceResponse``.

    Args:
        content: The source of the events, as for `asgi_sse.EventSourceResponse`.
        status_code: The status. Default: 200, for POST as well.
        headers: More response headers, or other values for the headers of an event stream.
        cookies: Cookies to set.
        background: A task to run when the stream has ended, unless it ended by an error.
        **options: The stream arguments of `asgi_sse.EventSourceResponse`, such as ``ping`` and ``send_timeout``.

    Raises:
        TypeError: `content` is not a source of events, or an argument has a wrong type.
        ValueError: An argument is out of range, or a header is invalid.
    """

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        cookies: ResponseCookies | None = None,
        background: BackgroundTask | BackgroundTasks | None = None,
        **options: Unpack[ResponseArguments],
    ) -> None:
        self._response = PlainResponse(content, status_code=status_code, headers=headers, **options)
        pairs = {name.decode(): value.decode("latin-1") for name, value in self._response.raw_headers}
        super().__init__(
            content,
            background=background,
            cookies=cookies,
            headers=pairs,
            media_type="text/event-stream",
            status_code=status_code,
        )

    def to_asgi_response(  # noqa: D102 (Litestar's method)
        self, app: Litestar | None, request: Request[Any, Any, Any], **options: Any
    ) -> ASGIResponse:
        return _StreamedResponse(self._response, super().to_asgi_response(app, request, **options))

    def render(self, content: Any, media_type: str, enc_hook: Any = None) -> bytes:  # noqa: ARG002, D102 (Litestar's method)
        return b""


class _StreamedResponse(ASGIResponse):
    """An event stream with the status, headers and cookies of Litestar's own ASGI response."""

    __slots__ = ("_response",)

    def __init__(self, response: PlainResponse, litestar_response: ASGIResponse) -> None:
        for name in ASGIResponse.__slots__:
            setattr(self, name, getattr(litestar_response, name))
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._response.status_code = self.status_code
        self._response.raw_headers = [pair for pair in self.encode_headers() if pair[0] != b"content-length"]
        await self._response(scope, receive, send)  # type: ignore[arg-type]  # as in `mount`
        await self.after_response()
