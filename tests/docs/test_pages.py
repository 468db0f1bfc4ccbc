"""Every code block of README and docs is run, in the order of its page; see page_blocks.py."""

from __future__ import annotations

from pathlib import Path

import pytest

import page_blocks
from page_blocks import PAGES, Block, blocks, furnish


def is_run(block: Block) -> bool:
    return block.language in {"sh", "python"} and block.not_run is None


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, blocks(page)))], ids=lambda page: page.stem)
def test_the_blocks_of_the_page_run(page: Path, tmp_path: Path) -> None:
    furnish(tmp_path)
    for block in blocks(page):
        page_blocks.run(block, tmp_path)


def test_a_block_that_fails_is_told_with_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("A page.\n\n```sh\ntrue\n```\n\n```sh\nfalse | true\n```\n")
    fine, wrong = blocks(page)
    page_blocks.run(fine, tmp_path)
    with pytest.raises(AssertionError, match=r"^page.md:7: exit code 1\n"):
        page_blocks.run(wrong, tmp_path)
