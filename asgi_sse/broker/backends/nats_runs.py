"""`Bucket`: what NATS has of runs, a key and a value for each."""

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

_LEASE: Final = 30.0
"""Seconds for which a run goes on of whose process nothing is heard."""

_RUNS: Final = 100_000
"""Runs that the bucket knows."""

_SPARE: Final = 60
"""Seconds for which the server keeps a run's entry longer than anybody looks at it."""

_WRONG_REVISION: Final = frozenset({10071, 10164})
"""The server's codes for "wrong last sequence", with and without that sequence in the text."""


@dataclass(slots=True)
class RunEntry:
    """What the bucket has of a run.

    Attributes:
        lease: The run.
        token: Of the call that has made it: who has got no answer to that finds out so that it was its own.
        revision: The number of the entry.
        age: Seconds since it was written.
    """

    lease: RunLease
    token: str
    revision: int
    age: float

    @property
    def is_over(self) -> bool:
        """Whether nobody is to find it any more."""
        return self.age >= (self.lease.ttl if self.lease.outcome else _LEASE)


class Bucket:
    """A stream of JetStream that has the last message of each subject alone, as nats-py's buckets of keys and values.

    Args:
        name: Its name.
        link: Gives the connection.
        clock: Gives the server's time, in seconds.
    """

    def __init__(self, name: str, link: Callable[[], JetStream], clock: Callable[[], float]) -> None:
        self._stream = f"KV_{name}"
        self._keys = f"$KV.{name}."
        self._link = link
        self._clock = clock

    def _subject(self, run: str) -> str:
        return self._keys + b32encode(run.encode()).decode().rstrip("=")

    async def entry(self, run: str) -> RunEntry | None:
        """What there is of a run."""
        found = await self._link().message(self._stream, last_by_subj=self._subject(run))
        if found is None:
            return None
        fields = json.loads(found.payload)
        token = fields.pop("token")
        return RunEntry(RunLease(**fields), token, found.offset, self._clock() - found.time / 1e9)

    async def write(self, run: str, lease: RunLease, token: str, revision: int) -> bool:
        """Put it in the place of that revision. False: there is another one."""
        headers = {"Nats-Expected-Last-Subject-Sequence": str(revision)}
        if await self._forgets():
            headers["Nats-TTL"] = str(ceil(lease.ttl if lease.outcome else _LEASE) + _SPARE)
        try:
            payload = json.dumps({**asdict(lease), "token": token}).encode()
            await self._link().request(self._subject(run), payload, headers)
        except nats.js.errors.APIError as exc:
            if exc.err_code in _WRONG_REVISION:
                return False
            raise
        return True

    async def _forgets(self) -> bool:
        """Whether the server forgets entries by itself, as those from 2.11 on do; of others, the oldest go."""
        try:
            stream = await self._link().stream(self._stream)
        except nats.js.errors.NotFoundError:
            await self._link().make_stream(
                {
                    "name": self._stream,
                    "subjects": [f"{self._keys}>"],
                    "storage": "file",
                    "retention": "limits",
                    "discard": "old",
                    "max_msgs": _RUNS,
                    "max_msgs_per_subject": 1,
                    "allow_rollup_hdrs": True,
                    "allow_direct": True,
                    "allow_msg_ttl": True,
                }
            )
            stream = await self._link().stream(self._stream)
        return bool(stream.config.get("allow_msg_ttl"))
