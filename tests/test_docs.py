"""The documentation is true: each of its code blocks is run, or says why it cannot be; links lead somewhere."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import ExitStack
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pages import ENOUGH, PAGES, ROOT, Block, Browser, in_order, read_blocks, session
from serving import environment

import asgi_sse
from asgi_sse.options import StreamOptions
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

if not PAGES.exists():
    pytest.skip("the tree is not beside the tests", allow_module_level=True)

ALL = [ROOT / "README.md", ROOT / "MIGRATING.md", *sorted(PAGES.rglob("*.md"))]
BLOCKS = {page: read_blocks(page) for page in ALL}
RUN_ELSEWHERE = {  # by which test
    "nginx": ("docs/pages/guides/proxies.md", "test_proxies.py"),
    "caddyfile": ("docs/pages/guides/proxies.md", "test_proxies.py"),
}
NOTHING_TO_RUN = {"", "text", "diff"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/pages/")


def pages_with(*languages: str, mark: str = "") -> Any:
    """The pages that have blocks of a language, as parameters."""
    found = [
        page
        for page, blocks in BLOCKS.items()
        if any(block.language in languages and block.command.startswith(mark) for block in blocks)
    ]
    return pytest.mark.parametrize("page", found, ids=name_of)


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    blocks = BLOCKS[page]
    for number, block in enumerate(blocks):
        if block.language in NOTHING_TO_RUN:
            assert not block.mark, f"{block}: there is nothing to run"
        elif block.command == "not run":
            assert len(block.mark.removeprefix("not run:").split()) >= 2, f"{block}: say why it is not run"
        elif block.command == "command":
            assert page.name == "README.md", f"{block}: who runs it?"
        elif block.language == "sh":
            assert block.mark == "run", f"{block}: is it run? {block.mark!r}"
        elif block.language == "js":
            assert block.mark in {"", "run: browser"}, f"{block}: how is it run? {block.mark!r}"
        elif block.language in RUN_ELSEWHERE:
            assert name_of(page) == name_of(ROOT / RUN_ELSEWHERE[block.language][0]), f"{block}: who runs it?"
        elif block.is_module:
            later = blocks[number + 1 :]
            assert any(other.command == "run" for other in later), f"{block}: nobody imports it"
        else:
            assert block.language in {"python", "yaml", "toml", "json"}, f"{block}: {block.language!r} is not known here"


@pytest.mark.parametrize(
    "block",
    [block for blocks in BLOCKS.values() for block in blocks if block.language in {"yaml", "toml", "json", "js"}],
    ids=str,
)
def test_it_can_be_parsed(block: Block) -> None:
    if block.language == "yaml":
        assert all(yaml.safe_load_all(block.text))
    elif block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "json":
        json.loads(block.text)
    elif (node := shutil.which("node")) is None:
        pytest.skip("node is not installed")
    else:
        subprocess.run(
            [node, "--input-type=module", "--check"], input=block.text, text=True, check=True, timeout=ENOUGH
        )


# What blocks of Python do beyond running, by page: given the apps that they have made, in order.

Check = "Callable[[list[Any]], Awaitable[None]]"
CHECKS: dict[str, Any] = {}
GIVEN: dict[str, dict[str, Any]] = {}


def check(page: str, **given: Any) -> Any:
    """Hold the apps of a page to what the page says of them; its blocks find `given` there."""

    def decorate(function: Any) -> Any:
        CHECKS[page] = function
        GIVEN[page] = given
        return function

    return decorate


@pytest.fixture
def page_module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module in which a page is run: frameworks look annotations up there."""
    module = ModuleType("page_of_the_documentation")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]
    for name, other in [*sys.modules.items()]:  # a page may import its own files
        if str(getattr(other, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pages_with("python")
def test_python(page: Path, page_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in BLOCKS[page] if block.language == "python"]
    for block in blocks:
        block.compiled()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = vars(page_module)
    names |= GIVEN.get(name_of(page), {})
    apps, tests = [], {}
    for block in blocks:
        if block.command == "not run" or block.is_module:
            continue
        if block.title:
            (tmp_path / block.title).write_text(block.text)
        before = names.get("app")
        exec(block.compiled(), names)
        if names.get("app") is not before:
            apps.append(names["app"])
        tests |= {name: value for name, value in names.items() if name.startswith("test_") and callable(value)}
    for test in tests.values():
        if inspect.signature(test).parameters:  # of fixtures
            run_by_pytest(page, tmp_path)
        elif inspect.iscoroutinefunction(test):
            run(test)
        else:
            test()
    if name_of(page) in CHECKS:
        run(CHECKS[name_of(page)], apps)


def run(function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(ENOUGH):
            await function(*arguments)

    asyncio.run(within_time())


def run_by_pytest(page: Path, directory: Path) -> None:
    blocks = [block for block in BLOCKS[page] if block.language == "python" and block.command != "not run"]
    (directory / "test_page.py").write_text("\n".join(block.text for block in blocks if not block.is_module))
    own = find_spec("asgi_sse.pytest_plugin") is not None
    installed = any(point.value.startswith("asgi_sse") for point in entry_points(group="pytest11"))
    plugin = ["-p", "asgi_sse.pytest_plugin"] if own and not installed else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", *plugin, "."]
    done = subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{name_of(page)}:\n{done.stdout}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[[], Browser]]:
    with ExitStack() as stack:
        started: list[Browser] = []

        def start() -> Browser:
            if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
                pytest.skip("no Chromium is installed")
            pytest.importorskip("playwright")
            if not started:
                started.append(Browser(stack))
            return started[0]

        yield start


@pages_with("sh", mark="run")
def test_commands(page: Path, tmp_path: Path, browser: Callable[[], Browser]) -> None:
    blocks = BLOCKS[page]
    with ExitStack() as engines, session(tmp_path, engines_for(page, engines, tmp_path)) as reader:
        for block, behind in zip(blocks, [*blocks[1:], None], strict=True):
            expected = behind.text if behind is not None and behind.language == "text" else ""
            if block.title:
                reader.write(block)
            if block.mark == "run":
                reader.run(block, expected)
            elif block.mark == "run: browser":

                def enough(lines: list[str], expected: str = expected) -> bool:
                    return in_order(expected, "\n".join(lines))

                assert expected, f"{block}: say what it logs"
                reader.log_of(browser().run(block.text, reader.origin, enough), expected, block)


def engines_for(page: Path, stack: ExitStack, directory: Path) -> dict[str, str]:
    """Engines in place of those that the page's commands name."""
    text = re.sub("#.*", "", "".join(block.text for block in BLOCKS[page] if block.mark == "run"))
    replaced = {}
    for url, kind in {"redis://localhost:6379/0": "Valkey", "nats://localhost:4222": "Nats"}.items():
        if url in text:
            sys.path.append(str(Path(__file__).parent / "broker"))
            engine = getattr(import_module("engines"), kind)
            if not engine.available():
                pytest.skip(f"{kind} is not installed")
            (directory / kind).mkdir()
            replaced[url] = stack.enter_context(engine(directory / kind)).url
    return replaced


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize(
    "page", [*ALL, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples/README.md"], ids=name_of
)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors_of(there), f"{name_of(page)}: {target}"


def test_the_options_table_names_each_default() -> None:
    defaults = StreamOptions()
    rows = re.findall(r"^\| `(\w+)` \| (\S+)", (PAGES / "reference/response.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    for name, shown in rows:
        value = getattr(defaults, name)
        assert shown == ("none" if value is None else f"{value:g}"), name
    documented = inspect.getdoc(asgi_sse.EventSourceResponse) or ""
    for field in fields(StreamOptions):
        assert f"{field.name}:" in documented


def test_the_architecture_names_every_room() -> None:
    text = (PAGES / "architecture.md").read_text()
    package = Path(asgi_sse.__file__).parent
    for path in package.rglob("*.py"):
        room = path.relative_to(package)
        if room.name == "__init__.py":
            assert len(room.parts) == 1 or f"`{room.parent}/`" in text, room
        else:
            assert f"`{room.name}`" in text, room


def test_each_public_name_has_a_place_in_the_reference() -> None:
    text = "".join(page.read_text() for page in (PAGES / "reference").glob("*.md"))
    for name in asgi_sse.__all__:
        assert re.search(rf"^::: asgi_sse\.(?:\w+\.)*{name}$", text, re.MULTILINE), name
