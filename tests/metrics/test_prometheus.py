"""The metrics of streams and brokers for Prometheus, and the endpoint for its scrapes."""

import asyncio
import gc
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector as PrometheusCollector
from serving import running

from asgi_sse import Broker, EventSourceResponse, SSEMiddleware, StreamRegistry, create_app
from asgi_sse.metrics.prometheus import Collector, MetricsEndpoint
from asgi_sse.stream.counters import RegistryStatistics
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "guides" / "observe.md"


def values_of(families: Iterable[Any]) -> dict[str, float]:
    """Return the value of each sample, by its name and labels in the text format."""
    values: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            name = sample.name + f"{{{labels}}}" * bool(labels)
            assert name not in values, f"{name} occurs twice"
            values[name] = sample.value
    return values


def read(collector: PrometheusCollector) -> dict[str, float]:
    """Return the values as a scraper reads them. Both text formats must have the same samples."""
    found = values_of(parse_text(generate_latest(collector).decode()))
    text = generate_openmetrics(collector).decode()  # type: ignore[no-untyped-call]
    assert values_of(parse_openmetrics(text)).keys() == found.keys()  # type: ignore[no-untyped-call]
    return found


async def idle() -> AsyncIterator[str]:
    yield "first"
    await anyio.sleep_forever()


async def test_collector_reports_each_count_of_streams() -> None:
    registry = StreamRegistry()
    collector = Collector(registry)
    assert set(read(collector).values()) == {0}

    async def lasting(seconds: float) -> AsyncIterator[str]:
        yield "first"
        await anyio.sleep(seconds)

    async with open_stream(EventSourceResponse(idle(), registry=registry)) as stream:
        await stream.receive()
        values = read(collector)
        assert values["asgi_sse_streams"] == values["asgi_sse_streams_opened_total"] == 1
        assert values["asgi_sse_events_total"] == 1
        assert values["asgi_sse_sent_bytes_total"] == len(b": stream opened\nretry: 3000\n\ndata: first\n\n")
    for seconds in (3, 100, 100_000):
        async with open_stream(EventSourceResponse(lasting(seconds), registry=registry, ping=None)) as stream:
            assert [event.data async for event in stream] == ["first"]
    async with open_stream(EventSourceResponse(idle(), registry=registry)):
        await registry.drain()
    registry.count_compressed("encoded")
    values = read(collector)
    assert values["asgi_sse_streams"] == 0
    assert values["asgi_sse_streams_opened_total"] == 5
    closed = {
        "disconnected": 1,
        "finished": 3,
        "drained": 1,
        "timed_out": 0,
        "overflowed": 0,
        "failed": 0,
        "expired": 0,
    }
    assert {name: values[f'asgi_sse_streams_closed_total{{reason="{name}"}}'] for name in closed} == closed
    assert values["asgi_sse_events_total"] == registry.statistics().events
    assert values["asgi_sse_sent_bytes_total"] == registry.statistics().bytes
    assert values["asgi_sse_drains_total"] == values["asgi_sse_draining"] == 1
    assert values['asgi_sse_streams_compressed_total{kind="encoded"}'] == 1
    bounds = ("1.0", "5.0", "60.0", "300.0", "86400.0", "+Inf")
    assert [values[f'asgi_sse_stream_duration_seconds_bucket{{le="{bound}"}}'] for bound in bounds] == [
        2,
        3,
        3,
        4,
        4,
        5,
    ]
    assert values["asgi_sse_stream_duration_seconds_count"] == 5
    assert values["asgi_sse_stream_duration_seconds_sum"] == pytest.approx(100_103, abs=0.1)


async def test_slowest_client_is_reported_from_any_thread() -> None:
    registry = StreamRegistry()

    async def fast() -> AsyncIterator[str]:
        while True:
            yield "x" * 10_000

    async with open_stream(EventSourceResponse(fast(), registry=registry), capacity=1):
        await anyio.sleep(5)
        found: list[float] = []
        thread = threading.Thread(
            target=lambda: found.append(read(Collector(registry))["asgi_sse_slowest_client_wait_seconds"])
        )
        thread.start()
        thread.join(10)
        assert 4 <= found[0] <= 5


def test_each_metric_occurs_once() -> None:
    one, two = StreamRegistry(), StreamRegistry()
    assert read(Collector(one, one)).keys() == read(Collector(one)).keys()
    values = read(Collector(one, two, one))
    assert {'asgi_sse_streams{registry="0"}', 'asgi_sse_streams{registry="1"}'} <= values.keys()
    assert 'asgi_sse_streams{registry="2"}' not in values
    assert 'asgi_sse_streams_closed_total{reason="failed",registry="1"}' in values
    prometheus = CollectorRegistry()
    prometheus.register(Collector(one))
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        prometheus.register(Collector(two))


async def test_collector_reports_brokers_by_label() -> None:
    one, two = Broker(history=50), Broker()
    values = read(Collector(StreamRegistry(), brokers=one))
    assert values['asgi_sse_broker_state{state="local"}'] == 1
    assert sum(value for name, value in values.items() if name.startswith("asgi_sse_broker_state")) == 1
    for number in range(3):
        one.publish_nowait(f"a.{number}", number)
    values = read(Collector(StreamRegistry(), brokers=[one, one]))
    assert values["asgi_sse_broker_published_total"] == values["asgi_sse_broker_received_total"] == 3
    assert values["asgi_sse_broker_channels"] == 3
    values = read(Collector(StreamRegistry(), brokers=(one, two)))
    assert (values['asgi_sse_broker_channels{broker="0"}'], values['asgi_sse_broker_channels{broker="1"}']) == (3, 0)
    values = read(Collector(StreamRegistry(), brokers={"orders": one, "same": one}))
    assert values['asgi_sse_broker_channels{broker="orders"}'] == 3
    assert 'asgi_sse_broker_channels{broker="same"}' not in values


@pytest.mark.parametrize("channels", [["a"], ["a", "b"], ["*"], [f"c{number}" for number in range(20)] + ["a"]])
async def test_lag_is_that_of_the_slowest_subscription(channels: list[str]) -> None:
    broker = Broker()
    collector = Collector(StreamRegistry(), brokers=broker)

    def lag() -> float:
        return read(collector)["asgi_sse_broker_lag_events"]

    async with (
        open_stream(EventSourceResponse(broker.subscribe(*channels)), capacity=1) as slow,
        open_stream(EventSourceResponse(broker.subscribe("a")), capacity=100) as fast,
    ):
        await fast.read()
        await slow.read()
        assert lag() == 0
        for number in range(
            40
        ):  # one after the other, so that each is a message of its own, and the slow client takes one
            broker.publish_nowait("a", number)
            await anyio.sleep(0.01)
        assert 36 <= lag() <= 40
        assert [(await fast.receive()).data for _ in range(40)] == list(map(str, range(40)))
        assert 36 <= lag() <= 40
        assert [(await slow.receive()).data for _ in range(40)] == list(map(str, range(40)))
        await anyio.sleep(0.01)
        assert lag() == 0
    assert lag() == 0


async def test_lag_includes_events_that_a_subscription_read_ahead() -> None:
    broker = Broker()
    other, slowest = aiter(broker.subscribe("b")), aiter(broker.subscribe("a"))
    for channel, reader in (("b", other), ("a", slowest)):
        broker.publish_nowait(channel, "first")
        await anext(reader)
    for channel in ["b"] * 50 + ["a"] * 101:
        broker.publish_nowait(channel, "next")
    await anext(slowest)  # it reads several events at once
    assert read(Collector(StreamRegistry(), brokers=broker))["asgi_sse_broker_lag_events"] == 100


# All registries of the process


def counted(collector: Collector) -> tuple[float, float, float]:
    values = read(collector)
    names = ("streams_opened_total", "events_total", "stream_duration_seconds_count")
    return tuple(values[f"asgi_sse_{name}"] for name in names)  # type: ignore[return-value]


def test_counts_outlive_their_event_loop() -> None:
    collector = Collector()
    opened, events, ended = counted(collector)

    async def stream() -> None:
        async with open_stream(EventSourceResponse(["a", "b", "c"])) as stream:
            assert len([event async for event in stream]) == 3

    def run() -> None:
        for _ in range(3):
            asyncio.run(stream())

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert counted(collector) == counted(Collector()) == (opened + 6, events + 18, ended + 6)


def test_counts_of_collected_registries_are_kept() -> None:
    before = read(Collector())
    for number in range(200):
        registry = StreamRegistry()
        registry.count_compressed("held" if number % 2 else "encoded")
    after = read(Collector())
    for kind in ("held", "encoded"):
        name = f'asgi_sse_streams_compressed_total{{kind="{kind}"}}'
        assert after[name] == before[name] + 100


def test_counters_never_decrease() -> None:
    """Statistics decrease when an event loop is closed under its streams, whose counts are then lost."""

    class Decreasing(StreamRegistry):
        events = 10

        def statistics(self) -> RegistryStatistics:
            return replace(super().statistics(), events=self.events)

    registry = Decreasing()
    collector = Collector(registry)
    seen = []
    for registry.events in (10, 7, 9, 11):
        seen.append(read(collector)["asgi_sse_events_total"])
    assert seen == [10, 10, 10, 11]


@pytest.mark.real_time
async def test_scrape_in_another_thread_while_streams_begin_and_end() -> None:
    registry = StreamRegistry()
    collector = Collector(registry)
    over = threading.Event()
    seen: list[dict[str, float]] = []
    errors: list[BaseException] = []

    def scrape() -> None:
        try:
            while not over.is_set():
                seen.append(values_of(collector.collect()))
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=scrape)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads switch as often as possible
    thread.start()
    try:
        for number in range(1, 201):
            async with open_stream(EventSourceResponse(["x"] * 20, registry=registry)) as stream:
                assert len([event async for event in stream]) == 20
            values = values_of(collector.collect())
            assert values["asgi_sse_events_total"] == 20 * number  # a higher value would have remained
            assert values["asgi_sse_streams_opened_total"] == number
    finally:
        sys.setswitchinterval(interval)
        over.set()
        thread.join(10)
    assert not errors
    assert len(seen) > 10
    for name in seen[-1]:
        if "_total" in name or "_bucket" in name:
            values_over_time = [values[name] for values in seen]
            assert values_over_time == sorted(values_over_time), name


def test_signal_handler_may_scrape_during_a_scrape() -> None:
    code = """
import signal
from asgi_sse import StreamRegistry
from asgi_sse.metrics.prometheus import Collector

collectors = [Collector(StreamRegistry()), Collector()]
calls = 0

def read(*_):
    global calls
    calls += 1
    for collector in collectors:
        list(collector.collect())
    if calls < 500:
        signal.setitimer(signal.ITIMER_REAL, 0.0003)

signal.signal(signal.SIGALRM, read)
read()
while calls < 500:
    for collector in collectors:
        list(collector.collect())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdin=subprocess.DEVNULL)


# The endpoint


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_endpoint_negotiates_the_format() -> None:
    app = create_app({"/metrics": MetricsEndpoint(StreamRegistry(), broker=Broker())})
    async with client_of(app) as client:
        plain = await client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
        openmetrics = await client.get("/metrics", headers={"accept": accept})
        assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert openmetrics.text.endswith("# EOF\n")
        values = values_of(parse_text(plain.text))
        assert values == values_of(parse_openmetrics(openmetrics.text))  # type: ignore[no-untyped-call]
        assert values['asgi_sse_broker_state{state="local"}'] == 1
        head = await client.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) == len(plain.content)
        refused = await client.post("/metrics")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_endpoint_adds_the_metrics_of_a_collector_registry() -> None:
    prometheus = CollectorRegistry()
    Counter("orders", "Orders.", registry=prometheus).inc(3)
    registry = StreamRegistry()
    for _ in range(2):  # the second time, our collector is registered there too
        async with client_of(MetricsEndpoint(registry, collector_registry=prometheus)) as client:
            values = values_of(parse_text((await client.get("/")).text))
        assert (values["orders_total"], values["asgi_sse_streams"]) == (3, 0)
        if not list(prometheus.restricted_registry(["asgi_sse_streams"]).collect()):
            prometheus.register(Collector(registry))


async def test_endpoint_can_be_mounted_in_a_framework() -> None:
    fastapi = pytest.importorskip("fastapi").FastAPI()
    fastapi.mount("/mounted", MetricsEndpoint())
    fastapi.add_route("/metrics", MetricsEndpoint())
    async with client_of(SSEMiddleware(fastapi)) as client:
        for path in ("/mounted/", "/metrics"):
            assert "asgi_sse_streams_opened_total" in values_of(parse_text((await client.get(path)).text))


def test_invalid_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="registry must be a StreamRegistry, got 'x'; pass one"):
        Collector("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="registry must be a StreamRegistry, got"):
        Collector([StreamRegistry()])  # type: ignore[arg-type]
    for brokers in (["x"], [["x"]], {"a": "x"}, "x", 5, None):
        with pytest.raises(TypeError, match=r"brokers must be Broker instances, got .*; pass one or several"):
            Collector(brokers=brokers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="only one of broker and brokers"):
        MetricsEndpoint(broker=Broker(), brokers=[Broker()])
    with pytest.raises(TypeError, match="collector_registry must be a CollectorRegistry, got 'x'"):
        MetricsEndpoint(collector_registry="x")  # type: ignore[arg-type]


async def test_websocket_is_refused_by_the_endpoint() -> None:
    with pytest.raises(TypeError, match="'websocket'"):
        await MetricsEndpoint()({"type": "websocket"}, None, None)  # type: ignore[arg-type]


@pytest.mark.real_time
def test_scrape_of_a_real_server() -> None:
    with running("uvicorn-h11-asyncio", "metrics_app:app") as port, httpx.Client(timeout=60) as client:
        address = f"http://127.0.0.1:{port}"

        def scrape(accept: str = "") -> dict[str, float]:
            answer = client.get(f"{address}/metrics", headers={"accept": accept})
            parse = parse_openmetrics if "openmetrics" in answer.headers["content-type"] else parse_text
            return values_of(parse(answer.text))

        with client.stream("GET", f"{address}/news") as stream:
            lines = stream.iter_lines()
            while next(lines) != "data: 2":
                pass
            values = scrape()
            assert (values["asgi_sse_streams"], values["asgi_sse_events_total"]) == (1, 2)
            assert values["asgi_sse_broker_subscriptions"] == 1
            assert values["python_info" if "python_info" in values else "process_start_time_seconds"]
        deadline = time.monotonic() + 60
        while values["asgi_sse_streams"]:
            assert time.monotonic() < deadline
            values = scrape("application/openmetrics-text;version=1.0.0")
        assert values['asgi_sse_streams_closed_total{reason="disconnected"}'] == 1


# The documentation


@pytest.mark.skipif(not PAGE.exists(), reason="an sdist has no pages")
def test_documentation_lists_each_metric() -> None:
    table = re.findall(r"^\| `(asgi_sse_\w+)(?:\{(\w+)\})?` \| (\w+) \|", PAGE.read_text(), re.MULTILINE)
    found = []
    for family in Collector(brokers=Broker()).collect():
        name = family.name + "_total" * (family.type == "counter")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found.append((name, "".join(labels), family.type))
    assert table == found
