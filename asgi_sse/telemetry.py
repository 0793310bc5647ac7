"""Streams and brokers for OpenTelemetry: metrics, and attributes of each stream on the span of its request.

Needs the extra ``opentelemetry``, which installs the API only. The app chooses the SDK and where it exports to.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from asgi_sse import __version__

from .errors import raise_missing_extra
from .metrics.instruments import (
    INSTRUMENTS,
    STREAM_DURATION,
    STREAM_INSTRUMENTS,
    Brokers,
    Instrument,
    Labels,
    Sampler,
)
from .stream.counters import DURATION_BOUNDS_S
from .stream.observer import Observer, process_observers

try:
    from opentelemetry import context, metrics, trace
except ModuleNotFoundError as _error:
    raise_missing_extra(_error, "opentelemetry", "opentelemetry-api", "asgi-sse[opentelemetry]")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextvars import Token

    from .broker import Broker
    from .broker.backends.base import BrokerStatistics
    from .stream.counters import RegistryStatistics
    from .stream.registry import StreamRegistry
    from .stream.stream import Stream


class Instrumentation:
    """The result of `instrument`, which can be undone.

    Args:
        undo: Functions that undo the instrumentation.
    """

    def __init__(self, undo: Iterable[Callable[[], object]]) -> None:
        self._undo = tuple(undo)

    def uninstrument(self) -> None:
        """Stop reporting metrics and setting attributes of spans, also for the streams that run. Idempotent."""
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
    """Report streams and brokers to OpenTelemetry.

    Statistics become metrics. A stream has no span of its own, and its events have none either. Instead, the span of
    its request receives the attributes ``sse.events``, ``sse.bytes``, ``sse.duration`` (seconds) and
    ``sse.close_reason``. If the source raised, the status of the span is an error. The instrumentation that created the
    span records the exception.

    Args:
        registry: The registry of streams. Default: the sum of all registries of this process.
        broker: One broker.
        brokers: Several brokers, as `metrics.prometheus.Collector` takes them.
        meter_provider: Where metrics are reported. Default: the global meter provider.
        message_spans: Whether the ASGI instrumentation may create a span for each message that a stream sends or
            receives. By default, these spans get a parent that is not sampled, and the sampler drops them. This does
            not work with a sampler that ignores the parent, nor with a middleware that sends from a task of its own.
            In these cases, pass ``exclude_spans=["send", "receive"]`` to the instrumentation.

    Returns:
        An object whose method ``uninstrument`` undoes the call.

    Raises:
        RuntimeError: This meter provider is in use by an earlier call.
        TypeError: An argument has the wrong type, or `broker` and `brokers` are both given.
    """
    if broker is not None and brokers:
        raise TypeError("only one of broker and brokers can be passed; pass all brokers as brokers")
    sampler = Sampler(() if registry is None else (registry,), brokers if broker is None else broker)
    provider = metrics.get_meter_provider() if meter_provider is None else meter_provider
    instruments = _instruments.get(provider)
    if instruments is None:
        instruments = _instruments[provider] = _Instruments(provider)
    if instruments.sampler is not None:
        raise RuntimeError(
            "a meter provider can report one instrumentation, and this one is in use; call uninstrument() of the first"
        )
    instruments.sampler = sampler
    observer = _SpanObserver(instruments, message_spans=message_spans)
    stop_observing = process_observers.add(observer) if registry is None else registry.observe(observer)
    return Instrumentation([stop_observing, instruments.pause])


class _Instruments:
    """The instruments of one meter provider. The API cannot remove instruments, so they stay and can be paused."""

    def __init__(self, provider: metrics.MeterProvider) -> None:
        self.sampler: Sampler | None = None
        self._streams: list[tuple[Labels, RegistryStatistics]] = []
        self._brokers: list[tuple[Labels, BrokerStatistics]] = []
        self._observed = set(INSTRUMENTS)  # since these statistics were read
        meter = metrics.get_meter("asgi_sse", __version__, provider)
        create: dict[str, Callable[..., object]] = {
            "counter": meter.create_observable_counter,
            "up_down_counter": meter.create_observable_up_down_counter,
            "gauge": meter.create_observable_gauge,
        }
        for instrument in INSTRUMENTS:
            create[instrument.kind](
                instrument.otel_name,
                [partial(self._observe, instrument)],
                unit=instrument.unit,
                description=instrument.description,
            )
        self.durations: metrics.Histogram = _histogram(meter)

    def pause(self) -> None:
        """Observe nothing until a sampler is set."""
        self.sampler = None
        self._observed.update(INSTRUMENTS)

    def _observe(self, instrument: Instrument, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        sampler = self.sampler
        if sampler is not None:
            # A collection observes one instrument after the other. The statistics are read once for all of them, when
            # an instrument is observed for the second time.
            if instrument in self._observed:
                self._observed.clear()
                self._streams, self._brokers = sampler.streams(), sampler.brokers()
            self._observed.add(instrument)
            statistics = self._streams if instrument in STREAM_INSTRUMENTS else self._brokers
            for labels, value in sampler.values(instrument, statistics):
                attributes = {_ATTRIBUTES.get(name, f"sse.{name}"): labels[name] for name in labels}
                yield metrics.Observation(value, attributes)


_ATTRIBUTES: Final = {"reason": "sse.close_reason", "kind": "sse.compression", "state": "sse.broker.state"}
_instruments: Final[weakref.WeakKeyDictionary[metrics.MeterProvider, _Instruments]] = weakref.WeakKeyDictionary()


def _histogram(meter: metrics.Meter) -> metrics.Histogram:
    options: dict[str, Any] = {"unit": STREAM_DURATION.unit, "description": STREAM_DURATION.description}
    return meter.create_histogram(
        STREAM_DURATION.otel_name, **options, explicit_bucket_boundaries_advisory=DURATION_BOUNDS_S
    )


class _SpanObserver(Observer):
    """Sets the attributes of the request's span, and records the duration of each stream."""

    def __init__(self, instruments: _Instruments, *, message_spans: bool) -> None:
        self._instruments = instruments
        self._message_spans = message_spans

    def begun(self, stream: Stream) -> None:
        """Hide the spans of messages."""
        span = trace.get_current_span()
        if not self._message_spans and span.is_recording():
            stream.send_and_receive_within(partial(_NotSampled, span.get_span_context()))

    def ending(self, stream: Stream) -> None:
        """Set the attributes now, since the span ends with the last message."""
        _set_attributes(stream)

    def ended(self, stream: Stream) -> None:
        """Set the attributes of a span that is still open, and record the duration."""
        _set_attributes(stream)
        self._instruments.durations.record(stream.age, {"sse.close_reason": str(stream.reason)})


class _NotSampled:
    """A context in which the current span has the same ids, but is not sampled, and thus asks for no child spans.

    This is not a generator: one that is never exited would be closed in a context that is not its own.
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


def _set_attributes(stream: Stream) -> None:
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
        if stream.reason == "failed":  # a middleware may have kept the error from the instrumentation
            span.set_status(trace.StatusCode.ERROR)
