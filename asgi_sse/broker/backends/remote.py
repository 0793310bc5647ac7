"""`RemoteBackend`: what the back ends on other machines have in common.

One task follows the engine's log into the dispatcher, and begins again where it was cut. Another one publishes, in the
order of asking.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import secrets
from abc import abstractmethod
from collections import deque
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

from asgi_sse.broker.dispatcher import UnavailableError, clock
from asgi_sse.errors import BrokerError
from asgi_sse.protocol.event import ServerSentEvent
from asgi_sse.stream.flusher import current_flusher

from . import codec as wire
from .base import Backend, BrokerStatistics, Publication, RunLease, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from asgi_sse.broker.dispatcher import Dispatcher

T = TypeVar("T")

logger: Final = logging.getLogger(__name__)

CONTROL: Final = "!control"
"""Where processes tell each other what is for no client: no channel may be called so."""

_OPENING: Final = 30.0
"""Seconds in which a broker has to be connected, before its app's startup fails."""

_ANSWER: Final = 5.0
"""Seconds that a request has for a question, where publishers have any."""

_LAST_ANSWERS: Final = 1.0
"""Seconds for which a broker that is closed waits for what it has sent to be acknowledged."""

_CANCEL_AGAIN: Final = 0.5
"""Seconds after which a task that was cancelled is cancelled again."""

_QUESTIONS: Final = 16
"""Of readers and requests, under way together: when all clients come back at once, each has one."""

_BATCH: Final = 64
"""Publications that are under way together."""

_BATCH_BYTES: Final = 1024 * 1024

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds between attempts; at random from half of it, so that not all processes come back at once."""


class Pauses:
    """Each longer than the one before, and at random."""

    def __init__(self) -> None:
        self._next = _FIRST_PAUSE

    async def wait(self) -> None:
        """Wait for the next one."""
        pause, self._next = self._next, min(2 * self._next, _LONGEST_PAUSE)
        await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311

    def reset(self) -> None:
        """It has worked."""
        self._next = _FIRST_PAUSE


class Item:
    """One publication, and who waits for it."""

    __slots__ = ("answer", "payload", "publication", "sent")

    def __init__(self, publication: Publication, payload: bytes, answer: asyncio.Future[str]) -> None:
        self.publication = publication
        self.payload = payload
        self.answer = answer
        self.sent = False  # it may have come to the engine


class RemoteBackend(Backend):
    """Follows an engine, and publishes to it.

    It lives in the event loop that has opened it, which is asyncio's; it may be called from others, and from threads
    that have one.

    Args:
        dispatcher: Where events go.
        url: The engine, for messages: without a password.
        timeout: Seconds that publishing may take, and to find or lease a run; ``None``: publishing as long as it takes,
            runs five.
        burst: Events after which the streams of the event loop are let to take what came.
    """

    transient: ClassVar[tuple[type[BaseException], ...]] = (OSError, TimeoutError)
    """What is tried again."""
    starting: ClassVar[tuple[type[BaseException], ...]] = ()
    """What an engine says that will answer soon: then an app's startup waits."""

    def __init__(self, dispatcher: Dispatcher, url: str, *, timeout: float | None, burst: int) -> None:
        super().__init__(dispatcher)
        dispatcher.upstream = self
        self.url = url
        self._extra: dict[str, object] = {"sse_engine": url}  # of log records
        self._timeout = timeout
        self._burst = burst
        self._holder = secrets.token_hex(4)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._queue: deque[Item] = deque()
        self._queued = asyncio.Event()
        self._batch: list[Item] = []  # under way
        self._attempts = count(1)
        self._progress = asyncio.Event()
        self._recalls: dict[str, asyncio.Future[None]] = {}
        self._questions = asyncio.Semaphore(_QUESTIONS)
        self._releases: set[asyncio.Task[None]] = set()
        self._state: State = "closed"
        self._error = ""
        self._received = 0
        self._reconnects = 0
        self._restarts = 0
        self._round_trip = 0.0
        self._sent_at: float | None = None  # of what is to be acknowledged
        self._under_way: tuple[int, float] | None = None  # an event that is to come back, and when it was sent

    # What an engine is

    @abstractmethod
    async def _connect(self) -> None:
        """Make what is needed to talk to the engine."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Let go of it. Must not raise."""

    @abstractmethod
    async def _catch_up(self, *, first: bool) -> None:
        """Bring the dispatcher's log to where the engine's is, or find that it is another one."""

    async def _look_in(self) -> None:
        """See that the engine is there, and find out what there is to know for publishing alone."""
        await self._position()

    @abstractmethod
    async def _read(self) -> None:
        """Bring what the engine has behind the tail of the dispatcher's log, for ever.

        Returns:
            It is to catch up before it reads on.
        """

    @abstractmethod
    async def _send(self, items: list[Item], attempt: int) -> list[str]:
        """Publish all, and give their ids.

        Args:
            items: What to publish.
            attempt: A number that grows, but is the same each time that these items are tried.

        Returns:
            As many ids as items; ``""`` for one whose publisher has its answer already.
        """

    @abstractmethod
    async def _position(self) -> tuple[str, int]:
        """The epoch and the last number of the engine's log."""

    @abstractmethod
    async def _release(self, name: str, token: str) -> None:
        """Undo the lease of a run that was made with this token."""

    @abstractmethod
    async def _recall(self, channels: list[str]) -> None:
        """See `dispatcher.Upstream`."""

    # Life

    async def open(self, *, follow: bool = True) -> None:
        """See `Backend`; without `follow`, only to publish."""
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise BrokerError(f"{self.url} needs asyncio: its client knows no other event loop") from None
        self._holder = secrets.token_hex(4)
        self._queued, self._progress = asyncio.Event(), asyncio.Event()
        self._questions = asyncio.Semaphore(_QUESTIONS)
        self._state = "connecting"
        try:
            async with asyncio.timeout(_OPENING):
                await self._connect()
                await self._find_in(follow=follow)
        except BaseException as exc:
            await self._disconnect()
            self._state, self._loop = "closed", None
            if isinstance(exc, Exception) and not isinstance(exc, BrokerError):
                raise BrokerError(f"cannot connect to {self.url}: {_text(exc)}") from exc
            raise
        self._state, self._error = "connected", ""
        self._tasks = [self._loop.create_task(self._publish_all(), name="asgi_sse publish")]
        if follow:
            self._tasks.append(self._loop.create_task(self._follow(), name="asgi_sse follow"))

    async def _find_in(self, *, follow: bool) -> None:
        pauses = Pauses()
        while True:
            try:
                await (self._catch_up(first=True) if follow else self._look_in())
            except self.starting:
                await pauses.wait()
            else:
                return

    async def close(self) -> None:
        """See `Backend`."""
        if self._loop is None:
            return
        if self._loop.is_closed():
            self._loop, self._tasks, self._state = None, [], "closed"
            return
        await self._here(self._close)

    async def _close(self) -> None:
        tasks, self._tasks = set(self._tasks), []
        # The end of a run may be here, and be acknowledged only now.
        under_way = [item.answer for item in (*self._batch, *self._queue) if not item.answer.done()]
        try:
            if under_way and self._state == "connected":
                await asyncio.wait(under_way, timeout=_LAST_ANSWERS)
            while tasks:  # redis-py on Python 3.11 loses a cancellation now and then
                for task in tasks:
                    task.cancel()
                _, tasks = await asyncio.wait(tasks, timeout=_CANCEL_AGAIN)
            await self._disconnect()
        finally:
            for task in tasks:  # where we were cancelled ourselves
                task.cancel()
            self._state, self._loop = "closed", None
            self._sent_at = self._under_way = None
            self._progress.set()

    def check_open(self) -> asyncio.AbstractEventLoop:
        """See `Backend`."""
        loop = self._loop
        if loop is None or loop.is_closed():
            raise BrokerError(
                f"{self.url} is not open: give the broker to the app, as broker=…, or use 'async with broker'"
            )
        return loop

    async def _here(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run it in the event loop of this back end."""
        loop = self.check_open()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            raise BrokerError(f"{self.url} needs asyncio: its client knows no other event loop") from None
        if running is loop:
            return await make()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(make(), loop))

    def statistics(self) -> BrokerStatistics:
        """See `Backend`."""
        now, sent_at, under_way = clock(), self._sent_at, self._under_way
        waits = [self._round_trip]
        if sent_at is not None:
            waits.append(now - sent_at)
        if under_way is not None:
            waits.append(now - under_way[1])
        return self._statistics(
            self._state,
            error=self._error,
            received=self._received,
            reconnects=self._reconnects,
            restarts=self._restarts,
            round_trip=max(waits),
        )

    # Reading

    async def _follow(self) -> None:
        log, pauses = self.dispatcher.log, Pauses()
        while True:
            place = log.epoch, log.last_offset
            try:
                if self._state == "connected":
                    await self._read()
                await self._catch_up(first=False)
                if self._state != "connected":
                    self._state, self._error = "connected", ""
                    self._reconnects += 1
                    logger.warning("connected to %s again", self.url, extra=self._extra)
                elif place == (log.epoch, log.last_offset):
                    await pauses.wait()  # something stands in the log that nobody here understands
                    continue
                pauses.reset()
            except Exception as exc:
                if not self._is_transient(exc):
                    logger.exception("reading from %s failed, and is tried again", self.url, extra=self._extra)
                elif self._state == "connected":
                    logger.warning(
                        "the connection to %s is lost, and is tried again: %s", self.url, _text(exc), extra=self._extra
                    )
                self._state, self._error = "disconnected", _text(exc)
                await pauses.wait()

    def _restarted(self) -> None:
        """To be called where the dispatcher was restarted."""
        self._under_way = None  # it is of a log that there is no more
        if self._state != "connecting":
            self._restarts += 1
            logger.warning(
                "the log of %s is another one, or has lost events: readers are told by a reset",
                self.url,
                extra=self._extra,
            )
        self._progressed()

    def _controlled(self, payload: bytes) -> None:
        """To be called with each publication to `CONTROL`."""
        try:
            event, _ = wire.load(payload)
            order: Any = json.loads(event.data or "")
            name, holder = order["cancel"], order["holder"]
        except Exception:  # anybody may have written it
            logger.exception("an order that nobody understands came from %s", self.url, extra=self._extra)
            return
        if holder == self._holder:
            self.on_cancel(name)

    # Runs

    async def find(self, name: str) -> RunLease | None:
        """See `Backend`."""
        return await self._here(partial(self._in_time, partial(self._find_now, name)))

    async def _find_now(self, name: str) -> RunLease | None:
        lease = await self._question(partial(self._find, name))
        return lease and await self._as_of_now(lease)

    @abstractmethod
    async def _find(self, name: str) -> RunLease | None:
        """What the engine has of a run."""

    async def _as_of_now(self, lease: RunLease) -> RunLease:
        """A lease in config of the log that there is; of an earlier one, only what has ended in that.

        The engine may have it from before it lost events, or from a process that did not know of that yet: a reader
        would miss the beginning, and not be told.
        """
        if lease.epoch != self.dispatcher.log.epoch:
            await self._sync()  # it may be ahead of us
        if lease.epoch == self.dispatcher.log.epoch or lease.outcome:
            return lease
        epoch, start = await self._question(self._epoch)
        return replace(lease, epoch=epoch, start=start, whole=False)

    @abstractmethod
    async def _epoch(self) -> tuple[str, int]:
        """The engine's epoch, and the number behind which it is."""

    def ask_to_stop(self, name: str, holder: str) -> None:
        """See `Backend`."""
        self.post(Publication(CONTROL, ServerSentEvent({"cancel": name, "holder": holder})))

    def _progressed(self) -> None:
        self._measure()
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    def _measure(self) -> None:
        """See whether what was sent has come back: of one event at a time, and where many have come."""
        if self._under_way is not None and self.dispatcher.log.last_offset >= self._under_way[0]:
            self._round_trip = clock() - self._under_way[1]
            self._under_way = None

    async def _rest(self) -> None:
        """To be called after each `burst` events: streams take what they can, so that none of them is overrun."""
        self._progressed()
        await current_flusher().turn()

    async def sync(self) -> None:
        """See `dispatcher.Upstream`."""
        await self._here(self._sync)

    async def _sync(self) -> None:
        log = self.dispatcher.log
        while True:
            epoch, last_offset = await self._patiently(partial(self._question, self._position))
            restarts = self._restarts
            while self._restarts == restarts:
                if log.epoch == epoch and log.last_offset >= last_offset:
                    return
                await self._progress.wait()
                if self._loop is None:
                    raise BrokerError(f"{self.url} was closed")

    async def recall(self, channels: list[str]) -> None:
        """See `dispatcher.Upstream`."""
        await self._here(partial(self._recall_once, channels))

    async def _recall_once(self, channels: list[str]) -> None:
        """Who wants what another one is getting waits for that."""
        wanted = [name for name in channels if name not in self._recalls]
        others = [self._recalls[name] for name in channels if name in self._recalls]
        if wanted:
            task = asyncio.ensure_future(self._patiently(partial(self._question, partial(self._recall, wanted))))
            self._recalls.update(dict.fromkeys(wanted, task))
            task.add_done_callback(lambda _: [self._recalls.pop(name, None) for name in wanted])
            others.append(task)
        await asyncio.gather(*map(asyncio.shield, others))

    async def _patiently(self, make: Callable[[], Coroutine[Any, Any, T]], limit: asyncio.Timeout | None = None) -> T:
        pauses = Pauses()
        while self._loop is not None:
            try:
                return await make()
            except Exception as exc:
                if not self._is_transient(exc):
                    raise
                if limit is not None and limit.expired():  # redis-py on Python 3.11 may have lost the cancellation
                    raise TimeoutError from exc
                await pauses.wait()
        raise BrokerError(f"{self.url} was closed")

    async def _question(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._questions:
            return await make()

    async def _lease_or_release(
        self, name: str, token: str, lease: Callable[[], Coroutine[Any, Any, tuple[RunLease, bool]]]
    ) -> tuple[RunLease, bool]:
        try:
            return await self._here(partial(self._in_time, lease))
        except BaseException:  # who has asked is gone, or waits no more: nobody would run it
            loop = self._loop
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._release_soon, name, token)
            raise

    def _release_soon(self, name: str, token: str) -> None:
        task = asyncio.ensure_future(self._patiently(partial(self._release, name, token)))
        self._releases.add(task)
        task.add_done_callback(self._released)

    def _released(self, task: asyncio.Task[None]) -> None:
        self._releases.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.debug("a lease of a run was not released: %s", exc, extra=self._extra)

    async def _in_time(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Try it as long as a publisher would: a request that waits for ever holds its server when that stops."""
        seconds = _ANSWER if self._timeout is None else self._timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._patiently(make, limit)
        except TimeoutError:
            why = f" ({self._error})" if self._error else ""
            raise UnavailableError(f"{self.url} did not answer within {seconds:g} s{why}") from None

    def _is_transient(self, exc: BaseException) -> bool:
        # What uvloop raises where a connection is written to that was lost a moment ago; asyncio lets it pass.
        return isinstance(exc, self.transient) or (isinstance(exc, RuntimeError) and "handler is closed" in str(exc))

    # Publishing

    async def publish(self, publication: Publication, *, wait: bool = False) -> str:
        """See `Backend`."""
        return await self._here(partial(self._publish, publication, wait=wait))

    def post(self, publication: Publication) -> None:
        """See `Backend`."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._post, publication)

    def _post(self, publication: Publication) -> None:
        try:
            self._enqueue(publication)
        except BrokerError as exc:
            logger.warning(
                "what was to go to channel %s was not published: %s",
                publication.channel,
                exc,
                extra={**self._extra, "sse_channel": publication.channel},
            )

    def _enqueue(self, publication: Publication) -> Item:
        loop = self._loop
        if loop is None or not self._tasks or self._tasks[0].done():  # by who ends the event loop without closing us
            raise BrokerError(f"{self.url} was closed")
        item = Item(publication, self._payload(publication), loop.create_future())
        self._queue.append(item)
        self._queued.set()
        return item

    @abstractmethod
    def _payload(self, publication: Publication) -> bytes:
        """What of a publication every process is to get."""

    async def _publish(self, publication: Publication, *, wait: bool) -> str:
        item = self._enqueue(publication)
        try:
            async with asyncio.timeout(None if wait else self._timeout):
                return await item.answer
        except TimeoutError:
            why = f" ({self._error})" if self._error else ""
            what = f"within {self._timeout:g} s: {self.url} is {self._state}{why}"
            if not item.sent:
                raise BrokerError(f"not published {what}") from None
            raise BrokerError(
                f"not acknowledged {what}; it may have been published. To publish it again, give both times the same "
                "idempotency_key"
            ) from None

    async def _publish_all(self) -> None:
        try:
            await self._publish_batches()
        finally:
            self._refuse(self._queue, f"{self.url} was closed before this was published")
            self._queue.clear()

    async def _publish_batches(self) -> None:
        while True:
            await self._queued.wait()
            batch: list[Item] = []
            size = 0
            while self._queue and len(batch) < _BATCH and size < _BATCH_BYTES:
                item = self._queue.popleft()
                if not item.answer.done():  # else its publisher did not wait so long
                    batch.append(item)
                    size += len(item.payload)
            if not self._queue:
                self._queued.clear()
            if batch:
                self._batch = batch
                await self._publish_batch(batch)
                self._batch, self._sent_at = [], None

    async def _publish_batch(self, batch: list[Item]) -> None:
        pauses, attempt = Pauses(), next(self._attempts)
        self._sent_at = began = clock()
        while not all(item.answer.done() for item in batch):
            for item in batch:
                item.sent = True
            try:
                ids = await self._send(batch, attempt)
            except asyncio.CancelledError:
                self._refuse(batch, f"{self.url} was closed; this may have been published")
                raise
            except Exception as exc:
                if self._is_transient(exc):
                    self._error = self._error or _text(exc)
                    await pauses.wait()
                else:
                    # A script that an error has ended has done what came before it.
                    doubt = "" if len(batch) == 1 else "; it, or what was sent with it, may have been published"
                    self._refuse(batch, f"{self.url} did not take it: {_text(exc)}{doubt}")
            else:
                self._acknowledge(batch, ids)
                self._expect(ids, began)

    def _expect(self, ids: list[str], sent_at: float) -> None:
        """Measure how long the last one takes to come back, unless another one is under way, or nobody reads here."""
        epoch, _, offset = next(filter(None, reversed(ids)), "").partition("-")
        if self._under_way is None and epoch == self.dispatcher.log.epoch and len(self._tasks) > 1:
            self._under_way = int(offset), sent_at
            self._measure()

    def _acknowledge(self, batch: list[Item], ids: list[str]) -> None:
        if self._state == "connected":
            self._error = ""
        self._published += sum(map(bool, ids))  # "" where it was refused by itself
        for item, event_id in zip(batch, ids, strict=True):
            if not item.answer.done():
                item.answer.set_result(event_id)

    def _refuse(self, items: Iterable[Item], why: str | BrokerError) -> None:
        for item in items:
            if not item.answer.done():
                # Each waits for an error of its own, to which its traceback is added.
                item.answer.set_exception(BrokerError(why) if isinstance(why, str) else why)
                item.answer.exception()  # of what was posted, nobody asks


def _text(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__
