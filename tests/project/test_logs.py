"""Log records: their loggers, their fields, and that they contain no data of streams."""

import ast
import json
import logging
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import asgi_sse
from asgi_sse import (
    Broker,
    BrokerError,
    EventSourceResponse,
    HTTPError,
    InvalidEventError,
    Request,
    SendTimeoutError,
    ServerSentEvent,
    SSEMiddleware,
    StreamRegistry,
    create_app,
)
from asgi_sse.broker.backends import codec as wire
from asgi_sse.testing import open_stream

PACKAGE = Path(asgi_sse.__file__).parent
PAGE = PACKAGE.parent / "docs" / "pages" / "guides" / "observe.md"
FILES = sorted(PACKAGE.rglob("*.py"))
MARK = "sEcReT-7f3a"


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name.startswith("sse_")}


def end_records(records: list[logging.LogRecord]) -> list[dict[str, Any]]:
    return [fields(record) for record in records if " ended: " in record.getMessage()]


# Loggers and fields


def logging_calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in ("logger", "logging"):
                yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_uses_the_logger_of_its_name(path: Path) -> None:
    for call in logging_calls(path):
        assert isinstance(call.func, ast.Attribute)
        if call.func.attr == "getLogger":
            assert ast.unparse(call) == "logging.getLogger(__name__)"
        elif call.func.attr == "basicConfig":
            assert (
                path == PACKAGE / "cli" / "commands" / "serve.py"
            )  # a command is an application, which configures logging
        else:
            assert isinstance(call.func.value, ast.Name)
            assert call.func.value.id == "logger", f"{ast.unparse(call)} must use the logger of the module"


@pytest.mark.skipif(not PAGE.exists(), reason="an sdist has no pages")
def test_documentation_lists_each_field() -> None:
    used = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("sse_"):
                used.add(node.value)
    documented = {line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `sse_")}
    assert documented == used


# The end of a stream


@pytest.mark.anyio
async def test_end_of_a_stream_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")
    registry = StreamRegistry()

    async def three() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}"
            await anyio.sleep(1)

    async with open_stream(EventSourceResponse(three(), registry=registry), "/three") as stream:
        assert len([event async for event in stream]) == 3
    (end,) = end_records(caplog.records)
    assert end.pop("sse_seconds") == pytest.approx(3, abs=0.1)
    size = registry.statistics().bytes
    assert end == {"sse_path": "/three", "sse_reason": "finished", "sse_events": 3, "sse_bytes": size}
    (record,) = (record for record in caplog.records if " ended: " in record.getMessage())
    assert (record.name, record.levelname) == ("asgi_sse.stream.registry", "DEBUG")
    assert record.getMessage() == f"stream /three ended: finished after 3.0 s, 3 events, {size} bytes"


@pytest.mark.anyio
async def test_drain_is_logged_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    registry = StreamRegistry()
    async with open_stream(EventSourceResponse(raises_in_its_clean_up(), registry=registry)) as stream:
        await stream.receive()
        with pytest.raises(OwnError):
            await registry.drain()
            await stream.receive()
    (record,) = (record for record in caplog.records if "drained" in record.getMessage())
    found = fields(record)
    assert found.pop("sse_seconds") < 1
    assert found == {"sse_streams": 1, "sse_cause": "drain()"}


@pytest.mark.anyio
async def test_ordinary_stream_logs_nothing_above_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "asgi_sse")
    async with open_stream(EventSourceResponse(["x"])) as stream:
        assert len([event async for event in stream]) == 1
    assert not caplog.records


# No data of streams


def assert_no_mark(records: list[logging.LogRecord]) -> None:
    """Check that only the text of the app's own exceptions contains the mark."""
    for record in records:
        attributes = {name: value for name, value in vars(record).items() if name not in ("exc_info", "exc_text")}
        assert MARK not in record.getMessage()
        assert MARK not in repr(attributes)
        if record.exc_info and record.exc_info[1] is not None:
            for error in chain_of(record.exc_info[1]):
                assert isinstance(error, OwnError) or MARK not in "".join(traceback.format_exception_only(error))


def chain_of(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


class OwnError(Exception):
    """An exception of the app, which may contain anything."""


async def request_with_marks(app: Any, path: str = "/", **options: Any) -> None:
    """Read a stream as a client that sends the mark in every part of its request except the path."""
    headers = {"cookie": f"session={MARK}", "authorization": f"Bearer {MARK}", "last-event-id": MARK}
    try:
        async with open_stream(app, f"{path}?token={MARK}", headers=headers.items(), **options) as stream:
            with anyio.move_on_after(40):
                async for _ in stream:
                    pass
    except (OwnError, HTTPError, InvalidEventError, TimeoutError):
        pass


async def raises() -> AsyncIterator[str]:
    yield MARK
    raise OwnError(MARK)


async def raises_twice() -> AsyncIterator[str]:
    try:
        yield MARK
        raise OwnError(MARK)
    finally:
        raise OwnError("in the clean-up")


async def never_cleans_up() -> AsyncIterator[str]:
    try:
        yield MARK
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(50)


async def raises_in_its_clean_up() -> AsyncIterator[str]:
    try:
        yield MARK
        await anyio.sleep_forever()
    finally:
        raise OwnError(MARK)


async def reads_the_body(request: Request) -> AsyncIterator[str]:
    await request.body()
    yield MARK
    raise OwnError(MARK)


async def never_waits() -> AsyncIterator[str]:
    while True:
        yield MARK * 10_000


def raising_hook(*_: Any) -> Any:
    raise OwnError(MARK)


def responds(source: Any, **options: Any) -> Any:
    async def endpoint(request: Request) -> EventSourceResponse:
        return EventSourceResponse(source(), **options)

    return endpoint


@pytest.mark.anyio
async def test_records_of_failures_contain_no_data(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")
    broker = Broker(on_join=raising_hook, on_leave=raising_hook)

    async def run(request: Request) -> Any:
        return await broker.run("job", raises(), on_end=raising_hook)

    app = create_app(
        {
            "/raises": raises,
            "/twice": raises_twice,
            "/on-error": responds(raises, on_error=raising_hook),
            "/never": responds(never_cleans_up, cleanup_timeout=0.1, max_lifetime=1),
            "/ended": responds(raises_in_its_clean_up, max_lifetime=1),
            "/slow": responds(never_waits, send_timeout=1),
            "/body": reads_the_body,
            "/run": run,
            "/news": broker.channel("news"),
        },
        broker=broker,
    )
    for path in ("/raises", "/twice", "/on-error", "/never", "/ended", "/run"):
        await request_with_marks(app, path)
    await request_with_marks(app, "/body", method="POST", body=MARK.encode())
    with pytest.raises(SendTimeoutError, match="the client of /slow read nothing"):
        async with open_stream(app, "/slow", capacity=1):
            await anyio.sleep(5)
    async with open_stream(app, "/news", headers={"last-event-id": MARK}) as stream:
        assert (await stream.receive()).event == "reset"
        broker.publish_nowait("news", MARK)
        assert (await stream.receive()).data == MARK
    text = " ".join(record.getMessage() for record in caplog.records)
    for expected in (
        "the source of run job raised",
        "on_end of run job raised",
        "on_error of /on-error raised",
        "the source of /never was not cleaned up",
        "on_join of a subscription of news raised",
        "/twice ended: failed",
        "/slow ended: timed_out",
        "/ended ended: expired",
    ):
        assert expected in text, expected
    assert_no_mark(caplog.records)


@pytest.mark.anyio
async def test_records_of_adopted_streams_contain_no_data(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "asgi_sse")

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": f"data: {MARK}\n\n".encode(), "more_body": True})
        raise OwnError(MARK)

    async def compressed(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": MARK.encode()})

    for app in (fails, compressed):
        for compressors in ("bypass", "refuse"):
            await request_with_marks(SSEMiddleware(app, compressors=compressors))
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "stream / ended: failed" in text
    assert "left the app gzip-encoded" in text
    assert_no_mark(caplog.records)


@pytest.mark.parametrize(
    "payload",
    [
        MARK.encode(),
        json.dumps([MARK]).encode(),
        json.dumps({"id": MARK}).encode(),
        json.dumps({MARK: MARK}).encode(),
        json.dumps({"data": MARK, "event": f"{MARK}\n"}).encode(),
        json.dumps({"data": MARK, "event": "ok", "retry": MARK}).encode(),
        json.dumps({"data": MARK, "end": [MARK]}).encode(),
        json.dumps({"event": MARK}).encode(),
        MARK.encode() + b"\xff",
        b"[" * 100_000,
    ],
    ids=range(10),
)
def test_error_of_a_publication_does_not_contain_it(payload: bytes) -> None:
    with pytest.raises(InvalidEventError, match=rf"^payload of {len(payload)} bytes(:| must be) ") as info:
        wire.load(payload)
    for error in chain_of(info.value):
        assert MARK not in str(error)


def test_error_of_a_publication_names_the_field() -> None:
    with pytest.raises(InvalidEventError, match="does not accept this value of retry"):
        wire.load(json.dumps({"data": "x", "event": "ok", "retry": -1}).encode())
    assert wire.load(wire.dump(ServerSentEvent("x", event="ok"), "finished"))[1] == "finished"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{MARK}@localhost:1/0",
        f"redis://localhost:1/0?password={MARK}",
        f"redis+sentinel://:{MARK}@localhost:1/main/0?sentinel_password={MARK}",
        f"nats://user:{MARK}@localhost:1",
        f"nats://{MARK}@localhost:1",
        f"nats://{MARK}@one:1,two:2",
    ],
)
def test_error_of_a_backend_does_not_contain_its_password(url: str) -> None:
    pytest.importorskip("redis" if url.startswith("redis") else "nats")
    with pytest.raises(BrokerError, match=r"localhost:1|one:1") as info:
        Broker(url).subscribe("a")
    assert MARK not in str(info.value)
