"""The demo as an ASGI app: a page, and the streams that feed it.

``python -m asgi_sse`` serves it, as does any ASGI server: ``hypercorn asgi_sse.cli.demo.app:app``.
"""

from typing import Any, Final

from asgi_sse.broker import Broker, Subscription
from asgi_sse.middleware.app import create_app
from asgi_sse.middleware.middleware import SSEMiddleware
from asgi_sse.routing.request import HTTPError, Request
from asgi_sse.stream.registry import StreamRegistry

from .limits import command
from .meter import Meter
from .page import PageFile
from .room import Room
from .story import Story
from .stream_list import Roll
from .swarm import Swarm
from .ticks import Ticks

_DRAIN_TIMEOUT: Final = 0.5
"""Seconds until a client that does not read is dropped: Ctrl-C is to end the demo within one."""

_HISTORY: Final = 300
"""Events that each channel keeps, for pages that come back."""

_MOST_PAGES: Final = 200
_POST_BYTES: Final = 4096


def create_demo() -> SSEMiddleware:
    """The demo: the page at ``/``, its stream at ``/live``, a story at ``/story``, figures alone at ``/figures``."""
    registry = StreamRegistry(drain_timeout=_DRAIN_TIMEOUT)

    def recount(_: Subscription) -> None:
        for part in (room, figures, streams):
            part.recount()

    broker = Broker(
        history=_HISTORY,
        max_subscribers=_MOST_PAGES,
        on_join=recount,
        on_leave=recount,
        run_grace=0,  # nothing here is worth waiting for, when the server stops
    )
    room, roll, story, swarm = Room(broker), Roll(registry, broker), Story(broker), Swarm(broker, "/crowd")
    figures, streams = Ticks(broker, "figures", Meter().read), Ticks(broker, roll.channel, roll.read)

    def state() -> dict[str, Any]:
        parts = {"room": room.state(), "streams": roll.state(), "story": story.state(), "swarm": swarm.state()}
        return {"event": "state", "data": parts}

    async def pull_source(request: Request) -> Subscription:
        # All in one stream: over HTTP/1.1 a browser opens six connections to a server, for all of its tabs together.
        await figures.begin()
        await streams.begin()
        channels = figures.channel, streams.channel, room.channel, story.channel, swarm.channel
        return broker.subscribe(*channels, last_event_id=request.last_event_id, snapshot=state)

    async def only_figures(request: Request) -> Subscription:
        await figures.begin()
        return broker.subscribe(figures.channel, last_event_id=request.last_event_id)

    async def say(request: Request) -> None:
        await room.say(await request.json(limit=_POST_BYTES))
        raise HTTPError(204)

    async def tell(_: Request) -> None:
        raise HTTPError(201, await story.begin())

    async def drain(request: Request) -> None:
        await swarm.call(request)
        await swarm.drained()
        # As begin_drain(), but for one thing: who comes back is taken again at once.
        registry.end(registry)
        raise HTTPError(204)

    return create_app(
        {
            "/": PageFile("page.html"),
            "/page.css": PageFile("page.css"),
            "/page.js": PageFile("page.js"),
            "/live": pull_source,
            "/figures": only_figures,
            "/story": broker.endpoint(runs=True),
            "/crowd": broker.channel("crowd"),
            "/say": command(say),
            "/tell": command(tell),
            "/drain": command(drain),
        },
        registry=registry,
        broker=broker,
    )


app = create_demo()
