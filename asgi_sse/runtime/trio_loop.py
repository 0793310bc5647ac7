"""The event loop of trio: system tasks run the sources, which are cancelled once as on asyncio, and the writers."""

import contextvars
import types
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from typing import Any, Final

import trio

from asgi_sse.protocol.asgi import Message, Send

from .base import Child, EventLoop, Sender, Wait


class TrioLoop(EventLoop):
    """A run of trio."""

    # System tasks, not a nursery of the request: the stream must be able to abandon a source that ignores its
    # cancellation, and a nursery waits for every child.
    def __init__(self) -> None:
        self._locals: dict[Any, Any] = {}
        self._token = trio.lowlevel.current_trio_token()
        self._clock = trio.lowlevel.current_clock()  # other threads can ask it too

    @property
    def locals(self) -> dict[Any, Any]:
        return self._locals

    def time(self) -> float:
        return self._clock.current_time()

    @property
    def closed(self) -> bool:
        return not self.call_threadsafe(_do_nothing)  # trio has no other way to ask

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._token.run_sync_soon(callback)

    def call_threadsafe(self, callback: Callable[[], None]) -> bool:
        try:
            self._token.run_sync_soon(callback)
        except trio.RunFinishedError:
            return False
        return True

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep_until(when)
            callback()

        with suppress(RuntimeError):  # the run ends and takes no more tasks: nobody needs the timer
            trio.lowlevel.spawn_system_task(wait, name="asgi_sse timer")

    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]], name: str) -> Child:
        child = TrioChild()
        context = contextvars.copy_context()
        trio.lowlevel.spawn_system_task(child.run, main, name=name, context=context)
        return child

    def coroutines(self) -> Iterable[Any]:
        task: trio.lowlevel.Task | None = trio.lowlevel.current_task()
        while task is not None:  # up to the root task
            yield task.coro
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None

    def wait(self) -> Wait:
        return TrioWait()

    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        return TrioSender(send, sent, context)


_current: Final[trio.lowlevel.RunVar[TrioLoop]] = trio.lowlevel.RunVar("asgi_sse event loop")


def current_trio_loop() -> TrioLoop:
    """Return the loop of the trio run that the caller is in."""
    try:
        return _current.get()
    except LookupError:
        loop = TrioLoop()
        _current.set(loop)
        return loop


class TrioChild(Child):
    """A task that a cancellation interrupts once, as on asyncio.

    trio cancels a scope for good: every later wait raises again, which would cut short a ``finally`` that
    waits. So the task runs in two scopes. `cancel` cancels the outer one. The inner one becomes a shield
    when the task resumes after the cancellation was delivered to it.
    """

    __slots__ = ("_delivered", "_inner", "_outer")

    def __init__(self) -> None:
        self._delivered = False
        self._outer = trio.CancelScope()
        self._inner = trio.CancelScope()

    async def run(self, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with self._outer, self._inner:
            await self._interruptible(main())

    def cancel(self) -> None:
        self._outer.cancel()

    def shield(self) -> None:
        self._inner.shield = True

    @property
    def cancelled(self) -> bool:
        return True  # trio raises Cancelled only in a task whose scope was cancelled

    @property
    def running(self) -> bool:
        return True  # trio never collects a task before its end

    def force_cancel(self) -> None:
        self._outer.cancel()
        self._inner.shield = False

    @types.coroutine
    def _interruptible(self, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        try:
            trap = coroutine.send(None)
            while True:
                try:
                    outcome = yield self._with_notice(trap)
                except BaseException as exc:  # trio throws if it does not know the trap, such as one of asyncio
                    trap = coroutine.throw(exc)
                    continue
                delivered = self._delivered
                trap = coroutine.send(outcome)
                # Set the shield after the step. trio's checkpoint() waits in a scope of its own, which would take the
                # cancellation for its own if a shield hid ours.
                if delivered:
                    self._inner.shield = True
        except StopIteration:
            return
        finally:
            coroutine.close()

    def _with_notice(self, trap: Any) -> Any:
        # trio calls a wait's abort function to deliver a cancellation. A nursery raises it only when its children have
        # ended, so the outcome with which the task resumes does not show whether the cancellation was delivered.
        abort = getattr(trap, "abort_func", None)
        if abort is None:
            return trap

        def abort_and_note(raise_cancel: Any) -> Any:
            self._delivered = self._delivered or self._outer.cancel_called
            return abort(raise_cancel)

        return type(trap)(abort_and_note)


class TrioWait(Wait):
    """A cancel scope of trio."""

    __slots__ = ("_scope",)

    def __init__(self) -> None:
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None:
        return self._scope.__exit__(kind, exc, traceback)  # type: ignore[arg-type]

    def cancel(self, *, again: bool = False) -> None:  # noqa: ARG002 (trio cancels for good)
        self._scope.cancel()


class TrioSender(Sender):
    """Runs one writer task per stream, because trio starts a new task in a later turn only."""

    __slots__ = ("_context", "_ended", "_message", "_scope", "_send", "_sent", "_wake")

    def __init__(
        self,
        send: Send,
        sent: Callable[[BaseException | None], None],
        context: contextvars.Context,
    ) -> None:
        self._send = send
        self._sent: Callable[[BaseException | None], None] | None = sent  # None once it is closed
        self._context = context
        self._scope = trio.CancelScope()
        self._wake = trio.Event()
        self._message: Message | None = None
        self._ended: trio.Event | None = None  # set when the writer has ended; None before it starts

    def start(self, message: Message) -> bool:
        self._message = message
        if self._ended is not None:
            self._wake.set()
        else:
            self._ended = trio.Event()
            trio.lowlevel.spawn_system_task(self._run, name="asgi_sse writer", context=self._context)
        return False

    def use(self, context: contextvars.Context) -> None:
        self._context = context

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
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            error: BaseException | None = None
            try:
                await self._send(message)
            except trio.Cancelled:
                raise
            except Exception as exc:
                error = exc
            if self._sent is not None:
                self._sent(error)


def _do_nothing() -> None:
    """Do nothing; `TrioLoop.closed` schedules this to see whether the run still accepts callbacks."""
