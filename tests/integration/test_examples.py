"""Each example as its README says to run it, on real servers: what it promises, and its end with a stream open."""

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
ENOUGH = 30.0  # seconds for any one thing, on a slow machine; none of them waits for it to pass
TESTED_ELSEWHERE = {"mcp"}
BAD = re.compile(r"ERROR|Traceback|ResourceWarning|RuntimeWarning")

if not EXAMPLES.exists():
    pytest.skip("the tree is not beside the tests", allow_module_level=True)


def read_readme() -> dict[str, list[list[str]]]:
    """The commands of each example."""
    _, *sections = re.split(r"^## \[(\w+)\]\(.*\)$", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    blocks = [re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for text in sections[1::2]]
    lines = [[shlex.split(line) for block in found for line in block.splitlines()] for found in blocks]
    return dict(zip(sections[::2], lines, strict=True))


COMMANDS = read_readme()


class Run:
    """An example's server, and a client of it."""

    def __init__(self, port: int, log: Path, client: httpx.Client) -> None:
        self.port = port
        self.log = log
        self.client = client

    @contextmanager
    def stream(self, path: str, method: str = "GET", **request: Any) -> Iterator[Iterator[ServerSentEvent]]:
        def events() -> Iterator[ServerSentEvent]:
            decoder, deadline = EventDecoder(), time.monotonic() + ENOUGH
            for chunk in response.iter_bytes():
                yield from decoder.feed(chunk)
                assert time.monotonic() < deadline, "the stream goes on"

        with self.client.stream(method, path, **request) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            yield events()

    def some(self, path: str, number: int = 3, **request: Any) -> list[ServerSentEvent]:
        """The first events of an endless stream."""
        with self.stream(path, **request) as events:
            return [next(events) for _ in range(number)]

    def status(self, path: str, method: str = "GET", **request: Any) -> int:
        with self.client.stream(method, path, **request) as response:
            return response.status_code

    def all(self, path: str, method: str = "GET", **request: Any) -> list[tuple[float, ServerSentEvent]]:
        """The events of a stream that ends, each with its time."""
        with self.stream(path, method, **request) as events:
            return [(time.monotonic(), event) for event in events]

    def wait_for_log(self, pattern: str) -> re.Match[str]:
        deadline = time.monotonic() + ENOUGH
        while not (found := re.search(pattern, self.log.read_text())):
            assert time.monotonic() < deadline, f"no {pattern} in\n{self.log.read_text()}"
            time.sleep(0.02)
        return found


def data_of(events: list[ServerSentEvent]) -> list[str | None]:
    return [event.data for event in events]


def id_of(last: str) -> dict[str, str]:
    return {"Last-Event-ID": last}


def check_starlette(run: Run) -> None:
    assert [event.id for event in run.some("/numbers")] == ["1", "2", "3"]
    event, _ = run.some("/numbers", 2, headers=id_of("40"))
    assert (event.event, event.id, event.data) == ("number", "41", '{"number":41}')
    assert run.status("/numbers", headers=id_of("x")) == 400


def check_fastapi(run: Run) -> None:
    assert data_of(run.some("/multiples?step=7", 2)) == ['{"multiple":7}', '{"multiple":14}']
    assert data_of(run.some("/multiples", 1, headers=id_of("40"))) == ['{"multiple":41}']
    assert run.status("/multiples?step=0") == 422
    assert run.status("/multiples", headers=id_of("x")) == 422


def check_django(run: Run) -> None:
    assert [event.id for event in run.some("/clock")] == ["1", "2", "3"]
    with run.stream("/messages") as events:
        for text in ("one", "two\nlines"):
            assert run.client.post("/say", data={"text": text}).status_code == 201
            while (event := next(events)).data != json.dumps({"text": text}, separators=(",", ":")):
                pass
    assert event.id is not None
    assert run.client.post("/say", data={"text": "missed"}).status_code == 201
    assert data_of(run.some("/messages", 1, headers=id_of(event.id))) == ['{"text":"missed"}']
    assert run.status("/messages", headers=id_of("x")) == 400
    assert run.status("/say") == 405


def check_quart(run: Run) -> None:
    assert data_of(run.some("/greetings?name=Ann", 2)) == ["Hello Ann"] * 2
    assert data_of(run.some("/greetings", 1)) == ["Hello you"]


def check_litestar(run: Run) -> None:
    assert data_of(run.some("/multiples?step=7", 2)) == ['{"multiple":7}', '{"multiple":14}']
    assert data_of(run.some("/plain", 2)) == ['{"multiple":1}', '{"multiple":2}']
    assert run.status("/multiples?step=0") == 400


def check_plain_asgi(run: Run) -> None:
    assert [event.event for event in run.some("/ticks")] == ["tick"] * 3
    assert data_of(run.some("/by-hand", 2)) == ['{"tick":1}', '{"tick":2}']
    is_countdown(lambda: run.all("/countdown/Ann"), ["Ann: 3", "Ann: 2", "Ann: 1"])


def come_one_by_one(read: Callable[[], list[tuple[float, ServerSentEvent]]], seconds: float) -> list[ServerSentEvent]:
    """The events of a stream, of which the last came so many seconds after the first.

    Who has stood still finds them all together, as if they had been held back, so that it is tried again.
    """
    for _ in range(5):
        (first, _), *_, (last, _) = events = read()
        if last - first > seconds:
            return [event for _, event in events]
    pytest.fail("they came together")


def is_countdown(read: Callable[[], list[tuple[float, ServerSentEvent]]], expected: list[str]) -> None:
    assert [event.data for event in come_one_by_one(read, 0.05)] == expected


def check_llm_tokens(run: Run) -> None:
    question = {"prompt": "any  thing"}
    *tokens, done = come_one_by_one(lambda: run.all("/answer", "POST", json=question), 0.3)
    assert done.data == "[DONE]"
    assert "".join(json.loads(str(event.data))["token"] for event in tokens).startswith("You said: any  thing\nI ")
    assert int(run.wait_for_log(r"made (\d+) tokens")[1]) == len(tokens)
    answers = run.log.read_text().count(" tokens")
    with run.stream("/answer", "POST", json={"prompt": "long " * 1000}) as events:  # of 3,000 tokens: two minutes
        next(events)
    assert int(run.wait_for_log(rf"(?s)(?:made .*){{{answers}}}made (\d+) tokens")[1]) < 3000
    assert run.status("/answer", "POST", json={}) == 422
    assert run.status("/answer", "POST", content=b"{") == 400
    assert "fetch(" in run.client.get("/").text


def check_progress(run: Run) -> None:
    assert run.status("/jobs/a") == 404
    assert run.status("/jobs/a", "POST") == 202
    assert run.status("/jobs/a", "POST") == 409
    seen = run.some("/jobs/a", 5)[-1].id
    assert seen is not None
    *progress, last = [event for _, event in run.all("/jobs/a", headers=id_of(seen))]
    percents = [int(seen), *(json.loads(str(event.data))["percent"] for event in (*progress, last))]
    assert percents == sorted(set(percents))
    assert len(percents) > 3
    assert {event.event for event in progress} == {"progress"}
    assert (last.event, last.id, last.data) == ("done", "100", '{"percent":100}')
    assert run.status("/jobs/a", headers=id_of("100")) == 204
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
    (again,) = run.some("/board?key=bread", 1, headers=id_of(str(board.id)))
    assert again == change
    reset, board = run.some("/board?key=bread", 2, headers=id_of("gone-1"))
    assert (reset.event, reset.id, board.event) == ("reset", "", "board")
    assert run.status("/board?key=bread&channel=shop.butcher") == 403
    assert run.status("/board") == 403
    assert run.status("/shops/none", "POST") == 400
    assert "EventSource(" in run.client.get("/").text


def ask(run: Run, prompt: str) -> str:
    return f"/answers?channel={run.client.post('/ask', json={'prompt': prompt}).json()['channel']}"


def check_conversation(run: Run) -> None:
    path = ask(run, "any thing")
    seen = run.some(path, 3)  # and away
    run.wait_for_log("an answer has ended")
    rest = [event for _, event in run.all(path, headers=id_of(str(seen[-1].id)))]
    *tokens, end = [*seen, *rest]
    assert (end.event, end.data) == ("end", '{"reason":"finished"}')
    assert "".join(json.loads(str(event.data))["token"] for event in tokens).startswith("You said: any thing\nI ")
    assert [event for _, event in run.all(path)] == [*tokens, end]
    assert run.status(path, headers=id_of(str(end.id))) == 204
    path = ask(run, "long " * 1000)
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
    with pytest.raises(httpx.RemoteProtocolError), run.stream("/reports/broken") as events:  # its body is cut
        seen += events  # one by one: it raises at the end
    assert [(event.event, event.data) for event in seen][2:] == [
        ("message", '{"line":3}'),
        ("failed", '{"error":"ConnectionError"}'),
    ]
    run.wait_for_log("a stream has ended: failed")
    run.wait_for_log("ConnectionError: the database has gone")
    run.some("/reports/daily")
    run.wait_for_log("a stream has ended: disconnected")


def check_memory_channels(run: Run) -> None:
    with run.stream("/news") as one, run.stream("/news") as other:
        first = next(other).data  # which one has too, as it was there before
        while next(one).data != first:
            pass
        assert next(one).data == next(other).data != first
    is_countdown(lambda: run.all("/countdown"), ["3", "2", "1"])


def check_shutdown(run: Run) -> None:
    assert [event.id for event in run.some("/ticks")] == ["1", "2", "3"]
    assert [event.id for event in run.some("/adapter")] == ["1", "2", "3"]


CHECKS: dict[str, Callable[[Run], None]] = {
    name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")
}
# The streams that are open when the server stops: the request, and what the type of its last event is in.
GET, ASK = {"method": "GET"}, {"method": "POST", "json": {"prompt": "long " * 1000}}
OPEN: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "starlette": {"/numbers": (GET, "number")},
    "fastapi": {"/multiples": (GET, "message")},
    "django": {"/clock": (GET, "message"), "/messages": (GET, "message")},
    "quart": {"/greetings": (GET, "message")},
    "litestar": {"/multiples": (GET, "message"), "/plain": (GET, "message")},
    "plain_asgi": {"/ticks": (GET, "tick"), "/by-hand": (GET, "tick")},
    "llm_tokens": {"/answer": (ASK, "message")},
    "progress": {"/jobs/b": (GET, "progress, or done")},
    "dashboard": {"/board?key=bread": (GET, "board")},
    "conversation": {"/answers": (ASK, "end")},
    "errors": {"/reports/daily": (GET, "message")},
    "memory_channels": {"/news": (GET, "message"), "/countdown": (GET, "message")},
    "shutdown": {"/ticks": (GET, "farewell"), "/adapter": (GET, "farewell")},
}


def test_every_example_is_tested() -> None:
    folders = {path.name for path in EXAMPLES.iterdir() if (path / "app.py").exists()}
    assert folders - TESTED_ELSEWHERE == set(CHECKS) == set(OPEN) == set(COMMANDS) - TESTED_ELSEWHERE


def run_curl(run: Run, arguments: list[str]) -> None:
    """Do what a line of the README does with curl: ``-N`` for a stream, else a short answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("-H", default="")
    parser.add_argument("-X")
    parser.add_argument("-d")
    parser.add_argument("-N", action="store_true")
    parser.add_argument("-i", action="store_true")
    given = parser.parse_args(arguments)
    headers = dict([given.H.split(": ")] if given.H else [])
    if given.d:
        headers["content-type"] = "application/x-www-form-urlencoded"  # as curl says, whatever it is
    path, method = given.url.removeprefix("http://127.0.0.1:8000"), given.X or ("POST" if given.d else "GET")
    if given.N:
        with run.stream(path, method, headers=headers, content=given.d) as events:
            next(events)
    else:
        assert run.status(path, method, headers=headers, content=given.d) in (201, 202, 403, 404)


@contextmanager
def started(name: str, server: str, directory: Path) -> Iterator[tuple[Run, subprocess.Popen[bytes]]]:
    """Run the lines of the README in a fresh copy of the examples."""
    shutil.copytree(EXAMPLES, directory / "examples", ignore=shutil.ignore_patterns("__pycache__", "*.sqlite3"))
    for command in COMMANDS[name]:
        if command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], cwd=directory, env=environment(), check=True, timeout=ENOUGH)
    (command,) = (command for command in COMMANDS[name] if command[0] == server)
    port, log = free_port(), directory / "server.log"
    arguments = [sys.executable, "-m", *command, *address(server, port)]
    with (
        serving(arguments, port, log, directory) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ENOUGH, trust_env=False) as client,
    ):
        yield Run(port, log, client), process


@pytest.mark.parametrize("name", CHECKS)
def test_example(name: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor() as pool:  # both at once, since each of them waits most of its time
        for done in [pool.submit(try_example, name, server, tmp_path / server) for server in ("uvicorn", "hypercorn")]:
            done.result()


def try_example(name: str, server: str, directory: Path) -> None:
    with started(name, server, directory) as (run, process), ExitStack() as streams:
        CHECKS[name](run)
        for command in COMMANDS[name]:
            if command[0] == "curl":
                run_curl(run, command[1:])
        planned = len(run.log.read_text()) if name == "errors" else 0
        if name == "progress":
            assert run.status("/jobs/b", "POST") == 202
        still_open = []
        for path, (request, kind) in OPEN[name].items():
            asked = ask(run, **request["json"]) if name == "conversation" else path
            events = streams.enter_context(run.stream(asked, **(GET if asked != path else request)))
            still_open.append((next(events), events, kind))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for first, events, kind in still_open:
            assert str([first, *events][-1].event) in kind  # and httpx raises if the body has no proper end
        process.wait(ENOUGH)
        assert time.monotonic() - began < 10
    assert not BAD.search(run.log.read_text()[planned:]), run.log.read_text()
