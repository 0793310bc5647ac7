"""The apps that the tests of channels on servers run, each in a process of its own: `resuming`, `crowded`, `django`.

Each event says which one it is: who published it, and its number among those.
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

registry = StreamRegistry()  # a process runs one of the apps
NO_PING = None  # it would wake a reader that was forgotten


class Noted(Broker):
    """A broker that knows all it has ever published: the number in the id, who published it, its number among those."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.published: list[tuple[int, str, int]] = []
        self._counts: Counter[str] = Counter()

    def next_event(self, who: str, text: str = "") -> dict[str, Any]:
        self._counts[who] += 1
        return {"data": {"who": who, "count": self._counts[who], "text": text}}

    def note(self, event_id: str, who: str) -> None:
        self.published.append((int(event_id.partition("-")[2]), who, self._counts[who]))

    def more(self, channel: str, text: str = "") -> None:
        """Publish the next event of a channel, to which one thread publishes."""
        self.note(self.publish_nowait(channel, self.next_event(channel, text)), channel)

    def figures(self) -> dict[str, Any]:
        names = ("a", "b.x", "b.y", "big")
        return {"subscribers": sum(map(self.subscribers, names)), "published": sorted(self.published)}


def figures(registry: StreamRegistry, broker: Noted, **others: Noted) -> Callable[[], AsyncIterator[ServerSentEvent]]:
    async def endpoint() -> AsyncIterator[ServerSentEvent]:
        streams = {"streams": len(registry), "closed": dict(registry.statistics().closed)}
        more = {name: other.figures() for name, other in others.items()}
        yield ServerSentEvent({**streams, **broker.figures(), **more})

    return endpoint


# Clients that drop and resume

steady = Noted(history=100_000)  # nobody is away for so long
_finished = threading.Event()
_publishers: list[asyncio.Future[None]] = []


async def events(request: Request) -> Subscription:
    return steady.subscribe(*request.query.getlist("channel"), last_event_id=request.last_event_id)


async def publish_here() -> None:
    """About 67 events a second, some of them in one turn of the loop."""
    while not _finished.is_set():
        for _ in range(random.choice([1, 1, 2, 4])):
            steady.more(random.choice(["a", "b.x"]))
        await asyncio.sleep(random.uniform(0, 0.06))


def publish_there() -> None:
    """About 33 a second, from a thread."""
    while not _finished.wait(random.uniform(0, 0.06)):
        steady.more("b.y")


async def begin() -> AsyncIterator[str]:
    _publishers.extend(map(asyncio.ensure_future, (publish_here(), asyncio.to_thread(publish_there))))
    yield "begun"


async def finish() -> AsyncIterator[str]:
    """The last event of each channel comes when nobody publishes any more."""
    _finished.set()
    await asyncio.gather(*_publishers)
    for channel in ("a", "b.x", "b.y"):
        steady.more(channel, "the last one")
    yield "finished"


resuming = create_app(
    {"/events": events, "/begin": begin, "/finish": finish, "/figures": figures(registry, steady)},
    registry=registry,
    ping=NO_PING,
)


# Clients of which some do not read

short = Noted(history=100)
closing = Noted(history=100, overflow="close")


async def patient(request: Request) -> EventSourceResponse:
    return EventSourceResponse(short.subscribe(*request.query.getlist("channel")), send_timeout=None)


async def impatient(request: Request) -> Subscription:
    return short.subscribe(*request.query.getlist("channel"))


async def strict(request: Request) -> EventSourceResponse:
    return EventSourceResponse(closing.subscribe("big"), send_timeout=None)


async def publish(request: Request) -> AsyncIterator[str]:
    """So many events of 1 kB for everybody, and as many of 50 kB for those who do not read."""
    for _ in range(int(request.query["count"])):
        short.more("a", "x" * 1_000)
        for broker in (short, closing):
            broker.more("big", "x" * 50_000)
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


# Django, whose synchronous views run in threads

PUBLISHERS = {"one": "nowait", "two": "nowait", "three": "awaited", "four": "awaited", "five": "thread"}
EACH = 50  # events that each of them publishes


@cache
def django_app() -> SSEMiddleware:
    from asgiref.sync import async_to_sync
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpResponse
    from django.urls import path

    broker = Noted()
    together = threading.Barrier(len(PUBLISHERS))  # they begin when all of them are there

    def publish_nowait(who: str) -> None:
        if who in PUBLISHERS:
            together.wait(10)
        for _ in range(EACH):
            broker.note(broker.publish_nowait("a", broker.next_event(who)), who)

    def nowait(request: Any, who: str) -> Any:
        publish_nowait(who)
        return HttpResponse(threading.current_thread().name)

    def awaited(request: Any, who: str) -> Any:
        together.wait(10)
        for _ in range(EACH):
            broker.note(async_to_sync(broker.publish)("a", broker.next_event(who)), who)
        return HttpResponse(threading.current_thread().name)

    def thread(request: Any, who: str) -> Any:
        """One that the app has started, with no event loop near it."""
        publisher = threading.Thread(target=publish_nowait, args=(who,))
        publisher.start()
        return HttpResponse(publisher.name)

    views = {"nowait": nowait, "awaited": awaited, "thread": thread}
    urls = type("urls", (), {"urlpatterns": [path(f"{name}/<who>", view) for name, view in views.items()]})
    settings.configure(ROOT_URLCONF=urls, ALLOWED_HOSTS=["*"], SECRET_KEY="x")
    sys.setswitchinterval(1e-5)  # or one of them would be done before the next one has its turn
    routes = {"/events": broker.channel("a"), "/figures": figures(registry, broker)}
    return SSEMiddleware(get_asgi_application(), routes, registry=registry, ping=NO_PING)


def __getattr__(name: str) -> Any:
    if name == "django":  # made by who asks for it: the others do without
        return django_app()
    raise AttributeError(name)
