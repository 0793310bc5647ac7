"""The demo, as who runs it sees it: real processes, real sockets, real figures."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from asgi_sse import EventDecoder, ServerSentEvent
from asgi_sse.demo.app import Meter, create_demo
from asgi_sse.testing import open_stream

ENOUGH = 30.0  # seconds for any of these, on a slow machine; none of them waits for it to pass


@contextmanager
def serving(*command: str, stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and its URL as soon as it has told it. It is killed when it has had long enough."""
    command = (sys.executable, *command)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        watchdog = Timer(ENOUGH, process.kill)
        watchdog.start()
        try:
            said = ""
            for line in process.stdout or ():
                said += line
                if found := re.search(r"http://[\w.]+:\d+", line):
                    yield process, found[0]
                    return
            pytest.fail(f"{command} has told no URL: {said or process.communicate()}")
        finally:
            watchdog.cancel()
            process.kill()


@contextmanager
def streaming(url: str) -> Iterator[tuple[httpx.Response, Iterator[ServerSentEvent]]]:
    def events() -> Iterator[ServerSentEvent]:
        decoder = EventDecoder()
        for chunk in response.iter_bytes():
            yield from decoder.feed(chunk)

    with httpx.Client(trust_env=False, timeout=ENOUGH) as client, client.stream("GET", f"{url}/figures") as response:
        yield response, events()


def check_figures(event: ServerSentEvent, number: int) -> dict[str, Any]:
    """The event is the `number`-th of a stream, and this machine's."""
    assert (event.event, event.id) == ("figures", str(number))
    figures: dict[str, Any] = json.loads(event.data or "")
    assert len(figures["cpu"]) == psutil.cpu_count()
    assert all(0 <= percent <= 100 for percent in figures["cpu"])
    memory = figures["memory"]
    assert memory["total"] == psutil.virtual_memory().total
    assert 0 < memory["used"] < memory["total"]
    assert 0 < memory["percent"] < 100
    assert figures["network"] is None or min(figures["network"].values()) >= 0
    assert figures["load"] is None or len(figures["load"]) == 3
    assert 1_000_000 < figures["rss"] < memory["total"]
    assert figures["streams"] == 1
    return figures


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_shows_this_machine_until_it_is_told_to_end(number: signal.Signals, status: int) -> None:
    with serving("-W", "always::ResourceWarning", "-m", "asgi_sse", "--port", "0") as (process, url):
        page = httpx.get(url, trust_env=False)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.text.startswith("<!doctype html>")
        with streaming(url) as (response, events):
            assert response.headers["content-type"].startswith("text/event-stream")
            check_figures(next(events), 1)
            check_figures(next(events), 2)
            process.send_signal(number)
            assert len(list(events)) <= 1  # httpx raises for a body that is cut
        assert process.wait(5) == status
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "command",
    [
        "hypercorn --workers 0 --bind 127.0.0.1:0",
        "hypercorn --workers 0 --bind 127.0.0.1:0 --worker-class trio",
        "uvicorn --port 0",
    ],
)
def test_runs_under_other_servers(command: str) -> None:
    # They are not told to end while the stream is open: they would wait for its client.
    with serving("-m", *command.split(), "asgi_sse.demo.app:app", stderr=subprocess.STDOUT) as (process, url):
        with streaming(url) as (_, events):
            check_figures(next(events), 1)
            check_figures(next(events), 2)
        process.terminate()
        process.wait(ENOUGH)


# The app


@pytest.mark.anyio
async def test_page() -> None:
    app = create_demo()
    async with open_stream(app) as page:
        body = await page.read()
    assert page.status == 200
    assert page.headers["content-length"] == str(len(body))
    assert page.headers["cache-control"] == "no-store"
    assert not re.search(
        rb"""(?:src|href)=["'](?!data:)|url\(|@import|innerHTML""", body
    )  # it needs nothing but itself
    async with open_stream(app, method="HEAD") as head:
        assert await head.read() == b""
    assert (head.status, head.headers) == (200, page.headers)
    async with open_stream(app, method="POST") as post:
        assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.anyio
async def test_figures_count_on_after_a_reconnection() -> None:
    app = create_demo()
    async with open_stream(app, "/figures") as stream:
        check_figures(await stream.receive(), 1)
        check_figures(await stream.receive(2), 2)
    async with open_stream(app, "/figures", headers={"last-event-id": stream.last_event_id}) as stream:
        check_figures(await stream.receive(), 3)
    async with open_stream(app, "/figures", headers={"last-event-id": "of another app"}) as stream:
        check_figures(await stream.receive(), 1)


def test_each_meter_measures_since_its_own_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(**core: float) -> None:
        times = {"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 0.0, "guest": 0.0, "guest_nice": 0.0} | core
        counted = type("Times", (tuple,), times)(times.values())
        monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [counted])

    look(user=10, idle=10)
    one, other = Meter(), Meter()
    look(user=11, idle=13)
    assert one.read()["cpu"] == [25.0]
    look(user=13, guest=2, idle=14, iowait=1)  # the kernel counts a guest as user, too
    assert one.read()["cpu"] == [50.0]
    assert other.read()["cpu"] == [37.5]
    assert other.read()["cpu"] == [0.0]  # no time has passed


def test_network_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(seconds: float, **interfaces: int) -> None:
        counters = {name: SimpleNamespace(bytes_recv=n, bytes_sent=2 * n) for name, n in interfaces.items()}
        monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: dict(counters))
        monkeypatch.setattr("time.monotonic", lambda: seconds)

    look(5, lo=10, eth0=100, wlan0=1000)
    meter = Meter()
    look(7, lo=20, eth0=200, wlan0=3000)
    assert meter.read()["network"] == {"in": 1050, "out": 2100, "loopback": 10}
    look(8, lo=20, eth0=300)  # an interface has gone, and its count with it
    assert meter.read()["network"] == {"in": 0, "out": 0, "loopback": 0}


def test_what_a_container_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise FileNotFoundError("/proc/net/dev")

    monkeypatch.setattr(psutil, "net_io_counters", fail)
    monkeypatch.setattr(psutil, "getloadavg", fail)
    figures = Meter().read()
    assert (figures["network"], figures["load"]) == (None, None)
    assert figures["memory"]["total"] > 0
