"""`MemoryBackend`: keeps the events of a broker in this process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from asgi_sse.broker.dispatcher import clock
from asgi_sse.errors import BrokerError

from .base import Backend, BrokerStatistics, Publication, RunLease

if TYPE_CHECKING:
    from asgi_sse.broker.dispatcher import Dispatcher

_IDEMPOTENCY_WINDOW_S: Final = 120.0
"""Seconds for which a key is known: the default of NATS JetStream."""

_MAX_IDEMPOTENCY_KEYS: Final = 1_000_000


class MemoryBackend(Backend):
    """Stores events in the dispatcher's log, which is the only one. All events are lost when the process ends."""

    is_alone = True

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher)
        self._keys_lock = threading.Lock()
        self._keys: OrderedDict[tuple[str, str], tuple[float, str]] = OrderedDict()

    async def open(self) -> None:
        """Do nothing: memory is always open."""

    async def close(self) -> None:
        """Do nothing: the events stay until the process ends."""

    async def publish(self, publication: Publication, *, wait: bool = False) -> str:  # noqa: ARG002 (nothing to wait for)
        """Append the event and return its id."""
        return self.publish_nowait(publication)

    def post(self, publication: Publication) -> None:
        """Append the event."""
        self.publish_nowait(publication)

    def publish_nowait(self, publication: Publication) -> str:
        """Append the event and return its id. May be called from any thread.

        Raises:
            BrokerError: More than a million idempotency keys were used within two minutes.
        """
        if publication.key is None:
            return self._append(publication)
        key = publication.channel, publication.key
        with self._keys_lock:
            now = clock()
            while self._keys and next(iter(self._keys.values()))[0] <= now - _IDEMPOTENCY_WINDOW_S:
                self._keys.popitem(last=False)
            known = self._keys.get(key)
            if known is not None:
                return known[1]
            if len(self._keys) >= _MAX_IDEMPOTENCY_KEYS:
                raise BrokerError(
                    f"memory:// takes at most {_MAX_IDEMPOTENCY_KEYS} idempotency keys within "
                    f"{_IDEMPOTENCY_WINDOW_S:g} s; publish without a key, or more slowly"
                )
            event_id = self._append(publication)
            self._keys[key] = now, event_id
            return event_id

    def _append(self, publication: Publication) -> str:
        self._published += 1
        entry = self.dispatcher.publish(publication.channel, publication.event, end=publication.end)
        return self.dispatcher.log.id_of(entry.offset)

    def check_open(self) -> None:
        """Do nothing: memory is always open."""

    def statistics(self) -> BrokerStatistics:
        """Return the counters; the state is ``local``."""
        return self._make_statistics("local")

    async def acquire_lease(
        self,
        name: str,  # noqa: ARG002
        max_bytes: int,
        ttl: float,
        *,
        replace_ended: bool,  # noqa: ARG002
        ended_start: int,  # noqa: ARG002
    ) -> tuple[RunLease, bool]:
        """Return a new lease: the broker already knows all runs, which are in this process."""
        log = self.dispatcher.log
        return RunLease("", log.epoch, log.last_offset, max_bytes, ttl), True

    async def find_lease(self, name: str) -> RunLease | None:  # noqa: ARG002
        """Return ``None``: no other process has runs."""
        return None

    async def renew_lease(self, name: str, lease: RunLease) -> bool:  # noqa: ARG002
        """Return True: no other process can take the run over."""
        return True

    def request_cancel(self, name: str, holder: str) -> None:
        """Do nothing: no other process holds a run."""
