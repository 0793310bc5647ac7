"""``asgi-sse serve``."""

import argparse
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from asgi_sse.cli.frame import (
    WRONG_ARGUMENTS,
    Commands,
    add_address,
    count,
    fail,
    missing,
    note,
    positive_seconds,
    seconds,
)

_DESCRIPTION: Final = """\
Runs a hub: apps in any language publish events by POST, and any number of
clients (EventSource in a browser, curl, "asgi-sse tail") read them by GET.

  GET  /channels/NAME                   the channel's events, from now on
  GET  /channels?channel=A&channel=B    of several
  POST /channels/NAME                   publish: the body is the event's data
  GET  /health/live, /health/ready      for who watches the process
  GET  /metrics                         for Prometheus

Who comes back with the header Last-Event-ID, as an EventSource does by itself,
or with ?last_event_id=ID, gets what it has missed, or an event of the type
"reset" if that is gone. Needs uvicorn: pip install "asgi-sse[cli]".
"""

_EPILOG: Final = """\
publishing:
  curl -d "it rains" -H "Authorization: Bearer $TOKEN" \\
       http://127.0.0.1:8000/channels/news
  is answered 201 and {"id": "…"}. The event's type is in ?event= or the header
  X-SSE-Event. With ?idempotency_key= or Idempotency-Key, publishing the same
  again within two minutes gives the first one's id and does nothing.
  POST /channels takes it as JSON: {"channel": …, "data": …, "event": …,
  "retry": …, "idempotency_key": …}; data that is no string becomes JSON text.
  400 the request is wrong; 401 the token is; 403 it is one for reading, or
  publishing is off; 413 the body is too large; 503 the engine does not answer:
  try again.

examples:
  ASGI_SSE_PUBLISH_TOKEN=secret asgi-sse serve
  asgi-sse serve --insecure-publish            everybody may publish
  asgi-sse serve --broker redis://localhost:6379/0 --cors https://example.com

environment:
  ASGI_SSE_PUBLISH_TOKEN, ASGI_SSE_SUBSCRIBE_TOKEN   tokens, between spaces,
                       where the options are not given. Other users of this
                       machine can read options (ps), but not the environment.
  ASGI_SSE_BROKER      URL of the broker

exit status: 130 by Ctrl-C; 1 if it cannot listen, or not reach the broker;
2 if an option or a variable is wrong.
SIGTERM ends it too: its streams end properly, and their clients are told when
to come back.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "serve",
        help="run a hub, to which apps in any language publish",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    add_address(parser)
    _add_who(parser)
    _add_events(parser)
    _add_process(parser)


def _add_who(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may do what")
    group.add_argument(
        "--publish-token", action="append", metavar="TOKEN", help="who has it may publish; may be given several times"
    )
    group.add_argument(
        "--insecure-publish",
        action="store_true",
        help="without a token everybody may publish who reaches the port, but for pages of origins that are not in "
        "--cors; else nobody may",
    )
    group.add_argument(
        "--subscribe-token",
        action="append",
        metavar="TOKEN",
        help='who has it may read, by the header "Authorization: Bearer TOKEN", ?token=TOKEN or the cookie '
        "asgi_sse_token; may be given several times (default: everybody may)",
    )
    group.add_argument("--patterns", action="store_true", help="readers may name patterns: orders.*, orders.**, **")
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of that origin may read, '*': of any; may be given several times",
    )


def _add_events(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("events")
    group.add_argument(
        "--broker",
        metavar="URL",
        help="memory://, redis://HOST:PORT/DB or nats://HOST:PORT: with an engine, several hubs and apps share their "
        "channels, and events outlive a restart (default: memory://)",
    )
    group.add_argument("--prefix", default="asgi_sse", help="that of the broker (default: %(default)s)")
    group.add_argument("--history", type=count, default=1000, help="events that a channel keeps (default: %(default)s)")
    group.add_argument(
        "--max-age", type=positive_seconds, metavar="SECONDS", help="for which events are kept (default: any time)"
    )
    group.add_argument(
        "--max-subscribers",
        type=count,
        metavar="N",
        help="of a channel; the next is answered 503 (default: any number)",
    )
    group.add_argument(
        "--max-body", type=count, default=1_048_576, metavar="BYTES", help="of a POST (default: %(default)s)"
    )


def _add_process(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the process")
    group.add_argument(
        "--ping",
        type=seconds,
        default=15.0,
        metavar="SECONDS",
        help="after which an idle stream gets a comment, so that proxies keep it open; 0: never (default: %(default)g)",
    )
    group.add_argument(
        "--drain-timeout",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="that clients which do not read have at the end (default: %(default)g)",
    )
    group.add_argument(
        "--metrics", choices=("on", "off"), default="on", help="/metrics, for Prometheus (default: %(default)s)"
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="what is logged, to the standard error (default: %(default)s); never requests, nor tokens",
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.uvicorn_server import serve  # noqa: PLC0415 (of an extra)
    except ModuleNotFoundError as exc:
        return missing(exc, "serve", "cli", "uvicorn")
    from asgi_sse.broker import Broker  # noqa: PLC0415 (the other commands do without)
    from asgi_sse.cli import hub  # noqa: PLC0415
    from asgi_sse.errors import BrokerError  # noqa: PLC0415
    from asgi_sse.stream.registry import StreamRegistry  # noqa: PLC0415

    publish_tokens = options.publish_token or hub.tokens_in(hub.PUBLISH_TOKEN)
    try:
        broker = Broker(
            options.broker or os.environ.get(hub.BROKER) or "memory://",
            history=options.history,
            max_age=options.max_age,
            max_subscribers=options.max_subscribers,
            prefix=options.prefix,
        )
        app = hub.create_hub(
            broker,
            publish_tokens=publish_tokens,
            subscribe_tokens=options.subscribe_token,
            insecure_publish=options.insecure_publish,
            patterns=options.patterns,
            cors=options.cors,
            max_body=options.max_body,
            metrics=options.metrics == "on",
            registry=StreamRegistry(drain_timeout=options.drain_timeout),
            ping=options.ping,
        )
    except ModuleNotFoundError as exc:
        return fail(str(exc))
    except ValueError as exc:
        return fail(str(exc), WRONG_ARGUMENTS)
    if not publish_tokens and not options.insecure_publish:
        note(f"nobody may publish: give --publish-token, {hub.PUBLISH_TOKEN} or --insecure-publish")
    if options.metrics == "on" and hub.metrics_endpoint() is None:
        note('there is no /metrics: pip install "asgi-sse[metrics]"')
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[None]:
        """Before uvicorn opens it with the app, and would report that it cannot by a traceback."""
        async with broker:
            yield

    told = "The hub runs at {} (Ctrl-C ends it)".format
    try:
        return serve(app, options.host, options.port, told, during_startup=open_broker, log_config=None)
    except BrokerError as exc:
        return fail(str(exc))
