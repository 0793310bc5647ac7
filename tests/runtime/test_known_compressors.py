"""Which compressors of an app are warned about: by their version, and wherever the app holds them."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_sse import EventSourceResponse, SSEMiddleware
from asgi_sse.testing import open_stream

pytestmark = pytest.mark.anyio


async def inner_app(scope: Any, receive: Any, send: Any) -> None:
    await EventSourceResponse(["a"])(scope, receive, send)


class Wrapper:
    """A middleware that only passes requests on."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


def middleware_named(name: str) -> type[Wrapper]:
    """Return a middleware class with this full name, as if its package were installed."""
    module, _, class_name = name.rpartition(".")
    return type(class_name, (Wrapper,), {"__module__": module, "__qualname__": class_name})


BROTLI = middleware_named("brotli_asgi.BrotliMiddleware")


async def messages_of(app: SSEMiddleware, caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """Return what is logged about compressors when the app answers its first request."""
    caplog.set_level(logging.DEBUG, "asgi_sse.runtime.compressors")
    async with open_stream(app) as stream:
        assert (await stream.receive()).data == "a"
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "asgi_sse.runtime.compressors" and record.levelno >= level
    ]


@pytest.mark.parametrize(
    ("middleware", "package", "version", "cure"),
    [
        ("starlette.middleware.gzip.GZipMiddleware", "starlette", "0.45.3", "upgrade Starlette to 0.46 or later"),
        ("starlette.middleware.gzip.GZipMiddleware", "starlette", "0.46.0", None),
        ("starlette.middleware.gzip.GZipMiddleware", "starlette", "1.0.0rc1", None),
        ("asgi_gzip.asgi_gzip.GZipMiddleware", "asgi-gzip", "0.2", "upgrade asgi-gzip to 0.3 or later"),
        ("asgi_gzip.GZipMiddleware", "asgi-gzip", "0.3", None),
        ("starlette_compress.CompressMiddleware", "starlette-compress", "1.9.1", None),
        ("starlette_compress.CompressMiddleware", "starlette-compress", "2.0.0", "remove_compress_type"),
        ("asgi_compression.middleware.CompressionMiddleware", "asgi-compression", "0.1", None),
        ("zstd_asgi.ZstdMiddleware", "zstd-asgi", "0.1", "excluded_handlers"),
    ],
)
async def test_known_compressor_is_warned_about_in_the_versions_that_delay_events(
    middleware: str,
    package: str,
    version: str,
    cure: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = await messages_of(SSEMiddleware(middleware_named(middleware)(inner_app)), caplog)
    if cure is None:
        assert found == []
    else:
        (message,) = found
        assert message.startswith(f"{middleware} (app) compresses event streams")
        assert cure in message


async def test_known_compressor_of_unknown_version_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """A copy of its code in another project has no version."""
    copied = middleware_named("asgi_gzip.GZipMiddleware")
    (message,) = await messages_of(SSEMiddleware(copied(inner_app)), caplog)
    assert message.startswith("asgi_gzip.GZipMiddleware (app) compresses event streams")


@pytest.mark.parametrize(
    ("mode", "policy"),
    [
        ("bypass", "SSEMiddleware routes requests that accept text/event-stream past it."),
        ("refuse", "SSEMiddleware refuses the streams that it has compressed."),
    ],
)
async def test_warning_says_what_the_middleware_does_about_it(
    mode: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = await messages_of(SSEMiddleware(BROTLI(inner_app), compressors=mode), caplog)
    assert policy in message


async def test_subclass_of_a_known_compressor_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    class Tuned(BROTLI):  # type: ignore[misc, valid-type]
        """A compressor of the user, with other settings."""

    (message,) = await messages_of(SSEMiddleware(Tuned(inner_app)), caplog)
    assert message.startswith("brotli_asgi.BrotliMiddleware (app) compresses event streams")


def in_a_partial(app: Any) -> Any:
    async def call(inner: Any, scope: Any, receive: Any, send: Any, *, unused: Any = None) -> None:
        await inner(scope, receive, send)

    return functools.partial(call, app, unused=1)


def in_a_closure_that_is_not_filled(app: Any) -> Any:
    async def call(scope: Any, receive: Any, send: Any) -> None:
        if scope is None:
            print(later)
        await app(scope, receive, send)

    if app is None:
        later = 1
    return call


def in_a_bound_method(app: Any) -> Any:
    return Wrapper(app).__call__


def beside_an_attribute_that_raises(app: Any) -> Any:
    class NotReady(Wrapper):
        @property
        def middleware_stack(self) -> Any:
            raise RuntimeError("the app has not started")

    return NotReady(app)


@pytest.mark.parametrize(
    "hold", [in_a_partial, in_a_closure_that_is_not_filled, in_a_bound_method, beside_an_attribute_that_raises]
)
async def test_compressor_is_found_wherever_the_app_holds_it(
    hold: Callable[[Any], Any], caplog: pytest.LogCaptureFixture
) -> None:
    (message,) = await messages_of(SSEMiddleware(hold(BROTLI(inner_app))), caplog)
    assert message.startswith("brotli_asgi.BrotliMiddleware (app")


async def test_app_that_cannot_be_searched_is_served_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class LazyRoutes(dict[str, Any]):
        def items(self) -> Any:
            raise LookupError("no database yet")

    app = Wrapper(inner_app)
    app.routes = LazyRoutes()  # type: ignore[attr-defined]
    (message,) = await messages_of(SSEMiddleware(app), caplog, logging.DEBUG)
    assert message == "cannot search for compressors in a Wrapper"
