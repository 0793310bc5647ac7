"""Both event loops for every async test, on a virtual clock unless a test asks for real time."""

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from trio.testing import MockClock

from asgi_sse.testing import VirtualTimeLoop

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of a job in the background of a shell script; the tests send it to processes, which would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# An example has no deadline of 0.2 s, nor has making it: a machine that is busy may take longer over any.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def _eager(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], asyncio.AbstractEventLoop]:
    def new_eager_loop() -> asyncio.AbstractEventLoop:
        loop = new_loop()
        if sys.version_info >= (3, 12):
            loop.set_task_factory(asyncio.eager_task_factory)
        return loop

    return new_eager_loop


BACKENDS = ["asyncio", "trio", *(["asyncio+eager"] if sys.version_info >= (3, 12) else [])]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    real = request.node.get_closest_marker("real_time") is not None
    if request.param == "trio":
        return "trio", {} if real else {"clock": MockClock(autojump_threshold=0)}
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.SelectorEventLoop if real else VirtualTimeLoop
    return "asyncio", {"loop_factory": _eager(new_loop) if request.param == "asyncio+eager" else new_loop}
