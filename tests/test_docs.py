"""What README and docs say is so: commands and options exist, links lead somewhere, the Python code runs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import longrope
from command_lines import parsed
from longrope.errors import UserError
from longrope.evaluate.ruler_texts import read_templates
from longrope.evaluate.templates import read_needle_template, read_passkey_template
from page_blocks import LANGUAGES, PAGES, PLACEHOLDERS, ROOT, Block, blocks, commands
from reference import COMMANDS, PAGE, help_text

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
BLOCKS = [block for page in PAGES for block in blocks(page)]
ARGUMENTS = ["MODEL", "--lengths", "8k", "--documents", "D"]


def of_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def of_page(name: str, language: str) -> list[str]:
    return [block.text for block in of_language(language) if block.page.name == name]


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


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_says_what_it_is_and_whether_it_is_run(block: Block) -> None:
    assert block.language in LANGUAGES
    if block.not_run is not None:
        assert block.language in {"sh", "python"}
        assert len(block.not_run.split()) >= 3, "a reason"
    if block.language == "toml":
        assert tomllib.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text)
    elif block.language == "json":
        assert all(
            json.loads(line) for line in ([block.text] if block.text.startswith("{\n") else block.text.splitlines())
        )
    assert block.file is not None or block.language in {"sh", "python", "text"} or block.page.name == "files.md"


def test_no_block_is_overlooked() -> None:
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    assert {block.not_run is None for block in of_language("sh")} == {True, False}


@pytest.mark.parametrize("block", of_language("sh"), ids=lambda block: block.place)
def test_the_shell_and_our_command_line_accept_the_block(block: Block) -> None:
    """Run or not: every word of it that is ours exists, with its options and their values."""
    subprocess.run(["bash", "-n", "-c", block.text], check=True)
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(block):
        if words[0] == "longrope":
            parsed(words[1:])
        elif "-m" in words and words[words.index("-m") + 1] == "longrope":
            parsed(words[words.index("-m") + 2 :])
        elif words[0] == "make":
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in words[1:]), words
        for word in words:
            for named in re.findall(r"^(?:\.|longrope)\[([\w,]+)\]$", word):
                assert set(named.split(",")) <= extras, word
            if re.fullmatch(r"(?:benchmarks|tools|examples)/.+", word):
                assert (ROOT / word).exists(), word
        script = next((word for word in words if re.fullmatch(r"(?:benchmarks|tools)/\w+\.py", word)), None)
        if script is not None:
            known = (ROOT / script).read_text() + (ROOT / "benchmarks" / "common.py").read_text()
            assert [flag for flag in words if flag.startswith("--") and f'"{flag}"' not in known] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["search", "tiny", "--to", "2k", "-d", "D", "--banana"], "No such option: --banana"),
        (["search", "tiny", "--to", "2kk", "-d", "D"], "length: got '2kk'"),
        (["search", "tiny", "--to", "2k", "-d", "D", "--method", "luck"], "--method: got 'luck'"),
        (["search", "tiny", "--to", "2k"], "Missing parameter: documents"),
        (["export", "tiny", "--out", "o", "--engine", "steam"], "--engine: got 'steam'"),
        (["compare", *ARGUMENTS, "--methods", "none,banana"], "'banana'"),
        (["compare", *ARGUMENTS, "--measure", "luck"], "'luck'"),
        (["evaluate", "luck", "tiny"], "No such command 'luck'"),
        (["finetune", "tiny", "--length", "2k", "-d", "D", "--recipe", "cake"], "--recipe: got 'cake'"),
        (["generate", "tiny", "--policy", "best"], "policy: got 'best'"),
    ],
)
def test_what_the_check_of_command_lines_refuses(line: list[str], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        parsed(line)


@pytest.mark.parametrize("block", of_language("python"), ids=lambda block: block.place)
def test_the_python_of_a_block_compiles_and_names_what_there_is(block: Block) -> None:
    compile(block.text, block.place, "exec")
    for name in re.findall(r"\blongrope\.(\w+)\(", block.text):
        assert name in longrope.__all__, f"{block.place}: longrope.{name}"


@pytest.mark.parametrize("name", sorted(set(longrope.__all__) - {"__version__"}))
def test_every_public_name_says_what_it_takes_and_gives(name: str) -> None:
    public: Any = getattr(longrope, name)
    said = inspect.getdoc(public) or ""
    assert len(said.split()) >= 8
    if inspect.isfunction(public):
        unsaid = [each for each in inspect.signature(public).parameters if not re.search(rf"\b{each}\b", said)]
        assert unsaid == []
        assert UserError.__name__ in said
    for method, function in inspect.getmembers(public, inspect.isfunction) if inspect.isclass(public) else []:
        assert method.startswith("_") or inspect.getdoc(function), f"{name}.{method}"
    assert re.search(rf"^::: longrope\.[\w.]*\b{name}$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_the_readmes_table_names_every_command() -> None:
    named = set(re.findall(r"^\| `longrope (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert named == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("target", ["demo", "test", "test-docs", "lint", "format", "bench", "docs"])
def test_the_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_templates_in_the_docs_can_be_given(tmp_path: Path) -> None:
    (prompts,) = of_page("measures.md", "toml")
    (tmp_path / "prompts.toml").write_text(prompts)
    assert read_passkey_template(tmp_path / "prompts.toml").filler
    assert "Anna Berg" in read_needle_template(tmp_path / "prompts.toml").names
    (texts,) = of_page("ruler.md", "toml")
    (tmp_path / "ruler.toml").write_text("\ufeff" + texts, "utf-8")  # as some editors write it
    assert read_templates(tmp_path / "ruler.toml")


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = of_page("README.md", "python")
    monkeypatch.chdir(tmp_path)
    made: dict[str, object] = {}
    for name, stands_for in PLACEHOLDERS.items():
        code = code.replace(name, stands_for)
    exec(code, made)
    assert (tmp_path / "runs" / "readme" / "factors.json").is_file()
    assert made["table"].lengths == [256, 1024]  # type: ignore[attr-defined]
