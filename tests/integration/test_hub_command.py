"""``asgi-sse serve`` with a broker on a server: a hub is replaced, and its clients read one log."""

import json
import signal
import time
from pathlib import Path

import httpx
import pytest
from backend_servers import Valkey
from hub_process import TIMEOUT_S, command, hub
from serving import free_port

from asgi_sse.cli.main import main


@pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed")
def test_client_of_a_hub_survives_a_new_hub_and_a_server_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The events outlive the hub, and the client loses and doubles none."""
    port = free_port()
    options = ("--insecure-publish", "--drain-timeout", "1")
    with Valkey(tmp_path, sync=False) as server:
        url, read = f"http://127.0.0.1:{port}", []

        def publish(*numbers: int) -> None:
            for number in numbers:
                # Odd numbers through the hub, even numbers directly to the server.
                assert main(["publish", url if number % 2 else server.url, "count", str(number)]) == 0

        with hub(*options, port=port, ASGI_SSE_BROKER=server.url) as (first, _):
            publish(0)
            start = capsys.readouterr().out.strip()
            with command("tail", "--json", "--count", "6", "--since", start, f"{url}/channels/count") as tail:
                assert tail.stdout is not None
                publish(1)
                # The event sets the reconnection time of the client, in ms.
                event = {"channel": "count", "data": "2", "retry": 100}
                httpx.post(f"{url}/channels", json=event, trust_env=False).raise_for_status()
                read += [json.loads(tail.stdout.readline()) for _ in range(2)]
                first.kill()  # in the middle of its stream
                first.wait()
                publish(4)
                assert tail.stderr is not None
                assert "reconnecting in" in tail.stderr.readline()
                with hub(*options, port=port, ASGI_SSE_BROKER=server.url) as (second, _):
                    publish(6)
                    read += [json.loads(tail.stdout.readline()) for _ in range(2)]
                    server.kill()
                    deadline = time.monotonic() + TIMEOUT_S
                    while httpx.get(f"{url}/health/ready", trust_env=False).status_code != 503:
                        assert time.monotonic() < deadline
                        time.sleep(0.02)
                    assert httpx.get(f"{url}/health/ready", trust_env=False).json()["broker"] == "disconnected"
                    server.start()
                    publish(7, 9)
                    read += [json.loads(line) for line in tail.stdout]
                    assert tail.wait(TIMEOUT_S) == 0
                    second.terminate()
                    assert second.wait(TIMEOUT_S) == -signal.SIGTERM
    assert [event["data"] for event in read] == ["1", "2", "4", "6", "7", "9"]
