"""``asgi-sse tail``."""

import argparse
import codecs
import json
import sys
from pathlib import Path
from typing import Any, Final

from asgi_sse.cli.frame import Commands, add_headers, count, fail, missing, note, positive_seconds, say, web_url
from asgi_sse.protocol.event import ServerSentEvent

_DESCRIPTION: Final = """\
Prints the events of a stream as they come, and goes on where it was when the
connection ends, as an EventSource in a browser does: with Last-Event-ID, after
the time that the stream asks for. 204 ends it; what else is no event stream is
an error. After a failure it waits longer each time, up to a minute. Needs
httpx: pip install "asgi-sse[cli]".

A line is the event's data, behind its [type] if it has one; data of several
lines takes as many. For programs, --json has one object a line: {"id": …,
"event": …, "data": …}, of which all three are strings. On a terminal, control
characters of events are shown as \\u001b.
"""

_EPILOG: Final = """\
examples:
  asgi-sse tail http://127.0.0.1:8000/channels/news
  asgi-sse tail --json --count 10 https://example.com/events | jq .data
  asgi-sse tail -v --since "$ID" -H "Authorization: Bearer $TOKEN" URL
  asgi-sse tail --data '{"stream": true, "prompt": "hello"}' URL

A POST is sent once, unless --reconnect is given: to ask again may cost, and
give another answer. Redirects are followed: Authorization does not go along to
another origin, other headers do. Proxies are those of HTTP_PROXY, HTTPS_PROXY,
NO_PROXY.

exit status: 0 the server said that there is no more (204), there were --count
events, or the stream has ended and is not to be reconnected; 1 the answer is no
event stream, or the connection failed and is not to be made again; 130 by
Ctrl-C; 141 if who reads the output has gone.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "tail",
        help="print the events of a stream, and reconnect as a browser does",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", type=web_url, help="of the stream")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--event", action="append", metavar="TYPE", help="that type alone; may be given several times")
    parser.add_argument("--count", type=count, metavar="N", help="end behind so many events")
    parser.add_argument("--since", default="", metavar="ID", help="begin behind the event of that id")
    add_headers(parser)
    parser.add_argument("--method", metavar="METHOD", help="of the request (default: GET, with --data POST)")
    parser.add_argument(
        "--data", metavar="TEXT", help="the request's body; @FILE reads a file, @- the standard input. What is JSON is "
        "sent as such",
    )  # fmt: skip
    parser.add_argument(
        "--reconnect",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether to go on when a connection has ended or failed (default: yes, but for a POST)",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help="without a byte after which a connection is taken to be dead (default: never)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="tell of connections, comments and retry, on the standard error"
    )


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.follow import Follower, StoppedError, ignore  # noqa: PLC0415 (of an extra)
    except ModuleNotFoundError as exc:
        return missing(exc, "tail", "cli", "httpx", "h11")
    try:
        body = _body(options.data)
    except OSError as exc:
        return fail(f"cannot read {options.data[1:]}: {exc.strerror}")
    headers = list(options.header)
    if body is not None and not any(name.lower() == b"content-type" for name, _ in headers):
        kind = b"application/json" if _is_json(body) else b"text/plain; charset=utf-8"
        headers.append((b"content-type", kind))
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
            silence=options.timeout,
            told=note,
            detailed=note if options.verbose else ignore,
        ) as follower:
            return _print(follower, options)
    except StoppedError as exc:
        return fail(str(exc))


def _print(events: Any, options: argparse.Namespace) -> int:
    # Of what an encoding lacks, JSON has escapes of its own.
    ascii_alone = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    wanted = set(options.event or ())
    printed = 0
    for event in events:
        if wanted and event.event not in wanted:
            continue
        say(_as_json(event, ascii_alone=ascii_alone) if options.json else _as_text(event))
        printed += 1
        if printed == options.count:
            break
    return 0


def _as_json(event: ServerSentEvent, *, ascii_alone: bool) -> str:
    return json.dumps({"id": event.id, "event": event.event, "data": event.data}, ensure_ascii=ascii_alone)


def _as_text(event: ServerSentEvent) -> str:
    kind = "" if event.event == "message" else f"[{event.event}] "
    return f"{kind}{event.data}"


def _body(data: str | None) -> bytes | None:
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
