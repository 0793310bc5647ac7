"""Pages of the site that stand elsewhere in the tree: ``<!-- include: FILE -->`` is that file, with links that fit."""  # noqa: INP001 (a hook, no package)

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = "docs/pages/"
INCLUDE = re.compile(r"\A<!-- include: (\S+) -->\s*\Z")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    include = INCLUDE.match(markdown)
    if include is None:
        return markdown
    origin = include[1]
    text = (ROOT / origin).read_text()
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)", lambda link: fitted(link, origin, page), text)


def fitted(link: re.Match[str], origin: str, page: Any) -> str:
    """The link as it leads from `page`; of what is no page, its text."""
    text, target, anchor = link[1], normpath(f"{Path(origin).parent}/{link[2]}"), link[3] or ""
    for place in (ROOT / PAGES).rglob("*.md"):
        included = INCLUDE.match(place.read_text())
        name = str(place.relative_to(ROOT / PAGES))
        if target == PAGES + name or (included and included[1] == target):
            return f"[{text}]({relpath(name, Path(page.file.src_path).parent)}{anchor})"
    return f"{text} (`{target}`)" if target not in text else text
