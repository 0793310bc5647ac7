"""The body of an adapter's response, if its event loop, its task or its framework ends early."""

import asyncio
import logging
from collections.abc import AsyncIterator

import anyio
import pytest

from asgi_sse import EventSourceResponse
from asgi_sse.adapters.body import Body

pytestmark = pytest.mark.anyio


class Source:
    """A source that waits after its first event, and in its clean-up."""

    def __init__(self) -> None:
        self.cleaning = anyio.Event()
        self.log: list[str] = []

    async def events(self) -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            self.log.append("clean-up begins")
            self.cleaning.set()
            await anyio.sleep(60)
            self.log.append("clean-up ends")


async def test_body_that_is_closed_before_its_first_chunk_runs_no_source() -> None:
    """A framework may send another response in place of it, and still close it."""
    source = Source()
    body = Body(EventSourceResponse(source.events()))
    body.close()
    await body.aclose()
    await anyio.wait_all_tasks_blocked()
    assert source.log == []
    with pytest.raises(StopAsyncIteration):
        await anext(body)


async def test_cancelled_framework_ends_the_source() -> None:
    seen = []

    async def events() -> AsyncIterator[str]:
        try:
            yield "a"
            await anyio.sleep_forever()
        finally:
            seen.append("closed")

    body = Body(EventSourceResponse(events()))
    assert (await anext(body)).endswith(b"data: a\n\n")
    with anyio.move_on_after(1):
        await anext(body)
    await body.aclose()
    assert seen == ["closed"]


def test_end_of_the_event_loop_during_a_clean_up_is_no_error_of_the_source(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()

    async def main() -> None:
        body = Body(EventSourceResponse(source.events()))
        await anext(body)
        body.close()
        await source.cleaning.wait()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert source.log == ["clean-up begins"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
