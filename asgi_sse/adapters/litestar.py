"""For Litestar: a response of its own that streams events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack, cast

from asgi_sse.errors import raise_missing_extra
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import StreamArguments

try:
    from litestar import asgi
    from litestar.response import Response
    from litestar.response.base import ASGIResponse
    from litestar.types import Receive, Scope, Send  # noqa: TC002 (Litestar looks at the annotations)
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "litestar", "Litestar", "litestar")

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
    """A route handler that mounts an app of this library, as `asgi_sse.create_app` makes them.

    Litestar puts a slash behind the path that a mounted app sees, and tells it nothing of what went before.

    Args:
        path: Where to mount it.
        app: The app.
    """

    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        inside = cast("dict[str, Any]", scope)
        raw_path = inside.get("raw_path") or b"/"
        if inside["path"] != "/" and not raw_path.endswith(b"/"):
            inside["path"] = inside["path"].removesuffix("/")
        await app(inside, receive, send)  # type: ignore[arg-type]  # TypedDicts there, mappings here

    return asgi(path, is_mount=True, copy_scope=True)(mounted)


class EventSourceResponse(Response[Any]):
    """Return it from a route handler, annotated ``-> EventSourceResponse``. Its status is 200, for POST too.

    Args:
        content: Where the events come from, as in `asgi_sse.EventSourceResponse`.
        status_code: The status.
        headers: More headers.
        cookies: Cookies to set.
        background: Run when the stream has ended, unless that was by an error.
        **options: What `asgi_sse.EventSourceResponse` takes about the stream.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        cookies: ResponseCookies | None = None,
        background: BackgroundTask | BackgroundTasks | None = None,
        **options: Unpack[StreamArguments],
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

    def to_asgi_response(  # noqa: D102 (Litestar's)
        self, app: Litestar | None, request: Request[Any, Any, Any], **options: Any
    ) -> ASGIResponse:
        return _Streamed(self._response, super().to_asgi_response(app, request, **options))

    def render(self, content: Any, media_type: str, enc_hook: Any = None) -> bytes:  # noqa: ARG002, D102 (Litestar's)
        return b""


class _Streamed(ASGIResponse):
    """A head as Litestar makes it, and the stream behind it."""

    __slots__ = ("_response",)

    def __init__(self, response: PlainResponse, head: ASGIResponse) -> None:
        for name in ASGIResponse.__slots__:
            setattr(self, name, getattr(head, name))
        self._response = response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._response.status_code = self.status_code
        self._response.raw_headers = [pair for pair in self.encode_headers() if pair[0] != b"content-length"]
        await self._response(scope, receive, send)  # type: ignore[arg-type]  # TypedDicts there, mappings here
        await self.after_response()
