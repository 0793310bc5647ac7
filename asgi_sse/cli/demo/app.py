"""The demo as an ASGI app: the page and its streams.

``python -m asgi_sse`` serves it. Any ASGI server can: ``hypercorn asgi_sse.cli.demo.app:app``.
"""

from typing import Any, Final

from asgi_sse.broker import Broker, Subscription
from asgi_sse.middleware.app import create_app
from asgi_sse.middleware.middleware import SSEMiddleware
from asgi_sse.routing.request import HTTPError, Request
from asgi_sse.stream.registry import StreamRegistry

from .limits import page_command
from .meter import Meter
from .page import PageFile
from .room import Room
from .story import Story
from .stream_list import StreamList
from .swarm import Swarm
from .ticks import Ticks

_DRAIN_TIMEOUT_S: Final = 0.5
"""Time for clients that do not read at shutdown. Ctrl-C should end the demo within a second."""

_HISTORY: Final = 300
"""Events that each channel keeps for pages that reconnect."""

_MAX_PAGES: Final = 200
_MAX_POST_BYTES: Final = 4096


def create_demo() -> SSEMiddleware:
    """Create the app: the page at ``/``, its stream at ``/live``, a story at ``/story``, the load at ``/figures``."""
    registry = StreamRegistry(drain_timeout=_DRAIN_TIMEOUT_S)

    def update_counts(_: Subscription) -> None:
        for part in (room, figures, streams):
            part.update_count()

    broker = Broker(
        history=_HISTORY,
        max_subscribers=_MAX_PAGES,
        on_join=update_counts,
        on_leave=update_counts,
        run_grace=0,  # at shutdown, no run of the demo is worth waiting for
    )
    room, stream_list, story = Room(broker), StreamList(registry, broker), Story(broker)
    swarm = Swarm(broker, "/crowd")
    figures = Ticks(broker, "figures", Meter().read)
    streams = Ticks(broker, stream_list.channel, stream_list.read)

    def state() -> dict[str, Any]:
        parts = {"room": room.state(), "streams": stream_list.state(), "story": story.state(), "swarm": swarm.state()}
        return {"event": "state", "data": parts}

    async def live(request: Request) -> Subscription:
        # One stream for all channels: over HTTP/1.1, the tabs of a browser share six connections to a server.
        await figures.begin()
        await streams.begin()
        channels = figures.channel, streams.channel, room.channel, story.channel, swarm.channel
        return broker.subscribe(*channels, last_event_id=request.last_event_id, snapshot=state)

    async def only_figures(request: Request) -> Subscription:
        await figures.begin()
        return broker.subscribe(figures.channel, last_event_id=request.last_event_id)

    async def say(request: Request) -> None:
        await room.say(await request.json(limit=_MAX_POST_BYTES))
        raise HTTPError(204)

    async def tell(_: Request) -> None:
        raise HTTPError(201, await story.begin())

    async def drain(request: Request) -> None:
        await swarm.connect(request)
        await swarm.announce_drain()
        # Ends the streams as begin_drain() does, but reconnecting clients get a stream again at once.
        registry.end(registry)
        raise HTTPError(204)

    return create_app(
        {
            "/": PageFile("page.html"),
            "/page.css": PageFile("page.css"),
            "/page.js": PageFile("page.js"),
            "/streams.js": PageFile("streams.js"),
            "/live": live,
            "/figures": only_figures,
            "/story": broker.endpoint(runs=True),
            "/crowd": broker.channel("crowd"),
            "/say": page_command(say),
            "/tell": page_command(tell),
            "/drain": page_command(drain),
        },
        registry=registry,
        broker=broker,
    )


app: Final = create_demo()
