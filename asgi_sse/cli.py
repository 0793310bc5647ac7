"""The command ``asgi-sse``."""

import argparse
import socket
import sys
from collections.abc import Sequence
from typing import Final

from . import __version__

_NAME: Final = "asgi-sse"
_INTERRUPTED: Final = 130  # what a shell reports for 128 + SIGINT
_LAST_PORT: Final = 65535

_EXAMPLES: Final = """\
examples:
  asgi-sse                      the demo, at http://127.0.0.1:8000/
  asgi-sse demo --port 9000     the demo, at another port
  asgi-sse demo --host 0.0.0.0  the demo, for other machines too
  asgi-sse publish redis://localhost:6379/0 news "it rains"
                                an event for the subscribers of an app

Without a command it runs the demo. "asgi-sse demo --help" tells its options.
"""

_DEMO: Final = """\
Serves a page that shows the load of this machine, measured once a second by
psutil and sent as Server-Sent Events. Ctrl-C ends it, however many browsers
are looking. Needs psutil and uvicorn: pip install "asgi-sse[demo]".
"""


_PUBLISH: Final = """\
Publishes an event to a channel of the apps whose Broker has that URL, and
prints the event's id. Needs the client of the engine: pip install
"asgi-sse[redis]" or "asgi-sse[nats]".
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
        prog=_NAME,
        description="Server-Sent Events for any ASGI app.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_NAME} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="show this machine's load, live, in a browser",
        description=_DEMO,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    demo.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, for this machine alone; 0.0.0.0 is for all the network)",
    )
    demo.add_argument(
        "--port", type=_port, default=8000, help="port to listen on (default: %(default)s; 0 takes any free one)"
    )
    demo.set_defaults(run=_demo)

    publish = commands.add_parser(
        "publish",
        help="publish an event to a channel of an app, by Redis or NATS",
        description=_PUBLISH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    publish.add_argument("url", metavar="URL", help="of the broker: redis://…, nats://…")
    publish.add_argument("channel", metavar="CHANNEL", help="the channel's name")
    publish.add_argument("data", metavar="DATA", nargs="?", help="of the event; default: the standard input")
    publish.add_argument("--event", metavar="TYPE", help="the event's type")
    publish.add_argument("--key", help="idempotency key: the same one within two minutes publishes nothing more")
    publish.add_argument("--prefix", default="asgi_sse", help="that of the broker (default: %(default)s)")
    publish.add_argument(
        "--timeout", type=float, default=5.0, help="seconds to wait for the engine (default: %(default)g)"
    )
    publish.set_defaults(run=_publish)

    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        arguments.insert(0, "demo")
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        status = _INTERRUPTED
    return status


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        port = -1
    if not 0 <= port <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a number from 0 to {_LAST_PORT}")
    return port


def _demo(options: argparse.Namespace) -> int:
    try:
        import uvicorn  # noqa: PLC0415 (an extra)

        from .demo.app import create_demo  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        if exc.name not in ("psutil", "uvicorn"):
            raise
        return _fail(f'the demo needs {exc.name}, which is not installed: pip install "asgi-sse[demo]"')

    host, port = options.host, options.port
    try:
        # Here and not in uvicorn, which would report a port in use by a log line and an exit of its own.
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as exc:
        reason, *_ = (getattr(exc, "strerror", None) or str(exc)).partition(" (while")  # attempting to bind on …
        return _fail(f"cannot listen on {host} port {port}: {reason}; give another --host or --port")

    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"

    class DemoServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(f"The demo runs at {url} (Ctrl-C ends it)", flush=True)  # noqa: T201

    with listener:
        DemoServer(uvicorn.Config(create_demo(), log_level="warning")).run(sockets=[listener])
    # uvicorn raises the signal again that ended it. Still here: SIGINT, which the parent has made this process ignore.
    return _INTERRUPTED


def _publish(options: argparse.Namespace) -> int:
    from .broker import publish  # noqa: PLC0415 (the demo does without)
    from .errors import SSEError  # noqa: PLC0415

    try:
        data = options.data
        if data is None:
            data = sys.stdin.buffer.read().removesuffix(b"\n")  # that of the shell's echo
        event_id = publish(
            options.url,
            options.channel,
            {"data": data, "event": options.event},
            idempotency_key=options.key,
            prefix=options.prefix,
            timeout=options.timeout,
        )
    except (SSEError, ModuleNotFoundError, ValueError) as exc:
        return _fail(str(exc))
    print(event_id)  # noqa: T201
    return 0


def _fail(message: str) -> int:
    print(f"{_NAME}: error: {message}", file=sys.stderr)  # noqa: T201
    return 1
