"""What the commands share: how their parsers look, how they say what is wrong, and their kinds of arguments."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from asgi_sse.errors import missing_module

NAME: Final = "asgi-sse"
WRONG_ARGUMENTS: Final = 2  # as argparse has it
INTERRUPTED: Final = 130  # what a shell reports for 128 + SIGINT
_BROKEN_PIPE: Final = 141  # and for 128 + SIGPIPE
_LAST_PORT: Final = 65535

# C0 but for tab and line feed, DEL and C1 can drive a terminal; what turns the direction of text can hide a part of it.
_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Commands:
    """The commands of a parser, each added by the room that it is in."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self,
        name: str,
        *,
        help: str,  # noqa: A002 (as argparse has it)
        description: str,
        epilog: str,
        run: Callable[[argparse.Namespace], int],
    ) -> argparse.ArgumentParser:
        """A command's parser. `run` is called with what it has parsed, and gives the exit status."""
        parser = self._commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(run=run)
        return parser


def fail(message: str, status: int = 1) -> int:
    """Say on one line what is wrong; gives the exit status."""
    note(f"error: {message}")
    return status


def note(message: str) -> None:
    """Tell who runs the command, on the standard error."""
    print(f"{NAME}: {safe(message)}", file=sys.stderr, flush=True)


class OutputError(Exception):
    """The standard output takes nothing more: its reader has gone, or its disk is full."""


def say(text: str) -> None:
    """Print what the command is asked for; what the output cannot carry, or would act on a terminal, as an escape.

    Raises:
        OutputError: It cannot be written. `main` ends the command by `unwritten`.
    """
    if sys.stdout.isatty():
        text = safe(text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as exc:
        raise OutputError(exc.strerror) from exc


def unwritten(exc: OutputError) -> int:
    """The exit status of a command whose output cannot be written."""
    # What is left in the buffer would be tried again at the end of Python, which would say that it cannot.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _BROKEN_PIPE if isinstance(exc.__cause__, BrokenPipeError) else fail(f"cannot write: {exc}")


def missing(exc: ModuleNotFoundError, what: str, extra: str, *modules: str) -> int:
    """As `fail`, of `modules` of an extra of which one is not installed.

    Raises:
        ModuleNotFoundError: It is another one that was not found.
    """
    module = missing_module(exc, *modules)
    if not module:
        raise exc
    return fail(f'{what} needs {module}, which is not installed: pip install "asgi-sse[{extra}]"')


def safe(text: str) -> str:
    """`text`, of which nothing acts on a terminal: what could stands as an escape, which JSON has too."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


# Kinds of arguments. What argparse says of one that is none begins with the option's name.


def port(text: str) -> int:
    """A port to listen on."""
    number = int(text) if text.isdecimal() and len(text) <= 5 else -1
    if not 0 <= number <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to {_LAST_PORT}")
    return number


def seconds(text: str) -> float:
    """A length of time."""
    return _number(text, "length of time; give seconds of at least 0")


def positive_seconds(text: str) -> float:
    """A length of time that is some."""
    return _number(text, "length of time; give seconds, more than 0", positive=True)


def rate(text: str) -> float:
    """So many a second."""
    return _number(text, "rate; give a number a second, more than 0", positive=True)


def count(text: str) -> int:
    """How many there are, at least one."""
    number = int(text) if text.isdecimal() and len(text) <= 15 else 0
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of them; give a whole number of at least 1")
    return number


def web_url(text: str) -> str:
    """A URL of HTTP."""
    try:
        good = re.match(r"https?://[^/?#\s]", text) is not None and urlsplit(text).port != 0
    except ValueError:  # a port beyond the last one, or half an address of IPv6
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL of HTTP; give one such as 'http://127.0.0.1:8000/events'")
    return text


def _number(text: str, what: str, *, positive: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf or (positive and not number):
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
    return number


def add_address(parser: argparse.ArgumentParser) -> None:
    """The options of a command that listens."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, for this machine alone; 0.0.0.0 is for all the network)",
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="port to listen on (default: %(default)s; 0 takes any free one)"
    )


def add_headers(parser: argparse.ArgumentParser) -> None:
    """The option of a command that asks, for headers of its request: pairs of bytes."""
    parser.add_argument(
        "-H",
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="of the request; may be given several times",
    )


def _header(text: str) -> tuple[bytes, bytes]:
    name, found, value = text.partition(":")
    if not found or not name.strip() or "\r" in text or "\n" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no header; give it as 'Name: value'")
    return name.strip().encode("utf-8", "surrogateescape"), value.strip().encode("utf-8", "surrogateescape")
