"""`StreamingASGITransport`: httpx against an app in-process, for responses that do not end."""

import sys
from collections.abc import AsyncIterator
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import anyio

from asgi_sse.protocol.asgi import ASGIApp, Scope

from .app_task import check_app
from .stream import OpenStream

if TYPE_CHECKING:
    import httpx

    _Base = httpx.AsyncBaseTransport
else:
    # This class defines all three methods, so httpx need not be imported, and its successor httpx2 works as well.
    _Base = object


class StreamingASGITransport(_Base):
    """A replacement for httpx's ``ASGITransport``, which returns a response only after the app has returned.

    This transport returns the response once its start is there, and its body chunk by chunk. Closing the response
    disconnects, and waits until the app has returned. The client's read timeout applies to each chunk (httpx's default
    is 5 s).

    Args:
        app: Any ASGI app.
        raise_app_exceptions: Whether to raise what the app raises, from the request or from reading. Default: True. If
            False, an error before the response start becomes a 500, and a later error a body that is cut.
        root_path: The ``root_path`` of the scope. Default: empty.
        client: The client's address and port.
        capacity: The number of unread body messages at which the app's ``send`` waits. Default: 16.

    Raises:
        TypeError: `app` is not callable.
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
        check_app(app)
        self._app = app
        self._raise_app_exceptions = raise_app_exceptions
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
        """Do nothing: the transport holds nothing between requests."""

    async def handle_async_request(self, request: "httpx.Request") -> "httpx.Response":
        """Send a request and return its response as soon as the response start is there.

        Args:
            request: The request of httpx or httpx2.

        Raises:
            httpx.ReadTimeout: The response start did not come within the client's read timeout.
            Exception: What the app raised before it, if `raise_app_exceptions`.
        """
        httpx = sys.modules[type(request).__module__.partition(".")[0]]  # the client's own module: httpx or httpx2
        read_timeout = request.extensions.get("timeout", {}).get("read")
        seconds = float("inf") if read_timeout is None else float(read_timeout)
        stream = OpenStream(self._app, self._scope_of(request), await request.aread(), self._capacity)
        stream.start()
        try:
            with anyio.move_on_after(seconds) as deadline:
                await stream.wait_for_start()
            if deadline.cancelled_caught:
                raise httpx.ReadTimeout(f"no response within {seconds:g} s: {stream!r}", request=request)
        except BaseException as exc:
            with anyio.CancelScope(shield=True):
                await stream.disconnect()
            if self._raise_app_exceptions or not stream.is_app_error(exc):
                raise
            return httpx.Response(500)  # type: ignore[no-any-return]

        body_class = _make_body_class(httpx.AsyncByteStream)
        body = body_class(stream, seconds, request, httpx, raise_app_exceptions=self._raise_app_exceptions)
        return httpx.Response(stream.status, headers=stream.raw_headers, stream=body)  # type: ignore[no-any-return]

    def _scope_of(self, request: "httpx.Request") -> Scope:
        url = request.url
        return {
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


class _Body:
    """The body of a response, to be combined with the ``AsyncByteStream`` of the client's module."""

    def __init__(
        self, stream: OpenStream, seconds: float, request: Any, httpx: Any, *, raise_app_exceptions: bool
    ) -> None:
        self._stream = stream
        self._seconds = seconds
        self._request = request
        self._httpx = httpx
        self._raise_app_exceptions = raise_app_exceptions

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self._read():
            if self._request.method != "HEAD":  # a server sends no body for HEAD
                yield chunk
        if not self._stream.complete:
            raise self._httpx.RemoteProtocolError(
                f"the app returned before the end of the body, so a server cuts the connection: {self._stream!r}",
                request=self._request,
            )

    async def _read(self) -> bytes:
        try:
            chunk = await self._stream.try_read(self._seconds)
        except Exception:  # the app's
            if self._raise_app_exceptions:
                raise
            return b""
        if isinstance(chunk, TimeoutError):
            raise self._httpx.ReadTimeout(str(chunk), request=self._request)
        return chunk

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._stream.disconnect()
            except Exception as exc:
                if self._raise_app_exceptions or not self._stream.is_app_error(exc):
                    raise


@cache
def _make_body_class(base: type) -> Any:
    return type("ResponseBody", (_Body, base), {})
