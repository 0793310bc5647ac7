"""`StreamOptions`: every option of a stream, its default and the reason for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.protocol.event import JSONDumps, ServerSentEvent, check_separator
from asgi_sse.protocol.validation import check_number


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How a stream behaves. `EventSourceResponse` documents each option.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    # WHATWG HTML 9.2.7 advises 15 s. That is below the idle timeout of every common proxy.
    ping: float | None = 15.0
    ping_message_factory: Callable[[], Any] | None = None
    sep: str = "\n"
    retry: int | None = 3000
    send_timeout: float | None = 30.0
    max_lifetime: float | None = None
    cleanup_timeout: float = 10.0
    open_timeout: float = 0.0
    opening_comment: bool = True
    on_error: Callable[[Exception], Any] | None = None
    on_close: Callable[[CloseReason], Any] | None = None
    json_dumps: JSONDumps | None = None

    def __post_init__(self) -> None:
        """Check each value now, not during a request."""
        for name in ("ping", "send_timeout", "max_lifetime"):
            check_number(name, getattr(self, name), optional=True)
        for name in ("cleanup_timeout", "open_timeout"):
            check_number(name, getattr(self, name))
        for name in ("ping_message_factory", "on_error", "on_close", "json_dumps"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable or None, got {getattr(self, name)!r}; pass a function")
        check_separator(self.sep)
        if self.retry is not None:
            ServerSentEvent(retry=self.retry)
