"""The demo, as who runs it sees it: real processes, real sockets, real figures."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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

ENOUGH = 60.0  # seconds for any of these, on a slow machine; none of them waits for it to pass


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


def check_figures(event: ServerSentEvent) -> dict[str, Any]:
    """The event has the figures of this machine."""
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
def test_shows_this_machine_until_it_is_told_to_end(number: signal.Signals, status: int) -> None:
    with serving("-W", "always::ResourceWarning", "-m", "asgi_sse", "--port", "0") as (process, url):
        page = httpx.get(url, trust_env=False, timeout=ENOUGH)
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.text.startswith("<!doctype html>")
        with streaming(url) as (response, events):
            assert response.headers["content-type"].startswith("text/event-stream")
            check_figures(next(events))
            check_figures(next(events))
            process.send_signal(number)
            assert len(list(events)) <= 1  # httpx raises for a body that is cut
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
def test_runs_under_other_servers(command: str) -> None:
    # They are not told to end while the stream is open: they would wait for its client.
    with serving("-m", *command.split(), "asgi_sse.cli.demo.app:app", stderr=subprocess.STDOUT) as (process, url):
        with streaming(url) as (_, events):
            check_figures(next(events))
            check_figures(next(events))
        process.terminate()
        process.wait(ENOUGH)


# The app


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "kind", "begins"),
    [("/", "html", b"<!doctype html>"), ("/page.css", "css", b":root"), ("/page.js", "javascript", b'"use strict"')],
)
async def test_page(path: str, kind: str, begins: bytes) -> None:
    app = create_demo()
    async with open_stream(app, path) as page:
        body = await page.read()
    assert page.status == 200
    assert body.startswith(begins)
    assert page.headers["content-type"] == f"text/{kind}; charset=utf-8"
    assert page.headers["content-length"] == str(len(body))
    assert page.headers["cache-control"] == "no-store"
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in page.headers["content-security-policy"]
    # It needs nothing but itself, and makes no markup of what anybody says.
    assert set(re.findall(rb"""(?:src|href)=["']([^"':]*)""", body)) <= {b"page.css", b"page.js", b"data"}
    assert not re.search(rb"url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", body)
    async with open_stream(app, path, method="HEAD") as head:
        assert await head.read() == b""
    assert (head.status, head.headers) == (200, page.headers)
    async with open_stream(app, path, method="POST") as post:
        assert (post.status, post.headers["allow"]) == (405, "GET, HEAD")


async def of_type(stream: OpenStream, kind: str, seconds: float = 5) -> Any:
    """The data of the next event of a type."""
    with anyio.fail_after(seconds):
        while (event := await stream.receive(seconds)).event != kind:
            pass
    return json.loads(event.data or "")


@pytest.mark.anyio
async def test_who_comes_back_gets_the_figures_that_it_missed() -> None:
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
async def test_nothing_is_measured_while_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert len(reads) <= before + 1  # to begin anew with
        async with open_stream(app, "/figures") as stream:
            check_figures(await stream.receive())


@pytest.mark.anyio
async def test_the_room_shows_everybody_what_anybody_says() -> None:
    app = create_demo()
    async with LifespanManager(app), open_stream(app, "/live") as one:
        assert (await of_type(one, "state"))["room"]["posts"] == []
        async with open_stream(app, "/live") as other:
            await of_type(other, "state")
            while (await of_type(one, "here"))["here"] != 2:
                pass
            assert (await say(app, {"name": "Ann", "text": " <b>hi</b>\n\u202ethere\x07 \u2764"})).status == 204
            said = {"name": "Ann", "text": "<b>hi</b> there \u2764"}
            assert await of_type(one, "post") == await of_type(other, "post") == said
        assert (await of_type(one, "here")) == {"here": 1}
        async with open_stream(app, "/live") as late:
            assert (await of_type(late, "state"))["room"]["posts"] == [said]


async def say(app: Any, post: Any, **headers: str) -> OpenStream:
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
async def test_a_post_that_is_none(post: Any, status: int) -> None:
    assert (await say(create_demo(), post)).status == status


@pytest.mark.anyio
async def test_posts_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    # Five more are allowed each second: on a slow machine the 21st would be one of them.
    monkeypatch.setattr("asgi_sse.cli.demo.limits.time", SimpleNamespace(monotonic=lambda: now))
    app = create_demo()
    answers = [await say(app, {"name": "Ann", "text": "hi"}) for _ in range(21)]
    assert [answer.status for answer in answers[:-1]] == [204] * 20
    assert (answers[-1].status, answers[-1].headers["retry-after"]) == (429, "1")
    now = 5.4
    answers = [await say(app, {"name": "Ann", "text": "hi"}) for _ in range(3)]
    assert [answer.status for answer in answers] == [204, 204, 429]


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/say", "/tell", "/drain"])
async def test_no_other_site_may_ask_for_anything(path: str) -> None:
    app = create_demo()
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "http://127.0.0.1:9000", "host": "127.0.0.1:8000"},
        {"origin": "null", "host": "127.0.0.1:8000"},
        {"origin": "http://[", "host": "127.0.0.1:8000"},  # of no browser
    ):
        async with open_stream(app, path, method="POST", headers=headers) as stream:
            assert stream.status == 403
    async with open_stream(app, path) as stream:
        assert (stream.status, stream.headers["allow"]) == (405, "POST")
    for headers in (
        {"sec_fetch_site": "same-origin", "origin": "https://demo.example", "host": "behind-a-proxy:8000"},
        {"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"},
        {},  # of no browser
    ):
        assert (await say(app, {"name": "Ann", "text": "hi"}, **headers)).status == 204


@pytest.mark.anyio
async def test_the_story_goes_on_without_its_listener() -> None:
    app = create_demo()
    async with LifespanManager(app):
        runs = set()
        for _ in range(2):  # who asks while it goes on gets the same one
            async with open_stream(app, "/tell", method="POST") as told:
                assert told.status == 201
                runs.add((await told.read()).decode())
        (run,) = runs
        async with open_stream(app, f"/story?channel={run}") as stream:
            heard = [json.loads((await stream.receive()).data or "") for _ in range(5)]
        async with open_stream(app, "/live") as pull_source:
            of = (await of_type(pull_source, "state"))["story"]["of"]
            while (await of_type(pull_source, "story"))["made"] < 20:
                pass
        async with open_stream(app, f"/story?channel={run}&last_event_id={stream.last_event_id}") as again:
            events = [event async for event in again]
        heard += [json.loads(event.data or "") for event in events if event.event == "token"]
        assert [token["n"] for token in heard] == list(range(1, of + 1))
        assert (events[-1].event, events[-1].data) == ("end", '{"reason":"finished"}')
        headers = {"last-event-id": again.last_event_id}
        async with open_stream(app, f"/story?channel={run}", headers=headers) as over:
            assert over.status == 204
        async with open_stream(app, "/tell", method="POST") as told:
            assert (await told.read()).decode() != run


@pytest.mark.anyio
async def test_the_roll_tells_which_streams_there_are_and_why_they_ended() -> None:
    app = create_demo()
    async with LifespanManager(app), open_stream(app, "/live") as pull_source:
        await of_type(pull_source, "state")
        async with open_stream(app, "/figures") as stream:
            await stream.receive()
            while len(lines := (await of_type(pull_source, "streams"))["lines"]) < 2:
                pass
            assert [(line["path"], line["streams"], line["state"]) for line in lines] == [
                ("/live", 1, "open"),
                ("/figures", 1, "open"),
            ]
            assert lines[0]["age"] >= lines[1]["age"]
            assert min(lines[0]["events"], lines[0]["bytes"]) > 0
        ended = await of_type(pull_source, "ended")
        assert (ended["path"], ended["streams"], ended["reason"]) == ("/figures", 1, "disconnected")
        for _ in range(5):
            async with open_stream(app, "/crowd"):
                pass
        async with open_stream(app, "/live") as other:
            roll = (await of_type(other, "state"))["streams"]
        assert [line["path"] for line in roll["ended"]] == ["/figures", *["/crowd"] * 5]
        assert "127.0.0.1" not in json.dumps(roll)


@contextmanager
def served_here(app: Any) -> Iterator[str]:
    """By uvicorn, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + ENOUGH
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(ENOUGH)
        assert not thread.is_alive()


def test_a_drain_brings_all_clients_back_spread_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over real sockets, since the clients of the drain are real ones."""
    # On a slow machine not all would be there when they are drained, and a second drain be allowed by then.
    for name in ("_PATIENCE", "_STAY"):
        monkeypatch.setattr(f"asgi_sse.cli.demo.swarm.{name}", ENOUGH)
    monkeypatch.setattr("asgi_sse.cli.demo.limits.time", SimpleNamespace(monotonic=lambda: 5.0))
    with served_here(create_demo()) as url:
        came: dict[int, int] = {}
        retries: dict[int, int] = {}
        drained = last_id = None
        with httpx.Client(trust_env=False, timeout=ENOUGH) as client:
            while len(came) < 30:
                with client.stream("GET", f"{url}/live", params={"last_event_id": last_id or ""}) as pull_source:
                    decoder = EventDecoder()
                    if last_id is None:
                        assert client.post(f"{url}/drain").status_code == 204
                        assert client.post(f"{url}/drain").status_code == 429
                    for chunk in pull_source.iter_bytes():  # to its end, which the drain makes a proper one
                        for event in decoder.feed(chunk):
                            data = json.loads(event.data or "")
                            if event.event == "drain":
                                drained = data["at"]
                            elif event.event == "swarm" and drained is not None:
                                if data["state"] == "away":
                                    retries[data["client"]] = data["retry"]
                                elif data["state"] == "open":
                                    came[data["client"]] = data["at"] - drained
                        if len(came) == 30:
                            break
                    last_id = decoder.last_event_id
        assert set(came) == set(retries) == set(range(30))
        assert all(1000 <= retry <= 5000 for retry in retries.values())
        assert all(came[number] >= retries[number] for number in came)
        assert len({retry // 400 for retry in retries.values()}) > 4  # thirty at random in ten such slots


@pytest.mark.anyio
@pytest.mark.real_time
async def test_the_clients_of_a_drain_take_nothing_over_from_a_block_that_was_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their next connection begins anew, behind the last whole event."""
    monkeypatch.setattr("asgi_sse.cli.demo.swarm._PATIENCE", 0.1)  # they do not stay
    asked: list[bytes] = []
    enough = anyio.Event()

    async def answer(stream: SocketStream) -> None:
        async with stream:
            asked.append(await stream.receive())
            block = b"retry: 1\nid: 1\ndata: x\n\nid: 2\ndata: cut" if len(asked) < 31 else b"\ndata: y\n\n"
            await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + block)
        if len(asked) > 150:
            enough.set()

    app = create_demo()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, LifespanManager(app), anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        scope = {"server": listener.extra(SocketAttribute.local_address)}
        async with open_stream(app, "/drain", method="POST", scope=scope):
            pass  # whether it finds anybody open, of whom nobody stays, is by chance
        with anyio.fail_after(ENOUGH):
            await enough.wait()
        tasks.cancel_scope.cancel()
    ids = {name for request in asked for name in re.findall(rb"last-event-id: (.*)\r", request)}
    assert ids == {b"1"}


@pytest.mark.anyio
async def test_a_drain_needs_a_port() -> None:
    app = create_demo()
    scope = {"server": ("/run/demo.socket", None)}
    async with open_stream(app, "/drain", method="POST", scope=scope) as stream:
        assert stream.status == 501
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asgi_sse.cli.demo.swarm._PATIENCE", 0.5)
        async with LifespanManager(app):
            with socket.socket() as taken:  # bound, and nobody listens
                taken.bind(("127.0.0.1", 0))
                scope = {"server": taken.getsockname()}
                async with open_stream(app, "/drain", method="POST", scope=scope) as stream:
                    assert stream.status == 503


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
