"""Read the code blocks of the documentation, and run them.

A block is the text between two fences. An HTML comment on the line above the fence says how to run the block. The site
does not show it.

``<!-- run -->``
    For ``sh``: run each line, in a directory of the page's own. Blocks with a ``title="app.py"`` are files there.
    Servers listen on free ports instead of the page's, and ``curl -N`` continues in the background. A ``text`` block
    directly after it shows how the output begins. There, ``…`` stands for any characters, and a line ``…`` for any
    lines.
``<!-- run: to the end -->``
    The same, but the expected output may also appear when the servers stop.
``<!-- run: browser -->``
    For ``js``: run in Chromium, on a page of the server that is running. The ``text`` block after it shows what the
    script logs.
``<!-- not run: REASON -->``
    The block cannot be run here.

A block that only installs packages needs no comment. It is not run, but its extras must exist. A ``curl`` without
expected output must succeed. Any other way to write a block is an error, because the tests would not see it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from codecs import getincrementaldecoder
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving import ROOT, address, environment, free_port, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGES = ROOT / "docs/pages"
TIMEOUT_S = 60.0  # for each single step, on a slow machine; no test waits for it to pass
SERVERS = ("uvicorn", "hypercorn", "granian", "asgi-sse serve", "asgi-sse demo")
ENDLESS = ("curl -N", "asgi-sse tail")

_FENCE = re.compile(r"^( *)```(\w*)( .*)?$")
_UNSUPPORTED = re.compile(r"[\s>*+-]*(```|~~~)|=== \"|[!?]{3} ")  # other fences, and blocks that only mkdocs renders
_COMMENT = re.compile(r"^ *<!-- (.+) -->$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The page.
        line: The number of the block's first line of text.
        language: The language that the fence names.
        title: The file name that the fence gives, or ``""``.
        mark: The text of the comment above the fence, or ``""``.
        text: The text, without its indentation.
    """

    page: Path
    line: int
    language: str
    title: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def command(self) -> str:
        """The mark without its details, such as ``run`` or ``not run``."""
        return self.mark.partition(":")[0]

    @property
    def is_module(self) -> bool:
        """Whether the block is a module of a package, which other code imports instead of the page."""
        return self.language == "python" and "/" in self.title

    @property
    def installs(self) -> bool:
        """Whether the block only installs packages."""
        return self.language == "sh" and all(line.startswith("pip install ") for line in self.text.splitlines())

    def compiled(self) -> Any:
        """Compile the block, so that tracebacks name the page and the line."""
        return compile("\n" * (self.line - 1) + self.text, str(self).rpartition(":")[0], "exec", dont_inherit=True)


def read_blocks(page: Path) -> list[Block]:
    """Return all blocks of a page, in order."""
    blocks, lines, number = [], page.read_text().splitlines(), 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            assert not _UNSUPPORTED.match(lines[number - 1]), f"{page}:{number}: write the block as ```language"
            continue
        indent, language, rest = fence.groups(default="")
        comment = _COMMENT.match(lines[number - 2]) if number > 1 else None
        title = _TITLE.search(rest)
        begin = number
        while lines[number].strip() != "```":
            number += 1
        text = textwrap.dedent("\n".join(lines[begin:number])) + "\n"
        assert indent == " " * len(indent)
        blocks.append(Block(page, begin + 1, language, title[1] if title else "", comment[1] if comment else "", text))
        number += 1
    return blocks


def in_order(expected: str, output: str) -> bool:
    """Return whether `output` has the lines of `expected`, in that order; ``…`` stands for any characters."""
    lines = iter(output.splitlines())
    for wanted in filter(None, map(str.strip, expected.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if not any(pattern.fullmatch(line.strip()) for line in lines):
            return False
    return True


def begins_as_shown(expected: str, *outputs: str) -> bool:
    """Return whether `expected` is how the outputs begin, one output after the other.

    A line ``…`` stands for any lines. Blank lines are ignored. Whole outputs may be missing from `expected`.
    """
    wanted = [line for line in map(str.strip, expected.splitlines()) if line]
    if not outputs:
        return not wanted
    actual = "".join(f"{line.strip()}\n" for line in outputs[0].splitlines() if line.strip())
    patterns = ("(?:.*\n)*?" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + "\n" for line in wanted)
    pattern = ""
    for number, more in enumerate(["", *patterns]):
        pattern += more
        if re.match(pattern, actual) and begins_as_shown("\n".join(wanted[number:]), *outputs[1:]):
            return True
    return False


class Output:
    """The output of a command, read in a thread while the command runs."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.text = ""
        self._changed = threading.Condition()
        self.ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            decoder = getincrementaldecoder("utf-8")()  # a chunk may end in the middle of a character
            while chunk := stream.read1():  # type: ignore[attr-defined]
                with self._changed:
                    self.text += decoder.decode(chunk)
                    self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[str], bool]) -> bool:
        """Wait until `condition` holds for the text, and return whether it does."""
        with self._changed:
            self._changed.wait_for(lambda: self.ended or condition(self.text), TIMEOUT_S)
            return condition(self.text)

    def close(self) -> None:
        """Kill the command if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._thread.join(TIMEOUT_S)


class Session:
    """A reader of a page, who follows it in a new directory.

    Args:
        directory: The directory.
        stack: Ends the processes.
        replaced: Texts of the page's commands, with what to run instead.
    """

    def __init__(self, directory: Path, stack: ExitStack, replaced: dict[str, str]) -> None:
        self._directory = directory
        self._stack = stack
        self._replaced = replaced
        self._variables: dict[str, str] = {}
        self._ports: dict[str, int] = {}
        self._servers: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._waiting: list[tuple[Block, str, list[Output]]] = []
        self.origin = ""

    def write(self, block: Block) -> None:
        """Write the block to the file that its title names."""
        path = self._directory / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    def run(self, block: Block, expected: str) -> None:
        """Run the lines of a block; `finish` waits for the rest of the expected output."""
        lines = block.text.replace("\\\n", " ").splitlines()
        outputs = [output for line in lines if (output := self._run(line, block, expected))]
        if expected:
            self._waiting.append((block, expected, outputs))

    def _run(self, line: str, block: Block, expected: str) -> Output | None:
        for old, new in self._replaced.items():
            line = line.replace(old, new)
        line = re.sub(r"^python -m asgi_sse\b", "asgi-sse", line)
        words = shlex.split(line, comments=True)
        if not words or words[:2] == ["pip", "install"]:
            return None
        if words[0] == "asgi-sse" and (len(words) == 1 or words[1].startswith("--")):
            words.insert(1, "demo")
        if words[0] == "export":
            self._variables |= dict(word.split("=", 1) for word in words[1:])
            return None
        variables = dict(self._variables)
        while "=" in words[0]:
            name, value = words.pop(0).split("=", 1)
            variables[name] = value
        if " ".join(words).startswith(SERVERS):
            self._serve(words, variables)
            return None
        for port, actual in self._ports.items():
            line = line.replace(f":{port}", f":{actual}")
        line = re.sub(r"\bcurl ", f"curl -sS {'' if expected else '--fail '}", line)  # -s: no progress meter
        line = re.sub(r"\basgi-sse ", "python -m asgi_sse ", line)  # the script may not be installed
        path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
        endless = " ".join(words).startswith(ENDLESS)
        process = subprocess.Popen(
            ["sh", "-c", f"exec {line}" if endless else line],  # without exec, only the shell would be killed
            cwd=self._directory,
            env={**environment(), "PYTHONWARNINGS": "ignore", **variables, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = Output(process)
        self._stack.callback(output.close)
        if endless:
            assert output.wait_for(lambda text: "\n" in text), f"{block}: {line}: no output"
        else:
            assert process.wait(TIMEOUT_S) == 0, f"{block}: {line}: exit status {process.returncode}: {output.text}"
        return output

    def _serve(self, words: list[str], variables: dict[str, str]) -> None:
        module, *arguments = words
        module = module.replace("-", "_")
        wanted = re.search(r"(?:--port[ =]|--bind[ =]\S*:)(\d+)", " ".join(words))
        port = free_port()
        self._ports[wanted[1] if wanted else "8000"] = port
        self.origin = f"http://127.0.0.1:{port}"
        log = self._directory / f"server{port}.log"
        kept = [
            word
            for previous, word in zip(words, arguments, strict=False)
            if not {previous, word.partition("=")[0]} & {"--port", "--host", "--bind"}
        ]
        command = [sys.executable, "-m", module, *kept, *address(module, port)]
        variables = {**variables, "PYTHONPATH": f"{self._directory}:{environment()['PYTHONPATH']}"}
        process = self._stack.enter_context(serving(command, port, log, self._directory, variables))
        self._servers.append((process, log))

    def check_log(self, lines: list[str], expected: str, block: Block) -> None:
        """Check what the script of a block has logged."""
        assert in_order(expected, "\n".join(lines)), f"{block}: expected\n{expected}\nbut it logged\n{lines}"

    def finish(self) -> None:
        """Wait for the expected output, then stop the servers while their streams are open."""
        self._expect([waiting for waiting in self._waiting if waiting[0].mark == "run"])
        for process, log in self._servers:
            process.terminate()
            process.wait(TIMEOUT_S)
            text = log.read_text()
            # No check for ResourceWarning: uvicorn itself leaves a socket open until its process ends.
            assert not re.search(r"ERROR|Traceback|RuntimeWarning", text), text
        self._expect(self._waiting)

    def _expect(self, waiting: list[tuple[Block, str, list[Output]]]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        for block, expected, outputs in waiting:
            while True:
                ended = all(output.ended for output in outputs)  # read before the text, which is then complete
                if begins_as_shown(expected, *(texts := [output.text for output in outputs])):
                    break
                more = time.monotonic() < deadline and not ended
                assert more, f"{block}: expected\n{expected}\nbut the output was\n{''.join(texts)}"
                time.sleep(0.02)


@contextmanager
def session(directory: Path, replaced: dict[str, str]) -> Iterator[Session]:
    """Follow a page in `directory`; `replaced` has texts of its commands, with what to run instead."""
    with ExitStack() as stack:
        the_session = Session(directory, stack, replaced)
        yield the_session
        the_session.finish()


class Browser:
    """The Chromium that is installed on this machine."""

    def __init__(self, stack: ExitStack) -> None:
        from playwright.sync_api import sync_playwright

        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        playwright = stack.enter_context(sync_playwright())
        self._browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        stack.callback(self._browser.close)

    def run(self, script: str, origin: str, done: Callable[[list[str]], bool]) -> list[str]:
        """Run a script on an empty page of `origin` until `done` holds for its log, and return the log."""
        logged: list[str] = []
        page = self._browser.new_page()
        try:
            page.route(f"{origin}/", lambda route: route.fulfill(body="<!doctype html>", content_type="text/html"))
            page.on("console", lambda message: logged.append(message.text))
            page.on("pageerror", lambda error: logged.append(f"error: {error}"))
            page.goto(f"{origin}/")
            page.add_script_tag(content=script, type="module")
            deadline = time.monotonic() + TIMEOUT_S
            while not done(logged) and time.monotonic() < deadline:
                page.wait_for_timeout(20)
        finally:
            page.close()
        return logged
