"""`LeaseBucket`: the leases of runs on NATS."""

from __future__ import annotations

import json
from base64 import b32encode
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Final

import nats.js.errors

from .base import RunLease

if TYPE_CHECKING:
    from collections.abc import Callable

    from .jetstream import JetStream

_LEASE_S: Final = 30.0
"""Seconds after which a lease expires, unless it is renewed."""

_MAX_LEASES: Final = 100_000
"""Leases that the bucket keeps."""

_SERVER_TTL_MARGIN_S: Final = 60
"""Seconds for which the server keeps a lease after its expiry. Processes no longer read it then."""

_WRONG_REVISION: Final = frozenset({10071, 10164})
"""Error codes of the server for "wrong last sequence", with and without that sequence in the text."""


@dataclass(slots=True)
class StoredLease:
    """The lease of a run in the bucket.

    Attributes:
        lease: The lease.
        token: The token of the call that acquired it. A call whose answer was lost recognises its lease by it.
        revision: The sequence number of the message that holds it.
        age: Seconds since it was written.
    """

    lease: RunLease
    token: str
    revision: int
    age: float

    @property
    def is_expired(self) -> bool:
        """Whether a running lease was not renewed in time, or an ended one is older than its ``ttl``."""
        return self.age >= (self.lease.ttl if self.lease.outcome else _LEASE_S)


class LeaseBucket:
    """A JetStream stream that keeps the last message of each subject, as the key-value buckets of nats-py do.

    Args:
        name: The name of the bucket.
        connection: Returns the current connection.
        clock: Returns the server's time in seconds.
    """

    def __init__(self, name: str, connection: Callable[[], JetStream], clock: Callable[[], float]) -> None:
        self._stream = f"KV_{name}"
        self._keys = f"$KV.{name}."
        self._connection = connection
        self._clock = clock

    def _subject(self, run: str) -> str:
        return self._keys + b32encode(run.encode()).decode().rstrip("=")

    async def get(self, run: str) -> StoredLease | None:
        """Return the lease of a run, which may be expired."""
        found = await self._connection().get_message(self._stream, last_by_subj=self._subject(run))
        if found is None:
            return None
        fields = json.loads(found.payload)
        token = fields.pop("token")
        return StoredLease(RunLease(**fields), token, found.offset, self._clock() - found.time_ns / 1e9)

    async def write(self, run: str, lease: RunLease, token: str, revision: int) -> bool:
        """Write the lease of a run.

        Args:
            run: The name of the run.
            lease: The lease.
            token: See `StoredLease`.
            revision: The revision that it replaces; 0: there must be none.

        Returns:
            False, and nothing is written, if the bucket has another revision.
        """
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        if await self._allows_ttl():
            headers["Nats-TTL"] = str(ceil(lease.ttl if lease.outcome else _LEASE_S) + _SERVER_TTL_MARGIN_S)
        try:
            payload = json.dumps({**asdict(lease), "token": token}).encode()
            await self._connection().request(self._subject(run), payload, headers)
        except nats.js.errors.APIError as exc:
            if exc.err_code in _WRONG_REVISION:
                return False
            raise
        return True

    async def _allows_ttl(self) -> bool:
        """Return whether the server deletes expired leases; create the stream if there is none.

        Servers from 2.11 on do. Older ones drop the oldest leases when there are too many.
        """
        try:
            info = await self._connection().stream_info(self._stream)
        except nats.js.errors.NotFoundError:
            await self._connection().create_stream(
                {
                    "name": self._stream,
                    "subjects": [f"{self._keys}>"],
                    "storage": "file",
                    "retention": "limits",
                    "discard": "old",
                    "max_msgs": _MAX_LEASES,
                    "max_msgs_per_subject": 1,
                    "allow_rollup_hdrs": True,
                    "allow_direct": True,
                    "allow_msg_ttl": True,
                }
            )
            info = await self._connection().stream_info(self._stream)
        return bool(info.config.get("allow_msg_ttl"))
