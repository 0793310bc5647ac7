"""Streams and brokers for Prometheus: a `Collector` for its client, and `MetricsEndpoint`, which answers scrapes.

Needs the extra ``metrics``. Nothing is counted twice for it: each scrape reads the figures that there are anyway.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from asgi_sse.broker import Broker
from asgi_sse.errors import raise_missing_extra, short_repr
from asgi_sse.protocol.asgi import Receive, Scope, Send
from asgi_sse.routing.endpoint import send_text
from asgi_sse.routing.request import HTTPError
from asgi_sse.stream.counters import DURATIONS
from asgi_sse.stream.registry import StreamRegistry

from .instruments import DURATION, OF_BROKERS, OF_STREAMS, Brokers, Instrument, Labels, Sampler

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector as PrometheusCollector
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "prometheus_client", "prometheus-client", "asgi-sse[metrics]")

_UNITS: Final = {"s": "seconds", "By": "bytes"}


class Collector(PrometheusCollector):
    """The figures of registries and brokers, to be registered with a ``CollectorRegistry`` of prometheus_client.

    It is asked by each scrape, in whichever thread. What it counts begins with the process, or with the registry that
    it is given, and never goes down: what an event loop has counted that has ended is not lost.

    Args:
        *registries: Of streams. Default: all of this process, those of event loops and apps to come among them, as one.
            Several have a label ``registry`` each, counted from 0.
        brokers: One, several, or several by name. Several have a label ``broker``: their names, or counted from 0.

    Raises:
        TypeError: One is none.
    """

    def __init__(self, *registries: StreamRegistry, brokers: Brokers = ()) -> None:
        self._sources = Sampler(registries, brokers)

    def describe(self) -> Iterable[Metric]:
        """The metrics without their values: registering it twice is an error at once."""
        yield from map(_family, (*OF_STREAMS, *OF_BROKERS))
        yield _histogram()

    def collect(self) -> Iterator[Metric]:
        """The metrics as of now."""
        streams, brokers = self._sources.streams(), self._sources.brokers()
        for figures, statistics in ((OF_STREAMS, streams), (OF_BROKERS, brokers)):
            for figure in figures if statistics else ():
                family = _family(figure)
                for labels, value in self._sources.values(figure, statistics):
                    family.add_sample(figure.name + "_total" * (figure.kind == "counter"), labels, value)
                yield family
        durations = _histogram()
        for labels, found in streams:
            _add_durations(durations, labels, found.durations, found.seconds)
        yield durations


def _family(figure: Instrument) -> Metric:
    kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
    family: Metric = kind(figure.name, figure.about, unit=_UNITS.get(figure.unit, ""))
    return family


def _histogram() -> HistogramMetricFamily:
    return HistogramMetricFamily(DURATION.name, DURATION.about, unit=_UNITS[DURATION.unit])


def _add_durations(family: Metric, labels: Labels, durations: Iterable[int], seconds: float) -> None:
    bounds = (*map(str, DURATIONS), "+Inf")
    counts = list(accumulate(durations))
    for bound, number in zip(bounds, counts, strict=True):
        family.add_sample(f"{DURATION.name}_bucket", {**labels, "le": bound}, number)
    family.add_sample(f"{DURATION.name}_count", labels, counts[-1])
    family.add_sample(f"{DURATION.name}_sum", labels, seconds)


class MetricsEndpoint:
    """Answers scrapes, as ``/metrics``: an ASGI app, and so an endpoint of `create_app` and of any framework.

    In the text format of Prometheus or as OpenMetrics, as the scraper asks.

    Args:
        registry: Of streams. Default: all of this process.
        broker: A broker.
        brokers: Several, as of `Collector`.
        collector_registry: Of which the other metrics of the process are, such as ``prometheus_client.REGISTRY``.
            What it has of ours already, by a `Collector` of your own, is left as it is.

    Raises:
        TypeError: An argument is of a wrong kind, or both `broker` and `brokers` are given.
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
            raise TypeError("broker and brokers are both given; give all of them as brokers")
        if collector_registry is not None and not hasattr(collector_registry, "collect"):
            raise TypeError(
                f"collector_registry={short_repr(collector_registry)} is none; give one of prometheus_client, as REGISTRY"
            )
        own = Collector(*(() if registry is None else (registry,)), brokers=brokers if broker is None else broker)
        self._source: PrometheusCollector = own if collector_registry is None else _Both(collector_registry, own)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI)
        """Answer one request."""
        if scope["type"] != "http":
            raise TypeError(f"metrics answer HTTP requests, not {scope['type']!r}")
        if scope["method"] not in ("GET", "HEAD"):
            await send_text(scope, send, HTTPError(405, headers={"allow": "GET, HEAD"}))
            return
        accept = b",".join(value for name, value in scope["headers"] if name.lower() == b"accept")
        encode, content_type = choose_encoder(accept.decode("latin-1"))
        body = encode(self._source)
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(
            {"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body, "more_body": False}
        )


class _Both(PrometheusCollector):
    """What a registry has, and what it has not of ours: a metric that stands twice is one that no scraper takes."""

    def __init__(self, registry: CollectorRegistry, own: Collector) -> None:
        self._registry = registry
        self._own = own

    def collect(self) -> Iterator[Metric]:
        names = set()
        for metric in self._registry.collect():
            names.add(metric.name)
            yield metric
        for metric in self._own.collect():
            if metric.name not in names:
                yield metric
