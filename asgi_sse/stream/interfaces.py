"""What a stream needs of the parts around it: its registry, the request and a source that is pulled from.

The protocols are generic over the stream's class, so that this module does not import it.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

from .buffer import Feed

StreamT_contra = TypeVar("StreamT_contra", contravariant=True)


class StreamObserverHost(Protocol[StreamT_contra]):
    """What a stream needs of its registry."""

    def add(self, stream: StreamT_contra) -> None:
        """Add a stream that begins."""
        ...

    def ending(self, stream: StreamT_contra) -> None:
        """Report that the stream's last message is about to be sent."""
        ...

    def discard(self, stream: StreamT_contra) -> None:
        """Remove a stream that has ended. Called again when an abandoned source ends after all."""
        ...

    def arm(self, stream: StreamT_contra, when: float) -> None:
        """Call the stream's `tick` at `when`, in its loop's time, or earlier."""
        ...


class DisconnectWatcher(Protocol):
    """What a stream needs of the request's ``receive()``. `receiver.RequestReceiver` implements it."""

    disconnected: bool

    @property
    def reading(self) -> bool:
        """Whether the app is waiting for the request's body."""
        ...

    def discard(self) -> None:
        """Discard the rest of the request's body."""
        ...

    async def watch(self) -> None:
        """Return when the client has disconnected."""
        ...


class PullSource(Feed, Protocol[StreamT_contra]):
    """A source that the writer pulls from itself, without a task and a buffer. It ends with its stream."""

    @property
    def pushed(self) -> int:
        """The number of events taken so far."""
        ...

    def attach(self, wake: Callable[[], object]) -> None:
        """Call `wake` in the stream's event loop whenever there is something to take."""
        ...

    def joined(self, stream: StreamT_contra) -> None:
        """Accept `stream` as the one that takes."""
        ...

    def detach(self) -> None:
        """Release the stream, which is over."""
        ...

    def stop(self) -> None:
        """Give nothing more: the stream ends early, and its client resumes at what it has not taken."""
        ...

    def keep_alive(self) -> bytes:
        """Return what to send to an idle client instead of a comment; ``b""`` for a comment."""
        ...

    @property
    def pending(self) -> bool:
        """Whether the first event is being made and may fail. The response start waits for it."""
        ...

    @property
    def patient(self) -> bool:
        """Whether the source ends by itself, and therefore gets the whole time of a drain."""
        ...
