"""The event loop of asyncio and uvloop: eager tasks drive the sends, callbacks do everything else."""

import asyncio
import contextvars
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final

from asgi_sse.protocol.asgi import Message, Send

from .base import Child, EventLoop, Sender, Wait

_EAGER: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


# Not an attribute of AsyncioLoop: the values refer to it, so an ended loop would leave cycles to the garbage collector.
_locals: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, Any]]] = weakref.WeakKeyDictionary()


class AsyncioLoop(EventLoop):
    """A running event loop of asyncio or uvloop."""

    def __init__(self) -> None:
        # Weak: `current` keeps this object for as long as the loop lives.
        self._ref = weakref.ref(asyncio.get_running_loop())
        # A callback may serve many streams. In the context of the stream that asked for it, the callback would see
        # that stream's variables and keep them alive.
        self._context = contextvars.Context()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self._ref()
        if loop is None:
            raise RuntimeError("the event loop of the stream no longer exists; end streams before their event loop")
        return loop

    @property
    def locals(self) -> dict[Any, Any]:
        loop = self._loop
        values = _locals.get(loop)
        if values is None:
            values = _locals[loop] = {}
        return values

    def time(self) -> float:
        return self._loop.time()

    @property
    def closed(self) -> bool:
        loop = self._ref()
        return loop is None or loop.is_closed()

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._loop.call_soon(callback, context=self._context)

    def call_threadsafe(self, callback: Callable[[], None]) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback, context=self._context)
        except RuntimeError:
            return False
        return True

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self._loop.call_at(when, callback, context=self._context)

    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]], name: str) -> Child:
        # A plain task, whatever the loop's task factory: an eager task would run the source inside the request's step.
        task = asyncio.Task(main(), loop=self._loop, name=name, context=contextvars.copy_context())
        return AsyncioChild(task)

    def coroutines(self) -> Iterable[Any]:
        return [task.get_coro() for task in asyncio.all_tasks(self._loop)]

    def wait(self) -> Wait:
        return AsyncioWait()

    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        return AsyncioSender(self._loop, send, sent, context)


class AsyncioChild(Child):
    """A task of asyncio."""

    __slots__ = ("_shielded", "_task")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task
        self._shielded = False

    def cancel(self) -> None:
        if not self._shielded:
            self._task.cancel()

    def shield(self) -> None:
        self._shielded = True

    @property
    def cancelled(self) -> bool:
        return self._task.cancelling() > 0

    @property
    def running(self) -> bool:
        return asyncio.current_task(self._task.get_loop()) is self._task

    def force_cancel(self) -> None:
        self._task.cancel()


class AsyncioWait(Wait):
    """A wait that is cancelled by cancelling its task and then taking the cancellation back."""

    __slots__ = ("_before", "_cancelled", "_task")

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None  # the task that is in the block
        self._cancelled = 0  # how many times
        self._before = 0

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._before = self._task.cancelling()
            if self._cancelled:
                self._task.cancel()

    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None:
        task, self._task = self._task, None
        if task is None or not self._cancelled:
            return None
        # Take back our own cancellations and no others, as asyncio.timeout does.
        left = task.cancelling()
        for _ in range(self._cancelled):
            left = task.uncancel()
        return left <= self._before and kind is asyncio.CancelledError

    def cancel(self, *, again: bool = False) -> None:
        if (self._cancelled and not again) or (self._task is not None and self._task is asyncio.current_task()):
            return  # a task that cancels itself does not wait, and leaves the block by itself
        self._cancelled += 1
        if self._task is not None:
            self._task.cancel()


class AsyncioSender(Sender):
    """Runs each send as an eager task, so that a send that does not wait takes no turn of the loop.

    None of the servers measured waits while the socket is writable, except hypercorn on trio. Python 3.11
    has no eager tasks, so there each send takes a turn.
    """

    __slots__ = ("_context", "_loop", "_send", "_sent", "_task")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        send: Send,
        sent: Callable[[BaseException | None], None],
        context: contextvars.Context,
    ) -> None:
        self._loop = loop
        self._send = send
        self._sent: Callable[[BaseException | None], None] | None = sent  # None once it is closed
        self._context = context
        self._task: asyncio.Task[None] | None = None

    def start(self, message: Message) -> bool:
        task = asyncio.Task(_awaited(self._send, message), loop=self._loop, context=self._context, **_EAGER)
        if not task.done():
            self._task = task
            task.add_done_callback(self._finished)
            return False
        if (error := _error_of(task)) is not None:
            raise error
        return True

    def use(self, context: contextvars.Context) -> None:
        self._context = context

    def close(self) -> None:
        self._sent = None
        if self._task is not None:
            self._task.cancel()

    async def wait_closed(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def _finished(self, task: asyncio.Task[None]) -> None:
        error = _error_of(task)  # always read it, or asyncio reports an exception that was never retrieved
        self._task = None
        if self._sent is not None:
            self._sent(error)


async def _awaited(send: Send, message: Message) -> None:
    # The send of granian returns an awaitable that is not a coroutine. A task accepts coroutines only.
    await send(message)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    # Only the server cancels a send, when it has closed the connection.
    return ConnectionAbortedError("the send was cancelled") if task.cancelled() else task.exception()
