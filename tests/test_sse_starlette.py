"""sse-starlette's own tests, and the snippets of its README, run on our adapter in its place."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from serving import HERE

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
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ALIAS), str(HERE.parent)]), "PYTEST_ADDOPTS": ""}


def test_its_own_tests_pass(distribution: Path, tmp_path: Path) -> None:
    """Each that does not is listed above, with the reason; none is listed that does."""
    shutil.copytree(distribution / "tests", tmp_path / "tests")
    shutil.copy(distribution / "pyproject.toml", tmp_path)
    for helper in (ALIAS / "helpers").iterdir():
        if helper.suffix == ".py":
            shutil.copy(helper, tmp_path / "tests")
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
