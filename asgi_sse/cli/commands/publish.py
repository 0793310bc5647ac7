"""``asgi-sse publish``: publish one event to a backend or a hub."""

import argparse
import sys
from typing import Any, Final

from asgi_sse.cli.arguments import Commands, positive_seconds
from asgi_sse.cli.hub import PUBLISH_TOKEN, tokens_in
from asgi_sse.cli.output import EXIT_USAGE, extra_missing, fail, print_result

_TIMEOUT_S: Final = 5.0
# A hub waits that long for its backend, and then answers whether the event was published. It needs time to answer.
_HUB_TIMEOUT_S: Final = _TIMEOUT_S + 1

_DESCRIPTION: Final = """\
Publishes an event to a channel and prints the event's id. The URL is either
the one that your apps pass to Broker, or the URL of a hub ("asgi-sse serve").

A Redis or NATS URL needs that backend's client; a hub's URL needs httpx. Not
on PyPI yet: from a clone, use pip install '.[redis]', '.[nats]' or '.[cli]'.
"""

_EPILOG: Final = """\
examples:
  asgi-sse publish redis://localhost:6379/0 news "it rains"
  asgi-sse publish http://127.0.0.1:8000 news "it rains" --event weather
  date | asgi-sse publish nats://localhost:4222 clock

environment:
  ASGI_SSE_PUBLISH_TOKEN   the hub's publish token, if --token is not given

exit status: 0 the event was published; 1 it was not published, or it is unknown
whether it was: the message says which. If you gave --key, you can safely try
again. 2 URL is invalid.
"""


def add(commands: Commands) -> None:
    """Add the ``publish`` command."""
    parser = commands.add(
        "publish",
        help="publish an event through Redis, NATS or a hub",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", help="redis://… or nats://… of a broker, or http://… of a hub")
    parser.add_argument("channel", metavar="CHANNEL", help="name of the channel")
    parser.add_argument("data", metavar="DATA", nargs="?", help="data of the event (default: standard input)")
    parser.add_argument("--event", metavar="TYPE", help="type of the event")
    parser.add_argument(
        "--key", help="idempotency key: publishing again with the same key within two minutes publishes nothing"
    )
    parser.add_argument("--prefix", default="asgi_sse", help="prefix of the broker (default: %(default)s)")
    parser.add_argument("--token", help="publish token of the hub")
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help=f"time to wait for the answer (default: {_TIMEOUT_S:g}, or {_HUB_TIMEOUT_S:g} for a hub)",
    )


def _run(options: argparse.Namespace) -> int:
    from asgi_sse.broker import publish  # noqa: PLC0415 (slow to import, and not needed for --help)
    from asgi_sse.errors import SSEError  # noqa: PLC0415

    if "://" not in options.url:
        return fail(
            f"URL must start with redis://, nats:// or http://, got {options.url!r}; for a hub give http://HOST:PORT",
            EXIT_USAGE,
        )
    data = options.data
    if data is None:
        data = sys.stdin.buffer.read().removesuffix(b"\n")  # the line end that echo and date add
    if options.url.startswith(("http://", "https://")):
        return _publish_to_hub(options, data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    try:
        event_id = publish(
            options.url,
            options.channel,
            {"data": data, "event": options.event},
            idempotency_key=options.key,
            prefix=options.prefix,
            timeout=options.timeout or _TIMEOUT_S,
        )
    except (SSEError, ModuleNotFoundError, ValueError) as exc:
        return fail(str(exc))
    print_result(event_id)
    return 0


def _publish_to_hub(options: argparse.Namespace, data: bytes) -> int:
    try:
        import httpx  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError as exc:
        return extra_missing(exc, "publishing to a hub", "cli", "httpx", "h11")
    parameters = {"channel": options.channel, "event": options.event, "idempotency_key": options.key}
    token = options.token or next(iter(tokens_in(PUBLISH_TOKEN)), None)
    try:
        response = httpx.post(
            f"{options.url.rstrip('/')}/channels",
            params={name: value for name, value in parameters.items() if value is not None},
            content=data,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=options.timeout or _HUB_TIMEOUT_S,
        )
    except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
        return fail(f"not published: cannot connect to {options.url}: {exc}")
    # The URL, its host name or a header is invalid; or a proxy or certificate file from the environment is.
    except (
        httpx.InvalidURL,
        httpx.LocalProtocolError,
        httpx.UnsupportedProtocol,
        ImportError,
        OSError,
        ValueError,
    ) as exc:
        return fail(f"not published: cannot send the request: {exc}")
    except httpx.HTTPError as exc:
        reason = str(exc) or type(exc).__name__
        return fail(f"not acknowledged: {reason}; the event may have been published; with --key, trying again is safe")
    return _check_answer(options.url, response)


def _check_answer(url: str, response: Any) -> int:
    """Print the event's id from the hub's answer, or the error; return the exit status."""
    if response.status_code != 201:
        text = " ".join(response.text[:500].split())
        hint = "; give the URL of the hub only, http://HOST:PORT, and the channel as the next argument"
        return fail(f"the hub answered {response.status_code}: {text}{hint if response.status_code == 404 else ''}")
    try:
        event_id = str(response.json()["id"])
    except (ValueError, TypeError, LookupError, RecursionError):
        return fail(f"{url} must be the URL of a hub, but its 201 answer has no event id")
    print_result(event_id)
    return 0
