"""`ChangeNotifier`: a base class for objects whose state one task changes and another waits for."""

import anyio


class ChangeNotifier:
    """Lets tasks wait for a change. It costs nothing while nobody waits."""

    __slots__ = ("_changed",)

    def __init__(self) -> None:
        # The waiting task makes it, since anyio cannot make one in a callback of the event loop.
        self._changed: anyio.Event | None = None

    async def wait_changed(self) -> None:
        """Wait for the next call of `notify_changed`."""
        if self._changed is None:
            self._changed = anyio.Event()
        await self._changed.wait()

    def notify_changed(self) -> None:
        """Wake the tasks that wait. Call it in their event loop."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None
