"""What README and docs say is so: commands and options exist, links lead somewhere, the Python code runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from longrope.checkpoint import model_source
from longrope.evaluate.ruler_texts import read_templates
from longrope.evaluate.templates import read_needle_template, read_passkey_template
from reference import COMMANDS, PAGE, help_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def helps() -> dict[str, str]:
    return {command: help_text(command) for command in COMMANDS}


def test_every_command_is_on_the_page_with_every_option(helps: dict[str, str]) -> None:
    sections = dict(
        re.findall(r"^## longrope ([\w ]+)\n+```text\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    )
    assert list(sections) == COMMANDS, "run make docs"
    for command, text in helps.items():
        assert set(FLAG.findall(sections[command])) == set(FLAG.findall(text)), f"{command}: run make docs"


def test_every_command_line_in_the_docs_exists_with_its_options(helps: dict[str, str]) -> None:
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("longrope ")]
    assert commands
    for line in commands:
        words = shlex.split(line, comments=True)[1:]
        command = " ".join(words[:2]) if words[0] == "evaluate" else words[0]
        assert command in helps, line
        assert {word for word in words if word.startswith("--")} <= set(FLAG.findall(helps[command])), line


def test_the_readmes_table_names_every_command() -> None:
    named = set(re.findall(r"^\| `longrope (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("target", ["demo", "test", "lint", "format", "bench", "docs"])
def test_the_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_templates_in_the_docs_can_be_given(tmp_path: Path) -> None:
    (prompts,) = blocks(ROOT / "docs" / "measures.md", "toml")
    (tmp_path / "prompts.toml").write_text(prompts)
    assert read_passkey_template(tmp_path / "prompts.toml").filler
    assert "Anna Berg" in read_needle_template(tmp_path / "prompts.toml").names
    (texts,) = blocks(ROOT / "docs" / "ruler.md", "toml")
    (tmp_path / "ruler.toml").write_text("\ufeff" + texts, "utf-8")  # as some editors write it
    assert read_templates(tmp_path / "ruler.toml")


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    made: dict[str, object] = {}
    exec(code.replace("path/of/a/checkpoint", model_source("tiny")), made)
    assert (tmp_path / "runs" / "readme" / "factors.json").is_file()
    assert made["table"].lengths == [256, 1024]  # type: ignore[attr-defined]
