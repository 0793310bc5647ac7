"""``asgi-sse serve`` as a process."""

import json
import os
import re
import shutil
import signal
import subprocess

import httpx
import pytest
from hub_process import TIMEOUT_S, hub

from asgi_sse.cli.main import main


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signal_ends_streams_with_a_reconnection_time(number: signal.Signals, status: int) -> None:
    with hub("--log-level", "debug", "--subscribe-token", "hush", "--insecure-publish") as (process, url):
        with (
            httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client,
            client.stream("GET", f"{url}/channels/news?token=hush") as stream,
        ):
            body = stream.iter_bytes()
            assert next(body).startswith(b": ")
            assert client.post(f"{url}/channels/news", content="x").status_code == 201
            assert any(b"data: x\n" in chunk for chunk in body)
            process.send_signal(number)
            assert re.search(rb"retry: \d+\n\n\Z", b"".join(body))  # httpx raises if the body is incomplete
        assert process.wait(9) == status
        assert process.stderr is not None
        log = process.stderr.read()
        assert "drained 1 stream" in log
        assert "hush" not in log
        assert "Traceback" not in log


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_publishes_and_subscribes(hub_url: str) -> None:
    """The commands are those of the documentation."""
    curl = ["curl", "-sS", "--max-time", "20"]
    url = f"{hub_url}/channels/curl"
    done = subprocess.run(
        [*curl, "-d", "it rains", "-H", "Authorization: Bearer other", f"{url}?event=weather"],
        capture_output=True,
        check=True,
    )
    event_id = json.loads(done.stdout)["id"]
    first = event_id.rpartition("-")[0] + "-0"
    with subprocess.Popen([*curl, "-N", "-H", f"Last-Event-ID: {first}", url], stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        lines = iter(reader.stdout.readline, b"")
        assert next(line for line in lines if line.startswith(b"event")) == b"event: weather\n"
        assert next(lines) == b"data: it rains\n"
        reader.terminate()
    done = subprocess.run(
        [*curl, "-d", "x", url, "-w", "%{http_code}", "-o", os.devnull], capture_output=True, check=True
    )
    assert done.stdout == b"401"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--broker", "foo://bar"],
            "url must be memory://, or start with redis://, rediss://, unix:// or nats://, got 'foo://...'",
        ),
        (
            ["--broker", "rediss"],
            "url must be memory://, or start with redis://, rediss://, unix:// or nats://, got 'rediss'",
        ),
        (
            ["--broker", "nats"],
            "url must be memory://, or start with redis://, rediss://, unix:// or nats://, got 'nats'",
        ),
        (["--broker", "redis://127.0.0.1:1/0"], "cannot connect to redis://127.0.0.1:1/0: "),
        (["--cors", "example.com"], "a CORS origin must be a scheme, a host and a port, got 'example.com'"),
        (["--publish-token", "a b"], "each token must be printable ASCII"),
        (["--prefix", "a b"], "prefix must be 1 to 64 characters of A-Z a-z 0-9 _ -, got 'a b'"),
    ],
)
def test_invalid_options_stop_the_start(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = 1 if expected.startswith("cannot") else 2  # 2: an invalid option
    assert main(["serve", "--port", "0", "--insecure-publish", "--metrics", "off", *options]) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"asgi-sse: error: {expected}")
    assert error.count("\n") == 1


def test_start_without_a_publish_token_warns_that_publishing_is_off() -> None:
    with hub() as (process, url):
        assert httpx.post(f"{url}/channels/a", content="x", trust_env=False, timeout=TIMEOUT_S).status_code == 403
        process.terminate()
        assert process.stderr is not None
        first = process.stderr.readline()
    assert first == (
        "asgi-sse: publishing is off; give --publish-token, ASGI_SSE_PUBLISH_TOKEN or --insecure-publish "
        "to turn it on\n"
    )
