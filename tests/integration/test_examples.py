"""Each example, run with the commands of its README on real servers, and stopped while streams are open."""

import argparse
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ROOT, address, environment, free_port, serving

from asgi_sse import EventDecoder, ServerSentEvent

EXAMPLES = ROOT / "examples"
TIMEOUT_S = 30.0  # for any one step on a slow machine; a passing test never waits that long
TESTED_ELSEWHERE = {"mcp"}
BAD = re.compile(r"ERROR|Traceback|ResourceWarning|RuntimeWarning")

if not EXAMPLES.exists():
    pytest.skip("the examples are not next to the tests", allow_module_level=True)


def read_readme() -> dict[str, list[list[str]]]:
    """Return the commands of each example from examples/README.md."""
    _, *sections = re.split(r"^## \[(\w+)\]\(.*\)$", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    blocks = [re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in sections[1::2]]
    lines = [[shlex.split(line) for block in found for line in block.splitlines()] for found in blocks]
    return dict(zip(sections[::2], lines, strict=True))


COMMANDS = read_readme()


class Run:
    """A running example and an HTTP client for it."""

    def __init__(self, port: int, log: Path, client: httpx.Client) -> None:
        self.port = port
        self.log = log
        self.client = client

    @contextmanager
    def stream(self, path: str, method: str = "GET", **request: Any) -> Iterator[Iterator[ServerSentEvent]]:
        def events() -> Iterator[ServerSentEvent]:
            decoder, deadline = EventDecoder(), time.monotonic() + TIMEOUT_S
            for chunk in response.iter_bytes():
                yield from decoder.feed(chunk)
                assert time.monotonic() < deadline, "the stream does not end"

        with self.client.stream(method, path, **request) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            yield events()

    def first_events(self, path: str, number: int = 3, **request: Any) -> list[ServerSentEvent]:
        """Return the first events of an endless stream."""
        with self.stream(path, **request) as events:
            return [next(events) for _ in range(number)]

    def status(self, path: str, method: str = "GET", **request: Any) -> int:
        with self.client.stream(method, path, **request) as response:
            return response.status_code

    def all_events(self, path: str, method: str = "GET", **request: Any) -> list[tuple[float, ServerSentEvent]]:
        """Return the events of a stream that ends, each with the time of its arrival."""
        with self.stream(path, method, **request) as events:
            return [(time.monotonic(), event) for event in events]

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < deadline, f"no {pattern} in\n{self.log.read_text()}"
            time.sleep(0.02)
        return found


def data_of(events: list[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events]


def last_event_id(value: str) -> dict[str, str]:
    return {"Last-Event-ID": value}


def check_starlette(run: Run) -> None:
    assert [event.id for event in run.first_events("/numbers")] == ["1", "2", "3"]
    event, _ = run.first_events("/numbers", 2, headers=last_event_id("40"))
    assert (event.event, event.id, event.data) == ("number", "41", '{"number":41}')
    assert run.status("/numbers", headers=last_event_id("x")) == 400


def check_fastapi(run: Run) -> None:
    assert data_of(run.first_events("/multiples?step=7", 2)) == ['{"multiple":7}', '{"multiple":14}']
    assert data_of(run.first_events("/multiples", 1, headers=last_event_id("40"))) == ['{"multiple":41}']
    assert run.status("/multiples?step=0") == 422
    assert run.status("/multiples", headers=last_event_id("x")) == 422


def check_django(run: Run) -> None:
    assert [event.id for event in run.first_events("/clock")] == ["1", "2", "3"]
    with run.stream("/messages") as events:
        for text in ("one", "two\nlines"):
            assert run.client.post("/say", data={"text": text}).status_code == 201
            while (event := next(events)).data != json.dumps({"text": text}, separators=(",", ":")):
                pass
    assert event.id is not None
    assert run.client.post("/say", data={"text": "missed"}).status_code == 201
    assert data_of(run.first_events("/messages", 1, headers=last_event_id(event.id))) == ['{"text":"missed"}']
    assert run.status("/messages", headers=last_event_id("x")) == 400
    assert run.status("/say") == 405


def check_quart(run: Run) -> None:
    assert data_of(run.first_events("/greetings?name=Ann", 2)) == ["Hello Ann"] * 2
    assert data_of(run.first_events("/greetings", 1)) == ["Hello you"]


def check_litestar(run: Run) -> None:
    assert data_of(run.first_events("/multiples?step=7", 2)) == ['{"multiple":7}', '{"multiple":14}']
    assert data_of(run.first_events("/plain", 2)) == ['{"multiple":1}', '{"multiple":2}']
    assert run.status("/multiples?step=0") == 400


def check_plain_asgi(run: Run) -> None:
    assert [event.event for event in run.first_events("/ticks")] == ["tick"] * 3
    assert data_of(run.first_events("/by-hand", 2)) == ['{"tick":1}', '{"tick":2}']
    expect_countdown(lambda: run.all_events("/countdown/Ann"), ["Ann: 3", "Ann: 2", "Ann: 1"])


def events_one_by_one(read: Callable[[], list[tuple[float, ServerSentEvent]]], seconds: float) -> list[ServerSentEvent]:
    """Return the events of a stream whose last event arrives more than `seconds` after its first.

    A process that the system paused finds all events at once, as if they had been held back: hence several attempts.
    """
    for _ in range(5):
        (first, _), *_, (last, _) = events = read()
        if last - first > seconds:
            return [event for _, event in events]
    pytest.fail("all events arrived at once")


def expect_countdown(read: Callable[[], list[tuple[float, ServerSentEvent]]], expected: list[str]) -> None:
    assert [event.data for event in events_one_by_one(read, 0.05)] == expected


def check_llm_tokens(run: Run) -> None:
    question = {"prompt": "any  thing"}
    *tokens, done = events_one_by_one(lambda: run.all_events("/answer", "POST", json=question), 0.3)
    assert done.data == "[DONE]"
    assert "".join(json.loads(str(event.data))["token"] for event in tokens).startswith("You said: any  thing\nI ")
    assert int(run.wait_for_log(r"generated (\d+) tokens")[1]) == len(tokens)
    answers = run.log.read_text().count(" tokens")
    # The whole answer would have 3,000 tokens and take two minutes.
    with run.stream("/answer", "POST", json={"prompt": "long " * 1000}) as events:
        next(events)
    assert int(run.wait_for_log(rf"(?s)(?:generated .*){{{answers}}}generated (\d+) tokens")[1]) < 3000
    assert run.status("/answer", "POST", json={}) == 422
    assert run.status("/answer", "POST", content=b"{") == 400
    assert "fetch(" in run.client.get("/").text


def check_progress(run: Run) -> None:
    assert run.status("/jobs/a") == 404
    assert run.status("/jobs/a", "POST") == 202
    assert run.status("/jobs/a", "POST") == 409
    seen = run.first_events("/jobs/a", 5)[-1].id
    assert seen is not None
    *progress, last = [event for _, event in run.all_events("/jobs/a", headers=last_event_id(seen))]
    percents = [int(seen), *(json.loads(str(event.data))["percent"] for event in (*progress, last))]
    assert percents == sorted(set(percents))
    assert len(percents) > 3
    assert {event.event for event in progress} == {"progress"}
    assert (last.event, last.id, last.data) == ("done", "100", '{"percent":100}')
    assert run.status("/jobs/a", headers=last_event_id("100")) == 204
    assert "EventSource(" in run.client.get("/").text


def check_dashboard(run: Run) -> None:
    for order, state in (("7", "paid"), ("8", "new"), ("7", "sent")):
        assert run.status(f"/shops/bakery?order={order}&state={state}", "POST") == 201
    with run.stream("/board?key=bread") as events:
        board = next(events)
        assert (board.event, board.data) == ("board", '{"7": "sent", "8": "new"}')
        run.status("/shops/butcher?order=1&state=new", "POST")
        run.status("/shops/bakery?order=8&state=paid", "POST")
        change = next(events)
        assert (change.event, change.data) == ("change", '{"order":"8","state":"paid"}')
    (again,) = run.first_events("/board?key=bread", 1, headers=last_event_id(str(board.id)))
    assert again == change
    reset, board = run.first_events("/board?key=bread", 2, headers=last_event_id("gone-1"))
    assert (reset.event, reset.id, board.event) == ("reset", "", "board")
    assert run.status("/board?key=bread&channel=shop.butcher") == 403
    assert run.status("/board") == 403
    assert run.status("/shops/none", "POST") == 400
    assert "EventSource(" in run.client.get("/").text


def start_answer(run: Run, prompt: str) -> str:
    return f"/answers?channel={run.client.post('/ask', json={'prompt': prompt}).json()['channel']}"


def check_conversation(run: Run) -> None:
    path = start_answer(run, "any thing")
    seen = run.first_events(path, 3)  # then disconnect
    run.wait_for_log("the answer is complete or was cancelled")
    rest = [event for _, event in run.all_events(path, headers=last_event_id(str(seen[-1].id)))]
    *tokens, end = [*seen, *rest]
    assert (end.event, end.data) == ("end", '{"reason":"finished"}')
    assert "".join(json.loads(str(event.data))["token"] for event in tokens).startswith("You said: any thing\nI ")
    assert [event for _, event in run.all_events(path)] == [*tokens, end]
    assert run.status(path, headers=last_event_id(str(end.id))) == 204
    path = start_answer(run, "long " * 1000)
    with run.stream(path) as events:
        next(events)
        assert run.status(path.replace("/answers", "/cancel"), "POST") == 202
        assert [*events][-1].data == '{"reason":"cancelled"}'
    assert run.status("/answers?channel=answer/none") == 404
    assert run.status("/cancel", "POST") == 404
    assert run.status("/ask", "POST", json={}) == 422
    assert "EventSource(" in run.client.get("/").text


def check_errors(run: Run) -> None:
    response = run.client.get("/reports/missing")
    assert (response.status_code, response.text) == (404, "there is no report 'missing'")
    assert run.status("/reports/secret") == 403
    seen: list[ServerSentEvent] = []
    with pytest.raises(httpx.RemoteProtocolError), run.stream("/reports/broken") as events:  # the body is incomplete
        seen += events  # keeps the events before the error
    assert [(event.event, event.data) for event in seen][2:] == [
        ("message", '{"line":3}'),
        ("failed", '{"error":"ConnectionError"}'),
    ]
    run.wait_for_log("stream ended: failed")
    run.wait_for_log("ConnectionError: the database is unavailable")
    run.first_events("/reports/daily")
    run.wait_for_log("stream ended: disconnected")


def check_memory_channels(run: Run) -> None:
    with run.stream("/news") as one, run.stream("/news") as other:
        first = next(other).data  # `one` gets it too, because it connected earlier
        while next(one).data != first:
            pass
        assert next(one).data == next(other).data != first
    expect_countdown(lambda: run.all_events("/countdown"), ["3", "2", "1"])


def check_shutdown(run: Run) -> None:
    assert [event.id for event in run.first_events("/ticks")] == ["1", "2", "3"]
    assert [event.id for event in run.first_events("/adapter")] == ["1", "2", "3"]


CHECKS: dict[str, Callable[[Run], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
# The streams that are open when the server stops: each with its request and the expected type of its last event.
GET, POST_PROMPT = {"method": "GET"}, {"method": "POST", "json": {"prompt": "long " * 1000}}
OPEN: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "starlette": {"/numbers": (GET, "number")},
    "fastapi": {"/multiples": (GET, "message")},
    "django": {"/clock": (GET, "message"), "/messages": (GET, "message")},
    "quart": {"/greetings": (GET, "message")},
    "litestar": {"/multiples": (GET, "message"), "/plain": (GET, "message")},
    "plain_asgi": {"/ticks": (GET, "tick"), "/by-hand": (GET, "tick")},
    "llm_tokens": {"/answer": (POST_PROMPT, "message")},
    "progress": {"/jobs/b": (GET, "progress, or done")},
    "dashboard": {"/board?key=bread": (GET, "board")},
    "conversation": {"/answers": (POST_PROMPT, "end")},
    "errors": {"/reports/daily": (GET, "message")},
    "memory_channels": {"/news": (GET, "message"), "/countdown": (GET, "message")},
    "shutdown": {"/ticks": (GET, "farewell"), "/adapter": (GET, "farewell")},
}


def test_every_example_is_tested() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if (path / "app.py").exists()}
    assert folders - TESTED_ELSEWHERE == set(CHECKS) == set(OPEN) == set(COMMANDS) - TESTED_ELSEWHERE


def run_curl(run: Run, arguments: list[str]) -> None:
    """Send the request of a curl command of the README; ``-N`` marks a stream."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-H", default="")
    parser.add_argument("-X")
    parser.add_argument("-d")
    parser.add_argument("-N", action="store_true")
    parser.add_argument("-i", action="store_true")
    options = parser.parse_args(arguments)
    headers = dict([options.H.split(": ")] if options.H else [])
    if options.d:
        headers["content-type"] = "application/x-www-form-urlencoded"  # curl sends this with -d
    path, method = options.url.removeprefix("http://127.0.0.1:8000"), options.X or ("POST" if options.d else "GET")
    if options.N:
        with run.stream(path, method, headers=headers, content=options.d) as events:
            next(events)
    else:
        assert run.status(path, method, headers=headers, content=options.d) in (201, 202, 403, 404)


@contextmanager
def started(name: str, server: str, directory: Path) -> Iterator[tuple[Run, subprocess.Popen[bytes]]]:
    """Run the commands of the README in a fresh copy of the examples."""
    shutil.copytree(EXAMPLES, directory / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3"))
    for command in COMMANDS[name]:
        if command[0] == "python":
            subprocess.run(
                [sys.executable, *command[1:]], cwd=directory, env=environment(), check=True, timeout=TIMEOUT_S
            )
    (command,) = (command for command in COMMANDS[name] if command[0] == server)
    port, log = free_port(), directory / "server.log"
    arguments = [sys.executable, "-m", *command, *address(server, port)]
    with (
        serving(arguments, port, log, directory) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_S, trust_env=False) as client,
    ):
        yield Run(port, log, client), process


@pytest.mark.parametrize("name", CHECKS)
def test_example_runs_and_stops_on_both_servers(name: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:  # both servers at once, since each test mostly waits
        for result in [
            pool.submit(run_example, name, server, tmp_path / server) for server in ("uvicorn", "hypercorn")
        ]:
            result.result()


def run_example(name: str, server: str, directory: Path) -> None:
    with started(name, server, directory) as (run, process), ExitStack() as streams:
        CHECKS[name](run)
        for command in COMMANDS[name]:
            if command[0] == "curl":
                run_curl(run, command[1:])
        skipped = len(run.log.read_text()) if name == "errors" else 0
        if name == "progress":
            assert run.status("/jobs/b", "POST") == 202
        still_open = []
        for path, (request, kind) in OPEN[name].items():
            requested = start_answer(run, **request["json"]) if name == "conversation" else path
            events = streams.enter_context(run.stream(requested, **(GET if requested != path else request)))
            still_open.append((next(events), events, kind))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for first, events, kind in still_open:
            assert str([first, *events][-1].event) in kind  # httpx raises if the body is incomplete
        process.wait(TIMEOUT_S)
        assert time.monotonic() - began < 10
    assert not BAD.search(run.log.read_text()[skipped:]), run.log.read_text()
