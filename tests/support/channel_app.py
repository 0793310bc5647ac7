"""The apps of the tests of channels on real servers: `resuming`, `crowded` and `django`.

Each test runs one of them in a process of its own. Each event has its publisher and a count, so that a lost or repeated
event is seen.
"""

import asyncio
import random
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import cache
from typing import Any

from asgi_sse import (
    Broker,
    EventSourceResponse,
    Request,
    ServerSentEvent,
    SSEMiddleware,
    StreamRegistry,
    Subscription,
    create_app,
)

registry = StreamRegistry()  # one for all apps, since a process runs one app only
NO_PING = None  # a keep-alive would hide that a subscriber was not woken


class Recorder(Broker):
    """A broker that records the offset, the publisher and the publisher's count of each event."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.published: list[tuple[int, str, int]] = []
        self._counts: Counter[str] = Counter()

    def next_event(self, publisher: str, text: str = "") -> dict[str, Any]:
        self._counts[publisher] += 1
        return {"data": {"publisher": publisher, "count": self._counts[publisher], "text": text}}

    def record(self, event_id: str, publisher: str) -> None:
        self.published.append((int(event_id.partition("-")[2]), publisher, self._counts[publisher]))

    def publish_next(self, channel: str, text: str = "") -> None:
        """Publish the next event of a channel to which only one thread publishes."""
        self.record(self.publish_nowait(channel, self.next_event(channel, text)), channel)

    def figures(self) -> dict[str, Any]:
        names = ("a", "b.x", "b.y", "big")
        return {"subscribers": sum(map(self.subscribers, names)), "published": sorted(self.published)}


def figures(
    registry: StreamRegistry, broker: Recorder, **others: Recorder
) -> Callable[[], AsyncIterator[ServerSentEvent]]:
    async def endpoint() -> AsyncIterator[ServerSentEvent]:
        streams = {"streams": len(registry), "closed": dict(registry.statistics().closed)}
        more = {name: other.figures() for name, other in others.items()}
        yield ServerSentEvent({**streams, **broker.figures(), **more})

    return endpoint


# Clients that drop and resume

steady = Recorder(history=100_000)  # no client is away for longer
_finished = threading.Event()
_publishers: list[asyncio.Future[None]] = []


async def events(request: Request) -> Subscription:
    return steady.subscribe(*request.query.getlist("channel"), last_event_id=request.last_event_id)


async def publish_in_loop() -> None:
    """Publish about 67 events a second, some of them in one turn of the loop."""
    while not _finished.is_set():
        for _ in range(random.choice([1, 1, 2, 4])):
            steady.publish_next(random.choice(["a", "b.x"]))
        await asyncio.sleep(random.uniform(0, 0.06))


def publish_in_thread() -> None:
    """Publish about 33 events a second from a thread."""
    while not _finished.wait(random.uniform(0, 0.06)):
        steady.publish_next("b.y")


async def begin() -> AsyncIterator[str]:
    _publishers.extend(map(asyncio.ensure_future, (publish_in_loop(), asyncio.to_thread(publish_in_thread))))
    yield "begun"


async def finish() -> AsyncIterator[str]:
    """End all publishers, then publish the last event of each channel."""
    _finished.set()
    await asyncio.gather(*_publishers)
    for channel in ("a", "b.x", "b.y"):
        steady.publish_next(channel, "the last one")
    yield "finished"


resuming = create_app(
    {"/events": events, "/begin": begin, "/finish": finish, "/figures": figures(registry, steady)},
    registry=registry,
    ping=NO_PING,
)


# Clients, including some that do not read

short = Recorder(history=100)
closing = Recorder(history=100, overflow="close")


async def patient(request: Request) -> EventSourceResponse:
    return EventSourceResponse(short.subscribe(*request.query.getlist("channel")), send_timeout=None)


async def impatient(request: Request) -> Subscription:
    return short.subscribe(*request.query.getlist("channel"))


async def strict(request: Request) -> EventSourceResponse:
    return EventSourceResponse(closing.subscribe("big"), send_timeout=None)


async def publish(request: Request) -> AsyncIterator[str]:
    """Publish `count` events of 1 kB for all clients, and as many of 50 kB for those that do not read."""
    for _ in range(int(request.query["count"])):
        short.publish_next("a", "x" * 1_000)
        for broker in (short, closing):
            broker.publish_next("big", "x" * 50_000)
    yield "published"


crowded = create_app(
    {
        "/patient": patient,
        "/impatient": impatient,
        "/strict": strict,
        "/publish": publish,
        "/figures": figures(registry, short, closing=closing),
    },
    registry=registry,
    send_timeout=1,
    ping=NO_PING,
)


# Django, which runs synchronous views in threads

PUBLISHERS = {"one": "nowait", "two": "nowait", "three": "awaited", "four": "awaited", "five": "thread"}
EACH = 50  # events that each of them publishes


@cache
def django_app() -> SSEMiddleware:
    from asgiref.sync import async_to_sync
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse
    from django.urls import path

    broker = Recorder()
    all_ready = threading.Barrier(len(PUBLISHERS))  # so that the publishers run at the same time

    def publish_nowait(publisher: str) -> None:
        if publisher in PUBLISHERS:
            all_ready.wait(10)
        for _ in range(EACH):
            broker.record(broker.publish_nowait("a", broker.next_event(publisher)), publisher)

    def nowait(request: Any, publisher: str) -> Any:
        publish_nowait(publisher)
        return HttpResponse(threading.current_thread().name)

    def awaited(request: Any, publisher: str) -> Any:
        all_ready.wait(10)
        for _ in range(EACH):
            broker.record(async_to_sync(broker.publish)("a", broker.next_event(publisher)), publisher)
        return HttpResponse(threading.current_thread().name)

    def thread(request: Any, publisher: str) -> Any:
        """Publish in a thread that the app starts, which has no event loop."""
        started = threading.Thread(target=publish_nowait, args=(publisher,))
        started.start()
        return HttpResponse(started.name)

    views = {"nowait": nowait, "awaited": awaited, "thread": thread}
    urls = type("urls", (), {"urlpatterns": [path(f"{name}/<publisher>", view) for name, view in views.items()]})
    settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY="x")
    sys.setswitchinterval(1e-5)  # otherwise one thread would finish before the next one has a turn
    routes = {"/events": broker.channel("a"), "/figures": figures(registry, broker)}
    app: Any = get_asgi_application()  # its type stubs accept only a dict as the scope
    return SSEMiddleware(app, routes, registry=registry, ping=NO_PING)


def __getattr__(name: str) -> Any:
    if name == "django":  # made on demand, because the other apps do not need Django
        return django_app()
    raise AttributeError(name)
