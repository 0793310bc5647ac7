"""Include files from outside of the site: a page ``<!-- include: FILE -->`` shows FILE, with its links adapted."""  # noqa: INP001 (a hook, no package)

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://github.com/asgi-sse/asgi-sse/blob/main/"
FILES = "https://raw.githubusercontent.com/asgi-sse/asgi-sse/main/"
"""The README links to these, so that it also reads on a package index."""
PAGES = ROOT / "docs/pages"
INCLUDE = re.compile(r"\A<!-- include: (\S+) -->\s*\Z")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"""(?<=\ssrc=")docs/pages/|(?<=\ssrcset=")docs/pages/""")  # in HTML, which mkdocs does not change


def included() -> dict[str, str]:
    """Return the included files, each with the page that shows it."""
    found = {page: INCLUDE.match(page.read_text()) for page in PAGES.rglob("*.md")}
    return {include[1]: str(page.relative_to(PAGES)) for page, include in found.items() if include}


def text_of(origin: str) -> str:
    """Return the text of a file, with links into the repository as relative ones."""
    return (ROOT / origin).read_text().replace(f"]({REPOSITORY}", "](").replace(f'"{FILES}', '"')


def target_of(link: re.Match[str], origin: str) -> str:
    """Return the target of a link in the file `origin`, relative to the root of the repository."""
    return normpath(f"{Path(origin).parent}/{link[3]}")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Add the images of included files to the site. mkdocs calls this with all files."""
    from mkdocs.structure.files import File  # noqa: PLC0415 (the tests import this module without mkdocs)

    for origin in included():
        for link in LINK.finditer(text_of(origin)):
            target = target_of(link, origin)
            if link[1] and not target.startswith("docs/pages/"):
                files.append(File.generated(config, f"included/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the text of a page, with the included file in place. mkdocs calls this for each page."""
    include = INCLUDE.match(markdown)
    if include is None:
        return markdown
    origin, here = include[1], Path(page.file.src_path).parent
    pages = included()

    def adapted(link: re.Match[str]) -> str:
        image, text, anchor, target = link[1], link[2], link[4] or "", target_of(link, origin)
        if target in pages:
            path = pages[target]
        elif target.startswith("docs/pages/"):
            path = target.removeprefix("docs/pages/")
        elif image:
            path = f"included/{target}"
        else:  # not a page of the site: show the file's name instead of a link
            return text if target in text else f"{text} (`{target}`)"
        return f"{image}[{text}]({relpath(path, here)}{anchor})"

    return PICTURE.sub(f"{relpath('.', here)}/", LINK.sub(adapted, text_of(origin)))
