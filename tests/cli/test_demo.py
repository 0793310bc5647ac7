"""The demo: as a process, as an app, and its parts."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from threading import Thread, Timer
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import psutil
import pytest
import uvicorn
from anyio.abc import SocketAttribute, SocketStream
from asgi_lifespan import LifespanManager

from asgi_sse import EventDecoder, ServerSentEvent
from asgi_sse.cli.demo.app import create_demo
from asgi_sse.cli.demo.meter import Meter
from asgi_sse.testing import OpenStream, open_stream

TIMEOUT_S = 60.0  # for any one step on a slow machine; a passing test never waits that long


@contextmanager
def running_server(*arguments: str, stderr: int = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server; yield its process and the URL that it prints. A watchdog kills it after `TIMEOUT_S`."""
    command = (sys.executable, *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        watchdog = Timer(TIMEOUT_S, process.kill)
        watchdog.start()
        try:
            output = ""
            for line in process.stdout or ():
                output += line
                if found := re.search(r"http://[\w.]+:\d+", line):
                    yield process, found[0]
                    return
            pytest.fail(f"{command} printed no URL: {output or process.communicate()}")
        finally:
            watchdog.cancel()
            process.kill()


@contextmanager
def reading_figures(url: str) -> Iterator[tuple[httpx.Response, Iterator[ServerSentEvent]]]:
    """Open the stream of figures; yield the response and an iterator of its events."""

    def events() -> Iterator[ServerSentEvent]:
        decoder = EventDecoder()
        for chunk in response.iter_bytes():
            yield from decoder.feed(chunk)

    with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client, client.stream("GET", f"{url}/figures") as response:
        yield response, events()


def check_figures(event: ServerSentEvent) -> dict[str, Any]:
    """Check that the event has plausible readings of this machine, and return them."""
    assert event.event == "figures"
    assert re.fullmatch(r"\w+-\d+", str(event.id))
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
    return figures


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_demo_serves_page_and_figures_until_a_signal(number: signal.Signals, status: int) -> None:
    with running_server("-W", "always::ResourceWarning", "-m", "asgi_sse", "--port", "0") as (process, url):
        page = httpx.get(url, trust_env=False, timeout=TIMEOUT_S)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.text.startswith("<!doctype html>")
        with reading_figures(url) as (response, events):
            assert response.headers["content-type"].startswith("text/event-stream")
            check_figures(next(events))
            check_figures(next(events))
            process.send_signal(number)
            assert len(list(events)) <= 1  # httpx raises if the body is incomplete
        assert process.wait(9) == status
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
def test_demo_app_runs_under_other_servers(command: str) -> None:
    # The stream is closed before the server stops: these servers would wait for its client.
    with running_server("-m", *command.split(), "asgi_sse.cli.demo.app:app", stderr=subprocess.STDOUT) as (
        process,
        url,
    ):
        with reading_figures(url) as (_, events):
            check_figures(next(events))
            check_figures(next(events))
        process.terminate()
        process.wait(TIMEOUT_S)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "media_type", "start"),
    [
        ("/", "html", b"<!doctype html>"),
        ("/page.css", "css", b":root"),
        ("/page.js", "javascript", b'"use strict"'),
        ("/streams.js", "javascript", b'"use strict"'),
    ],
)
async def test_page_files_have_strict_headers(path: str, media_type: str, start: bytes) -> None:
    app = create_demo()
    async with open_stream(app, path) as page:
        body = await page.read()
    assert page.status == 200
    assert body.startswith(start)
    assert page.headers["content-type"] == f"text/{media_type}; charset=utf-8"
    assert page.headers["content-length"] == str(len(body))
    assert page.headers["cache-control"] == "no-store"
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in page.headers["content-security-policy"]
    # The page loads nothing from elsewhere, and never turns text into markup.
    assert set(re.findall(rb"""(?:src|href)=["']([^"':]*)""", body)) <= {
        b"page.css",
        b"page.js",
        b"streams.js",
        b"data",
    }
    assert not re.search(rb"url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", body)
    async with open_stream(app, path, method="HEAD") as head:
        assert await head.read() == b""
    assert (head.status, head.headers) == (200, page.headers)
    async with open_stream(app, path, method="POST") as post:
        assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")


async def next_of_type(stream: OpenStream, event_type: str, seconds: float = 5) -> Any:
    """Return the parsed data of the next event of a type."""
    with anyio.fail_after(seconds):
        while (event := await stream.receive(seconds)).event != event_type:
            pass
    return json.loads(event.data or "")


@pytest.mark.anyio
async def test_figures_resume_after_a_reconnect() -> None:
    app = create_demo()
    async with LifespanManager(app), open_stream(app, "/figures") as other:
        check_figures(await other.receive())
        async with open_stream(app, "/figures") as stream:
            check_figures(await stream.receive(2))
        assert (await other.receive()).id == stream.last_event_id
        missed = [await other.receive(2) for _ in range(3)]
        async with open_stream(app, "/figures", headers={"last-event-id": stream.last_event_id}) as stream:
            assert [await stream.receive() for _ in missed] == missed


@pytest.mark.anyio
async def test_machine_is_not_measured_without_subscribers(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    measure = psutil.virtual_memory

    def counted() -> Any:
        reads.append(1)
        return measure()

    monkeypatch.setattr(psutil, "virtual_memory", counted)
    app = create_demo()
    async with LifespanManager(app):
        async with open_stream(app, "/figures") as stream:
            await stream.receive()
        before = len(reads)
        await anyio.sleep(100)
        assert len(reads) <= before + 1  # one to start the next interval
        async with open_stream(app, "/figures") as stream:
            check_figures(await stream.receive())


@pytest.mark.anyio
async def test_chat_shows_posts_to_all_tabs() -> None:
    app = create_demo()
    async with LifespanManager(app), open_stream(app, "/live") as one:
        assert (await next_of_type(one, "state"))["room"]["posts"] == []
        async with open_stream(app, "/live") as other:
            await next_of_type(other, "state")
            while (await next_of_type(one, "here"))["here"] != 2:
                pass
            assert (
                await post_message(app, {"name": "Ann", "text": " <b>hi</b>\n\u202ethere\x07 \u2764"})
            ).status == 204
            clean = {"name": "Ann", "text": "<b>hi</b> there \u2764"}
            assert await next_of_type(one, "post") == await next_of_type(other, "post") == clean
        assert (await next_of_type(one, "here")) == {"here": 1}
        async with open_stream(app, "/live") as late:
            assert (await next_of_type(late, "state"))["room"]["posts"] == [clean]


async def post_message(app: Any, post: Any, **headers: str) -> OpenStream:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    async with open_stream(app, "/say", method="POST", headers=fields, body=json.dumps(post).encode()) as stream:
        return stream


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("post", "status"),
    [
        ([], 400),
        ({"name": "Ann"}, 400),
        ({"name": "Ann", "text": 5}, 400),
        ({"name": "Ann", "text": "x" * 281}, 400),
        ({"name": "x" * 25, "text": "hi"}, 400),
        ({"name": "Ann", "text": " \n\u200d"}, 400),
        ({"name": "Ann", "text": "\ud800"}, 400),
        ({"name": "Ann", "text": "x" * 5000}, 413),
    ],
)
async def test_invalid_post_is_refused(post: Any, status: int) -> None:
    assert (await post_message(create_demo(), post)).status == status


@pytest.mark.anyio
async def test_posts_are_rate_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    # The limit refills by five per second: on a slow machine, the 21st post could be allowed.
    monkeypatch.setattr("asgi_sse.cli.demo.limits.time", SimpleNamespace(monotonic=lambda: now))
    app = create_demo()
    answers = [await post_message(app, {"name": "Ann", "text": "hi"}) for _ in range(21)]
    assert [answer.status for answer in answers[:-1]] == [204] * 20
    assert (answers[-1].status, answers[-1].headers["retry-after"]) == (429, "1")
    now = 5.4
    answers = [await post_message(app, {"name": "Ann", "text": "hi"}) for _ in range(3)]
    assert [answer.status for answer in answers] == [204, 204, 429]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/say", "/tell", "/drain"])
async def test_commands_refuse_pages_of_other_origins(path: str) -> None:
    app = create_demo()
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "http://127.0.0.1:9000", "host": "127.0.0.1:8000"},
        {"origin": "null", "host": "127.0.0.1:8000"},
        {"origin": "http://[", "host": "127.0.0.1:8000"},  # no browser sends this
    ):
        async with open_stream(app, path, method="POST", headers=headers) as stream:
            assert stream.status == 403
    async with open_stream(app, path) as stream:
        assert (stream.status, stream.headers["allow"]) == (405, "POST")
    for headers in (
        {"sec_fetch_site": "same-origin", "origin": "https://demo.example", "host": "behind-a-proxy:8000"},
        {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"},
        {},  # not a browser
    ):
        assert (await post_message(app, {"name": "Ann", "text": "hi"}, **headers)).status == 204


@pytest.mark.anyio
async def test_story_continues_without_readers_and_resumes() -> None:
    app = create_demo()
    async with LifespanManager(app):
        runs = set()
        for _ in range(2):  # the second request joins the running story
            async with open_stream(app, "/tell", method="POST") as response:
                assert response.status == 201
                runs.add((await response.read()).decode())
        (run,) = runs
        async with open_stream(app, f"/story?channel={run}") as stream:
            tokens = [json.loads((await stream.receive()).data or "") for _ in range(5)]
        async with open_stream(app, "/live") as live:
            of = (await next_of_type(live, "state"))["story"]["of"]
            while (await next_of_type(live, "story"))["written"] < 20:
                pass
        async with open_stream(app, f"/story?channel={run}&last_event_id={stream.last_event_id}") as resumed:
            events = [event async for event in resumed]
        tokens += [json.loads(event.data or "") for event in events if event.event == "token"]
        assert [token["n"] for token in tokens] == list(range(1, of + 1))
        assert (events[-1].event, events[-1].data) == ("end", '{"reason":"finished"}')
        headers = {"last-event-id": resumed.last_event_id}
        async with open_stream(app, f"/story?channel={run}", headers=headers) as finished:
            assert finished.status == 204
        async with open_stream(app, "/tell", method="POST") as response:
            assert (await response.read()).decode() != run


@pytest.mark.anyio
async def test_stream_list_shows_open_streams_and_why_others_ended() -> None:
    app = create_demo()
    async with LifespanManager(app), open_stream(app, "/live") as live:
        await next_of_type(live, "state")
        async with open_stream(app, "/figures") as stream:
            await stream.receive()
            while len(rows := (await next_of_type(live, "streams"))["rows"]) < 2:
                pass
            assert [(row["path"], row["streams"], row["state"]) for row in rows] == [
                ("/live", 1, "open"),
                ("/figures", 1, "open"),
            ]
            assert rows[0]["age"] >= rows[1]["age"]
            assert min(rows[0]["events"], rows[0]["bytes"]) > 0
        ended = await next_of_type(live, "ended")
        assert (ended["path"], ended["streams"], ended["reason"]) == ("/figures", 1, "disconnected")
        for _ in range(5):
            async with open_stream(app, "/crowd"):
                pass
        async with open_stream(app, "/live") as other:
            streams = (await next_of_type(other, "state"))["streams"]
        assert [row["path"] for row in streams["ended"]] == ["/figures", *["/crowd"] * 5]
        assert "127.0.0.1" not in json.dumps(streams)


@contextmanager
def serving_in_thread(app: Any) -> Iterator[str]:
    """Serve `app` with uvicorn in a thread of this process; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def test_drained_clients_reconnect_at_different_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test clients need real sockets."""
    # On a slow machine, some clients would not be connected yet, and a second drain would be allowed again.
    for name in ("_CONNECT_TIMEOUT_S", "_STAY_S"):
        monkeypatch.setattr(f"asgi_sse.cli.demo.swarm.{name}", TIMEOUT_S)
    monkeypatch.setattr("asgi_sse.cli.demo.limits.time", SimpleNamespace(monotonic=lambda: 5.0))
    with serving_in_thread(create_demo()) as url:
        returned: dict[int, int] = {}
        retries: dict[int, int] = {}
        drained = last_id = None
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:
            while len(returned) < 30:
                with client.stream("GET", f"{url}/live", params={"last_event_id": last_id or ""}) as live:
                    decoder = EventDecoder()
                    if last_id is None:
                        assert client.post(f"{url}/drain").status_code == 204
                        assert client.post(f"{url}/drain").status_code == 429
                    for chunk in live.iter_bytes():  # to the end of the body, which the drain completes
                        for event in decoder.feed(chunk):
                            data = json.loads(event.data or "")
                            if event.event == "drain":
                                drained = data["at"]
                            elif event.event == "swarm" and drained is not None:
                                if data["state"] == "away":
                                    retries[data["client"]] = data["retry"]
                                elif data["state"] == "open":
                                    returned[data["client"]] = data["at"] - drained
                        if len(returned) == 30:
                            break
                    last_id = decoder.last_event_id
        assert set(returned) == set(retries) == set(range(30))
        assert all(1000 <= retry <= 5000 for retry in retries.values())
        assert all(returned[number] >= retries[number] for number in returned)
        assert len({retry // 400 for retry in retries.values()}) > 4  # 30 random times in ten slots of 400 ms


@pytest.mark.anyio
@pytest.mark.real_time
async def test_drained_clients_ignore_an_event_that_was_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next connection resumes after the last complete event."""
    monkeypatch.setattr("asgi_sse.cli.demo.swarm._CONNECT_TIMEOUT_S", 0.1)  # no client stays connected
    requests: list[bytes] = []
    all_reconnected = anyio.Event()

    async def answer(stream: SocketStream) -> None:
        async with stream:
            requests.append(await stream.receive())
            block = b"retry: 1\nid: 1\ndata: x\n\nid: 2\ndata: cut" if len(requests) < 31 else b"\ndata: y\n\n"
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + block)
        if len(requests) > 150:
            all_reconnected.set()

    app = create_demo()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, LifespanManager(app), anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        scope = {"server": listener.extra(SocketAttribute.local_address)}
        async with open_stream(app, "/drain", method="POST", scope=scope):
            pass  # its status depends on whether a client is connected at that moment
        with anyio.fail_after(TIMEOUT_S):
            await all_reconnected.wait()
        tasks.cancel_scope.cancel()
    ids = {name for request in requests for name in re.findall(rb"last-event-id: (.*)\r", request)}
    assert ids == {b"1"}


@pytest.mark.anyio
@pytest.mark.real_time
@pytest.mark.parametrize(("status", "answered"), [("200 OK", 204), ("503 Service Unavailable", 503)])
async def test_test_clients_that_stay_no_longer_leave(
    status: str, answered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client counts as connected after the final response only, whatever comes before it."""
    monkeypatch.setattr("asgi_sse.cli.demo.swarm._CONNECT_TIMEOUT_S", 0.3 if answered == 503 else TIMEOUT_S)
    monkeypatch.setattr("asgi_sse.cli.demo.swarm._STAY_S", 0.6 if answered == 503 else TIMEOUT_S)
    connections, drained = 0, anyio.Event()
    head = f"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 {status}\r\nContent-Type: text/event-stream\r\n\r\n".encode()

    async def answer(stream: SocketStream) -> None:
        nonlocal connections
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):  # the client left meanwhile
            async with stream:
                await stream.receive()
                connections += 1
                if connections == 30:  # from now on, since a slow machine takes its time to connect them
                    monkeypatch.setattr("asgi_sse.cli.demo.swarm._STAY_S", 0.3)
                await stream.send(head + b"retry: 20\n\n")
                if answered == 204:
                    await drained.wait()

    app = create_demo()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, LifespanManager(app), anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        scope = {"server": listener.extra(SocketAttribute.local_address)}
        states: set[str] = set()
        async with AsyncExitStack() as streams:
            live = await streams.enter_async_context(open_stream(app, "/live"))
            async with open_stream(app, "/drain", method="POST", scope=scope, timeout=TIMEOUT_S) as stream:
                assert stream.status == answered
            drained.set()
            while "left" not in states:
                async for event in live:
                    if event.event == "swarm":
                        states.add(json.loads(event.data or "")["state"])
                    if "left" in states:
                        break
                else:  # the drain has ended this stream as well
                    live = await streams.enter_async_context(live.reconnect())
        await anyio.wait_all_tasks_blocked()  # a connection whose task has not begun would not be closed
        tasks.cancel_scope.cancel()
    assert ("open" in states) == (answered == 204)


@pytest.mark.anyio
async def test_drain_needs_a_server_with_a_port() -> None:
    app = create_demo()
    scope = {"server": ("/run/demo.socket", None)}
    async with open_stream(app, "/drain", method="POST", scope=scope) as stream:
        assert stream.status == 501
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asgi_sse.cli.demo.swarm._CONNECT_TIMEOUT_S", 0.5)
        async with LifespanManager(app):
            with socket.socket() as taken:  # bound, but not listening
                taken.bind(("127.0.0.1", 0))
                scope = {"server": taken.getsockname()}
                async with open_stream(app, "/drain", method="POST", scope=scope) as stream:
                    assert stream.status == 503


def test_meter_rates_cover_the_time_since_its_own_last_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_times(**core: float) -> None:
        times = {"user": 0.0, "system": 0.0, "idle": 0.0, "iowait": 0.0, "guest": 0.0, "guest_nice": 0.0} | core
        counted = type("Times", (tuple,), times)(times.values())
        monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [counted])

    set_times(user=10, idle=10)
    one, other = Meter(), Meter()
    set_times(user=11, idle=13)
    assert one.read()["cpu"] == [25.0]
    set_times(user=13, guest=2, idle=14, iowait=1)  # the kernel counts guest time as user time, too
    assert one.read()["cpu"] == [50.0]
    assert other.read()["cpu"] == [37.5]
    assert other.read()["cpu"] == [0.0]  # no time has passed


def test_network_rates_exclude_loopback_and_never_fall_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_counters(seconds: float, **interfaces: int) -> None:
        counters = {name: SimpleNamespace(bytes_recv=n, bytes_sent=2 * n) for name, n in interfaces.items()}
        monkeypatch.setattr(psutil, "net_io_counters", lambda pernic: dict(counters))
        monkeypatch.setattr("time.monotonic", lambda: seconds)

    set_counters(5, lo=10, eth0=100, wlan0=1000)
    meter = Meter()
    set_counters(7, lo=20, eth0=200, wlan0=3000)
    assert meter.read()["network"] == {"in": 1050, "out": 2100, "loopback": 10}
    set_counters(8, lo=20, eth0=300)  # an interface and its counter disappeared
    assert meter.read()["network"] == {"in": 0, "out": 0, "loopback": 0}


def test_unavailable_readings_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise FileNotFoundError("/proc/net/dev")

    monkeypatch.setattr(psutil, "net_io_counters", fail)
    monkeypatch.setattr(psutil, "getloadavg", fail)
    figures = Meter().read()
    assert (figures["network"], figures["load"]) == (None, None)
    assert figures["memory"]["total"] > 0
