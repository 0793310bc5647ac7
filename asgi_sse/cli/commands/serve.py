"""``asgi-sse serve``: run a hub."""

import argparse
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from asgi_sse.cli.arguments import Commands, add_address, count, positive_seconds, seconds
from asgi_sse.cli.output import EXIT_USAGE, extra_missing, fail, print_note

_DESCRIPTION: Final = """\
Runs a hub: apps in any language publish events with POST, and any number of
clients read them with GET (EventSource in a browser, curl, "asgi-sse tail").

  GET  /channels/NAME                   the channel's events, from now on
  GET  /channels?channel=A&channel=B    the events of several channels
  POST /channels/NAME                   publish; the body is the event's data
  GET  /health/live, /health/ready      health checks of the process
  GET  /metrics                         metrics for Prometheus

A client resumes with the header Last-Event-ID, which EventSource sends when it
reconnects, or with ?last_event_id=ID. It gets the events that it missed, or a
"reset" event if the hub no longer has them.

Needs uvicorn. Not on PyPI yet: from a clone, use pip install '.[cli]'.
"""

_EPILOG: Final = """\
publishing:
  curl -d "it rains" -H "Authorization: Bearer $TOKEN" \\
       http://127.0.0.1:8000/channels/news
  The hub answers 201 and {"id": "…"}.
  Give the event's type in ?event= or in the header X-SSE-Event. Give an
  idempotency key in ?idempotency_key= or in the header Idempotency-Key: if you
  publish again with the same key within two minutes, the hub publishes nothing
  and answers with the id of the first event.
  POST /channels takes JSON instead: {"channel": …, "data": …, "event": …,
  "retry": …, "idempotency_key": …}. Data that is not a string is sent as JSON.
  Errors: 400 the request is invalid; 401 the token is missing or unknown;
  403 the token is for reading only, or publishing is off; 413 the body is too
  large; 503 the backend does not answer, try again.

examples:
  ASGI_SSE_PUBLISH_TOKEN=secret asgi-sse serve
  asgi-sse serve --insecure-publish            publishing needs no token
  asgi-sse serve --broker redis://localhost:6379/0 --cors https://example.com

environment:
  ASGI_SSE_PUBLISH_TOKEN     publish tokens, separated by spaces
  ASGI_SSE_SUBSCRIBE_TOKEN   subscribe tokens, separated by spaces
  ASGI_SSE_BROKER            URL of the broker
  An option overrides its variable. Prefer variables for tokens: other users of
  this machine can see options (ps), but not the environment.

exit status: 130 after Ctrl-C; 1 if the address cannot be listened on or the
broker cannot be reached; 2 if an option or a variable is invalid.
SIGTERM stops the hub too. Every stream ends properly and tells its client when
to reconnect.
"""


def add(commands: Commands) -> None:
    """Add the ``serve`` command."""
    parser = commands.add(
        "serve",
        help="run a hub that apps in any language publish to",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    add_address(parser)
    _add_access_options(parser)
    _add_event_options(parser)
    _add_process_options(parser)


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--publish-token",
        action="append",
        metavar="TOKEN",
        help="let clients with this token publish; repeatable (default: nobody may publish)",
    )
    group.add_argument(
        "--insecure-publish",
        action="store_true",
        help="without a publish token, let anyone who reaches the port publish, except pages from origins not in "
        "--cors",
    )
    group.add_argument(
        "--subscribe-token",
        action="append",
        metavar="TOKEN",
        help='let only clients with this token subscribe; they send it in the header "Authorization: Bearer TOKEN", '
        "in ?token=TOKEN or in the cookie asgi_sse_token; repeatable (default: anyone may subscribe)",
    )
    group.add_argument(
        "--patterns", action="store_true", help="let clients subscribe to patterns: orders.*, orders.**, **"
    )
    group.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages from this origin use the hub, '*' for any origin; repeatable",
    )


def _add_event_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("events")
    group.add_argument(
        "--broker",
        metavar="URL",
        help="memory://, redis://HOST:PORT/DB or nats://HOST:PORT; with Redis or NATS, several hubs and apps share "
        "their channels, and events survive a restart (default: memory://)",
    )
    group.add_argument("--prefix", default="asgi_sse", help="prefix of the broker (default: %(default)s)")
    group.add_argument(
        "--history", type=count, default=1000, metavar="N", help="events to keep per channel (default: %(default)s)"
    )
    group.add_argument(
        "--max-age",
        type=positive_seconds,
        metavar="SECONDS",
        help="time to keep an event (default: no limit)",
    )
    group.add_argument(
        "--max-subscribers",
        type=count,
        metavar="N",
        help="subscribers per channel; the hub answers 503 to more (default: no limit)",
    )
    group.add_argument(
        "--max-body",
        type=count,
        default=1_048_576,
        metavar="BYTES",
        help="size limit of a POST body (default: %(default)s)",
    )


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("process")
    group.add_argument(
        "--ping",
        type=seconds,
        default=15.0,
        metavar="SECONDS",
        help="time without events after which a stream sends a keep-alive comment, so that proxies keep it open; "
        "0 turns it off (default: %(default)g)",
    )
    group.add_argument(
        "--drain-timeout",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="time to wait at shutdown for clients that do not read (default: %(default)g)",
    )
    group.add_argument(
        "--metrics", choices=("on", "off"), default="on", help="serve /metrics for Prometheus (default: %(default)s)"
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="level of the log on the standard error, which never has requests or tokens (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.uvicorn_server import serve  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError as exc:
        return extra_missing(exc, "serve", "cli", "uvicorn")
    from asgi_sse.broker import Broker  # noqa: PLC0415 (slow to import, and not needed for --help)
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
        return fail(str(exc), EXIT_USAGE)
    if not publish_tokens and not options.insecure_publish:
        print_note(f"publishing is off; give --publish-token, {hub.PUBLISH_TOKEN} or --insecure-publish to turn it on")
    if options.metrics == "on" and hub.metrics_endpoint() is None:
        print_note(
            "/metrics is off because prometheus_client is not installed; not on PyPI yet: from a clone, use "
            "pip install '.[metrics]'"
        )
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    @asynccontextmanager
    async def open_broker() -> AsyncIterator[None]:
        """Open the broker before the app does: uvicorn would print a traceback if the backend cannot be reached."""
        async with broker:
            yield

    started_message = "The hub runs at {} (Ctrl-C ends it)".format
    try:
        return serve(app, options.host, options.port, started_message, during_startup=open_broker, log_config=None)
    except BrokerError as exc:
        return fail(str(exc))
