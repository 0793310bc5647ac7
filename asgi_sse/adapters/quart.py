"""For Quart: a response of its own that streams events."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, Unpack, cast

from asgi_sse.errors import raise_missing_extra
from asgi_sse.stream.response import EventSourceResponse as PlainResponse
from asgi_sse.stream.response import StreamArguments

from .body import Body

try:
    from quart import Response, has_request_context, request
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "quart", "Quart", "quart")

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from asgi_sse.protocol.asgi import Scope
    from asgi_sse.protocol.headers import Headers

__all__ = ["EventSourceResponse"]


class EventSourceResponse(Response):
    """Return it from a view. ``RESPONSE_TIMEOUT`` does not end it; the source may use ``quart.request``.

    Put `asgi_sse.SSEMiddleware` around the app (``app.asgi_app = SSEMiddleware(app.asgi_app)``): without it, a
    stuck client cannot be dropped, since Quart waits in its own send.

    Args:
        content: Where the events come from, as in `asgi_sse.EventSourceResponse`.
        status_code: The status.
        headers: More headers.
        **options: What `asgi_sse.EventSourceResponse` takes about the stream.

    Raises:
        TypeError: As there.
        ValueError: As there.
    """

    implicit_sequence_conversion = False  # or a look at the data would wait for an endless stream
    automatically_set_content_length = False

    def __init__(
        self,
        content: AsyncIterable[Any] | Iterable[Any],
        *,
        status_code: int = 200,
        headers: Headers | None = None,
        **options: Unpack[StreamArguments],
    ) -> None:
        response = PlainResponse(content, status_code=status_code, headers=headers, **options)
        scope = cast("Scope", request.scope) if has_request_context() else None
        super().__init__(Body(response, scope, contextvars.copy_context()), status_code)
        self.headers.clear()
        for name, value in response.raw_headers:
            self.headers.add(name.decode(), value.decode("latin-1"))
        self.timeout = None
