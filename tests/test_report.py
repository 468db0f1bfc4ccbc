"""The report: one page that holds everything, loads nothing, believes no name and says what is missing."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import longrope
from longrope.baselines import METHODS, baseline, critical_dimension
from longrope.errors import UserError
from longrope.report import write_csv, write_png, write_report, write_tensorboard
from longrope.report.facts import (
    Card,
    cards,
    command_line,
    headline,
    missing,
    not_measured,
    settings,
    table_rows,
    verdict,
)
from longrope.report.figures import log_ticks, on_log_axis
from longrope.report.plots import plots_of
from longrope.report.read import RunData, read_run
from longrope.report.results import MEASURES
from longrope.report.searched import search_facts
from longrope.report.style import count_text, duration_text, is_ours, look, percent_text, value_text
from report_runs import CONFIG, LENGTHS, SHAPE, add_positions, further, make_run, measured, results


class Page(HTMLParser):
    """What a browser would see: elements, text outside of scripts, and the JSON of the figures."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.bold: list[str] = []
        self.rows: list[list[str]] = []
        self.json = ""
        self._inside: list[tuple[str, dict[str, str | None]]] = []
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in ("meta", "link", "img", "br"):
            self._inside.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, attributes = self._inside[-1] if self._inside else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.json += data
        elif tag not in ("script", "style"):
            self.words.append(data.strip())
            inside = {name for name, _ in self._inside}
            if inside & {"td", "th"} and tag != "small":
                self.rows[-1][-1] += data.strip()
            if tag == "strong":
                self.bold.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(write_report(run))


# --- the whole page --------------------------------------------------------------------------------------------------


def test_the_report_is_written_beside_the_run_or_where_asked(run: Path, tmp_path: Path) -> None:
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "other.html").read_bytes() == (run / "report.html").read_bytes()


def test_the_page_is_small_and_loads_nothing(run: Path, page: Page) -> None:
    assert (run / "report.html").stat().st_size < 6_000_000
    loading = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert [item for item in page.attributes if item[1] in loading] == []
    assert page.tags.keys().isdisjoint({"link", "iframe", "img", "object", "embed", "base", "form"})
    policy = [value for tag, key, value in page.attributes if (tag, key) == ("meta", "content") and "-src" in value]
    assert len(policy) == 1
    assert policy[0].startswith("default-src 'none';")
    style = (run / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "@media" in style
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_is_in_the_page_once_and_every_plot_has_its_place(run: Path, page: Page) -> None:
    assert (run / "report.html").read_text().count("plotly.js v") == 1
    figures = json.loads(page.json)
    places = [value for _, key, value in page.attributes if key == "data-figure"]
    assert places == ["results", "gap", "factors", "wavelengths", "convergence"]
    assert sorted(figures) == sorted(places)


def test_every_method_is_in_the_table_with_its_figures_and_the_best_first(page: Page) -> None:
    header = page.rows.index(["method", "256", "1024", "2048"])
    assert page.rows[header + 1 : header + 7] == [
        ["searched", "5.100", "4.500", "4.268"],
        ["YaRN", "5.100", "4.600", "4.490"],
        ["YaRN + su", "5.100", "4.610", "4.520"],
        ["dynamic NTK", "5.100", "4.950", "5.400"],
        ["PI", "5.100", "6.900", "9.100"],
        ["unscaled", "5.100", "35.00", "—"],
    ]
    assert page.bold == ["5.100", "4.500", "4.268", *["5.100"] * 5]
    assert "3.841 – 4.695" in page.text
    assert next(value for _, key, value in page.attributes if key == "data-method") == "searched"


def test_the_page_says_what_was_asked(page: Page) -> None:
    assert "tiny, 256 → 2048 tokens: perplexity 4.27, YaRN 4.49 (−4.9%)" in page.text
    assert "longrope search tiny --documents 'my texts'" in page.text
    assert ["asyncio/events.py", "ab" * 8, "17"] in page.rows
    assert ["settings.seed", "3"] in page.rows
    assert ["longrope", "0.1.0"] in page.rows
    assert ["256", "1.000", "1.000", "0", "1.0000"] in page.rows
    assert ["2048", "1.000", "9.000", "4", "1.1700"] in page.rows
    assert "Missing" not in page.text


@pytest.mark.usefixtures("page")
def test_the_page_follows_light_and_dark_screens_and_paper(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert "@media screen and (prefers-color-scheme: dark)" in text
    assert "@media print" in text
    assert 'matchMedia("(prefers-color-scheme: dark)")' in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_importing_the_report_imports_neither_torch_nor_transformers_nor_plotly() -> None:
    code = "import sys, longrope.report, longrope.runs; print({'torch', 'transformers', 'plotly'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"


# --- names from files ------------------------------------------------------------------------------------------------

HOSTILE = "</script></title></style><img src=x onerror=alert(1)>&lt;b>'\"{{ 7*7 }}\u2028%{x}"


def test_hostile_names_are_text_everywhere(run: Path, page: Page, tmp_path: Path) -> None:
    hostile = Page(write_report(make_run(tmp_path / "run", name=HOSTILE, document=HOSTILE, method=HOSTILE)))
    assert hostile.tags == page.tags
    shown = " ".join(HOSTILE.split())
    assert " ".join(hostile.text.split()).count(shown) >= 5  # title, headline, table, document, settings
    figures = json.loads(hostile.json)
    names = [trace["name"] for trace in figures["results"]["data"]]
    assert [name for name in names if "img" in name] == [
        "&lt;/script&gt;&lt;/title&gt;&lt;/style&gt;&lt;img src=x onerror=alert(1)&gt;&amp;lt;b&gt;'\""
        "{{ 7*7 }}\u2028%{x}"
    ]
    assert "<" not in json.dumps([figure["data"] for figure in figures.values()])


def test_a_hostile_measure_is_text_too(run: Path, page: Page, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    metrics = json.loads((path / "metrics.json").read_text())
    (path / "metrics.json").write_text(json.dumps({**metrics, "measure": "<a href=x>passkey</a>"}))
    hostile = Page(write_report(path))
    assert hostile.tags - page.tags == Counter()
    assert page.tags - hostile.tags == Counter({"button": 1}), "only the logarithmic axis of a perplexity"
    title = json.loads(hostile.json)["results"]["layout"]["yaxis"]["title"]["text"]
    assert title == "&lt;a href=x&gt;passkey&lt;/a&gt;"


def test_a_name_that_is_no_unicode_text_is_still_written(tmp_path: Path) -> None:
    assert "broken-?-name" in Page(write_report(make_run(tmp_path, name="broken-\udcff-name"))).text


# --- plots -----------------------------------------------------------------------------------------------------------


def figures_of(path: Path) -> dict[str, Any]:
    return {plot.name: plot.figure for plot in plots_of([read_run(path)])}


def test_the_results_plot_has_every_method_on_log_axes_and_ours_stands_out(run: Path) -> None:
    figure = figures_of(run)["results"]
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert set(traces) == {"searched", "YaRN", "YaRN + su", "dynamic NTK", "PI", "unscaled"}
    assert traces["searched"]["y"] == [5.1, 4.5, 4.268]
    assert traces["unscaled"]["y"] == [5.1, 35.0, None]
    assert traces["YaRN"]["x"] == LENGTHS
    widths = {name: trace["line"]["width"] for name, trace in traces.items()}
    assert all(widths["searched"] > width for name, width in widths.items() if name != "searched")
    assert (figure["layout"]["xaxis"]["type"], figure["layout"]["yaxis"]["type"]) == ("log", "log")
    assert figure["layout"]["xaxis"]["ticktext"] == ["256", "1024", "2048"]
    assert traces["YaRN"]["error_y"]["array"] == pytest.approx([0.51, 0.46, 0.449])


def test_the_gap_plot_is_relative_to_the_best_baseline_at_the_target(run: Path) -> None:
    traces = {trace["name"]: trace for trace in figures_of(run)["gap"]["data"]}
    assert traces["YaRN"]["y"] == [0, 0, 0]
    assert traces["searched"]["y"] == pytest.approx([0, 100 * (4.5 / 4.6 - 1), 100 * (4.268 / 4.49 - 1)])


def test_the_factors_plot_shows_ours_beside_pi_ntk_and_yarn_with_the_critical_dimension(run: Path) -> None:
    figure = figures_of(run)["factors"]
    traces = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert set(traces) == {"this run", "PI", "NTK", "YaRN"}
    for name, label in (("pi", "PI"), ("ntk", "NTK"), ("yarn", "YaRN")):
        assert traces[label] == list(baseline(name, SHAPE, 2048).rescale)
    assert traces["this run"] == np.linspace(1, 9, 32).tolist()
    assert figure["layout"]["shapes"][0]["x0"] == critical_dimension(SHAPE)
    assert figure["layout"]["annotations"][0]["text"] == "critical dimension 22.4"


def test_the_convergence_is_the_best_so_far_against_token_passes(run: Path) -> None:
    made = {plot.name: plot for plot in plots_of([read_run(run)])}
    figure = made["convergence"].figure
    line = {trace["name"]: trace for trace in figure["data"]}
    assert line["best so far"]["x"] == [2048 * count for count in (1, 2, 5, 7, 7)]
    assert line["best so far"]["y"] == [9.1, 4.49, 4.3, 4.268, 4.268]
    assert line["seeds"]["y"] == [9.1, 4.49, 4.6]
    assert line["mutations"]["x"] == [2048 * count for count in (3, 5, 6, 7)]
    assert line["mutations"]["y"] == [None, 4.3, 4.35, 4.268]
    assert line["YaRN"]["y"] == [4.49, 4.49]
    assert figure["layout"]["xaxis"]["title"]["text"] == "token-passes, 2.05k an evaluation"
    assert made["convergence"].caption == (
        "Best 4.268 after 14.3k of 14.3k token-passes. Dots are candidates on all windows, 7; "
        "2 lie above the frame or are not finite."
    )
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 4.268 < 4.49 < high < 9.1


def task(origin: str, windows: list[int], value: float | None = None, **more: object) -> dict[str, object]:
    """A line of evaluations.jsonl as a search of tasks writes it; each origin has factors of its own."""
    factors = {"rescale": [1.0, float(sum(origin.encode()))], "start_tokens": 0, "attention_factor": 1.1}
    tokens = 2048 * len(windows) * (3 if "gradient" in more else 1)
    losses = {"losses": [1.0] * len(windows), "tokens": tokens, "seconds": 0.3}
    return {"origin": origin, **factors, "windows": windows, "value": value, **losses, **more}


@pytest.fixture
def tasks(run: Path, tmp_path: Path) -> Path:
    """A run of method hybrid, with every kind of line."""
    path = tmp_path / "hybrid"
    shutil.copytree(run, path)
    settings = {"method": "hybrid", "objective": "perplexity", "space": "longrope", "attention_factor": "search"}
    documents = {"search": [{"name": f"{index}", "sha256": "ab" * 32, "start": 0} for index in range(4)]}
    config = {**CONFIG, "settings": {"to": 2048, "start_tokens": "0", **settings}, "documents": documents}
    (path / "config.json").write_text(json.dumps(config))
    every, descent = [0, 1, 2, 3], "descent from llama3+su"
    lines = [
        task("pi+none", [0]),
        task("yarn+su", [0]),
        task("yarn+su", [1, 2, 3], 4.6),
        task("llama3+su", every, 4.5),
        task(descent, [2], gradient=[0.1, 0.2, 0.3], recomputed=2048),
        task(f"{descent} check", every, 4.3),
        task(f"{descent} end", every, losses=[1.0, None, None, None]),
        task(f"{descent} unrounded", every, 4.1),
        task("polish", [0, 1], rescale=[1.0, 1.5]),
        task("polish", every, 4.25, rescale=[1.0, 1.6]),
    ]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_convergence_of_tasks_has_complete_candidates_by_stage_at_what_they_cost(tasks: Path) -> None:
    made = {plot.name: plot for plot in plots_of([read_run(tasks)])}["convergence"]
    traces = {trace["name"]: trace for trace in made.figure["data"]}
    assert list(traces) == ["seeds", "descent", "polish", "YaRN + su", "Llama 3 + su", "best so far"]
    points = {name: (trace["x"], trace["y"]) for name, trace in traces.items()}
    assert points["seeds"] == ([10240, 18432], [4.6, 4.5])
    assert points["descent"] == ([32768, 40960], [4.3, None]), "a gradient step of one window costs 6144"
    assert points["polish"] == ([61440], [4.25])
    assert points["best so far"] == ([10240, 18432, 32768, 61440, 61440], [4.6, 4.5, 4.3, 4.25, 4.25])
    assert points["Llama 3 + su"] == ([10240, 61440], [4.5, 4.5])
    assert traces["descent"]["text"][0] == "descent from llama3+su check"
    assert made.figure["layout"]["yaxis"]["title"]["text"] == "perplexity"
    assert made.caption == (
        "Best 4.250 after 61.4k of 61.4k token-passes. Dots are candidates on all windows, 5; 1 lie above the frame "
        "or are not finite. The cost includes 1 gradient step and 2 candidates on some windows only."
    )


def test_the_page_says_what_was_searched_and_what_was_done(tasks: Path) -> None:
    read = read_run(tasks)
    assert search_facts(read) == {
        "Method": "hybrid: all seeds, gradient descent from the best, a short evolution around the result",
        "Objective": "perplexity",
        "Space": "longrope: every pair is free",
        "Attention factor": "searched",
        "Start tokens": "not searched: 0",
        "Work": "4 candidates on all windows, 1 without a finite value, 2 on some windows only, 1 gradient step, "
        "2.05k tokens run again to save memory, beside the token-passes",
    }
    remark = "61.4k token-passes, 3\N{NO-BREAK SPACE}s of work"
    assert cards(read)[-1] == Card("Evaluations", "7.5", remark)
    (tasks / "metrics.json").unlink()
    assert headline(read_run(tasks)).endswith("best value 4.25 after 7.5 evaluations")
    (tasks / "config.json").unlink()
    assert headline(read_run(tasks)).endswith("best value 4.25 after 61.4k token-passes")
    assert cards(read_run(tasks))[-1] == Card("Token-passes", "61.4k", "3\N{NO-BREAK SPACE}s of work")
    page = Page(write_report(tasks))
    assert "4 candidates on all windows, 1 without a finite value" in page.text


def test_a_search_of_one_attention_factor_names_it_in_its_seeds(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "evaluations.jsonl", tmp_path)
    config = {**CONFIG, "settings": {"to": 2048, "method": "evolution", "attention_factor": "su"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "YaRN + su" in {trace["name"] for trace in figures_of(tmp_path)["convergence"]["data"]}
    assert search_facts(read_run(tmp_path))["Attention factor"] == "not searched: su"


def test_a_search_that_has_no_complete_candidate_yet_has_no_plot(tasks: Path) -> None:
    path = tasks / "evaluations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "convergence" not in figures_of(tasks)
    assert search_facts(read_run(tasks))["Work"] == "0 candidates on all windows, 2 on some windows only"
    write_report(tasks)


def test_a_method_looks_the_same_in_every_plot(run: Path) -> None:
    colours: dict[str, set[str]] = {}
    for figure in figures_of(run).values():
        for trace in figure["data"]:
            if "line" in trace:
                colours.setdefault(trace["name"], set()).add(trace["line"]["color"])
    assert all(len(found) == 1 for found in colours.values())
    assert colours["searched"] == colours["this run"] == colours["best so far"]


def test_no_two_methods_look_alike() -> None:
    names = ["none", *METHODS, *(f"{name}+su" for name in ("pi", "ntk", "dynamic-ntk", "yarn", "llama3")), "a", "b"]
    looks = [look(name, names) for name in names]
    assert len({(item.colour, item.dash, item.symbol) for item in looks}) == len(names)
    assert len({item.label for item in looks}) == len(names)
    assert [item.label for item in looks if item.ours] == ["a", "b"]


def test_a_long_search_is_thinned_to_keep_the_page_small(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    records = [{"origin": "mutation", "value": 5 - index / 50_000, "tokens": 9} for index in range(20_000)]
    records[12_345]["value"] = 4.0
    (path / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    traces = {trace["name"]: trace for trace in figures_of(path)["convergence"]["data"]}
    assert len(traces["mutations"]["x"]) == 2000
    assert min(traces["best so far"]["y"]) == 4.0
    assert write_report(path).stat().st_size < 6_000_000


@pytest.mark.parametrize(
    ("low", "high"), [(4.2, 4.6), (4.27, 900.0), (1.0, 1e6), (3.0, 3.0), (1e-3, 2e-3), (99.0, 101.0)]
)
def test_log_ticks_are_few_round_numbers_inside_the_range(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(low * 0.97 <= tick <= high * 1.03 for tick in ticks)


def test_numbers_stand_written_out_at_a_log_axis() -> None:
    assert on_log_axis([16, None, 2048, 0, math.inf])["ticktext"] == ["20", "50", "100", "200", "500", "1000", "2000"]
    assert on_log_axis([64, 131_072])["ticktext"] == ["100", "300", "1000", "3000", "10k", "30k", "100k"]
    assert on_log_axis([None]) == {"type": "log"}


def test_no_plot_leaves_the_ticks_of_a_log_axis_to_plotly(run: Path) -> None:
    add_positions(run)
    axes = [figure["layout"][axis] for figure in figures_of(run).values() for axis in ("xaxis", "yaxis")]
    logarithmic = [axis for axis in axes if axis.get("type") == "log"]
    assert len(logarithmic) >= 6
    assert [axis for axis in logarithmic if "tickvals" not in axis and axis.get("dtick") != 1] == []


# --- what may be missing ---------------------------------------------------------------------------------------------

SENTENCES = {
    "config.json": "What was asked: there is no config.json.",
    "metrics.json": "Perplexity by length: there is no metrics.json with results.",
    "factors.json": "The factors: there is no factors.json.",
    "evaluations.jsonl": "The convergence: there is no evaluations.jsonl with evaluations.",
}


@pytest.mark.parametrize("gone", SENTENCES)
def test_a_missing_file_is_said_and_the_rest_is_shown(run: Path, tmp_path: Path, gone: str) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (path / gone).unlink()
    text = Page(write_report(path)).text
    assert [name for name, sentence in SENTENCES.items() if sentence in text] == [gone]


@pytest.mark.parametrize("kept", SENTENCES)
def test_a_run_with_one_file_makes_a_page(run: Path, tmp_path: Path, kept: str) -> None:
    shutil.copy(run / kept, tmp_path)
    text = Page(write_report(tmp_path)).text
    assert [name for name, sentence in SENTENCES.items() if sentence in text] == [
        name for name in SENTENCES if name != kept
    ]
    assert ("not finished" in text) == (kept != "metrics.json")


def test_a_page_without_plots_carries_no_scripts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    page = Page(write_report(tmp_path))
    assert page.tags["script"] == 0
    assert "tiny, 256 → 2048 tokens: no figures yet" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    names = "config.json, metrics.json, factors.json, evaluations.jsonl, training.jsonl"
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    rule = "a run is a folder that a command wrote; give the --out of a command"
    assert str(caught.value) == f"run: got {tmp_path}, which has none of {names}; {rule}"
    with pytest.raises(UserError, match=rf"run: got {tmp_path}/none, which is no folder; a run is a folder"):
        write_report(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    shutil.copy(Path(__file__), tmp_path / "factors.json")
    with pytest.raises(UserError) as caught:
        write_report(tmp_path)
    assert str(caught.value) == (
        f"run: got {tmp_path}, whose config.json names no command; a run is a folder that a command wrote; "
        "give the --out of a command"
    )
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"output: got {tmp_path}/none/page\.html \(No such file or directory\)"):
        write_report(run, tmp_path / "none" / "page.html")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "it is JSON"),
        ("config.json", "[]", "it is a JSON object"),
        ("config.json", '{"command": "search", "model": 3}', "model is an object or a name"),
        ("config.json", '{"command": "search", "settings": []}', "settings is an object"),
        ("config.json", '{"command": "search", "documents": {"search": ["a"]}}', "documents are lists of objects"),
        ("metrics.json", "\x00", "it is JSON"),
        ("metrics.json", '{"results": {}}', "results is a list"),
        ("metrics.json", '{"results": [3]}', "results is a list"),
        ("metrics.json", '{"results": [{"length": 1}]}', "a method is a name"),
        ("metrics.json", '{"results": [{"method": "a", "length": 0}]}', "a length is a positive whole number"),
        ("metrics.json", '{"results": [{"method": "a", "length": true}]}', "a length is a positive whole number"),
        ("metrics.json", '{"results": [{"method": "a", "length": 1, "value": "4"}]}', "value: a number"),
        ("metrics.json", '{"results": [{"method": "a", "length": 1, "ci": [1]}]}', "ci is null or two numbers"),
        ("factors.json", "", "which is empty"),
        ("factors.json", '{"format": "other"}', "factors: format: got format 'other'; it is \"longrope-factors\""),
        ("evaluations.jsonl", "x\n{}\n", "line 1 broken"),
        ("evaluations.jsonl", '{"value": "low"}\n', "value: a number"),
        ("evaluations.jsonl", '{"value": null, "losses": 3}\n', "losses is a list"),
    ],
)
def test_a_corrupt_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        write_report(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_values_that_are_not_finite_are_a_dash(tmp_path: Path) -> None:
    huge = "1" + "0" * 400
    values = ["NaN", "Infinity", "null", huge]
    rows = [
        f'{{"method": "{name}", "length": 512, "value": {value}}}' for name, value in zip("abcd", values, strict=True)
    ]
    (tmp_path / "metrics.json").write_text(f'{{"model": "m", "results": [{", ".join(rows)}]}}')
    page = Page(write_report(tmp_path))
    assert [row for row in page.rows if row[0] in "abcd"] == [[name, "—"] for name in "abcd"]


# --- words -----------------------------------------------------------------------------------------------------------


def written(path: Path, values: dict[str, list[float | None]], **metrics: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "metrics.json").write_text(json.dumps({"results": results(values), **metrics}))
    return path


@pytest.mark.parametrize(
    ("values", "measure", "sentence"),
    [
        ({"yarn": [5.0, 5.0, 4.0], "x": [5.0, 5.0, 4.4]}, "perplexity", "perplexity 4.40, YaRN 4.00 (+10.0%)"),
        ({"ntk": [5, 5, 6], "yarn": [5, 5, 7], "x": [5, 5, 3]}, "perplexity", "perplexity 3.00, NTK 6.00 (−50.0%)"),
        ({"yarn": [5.0, 5.0, 4.0], "x": [5.0, 4.0, None]}, "perplexity", "perplexity at 1024 4.00, YaRN 5.00 (−20.0%)"),
        ({"x": [5.0, 5.0, 4.4]}, "perplexity", "perplexity 4.40"),
        ({"none": [5.0, 9.0, None], "x": [5.0, 5.0, 4.4]}, "perplexity", "perplexity 4.40"),
        (
            {"yarn": [5.0, 5.0, 4.0], "pi": [5.0, 5.0, 9.0]},
            "perplexity",
            "YaRN is the best of 2, perplexity 4.00 at 2048 tokens",
        ),
        ({"yarn": [1.0, 0.9, 0.4], "x": [1.0, 1.0, 0.8]}, "passkey", "passkey 0.80, YaRN 0.40 (+100.0%)"),
        ({"yarn": [1.0, 0.9, 0.0], "x": [1.0, 1.0, 0.8]}, "passkey", "passkey 0.80, YaRN 0.000"),
    ],
)
def test_the_headline_is_computed_from_the_figures(
    tmp_path: Path, values: dict[str, list[float | None]], measure: str, sentence: str
) -> None:
    run = read_run(written(tmp_path, values, measure=measure))
    assert headline(run) == f"tiny, 256 → 2048 tokens: {sentence}"
    assert plots_of([run])


def test_the_headline_of_a_search_without_measurements_is_its_best_value(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.json", tmp_path)
    shutil.copy(run / "evaluations.jsonl", tmp_path)
    assert headline(read_run(tmp_path)) == "tiny, 256 → 2048 tokens: best value 4.27 after 7 evaluations"


def test_results_all_of_which_diverged_make_a_page(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, {"none": [None, None, None]}))
    assert headline(run) == "tiny, 256 → 2048 tokens: no figures yet"
    assert [cell.text for cell in table_rows(run)[0].cells] == ["—", "—", "—"]
    assert Page(write_report(tmp_path)).tags["figure"] == 1


def test_the_higher_share_wins_where_answers_are_counted(tmp_path: Path) -> None:
    run = read_run(written(tmp_path, {"pi": [1.0, 0.2, 0.1], "yarn": [1.0, 0.9, 0.4]}, measure="passkey"))
    assert [(row.method, [cell.best for cell in row.cells]) for row in table_rows(run)] == [
        ("yarn", [True, True, True]),
        ("pi", [True, False, False]),
    ]
    assert "Higher is better" in Page(write_report(tmp_path)).text


def test_the_cards_hold_the_key_numbers(run: Path) -> None:
    assert [(card.name, card.value, card.remark) for card in cards(read_run(run))] == [
        ("Extension", "8×", "256 → 2048 tokens"),
        ("Perplexity at 2048", "4.268", "3.841 – 4.695"),
        ("Best baseline", "4.490", "YaRN, ours −4.9%"),
        ("Attention factor", "1.170", "4 start tokens"),
        ("Evaluations", "7", "14.3k token-passes, 4\N{NO-BREAK SPACE}s of work"),
    ]


def test_a_run_without_a_command_line_shows_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "ignored": {}}))
    run = read_run(tmp_path)
    assert command_line(run) == ""
    assert missing(run) == [sentence for name, sentence in SENTENCES.items() if name != "config.json"]
    assert "Command" not in Page(write_report(tmp_path)).text


def test_held_out_windows_make_the_headline_and_those_of_the_search_stand_apart(tmp_path: Path) -> None:
    seen = [{**item, "windows": "search"} for item in results({"yarn": [5.0, 5.0, 4.0], "x": [5.0, 4.0, 2.0]})]
    unseen = [{**item, "windows": "unseen"} for item in results({"yarn": [5.0, 5.0, 4.0], "x": [5.0, 4.0, 3.0]})]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for order in (seen + unseen, unseen + seen):
        (tmp_path / "metrics.json").write_text(json.dumps({"results": order}))
        page = Page(write_report(tmp_path))
        assert "perplexity 3.00, YaRN 4.00 (−25.0%)" in page.text
        assert "Measured on windows that the search did not see." in page.text
        assert [row for row in page.rows if row[0] == "x"] == [
            ["x", "5.000", "4.000", "3.000"],
            ["x", "5.000", "4.000", "2.000"],
        ]
    (tmp_path / "metrics.json").write_text(json.dumps({"results": seen}))
    page = Page(write_report(tmp_path))
    assert "Measured on the windows that the search itself used." in page.text
    assert [row for row in page.rows if row[0] == "x"] == [["x", "5.000", "4.000", "2.000"]]


def test_a_run_is_finished_once_it_is_measured_or_done(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert not read_run(tmp_path).finished
    (tmp_path / "DONE").touch()
    assert read_run(tmp_path).finished
    (tmp_path / "DONE").unlink()
    assert read_run(written(tmp_path, {"yarn": [5.0, 5.0, 4.0]})).finished


def test_settings_are_listed_by_dotted_key_without_the_documents(run: Path) -> None:
    shown = settings(read_run(run))
    assert shown["model.fingerprint"] == "f00d"
    assert shown["settings.hours"] == "null"
    assert shown["settings.documents"] == '["stdlib", "my texts"]'
    assert not [key for key in shown if key.startswith("documents")]


def test_numbers_read_well() -> None:
    assert [value_text(value) for value in (4.2684, 42.684, 426.84, 4268.4, 4.2e7, 0.0, None)] == [
        *("4.268", "42.68", "426.8", "4,268.4", "4.20e+07", "0.000", "—")
    ]
    assert [count_text(count) for count in (0, 999, 12_345, 999_999, 5_120_000, 7e9, 2e12)] == [
        *("0", "999", "12.3k", "1M", "5.12M", "7G", "2T")
    ]
    assert [percent_text(share) for share in (-0.05, 0.1, 0.0)] == ["−5.0%", "+10.0%", "+0.0%"]
    assert [duration_text(seconds).replace("\xa0", " ") for seconds in (83, 720, 12240)] == ["83 s", "12 min", "3.4 h"]


# --- every measure, several runs, other files ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every measurement."""
    return add_positions(further(make_run(tmp_path_factory.mktemp("full") / "run")))


@pytest.fixture(scope="module")
def pair(full: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [full, make_run(tmp_path_factory.mktemp("other") / "run", method="<b>other")]


def test_every_measure_of_a_run_has_its_plots_and_its_table(full: Path) -> None:
    page = Page(write_report(full))
    assert list(read_run(full).measures) == ["perplexity", "passkey", "needle", "ruler", "harness", "nonuniformity"]
    places = [value for _, key, value in page.attributes if key == "data-figure"]
    assert len(places) == len(set(places))
    assert {"position", "passkey-depth-1", "needle-depth-3", "ruler-tasks-1", "harness-short"} <= set(places)
    assert ["searched at 2048", "1.000", "0.900"] in page.rows, "RULER by task"
    assert ["pairs 0 to 7", "40.10", "5.000"] in page.rows
    assert "Not measured" not in page.text
    assert (full / "report.html").stat().st_size < 6_000_000


def test_perplexity_by_position_is_that_of_the_longest_windows(full: Path) -> None:
    figure = figures_of(full)["position"]
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert traces["searched"]["x"] == [64, 256, 2048]
    assert traces["searched"]["y"] == [9.0, 5.0, 4.268]
    assert traces["unscaled"]["y"] == [9.0, 5.0, None]
    assert figure["layout"]["xaxis"]["type"] == "log"


def test_a_heat_map_has_lengths_by_depth_with_the_share_in_each_cell(full: Path) -> None:
    figures = {plot.title: plot.figure for plot in plots_of([read_run(full)]) if plot.name.startswith("passkey-depth")}
    (trace,) = figures["YaRN, by length and depth"]["data"]
    assert (trace["x"], trace["y"]) == (["256", "1024", "2048"], ["0–50%", "50–100%"])
    assert trace["z"] == [[0.9, 0.5, 0.1], [1.0, 1.0, 1.0]]
    assert trace["text"] == [["90%", "50%", "10%"], ["100%", "100%", "100%"]]
    assert trace["customdata"][0][2] == "2048 tokens, depth 0–50%: 10% of 5 tries"
    (needle,) = (plot for plot in plots_of([read_run(full)]) if plot.name == "needle-depth-1")
    assert needle.figure["data"][0]["y"] == ["0%", "25%", "50%", "75%", "100%"]
    assert needle.figure["data"][0]["customdata"][0][0].endswith("depth 0%: 90% of 4 tries, mean loss 1.500")


def test_a_depth_without_tries_is_an_empty_cell(full: Path, tmp_path: Path) -> None:
    path = shutil.copytree(full, tmp_path / "run")
    rows = [[0.0, 0.5, None, 0], [0.5, 1.0, 1.0, 3]]
    further(path, passkey=measured("passkey", {"by_depth": lambda _: rows}, methods=["none"]))
    assert figures_of(path)["passkey-depth-1"]["data"][0]["y"] == ["50–100%"]


def test_short_benchmarks_stand_beside_the_unscaled_model(full: Path, tmp_path: Path) -> None:
    path = shutil.copytree(full, tmp_path / "run")
    data = json.loads((path / "harness" / "metrics.json").read_text())
    shares = dict(zip(("none", "yarn", "searched"), (0.5, 0.4375, 0.5), strict=True))
    for result in data["results"]:
        result["details"]["tasks"]["arc_easy"]["acc,none"] = shares[result["method"]]
    (path / "harness" / "metrics.json").write_text(json.dumps(data))
    page = Page(write_report(path))
    assert ["method", "arc_easy acc", "wiki ppl"] in page.rows
    assert "−0.062" in page.text
    (plot,) = (plot for plot in plots_of([read_run(path)]) if plot.name == "harness-short")
    bars = {trace["name"]: trace for trace in plot.figure["data"]}
    assert bars["YaRN"]["y"] == [0.4375], "what is no share is in the table only"
    assert bars["YaRN"]["error_y"]["array"] == [0.01]


def test_the_studies_of_non_uniformity_are_drawn(full: Path) -> None:
    figures = figures_of(full)
    groups = {trace["name"]: trace for trace in figures["nonuniformity-groups"]["data"]}
    assert groups["only these rescaled"]["x"] == [3.5, 19.5]
    assert groups["only these rescaled"]["y"] == [40.1, 5.0]
    assert groups["all but these"]["y"] == [5.0, 40.0]
    starts = {trace["name"]: (trace["x"], trace["y"]) for trace in figures["nonuniformity-start"]["data"]}
    assert starts == {"PI": ([0, 4], [9.0, 8.5]), "YaRN": ([0, 4], [4.6, 4.6])}
    colours = {trace["name"]: trace["line"]["color"] for trace in figures["nonuniformity-start"]["data"]}
    assert colours == {"PI": look("pi").colour, "YaRN": look("yarn").colour}, "as everywhere on the page"
    assert not [name for name in figures if name.startswith("results-nonuniformity")]
    (attention,) = figures["nonuniformity-attention"]["data"]
    assert (attention["x"], attention["y"]) == (["none", "su"], [5.0, 4.6])


def test_wavelengths_are_the_periods_times_the_factors(run: Path) -> None:
    figure = figures_of(run)["wavelengths"]
    traces = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert traces["unscaled"] == pytest.approx(SHAPE.periods)
    assert traces["this run"] == pytest.approx(SHAPE.periods * np.linspace(1, 9, 32))
    assert [shape["y0"] for shape in figure["layout"]["shapes"]] == [256, 2048]


def test_what_was_not_measured_is_said_in_one_line_with_what_measures_it(run: Path, page: Page) -> None:
    assert "Not measured: passkey, needle, ruler, harness, nonuniformity" in page.text
    assert f"longrope evaluate passkey tiny --factors {run} --lengths 256,1k,2k --out {run}/passkey" in page.text


def test_results_inside_a_run_join_its_own_only_where_they_are_of_the_same_items(run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    more: list[dict[str, Any]] = [
        {"method": "mine", "length": length, "value": 3.5, "unknown": {}} for length in (128, 2048)
    ]
    later = {"measure": "perplexity", "items": {"128": "sha256:0", "2048": "sha256:1"}, "results": more}
    further(path, later=later)
    own = json.loads((path / "metrics.json").read_text())
    beside = "give it to the report beside this run."
    for items, reason in (
        ({"2048": "sha256:1", "1024": "sha256:2"}, ""),
        ({"2048": "sha256:3", "128": "sha256:0"}, f"not on the same items as what is shown at 2048; {beside}"),
        ({}, f"what is shown does not say its items, as an earlier version left it; {beside}"),
    ):
        (path / "metrics.json").write_text(json.dumps({**own, "items": items}))
        read = read_run(path)
        assert [read.result("mine", length) is not None for length in (128, 2048)] == [not reason] * 2
        assert len(read.results) == (18 if reason else 20)
        assert read.left_out == ((f"later: {reason}",) if reason else ())
    assert f"Inside the run, later: {reason}" in Page(write_report(path)).text
    (path / "metrics.json").write_text(json.dumps({**own, "items": {"2048": "sha256:1"}}))
    further(path, later={**later, "items": {}})
    assert read_run(path).left_out == (f"later: it does not say its items, as an earlier version left it; {beside}",)


def test_a_search_inside_a_run_is_none_of_its_measurements(run: Path, tmp_path: Path) -> None:
    """What was found at a shorter search length is compared with nothing of the target length."""
    path = shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run, path / "search-1k")
    assert read_run(path).left_out == ("search-1k: a search of its own; give it to the report beside this run.",)


def _measured_inside(path: Path, documents: Path, *, unseen: Path | None) -> RunData:
    """A search of a model of one layer, with what is measured inside its folder on documents afterwards."""
    held = () if unseen is None else ("--unseen", str(unseen))
    common = ("--windows", "2", "-q")
    texts = ("-d", str(documents))
    searched = longrope(
        "search", "tiny", "--to", "512", *texts, *held, "--evaluations", "1", "--out", str(path), *common
    )
    assert searched.code == 0, searched.err
    on = ("-d", str(unseen or documents))
    few = ("tiny", "--lengths", "128,512", *on, *common)
    assert longrope("compare", *few, "--methods", "none,yarn", "--out", str(path / "compare")).code == 0
    measured = longrope("evaluate", "perplexity", *few, "-f", str(path), "--out", str(path / "perplexity"))
    assert measured.code == 0, measured.err
    return read_run(path)


@pytest.mark.parametrize("held_out", [True, False])
def test_what_is_measured_inside_a_search_on_its_windows_stands_beside_its_own(
    tmp_path: Path, *, held_out: bool
) -> None:
    """On unseen documents, or on the windows of the search itself where there are no unseen ones."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            words = " ".join(f"{name}{number * 1000 + index}" for index in range(400))
            (tmp_path / name / f"{number}.txt").write_text(words)
    read = _measured_inside(tmp_path / "run", tmp_path / "a", unseen=tmp_path / "b" if held_out else None)
    assert read.left_out == ()
    assert read.lengths == [128, 512]
    for length in (128, 512):
        there = {each.method for each in read.results if each.length == length}
        assert there >= {"none", "yarn"}
        assert any(is_ours(method) for method in there)
    assert read.result("pi", 512) is not None, "what the search has measured itself is still there"
    assert read.result("pi", 128) is None
    assert {each.seen for each in read.results} == {not held_out}
    assert bool(read.searched_on) == (not held_out)


def test_results_of_another_model_inside_a_run_are_left_out_and_said(run: Path, tmp_path: Path) -> None:
    path = further(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((path / "needle" / "config.json").read_text())
    config["model"] |= {"name": "another", "fingerprint": "beef"}
    (path / "needle" / "config.json").write_text(json.dumps(config))
    read = read_run(path)
    assert "needle" not in read.measures
    assert read.left_out == ("needle: of another model; give it to the report beside this run.",)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "/elsewhere/models/tiny"}, True),  # the very weights, by the fingerprint
        ({"name": "tiny/", "fingerprint": "beef"}, True),  # another dtype, and a slash
        ({"name": str(Path("tiny").resolve()), "fingerprint": "beef"}, True),
        ({"name": "/elsewhere/models/tiny", "fingerprint": "beef"}, False),
        ({"name": "/elsewhere/models/tiny", "fingerprint": None}, False),
        ({"original_length": 512}, False),
    ],
)
def test_a_model_is_the_same_however_it_is_spelled(
    run: Path, tmp_path: Path, changes: dict[str, object], *, same: bool
) -> None:
    path = further(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((path / "needle" / "config.json").read_text())
    config["model"] |= changes
    (path / "needle" / "config.json").write_text(json.dumps(config))
    assert ("needle" in read_run(path).measures) == same


def test_what_is_broken_or_unfinished_inside_a_run_is_said_and_the_rest_is_shown(run: Path, tmp_path: Path) -> None:
    path = further(shutil.copytree(run, tmp_path / "run"))
    (path / "needle" / "metrics.json").write_text('{"results": [')
    (path / "ruler" / "config.json").write_text("")
    (path / "passkey" / "metrics.json").unlink()
    page = Page(write_report(path))
    for words in ("Inside the run, needle: ", "Inside the run, ruler: ", "Inside the run, passkey: not finished"):
        assert words in page.text
    assert list(read_run(path).measures) == ["perplexity", "harness", "nonuniformity"]


def test_documents_that_the_search_has_read_are_said(run: Path, tmp_path: Path) -> None:
    path = further(shutil.copytree(run, tmp_path / "run"))
    config = json.loads((path / "nonuniformity" / "config.json").read_text())
    config["documents"] = {"unseen": config["documents"]["search"]}
    (path / "nonuniformity" / "config.json").write_text(json.dumps(config))
    assert read_run(path).searched_on == {"nonuniformity": 1}


@pytest.mark.parametrize("measure", MEASURES)
def test_what_measures_it_is_a_command_that_can_be_given(run: Path, measure: str) -> None:
    words = shlex.split(not_measured([replace(read_run(run), measures={})])[measure])
    if measure == "nonuniformity":
        assert words[words.index("--lengths") + 1] == "2k"
    given = {"tiny": str(run / "nowhere"), "D": str(run), "A,B": "nothing-of-this-name"}
    ran = longrope(*(given.get(word, word) for word in words[1:]), "-q")
    assert ran.code == 2
    assert re.match(r"longrope: (model|--tasks): got ", ran.err), "the command line itself is right"


def test_a_training_is_drawn_by_step(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "trained"
    path.mkdir()
    for name in ("config.json", "factors.json"):
        shutil.copy(run / name, path)
    lines = [{"step": step, "loss": 5.0 / step, "grad_norm": 1.0} for step in range(1, 6)]
    (path / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    (trace,) = figures_of(path)["training"]["data"]
    assert trace["x"] == [1, 2, 3, 4, 5]
    assert trace["y"] == pytest.approx([5.0, 2.5, 1.667, 1.25, 1.0], abs=1e-3)
    page = Page(write_report(path))
    assert "Loss by step" in page.text
    assert "evaluations.jsonl" not in page.text
    (path / "training.jsonl").write_text('{"step": "first", "loss": 1.0}\n{}\n')
    with pytest.raises(UserError, match="step: a number"):
        write_report(path)


def test_a_baseline_that_finds_nothing_has_no_gaps(run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    results = [
        {"method": method, "length": length, "value": value, "tokens": 9, "ci": None}
        for method, value in (("none", 0.0), ("searched", 0.5))
        for length in (256, 2048)
    ]
    (path / "metrics.json").write_text(json.dumps({"measure": "passkey", "results": results}))
    assert "gap" not in figures_of(path)
    write_report(path)


def test_a_study_and_task_suites_have_no_headline_of_a_best_method(full: Path, tmp_path: Path) -> None:
    for measure in ("nonuniformity", "harness"):
        path = tmp_path / measure
        shutil.copytree(full / measure, path)
        assert verdict(read_run(path)) is None
        assert "(−" not in headline(read_run(path))


def test_numbers_that_no_float_holds_are_no_lengths(run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    del config["crc"]
    config["settings"] |= {"to": 10**400, "evaluations": 10**400}
    (path / "config.json").write_text(json.dumps(config))
    assert read_run(path).target_length == 2048
    write_report(path)
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["results"][0]["length"] = 10**400
    (path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="a length is a positive whole number"):
        write_report(path)


def test_the_commands_of_the_measurements_inside_a_run_are_on_its_page(full: Path) -> None:
    page = Page(write_report(full))
    assert "longrope search tiny --documents 'my texts'" in page.text
    assert "longrope evaluate needle tiny --out RUN/needle" in page.text


def test_a_folder_of_runs_is_no_run_and_one_that_is_no_run_is_not_read(run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    with pytest.raises(UserError, match="a run is a folder that a command wrote"):
        write_report(tmp_path)
    (path / "checkpoint").mkdir()
    (path / "checkpoint" / "config.json").write_text('{"model_type": "llama"}')
    (path / "checkpoint" / "metrics.json").write_text("not ours")
    assert list(read_run(path).measures) == ["perplexity"]


@pytest.mark.parametrize(
    ("measure", "details", "message"),
    [
        ("passkey", [3], "details is an object"),
        ("passkey", {"by_depth": {}}, "details.by_depth is a list of rows of number, number, number, number"),
        ("passkey", {"by_depth": [[0, 1]]}, "details.by_depth is a list of rows"),
        ("needle", {"by_depth": [[0, "x", 1, 1]]}, "details.by_depth: a number"),
        ("perplexity", {"by_position": [3]}, "details.by_position is a list of rows of number, number"),
        ("ruler", {"tasks": []}, "details.tasks is an object of objects, by task"),
        ("ruler", {"tasks": {"vt": 3}}, "details.tasks is an object of objects, by task"),
        ("nonuniformity", {"start_tokens": [[0, 1, 2]]}, "details.start_tokens is a list of rows of number, text"),
    ],
)
def test_details_of_another_shape_are_refused_naming_the_file(
    tmp_path: Path, measure: str, details: object, message: str
) -> None:
    record = {"method": "none", "length": 256, "value": 0.5, "details": details}
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"measure": measure, "results": [record]}))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        write_report(tmp_path)
    assert str(file) in str(caught.value)


def test_several_runs_stand_side_by_side(pair: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(pair, tmp_path / "both.html"))
    assert "2 runs side by side" in page.text
    assert ["run-2: <b>other", "5.100", "4.500", "4.268"] in page.rows
    assert ["run: YaRN", "5.100", "4.600", "4.490"] in page.rows
    figures = json.loads(page.json)
    assert len(figures["results"]["data"]) == 12
    assert [trace["name"] for trace in figures["factors"]["data"]] == ["PI", "NTK", "YaRN", "run", "run-2"]
    assert {trace["name"]: min(trace["y"]) for trace in figures["convergence"]["data"]} == {
        "run": 4.268,
        "run-2": 4.268,
    }
    ours = [trace for trace in figures["results"]["data"] if "other" in trace["name"] or "searched" in trace["name"]]
    assert len({trace["line"]["color"] for trace in ours}) == 2
    assert page.text.count("What was asked:") == 2
    assert "passkey" not in page.text.partition("Not measured")[2], "the first run has it"


def test_several_runs_are_written_here_by_default(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_report(pair) == Path("report.html")
    assert (tmp_path / "report.html").is_file()


def test_tables_and_plots_are_written_as_csv(full: Path, tmp_path: Path) -> None:
    written = write_csv(full, tmp_path / "csv")
    names = {path.stem for path in written}
    assert {f"plot-{plot.name}" for plot in plots_of([read_run(full)])} <= names
    assert {"perplexity", "passkey", "needle", "ruler", "ruler-tasks", "harness-tasks"} <= names
    table = list(csv.reader((tmp_path / "csv" / "perplexity.csv").read_text().splitlines()))
    assert table[:2] == [
        ["method", "256", "1024", "2048"],
        ["searched", *(f"{v:.3f} ({0.9 * v:.3f} – {1.1 * v:.3f})" for v in (5.1, 4.5, 4.268))],
    ]
    points = list(csv.DictReader((tmp_path / "csv" / "plot-results.csv").read_text().splitlines()))
    (point,) = (point for point in points if (point["trace"], point["x"]) == ("YaRN", "2048"))
    assert float(point["y"]) == 4.49
    assert float(point["low"]) == pytest.approx(0.9 * 4.49)
    cells = list(csv.DictReader((tmp_path / "csv" / "plot-passkey-depth-1.csv").read_text().splitlines()))
    assert [(cell["x"], cell["y"], cell["value"]) for cell in cells][-1] == ("2048", "50–100%", "1.0")


def test_a_name_that_a_spreadsheet_would_run_is_text_in_a_csv(tmp_path: Path) -> None:
    write_csv(make_run(tmp_path / "run", method="=1+1"), tmp_path / "csv")
    assert "'=1+1" in [row[0] for row in csv.reader((tmp_path / "csv" / "perplexity.csv").read_text().splitlines())]


def test_every_plot_is_written_as_a_picture(full: Path, tmp_path: Path) -> None:
    written = write_png(full, tmp_path / "png")
    assert [path.stem for path in written] == [f"plot-{plot.name}" for plot in plots_of([read_run(full)])]
    for path in written:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG")
        assert (width, height > 200) == (1280, True)


def test_a_name_with_dollars_is_a_name_in_a_picture(tmp_path: Path) -> None:
    assert write_png(make_run(tmp_path / "run", method=r"$\frac{$ <b>"), tmp_path / "png")


def test_event_files_hold_the_best_value_and_the_results(full: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # a second report replaces what the first one wrote
        (file,) = write_tensorboard(full, tmp_path)
    events = EventAccumulator(str(file))
    events.Reload()
    best = [(event.step, event.value) for event in events.Scalars("search/best")]
    assert best == [(2048 * n, pytest.approx(v)) for n, v in ((1, 9.1), (2, 4.49), (5, 4.3), (7, 4.268))]
    assert [(e.step, e.value) for e in events.Scalars("passkey/yarn")] == [
        (256, pytest.approx(0.9)),
        (1024, pytest.approx(0.5)),
        (2048, pytest.approx(0.1)),
    ]


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "factors.json", "evaluations.jsonl"])
def test_a_file_that_ends_in_a_half_line_is_said(run: Path, tmp_path: Path, name: str) -> None:
    path = shutil.copytree(run, tmp_path / "run")
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) - 20])
    if name == "evaluations.jsonl":  # of which a search that is killed leaves half a line
        assert len(read_run(path).evaluations) == 6
        return
    with pytest.raises(UserError, match=re.escape(str(path / name))):
        write_report(path)
