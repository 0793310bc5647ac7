"""The app that the nodes of the tests of faults run, each in a process of its own.

Each node publishes by itself, and writes down what became of each event before anything else can happen to it:

- ``t WHO COUNT CHANNEL``: it is going to be published;
- ``a WHO COUNT ID TIME TRIES``: it was acknowledged, at the so many-th try;
- ``f WHO COUNT``: publishing it raised `BrokerError`.
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
TIMEOUT = 3.0  # seconds after which publishing fails: less than an engine is paused for
GIVEN_UP = 60.0  # seconds after which it is not tried again

url = os.environ.get("ASGI_SSE_FAULTS_URL", "memory://")
who = os.environ.get("ASGI_SSE_FAULTS_NODE", "")
ledger = os.open(os.environ.get("ASGI_SSE_FAULTS_LEDGER", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
broker = Broker(url, publish_timeout=TIMEOUT)
counts = count(1)
publishing: set[asyncio.Task[None]] = set()
tickers: list[asyncio.Task[None]] = []


def note(line: str) -> None:
    os.write(ledger, line.encode() + b"\n")  # of one write, a process that is killed leaves all or nothing


async def publish_one(channel: str, number: int, *, again: bool, **said: Any) -> None:
    event = {"data": {"who": who, "count": number, "at": time.monotonic(), **said}}
    key = f"{who}-{number}" if again else None  # without, the back end alone sees that it is published once
    deadline = time.monotonic() + GIVEN_UP
    note(f"t {who} {number} {channel}")
    for tries in count(1):
        try:
            event_id = await broker.publish(channel, event, idempotency_key=key)
        except BrokerError:
            note(f"f {who} {number}")
            if not again or time.monotonic() > deadline:
                return
        else:
            note(f"a {who} {number} {event_id} {time.monotonic():.6f} {tries}")
            return


async def tick(rate: float, *, again: bool) -> None:
    """Publish so many a second, whether those before are acknowledged or not."""
    began = time.monotonic()
    for number in count():
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        mine = next(counts)
        task = asyncio.create_task(publish_one(CHANNELS[mine % len(CHANNELS)], mine, again=again))
        publishing.add(task)
        task.add_done_callback(publishing.discard)


async def events(request: Request) -> Subscription:
    return broker.subscribe(*request.query.getlist("channel"), last_event_id=request.last_event_id)


async def begin(request: Request) -> AsyncIterator[str]:
    """Publish from now on: ``rate`` events a second; with ``again=1`` those that fail once more, with the same key."""
    again = request.query.get("again") == "1"
    tickers.append(asyncio.create_task(tick(float(request.query["rate"]), again=again)))
    yield "begun"


async def finish() -> AsyncIterator[str]:
    """Publish no more, and wait for what is under way."""
    for ticker in tickers:
        ticker.cancel()
    await asyncio.gather(*tickers, *publishing, return_exceptions=True)
    yield "finished"


async def last() -> AsyncIterator[str]:
    """Publish the last event of each channel."""
    await asyncio.gather(*(publish_one(channel, next(counts), again=True, last=True) for channel in CHANNELS))
    yield "published"


async def figures() -> AsyncIterator[ServerSentEvent]:
    memory = psutil.Process().memory_info().rss
    yield ServerSentEvent({**asdict(broker.statistics()), "rss": memory, "publishing": len(publishing)})


app = create_app(
    {"/events": events, "/begin": begin, "/finish": finish, "/last": last, "/figures": figures}, broker=broker
)
