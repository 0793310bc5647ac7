"""The hub as an app: publishing, subscribing, tokens, origins, health checks and metrics."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from asgi_sse import Broker, BrokerError, StreamRegistry
from asgi_sse.cli.hub import create_hub
from asgi_sse.testing import open_stream

TOKEN = {"authorization": "Bearer secret"}


async def post(app: Any, path: str, body: bytes | str = b"", **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Return the status, the body (parsed if it is JSON) and the headers of the response to a POST."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body.encode() if isinstance(body, str) else body
    async with open_stream(app, path, method="POST", headers=fields, body=data) as answer:
        text = (await answer.read()).decode()
    return answer.status, json.loads(text) if "json" in answer.headers["content-type"] else text, answer.headers


@pytest.mark.anyio
async def test_posted_event_reaches_subscribers_and_can_be_resumed() -> None:
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
        # The body is the data, whatever its Content-Type.
        await post(app, "/channels/news", '{"a": 1}', content_type="application/json", **TOKEN)
        assert (await one.receive()).data == '{"a": 1}'
    async with open_stream(app, f"/channels/news?last_event_id={event.id}") as stream:
        assert (await stream.receive()).data == '{"a": 1}'


@pytest.mark.anyio
async def test_json_body_sets_the_fields_of_the_event() -> None:
    app = create_hub(insecure_publish=True)
    async with open_stream(app, "/channels/a/") as response:
        assert response.status == 404
    async with open_stream(app, "/channels/a") as stream:
        await post(app, "/channels", json.dumps({"channel": "a", "data": {"b": [1, "ö"]}, "event": "c"}))
        event = await stream.receive()
        assert (event.event, event.data) == ("c", '{"b":[1,"ö"]}')
        await post(app, "/channels?event=d", json.dumps({"channel": "a", "data": "text", "retry": 5000}))
        event = await stream.receive()
        assert (event.event, event.data) == ("d", "text")


@pytest.mark.anyio
async def test_idempotency_key_publishes_once() -> None:
    app = create_hub(insecure_publish=True)
    first = await post(app, "/channels/a", "x", idempotency_key="7")
    assert await post(app, "/channels/a?idempotency_key=7", "y") == first
    assert await post(app, "/channels", json.dumps({"channel": "a", "data": "z", "idempotency_key": "7"})) == first
    assert (await post(app, "/channels/a", "x", idempotency_key="8"))[1] != first[1]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "expected"),
    [
        ("/channels/news", "x", {"authorization": ""}, 401, "Authorization: Bearer TOKEN"),
        ("/channels/news", "x", {"authorization": "Basic secret"}, 401, "Authorization: Bearer TOKEN"),
        ("/channels/news", "x", {"authorization": "Bearer secre"}, 401, "unknown"),
        ("/channels/news", "x", {"authorization": "Bearer s\u00e9cret"}, 401, "unknown"),
        ("/channels/news?token=secret", "x", {"authorization": ""}, 401, "Bearer"),
        ("/channels/news", "x", {"authorization": "Bearer reader"}, 403, "this token may not publish"),
        ("/channels/a b", "x", {}, 400, "a b"),
        ("/channels/a.*", "x", {}, 400, "a.*"),
        (
            "/channels?channel=a&channel=b",
            "x",
            {},
            400,
            "channel must be given once, got 2; publish to one channel at a time",
        ),
        ("/channels/news", b"\xff", {}, 400, "data must be UTF-8"),
        ("/channels/news?event=a%0Ab", "x", {}, 400, "line end"),
        ("/channels/news", "x", {"x-sse-event": "\u00ff"}, 400, "x-sse-event must be UTF-8"),
        ("/channels/news", "x", {"idempotency-key": "x" * 201}, 400, "idempotency_key"),
        ("/channels", "x", {}, 400, "channel is missing"),
        ("/channels", "[1]", {}, 400, "JSON object"),
        ("/channels", '{"data": "x"}', {}, 400, "channel"),
        (
            "/channels",
            '{"channel": "a", "data": "x", "id": 7}',
            {},
            400,
            "'id' is an unknown field; the body must be a JSON object with",
        ),
        (
            "/channels",
            '{"chanel": "a", "dat": "x"}',
            {},
            400,
            "'chanel' is an unknown field; the body must be a JSON object with",
        ),
        ("/channels", '{"channel": 7, "data": "x"}', {}, 400, "channel must be a string, got 7"),
        ("/channels", '{"channel": "a"}', {}, 400, "nothing to send"),
        ("/channels", '{"channel": "a", "data": "x", "retry": "soon"}', {}, 400, "at least 0, got 'soon'"),
        (
            "/channels",
            '{"channel": "a", "data": "x", "idempotency_key": 7}',
            {},
            400,
            "idempotency_key must be a str of 1 to 200 characters or None, got 7",
        ),
        ("/channels/news", "x" * 101, {}, 413, "more than 100 bytes"),
        ("/health/live", "x", {}, 405, "Method Not Allowed"),
    ],
)
async def test_invalid_post_is_refused_with_its_reason(
    path: str, body: str | bytes, headers: dict[str, str], status: int, expected: str
) -> None:
    broker = Broker()
    app = create_hub(broker, publish_tokens=["secret"], subscribe_tokens=["reader"], max_body=100)
    answer = await post(app, path, body, **{**TOKEN, **headers})
    assert answer[0] == status
    assert expected in answer[1]
    if status in (401, 403):
        assert answer[2]["www-authenticate"].startswith('Bearer realm="asgi-sse"')
    if status == 403:
        assert answer[2]["www-authenticate"].endswith('error="insufficient_scope"')
    assert broker.statistics().published == 0


@pytest.mark.anyio
async def test_publishing_is_off_without_a_token() -> None:
    status, body, _ = await post(create_hub(), "/channels/a", "x", **TOKEN)
    assert (status, body) == (
        403,
        "publishing is off; start the hub with --publish-token or --insecure-publish to turn it on",
    )
    async with open_stream(create_hub(), "/channels/a", method="PUT") as answer:
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD, POST")


@pytest.mark.anyio
async def test_insecure_publish_refuses_pages_of_unlisted_origins() -> None:
    app = create_hub(insecure_publish=True, cors=["https://example.com"])
    for origin, status in [
        ("https://evil.example", 403),
        ("null", 403),
        ("https://example.com", 201),
        ("https://hub.example", 403),  # the same name as in the Host header
    ]:
        assert (await post(app, "/channels/a", "x", origin=origin, host="hub.example"))[0] == status
    assert (await post(create_hub(insecure_publish=True), "/channels/a", "x", origin="https://example.com"))[0] == 403


@pytest.mark.anyio
async def test_environment_configures_a_hub_without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_tokens_must_fit_into_a_header(tokens: list[str]) -> None:
    with pytest.raises(ValueError, match="each token must be printable ASCII"):
        create_hub(publish_tokens=tokens)
    with pytest.raises(TypeError, match=r"\[token\]"):
        create_hub(publish_tokens="secret")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "headers", "status", "expected"),
    [
        ("/channels/a", {}, 401, "token is missing"),
        ("/channels/a", {"authorization": "Bearer reader"}, 200, ": "),
        ("/channels/a", {"authorization": "bearer  reader"}, 200, ": "),
        ("/channels/a", {"authorization": "Bearer wrong"}, 401, "this token is unknown"),
        ("/channels/a?token=reader", {}, 200, ": "),
        ("/channels/a?token=secret", {}, 403, "this token may not subscribe"),
        ("/channels/a", {"cookie": "a=b; asgi_sse_token=reader"}, 200, ": "),
        ("/channels/a", {"cookie": "asgi_sse_token=secret"}, 403, "this token may not subscribe"),
        ("/channels?token=reader", {}, 400, "channel is missing; use /channels/NAME or ?channel=NAME"),
        ("/channels?token=reader&channel=a.*", {}, 403, "no access to a.*: a pattern must be granted"),
    ],
)
async def test_subscribing_needs_a_subscribe_token(
    path: str, headers: dict[str, str], status: int, expected: str
) -> None:
    app = create_hub(publish_tokens=["secret"], subscribe_tokens=["reader"])
    async with open_stream(app, path, headers=headers) as stream:
        assert stream.status == status
        assert ("www-authenticate" in stream.headers) == (status == 401 or expected.startswith("this token"))
        assert (await stream.read()).startswith(expected.encode())


@pytest.mark.anyio
async def test_patterns_can_be_allowed() -> None:
    app = create_hub(insecure_publish=True, patterns=True)
    async with open_stream(app, "/channels/a.*") as stream, open_stream(app, "/channels") as response:
        await post(app, "/channels/a.b", "x")
        assert (await stream.receive()).data == "x"
        assert response.status == 400


@pytest.mark.anyio
async def test_cors_headers_for_listed_origins() -> None:
    app = create_hub(publish_tokens=["secret"], cors=["https://example.com"])
    preflight = {"origin": "https://example.com", "access-control-request-method": "POST"}
    async with open_stream(app, "/channels/a", method="OPTIONS", headers=preflight) as answer:
        allowed = answer.headers["access-control-allow-headers"]
        assert allowed == "Last-Event-ID, Authorization, Content-Type, Idempotency-Key, X-SSE-Event"
    async with open_stream(app, "/channels/a", headers={"origin": "https://example.com"}) as stream:
        assert stream.headers["access-control-allow-credentials"] == "true"
    app = create_hub(cors="*")
    async with open_stream(app, "/channels/a", headers={"origin": "https://example.com"}) as stream:
        assert stream.headers["access-control-allow-origin"] == "*"


@pytest.mark.anyio
async def test_finished_run_is_answered_204() -> None:
    broker = Broker()
    app = create_hub(broker)
    await (await broker.run("job", ["one"])).wait()
    async with open_stream(app, "/channels/job") as stream:
        assert (await stream.receive()).data == "one"
        last = (await stream.receive()).id
    async with open_stream(app, "/channels/job", headers={"last-event-id": str(last)}) as stream:
        assert stream.status == 204


@pytest.mark.anyio
async def test_health_checks_report_draining() -> None:
    registry = StreamRegistry()
    app = create_hub(registry=registry)

    async def check(path: str) -> tuple[int, Any]:
        async with open_stream(app, path) as answer:
            return answer.status, json.loads(await answer.read())

    assert await check("/health/live") == (200, {"live": True})
    assert await check("/health/ready") == (200, {"ready": True, "broker": "local", "draining": False})
    registry.begin_drain()
    assert await check("/health/live") == (200, {"live": True})
    assert await check("/health/ready") == (503, {"ready": False, "broker": "local", "draining": True})
    async with open_stream(app, "/health/ready", method="HEAD") as answer:
        assert (answer.status, await answer.read()) == (503, b"")


@pytest.mark.anyio
async def test_metrics_are_served_unless_turned_off() -> None:
    pytest.importorskip("asgi_sse.metrics.prometheus")
    app = create_hub(insecure_publish=True)
    await post(app, "/channels/a", "x")
    async with open_stream(app, "/channels/a"), open_stream(app, "/metrics") as answer:
        assert answer.status == 200
        assert re.search(rb"^asgi_sse_\w+", await answer.read(), re.MULTILINE)
    async with open_stream(create_hub(metrics=False), "/metrics") as answer:
        assert answer.status == 404


def test_metrics_need_prometheus_client() -> None:
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


@pytest.mark.anyio
async def test_backend_failure_is_answered_503_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker()

    async def fail(*_: Any, **__: Any) -> str:
        raise BrokerError("not published within 5 s")

    monkeypatch.setattr(broker, "publish", fail)
    status, body, headers = await post(create_hub(broker, insecure_publish=True), "/channels/a", "x")
    assert (status, body, headers["retry-after"]) == (503, "not published within 5 s", "5")
