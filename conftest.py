"""Run every async test on asyncio and trio, with a virtual clock unless the test is marked ``real_time``."""

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
    # A shell script starts background jobs with SIGINT ignored. The tests send SIGINT to their processes, which would
    # inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


# No deadline of 0.2 s for an example, and none for generating it: a busy machine may take longer.
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
