"""The instruments that measure streams and brokers, and `Sampler`, which reads them."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from asgi_sse.broker import Broker
from asgi_sse.broker.backends.base import BrokerStatistics, State
from asgi_sse.errors import short_repr
from asgi_sse.protocol.asgi import CloseReason
from asgi_sse.stream.counters import RegistryStatistics
from asgi_sse.stream.registry import StreamRegistry, statistics_of_all

Brokers: TypeAlias = Broker | Iterable[Broker] | Mapping[str, Broker]
Labels: TypeAlias = dict[str, str]


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric, and the field of `RegistryStatistics` or `BrokerStatistics` that it reads.

    Attributes:
        name: The name in Prometheus, without the ``_total`` of a counter.
        otel_name: The name in OpenTelemetry.
        kind: As in OpenTelemetry. A counter never decreases, an up-down counter counts what comes and goes, and a gauge
            is any other value. Prometheus has gauges for both of the latter.
        unit: The unit in UCUM: ``s``, ``By``, ``{event}``.
        description: What is measured, in one sentence.
        field: The field of the statistics: a number, a number for each value of `label`, or one value of `label`.
        label: The label that separates several values; ``""`` for a single value.
        label_values: All values of `label`. Each is reported from the start, since the rate of a series cannot be
            computed across its appearance.
    """

    name: str
    otel_name: str
    kind: Literal["counter", "up_down_counter", "gauge"]
    unit: str
    description: str
    field: str
    label: str = ""
    label_values: tuple[str, ...] = ()

    def read(self, statistics: RegistryStatistics | BrokerStatistics) -> Mapping[str, float]:
        """Return the numbers by value of `label`, or one number for ``""``."""
        value: Any = getattr(statistics, self.field)
        if isinstance(value, Mapping):
            return {name: value.get(name, 0) for name in self.label_values}
        if self.label:
            return {name: float(name == value) for name in self.label_values}
        return {"": float(value) if isinstance(value, bool) else value}


STREAM_INSTRUMENTS: Final = (
    Instrument("asgi_sse_streams", "sse.server.active_streams", "up_down_counter", "{stream}",
               "Streams that run now.", "open"),
    Instrument("asgi_sse_streams_opened", "sse.server.opened_streams", "counter", "{stream}",
               "Streams that have begun.", "opened"),
    Instrument("asgi_sse_streams_closed", "sse.server.closed_streams", "counter", "{stream}",
               "Streams that have ended, by reason.", "closed", "reason", get_args(CloseReason)),
    Instrument("asgi_sse_events", "sse.server.events", "counter", "{event}",
               "Events that streams have taken from their sources.", "events"),
    Instrument("asgi_sse_sent_bytes", "sse.server.sent", "counter", "By",
               "Bytes of body that were handed to the server.", "bytes"),
    Instrument("asgi_sse_slowest_client_wait_seconds", "sse.server.slowest_client_wait", "gauge", "s",
               "Time for which the slowest client has not taken its current message.", "longest_wait"),
    Instrument("asgi_sse_abandoned_sources", "sse.server.abandoned_sources", "up_down_counter", "{source}",
               "Sources that did not clean up in time, were abandoned, and still run.", "abandoned"),
    Instrument("asgi_sse_drains", "sse.server.drains", "counter", "{drain}",
               "Drains of streams that have ended.", "drains"),
    Instrument("asgi_sse_draining", "sse.server.draining", "gauge", "1",
               "1 while a server is stopping and new clients are told to reconnect.", "draining"),
    Instrument("asgi_sse_streams_compressed", "sse.server.compressed_streams", "counter", "{stream}",
               "Streams that a middleware compressed or collected, which delays their events, by kind.",
               "compressed", "kind", ("encoded", "held", "buffered")),
)  # fmt: skip
BROKER_INSTRUMENTS: Final = (
    Instrument("asgi_sse_broker_state", "sse.broker.state", "gauge", "1",
               "1 for the current state of the broker's connection, 0 for the others.",
               "state", "state", get_args(State)),
    Instrument("asgi_sse_broker_published", "sse.broker.published", "counter", "{event}",
               "Events that this process has published, and that were acknowledged.", "published"),
    Instrument("asgi_sse_broker_received", "sse.broker.received", "counter", "{event}",
               "Events that this process has received, its own included.", "received"),
    Instrument("asgi_sse_broker_subscriptions", "sse.broker.subscriptions", "up_down_counter", "{subscription}",
               "Subscriptions that are open now.", "subscriptions"),
    Instrument("asgi_sse_broker_channels", "sse.broker.channels", "up_down_counter", "{channel}",
               "Channels that have events in memory.", "channels"),
    Instrument("asgi_sse_broker_lag_events", "sse.broker.lag", "gauge", "{event}",
               "Events that the slowest subscription has not taken yet.", "lag"),
    Instrument("asgi_sse_broker_round_trip_seconds", "sse.broker.round_trip", "gauge", "s",
               "Time that an event published by this process took to return from the backend, or has taken so far.",
               "round_trip"),
    Instrument("asgi_sse_broker_reconnects", "sse.broker.reconnects", "counter", "{reconnect}",
               "Times that a lost connection was restored.", "reconnects"),
    Instrument("asgi_sse_broker_restarts", "sse.broker.restarts", "counter", "{restart}",
               "Times that the log was found replaced; every subscriber received a reset.", "restarts"),
)  # fmt: skip
INSTRUMENTS: Final = (*STREAM_INSTRUMENTS, *BROKER_INSTRUMENTS)
STREAM_DURATION: Final = Instrument(
    "asgi_sse_stream_duration_seconds", "sse.server.stream_duration", "gauge", "s",
    "Duration of streams that have ended.", "durations",
)  # fmt: skip
"""A histogram with the bounds `counters.DURATION_BOUNDS_S`. `Sampler` does not read it."""


class Sampler:
    """Reads the statistics of registries and brokers.

    Args:
        registries: The registries. If there are none, the sum of all registries that this process has had.
        brokers: One broker, several, or several by the value of their label ``broker``.

    Raises:
        TypeError: An argument is not a registry or not a broker.
    """

    def __init__(self, registries: Iterable[StreamRegistry], brokers: Brokers) -> None:
        numbered = _numbered(registries)
        for registry in numbered.values():
            if not isinstance(registry, StreamRegistry):
                raise TypeError(
                    f"registry must be a StreamRegistry, got {short_repr(registry)}; pass one, such as app.registry"
                )
        self._registries = _labelled("registry", numbered)
        if isinstance(brokers, Mapping):
            named = {str(name): broker for name, broker in brokers.items()}
        else:
            named = _numbered(brokers if isinstance(brokers, Iterable) else [brokers])
        for broker in named.values():
            if not isinstance(broker, Broker):
                raise TypeError(f"brokers must be Broker instances, got {short_repr(broker)}; pass one or several")
        self._brokers = _labelled("broker", named, always=isinstance(brokers, Mapping))
        self._highest: dict[tuple[str, ...], float] = {}
        self._lock = threading.RLock()  # several threads may scrape, and so may a signal handler in one of them

    def streams(self) -> list[tuple[Labels, RegistryStatistics]]:
        """Return the current statistics of streams, with their labels."""
        if not self._registries:
            return [({}, statistics_of_all())]
        return [(labels, registry.statistics()) for labels, registry in self._registries]

    def brokers(self) -> list[tuple[Labels, BrokerStatistics]]:
        """Return the current statistics of brokers, with their labels."""
        return [(labels, broker.statistics()) for labels, broker in self._brokers]

    def values(
        self, instrument: Instrument, statistics: Iterable[tuple[Labels, Any]]
    ) -> Iterator[tuple[Labels, float]]:
        """Yield the values of an instrument, each with its labels.

        Args:
            instrument: One of `STREAM_INSTRUMENTS` or `BROKER_INSTRUMENTS`.
            statistics: The result of `streams` or of `brokers`.
        """
        for labels, found in statistics:
            for name, value in instrument.read(found).items():
                full = {**labels, instrument.label: name} if name else labels
                yield full, self._never_lower(instrument, full, value) if instrument.kind == "counter" else value

    def _never_lower(self, instrument: Instrument, labels: Labels, value: float) -> float:
        """Return the highest value of a counter so far. A lower one would read as a restart of the process.

        A stream that ends in another thread is missing from the counts for a moment. If its event loop was closed and
        the stream was collected, its counts are missing for good.
        """
        key = (instrument.name, *labels.values())
        with self._lock:
            self._highest[key] = highest = max(value, self._highest.get(key, 0))
        return highest


def _numbered(items: Iterable[Any]) -> dict[str, Any]:
    """Return each item once, by its number. Items are compared by identity: a wrong argument may not be hashable."""
    return {str(number): item for number, item in enumerate({id(item): item for item in items}.values())}


def _labelled(label: str, named: Mapping[str, Any], *, always: bool = False) -> list[tuple[Labels, Any]]:
    """Return the items with their labels. A single item has no label, unless `always`."""
    if len(named) == 1 and not always:
        return [({}, next(iter(named.values())))]
    labels: dict[Any, Labels] = {}
    for name, item in named.items():  # an item with two names keeps the first, or sums would count it twice
        labels.setdefault(item, {label: name})
    return [(labels_of_item, item) for item, labels_of_item in labels.items()]
