"""`FIGURES`: what is to be known of streams and brokers, by which names; and `Sampler`, which they are read from."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from asgi_sse.broker import Broker
from asgi_sse.broker.backends.base import BrokerStatistics, State
from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.stream.registry import RegistryStatistics, StreamRegistry, statistics_of_all

Brokers: TypeAlias = Broker | Iterable[Broker] | Mapping[str, Broker]
Labels: TypeAlias = dict[str, str]

_COMPRESSION: Final = ("encoded", "held", "buffered")


@dataclass(frozen=True, slots=True)
class Instrument:
    """One of them.

    Attributes:
        name: As Prometheus has it, without the ``_total`` of a counter.
        semantic: As OpenTelemetry has it.
        kind: A counter never goes down; a gauge is a number of things that come and go, or the state of one.
        unit: In UCUM: ``s``, ``By``, ``{event}``, …
        about: What it is, in a sentence.
        of: Takes it from the statistics: a number, or one for each value of `label`.
        label: What its values are told apart by, if there are several.
    """

    name: str
    semantic: str
    kind: Literal["counter", "gauge", "state"]
    unit: str
    about: str
    of: Callable[[Any], float | Mapping[str, float]]
    label: str = ""


def _closed(figures: RegistryStatistics) -> Mapping[str, float]:
    # All of them from the beginning: a rate from nothing to 1 is none.
    return {reason: figures.closed.get(reason, 0) for reason in get_args(CloseReason)}


def _compressed(figures: RegistryStatistics) -> Mapping[str, float]:
    return {kind: figures.compressed.get(kind, 0) for kind in _COMPRESSION}


def _state(figures: BrokerStatistics) -> Mapping[str, float]:
    return {state: float(state == figures.state) for state in get_args(State)}


OF_STREAMS: Final = (
    Instrument("asgi_sse_streams", "sse.server.active_streams", "gauge", "{stream}",
           "Streams that run now.", lambda figures: figures.open),
    Instrument("asgi_sse_streams_opened", "sse.server.opened_streams", "counter", "{stream}",
           "Streams that have begun.", lambda figures: figures.opened),
    Instrument("asgi_sse_streams_closed", "sse.server.closed_streams", "counter", "{stream}",
           "Streams that have ended, by the reason for it.", _closed, "reason"),
    Instrument("asgi_sse_events", "sse.server.events", "counter", "{event}",
           "Events that streams have taken from their sources.", lambda figures: figures.events),
    Instrument("asgi_sse_sent_bytes", "sse.server.sent", "counter", "By",
           "Bytes of body that were handed to the server.", lambda figures: figures.bytes),
    Instrument("asgi_sse_slowest_client_wait_seconds", "sse.server.slowest_client_wait", "state", "s",
           "Time for which the slowest client has not taken its message.", lambda figures: figures.longest_wait),
    Instrument("asgi_sse_abandoned_sources", "sse.server.abandoned_sources", "gauge", "{source}",
           "Sampler that were left behind, since they did not clean up in time, and still run.",
           lambda figures: figures.abandoned),
    Instrument("asgi_sse_drains", "sse.server.drains", "counter", "{drain}",
           "Drains of streams that have ended.", lambda figures: figures.drains),
    Instrument("asgi_sse_draining", "sse.server.draining", "state", "1",
           "Whether a server is stopping, and streams are told to return later.",
           lambda figures: float(figures.draining)),
    Instrument("asgi_sse_streams_compressed", "sse.server.compressed_streams", "counter", "{stream}",
           "Streams that a middleware has compressed or collected, which delays their events, by how.",
           _compressed, "kind"),
)  # fmt: skip
OF_BROKERS: Final = (
    Instrument("asgi_sse_broker_state", "sse.broker.state", "state", "1",
           "1 for the state that the broker's connection is in.", _state, "state"),
    Instrument("asgi_sse_broker_published", "sse.broker.published", "counter", "{event}",
           "Events that were published from here, and acknowledged.", lambda figures: figures.published),
    Instrument("asgi_sse_broker_received", "sse.broker.received", "counter", "{event}",
           "Events that came to this process, its own ones too.", lambda figures: figures.received),
    Instrument("asgi_sse_broker_subscriptions", "sse.broker.subscriptions", "gauge", "{subscription}",
           "Subscriptions that are read now.", lambda figures: figures.subscriptions),
    Instrument("asgi_sse_broker_channels", "sse.broker.channels", "gauge", "{channel}",
           "Channels of which there are events in memory.", lambda figures: figures.channels),
    Instrument("asgi_sse_broker_lag_events", "sse.broker.lag", "state", "{event}",
           "Events that the slowest subscription has not taken yet.", lambda figures: figures.lag),
    Instrument("asgi_sse_broker_round_trip_seconds", "sse.broker.round_trip", "state", "s",
           "Time that an event which was published from here took to come back from the engine, or takes already.",
           lambda figures: figures.round_trip),
    Instrument("asgi_sse_broker_reconnects", "sse.broker.reconnects", "counter", "{reconnect}",
           "Times that a lost connection was made again.", lambda figures: figures.reconnects),
    Instrument("asgi_sse_broker_restarts", "sse.broker.restarts", "counter", "{restart}",
           "Times that the log was found to be another one, of which all who read are told by a reset.",
           lambda figures: figures.restarts),
)  # fmt: skip
FIGURES: Final = (*OF_STREAMS, *OF_BROKERS)
DURATION: Final = Instrument(
    "asgi_sse_stream_duration_seconds", "sse.server.stream_duration", "state", "s",
    "How long streams have lasted that have ended.", lambda figures: figures.seconds,
)  # fmt: skip
"""A histogram, by `counters.DURATIONS`."""


class Sampler:
    """What figures are read from.

    Args:
        registries: Of streams; none: all that there are in this process, or have been.
        brokers: One, several, or several by the names that they are told apart by.

    Raises:
        TypeError: One is none.
    """

    def __init__(self, registries: Iterable[StreamRegistry], brokers: Brokers) -> None:
        known = _numbered(registries)
        for registry in known.values():
            if not isinstance(registry, StreamRegistry):
                raise TypeError(f"{short_repr(registry)} is no registry; give a StreamRegistry, such as app.registry")
        self._registries = _labelled("registry", known)
        if isinstance(brokers, Mapping):
            named = {str(name): broker for name, broker in brokers.items()}
        else:
            several = brokers if isinstance(brokers, Iterable) else [brokers]
            named = _numbered(several)
        for broker in named.values():
            if not isinstance(broker, Broker):
                raise TypeError(f"brokers: {short_repr(broker)} is none; give a Broker")
        self._brokers = _labelled("broker", named, always=isinstance(brokers, Mapping))
        self._highest: dict[tuple[str, ...], float] = {}
        self._lock = threading.RLock()  # scrapes may come in several threads, and in a handler of a signal

    def streams(self) -> list[tuple[Labels, RegistryStatistics]]:
        """The statistics of streams."""
        if not self._registries:
            return [({}, statistics_of_all())]
        return [(labels, registry.statistics()) for labels, registry in self._registries]

    def brokers(self) -> list[tuple[Labels, BrokerStatistics]]:
        """The statistics of brokers."""
        return [(labels, broker.statistics()) for labels, broker in self._brokers]

    def values(self, figure: Instrument, statistics: Iterable[tuple[Labels, Any]]) -> Iterator[tuple[Labels, float]]:
        """The values of a figure, each with what tells it apart from the others.

        Args:
            figure: One of `OF_STREAMS` or `OF_BROKERS`.
            statistics: As of `streams` or of `brokers`.
        """
        for labels, found in statistics:
            values = figure.of(found)
            if not isinstance(values, Mapping):
                values = {"": values}
            for name, value in values.items():
                full = {**labels, figure.label: name} if name else labels
                yield full, self._risen(figure, full, value) if figure.kind == "counter" else value

    def _risen(self, figure: Instrument, labels: Labels, value: float) -> float:
        """A counter must not go down: that means a process which has begun anew.

        What a stream has sent is missing for a moment where it ends in another thread; and for good, where its event
        loop was closed under it and nothing of it is left.
        """
        key = (figure.name, *labels.values())
        with self._lock:
            self._highest[key] = highest = max(value, self._highest.get(key, 0))
        return highest


def _numbered(things: Iterable[Any]) -> dict[str, Any]:
    """Each once. By its identity, since what is of a wrong kind, and to be told of, may have no hash."""
    return {str(number): thing for number, thing in enumerate({id(thing): thing for thing in things}.values())}


def _labelled(label: str, named: Mapping[str, Any], *, always: bool = False) -> list[tuple[Labels, Any]]:
    if len(named) == 1 and not always:
        return [({}, next(iter(named.values())))]
    found: dict[Any, Labels] = {}  # each once, under the first of its names: else sums would have it twice
    for name, thing in named.items():
        found.setdefault(thing, {label: name})
    return [(labels, thing) for thing, labels in found.items()]
