"""`DrainingEvent`, by which a source learns that its server is about to stop."""

import anyio


class DrainingEvent:
    """An event that is set when the server is about to stop. A source that watches it may end by itself.

    Attributes:
        watched: Whether the source watches. Only then does it get a grace period.
        grace: Seconds of the grace period; ``None`` for the whole time of the drain.
    """

    __slots__ = ("_event", "_is_set", "grace", "watched")

    def __init__(self, *, grace: float | None = None) -> None:
        self._is_set = False
        self._event: anyio.Event | None = None
        self.watched: bool = bool(grace)
        self.grace: float | None = grace

    def is_set(self) -> bool:
        """Return whether the server is stopping."""
        return self._is_set

    __bool__ = is_set  # otherwise ``if request.draining:`` would always be true

    async def wait(self) -> None:
        """Wait until the server is stopping."""
        while not self._is_set:
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()

    def set(self) -> None:
        """Report that the server is stopping. Call it in the stream's event loop."""
        self._is_set = True
        if self._event is not None:
            self._event.set()
