"""Metrics and spans for OpenTelemetry, with its SDK and its instrumentation of ASGI apps."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anyio
import pytest

from asgi_sse import Broker, EventSourceResponse, Request, SSEMiddleware, StreamRegistry, create_app
from asgi_sse.metrics.instruments import BROKER_INSTRUMENTS, INSTRUMENTS, STREAM_DURATION, STREAM_INSTRUMENTS
from asgi_sse.stream.counters import RegistryStatistics
from asgi_sse.testing import open_stream

pytest.importorskip("opentelemetry.instrumentation.asgi")
pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from asgi_sse.telemetry import instrument

pytestmark = pytest.mark.anyio


class Telemetry:
    """An SDK that keeps all spans and metrics in memory."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(**options)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader])

    def around(self, app: Any, **options: Any) -> Any:
        """Return `app` inside the ASGI instrumentation of OpenTelemetry."""
        return OpenTelemetryMiddleware(app, tracer_provider=self.tracer_provider, **options)

    def spans(self) -> Sequence[ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        return spans

    def metrics(self) -> dict[str, Any]:
        """Return the data points of our metrics, by name and attributes."""
        data = self.reader.get_metrics_data()
        found: dict[str, Any] = {}
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                if scope.scope.name == "asgi_sse":
                    for metric in scope.metrics:
                        points = {tuple((point.attributes or {}).items()): point for point in metric.data.data_points}
                        found[metric.name] = points
        return found

    def value(self, name: str, **attributes: str) -> Any:
        return self.metrics()[name][tuple((f"sse.{key}", value) for key, value in attributes.items())].value


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracer_provider.shutdown()
    telemetry.meter_provider.shutdown()


@pytest.fixture
def registry() -> StreamRegistry:
    return StreamRegistry()


async def five() -> AsyncIterator[int]:
    for number in range(5):
        yield number
        await anyio.sleep(1)


async def idle() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep_forever()


async def fails() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep(1)
    raise LookupError("of the source")


async def read(app: Any, path: str = "/") -> list[str | None]:
    async with open_stream(app, path) as stream:
        return [event.data async for event in stream]


def own_attributes(span: ReadableSpan) -> dict[str, Any]:
    return {name: value for name, value in (span.attributes or {}).items() if name.startswith("sse.")}


async def test_stream_has_one_span_with_its_attributes(telemetry: Telemetry, registry: StreamRegistry) -> None:
    app = telemetry.around(create_app({"/five": five}, registry=registry))
    await read(app, "/five")
    assert len(telemetry.spans()) >= 8  # one of each message, without our instrumentation
    instrumentation = instrument(registry, meter_provider=telemetry.meter_provider)
    assert await read(app, "/five") == list(map(str, range(5)))
    (span,) = telemetry.spans()
    assert span.kind is trace.SpanKind.SERVER
    attributes = own_attributes(span)
    assert attributes.pop("sse.duration") == pytest.approx(5, abs=0.1)
    assert attributes == {"sse.events": 5, "sse.bytes": registry.statistics().bytes / 2, "sse.close_reason": "finished"}
    assert span.status.is_unset
    instrumentation.uninstrument()
    instrumentation.uninstrument()
    await read(app, "/five")
    spans = telemetry.spans()
    assert len(spans) >= 8
    assert not any(map(own_attributes, spans))


async def test_span_has_the_close_reason(telemetry: Telemetry, registry: StreamRegistry) -> None:
    instrument(registry, meter_provider=telemetry.meter_provider)
    app = telemetry.around(create_app({"/idle": idle}, registry=registry))
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
    (span,) = telemetry.spans()
    assert (own_attributes(span)["sse.close_reason"], own_attributes(span)["sse.events"]) == ("disconnected", 1)
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
        await registry.drain()
        assert [event async for event in stream] == []
    (span,) = telemetry.spans()
    assert own_attributes(span)["sse.close_reason"] == "drained"


async def test_failed_source_sets_an_error_status(telemetry: Telemetry, registry: StreamRegistry) -> None:
    """The ASGI instrumentation records the exception itself, once."""
    instrument(registry, meter_provider=telemetry.meter_provider)
    app = telemetry.around(create_app({"/fails": fails}, registry=registry))
    with pytest.raises(LookupError):
        await read(app, "/fails")
    (span,) = telemetry.spans()
    assert own_attributes(span)["sse.close_reason"] == "failed"
    assert span.status.status_code is trace.StatusCode.ERROR
    (event,) = span.events
    assert (event.name, (event.attributes or {})["exception.type"]) == ("exception", "LookupError")


async def test_failed_source_inside_a_middleware_sets_an_error_status(
    telemetry: Telemetry, registry: StreamRegistry
) -> None:
    """Starlette's BaseHTTPMiddleware keeps the error, and ends the body in place of the stream."""
    instrument(registry, meter_provider=telemetry.meter_provider)
    inner = create_app({"/fails": fails}, registry=registry)

    async def keeps_errors(scope: Any, receive: Any, send: Any) -> None:
        try:
            await inner(scope, receive, send)
        except LookupError:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    await read(telemetry.around(keeps_errors), "/fails")
    (request,) = (span for span in telemetry.spans() if span.kind is trace.SpanKind.SERVER)
    assert request.status.status_code is trace.StatusCode.ERROR


async def test_spans_of_the_app_are_children_of_the_request(telemetry: Telemetry, registry: StreamRegistry) -> None:
    """The source, the callbacks and the tasks beside the stream run in the context of the request."""
    tracer = telemetry.tracer_provider.get_tracer("app")
    instrument(registry, meter_provider=telemetry.meter_provider)
    broker = Broker()

    async def source(request: Request) -> AsyncIterator[str]:
        try:
            for name in ("one", "two"):
                with tracer.start_as_current_span(name):
                    await anyio.sleep(1)
                yield name
        finally:
            with tracer.start_as_current_span("clean-up"):
                await anyio.sleep(0.1)

    def ping() -> Any:
        with tracer.start_as_current_span("ping"):
            return {"comment": "ping"}

    async def closed(reason: str) -> None:
        with tracer.start_as_current_span("on_close"):
            await anyio.sleep(0.1)

    async def endpoint(request: Request) -> EventSourceResponse:
        return EventSourceResponse(source(request), ping=0.6, ping_message_factory=ping, on_close=closed)

    async def snapshot() -> Any:
        with tracer.start_as_current_span("snapshot"):
            await anyio.sleep(0.1)
        return [{"data": "state"}]

    async def state(request: Request) -> Any:
        return broker.subscribe("a", snapshot=snapshot)

    app = telemetry.around(create_app({"/source": endpoint, "/state": state}, registry=registry))
    assert await read(app, "/source") == ["one", "two"]
    spans = telemetry.spans()
    (request,) = (span for span in spans if span.kind is trace.SpanKind.SERVER)
    assert request.context is not None
    children = [span for span in spans if span is not request]
    assert sorted({span.name for span in children}) == ["clean-up", "on_close", "one", "ping", "two"]
    assert {span.parent.span_id for span in children if span.parent} == {request.context.span_id}
    async with open_stream(app, "/state") as stream:
        assert (await stream.receive()).data == "state"
    assert sorted(span.name for span in telemetry.spans()) == ["GET /state", "snapshot"]


async def test_adopted_stream_has_one_span(telemetry: Telemetry, registry: StreamRegistry) -> None:
    starlette = pytest.importorskip("starlette.applications")
    responses = pytest.importorskip("starlette.responses")
    routing = pytest.importorskip("starlette.routing")

    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {number}\n\n"
            await anyio.sleep(1)

    async def foreign(request: Any) -> Any:
        return responses.StreamingResponse(lines(), media_type="text/event-stream")

    async def own(request: Any) -> Any:
        return EventSourceResponse(five())

    instrument(registry, meter_provider=telemetry.meter_provider)
    routes = [routing.Route("/foreign", foreign), routing.Route("/own", own)]
    app = telemetry.around(SSEMiddleware(starlette.Starlette(routes=routes), registry=registry))
    assert await read(app, "/own") == list(map(str, range(5)))
    (span,) = telemetry.spans()
    assert own_attributes(span)["sse.events"] == 5
    assert await read(app, "/foreign") == list(map(str, range(3)))
    spans = telemetry.spans()
    assert not any("send" in span.name for span in spans)
    (request,) = (span for span in spans if span.kind is trace.SpanKind.SERVER)
    assert own_attributes(request)["sse.events"] == 3


async def test_message_spans_can_be_kept(registry: StreamRegistry) -> None:
    """A sampler that ignores the parent keeps them too, unless the instrumentation excludes them."""
    telemetry = Telemetry(sampler=ALWAYS_ON)
    instrumentation = instrument(registry, meter_provider=telemetry.meter_provider)
    app = create_app({"/five": five}, registry=registry)
    await read(telemetry.around(app), "/five")
    assert len(telemetry.spans()) >= 8
    await read(telemetry.around(app, exclude_spans=["send", "receive"]), "/five")
    (span,) = telemetry.spans()
    assert own_attributes(span)["sse.events"] == 5
    instrumentation.uninstrument()
    telemetry = Telemetry()
    instrument(registry, meter_provider=telemetry.meter_provider, message_spans=True)
    await read(telemetry.around(app), "/five")
    spans = telemetry.spans()
    assert len(spans) >= 8
    assert [own_attributes(span)["sse.events"] for span in spans if own_attributes(span)] == [5]


async def test_stream_without_a_span_is_counted(telemetry: Telemetry, registry: StreamRegistry) -> None:
    instrument(registry, meter_provider=telemetry.meter_provider)
    assert await read(create_app({"/five": five}, registry=registry), "/five") == list(map(str, range(5)))
    assert not telemetry.spans()
    assert telemetry.value("sse.server.opened_streams") == 1


async def test_metrics_of_streams_and_brokers(telemetry: Telemetry, registry: StreamRegistry) -> None:
    broker = Broker()
    instrumentation = instrument(registry, broker=broker, meter_provider=telemetry.meter_provider)
    app = create_app({"/five": five, "/idle": idle, "/news": broker.channel("news")}, registry=registry)
    await read(app, "/five")
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
        metrics = telemetry.metrics()
        assert metrics.keys() == {instrument.otel_name for instrument in (*INSTRUMENTS, STREAM_DURATION)}
        assert metrics["sse.server.active_streams"][()].value == 1
        assert metrics["sse.server.opened_streams"][()].value == 2
        assert metrics["sse.server.events"][()].value == 6
        assert metrics["sse.server.closed_streams"][("sse.close_reason", "finished"),].value == 1
        assert metrics["sse.server.closed_streams"][("sse.close_reason", "failed"),].value == 0
        assert metrics["sse.broker.state"][("sse.broker.state", "local"),].value == 1
        (duration,) = metrics["sse.server.stream_duration"].values()
        assert (duration.count, duration.attributes) == (1, {"sse.close_reason": "finished"})
        assert duration.sum == pytest.approx(5, abs=0.1)
        assert duration.explicit_bounds[0] == 1
    async with open_stream(app, "/news") as stream:
        await stream.read()
        broker.publish_nowait("news", "x")
        assert telemetry.value("sse.broker.subscriptions") == 1
        assert telemetry.value("sse.broker.published") == 1
    with pytest.raises(RuntimeError, match="a meter provider can report one instrumentation"):
        instrument(registry, meter_provider=telemetry.meter_provider)
    instrumentation.uninstrument()
    assert telemetry.metrics().keys() <= {"sse.server.stream_duration"}
    instrument(meter_provider=telemetry.meter_provider, brokers={"one": broker, "two": Broker()}).uninstrument()
    instrument(registry, brokers={"one": broker, "two": Broker()}, meter_provider=telemetry.meter_provider)
    assert telemetry.value("sse.server.closed_streams", close_reason="finished") == 1
    assert telemetry.value("sse.broker.published", broker="one") == 1
    assert telemetry.value("sse.broker.published", broker="two") == 0


async def test_instrument_reports_all_registries_by_default(telemetry: Telemetry) -> None:
    instrumentation = instrument(meter_provider=telemetry.meter_provider)
    try:
        before = telemetry.value("sse.server.opened_streams")
        await read(telemetry.around(EventSourceResponse(five())))
        await read(telemetry.around(create_app({"/five": five})), "/five")
        assert telemetry.value("sse.server.opened_streams") == before + 2
        assert [own_attributes(span)["sse.events"] for span in telemetry.spans()] == [5, 5]
    finally:
        instrumentation.uninstrument()
    await read(EventSourceResponse(five()))
    (duration,) = telemetry.metrics()["sse.server.stream_duration"].values()
    assert duration.count == 2


async def test_statistics_are_read_once_per_collection(telemetry: Telemetry) -> None:
    class CountingRegistry(StreamRegistry):
        read = 0

        def statistics(self) -> RegistryStatistics:
            self.read += 1
            return super().statistics()

    registry = CountingRegistry()
    instrument(registry, broker=Broker(), meter_provider=telemetry.meter_provider)
    for times in (1, 2, 3):
        telemetry.metrics()
        assert registry.read == times


def test_invalid_arguments_are_refused(telemetry: Telemetry) -> None:
    with pytest.raises(TypeError, match="only one of broker and brokers"):
        instrument(broker=Broker(), brokers=[Broker()], meter_provider=telemetry.meter_provider)
    with pytest.raises(TypeError, match="registry must be a StreamRegistry, got 'x'"):
        instrument("x", meter_provider=telemetry.meter_provider)  # type: ignore[arg-type]
    instrument(StreamRegistry(), meter_provider=telemetry.meter_provider).uninstrument()


def test_names_follow_the_conventions() -> None:
    names = [instrument.otel_name for instrument in (*INSTRUMENTS, STREAM_DURATION)]
    assert len(set(names)) == len(names)
    assert all(instrument.otel_name.startswith("sse.server.") for instrument in STREAM_INSTRUMENTS)
    assert all(instrument.otel_name.startswith("sse.broker.") for instrument in BROKER_INSTRUMENTS)
    assert not any(name.endswith(("_total", "_seconds", "_bytes")) for name in names)  # the unit is a separate field
