"""The pictures of the documentation are those that the package's formulas and the committed factors give today."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from longrope.baselines import critical_dimension
from pictures import (
    FOLDER,
    LLAMA2,
    PICTURES,
    RATIO,
    ROOT,
    TINY,
    digest,
    draw,
    factors_data,
    regimes_data,
    turns_data,
    written_digest,
)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_current_and_on_the_page(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.svg"
    assert written_digest(path) == digest(name), "run python tools/pictures.py"
    assert f"](img/{name}.svg)" in (ROOT / "docs" / "method.md").read_text()
    if f"Matplotlib v{matplotlib.__version__}" in path.read_text():  # another version may draw the same otherwise
        assert draw(name, tmp_path).read_bytes() == path.read_bytes()


def test_a_picture_of_other_numbers_is_told(tmp_path: Path) -> None:
    assert written_digest(tmp_path / "none.svg") is None
    copy = tmp_path / "turns.svg"
    copy.write_text((FOLDER / "turns.svg").read_text().replace(digest("turns"), "0" * 64))
    assert written_digest(copy) == "0" * 64


def test_the_numbers_that_the_page_says_of_the_pictures() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    tiny, llama = turns_data().values()
    assert (
        f"pair {tiny['critical']:.1f} of {TINY.pairs} in `tiny` and {llama['critical']:.1f} of {LLAMA2.pairs}" in page
    )
    assert {round(critical_dimension(shape) / shape.pairs, 2) for shape in (TINY, LLAMA2)} == {0.70}
    assert min(tiny["turns"][0], llama["turns"][0]) > 40
    assert max(tiny["turns"][-1], llama["turns"][-1]) < 0.25
    searched = np.array(factors_data()["lines"]["searched"])
    found = re.search(r"leaves (\w+) of 32 pairs at 1.02 or below", page)
    assert found
    assert found[1] == {10: "ten", 11: "eleven", 12: "twelve"}[int((searched <= 1.02).sum())]
    assert 0.9 * RATIO < searched[-1] < RATIO
    spent = regimes_data()["spent"]
    assert spent[256] - spent[255] == 257  # the 256 tokens in the cache once more, and the one that is new
    assert spent[-1] == len(spent) + 256 + 1024
