"""The documentation is correct: its code blocks run, or say why they cannot, and its links have targets."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import runpy
import shutil
import subprocess
import sys
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
from pages import PAGES, TIMEOUT_S, Block, Browser, in_order, read_blocks, session
from serving import ROOT, environment

import asgi_sse
from asgi_sse import broker, testing
from asgi_sse.cli.main import main
from asgi_sse.stream.options import StreamOptions
from asgi_sse.testing import open_stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

if not PAGES.exists():
    pytest.skip("the repository is not next to the tests", allow_module_level=True)

yaml: Any = import_module("yaml")  # installed with uvicorn[standard]

DOCUMENTS = [
    *(ROOT / f"{name}.md" for name in ("README", "MIGRATING", "CONTRIBUTING", "SECURITY", "CHANGELOG")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted(PAGES.rglob("*.md")),
]
BLOCKS = {page: read_blocks(page) for page in DOCUMENTS}
TESTED_ELSEWHERE = {  # blocks of these languages on these pages, and their test
    "nginx": ("docs/pages/guides/proxies.md", "test_proxies.py"),
    "caddyfile": ("docs/pages/guides/proxies.md", "test_proxies.py"),
}
OWN_URLS = [runpy.run_path(str(ROOT / "docs/include.py"))[name] for name in ("REPOSITORY", "FILES")]
TARGET = re.compile(r"""(?:\]\(|\ssrc="|\ssrcset=")([^)"\s]+)[)"]""")  # of a Markdown link, or an image in HTML
LINKING = [*DOCUMENTS, *(ROOT / folder / "README.md" for folder in ("examples", "examples/mcp", "tests/fuzz"))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/pages/")


def pages_with(*languages: str, mark: str = "") -> pytest.MarkDecorator:
    """Parametrise a test with the pages that have blocks of these languages."""
    found = [
        page
        for page, blocks in BLOCKS.items()
        if any(block.language in languages and block.command.startswith(mark) for block in blocks)
    ]
    return pytest.mark.parametrize("page", found, ids=name_of)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    blocks = BLOCKS[page]
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for number, block in enumerate(blocks):
        named = {extra for found in re.findall(r"(?:asgi-sse|\.)\[(.*?)\]", block.text) for extra in found.split(",")}
        assert block.language != "sh" or named <= extras, f"{block}: unknown extras"
        if block.command == "not run":
            assert len(block.mark.removeprefix("not run:").split()) >= 2, f"{block}: give the reason why it is not run"
        elif block.mark == "diagram":
            assert block.language == "text", f"{block}: a diagram is text"
        elif block.language == "text":
            follows_run = number > 0 and blocks[number - 1].command == "run"
            assert follows_run or page.parent.name == "benchmarks", (
                f"{block}: put it after the block whose output it is"
            )
        elif block.language == "diff":
            assert page.name == "MIGRATING.md", f"{block}: no test runs a diff here"
        elif block.command == "command":
            assert page.name == "README.md", f"{block}: no test runs this command here"
            assert block.mark in {"command: demo", "command: test"}, f"{block}: no test runs this command"
        elif block.installs:
            assert named, f"{block}: say in a comment above it how to run it"
        elif block.language == "sh":
            marks = "<!-- run --> or <!-- not run: REASON -->"
            assert block.mark in {"run", "run: to the end"}, f"{block}: write {marks} above it"
        elif block.language == "js":
            assert block.mark in {"", "run: browser"}, f"{block}: unknown mark {block.mark!r}"
        elif block.language in TESTED_ELSEWHERE:
            assert name_of(page) == name_of(ROOT / TESTED_ELSEWHERE[block.language][0]), f"{block}: no test runs it"
        elif block.is_module:
            later = blocks[number + 1 :]
            assert any(other.command == "run" for other in later), f"{block}: no later block imports it"
        else:
            assert block.language in {"python", "yaml", "toml", "json"}, (
                f"{block}: the tests do not know the language {block.language!r}"
            )


@pytest.mark.parametrize(
    "block",
    [
        block
        for blocks in BLOCKS.values()
        for block in blocks
        if block.language in {"yaml", "toml", "json", "js"} and not block.mark
    ],
    ids=str,
)
def test_block_can_be_parsed(block: Block) -> None:
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
            [node, "--input-type=module", "--check"], input=block.text, text=True, check=True, timeout=TIMEOUT_S
        )


# Checks of the apps of a page, beyond what the page itself shows. `apps` has them in the order of the page's blocks.

CHECKS: dict[str, Callable[[list[Any]], Awaitable[None]]] = {}


def check(page: str) -> Callable[[Callable[[list[Any]], Awaitable[None]]], None]:
    return lambda function: CHECKS.update({page: function})


@check("README.md")
async def _(apps: list[Any]) -> None:
    alone, around, fastapi, channels = apps
    async with open_stream(alone, "/ticks", headers={"Last-Event-ID": "41"}) as stream:
        event = await stream.receive()
        assert (event.id, event.data) == ("42", '{"tick":42}')
    async with open_stream(alone, "/ticks", headers={"Last-Event-ID": "x"}) as stream:
        assert stream.status == 400
    async with open_stream(around, "/more/ticks") as stream:
        assert (await stream.receive()).id == "1"
    async with open_stream(around, "/ticks") as stream:  # from the wrapped app
        assert (await stream.receive()).id == "1"
    async with open_stream(fastapi, "/greetings") as stream:
        assert (await stream.receive()).data == "hello"
    async with open_stream(channels, "/news") as stream:
        async with open_stream(channels, "/say", method="POST", body=b"rain") as said:
            assert said.status == 204
        assert (await stream.receive()).data == "rain"
        async with open_stream(channels, "/say") as read:
            assert (read.status, read.headers["allow"]) == (405, "POST")
        async with open_stream(channels, "/say", method="POST", body=b"\xff") as said:
            assert said.status == 204
        assert (await stream.receive()).data == "\N{REPLACEMENT CHARACTER}"


@check("guides/broadcast.md")
async def _(apps: list[Any]) -> None:
    channels, rights = apps
    async with open_stream(channels, "/orders") as stream:
        async with open_stream(channels, "/order") as order:
            assert order.status == 204
        event = await stream.receive()
        assert (event.event, event.data) == ("order", '{"state":"paid"}')
    async with open_stream(rights, "/events/user.ann", headers={"Cookie": "session=secret"}) as stream:
        assert (await stream.receive()).data == '{"of":"user.ann"}'
    for path, cookie, status in (
        ("/events/user.bob", "session=secret", 403),
        ("/events/user.ann", "session=none", 403),
        ("/mine", "session=secret", 200),
    ):
        async with open_stream(rights, path, headers={"Cookie": cookie}) as stream:
            assert stream.status == status


@check("guides/resume.md")
async def _(apps: list[Any]) -> None:
    rows, prices = apps
    for last, status in (("3", 200), ("5", 204), ("x", 400)):
        async with open_stream(rows, "/rows", headers={"Last-Event-ID": last}) as stream:
            assert stream.status == status
            if status == 200:
                assert [event.id async for event in stream] == ["4", "5"]
    for last, reason in (("x", "unknown"), ("0-1", "epoch")):
        async with open_stream(prices, "/events", headers={"Last-Event-ID": last}) as stream:
            event = await stream.receive()
            assert (event.event, event.data) == ("reset", f'{{"reason":"{reason}"}}')
    async with open_stream(prices, "/events") as stream:
        for _ in range(2):
            async with open_stream(prices, "/change"):
                pass
        first = (await stream.receive()).id
    for _ in range(4):
        async with open_stream(prices, "/change"):
            pass
    async with open_stream(prices, "/events", headers={"Last-Event-ID": str(first)}) as stream:
        assert (await stream.receive()).data == '{"reason":"expired"}'


@check("guides/tokens.md")
async def _(apps: list[Any]) -> None:
    answer, chat, again = apps
    for body in (b"{}", b"{", b'{"prompt": ""}'):
        async with open_stream(answer, "/answer", method="POST", body=body) as stream:
            assert stream.status in {400, 422}
    async with open_stream(chat, "/ask", method="POST", body=b'{"prompt": "hi"}') as asked:
        channel = json.loads(await asked.read())["channel"]
    async with open_stream(chat, f"/cancel?channel={channel}", method="POST") as cancelled:
        assert json.loads(await cancelled.read()) == {"outcome": "cancelled"}
    async with open_stream(chat, f"/answers?channel={channel}") as stream:
        assert [event.data async for event in stream][-1] == '{"reason":"cancelled"}'
    async with open_stream(chat, "/cancel?channel=answer/none", method="POST") as cancelled:
        assert cancelled.status == 404
    async with open_stream(again, "/ask/42", method="POST", body=b"a b") as stream:
        events = [event.data async for event in stream]
        assert events[-1] == '{"reason":"finished"}'
        last = stream.last_event_id
    async with open_stream(again, "/ask/42", method="POST", body=b"something else") as stream:
        assert [event.data async for event in stream] == events
    async with open_stream(again, "/runs?channel=chat/42") as stream:
        assert [event.data async for event in stream] == events
    async with open_stream(again, "/runs?channel=chat/42", headers={"Last-Event-ID": last}) as stream:
        assert stream.status == 204


@check("guides/frameworks.md")
async def _(apps: list[Any]) -> None:
    for app, path in zip(apps, ("/yielded", *("/hello?name=Ann",) * 3), strict=True):
        async with open_stream(app, path) as stream:
            assert [event.data async for event in stream] == ["hello" if path == "/yielded" else "hello Ann"]
    async with open_stream(apps[-1], "/sse/news") as stream:
        assert stream.status == 200


@check("guides/scale.md")
async def _(apps: list[Any]) -> None:
    async with open_stream(apps[0], "/news") as stream:  # in memory, because no URL is set
        assert stream.status == 200


@check("guides/stop.md")
async def _(apps: list[Any]) -> None:
    _, probed = apps
    for path in ("/ready", "/live"):
        async with open_stream(probed, path) as stream:
            assert stream.status == (503 if path == "/ready" else 200)  # the page's own test drained it
    async with open_stream(probed, "/ticks") as stream:  # a new client during the drain
        assert stream.status == 200
        assert [event async for event in stream] == []
        assert stream.complete
        assert 1000 <= (stream.retry or 0) <= 5000


@pytest.fixture
def page_module(tmp_path: Path) -> Iterator[ModuleType]:
    """A module in which a page runs, because frameworks look up annotations in it."""
    module = ModuleType("page_of_the_documentation")
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]
    for name, other in [*sys.modules.items()]:  # files of the page that it has imported
        if str(getattr(other, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pages_with("python")
def test_python_blocks_run(
    page: Path, page_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block for block in BLOCKS[page] if block.language == "python"]
    for block in blocks:
        block.compiled()  # including those that are not run
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = vars(page_module)
    apps: list[Any] = []
    tests: dict[str, Any] = {}
    for block in blocks:
        if block.command == "not run" or block.is_module:
            continue
        before = names.get("app")
        if block.title:  # a file of its own, which must not change names of earlier blocks
            (tmp_path / block.title).write_text(block.text)
            names = dict(names)
        exec(block.compiled(), names)
        if names.get("app") is not before:
            apps.append(names["app"])
        found = {name: value for name, value in names.items() if name.startswith("test_") and callable(value)}
        for name in found.keys() & tests.keys():
            assert found[name] is tests[name], f"{block}: an earlier block defines {name} too, and would not run"
        tests |= found
    for test in tests.values():
        if inspect.signature(test).parameters:  # it needs fixtures
            run_by_pytest(page, tmp_path)
        elif inspect.iscoroutinefunction(test):
            run(test)
        else:
            test()
    if name_of(page) in CHECKS:
        run(CHECKS[name_of(page)], apps)


def run(function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    async def within_time() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await function(*arguments)

    asyncio.run(within_time())


def run_by_pytest(page: Path, directory: Path) -> None:
    blocks = [block for block in BLOCKS[page] if block.language == "python" and block.command != "not run"]
    (directory / "test_page.py").write_text("\n".join(block.text for block in blocks if not block.is_module))
    available = find_spec("asgi_sse.testing.pytest_plugin") is not None
    installed = any(point.value.startswith("asgi_sse") for point in entry_points(group="pytest11"))
    plugin = ["-p", "asgi_sse.testing.pytest_plugin"] if available and not installed else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio", *plugin, "."]
    done = subprocess.run(
        command, cwd=directory, env=environment(), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, f"{name_of(page)}:\n{done.stdout}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Callable[[], Browser]]:
    """Return a function that gives the browser, and starts it at the first call."""
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
def test_commands_run_as_shown(page: Path, tmp_path: Path, browser: Callable[[], Browser]) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    blocks = BLOCKS[page]
    with ExitStack() as backends, session(tmp_path, backends_for(page, backends, tmp_path)) as reader:
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            expected = following.text if following is not None and following.language == "text" else ""
            if block.title:
                reader.write(block)
            if block.mark in {"run", "run: to the end"}:
                reader.run(block, expected)
            elif block.mark == "run: browser":

                def enough(lines: list[str], expected: str = expected) -> bool:
                    return in_order(expected, "\n".join(lines))

                assert expected, f"{block}: add a text block with what it logs"
                reader.check_log(browser().run(block.text, reader.origin, enough), expected, block)
    for block in blocks:
        if block.is_module and not sys.dont_write_bytecode:
            path = tmp_path / block.title
            assert any(path.parent.glob(f"__pycache__/{path.stem}.*")), f"{block}: nothing imported it"


def backends_for(page: Path, stack: ExitStack, directory: Path) -> dict[str, str]:
    """Start a backend for each URL in the page's commands, and return the URLs to use instead."""
    text = re.sub("#.*", "", "".join(block.text for block in BLOCKS[page] if block.command == "run"))
    replaced = {}
    for url, kind in {"redis://localhost:6379/0": "Valkey", "nats://localhost:4222": "Nats"}.items():
        if url in text:
            sys.path.append(str(Path(__file__).parents[1] / "support"))
            server = getattr(import_module("backend_servers"), kind)
            if not server.available():
                pytest.skip(f"{kind} is not installed")
            (directory / kind).mkdir()
            replaced[url] = stack.enter_context(server(directory / kind)).url
    return replaced


def anchors_of(page: Path) -> set[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def test_migration_names_can_be_imported() -> None:
    (block,) = (block for block in BLOCKS[ROOT / "MIGRATING.md"] if block.language == "diff")
    exec("\n".join(line[1:] for line in block.text.splitlines() if line.startswith("+")), {})


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_have_targets(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in TARGET.findall(text):
        own = next((url for url in OWN_URLS if target.startswith(url)), None)
        if own is None and re.match(r"https?:", target):
            continue
        # A link into the repository has to lead somewhere, too.
        path, _, anchor = (target if own is None else str(ROOT / target.removeprefix(own))).partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors_of(linked), f"{name_of(page)}: {target}"


def test_site_navigation_has_every_page() -> None:
    def files(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        else:
            for inner in item.values() if isinstance(item, dict) else item:
                yield from files(inner)

    nav = yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text())["nav"]
    assert sorted(files(nav)) == sorted(str(page.relative_to(PAGES)) for page in PAGES.rglob("*.md"))


@pytest.mark.parametrize(
    "page", [page for page in DOCUMENTS if page.read_text().startswith("<!-- include")], ids=name_of
)
def test_links_of_included_pages_fit_the_site(page: Path) -> None:
    hook = runpy.run_path(str(ROOT / "docs/include.py"))["on_page_markdown"]
    file = SimpleNamespace(src_path=str(page.relative_to(PAGES)))
    text = hook(page.read_text(), page=SimpleNamespace(file=file))
    assert len(text) > 100
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in TARGET.findall(text):
        if re.match(r"https?:|#", target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve().relative_to(PAGES)
        image = path.parts[0] == "included"  # the hook adds it to the site
        assert (ROOT.joinpath(*path.parts[1:]) if image else PAGES / path).exists(), target


def test_options_table_lists_each_option_with_its_default() -> None:
    _, options = (PAGES / "reference/response.md").read_text().split("## Options")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+)", options.partition("\n## ")[0], re.MULTILINE))
    words: dict[Any, str] = {None: "none", True: "on", "\n": "LF"}
    for field in fields(StreamOptions):
        default: Any = field.default
        assert rows.pop(field.name) == (words.get(default) or f"{default:g}"), field.name
    assert not rows
    documented = inspect.getdoc(asgi_sse.EventSourceResponse) or ""
    for field in fields(StreamOptions):
        assert f"{field.name}:" in documented


@pytest.mark.parametrize(
    ("page", "heading", "function", "others"),
    [
        ("app", "Options", asgi_sse.SSEMiddleware, {"self", "app", "defaults"}),
        ("broker", "Options of a broker", asgi_sse.Broker, {"self"}),
        ("broker", "Options of a run", asgi_sse.Broker.run, {"self", "name", "source"}),
        ("registry", "Registry", asgi_sse.StreamRegistry, {"self"}),
    ],
)
def test_option_tables_list_each_parameter(
    page: str, heading: str, function: Callable[..., Any], others: set[str]
) -> None:
    _, text = re.split(rf"^#+ {heading}$", (PAGES / f"reference/{page}.md").read_text(), flags=re.MULTILINE)
    cells = re.findall(r"^\| (`\w.*?) \|", text.partition("\n## ")[0], re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert names == {*inspect.signature(function).parameters} - others


@pytest.mark.parametrize("name", ["demo", "serve", "publish", "tail", "bench"])
def test_reference_lists_each_option_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = re.split(rf"^## {name}$", (PAGES / "reference/cli.md").read_text(), flags=re.MULTILINE)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    lines = "".join(line for line in capsys.readouterr().out.splitlines() if line.startswith("  -"))
    option = re.compile(r"--[a-z][a-z-]+")
    assert {*option.findall(found.partition("\n## ")[0])} == {*option.findall(lines)} - {"--help"}


def test_times_of_the_kubernetes_manifest_fit_the_defaults() -> None:
    blocks = BLOCKS[PAGES / "guides/stop.md"]
    (manifest,) = (block for block in blocks if block.language == "yaml")
    pod = yaml.safe_load(manifest.text)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pre_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    server = int(container["command"][container["command"].index("--timeout-graceful-shutdown") + 1])
    drain = inspect.signature(asgi_sse.StreamRegistry).parameters["drain_timeout"].default
    grace = inspect.signature(asgi_sse.Broker).parameters["run_grace"].default
    assert f"drain_timeout={drain:g}" in "".join(block.text for block in blocks)
    assert grace <= drain < server  # the server does not cut streams that end in time
    assert pod["terminationGracePeriodSeconds"] > pre_stop + server  # Kubernetes does not either
    python = "".join(block.text for block in blocks if block.language == "python")
    for probe in ("readinessProbe", "livenessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in python


def test_reference_has_each_public_name() -> None:
    text = "".join(page.read_text() for page in (PAGES / "reference").glob("*.md"))
    for name in (*asgi_sse.__all__, *testing.__all__, *broker.__all__):
        assert re.search(rf"^::: asgi_sse\.(?:\w+\.)*{name}$", text, re.MULTILINE), name
