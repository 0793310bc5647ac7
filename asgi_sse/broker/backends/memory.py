"""The back end in memory: the dispatcher's log is all there is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from asgi_sse.broker.dispatcher import clock
from asgi_sse.errors import BrokerError

from .base import Backend, BrokerStatistics, Publication, RunLease

if TYPE_CHECKING:
    from asgi_sse.broker.dispatcher import Dispatcher

_IDEMPOTENCY_WINDOW: Final = 120.0
"""Seconds for which a key is known: as long as NATS JetStream does by default."""

_IDEMPOTENCY_KEYS: Final = 1_000_000


class MemoryBackend(Backend):
    """Promises what `Backend` does to the readers of this process; they all lose everything when it ends."""

    is_alone = True

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(dispatcher)
        self._keys_lock = threading.Lock()
        self._keys: OrderedDict[tuple[str, str], tuple[float, str]] = OrderedDict()

    async def open(self) -> None:
        """See `Backend`."""

    async def close(self) -> None:
        """See `Backend`."""

    async def publish(self, publication: Publication, *, wait: bool = False) -> str:  # noqa: ARG002 (nothing to wait for)
        """See `Backend`."""
        return self.publish_nowait(publication)

    def post(self, publication: Publication) -> None:
        """See `Backend`."""
        self.publish_nowait(publication)

    def publish_nowait(self, publication: Publication) -> str:
        """As `publish`, from any thread.

        Raises:
            BrokerError: There were more than a million keys within two minutes.
        """
        if publication.key is None:
            return self._append(publication)
        place = publication.channel, publication.key
        with self._keys_lock:
            now = clock()
            while self._keys and next(iter(self._keys.values()))[0] <= now - _IDEMPOTENCY_WINDOW:
                self._keys.popitem(last=False)
            known = self._keys.get(place)
            if known is not None:
                return known[1]
            if len(self._keys) >= _IDEMPOTENCY_KEYS:
                raise BrokerError(
                    f"more than {_IDEMPOTENCY_KEYS} idempotency keys within {_IDEMPOTENCY_WINDOW:g} s: publish without"
                )
            event_id = self._append(publication)
            self._keys[place] = now, event_id
            return event_id

    def _append(self, publication: Publication) -> str:
        self._published += 1
        entry = self.dispatcher.publish(publication.channel, publication.event, end=publication.end)
        return self.dispatcher.log.id_of(entry.offset)

    def check_open(self) -> None:
        """See `Backend`: it always is."""

    def statistics(self) -> BrokerStatistics:
        """See `Backend`."""
        return self._statistics("local")

    async def lease(self, name: str, max_bytes: int, ttl: float, *, again: bool, over: int) -> tuple[RunLease, bool]:  # noqa: ARG002
        """See `Backend`: the runs of this process are all there are, and it knows them."""
        log = self.dispatcher.log
        return RunLease("", log.epoch, log.last_offset, max_bytes, ttl), True

    async def find(self, name: str) -> RunLease | None:  # noqa: ARG002
        """See `Backend`."""
        return None

    async def renew(self, name: str, lease: RunLease) -> bool:  # noqa: ARG002
        """See `Backend`."""
        return True

    def ask_to_stop(self, name: str, holder: str) -> None:
        """See `Backend`: it is never another process."""
