"""The adapter for Quart: a response that its views can return."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Unpack, cast

from asgi_sse.errors import raise_missing_extra
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import ResponseArguments

from .body import Body

try:
    from quart import Response, has_request_context, request
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "quart", "Quart", "quart")

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from asgi_sse.protocol.asgi import Scope
    from asgi_sse.protocol.headers import Headers

__all__ = ["EventSourceResponse"]


class EventSourceResponse(Response):
    """An event stream to return from a Quart view.

    The source may use ``quart.request``. Quart's ``RESPONSE_TIMEOUT`` does not end the stream.

    Wrap the app in `asgi_sse.SSEMiddleware` (``app.asgi_app = SSEMiddleware(app.asgi_app)``). Without it, a stuck
    client cannot be dropped, because Quart waits in its own send.

    Args:
        content: The source of the events, as for `asgi_sse.EventSourceResponse`.
        status_code: The status. Default: 200.
        headers: More response headers, or other values for the headers of an event stream.
        **options: The stream arguments of `asgi_sse.EventSourceResponse`, such as ``ping`` and ``send_timeout``.

    Raises:
        TypeError: `content` is not a source of events, or an argument has a wrong type.
        ValueError: An argument is out of range, or a header is invalid.
    """

    implicit_sequence_conversion = False  # otherwise reading the data would wait for an endless stream
    automatically_set_content_length = False

    timeout: Any

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        **options: Unpack[ResponseArguments],
    ) -> None:
        response = PlainResponse(content, status_code=status_code, headers=headers, **options)
        scope = cast("Scope", request.scope) if has_request_context() else None
        super().__init__(Body(response, scope, contextvars.copy_context()), status_code)
        self.headers.clear()
        for name, value in response.raw_headers:
            self.headers.add(name.decode(), value.decode("latin-1"))
        self.timeout = None
