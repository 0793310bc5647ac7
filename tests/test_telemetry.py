"""What OpenTelemetry sees, by its SDK and its own instrumentation of ASGI apps."""

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
    """An SDK that keeps what it is given."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracer_provider = TracerProvider(**options)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter_provider = MeterProvider([self.reader])

    def around(self, app: Any, **options: Any) -> Any:
        """`app` with the instrumentation that everybody uses."""
        return OpenTelemetryMiddleware(app, tracer_provider=self.tracer_provider, **options)

    def spans(self) -> Sequence[ReadableSpan]:
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        return spans

    def metrics(self) -> dict[str, Any]:
        """Our metrics: the points of each, by their attributes."""
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


def ours(span: ReadableSpan) -> dict[str, Any]:
    return {name: value for name, value in (span.attributes or {}).items() if name.startswith("sse.")}


async def test_a_stream_is_one_span(telemetry: Telemetry, registry: StreamRegistry) -> None:
    app = telemetry.around(create_app({"/five": five}, registry=registry))
    await read(app, "/five")
    assert len(telemetry.spans()) >= 8  # of each message one: what is to be prevented
    instrumentation = instrument(registry, meter_provider=telemetry.meter_provider)
    assert await read(app, "/five") == list(map(str, range(5)))
    (span,) = telemetry.spans()
    assert span.kind is trace.SpanKind.SERVER
    attributes = ours(span)
    assert attributes.pop("sse.duration") == pytest.approx(5, abs=0.1)
    assert attributes == {"sse.events": 5, "sse.bytes": registry.statistics().bytes / 2, "sse.close_reason": "finished"}
    assert span.status.is_unset
    instrumentation.uninstrument()
    instrumentation.uninstrument()
    await read(app, "/five")
    spans = telemetry.spans()
    assert len(spans) >= 8
    assert not any(map(ours, spans))


async def test_a_client_that_leaves_and_a_drain(telemetry: Telemetry, registry: StreamRegistry) -> None:
    instrument(registry, meter_provider=telemetry.meter_provider)
    app = telemetry.around(create_app({"/idle": idle}, registry=registry))
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
    (span,) = telemetry.spans()
    assert (ours(span)["sse.close_reason"], ours(span)["sse.events"]) == ("disconnected", 1)
    async with open_stream(app, "/idle") as stream:
        await stream.receive()
        await registry.drain()
        assert [event async for event in stream] == []
    (span,) = telemetry.spans()
    assert ours(span)["sse.close_reason"] == "drained"


async def test_a_source_that_fails(telemetry: Telemetry, registry: StreamRegistry) -> None:
    """The instrumentation records the error by itself, and once."""
    instrument(registry, meter_provider=telemetry.meter_provider)
    app = telemetry.around(create_app({"/fails": fails}, registry=registry))
    with pytest.raises(LookupError):
        await read(app, "/fails")
    (span,) = telemetry.spans()
    assert ours(span)["sse.close_reason"] == "failed"
    assert span.status.status_code is trace.StatusCode.ERROR
    (event,) = span.events
    assert (event.name, (event.attributes or {})["exception.type"]) == ("exception", "LookupError")


async def test_a_source_that_fails_behind_a_middleware(telemetry: Telemetry, registry: StreamRegistry) -> None:
    """One that keeps the error, and ends the body in place of the stream, as Starlette's BaseHTTPMiddleware does."""
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


async def test_spans_of_the_app_stay(telemetry: Telemetry, registry: StreamRegistry) -> None:
    """What it does in its source, in its callbacks and beside its stream belongs to its request."""
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
    below = [span for span in spans if span is not request]
    assert sorted({span.name for span in below}) == ["clean-up", "on_close", "one", "ping", "two"]
    assert {span.parent.span_id for span in below if span.parent} == {request.context.span_id}
    async with open_stream(app, "/state") as stream:
        assert (await stream.receive()).data == "state"
    assert sorted(span.name for span in telemetry.spans()) == ["GET /state", "snapshot"]


async def test_streams_of_an_app_of_its_own(telemetry: Telemetry, registry: StreamRegistry) -> None:
    starlette = pytest.importorskip("starlette.applications")
    responses = pytest.importorskip("starlette.responses")
    routing = pytest.importorskip("starlette.routing")

    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {number}\n\n"
            await anyio.sleep(1)

    async def theirs(request: Any) -> Any:
        return responses.StreamingResponse(lines(), media_type="text/event-stream")

    async def our_own(request: Any) -> Any:
        return EventSourceResponse(five())

    instrument(registry, meter_provider=telemetry.meter_provider)
    routes = [routing.Route("/theirs", theirs), routing.Route("/ours", our_own)]
    app = telemetry.around(SSEMiddleware(starlette.Starlette(routes=routes), registry=registry))
    assert await read(app, "/ours") == list(map(str, range(5)))
    (span,) = telemetry.spans()
    assert ours(span)["sse.events"] == 5
    assert await read(app, "/theirs") == list(map(str, range(3)))
    spans = telemetry.spans()
    assert not any("send" in span.name for span in spans)
    (request,) = (span for span in spans if span.kind is trace.SpanKind.SERVER)
    assert ours(request)["sse.events"] == 3


async def test_spans_of_messages_on_request(registry: StreamRegistry) -> None:
    """And by a sampler that makes a span of everything: then the instrumentation itself is told."""
    telemetry = Telemetry(sampler=ALWAYS_ON)
    instrumentation = instrument(registry, meter_provider=telemetry.meter_provider)
    app = create_app({"/five": five}, registry=registry)
    await read(telemetry.around(app), "/five")
    assert len(telemetry.spans()) >= 8
    await read(telemetry.around(app, exclude_spans=["send", "receive"]), "/five")
    (span,) = telemetry.spans()
    assert ours(span)["sse.events"] == 5
    instrumentation.uninstrument()
    telemetry = Telemetry()
    instrument(registry, meter_provider=telemetry.meter_provider, message_spans=True)
    await read(telemetry.around(app), "/five")
    spans = telemetry.spans()
    assert len(spans) >= 8
    assert [ours(span)["sse.events"] for span in spans if ours(span)] == [5]


async def test_streams_without_a_span(telemetry: Telemetry, registry: StreamRegistry) -> None:
    instrument(registry, meter_provider=telemetry.meter_provider)
    assert await read(create_app({"/five": five}, registry=registry), "/five") == list(map(str, range(5)))
    assert not telemetry.spans()
    assert telemetry.value("sse.server.opened_streams") == 1


async def test_metrics(telemetry: Telemetry, registry: StreamRegistry) -> None:
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


async def test_all_streams_of_a_process(telemetry: Telemetry) -> None:
    instrumentation = instrument(meter_provider=telemetry.meter_provider)
    try:
        before = telemetry.value("sse.server.opened_streams")
        await read(telemetry.around(EventSourceResponse(five())))
        await read(telemetry.around(create_app({"/five": five})), "/five")
        assert telemetry.value("sse.server.opened_streams") == before + 2
        assert [ours(span)["sse.events"] for span in telemetry.spans()] == [5, 5]
    finally:
        instrumentation.uninstrument()
    await read(EventSourceResponse(five()))
    (duration,) = telemetry.metrics()["sse.server.stream_duration"].values()
    assert duration.count == 2


async def test_one_collection_reads_the_streams_once(telemetry: Telemetry) -> None:
    class Counts(StreamRegistry):
        read = 0

        def statistics(self) -> RegistryStatistics:
            self.read += 1
            return super().statistics()

    registry = Counts()
    instrument(registry, broker=Broker(), meter_provider=telemetry.meter_provider)
    for times in (1, 2, 3):
        telemetry.metrics()
        assert registry.read == times


def test_wrong_arguments(telemetry: Telemetry) -> None:
    with pytest.raises(TypeError, match="only one of broker and brokers"):
        instrument(broker=Broker(), brokers=[Broker()], meter_provider=telemetry.meter_provider)
    with pytest.raises(TypeError, match="registry must be a StreamRegistry, got 'x'"):
        instrument("x", meter_provider=telemetry.meter_provider)  # type: ignore[arg-type]
    instrument(StreamRegistry(), meter_provider=telemetry.meter_provider).uninstrument()


def test_names_by_convention() -> None:
    names = [instrument.otel_name for instrument in (*INSTRUMENTS, STREAM_DURATION)]
    assert len(set(names)) == len(names)
    assert all(instrument.otel_name.startswith("sse.server.") for instrument in STREAM_INSTRUMENTS)
    assert all(instrument.otel_name.startswith("sse.broker.") for instrument in BROKER_INSTRUMENTS)
    assert not any(name.endswith(("_total", "_seconds", "_bytes")) for name in names)  # units have a place of their own
