"""The interface to an event loop that the rest of the package uses, for asyncio and trio alike."""

import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from asgi_sse.protocol.asgi import Message, Send


class Child(ABC):
    """A task that runs beside the task of the request, and outlives it if necessary."""

    __slots__ = ()

    @abstractmethod
    def cancel(self) -> None:
        """Interrupt the task once, where it waits. What the task does after that is not interrupted."""

    @abstractmethod
    def shield(self) -> None:
        """Protect the task from `cancel` from now on, also from a cancellation that has not reached it yet.

        The task calls this when it begins its clean-up.
        """

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether the task was cancelled.

        If it was not, a cancellation error that leaves the task comes from something that the task waited for.
        """

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether the caller runs inside the task.

        It does not when asyncio collects the task as garbage: then GeneratorExit is raised in it from elsewhere.
        """

    @abstractmethod
    def force_cancel(self) -> None:
        """Interrupt the task a last time, even in its clean-up."""


class Sender(ABC):
    """Calls one ``send`` in a private context, never twice at a time."""

    __slots__ = ()

    @abstractmethod
    def start(self, message: Message) -> bool:
        """Begin to send a message.

        Returns:
            True if the message is sent; False if the send is under way and the callback will be called.

        Raises:
            BaseException: What ``send`` raised, if it raised at once.
        """

    @abstractmethod
    def use(self, context: contextvars.Context) -> None:
        """Use another private context. Call this before the first message."""

    @abstractmethod
    def close(self) -> None:
        """Cancel the send that is under way. The callback is not called any more."""

    @abstractmethod
    async def wait_closed(self) -> None:
        """Wait until the send that was under way has ended."""


class Wait(ABC):
    """A block in which the current task waits, and whose wait another task can cancel.

    It works like a cancel scope of anyio, but an idle stream saves the 1 KiB that each of those costs on
    asyncio. Any other cancellation passes through.
    """

    __slots__ = ()

    @abstractmethod
    def __enter__(self) -> None: ...

    @abstractmethod
    def __exit__(self, kind: object, exc: object, traceback: object) -> bool | None: ...

    @abstractmethod
    def cancel(self, *, again: bool = False) -> None:
        """End the wait, also one that has not begun yet.

        Args:
            again: Cancel once more if the task ignored the first cancellation.
        """


class EventLoop(ABC):
    """An event loop of asyncio, or a run of trio."""

    @property
    @abstractmethod
    def locals(self) -> dict[Any, Any]:
        """The values of this loop, for `current.LoopLocal`. Ask in the loop only."""

    @abstractmethod
    def time(self) -> float:
        """Return the loop's clock, in seconds."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the loop has ended."""

    @abstractmethod
    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the next turn. Callbacks keep their order."""

    @abstractmethod
    def call_threadsafe(self, callback: Callable[[], None]) -> bool:
        """Call `callback` in the next turn, from any thread; return False if the loop is closed."""

    @abstractmethod
    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call `callback` at `when`, in the time of `time()`.

        There is no handle to cancel the call, because a handle would keep the loop alive.
        """

    @abstractmethod
    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]], name: str) -> Child:
        """Run `main` in a task and a context of its own.

        Args:
            main: The coroutine function. It must not raise.
            name: The task's name in task dumps.
        """

    @abstractmethod
    def coroutines(self) -> Iterable[Any]:
        """Return the coroutines of the tasks in which the server of the current task may run."""

    @abstractmethod
    def wait(self) -> Wait:
        """Return a `Wait` for the current task."""

    @abstractmethod
    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        """Return a `Sender` for `send`.

        Args:
            send: The function to call.
            sent: Called with the error, or ``None``, when a send that was under way ends.
            context: The private context of the calls.
        """
