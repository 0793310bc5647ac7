"""The app of the fault tests. Two processes run it.

Each process publishes events, and writes the fate of each event to its ledger at once:

- ``t PUBLISHER COUNT CHANNEL``: the event is about to be published.
- ``a PUBLISHER COUNT ID TIME ATTEMPTS``: it was acknowledged after so many attempts.
- ``f PUBLISHER COUNT``: publishing it raised `BrokerError`.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from itertools import count
from typing import Any

import psutil

from asgi_sse import Broker, BrokerError, Request, ServerSentEvent, Subscription, create_app

CHANNELS = ["a", "b.x", "b.y", "c.1", "c.2", "c.1.d", "e", "f", "g", "h"]
PUBLISH_TIMEOUT_S = 3.0  # shorter than the pause of a server
RETRY_LIMIT_S = 60.0

url = os.environ.get("ASGI_SSE_FAULTS_URL", "memory://")
publisher = os.environ.get("ASGI_SSE_FAULTS_PUBLISHER", "")
ledger = os.open(os.environ.get("ASGI_SSE_FAULTS_LEDGER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
broker = Broker(url, publish_timeout=PUBLISH_TIMEOUT_S)
counts = count(1)
publishing: set[asyncio.Task[None]] = set()
tickers: list[asyncio.Task[None]] = []


def note(line: str) -> None:
    os.write(ledger, line.encode() + b"\n")  # a killed process leaves all of one write, or nothing


async def publish_one(channel: str, number: int, *, retry: bool, **fields: Any) -> None:
    event = {"data": {"publisher": publisher, "count": number, "published_at": time.monotonic(), **fields}}
    key = f"{publisher}-{number}" if retry else None  # without a key, the backend alone prevents duplicates
    deadline = time.monotonic() + RETRY_LIMIT_S
    note(f"t {publisher} {number} {channel}")
    for attempt in count(1):
        try:
            event_id = await broker.publish(channel, event, idempotency_key=key)
        except BrokerError:
            note(f"f {publisher} {number}")
            if not retry or time.monotonic() > deadline:
                return
        else:
            note(f"a {publisher} {number} {event_id} {time.monotonic():.6f} {attempt}")
            return


async def tick(rate: float, *, retry: bool) -> None:
    """Publish `rate` events a second, without waiting for acknowledgements."""
    began = time.monotonic()
    for number in count():
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        mine = next(counts)
        task = asyncio.create_task(publish_one(CHANNELS[mine % len(CHANNELS)], mine, retry=retry))
        publishing.add(task)
        task.add_done_callback(publishing.discard)


async def events(request: Request) -> Subscription:
    return broker.subscribe(*request.query.getlist("channel"), last_event_id=request.last_event_id)


async def begin(request: Request) -> AsyncIterator[str]:
    """Start to publish ``rate`` events a second. With ``retry=1``, failed events are retried with the same key."""
    retry = request.query.get("retry") == "1"
    tickers.append(asyncio.create_task(tick(float(request.query["rate"]), retry=retry)))
    yield "begun"


async def finish() -> AsyncIterator[str]:
    """Stop publishing, and wait for the events that were sent."""
    for ticker in tickers:
        ticker.cancel()
    await asyncio.gather(*tickers, *publishing, return_exceptions=True)
    yield "finished"


async def last() -> AsyncIterator[str]:
    """Publish the last event of each channel."""
    await asyncio.gather(*(publish_one(channel, next(counts), retry=True, last=True) for channel in CHANNELS))
    yield "published"


async def figures() -> AsyncIterator[ServerSentEvent]:
    memory = psutil.Process().memory_info().rss
    yield ServerSentEvent({**asdict(broker.statistics()), "rss": memory, "publishing": len(publishing)})


app = create_app(
    {"/events": events, "/begin": begin, "/finish": finish, "/last": last, "/figures": figures}, broker=broker
)
