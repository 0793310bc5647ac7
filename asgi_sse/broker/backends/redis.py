"""The back end on Redis 6.2 or later, or Valkey: Redis Streams, by one script.

Its keys, with the prefix in braces, so that a cluster has them on one node:

- ``{p}:meta``, a hash: the ``epoch``, ``n`` (the last number), ``start`` (the number at which the epoch began),
  ``root`` (the first epoch of these numbers, for what is not lost with an epoch), ``floor`` (the last number of the
  channels that were forgotten), ``history``, ``channels`` and ``age`` (the limits, for who has none).
- ``{p}:log``, a stream that every process reads: each event as ``n-0``, with its channel ``c``, its payload ``e``, the
  number ``l`` of the one before it in its channel, the time ``t`` in ms and the epoch ``x``.
- ``{p}:c:CHANNEL``, a stream: the same events under the same ids, for who resumes behind what a process has in memory.
- ``{p}:last``, a sorted set: the last number of each channel.
- ``{p}:w:NODE``: what a process has published last, so that it may try again when it has got no answer.
- ``{p}:k:…``: the root and number of each idempotency key.
- ``{p}:r:RUN``, a hash: a run, see `RunLease`.

Who reads the log looks at each number and epoch: an entry that is not the next one means that there was more than the
log keeps, or that somebody has emptied it, and ``XREAD`` would not say so. After each lost connection, the last entry
that was read is compared with what stands in its place now: a server that has come back with less than it had
acknowledged, or a replica that took over behind its master, gives another one, or none.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ReadOnlyError,
    ResponseError,
    SlotNotCoveredError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from asgi_sse.broker.dispatcher import clock
from asgi_sse.errors import InvalidEventError

from . import codec as wire
from . import redis_script
from .base import Publication, RunLease
from .redis_client import RedisURL, shown_url
from .remote import CONTROL, Item, RemoteBackend, logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.broker.ring import Entry

_BLOCK_MS: Final = 1000
"""How long a read waits for something to come, before it is asked whether the log is still the same."""

_COUNT: Final = 256
"""Entries that one read takes, at the most."""

_LEASE_MS: Final = 30_000
"""For how long a run goes on of whose process nothing is heard."""

_ANY: Final = 2**53
"""More than any number."""

_CHUNK: Final = 100
"""Channels that are asked for at once."""


class _Last(NamedTuple):
    """The entry of the log that was read last."""

    offset: int
    fields: dict[bytes, bytes]

    def is_at(self, found: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> bool | None:
        """Whether it is the one that was found in its place; ``None``: there was none."""
        for _, fields in found:
            return all(fields.get(name) == self.fields.get(name) for name in (b"e", b"t", b"l"))
        return None


class RedisBackend(RemoteBackend):
    """See the module.

    Args:
        dispatcher: Where events go.
        url: As redis-py takes it: ``redis://``, ``rediss://`` or ``unix://``; with ``+cluster`` a cluster; with
            ``+sentinel`` a master by its sentinels: ``redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB``, whose user and
            password are the master's, and those of the sentinels ``?sentinel_username=…&sentinel_password=…``.
        prefix: Of its keys.
        timeout: See `RemoteBackend`.
        burst: See there.
        history: Events that each channel keeps; ``None``: as others have set it.
        max_channels: Channels that are kept.
        max_age: Seconds for which they are, after their last event.
    """

    transient = (
        *RemoteBackend.transient, RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError,
        ClusterDownError, TryAgainError, SlotNotCoveredError,
    )  # fmt: skip
    starting = (BusyLoadingError,)

    def __init__(
        self,
        dispatcher: Dispatcher,
        url: str,
        *,
        prefix: str,
        timeout: float | None,
        burst: int,
        history: int | None,
        max_channels: int,
        max_age: float | None,
    ) -> None:
        self._connect_to = RedisURL(url)
        super().__init__(dispatcher, shown_url(url), timeout=timeout, burst=burst)
        self._prefix = f"{{{prefix}}}:"
        age = 0 if max_age is None else max(1, int(max_age * 1000))
        self._limits: list[Any] = ["", "", ""] if history is None else [history, max_channels, age]
        self._client: Any = None
        self._closers: list[Any] = []
        self._last: _Last | None = None
        self._run_id = b""
        self._count = _COUNT  # entries that the next read takes
        self._known: tuple[str, int] = "", 0  # the epoch and last number that the engine has had, as far as it has said
        self._skew = 0.0  # of `clock` to the engine's, in seconds

    # Connection

    async def _connect(self) -> None:
        self._client, self._closers = self._connect_to.connect()
        self._publish_script = self._client.register_script(redis_script.PUBLISH)
        self._lease_script = self._client.register_script(redis_script.CLAIM)
        self._release_script = self._client.register_script(redis_script.RELEASE)
        self._renew_script = self._client.register_script(redis_script.RENEW)

    async def _disconnect(self) -> None:
        closers, self._closers = self._closers, []
        for client in closers:
            try:
                await client.aclose()
            except Exception as exc:
                logger.debug("closing %s: %s", self.url, exc, extra=self._extra)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _stream(self, channel: str) -> str:
        return f"{self._prefix}c:{channel}"

    async def _call(self, items: list[Item], attempt: int, *, instead_of: str = "") -> list[Any]:
        """Run the script, and give its answer: epoch, number, time, start, ids."""
        epoch, known = (instead_of, _ANY) if instead_of else self._what_is_known()
        keys = [self._key(name) for name in ("meta", "log", "last", f"w:{self._holder}")]
        arguments: list[Any] = [secrets.token_hex(4), epoch, attempt, *self._limits, self._key("c:"), known]
        for item in items:
            one = item.publication
            keys.append(self._stream(one.channel))
            if one.key is None and one.keep_after is None and one.ttl is None and one.end is None:
                arguments += [item.payload, ""]
                continue
            if one.key is not None:
                keys.append(self._key(f"k:{len(one.channel)}:{one.channel}:{one.key}"))
            keep = "" if one.keep_after is None else f"{one.keep_after + 1}-0"
            ttl = "" if one.ttl is None else max(1, int(one.ttl * 1000))
            run = "" if one.end is None else self._key(f"r:{one.channel}")
            arguments += [item.payload, "+", int(one.key is not None), keep, ttl, run, one.end or ""]
        answer: list[Any] = await self._publish_script(keys=keys, args=arguments)
        epoch, offset = answer[0].decode(), int(answer[1])
        self._known = epoch, max(offset, self._known[1]) if epoch == self._known[0] else offset
        return answer

    def _what_is_known(self) -> tuple[str, int]:
        """An epoch, and a number that the engine has had in it.

        One that has less now has lost events. That is seen before anything is published to it, or an id that was given
        already would be given once more, until somebody who reads sees it.
        """
        log = self.dispatcher.log
        epoch, offset = self._known
        return epoch, max(offset, log.last_offset) if epoch == log.epoch else offset

    async def _position(self) -> tuple[str, int]:
        epoch, offset, *_ = await self._call([], 0)
        return epoch.decode(), int(offset)

    async def _epoch(self) -> tuple[str, int]:
        epoch, _, _, start, _ = await self._call([], 0)
        return epoch.decode(), int(start)

    # Reading

    async def _catch_up(self, *, first: bool) -> None:
        log = self.dispatcher.log
        while True:
            epoch, last_offset, now, start, _ = await self._call([], 0)
            epoch, last_offset, start = epoch.decode(), int(last_offset), int(start)
            self._skew = clock() - int(now) / 1000
            run_id = await self._find_run_id()
            if first or epoch != log.epoch:
                break
            if await self._is_continued(last_offset, same_process=run_id == self._run_id != b""):
                self._run_id = run_id
                if log.last_offset < last_offset:
                    await self._fill_gap(last_offset)
                return
            # Somebody may hold an id of what was lost: from now on there are others. All processes agree on them.
            logger.warning(
                "%s has lost events that it had acknowledged: readers are told by a reset", self.url, extra=self._extra
            )
            await self._call([], 0, instead_of=epoch)
        self._run_id = run_id
        known: list[tuple[str, int]] = []
        floor = start
        if first:
            known, floor = await self._survey(last_offset)
        else:  # what was published since this epoch began follows
            last_offset = start
        await self._restart(epoch, last_offset, known, floor)

    async def _restart(self, epoch: str, last_offset: int, known: list[tuple[str, int]], floor: int) -> None:
        if self._state == "connecting":  # see that we may
            await self._client.xread({self._key("log"): f"{last_offset}-0"}, count=1)
        found = await self._client.xrange(self._key("log"), f"{last_offset}-0", f"{last_offset}-0")
        self._last = _Last(last_offset, found[0][1]) if found else None
        self.dispatcher.restart(epoch, last_offset, known, floor=floor)
        self._restarted()

    async def _survey(self, last_offset: int) -> tuple[list[tuple[str, int]], int]:
        """The last number of each channel, and that of those that were forgotten, as of `last_offset`."""
        pipeline = self._client.pipeline(transaction=False)
        pipeline.zrange(self._key("last"), 0, -1, withscores=True)
        pipeline.hget(self._key("meta"), "floor")
        known, floor = await pipeline.execute()
        offsets = [(name.decode(), min(int(score), last_offset)) for name, score in known if name != CONTROL.encode()]
        return offsets, min(int(floor or 0), last_offset)

    async def _find_run_id(self) -> bytes:
        try:
            info = await self._client.info("server")
        except ResponseError:  # not allowed to
            return b""
        return str(info.get("run_id", "")).encode()

    async def _is_continued(self, last_offset: int, *, same_process: bool) -> bool:
        """Whether what was read last still stands in its place."""
        own = self.dispatcher.log.last_offset
        if last_offset < own:
            return False
        if same_process:  # it has been there all the time, and would have begun another epoch
            return True
        last = self._last
        if last is None:
            return own == 0  # nothing to compare, and an engine that is another one
        at = f"{last.offset}-0"
        found = last.is_at(await self._client.xrange(self._key("log"), at, at))
        if found is None and b"c" in last.fields:
            found = last.is_at(await self._client.xrange(self._stream(last.fields[b"c"].decode()), at, at))
        return found is True

    async def _read(self) -> None:
        log, key = self.dispatcher.log, self._key("log")
        while True:
            try:
                answer = await self._client.xread({key: f"{log.last_offset}-0"}, count=self._count, block=_BLOCK_MS)
            except RedisTimeoutError:
                self._count = max(1, self._count // 4)  # so many large ones may not come in time, and never would
                raise
            self._count = min(_COUNT, self._count + 8)
            entries = [entry for _, batch in _pairs(answer) for entry in batch]
            for place, (entry_id, fields) in enumerate(entries, 1):
                if fields is None or _offset(entry_id) != log.last_offset + 1 or fields.get(b"x") != log.epoch.encode():
                    return
                self._receive(log.last_offset + 1, fields[b"c"].decode(), fields)
                self._last = _Last(log.last_offset, fields)
                if place % self._burst == 0:
                    await self._rest()
            if entries:
                await self._rest()
            elif await self._position() != (log.epoch, log.last_offset):
                return

    def _receive(self, offset: int, channel: str, fields: dict[bytes, bytes]) -> None:
        self._received += 1
        if channel == CONTROL:
            self.dispatcher.log.skip(offset)
            self._controlled(fields[b"e"])
            return
        entry = self._event(offset, fields)
        if entry is None:
            self.dispatcher.log.skip(offset)
        else:
            event, end = entry
            self.dispatcher.publish(channel, event, offset=offset, time=self._time(fields), end=end)

    def _event(self, offset: int, fields: dict[bytes, bytes]) -> Any:
        try:
            return wire.load(fields[b"e"])
        except InvalidEventError:
            logger.exception("event %d of %s is left out", offset, self.url, extra=self._extra)
            return None

    def _time(self, fields: dict[bytes, bytes]) -> float:
        return int(fields[b"t"]) / 1000 + self._skew

    async def _fill_gap(self, last_offset: int) -> None:
        """The log does not have any more what comes next: get it from the channels that are read here."""
        log = self.dispatcher.log
        pipeline = self._client.pipeline(transaction=False)
        # Those with something behind `last_offset` too: they may have something before it as well.
        pipeline.zrangebyscore(self._key("last"), f"({log.last_offset}", "+inf", withscores=True)
        pipeline.hget(self._key("meta"), "floor")
        pipeline.xrange(self._key("log"), f"({log.last_offset}-0", f"{log.last_offset + 1}-0")
        changed, floor, following = await pipeline.execute()
        if following:
            return  # it was only behind
        last_offset = max([last_offset, *(int(score) for _, score in changed)])  # as of then
        if int(floor or 0) > log.last_offset:
            # Channels were forgotten meanwhile, and nobody knows which ones.
            await self._restart(log.epoch, last_offset, *await self._survey(last_offset))
            return
        wanted = [
            name.decode() for name, _ in changed if name == CONTROL.encode() or self.dispatcher.is_wanted(name.decode())
        ]
        missed = {name.decode(): int(score) for name, score in changed}
        found: list[tuple[int, str, dict[bytes, bytes] | None]] = []
        for channel, entries in await self._channels(wanted, after=log.last_offset, until=last_offset):
            if entries and (int(entries[0][1][b"l"]) <= log.last_offset or channel == CONTROL):
                del missed[channel]  # the one before it is here
            elif entries:
                missed[channel] = int(entries[0][1][b"l"])
            found += [(_offset(entry_id), channel, fields) for entry_id, fields in entries]
        # What was missed has its place among the rest: who is told so goes on behind that, and not in front of it.
        found += [(offset, channel, None) for channel, offset in missed.items()]
        found.sort(key=lambda each: each[0])
        for place, (offset, channel, fields) in enumerate(found, 1):
            if fields is None:
                with self.dispatcher.lock:
                    log.skip(offset)
                self.dispatcher.miss(channel, offset)
            else:
                self._receive(offset, channel, fields)
                self._last = _Last(offset, {**fields, b"c": channel.encode()})
            if place % self._burst == 0:
                await self._rest()
        if log.last_offset < last_offset:
            with self.dispatcher.lock:
                log.skip(last_offset)
        await self._rest()

    async def _channels(self, names: list[str], *, after: int, until: int) -> list[tuple[str, list[Any]]]:
        """What channels have behind a number."""
        found: list[tuple[str, list[Any]]] = []
        for first in range(0, len(names), _CHUNK):
            chunk = names[first : first + _CHUNK]
            pipeline = self._client.pipeline(transaction=False)
            for name in chunk:
                pipeline.xrange(self._stream(name), f"({after}-0", f"{until}-0")
            found += zip(chunk, await pipeline.execute(), strict=True)
        return found

    async def _recall(self, channels: list[str]) -> None:
        log = self.dispatcher.log
        epoch, last_offset = log.epoch, log.last_offset
        scores: dict[str, int] = {}
        for first in range(0, len(channels), _CHUNK):
            chunk = channels[first : first + _CHUNK]
            pipeline = self._client.pipeline(transaction=False)
            for name in chunk:
                pipeline.zscore(self._key("last"), name)
            pipeline.hget(self._key("meta"), "floor")
            *last, floor = await pipeline.execute()
            scores.update(
                {name: int(floor if score is None else score) for name, score in zip(chunk, last, strict=True)}
            )
        for channel, entries in await self._channels(channels, after=0, until=last_offset):
            made: list[Entry] = []
            for entry_id, fields in entries:
                event = self._event(_offset(entry_id), fields)
                if event is not None:
                    made.append(log.entry(_offset(entry_id), channel, event[0], self._time(fields), end=event[1]))
            with self.dispatcher.lock:
                if log.epoch != epoch:
                    return
                trimmed = int(entries[0][1][b"l"]) if entries else min(scores[channel], last_offset)
                log.fill(channel, made, trimmed, last_offset)

    # Publishing

    def _payload(self, publication: Publication) -> bytes:
        return wire.dump(publication.event, publication.end)

    async def _send(self, items: list[Item], attempt: int) -> list[str]:
        *_, ids = await self._call(items, attempt)
        if ids == b"stale":
            raise ResponseError("a later publication of this process came before it")
        return str(ids, "ascii").split(" ")

    # Runs

    async def lease(
        self,
        name: str,
        max_bytes: int,
        ttl: float,
        *,
        again: bool,
        over: int,  # noqa: ARG002 (that a run is over is told with its last event)
    ) -> tuple[RunLease, bool]:
        """See `Backend`."""
        token = secrets.token_hex(8)
        return await self._lease_or_release(name, token, partial(self._lease, name, max_bytes, ttl, token, again=again))

    async def _release(self, name: str, token: str) -> None:
        await self._release_script(keys=[self._key(f"r:{name}")], args=[token])

    async def _lease(self, name: str, max_bytes: int, ttl: float, token: str, *, again: bool) -> tuple[RunLease, bool]:
        await self._sync()  # to know of the epoch
        while True:
            new, fields = await self._lease_script(
                keys=[self._key(f"r:{name}"), self._key("meta")],
                args=[self._holder, max_bytes, ttl, int(again), _LEASE_MS, token],
            )
            lease = _lease_of(dict(zip(fields[::2], fields[1::2], strict=True)))
            known = await self._as_of_now(lease)
            if new or not known.is_gone(self.dispatcher.log.epoch):
                return known, bool(new)
            again = True

    async def _find(self, name: str) -> RunLease | None:
        fields = await self._client.hgetall(self._key(f"r:{name}"))
        return _lease_of(fields) if fields else None

    async def renew(self, name: str, lease: RunLease) -> bool:
        """See `Backend`."""
        return await self._here(partial(self._patiently, partial(self._renew, name, lease)))

    async def _renew(self, name: str, lease: RunLease) -> bool:
        arguments = [self._holder, _LEASE_MS, lease.epoch, lease.start]
        for field in ("max_bytes", "ttl", "outcome", "final", "epoch", "start"):
            arguments += [field, getattr(lease, field)]
        arguments += ["whole", int(lease.whole)]
        return bool(await self._renew_script(keys=[self._key(f"r:{name}")], args=arguments))


def _lease_of(fields: dict[bytes, bytes]) -> RunLease:
    text = {name.decode(): value.decode() for name, value in fields.items()}
    return RunLease(
        holder=text["holder"],
        epoch=text["epoch"],
        start=int(text["start"]),
        max_bytes=int(text["max_bytes"]),
        ttl=float(text["ttl"]),
        outcome=text["outcome"],
        final=int(text["final"]),
        whole=text["whole"] == "1",
    )


def _offset(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])


def _pairs(answer: Any) -> Iterable[tuple[bytes, Any]]:
    """Streams with their entries, as RESP2 and RESP3 have them."""
    if isinstance(answer, dict):
        return [(name, entry) for name, batches in answer.items() for entry in batches]
    return answer or ()
