"""The page on proxies: nginx and Caddy run with exactly its settings, in front of a real server."""

import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trustme
from pages import Browser
from serving import ROOT, address, free_port, serving

from asgi_sse import EventDecoder, ServerSentEvent

PAGE = ROOT / "docs/pages/guides/proxies.md"
TIMEOUT_S = 60.0  # for each single step, on a slow machine; no test waits for it to pass

if not PAGE.exists():
    pytest.skip("the repository is not next to the tests", allow_module_level=True)


def settings_of_the_page(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE.name} has no settings for {language}"
    return found[1]


def with_ports(settings: str, listen: str, port: str, upstream: int) -> str:
    """Return the settings with other addresses, and otherwise unchanged."""
    assert listen in settings, settings
    assert "127.0.0.1:8000" in settings, settings
    return settings.replace(listen, port).replace("127.0.0.1:8000", f"127.0.0.1:{upstream}")


def nginx(directory: Path, port: int, upstream: int, settings: str) -> list[str]:
    binary = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if binary is None:
        pytest.skip("nginx is not installed")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
    server = with_ports(settings, "listen 80;", f"listen 127.0.0.1:{port};", upstream)
    (directory / "nginx.conf").write_text(
        f"daemon off;\nworker_shutdown_timeout 1s;\npid {directory}/pid;\nerror_log {directory}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}{server}}}\n"
    )
    return [binary, "-p", str(directory), "-e", f"{directory}/error.log", "-c", f"{directory}/nginx.conf"]


def caddy(directory: Path, port: int, upstream: int, settings: str) -> list[str]:
    binary = shutil.which("caddy")
    if binary is None:
        pytest.skip("caddy is not installed")
    site = with_ports(settings, ":80 {", f"http://127.0.0.1:{port} {{", upstream)
    (directory / "Caddyfile").write_text(f"{{\nadmin off\nauto_https off\ngrace_period 1ms\n}}\n{site}")
    return [binary, "run", "--config", f"{directory}/Caddyfile", "--adapter", "caddyfile"]


PLAIN_NGINX = "server {\n listen 80;\n location / { proxy_pass http://127.0.0.1:8000; }\n}\n"
GZIP = "gzip on;\ngzip_types text/event-stream;\ngzip_min_length 0;\ngzip_proxied any;\n"
IGNORE_HEADER = "proxy_ignore_headers X-Accel-Buffering;\n"
PLAIN_CADDY = ":80 {\n reverse_proxy 127.0.0.1:8000\n}\n"

Proxy = tuple[Callable[[Path, int, int, str], list[str]], Callable[[], str]]
PAGE_NGINX: Proxy = (nginx, lambda: settings_of_the_page("nginx"))
PAGE_CADDY: Proxy = (caddy, lambda: settings_of_the_page("caddyfile"))
WORKING: dict[str, Proxy] = {
    "nginx": PAGE_NGINX,
    "nginx that would compress streams": (nginx, lambda: GZIP + settings_of_the_page("nginx")),
    "nginx with defaults": (nginx, lambda: PLAIN_NGINX),
    "nginx with defaults and gzip": (nginx, lambda: GZIP + PLAIN_NGINX),
    "caddy": PAGE_CADDY,
    "caddy with defaults": (caddy, lambda: PLAIN_CADDY),
}


class Client:
    """An HTTP client of one address."""

    def __init__(self, port: int, timeout: float = TIMEOUT_S, server: subprocess.Popen[bytes] | None = None) -> None:
        self.server = server
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            timeout=timeout,
            trust_env=False,
            headers={"Accept": "text/event-stream", "Accept-Encoding": "gzip"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @contextmanager
    def stream(self, path: str, method: str = "GET", **request: Any) -> Iterator[tuple[httpx.Headers, Iterator[bytes]]]:
        with self.http.stream(method, path, **request) as response:
            assert response.status_code == 200, response.read()
            yield response.headers, response.iter_bytes()

    @contextmanager
    def events(self, path: str, method: str = "GET", **request: Any) -> Iterator[Iterator[ServerSentEvent]]:
        def decode(chunks: Iterator[bytes]) -> Iterator[ServerSentEvent]:
            decoder = EventDecoder()
            for chunk in chunks:
                yield from decoder.feed(chunk)

        with self.stream(path, method, **request) as (_, chunks):
            yield decode(chunks)

    def publish(self, channel: str, data: str) -> None:
        assert self.http.post(f"/publish/{channel}", content=data).status_code == 204

    def subscribers(self, channel: str) -> str | None:
        (event,) = EventDecoder().feed(self.http.get(f"/subscribers/{channel}").content)
        return event.data if isinstance(event.data, str) else None

    def wait_for_no_subscribers(self, channel: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.subscribers(channel) != "0":
            assert time.monotonic() < deadline, "the client has left, but the app was not told"
            time.sleep(0.02)


@contextmanager
def app(port: int, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [sys.executable, "-m", "uvicorn", "--log-level=warning", *address("uvicorn", port), "proxy_app:app"]
    with serving(arguments, port, directory / "app.log") as process:
        yield process


@contextmanager
def proxied(proxy: Proxy, upstream: int, directory: Path, timeout: float = TIMEOUT_S) -> Iterator[Client]:
    make, settings = proxy
    port = free_port()
    variables = {"XDG_CONFIG_HOME": str(directory), "XDG_DATA_HOME": str(directory)}  # for Caddy
    arguments = make(directory, port, upstream, settings())
    with (
        serving(arguments, port, directory / "proxy.log", variables=variables) as server,
        Client(port, timeout, server) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with app(port, tmp_path_factory.mktemp("app")):
        yield port


@pytest.fixture
def direct(upstream: int) -> Iterator[Client]:
    with Client(upstream) as client:
        yield client


@pytest.mark.parametrize("name", WORKING)
def test_events_disconnects_resume_and_post_pass_through(
    name: str, upstream: int, direct: Client, tmp_path: Path
) -> None:
    channel = re.sub(r"\W", "-", name)
    with proxied(WORKING[name], upstream, tmp_path) as client:
        with client.events(f"/events/of/{channel}") as events:
            seen = []
            for data in ("one", "two " * 1000, "three"):  # each arrives before the next one is published
                direct.publish(channel, data)
                seen.append(next(events))
                assert seen[-1].data == data
            assert direct.subscribers(channel) == "1"
        direct.wait_for_no_subscribers(channel)
        direct.publish(channel, "missed")
        with client.events(f"/events/of/{channel}", headers={"Last-Event-ID": str(seen[0].id)}) as events:
            assert [next(events).data for _ in range(3)] == ["two " * 1000, "three", "missed"]
            direct.publish(channel, "live")
            assert next(events).data == "live"
        with client.events("/events/answer", "POST", content=b"tokens by POST") as events:
            assert [event.data for event in events] == ["tokens", "by", "POST", "[DONE]"]


@pytest.mark.parametrize("name", ["nginx that would compress streams", "caddy"])
def test_settings_of_the_page_never_compress_streams(name: str, upstream: int, tmp_path: Path) -> None:
    with proxied(WORKING[name], upstream, tmp_path) as client:
        for path in ("/events", "/events/answer"):  # the first one must not be redirected either
            with client.stream(path, "POST", content=b"long" * 1000) as (headers, _):
                assert "content-encoding" not in headers


@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_settings_that_the_page_warns_about_delay_events(name: str, upstream: int, tmp_path: Path) -> None:
    """An event does not pass through until the stream ends or a buffer is full."""
    buffering: Proxy = (nginx, lambda: IGNORE_HEADER + GZIP + PLAIN_NGINX)
    compressing: Proxy = (caddy, lambda: PLAIN_CADDY.replace(":80 {", ":80 {\n encode gzip"))
    with (
        proxied(buffering if name == "nginx" else compressing, upstream, tmp_path, timeout=0.5) as client,
        pytest.raises(httpx.ReadTimeout),
        client.events("/events/replay") as events,
    ):
        next(events)


def test_caddy_with_flush_interval_hides_the_disconnect(upstream: int, direct: Client, tmp_path: Path) -> None:
    eager: Proxy = (caddy, lambda: ":80 {\n reverse_proxy 127.0.0.1:8000 {\n flush_interval -1\n }\n}\n")
    binary = shutil.which("caddy")
    if binary is None or not subprocess.check_output([binary, "version"], text=True).startswith(("2.6", "v2.6")):
        pytest.skip("only Caddy 2.6 is known to do this")
    with proxied(eager, upstream, tmp_path) as client:
        with client.events("/events/of/eager") as events:
            direct.publish("eager", "one")
            next(events)
        for data in ("two", "three", "four"):
            direct.publish("eager", data)
        assert direct.subscribers("eager") == "1"
    direct.wait_for_no_subscribers("eager")  # Caddy has ended


def test_keep_alives_keep_a_silent_stream_open(upstream: int, tmp_path: Path) -> None:
    def with_ping() -> None:
        received = b""
        with client.stream("/events/silent?ping=0.2") as (_, chunks):
            while received.count(b"\n:") < 12:  # after 2.4 s; the timeout of nginx is 2 s
                received += next(chunks)

    def without_ping() -> None:
        with (
            pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
            client.events("/events/silent?ping=0") as events,
        ):
            assert [event.data for event in events] == ["the only event"]

    assert "proxy_read_timeout 60s;" in settings_of_the_page("nginx")
    shorter: Proxy = (nginx, lambda: settings_of_the_page("nginx").replace("read_timeout 60s", "read_timeout 2s"))
    with proxied(shorter, upstream, tmp_path) as client, ThreadPoolExecutor() as pool:
        for done in [pool.submit(with_ping), pool.submit(without_ping)]:
            done.result()


def test_browser_reconnects_while_the_app_is_down(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium is installed")
    pytest.importorskip("playwright")
    shorter: Proxy = (nginx, lambda: settings_of_the_page("nginx").replace("retry: 3000", "retry: 100"))
    script = """
        const source = new EventSource("events/silent?ping=15");
        source.onerror = () => console.log("reconnects", source.readyState === EventSource.CONNECTING);
        source.onmessage = (event) => { console.log(event.data); source.close(); };
    """
    port = free_port()
    with ExitStack() as stack, proxied(shorter, port, tmp_path) as client:
        browser = Browser(stack)

        def enough(logged: list[str]) -> bool:
            if logged.count("reconnects true") >= 2 and not started:  # twice, to exclude chance
                started.append(stack.enter_context(app(port, tmp_path)))
            return "the only event" in logged

        started: list[object] = []
        logged = browser.run(script, str(client.http.base_url), enough)
        assert {*logged} <= {"reconnects true", "the only event"}
        assert logged[-1] == "the only event"


def test_ten_streams_share_one_http2_connection(upstream: int, direct: Client, tmp_path: Path) -> None:
    """Ten are more than the six connections that a browser opens over HTTP/1.1."""

    def nginx_with_tls(directory: Path, port: int, upstream: int, settings: str) -> list[str]:
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(directory / "both.pem"))
        arguments = nginx(directory, port, upstream, settings)
        conf = (directory / "nginx.conf").read_text()
        (directory / "nginx.conf").write_text(
            conf.replace(
                f"listen 127.0.0.1:{port};",
                f"listen 127.0.0.1:{port} ssl http2; ssl_certificate both.pem; ssl_certificate_key both.pem;",
            )
        )
        return arguments

    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with proxied((nginx_with_tls, PAGE_NGINX[1]), upstream, tmp_path) as client, ExitStack() as streams:
        http = httpx.Client(
            base_url=str(client.http.base_url).replace("http:", "https:"),
            http2=True,
            verify=context,
            trust_env=False,
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=1),
        )
        streams.enter_context(http)
        bodies = []
        for _ in range(10):
            response = streams.enter_context(http.stream("GET", "/events/of/h2"))
            assert response.http_version == "HTTP/2"
            bodies.append(response.iter_bytes())
        direct.publish("h2", "for all ten")
        for body in bodies:
            received = b""
            while b"data: for all ten" not in received:
                received += next(body)
        assert direct.subscribers("h2") == "10"
    direct.wait_for_no_subscribers("h2")


def test_clients_resume_after_a_reload_of_nginx(upstream: int, direct: Client, tmp_path: Path) -> None:
    with proxied(PAGE_NGINX, upstream, tmp_path) as client:
        assert client.server is not None
        with client.events("/events/of/reload") as events:
            direct.publish("reload", "one")
            first = next(events)
            client.server.send_signal(signal.SIGHUP)
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):  # after worker_shutdown_timeout
                next(events)
        direct.publish("reload", "missed")
        with client.events("/events/of/reload", headers={"Last-Event-ID": str(first.id)}) as events:
            assert next(events).data == "missed"


@pytest.mark.parametrize("name", ["nginx", "caddy"])
def test_clients_survive_a_restart_of_the_app(name: str, tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as first_app, ThreadPoolExecutor() as pool:
        process = first_app.enter_context(app(port, tmp_path))
        with proxied(WORKING[name], port, tmp_path) as client:
            with client.stream("/events/silent?ping=0") as (_, chunks):
                received = next(chunks)
                process.terminate()
                received += b"".join(chunks)  # httpx raises if the body is cut
            times = re.findall(rb"^retry: (\d+)$", received, re.MULTILINE)
            assert 1000 <= int(times[-1]) <= 5000
            process.wait(TIMEOUT_S)
            meanwhile = pool.submit(lambda: client.http.get("/events/answer?meanwhile"))
            if name == "nginx":  # it answers, so that an EventSource reconnects
                answer = meanwhile.result()
                assert (answer.status_code, answer.content) == (200, b"retry: 3000\n\n")
                assert answer.headers["content-type"].startswith("text/event-stream")
            with app(port, tmp_path):
                if name == "caddy":  # the request waits for the app
                    assert meanwhile.result().status_code == 200
                with client.events("/events/answer", "POST", content=b"again") as events:
                    assert next(events).data == "again"
