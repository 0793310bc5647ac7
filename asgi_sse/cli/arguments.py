"""The commands' parsers, the options that several commands share, and the types of arguments."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

_LAST_PORT: Final = 65535


class Commands:
    """The commands of ``asgi-sse``.

    Args:
        parser: The parser that gets a sub-parser for each command.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        self,
        name: str,
        *,
        help: str,  # noqa: A002 (argparse's name for it)
        description: str,
        epilog: str,
        run: Callable[[argparse.Namespace], int],
    ) -> argparse.ArgumentParser:
        """Add a command and return its parser.

        Args:
            name: The command's name.
            help: One line for the list of commands.
            description: The text above the command's options, printed as it is.
            epilog: The text below them, printed as it is.
            run: Runs the command with its parsed arguments, and returns the exit status.
        """
        parser = self._subparsers.add_parser(
            name,
            help=help,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(run=run)
        return parser


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that listens on a port."""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 accepts connections from the network "
        "(default: %(default)s, this machine only)",
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="port to listen on; 0 picks a free one (default: %(default)s)"
    )


def add_headers(parser: argparse.ArgumentParser) -> None:
    """Add the option for request headers, which parses to pairs of bytes."""
    parser.add_argument(
        "-H",
        "--header",
        action="append",
        default=[],
        type=_header,
        metavar="'NAME: VALUE'",
        help="header to send with the request; repeatable",
    )


# The types of arguments. argparse puts "argument --NAME: " in front of their messages.


def port(text: str) -> int:
    """Return a port number to listen on."""
    number = int(text) if text.isdecimal() and len(text) <= 5 else -1
    if not 0 <= number <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to {_LAST_PORT}, got {text!r}")
    return number


def seconds(text: str) -> float:
    """Return a duration of at least 0 seconds."""
    return _number(text, "at least 0 seconds")


def positive_seconds(text: str) -> float:
    """Return a duration of more than 0 seconds."""
    return _number(text, "more than 0 seconds", positive=True)


def rate(text: str) -> float:
    """Return a number per second, which is more than 0."""
    return _number(text, "more than 0 per second", positive=True)


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    number = int(text) if text.isdecimal() and len(text) <= 15 else 0
    if not number:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return number


def web_url(text: str) -> str:
    """Return an http or https URL unchanged."""
    try:
        valid = re.match(r"https?://[^/?#\s]", text) is not None and urlsplit(text).port != 0
    except ValueError:  # the port is above 65535, or the IPv6 address has no closing bracket
        valid = False
    if not valid:
        example = "http://127.0.0.1:8000/events"
        raise argparse.ArgumentTypeError(f"must be an http or https URL, got {text!r}; give one such as {example}")
    return text


def _number(text: str, required: str, *, positive: bool = False) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf or (positive and not number):
        raise argparse.ArgumentTypeError(f"must be {required}, got {text!r}")
    return number


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or "\r" in text or "\n" in text:
        raise argparse.ArgumentTypeError(f"must be a header on one line such as 'Name: value', got {text!r}")
    return name.strip().encode("utf-8", "surrogateescape"), value.strip().encode("utf-8", "surrogateescape")
