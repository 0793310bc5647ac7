"""``asgi-sse publish``."""

import argparse
import sys
from typing import Any, Final

from asgi_sse.cli.frame import WRONG_ARGUMENTS, Commands, fail, missing, positive_seconds, say
from asgi_sse.cli.hub import PUBLISH_TOKEN, tokens_in

_TIMEOUT: Final = 5.0
_HUB_TIMEOUT: Final = _TIMEOUT + 1  # a hub waits for its engine that long itself, and then says what has become of it

_DESCRIPTION: Final = """\
Publishes an event to a channel, and prints the event's id: to the apps whose
Broker has that URL, or to a hub that "asgi-sse serve" runs. Needs the client of
the engine, pip install "asgi-sse[redis]" or "asgi-sse[nats]"; for a hub, httpx:
pip install "asgi-sse[cli]".
"""

_EPILOG: Final = """\
examples:
  asgi-sse publish redis://localhost:6379/0 news "it rains"
  asgi-sse publish http://127.0.0.1:8000 news "it rains" --event weather
  date | asgi-sse publish nats://localhost:4222 clock

environment:
  ASGI_SSE_PUBLISH_TOKEN   token for a hub, where --token is not given

exit status: 0 it was published; 1 it was not, or may not have been: the message
says which. With --key it is safe to try again. 2 the URL is none.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "publish",
        help="publish an event to a channel, by Redis, NATS or a hub",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", help="of the broker, redis://… or nats://…; or of a hub, http://…")
    parser.add_argument("channel", metavar="CHANNEL", help="the channel's name")
    parser.add_argument("data", metavar="DATA", nargs="?", help="of the event; default: the standard input")
    parser.add_argument("--event", metavar="TYPE", help="the event's type")
    parser.add_argument("--key", help="idempotency key: the same one within two minutes publishes nothing more")
    parser.add_argument("--prefix", default="asgi_sse", help="that of the broker (default: %(default)s)")
    parser.add_argument("--token", help="of a hub")
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        help=f"seconds to wait for the answer (default: {_TIMEOUT:g}; of a hub: {_HUB_TIMEOUT:g})",
    )


def _run(options: argparse.Namespace) -> int:
    from asgi_sse.broker import publish  # noqa: PLC0415 (the other commands do without)
    from asgi_sse.errors import SSEError  # noqa: PLC0415

    if "://" not in options.url:
        wrong = f"{options.url!r} is no URL; give redis://…, nats://…, or a hub's http://HOST:PORT"
        return fail(wrong, WRONG_ARGUMENTS)
    data = options.data
    if data is None:
        data = sys.stdin.buffer.read().removesuffix(b"\n")  # that of the shell's echo
    if options.url.startswith(("http://", "https://")):
        return _to_hub(options, data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    try:
        event_id = publish(
            options.url,
            options.channel,
            {"data": data, "event": options.event},
            idempotency_key=options.key,
            prefix=options.prefix,
            timeout=options.timeout or _TIMEOUT,
        )
    except (SSEError, ModuleNotFoundError, ValueError) as exc:
        return fail(str(exc))
    say(event_id)
    return 0


def _to_hub(options: argparse.Namespace, data: bytes) -> int:
    try:
        import httpx  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as exc:
        return missing(exc, "publishing to a hub", "cli", "httpx", "h11")
    given = {"channel": options.channel, "event": options.event, "idempotency_key": options.key}
    token = options.token or next(iter(tokens_in(PUBLISH_TOKEN)), None)
    try:
        response = httpx.post(
            f"{options.url.rstrip('/')}/channels",
            params={name: value for name, value in given.items() if value is not None},
            content=data,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=options.timeout or _HUB_TIMEOUT,
        )
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        return fail(f"not published: {options.url} cannot be reached: {exc}")
    # Of a URL, a name that is no host's, a header, or the proxy or certificates that the environment names.
    except (
        httpx.InvalidURL,
        httpx.LocalProtocolError,
        httpx.UnsupportedProtocol,
        ImportError,
        OSError,
        ValueError,
    ) as exc:
        return fail(f"not published: the request cannot be made: {exc}")
    except httpx.HTTPError as exc:
        kind = str(exc) or type(exc).__name__
        return fail(f"not acknowledged: {kind}; it may have been published, and with --key it is safe to try again")
    return _answered(options.url, response)


def _answered(url: str, response: Any) -> int:
    if response.status_code != 201:
        hint = "; give the hub's own URL, http://HOST:PORT: the channel comes after it"
        text = " ".join(response.text[:500].split())
        return fail(f"the hub answered {response.status_code}: {text}{hint * (response.status_code == 404)}")
    try:
        event_id = str(response.json()["id"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return fail(f"{url} is no hub: it answered 201, but without the event's id")
    say(event_id)
    return 0
