"""``asgi-sse bench``: measure a stream with many connections."""

import argparse
import asyncio
import json
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.cli.arguments import Commands, add_headers, count, positive_seconds, rate, web_url
from asgi_sse.cli.hub import PUBLISH_TOKEN, tokens_in
from asgi_sse.cli.output import EXIT_INTERRUPTED, escape_controls, extra_missing, fail, print_result

if TYPE_CHECKING:
    from asgi_sse.cli.load import Load

_OTHER_FILES: Final = 100
"""Open files besides the connections of the clients: Python's own, and the connections that publish."""

_LAST_ANSWERS_S: Final = 2.0
"""How long Ctrl-C waits for the answers to the events that were already sent."""

_BUSY_SHARE: Final = 0.8
"""Share of one core above which this process itself delays the measured times."""

_BAR_LENGTH: Final = 20
_LABELS: Final = {
    "head": "head",
    "first_event": "first event",
    "spread": "spread",
    "delivery": "delivery",
    "publish_answer": "publish answer",
}

_DESCRIPTION: Final = """\
Reads a stream with many connections at once and reports how many events arrived
and how long that took:

  head            from the start of a connection to the response headers
  first event     from the start of a connection to its first event
  spread          from the first client that received an event to each other
                  client. Events are matched by id, so this needs ids that mean
                  the same event for all clients, as in channels.
  delivery        from before the POST of an event to each client that received
                  it. This needs --publish or --publish-rate and a hub.
  publish answer  from before the POST of an event to the hub's answer

Events, bytes and spread count once all connections are open. Percentiles are
exact to 1 %. One process does all the measuring, and its own work takes time.
The report says how busy it was: above 80 % of a core, its work delays the
measured times. Then run several processes, or use fewer connections.

Needs h11 and httpx. Not on PyPI yet: from a clone, use pip install '.[cli]'.
"""

_EPILOG: Final = """\
examples:
  asgi-sse bench http://127.0.0.1:8000/channels/news --connections 1000
  asgi-sse bench URL --publish-rate 10 --publish "$TOKEN" --json

environment:
  ASGI_SSE_PUBLISH_TOKEN   token for --publish-rate, if --publish is not given

exit status: 0 every connection read to the end; 1 a connection failed, or a POST
was not answered 201; 130 after Ctrl-C, which prints the results so far.
"""


def add(commands: Commands) -> None:
    """Add the ``bench`` command."""
    parser = commands.add(
        "bench",
        help="measure a stream with many connections",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", type=web_url, help="URL of the stream")
    parser.add_argument(
        "--connections", type=count, default=100, metavar="N", help="connections to open (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=rate, default=500.0, metavar="N", help="connections to start per second (default: %(default)g)"
    )
    parser.add_argument(
        "--duration",
        type=positive_seconds,
        default=10.0,
        metavar="SECONDS",
        help="time to measure once all connections are open (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=10.0,
        metavar="SECONDS",
        help="time that a connection has to receive the response headers (default: %(default)g)",
    )
    add_headers(parser)
    parser.add_argument(
        "--publish", metavar="TOKEN", help="publish to the same URL, a channel of a hub, with this token"
    )
    parser.add_argument("--publish-rate", type=rate, metavar="N", help="events to publish per second (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the results as a JSON object")


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.load import Load  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError as exc:
        return extra_missing(exc, "bench", "cli", "h11", "httpx")
    from asgi_sse.errors import SSEError  # noqa: PLC0415

    needed, limit = options.connections + _OTHER_FILES, _raise_file_limit()
    if needed > limit:
        return fail(
            f"{options.connections} connections need {needed} open files, but this process may open {limit}; "
            "raise the hard limit (ulimit -Hn, LimitNOFILE=), or lower --connections"
        )
    try:
        load = Load(options.url, options.header, options.timeout)
        seconds, busy, interrupted = asyncio.run(_measure(load, options))
    except SSEError as exc:
        return fail(str(exc))
    result = _result(load, options.connections, seconds, busy)
    print_result(json.dumps(result) if options.json else _as_text(result))
    if interrupted:
        return EXIT_INTERRUPTED
    return 1 if load.errors else 0


def _raise_file_limit() -> float:
    """Raise the limit on open files as far as the system allows, and return it."""
    import resource  # noqa: PLC0415 (Windows has none, and the other commands run there)

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS reports no hard limit, but enforces one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


async def _measure(load: "Load", options: argparse.Namespace) -> tuple[float, float, bool]:
    """Run the load.

    Returns:
        The measured seconds, the share of a core that this process used, and whether Ctrl-C stopped the run.
    """
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    await load.resolve()
    progress = asyncio.create_task(_show_progress(load, options)) if sys.stderr.isatty() else None
    await _open_connections(load, options, interrupted)
    load.measure()
    began, cpu = time.perf_counter(), time.process_time()
    over = asyncio.Event()
    publisher = None
    if options.publish is not None or options.publish_rate is not None:
        token = options.publish or next(iter(tokens_in(PUBLISH_TOKEN)), None)
        publisher = asyncio.create_task(load.publish(token, options.publish_rate or 1.0, over))
    if load.open:
        await _wait(interrupted, options.duration)
    seconds = time.perf_counter() - began
    busy = (time.process_time() - cpu) / seconds
    over.set()
    if publisher is not None:
        await _wait_for_answers(publisher, interrupted)
    await load.finish()
    if progress is not None:
        progress.cancel()
        with suppress(asyncio.CancelledError):
            await progress
    return seconds, busy, interrupted.is_set()


async def _open_connections(load: "Load", options: argparse.Namespace, interrupted: asyncio.Event) -> None:
    """Start the connections at the given rate, and wait until each one is open or has failed."""
    began = time.perf_counter()
    connecting: set[asyncio.Task[None]] = set()
    for number in range(options.connections):
        connecting.add(asyncio.create_task(load.connect()))
        await _wait(interrupted, began + (number + 1) / options.rate - time.perf_counter())
        if interrupted.is_set():
            break
    waiting = asyncio.create_task(interrupted.wait())
    done: asyncio.Future[Any] = asyncio.gather(*connecting)
    await asyncio.wait([waiting, done], return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, done):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait until `event` is set, for `seconds` at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _wait_for_answers(publisher: asyncio.Task[None], interrupted: asyncio.Event) -> None:
    """Wait until every published event is answered, or give up after Ctrl-C: a server may never answer."""
    waiting = asyncio.create_task(interrupted.wait())
    await asyncio.wait([publisher, waiting], return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait([publisher], timeout=_LAST_ANSWERS_S)
    for task in (waiting, publisher):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _show_progress(load: "Load", options: argparse.Namespace) -> None:
    """Keep a progress bar on the terminal until cancelled."""
    began, ramp = time.perf_counter(), options.connections / options.rate
    try:
        while True:
            share = min(1.0, (time.perf_counter() - began) / (ramp + options.duration))
            bar = "#" * round(share * _BAR_LENGTH)
            text = f"{load.open:,} of {options.connections:,} open, {load.failed:,} failed, {load.events:,} events"
            print(f"\r[{bar:-<{_BAR_LENGTH}}] {text}\x1b[K", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.2)
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _result(load: "Load", connections: int, seconds: float, busy: float) -> dict[str, Any]:
    times = {
        "head": load.head,
        "first_event": load.first,
        "spread": load.spread,
        "delivery": load.delivery,
        "publish_answer": load.answer,
    }
    return {
        "url": load.url,
        "connections": {"asked": connections, "begun": load.started, "opened": load.opened, "failed": load.failed},
        "errors": dict(load.errors),
        "seconds": round(seconds, 3),
        "events": load.events,
        "events_per_second": round(load.events / seconds, 1),
        "bytes": load.bytes,
        "bytes_per_second": round(load.bytes / seconds, 1),
        "milliseconds": {name: summary for name, times in times.items() if (summary := times.summary())},
        "published": load.published,
        "not_published_in_time": load.skipped,
        "delivered": load.delivered,
        "expected": load.expected,
        "client_busy": round(busy, 3),
    }


def _as_text(result: dict[str, Any]) -> str:
    opened, asked, failed = (f"{result['connections'][name]:,}" for name in ("opened", "asked", "failed"))
    events, bytes_ = f"{result['events_per_second']:,.0f}", f"{result['bytes_per_second'] / 1000:,.1f}"
    lines = [
        f"connections     {opened} of {asked} opened, {failed} failed",
        f"events          {result['events']:,} in {result['seconds']:g} s: {events} per second, {bytes_} kB per second",
    ]
    if result["published"] or result["not_published_in_time"]:
        skipped = result["not_published_in_time"]
        lines.append(
            f"published       {result['published']:,}, delivered {result['delivered']:,} of {result['expected']:,}"
            + f"; {skipped:,} not sent because too many POSTs were unanswered" * bool(skipped)
        )
    if result["milliseconds"]:
        lines.append(f"{'milliseconds':<14}" + "".join(f"{name:>12}" for name in ("p50", "p90", "p99", "max")))
    for name, summary in result["milliseconds"].items():
        lines.append(f"{_LABELS[name]:<14}" + "".join(f"{value:>12,.2f}" for value in summary.values()))
    if result["connections"]["opened"]:
        warning = "; its own work delays these times" * (result["client_busy"] > _BUSY_SHARE)
        lines.append(f"this process    {result['client_busy']:.0%} of a core{warning}")
    for kind, number in sorted(result["errors"].items()):
        lines.append(escape_controls(f"failed          {number:,}: {kind}"))
    return "\n".join(lines)
