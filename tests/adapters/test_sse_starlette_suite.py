"""sse-starlette's own tests, and the snippets of its README, run on our adapter in its place."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import anyio
import pytest
from serving import HERE, ROOT
from starlette.requests import Request

from asgi_sse import SSEMiddleware, StreamRegistry
from asgi_sse.adapters.sse_starlette import EventSourceResponse
from asgi_sse.testing import open_stream

VERSION = "3.7.0"
ALIAS = HERE / "sse_starlette_alias"

PRIVATE = "looks at private functions and state of sse-starlette, which are not there"
EXAMPLE = "tests an example of sse-starlette, which its source distribution leaves out"
IN_FLIGHT = "a message that is being sent when the server stops has drain_timeout to arrive; sse-starlette cuts it off"
CLIENT_GONE = "an OSError of send means that the client has left (ASGI 2.4), which is no error of the app"
RAISED = "what a source raises in its clean-up is raised, for the server to log; sse-starlette logs it and goes on"
EXPECTED_TO_FAIL = {
    "test_broadcasting_example.py": EXAMPLE,
    "test_issue132.py": PRIVATE,
    "test_issue152.py": PRIVATE,
    "test_multi_loop.py": PRIVATE,
    "test_issue217.py::test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[shutdown]": IN_FLIGHT,
    "test_issue217.py::test_send_whenInterruptedAndCleanupStuck_thenDeadlineCancelsCleanup[send_error]": CLIENT_GONE,
    "test_issue217.py::test_closingFrame_whenSendStalls_thenInterruptionEndsResponse[shutdown]": IN_FLIGHT,
    **{
        f"test_sse.py::TestEventSourceResponse::{name}": reason
        for name, reason in {
            "test_disconnect_whenClientDisconnects_thenHandlesGracefully": "expects each event in the debug log",
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[False-shutdown]": IN_FLIGHT,
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[True-shutdown]": IN_FLIGHT,
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[False-send_error]": CLIENT_GONE,
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[True-send_error]": CLIENT_GONE,
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[True-disconnect]": RAISED,
            "test_send_whenInterrupted_thenClosesSuspendedGenerator[True-cancel]": RAISED,
            "test_ping_whenTimerTicks_thenSendsOneMessagePerTick": "calls the private _ping()",
            "test_ping_whenSendTimesOut_thenRaisesSendTimeoutError": "calls the private _ping()",
            "test_ping_whenConcurrentWithEvents_thenRespectsLocking": "expects two sends at once, which never happens",
        }.items()
    },
}
COLLECTED = 140
"""How many tests there are; so that a suite that lost some on the way does not pass."""


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sse_starlette")
    options = ["--no-deps", "--no-binary=:all:", "--quiet", f"--dest={folder}"]
    download = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"sse-starlette=={VERSION}"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert download.returncode == 0, f"sse-starlette {VERSION} could not be fetched: {download.stderr}"
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"sse_starlette-{VERSION}"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ALIAS), str(ROOT)]), "PYTEST_ADDOPTS": ""}


def test_its_own_tests_pass(distribution: Path, tmp_path: Path) -> None:
    """Each that does not is listed above, with the reason; none is listed that does."""
    shutil.copytree(distribution / "tests", tmp_path / "tests")
    shutil.copy(distribution / "pyproject.toml", tmp_path)
    shutil.copy(ALIAS / "helpers" / "anyio_compat.py", tmp_path / "tests")
    shutil.copy(ALIAS / "helpers" / "fixtures.py", tmp_path / "tests" / "conftest.py")
    (tmp_path / "tests" / "__init__.py").touch()
    report = tmp_path / "report"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", "--tb=line", "tests"],
        cwd=tmp_path, env=environment(), check=False, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    report.write_text(run.stdout)
    found = re.findall(r"^(PASSED|FAILED|ERROR) tests/(\S+)", run.stdout, re.MULTILINE)
    assert len(found) == COLLECTED, run.stdout[-3000:] + run.stderr
    failed = {name for outcome, name in found if outcome != "PASSED"}
    passed = {name for outcome, name in found if outcome == "PASSED"}
    print(f"{len(passed)} of {COLLECTED} tests of sse-starlette {VERSION} pass")
    assert {name for name in failed if not is_listed(name)} == set(), run.stdout[-6000:]
    assert {name for name in passed if is_listed(name)} == set(), "these pass: take them off the list"
    assert len(passed) == COLLECTED - len(failed)


def is_listed(name: str) -> bool:
    return name in EXPECTED_TO_FAIL or name.partition("::")[0] in EXPECTED_TO_FAIL


# The snippets of its README, each with its import changed and nothing else


async def generate_events() -> AsyncIterator[dict[str, str]]:
    yield {"data": "first"}
    await asyncio.sleep(25)
    yield {"data": "last"}


class AsyncSession:
    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def execute(self, query: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="a row", id=7)]


class Item(str):
    __slots__ = ()

    id = 7


AROUND = {  # what the snippets leave to their reader
    "anyio": anyio,
    "asyncio": asyncio,
    "EventSourceResponse": EventSourceResponse,
    "generate_events": generate_events,
    "data": [Item("a"), Item("b")],
    "AsyncSession": AsyncSession,
    "User": "users",
    "select": lambda what: f"SELECT * FROM {what}",
}

Snippet = dict[str, Any]


@pytest.fixture(scope="module")
def snippets(distribution: Path) -> list[str]:
    text = (distribution / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        re.sub(r"from sse_starlette[.\w]* import", "from asgi_sse.adapters.sse_starlette import", block)
        for block in blocks
    ]


@pytest.fixture
def snippet(snippets: list[str], request: pytest.FixtureRequest) -> Snippet:
    """The names that a snippet defines; ``respond`` is what it returns, where it does that outside of a function."""
    block = next(block for block in snippets if request.param in block)
    if re.search(r"^return", block, re.MULTILINE):
        block = f"async def respond(request):\n{textwrap.indent(block, '    ')}"
    names = dict(AROUND)
    exec(block, names)
    return names


def of_readme(mark: str) -> Callable[[Any], Any]:
    """The test of the snippet that holds `mark`."""
    tested.append(mark)
    return pytest.mark.parametrize("snippet", [mark], indirect=True)


tested: list[str] = []


def app_of(respond: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        response = await respond(Request(scope, receive))
        await response(scope, receive, send)

    return app


@pytest.fixture
def on_asyncio(anyio_backend: Any) -> None:
    if "trio" in anyio_backend:
        pytest.skip("it uses asyncio")


async def data_of(app: Any, path: str = "/") -> list[str | None]:
    async with open_stream(app, path) as stream:
        events = [event.data async for event in stream]
        assert stream.complete
    return events


@of_readme("# Basic usage")
@pytest.mark.anyio
async def test_basic_usage(snippet: Snippet) -> None:
    async with open_stream(app_of(snippet["respond"])) as stream:
        assert [(event.data, event.event, event.id) async for event in stream] == [
            ("a", "update", "7"),
            ("b", "update", "7"),
        ]


@of_readme("app = Starlette(")
@pytest.mark.anyio
async def test_quick_start(snippet: Snippet, on_asyncio: None) -> None:
    assert await data_of(snippet["app"], "/events") == [f"Event {number}" for number in range(10)]


@of_readme("event = ServerSentEvent(")
def test_server_sent_event(snippet: Snippet) -> None:
    encoded = snippet["event"].encode()
    assert encoded == b"id: msg-123\r\nevent: notification\r\ndata: Custom message\r\nretry: 5000\r\n\r\n"


@of_readme("event = JSONServerSentEvent(")
def test_json_server_sent_event(snippet: Snippet) -> None:
    assert snippet["event"].encode() == b'data: {"field":"value"}\r\n\r\n'


@of_readme("def custom_ping")
@pytest.mark.anyio
async def test_custom_ping(snippet: Snippet, on_asyncio: None) -> None:
    async with open_stream(app_of(snippet["respond"])) as stream:
        body = b""
        while chunk := await stream.read(timeout=60):
            body += chunk
    ping = b": Custom ping message\r\n\r\n"
    assert body == b"data: first\r\n\r\n" + ping + ping + b"data: last\r\n\r\n"


@of_readme("def run_sse_in_thread")
def test_threads(snippet: Snippet) -> None:
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) is snippet["run_sse_in_thread"]:
            thread.join(5)
            assert not thread.is_alive()


@of_readme("async def stream_database_results")
@pytest.mark.anyio
async def test_database(snippet: Snippet) -> None:
    assert await data_of(app_of(snippet["respond"])) == ["a row"]


@of_readme("async def robust_stream")
@pytest.mark.anyio
async def test_error_handling_and_timeouts(snippet: Snippet, on_asyncio: None) -> None:
    app = app_of(snippet["respond"])
    assert await data_of(app) == [f"Item {number}" for number in range(100)]
    async with open_stream(app) as stream:
        assert stream.headers["cache-control"] == "no-cache"
        await stream.receive()
        await stream.disconnect()


@of_readme("async def data_producer")
@pytest.mark.anyio
async def test_memory_channels(snippet: Snippet) -> None:
    assert await data_of(app_of(snippet["channel_endpoint"])) == [f"Item {number}" for number in range(10)]


@of_readme("async def graceful_stream")
@pytest.mark.anyio
async def test_cooperative_shutdown(snippet: Snippet) -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(app_of(snippet["graceful_stream"]), registry=registry)) as stream:
        await stream.receive()
        registry.begin_drain()
        assert [(event.event, event.data) async for event in stream] == [("shutdown", "Server is shutting down")]
        assert stream.complete


@of_readme("async def monitored_stream")
@pytest.mark.anyio
async def test_client_disconnection(snippet: Snippet, on_asyncio: None, capsys: pytest.CaptureFixture[str]) -> None:
    async def respond(request: Any) -> Any:
        return EventSourceResponse(snippet["monitored_stream"](request))

    async with open_stream(app_of(respond)) as stream:
        await stream.receive()
        await stream.disconnect()
    assert capsys.readouterr().out == "Stream cancelled\n"


@of_readme("def reset_sse_app_status")
def test_testing(snippet: Snippet) -> None:
    snippet["AppStatus"].should_exit = True
    fixture = snippet["reset_sse_app_status"].__wrapped__()
    next(fixture)
    with pytest.raises(StopIteration):
        next(fixture)
    assert snippet["AppStatus"].should_exit is False


@of_readme("class ConnectionLimiter")
@pytest.mark.anyio
async def test_connection_limiter(snippet: Snippet, on_asyncio: None) -> None:
    limiter = snippet["ConnectionLimiter"]()
    assert await data_of(app_of(limiter.limited_endpoint)) == ["first", "last"]


def test_every_snippet_is_tested(snippets: list[str]) -> None:
    assert [block for block in snippets if not any(mark in block for mark in tested)] == []
    assert len(tested) == len(snippets) == 13
