"""`SSEMiddleware` around an app of every framework, on real servers.

The tests run a sample of the frameworks, or all of them if ``ASGI_SSE_FRAMEWORKS`` is ``full``.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from framework_apps import INSIDE
from stopping import TERM, Client, Row, Run, check, hypercorn, starting, uvicorn

FULL = os.environ.get("ASGI_SSE_FRAMEWORKS") == "full"
APPS = [f"wrapped_{name}" for name in sorted(INSIDE)] + [
    f"{name}_is_around" for name in ("sentry", "opentelemetry", "base_http")
]
SAMPLE = ["wrapped_starlette", "wrapped_base_http", "base_http_is_around"]
SERVERS: dict[str, Row] = {"uvicorn": uvicorn(trigger=TERM), "hypercorn": hypercorn(trigger=TERM)}


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[[Row], Run]]:
    with starting(tmp_path) as start:
        yield start


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("app", APPS if FULL else SAMPLE)
def test_framework_streams_and_stops(app: str, server: str, runs: Callable[[Row], Run]) -> None:
    has_hooks = "django" not in app
    # After the colon, hypercorn evaluates an expression, and uvicorn looks up a name.
    inner = app.removeprefix("wrapped_")
    expression = f"wrapped({inner}())" if inner != app else f"{app.removesuffix('_is_around')}_around()"
    name = app if server == "uvicorn" else expression
    row = replace(SERVERS[server], app=f"framework_apps:{name}", finals=None, lifespan=False)
    run = runs(row)
    assert httpx.get(f"http://127.0.0.1:{run.port}/page").text == "a page " * 1000
    assert httpx.get(f"http://127.0.0.1:{run.port}/nowhere").status_code == 404

    leaving = Client(run.port, "/stream", raw=True)
    head, _, body = bytes(leaving.body).partition(b"\r\n\r\n")
    assert b"x-accel-buffering: no" in head.lower()
    run.wait_until(
        lambda: b": ping\n\n" in leaving.body and b"data: 1\n\n" in leaving.body,
        20,
        "the stream received no keep-alive",
    )
    assert (
        bytes(leaving.body).index(b"data: 0")
        < bytes(leaving.body).index(b": ping")
        < bytes(leaving.body).index(b"data: 1")
    )
    assert body
    leaving.disconnect()
    run.wait_until(
        lambda: run.noted("finally of the app's stream") == 1, 20, "the disconnect did not reach the generator"
    )

    clients = [Client(run.port, "/ours"), Client(run.port, "/stream")]
    check(f"{server}: {app}", row, run, clients)
    assert run.noted("finally of the app's stream") == 2
    assert run.noted("finally") == 1
    if has_hooks:
        notes = run.notes.read_text().splitlines()
        assert (notes[0], notes[-1]) == ("the app starts", "the app stops")
