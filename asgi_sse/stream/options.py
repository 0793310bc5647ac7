"""The options of a stream: their names, types, defaults and checks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import EllipsisType
from typing import Any, Final, TypedDict

from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.protocol.event import JSONDumps, ServerSentEvent, check_separator
from asgi_sse.protocol.validation import check_number


class StreamArguments(TypedDict, total=False):
    """The options of a stream as keyword arguments. `EventSourceResponse` documents each of them.

    An option that is left out, or is ``...``, takes the default of the app or middleware around the stream.
    """

    ping: float | None | EllipsisType
    ping_message_factory: Callable[[], Any] | None
    sep: str
    retry: int | None | EllipsisType
    send_timeout: float | None | EllipsisType
    max_lifetime: float | None | EllipsisType
    cleanup_timeout: float | EllipsisType
    open_timeout: float
    opening_comment: bool
    on_error: Callable[[Exception], Any] | None
    on_close: Callable[[CloseReason], Any] | None
    json_dumps: JSONDumps | None | EllipsisType


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """The options of one stream, complete and checked. `EventSourceResponse` documents each of them.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    # WHATWG HTML 9.2.7 advises 15 s. That is also below the idle timeout of every common proxy.
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
        """Check every value now, before a client waits."""
        for name in ("ping", "send_timeout", "max_lifetime"):
            check_number(name, getattr(self, name), optional=True)
        for name in ("cleanup_timeout", "open_timeout"):
            check_number(name, getattr(self, name))
        for name in ("ping_message_factory", "on_error", "on_close", "json_dumps"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None, got {short_repr(value)}; pass a function")
        check_separator(self.sep)
        if self.retry is not None:
            ServerSentEvent(retry=self.retry)


DEFAULT_OPTIONS: Final = StreamOptions()

_NAMES: Final = tuple(field.name for field in fields(StreamOptions))
_MAY_BE_ELLIPSIS: Final = frozenset({"ping", "retry", "send_timeout", "max_lifetime", "cleanup_timeout", "json_dumps"})


def given_options(arguments: Mapping[str, object], others: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that a stream was given, which override the defaults of its app.

    An option that takes ``...`` counts as given unless it is that. Any other option counts as given if it differs from
    the built-in default.

    Args:
        arguments: The keyword arguments.
        others: Names of other keyword arguments that the caller takes, for the message of an error.

    Raises:
        TypeError: An argument is not an option.
    """
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if name not in _NAMES:
            raise TypeError(f"unknown option {name!r}; the options are {', '.join((*others, *_NAMES))}")
        if value is not ... and (name in _MAY_BE_ELLIPSIS or value != getattr(DEFAULT_OPTIONS, name)):
            given[name] = value
    return given
