"""Names are text: a terminal, a page and a model card show them and act on none."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
from base64 import b64encode
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.table import Table

from commands import longrope, refused, table
from hostility import CONTROL, MARKUP
from longrope.console import Plain, _PlainLines
from longrope.errors import UserError, one_line, printable, shown
from longrope.export.card import extension_card, model_card
from longrope.report import write_report
from report_runs import add_positions, further, make_run

HOSTILE = f"{MARKUP}'\"&lt;`x`{CONTROL}"
CARD = "x\n# Own heading\n<script>hostile()</script> ![i](http://e.vil/i) [l](javascript:x) `c` | https://e.vil \x1b[2J"


class Elements(HTMLParser):
    """Every element of a page with the names of its attributes, and what its scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.values: list[str] = []
        self.scripts: list[str] = []
        self._script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, tuple(name for name, _ in attrs)] += 1
        self.values += [value for name, value in attrs if name == "content" and value and "default-src" in value]
        self._script = tag == "script" and not attrs
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data


def pages(folder: Path) -> tuple[str, str]:
    """The page of a run, and of the same run where every name is hostile."""
    made = []
    for name, text in (("plain", "a"), ("hostile", HOSTILE)):
        run = make_run(folder / name, name=text, document=text, method=text)
        add_positions(further(run))
        for path in (run / "config.json", run / "ruler" / "metrics.json", run / "harness" / "metrics.json"):
            data = json.loads(path.read_text())
            data.pop("crc", None)  # as of a run of an earlier version, which anybody may write
            data.setdefault("settings", {})["template"] = {"intro": text}
            for key in ("niah_single_1", "arc_easy"):
                data = json.loads(json.dumps(data).replace(f'"{key}"', json.dumps(f"task {text}")))
            path.write_text(json.dumps(data))
        made.append(write_report(run).read_text("utf-8"))
    return made[0], made[1]


def test_hostile_names_make_no_element_of_a_page(tmp_path: Path) -> None:
    plain, hostile = (Elements(page) for page in pages(tmp_path))
    assert hostile.found == plain.found
    assert hostile.scripts == plain.scripts
    assert not any("<img" in script for script in hostile.scripts)


def test_a_page_lets_its_own_scripts_run_alone(tmp_path: Path) -> None:
    for page in pages(tmp_path):
        elements = Elements(page)
        (policy,) = elements.values
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        hashes = {f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in elements.scripts}
        assert set(rules.pop("script-src").split()) == hashes
        assert len(hashes) == 2
        assert "http" not in policy
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert not [names for _, names in elements.found if any(name.startswith("on") for name in names)]


def test_a_page_without_plots_lets_no_script_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"command": "search", "settings": {}, "model": HOSTILE}))
    elements = Elements(write_report(tmp_path / "run").read_text("utf-8"))
    assert elements.scripts == []
    assert "script-src 'none'" in elements.values[0]


def test_a_live_view_shows_names_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", name=HOSTILE, document=HOSTILE, method=HOSTILE)
    ran = longrope("watch", run, "--once")
    assert ran.code == 0
    assert all(letter.isprintable() or letter == "\n" for letter in ran.err)
    assert "[bold]" in ran.err


def test_names_are_no_markup_of_a_model_card() -> None:
    made = replace(table(), provenance={"method": CARD, CARD: [CARD]})
    plain = replace(table(), provenance={"method": "x", "y": ["x"]})
    for card, other in (
        (model_card(CARD, made, "long"), model_card("x", plain, "long")),
        (extension_card(CARD, made, []), extension_card("x", plain, [])),
    ):
        assert len(card.splitlines()) == len(other.splitlines())
        assert "<" not in card
        assert "\x1b" not in card
        assert "://" not in card
        written = re.sub(r"\\.", "", card)
        assert not re.search(r"\]\(|!\[|`c`", written)


@pytest.mark.parametrize("name", ["[/bold]", "[red]x", ":smile:", "a\x1b[31m", "a\nb", "\udcff"])
def test_paths_are_text_on_a_terminal(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / name)
    for command in (("report", name), ("watch", name, "--once"), ("factors", f"{name}/factors.json")):
        ran = longrope(*command)
        assert ran.code == 0, ascii(ran.err)
        assert ran.err.replace("\n", "").isprintable(), ascii(ran.err)
    for command in (
        ("report", f"no{name}"),
        ("factors", f"no{name}"),
        ("doctor", f"no{name}"),
        ("documents", f"no{name}"),
    ):
        refused(*command)


def test_a_console_acts_on_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    console = Plain()
    shown_table = Table(title=HOSTILE)
    shown_table.add_column("[bold]" + CONTROL)
    shown_table.add_row(HOSTILE)
    console.print(shown_table)
    console.print(HOSTILE, soft_wrap=True)
    record = logging.LogRecord("longrope", logging.INFO, "", 0, "of %s", (HOSTILE,), None)
    for text in (out.getvalue(), _PlainLines().format(record)):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert "[bold]" in text.replace("\n", "")


def test_an_error_is_one_line_of_a_bearable_length() -> None:
    error = UserError("a\nb", got=CONTROL + "x" * 10**6, rule="r\x1b", do="d\u2028e")
    assert str(error).isprintable()
    assert len(str(error)) < 2500
    assert one_line("a \t\r\n b\x1b") == "a b\\x1b"
    assert printable("a\x1b\n\u00a0\u3000\u202e\ud800", "\n") == "a\\x1b\n\u00a0\u3000\\u202e\\ud800"
    assert shown("x" * 100).endswith(" ...")
    assert shown(16**5000) == "a int too large to show"


def test_a_text_of_a_model_is_written_as_it_is_but_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope.console import print_out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, expected in ((io.StringIO(), "a\x1b[2J\n\\ud800"), (Terminal(), "a\\x1b[2J\n\\ud800")):
        monkeypatch.setattr("sys.stdout", out)
        print_out("a\x1b[2J\n\ud800")
        assert out.getvalue() == expected


def test_half_a_surrogate_pair_stays_what_json_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    replace(table(), model="half \ud800").save("f.json")
    assert json.loads(Path("f.json").read_text())["model"] == "half \ud800"
    for form in ("csv", "json"):
        assert longrope("factors", "f.json", "--to", form, "--out", f"out.{form}").code == 0
    config = {"model_type": "llama", "half \ud800": "\ud800", "max_position_embeddings": 48, "head_dim": 16}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert longrope("doctor", "model", "--fix", "mended").code in (0, 1)
    assert json.loads((tmp_path / "mended" / "config.json").read_text())["half \ud800"] == "\ud800"
    shutil.rmtree(tmp_path / "mended")
    assert os.listdir(tmp_path / "model") == ["config.json"]
