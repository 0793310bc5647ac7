"""The errors that asgi_sse raises, each naming the value, what is wrong with it and what to do."""

import reprlib
import sys
from typing import Final, NoReturn

_repr: Final = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


_LINE: Final = 200
"""Characters of a client's text that a line of a log may have."""


def short_repr(value: object) -> str:
    """A value for an error's message: short, and safe to ask for."""
    try:
        return _repr.repr(value)
    except Exception:  # reprlib guards a repr that raises, but not that of an int of over 4,300 digits
        return f"<{type(value).__name__}>"


def printable(text: str) -> str:
    """Text of a client for a line of a log: escaped and cut, where it would forge another line or fill the log."""
    return text if len(text) <= _LINE and text.isprintable() else short_repr(text)


def missing(exc: ModuleNotFoundError, module: str, what: str, package: str) -> NoReturn:
    """Raise `exc` again; if it is `module` that was not found, saying what is to be installed.

    Args:
        exc: What an import has raised.
        module: The top name of what was imported.
        what: Who that is.
        package: What pip installs.

    Raises:
        ModuleNotFoundError: Always.
    """
    if not not_installed(exc, module):
        raise exc
    raise ModuleNotFoundError(f'{what} is not installed: pip install "{package}"', name=exc.name) from exc


def not_installed(exc: ModuleNotFoundError, *modules: str) -> str:
    """Which of `modules`, top names, is not installed; empty if something else was not found."""
    name = (exc.name or "").partition(".")[0]
    # What is there, but without such a part, is too old, or a file of the user's that is called so.
    return name if name in modules and sys.modules.get(name) is None else ""


class SSEError(Exception):
    """Base of every error that asgi_sse raises on its own account."""


class InvalidEventError(SSEError, ValueError):
    """An event that no client could read as meant: refused when it is built, or too large to decode."""


class SendTimeoutError(SSEError, TimeoutError):
    """The client did not take a message within ``send_timeout`` seconds."""


class StreamClosedError(SSEError):
    """The stream, or the request that it answers, is over."""


class CompressionError(SSEError):
    """A middleware would compress, hold or buffer the stream."""


class BrokerError(SSEError):
    """A broker could not do what was asked of it."""
