"""What the package promises at its door: its names, and what it imports."""

import inspect
import subprocess
import sys

import pytest

import asgi_sse


@pytest.mark.parametrize("name", asgi_sse.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert inspect.getdoc(getattr(asgi_sse, name))


def test_all_is_sorted_and_complete() -> None:
    public = {name for name, value in vars(asgi_sse).items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert set(asgi_sse.__all__) == public
    assert len(asgi_sse.__all__) == len(public)


def test_importing_it_imports_nothing_optional() -> None:
    code = "import asgi_sse, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"trio", "uvicorn", "hypercorn", "psutil", "starlette", "django", "quart", "litestar", "httpx"} & set(
        loaded
    )
