"""The exceptions of asgi_sse, and helpers for the texts of errors and log records.

Each message names the argument, the value that it got, and what to do about it.
"""

import reprlib
import sys
from typing import Final, NoReturn

_repr: Final = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80

_MAX_LOG_CHARS: Final = 200
"""The most characters of a client's text that go into a line of a log."""


def short_repr(value: object) -> str:
    """Return a short ``repr`` of `value` for an error message. Never raises."""
    try:
        return _repr.repr(value)
    except Exception:  # reprlib guards against a repr that raises, but not against an int of over 4,300 digits
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """Return `text`, which a client sent, so that it can neither forge a line of a log nor fill the log."""
    return text if len(text) <= _MAX_LOG_CHARS and text.isprintable() else short_repr(text)


def raise_missing_extra(exc: ModuleNotFoundError, module: str, what: str, package: str) -> NoReturn:
    """Raise an error that says what to install if `module` is missing; otherwise raise `exc` again.

    Args:
        exc: The error of an import.
        module: The top-level name of the module that was imported.
        what: The name of the missing software, for the message.
        package: The requirement to install with pip.

    Raises:
        ModuleNotFoundError: Always.
    """
    if not missing_module(exc, module):
        raise exc
    raise ModuleNotFoundError(f'{what} is not installed: pip install "{package}"', name=exc.name) from exc


def missing_module(exc: ModuleNotFoundError, *modules: str) -> str:
    """Return which of `modules`, top-level names, is not installed; ``""`` if `exc` is about another module."""
    name = (exc.name or "").partition(".")[0]
    # If the top-level module was imported and only a submodule is missing, then the package is too old, or a file of
    # the user has the same name. Installing it would not help.
    return name if name in modules and sys.modules.get(name) is None else ""


class SSEError(Exception):
    """The base class of the errors that asgi_sse defines."""


class InvalidEventError(SSEError, ValueError):
    """An event that cannot be sent so that clients read it as meant, or that is too large to decode."""


class SendTimeoutError(SSEError, TimeoutError):
    """The client did not take a message within ``send_timeout`` seconds."""


class StreamClosedError(SSEError):
    """The stream, or the request that it answers, has ended."""


class CompressionError(SSEError):
    """A middleware would compress, hold back or buffer the stream."""


class BrokerError(SSEError):
    """A broker could not do what it was asked to do."""
