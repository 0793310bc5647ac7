"""The command, as who types it sees it; its hub, as its clients do."""

import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_process import ENOUGH, OWN, command, hub

from asgi_sse import Broker, BrokerError, StreamRegistry, __version__
from asgi_sse.cli.hub import create_hub
from asgi_sse.cli.main import main
from asgi_sse.testing import open_stream

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
GONE = b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASGI_SSE_BROKER", "ASGI_SSE_PUBLISH_TOKEN", "ASGI_SSE_SUBSCRIBE_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    """The URL of a hub that stays for the whole module; its token is ``secret``."""
    with hub(patience=20 * ENOUGH, ASGI_SSE_PUBLISH_TOKEN="secret other") as (_, url):
        yield url


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that gives each connection the next of the answers, and the last one to all that follow.

    Gives its URL, and what it was asked.
    """
    asked: list[str] = []
    left = list(answers)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data = b""
            while b"\r\n\r\n" not in data:
                chunk = self.request.recv(65_536)
                if not chunk:
                    return  # it has asked for nothing
                data += chunk
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            while length and len(body) < int(length[1]):
                body += self.request.recv(65_536)
            asked.append((head + b"\r\n\r\n" + body).decode(errors="replace"))
            answer = left.pop(0) if len(left) > 1 else left[0]
            # Else a client may ask again while it is closed, and the next answer is lost.
            self.request.sendall(answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def asked_for(request: str, name: str) -> str | None:
    found = re.search(rf"^{name}: *(.*?)\r$", request, re.IGNORECASE | re.MULTILINE)
    return found and found[1]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# The command


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"asgi-sse {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--help", ["demo", "serve", "publish", "tail", "bench"]),
        ("demo --help", ["--port"]),
        ("serve --help", ["--publish-token", "ASGI_SSE_PUBLISH_TOKEN", "Idempotency-Key", "/health/ready"]),
        ("publish --help", ["--key", "ASGI_SSE_PUBLISH_TOKEN"]),
        ("tail --help", ["--since", "204", "--no-reconnect"]),
        ("bench --help", ["--connections", "spread"]),
    ],
)
def test_help(arguments: str, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(arguments.split())
    out = capsys.readouterr().out
    assert all(text in out for text in [*told, "exit status"])


@pytest.mark.parametrize(
    "arguments",
    [
        "--port x", "--port 65536", "demo --port -1", "demo --port 080808", "--prt 80", "srv", "serve --history 0",
        "serve --max-age 0", "serve --ping nan", "serve --drain-timeout inf", "tail ftp://localhost/", "tail http:///x",
        "tail http://localhost/ -H Authorization", "tail http://localhost/ --count 0",
        "bench http://localhost/ --rate 0", "tail http://localhost:65536/", "bench http://localhost:x/", "tail http://[::g/",
    ],
)  # fmt: skip
def test_wrong_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments.split())
    error = last_line(capsys)
    assert ": error: " in error
    assert arguments.rsplit(maxsplit=1)[-1] in error


@pytest.mark.parametrize(
    "arguments",
    ["tail {}/channels/full?last_event_id=0-0", "publish {} full x --token secret", "serve --port 0 --metrics off",
     "bench {}/channels/full --connections 1 --duration 0.1"],
)  # fmt: skip
def test_output_that_cannot_be_written(arguments: str, running: str) -> None:
    given = arguments.format(running).split()
    with Path("/dev/full").open("w") as full, command(*given, stdout=full.fileno()) as process:
        assert process.wait(ENOUGH) == 1
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "asgi-sse: error: cannot write: No space left on device"
    ours, its = os.pipe()
    os.close(ours)
    with command(*given, stdout=its) as process:
        os.close(its)
        assert process.wait(ENOUGH) == 141
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("arguments", [[], ["serve", "--insecure-publish"]])
def test_port_in_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*arguments, "--port", str(port)]) == 1
    error = last_line(capsys)
    assert error.startswith(f"asgi-sse: error: cannot listen on 127.0.0.1 port {port}: Address already in use; give ")


@pytest.mark.parametrize("name", ["demo", "serve"])
@pytest.mark.parametrize("host", ["a..b", "::g"])
def test_no_such_host(name: str, host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--host", host]) == 1
    assert last_line(capsys).startswith(f"asgi-sse: error: cannot listen on {host} port 8000: ")


@pytest.mark.parametrize(
    ("arguments", "missing", "what", "extra"),
    [
        ("", "psutil", "the demo", "demo"),
        ("demo", "uvicorn", "the demo", "demo"),
        ("serve", "uvicorn", "serve", "cli"),
        ("publish http://127.0.0.1:1 a x", "httpx", "publishing to a hub", "cli"),
        ("tail http://127.0.0.1:1/", "httpx", "tail", "cli"),
        ("bench http://127.0.0.1:1/", "h11", "bench", "cli"),
    ],
)
def test_missing_extra(arguments: str, missing: str, what: str, extra: str) -> None:
    # In a process of its own: a module that is imported anew would be another one for the tests that follow.
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from asgi_sse.cli.main import main; "
        f"sys.exit(main({arguments.split()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ENOUGH, check=False)
    told = f'asgi-sse: error: {what} needs {missing}, which is not installed: pip install "asgi-sse[{extra}]"\n'
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


def test_help_needs_no_extra() -> None:
    code = (
        "import sys\n"
        "for name in ('httpx', 'h11', 'uvicorn', 'psutil', 'prometheus_client'): sys.modules[name] = None\n"
        "from asgi_sse.cli.main import main; main(['serve', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ENOUGH, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# The hub, as an app

TOKEN = {"authorization": "Bearer secret"}


async def post(app: Any, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """The status, the body (parsed, if it is JSON) and the headers of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body.encode() if isinstance(body, str) else body
    async with open_stream(app, path, method="POST", headers=named, body=data) as answer:
        text = (await answer.read()).decode()
    return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text, answer.headers


@pytest.mark.anyio
async def test_what_is_posted_is_read() -> None:
    app = create_hub(publish_tokens=["secret"])
    async with (
        open_stream(app, "/channels/news") as one,
        open_stream(app, "/channels?channel=news&channel=a/b") as both,
    ):
        status, answer, headers = await post(app, "/channels/news?event=weather", "it rains\nand rains", **TOKEN)
        assert (status, headers["cache-control"]) == (201, "no-store")
        for stream in (one, both):
            event = await stream.receive()
            assert (event.event, event.data, event.id) == ("weather", "it rains\nand rains", answer["id"])
        status, answer, _ = await post(app, "/channels?channel=a/b", "ö", x_sse_event="\u00c3\u00b6", **TOKEN)
        event = await both.receive()
        assert (event.event, event.data, event.id) == ("ö", "ö", answer["id"])
        # The body is the data, whatever kind of data it is said to be.
        await post(app, "/channels/news", '{"a": 1}', content_type="application/json", **TOKEN)
        assert (await one.receive()).data == '{"a": 1}'
    async with open_stream(app, f"/channels/news?last_event_id={event.id}") as stream:
        assert (await stream.receive()).data == '{"a": 1}'


@pytest.mark.anyio
async def test_json() -> None:
    app = create_hub(insecure_publish=True)
    async with open_stream(app, "/channels/a/") as nothing:
        assert nothing.status == 404
    async with open_stream(app, "/channels/a") as stream:
        await post(app, "/channels", json.dumps({"channel": "a", "data": {"b": [1, "ö"]}, "event": "c"}))
        event = await stream.receive()
        assert (event.event, event.data) == ("c", '{"b":[1,"ö"]}')
        await post(app, "/channels?event=d", json.dumps({"channel": "a", "data": "text", "retry": 5000}))
        event = await stream.receive()
        assert (event.event, event.data) == ("d", "text")


@pytest.mark.anyio
async def test_a_key_publishes_once() -> None:
    app = create_hub(insecure_publish=True)
    first = await post(app, "/channels/a", "x", idempotency_key="7")
    assert await post(app, "/channels/a?idempotency_key=7", "y") == first
    assert await post(app, "/channels", json.dumps({"channel": "a", "data": "z", "idempotency_key": "7"})) == first
    assert (await post(app, "/channels/a", "x", idempotency_key="8"))[1] != first[1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "told"),
    [
        ("/channels/news", "x", {"authorization": ""}, 401, "Authorization: Bearer TOKEN"),
        ("/channels/news", "x", {"authorization": "Basic secret"}, 401, "Authorization: Bearer TOKEN"),
        ("/channels/news", "x", {"authorization": "Bearer secre"}, 401, "not known"),
        ("/channels/news", "x", {"authorization": "Bearer s\u00e9cret"}, 401, "not known"),
        ("/channels/news?token=secret", "x", {"authorization": ""}, 401, "Bearer"),
        ("/channels/news", "x", {"authorization": "Bearer reader"}, 403, "that token may not publish"),
        ("/channels/a b", "x", {}, 400, "a b"),
        ("/channels/a.*", "x", {}, 400, "a.*"),
        ("/channels?channel=a&channel=b", "x", {}, 400, "one at a time"),
        ("/channels/news", b"\xff", {}, 400, "not UTF-8"),
        ("/channels/news?event=a%0Ab", "x", {}, 400, "line end"),
        ("/channels/news", "x", {"x-sse-event": "\u00ff"}, 400, "x-sse-event is not UTF-8"),
        ("/channels/news", "x", {"idempotency-key": "x" * 201}, 400, "idempotency_key"),
        ("/channels", "x", {}, 400, "name the channel"),
        ("/channels", "[1]", {}, 400, "JSON object"),
        ("/channels", '{"data": "x"}', {}, 400, "channel"),
        ("/channels", '{"channel": "a", "data": "x", "id": 7}', {}, 400, "'id' is no field; give a JSON object with"),
        ("/channels", '{"chanel": "a", "dat": "x"}', {}, 400, "'chanel' is no field; give a JSON object with"),
        ("/channels", '{"channel": 7, "data": "x"}', {}, 400, "channel 7"),
        ("/channels", '{"channel": "a"}', {}, 400, "nothing to send"),
        ("/channels", '{"channel": "a", "data": "x", "retry": "soon"}', {}, 400, "retry='soon'"),
        (
            "/channels",
            '{"channel": "a", "data": "x", "idempotency_key": 7}',
            {},
            400,
            "idempotency_key must be a str of 1 to 200",
        ),
        ("/channels/news", "x" * 101, {}, 413, "more than 100 bytes"),
        ("/health/live", "x", {}, 405, "Method Not Allowed"),
    ],
)
async def test_what_is_refused(path: str, body: str | bytes, headers: dict[str, str], status: int, told: str) -> None:
    broker = Broker()
    app = create_hub(broker, publish_tokens=["secret"], subscribe_tokens=["reader"], max_body=100)
    answer = await post(app, path, body, **{**TOKEN, **headers})
    assert answer[0] == status
    assert told in answer[1]
    if status in (401, 403):
        assert answer[2]["www-authenticate"].startswith('Bearer realm="asgi-sse"')
    if status == 403:
        assert answer[2]["www-authenticate"].endswith('error="insufficient_scope"')
    assert broker.statistics().published == 0


@pytest.mark.anyio
async def test_nobody_publishes_without_a_token_unless_it_is_said() -> None:
    status, told, _ = await post(create_hub(), "/channels/a", "x", **TOKEN)
    assert (status, told) == (403, "publishing is off: this hub was given no token for it")
    async with open_stream(create_hub(), "/channels/a", method="PUT") as answer:
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, POST")


@pytest.mark.anyio
async def test_without_a_token_no_page_publishes_that_is_not_known() -> None:
    app = create_hub(insecure_publish=True, cors=["https://example.com"])
    for origin, status in [
        ("https://evil.example", 403),
        ("null", 403),
        ("https://example.com", 201),
        ("https://hub.example", 403),  # what it calls itself
    ]:
        assert (await post(app, "/channels/a", "x", origin=origin, host="hub.example"))[0] == status
    assert (await post(create_hub(insecure_publish=True), "/channels/a", "x", origin="https://example.com"))[0] == 403


@pytest.mark.anyio
async def test_the_environment_configures_a_hub_that_is_given_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASGI_SSE_PUBLISH_TOKEN", "one secret")
    monkeypatch.setenv("ASGI_SSE_SUBSCRIBE_TOKEN", "reader")
    app = create_hub()
    assert (await post(app, "/channels/a", "x", **TOKEN))[0] == 201
    async with open_stream(app, "/channels/a") as stream:
        assert stream.status == 401
    monkeypatch.setenv("ASGI_SSE_BROKER", "foo://bar")
    with pytest.raises(ValueError, match="foo"):
        create_hub()


@pytest.mark.parametrize("tokens", [["a b"], [""], ["ö"], ["a\n"]])
def test_tokens_that_no_header_carries(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="a token"):
        create_hub(publish_tokens=tokens)
    with pytest.raises(TypeError, match=r"\[token\]"):
        create_hub(publish_tokens="secret")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "headers", "status", "told"),
    [
        ("/channels/a", {}, 401, "this needs a token"),
        ("/channels/a", {"authorization": "Bearer reader"}, 200, ": "),
        ("/channels/a", {"authorization": "bearer  reader"}, 200, ": "),
        ("/channels/a", {"authorization": "Bearer wrong"}, 401, "that token is not known"),
        ("/channels/a?token=reader", {}, 200, ": "),
        ("/channels/a?token=secret", {}, 403, "that token may not read"),
        ("/channels/a", {"cookie": "a=b; asgi_sse_token=reader"}, 200, ": "),
        ("/channels/a", {"cookie": "asgi_sse_token=secret"}, 403, "that token may not read"),
        ("/channels?token=reader", {}, 400, "name the channel, as /channels/NAME or ?channel=NAME"),
        ("/channels?token=reader&channel=a.*", {}, 403, "no access to a.*: a pattern must be granted"),
    ],
)
async def test_who_reads_needs_the_token_for_it(path: str, headers: dict[str, str], status: int, told: str) -> None:
    app = create_hub(publish_tokens=["secret"], subscribe_tokens=["reader"])
    async with open_stream(app, path, headers=headers) as stream:
        assert stream.status == status
        assert ("www-authenticate" in stream.headers) == (status == 401 or told.startswith("that token"))
        assert (await stream.read()).startswith(told.encode())


@pytest.mark.anyio
async def test_patterns_are_read_where_they_may_be() -> None:
    app = create_hub(insecure_publish=True, patterns=True)
    async with open_stream(app, "/channels/a.*") as stream, open_stream(app, "/channels") as nothing:
        await post(app, "/channels/a.b", "x")
        assert (await stream.receive()).data == "x"
        assert nothing.status == 400


@pytest.mark.anyio
async def test_other_origins() -> None:
    app = create_hub(publish_tokens=["secret"], cors=["https://example.com"])
    asks = {"origin": "https://example.com", "access-control-request-method": "POST"}
    async with open_stream(app, "/channels/a", method="OPTIONS", headers=asks) as answer:
        allowed = answer.headers["access-control-allow-headers"]
        assert allowed == "Last-Event-ID, Authorization, Content-Type, Idempotency-Key, X-SSE-Event"
    async with open_stream(app, "/channels/a", headers={"origin": "https://example.com"}) as stream:
        assert stream.headers["access-control-allow-credentials"] == "true"
    app = create_hub(cors="*")
    async with open_stream(app, "/channels/a", headers={"origin": "https://example.com"}) as stream:
        assert stream.headers["access-control-allow-origin"] == "*"


@pytest.mark.anyio
async def test_a_run_that_is_over_is_answered_with_204() -> None:
    broker = Broker()
    app = create_hub(broker)
    await (await broker.run("job", ["one"])).wait()
    async with open_stream(app, "/channels/job") as stream:
        assert (await stream.receive()).data == "one"
        last = (await stream.receive()).id
    async with open_stream(app, "/channels/job", headers={"last-event-id": str(last)}) as stream:
        assert stream.status == 204


@pytest.mark.anyio
async def test_health() -> None:
    registry = StreamRegistry()
    app = create_hub(registry=registry)

    async def look(path: str) -> tuple[int, Any]:
        async with open_stream(app, path) as answer:
            return answer.status, json.loads(await answer.read())

    assert await look("/health/live") == (200, {"live": True})
    assert await look("/health/ready") == (200, {"ready": True, "broker": "local", "draining": False})
    registry.begin_drain()
    assert await look("/health/live") == (200, {"live": True})
    assert await look("/health/ready") == (503, {"ready": False, "broker": "local", "draining": True})
    async with open_stream(app, "/health/ready", method="HEAD") as answer:
        assert (answer.status, await answer.read()) == (503, b"")


@pytest.mark.anyio
async def test_metrics() -> None:
    pytest.importorskip("asgi_sse.metrics.prometheus")
    app = create_hub(insecure_publish=True)
    await post(app, "/channels/a", "x")
    async with open_stream(app, "/channels/a"), open_stream(app, "/metrics") as answer:
        assert answer.status == 200
        assert re.search(rb"^asgi_sse_\w+", await answer.read(), re.MULTILINE)
    async with open_stream(create_hub(metrics=False), "/metrics") as answer:
        assert answer.status == 404


def test_without_the_client_of_prometheus_there_are_no_metrics() -> None:
    code = (
        "import sys, anyio; sys.modules['prometheus_client'] = None\n"
        "from asgi_sse.cli.hub import create_hub\n"
        "from asgi_sse.testing import open_stream\n"
        "async def main():\n"
        "    async with open_stream(create_hub(), '/metrics') as answer:\n"
        "        print(answer.status)\n"
        "anyio.run(main)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "404\n"


# The hub, as a process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_hub_that_is_told_to_end_tells_its_readers(number: signal.Signals, status: int) -> None:
    with hub("--log-level", "debug", "--subscribe-token", "hush", "--insecure-publish") as (process, url):
        with (
            httpx.Client(timeout=ENOUGH, trust_env=False) as client,
            client.stream("GET", f"{url}/channels/news?token=hush") as stream,
        ):
            body = stream.iter_bytes()
            assert next(body).startswith(b": ")
            assert client.post(f"{url}/channels/news", content="x").status_code == 201
            assert any(b"data: x\n" in chunk for chunk in body)
            process.send_signal(number)
            assert re.search(rb"retry: \d+\n\n\Z", b"".join(body))  # httpx raises for a body that is cut
        assert process.wait(9) == status
        assert process.stderr is not None
        log = process.stderr.read()
        assert "drained 1 stream" in log
        assert "hush" not in log
        assert "Traceback" not in log


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_hub_for_other_languages(running: str) -> None:
    """By curl, as the documentation has it."""
    curl = ["curl", "-sS", "--max-time", "20"]
    url = f"{running}/channels/curl"
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
    ("options", "told"),
    [
        (["--broker", "foo://bar"], "url='foo://' is no broker that is known"),
        (["--broker", "rediss"], "url='rediss' is no broker that is known"),
        (["--broker", "nats"], "url='nats' is no broker that is known"),
        (["--broker", "redis://127.0.0.1:1/0"], "cannot connect to redis://127.0.0.1:1/0: "),
        (["--cors", "example.com"], "cors: 'example.com' is no origin"),
        (["--publish-token", "a b"], "a token is empty, or has other than printable ASCII"),
        (["--prefix", "a b"], "prefix='a b'"),
    ],
)
def test_a_hub_that_cannot_start(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = 1 if told.startswith("cannot") else 2  # of wrong arguments
    assert main(["serve", "--port", "0", "--insecure-publish", "--metrics", "off", *options]) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith(f"asgi-sse: error: {told}")
    assert error.count("\n") == 1


def test_a_hub_says_what_it_does_not_do() -> None:
    with hub() as (process, url):
        assert httpx.post(f"{url}/channels/a", content="x", trust_env=False, timeout=ENOUGH).status_code == 403
        process.terminate()
        assert process.stderr is not None
        first = process.stderr.readline()
    assert first == (
        "asgi-sse: nobody may publish: give --publish-token, ASGI_SSE_PUBLISH_TOKEN or --insecure-publish\n"
    )


@pytest.mark.anyio
async def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()

    async def fail(*_: Any, **__: Any) -> str:
        raise BrokerError("not published within 5 s")

    monkeypatch.setattr(broker, "publish", fail)
    status, told, headers = await post(create_hub(broker, insecure_publish=True), "/channels/a", "x")
    assert (status, told, headers["retry-after"]) == (503, "not published within 5 s", "5")


# publish


def test_publish_to_a_hub(running: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ASGI_SSE_PUBLISH_TOKEN", "secret")
    assert main(["publish", running, "a/b", "ö", "--event", "c d", "--key", "1"]) == 0
    first = capsys.readouterr().out
    assert main(["publish", f"{running}/", "a/b", "ö", "--key", "1", "--token", "other"]) == 0
    assert capsys.readouterr().out == first
    with httpx.stream(
        "GET", f"{running}/channels?channel=a/b&last_event_id={first.strip()[:-1]}0", timeout=ENOUGH, trust_env=False
    ) as stream:
        body = ""
        for text in stream.iter_text():
            body += text
            if "data: " in body:
                break
    assert "event: c d\ndata: ö\n" in body
    assert main(["publish", running, "a b", "x"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: the hub answered 400: channel must be 1 to 200 ")
    assert main(["publish", running, "a", "x", "--token", "wrong"]) == 1
    assert last_line(capsys) == "asgi-sse: error: the hub answered 401: that token is not known"
    assert main(["publish", f"{running}/channels/news", "a", "x"]) == 1
    assert last_line(capsys) == (
        "asgi-sse: error: the hub answered 404: Not Found; give the hub's own URL, http://HOST:PORT: the channel comes "
        "after it"
    )
    assert main(["publish", "http://127.0.0.1:1", "a", "x"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: not published: http://127.0.0.1:1 cannot be reached")


def test_publish_to_what_is_no_broker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x\n")))
    assert main(["publish", "memory://", "a"]) == 1
    assert "of the app in its own process" in last_line(capsys)
    assert main(["publish", "127.0.0.1:8041", "a"]) == 2  # and reads nothing for it
    told = "'127.0.0.1:8041' is no URL; give redis://…, nats://…, or a hub's http://HOST:PORT"
    assert last_line(capsys) == f"asgi-sse: error: {told}"
    assert main(["publish", "redis://127.0.0.1:1/0", "a b", "x"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: channel must be 1 to 200 ")
    assert main(["publish", "redis://127.0.0.1:1/0", "a", "x", "--timeout", "0.2"]) == 1
    assert "redis://127.0.0.1:1/0" in last_line(capsys)


@pytest.mark.parametrize("body", ["hi", "[]", "{}", "[" * 100_000])
def test_publish_to_what_is_no_hub(body: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = f"HTTP/1.1 201 Created\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    with answering(answer.encode()) as (url, _):
        assert main(["publish", url, "a", "x"]) == 1
        assert last_line(capsys) == f"asgi-sse: error: {url} is no hub: it answered 201, but without the event's id"


def test_publish_shows_nothing_that_acts_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b'{"id": "\\u001b[2Jx"}'
    with answering(b"HTTP/1.1 201 Created\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)) as (url, _):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["publish", url, "a", "x"]) == 0
    assert capsys.readouterr().out == "\\u001b[2Jx\n"


def test_publish_says_when_nothing_was_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in ("http://[::g/", "http://a..b/", "http://"):
        assert main(["publish", url, "a", "x"]) == 1
        assert last_line(capsys).startswith("asgi-sse: error: not published: the request cannot be made: ")
    with socket.socket() as taken:  # whose queue of connections is full
        taken.bind(("127.0.0.1", 0))
        taken.listen(0)
        address = taken.getsockname()
        with socket.create_connection(address):
            assert main(["publish", f"http://127.0.0.1:{address[1]}", "a", "x", "--timeout", "0.2"]) == 1
    assert last_line(capsys).startswith(f"asgi-sse: error: not published: http://127.0.0.1:{address[1]} cannot be ")
    monkeypatch.setenv("HTTP_PROXY", "foo://bar")
    assert main(["publish", "http://127.0.0.1:1", "a", "x"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: not published: the request cannot be made: ")


def test_publish_says_when_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"") as (url, _):
        assert main(["publish", url, "a", "x"]) == 1
    assert "it may have been published" in last_line(capsys)


# tail


def test_tail_resumes_as_an_eventsource(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(
        STREAM + b"retry: 10\nid: 1\ndata: one\n\nid: 2\nevent: add\ndata: two\ndata: 2\n\nid: 3\ndata: lost",
        CHUNKED + b"8\r\nid: \xc3\xb6\n\n\r\n5\r\ndata",
        b"",
        STREAM + b"id\n\ndata: three\n\n",
        STREAM + b"id: 4\n\n",
        GONE,
    ) as (url, asked):
        assert main(["tail", url, "--since", "\u00fc"]) == 0
    out, error = capsys.readouterr()
    assert out == "one\n[add] two\n2\nthree\n"
    assert [asked_for(request, "last-event-id") for request in asked] == ["ü", "2", "ö", "ö", None, "4"]
    assert all(asked_for(request, "accept") == "text/event-stream" for request in asked)
    lines = error.splitlines()
    assert [line.partition(" again")[0].partition(": ")[2][:21] for line in lines] == [
        "the stream has ended;",
        "the connection failed",
        "the connection failed",
        "the stream has ended;",
        "the stream has ended;",
        "the server says that ",
    ]


def test_tail_waits_longer_after_each_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("asgi_sse.cli.follow.time.sleep", pauses.append)
    forever = STREAM + b"retry: " + b"9" * 400 + b"\n\n"
    with answering(STREAM + b"retry: 1000\n\n", *[b""] * 9, STREAM + b"data: x\n\n", forever, GONE) as (url, _):
        assert main(["tail", url]) == 0
    assert pauses.pop() == 86_400
    assert pauses[0] == pauses[-1] == 1
    for number, pause in enumerate(pauses[1:-1]):
        longest = min(60, 2**number)
        assert longest / 2 <= pause <= longest
    assert len(pauses) == 11


def test_tail_does_not_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the stream asks it to."""
    pauses: list[float] = []
    monkeypatch.setattr("asgi_sse.cli.follow.time.sleep", pauses.append)
    with answering(STREAM + b"retry: 0\n\n", STREAM, GONE) as (url, _):
        assert main(["tail", url]) == 0
    assert pauses == [0.1, 0.1]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 10\r\n\r\nfull\x1b[2Jxx",
            "the server answered 503 Service Unavailable: full\\u001b[2Jxx",
        ),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answered 404 Not Found"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n", "the server answered 404 Not Found"),  # and is cut
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 0\r\n\r\n",
            "that is no event stream, its Content-Type is 'text/html'",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
            "that is no event stream, its Content-Type is ''",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "the request cannot be made: Exceeded"),
    ],
)
def test_tail_stops_at_what_is_no_stream(answer: bytes, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(answer) as (url, asked):
        assert main(["tail", url]) == 1
    assert last_line(capsys).startswith(f"asgi-sse: error: {told}")
    assert "302" in answer.decode() or len(asked) == 1


def test_tail_does_not_wait_for_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is an error, and its body never comes."""
    monkeypatch.setattr("asgi_sse.cli.follow._REASON_TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:

        def answer() -> socket.socket:
            connection, _ = listener.accept()
            connection.recv(65_536)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\n\r\n")
            return connection

        answered = pool.submit(answer)
        assert main(["tail", f"http://127.0.0.1:{listener.getsockname()[1]}/"]) == 1
        answered.result(ENOUGH).close()
    assert last_line(capsys) == "asgi-sse: error: the server answered 404 Not Found"


def test_tail_and_what_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "foo://bar")
    assert main(["tail", "http://127.0.0.1:1/"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: the request cannot be made: ")


def test_tail_of_one_connection(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(STREAM + b"data: x\n\n", b"") as (url, _):
        assert main(["tail", url, "--no-reconnect"]) == 0
        assert capsys.readouterr() == ("x\n", "")
        assert main(["tail", url, "--no-reconnect"]) == 1
        assert last_line(capsys).startswith("asgi-sse: error: the connection failed: ")
        assert main(["tail", url, "-H", "a b: c"]) == 1
        assert last_line(capsys).startswith("asgi-sse: error: the request cannot be made: ")
    assert main(["tail", "http://a..b/"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: the request cannot be made: ")


def test_tail_begins_at_an_id_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(STREAM + b"retry: 1\nid: 7\ndata: x\n\n", GONE) as (url, asked):
        # As the shell gives a byte that is no UTF-8; and what is given by hand does not outlive the first event.
        assert main(["tail", url, "--since", "\udcff", "-H", "Last-Event-ID: 5"]) == 0
        assert asked[0].count("last-event-id") == asked[1].count("last-event-id") == 1
        assert asked_for(asked[1], "last-event-id") == "7"
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize(
    ("option", "told"),
    [("--no-reconnect", "\\xf6\\u2713\\U0001f600\n"), ("--json", '"\\u00f6\\u2713\\ud83d\\ude00"}\n')],
)
def test_tail_to_an_output_that_is_not_of_unicode(option: str, told: str) -> None:
    with (
        answering(STREAM + "data: \u00f6\u2713\U0001f600\n\n".encode()) as (url, _),
        command("tail", url, "--count", "1", option, variables={"PYTHONIOENCODING": "ascii"}) as process,
    ):
        out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert out.endswith(told)


def test_tail_finds_a_connection_dead(running: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tail", f"{running}/channels/quiet", "--timeout", "0.1", "--no-reconnect"]) == 1
    assert last_line(capsys) == "asgi-sse: error: the connection failed: timed out"


def test_tail_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    events = b"id: 1\ndata: {}\n\nevent: b\ndata: \xc3\xb6\ndata: \x1b\n\nevent: c\ndata: 3\n\nevent: b\ndata: 4\n\n"
    with answering(STREAM + events) as (url, _):
        assert main(["tail", url, "--json", "--count", "4"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines == [
            {"id": "1", "event": "message", "data": "{}"},
            {"id": "1", "event": "b", "data": "ö\n\x1b"},
            {"id": "1", "event": "c", "data": "3"},
            {"id": "1", "event": "b", "data": "4"},
        ]
        assert main(["tail", url, "--event", "c", "--event", "b", "--count", "3"]) == 0
        assert capsys.readouterr().out == "[b] ö\n\x1b\n[c] 3\n[b] 4\n"


def test_tail_of_an_answer_to_a_post(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("hello")
    with answering(STREAM + b"data: hi\n\n") as (url, asked):
        assert main(["tail", url, "--data", '{"a": 1}', "-H", "X-A: ö", "-H", "x-a: 2"]) == 0
        assert main(["tail", url, "--data", f"@{prompt}"]) == 0
        assert main(["tail", url, "--data", "x", "-H", "content-type: a/b", "--method", "put"]) == 0
        assert main(["tail", url, "--data", f"@{tmp_path}/none"]) == 1
    assert last_line(capsys).endswith("none: No such file or directory")
    assert [request.partition(" ")[0] for request in asked] == ["POST", "POST", "PUT"]
    assert [request.partition("\r\n\r\n")[2] for request in asked] == ['{"a": 1}', "hello", "x"]
    kinds = [asked_for(request, "content-type") for request in asked]
    assert kinds == ["application/json", "text/plain; charset=utf-8", "a/b"]
    assert re.findall(r"x-a: *(.*?)\r", asked[0], re.IGNORECASE) == ["ö", "2"]


def test_tail_repeats_a_post_when_it_is_told_to(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(STREAM + b"retry: 1\ndata: hi\n\n", GONE) as (url, asked):
        assert main(["tail", url, "--data", "x", "--reconnect"]) == 0
    assert len(asked) == 2
    assert capsys.readouterr().out == "hi\n"


def test_tail_does_not_tell_its_secret_to_another_origin() -> None:
    with answering(STREAM + b"data: x\n\n") as (other, asked_other):
        moved = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {other}/there\r\nContent-Length: 0\r\n\r\n".encode()
        with answering(moved) as (url, asked):
            assert main(["tail", url, "-H", "Authorization: Bearer secret", "--count", "1"]) == 0
    assert asked_for(asked[0], "authorization") == "Bearer secret"
    assert asked_other[0].startswith("GET /there ")
    assert "secret" not in asked_other[0]


def test_tail_tells_more(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(STREAM + b": \x1b[2Jhi\r\nretry: 5\r\ndata: :x\r\n\r\n") as (url, _):
        assert main(["tail", url, "-v", "--no-reconnect"]) == 0
    out, error = capsys.readouterr()
    assert out == ":x\n"
    told = [line.removeprefix("asgi-sse: ") for line in error.splitlines()]
    assert told == [f"connected to {url}", ": \\u001b[2Jhi", "retry: 5", "the stream has ended"]


def test_tail_is_safe_for_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evil = b"event: \x1b]0;owned\x07\ndata: a\tb\x1b[2J\xc2\x9b31m\xe2\x80\xae\x00\n\n"
    with answering(STREAM + evil) as (url, _):
        text = shown_by_a_terminal("tail", url, "--count", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(["tail", url, "--json", "--count", "1"]) == 0
        line = capsys.readouterr().out.encode()
    for shown in (text, line):
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80\xae", shown)
    assert text.decode() == "[\\u001b]0;owned\\u0007] a\tb\\u001b[2J\\u009b31m\\u202e\\u0000\r\n"
    assert json.loads(line)["data"] == "a\tb\x1b[2J\x9b31m\u202e\0"


def shown_by_a_terminal(*arguments: str) -> bytes:
    """The first line that the command prints to one."""
    ours, its = pty.openpty()
    shown = b""
    try:
        with command(*arguments, stdout=its) as process:
            os.close(its)
            while not shown.endswith(b"\n"):
                shown += os.read(ours, 4096)
            assert process.wait(ENOUGH) == 0
    finally:
        os.close(ours)
    return shown


def test_tail_into_a_pipe_that_closes_and_until_ctrl_c(running: str) -> None:
    def publish(data: str) -> None:
        headers = {"authorization": "Bearer secret"}
        url = f"{running}/channels/pipe"
        assert httpx.post(url, content=data, headers=headers, trust_env=False, timeout=ENOUGH).is_success

    arguments = ("tail", "-v", f"{running}/channels/pipe")
    with command(*arguments) as process, command(*arguments) as interrupted:
        for one in (process, interrupted):
            assert one.stderr is not None
            assert "connected" in one.stderr.readline()
        publish("one")
        assert process.stdout is not None
        assert process.stdout.readline() == "one\n"
        process.stdout.close()
        publish("two")
        assert process.wait(ENOUGH) == 141
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(ENOUGH) == 130
        for one in (process, interrupted):
            assert one.stderr is not None
            assert re.sub("asgi-sse: .*\n", "", one.stderr.read()) == ""


# bench


def test_bench(running: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"{running}/channels/bench"
    options = [
        "--connections",
        "30",
        "--rate",
        "1000",
        "--duration",
        "0.5",
        "--publish-rate",
        "20",
        "--publish",
        "secret",
    ]
    assert main(["bench", url, *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["connections"] == {"asked": 30, "begun": 30, "opened": 30, "failed": 0}
    assert result["errors"] == {}
    published = result["published"]
    assert 1 <= published <= 20 * result["seconds"] + 2
    assert result["delivered"] == result["expected"] == published * 30
    assert 0 < result["events"] <= published * 30
    assert result["bytes"] > result["events"] * 50
    times = result["milliseconds"]
    assert set(times) == {"head", "first_event", "spread", "delivery", "publish_answer"}
    for summary in times.values():
        assert 0 < summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["max"] < 1000 * ENOUGH
    assert times["spread"]["max"] < times["delivery"]["max"]

    assert main(["bench", url, *options[:6]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("connections     30 of 30 opened, 0 failed\n")
    assert "\nhead " in out
    assert "of a core" in out


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", "cut by the server"),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "answered 503"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", "no event stream: text/html"),
        (STREAM.replace(b"\r\n", b"\r\nContent-Encoding: gzip\r\n", 1), "encoded as gzip"),
        (STREAM + b"data: x\n\n", "ended by the server"),
        (CHUNKED + b"5\r\nda", "cut by the server"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
    ],
)
def test_bench_counts_errors_by_kind(answer: bytes, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(answer) as (url, _):
        assert main(["bench", url, "--connections", "3", "--duration", "0.2", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["connections"]["failed"] == 3
    ((told, number),) = result["errors"].items()
    assert (told.startswith(kind), number) == (True, 3)


def test_bench_of_nothing(running: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "http://127.0.0.1:1/", "--connections", "3", "--duration", "60"]) == 1
    assert "failed          3: connection refused\n" in capsys.readouterr().out
    assert main(["bench", "http://a..b/"]) == 1
    assert last_line(capsys).startswith("asgi-sse: error: a..b is not known: ")
    assert main(["bench", "http://127.0.0.1:1/", "-H", "a b: c"]) == 1
    assert last_line(capsys) == "asgi-sse: error: the request cannot be made: Illegal header name b'a b'"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        assert main(["bench", url, "--connections", "2", "--duration", "60", "--timeout", "0.2"]) == 1
    assert "failed          2: timed out\n" in capsys.readouterr().out
    url = f"{running}/channels/bench"
    options = ["--connections", "1", "--duration", "0.3", "--publish", "wrong", "--publish-rate", "5"]
    assert main(["bench", url, *options]) == 1
    out = capsys.readouterr().out
    assert "1 of 1 opened, 0 failed" in out
    assert "publishing: answered 401" in out
    assert main(["bench", url, "--connections", "100000000"]) == 1
    assert re.search(r"100000000 connections need 100000100 open files, and .*ulimit", last_line(capsys))


def test_bench_shows_how_far_it_is_and_stops_at_ctrl_c(running: str) -> None:
    ours, its = pty.openpty()
    given = [sys.executable, "-m", "asgi_sse", "bench", f"{running}/channels/bench", "--connections", "2", "--json"]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=its, env=OWN, text=True) as process:
        os.close(its)
        try:
            shown = b""
            while b"2 of 2 read" not in shown:
                shown += os.read(ours, 4096)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=ENOUGH)
        finally:
            process.kill()
            os.close(ours)
    assert process.returncode == 130
    assert json.loads(out)["connections"]["opened"] == 2
    assert b"[#" in shown or b"[-" in shown


@pytest.mark.parametrize(
    "options",
    [
        ["--connections", "2", "--rate", "0.01"],  # it waits for the next connection
        ["--connections", "1", "--publish-rate", "50", "--timeout", "600"],  # it waits for what is never answered
    ],
)
def test_bench_ends_at_ctrl_c_wherever_it_is(options: list[str]) -> None:
    waiting = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            """One stream, on which nothing comes; what is posted is not answered."""
            posted = self.request.recv(65_536).startswith(b"POST")
            if not posted:
                self.request.sendall(STREAM)
            if posted == ("--publish-rate" in options):
                waiting.set()
            while self.request.recv(65_536):
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            with command("bench", url, "--duration", "600", "--json", *options) as process:
                assert waiting.wait(ENOUGH), process.communicate()
                process.send_signal(signal.SIGINT)
                out, error = process.communicate()
        finally:
            server.shutdown()
            thread.join()
    assert (process.returncode, error) == (130, "")
    result = json.loads(out)
    assert result["seconds"] < ENOUGH
    assert list(result["errors"]) == ["publishing: not answered before the end"] * ("--publish-rate" in options)
