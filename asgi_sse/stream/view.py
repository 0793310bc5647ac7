"""`StreamView`: what a running stream shows of itself to the registry, to observers and to metrics."""

from enum import Enum
from typing import TYPE_CHECKING, Any

from asgi_sse.errors import printable

if TYPE_CHECKING:
    from asgi_sse.protocol.asgi import CloseReason
    from asgi_sse.runtime.base import EventLoop
    from asgi_sse.runtime.server import Server

    from .draining import DrainingEvent
    from .writer import StreamWriter


class StreamState(Enum):
    """The three states of a stream. It passes through them in this order."""

    OPEN = "open"
    DRAINING = "draining"  # the rest is being sent, or the source uses its grace period
    CLOSED = "closed"


class StreamView:
    """The figures of one running response.

    Attributes:
        path: The request's path.
        client: The client's address and port, as the server reports them.
        reason: Why the stream is closing; ``None`` while it is not.
        server: The server that the request came through.
        ended_itself: Whether the source ended before anything else ended the stream.
        forced: Whether the drain's deadline ended the stream.
        abandoned: Whether the source still runs although the stream is closed.
    """

    __slots__ = (
        "__weakref__", "_began", "_draining", "_state", "_writer", "abandoned", "client", "ended_itself", "forced",
        "loop", "path", "reason", "server",
    )  # fmt: skip

    _writer: "StreamWriter"

    def __init__(self, path: str, client: Any, server: "Server", draining: "DrainingEvent") -> None:
        self.path: str = path
        self.client: Any = client
        self.server: Server = server
        self.loop: EventLoop = server.loop
        self.reason: CloseReason | None = None
        self.ended_itself: bool = False
        self.forced: bool = False
        self.abandoned: bool = False
        self._draining = draining
        self._state = StreamState.OPEN
        self._began = self.loop.time()

    @property
    def state(self) -> str:
        """``"open"``, ``"draining"`` or ``"closed"``."""
        return self._state.value

    @property
    def opened(self) -> bool:
        """Whether the response start is sent, or is about to be. No other status is possible after that."""
        return self._writer.opened

    @property
    def bytes_sent(self) -> int:
        """Bytes of the body that the server has been given."""
        return self._writer.bytes_sent

    @property
    def age(self) -> float:
        """Seconds since the request came; 0 if the event loop was closed before the stream ended."""
        return 0.0 if self.loop.closed else self.loop.time() - self._began

    @property
    def waiting(self) -> float:
        """Seconds that the client has been taking for the current message; 0 if no send waits."""
        since = self._writer.waiting_since
        return 0.0 if since is None or self.loop.closed else self.loop.time() - since

    @property
    def grace(self) -> float:
        """Seconds that the source was promised to end by itself when the server stops."""
        return self._draining.grace or 0.0

    @property
    def log_fields(self) -> dict[str, object]:
        """The fields of log records about the stream."""
        return {"sse_path": printable(self.path)}

    def describe(self) -> tuple[str, dict[str, object]]:
        """Return the stream's name for log records, and their extra fields."""
        return printable(self.path), self.log_fields

    def __repr__(self) -> str:
        return f"<Stream {printable(self.path)} {self.reason or self.state}>"
