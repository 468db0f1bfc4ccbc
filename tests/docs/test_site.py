"""The built pages: complete, whole without a network, and with their links to the rest of the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import longrope
from page_blocks import ROOT, environment
from site_links import outside, rewritten


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_in_the_navigation(site: Path) -> None:
    pages = {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")}
    start = (site / "index.html").read_text()
    linked = set(re.findall(r'href="\.?/?([\w-]+\.html)"', start)) | {"index.html"}
    assert {path.name for path in site.glob("*.html")} - {"404.html"} == pages
    assert pages <= linked


def test_the_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text())
        fetched = [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)]
        assert [tag for tag in fetched if 'rel="canonical"' not in tag] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?:", path.read_text()), path.name


def test_public_names_are_described_from_their_docstrings(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in set(longrope.__all__) - {"__version__"}:
        public = getattr(longrope, name)
        first = re.split(r"[`:.;,(]", public.__doc__.strip().splitlines()[0])[0].strip()
        assert f"{public.__module__}.{name}" in page
        assert first in page, name


def test_links_out_of_the_pages(site: Path) -> None:
    assert rewritten("[a](../benchmarks/results/needle.json)") == "[a](repository/benchmarks/results/needle.json)"
    assert rewritten("[the examples](../examples/accelerate)") == "the examples (`examples/accelerate`)"
    assert rewritten("[x](method.md#a) [y](https://e.org) ![z](img/a.svg)") == (
        "[x](method.md#a) [y](https://e.org) ![z](img/a.svg)"
    )
    assert outside("../README.md") == "README.md"
    assert (site / "repository" / "benchmarks" / "results" / "search" / "search.svg").is_file()
