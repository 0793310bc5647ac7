"""The pytest plugin: timeouts, leaks, and what an interruption leaves to later tests."""

from pathlib import Path

import pytest

import asgi_sse

pytest_plugins = ["pytester"]


PLUGIN = ["-p", "asgi_sse.testing.pytest_plugin", "-p", "no:cacheprovider", "-W", "error"]


APP = """
import time

import anyio, httpx, pytest
from asgi_sse import create_app
from asgi_sse.testing import open_stream, virtual_time

async def ticks():
    for number in range(10**9):
        yield str(number)
        await anyio.sleep(0.05)

app = create_app({"/ticks": ticks})
"""
HANGING = (
    APP
    + """
@pytest.mark.asgi_sse(timeout=0.5)
async def test_hangs():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/ticks")

@pytest.mark.asgi_sse(timeout=0.5)
class TestInClass:
    async def test_reads(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

@pytest.mark.asgi_sse
async def test_passes():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")

@pytest.mark.asgi_sse
async def test_fails_itself():
    assert False, "its own failure"

opened = []

@pytest.mark.asgi_sse
async def test_leaks():
    opened.append(open_stream(app, "/ticks"))
    await opened[0].__aenter__()

@pytest.mark.asgi_sse(leaks=False)
async def test_may_leak():
    opened.append(open_stream(app, "/ticks"))
    await opened[1].__aenter__()

@pytest.mark.asgi_sse(timouts=3)
async def test_unknown_argument():
    pass

@pytest.mark.asgi_sse(timeout="5")
async def test_invalid_timeout():
    pass
"""
)


IN_FIXTURES = """
import pytest
from asgi_sse import create_app
from asgi_sse.testing import open_stream, running

async def ticks():
    yield "0"
    yield "1"

@pytest.fixture
async def server():
    async with running(create_app({"/ticks": ticks})) as server:
        yield server

@pytest.fixture
async def stream(server):
    async with open_stream(server, "/ticks") as stream:
        yield stream

@pytest.mark.asgi_sse
async def test_it(server, stream):
    await stream.expect("0")
    await server.stop()
"""
TIMEOUT_LINES = ["the test has not ended within 0.5 s.", "  <Stream /ticks open>, * events."]


plugins = pytest.mark.parametrize(
    ("plugins", "prefix"),
    [
        (
            ["-p", "anyio.pytest_plugin"],
            "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n",
        ),
        (
            ["-p", "anyio.pytest_plugin"],
            "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return 'trio'\n",
        ),
        (
            [
                "-p",
                "pytest_asyncio.plugin",
                "-o",
                "asyncio_mode=auto",
                "-o",
                "asyncio_default_fixture_loop_scope=function",
            ],
            "",
        ),
    ],
    ids=["anyio", "trio", "pytest-asyncio"],
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the inner pytest import the package even if it is not installed, and load only the plugins that it names."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(asgi_sse.__file__).parent.parent))


@plugins
def test_hanging_or_leaking_test_fails(pytester: pytest.Pytester, plugins: list[str], prefix: str) -> None:
    pytester.makepyfile(HANGING + prefix)
    trio = "trio" in prefix  # trio does not let a system task outlive the test that left it
    result = pytester.runpytest_inprocess(
        *PLUGIN, *plugins, *(["-k", "not test_leaks and not test_may"] if trio else [])
    )
    result.assert_outcomes(failed=5 if trio else 6, passed=1 if trio else 2, deselected=2 if trio else 0)
    text = result.stdout.str()
    result.stdout.fnmatch_lines([*TIMEOUT_LINES, "If it waits for a response: httpx's ASGITransport*"])
    result.stdout.fnmatch_lines([*TIMEOUT_LINES, "  <OpenStream GET /ticks 200 open>.", "If it waits*"])
    assert "AssertionError: its own failure" in text
    for error in ("got an unexpected keyword argument 'timouts'", "timeout must be a number or None, got '5'"):
        assert f"{error}; it takes timeout=, seconds or None, and leaks=, a bool" in text
    if not trio:
        result.stdout.fnmatch_lines(["the test leaves streams open.", "  <Stream /ticks open>*", "  <OpenStream*"])


@plugins
def test_streams_may_be_opened_in_fixtures(pytester: pytest.Pytester, plugins: list[str], prefix: str) -> None:
    """On pytest-asyncio, a fixture begins and ends in different tasks."""
    pytester.makepyfile(IN_FIXTURES + prefix)
    pytester.runpytest_inprocess(*PLUGIN, *plugins).assert_outcomes(passed=1)


def test_interruption_is_not_lost_in_a_destructor(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import weakref

class Slow:
    def __del__(self):
        time.sleep(0.4)

@pytest.mark.asgi_sse(timeout=0.2)
def test_destructor():
    Slow()
    time.sleep(30)

class Thing:
    pass

@pytest.mark.asgi_sse(timeout=0.2)
def test_weak_reference():
    thing = Thing()
    weakref.finalize(thing, time.sleep, 0.4)
    del thing
    time.sleep(30)
"""
    )
    # pytest warns of a lost interruption, and the next one comes some seconds later.
    pytester.runpytest_inprocess(*PLUGIN).assert_outcomes(failed=2, errors=0, warnings=0)


def test_synchronous_test_is_interrupted(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import unittest
from starlette.testclient import TestClient

@pytest.mark.filterwarnings("default")
def test_client():
    TestClient(app).get("/ticks")

class TestVirtual:
    @virtual_time
    async def test_virtual(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

@virtual_time(backend="trio")
async def test_virtual_on_trio():
    async with open_stream(app, "/ticks") as stream:
        async for event in stream:
            pass

def test_blocked():
    time.sleep(30)

cleaned_up = []

class TestOfUnittest(unittest.IsolatedAsyncioTestCase):
    def setUp(self):
        self.addCleanup(cleaned_up.append, self.id())

    async def test_hangs(self):
        async with open_stream(app, "/ticks") as stream:
            async for event in stream:
                pass

    def test_hangs_too(self):
        time.sleep(30)

    async def test_passes(self):
        async with open_stream(app, "/ticks") as stream:
            await stream.expect("0")

def test_cleanups_pass():
    assert [test.rpartition(".")[2] for test in cleaned_up] == ["test_hangs", "test_hangs_too", "test_passes"]
"""
    )
    pytester.makeini("[pytest]\nasgi_sse_guard = true")
    pytester.makeconftest(
        "import pytest\ndef pytest_collection_modifyitems(items):\n"
        "    for item in items: item.add_marker(pytest.mark.asgi_sse(timeout=30 if 'pass' in item.name else 0.5))"
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    result.assert_outcomes(failed=6, passed=2)
    result.stdout.fnmatch_lines([*TIMEOUT_LINES] * 3)
    # unittest runs asyncio in debug mode, so slowly that the stream may not have begun by then.
    result.stdout.fnmatch_lines(["*TestOfUnittest.test_hangs*", TIMEOUT_LINES[0]])


def test_event_loop_is_interrupted_between_two_of_its_steps(pytester: pytest.Pytester) -> None:
    """Within a step, asyncio would lose what it was about to do, and trio would fail with an internal error."""
    pytester.makepyfile(
        APP.replace("0.05", "0")
        + """
import asyncio, signal, trio

pytestmark = pytest.mark.asgi_sse(timeout=60)
cleaned_up = []

async def reads(seconds):
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        signal.setitimer(signal.ITIMER_REAL, seconds)  # the plugin's own alarm may come before the loop runs
        try:
            async for event in stream:
                pass
        finally:
            cleaned_up.append(stream)

async def blocks():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(30)

many = pytest.mark.parametrize("number", range(12))

@many
def test_asyncio(number):
    asyncio.run(reads(0.01 + number / 1000), debug=True)

@many
def test_trio(number):
    trio.run(reads, 0.01 + number / 1000)

def test_all_are_cleaned_up():
    assert len(cleaned_up) == 24

def test_blocked():
    asyncio.run(blocks())

def test_blocked_on_trio():
    trio.run(blocks)
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    result.assert_outcomes(failed=26, passed=1)
    assert result.stdout.str().count("the test has not ended within") >= 26


def test_interrupted_test_cleans_up_and_does_not_affect_later_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import asyncio, signal, trio

cleaned_up = []

async def blocks(backend):
    async def sleeper():
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            cleaned_up.append(backend)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleeper)
        async with open_stream(app, "/ticks") as stream:
            await stream.expect("0")
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(30)

@pytest.mark.asgi_sse(timeout=60)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_blocks(backend):
    anyio.run(blocks, backend, backend=backend)

def test_cleanup_has_run():
    assert cleaned_up == ["asyncio", "trio"]

@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.mark.parametrize("number", range(5))
@pytest.mark.asgi_sse(timeout=60)
def test_ends_near_its_timeout(loop, number):
    async def ends():
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        time.sleep(0.018 + number / 1000)  # in the last turn of the loop

    loop.run_until_complete(ends())

def test_passes(loop):
    loop.run_until_complete(asyncio.sleep(0.05))
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN)
    passed = result.parseoutcomes()["passed"]  # some of those near their timeout may end in time
    result.assert_outcomes(failed=9 - passed, passed=passed)
    result.stdout.fnmatch_lines(["FAILED *test_blocks?asyncio?*", "FAILED *test_blocks?trio?*"])
    for passing in ("test_cleanup_has_run", "test_passes"):
        result.stdout.no_fnmatch_line(f"FAILED *{passing}*")


BLOCKING = """
@pytest.mark.asgi_sse(timeout=0.5)
async def test_blocked():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")
        time.sleep(60)

async def test_passes():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")

async def test_passes_too():
    pass
"""
ONE_RUNNER = """
pytestmark = pytest.mark.anyio

@pytest.fixture(scope="module")
def anyio_backend():
    return "{}"

@pytest.fixture(scope="module", autouse=True)
async def shared():
    yield

"""
ONE_LOOP = [
    *("-p", "pytest_asyncio.plugin", "-o", "asyncio_mode=auto"),
    *("-o", "asyncio_default_fixture_loop_scope=session", "-o", "asyncio_default_test_loop_scope=session"),
]


@pytest.mark.parametrize(
    ("plugins", "shared"),
    [
        (["-p", "anyio.pytest_plugin"], ONE_RUNNER.format("asyncio")),
        (["-p", "anyio.pytest_plugin"], ONE_RUNNER.format("trio")),
        (ONE_LOOP, ""),
    ],
    ids=["anyio", "trio", "pytest-asyncio"],
)
def test_blocking_test_does_not_break_a_shared_loop(pytester: pytest.Pytester, plugins: list[str], shared: str) -> None:
    pytester.makepyfile(APP + shared + BLOCKING)
    result = pytester.runpytest_inprocess(*PLUGIN, *plugins)
    result.assert_outcomes(failed=1, passed=2)
    result.stdout.fnmatch_lines([TIMEOUT_LINES[0], "  <Stream /ticks open>*"])


def test_plugin_is_cheap_unless_a_test_asks_for_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys

def test_it():
    assert "asgi_sse.testing.pytest_plugin" in sys.modules
    assert "asgi_sse.testing.guard" not in sys.modules
    assert not {"httpx", "trio", "starlette"} & set(sys.modules)
"""
    )
    result = pytester.runpytest_subprocess(*PLUGIN, "--strict-config", timeout=60)
    result.assert_outcomes(passed=1)


def test_ini_option_guards_every_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import asyncio
import pytest
from asgi_sse import EventSourceResponse
from asgi_sse.testing import open_stream

async def source():
    yield "0"
    await asyncio.Event().wait()

@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()

@pytest.fixture
def opened(loop):
    opened = open_stream(EventSourceResponse(source()))
    yield opened
    loop.run_until_complete(opened.__aexit__(None, None, None))

def test_leaks(loop, opened):
    stream = loop.run_until_complete(opened.__aenter__())
    loop.run_until_complete(stream.expect("0"))
"""
    )
    for value in ("true", "false"):
        pytester.makeini(f"[pytest]\nasgi_sse_guard = {value}")
        result = pytester.runpytest_inprocess(*PLUGIN)
        result.assert_outcomes(passed=value == "false", failed=value == "true")


def test_test_keeps_its_own_alarm(pytester: pytest.Pytester) -> None:
    """Its timeout then ends async tests only."""
    pytester.makepyfile(
        """
import signal
import anyio, pytest

def handler(number, frame):
    pass

@pytest.fixture
def own_alarm():
    before = signal.signal(signal.SIGALRM, handler)
    yield
    assert signal.signal(signal.SIGALRM, before) is handler

@pytest.mark.asgi_sse(timeout=0.2)
def test_synchronous(own_alarm):
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)

@pytest.mark.anyio
@pytest.mark.asgi_sse(timeout=0.2)
async def test_async(own_alarm):
    await anyio.sleep(60)

@pytest.fixture
def anyio_backend():
    return "asyncio"
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "anyio.pytest_plugin")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["the test has not ended within 0.2 s.*"])


def test_timeout_none_sets_no_alarm_and_still_finds_leaks(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        APP
        + """
import signal
import unittest

@pytest.fixture
def anyio_backend():
    return "asyncio"

opened = []
pytestmark = pytest.mark.asgi_sse(timeout=None)

def test_synchronous():
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL

class TestOfUnittest(unittest.TestCase):
    def test_passes(self):
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL

@pytest.mark.anyio
async def test_passes():
    async with open_stream(app, "/ticks") as stream:
        await stream.expect("0")

@pytest.mark.anyio
async def test_leaks():
    opened.append(open_stream(app, "/ticks"))
    await opened[0].__aenter__()
"""
    )
    result = pytester.runpytest_inprocess(*PLUGIN, "-p", "anyio.pytest_plugin")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["the test leaves streams open.", "  <Stream /ticks open>*"])


def test_cancelled_test_may_take_long_to_clean_up(pytester: pytest.Pytester) -> None:
    """Longer than an event loop that is not blocked has for one turn."""
    pytester.makepyfile(
        """
import anyio, pytest

cleaned_up = []

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
@pytest.mark.asgi_sse(timeout=0.2)
async def test_hangs():
    try:
        await anyio.sleep(60)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1.5)
            cleaned_up.append(True)

def test_clean_up_passes():
    assert cleaned_up == [True]
"""
    )
    pytester.runpytest_inprocess(*PLUGIN, "-p", "anyio.pytest_plugin").assert_outcomes(passed=1, failed=1)


def test_blocked_test_is_interrupted_where_trio_is_not_imported(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
import sys, time
import pytest

@pytest.mark.asgi_sse(timeout=0.2)
def test_blocked():
    assert "trio" not in sys.modules
    time.sleep(60)
"""
    )
    result = pytester.runpytest_subprocess(*PLUGIN, timeout=60)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the test has not ended within 0.2 s.*"])


def test_items_that_are_no_functions_are_guarded(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nasgi_sse_guard = true")
    pytester.makeconftest(
        """
import asyncio
import pytest
from asgi_sse import EventSourceResponse
from asgi_sse.testing import open_stream

async def source():
    yield "0"
    await asyncio.Event().wait()

loop = asyncio.new_event_loop()
opened = []

def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".case":
        return Cases.from_parent(parent, path=file_path)

class Cases(pytest.File):
    def collect(self):
        yield Case.from_parent(self, name="passes")
        yield Case.from_parent(self, name="leaks")

class Case(pytest.Item):
    def runtest(self):
        if self.name == "leaks":
            opened.append(open_stream(EventSourceResponse(source())))
            loop.run_until_complete(opened[0].__aenter__())

def pytest_unconfigure():
    for one in opened:
        loop.run_until_complete(one.__aexit__(None, None, None))
    loop.close()
"""
    )
    pytester.makefile(".case", some="")
    result = pytester.runpytest_inprocess(*PLUGIN)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["the test leaves streams open.", "  <Stream / *"])
