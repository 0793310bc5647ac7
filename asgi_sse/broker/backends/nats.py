"""The back end on NATS 2.10 or later: one stream of JetStream, followed by one consumer.

With the prefix p:

- ``SSE_p``, a stream of the subjects ``sse.p.CHANNEL``, whose sequence numbers are those of the events. It is made
  unless there is one, whose own limits hold. They bound all channels together, so that each process has the whole
  stream in memory, up to 100,000 events and 256 MiB, and nobody asks for what is older.
- ``SSE_p_runs``, a bucket of keys and values: a run, see `RunLease`, by its encoded name.

An epoch is a stream's creation and what stands in its metadata; who finds that the stream has come back with less than
it had acknowledged writes that anew. For that, the last message that was read is compared with what stands in its
place, whenever the consumer has to be made again.

Numbers may be left out: messages can be deleted. So what is missing is told by the place of each delivery, which has no
gaps, and by heartbeats, which name the last one: a consumer that has lost something, or is not heard of, is made anew.
If numbers are left out, what the stream begins with tells whether its limits took them, which readers are told of.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import replace
from functools import partial
from hashlib import blake2s
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

import nats.errors
import nats.js.errors

from asgi_sse.broker.dispatcher import TooLargeError, clock
from asgi_sse.broker.patterns import check_name
from asgi_sse.errors import BrokerError

from . import codec as wire
from .base import Publication, RunLease
from .jetstream import ANSWER, DELIVERY, HEARTBEAT, Delivery, JetStream, Stream, answer_of, servers_of, shown_server
from .nats_runs import Bucket
from .remote import CONTROL, Item, RemoteBackend, logger

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from asgi_sse.broker.dispatcher import Dispatcher

    from .jetstream import Consumer

_LIMIT: Final = 100_000
"""Events of all channels that a process has in memory."""

_BYTES: Final = 256 * 1024 * 1024
"""What they may have together, about, by the average of the stream."""

_LEAST: Final = 10_000
"""Events that a stream of ours keeps, at least."""

_SILENCE: Final = 3 * HEARTBEAT
"""Seconds after which a consumer of which nothing is heard is made anew."""

_CHECK: Final = 2.0
"""Seconds between two looks at the stream."""

_WINDOW: Final = 120.0
"""Seconds for which the server knows the ids of messages."""


class _Mark(NamedTuple):
    """A message that was read: no other one has its number and its time."""

    offset: int
    time: int


class _Sent(NamedTuple):
    """What is to be acknowledged."""

    place: int
    item: Item
    answer: asyncio.Future[Msg]


class NatsBackend(RemoteBackend):
    """See the module.

    Args:
        dispatcher: Where events go.
        url: As nats-py takes it: ``nats://USER:PASSWORD@HOST:PORT``, ``nats://TOKEN@HOST``, ``tls://``, ``ws://`` or
            ``wss://``; of a cluster, several between commas, with the scheme and the user of the first.
        prefix: Of its stream and its subjects.
        timeout: See `RemoteBackend`.
        burst: See there.
        history: Ten times that, and 10,000 at least, is what a stream keeps that is made here. ``None``: 10,000.
        max_channels: Of no use here: the stream has one limit for all channels, and the dispatcher's log has its own.
        max_age: Seconds for which such a stream keeps events, two minutes at least.
    """

    transient = (
        *RemoteBackend.transient, nats.errors.TimeoutError, nats.errors.ConnectionClosedError,
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
        max_channels: int,  # noqa: ARG002 (what all back ends are given)
        max_age: float | None,
    ) -> None:
        self._servers = servers_of(url)
        super().__init__(dispatcher, ",".join(map(shown_server, self._servers)), timeout=timeout, burst=burst)
        dispatcher.log.keep_many()
        self._name = f"SSE_{prefix}"
        self._subjects = f"sse.{prefix}."
        self._config = {
            "name": self._name,
            "subjects": [f"{self._subjects}>"],
            "storage": "file",
            "retention": "limits",
            "discard": "old",
            "max_msgs": max(_LEAST, 10 * (history or 0)),
            # Not less than the time for which it is to know what it has; the dispatcher's log takes the limit as it is.
            "max_age": 0 if max_age is None else int(max(max_age, _WINDOW) * 1e9),
            "duplicate_window": int(_WINDOW * 1e9),
            "allow_direct": True,
        }
        self._runs = Bucket(f"{self._name}_runs", lambda: self._js, lambda: clock() - self._skew)
        self._link: JetStream | None = None
        self._proven: JetStream | None = None  # it, once its stream is known to be the one that was read
        self._consumer: Consumer | None = None
        self._marks: deque[_Mark] = deque(maxlen=16)
        self._acknowledged = 0  # the greatest number of this epoch that a publisher has got
        self._skew = 0.0  # of `clock` to the engine's, in seconds
        self._suspicious = False  # the stream is to be looked at
        self._stuck = 0  # a tail behind which there is something that does not come
        self._cut_at = 0
        # The publications that are under way: since when, their ids, and those of their numbers that came here.
        self._sender = ""
        self._attempt = 0
        self._since = 0.0
        self._doubts: dict[str, int] = {}

    # Connection

    async def _connect(self) -> None:
        self._sender = secrets.token_hex(8)
        self._link = await JetStream.connect(self._servers)

    async def _disconnect(self) -> None:
        link, self._link, self._proven, self._consumer = self._link, None, None, None
        if link is not None:
            await link.close()

    @property
    def _js(self) -> JetStream:
        if self._link is None:
            raise nats.errors.ConnectionClosedError
        return self._link

    async def _look(self) -> Stream:
        stream = await self._js.stream(self._name)
        self._skew = clock() - stream.time
        return stream

    async def _look_or_make(self) -> Stream:
        try:
            return await self._look()
        except nats.js.errors.NotFoundError:
            pass
        try:
            await self._js.make_stream(self._config)
        except nats.js.errors.APIError as exc:
            if isinstance(exc, self.transient):
                raise
            raise BrokerError(f"{self.url} does not make the stream {self._name}: {exc.description}") from exc
        return await self._look()

    async def _look_ahead(self) -> Stream:
        """Look at the stream, which who reads may find to be another one only later."""
        try:
            stream = await self._look()
        except nats.js.errors.NotFoundError:
            self._suspect()
            raise ConnectionError(f"the stream {self._name} is gone") from None
        if stream.epoch != self.dispatcher.log.epoch:
            self._suspect()
        return stream

    async def _position(self) -> tuple[str, int]:
        stream = await self._look_ahead()
        return stream.epoch, stream.last

    async def _epoch(self) -> tuple[str, int]:
        stream = await self._look_ahead()
        return stream.epoch, stream.start

    def _suspect(self) -> None:
        """Have who reads look at the stream now."""
        self._suspicious = True
        if self._consumer is not None:
            self._consumer.wake()

    # Reading

    async def _catch_up(self, *, first: bool) -> None:
        log = self.dispatcher.log
        if self._link is None or self._link.is_lost:
            await self._disconnect()
            self._link = await JetStream.connect(self._servers)
        try:
            while True:
                acknowledged = self._acknowledged  # before it is asked for what there is
                stream = await self._look_or_make()
                if first or stream.epoch != log.epoch:
                    break
                if await self._is_continued(stream, acknowledged):
                    if stream.floor > log.last_offset:
                        self._lose(stream.floor)
                    self._proven = self._link
                    return
                # Somebody may hold an id of what was lost: from now on there are others. All processes agree on them.
                logger.warning(
                    "%s has lost events that it had acknowledged: readers are told by a reset",
                    self.url,
                    extra=self._extra,
                )
                await self._js.begin_epoch(self._name, instead_of=stream.epoch)
            start = max(stream.floor, stream.last - _reach(stream))
            if not first:  # what was published since this epoch began follows
                start = max(start, stream.start)
            await self._restart(stream.epoch, start)
            if first:
                await self._load(stream.last)
            self._proven = self._link
        except TimeoutError:
            await self._disconnect()  # a server that does not answer may have become another one
            raise

    async def _look_in(self) -> None:
        stream = await self._look_or_make()
        self.dispatcher.restart(stream.epoch, 0, floor=0)
        self._proven = self._link

    async def _restart(self, epoch: str, start: int) -> None:
        mark = await self._js.message(self._name, seq=start) if start else None
        self._marks.clear()
        if mark is not None:
            self._marks.append(_Mark(start, mark.time))
        self._doubts = dict.fromkeys(self._doubts, 0)
        self._acknowledged, self._cut_at = 0, start
        self.dispatcher.restart(epoch, start, floor=start)
        self._restarted()

    def _lose(self, offset: int) -> None:
        """The stream has forgotten what nobody has read here."""
        logger.warning(
            "%s has forgotten events before they were read: readers are told by a reset", self.url, extra=self._extra
        )
        self._cut_at = offset
        self.dispatcher.restart(self.dispatcher.log.epoch, offset, floor=offset)
        self._restarted()

    async def _is_continued(self, stream: Stream, acknowledged: int) -> bool:
        """Whether what was read last still stands in its place."""
        if stream.last < max(self.dispatcher.log.last_offset, acknowledged):
            return False
        for mark in reversed(self._marks):
            if mark.offset <= stream.floor:
                return True  # the stream is not to have it any more
            found = await self._js.message(self._name, seq=mark.offset)
            if found is not None:
                return found.time == mark.time
        return not self._marks

    async def _load(self, last: int) -> None:
        """Read all that there was when this began."""
        log, link = self.dispatcher.log, self._js
        self._consumer = consumer = await link.consume(self._name, log.last_offset + 1)
        while log.last_offset < last:
            if consumer.pending or consumer.messages:
                await consumer.wait()
            if link.is_lost:
                raise nats.errors.ConnectionClosedError
            if not await self._take(consumer):
                raise ConnectionError("what the stream has could not be read at once")
            if not consumer.pending and log.last_offset < last and not await self._is_current(consumer):
                raise ConnectionError("the stream has become another one while it was read")

    async def _read(self) -> None:
        loop, link = asyncio.get_running_loop(), self._js
        consumer = self._consumer
        try:
            if consumer is None:
                consumer = self._consumer = await link.consume(self._name, self.dispatcher.log.last_offset + 1)
            looked = loop.time()
            while True:
                await consumer.wait()
                if link.is_lost:
                    raise nats.errors.ConnectionClosedError
                if not await self._take(consumer):
                    return
                if self._suspicious or loop.time() - looked >= _CHECK:
                    self._suspicious = False
                    if not await self._is_current(consumer):
                        return
                    looked = loop.time()
                if loop.time() - consumer.heard >= _SILENCE:
                    return
        finally:
            self._consumer = None

    async def _take(self, consumer: Consumer) -> bool:
        """Take what the consumer has brought. False: it is to be made anew."""
        taken = 0
        while consumer.messages:
            message = consumer.messages.popleft()
            if not message.reply.startswith(DELIVERY):
                if not await self._is_alive(consumer, message):
                    return False
                continue
            delivery = Delivery.of(message.reply)
            if delivery.place != consumer.place + 1:
                return False
            consumer.place, consumer.pending = delivery.place, delivery.pending
            if delivery.offset <= self.dispatcher.log.last_offset:
                continue
            if not await self._bridge(consumer, delivery.offset):
                return False
            self._receive(message, delivery)
            taken += 1
            if taken % self._burst == 0:
                await self._rest()
        if taken:
            await self._rest()
        return True

    async def _bridge(self, consumer: Consumer, offset: int) -> bool:
        """The next one is `offset`. False: the stream is another one."""
        log = self.dispatcher.log
        if offset == log.last_offset + 1:
            return True
        if offset <= consumer.checked:
            self._skip(offset - 1)
            return True
        newest = consumer.messages[-1].reply if consumer.messages else ""
        if not await self._jump(offset):
            return False
        if newest.startswith(DELIVERY) and self._cut_at < offset - 1:
            # The limits have not come so far by now, so that they took nothing from between those that are here.
            consumer.checked = Delivery.of(newest).offset
        return True

    async def _is_alive(self, consumer: Consumer, message: Msg) -> bool:
        """What the server says of the consumer: that it is there, or waits for an answer, or is gone."""
        headers = message.headers or {}
        if headers.get("Status") != "100":
            return False
        reply = message.reply or headers.get("Nats-Consumer-Stalled")
        if reply:
            await self._js.say(reply)
        return int(headers.get("Nats-Last-Consumer", 0)) <= consumer.place

    async def _jump(self, offset: int) -> bool:
        """The next one is `offset`: nobody is to miss what was before. False: the stream is another one."""
        stream = await self._look()
        if stream.epoch != self.dispatcher.log.epoch:
            return False
        if stream.floor > self.dispatcher.log.last_offset:
            self._lose(offset - 1)
        else:
            self._skip(offset - 1)
        return True

    def _skip(self, offset: int) -> None:
        with self.dispatcher.lock:
            self.dispatcher.log.skip(offset)

    async def _is_current(self, consumer: Consumer) -> bool:
        """Whether the stream is the one that is read, and the consumer has what there is of it."""
        log, acknowledged = self.dispatcher.log, self._acknowledged
        try:
            stream = await self._look()
        except nats.js.errors.NotFoundError:
            return False
        if stream.epoch != log.epoch or stream.last < max(log.last_offset, acknowledged):
            return False
        if stream.last > log.last_offset and not consumer.has_more():
            # It is on its way; or the last ones were deleted, and nothing comes.
            last_offset = log.last_offset
            following = await self._js.message(self._name, seq=last_offset + 1, next_by_subj=">")
            if consumer.has_more():
                return True
            if following is None or following.offset > stream.last:
                await self._jump(stream.last + 1)
                self._progressed()
            elif self._stuck == last_offset:
                return False
            self._stuck = last_offset
        cut = max(stream.floor, log.last_offset - _reach(stream))
        if cut > self._cut_at:
            self._cut_at = cut
            with self.dispatcher.lock:
                log.cut(cut)
        return True

    def _receive(self, message: Msg, delivery: Delivery) -> None:
        offset = delivery.offset
        self._received += 1
        self._marks.append(_Mark(offset, delivery.time))
        if self._doubts:
            message_id = (message.headers or {}).get("Nats-Msg-Id")
            if message_id in self._doubts:
                self._doubts[message_id] = offset
        channel = message.subject.removeprefix(self._subjects)
        if channel == CONTROL:
            self._skip(offset)
            self._controlled(message.data)
            return
        try:
            if channel == message.subject:
                raise ValueError(f"{channel} is no subject of this stream")
            check_name(channel)
            event, end = wire.load(message.data)
        except Exception:  # anybody may have written it
            logger.exception("message %d of %s is left out", offset, self.url, extra=self._extra)
            self._skip(offset)
            return
        self.dispatcher.publish(channel, event, offset=offset, time=delivery.time / 1e9 + self._skew, end=end)

    async def _recall(self, channels: list[str]) -> None:
        """What the stream has is here, or is more than there is to be."""

    # Publishing

    def _payload(self, publication: Publication) -> bytes:
        return wire.dump(publication.event, publication.end)

    def _message_id(self, publication: Publication, attempt: int, place: int) -> str:
        if publication.key is None:
            return f"{self._sender}-{attempt}-{place}"
        return "key-" + blake2s(f"{publication.channel}\0{publication.key}".encode(), digest_size=16).hexdigest()

    async def _send(self, items: list[Item], attempt: int) -> list[str]:
        log, now = self.dispatcher.log, asyncio.get_running_loop().time()
        message_ids = [self._message_id(item.publication, attempt, place) for place, item in enumerate(items)]
        if attempt != self._attempt:
            self._attempt, self._since, self._doubts = attempt, now, dict.fromkeys(message_ids, 0)
        elif now - self._since > _WINDOW / 2:
            # The server may not know them any more: what it has got of them, we have got as well.
            async with asyncio.timeout(ANSWER):
                await self._sync()
        epoch, last_offset = log.epoch, log.last_offset
        offsets = {place: offset for place, each in enumerate(message_ids) if (offset := self._doubts[each])}
        failed, is_other = self._settle(await self._ask(items, message_ids, offsets), offsets, last_offset)
        last: float = inf
        if is_other or epoch != log.epoch:
            epoch, last = await self._position()
        if epoch == log.epoch:
            # But not the numbers of a stream that was deleted while this was under way.
            self._acknowledged = max(self._acknowledged, *(offset for offset in offsets.values() if offset <= last), 0)
        if failed is not None:
            self._doubts.update((message_ids[place], offset) for place, offset in offsets.items())
            self._suspect()
            raise failed
        for place, offset in offsets.items():
            await self._end_run(items[place].publication, offset)
        return [f"{epoch}-{offsets[place]}" if place in offsets else "" for place in range(len(items))]

    def _settle(
        self, sent: list[_Sent], offsets: dict[int, int], last_offset: int
    ) -> tuple[BaseException | None, bool]:
        """Put the numbers of what was acknowledged to the others, and refuse what was refused.

        Returns:
            Why it is to be tried again, and whether the stream seems to be another one: it counts from further below.
        """
        failed: BaseException | None = None
        is_other = False
        for place, item, answer in sent:
            if not answer.done():
                answer.cancel()
                failed = TimeoutError(f"no acknowledgement within {ANSWER:g} s")
                continue
            try:
                told = answer_of(answer.result())
            except self.transient as exc:
                failed = exc
            except Exception as exc:
                self._refuse([item], f"{self.url} did not take it: {exc}")
            else:
                offsets[place] = told["seq"]
                is_other = is_other or (told["seq"] <= last_offset and not told.get("duplicate"))
        return failed, is_other

    async def _ask(self, items: list[Item], message_ids: list[str], known: dict[int, int]) -> list[_Sent]:
        """Send what is not known to have come, and wait for the answers."""
        link = self._proven
        if link is None:  # what is published before another epoch begins, readers would not get
            raise nats.errors.ConnectionClosedError
        sent: list[_Sent] = []
        try:
            async with asyncio.timeout(ANSWER):
                for place, (item, message_id) in enumerate(zip(items, message_ids, strict=True)):
                    if place in known or item.answer.done():
                        continue
                    headers = {"Nats-Msg-Id": message_id, "Nats-Expected-Stream": self._name}
                    size = len(item.payload) + 14 + sum(len(name) + len(value) + 4 for name, value in headers.items())
                    if size > link.max_payload:  # for which the server would close the connection
                        self._refuse([item], TooLargeError(size, link.max_payload))
                        continue
                    subject = self._subjects + item.publication.channel
                    sent.append(_Sent(place, item, await link.ask(subject, item.payload, headers)))
                if sent:
                    await asyncio.wait([each.answer for each in sent])
        except TimeoutError:
            pass
        return sent

    # Runs

    async def lease(self, name: str, max_bytes: int, ttl: float, *, again: bool, over: int) -> tuple[RunLease, bool]:
        """See `Backend`."""
        token = secrets.token_hex(8)
        lease = partial(self._lease, name, max_bytes, ttl, token, again=again, over=over)
        return await self._lease_or_release(name, token, lease)

    async def _release(self, name: str, token: str) -> None:
        entry = await self._runs.entry(name)
        if entry is not None and entry.token == token:
            over = replace(entry.lease, outcome="cancelled", ttl=0)
            await self._runs.write(name, over, token, entry.revision)

    async def _lease(
        self, name: str, max_bytes: int, ttl: float, token: str, *, again: bool, over: int
    ) -> tuple[RunLease, bool]:
        log = self.dispatcher.log
        while True:
            entry = await self._runs.entry(name)
            if entry is not None and entry.token == token:
                return await self._as_of_now(entry.lease), True
            if entry is not None and not entry.is_over:
                known = await self._as_of_now(entry.lease)
                has_ended = known.outcome or known.start == over  # which is written behind its end
                if not ((again and has_ended) or known.is_gone(log.epoch)):
                    return known, False
            await self._sync()  # so that it begins behind the end of the one before
            with self.dispatcher.lock:
                lease = RunLease(self._holder, log.epoch, log.last_offset, max_bytes, ttl)
            if await self._runs.write(name, lease, token, 0 if entry is None else entry.revision):
                return await self._as_of_now(lease), True

    async def _find(self, name: str) -> RunLease | None:
        entry = await self._runs.entry(name)
        return None if entry is None or entry.is_over else entry.lease

    async def renew(self, name: str, lease: RunLease) -> bool:
        """See `Backend`."""
        return await self._here(partial(self._patiently, partial(self._renew, name, lease)))

    async def _renew(self, name: str, lease: RunLease) -> bool:
        while True:
            entry = await self._runs.entry(name)
            if entry is not None and not entry.is_over and not entry.lease.is_before(lease):
                if entry.lease.holder != self._holder:
                    return False
                if entry.lease.outcome:
                    return True
                if entry.lease.epoch == lease.epoch:
                    lease = entry.lease
            lease = replace(lease, holder=self._holder)
            token, revision = ("", 0) if entry is None else (entry.token, entry.revision)
            if await self._runs.write(name, lease, token, revision):
                return True

    async def _end_run(self, publication: Publication, offset: int) -> None:
        """Say that a run has ended, to who looks for it later; who reads it sees it by its last event."""
        if publication.end is None:
            return
        try:
            while True:
                entry = await self._runs.entry(publication.channel)
                if entry is None or entry.lease.holder != self._holder or entry.lease.outcome:
                    return
                ended = await self._as_of_now(entry.lease)
                if ended.start >= offset:
                    return  # it was begun again
                if ended.epoch != entry.lease.epoch and offset > self.dispatcher.log.last_offset:
                    return  # the end was in the stream that is gone: its readers would wait for that number
                ended.outcome, ended.final = publication.end, offset
                if publication.ttl is not None:
                    ended.ttl = publication.ttl
                if await self._runs.write(publication.channel, ended, entry.token, entry.revision):
                    return
        except Exception as exc:
            if isinstance(exc, self.transient):
                raise  # to publish it again does nothing but this
            logger.exception(
                "that run %s has ended could not be written to %s",
                publication.channel,
                self.url,
                extra={**self._extra, "sse_run": publication.channel},
            )


def _reach(stream: Stream) -> int:
    """How many of its events are to be in memory."""
    return min(_LIMIT, int(_BYTES / max(stream.size, 1)))
