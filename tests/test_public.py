"""What the package promises at its door: its names, what it imports, and that its README is true."""

import inspect
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

import asgi_sse
from asgi_sse.options import StreamOptions
from asgi_sse.testing import open_stream

README = Path(__file__).parent.parent / "README.md"


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


@pytest.fixture(scope="module")
def readme() -> str:
    if not README.exists():
        pytest.skip("the tree is not beside the tests")
    return README.read_text()


def test_the_readme_names_each_default(readme: str) -> None:
    defaults = StreamOptions()
    rows = re.findall(r"^\| `(\w+)` \| (\S+)", readme.split("### How a stream lives")[1], re.MULTILINE)
    assert len(rows) == 8
    for name, shown in rows:
        value = getattr(defaults, name)
        assert shown == ("none" if value is None else f"{value:g}"), name
    documented = inspect.getdoc(asgi_sse.EventSourceResponse) or ""
    for field in fields(StreamOptions):
        assert f"{field.name}:" in documented


@pytest.mark.anyio
@pytest.mark.real_time
async def test_the_readme_runs(readme: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 10

    async def load_state(channel: str) -> str:
        return f"the state of {channel}"

    async def tokens(prompt: str) -> AsyncIterator[str]:
        for word in prompt.split():
            yield word

    ann = SimpleNamespace(name="ann", session_ends=time.time() + 100)
    names: dict[str, Any] = {"users": {"secret": ann}, "load_state": load_state, "tokens": tokens}
    apps = []
    for block in blocks:
        names = dict(names)  # each block may use what those before it have defined, and changes nothing for them
        exec(block, names)
        apps.append(names["app"])
    async with open_stream(apps[0], "/ticks", headers={"Last-Event-ID": "41"}) as stream:
        event = await stream.receive()
        assert (event.event, event.id, event.data) == ("tick", "42", '{"tick":42}')
    async with open_stream(apps[0], "/ticks", headers={"Last-Event-ID": "x"}) as stream:
        assert stream.status == 400
    async with open_stream(apps[0], "/answers/small", method="POST", body=b"hi") as stream:
        assert [event.data async for event in stream] == ["You", "said:", "hi", "[DONE]"]
    async with open_stream(apps[1], "/ticks") as stream:
        assert (await stream.receive()).id == "1"
    async with open_stream(apps[2], "/events") as stream:
        assert [event.data async for event in stream] == ["hello"]
    async with open_stream(apps[3], "/orders") as stream:
        async with open_stream(apps[3], "/order") as order:
            assert order.status == 204
        event = await stream.receive()
        assert (event.event, event.data) == ("order", '{"state":"paid"}')
    async with open_stream(apps[4], "/events/user.ann", headers={"Cookie": "session=secret"}) as stream:
        assert (await stream.receive()).data == "the state of user.ann"
    for path, status in (("/events/user.bob", 403), ("/mine", 200)):
        async with open_stream(apps[4], path, headers={"Cookie": "session=secret"}) as stream:
            assert stream.status == status
    async with open_stream(apps[5], "/ask/42", method="POST", body=b"a b") as stream:
        assert [event.data async for event in stream] == ["a", "b", '{"reason":"finished"}']
        last = stream.last_event_id
    async with open_stream(apps[5], "/runs?channel=chat/42") as stream:
        assert [event.data async for event in stream][:2] == ["a", "b"]
    async with open_stream(apps[5], "/runs?channel=chat/42", headers={"Last-Event-ID": last}) as stream:
        assert stream.status == 204
    async with open_stream(apps[6], "/news") as stream:  # in memory, as long as there is no URL
        assert stream.status == 200
    async with open_stream(apps[7], "/ticks") as stream:
        assert (await stream.receive()).id == "1"
        apps[7].registry.begin_drain()
        assert [event async for event in stream] == []
        assert stream.complete
    names["app"] = apps[0]
    with anyio.fail_after(10):
        await names["test_ticks"]()
