"""`Backend`: what a broker needs of the engine that distributes its events, and what that engine promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from asgi_sse.broker.dispatcher import Dispatcher
    from asgi_sse.protocol.event import ServerSentEvent

State: TypeAlias = Literal[
    "local",  # in memory: there is nothing to be connected to
    "closed",
    "connecting",
    "connected",
    "disconnected",  # it was connected, and tries again
]


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    """A broker, as this process sees it.

    Attributes:
        state: ``local``, ``closed``, ``connecting``, ``connected`` or ``disconnected``.
        error: What went wrong last while it is not connected; ``""``: nothing.
        published: Events published from here, and acknowledged.
        received: Events that came to this process, its own ones too.
        reconnects: Times that the connection was lost and made again.
        restarts: Times that the log was found to be another one, or to have lost what was here: each is a ``reset``
            for all who read.
        subscriptions: Those that are read now.
        channels: Channels of which there are events in memory.
        last_event_id: The id of the last event.
        lag: Events that the subscription has not taken yet that is furthest behind. Of one that reads many channels at
            once, those of others that came meanwhile may count as well.
        round_trip: Seconds that an event which was published from here took to come back to this process, as every
            reader gets it: a late one, of those sent together. If one has not come, or was not even acknowledged, for
            longer than that: for how long. 0 in memory.
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
    """A run, as all processes see it.

    Attributes:
        holder: The process that it runs in.
        epoch: That of the log whose numbers these are: the one that it began in, or a later one that it goes on in.
        start: The number behind which its events are.
        max_bytes: Memory that its events may take in each process.
        ttl: Seconds for which it can be had after its end.
        outcome: How it ended; ``""``: it goes on.
        final: The number of its last event, once it has ended.
        whole: Whether the log has it from its first event on: it has not, if it began in an earlier one.
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
        """Whether it ended in a log that there is no more: this is the epoch that there is."""
        return bool(self.outcome) and self.epoch != epoch

    def is_before(self, later: RunLease) -> bool:
        """Whether it had ended when that one began: then an engine that has lost events has brought it back."""
        return bool(self.outcome) and (self.epoch != later.epoch or self.start < later.start)


@dataclass(slots=True)
class Publication:
    """What is to be published.

    Attributes:
        channel: The channel's name.
        event: The event; it has no id.
        key: Publishing it again, with the same key and to the same channel, within two minutes does nothing.
        end: How the run ended of which it is the last event.
        keep_after: Of a run: the number behind which its channel keeps all. ``None``: it is no run's, and its channel
            keeps ``history``.
        ttl: Of the last event of a run: the seconds for which its channel is kept from now on.
    """

    channel: str
    event: ServerSentEvent
    key: str | None = None
    end: str | None = None
    keep_after: int | None = None
    ttl: float | None = None


class Backend(ABC):
    """Numbers events and brings each of them to the hubs of all processes that have it open.

    What each back end promises, and ``tests/broker/test_contract.py`` asks of each:

    - **Order.** There is one sequence for all channels, and every process sees the events in its order. What one task
      publishes, one after the other, is in that order.
    - **Acknowledged.** When `publish` has returned an id, the event is in the log. When it raises `BrokerError`, the
      event may be in it, and then stands there once: to publish again with the same key is safe.
    - **No gap, no duplicate.** A dispatcher has each event once; a reader that resumes after the id of an event has
      all that follows, as long as the engine keeps it, whichever process gave it the id.
    - **Never silently.** A dispatcher that finds events gone, or the log to be another one than before (an engine that
      was restarted empty, flushed, or has come back with less than was acknowledged), tells each reader that may have
      missed something. The log of an engine that has lost acknowledged events gets another epoch, so that no id of
      before stands for anything else.
    - **Bounded.** What is kept has the limits of the broker; what waits to be published, those of its callers, each of
      whom waits for its own event, ``timeout`` seconds at the most.

    Args:
        dispatcher: Where events go.
    """

    is_alone: ClassVar[bool] = False
    """Whether there is no other process."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.on_cancel: Callable[[str], None] = lambda _: None  # another process asks for a run to be cancelled
        self._published = 0

    @abstractmethod
    async def open(self) -> None:
        """Connect, or raise `BrokerError`."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of everything."""

    @abstractmethod
    async def publish(self, publication: Publication, *, wait: bool = False) -> str:
        """Publish, and give the id.

        Args:
            publication: What.
            wait: As long as it takes, instead of the time that a publisher has.

        Raises:
            BrokerError: It could not be, or it is not known whether it could.
        """

    @abstractmethod
    def post(self, publication: Publication) -> None:
        """Publish as soon as it can be, from any thread, and do not wait for it."""

    @abstractmethod
    def statistics(self) -> BrokerStatistics:
        """How it is."""

    # Runs

    @abstractmethod
    async def lease(self, name: str, max_bytes: int, ttl: float, *, again: bool, over: int) -> tuple[RunLease, bool]:
        """Make the run `name` one of this process.

        Args:
            name: The run.
            max_bytes: See `RunLease`.
            ttl: See `RunLease`.
            again: Whether one that has ended may be begun again.
            over: The start of the one that was seen to end here; -1: none was.

        Returns:
            It, and whether it is new and of this process: else it is the one that there is.
        """

    @abstractmethod
    async def find(self, name: str) -> RunLease | None:
        """The run of that name: it goes on somewhere, or has ended less than its ``ttl`` ago.

        One that goes on is told of in config of the log that there is; one that ended in an earlier log, as of that.
        """

    @abstractmethod
    async def renew(self, name: str, lease: RunLease) -> bool:
        """This process has it still. False: it does not, since it was silent for too long."""

    @abstractmethod
    def ask_to_stop(self, name: str, holder: str) -> None:
        """Ask the process `holder` to cancel its run. From any thread."""

    @abstractmethod
    def check_open(self) -> object:
        """Raise `BrokerError` unless it is open."""

    def _statistics(self, state: State, **figures: Any) -> BrokerStatistics:
        dispatcher = self.dispatcher
        with dispatcher.lock:
            channels, last_event_id = dispatcher.log.kept_channels, dispatcher.log.id_of(dispatcher.log.last_offset)
        given = {
            "error": "",
            "received": self._published,
            "reconnects": 0,
            "restarts": 0,
            "round_trip": 0.0,
            **figures,
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
