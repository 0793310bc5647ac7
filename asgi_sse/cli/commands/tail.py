"""``asgi-sse tail``: print the events of a stream."""

import argparse
import codecs
import json
import sys
from pathlib import Path
from typing import Any, Final

from asgi_sse.cli.arguments import Commands, add_headers, count, positive_seconds, web_url
from asgi_sse.cli.output import extra_missing, fail, print_note, print_result
from asgi_sse.protocol.event import ServerSentEvent

_DESCRIPTION: Final = """\
Prints the events of a stream as they arrive. When the connection ends, it
reconnects as EventSource in a browser does: with Last-Event-ID, after the
reconnection time of the stream. After each failure in a row it waits longer, up
to a minute. It stops when the server answers 204. Any other answer that is not
an event stream is an error.

Prints the data of an event, with its [type] in front if it has one. Data of
several lines is printed as several lines. For programs, --json prints one object
per line, {"id": …, "event": …, "data": …}, with three strings. On a terminal,
control characters in events are shown as escapes such as \\u001b.

Needs httpx. Not on PyPI yet: from a clone, use pip install '.[cli]'.
"""

_EPILOG: Final = """\
examples:
  asgi-sse tail http://127.0.0.1:8000/channels/news
  asgi-sse tail --json --count 10 https://example.com/events | jq .data
  asgi-sse tail -v --since "$ID" -H "Authorization: Bearer $TOKEN" URL
  asgi-sse tail --data '{"stream": true, "prompt": "hello"}' URL

A POST is sent once, unless you give --reconnect: a second request may cost money
and may get another answer. Redirects are followed. The header Authorization is
not sent to another origin; all other headers are. HTTP_PROXY, HTTPS_PROXY and
NO_PROXY choose the proxy.

exit status: 0 the server answered 204, --count events were printed, or the
stream ended and reconnecting is off; 1 the answer is not an event stream, or the
connection failed and reconnecting is off; 130 after Ctrl-C; 141 if the reader of
the output closed the pipe.
"""


def add(commands: Commands) -> None:
    """Add the ``tail`` command."""
    parser = commands.add(
        "tail",
        help="print the events of a stream and reconnect as a browser does",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", type=web_url, help="URL of the stream")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--event", action="append", metavar="TYPE", help="print only events of this type; repeatable")
    parser.add_argument("--count", type=count, metavar="N", help="stop after N printed events")
    parser.add_argument("--since", default="", metavar="ID", help="start after the event with this id")
    add_headers(parser)
    parser.add_argument("--method", metavar="METHOD", help="method of the request (default: GET, or POST with --data)")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="body of the request; @FILE reads a file, @- the standard input; sent as application/json if it is JSON, "
        "else as text/plain",
    )
    parser.add_argument(
        "--reconnect",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="reconnect when the connection has ended or failed (default: for GET only)",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help="time without a byte after which the connection counts as failed (default: no limit)",
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="also print connections, comments and reconnection times, on the standard error",
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.follow import Follower, StoppedError, ignore  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError as exc:
        return extra_missing(exc, "tail", "cli", "httpx", "h11")
    try:
        body = _body(options.data)
    except OSError as exc:
        return fail(f"cannot read {options.data[1:]}: {exc.strerror}")
    headers = list(options.header)
    if body is not None and not any(name.lower() == b"content-type" for name, _ in headers):
        content_type = b"application/json" if _is_json(body) else b"text/plain; charset=utf-8"
        headers.append((b"content-type", content_type))
    method = (options.method or ("GET" if body is None else "POST")).upper()
    reconnect = options.reconnect if options.reconnect is not None else method == "GET"
    try:
        with Follower(
            options.url,
            method=method,
            headers=headers,
            body=body,
            last_event_id=options.since,
            reconnect=reconnect,
            read_timeout=options.timeout,
            on_status=print_note,
            on_detail=print_note if options.verbose else ignore,
        ) as follower:
            return _print_events(follower, options)
    except StoppedError as exc:
        return fail(str(exc))


def _print_events(events: Any, options: argparse.Namespace) -> int:
    # An output that is not UTF-8 lacks characters. JSON has its own escapes for them; text gets Python's.
    ascii_only = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    types = set(options.event or ())
    printed = 0
    for event in events:
        if types and event.event not in types:
            continue
        print_result(_as_json(event, ascii_only=ascii_only) if options.json else _as_text(event))
        printed += 1
        if printed == options.count:
            break
    return 0


def _as_json(event: ServerSentEvent, *, ascii_only: bool) -> str:
    return json.dumps({"id": event.id, "event": event.event, "data": event.data}, ensure_ascii=ascii_only)


def _as_text(event: ServerSentEvent) -> str:
    prefix = "" if event.event == "message" else f"[{event.event}] "
    return f"{prefix}{event.data}"


def _body(data: str | None) -> bytes | None:
    """Return the request's body from the value of ``--data``."""
    if data is None:
        return None
    if data == "@-":
        return sys.stdin.buffer.read()
    if data.startswith("@"):
        return Path(data[1:]).read_bytes()
    return data.encode("utf-8", "surrogateescape")


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True
