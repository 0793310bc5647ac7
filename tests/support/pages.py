"""The code blocks of the documentation, and how each of them is run.

A block is what stands between fences. An HTML comment on the line above its fence, which readers do not see, says how
it is run:

``<!-- run -->``: of ``sh``: its lines are run, in a directory of the page's own, where blocks with a ``title="app.py"``
    have become files. Servers listen elsewhere than at port 8000, ``curl -N`` goes on in the background, and what a
    ``text`` block right behind has is how what comes out begins; ``…`` stands for anything, and alone for any lines.
``<!-- run: to the end -->``: the same, but what comes out when the servers stop counts too.
``<!-- run: browser -->``: of ``js``: run in Chromium, on a page of the server that runs; the same with what it logs.
``<!-- not run: REASON -->``: it cannot be run here.

What installs packages needs no mark: it is not run, but has to name extras that there are. A ``curl`` behind which no
output stands has to succeed. Another way to write a block is an error, since it would not be seen.
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
ENOUGH = 60.0  # seconds for any one thing; none of them waits for it to pass
SERVERS = ("uvicorn", "hypercorn", "granian", "asgi-sse serve", "asgi-sse demo")
ENDLESS = ("curl -N", "asgi-sse tail")

_FENCE = re.compile(r"^( *)```(\w*)( .*)?$")
_OTHER_FENCE = re.compile(r"[\s>*+-]*(```|~~~)|=== \"|[!?]{3} ")  # and what mkdocs alone shows as more than text
_COMMENT = re.compile(r"^ *<!-- (.+) -->$")
_TITLE = re.compile(r'title="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """What stands between fences."""

    page: Path
    line: int  # of its first line
    language: str
    title: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def command(self) -> str:
        """What its mark says, without the details."""
        return self.mark.partition(":")[0]

    @property
    def is_module(self) -> bool:
        """Whether it is a file in a package: that is run by who imports it, not as a part of the page."""
        return self.language == "python" and "/" in self.title

    @property
    def installs(self) -> bool:
        """Whether it does nothing but install packages."""
        return self.language == "sh" and all(line.startswith("pip install ") for line in self.text.splitlines())

    def compiled(self) -> Any:
        """Its code, of which tracebacks name the page and the line."""
        return compile("\n" * (self.line - 1) + self.text, str(self).rpartition(":")[0], "exec", dont_inherit=True)


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    blocks, lines, number = [], page.read_text().splitlines(), 0
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            assert not _OTHER_FENCE.match(lines[number - 1]), f"{page}:{number}: write it as ```language"
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
    """Whether the lines of `expected` are among those of `output`, in that order; ``…`` stands for anything."""
    lines = iter(output.splitlines())
    for wanted in filter(None, map(str.strip, expected.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if not any(pattern.fullmatch(line.strip()) for line in lines):
            return False
    return True


def as_shown(expected: str, *outputs: str) -> bool:
    """Whether `expected` is what comes first of one output after the other; a line ``…`` stands for any lines.

    Blank lines do not count, and an output may be left out as a whole.
    """
    wanted = [line for line in map(str.strip, expected.splitlines()) if line]
    if not outputs:
        return not wanted
    said = "".join(f"{line.strip()}\n" for line in outputs[0].splitlines() if line.strip())
    patterns = ("(?:.*\n)*?" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + "\n" for line in wanted)
    pattern = ""
    for number, more in enumerate(["", *patterns]):
        pattern += more
        if re.match(pattern, said) and as_shown("\n".join(wanted[number:]), *outputs[1:]):
            return True
    return False


class Output:
    """What a command says while it runs, and has said."""

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
            decoder = getincrementaldecoder("utf-8")()  # a chunk may end within a character
            while chunk := stream.read1():  # type: ignore[attr-defined]
                with self._changed:
                    self.text += decoder.decode(chunk)
                    self._changed.notify_all()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def wait_for(self, what: Callable[[str], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.ended or what(self.text), ENOUGH)
            return what(self.text)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(ENOUGH)
        self._thread.join(ENOUGH)


class Session:
    """One reader of a page, who does what it says in a new directory."""

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
        """Make the file that the block's title names."""
        path = self._directory / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    def run(self, block: Block, expected: str) -> None:
        """Run its lines; what is still to come may come until the page's end."""
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
        line = re.sub(r"\bcurl ", f"curl -sS {'' if expected else '--fail '}", line)  # without its progress
        line = re.sub(r"\basgi-sse ", "python -m asgi_sse ", line)  # it may not be installed
        path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
        endless = " ".join(words).startswith(ENDLESS)
        process = subprocess.Popen(
            ["sh", "-c", f"exec {line}" if endless else line],  # the shell would be ended in its place
            cwd=self._directory,
            env={**environment(), "PYTHONWARNINGS": "ignore", **variables, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = Output(process)
        self._stack.callback(output.close)
        if endless:
            assert output.wait_for(lambda text: "\n" in text), f"{block}: {line}: nothing comes"
        else:
            assert process.wait(ENOUGH) == 0, f"{block}: {line}: status {process.returncode}: {output.text}"
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
            for before, word in zip(words, arguments, strict=False)
            if not {before, word.partition("=")[0]} & {"--port", "--host", "--bind"}
        ]
        command = [sys.executable, "-m", module, *kept, *address(module, port)]
        variables = {**variables, "PYTHONPATH": f"{self._directory}:{environment()['PYTHONPATH']}"}
        process = self._stack.enter_context(serving(command, port, log, self._directory, variables))
        self._servers.append((process, log))

    def log_of(self, lines: list[str], expected: str, block: Block) -> None:
        """Hold what a script has logged against what is expected."""
        assert in_order(expected, "\n".join(lines)), f"{block}: expected\n{expected}\nbut it has logged\n{lines}"

    def finish(self) -> None:
        """Wait for what was expected, and end the servers, with streams open."""
        self._expect([waiting for waiting in self._waiting if waiting[0].mark == "run"])
        for process, log in self._servers:
            process.terminate()
            process.wait(ENOUGH)
            text = log.read_text()
            # uvicorn itself leaves a socket to the end of its process: no ResourceWarning
            assert not re.search(r"ERROR|Traceback|RuntimeWarning", text), text
        self._expect(self._waiting)

    def _expect(self, what: list[tuple[Block, str, list[Output]]]) -> None:
        deadline = time.monotonic() + ENOUGH
        for block, expected, outputs in what:
            while True:
                ended = all(output.ended for output in outputs)  # asked first: behind its end nothing more is said
                if as_shown(expected, *(said := [output.text for output in outputs])):
                    break
                more = time.monotonic() < deadline and not ended
                assert more, f"{block}: expected\n{expected}\nbut there was\n{''.join(said)}"
                time.sleep(0.02)


@contextmanager
def session(directory: Path, replaced: dict[str, str]) -> Iterator[Session]:
    """Somebody who follows a page."""
    with ExitStack() as stack:
        the_session = Session(directory, stack, replaced)
        yield the_session
        the_session.finish()


class Browser:
    """A Chromium that there is on this machine; started when it is needed."""

    def __init__(self, stack: ExitStack) -> None:
        from playwright.sync_api import sync_playwright

        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        playwright = stack.enter_context(sync_playwright())
        self._browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        stack.callback(self._browser.close)

    def run(self, script: str, origin: str, done: Callable[[list[str]], bool]) -> list[str]:
        """Run a script on an empty page of `origin`, until what it has logged is enough; gives that."""
        logged: list[str] = []
        page = self._browser.new_page()
        try:
            page.route(f"{origin}/", lambda route: route.fulfill(body="<!doctype html>", content_type="text/html"))
            page.on("console", lambda message: logged.append(message.text))
            page.on("pageerror", lambda error: logged.append(f"error: {error}"))
            page.goto(f"{origin}/")
            page.add_script_tag(content=script, type="module")
            deadline = time.monotonic() + ENOUGH
            while not done(logged) and time.monotonic() < deadline:
                page.wait_for_timeout(20)
        finally:
            page.close()
        return logged
