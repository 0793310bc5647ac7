"""`SourceTask`: runs one source in a task of its own, from its first step to the end of its clean-up."""

import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import anyio
import anyio.lowlevel

from asgi_sse.errors import InvalidEventError
from asgi_sse.runtime.base import Child, EventLoop

logger: Final = logging.getLogger(__name__)

_FORCED_CLEANUP_S: Final = 0.1
"""Seconds that a source has to obey its forced cancellation before it is abandoned."""

Take: TypeAlias = Callable[[Any], Awaitable[None] | None]
"""Takes one item. The task awaits the result before it asks the source for the next item."""


class SourceOwner(Protocol):
    """What a `SourceTask` needs of the stream or run whose source it runs."""

    def describe(self) -> tuple[str, Mapping[str, object]]:
        """Return the owner's name for log records, and their extra fields."""
        ...

    def source_raised(self, error: BaseException) -> None:
        """Handle an error of the source, of `Take`, or of the clean-up. Unless it is of the clean-up, that follows."""
        ...

    def source_ended(self) -> Awaitable[None] | None:
        """Handle the end of the source after its clean-up. Its task awaits the result."""
        ...


class HelperOwner(Protocol):
    """What a `SourceTask` needs of an owner with helpers."""

    def helper_raised(self, error: BaseException) -> None:
        """Handle an error of a helper."""
        ...

    def helper_ended(self) -> None:
        """Handle the end of a helper, after an error too."""
        ...


class _Helper:
    """A task that runs beside the source and ends with it."""

    __slots__ = ("child", "main", "may_cancel")

    def __init__(self, main: Callable[[], Awaitable[None]]) -> None:
        self.main = main
        self.child: Child | None = None
        self.may_cancel = False  # it has taken its first step, and was not cancelled yet


class SourceTask:
    """Makes every ``__anext__``, ``athrow`` and ``aclose`` of a source, and ends the source and its helpers.

    A source ends in up to three steps. `stop` cancels it once, where it waits. `clean_up` gives it time for its
    clean-up, and then cancels it a second time. If it ignores that as well, it is abandoned and runs on alone.

    No step of the source runs inside a cancel scope of ours, because a source may hold scopes of its own over a
    ``yield``.

    Args:
        source: The source; ``None`` if another task produces the events, or nobody does.
        child: The task of another app that produces the events.

    Attributes:
        source: The source, until it is closed.
        child: The source's task, until it has ended or was abandoned.
        stopped: Whether the source was told to end.
    """

    __slots__ = ("_ended", "_helpers", "_may_cancel", "child", "source", "stopped")

    def __init__(self, source: AsyncIterator[Any] | None, child: Child | None = None) -> None:
        self.source = source
        self.child = child
        self.stopped: bool = False
        self._may_cancel = source is None  # a task of ours may only be cancelled once it has taken its first step
        self._helpers: tuple[_Helper, ...] = ()
        self._ended: anyio.Event | None = None  # only while `clean_up` waits

    @property
    def running(self) -> bool:
        """Whether the source or a helper still runs."""
        return self.child is not None or bool(self._helpers)

    def start(self, owner: SourceOwner, take: Take, loop: EventLoop, name: str) -> None:
        """Run the source in a task.

        Args:
            owner: The source's owner. Only the task refers to it.
            take: Called with each item.
            loop: The event loop to run in.
            name: The task's name in task dumps.
        """
        self.child = loop.spawn(partial(self._run, owner, take), name)

    def start_helper(
        self,
        main: Callable[[], Awaitable[None]],
        owner: HelperOwner,
        loop: EventLoop,
        context: contextvars.Context,
    ) -> None:
        """Run `main` in a task that ends with the source, and in `context`."""
        helper = _Helper(main)
        self._helpers += (helper,)
        helper.child = context.run(loop.spawn, partial(self._run_helper, helper, owner), "asgi_sse helper")

    def stop(self) -> None:
        """Tell the source and its helpers to end: each sees one cancellation, at the point where it waits."""
        if not self.stopped:
            self.stopped = True
            if self.child is not None and self._may_cancel:  # otherwise its first step closes the source
                self.child.cancel()
        for helper in self._helpers:
            if helper.may_cancel and helper.child is not None:
                helper.may_cancel = False
                helper.child.cancel()

    async def clean_up(
        self, owner: SourceOwner, seconds: float, option: str = "", *, force_if_cancelled: bool = True
    ) -> None:
        """Wait for the clean-up of the source and its helpers, after `stop`. Force it when the time is over.

        A cancellation of the calling task, and `end_wait`, end the time early. If the source had to be forced, one
        warning says whether it has ended since. If it has not, `running` stays true and the source is abandoned.

        Args:
            owner: The source's owner, for the warning.
            seconds: How long the clean-up may take.
            option: The option that sets `seconds`, for the warning.
            force_if_cancelled: Whether to force the clean-up if the calling task is cancelled.
        """
        force = force_if_cancelled
        limit = "before its request was cancelled"
        try:
            await self._wait(seconds)
            force = True
            if self._ended is not None and self._ended.is_set():
                limit = "before the server's deadline"
            else:
                limit = f"within {seconds:g} s{f' ({option})' if option else ''}"
        finally:  # a cancel scope cannot shield from asyncio's own cancellation
            if force and self.running:
                await self._force(owner, limit)

    def end_wait(self) -> bool:
        """End the wait of `clean_up` now. Return False if it was not called."""
        if self._ended is None:
            return False
        self._ended.set()
        return True

    def release(self) -> None:
        """Forget the source's task: it has ended, or it is abandoned."""
        self.child = None
        self._task_ended()

    async def _wait(self, seconds: float) -> None:
        if self.running:
            self._ended = anyio.Event()
            with anyio.move_on_after(seconds):
                await self._ended.wait()

    async def _force(self, owner: SourceOwner, limit: str) -> None:
        source: Any = self.source
        if source is None:
            source = [helper.main for helper in self._helpers]
        for child in (self.child, *(helper.child for helper in self._helpers)):
            if child is not None:
                child.force_cancel()
        await self._wait(_FORCED_CLEANUP_S)
        outcome = "was abandoned" if self.running else "ended when it was cancelled again"
        name, extra = owner.describe()
        logger.warning("the source of %s was not cleaned up %s and %s: %r", name, limit, outcome, source, extra=extra)

    async def _run(self, owner: SourceOwner, take: Take) -> None:
        source: Any = self.source
        child = self.child  # kept here, because `release` may forget it
        following, step = None, None
        interrupt: type[BaseException] = anyio.get_cancelled_exc_class()
        self._may_cancel = True
        try:
            following = source.__anext__  # an ``__aiter__`` may return an object without it
            step = None if self.stopped else following()
            while step is not None:
                item = await step
                if self.stopped:
                    del item
                    break  # the source swallowed its cancellation and yielded
                try:
                    waiting = take(item)
                    del item  # an idle source would keep its last item
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
            self._shield()  # the owner will call `stop`, and must not cancel the clean-up with it
            owner.source_raised(exc)
        await self._close(owner, child)
        del source, take, following, step  # nothing may keep what the source holds while the owner ends
        waiting = owner.source_ended()
        if waiting is not None:
            await waiting

    async def _throw(self, exc: BaseException) -> Awaitable[Any]:
        """Raise `exc` at the source's ``yield``, so that its traceback names the line and the source can react."""
        throw: Callable[[BaseException], Awaitable[Any]] | None = getattr(self.source, "athrow", None)
        if throw is None:
            raise exc
        if isinstance(exc, InvalidEventError):
            await anyio.lowlevel.checkpoint()  # a source that catches every error must not starve the event loop
        return throw(exc)

    def _shield(self) -> None:
        if self.child is not None:
            self.child.shield()

    async def _close(self, owner: SourceOwner, child: Child | None) -> None:
        self._shield()
        try:
            close = getattr(self.source, "aclose", None)
            if close is not None:
                await close()
        except BaseException as exc:
            if _is_collected(exc, child):
                raise
            owner.source_raised(exc)
        self.source = None  # a response that is kept must not keep what the source holds
        self.release()

    async def _run_helper(self, helper: _Helper, owner: HelperOwner) -> None:
        helper.may_cancel = True
        try:
            if not self.stopped:
                await helper.main()
        except BaseException as exc:
            owner.helper_raised(exc)
        self._helpers = tuple(other for other in self._helpers if other is not helper)
        self._task_ended()
        owner.helper_ended()

    def _task_ended(self) -> None:
        if self._ended is not None and not self.running:
            self._ended.set()


def _is_collected(error: BaseException, child: Child | None) -> bool:
    """Return whether the garbage collector ends the task, so that there is nobody to report `error` to."""
    return isinstance(error, GeneratorExit) and child is not None and not child.running
