"""An MCP server over streamable HTTP (``/mcp``) and SSE (``/sse``), with the streams of asgi_sse."""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

import anyio
import mcp.server.sse
import mcp.server.streamable_http
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCResponse

from asgi_sse import SSEMiddleware
from asgi_sse.adapters.sse_starlette import EventSourceResponse

# The SDK has no setting for its response class. It looks up this name in these two modules at each request.
mcp.server.sse.EventSourceResponse = EventSourceResponse  # type: ignore[assignment, attr-defined]
mcp.server.streamable_http.EventSourceResponse = EventSourceResponse  # type: ignore[assignment, attr-defined]

server = MCPServer("example")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
async def count(to: int, ctx: Context[Any, Any], seconds: float = 1.0) -> str:
    """Count slowly and report each step."""
    for number in range(1, to + 1):
        await anyio.sleep(seconds)
        await ctx.report_progress(number, to, f"{number} of {to}")
    return f"counted to {to}"


class Events:
    """The last `MAX` messages that were sent to one session, each with its stream and its id."""

    MAX = 1000

    def __init__(self) -> None:
        self._sent: dict[int, tuple[str, JSONRPCMessage | None]] = {}
        self._next = 1
        self.changed = anyio.Event()

    def add(self, stream: str, message: JSONRPCMessage | None) -> str:
        """Keep a message and return its id."""
        number, self._next = self._next, self._next + 1
        self._sent[number] = stream, message
        self._sent.pop(number - self.MAX, None)
        changed, self.changed = self.changed, anyio.Event()
        changed.set()
        return str(number)

    def stream_of(self, event_id: str) -> str | None:
        """Return the stream of an event, or None if the event is not kept."""
        number = int(event_id) if event_id.isdecimal() and len(event_id) < 10 else 0
        return self._sent[number][0] if number in self._sent else None

    def after(self, event_id: str, stream: str) -> list[tuple[str, JSONRPCMessage]]:
        """Return the later messages of a stream, each with its id."""
        return [
            (str(number), message)
            for number, (of, message) in self._sent.items()
            if message is not None and of == stream and number > int(event_id)
        ]


class Replay(EventStore):
    """Makes streams resumable, with separate events for each session.

    The SDK does not pass the session to a store. It names a stream after the id of its request, which starts at 1 in
    every session. In one shared store, a client could get the events of another one.
    """

    def __init__(self) -> None:
        self._current: ContextVar[Events] = ContextVar("events")
        # Weak: the session's task keeps its events alive, because it inherits the context of the first request.
        self._of_session: WeakValueDictionary[str, Events] = WeakValueDictionary()

    def around(self, app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """Return `app` with the events of the request's session in the context."""

        async def with_events(scope: Any, receive: Any, send: Any) -> None:
            async def send_and_register(message: Any) -> None:
                for name, value in message.get("headers", ()):
                    if name == b"mcp-session-id":
                        self._of_session[value.decode()] = events
                await send(message)

            session = dict(scope.get("headers", ())).get(b"mcp-session-id", b"").decode("latin-1")
            events = self._of_session.get(session) or Events()
            self._current.set(events)
            await app(scope, receive, send_and_register if scope["type"] == "http" else send)

        return with_events

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Keep a message of the current session and return its id."""
        return self._current.get().add(stream_id, message)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send the later messages of the event's stream: those that are kept, then each as it is stored.

        The SDK would take over after the first part, but it loses a message that is stored in between.
        """
        events = self._current.get()
        stream, sent = events.stream_of(last_event_id), last_event_id
        while stream is not None:
            changed = events.changed
            for event_id, message in events.after(sent, stream):
                await send_callback(EventMessage(message, event_id))
                sent = event_id
                if isinstance(message, JSONRPCResponse | JSONRPCError):
                    return None  # the request is answered
            await changed.wait()
        return None


replay = Replay()
starlette = server.streamable_http_app(event_store=replay, retry_interval=1000)  # its lifespan serves both transports
starlette.router.routes.extend(server.sse_app().routes)

app = SSEMiddleware(replay.around(starlette))
