"""The backend on NATS 2.10 or later. It stores events in one JetStream stream and follows it with one consumer.

With the prefix p, it uses:

- ``SSE_p``: a stream of the subjects ``sse.p.CHANNEL``. Its sequence numbers are the offsets of the events. The backend
  creates the stream unless it exists; an existing stream keeps its own limits. Limits of a stream bound all channels
  together. So each process has the whole stream in memory, up to 100,000 events and 256 MiB, and never asks the server
  for older events.
- ``SSE_p_runs``: a key-value bucket with the lease of each run, see `RunLease`. The key is the encoded name of the run.

An epoch is the creation time of the stream together with an entry in its metadata. A process that finds that the stream
has lost acknowledged events writes a new entry. To find out, it compares the last message that it read with the message
of that offset now, whenever it creates a consumer.

Offsets have holes, since messages can be deleted. So lost deliveries are detected by the consumer sequence, which has
no holes, and by heartbeats, which name its last number. A consumer that has lost a delivery, or is silent, is replaced.
At a hole, the first offset of the stream shows whether the stream's limits dropped those events. If they did,
subscribers get a reset event.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import replace
from functools import partial
from hashlib import blake2s
from math import inf
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

import nats.errors
import nats.js.errors

from asgi_sse.broker.dispatcher import TooLargeError, clock
from asgi_sse.broker.patterns import check_name
from asgi_sse.errors import BrokerError

from . import codec
from .base import Publication, RunLease
from .jetstream import (
    DELIVERY_PREFIX,
    HEARTBEAT_S,
    REQUEST_TIMEOUT_S,
    Delivery,
    JetStream,
    StreamInfo,
    parse_answer,
    redact_server,
    split_servers,
)
from .nats_runs import LeaseBucket
from .remote import CONTROL, PendingPublication, RemoteBackend, logger

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from asgi_sse.broker.dispatcher import Dispatcher

    from .jetstream import Consumer

_MAX_EVENTS: Final = 100_000
"""Events of all channels that a process has in memory."""

_MAX_BYTES: Final = 256 * 1024 * 1024
"""Bytes that those events may take, estimated from the average size in the stream."""

_MIN_STREAM_EVENTS: Final = 10_000
"""Events that a stream created here keeps at least."""

_SILENCE_S: Final = 3 * HEARTBEAT_S
"""Seconds without a message after which a consumer is replaced."""

_CHECK_S: Final = 2.0
"""Seconds between two checks of the stream."""

_DUPLICATE_WINDOW_S: Final = 120.0
"""Seconds for which the server knows the ids of messages."""


class _ReadMessage(NamedTuple):
    """A message that was read. Offset and time together identify it, also after a rollback of the server."""

    offset: int
    time_ns: int


class _SentMessage(NamedTuple):
    """A message that waits for its acknowledgement. `batch_index` counts from 0 in the batch."""

    batch_index: int
    pending: PendingPublication
    answer: asyncio.Future[Msg]


class NatsBackend(RemoteBackend):
    """Stores events in a JetStream stream; see the module for its names.

    Args:
        dispatcher: Receives the events.
        url: A URL of nats-py: ``nats://USER:PASSWORD@HOST:PORT``, ``nats://TOKEN@HOST``, ``tls://``, ``ws://`` or
            ``wss://``. The servers of a cluster are separated by commas, and share the scheme and the user of the
            first one.
        prefix: Part of the names of the stream and its subjects.
        timeout: Seconds that publishing and queries of runs may take; see `RemoteBackend`.
        burst: Events after which streams get a turn; see `RemoteBackend`.
        history: A stream created here keeps ten times as many events, and at least 10,000. ``None``: 10,000.
        max_channels: Ignored: the stream has one limit for all channels, and the dispatcher's log has its own.
        max_age: Seconds for which a stream created here keeps events, at least 120; ``None``: no limit.
    """

    transient_errors: ClassVar[tuple[type[BaseException], ...]] = (
        *RemoteBackend.transient_errors, nats.errors.TimeoutError, nats.errors.ConnectionClosedError,
        nats.errors.ConnectionDrainingError, nats.errors.ConnectionReconnectingError, nats.errors.NoRespondersError,
        nats.errors.NoServersError, nats.errors.OutboundBufferLimitError, nats.errors.StaleConnectionError,
        nats.js.errors.ServerError, nats.js.errors.ServiceUnavailableError,
    )  # fmt: skip

    def __init__(
        self,
        dispatcher: Dispatcher,
        url: str,
        *,
        prefix: str,
        timeout: float | None,
        burst: int,
        history: int | None,
        max_channels: int,  # noqa: ARG002 (every backend gets it)
        max_age: float | None,
    ) -> None:
        self._servers = split_servers(url)
        super().__init__(dispatcher, ",".join(map(redact_server, self._servers)), timeout=timeout, burst=burst)
        dispatcher.log.keep_many()
        self._name = f"SSE_{prefix}"
        self._subjects = f"sse.{prefix}."
        self._config = {
            "name": self._name,
            "subjects": [f"{self._subjects}>"],
            "storage": "file",
            "retention": "limits",
            "discard": "old",
            "max_msgs": max(_MIN_STREAM_EVENTS, 10 * (history or 0)),
            # The server refuses an age below its duplicate window. The dispatcher's log applies the exact age.
            "max_age": 0 if max_age is None else int(max(max_age, _DUPLICATE_WINDOW_S) * 1e9),
            "duplicate_window": int(_DUPLICATE_WINDOW_S * 1e9),
            "allow_direct": True,
        }
        self._leases = LeaseBucket(f"{self._name}_runs", lambda: self._jetstream, lambda: clock() - self._clock_skew_s)
        self._connection: JetStream | None = None
        self._verified_connection: JetStream | None = None  # the connection, once its stream was found to be the same
        self._consumer: Consumer | None = None
        self._recent_messages: deque[_ReadMessage] = deque(maxlen=16)
        self._acknowledged_offset = 0  # the greatest offset of this epoch that a publisher has got
        self._clock_skew_s = 0.0  # `clock` minus the server's time
        self._check_requested = False
        self._stalled_offset = 0  # the log's end at the last check, if more events were expected after it
        self._dropped_offset = 0  # the offset up to which the dispatcher's log has dropped events
        # The batch that is being published.
        self._sender = ""
        self._attempt = 0
        self._attempt_began = 0.0
        self._batch_offsets: dict[str, int] = {}  # message id → offset, or 0 until it is known

    # Connection

    async def _connect(self) -> None:
        self._sender = secrets.token_hex(8)
        self._connection = await JetStream.connect(self._servers)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._verified_connection, self._consumer = None, None
        if connection is not None:
            await connection.close()

    @property
    def _jetstream(self) -> JetStream:
        """The connection; raises if there is none."""
        if self._connection is None:
            raise nats.errors.ConnectionClosedError
        return self._connection

    async def _fetch_info(self) -> StreamInfo:
        """Return the state of the stream."""
        info = await self._jetstream.stream_info(self._name)
        self._clock_skew_s = clock() - info.time
        return info

    async def _fetch_or_create(self) -> StreamInfo:
        """Return the state of the stream; create it if there is none."""
        try:
            return await self._fetch_info()
        except nats.js.errors.NotFoundError:
            pass
        try:
            await self._jetstream.create_stream(self._config)
        except nats.js.errors.APIError as exc:
            if isinstance(exc, self.transient_errors):
                raise
            raise BrokerError(f"{self.url} refused to create the stream {self._name}: {exc.description}") from exc
        return await self._fetch_info()

    async def _fetch_info_and_compare(self) -> StreamInfo:
        """Return the state of the stream. If it is gone or has another epoch, the reader checks it at once."""
        try:
            info = await self._fetch_info()
        except nats.js.errors.NotFoundError:
            self._request_check()
            raise ConnectionError(f"the stream {self._name} was deleted") from None
        if info.epoch != self.dispatcher.log.epoch:
            self._request_check()
        return info

    async def _fetch_log_end(self) -> tuple[str, int]:
        info = await self._fetch_info_and_compare()
        return info.epoch, info.last

    async def _fetch_epoch_start(self) -> tuple[str, int]:
        info = await self._fetch_info_and_compare()
        return info.epoch, info.start

    def _request_check(self) -> None:
        """Have the reader check the stream now, instead of after `_CHECK_S`."""
        self._check_requested = True
        if self._consumer is not None:
            self._consumer.wake()

    # Following the log

    async def _catch_up(self, *, first: bool) -> None:
        log = self.dispatcher.log
        if self._connection is None or self._connection.is_lost:
            await self._disconnect()
            self._connection = await JetStream.connect(self._servers)
        try:
            while True:
                acknowledged = self._acknowledged_offset  # read first: the stream must have at least this
                info = await self._fetch_or_create()
                if first or info.epoch != log.epoch:
                    break
                if await self._is_same_log(info, acknowledged):
                    if info.floor > log.last_offset:
                        self._restart_after_trim(info.floor)
                    self._verified_connection = self._connection
                    return
                # Clients may have ids of lost events, so all later ids get another epoch. The first process to get
                # here begins it, and the others find it.
                self._warn_of_lost_events()
                await self._jetstream.begin_epoch(self._name, instead_of=info.epoch)
            start = max(info.floor, info.last - _memory_limit(info))
            if not first:  # events that were published since this epoch began are read next
                start = max(start, info.start)
            await self._restart(info.epoch, start)
            if first:
                await self._load_history(info.last)
            self._verified_connection = self._connection
        except TimeoutError:
            await self._disconnect()  # a silent server may come back as another one
            raise

    async def _check_server(self) -> None:
        info = await self._fetch_or_create()
        self.dispatcher.restart(info.epoch, 0, floor=0)
        self._verified_connection = self._connection

    async def _restart(self, epoch: str, start: int) -> None:
        """Restart the dispatcher after the message `start`."""
        message = await self._jetstream.get_message(self._name, seq=start) if start else None
        self._recent_messages.clear()
        if message is not None:
            self._recent_messages.append(_ReadMessage(start, message.time_ns))
        self._batch_offsets = dict.fromkeys(self._batch_offsets, 0)
        self._acknowledged_offset, self._dropped_offset = 0, start
        self.dispatcher.restart(epoch, start, floor=start)
        self._after_restart()

    def _restart_after_trim(self, offset: int) -> None:
        """Restart the dispatcher in the same epoch: the stream dropped events up to `offset` before they were read."""
        logger.warning(
            "%s dropped events before they were read; subscribers get a reset event", self.url, extra=self._log_extra
        )
        self._dropped_offset = offset
        self.dispatcher.restart(self.dispatcher.log.epoch, offset, floor=offset)
        self._after_restart()

    async def _is_same_log(self, info: StreamInfo, acknowledged: int) -> bool:
        """Return whether the stream still has the message that was read last, and all that was acknowledged."""
        if info.last < max(self.dispatcher.log.last_offset, acknowledged):
            return False
        for read in reversed(self._recent_messages):
            if read.offset <= info.floor:
                return True  # dropped by the limits, as it should be
            found = await self._jetstream.get_message(self._name, seq=read.offset)
            if found is not None:
                return found.time_ns == read.time_ns
        return not self._recent_messages

    async def _load_history(self, last: int) -> None:
        """Read all events up to `last`, before the broker is open."""
        log, connection = self.dispatcher.log, self._jetstream
        self._consumer = consumer = await connection.consume(self._name, log.last_offset + 1)
        while log.last_offset < last:
            if consumer.pending or consumer.messages:
                await consumer.wait()
            if connection.is_lost:
                raise nats.errors.ConnectionClosedError
            if not await self._take_messages(consumer):
                raise ConnectionError("deliveries were lost while the stream was read for the first time")
            if not consumer.pending and log.last_offset < last and not await self._is_current(consumer):
                raise ConnectionError("the stream was replaced while it was read for the first time")

    async def _read_log(self) -> None:
        loop, connection = asyncio.get_running_loop(), self._jetstream
        consumer = self._consumer
        try:
            if consumer is None:
                consumer = self._consumer = await connection.consume(self._name, self.dispatcher.log.last_offset + 1)
            checked_at = loop.time()
            while True:
                await consumer.wait()
                if connection.is_lost:
                    raise nats.errors.ConnectionClosedError
                if not await self._take_messages(consumer):
                    return
                if self._check_requested or loop.time() - checked_at >= _CHECK_S:
                    self._check_requested = False
                    if not await self._is_current(consumer):
                        return
                    checked_at = loop.time()
                if loop.time() - consumer.last_heard >= _SILENCE_S:
                    return
        finally:
            self._consumer = None

    async def _take_messages(self, consumer: Consumer) -> bool:
        """Pass the messages of a consumer to the dispatcher; return False if the consumer has to be replaced."""
        taken = 0
        while consumer.messages:
            message = consumer.messages.popleft()
            if not message.reply.startswith(DELIVERY_PREFIX):
                if not await self._handle_status(consumer, message):
                    return False
                continue
            delivery = Delivery.of(message.reply)
            if delivery.sequence != consumer.sequence + 1:
                return False
            consumer.sequence, consumer.pending = delivery.sequence, delivery.pending
            if delivery.offset <= self.dispatcher.log.last_offset:
                continue
            if not await self._advance_to(consumer, delivery.offset):
                return False
            self._receive(message, delivery)
            taken += 1
            if taken % self._burst == 0:
                await self._yield_to_streams()
        if taken:
            await self._yield_to_streams()
        return True

    async def _advance_to(self, consumer: Consumer, offset: int) -> bool:
        """Advance the log to just before `offset`, the next event; return False if the stream was replaced.

        Only a hole that was not verified yet costs a request. The request verifies all holes between the messages that
        had arrived before it: if the stream's limits have not reached this hole, they dropped nothing after it.
        """
        log = self.dispatcher.log
        if offset == log.last_offset + 1:
            return True
        if offset <= consumer.verified_offset:
            self._skip(offset - 1)
            return True
        newest = consumer.messages[-1].reply if consumer.messages else ""
        if not await self._verify_hole(offset):
            return False
        if newest.startswith(DELIVERY_PREFIX) and self._dropped_offset < offset - 1:
            consumer.verified_offset = Delivery.of(newest).offset
        return True

    async def _handle_status(self, consumer: Consumer, message: Msg) -> bool:
        """Handle a status of the server, which is a heartbeat, a flow control request or an error.

        Returns:
            False if the consumer is gone, or if the heartbeat shows that deliveries were lost.
        """
        headers = message.headers or {}
        if headers.get("Status") != "100":
            return False
        reply = message.reply or headers.get("Nats-Consumer-Stalled")
        if reply:
            await self._jetstream.reply(reply)
        return int(headers.get("Nats-Last-Consumer", 0)) <= consumer.sequence

    async def _verify_hole(self, offset: int) -> bool:
        """Advance the log to just before `offset`, after a hole; return False if the stream was replaced.

        If the limits of the stream dropped events in the hole, subscribers get a reset. If the messages were deleted
        one by one, the hole is skipped.
        """
        info = await self._fetch_info()
        if info.epoch != self.dispatcher.log.epoch:
            return False
        if info.floor > self.dispatcher.log.last_offset:
            self._restart_after_trim(offset - 1)
        else:
            self._skip(offset - 1)
        return True

    def _skip(self, offset: int) -> None:
        with self.dispatcher.lock:
            self.dispatcher.log.skip(offset)

    async def _is_current(self, consumer: Consumer) -> bool:
        """Return whether the stream is still the same, and the consumer has delivered what is in it.

        Also drops events that the stream has dropped, or that are too many for the memory of this process.
        """
        log, acknowledged = self.dispatcher.log, self._acknowledged_offset
        try:
            info = await self._fetch_info()
        except nats.js.errors.NotFoundError:
            return False
        if info.epoch != log.epoch or info.last < max(log.last_offset, acknowledged):
            return False
        if info.last > log.last_offset and not consumer.has_events():
            # The events are on their way, or the last messages were deleted and no event will come.
            last_offset = log.last_offset
            following = await self._jetstream.get_message(self._name, seq=last_offset + 1, next_by_subj=">")
            if consumer.has_events():
                return True
            if following is None or following.offset > info.last:
                await self._verify_hole(info.last + 1)
                self._announce_progress()
            elif self._stalled_offset == last_offset:
                return False
            self._stalled_offset = last_offset
        dropped = max(info.floor, log.last_offset - _memory_limit(info))
        if dropped > self._dropped_offset:
            self._dropped_offset = dropped
            with self.dispatcher.lock:
                log.cut(dropped)
        return True

    def _receive(self, message: Msg, delivery: Delivery) -> None:
        """Pass a message to the dispatcher."""
        offset = delivery.offset
        self._received += 1
        self._recent_messages.append(_ReadMessage(offset, delivery.time_ns))
        if self._batch_offsets:
            message_id = (message.headers or {}).get("Nats-Msg-Id")
            if message_id in self._batch_offsets:
                self._batch_offsets[message_id] = offset
        channel = message.subject.removeprefix(self._subjects)
        if channel == CONTROL:
            self._skip(offset)
            self._handle_control(message.data)
            return
        try:
            if channel == message.subject:
                raise ValueError(f"subject must begin with {self._subjects}, got {channel!r}")
            check_name(channel)
            event, end = codec.load(message.data)
        except Exception:  # anyone who can write to the server can write this
            logger.exception("skipped invalid event %d of %s", offset, self.url, extra=self._log_extra)
            self._skip(offset)
            return
        time = delivery.time_ns / 1e9 + self._clock_skew_s
        self.dispatcher.publish(channel, event, offset=offset, time=time, end=end)

    async def _load_channels(self, channels: list[str]) -> None:
        """Do nothing: the stream is in memory already, as far as it may be."""

    # Publishing

    def _message_id(self, publication: Publication, attempt: int, index: int) -> str:
        if publication.key is None:
            return f"{self._sender}-{attempt}-{index}"
        return "key-" + blake2s(f"{publication.channel}\0{publication.key}".encode(), digest_size=16).hexdigest()

    async def _send(self, batch: list[PendingPublication], attempt: int) -> list[str]:
        log, now = self.dispatcher.log, asyncio.get_running_loop().time()
        message_ids = [self._message_id(pending.publication, attempt, index) for index, pending in enumerate(batch)]
        if attempt != self._attempt:
            self._attempt, self._attempt_began, self._batch_offsets = attempt, now, dict.fromkeys(message_ids, 0)
        elif now - self._attempt_began > _DUPLICATE_WINDOW_S / 2:
            # The server may no longer know the message ids. So read all that it has: messages of this batch get their
            # offsets by that, and are not sent again.
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._sync()
        epoch, last_offset = log.epoch, log.last_offset
        offsets = {index: offset for index, each in enumerate(message_ids) if (offset := self._batch_offsets[each])}
        sent = await self._send_messages(batch, message_ids, offsets)
        failed, is_replaced = self._process_answers(sent, offsets, last_offset)
        last: float = inf
        if is_replaced or epoch != log.epoch:
            epoch, last = await self._fetch_log_end()
        if epoch == log.epoch:
            # Offsets of a stream that was deleted in the meantime do not count.
            acknowledged = (offset for offset in offsets.values() if offset <= last)
            self._acknowledged_offset = max(self._acknowledged_offset, *acknowledged, 0)
        if failed is not None:
            self._batch_offsets.update((message_ids[index], offset) for index, offset in offsets.items())
            self._request_check()
            raise failed
        for index, offset in offsets.items():
            await self._record_run_end(batch[index].publication, offset)
        return [f"{epoch}-{offsets[index]}" if index in offsets else "" for index in range(len(batch))]

    def _process_answers(
        self, sent: list[_SentMessage], offsets: dict[int, int], last_offset: int
    ) -> tuple[BaseException | None, bool]:
        """Add the offsets of acknowledged messages to `offsets`, and reject the messages that the server refused.

        Args:
            sent: The messages.
            offsets: The offset of each message, by its index.
            last_offset: The end of the log when the messages were sent.

        Returns:
            The error after which to send the rest again, or ``None``; and whether the stream seems to have been
            replaced, since it counts from below `last_offset`.
        """
        failed: BaseException | None = None
        is_replaced = False
        for index, pending, answer in sent:
            if not answer.done():
                answer.cancel()
                failed = TimeoutError(f"no acknowledgement within {REQUEST_TIMEOUT_S:g} s")
                continue
            try:
                fields = parse_answer(answer.result())
            except self.transient_errors as exc:
                failed = exc
            except Exception as exc:
                self._reject([pending], f"{self.url} refused the event: {exc}")
            else:
                offsets[index] = fields["seq"]
                is_replaced = is_replaced or (fields["seq"] <= last_offset and not fields.get("duplicate"))
        return failed, is_replaced

    async def _send_messages(
        self, batch: list[PendingPublication], message_ids: list[str], known: dict[int, int]
    ) -> list[_SentMessage]:
        """Send the messages that are not known to have arrived, and wait up to 5 seconds for the answers."""
        connection = self._verified_connection
        if connection is None:  # readers would not get events published before the stream is checked
            raise nats.errors.ConnectionClosedError
        sent: list[_SentMessage] = []
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                for index, (pending, message_id) in enumerate(zip(batch, message_ids, strict=True)):
                    if index in known or pending.acknowledged.done():
                        continue
                    headers = {"Nats-Msg-Id": message_id, "Nats-Expected-Stream": self._name}
                    size = (
                        len(pending.payload) + 14 + sum(len(name) + len(value) + 4 for name, value in headers.items())
                    )
                    if size > connection.max_payload:  # the server would close the connection
                        self._reject([pending], TooLargeError(size, connection.max_payload))
                        continue
                    subject = self._subjects + pending.publication.channel
                    answer = await connection.send_request(subject, pending.payload, headers)
                    sent.append(_SentMessage(index, pending, answer))
                if sent:
                    await asyncio.wait([each.answer for each in sent])
        except TimeoutError:
            pass
        return sent

    # Leases of runs

    async def acquire_lease(
        self, name: str, max_bytes: int, ttl: float, *, replace_ended: bool, ended_start: int
    ) -> tuple[RunLease, bool]:
        """Acquire the lease of a run, or return the lease that exists."""
        token = secrets.token_hex(8)
        acquire = partial(
            self._acquire_lease, name, max_bytes, ttl, token, replace_ended=replace_ended, ended_start=ended_start
        )
        return await self._acquire_or_release(name, token, acquire)

    async def _release_lease(self, name: str, token: str) -> None:
        stored = await self._leases.get(name)
        if stored is not None and stored.token == token:
            ended = replace(stored.lease, outcome="cancelled", ttl=0)
            await self._leases.write(name, ended, token, stored.revision)

    async def _acquire_lease(
        self, name: str, max_bytes: int, ttl: float, token: str, *, replace_ended: bool, ended_start: int
    ) -> tuple[RunLease, bool]:
        log = self.dispatcher.log
        while True:
            stored = await self._leases.get(name)
            if stored is not None and stored.token == token:
                return await self._in_current_epoch(stored.lease), True
            if stored is not None and not stored.is_expired:
                known = await self._in_current_epoch(stored.lease)
                # The end is recorded after the last event, so this process may have seen it before.
                has_ended = known.outcome or known.start == ended_start
                if not ((replace_ended and has_ended) or known.is_gone(log.epoch)):
                    return known, False
            await self._sync()  # the run has to begin after the end of the one before
            with self.dispatcher.lock:
                lease = RunLease(self._holder, log.epoch, log.last_offset, max_bytes, ttl)
            if await self._leases.write(name, lease, token, 0 if stored is None else stored.revision):
                return await self._in_current_epoch(lease), True

    async def _fetch_lease(self, name: str) -> RunLease | None:
        stored = await self._leases.get(name)
        return None if stored is None or stored.is_expired else stored.lease

    async def _renew_lease(self, name: str, lease: RunLease) -> bool:
        while True:
            stored = await self._leases.get(name)
            if stored is not None and not stored.is_expired and not stored.lease.ended_before(lease):
                if stored.lease.holder != self._holder:
                    return False
                if stored.lease.outcome:
                    return True
                if stored.lease.epoch == lease.epoch:
                    lease = stored.lease
            lease = replace(lease, holder=self._holder)
            token, revision = ("", 0) if stored is None else (stored.token, stored.revision)
            if await self._leases.write(name, lease, token, revision):
                return True

    async def _record_run_end(self, publication: Publication, offset: int) -> None:
        """Write into the lease that a run has ended, for processes that look for it later.

        Subscribers that read the run see its end by its last event.
        """
        if publication.end is None:
            return
        try:
            while True:
                stored = await self._leases.get(publication.channel)
                if stored is None or stored.lease.holder != self._holder or stored.lease.outcome:
                    return
                ended = await self._in_current_epoch(stored.lease)
                if ended.start >= offset:
                    return  # a run of this name has begun again
                if ended.epoch != stored.lease.epoch and offset > self.dispatcher.log.last_offset:
                    return  # the last event was in the lost stream, and subscribers would wait for its offset
                ended.outcome, ended.final = publication.end, offset
                if publication.ttl is not None:
                    ended.ttl = publication.ttl
                if await self._leases.write(publication.channel, ended, stored.token, stored.revision):
                    return
        except Exception as exc:
            if isinstance(exc, self.transient_errors):
                raise  # the batch is sent again, which only repeats this step
            logger.exception(
                "the end of run %s could not be recorded on %s",
                publication.channel,
                self.url,
                extra={**self._log_extra, "sse_run": publication.channel},
            )


def _memory_limit(info: StreamInfo) -> int:
    """Return how many events of a stream this process keeps in memory."""
    return min(_MAX_EVENTS, int(_MAX_BYTES / max(info.mean_bytes, 1)))
