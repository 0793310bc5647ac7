"""A plugin for pytest: a test of streams that hangs fails, and one that leaves a stream open does too.

It does nothing for a test without ``@pytest.mark.asgi_sse``, unless the ini option ``asgi_sse_guard`` asks for all.
"""

from collections.abc import Generator
from functools import partial
from typing import Any
from unittest import TestCase

import pytest

_MARKER = "asgi_sse"


def pytest_addoption(parser: pytest.Parser) -> None:
    """See pytest."""
    parser.addini("asgi_sse_guard", f"treat every test as if it had @pytest.mark.{_MARKER}", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """See pytest."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(timeout=10, leaks=True): fail the test when it has not ended after so many seconds of real time, "
        "naming the streams that were open; and when it leaves a stream running or a source behind.",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Guard the test, if it asks for it. First of all, so that pytest-asyncio and anyio run what is put around it."""
    marker = item.get_closest_marker(_MARKER)
    if marker is None and not item.config.getini("asgi_sse_guard"):
        return (yield)
    from .guard import Guard  # noqa: PLC0415 (only where it is used)

    guard = wrong = None
    try:
        guard = Guard(*marker.args, **marker.kwargs) if marker is not None else Guard()
    except (TypeError, ValueError) as exc:
        said = str(exc).removeprefix("Guard.__init__() ")
        wrong = f"@pytest.mark.{_MARKER}: {said}; it takes timeout=, seconds or None, and leaks=, a bool"
    if guard is None:
        pytest.fail(str(wrong), pytrace=False)
    test: Any = getattr(item, "obj", None)
    if issubclass(getattr(item, "cls", None) or object, TestCase):
        item.obj = guard.in_unittest(test, partial(pytest.fail, pytrace=False))  # type: ignore[attr-defined]
        setattr(item.instance, item.name, item.obj)  # type: ignore[attr-defined] # which unittest calls, if it is async
    elif guard.takes(test):
        item.obj = guard.around(test)  # type: ignore[attr-defined]
    result = None
    try:
        with guard:
            result = yield
    except BaseException:
        if not guard.failure:  # which says more than what the interruption has led to
            raise
    finally:
        if test is not None:
            item.obj = test  # type: ignore[attr-defined]
    if guard.failure:
        pytest.fail(guard.failure, pytrace=False)
    return result
