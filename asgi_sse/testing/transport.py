"""`StreamingASGITransport`: httpx against an app in-process, on responses that do not end."""

import sys
from collections.abc import AsyncIterator
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import ASGIApp, Scope

from .stream import OpenStream

if TYPE_CHECKING:
    import httpx

    _Base = httpx.AsyncBaseTransport
else:
    _Base = object  # its three methods are ours: so httpx is not imported, and httpx2, its successor, does as well


class StreamingASGITransport(_Base):
    """In place of httpx's ``ASGITransport``, which gives a response only when the app has returned.

    The head is given when it comes, the body piece by piece; closing the response is a disconnect, and waits
    until the app has returned. The client's read timeout counts between the pieces (httpx's default: 5 s).

    Args:
        app: Any ASGI app.
        raise_app_exceptions: Whether what the app raises is raised from the request, or from reading. Without, it
            is a 500 before the head, and after it a body that was cut.
        root_path: The ``root_path`` of the scope.
        client: The client's address and port.
        capacity: As of `open_stream`.

    Raises:
        TypeError: `app` is none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        raise_app_exceptions: bool = True,
        root_path: str = "",
        client: tuple[str, int] = ("127.0.0.1", 50000),
        capacity: int = 16,
    ) -> None:
        if not callable(app):
            raise TypeError(f"app={short_repr(app)} is not an ASGI app; give what a server is given")
        self._app = app
        self._raise = raise_app_exceptions
        self._root_path = root_path
        self._client = client
        self._capacity = capacity

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Nothing is held between requests."""

    async def handle_async_request(self, request: "httpx.Request") -> "httpx.Response":
        """Send one request. See httpx's ``AsyncBaseTransport``."""
        httpx = sys.modules[type(request).__module__.partition(".")[0]]  # the one whose client asks, httpx or httpx2
        url = request.url
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "path": url.path,
            "raw_path": url.raw_path.split(b"?")[0],
            "query_string": url.query,
            "root_path": self._root_path,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": self._client,
            "server": (url.host, url.port or (443 if url.scheme == "https" else 80)),
        }
        timeout = request.extensions.get("timeout", {}).get("read")
        seconds = float("inf") if timeout is None else float(timeout)
        stream = OpenStream(self._app, scope, await request.aread(), self._capacity)
        stream.start()
        try:
            with anyio.fail_after(seconds):
                await stream.wait_for_head()
        except BaseException as exc:
            with anyio.CancelScope(shield=True):
                await stream.disconnect()
            if isinstance(exc, TimeoutError) and not stream.raised(exc):
                raise httpx.ReadTimeout(f"no response within {seconds:g} s: {stream!r}", request=request) from None
            if self._raise or not stream.raised(exc):
                raise
            return httpx.Response(500)  # type: ignore[no-any-return]

        body = _body_class(httpx.AsyncByteStream)(stream, seconds, request, httpx, raising=self._raise)
        return httpx.Response(stream.status, headers=stream.raw_headers, stream=body)  # type: ignore[no-any-return]


class _Body:
    """The body of a response; with the ``AsyncByteStream`` of the client's module it is one of its streams."""

    def __init__(self, stream: OpenStream, seconds: float, request: Any, httpx: Any, *, raising: bool) -> None:
        self._stream = stream
        self._seconds = seconds
        self._request = request
        self._httpx = httpx
        self._raising = raising

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._stream
        while chunk := await self._read():
            if self._request.method != "HEAD":  # of which a server sends the head alone
                yield chunk
        if not stream.complete:
            raise self._httpx.RemoteProtocolError(
                f"the app returned before the end of the body, at which a server cuts the connection: {stream!r}",
                request=self._request,
            )

    async def _read(self) -> bytes:
        try:
            return await self._stream.read(self._seconds)
        except Exception as exc:
            if isinstance(exc, TimeoutError) and not self._stream.raised(exc):
                raise self._httpx.ReadTimeout(str(exc), request=self._request) from None
            if self._raising:
                raise
            return b""

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._stream.disconnect()
            except Exception as exc:
                if self._raising or not self._stream.raised(exc):
                    raise


@cache
def _body_class(base: type) -> Any:
    return type("ResponseBody", (_Body, base), {})
