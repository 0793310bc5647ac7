"""`StreamTimeouts`: when something of a stream is due, and what."""

import math
import random
from typing import Final, Literal, TypeAlias

from .options import StreamOptions
from .writer import StreamWriter

_FIRST_EVENT_S: Final = 1.0
"""Seconds for which the response start waits for a first event that is being made, if there is no `open_timeout`."""

_ABORT_WAIT_S: Final = 1.0
"""Seconds that a body has to end after the drain's deadline, before its client is dropped."""

Due: TypeAlias = Literal["drained", "send_timeout", "grace", "lifetime", "open", "keep_alive"]
"""What is due: the drain's deadline, the client's time for a message, the source's grace period, the stream's
lifetime, the response start, or a keep-alive."""


class StreamTimeouts:
    """The deadlines of one stream, in its event loop's time. ``inf`` is never.

    Args:
        options: The stream's options.
        writer: The stream's writer, which knows since when it is idle or waits.
        now: The current time.
        waits_for_event: Whether the first event is being made and may still fail.

    Attributes:
        drain_deadline: When the server's patience with the stream ends.
        grace_ends: When the source has used up its grace period, during a drain.
        expires_at: When the client's access ends.
    """

    __slots__ = (
        "_lifetime_ends",
        "_open_at",
        "_open_wait_s",
        "_options",
        "_writer",
        "drain_deadline",
        "expires_at",
        "grace_ends",
    )

    def __init__(self, options: StreamOptions, writer: StreamWriter, now: float, *, waits_for_event: bool) -> None:
        self._options = options
        self._writer = writer
        self._open_wait_s = options.open_timeout or (_FIRST_EVENT_S if waits_for_event else 0)
        self._open_at = now + self._open_wait_s if self._open_wait_s else math.inf
        # Spread, so that the clients of one deploy do not all reconnect at once.
        spread = random.uniform(0.8, 1.0)  # noqa: S311
        self._lifetime_ends = now + options.max_lifetime * spread if options.max_lifetime else math.inf
        self.drain_deadline: float = math.inf
        self.grace_ends: float = math.inf
        self.expires_at: float = math.inf

    def start_drain(self, now: float, within: float, grace: float | None) -> float:
        """Set the deadlines of a drain. An earlier drain's earlier deadline stays.

        Args:
            now: The current time.
            within: Seconds that the drain gives the stream.
            grace: Seconds that the source was promised. They count even if they are more.

        Returns:
            The earlier of the two deadlines.
        """
        self.drain_deadline = min(self.drain_deadline, now + max(within, grace or 0))
        if grace is not None:
            self.grace_ends = min(self.grace_ends, now + grace)
        return min(self.drain_deadline, self.grace_ends)

    def extend_drain(self, now: float) -> None:
        """Give the body a last moment to end properly."""
        self.drain_deadline = now + _ABORT_WAIT_S

    def restart_open(self, now: float) -> None:
        """Start the wait for the first event again, since the client is still uploading."""
        self._open_at = now + self._open_wait_s

    def due(self, now: float, *, closing: bool) -> Due | None:
        """Return the most urgent thing that is due at `now`.

        Args:
            now: The current time.
            closing: Whether the stream's end has begun. Then only its deadline and the client's time count.
        """
        if now >= self.drain_deadline:
            return "drained"
        if now >= self._send_deadline():
            return "send_timeout"
        return None if closing else self._due_while_open(now)

    def _due_while_open(self, now: float) -> Due | None:
        if now >= self.grace_ends:
            return "grace"
        if now >= self._lifetime_ends or now >= self.expires_at:
            return "lifetime"
        writer, ping = self._writer, self._options.ping
        if not writer.opened:
            return "open" if now >= self._open_at else None
        if ping and writer.waiting_since is None and now >= writer.idle_since + ping:
            return "keep_alive"
        return None

    def next_check(self, now: float, *, closing: bool) -> float:
        """Return when to call `due` again."""
        when = min(self.drain_deadline, self._send_deadline())
        if closing:
            return when
        when = min(when, self._lifetime_ends, self.expires_at, self.grace_ends)
        writer, ping = self._writer, self._options.ping
        if not writer.opened:
            return min(when, self._open_at)
        if ping:
            # No keep-alive is due during a send, but one will be after it, and nothing arms the timer then.
            quiet_since = writer.idle_since if writer.waiting_since is None else now
            when = min(when, quiet_since + ping)
        return when

    def _send_deadline(self) -> float:
        since, timeout = self._writer.waiting_since, self._options.send_timeout
        return math.inf if since is None or not timeout else since + timeout
