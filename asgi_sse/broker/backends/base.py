"""`Backend`: the contract between a broker and the place where its events are stored.

Read the docstring of `Backend` before you write one: it lists everything that the rest of the broker relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.protocol.event import ServerSentEvent

State: TypeAlias = Literal[
    "local",  # in memory, where there is no connection
    "closed",
    "connecting",
    "connected",
    "disconnected",  # the connection was lost, and the backend tries to connect again
]


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    """The state and the counters of a broker in this process.

    Counters start at 0 with the broker, and go on when it is closed and opened again.

    Attributes:
        state: ``local`` (in memory), ``closed``, ``connecting``, ``connected`` or ``disconnected``.
        error: The last error while the broker is not connected; ``""`` if there is none.
        published: Number of events that this process published and the server acknowledged.
        received: Number of events that this process received, including those that it published itself.
        reconnects: Number of times that a lost connection was restored.
        restarts: Number of times that the log was replaced or had lost events. Each one sends a ``reset`` to all
            subscribers of this process that may have missed something.
        subscriptions: Number of subscriptions that are being read now.
        channels: Number of channels that have events in the memory of this process.
        last_event_id: The id of the last event in the log, as far as this process has read it.
        lag: Number of events that the slowest subscription has not read yet. For a subscription of more than a few
            channels this is an upper limit: events of other channels may be counted too.
        round_trip: Seconds from sending an event until this process received it back, as every subscriber does. It is
            measured on the last event of a batch. While an event takes longer than the last measured one, this is the
            time it has taken so far, also if the server has not acknowledged it. 0 in memory.
    """

    state: State
    error: str
    published: int
    received: int
    reconnects: int
    restarts: int
    subscriptions: int
    channels: int
    last_event_id: str
    lag: int
    round_trip: float


@dataclass(slots=True)
class RunLease:
    """The right of one process to run a run, and the result of the run once it has ended.

    All processes see the same lease. Its offsets count in one epoch, so a lease without its epoch means nothing.

    Attributes:
        holder: Id of the process that runs it.
        epoch: The epoch of `start` and `final`. A run that outlives its log continues in the next epoch.
        start: The offset after which the events of the run begin.
        max_bytes: Bytes of memory that the events of the run may take in each process.
        ttl: Seconds for which the run can be read after its end.
        outcome: How the run ended; ``""`` while it is running.
        final: The offset of the last event of the run; 0 while it is running.
        whole: Whether the log has all events of the run. False if the run began in an earlier epoch.
    """

    holder: str
    epoch: str
    start: int
    max_bytes: int
    ttl: float
    outcome: str = ""
    final: int = 0
    whole: bool = True

    def is_gone(self, epoch: str) -> bool:
        """Return whether the run ended in an earlier log, so that its events no longer exist.

        Args:
            epoch: The current epoch.
        """
        return bool(self.outcome) and self.epoch != epoch

    def ended_before(self, later: RunLease) -> bool:
        """Return whether this run ended before the run `later` began.

        Both have the same name. If the server has this lease although `later` exists, the server was rolled back.
        """
        return bool(self.outcome) and (self.epoch != later.epoch or self.start < later.start)


@dataclass(slots=True)
class Publication:
    """An event to publish, and how to store it.

    Attributes:
        channel: The name of the channel.
        event: The event, without an id.
        key: Idempotency key. A second publication with the same key to the same channel within two minutes adds no
            event; it returns the id of the first one. ``None``: no key.
        end: How the run ended, on the last event of a run; ``None`` on any other event.
        keep_after: For an event of a run: the offset after which the channel keeps all its events. ``None``: the event
            belongs to no run, and the channel keeps its usual ``history``.
        ttl: On the last event of a run: seconds for which the channel is kept from now on.
    """

    channel: str
    event: ServerSentEvent
    key: str | None = None
    end: str | None = None
    keep_after: int | None = None
    ttl: float | None = None


class Backend(ABC):
    """Stores the events of a broker in a log, and delivers them to the dispatcher of this process.

    Every process that opens the broker has a backend and a dispatcher. The backends of all processes share one log,
    which is usually on a server. In memory, the dispatcher's own log is the only one.

    A backend promises the following. ``tests/broker/backends/test_contract.py`` checks each promise on each backend.

    1. **One order.** All channels share one sequence of offsets, and every process sees the events in this order. The
       id of an event is ``<epoch>-<offset>``. Offsets grow, and may have holes. Events that one task publishes one
       after another keep their order.
    2. **Acknowledged.** When `publish` returns an id, the event is in the log. When it raises `BrokerError`, the event
       may be in the log, at most once; publishing it again with the same key is safe.
    3. **Once.** A key identifies an event of one channel for two minutes, whichever process publishes it.
    4. **No gap, no duplicate.** The dispatcher receives each event once. A subscriber that resumes after an id receives
       all events that follow, from any process, as long as the log keeps them.
    5. **Never silent.** If events are lost, every subscriber that may have missed one receives a ``reset``. Events
       are lost if the server was restarted empty, was emptied, came back with less than it had acknowledged, or
       dropped events that this process had not read. If the log has lost acknowledged events, it gets a new epoch, and
       all processes agree on it. No id that was given out ever stands for a second event.
    6. **Bounded.** The log keeps what the limits of the broker allow. Each publisher waits for its own event, and at
       most ``timeout`` seconds.
    7. **Leases of runs.** At most one process holds the lease of a run. The holder renews its lease every 10 seconds. A
       lease that was not renewed for 30 seconds has expired, and any process may take it over. The lease of an ended
       run stays for its ``ttl``. `find_lease` and `acquire_lease` never return a running lease in an old epoch.

    To keep these promises, a backend calls the dispatcher from its event loop:

    - ``dispatcher.publish`` for each event, in the order of offsets, with its offset, its time and its ``end``.
    - ``dispatcher.log.skip`` for an offset without an event.
    - ``dispatcher.miss`` if events of one channel were lost.
    - ``dispatcher.restart`` if the log has another epoch, or if events of unknown channels were lost.

    A backend whose log is on a server also sets ``dispatcher.upstream``, which fetches what is not in memory here. If
    another process asks to cancel a run that this process holds, the backend calls `on_cancel` with the run's name.

    Args:
        dispatcher: Receives the events.

    Attributes:
        dispatcher: Receives the events.
        on_cancel: Called with the name of a run that another process asks to cancel. The broker sets it.
    """

    is_alone: ClassVar[bool] = False
    """Whether this process is the only one, so that no other can hold a run or publish an event."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.on_cancel: Callable[[str], None] = lambda _: None
        self._published = 0

    @abstractmethod
    async def open(self) -> None:
        """Connect, and bring the dispatcher's log to the end of the server's log.

        A backend may be opened again after `close`.

        Raises:
            BrokerError: The server could not be reached, or refused a command that the backend needs.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop all tasks and close all connections. Publishers that still wait get a `BrokerError`."""

    @abstractmethod
    async def publish(self, publication: Publication, *, wait: bool = False) -> str:
        """Publish an event and return its id, once the server has acknowledged it.

        May be called from any event loop.

        Args:
            publication: The event and how to store it.
            wait: Wait for the acknowledgement without a time limit.

        Raises:
            BrokerError: The event was refused, or was not acknowledged in time. The message says whether the event may
                have been published.
        """

    @abstractmethod
    def post(self, publication: Publication) -> None:
        """Publish an event without waiting for it. A failure is logged. May be called from any thread."""

    @abstractmethod
    def statistics(self) -> BrokerStatistics:
        """Return the current state and counters. May be called from any thread."""

    @abstractmethod
    def check_open(self) -> object:
        """Raise `BrokerError` unless the backend is open."""

    # Leases of runs

    @abstractmethod
    async def acquire_lease(
        self, name: str, max_bytes: int, ttl: float, *, replace_ended: bool, ended_start: int
    ) -> tuple[RunLease, bool]:
        """Acquire the lease of the run `name` for this process, or return the lease that exists.

        If the caller is cancelled or gets an error, the lease is released again.

        Args:
            name: The name of the run.
            max_bytes: Bytes of memory that the run's events may take; stored in the lease.
            ttl: Seconds for which the run can be read after its end; stored in the lease.
            replace_ended: Whether a run that has ended may begin again. A run that ended in an earlier log may always
                begin again.
            ended_start: The `start` of a run of this name that this process has seen end, although the server may not
                have recorded the end yet; -1 if there is none.

        Returns:
            The lease, and whether it was acquired now. If not, it belongs to a run that is running or has ended.

        Raises:
            BrokerError: The server did not answer in time.
        """

    @abstractmethod
    async def find_lease(self, name: str) -> RunLease | None:
        """Return the lease of the run `name`, or ``None`` if no such run is running or ended within its ``ttl``.

        A running lease is in the current epoch. A lease that ended in an earlier log keeps that epoch.

        Raises:
            BrokerError: The server did not answer in time.
        """

    @abstractmethod
    async def renew_lease(self, name: str, lease: RunLease) -> bool:
        """Renew the lease of the run `name` for this process.

        If the server has no lease, or an expired one, or one of an earlier run, this process becomes the holder. So a
        process that wants to end a run whose holder is gone renews its lease first.

        Args:
            name: The name of the run.
            lease: The lease as this process knows it.

        Returns:
            False if another process holds the run.
        """

    @abstractmethod
    def request_cancel(self, name: str, holder: str) -> None:
        """Ask the process `holder` to cancel the run `name`. May be called from any thread."""

    def _make_statistics(self, state: State, **counters: Any) -> BrokerStatistics:
        """Return statistics with `counters`; the defaults are right for a backend without a connection."""
        dispatcher = self.dispatcher
        with dispatcher.lock:
            channels, last_event_id = dispatcher.log.kept_channels, dispatcher.log.id_of(dispatcher.log.last_offset)
        given = {
            "error": "",
            "received": self._published,
            "reconnects": 0,
            "restarts": 0,
            "round_trip": 0.0,
            **counters,
        }
        return BrokerStatistics(
            state=state,
            published=self._published,
            subscriptions=dispatcher.subscriber_count,
            channels=channels,
            last_event_id=last_event_id,
            lag=dispatcher.lag,
            **given,
        )
