"""``asgi-sse demo``."""

import argparse
from typing import Final

from asgi_sse.cli.frame import Commands, add_address, missing

_DESCRIPTION: Final = """\
Serves a page that shows what streams of this library do: a text that resumes
at the token where its connection was cut, a room for all tabs, a drain whose
clients come back spread out, the streams of the server and why they ended,
this machine's load. Ctrl-C ends it, however many browsers are looking. Needs
psutil, h11 and uvicorn: pip install "asgi-sse[demo]".
"""

_EPILOG: Final = """\
exit status: 130 by Ctrl-C; 1 if it cannot listen there. SIGTERM ends it too.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "demo",
        help="show in a browser what streams can do",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    add_address(parser)


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.demo.app import create_demo  # noqa: PLC0415 (of an extra)
        from asgi_sse.cli.uvicorn_server import serve  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        return missing(exc, "the demo", "demo", "psutil", "uvicorn", "h11")
    told = "The demo runs at {} (Ctrl-C ends it)".format
    return serve(create_demo(), options.host, options.port, told, log_level="warning")
