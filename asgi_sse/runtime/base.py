"""What the rest of this package needs of an event loop."""

import contextvars
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from asgi_sse.protocol.asgi import Message, Send


class Child(ABC):
    """A task that runs apart from the request's, and outlives it where it must."""

    __slots__ = ()

    @abstractmethod
    def cancel(self) -> None:
        """Interrupt the task once, at the point where it waits. What it does then is not interrupted."""

    @abstractmethod
    def shield(self) -> None:
        """The task cleans up from now on: a cancellation that has not reached it yet shall not, nor one to come."""

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """Whether anybody has cancelled it: else a cancellation that comes out of it is one that it has met."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether the caller is a step of it. A task that is collected gets its GeneratorExit from outside."""

    @abstractmethod
    def force_cancel(self) -> None:
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
    def use(self, context: contextvars.Context) -> None:
        """Take another context, private as well. Before the first message."""

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
    def cancel(self, *, again: bool = False) -> None:
        """End the wait, or the one that is still to come; `again`, if it did not heed the first time."""


class EventLoop(ABC):
    """An event loop of asyncio, or a run of trio.

    Attributes:
        locals: The values of this loop, for `current.LoopLocal`.
    """

    def __init__(self) -> None:
        self.locals: dict[Any, Any] = {}

    @abstractmethod
    def time(self) -> float:
        """The loop's clock, in seconds."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether it has come to its end."""

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
    def spawn(self, main: Callable[[], Coroutine[Any, Any, None]], name: str) -> Child:
        """Run `main`, which must not raise, in a task and a context of its own; `name` is for task dumps."""

    @abstractmethod
    def coroutines(self) -> Iterable[Any]:
        """The coroutines of the tasks in which the server behind the current task may run."""

    @abstractmethod
    def wait(self) -> Wait:
        """A wait for the current task."""

    @abstractmethod
    def sender(self, send: Send, sent: Callable[[BaseException | None], None], context: contextvars.Context) -> Sender:
        """What makes the calls of `send`, in `context`; `sent` is called after each that was under way."""
