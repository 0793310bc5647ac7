"""A pytest plugin: it fails a test of streams that hangs, and one that leaves a stream open.

It does nothing for a test without ``@pytest.mark.asgi_sse``, unless the ini option ``asgi_sse_guard`` is true.
"""

from collections.abc import Generator
from functools import partial
from typing import Any
from unittest import TestCase

import pytest

_MARKER = "asgi_sse"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini option ``asgi_sse_guard``."""
    parser.addini("asgi_sse_guard", f"treat every test as if it had @pytest.mark.{_MARKER}", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker ``asgi_sse``."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(timeout=10, leaks=True): fail the test, and name its open streams, if it has not ended after "
        "`timeout` seconds of real time, or if it leaves a stream running or a source that was not cleaned up.",
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Guard a test that asks for it. This hook runs first, so that pytest-asyncio and anyio run the guarded test."""
    marker = item.get_closest_marker(_MARKER)
    if marker is None and not item.config.getini("asgi_sse_guard"):
        return (yield)
    from .guard import Guard  # noqa: PLC0415 (keeps the plugin cheap for tests that do not use it)

    guard = error = None
    try:
        guard = Guard(*marker.args, **marker.kwargs) if marker is not None else Guard()
    except (TypeError, ValueError) as exc:
        # Python 3.14 adds a question: "… argument 'timouts'. Did you mean 'timeout'?"
        reason = str(exc).removeprefix("Guard.__init__() ").partition(". Did you mean")[0]
        error = f"@pytest.mark.{_MARKER}: {reason}; it takes timeout=, seconds or None, and leaks=, a bool"
    if guard is None:
        pytest.fail(str(error), pytrace=False)
    test: Any = getattr(item, "obj", None)
    if issubclass(getattr(item, "cls", None) or object, TestCase):
        item.obj = guard.wrap_unittest(test, partial(pytest.fail, pytrace=False))  # type: ignore[attr-defined]
        setattr(item.instance, item.name, item.obj)  # type: ignore[attr-defined] # unittest calls this one if it is async
    elif guard.can_wrap(test):
        item.obj = guard.wrap(test)  # type: ignore[attr-defined]
    result = None
    try:
        with guard:
            result = yield
    except BaseException:
        if not guard.failure:  # it says more than what the interruption led to
            raise
    finally:
        if test is not None:
            item.obj = test  # type: ignore[attr-defined]
    if guard.failure:
        pytest.fail(guard.failure, pytrace=False)
    return result
