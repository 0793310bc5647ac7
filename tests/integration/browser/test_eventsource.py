"""The EventSource of a real browser against a real uvicorn: what the standard promises to users of both."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import HERE, free_port, serving

ODD_IDS = ["0f3e-1", "a b", "~_:/@+=,-", "\u00e9\u2713", '"quoted"', "%41"]

# Listens as a page would; `window.streams[name]` has what came, in order.
LISTEN = """([name, url, withCredentials, types]) => {
    window.streams ??= {};
    const source = new EventSource(url, { withCredentials });
    const stream = window.streams[name] = { source, events: [], opened: 0, errors: 0 };
    source.onopen = () => stream.opened++;
    source.onerror = () => stream.errors++;
    for (const type of types) source.addEventListener(type, ({ type, data, lastEventId }) =>
        stream.events.push([type, data, lastEventId]));
}"""


class Source:
    """An EventSource in a page."""

    def __init__(self, page: Any, url: str, *, name: str = "", credentials: bool = False) -> None:
        self._page = page
        self._name = name or url
        page.evaluate(LISTEN, [self._name, url, credentials, ["message", "kind", "reset", "end"]])

    def _get(self, expression: str) -> Any:
        return self._page.evaluate(f"(name) => {{ const s = window.streams[name]; return {expression} }}", self._name)

    def wait(self, condition: str) -> None:
        """Until `condition`, in the config of the script."""
        self._page.wait_for_function(
            f"(name) => {{ const s = window.streams[name]; return {condition} }}", arg=self._name
        )

    def take(self, number: int) -> list[list[str]]:
        """The events so far, when there are `number`."""
        self.wait(f"s.events.length >= {number}")
        return self.events

    @property
    def events(self) -> list[list[str]]:
        events: list[list[str]] = self._get("s.events")
        return events

    @property
    def state(self) -> int:
        state: int = self._get("s.source.readyState")
        return state


@pytest.fixture(scope="module")
def server(other_origin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [
        sys.executable, "-m", "uvicorn", f"--port={port}", "--log-level=warning",
        f"--app-dir={HERE}", "browser_app:app",
    ]  # fmt: skip
    with serving(arguments, port, log, variables={"OTHER_ORIGIN": other_origin}):
        yield f"http://127.0.0.1:{port}"
    assert "Traceback" not in Path(log).read_text()


@pytest.fixture
def page(open_page: Callable[..., Any], server: str) -> Any:
    return open_page(server)


@pytest.fixture
def foreign(open_page: Callable[..., Any], other_origin: str) -> Any:
    """A page of another origin."""
    return open_page(other_origin)


@pytest.fixture
def ask(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, trust_env=False, timeout=60) as client:
        yield client


def requests_of(ask: httpx.Client, path: str, query: str = "") -> list[dict[str, Any]]:
    """What the server was asked for at `path`, in order."""
    _, _, data = ask.get("/requests").text.partition("data: ")
    return [request for request in json.loads(data) if (request["path"], request["query"]) == (path, query)]


def wait_for_requests(ask: httpx.Client, number: int, path: str, query: str = "") -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(requests := requests_of(ask, path, query)) < number:
        assert time.monotonic() < deadline, requests
        time.sleep(0.02)
    return requests


def gaps(requests: list[dict[str, Any]]) -> list[float]:
    """Seconds between them."""
    return [later["at"] - earlier["at"] for earlier, later in pairwise(requests)]


def test_opens_and_gets_what_was_sent(page: Any) -> None:
    source = Source(page, "/kinds")
    assert source.take(4) == [
        ["message", "plain", ""],
        ["kind", "two\nlines\n", "1"],
        ["kind", "\u00fcn\u00efcode \u2713 \u2028 <b>", "two"],
        ["message", '{"json":[1,null,"x"]}', "two"],
    ]
    assert source.state == 1
    assert page.evaluate("window.streams['/kinds'].opened") == 1


def test_resumes_after_each_cut(page: Any, ask: httpx.Client) -> None:
    """The server cuts the connection five times, in the middle of an event: nothing is lost, and nothing doubled."""
    source = Source(page, "/cut")
    events = source.take(300)
    assert [event_id for _, _, event_id in events] == [str(number) for number in range(1, 301)]
    assert [data for _, data, _ in events] == ["x" * (number % 50) for number in range(1, 301)]
    requests = requests_of(ask, "/cut")
    assert len(requests) == 6
    ids = [int(request["id"] or 0) for request in requests]
    assert ids[0] == 0 < ids[-1]
    assert ids == sorted(ids)  # never back; a reset of the connection takes with it what the browser has not read yet
    assert page.evaluate("window.streams['/cut'].errors") == 5
    page.errors = [error for error in page.errors if "ERR_" not in error]  # which it tells of a cut


@pytest.mark.parametrize("retry", [50, 500])
def test_comes_back_after_the_time_that_it_was_told(retry: int, page: Any, ask: httpx.Client) -> None:
    Source(page, f"/ends?retry={retry}")
    for number in range(4, 20):  # a busy machine may be late, but not each time
        requests = wait_for_requests(ask, number, "/ends", f"retry={retry}")
        assert min(gaps(requests)) >= retry / 1000
        if min(gaps(requests)) < retry / 1000 + 0.5:  # and not after the three seconds that are its own default
            return
    pytest.fail(f"it came back after {gaps(requests)}")


def test_a_drain_sends_each_away_for_a_time_of_its_own(page: Any, ask: httpx.Client) -> None:
    sources = [Source(page, f"/idle?{number}") for number in range(4)]
    for source in sources:
        source.take(1)
    drained = time.monotonic()  # of one clock for all processes of a machine
    ask.post("/drain")
    for source in sources:
        source.wait("s.opened === 2 && s.events.length === 2")
    back = [requests_of(ask, "/idle", str(number))[1]["at"] - drained for number in range(4)]
    assert min(back) >= 0.3
    assert max(back) - min(back) > 0.005
    assert [source.state for source in sources] == [1] * 4


def test_stops_at_204(page: Any, ask: httpx.Client) -> None:
    """A run has ended, and its client, which has all of it, comes back once."""
    ask.post("/run")
    source = Source(page, "/words")
    source.wait("s.source.readyState === 2")
    assert [(kind, data) for kind, data, _ in source.events] == [
        ("message", "one"), ("message", "two"), ("message", "three"), ("end", '{"reason":"finished"}'),
    ]  # fmt: skip
    requests = requests_of(ask, "/words")
    assert [request["id"] for request in requests] == [None, source.events[-1][2]]
    page.wait_for_timeout(1000)  # it was told 150 ms, and would have come back by now
    assert len(requests_of(ask, "/words")) == 2
    assert source.state == 2


def test_is_told_what_it_has_missed_for_good(page: Any, ask: httpx.Client) -> None:
    """The broker keeps five events."""
    source = Source(page, "/small")
    source.wait("s.opened === 1")
    first = ask.post("/publish?data=first").text
    assert source.take(1) == [["message", "first", first]]
    ask.post("/drain?publish=20")
    source.wait("s.events.length >= 2")
    kind, data, place = source.events[1]
    assert (kind, data) == ("reset", '{"reason":"expired"}')
    newest = ask.post("/publish?data=newest").text
    assert source.take(3)[2:] == [["message", "newest", newest]]
    assert [request["id"] for request in requests_of(ask, "/small")] == [None, first]
    ask.post("/drain?publish=3")  # which it can still get
    assert [data for _, data, _ in source.take(6)[3:]] == ["0", "1", "2"]
    epoch, _, number = place.partition("-")
    assert newest == f"{epoch}-{int(number) + 1}"


@pytest.mark.parametrize("across", [False, True], ids=["own", "cross-origin"])
def test_ids_come_back_as_they_were_sent(
    across: bool, open_page: Callable[..., Any], other_origin: str, server: str, ask: httpx.Client
) -> None:
    path = "/allowed/odd" if across else "/odd"
    source = Source(open_page(other_origin if across else server), server + path)
    source.wait("s.source.readyState === 2")
    assert [event_id for _, _, event_id in source.events] == ODD_IDS
    requests = requests_of(ask, path)
    assert [request["id"] for request in requests] == [None, *ODD_IDS]
    assert {request["method"] for request in requests} == {"GET"}  # no preflight


def test_another_origin_that_may_read(foreign: Any, server: str, ask: httpx.Client) -> None:
    source = Source(foreign, f"{server}/allowed/small")
    source.wait("s.opened === 1")
    ids = [ask.post("/publish?data=one").text]
    assert source.take(1) == [["message", "one", ids[0]]]
    ask.post("/drain")
    source.wait("s.opened === 2")
    ids.append(ask.post("/publish?data=two").text)
    assert source.take(2)[1] == ["message", "two", ids[1]]
    requests = requests_of(ask, "/allowed/small")
    assert [(request["method"], request["id"]) for request in requests] == [("GET", None), ("GET", ids[0])]


@pytest.mark.parametrize(
    ("path", "credentials", "who"),
    [
        ("/allowed/cookie", False, "nobody"),
        ("/credentials/cookie", True, "Ann"),
        ("/credentials/cookie", False, "nobody"),
    ],
)
def test_cookies_of_another_origin(path: str, credentials: bool, who: str, foreign: Any, server: str) -> None:
    foreign.context.add_cookies([{"name": "who", "value": "Ann", "url": server}])
    source = Source(foreign, server + path, credentials=credentials)
    assert source.take(1) == [["message", who, ""]]


@pytest.mark.parametrize(
    ("path", "credentials"), [("/refused/small", False), ("/small", False), ("/allowed/cookie", True)]
)
def test_another_origin_that_may_not(path: str, credentials: bool, foreign: Any, server: str) -> None:
    source = Source(foreign, server + path, credentials=credentials)
    source.wait("s.source.readyState === 2")
    assert (source.events, foreign.evaluate("window.streams[Object.keys(window.streams)[0]].opened")) == ([], 0)
    assert any("CORS" in error for error in foreign.errors)
    foreign.errors.clear()
