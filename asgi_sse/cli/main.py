"""The command ``asgi-sse``, which is ``python -m asgi_sse`` too: each command of it is in a room of its own."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from asgi_sse import __version__
from asgi_sse.cli.commands import bench, demo, publish, serve, tail

from .frame import INTERRUPTED, NAME, Commands, OutputError, unwritten

_EPILOG: Final = """\
examples:
  asgi-sse                      the demo, at http://127.0.0.1:8000/
  ASGI_SSE_PUBLISH_TOKEN=secret asgi-sse serve
                                a hub, to which apps in any language publish
  asgi-sse publish http://127.0.0.1:8000 news "it rains"
                                an event for those who read the channel
  asgi-sse tail http://127.0.0.1:8000/channels/news
                                read it, as a browser would
  asgi-sse bench http://127.0.0.1:8000/channels/news --connections 1000
                                how it does with many who read

Without a command it runs the demo. "asgi-sse COMMAND --help" has the options of
each, its exit statuses, and the environment variables that it reads.

exit status: 0 done; 1 it failed, and the last line of the standard error says
why; 2 wrong arguments; 130 interrupted (Ctrl-C); 141 if who reads the output
has gone.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments. Default: those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: The arguments are wrong, or ask for help or the version.
    """
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Server-Sent Events: a demo, a hub, and tools for streams of any server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
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
        status = INTERRUPTED
    except OutputError as exc:
        status = unwritten(exc)
    return status
