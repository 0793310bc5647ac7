"""Fixtures that sse-starlette's tests use and its source distribution does not contain."""

import asyncio
import logging

import httpx2 as httpx
import pytest
from sse_starlette.sse import AppStatus, EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route


def rename(record):
    """Give our log records the logger name that the tests look for."""
    record.name = "sse_starlette.sse"
    return True


for name in ("stream", "source_task"):
    logging.getLogger(f"asgi_sse.stream.{name}").addFilter(rename)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def reset_shutdown_state():
    AppStatus.should_exit = False
    AppStatus.enable_automatic_graceful_drain_mode()
    yield
    AppStatus.should_exit = False
    AppStatus.enable_automatic_graceful_drain_mode()


@pytest.fixture
async def httpx_client():
    async def numbers():
        number = 0
        try:
            while True:
                number += 1
                yield {"data": number}
                await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            logging.getLogger(__name__).info("Disconnected from client")
            raise

    async def endless(request):
        return EventSourceResponse(numbers())

    app = Starlette(routes=[Route("/endless", endless)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client
