"""The life of one response: OPEN → DRAINING → CLOSED(reason).

The request's own task watches ``receive()``; a child task runs the source, every ``__anext__``,
``athrow`` and ``aclose`` of it. Run in the request's task instead, a ``finally`` that waits would be
cut short, and a source that swallows its cancellation would never let the request go.
"""

import contextvars
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from inspect import isawaitable
from typing import Any, Final, Protocol, TypeAlias

import anyio

from asgi_sse.errors import SendTimeoutError, StreamClosedError, printable
from asgi_sse.protocol.asgi import CloseReason, Message, Send
from asgi_sse.protocol.event import ItemEncoder, ServerSentEvent, encode_item
from asgi_sse.runtime.base import Child, EventLoop, Wait
from asgi_sse.runtime.server import Server, abort_transport

from .buffer import Feed, SendBuffer, UnbufferedSend
from .draining import DrainingEvent
from .flusher import current_flusher
from .options import StreamOptions
from .source_task import SourceTask
from .writer import StreamWriter

logger = logging.getLogger(__name__)

_LAST_CALL: Final = 0.1
"""Seconds that a source has to obey its second cancellation, before it is left behind."""

_FIRST_ITEM: Final = 1.0
"""Seconds for which the head waits for a first item that is being made, where `open_timeout` does not say."""

_ABORT_WAIT: Final = 1.0
"""Seconds that the server has to report the end of an aborted connection: it then logs no error."""

_Waiting: TypeAlias = Awaitable[None] | None  # made once, not for each stream

_SENT: Final[Message] = {}  # in place of a head, of which an idle stream need not keep a copy


class _State(Enum):
    OPEN = "open"
    DRAINING = "draining"  # the rest is being sent, or the source says farewell
    CLOSED = "closed"


class StreamObserverHost(Protocol):
    """What a stream needs of the registry that keeps it."""

    def add(self, stream: "Stream") -> None:
        """The stream has begun."""
        ...

    def ending(self, stream: "Stream") -> None:
        """The stream's last message is about to be sent."""
        ...

    def discard(self, stream: "Stream") -> None:
        """The stream is over, its source cleaned up or left behind."""
        ...

    def arm(self, stream: "Stream", when: float) -> None:
        """Call the stream's `tick` at a time of its loop."""
        ...


class DisconnectWatcher(Protocol):
    """What a stream needs of the request's ``receive()``: see `receiver.RequestReceiver`."""

    disconnected: bool

    @property
    def reading(self) -> bool:
        """Whether somebody waits for the request's body."""
        ...

    def discard(self) -> None:
        """The rest of the request's body is not wanted any more."""
        ...

    async def watch(self) -> None:
        """Return when the client has left."""
        ...


class PullSource(Feed, Protocol):
    """A feed that is no buffer of a source's: it ends with its stream."""

    @property
    def pushed(self) -> int:
        """How many events were taken, ever."""
        ...

    def attach(self, wake: Callable[[], object]) -> None:
        """Call `wake`, in the stream's event loop, when there is something to take."""
        ...

    def joined(self, stream: "Stream") -> None:
        """`stream` is the one that takes."""
        ...

    def detach(self) -> None:
        """The stream is over."""
        ...

    def stop(self) -> None:
        """The stream is ending early: what was not taken stays where it is, for a client that resumes."""
        ...

    def keep_alive(self) -> bytes:
        """What to send to an idle client in place of a comment; ``b""``: nothing else than that."""
        ...

    @property
    def pending(self) -> bool:
        """Whether its first event is being made, and may fail: the head waits for it, as for that of any source."""
        ...

    @property
    def patient(self) -> bool:
        """Whether it ends by itself, and has the time of a drain for it."""
        ...


class _Helper:
    """A task that runs beside the source."""

    __slots__ = ("child", "main", "runs")

    def __init__(self, main: Callable[[], Awaitable[None]]) -> None:
        self.main = main
        self.child: Child | None = None
        self.runs = False  # its first step was taken


class Stream:
    """One running response.

    Attributes:
        path: The request's path.
        client: The client's address and port, as the server gave them.
        reason: Why the stream is closing, once it is.
    """

    __slots__ = (
        "__weakref__",
        "_around_watch",
        "_began",
        "_connection",
        "_context",
        "_deadline",
        "_draining",
        "_encode",
        "_error",
        "_expires_at",
        "_farewell",
        "_grace_ends",
        "_head",
        "_helpers",
        "_host",
        "_lifetime_ends",
        "_loop",
        "_open_at",
        "_options",
        "_pending",
        "_pull_source",
        "_receiver",
        "_source_done",
        "_source_task",
        "_state",
        "_wait",
        "_writer",
        "abandoned",
        "buffer",
        "check_at",
        "client",
        "deadline_entry",
        "ended_itself",
        "forced",
        "path",
        "reason",
        "send_error",
        "server",
    )  # fmt: skip

    def __init__(
        self,
        source: AsyncIterator[Any] | None,
        *,
        head: Message,
        path: str,
        client: Any,
        receiver: DisconnectWatcher,
        send: Send,
        connection: Send,
        server: Server,
        options: StreamOptions,
        host: StreamObserverHost,
        draining: DrainingEvent,
        encoder: ItemEncoder = encode_item,
        unbuffered: bool = False,
        pull_source: PullSource | None = None,
        child: Child | None = None,
    ) -> None:
        loop = server.loop
        self._loop: EventLoop = loop
        self.server = server
        self._source_task = SourceTask(source, child)
        self._head = head
        self._receiver = receiver
        self._connection = connection
        self._options = options
        self._host = host
        self._draining = draining
        self._encode = encoder
        self.path = path
        self.client = client
        flusher = current_flusher()
        self.buffer = UnbufferedSend(flusher) if unbuffered else SendBuffer(flusher)
        self._pull_source = pull_source
        feed = pull_source or self.buffer
        self._context = contextvars.copy_context()
        self._writer = StreamWriter(send, feed, flusher=flusher, loop=loop, owner=self, context=self._context)
        feed.attach(self._writer.flush_now if unbuffered and pull_source is None else self._writer.wake)
        self._around_watch: Callable[[], AbstractContextManager[object]] = _plainly
        self._wait: Wait = loop.wait()
        self._helpers: tuple[_Helper, ...] = ()
        self._source_done: anyio.Event | None = None
        self._state = _State.OPEN
        self._error: BaseException | None = None
        self._farewell = b""
        self._began = loop.time()
        self._pending = pull_source is not None and pull_source.pending
        timeout = options.open_timeout or (_FIRST_ITEM if self._pending else 0)
        self._open_at = self._began + timeout if timeout else math.inf
        lifetime = options.max_lifetime
        # Spread, so that the clients of one deploy do not all return at once.
        spread = random.uniform(0.8, 1.0)  # noqa: S311
        self._lifetime_ends = self._began + lifetime * spread if lifetime else math.inf
        self._expires_at = math.inf
        self._deadline = math.inf  # of the closing
        self._grace_ends = math.inf  # of the source, while draining
        self.deadline_entry: list[Stream] = []
        self.check_at = math.inf
        self.reason: CloseReason | None = None
        self.send_error: BaseException | None = None
        self.ended_itself = False
        self.forced = False
        self.abandoned = False
        if pull_source is not None:
            pull_source.joined(self)

    @property
    def state(self) -> str:
        """``"open"``, ``"draining"`` or ``"closed"``."""
        return self._state.value

    @property
    def opened(self) -> bool:
        """Whether the head is sent, or will be: from then on no other status is possible."""
        return self._writer.opened

    @property
    def events(self) -> int:
        """How many items the source has given."""
        return (self._pull_source or self.buffer).pushed

    @property
    def bytes_sent(self) -> int:
        """Bytes of body handed to the server."""
        return self._writer.bytes_sent

    @property
    def age(self) -> float:
        """Seconds since the request came; 0 if its event loop was closed under it."""
        return 0.0 if self._loop.closed else self._loop.time() - self._began

    @property
    def waiting(self) -> float:
        """Seconds for which the client has not taken the message under way."""
        since = self._writer.waiting_since
        return 0.0 if since is None or self._loop.closed else self._loop.time() - since

    @property
    def grace(self) -> float:
        """Seconds that the source was promised for its farewell, when the server stops."""
        return self._draining.grace or 0.0

    @property
    def loop(self) -> EventLoop:
        """The event loop that the stream runs in."""
        return self._loop

    def talk_within(self, scope: Callable[[], AbstractContextManager[object]]) -> None:
        """Call the request's ``send`` and ``receive`` within what `scope` gives, and nothing else.

        Before it runs. Each of the two has a context of its own in which it is entered; that of ``send`` is never left.
        """
        context = self._context.copy()
        context.run(scope().__enter__)
        self._writer.send_in(context)
        self._around_watch = scope

    def __repr__(self) -> str:
        return f"<Stream {printable(self.path)} {self.reason or self.state}>"

    @property
    def log_fields(self) -> dict[str, object]:
        """The fields of log records about the stream."""
        return {"sse_path": printable(self.path)}

    # The request's task

    async def run(self) -> None:
        """Run the source, and send what it gives, until one of them ends or the client leaves.

        Raises:
            Exception: What the source raised, after the stream was cleaned up.
        """
        self._host.add(self)
        if self._source_task.source is not None:
            self._source_task.start(self, self._loop, "asgi_sse source")
        elif not self._pending:  # another app's task is the source, and has sent its head; or a feed that has no task
            self._open()
        if self._options.open_timeout == 0 and not self._pending:
            # The source's first step comes before the second turn, so that an error in it still has its own status.
            # Before the first one on asyncio; trio takes the tasks and callbacks of one turn in any order.
            self._loop.call_soon(lambda: self._loop.call_soon(self.open))
        self._host.arm(self, self._next_check())
        try:
            with self._wait, self._around_watch():
                await self._receiver.watch()
        except GeneratorExit:  # it is closed, or collected with an event loop that is: nothing can be awaited
            if not self._loop.closed:
                self._over("disconnected")
                self._leave()
            raise
        except BaseException:
            await self._end()
            raise
        await self._end()
        error, self._error = self._error, None
        if isinstance(error, StreamClosedError) and self._receiver.disconnected:
            error = None  # how a read of the body learned that the client had left: no more than a disconnect
        if error is not None:
            try:
                raise error
            finally:
                del error  # or its traceback would hold this frame, and this frame it

    async def _end(self) -> None:
        # The client has left, or the server cancels the request, unless the end has begun already.
        self._over("disconnected" if self._receiver.disconnected or not self._draining.is_set() else "drained")
        try:
            await self._clean_up()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._state = _State.CLOSED
        self.abandoned = self._has_tasks
        (self._pull_source or self.buffer).detach()
        self._host.discard(self)

    async def _clean_up(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._wait_for_source(self._options.cleanup_timeout)
                with anyio.move_on_after(_LAST_CALL):
                    await self._writer.wait_closed()
            finally:  # no shield stops a cancellation of asyncio's own: then patience is over
                try:
                    if self._has_tasks:
                        await self._insist()
                finally:
                    await self._tell_reason()

    async def _insist(self) -> None:
        source: Any = self._source_task.source
        if source is None:
            source = [helper.main for helper in self._helpers]
        for child in (self._source_task.child, *(helper.child for helper in self._helpers)):
            if child is not None:
                child.force_cancel()
        await self._wait_for_source(_LAST_CALL)
        time = (
            "before the server's deadline"
            if self.forced
            else f"within {self._options.cleanup_timeout} s (cleanup_timeout)"
        )
        left = "was left behind" if self._has_tasks else "obeyed when it was cancelled once more"
        logger.warning(
            "the source of %s was not cleaned up %s and %s: %r",
            printable(self.path),
            time,
            left,
            source,
            extra=self.log_fields,
        )

    async def _tell_reason(self) -> None:
        if self._options.on_close is None:
            return
        try:
            result = self._options.on_close(self.reason or "disconnected")
            if isawaitable(result):
                with anyio.fail_after(self._options.cleanup_timeout):
                    await result
        except Exception as exc:
            self._fail(exc)

    @property
    def _has_tasks(self) -> bool:
        return self._source_task.child is not None or bool(self._helpers)

    async def _wait_for_source(self, seconds: float) -> None:
        if self._has_tasks:
            self._source_done = anyio.Event()
            with anyio.move_on_after(seconds):
                await self._source_done.wait()

    # A source that is another app's task

    async def push(self, chunk: bytes) -> None:
        """Send bytes that may end anywhere; wait while too much is unsent."""
        if self.reason is None and self.buffer.push(chunk):
            await self.buffer.room()

    def end(self, error: BaseException | None = None) -> None:
        """There is nothing more to push; with an error, the body stays without its end.

        What was pushed is still sent, unless the error is a cancellation: then nobody shall wait for the client.
        """
        if self._source_task.child is None:
            return
        if error is not None and self.reason is None:
            self._open()  # the app has sent its head, whether or not it has left
            self._fail(error)
        self._source_task.child = None
        if error is not None and not isinstance(error, Exception):
            self._over("failed")
        self.source_ended()

    # As the owner of its source_task

    def taker(self) -> Callable[[Any], Awaitable[None] | None]:
        """See `source_task.Owner`."""
        buffer, encode, opened = self.buffer, self._encode, False
        push, sep, json_dumps = buffer.push, self._options.sep, self._options.json_dumps

        def take(item: Any) -> _Waiting:
            nonlocal opened
            full = push(encode(item, sep, json_dumps))
            if not opened:
                self._open()
                opened = True
            return buffer.room() if full else None

        return take

    def source_raised(self, error: BaseException) -> None:
        """See `source_task.Owner`."""
        self._task_raised(error)
        if self._error is not None:  # its clean-up may take no longer than any
            self._source_task.stopped = True
            self.ended_itself = self.ended_itself or self.reason is None
            self.close("failed")

    def source_ended(self) -> None:
        """See `source_task.Owner`."""
        self.ended_itself = self.ended_itself or self.reason is None
        self._task_ended()
        if self._state is _State.CLOSED:
            return
        if self._error is not None:
            self.close("failed")
        else:
            self.live_ended()

    # Tasks beside the source

    def run_beside(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run `main` in a task that ends with the stream; what it raises fails the stream."""
        if self.reason is None:
            helper = _Helper(main)
            self._helpers += (helper,)
            # In the request's context, which a callback of the event loop does not have.
            spawn = partial(self._loop.spawn, partial(self._run_helper, helper), "asgi_sse helper")
            helper.child = self._context.copy().run(spawn)

    async def _run_helper(self, helper: "_Helper") -> None:
        helper.runs = True
        try:
            if self.reason is None:
                await helper.main()
        except BaseException as exc:
            if self.reason is None:
                self.ended_itself = True
                self.fail(exc)
            elif not _is_left_alone(exc):
                self._task_raised(exc)
        self._helpers = tuple(other for other in self._helpers if other is not helper)
        self._task_ended()

    def _task_ended(self) -> None:
        """One of the source's tasks, which may have been left behind."""
        if self._has_tasks:
            return
        if self._source_done is not None:
            self._source_done.set()
        if self._state is _State.CLOSED:
            self.abandoned = False  # it has come to its end after all
            self._host.discard(self)

    def _task_raised(self, exc: BaseException) -> None:
        # A cancellation that is not ours is the source's own: it awaited something that was cancelled. Anything else,
        # KeyboardInterrupt too, is for the request's task to raise.
        if not (self._source_task.stopped and isinstance(exc, anyio.get_cancelled_exc_class())):
            self._fail(exc)

    def live_ended(self) -> None:
        """There is nothing more to take, ever."""
        self.ended_itself = self.ended_itself or self.reason is None
        # While draining, it used its grace to say farewell.
        self.close("drained" if self._state is _State.DRAINING else "finished")

    def _stop_source(self) -> None:
        self._source_task.stop()
        for helper in self._helpers:
            if helper.runs and helper.child is not None:
                helper.runs = False  # once is enough
                helper.child.cancel()

    def _fail(self, exc: BaseException) -> None:
        if self._state is _State.CLOSED:
            logger.error(
                "the source of %s raised after it was left behind",
                printable(self.path),
                exc_info=exc,
                extra=self.log_fields,
            )
        elif self._error is None:
            self._error = exc
        elif self._error is not exc:  # the first one is raised
            logger.error(
                "the source of %s raised once more, in its clean-up",
                printable(self.path),
                exc_info=exc,
                extra=self.log_fields,
            )

    # Transitions

    def open(self) -> None:
        """Send the head, unless it is too late for it."""
        if self.reason is None:
            self._open()

    def _open(self) -> None:
        if self._writer.opened:
            return
        self._receiver.discard()
        options = self._options
        comment = "stream opened" if options.opening_comment else None
        block = b""
        if comment is not None or options.retry is not None:
            block = ServerSentEvent(retry=options.retry, comment=comment).encode(options.sep)
        self._writer.open(self._head, block)
        self._head = _SENT
        self._host.arm(self, self._next_check())

    def close(self, reason: CloseReason) -> None:
        """Begin to end the body, unless that has begun already: the first reason counts."""
        if self.reason is not None:
            return
        if reason == "failed" and not self._writer.opened:
            self._over("failed")  # early enough for the caller to answer with a status of its own
        else:
            self._finish(reason)

    def expire_in(self, seconds: float) -> None:
        """End as after a lifetime of so many more seconds; ``inf`` takes that back."""
        self._expires_at = self._loop.time() + seconds
        self._host.arm(self, self._next_check())

    def fail(self, error: BaseException) -> None:
        """End as if the source had raised `error`: what it gave is sent, the body stays cut."""
        self._fail(error)
        self.close("failed")

    def drain(self, retry: int, within: float) -> None:
        """The server is stopping: end in so many seconds; the client is to return after `retry` ms.

        A source that was promised a longer grace has that.
        """
        now, grace = self._loop.time(), self._draining.grace
        self._deadline = min(self._deadline, now + max(within, grace or 0))
        if grace is not None:
            self._grace_ends = min(self._grace_ends, now + grace)
        self._host.arm(self, min(self._deadline, self._grace_ends))
        if self.reason is not None or self._draining.is_set():
            return
        self._farewell = ServerSentEvent(retry=retry).encode(self._options.sep)
        self._draining.set()
        if self._draining.watched:
            self._state = _State.DRAINING
        else:
            self.close("drained")

    def _finish(self, reason: CloseReason) -> None:
        """End the body properly; unless the source failed: its body must not look complete."""
        self._open()
        self._state = _State.DRAINING
        self.reason = reason
        self._stop_source()
        if self._pull_source is not None and reason != "finished":
            self._pull_source.stop()
        farewell = self._farewell
        if reason == "failed":
            farewell = self._error_event()
        self._writer.finish(farewell, cut=reason == "failed")

    def _error_event(self) -> bytes:
        on_error, error = self._options.on_error, self._error
        if on_error is None or not isinstance(error, Exception):
            return b""
        try:
            event = on_error(error)
            return b"" if event is None else self._encode(event, self._options.sep, self._options.json_dumps)
        except Exception:
            logger.exception("on_error of %s raised", printable(self.path), extra=self.log_fields)
            return b""

    def _over(self, reason: CloseReason) -> None:
        """Nothing more goes out: let the request's task go on to the cleaning up."""
        if self.reason is None:
            self.reason = reason
        self._state = _State.DRAINING
        self._writer.abort()
        self._stop_source()
        self._wait.cancel()

    # The writer

    def writer_done(self, error: BaseException | None) -> None:
        """See `writer.Owner`."""
        self.send_error = error
        if error is None:
            self._over(self.reason or "finished")
        elif _client_is_gone(error):
            self._over("disconnected")
        else:
            self._fail(error)
            self._over("failed")

    def last_message(self) -> None:
        """See `writer.Owner`."""
        self._context.run(self._host.ending, self)  # a callback of the event loop does not have the request's

    def send_blocked(self) -> None:
        """See `writer.Owner`."""
        if self._options.send_timeout:
            self._host.arm(self, self._loop.time() + self._options.send_timeout)

    # As the `Deadlined` of a `DeadlineQueue`

    def tick(self) -> float:
        """Do what is due. Gives when to look again, in the loop's time; ``inf`` for never."""
        now = self._loop.time()
        if self._writer.done:
            if now < self._deadline:
                return self._deadline
            if self._source_done is not None:  # its clean-up takes longer than the server may
                self.forced = True
                self._source_done.set()
            return math.inf
        if now >= self._deadline:
            self.forced = True
            if self.reason is None:  # its source made no use of the grace: the body still ends properly
                self._deadline = now + _ABORT_WAIT
                self.close("drained")
            else:
                self._drop("drained")
        elif now >= self._send_deadline():
            self._drop("timed_out")
        elif self.reason is None:
            self._tick_open(now)
        return self._next_check()

    def _tick_open(self, now: float) -> None:
        options, writer = self._options, self._writer
        if now >= self._grace_ends:
            self.close("drained")
        elif now >= self._lifetime_ends or now >= self._expires_at:
            self.close("expired")
        elif not writer.opened:
            if self._receiver.reading:  # the time for which a client uploads is not the source's
                self._open_at = now + options.open_timeout
            elif now >= self._open_at:
                self._open()
        elif options.ping and writer.waiting_since is None and now >= writer.idle_since + options.ping:
            self._ping()

    def _next_check(self) -> float:
        options, writer = self._options, self._writer
        when = min(self._deadline, self._send_deadline())
        if self.reason is not None:
            return when
        when = min(when, self._lifetime_ends, self._expires_at, self._grace_ends)
        if not writer.opened:
            return min(when, self._open_at)
        if options.ping:
            # While a send is under way no ping is due, but one will be when it has ended, and nobody arms for that.
            quiet_since = writer.idle_since if writer.waiting_since is None else self._loop.time()
            when = min(when, quiet_since + options.ping)
        return when

    def _send_deadline(self) -> float:
        since, timeout = self._writer.waiting_since, self._options.send_timeout
        return math.inf if since is None or not timeout else since + timeout

    def _ping(self) -> None:
        factory = self._options.ping_message_factory
        chunk = b"" if self._pull_source is None else self._pull_source.keep_alive()
        try:
            if not chunk:
                # In the request's context: the deadline queue serves other streams too, and has no context.
                item = ServerSentEvent(comment="ping") if factory is None else self._context.run(factory)
                chunk = self._encode(item, self._options.sep, self._options.json_dumps)
        except Exception as exc:
            self._fail(exc)
            self.close("failed")
            return
        self._writer.insert(chunk)  # not in the middle of an event: then the next one has its chance
        self._writer.idle_since = self._loop.time()

    def _drop(self, reason: CloseReason) -> None:
        """Part from a client that does not read, for real: its unsent bytes would hold the server's exit."""
        self._writer.abort()
        self._stop_source()
        if self.reason is None:
            self.reason = reason
        if abort_transport(self._connection):
            self._loop.call_at(self._loop.time() + _ABORT_WAIT, self._wait.cancel)
            return
        self._wait.cancel()
        if reason == "timed_out":  # then an error is the one way to tell the server that it must cut the connection
            self._fail(
                SendTimeoutError(
                    f"the client of {printable(self.path)} took nothing for {self._options.send_timeout} s"
                )
            )


_PLAIN: Final = nullcontext()  # one for all: an idle stream would keep its own


def _plainly() -> AbstractContextManager[object]:
    return _PLAIN


def _is_left_alone(error: BaseException) -> bool:
    """Whether a feeder found that its stream, which took what it gave, had ended before it."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_left_alone, error.exceptions))
    return isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)


def _client_is_gone(error: BaseException) -> bool:
    """Whether ``send`` raised because nobody is there any more, and not because something is wrong.

    ASGI 2.4 says OSError; anyio's errors come from middlewares that pass messages through a memory
    stream; uvloop raises RuntimeError on a closed handle.
    """
    if isinstance(error, RuntimeError):
        return "handler is closed" in str(error)
    return isinstance(error, OSError | anyio.ClosedResourceError | anyio.BrokenResourceError)
