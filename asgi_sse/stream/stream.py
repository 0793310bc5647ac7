"""The life of one response: OPEN → DRAINING → CLOSED(reason).

The request's own task watches ``receive()``. A second task runs the source. If the request's task ran it, a ``finally``
that waits would be cut short, and a source that swallows its cancellation would hold the request for ever.
"""

import contextvars
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from inspect import isawaitable
from typing import Any, Final, TypeAlias

import anyio

from asgi_sse.errors import SendTimeoutError, StreamClosedError, printable
from asgi_sse.protocol.asgi import CloseReason, Message, Send
from asgi_sse.protocol.event import ItemEncoder, ServerSentEvent, encode_item
from asgi_sse.runtime.base import Child, Wait
from asgi_sse.runtime.server import Server, abort_transport

from .buffer import SendBuffer, UnbufferedSend
from .draining import DrainingEvent
from .flusher import current_flusher
from .interfaces import DisconnectWatcher, PullSource, StreamObserverHost
from .options import StreamOptions
from .source_task import SourceTask, Take
from .timeouts import Due, StreamTimeouts
from .view import StreamState, StreamView
from .writer import StreamWriter

logger: Final = logging.getLogger(__name__)

_LAST_SEND_S: Final = 0.1
"""Seconds that a cancelled send has to end."""

_ABORT_WAIT_S: Final = 1.0
"""Seconds that the server has to report the end of an aborted connection. It then logs no error."""

_Waiting: TypeAlias = Awaitable[None] | None  # made once, not for each stream

_SENT: Final[Message] = {}  # replaces the response start once it is sent, since an idle stream need not keep it


class Stream(StreamView):
    """One running response.

    Attributes:
        path: The request's path.
        client: The client's address and port, as the server reports them.
        reason: Why the stream is closing; ``None`` while it is not.
    """

    __slots__ = (
        "_connection", "_context", "_encode", "_error", "_farewell", "_feed", "_host", "_options", "_pull_source",
        "_receive_scope", "_receiver", "_response_start", "_source_task", "_timeouts", "_wait", "buffer", "check_at",
        "deadline_entry", "send_error",
    )  # fmt: skip

    abandoned: bool
    ended_itself: bool
    forced: bool
    reason: CloseReason | None

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
        host: "StreamObserverHost[Stream]",
        draining: DrainingEvent,
        encoder: ItemEncoder = encode_item,
        unbuffered: bool = False,
        pull_source: "PullSource[Stream] | None" = None,
        child: Child | None = None,
    ) -> None:
        super().__init__(path, client, server, draining)
        self._source_task = SourceTask(source, child)
        self._response_start = head
        self._receiver = receiver
        self._connection = connection
        self._options = options
        self._host = host
        self._encode = encoder
        self._context = contextvars.copy_context()
        self._receive_scope: Callable[[], AbstractContextManager[object]] = _no_scope
        self._wait: Wait = self.loop.wait()
        self._error: BaseException | None = None
        self._farewell = b""
        flusher = current_flusher()
        self.buffer: SendBuffer = UnbufferedSend(flusher) if unbuffered else SendBuffer(flusher)
        self._pull_source = pull_source
        self._feed: SendBuffer | PullSource[Stream] = pull_source or self.buffer
        self._writer = StreamWriter(
            send, self._feed, flusher=flusher, loop=self.loop, owner=self, context=self._context
        )
        self._feed.attach(self._writer.flush_now if unbuffered and pull_source is None else self._writer.wake)
        pending = pull_source is not None and pull_source.pending
        self._timeouts = StreamTimeouts(options, self._writer, self._began, waits_for_event=pending)
        self.deadline_entry: list[Any] = []
        self.check_at: float = math.inf
        self.send_error: BaseException | None = None
        if pull_source is not None:
            pull_source.joined(self)

    @property
    def events(self) -> int:
        """How many events the source has given."""
        return self._feed.pushed

    def send_and_receive_within(self, scope: Callable[[], AbstractContextManager[object]]) -> None:
        """Call the request's ``send`` and ``receive`` inside what `scope` returns. Use it before `run`.

        Each of the two enters the scope in a context of its own. The context of ``send`` is never left.
        """
        context = self._context.copy()
        context.run(scope().__enter__)
        self._writer.send_in(context)
        self._receive_scope = scope

    # The request's task

    async def run(self) -> None:
        """Run the source and send what it gives, until one of them ends or the client disconnects.

        Raises:
            Exception: The source raised it. The stream is cleaned up first.
        """
        self._host.add(self)
        pending = self._pull_source is not None and self._pull_source.pending
        if self._source_task.source is not None:
            take = _make_take(self, self._encode, self._options)
            self._source_task.start(self, take, self.loop, "asgi_sse source")
        elif not pending:  # an adopted response has started already, and a pull source has no task
            self._open()
        if self._options.open_timeout == 0 and not pending:
            # The source takes its first step before the second turn, so an error in that step has its own status. On
            # asyncio it would do so before the first turn; trio runs tasks and callbacks of one turn in any order.
            self.loop.call_soon(lambda: self.loop.call_soon(self.open))
        self._host.arm(self, self._next_check())
        try:
            with self._wait, self._receive_scope():
                await self._receiver.watch()
        except GeneratorExit:  # the coroutine is closed, or collected after its event loop: nothing can be awaited
            if not self.loop.closed:
                self._abort("disconnected")
                self._leave()
            raise
        except BaseException:
            await self._end()
            raise
        await self._end()
        error, self._error = self._error, None
        if isinstance(error, StreamClosedError) and self._receiver.disconnected:
            error = None  # reading the body failed because the client disconnected, which is no error
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, and this frame would hold the error

    async def _end(self) -> None:
        # The client disconnected, or the server cancels the request, unless the end has begun already.
        self._abort("disconnected" if self._receiver.disconnected or not self._draining.is_set() else "drained")
        try:
            with anyio.CancelScope(shield=True):
                await self._clean_up()
        finally:
            self._leave()

    async def _clean_up(self) -> None:
        on_close, timeout = self._options.on_close, self._options.cleanup_timeout
        try:
            await self._source_task.clean_up(self, timeout, "cleanup_timeout")
            with anyio.move_on_after(_LAST_SEND_S):
                await self._writer.wait_closed()
        finally:  # a cancel scope cannot shield from asyncio's own cancellation
            if on_close is not None:
                try:
                    result = on_close(self.reason or "disconnected")
                    if isawaitable(result):
                        with anyio.fail_after(timeout):
                            await result
                except Exception as exc:
                    self._record(exc)

    def _leave(self) -> None:
        self._state = StreamState.CLOSED
        self.abandoned = self._source_task.running
        self._feed.detach()
        self._host.discard(self)

    # The source

    def end_source(self, error: BaseException | None = None) -> None:
        """End a source that is another app's task, and which has pushed everything.

        Args:
            error: What the app raised. The body is then cut after what was pushed. If it is a cancellation, the
                stream does not even wait for the client to take that.
        """
        if self._source_task.child is None:
            return
        if error is not None and self.reason is None:
            self._open()  # the app has sent its response start, whether or not that has left
            self._record(error)
        self._source_task.release()
        if error is not None and not isinstance(error, Exception):
            self._abort("failed")
        self.source_ended()

    def source_raised(self, error: BaseException) -> None:
        """Record the error of the source, and begin to end the body."""
        if not _is_our_cancellation(self._source_task, error):
            self._record(error)
        if self._error is not None:
            self.ended_itself = self.ended_itself or self.reason is None
            self.close("failed")

    def source_ended(self) -> None:
        """Begin to end the body, since the source has ended. If it was abandoned before, discard the stream."""
        self.ended_itself = self.ended_itself or self.reason is None
        self.helper_ended()
        if self._state is StreamState.CLOSED:
            return
        if self._error is not None:
            self.close("failed")
        else:
            self.finish()

    def start_helper(self, main: Callable[[], Awaitable[None]]) -> None:
        """Run `main` in a task that ends with the stream. An error of `main` fails the stream."""
        if self.reason is None:
            # In the request's context, which a callback of the event loop does not have.
            self._source_task.start_helper(main, self, self.loop, self._context.copy())

    def helper_raised(self, error: BaseException) -> None:
        """Record the error of a helper, unless it only means that the stream had ended."""
        if self.reason is None:
            self.ended_itself = True
            self.fail(error)
        elif not (_means_closed(error) or _is_our_cancellation(self._source_task, error)):
            self._record(error)

    def helper_ended(self) -> None:
        """Discard the stream a second time, if the last of its abandoned tasks has ended."""
        if self._state is StreamState.CLOSED and not self._source_task.running:
            self.abandoned = False
            self._host.discard(self)

    def _record(self, error: BaseException) -> None:
        """Keep the first error, which `run` raises; log any other."""
        if self._state is StreamState.CLOSED:
            what = "after it was abandoned"
        elif self._error is None:
            self._error = error
            return
        elif self._error is error:
            return
        else:
            what = "again, in its clean-up"
        path, fields = printable(self.path), self.log_fields
        logger.error("the source of %s raised %s", path, what, exc_info=error, extra=fields)

    # Transitions

    def open(self) -> None:
        """Send the response start, unless the stream is closing."""
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
        self._writer.open(self._response_start, block)
        self._response_start = _SENT
        self._host.arm(self, self._next_check())

    def close(self, reason: CloseReason) -> None:
        """Begin to end the body. The first reason counts; later calls do nothing."""
        if self.reason is not None:
            return
        if reason == "failed" and not self._writer.opened:
            self._abort("failed")  # early enough for the caller to answer with a status of its own
            return
        self._open()
        self._state = StreamState.DRAINING
        self.reason = reason
        self._source_task.stop()
        if self._pull_source is not None and reason != "finished":
            self._pull_source.stop()
        failed = reason == "failed"  # then the body is cut, since it must not look complete
        farewell = _error_event(self, self._options, self._encode, self._error) if failed else self._farewell
        self._writer.finish(farewell, cut=failed)

    def finish(self) -> None:
        """End the stream, since its source has nothing more to give."""
        self.ended_itself = self.ended_itself or self.reason is None
        # A source that ends during a drain has used its grace period.
        self.close("drained" if self._state is StreamState.DRAINING else "finished")

    def fail(self, error: BaseException) -> None:
        """End the stream as if its source had raised `error`: buffered events are sent, then the body is cut."""
        self._record(error)
        self.close("failed")

    def expire_in(self, seconds: float) -> None:
        """End the stream as expired in so many seconds; ``inf`` takes that back."""
        self._timeouts.expires_at = self.loop.time() + seconds
        self._host.arm(self, self._next_check())

    def drain(self, retry: int, within: float) -> None:
        """Ask the stream to end, because the server is stopping.

        Args:
            retry: The reconnection time for the client, in milliseconds.
            within: Seconds until the stream is cut. A source that was promised a longer grace period has that.
        """
        self._host.arm(self, self._timeouts.start_drain(self.loop.time(), within, self._draining.grace))
        if self.reason is not None or self._draining.is_set():
            return
        self._farewell = ServerSentEvent(retry=retry).encode(self._options.sep)
        self._draining.set()
        if self._draining.watched:
            self._state = StreamState.DRAINING
        else:
            self.close("drained")

    def _abort(self, reason: CloseReason) -> None:
        """Send nothing more, and let the request's task clean up."""
        if self.reason is None:
            self.reason = reason
        self._state = StreamState.DRAINING
        self._writer.abort()
        self._source_task.stop()
        self._wait.cancel()

    # The writer

    def writer_done(self, error: BaseException | None) -> None:
        """End the stream: its last message is sent, or ``send`` raised `error`."""
        self.send_error = error
        if error is None:
            self._abort(self.reason or "finished")
        elif _means_disconnected(error):
            self._abort("disconnected")
        else:
            self._record(error)
            self._abort("failed")

    def last_message(self) -> None:
        """Tell the observers, in the request's context, which a callback of the event loop does not have."""
        self._context.run(self._host.ending, self)

    def send_blocked(self) -> None:
        """Watch the time that the client takes for the message."""
        if self._options.send_timeout:
            self._host.arm(self, self.loop.time() + self._options.send_timeout)

    # Deadlines

    def tick(self) -> float:
        """Do what is due. Return the loop's time at which to check again; ``inf`` for never."""
        now, timeouts = self.loop.time(), self._timeouts
        if self._writer.done:
            if now < timeouts.drain_deadline:
                return timeouts.drain_deadline
            if self._source_task.end_wait():  # the source's clean-up takes longer than the server waits
                self.forced = True
            return math.inf
        due = timeouts.due(now, closing=self.reason is not None)
        if due == "keep_alive":
            self._send_keep_alive()
        elif due == "open":
            if self._receiver.reading:  # the time of the upload does not count
                timeouts.restart_open(now)
            else:
                self._open()
        elif due in _REASONS:
            self.close(_REASONS[due])
        elif due is not None:
            self._cut(due, now)
        return self._next_check()

    def _next_check(self) -> float:
        return self._timeouts.next_check(self.loop.time(), closing=self.reason is not None)

    def _send_keep_alive(self) -> None:
        factory = self._options.ping_message_factory
        chunk = b"" if self._pull_source is None else self._pull_source.keep_alive()
        try:
            if not chunk:
                # In the request's context: the deadline queue serves all streams and has none.
                item = ServerSentEvent(comment="ping") if factory is None else self._context.run(factory)
                chunk = self._encode(item, self._options.sep, self._options.json_dumps)
        except Exception as exc:
            self.fail(exc)
            return
        self._writer.insert(chunk)  # nothing is inserted into an event that is half sent; the next one follows
        self._writer.idle_since = self.loop.time()

    def _cut(self, due: Due, now: float) -> None:
        """Drop a client that does not read, since its unsent bytes would hold up the server's exit."""
        if due == "drained":
            self.forced = True
            if self.reason is None:  # the source did not use its grace period; the body still ends properly
                self._timeouts.extend_drain(now)
                self.close("drained")
                return
        self._writer.abort()
        self._source_task.stop()
        if self.reason is None:
            self.reason = "timed_out"
        if abort_transport(self._connection):
            self.loop.call_at(now + _ABORT_WAIT_S, self._wait.cancel)
            return
        self._wait.cancel()
        if due == "send_timeout":  # only an error tells the server to cut the connection
            path, seconds = printable(self.path), self._options.send_timeout
            self._record(SendTimeoutError(f"the client of {path} read nothing for {seconds} s"))


_REASONS: Final[dict[Due | None, CloseReason]] = {"grace": "drained", "lifetime": "expired"}

_NO_SCOPE: Final = nullcontext()  # one for all streams, since an idle one would keep its own


def _no_scope() -> AbstractContextManager[object]:
    return _NO_SCOPE


def _make_take(stream: Stream, encode: ItemEncoder, options: StreamOptions) -> Take:
    """Make the function that puts the source's items into the buffer."""
    buffer, opened = stream.buffer, False
    push, sep, json_dumps = buffer.push, options.sep, options.json_dumps

    def take(item: Any) -> _Waiting:
        nonlocal opened
        full = push(encode(item, sep, json_dumps))
        if not opened:
            stream.open()
            opened = True
        return buffer.room() if full else None

    return take


def _is_our_cancellation(task: SourceTask, error: BaseException) -> bool:
    # A cancellation that is not ours is the source's own: it awaited something that was cancelled. Anything else,
    # KeyboardInterrupt too, is raised by the request's task.
    return task.stopped and isinstance(error, anyio.get_cancelled_exc_class())


def _error_event(stream: StreamView, options: StreamOptions, encode: ItemEncoder, error: BaseException | None) -> bytes:
    """Make the last event for a client whose source failed."""
    if options.on_error is None or not isinstance(error, Exception):
        return b""
    try:
        event = options.on_error(error)
        return b"" if event is None else encode(event, options.sep, options.json_dumps)
    except Exception:
        logger.exception("on_error of %s raised", printable(stream.path), extra=stream.log_fields)
        return b""


def _means_closed(error: BaseException) -> bool:
    """Return whether a helper failed only because the stream that took its events had ended."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_means_closed, error.exceptions))
    return isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError)


def _means_disconnected(error: BaseException) -> bool:
    """Return whether ``send`` raised because the client has gone, and not because something is wrong.

    ASGI 2.4 says OSError. anyio's errors come from middlewares that pass messages through a memory stream. uvloop
    raises RuntimeError on a closed handle.
    """
    if isinstance(error, RuntimeError):
        return "handler is closed" in str(error)
    return isinstance(error, OSError | anyio.ClosedResourceError | anyio.BrokenResourceError)
