"""The log on Redis and Valkey: keys that are trimmed, deleted or rolled back, and payloads of others."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backend_helpers import data, reset_reason, take
from backend_servers import TIMEOUT_S, Valkey

import asgi_sse.broker
from asgi_sse import Broker

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.real_time,
    pytest.mark.skipif(not Valkey.available(), reason="Valkey is not installed"),
    pytest.mark.usefixtures("short_block"),
]


def block_loop_during(call: Callable[[], Any]) -> None:
    """Run `call` in a thread while the event loop is blocked, so that no reader sees the steps of it."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(TIMEOUT_S)


async def test_trimmed_log_is_filled_from_the_channel_streams(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        by_name, by_pattern, both, overflowed = (
            broker.subscribe(*names) for names in (("a",), ("b.*",), ("a", "b.x"), ("gone", "a"))
        )
        first = await broker.publish("a", "first")
        await broker.publish("b.x", "first")
        for subscription, number in ((by_name, 1), (by_pattern, 1), (both, 2), (overflowed, 1)):
            await take(subscription, number)

        def publish_and_trim() -> None:
            for number in range(5):
                for channel in ("a", "b.x", "unread", "gone"):
                    asgi_sse.broker.publish(valkey.url, channel, f"{channel} {number}", prefix=prefix)
            with valkey.client() as client:
                client.xtrim(f"{{{prefix}}}:log", maxlen=0, approximate=False)
                client.xtrim(f"{{{prefix}}}:c:gone", maxlen=2, approximate=False)

        block_loop_during(publish_and_trim)
        assert data(await take(by_name, 5)) == [f"a {number}" for number in range(5)]
        assert data(await take(by_pattern, 5)) == [f"b.x {number}" for number in range(5)]
        seen = data(await take(both, 10))
        assert seen == [f"{channel} {number}" for number in range(5) for channel in ("a", "b.x")]
        while (reset := (await take(overflowed, 1))[0]).event is None:
            pass  # the first events may have arrived before the trim
        assert reset_reason(reset) == "overflow"
        last = await broker.publish("unread", "last")
        cold = broker.subscribe("unread", "a", last_event_id=first)  # also for a channel that nobody has read
        seen = data(await take(cold, 11))
        assert seen[-1] == "last"
        assert [text for text in seen if (text or "").startswith("unread")] == [f"unread {n}" for n in range(5)]
        assert cold.last_event_id == last
        assert broker.statistics().restarts == 0


@pytest.mark.parametrize("keys", [("meta",), ("last",), ("meta", "log", "last"), ("*",)])
async def test_deleted_keys_begin_a_new_epoch(valkey: Valkey, prefix: str, keys: tuple[str, ...]) -> None:
    async with Broker(valkey.url, prefix=prefix) as one, Broker(valkey.url, prefix=prefix) as two:
        subscriptions = [broker.subscribe("a") for broker in (one, two)]
        ids = [await one.publish("a", str(number)) for number in range(5)]
        for subscription in subscriptions:
            await take(subscription, 5)
        with valkey.client() as client:
            names = [f"{{{prefix}}}:{key}" for key in keys]
            client.delete(*(client.keys(names[0].replace("{", "\\{")) if keys == ("*",) else names))
        after = await two.publish("a", "after")  # noticed by the publisher or by the idle reader
        assert after.partition("-")[0] != ids[0].partition("-")[0]
        for subscription in subscriptions:
            reset, event = await take(subscription, 2)
            assert reset_reason(reset) == "epoch"
            assert (event.data, event.id) == ("after", after)
        for broker in (one, two):
            (reset,) = await take(broker.subscribe("a", last_event_id=ids[2]), 1)
            assert reset_reason(reset) == "epoch"
            assert broker.statistics().restarts == 1


async def test_idle_reader_notices_a_deleted_log(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "x")
        await take(subscription, 1)
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:meta")
        assert reset_reason((await take(subscription, 1))[0]) == "epoch"


async def test_deleted_stream_is_harmless_while_live_and_resets_a_resume(valkey: Valkey, prefix: str) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        first = await broker.publish("a", "0")
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:log")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
        with valkey.client() as client:
            client.delete(f"{{{prefix}}}:c:a")
        last = await broker.publish("a", "2")
        assert data(await take(subscription, 1)) == ["2"]
        async with Broker(valkey.url, prefix=prefix) as cold:
            (reset,) = await take(cold.subscribe("a", last_event_id=first), 1)
            assert (reset_reason(reset), reset.id) == ("expired", last)


async def test_rolled_back_server_gets_a_new_epoch(tmp_path: Path) -> None:
    with Valkey(tmp_path) as server:
        async with Broker(server.url) as one, Broker(server.url) as two:
            subscriptions = [broker.subscribe("a") for broker in (one, two)]
            kept = [await one.publish("a", str(number), idempotency_key=str(number)) for number in range(3)]
            await asyncio.to_thread(server.save)
            lost = [await one.publish("a", f"lost {number}") for number in range(3)]
            for subscription in subscriptions:
                await take(subscription, 6)
            await asyncio.to_thread(server.restart, saved=True)
            ids = [await two.publish("a", f"new {number}") for number in range(4)]  # more than were lost
            assert not {ids[0].partition("-")[0]} & {kept[0].partition("-")[0]}
            for broker, subscription in zip((one, two), subscriptions, strict=True):
                reset, *events = await take(subscription, 5)
                assert reset_reason(reset) == "epoch"
                assert [event.id for event in events] == ids
                (reset,) = await take(broker.subscribe("a", last_event_id=lost[1]), 1)
                assert reset_reason(reset) == "epoch"
            again = await one.publish("a", "2", idempotency_key="2")  # kept, so it is in the log only once
            assert again.partition("-")[::2] == (ids[0].partition("-")[0], kept[2].partition("-")[2])


async def test_invalid_payload_is_skipped_and_logged(
    valkey: Valkey, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Broker(valkey.url, prefix=prefix) as broker:
        subscription = broker.subscribe("a")
        await broker.publish("a", "0")
        with valkey.client() as client:
            for payload in (
                b"no JSON",
                b"[1]",
                b'{"id": "7", "data": "x"}',
                b'{"data": "x", "event": "a\\nb"}',
                b"\xff",
            ):
                meta = f"{{{prefix}}}:meta"
                number = client.hincrby(meta, "n", 1)
                fields = {"c": "a", "e": payload, "l": number - 1, "t": 0, "x": client.hget(meta, "epoch")}
                client.xadd(f"{{{prefix}}}:log", fields, id=f"{number}-0")
        await broker.publish("a", "1")
        assert data(await take(subscription, 2)) == ["0", "1"]
    skipped = [record for record in caplog.records if record.getMessage().startswith("skipped invalid event")]
    assert [vars(record)["sse_backend"] for record in skipped] == [valkey.url] * 5
    assert not any(part in caplog.text for part in ("no JSON'", "[1]", "a\\nb"))  # nothing of the payloads
