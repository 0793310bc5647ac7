"""``asgi-sse bench``."""

import argparse
import asyncio
import json
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from asgi_sse.cli.frame import (
    INTERRUPTED,
    Commands,
    add_headers,
    count,
    fail,
    missing,
    positive_seconds,
    rate,
    safe,
    say,
    web_url,
)
from asgi_sse.cli.hub import PUBLISH_TOKEN, tokens_in

if TYPE_CHECKING:
    from asgi_sse.cli.load import Load

_OTHER_FILES: Final = 100
"""Beside its readers: its own libraries, and the connections by which it publishes."""

_LAST_ANSWERS: Final = 2.0
"""Seconds that what was published has to be answered, behind Ctrl-C."""

_BUSY: Final = 0.8
"""Of one core, from which on the times are those of this process too."""

_BAR: Final = 20
_NAMES: Final = {
    "head": "head",
    "first_event": "first event",
    "spread": "spread",
    "delivery": "delivery",
    "publish_answer": "publish answer",
}

_DESCRIPTION: Final = """\
Reads a stream with many connections at once, and tells how many events came and
how long that took. Needs h11 and httpx: pip install "asgi-sse[cli]".

  head            from the beginning of a connection to the head of its answer
  first event     from the same beginning to its first event
  spread          of one event, by its id: from the first reader that has it to
                  each other one. It says something where an id stands for the
                  same event for all, as in channels; a server that numbers each
                  stream by itself has no spread.
  delivery        of events that it publishes itself, to a channel of a hub: from
                  before the POST until each reader has it
  publish answer  from the same until the POST is answered

Events, bytes and spread are counted when all connections are there; percentiles
are true to 1 %. All is measured in this one process, which takes a part of it:
it tells how busy it was, and above 80 % of a core the times are its own as
well. Then run several, or ask for less.
"""

_EPILOG: Final = """\
examples:
  asgi-sse bench http://127.0.0.1:8000/channels/news --connections 1000
  asgi-sse bench URL --publish-rate 10 --publish "$TOKEN" --json

environment:
  ASGI_SSE_PUBLISH_TOKEN   token for --publish-rate, where --publish is not given

exit status: 0 all connections read to the end; 1 some failed, or something that
was published was not answered 201; 130 by Ctrl-C, with the figures until then.
"""


def add(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add(
        "bench",
        help="read a stream with many connections, and measure it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        run=_run,
    )
    parser.add_argument("url", metavar="URL", type=web_url, help="of the stream")
    parser.add_argument("--connections", type=count, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--rate", type=rate, default=500.0, metavar="N", help="connections begun a second (default: %(default)g)"
    )
    parser.add_argument(
        "--duration",
        type=positive_seconds,
        default=10.0,
        metavar="SECONDS",
        help="once all are connected (default: %(default)g)",
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=10.0,
        metavar="SECONDS",
        help="that a connection has until its head (default: %(default)g)",
    )
    add_headers(parser)
    parser.add_argument("--publish", metavar="TOKEN", help="publish to the same URL, a channel of a hub, by this token")
    parser.add_argument("--publish-rate", type=rate, metavar="N", help="events a second to publish (default: 1)")
    parser.add_argument("--json", action="store_true", help="the result as a JSON object")


def _run(options: argparse.Namespace) -> int:
    try:
        from asgi_sse.cli.load import Load  # noqa: PLC0415 (of an extra)
    except ModuleNotFoundError as exc:
        return missing(exc, "bench", "cli", "h11", "httpx")
    from asgi_sse.errors import SSEError  # noqa: PLC0415

    needed, limit = options.connections + _OTHER_FILES, _raise_limit()
    if needed > limit:
        return fail(
            f"{options.connections} connections need {needed} open files, and this process may have {limit}: "
            "raise the hard limit (ulimit -Hn, LimitNOFILE=), or give fewer --connections"
        )
    try:
        load = Load(options.url, options.header, options.timeout)
        seconds, busy, interrupted = asyncio.run(_measure(load, options))
    except SSEError as exc:
        return fail(str(exc))
    result = _result(load, options.connections, seconds, busy)
    say(json.dumps(result) if options.json else _as_text(result))
    if interrupted:
        return INTERRUPTED
    return 1 if load.errors else 0


def _raise_limit() -> float:
    """Open as many files as the system allows; gives how many."""
    import resource  # noqa: PLC0415 (the other commands do without; Windows has none)

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


async def _measure(load: "Load", options: argparse.Namespace) -> tuple[float, float, bool]:
    """Gives the seconds that were measured, the share of a core that this took, and whether Ctrl-C has ended it."""
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    await load.resolve()
    progress = asyncio.create_task(_show(load, options)) if sys.stderr.isatty() else None
    await _ramp(load, options, interrupted)
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
        await _last_answers(publisher, interrupted)
    await load.finish()
    if progress is not None:
        progress.cancel()
        with suppress(asyncio.CancelledError):
            await progress
    return seconds, busy, interrupted.is_set()


async def _ramp(load: "Load", options: argparse.Namespace, interrupted: asyncio.Event) -> None:
    """Begin the connections, so many a second, and wait until each reads or has failed."""
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
    for one in (waiting, done):
        one.cancel()
        with suppress(asyncio.CancelledError):
            await one


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for `event`, but no longer than that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _last_answers(publisher: asyncio.Task[None], interrupted: asyncio.Event) -> None:
    """Wait until all that was published is answered, which a server may never do; who interrupts that waits no more."""
    waiting = asyncio.create_task(interrupted.wait())
    await asyncio.wait([publisher, waiting], return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait([publisher], timeout=_LAST_ANSWERS)
    for one in (waiting, publisher):
        one.cancel()
        with suppress(asyncio.CancelledError):
            await one


async def _show(load: "Load", options: argparse.Namespace) -> None:
    """A line on the terminal, of how far it is."""
    began, ramp = time.perf_counter(), options.connections / options.rate
    try:
        while True:
            share = min(1.0, (time.perf_counter() - began) / (ramp + options.duration))
            bar = "#" * round(share * _BAR)
            text = f"{load.open:,} of {options.connections:,} read, {load.failed:,} failed, {load.events:,} events"
            print(f"\r[{bar:-<{_BAR}}] {text}\x1b[K", end="", file=sys.stderr, flush=True)
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
        "connections": {"asked": connections, "begun": load.asked, "opened": load.opened, "failed": load.failed},
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
        f"events          {result['events']:,} in {result['seconds']:g} s: {events} a second, {bytes_} kB a second",
    ]
    if result["published"] or result["not_published_in_time"]:
        late = result["not_published_in_time"]
        lines.append(
            f"published       {result['published']:,}, delivered {result['delivered']:,} of {result['expected']:,}"
            + f"; {late:,} more were not sent, since too many waited for their answers" * bool(late)
        )
    if result["milliseconds"]:
        lines.append(f"{'milliseconds':<14}" + "".join(f"{name:>12}" for name in ("p50", "p90", "p99", "max")))
    for name, summary in result["milliseconds"].items():
        lines.append(f"{_NAMES[name]:<14}" + "".join(f"{value:>12,.2f}" for value in summary.values()))
    if result["connections"]["opened"]:
        too_busy = ": the times are its own as much as the server's" * (result["client_busy"] > _BUSY)
        lines.append(f"this process    {result['client_busy']:.0%} of a core{too_busy}")
    for kind, number in sorted(result["errors"].items()):
        lines.append(safe(f"failed          {number:,}: {kind}"))
    return "\n".join(lines)
