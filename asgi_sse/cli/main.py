"""The entry point of ``asgi-sse`` and of ``python -m asgi_sse``."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from asgi_sse import __version__
from asgi_sse.cli.commands import bench, demo, publish, serve, tail

from .arguments import Commands
from .output import EXIT_INTERRUPTED, PROGRAM, OutputError, output_failed

_EPILOG: Final = """\
examples:
  asgi-sse                      run the demo at http://127.0.0.1:8000/
  ASGI_SSE_PUBLISH_TOKEN=secret asgi-sse serve
                                run a hub that apps in any language publish to
  asgi-sse publish http://127.0.0.1:8000 news "it rains"
                                publish an event to the channel "news"
  asgi-sse tail http://127.0.0.1:8000/channels/news
                                print the channel's events as they arrive
  asgi-sse bench http://127.0.0.1:8000/channels/news --connections 1000
                                measure the channel with 1,000 connections

Without a command, the demo runs. "asgi-sse COMMAND --help" lists the command's
options, exit statuses and environment variables.

exit status: 0 success; 1 failure, and the last line of the standard error says
why; 2 invalid arguments; 130 interrupted (Ctrl-C); 141 the reader of the output
closed the pipe.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The arguments without the program's name. Default: those of the process.

    Returns:
        0 success, 1 failure, 2 invalid arguments, 130 interrupted, 141 the output's pipe was closed.

    Raises:
        SystemExit: The arguments are invalid, or ask for help or the version.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Server-Sent Events: a demo, a hub, and tools for event streams of any server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = Commands(parser)
    for command in (demo, serve, publish, tail, bench):
        command.add(commands)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "demo")
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except OutputError as exc:
        status = output_failed(exc)
    return status
