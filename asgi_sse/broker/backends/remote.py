"""`RemoteBackend`: what the backends on Redis and NATS have in common.

Each has two tasks in the event loop that opened it. One follows the server's log and passes its events to the
dispatcher; it reconnects and catches up after a fault. The other one publishes queued events in their order.
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

from . import codec
from .base import Backend, BrokerStatistics, Publication, RunLease, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from asgi_sse.broker.dispatcher import Dispatcher

T = TypeVar("T")

logger: Final = logging.getLogger(__name__)

CONTROL: Final = "!control"
"""Internal channel between processes. ``!`` is illegal in the channel names of users."""

_OPEN_TIMEOUT_S: Final = 30.0
"""Seconds that opening a broker may take before the startup of its app fails."""

_QUERY_TIMEOUT_S: Final = 5.0
"""Seconds that a query of a run may take if publishing has no time limit."""

_CLOSE_TIMEOUT_S: Final = 1.0
"""Seconds for which closing waits until the events already sent are acknowledged."""

_RECANCEL_S: Final = 0.5
"""Seconds after which a task that was cancelled and still runs is cancelled again."""

_MAX_QUERIES: Final = 16
"""Queries of subscriptions and requests that run at the same time. When all clients return at once, each has one."""

_MAX_BATCH: Final = 64
"""Events that are sent together."""

_MAX_BATCH_BYTES: Final = 1024 * 1024

_FIRST_DELAY_S, _MAX_DELAY_S = 0.05, 2.0
"""Seconds between attempts. The actual delay is between half of it and all of it, so that processes do not return all
at once."""


class Backoff:
    """Random delays between attempts, each about twice as long as the one before."""

    def __init__(self) -> None:
        self._next = _FIRST_DELAY_S

    async def wait(self) -> None:
        """Wait for the next delay."""
        delay, self._next = self._next, min(2 * self._next, _MAX_DELAY_S)
        await asyncio.sleep(random.uniform(delay / 2, delay))  # noqa: S311

    def reset(self) -> None:
        """Start again with the shortest delay, after a success."""
        self._next = _FIRST_DELAY_S


class PendingPublication:
    """A publication that waits in the queue or for its acknowledgement.

    Attributes:
        publication: The event and how to store it.
        payload: The encoded event.
        acknowledged: Future of the event's id.
        sent: Whether it was sent, so that the server may have it.
    """

    __slots__ = ("acknowledged", "payload", "publication", "sent")

    def __init__(self, publication: Publication, payload: bytes, acknowledged: asyncio.Future[str]) -> None:
        self.publication: Publication = publication
        self.payload: bytes = payload
        self.acknowledged: asyncio.Future[str] = acknowledged
        self.sent: bool = False


class RemoteBackend(Backend):
    """Follows the log of a server and publishes to it.

    The backend lives in the asyncio event loop that opened it. Other event loops and threads may call it.

    Args:
        dispatcher: Receives the events.
        url: The URL of the server without its password, for messages.
        timeout: Seconds that publishing, finding a run and acquiring its lease may take. ``None``: publishing has no
            limit, and the queries of runs have 5 seconds.
        burst: Events after which the streams of the event loop get a turn to send what they have.
    """

    transient_errors: ClassVar[tuple[type[BaseException], ...]] = (OSError, TimeoutError)
    """Errors after which an attempt is repeated."""
    starting_errors: ClassVar[tuple[type[BaseException], ...]] = ()
    """Errors of a server that will answer soon, for which the startup of an app waits."""

    def __init__(self, dispatcher: Dispatcher, url: str, *, timeout: float | None, burst: int) -> None:
        super().__init__(dispatcher)
        dispatcher.upstream = self
        self.url = url
        self._log_extra: dict[str, object] = {"sse_backend": url}
        self._timeout = timeout
        self._burst = burst
        self._holder = secrets.token_hex(4)  # the id of this process in leases
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._queue: deque[PendingPublication] = deque()
        self._queued = asyncio.Event()
        self._batch: list[PendingPublication] = []  # being sent
        self._attempts = count(1)
        self._progress = asyncio.Event()  # set, and replaced, whenever the dispatcher's log has changed
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._queries = asyncio.Semaphore(_MAX_QUERIES)
        self._releases: set[asyncio.Task[None]] = set()
        self._state: State = "closed"
        self._error = ""
        self._received = 0
        self._reconnects = 0
        self._restarts = 0
        self._round_trip = 0.0
        self._batch_sent_at: float | None = None
        self._awaited_event: tuple[int, float] | None = None  # offset of the measured event, and when it was sent

    # What a server has to provide

    @abstractmethod
    async def _connect(self) -> None:
        """Create the client. Connecting may wait until it is used."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Close all connections. Must not raise."""

    @abstractmethod
    async def _catch_up(self, *, first: bool) -> None:
        """Bring the dispatcher's log to the end of the server's log.

        If the server has another log, or has lost events, restart the dispatcher.

        Args:
            first: Whether nothing was read yet since the backend was opened.
        """

    async def _check_server(self) -> None:
        """Check that the server answers, and learn what is needed to publish without following the log."""
        await self._fetch_log_end()

    @abstractmethod
    async def _read_log(self) -> None:
        """Pass all events after the end of the dispatcher's log to the dispatcher, without end.

        Returns only if the backend has to catch up before it can read on.
        """

    @abstractmethod
    async def _send(self, batch: list[PendingPublication], attempt: int) -> list[str]:
        """Publish a batch and return its ids.

        Args:
            batch: The publications.
            attempt: A number that grows with each batch, and stays the same when a batch is sent again.

        Returns:
            One id for each publication; ``""`` for one whose publisher already has its result.
        """

    @abstractmethod
    async def _fetch_log_end(self) -> tuple[str, int]:
        """Return the epoch and the last offset of the server's log."""

    @abstractmethod
    async def _fetch_epoch_start(self) -> tuple[str, int]:
        """Return the epoch of the server's log, and the offset after which the epoch begins."""

    @abstractmethod
    async def _load_channels(self, channels: list[str]) -> None:
        """Add the events of `channels` that the server keeps to the dispatcher's log."""

    @abstractmethod
    async def _fetch_lease(self, name: str) -> RunLease | None:
        """Return the lease of a run as the server has it, in any epoch."""

    @abstractmethod
    async def _renew_lease(self, name: str, lease: RunLease) -> bool:
        """Renew a lease once; see `renew_lease`."""

    @abstractmethod
    async def _release_lease(self, name: str, token: str) -> None:
        """Delete the lease of a run if it was acquired with `token`."""

    # Open and close

    async def open(self, *, follow: bool = True) -> None:
        """Connect and catch up.

        Args:
            follow: Whether to follow the log. Without, the backend can only publish.

        Raises:
            BrokerError: The server could not be reached within 30 seconds, or no asyncio event loop is running.
        """
        self._loop = self._running_loop()
        self._holder = secrets.token_hex(4)
        self._queued, self._progress = asyncio.Event(), asyncio.Event()
        self._queries = asyncio.Semaphore(_MAX_QUERIES)
        self._state = "connecting"
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                await self._connect()
                await self._wait_until_started(follow=follow)
        except BaseException as exc:
            await self._disconnect()
            self._state, self._loop = "closed", None
            if isinstance(exc, Exception) and not isinstance(exc, BrokerError):
                raise BrokerError(f"cannot connect to {self.url}: {_describe(exc)}") from exc
            raise
        self._state, self._error = "connected", ""
        self._tasks = [self._loop.create_task(self._publish_queue(), name="asgi_sse publish")]
        if follow:
            self._tasks.append(self._loop.create_task(self._follow(), name="asgi_sse follow"))

    async def _wait_until_started(self, *, follow: bool) -> None:
        backoff = Backoff()
        while True:
            try:
                await (self._catch_up(first=True) if follow else self._check_server())
            except self.starting_errors:
                await backoff.wait()
            else:
                return

    async def close(self) -> None:
        """Stop both tasks and close the connections.

        Events that were sent have one second to be acknowledged. The rest of the queue is rejected.
        """
        if self._loop is None:
            return
        if self._loop.is_closed():
            self._loop, self._tasks, self._state = None, [], "closed"
            return
        await self._in_own_loop(self._close)

    async def _close(self) -> None:
        tasks, self._tasks = set(self._tasks), []
        # The last event of a run may be among them.
        pending = (*self._batch, *self._queue)
        unacknowledged = [each.acknowledged for each in pending if not each.acknowledged.done()]
        try:
            if unacknowledged and self._state == "connected":
                await asyncio.wait(unacknowledged, timeout=_CLOSE_TIMEOUT_S)
            while tasks:  # redis-py on Python 3.11 sometimes loses a cancellation
                for task in tasks:
                    task.cancel()
                _, tasks = await asyncio.wait(tasks, timeout=_RECANCEL_S)
            await self._disconnect()
        finally:
            for task in tasks:  # left only if this coroutine was cancelled
                task.cancel()
            self._state, self._loop = "closed", None
            self._batch_sent_at = self._awaited_event = None
            self._progress.set()

    def check_open(self) -> asyncio.AbstractEventLoop:
        """Return the event loop of this backend, or raise `BrokerError` unless the backend is open."""
        loop = self._loop
        if loop is None or loop.is_closed():
            raise BrokerError(
                f"the broker on {self.url} is not open; pass it to the app as broker=..., or use 'async with broker'"
            )
        return loop

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            raise BrokerError(
                f"the broker on {self.url} needs asyncio, which its client is written for; run the app on asyncio"
            ) from None

    async def _in_own_loop(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `make` returns in the event loop of this backend."""
        loop = self.check_open()
        if self._running_loop() is loop:
            return await make()
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(make(), loop))

    def statistics(self) -> BrokerStatistics:
        """Return the current state and counters."""
        now, batch_sent_at, awaited_event = clock(), self._batch_sent_at, self._awaited_event
        waits = [self._round_trip]
        if batch_sent_at is not None:
            waits.append(now - batch_sent_at)
        if awaited_event is not None:
            waits.append(now - awaited_event[1])
        return self._make_statistics(
            self._state,
            error=self._error,
            received=self._received,
            reconnects=self._reconnects,
            restarts=self._restarts,
            round_trip=max(waits),
        )

    # Following the log

    async def _follow(self) -> None:
        log, backoff = self.dispatcher.log, Backoff()
        while True:
            before = log.epoch, log.last_offset
            try:
                if self._state == "connected":
                    await self._read_log()
                await self._catch_up(first=False)
                if self._state != "connected":
                    self._state, self._error = "connected", ""
                    self._reconnects += 1
                    logger.warning("reconnected to %s", self.url, extra=self._log_extra)
                elif before == (log.epoch, log.last_offset):
                    await backoff.wait()  # the log has an entry that this version cannot read past
                    continue
                backoff.reset()
            except Exception as exc:
                if not self._is_transient(exc):
                    logger.exception("reading from %s failed; trying again", self.url, extra=self._log_extra)
                elif self._state == "connected":
                    logger.warning(
                        "lost the connection to %s; trying again: %s", self.url, _describe(exc), extra=self._log_extra
                    )
                self._state, self._error = "disconnected", _describe(exc)
                await backoff.wait()

    def _warn_of_lost_events(self) -> None:
        logger.warning(
            "%s has lost acknowledged events; subscribers get a reset event", self.url, extra=self._log_extra
        )

    def _after_restart(self) -> None:
        """Count a restart of the dispatcher. Called after each of them."""
        self._awaited_event = None  # its offset belongs to the old log
        if self._state != "connecting":
            self._restarts += 1
            logger.warning(
                "the log of %s was replaced or has lost events; subscribers get a reset event",
                self.url,
                extra=self._log_extra,
            )
        self._announce_progress()

    def _handle_control(self, payload: bytes) -> None:
        """Obey an event of the channel `CONTROL`."""
        try:
            event, _ = codec.load(payload)
            command: Any = json.loads(event.data or "")
            name, holder = command["cancel"], command["holder"]
        except Exception:  # anyone who can write to the server can write this
            logger.exception("ignored an invalid control event from %s", self.url, extra=self._log_extra)
            return
        if holder == self._holder:
            self.on_cancel(name)

    def _announce_progress(self) -> None:
        """Wake all callers of `sync`, which look at the dispatcher's log again."""
        self._measure_round_trip()
        progress, self._progress = self._progress, asyncio.Event()
        progress.set()

    def _measure_round_trip(self) -> None:
        """Record the round trip if the measured event has come back. Called once for many events, to stay cheap."""
        if self._awaited_event is not None and self.dispatcher.log.last_offset >= self._awaited_event[0]:
            self._round_trip = clock() - self._awaited_event[1]
            self._awaited_event = None

    async def _yield_to_streams(self) -> None:
        """Let streams send what they have. Called after each `burst` events, so that no subscriber overflows."""
        self._announce_progress()
        await current_flusher().turn()

    # The upstream of the dispatcher

    async def sync(self) -> None:
        """Return when the dispatcher's log has all that the server's log had at the time of the call."""
        await self._in_own_loop(self._sync)

    async def _sync(self) -> None:
        log = self.dispatcher.log
        while True:
            epoch, last_offset = await self._retry(partial(self._query, self._fetch_log_end))
            restarts = self._restarts
            while self._restarts == restarts:
                if log.epoch == epoch and log.last_offset >= last_offset:
                    return
                await self._progress.wait()
                if self._loop is None:
                    raise BrokerError(f"the broker on {self.url} was closed")

    async def recall(self, channels: list[str]) -> None:
        """Add the events of `channels` that the server keeps to the dispatcher's log."""
        await self._in_own_loop(partial(self._load_channels_once, channels))

    async def _load_channels_once(self, channels: list[str]) -> None:
        """Load channels; a channel that is already being loaded is only waited for."""
        wanted = [name for name in channels if name not in self._loading]
        tasks = [self._loading[name] for name in channels if name in self._loading]
        if wanted:
            task = asyncio.ensure_future(self._retry(partial(self._query, partial(self._load_channels, wanted))))
            self._loading.update(dict.fromkeys(wanted, task))
            task.add_done_callback(lambda _: [self._loading.pop(name, None) for name in wanted])
            tasks.append(task)
        await asyncio.gather(*map(asyncio.shield, tasks))

    # Attempts

    async def _retry(self, make: Callable[[], Coroutine[Any, Any, T]], limit: asyncio.Timeout | None = None) -> T:
        """Run `make` again after each transient error, while the backend is open."""
        backoff = Backoff()
        while self._loop is not None:
            try:
                return await make()
            except Exception as exc:
                if not self._is_transient(exc):
                    raise
                if limit is not None and limit.expired():  # redis-py on Python 3.11 may have lost the cancellation
                    raise TimeoutError from exc
                await backoff.wait()
        raise BrokerError(f"the broker on {self.url} was closed")

    async def _query(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a query when fewer than `_MAX_QUERIES` are running."""
        async with self._queries:
            return await make()

    async def _retry_in_time(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Retry for as long as a publisher would wait. A request without a limit would keep its server from stopping.

        Raises:
            UnavailableError: The server did not answer in time.
        """
        seconds = _QUERY_TIMEOUT_S if self._timeout is None else self._timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                return await self._retry(make, limit)
        except TimeoutError:
            why = f" ({self._error})" if self._error else ""
            raise UnavailableError(f"{self.url} did not answer within {seconds:g} s{why}") from None

    def _is_transient(self, exc: BaseException) -> bool:
        # uvloop raises this RuntimeError on a write to a connection that was just lost; asyncio ignores the write.
        return isinstance(exc, self.transient_errors) or (
            isinstance(exc, RuntimeError) and "handler is closed" in str(exc)
        )

    # Leases of runs

    async def find_lease(self, name: str) -> RunLease | None:
        """Return the lease of a run, or ``None`` if there is none."""
        return await self._in_own_loop(partial(self._retry_in_time, partial(self._find_lease, name)))

    async def _find_lease(self, name: str) -> RunLease | None:
        lease = await self._query(partial(self._fetch_lease, name))
        return lease and await self._in_current_epoch(lease)

    async def _in_current_epoch(self, lease: RunLease) -> RunLease:
        """Return the lease of a running run in the current epoch, and the lease of an ended run as it is.

        The server may have a lease from before it lost events, or from a holder that does not know of the loss yet. A
        subscriber would then miss the beginning of the run without a reset.
        """
        if lease.epoch != self.dispatcher.log.epoch:
            await self._sync()  # the lease may be newer than the log here
        if lease.epoch == self.dispatcher.log.epoch or lease.outcome:
            return lease
        epoch, start = await self._query(self._fetch_epoch_start)
        return replace(lease, epoch=epoch, start=start, whole=False)

    async def renew_lease(self, name: str, lease: RunLease) -> bool:
        """Renew the lease of a run; return False if another process holds it."""
        return await self._in_own_loop(partial(self._retry, partial(self._renew_lease, name, lease)))

    def request_cancel(self, name: str, holder: str) -> None:
        """Ask the process `holder` to cancel a run, by an event of the channel `CONTROL`."""
        self.post(Publication(CONTROL, ServerSentEvent({"cancel": name, "holder": holder})))

    async def _acquire_or_release(
        self, name: str, token: str, acquire: Callable[[], Coroutine[Any, Any, tuple[RunLease, bool]]]
    ) -> tuple[RunLease, bool]:
        """Acquire a lease; release it if the caller does not get it."""
        try:
            return await self._in_own_loop(partial(self._retry_in_time, acquire))
        except BaseException:  # the caller left or timed out: without a release, nobody would run the run
            loop = self._loop
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._start_release, name, token)
            raise

    def _start_release(self, name: str, token: str) -> None:
        task = asyncio.ensure_future(self._retry(partial(self._release_lease, name, token)))
        self._releases.add(task)
        task.add_done_callback(self._on_released)

    def _on_released(self, task: asyncio.Task[None]) -> None:
        self._releases.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.debug("the lease of a run was not released: %s", exc, extra=self._log_extra)

    # Publishing

    async def publish(self, publication: Publication, *, wait: bool = False) -> str:
        """Publish an event and return its id, once the server has acknowledged it."""
        return await self._in_own_loop(partial(self._publish, publication, wait=wait))

    def post(self, publication: Publication) -> None:
        """Publish an event without waiting for it. A closed backend ignores it."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._post, publication)

    def _post(self, publication: Publication) -> None:
        try:
            self._enqueue(publication)
        except BrokerError as exc:
            logger.warning(
                "an event of channel %s was not published: %s",
                publication.channel,
                exc,
                extra={**self._log_extra, "sse_channel": publication.channel},
            )

    def _enqueue(self, publication: Publication) -> PendingPublication:
        loop = self._loop
        # The task is done if the event loop was shut down without closing the backend.
        if loop is None or not self._tasks or self._tasks[0].done():
            raise BrokerError(f"the broker on {self.url} was closed")
        payload = codec.dump(publication.event, publication.end)
        pending = PendingPublication(publication, payload, loop.create_future())
        self._queue.append(pending)
        self._queued.set()
        return pending

    async def _publish(self, publication: Publication, *, wait: bool) -> str:
        pending = self._enqueue(publication)
        try:
            async with asyncio.timeout(None if wait else self._timeout):
                return await pending.acknowledged
        except TimeoutError:
            why = f" ({self._error})" if self._error else ""
            what = f"within {self._timeout:g} s: {self.url} is {self._state}{why}"
            if not pending.sent:
                raise BrokerError(f"the event was not published {what}") from None
            raise BrokerError(
                f"the event was not acknowledged {what}. It may have been published; a repeat is safe if both "
                "publications have the same idempotency_key"
            ) from None

    async def _publish_queue(self) -> None:
        try:
            await self._publish_batches()
        finally:
            self._reject(self._queue, f"the broker on {self.url} was closed before the event was published")
            self._queue.clear()

    async def _publish_batches(self) -> None:
        while True:
            await self._queued.wait()
            batch: list[PendingPublication] = []
            size = 0
            while self._queue and len(batch) < _MAX_BATCH and size < _MAX_BATCH_BYTES:
                pending = self._queue.popleft()
                if not pending.acknowledged.done():  # else the publisher has stopped waiting
                    batch.append(pending)
                    size += len(pending.payload)
            if not self._queue:
                self._queued.clear()
            if batch:
                self._batch = batch
                await self._publish_batch(batch)
                self._batch, self._batch_sent_at = [], None

    async def _publish_batch(self, batch: list[PendingPublication]) -> None:
        backoff, attempt = Backoff(), next(self._attempts)
        self._batch_sent_at = sent_at = clock()
        while not all(pending.acknowledged.done() for pending in batch):
            for pending in batch:
                pending.sent = True
            try:
                ids = await self._send(batch, attempt)
            except asyncio.CancelledError:
                self._reject(batch, f"the broker on {self.url} was closed; the event may have been published")
                raise
            except Exception as exc:
                if self._is_transient(exc):
                    self._error = self._error or _describe(exc)
                    await backoff.wait()
                else:
                    # A script that stopped at an error has stored the events before it.
                    doubt = "" if len(batch) == 1 else "; it, or others sent with it, may have been published"
                    self._reject(batch, f"{self.url} refused the event: {_describe(exc)}{doubt}")
            else:
                self._acknowledge(batch, ids)
                self._start_round_trip(ids, sent_at)

    def _start_round_trip(self, ids: list[str], sent_at: float) -> None:
        """Measure the last event of a batch, unless one is being measured or this process does not follow the log."""
        epoch, _, offset = next(filter(None, reversed(ids)), "").partition("-")
        if self._awaited_event is None and epoch == self.dispatcher.log.epoch and len(self._tasks) > 1:
            self._awaited_event = int(offset), sent_at
            self._measure_round_trip()

    def _acknowledge(self, batch: list[PendingPublication], ids: list[str]) -> None:
        if self._state == "connected":
            self._error = ""
        self._published += sum(map(bool, ids))  # an id is "" where the event was refused
        for pending, event_id in zip(batch, ids, strict=True):
            if not pending.acknowledged.done():
                pending.acknowledged.set_result(event_id)

    def _reject(self, batch: Iterable[PendingPublication], why: str | BrokerError) -> None:
        for pending in batch:
            if not pending.acknowledged.done():
                # Each publisher gets an error of its own, since raising adds a traceback to it.
                pending.acknowledged.set_exception(BrokerError(why) if isinstance(why, str) else why)
                pending.acknowledged.exception()  # marks it as retrieved: nobody awaits a posted event


def _describe(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__
