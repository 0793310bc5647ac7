"""The EventSource of a real browser against a real uvicorn: reconnecting, ids, lost events, other origins."""

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

# Opens an EventSource and records its events in order in `window.streams[name]`.
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
        """Wait until `condition` holds in the page, where `s` is the record of this source."""
        self._page.wait_for_function(
            f"(name) => {{ const s = window.streams[name]; return {condition} }}", arg=self._name
        )

    def take(self, number: int) -> list[list[str]]:
        """Wait for `number` events, and return the events so far."""
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
def foreign_page(open_page: Callable[..., Any], other_origin: str) -> Any:
    """A page of another origin than the server."""
    return open_page(other_origin)


@pytest.fixture
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, trust_env=False, timeout=60) as opened:
        yield opened


def requests_of(client: httpx.Client, path: str, query: str = "") -> list[dict[str, Any]]:
    """Return the requests that the server received for `path`, in order."""
    _, _, data = client.get("/requests").text.partition("data: ")
    return [request for request in json.loads(data) if (request["path"], request["query"]) == (path, query)]


def wait_for_requests(client: httpx.Client, number: int, path: str, query: str = "") -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while len(requests := requests_of(client, path, query)) < number:
        assert time.monotonic() < deadline, requests
        time.sleep(0.02)
    return requests


def gaps(requests: list[dict[str, Any]]) -> list[float]:
    """Return the seconds between consecutive requests."""
    return [later["at"] - earlier["at"] for earlier, later in pairwise(requests)]


def test_events_arrive_as_they_were_sent(page: Any) -> None:
    source = Source(page, "/kinds")
    assert source.take(4) == [
        ["message", "plain", ""],
        ["kind", "two\nlines\n", "1"],
        ["kind", "\u00fcn\u00efcode \u2713 \u2028 <b>", "two"],
        ["message", '{"json":[1,null,"x"]}', "two"],
    ]
    assert source.state == 1
    assert page.evaluate("window.streams['/kinds'].opened") == 1


def test_eventsource_resumes_after_every_cut(page: Any, client: httpx.Client) -> None:
    """The server cuts the connection five times within an event. No event is lost or repeated."""
    source = Source(page, "/cut")
    events = source.take(300)
    assert [event_id for _, _, event_id in events] == [str(number) for number in range(1, 301)]
    assert [data for _, data, _ in events] == ["x" * (number % 50) for number in range(1, 301)]
    requests = requests_of(client, "/cut")
    assert len(requests) == 6
    ids = [int(request["id"] or 0) for request in requests]
    assert ids[0] == 0 < ids[-1]
    assert ids == sorted(ids)  # never lower; a TCP reset can discard bytes that the browser has not read
    assert page.evaluate("window.streams['/cut'].errors") == 5
    page.errors = [error for error in page.errors if "ERR_" not in error]  # the browser logs each cut


@pytest.mark.parametrize("retry", [50, 500])
def test_eventsource_waits_for_the_reconnection_time(retry: int, page: Any, client: httpx.Client) -> None:
    Source(page, f"/ends?retry={retry}")
    for number in range(4, 20):  # a busy machine may be late, but not every time
        requests = wait_for_requests(client, number, "/ends", f"retry={retry}")
        assert min(gaps(requests)) >= retry / 1000
        if min(gaps(requests)) < retry / 1000 + 0.5:  # and not after the default of three seconds
            return
    pytest.fail(f"the gaps between requests were {gaps(requests)} s")


def test_drained_clients_reconnect_at_different_times_in_a_browser(page: Any, client: httpx.Client) -> None:
    sources = [Source(page, f"/idle?{number}") for number in range(4)]
    for source in sources:
        source.take(1)
    drained = time.monotonic()  # the clock is the same in all processes of a machine
    client.post("/drain")
    for source in sources:
        source.wait("s.opened === 2 && s.events.length === 2")
    waited = [requests_of(client, "/idle", str(number))[1]["at"] - drained for number in range(4)]
    assert min(waited) >= 0.3
    assert max(waited) - min(waited) > 0.005
    assert [source.state for source in sources] == [1] * 4


def test_eventsource_stops_at_204(page: Any, client: httpx.Client) -> None:
    """The client of a finished run reconnects once, and gets 204."""
    client.post("/run")
    source = Source(page, "/words")
    source.wait("s.source.readyState === 2")
    assert [(kind, data) for kind, data, _ in source.events] == [
        ("message", "one"), ("message", "two"), ("message", "three"), ("end", '{"reason":"finished"}'),
    ]  # fmt: skip
    requests = requests_of(client, "/words")
    assert [request["id"] for request in requests] == [None, source.events[-1][2]]
    page.wait_for_timeout(1000)  # its reconnection time is 150 ms, so it would have reconnected by now
    assert len(requests_of(client, "/words")) == 2
    assert source.state == 2


def test_overflow_sends_reset_with_a_usable_id(page: Any, client: httpx.Client) -> None:
    """The broker keeps five events, and the client misses twenty."""
    source = Source(page, "/small")
    source.wait("s.opened === 1")
    first = client.post("/publish?data=first").text
    assert source.take(1) == [["message", "first", first]]
    client.post("/drain?publish=20")
    source.wait("s.events.length >= 2")
    event_type, data, reset_id = source.events[1]
    assert (event_type, data) == ("reset", '{"reason":"expired"}')
    newest = client.post("/publish?data=newest").text
    assert source.take(3)[2:] == [["message", "newest", newest]]
    assert [request["id"] for request in requests_of(client, "/small")] == [None, first]
    client.post("/drain?publish=3")  # these are still in the log
    assert [data for _, data, _ in source.take(6)[3:]] == ["0", "1", "2"]
    epoch, _, offset = reset_id.partition("-")
    assert newest == f"{epoch}-{int(offset) + 1}"


@pytest.mark.parametrize("cross_origin", [False, True], ids=["own", "cross-origin"])
def test_last_event_id_returns_unchanged(
    cross_origin: bool, open_page: Callable[..., Any], other_origin: str, server: str, client: httpx.Client
) -> None:
    path = "/allowed/odd" if cross_origin else "/odd"
    source = Source(open_page(other_origin if cross_origin else server), server + path)
    source.wait("s.source.readyState === 2")
    assert [event_id for _, _, event_id in source.events] == ODD_IDS
    requests = requests_of(client, path)
    assert [request["id"] for request in requests] == [None, *ODD_IDS]
    assert {request["method"] for request in requests} == {"GET"}  # no preflight


def test_allowed_origin_reads_and_resumes_without_a_preflight(
    foreign_page: Any, server: str, client: httpx.Client
) -> None:
    source = Source(foreign_page, f"{server}/allowed/small")
    source.wait("s.opened === 1")
    ids = [client.post("/publish?data=one").text]
    assert source.take(1) == [["message", "one", ids[0]]]
    client.post("/drain")
    source.wait("s.opened === 2")
    ids.append(client.post("/publish?data=two").text)
    assert source.take(2)[1] == ["message", "two", ids[1]]
    requests = requests_of(client, "/allowed/small")
    assert [(request["method"], request["id"]) for request in requests] == [("GET", None), ("GET", ids[0])]


@pytest.mark.parametrize(
    ("path", "credentials", "name"),
    [
        ("/allowed/cookie", False, "nobody"),
        ("/credentials/cookie", True, "Ann"),
        ("/credentials/cookie", False, "nobody"),
    ],
)
def test_cookies_cross_origins_only_with_credentials(
    path: str, credentials: bool, name: str, foreign_page: Any, server: str
) -> None:
    foreign_page.context.add_cookies([{"name": "user", "value": "Ann", "url": server}])
    source = Source(foreign_page, server + path, credentials=credentials)
    assert source.take(1) == [["message", name, ""]]


@pytest.mark.parametrize(
    ("path", "credentials"), [("/refused/small", False), ("/small", False), ("/allowed/cookie", True)]
)
def test_refused_origin_gets_no_events(path: str, credentials: bool, foreign_page: Any, server: str) -> None:
    source = Source(foreign_page, server + path, credentials=credentials)
    source.wait("s.source.readyState === 2")
    assert (source.events, foreign_page.evaluate("window.streams[Object.keys(window.streams)[0]].opened")) == ([], 0)
    assert any("CORS" in error for error in foreign_page.errors)
    foreign_page.errors.clear()
