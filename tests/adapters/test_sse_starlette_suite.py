"""sse-starlette's own tests and the snippets of its README, run on the drop-in."""

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

PRIVATE = "uses private functions and state of sse-starlette, which the drop-in does not have"
EXAMPLE = "tests an example of sse-starlette that its source distribution does not contain"
IN_FLIGHT = "a message under way at shutdown has drain_timeout to arrive, while sse-starlette cuts it off"
CLIENT_GONE = "an OSError from send means that the client has left (ASGI 2.4), so it is not an error of the app"
RAISED = "an error in the clean-up of a source is raised for the server to log, while sse-starlette logs it itself"
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
"""The number of tests in the suite, so that a suite with fewer tests does not pass."""


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Download and unpack the source distribution."""
    folder = tmp_path_factory.mktemp("sse_starlette")
    options = ["--no-deps", "--no-binary=:all:", "--quiet", f"--dest={folder}"]
    download = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, f"sse-starlette=={VERSION}"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert download.returncode == 0, f"cannot download sse-starlette {VERSION}: {download.stderr}"
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"sse_starlette-{VERSION}"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ALIAS), str(ROOT)]), "PYTEST_ADDOPTS": ""}


def test_own_tests_pass_except_for_the_listed_ones(distribution: Path, tmp_path: Path) -> None:
    """Every test that fails is listed above with its reason, and no listed test passes."""
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
    assert {name for name in failed if not is_expected_to_fail(name)} == set(), run.stdout[-6000:]
    assert {name for name in passed if is_expected_to_fail(name)} == set(), "remove these from the list"
    assert len(passed) == COLLECTED - len(failed)


def is_expected_to_fail(name: str) -> bool:
    return name in EXPECTED_TO_FAIL or name.partition("::")[0] in EXPECTED_TO_FAIL


# The snippets of the README, with no change but the import


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


CONTEXT = {  # the names that the snippets leave to their reader
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
    """Return the names that a snippet defines. A snippet with a bare ``return`` becomes the function ``respond``."""
    block = next(block for block in snippets if request.param in block)
    if re.search(r"^return", block, re.MULTILINE):
        block = f"async def respond(request):\n{textwrap.indent(block, '    ')}"
    names = dict(CONTEXT)
    exec(block, names)
    return names


def on_snippet(mark: str) -> Callable[[Any], Any]:
    """Run a test on the snippet that contains `mark`."""
    tested.append(mark)
    return pytest.mark.parametrize("snippet", [mark], indirect=True)


tested: list[str] = []


def make_app(respond: Any) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        response = await respond(Request(scope, receive))
        await response(scope, receive, send)

    return app


@pytest.fixture
def on_asyncio(anyio_backend: Any) -> None:
    if "trio" in anyio_backend:
        pytest.skip("the snippet uses asyncio")


async def read_data(app: Any, path: str = "/") -> list[str | None]:
    async with open_stream(app, path) as stream:
        events = [event.data async for event in stream]
        assert stream.complete
    return events


@on_snippet("# Basic usage")
@pytest.mark.anyio
async def test_snippet_basic_usage(snippet: Snippet) -> None:
    async with open_stream(make_app(snippet["respond"])) as stream:
        assert [(event.data, event.event, event.id) async for event in stream] == [
            ("a", "update", "7"),
            ("b", "update", "7"),
        ]


@on_snippet("app = Starlette(")
@pytest.mark.anyio
async def test_snippet_quick_start(snippet: Snippet, on_asyncio: None) -> None:
    assert await read_data(snippet["app"], "/events") == [f"Event {number}" for number in range(10)]


@on_snippet("event = ServerSentEvent(")
def test_snippet_server_sent_event(snippet: Snippet) -> None:
    encoded = snippet["event"].encode()
    assert encoded == b"id: msg-123\r\nevent: notification\r\ndata: Custom message\r\nretry: 5000\r\n\r\n"


@on_snippet("event = JSONServerSentEvent(")
def test_snippet_json_server_sent_event(snippet: Snippet) -> None:
    assert snippet["event"].encode() == b'data: {"field":"value"}\r\n\r\n'


@on_snippet("def custom_ping")
@pytest.mark.anyio
async def test_snippet_custom_ping(snippet: Snippet, on_asyncio: None) -> None:
    async with open_stream(make_app(snippet["respond"])) as stream:
        body = b""
        while chunk := await stream.read(timeout=60):
            body += chunk
    ping = b": Custom ping message\r\n\r\n"
    assert body == b"data: first\r\n\r\n" + ping + ping + b"data: last\r\n\r\n"


@on_snippet("def run_sse_in_thread")
def test_snippet_threads(snippet: Snippet) -> None:
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) is snippet["run_sse_in_thread"]:
            thread.join(5)
            assert not thread.is_alive()


@on_snippet("async def stream_database_results")
@pytest.mark.anyio
async def test_snippet_database(snippet: Snippet) -> None:
    assert await read_data(make_app(snippet["respond"])) == ["a row"]


@on_snippet("async def robust_stream")
@pytest.mark.anyio
async def test_snippet_error_handling_and_timeouts(snippet: Snippet, on_asyncio: None) -> None:
    app = make_app(snippet["respond"])
    assert await read_data(app) == [f"Item {number}" for number in range(100)]
    async with open_stream(app) as stream:
        assert stream.headers["cache-control"] == "no-cache"
        await stream.receive()
        await stream.disconnect()


@on_snippet("async def data_producer")
@pytest.mark.anyio
async def test_snippet_memory_channels(snippet: Snippet) -> None:
    assert await read_data(make_app(snippet["channel_endpoint"])) == [f"Item {number}" for number in range(10)]


@on_snippet("async def graceful_stream")
@pytest.mark.anyio
async def test_snippet_cooperative_shutdown(snippet: Snippet) -> None:
    registry = StreamRegistry()
    async with open_stream(SSEMiddleware(make_app(snippet["graceful_stream"]), registry=registry)) as stream:
        await stream.receive()
        registry.begin_drain()
        assert [(event.event, event.data) async for event in stream] == [("shutdown", "Server is shutting down")]
        assert stream.complete


@on_snippet("async def monitored_stream")
@pytest.mark.anyio
async def test_snippet_disconnection(snippet: Snippet, on_asyncio: None, capsys: pytest.CaptureFixture[str]) -> None:
    async def respond(request: Any) -> Any:
        return EventSourceResponse(snippet["monitored_stream"](request))

    async with open_stream(make_app(respond)) as stream:
        await stream.receive()
        await stream.disconnect()
    assert capsys.readouterr().out == "Stream cancelled\n"


@on_snippet("def reset_sse_app_status")
def test_snippet_testing(snippet: Snippet) -> None:
    snippet["AppStatus"].should_exit = True
    fixture = snippet["reset_sse_app_status"].__wrapped__()
    next(fixture)
    with pytest.raises(StopIteration):
        next(fixture)
    assert snippet["AppStatus"].should_exit is False


@on_snippet("class ConnectionLimiter")
@pytest.mark.anyio
async def test_snippet_connection_limiter(snippet: Snippet, on_asyncio: None) -> None:
    limiter = snippet["ConnectionLimiter"]()
    assert await read_data(make_app(limiter.limited_endpoint)) == ["first", "last"]


def test_every_snippet_is_tested(snippets: list[str]) -> None:
    assert [block for block in snippets if not any(mark in block for mark in tested)] == []
    assert len(tested) == len(snippets) == 13
