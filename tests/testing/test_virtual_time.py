"""`virtual_time`: async tests without a plugin and without waiting."""

from collections.abc import AsyncIterator

import anyio
import pytest

from asgi_sse import create_app
from asgi_sse.testing import open_stream, virtual_time


async def silent() -> AsyncIterator[str]:
    await anyio.sleep_forever()
    yield ""


def test_virtual_time_runs_a_test_without_a_plugin() -> None:
    @virtual_time
    async def on_asyncio(argument: int) -> float:
        """Keeps its name and docstring."""
        await anyio.sleep(3600)
        return anyio.current_time() + argument

    @virtual_time(backend="trio")
    async def on_trio() -> None:
        began = anyio.current_time()
        async with open_stream(create_app({"/": silent})) as stream:
            assert b"ping" not in await stream.read()
            assert await stream.read(timeout=20) == b": ping\n\n"
        assert 15 <= anyio.current_time() - began <= 16

    assert 3600 <= on_asyncio(1) - 1 <= 3601
    assert on_asyncio.__doc__
    on_trio()


def test_virtual_time_refuses_invalid_arguments() -> None:
    with pytest.raises(TypeError, match=r"must be a coroutine function, got .*; write virtual_time right above"):
        virtual_time(lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="backend must be 'asyncio' or 'trio', got 'curio'"):
        virtual_time(backend="curio")
