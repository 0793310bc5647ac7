"""What the commands print, and the exit statuses that they share."""

import os
import re
import sys
from typing import Final

from asgi_sse.errors import missing_module

PROGRAM: Final = "asgi-sse"

EXIT_USAGE: Final = 2  # the status that argparse uses
EXIT_INTERRUPTED: Final = 130  # the status that a shell reports for SIGINT: 128 + 2
_EXIT_BROKEN_PIPE: Final = 141  # the status that a shell reports for SIGPIPE: 128 + 13

# C0 except tab and line feed, DEL and C1 can control a terminal. Bidirectional controls can hide a part of the text.
_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class OutputError(Exception):
    """The standard output rejected a write: its reader closed the pipe, or the disk is full."""


def print_result(text: str) -> None:
    """Print a result of the command to the standard output.

    Characters that the output's encoding lacks become escapes. On a terminal, control characters do too.

    Raises:
        OutputError: The output cannot be written. `main` turns this into an exit status with `output_failed`.
    """
    if sys.stdout.isatty():
        text = escape_controls(text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as exc:
        raise OutputError(exc.strerror) from exc


def print_note(message: str) -> None:
    """Print a note for the user to the standard error."""
    print(f"{PROGRAM}: {escape_controls(message)}", file=sys.stderr, flush=True)


def fail(message: str, status: int = 1) -> int:
    """Print an error as one line to the standard error, and return the exit status."""
    print_note(f"error: {message}")
    return status


def output_failed(exc: OutputError) -> int:
    """Return the exit status for output that could not be written; print an error unless a pipe was closed."""
    # At exit, Python writes the rest of the buffer and would report the same error again: send it to the null device.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _EXIT_BROKEN_PIPE if isinstance(exc.__cause__, BrokenPipeError) else fail(f"cannot write: {exc}")


def extra_missing(exc: ModuleNotFoundError, feature: str, extra: str, *modules: str) -> int:
    """Print which module of an extra is not installed, and return the exit status.

    Args:
        exc: The error of the import.
        feature: The command or feature that needs the module.
        extra: The extra of this project that installs it.
        *modules: The modules of that extra.

    Raises:
        ModuleNotFoundError: Another module is missing.
    """
    module = missing_module(exc, *modules)
    if not module:
        raise exc
    return fail(
        f"{feature} needs {module}, which is not installed; asgi_sse is not on PyPI yet: from a clone, use "
        f"pip install '.[{extra}]'"
    )


def escape_controls(text: str) -> str:
    """Return `text` with each character that could control a terminal as an escape of JSON."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
