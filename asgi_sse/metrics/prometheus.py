"""Metrics of streams and brokers for Prometheus: a `Collector` for its client, and `MetricsEndpoint` for scrapes.

Needs the extra ``metrics``. A scrape reads statistics that exist anyway; nothing is counted twice.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from asgi_sse.broker import Broker
from asgi_sse.errors import raise_missing_extra, short_repr
from asgi_sse.protocol.asgi import Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError
from asgi_sse.stream.counters import DURATION_BOUNDS_S
from asgi_sse.stream.registry import StreamRegistry

from .instruments import BROKER_INSTRUMENTS, STREAM_DURATION, STREAM_INSTRUMENTS, Brokers, Instrument, Labels, Sampler

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector as PrometheusCollector
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "prometheus_client", "prometheus-client", "asgi-sse[metrics]")

_UNITS: Final = {"s": "seconds", "By": "bytes"}


class Collector(PrometheusCollector):
    """Metrics of registries and brokers, for a ``CollectorRegistry`` of prometheus_client.

    The Prometheus client calls the collector for each scrape, in any thread. Counters start with the process, or with
    the registry that is passed. They never decrease: the counts of an event loop that has ended are kept.

    Args:
        *registries: The registries of streams. Default: the sum of all registries of this process, including those that
            are created later. Several registries have a label ``registry``, numbered from 0.
        brokers: One broker, several, or several by name. Several have a label ``broker``: their name, or a number from
            0.

    Raises:
        TypeError: An argument is not a registry or not a broker.
    """

    def __init__(self, *registries: StreamRegistry, brokers: Brokers = ()) -> None:
        self._sampler = Sampler(registries, brokers)

    def describe(self) -> Iterable[Metric]:
        """Yield the metrics without values, so that registering two collectors raises at once."""
        yield from map(_family, (*STREAM_INSTRUMENTS, *BROKER_INSTRUMENTS))
        yield _histogram()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics with their current values."""
        streams, brokers = self._sampler.streams(), self._sampler.brokers()
        for instruments, statistics in ((STREAM_INSTRUMENTS, streams), (BROKER_INSTRUMENTS, brokers)):
            for instrument in instruments if statistics else ():
                family = _family(instrument)
                for labels, value in self._sampler.values(instrument, statistics):
                    family.add_sample(instrument.name + "_total" * (instrument.kind == "counter"), labels, value)
                yield family
        durations = _histogram()
        for labels, found in streams:
            _add_durations(durations, labels, found.durations, found.seconds)
        yield durations


def _family(instrument: Instrument) -> Metric:
    kind = CounterMetricFamily if instrument.kind == "counter" else GaugeMetricFamily
    family: Metric = kind(instrument.name, instrument.description, unit=_UNITS.get(instrument.unit, ""))
    return family


def _histogram() -> HistogramMetricFamily:
    return HistogramMetricFamily(STREAM_DURATION.name, STREAM_DURATION.description, unit=_UNITS[STREAM_DURATION.unit])


def _add_durations(family: Metric, labels: Labels, durations: Iterable[int], seconds: float) -> None:
    bounds = (*map(str, DURATION_BOUNDS_S), "+Inf")
    counts = list(accumulate(durations))
    for bound, number in zip(bounds, counts, strict=True):
        family.add_sample(f"{STREAM_DURATION.name}_bucket", {**labels, "le": bound}, number)
    family.add_sample(f"{STREAM_DURATION.name}_count", labels, counts[-1])
    family.add_sample(f"{STREAM_DURATION.name}_sum", labels, seconds)


class MetricsEndpoint:
    """An ASGI app that answers scrapes: an endpoint for `create_app`, and for any framework.

    The scraper chooses between the text format of Prometheus and OpenMetrics.

    Args:
        registry: The registry of streams. Default: the sum of all registries of this process.
        broker: One broker.
        brokers: Several brokers, as `Collector` takes them.
        collector_registry: Also export the other metrics of the process, for example
            ``prometheus_client.REGISTRY``. If a `Collector` is registered there, its metrics are exported once.

    Raises:
        TypeError: An argument has the wrong type, or `broker` and `brokers` are both given.
    """

    def __init__(
        self,
        registry: StreamRegistry | None = None,
        *,
        broker: Broker | None = None,
        brokers: Brokers = (),
        collector_registry: CollectorRegistry | None = None,
    ) -> None:
        if broker is not None and brokers:
            raise TypeError("only one of broker and brokers can be passed; pass all brokers as brokers")
        if collector_registry is not None and not hasattr(collector_registry, "collect"):
            raise TypeError(
                f"collector_registry must be a CollectorRegistry, got {short_repr(collector_registry)}; "
                "pass one of prometheus_client, such as REGISTRY"
            )
        own = Collector(*(() if registry is None else (registry,)), brokers=brokers if broker is None else broker)
        self._collector: PrometheusCollector = own if collector_registry is None else _Merged(collector_registry, own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI)
        """Answer one request."""
        if scope["type"] != "http":
            raise TypeError(f"MetricsEndpoint answers HTTP requests, got {scope['type']!r}; mount it for HTTP only")
        if scope["method"] not in ("GET", "HEAD"):
            await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
            return
        accept = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
        encode, content_type = choose_encoder(accept.decode("latin-1"))
        body = encode(self._collector)
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False}
        )


class _Merged(PrometheusCollector):
    """The metrics of a registry, and those of ours that it lacks. A scraper rejects a metric that occurs twice."""

    def __init__(self, registry: CollectorRegistry, own: Collector) -> None:
        self._registry = registry
        self._own = own

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once."""
        names = set()
        for metric in self._registry.collect():
            names.add(metric.name)
            yield metric
        for metric in self._own.collect():
            if metric.name not in names:
                yield metric
