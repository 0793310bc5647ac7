"""`SourceTask`: runs one source in a task of its own, from its first step to its clean-up."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.lowlevel

from asgi_sse.errors import InvalidEventError
from asgi_sse.runtime.base import Child, EventLoop


class Owner(Protocol):
    """Whose source it is."""

    def taker(self) -> Callable[[Any], Awaitable[None] | None]:
        """A function that takes an item. What it gives is awaited before the source is asked for the next one."""
        ...

    def source_raised(self, error: BaseException) -> None:
        """The source, or what takes its items, has raised; its clean-up follows, unless it was that which did."""
        ...

    def source_ended(self) -> Awaitable[None] | None:
        """It is cleaned up. What is given is awaited in its task."""
        ...


class SourceTask:
    """Makes every ``__anext__``, ``athrow`` and ``aclose`` of a source, and stops it.

    No cancel scope is opened around a step: a source may hold scopes of its own over a ``yield``.

    Args:
        source: The source; ``None`` where `child` makes the items by itself, or nobody does.
        child: The task of another app.

    Attributes:
        source: The source, until it is closed.
        child: The task, until it has ended or is left behind.
        stopped: Whether no cancellation is to follow: it was told to stop, or has failed.
    """

    __slots__ = ("_runs", "child", "source", "stopped")

    def __init__(self, source: AsyncIterator[Any] | None, child: Child | None = None) -> None:
        self.source = source
        self.child = child
        self.stopped = False
        self._runs = source is None  # its first step is taken, as that of another app's task long since

    def start(self, owner: Owner, loop: EventLoop, name: str) -> None:
        """Run the source in `loop`, for `owner`, whom its task alone holds; `name` is for task dumps."""
        self.child = loop.spawn(partial(self._run, owner), name)

    def stop(self) -> None:
        """End the source early: it sees one cancellation, where it waits, or where its item does."""
        if not self.stopped:
            self.stopped = True
            if self.child is not None and self._runs:  # else its first step finds that it is to close the source
                self.child.cancel()

    async def _run(self, owner: Owner) -> None:
        source: Any = self.source
        child = self.child  # which its owner may leave behind
        take, following, step = owner.taker(), None, None
        interrupt: type[BaseException] = anyio.get_cancelled_exc_class()
        self._runs = True
        try:
            following = source.__anext__  # which what an ``__aiter__`` gives need not have
            step = None if self.stopped else following()
            while step is not None:
                item = await step
                if self.stopped:
                    del item
                    break  # it swallowed its cancellation, and yielded
                try:
                    waiting = take(item)
                    del item  # or an idle source would keep its last one
                    if waiting is not None:
                        await waiting
                except (InvalidEventError, interrupt) as exc:
                    step = await self._throw(exc)
                else:
                    step = following()
        except StopAsyncIteration:
            pass
        except BaseException as exc:
            if _is_collected(exc, child):
                raise
            owner.source_raised(exc)
        await self._close(owner, child)
        del source, following, step  # or what the source holds would live on while its owner's last word waits
        waiting = owner.source_ended()
        if waiting is not None:
            await waiting

    async def _throw(self, exc: BaseException) -> Awaitable[Any]:
        """Raise `exc` at the source's yield: so its traceback names the line, and a cancellation is seen everywhere."""
        throw: Callable[[BaseException], Awaitable[Any]] | None = getattr(self.source, "athrow", None)
        if throw is None:
            raise exc
        if isinstance(exc, InvalidEventError):
            await anyio.lowlevel.checkpoint()  # or a source that catches each would starve the loop
        return throw(exc)

    async def _close(self, owner: Owner, child: Child | None) -> None:
        if self.child is not None:
            self.child.shield()
        try:
            close = getattr(self.source, "aclose", None)
            if close is not None:
                await close()
        except BaseException as exc:
            if _is_collected(exc, child):
                raise
            owner.source_raised(exc)
        self.source = None  # whoever keeps the response does not keep what the source holds
        self.child = None


def _is_collected(error: BaseException, child: Child | None) -> bool:
    """Whether it ends a task that nobody holds any more, its event loop closed or not: there is nobody to tell."""
    return isinstance(error, GeneratorExit) and child is not None and not child.running
