"""The backend on Redis 6.2 or later, or Valkey. It uses Redis Streams and Lua scripts, which are in ``scripts/``.

These are its keys. The prefix p is in braces, so that a cluster keeps all of them on one node.

- ``{p}:meta``: a hash with the state of the log. Its fields are ``epoch``, ``n`` (the last offset), ``start`` (the
  offset at which the epoch began), ``floor`` (the last offset of all forgotten channels) and ``root`` (the epoch in
  which these offsets began at 1; idempotency keys stay valid in the epochs that follow it). ``history``, ``channels``
  and ``age`` are the limits for publishers that have none.
- ``{p}:log``: a stream of all events, which every process reads. An entry has the id ``<offset>-0``, the channel ``c``,
  the payload ``e``, the offset ``l`` of the event before it in its channel, the time ``t`` in ms and the epoch ``x``.
- ``{p}:c:CHANNEL``: a stream of the events of one channel, with the same ids, for subscribers that resume from before
  what a process has in memory.
- ``{p}:last``: a sorted set with the last offset of each channel.
- ``{p}:w:ID``: a hash with the last batch that a process published, for a retry after a lost answer.
- ``{p}:k:…``: the root and the offset of each idempotency key.
- ``{p}:r:RUN``: a hash with the lease of a run, see `RunLease`.

``XREAD`` does not report missing entries, so the reader checks the offset and the epoch of each entry. If an entry is
not the next one, the log was trimmed too soon, or was emptied. After each lost connection, the backend compares the
last entry that it read with the entry of that offset now. The entry differs or is missing if the server has come back
with less than it had acknowledged, or if a replica took over before it had all of its master's data.
"""

from __future__ import annotations

import secrets
from functools import partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

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

from . import codec
from .base import RunLease
from .redis_client import RedisURL, redact_url
from .remote import CONTROL, PendingPublication, RemoteBackend, logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.broker.ring import Entry

_BLOCK_MS: Final = 1000
"""Milliseconds that a read waits for an event before the backend checks that the log is still the same."""

_READ_COUNT: Final = 256
"""Entries that one read takes at most."""

_LEASE_MS: Final = 30_000
"""Milliseconds after which a lease expires, unless it is renewed."""

_MAX_OFFSET: Final = 2**53
"""Greater than any offset."""

_CHANNELS_PER_PIPELINE: Final = 100

_SCRIPTS: Final = [
    files("asgi_sse.broker.backends").joinpath("scripts", f"{name}.lua").read_text(encoding="utf-8")
    for name in ("publish", "lease", "renew", "release")
]


class _LastEntry(NamedTuple):
    """The entry of the log that was read last, to recognise the log after a reconnect."""

    offset: int
    fields: dict[bytes, bytes]

    def matches(self, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> bool | None:
        """Return whether the server's entry of this offset is the same; ``None`` if `entries` is empty."""
        for _, fields in entries:
            return all(fields.get(name) == self.fields.get(name) for name in (b"e", b"t", b"l"))
        return None


class RedisBackend(RemoteBackend):
    """Stores events in Redis Streams; see the module for the keys.

    Args:
        dispatcher: Receives the events.
        url: A URL of redis-py: ``redis://``, ``rediss://`` or ``unix://``. With ``+cluster`` after the scheme, it is a
            node of a cluster. With ``+sentinel``, it names sentinels and the service whose master they know:
            ``redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB``. Its user and password are the master's; those of the
            sentinels are ``?sentinel_username=…&sentinel_password=…``.
        prefix: Prefix of the keys.
        timeout: Seconds that publishing and queries of runs may take; see `RemoteBackend`.
        burst: Events after which streams get a turn; see `RemoteBackend`.
        history: Events that each channel keeps. ``None``: the limits that another process has stored apply.
        max_channels: Number of channels to keep.
        max_age: Seconds for which a channel is kept after its last event; ``None``: no limit.
    """

    transient_errors: ClassVar[tuple[type[BaseException], ...]] = (
        *RemoteBackend.transient_errors, RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError,
        ClusterDownError, TryAgainError, SlotNotCoveredError,
    )  # fmt: skip
    starting_errors: ClassVar[tuple[type[BaseException], ...]] = (BusyLoadingError,)

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
        self._redis_url = RedisURL(url)
        super().__init__(dispatcher, redact_url(url), timeout=timeout, burst=burst)
        self._prefix = f"{{{prefix}}}:"
        age_ms = 0 if max_age is None else max(1, int(max_age * 1000))
        self._limits: list[Any] = ["", "", ""] if history is None else [history, max_channels, age_ms]
        self._client: Any = None
        self._clients: list[Any] = []  # all that have to be closed
        self._last_entry: _LastEntry | None = None
        self._server_run_id = b""
        self._read_count = _READ_COUNT  # entries that the next read takes
        self._seen_end: tuple[str, int] = "", 0  # the epoch and the last offset that the server has returned
        self._clock_skew_s = 0.0  # `clock` minus the server's time

    # Connection

    async def _connect(self) -> None:
        self._client, self._clients = self._redis_url.connect()
        self._publish_script, self._lease_script, self._renew_script, self._release_script = map(
            self._client.register_script, _SCRIPTS
        )

    async def _disconnect(self) -> None:
        clients, self._clients = self._clients, []
        for client in clients:
            try:
                await client.aclose()
            except Exception as exc:
                logger.debug("closing %s failed: %s", self.url, exc, extra=self._log_extra)

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _channel_key(self, channel: str) -> str:
        return f"{self._prefix}c:{channel}"

    async def _run_publish_script(
        self, batch: list[PendingPublication], attempt: int, *, replace_epoch: str = ""
    ) -> list[Any]:
        """Run ``publish.lua`` and return its answer: epoch, last offset, time in ms, start of the epoch, ids.

        Args:
            batch: What to publish. Empty: only check the log.
            attempt: See `_send`.
            replace_epoch: Begin a new epoch if the log still has this one.
        """
        epoch, known = (replace_epoch, _MAX_OFFSET) if replace_epoch else self._known_end()
        keys = [self._key(name) for name in ("meta", "log", "last", f"w:{self._holder}")]
        arguments: list[Any] = [secrets.token_hex(4), epoch, attempt, *self._limits, self._key("c:"), known]
        for pending in batch:
            one = pending.publication
            keys.append(self._channel_key(one.channel))
            if one.key is None and one.keep_after is None and one.ttl is None and one.end is None:
                arguments += [pending.payload, ""]
                continue
            if one.key is not None:
                keys.append(self._key(f"k:{len(one.channel)}:{one.channel}:{one.key}"))
            keep = "" if one.keep_after is None else f"{one.keep_after + 1}-0"
            ttl_ms = "" if one.ttl is None else max(1, int(one.ttl * 1000))
            run = "" if one.end is None else self._key(f"r:{one.channel}")
            arguments += [pending.payload, "+", int(one.key is not None), keep, ttl_ms, run, one.end or ""]
        answer: list[Any] = await self._publish_script(keys=keys, args=arguments)
        epoch, offset = answer[0].decode(), int(answer[1])
        self._seen_end = epoch, max(offset, self._seen_end[1]) if epoch == self._seen_end[0] else offset
        return answer

    def _known_end(self) -> tuple[str, int]:
        """Return an epoch, and the greatest offset that the server is known to have had in it.

        A server that has less has lost events. The script checks this before it publishes. Otherwise it could give an
        id a second time, until a reader notices the loss.
        """
        log = self.dispatcher.log
        epoch, offset = self._seen_end
        return epoch, max(offset, log.last_offset) if epoch == log.epoch else offset

    async def _fetch_log_end(self) -> tuple[str, int]:
        epoch, offset, *_ = await self._run_publish_script([], 0)
        return epoch.decode(), int(offset)

    async def _fetch_epoch_start(self) -> tuple[str, int]:
        epoch, _, _, start, _ = await self._run_publish_script([], 0)
        return epoch.decode(), int(start)

    # Following the log

    async def _catch_up(self, *, first: bool) -> None:
        log = self.dispatcher.log
        while True:
            epoch, last_offset, now_ms, start, _ = await self._run_publish_script([], 0)
            epoch, last_offset, start = epoch.decode(), int(last_offset), int(start)
            self._clock_skew_s = clock() - int(now_ms) / 1000
            run_id = await self._fetch_server_run_id()
            if first or epoch != log.epoch:
                break
            if await self._is_same_log(last_offset, same_process=run_id == self._server_run_id != b""):
                self._server_run_id = run_id
                if log.last_offset < last_offset:
                    await self._fill_gap(last_offset)
                return
            # Clients may have ids of lost events, so all later ids get another epoch. The first process to get here
            # begins it, and the others find it.
            self._warn_of_lost_events()
            await self._run_publish_script([], 0, replace_epoch=epoch)
        self._server_run_id = run_id
        known: list[tuple[str, int]] = []
        floor = start
        if first:
            known, floor = await self._fetch_channel_offsets(last_offset)
        else:  # events that were published since this epoch began are read next
            last_offset = start
        await self._restart(epoch, last_offset, known, floor)

    async def _restart(self, epoch: str, last_offset: int, known: list[tuple[str, int]], floor: int) -> None:
        if self._state == "connecting":  # fail now if the user may not run XREAD
            await self._client.xread({self._key("log"): f"{last_offset}-0"}, count=1)
        found = await self._client.xrange(self._key("log"), f"{last_offset}-0", f"{last_offset}-0")
        self._last_entry = _LastEntry(last_offset, found[0][1]) if found else None
        self.dispatcher.restart(epoch, last_offset, known, floor=floor)
        self._after_restart()

    async def _fetch_channel_offsets(self, last_offset: int) -> tuple[list[tuple[str, int]], int]:
        """Return the last offset of each channel, and that of all forgotten channels.

        Offsets after `last_offset` are cut to it, since those events have not been read yet.
        """
        pipeline = self._client.pipeline(transaction=False)
        pipeline.zrange(self._key("last"), 0, -1, withscores=True)
        pipeline.hget(self._key("meta"), "floor")
        known, floor = await pipeline.execute()
        offsets = [(name.decode(), min(int(score), last_offset)) for name, score in known if name != CONTROL.encode()]
        return offsets, min(int(floor or 0), last_offset)

    async def _fetch_server_run_id(self) -> bytes:
        """Return the id that a server process draws when it starts; empty if the user may not run ``INFO``."""
        try:
            info = await self._client.info("server")
        except ResponseError:
            return b""
        return str(info.get("run_id", "")).encode()

    async def _is_same_log(self, last_offset: int, *, same_process: bool) -> bool:
        """Return whether the server still has the entry that was read last.

        Args:
            last_offset: The end of the server's log.
            same_process: Whether the server has not been restarted since.
        """
        own = self.dispatcher.log.last_offset
        if last_offset < own:
            return False
        if same_process:  # a process that loses its keys begins another epoch
            return True
        last = self._last_entry
        if last is None:
            return own == 0  # another process, and no entry to compare
        entry_id = f"{last.offset}-0"
        found = last.matches(await self._client.xrange(self._key("log"), entry_id, entry_id))
        if found is None and b"c" in last.fields:
            found = last.matches(
                await self._client.xrange(self._channel_key(last.fields[b"c"].decode()), entry_id, entry_id)
            )
        return found is True

    async def _read_log(self) -> None:
        log, key = self.dispatcher.log, self._key("log")
        while True:
            try:
                answer = await self._client.xread(
                    {key: f"{log.last_offset}-0"}, count=self._read_count, block=_BLOCK_MS
                )
            except RedisTimeoutError:
                # So many large entries may not arrive within the timeout, and never would.
                self._read_count = max(1, self._read_count // 4)
                raise
            self._read_count = min(_READ_COUNT, self._read_count + 8)
            entries = [entry for _, batch in _streams_of(answer) for entry in batch]
            for taken, (entry_id, fields) in enumerate(entries, 1):
                if fields is None or _offset(entry_id) != log.last_offset + 1 or fields.get(b"x") != log.epoch.encode():
                    return
                self._receive(log.last_offset + 1, fields[b"c"].decode(), fields)
                self._last_entry = _LastEntry(log.last_offset, fields)
                if taken % self._burst == 0:
                    await self._yield_to_streams()
            if entries:
                await self._yield_to_streams()
            elif await self._fetch_log_end() != (log.epoch, log.last_offset):
                return

    def _receive(self, offset: int, channel: str, fields: dict[bytes, bytes]) -> None:
        """Pass an entry to the dispatcher."""
        self._received += 1
        if channel == CONTROL:
            self.dispatcher.log.skip(offset)
            self._handle_control(fields[b"e"])
            return
        decoded = self._decode(offset, fields)
        if decoded is None:
            self.dispatcher.log.skip(offset)
        else:
            event, end = decoded
            self.dispatcher.publish(channel, event, offset=offset, time=self._published_at(fields), end=end)

    def _decode(self, offset: int, fields: dict[bytes, bytes]) -> Any:
        """Return the event of an entry and its ``end``; log an invalid payload and return ``None``."""
        try:
            return codec.load(fields[b"e"])
        except InvalidEventError:
            logger.exception("skipped invalid event %d of %s", offset, self.url, extra=self._log_extra)
            return None

    def _published_at(self, fields: dict[bytes, bytes]) -> float:
        """Return the time of an entry, by `clock`."""
        return int(fields[b"t"]) / 1000 + self._clock_skew_s

    async def _fill_gap(self, last_offset: int) -> None:
        """Catch up from the channels' streams, since the log was trimmed past this process."""
        log = self.dispatcher.log
        pipeline = self._client.pipeline(transaction=False)
        # A channel with events after `last_offset` may also have some before it.
        pipeline.zrangebyscore(self._key("last"), f"({log.last_offset}", "+inf", withscores=True)
        pipeline.hget(self._key("meta"), "floor")
        pipeline.xrange(self._key("log"), f"({log.last_offset}-0", f"{log.last_offset + 1}-0")
        changed, floor, following = await pipeline.execute()
        if following:
            return  # the log still has the next entry
        last_offset = max([last_offset, *(int(score) for _, score in changed)])
        if int(floor or 0) > log.last_offset:
            # The server has forgotten channels meanwhile, and their names are lost.
            await self._restart(log.epoch, last_offset, *await self._fetch_channel_offsets(last_offset))
            return
        found = await self._collect_missed(changed, last_offset)
        for taken, (offset, channel, fields) in enumerate(found, 1):
            if fields is None:
                with self.dispatcher.lock:
                    log.skip(offset)
                self.dispatcher.miss(channel, offset)
            else:
                self._receive(offset, channel, fields)
                self._last_entry = _LastEntry(offset, {**fields, b"c": channel.encode()})
            if taken % self._burst == 0:
                await self._yield_to_streams()
        if log.last_offset < last_offset:
            with self.dispatcher.lock:
                log.skip(last_offset)
        await self._yield_to_streams()

    async def _collect_missed(
        self, changed: list[tuple[bytes, float]], last_offset: int
    ) -> list[tuple[int, str, dict[bytes, bytes] | None]]:
        """Return the events up to `last_offset` that were not read, in the order of their offsets.

        Args:
            changed: The channels with events that were not read, each with its last offset.
            last_offset: Where to stop.

        Returns:
            Offset, channel and fields of each event. Without fields, events of the channel up to that offset are lost
            or nobody here reads them. Such an entry is sorted by its offset like the others: a subscriber that gets a
            reset for it continues after that offset.
        """
        own = self.dispatcher.log.last_offset
        wanted = [
            name.decode() for name, _ in changed if name == CONTROL.encode() or self.dispatcher.is_wanted(name.decode())
        ]
        missed = {name.decode(): int(score) for name, score in changed}
        found: list[tuple[int, str, dict[bytes, bytes] | None]] = []
        for channel, entries in await self._read_channels(wanted, after=own, until=last_offset):
            if entries and (int(entries[0][1][b"l"]) <= own or channel == CONTROL):
                del missed[channel]  # the event before the first one was read
            elif entries:
                missed[channel] = int(entries[0][1][b"l"])
            found += [(_offset(entry_id), channel, fields) for entry_id, fields in entries]
        found += [(offset, channel, None) for channel, offset in missed.items()]
        found.sort(key=lambda each: each[0])
        return found

    async def _read_channels(self, names: list[str], *, after: int, until: int) -> list[tuple[str, list[Any]]]:
        """Return the entries of channels with offsets greater than `after`, up to and including `until`."""
        found: list[tuple[str, list[Any]]] = []
        for chunk in _chunks(names):
            pipeline = self._client.pipeline(transaction=False)
            for name in chunk:
                pipeline.xrange(self._channel_key(name), f"({after}-0", f"{until}-0")
            found += zip(chunk, await pipeline.execute(), strict=True)
        return found

    async def _load_channels(self, channels: list[str]) -> None:
        log = self.dispatcher.log
        epoch, last_offset = log.epoch, log.last_offset
        offsets: dict[str, int] = {}
        for chunk in _chunks(channels):
            pipeline = self._client.pipeline(transaction=False)
            for name in chunk:
                pipeline.zscore(self._key("last"), name)
            pipeline.hget(self._key("meta"), "floor")
            *scores, floor = await pipeline.execute()
            offsets.update(
                {name: int(floor if score is None else score) for name, score in zip(chunk, scores, strict=True)}
            )
        for channel, entries in await self._read_channels(channels, after=0, until=last_offset):
            loaded: list[Entry] = []
            for entry_id, fields in entries:
                decoded = self._decode(_offset(entry_id), fields)
                if decoded is not None:
                    event, end = decoded
                    loaded.append(log.entry(_offset(entry_id), channel, event, self._published_at(fields), end=end))
            with self.dispatcher.lock:
                if log.epoch != epoch:
                    return
                trimmed = int(entries[0][1][b"l"]) if entries else min(offsets[channel], last_offset)
                log.fill(channel, loaded, trimmed, last_offset)

    # Publishing

    async def _send(self, batch: list[PendingPublication], attempt: int) -> list[str]:
        *_, ids = await self._run_publish_script(batch, attempt)
        if ids == b"stale":
            raise ResponseError("a later batch of this process was published first")
        return str(ids, "ascii").split(" ")

    # Leases of runs

    async def acquire_lease(
        self,
        name: str,
        max_bytes: int,
        ttl: float,
        *,
        replace_ended: bool,
        ended_start: int,  # noqa: ARG002 (publish.lua records the end of a run together with its last event)
    ) -> tuple[RunLease, bool]:
        """Acquire the lease of a run, or return the lease that exists."""
        token = secrets.token_hex(8)
        acquire = partial(self._acquire_lease, name, max_bytes, ttl, token, replace_ended=replace_ended)
        return await self._acquire_or_release(name, token, acquire)

    async def _release_lease(self, name: str, token: str) -> None:
        await self._release_script(keys=[self._key(f"r:{name}")], args=[token])

    async def _acquire_lease(
        self, name: str, max_bytes: int, ttl: float, token: str, *, replace_ended: bool
    ) -> tuple[RunLease, bool]:
        await self._sync()  # learns the current epoch
        while True:
            acquired, fields = await self._lease_script(
                keys=[self._key(f"r:{name}"), self._key("meta")],
                args=[self._holder, max_bytes, ttl, int(replace_ended), _LEASE_MS, token],
            )
            lease = _parse_lease(dict(zip(fields[::2], fields[1::2], strict=True)))
            lease = await self._in_current_epoch(lease)
            if acquired or not lease.is_gone(self.dispatcher.log.epoch):
                return lease, bool(acquired)
            replace_ended = True

    async def _fetch_lease(self, name: str) -> RunLease | None:
        fields = await self._client.hgetall(self._key(f"r:{name}"))
        return _parse_lease(fields) if fields else None

    async def _renew_lease(self, name: str, lease: RunLease) -> bool:
        arguments = [self._holder, _LEASE_MS, lease.epoch, lease.start]
        for field in ("max_bytes", "ttl", "outcome", "final", "epoch", "start"):
            arguments += [field, getattr(lease, field)]
        arguments += ["whole", int(lease.whole)]
        return bool(await self._renew_script(keys=[self._key(f"r:{name}")], args=arguments))


def _parse_lease(fields: dict[bytes, bytes]) -> RunLease:
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


def _chunks(channels: list[str]) -> Iterator[list[str]]:
    """Split channels into lists for one pipeline each."""
    for first in range(0, len(channels), _CHANNELS_PER_PIPELINE):
        yield channels[first : first + _CHANNELS_PER_PIPELINE]


def _streams_of(answer: Any) -> Iterable[tuple[bytes, Any]]:
    """Return the streams of an answer to ``XREAD`` with their entries, from its RESP2 or RESP3 format."""
    if isinstance(answer, dict):
        return [(name, entry) for name, batches in answer.items() for entry in batches]
    return answer or ()
