"""``asgi-sse demo``: serve the demo page."""

import argparse
from typing import Final

from asgi_sse.cli.arguments import Commands, add_address
from asgi_sse.cli.output import extra_missing

_DESCRIPTION: Final = """\
Serves a page that shows event streams at work in your browser:

  - a text that resumes at the word where its connection broke
  - clients that reconnect at different times after a restart
  - a chat between tabs
  - the open and ended streams of the server
  - the load of this machine

Needs psutil, h11 and uvicorn. Not on PyPI yet: from a clone, use
pip install '.[demo]'.
"""

_EPILOG: Final = """\
Ctrl-C stops the server within about a second, even while browsers are connected.

exit status: 130 after Ctrl-C; 1 if the address cannot be listened on. SIGTERM
stops the server too.
"""


def add(commands: Commands) -> None:
    """Add the ``demo`` command."""
    parser = commands.add(
        "demo",
        help="show event streams at work in a browser",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    add_address(parser)


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.demo.app import create_demo  # noqa: PLC0415 (needs an extra)
        from asgi_sse.cli.uvicorn_server import serve  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        return extra_missing(exc, "the demo", "demo", "psutil", "uvicorn", "h11")
    started_message = "The demo runs at {} (Ctrl-C ends it)".format
    return serve(create_demo(), options.host, options.port, started_message, log_level="warning")
