"""The deprecated module `asgi_sse.adapters.starlette`."""

import importlib
import re
import subprocess
import sys
from typing import Any

import pytest

from asgi_sse.adapters import sse_starlette

TEXT = "asgi_sse.adapters.starlette is deprecated; import from asgi_sse.adapters.sse_starlette"


@pytest.fixture
def alias(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the alias as if for the first time, since Python runs a module only once."""
    monkeypatch.delitem(sys.modules, "asgi_sse.adapters.starlette", raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(TEXT)}$"):
        return importlib.import_module("asgi_sse.adapters.starlette")


def test_import_warns_and_exports_the_same_objects(alias: Any) -> None:
    assert alias.__all__ == sse_starlette.__all__
    for name in sse_starlette.__all__:
        assert getattr(alias, name) is getattr(sse_starlette, name)


def test_warning_can_be_made_an_error() -> None:
    code = "import asgi_sse.adapters.starlette"
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(f"DeprecationWarning: {TEXT}")
