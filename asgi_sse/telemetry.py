"""Streams and brokers for OpenTelemetry: figures as metrics, and each stream on its request's own span.

Needs the extra ``opentelemetry``: its API alone; which SDK is behind it, and where that sends, is the app's.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asgi_sse import __version__

from .errors import raise_missing_extra
from .metrics.instruments import DURATION, FIGURES, OF_STREAMS, Brokers, Instrument, Labels, Sampler
from .stream.counters import DURATIONS
from .stream.observer import EVERYWHERE, Observer

try:
    from opentelemetry import context, metrics, trace
except ModuleNotFoundError as exc:
    raise_missing_extra(exc, "opentelemetry", "opentelemetry-api", "asgi-sse[opentelemetry]")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextvars import Token

    from .broker import Broker
    from .broker.backends.base import BrokerStatistics
    from .stream.registry import RegistryStatistics, StreamRegistry
    from .stream.stream import Stream


class Instrumentation:
    """What `instrument` has begun.

    Args:
        undo: What ends it.
    """

    def __init__(self, undo: Iterable[Callable[[], object]]) -> None:
        self._undo = tuple(undo)

    def uninstrument(self) -> None:
        """Report nothing more, and leave spans alone; those of streams that run as well."""
        undo, self._undo = self._undo, ()
        for step in undo:
            step()


def instrument(
    registry: StreamRegistry | None = None,
    *,
    broker: Broker | None = None,
    brokers: Brokers = (),
    meter_provider: metrics.MeterProvider | None = None,
    message_spans: bool = False,
) -> Instrumentation:
    """Report streams to OpenTelemetry: their figures as metrics, and what became of each one on its request's span.

    A stream has no span of its own, and none for its events: the request's has attributes ``sse.events``,
    ``sse.bytes``, ``sse.duration`` (seconds) and ``sse.close_reason``. If its source raised, its status is an error;
    whoever made the span records the exception.

    Args:
        registry: Of streams. Default: all of this process.
        broker: A broker.
        brokers: Several, as of `metrics.Collector`.
        meter_provider: Where metrics go. Default: the global one.
        message_spans: Whether the instrumentation of ASGI apps may make a span of each message that a stream sends or
            receives. By default its sampler is told, by a parent that is not sampled, to drop those. A sampler that
            does not look at the parent, and one behind a middleware that sends from a task of its own, make them all
            the same: then give the instrumentation ``exclude_spans=["send", "receive"]``.

    Returns:
        What ends it.

    Raises:
        RuntimeError: Metrics are reported to this provider already.
        TypeError: An argument is of a wrong kind.
    """
    if broker is not None and brokers:
        raise TypeError("broker and brokers are both given; give all of them as brokers")
    sources = Sampler(() if registry is None else (registry,), brokers if broker is None else broker)
    provider = metrics.get_meter_provider() if meter_provider is None else meter_provider
    instruments = _instruments.get(provider)
    if instruments is None:
        instruments = _instruments[provider] = _Instruments(provider)
    if instruments.sources is not None:
        raise RuntimeError(
            "metrics are reported to this meter provider already; uninstrument() what reports them first"
        )
    instruments.sources = sources
    observer = _Spans(instruments, quiet=not message_spans)
    stop_observing = EVERYWHERE.add(observer) if registry is None else registry.observe(observer)
    return Instrumentation([stop_observing, instruments.rest])


class _Instruments:
    """Those of one meter provider. The API has no way to remove one, so they stay, and observe nothing meanwhile."""

    def __init__(self, provider: metrics.MeterProvider) -> None:
        self.sources: Sampler | None = None
        self._streams: list[tuple[Labels, RegistryStatistics]] = []
        self._brokers: list[tuple[Labels, BrokerStatistics]] = []
        self._seen = set(FIGURES)  # of those statistics
        meter = metrics.get_meter("asgi_sse", __version__, provider)
        make: dict[str, Callable[..., object]] = {
            "counter": meter.create_observable_counter,
            "gauge": meter.create_observable_up_down_counter,
            "state": meter.create_observable_gauge,
        }
        for figure in FIGURES:
            make[figure.kind](
                figure.semantic, [partial(self._observe, figure)], unit=figure.unit, description=figure.about
            )
        self.durations: metrics.Histogram = _histogram(meter)

    def rest(self) -> None:
        """Observe nothing from now on."""
        self.sources = None
        self._seen.update(FIGURES)

    def _observe(self, figure: Instrument, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        sources = self.sources
        if sources is not None:
            if figure in self._seen:  # once for all figures: who collects them asks for each, one after the other
                self._seen.clear()
                self._streams, self._brokers = sources.streams(), sources.brokers()
            self._seen.add(figure)
            for labels, value in sources.values(figure, self._streams if figure in OF_STREAMS else self._brokers):
                yield metrics.Observation(value, {_SEMANTIC.get(name, f"sse.{name}"): labels[name] for name in labels})


_SEMANTIC: Final = {"reason": "sse.close_reason", "kind": "sse.compression", "state": "sse.broker.state"}
_instruments: Final[weakref.WeakKeyDictionary[metrics.MeterProvider, _Instruments]] = weakref.WeakKeyDictionary()


def _histogram(meter: metrics.Meter) -> metrics.Histogram:
    about: dict[str, Any] = {"unit": DURATION.unit, "description": DURATION.about}
    return meter.create_histogram(DURATION.semantic, **about, explicit_bucket_boundaries_advisory=DURATIONS)


class _Spans(Observer):
    """Tells the request's span what became of the stream that answers it."""

    def __init__(self, instruments: _Instruments, *, quiet: bool) -> None:
        self._instruments = instruments
        self._quiet = quiet

    def begun(self, stream: Stream) -> None:
        """See `Observer`."""
        span = trace.get_current_span()
        if self._quiet and span.is_recording():
            stream.talk_within(partial(_NotSampled, span.get_span_context()))

    def ending(self, stream: Stream) -> None:
        """See `Observer`: behind the last message, the span is over."""
        _describe(stream)

    def ended(self, stream: Stream) -> None:
        """See `Observer`."""
        _describe(stream)
        self._instruments.durations.record(stream.age, {"sse.close_reason": str(stream.reason)})


class _NotSampled:
    """Puts in place of a span one that has its ids, and asks for no spans below it.

    Not a generator: where it is never left, that would be closed in a context which is not its own.
    """

    def __init__(self, span: trace.SpanContext) -> None:
        flags = trace.TraceFlags(span.trace_flags & ~trace.TraceFlags.SAMPLED)
        self._span = trace.SpanContext(span.trace_id, span.span_id, span.is_remote, flags, span.trace_state)
        self._token: Token[context.Context] | None = None

    def __enter__(self) -> None:
        self._token = context.attach(trace.set_span_in_context(trace.NonRecordingSpan(self._span)))

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        if self._token is not None:
            context.detach(self._token)


def _describe(stream: Stream) -> None:
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes(
            {
                "sse.events": stream.events,
                "sse.bytes": stream.bytes_sent,
                "sse.duration": stream.age,
                "sse.close_reason": str(stream.reason),
            }
        )
        if stream.reason == "failed":  # a middleware between may keep the error from who has made the span
            span.set_status(trace.StatusCode.ERROR)
