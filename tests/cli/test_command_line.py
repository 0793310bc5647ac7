"""The command line: help, arguments, exit statuses and missing extras."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_process import TIMEOUT_S, command
from scripted_server import last_error_line

from asgi_sse import __version__
from asgi_sse.cli.main import main


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"asgi-sse {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--help", ["demo", "serve", "publish", "tail", "bench"]),
        ("demo --help", ["--port"]),
        ("serve --help", ["--publish-token", "ASGI_SSE_PUBLISH_TOKEN", "Idempotency-Key", "/health/ready"]),
        ("publish --help", ["--key", "ASGI_SSE_PUBLISH_TOKEN"]),
        ("tail --help", ["--since", "204", "--no-reconnect"]),
        ("bench --help", ["--connections", "spread"]),
    ],
)
def test_help_names_the_options_and_exit_statuses(
    arguments: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(arguments.split())
    out = capsys.readouterr().out
    assert all(text in out for text in [*expected, "exit status"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--port x", "--port 65536", "demo --port -1", "demo --port 080808", "--prt 80", "srv", "serve --history 0",
        "serve --max-age 0", "serve --ping nan", "serve --drain-timeout inf", "tail ftp://localhost/", "tail http:///x",
        "tail http://localhost/ -H Authorization", "tail http://localhost/ --count 0",
        "bench http://localhost/ --rate 0", "bench http://localhost/ --duration soon",
        "tail http://localhost:65536/", "bench http://localhost:x/", "tail http://[::g/",
    ],
)  # fmt: skip
def test_invalid_arguments_exit_with_2_and_quote_the_value(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    error = last_error_line(capsys)
    assert ": error: " in error
    assert arguments.rsplit(maxsplit=1)[-1] in error


@pytest.mark.parametrize(
    "arguments",
    ["tail {}/channels/full?last_event_id=0-0", "publish {} full x --token secret", "serve --port 0 --metrics off",
     "bench {}/channels/full --connections 1 --duration 0.1"],
)  # fmt: skip
def test_unwritable_output_exits_with_1_or_141(arguments: str, hub_url: str) -> None:
    argv = arguments.format(hub_url).split()
    with Path("/dev/full").open("w") as full, command(*argv, stdout=full.fileno()) as process:
        assert process.wait(TIMEOUT_S) == 1
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "asgi-sse: error: cannot write: No space left on device"
    read_end, write_end = os.pipe()
    os.close(read_end)
    with command(*argv, stdout=write_end) as process:
        os.close(write_end)
        assert process.wait(TIMEOUT_S) == 141
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("arguments", [[], ["serve", "--insecure-publish"]])
def test_port_in_use_is_reported_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*arguments, "--port", str(port)]) == 1
    error = last_error_line(capsys)
    assert error.startswith(f"asgi-sse: error: cannot listen on 127.0.0.1 port {port}: Address already in use; give ")


@pytest.mark.parametrize("name", ["demo", "serve"])
@pytest.mark.parametrize("host", ["a..b", "::g"])
def test_unknown_host_is_reported_in_one_line(name: str, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--host", host]) == 1
    assert last_error_line(capsys).startswith(f"asgi-sse: error: cannot listen on {host} port 8000: ")


@pytest.mark.parametrize(
    ("arguments", "missing", "feature", "extra"),
    [
        ("", "psutil", "the demo", "demo"),
        ("demo", "uvicorn", "the demo", "demo"),
        ("serve", "uvicorn", "serve", "cli"),
        ("publish http://127.0.0.1:1 a x", "httpx", "publishing to a hub", "cli"),
        ("tail http://127.0.0.1:1/", "httpx", "tail", "cli"),
        ("bench http://127.0.0.1:1/", "h11", "bench", "cli"),
    ],
)
def test_missing_extra_is_named_with_its_install_command(
    arguments: str, missing: str, feature: str, extra: str
) -> None:
    # In a separate process, because the tests that follow need the modules that are already imported here.
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from asgi_sse.cli.main import main; "
        f"sys.exit(main({arguments.split()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    expected = (
        f"asgi-sse: error: {feature} needs {missing}, which is not installed; asgi_sse is not on PyPI yet: "
        f"from a clone, use pip install '.[{extra}]'\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_help_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('httpx', 'h11', 'uvicorn', 'psutil', 'prometheus_client'): sys.modules[name] = None\n"
        "from asgi_sse.cli.main import main; main(['serve', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
