"""A hook of mkdocs: links that lead out of docs/ lead somewhere on the built pages, too.

Pages link to files of the repository as they lie in it, so that the links work wherever the repository is read. What is
linked is put beside the pages, under `repository/`; of a folder the link becomes its path as text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BESIDE = "repository"

_LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|`[^`]*`)*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def outside(target: str) -> str | None:
    """The path from the repository's root of what a page links to; None where that is in docs/ or no file of ours."""
    if re.match(r"\w+:|/|#", target):
        return None
    path = posixpath.normpath(posixpath.join("docs", target))
    return None if path.startswith(("docs/", "../")) else path


def rewritten(markdown: str) -> str:
    """A page of docs/ with its links to the rest of the repository as the built pages have them."""

    def link(match: re.Match[str]) -> str:
        path = outside(match["target"])
        if path is None:
            return match[0]
        if not (ROOT / path).is_file() or path.endswith(".md"):
            name = match["text"]
            return name if path in name else f"{name} (`{path}`)"
        return f"{match['mark']}[{match['text']}]({BESIDE}/{path}{match['anchor'] or ''})"

    return _LINK.sub(link, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for each page."""
    return rewritten(markdown)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this with the files of docs/; those that pages link to from there are added."""
    from mkdocs.structure.files import File

    linked = set()
    for page in sorted((ROOT / "docs").glob("*.md")):
        for match in _LINK.finditer(page.read_text("utf-8")):
            path = outside(match["target"])
            if path is not None and (ROOT / path).is_file() and not path.endswith(".md"):
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, f"{BESIDE}/{path}", abs_src_path=str(ROOT / path)))
    return files
