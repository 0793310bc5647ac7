"""`DrainingEvent`: how the source of a stream learns that its server is about to stop."""

import anyio


class DrainingEvent:
    """Set when the server is about to stop. Who looks at it has time left to end its stream by itself.

    Attributes:
        watched: Whether somebody looks.
        grace: Seconds that are left then; ``None``: as many as the drain has.
    """

    __slots__ = ("_event", "_is_set", "grace", "watched")

    def __init__(self, *, grace: float | None = None) -> None:
        self._is_set = False
        self._event: anyio.Event | None = None
        self.watched = bool(grace)
        self.grace = grace

    def is_set(self) -> bool:
        """Whether the server is stopping."""
        return self._is_set

    __bool__ = is_set  # or ``if request.draining:`` would always hold

    async def wait(self) -> None:
        """Wait until the server is stopping."""
        while not self._is_set:
            if self._event is None:
                self._event = anyio.Event()
            await self._event.wait()

    def set(self) -> None:
        """The server is stopping. Called in the stream's own event loop."""
        self._is_set = True
        if self._event is not None:
            self._event.set()
