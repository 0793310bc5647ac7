"""What asyncio and trio do differently, behind one face: time, callbacks, the source's task, the sends.

Everything else of this package is written once, for both.
"""

import asyncio
import contextvars
import sys
import types
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Final

from anyio.lowlevel import RunVar

from ._types import Message, Send

if TYPE_CHECKING:
    import trio

_EAGER: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}


class Child(ABC):
    """A task that runs apart from the request's, and outlives it where it must."""

    __slots__ = ()

    @abstractmethod
    def cancel(self) -> None:
        """Interrupt the task once, at the point where it waits. What it does then is not interrupted."""

    @abstractmethod
    def spare(self) -> None:
        """The task cleans up from now on: a cancellation that has not reached it yet shall not either."""

    @abstractmethod
    def cancel_again(self) -> None:
        """Interrupt it a last time, its clean-up included."""


class Sender(ABC):
    """Makes the calls of one ``send``, in a private context, never two at a time."""

    __slots__ = ()

    @abstractmethod
    def start(self, message: Message) -> bool:
        """Send a message. True: it is sent; False: under way, and the callback will be called.

        Raises:
            BaseException: What ``send`` raised, if it did so at once.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel what is under way; the callback is not called any more."""

    @abstractmethod
    async def wait_closed(self) -> None:
        """Wait until what was under way is over."""


class Wait(ABC):
    """What the current task waits for in this block, another one can call off.

    A cancel scope, as anyio's, without the 1 KiB that each of those costs an idle stream on asyncio. Any
    other cancellation passes through.
    """

    __slots__ = ()

    @abstractmethod
    def __enter__(self) -> None: ...

    @abstractmethod
    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None: ...

    @abstractmethod
    def call_off(self) -> None:
        """End the wait, or the one that is still to come."""


class EventLoop(ABC):
    """The event loop, or trio run, that the caller is in."""

    @abstractmethod
    def time(self) -> float:
        """The loop's clock, in seconds."""

    @abstractmethod
    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call in the next turn, in the order of asking."""

    @abstractmethod
    def call_threadsafe(self, callback: Callable[[], None]) -> bool:
        """Call in the next turn, from any thread. False: the loop is closed."""

    @abstractmethod
    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call at a time of `time()`. Nothing is given that would cancel it: it would keep the loop alive."""

    @abstractmethod
    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]]) -> Child:
        """Run `main`, which must not raise, in a task and a context of its own."""

    @abstractmethod
    def wait(self) -> Wait:
        """A wait for the current task."""

    @abstractmethod
    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        """What makes the calls of `send`, in `context`; `sent` is called after each that was under way."""


class _AsyncioLoop(EventLoop):
    def __init__(self) -> None:
        # Weak, since anyio keeps a RunVar's value as long as its loop lives.
        self._ref = weakref.ref(asyncio.get_running_loop())
        # For callbacks that serve many streams: in the context of the one that asked, they would see its variables and
        # keep them.
        self._context = contextvars.Context()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = self._ref()
        if loop is None:
            raise RuntimeError("the event loop of the stream is gone")
        return loop

    def time(self) -> float:
        return self._loop.time()

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

    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]]) -> Child:
        # A plain task, whatever the loop's task factory: an eager one would run the source inside the request's step.
        task = asyncio.Task(main(), loop=self._loop, name="asgi_sse source", context=contextvars.copy_context())
        return _AsyncioChild(task)

    def wait(self) -> Wait:
        return _AsyncioWait()

    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        return _AsyncioSender(self._loop, send, sent, context)


class _AsyncioChild(Child):
    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        self._task.cancel()

    def spare(self) -> None:
        pass  # asyncio raises a cancellation at the next step, whatever that is

    def cancel_again(self) -> None:
        self._task.cancel()


class _AsyncioWait(Wait):
    __slots__ = ("_before", "_called_off", "_task")

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = None  # while it is in the block
        self._called_off = False
        self._before = 0

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._before = self._task.cancelling()
            if self._called_off:
                self._task.cancel()

    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None:
        task, self._task = self._task, None
        # As asyncio.timeout does: take our own cancellation back, and no other one.
        return (
            self._called_off and kind is asyncio.CancelledError and task is not None and task.uncancel() <= self._before
        )

    def call_off(self) -> None:
        if self._called_off or (self._task is not None and self._task is asyncio.current_task()):
            return  # in the second case it does not wait: it is about to come out by itself
        self._called_off = True
        if self._task is not None:
            self._task.cancel()


class _AsyncioSender(Sender):
    """Each send is driven as an eager task, so that one which does not wait needs no turn of the loop.

    None of the servers measured waits while the socket is writable, but for hypercorn on trio.
    Python 3.11 has no eager tasks: there each send takes a turn.
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
        self._sent: Callable[[BaseException | None], None] | None = sent  # until it is closed
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

    def close(self) -> None:
        self._sent = None
        if self._task is not None:
            self._task.cancel()

    async def wait_closed(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def _finished(self, task: asyncio.Task[None]) -> None:
        error = _error_of(task)  # read even where nobody asks, or asyncio would report it as never retrieved
        self._task = None
        if self._sent is not None:
            self._sent(error)


async def _awaited(send: Send, message: Message) -> None:
    # granian's send gives an awaitable that is no coroutine, which no task takes.
    await send(message)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    # Who but the server would cancel a send? It has closed the connection.
    return ConnectionAbortedError("the send was cancelled") if task.cancelled() else task.exception()


class _TrioLoop(EventLoop):
    # System tasks, not a nursery of the request's: a source that ignores its cancellation must be left behind, and
    # no nursery lets go of a child.
    def __init__(self, module: types.ModuleType) -> None:
        self._trio = module
        self._token: trio.lowlevel.TrioToken = module.lowlevel.current_trio_token()

    def time(self) -> float:
        now: float = self._trio.current_time()
        return now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._token.run_sync_soon(callback)

    def call_threadsafe(self, callback: Callable[[], None]) -> bool:
        try:
            self._token.run_sync_soon(callback)
        except self._trio.RunFinishedError:
            return False
        return True

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        async def wait() -> None:
            await self._trio.sleep_until(when)
            callback()

        self._trio.lowlevel.spawn_system_task(wait, name="asgi_sse timer")

    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]]) -> Child:
        child = _TrioChild(self._trio)
        context = contextvars.copy_context()
        self._trio.lowlevel.spawn_system_task(child.run, main, name="asgi_sse source", context=context)
        return child

    def wait(self) -> Wait:
        return _TrioWait(self._trio)

    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        return _TrioSender(self._trio, send, sent, context)


class _TrioChild(Child):
    """A task that one cancellation interrupts once, as on asyncio.

    trio cancels a scope for good: every later wait raises again, which would cut short a ``finally``
    that waits. So the task runs in two scopes; the outer one is cancelled, and the inner one turns
    into a shield at the moment in which the first ``Cancelled`` is handed in.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, module: types.ModuleType) -> None:
        self._outer: trio.CancelScope = module.CancelScope()
        self._inner: trio.CancelScope = module.CancelScope()

    async def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with self._outer, self._inner:
            await self._interruptible(main())

    def cancel(self) -> None:
        self._outer.cancel()

    def spare(self) -> None:
        self._inner.shield = True

    def cancel_again(self) -> None:
        self._inner.shield = False

    @types.coroutine
    def _interruptible(self, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        try:
            trap = coroutine.send(None)
            while True:
                try:
                    outcome = yield trap
                except BaseException as exc:  # trio throws for a trap that it does not know, such as one of asyncio's
                    trap = coroutine.throw(exc)
                    continue
                # What trio hands to a waiting task is an outcome.Value or outcome.Error. An Error while our scope is
                # cancelled is that cancellation, or else coincides with it, and is as good a reason to clean up.
                if self._outer.cancel_called and hasattr(outcome, "error"):
                    self._inner.shield = True
                trap = coroutine.send(outcome)
        except StopIteration:
            return
        finally:
            coroutine.close()


class _TrioWait(Wait):
    __slots__ = ("_scope",)

    def __init__(self, module: types.ModuleType) -> None:
        self._scope: trio.CancelScope = module.CancelScope()

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None:
        return self._scope.__exit__(kind, exc, traceback)  # type: ignore[arg-type]

    def call_off(self) -> None:
        self._scope.cancel()


class _TrioSender(Sender):
    """One writer task a stream, since trio starts no task but in a later turn."""

    __slots__ = ("_context", "_ended", "_message", "_scope", "_send", "_sent", "_trio", "_wake")

    def __init__(
        self,
        module: types.ModuleType,
        send: Send,
        sent: Callable[[BaseException | None], None],
        context: contextvars.Context,
    ) -> None:
        self._trio = module
        self._send = send
        self._sent: Callable[[BaseException | None], None] | None = sent  # until it is closed
        self._context = context
        self._scope: trio.CancelScope = module.CancelScope()
        self._wake: trio.Event = module.Event()
        self._message: Message | None = None
        self._ended: trio.Event | None = None  # of the writer, once it has started

    def start(self, message: Message) -> bool:
        self._message = message
        if self._ended is not None:
            self._wake.set()
        else:
            self._ended = self._trio.Event()
            self._trio.lowlevel.spawn_system_task(self._run, name="asgi_sse writer", context=self._context)
        return False

    def close(self) -> None:
        self._sent = None
        self._scope.cancel()

    async def wait_closed(self) -> None:
        if self._ended is not None:
            await self._ended.wait()

    async def _run(self) -> None:
        try:
            with self._scope:
                await self._write()
        finally:
            if self._ended is not None:
                self._ended.set()

    async def _write(self) -> None:
        while self._sent is not None:
            message, self._message = self._message, None
            if message is None:
                self._wake = self._trio.Event()
                await self._wake.wait()
                continue
            error: BaseException | None = None
            try:
                await self._send(message)
            except self._trio.Cancelled:
                raise
            except Exception as exc:
                error = exc
            if self._sent is not None:
                self._sent(error)


_current: RunVar[EventLoop] = RunVar("asgi_sse event loop")


def current_loop() -> EventLoop:
    """The face of the event loop that the caller runs in.

    Raises:
        RuntimeError: There is none.
    """
    try:
        return _current.get()
    except LookupError:
        trio = sys.modules.get("trio")
        loop = _TrioLoop(trio) if trio is not None and _in_task_of(trio) else _AsyncioLoop()
        _current.set(loop)
        return loop


def _in_task_of(trio: types.ModuleType) -> bool:
    # Asked of trio, not of asyncio: in trio's guest mode an asyncio loop runs as well.
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True
