"""Pages of the site that stand elsewhere in the tree: ``<!-- include: FILE -->`` is that file, with links that fit."""  # noqa: INP001 (a hook, no package)

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs/pages"
INCLUDE = re.compile(r"\A<!-- include: (\S+) -->\s*\Z")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")
PICTURE = re.compile(r"""(?<=\ssrc=")docs/pages/|(?<=\ssrcset=")docs/pages/""")  # of HTML, which mkdocs leaves as it is


def included() -> dict[str, str]:
    """The pages that are included, by the file that they are."""
    found = {page: INCLUDE.match(page.read_text()) for page in PAGES.rglob("*.md")}
    return {include[1]: str(page.relative_to(PAGES)) for page, include in found.items() if include}


def target_of(link: re.Match[str], origin: str) -> str:
    """Where a link of the file `origin` leads, from the root of the tree."""
    return normpath(f"{Path(origin).parent}/{link[3]}")


def on_files(files: Any, *, config: Any, **_: Any) -> Any:
    """Called by mkdocs with all files: adds the images of what is included."""
    from mkdocs.structure.files import File  # noqa: PLC0415 (the tests do without)

    for origin in included():
        for link in LINK.finditer((ROOT / origin).read_text()):
            target = target_of(link, origin)
            if link[1] and not target.startswith("docs/pages/"):
                files.append(File.generated(config, f"included/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    include = INCLUDE.match(markdown)
    if include is None:
        return markdown
    origin, here = include[1], Path(page.file.src_path).parent
    pages = included()

    def fitted(link: re.Match[str]) -> str:
        image, text, anchor, target = link[1], link[2], link[4] or "", target_of(link, origin)
        if target in pages:
            place = pages[target]
        elif target.startswith("docs/pages/"):
            place = target.removeprefix("docs/pages/")
        elif image:
            place = f"included/{target}"
        else:  # no page: its text has to do
            return text if target in text else f"{text} (`{target}`)"
        return f"{image}[{text}]({relpath(place, here)}{anchor})"

    return PICTURE.sub(f"{relpath('.', here)}/", LINK.sub(fitted, (ROOT / origin).read_text()))
