"""The page in real Chromium: plots drawn, switches work, no error, no request, at every width and on paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from longrope.report import write_report
from report_runs import add_positions, further, make_run

HOSTILE = "</script><img src=x onerror=\"document.title='run'\">'\"&lt;{{7*7}}"
RUNS = "</script><script>window.hostile=1;alert(1)</script><svg onload=alert(2)><a href='javascript:alert(3)'>x</a>"
RUNS += "<iframe src='http://127.0.0.1:9/x'></iframe><img src='http://127.0.0.1:9/y' onerror=alert(4)>"
WIDTHS = (360, 768, 1400)


@dataclass
class Seen:
    """What a page said and asked for."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


Open = Callable[..., Seen]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(add_positions(further(make_run(tmp_path_factory.mktemp("one") / "run"))))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    runs = [further(make_run(folder / "first")), further(make_run(folder / "second", method="other"))]
    return write_report(runs, folder / "both.html")


@pytest.fixture
def show(browser: Browser) -> Iterator[Open]:
    """Open a file, at a width and in a scheme; at the end nothing may have failed or been asked for."""
    shown: list[Seen] = []
    contexts = []

    def open_page(path: Path, width: int = 1400, **context: Any) -> Seen:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **context))
        seen = Seen(contexts[-1].new_page())
        shown.append(seen)
        seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type != "log" else None)
        seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
        seen.page.on("request", lambda request: seen.requests.append(request.url))
        seen.page.goto(path.as_uri())
        seen.page.wait_for_selector(".plot .main-svg")  # no wait_for_function: the page's policy forbids what it does
        seen.page.wait_for_timeout(100)
        return seen

    yield open_page
    for seen in shown:
        assert seen.errors == []
        assert [url for url in seen.requests if not url.startswith(("file:", "data:", "blob:"))] == []
        assert len([url for url in seen.requests if url.startswith("file:")]) == 1
    for context in contexts:
        context.close()


def plot(page: Page, name: str, expression: str) -> Any:
    """An expression of JavaScript on the element `it` of a plot."""
    return page.evaluate(f"(() => {{ const it = document.getElementById('plot-{name}'); return {expression}; }})()")


def drawn(page: Page) -> dict[str, int]:
    """Marks that have an extent in each plot: lines, points, bars, cells."""
    return page.evaluate(  # type: ignore[no-any-return]
        """Object.fromEntries([...document.querySelectorAll("[data-figure]")].map((place) => [
            place.dataset.figure,
            [...place.querySelectorAll(".scatterlayer path, .barlayer path, .heatmaplayer image")].filter((mark) => {
                const box = mark.getBoundingClientRect();
                return box.width + box.height > 0;
            }).length,
        ]))"""
    )


@pytest.mark.parametrize("which", ["one", "two"])
def test_every_plot_is_drawn_with_its_data(show: Open, request: pytest.FixtureRequest, which: str) -> None:
    page = show(request.getfixturevalue(which)).page
    marks = drawn(page)
    assert {"results", "gap", "factors", "wavelengths", "convergence"} <= set(marks)
    assert {"passkey-depth-1", "needle-depth-1", "ruler-tasks-1", "harness-short"} <= set(marks)
    assert {"nonuniformity-groups", "nonuniformity-start", "nonuniformity-attention"} <= set(marks)
    assert ("position" in marks) == (which == "one")
    assert [name for name, count in marks.items() if count == 0] == []
    assert len(page.query_selector_all("#plot-results .scatterlayer .trace")) == (6 if which == "one" else 12)


def test_a_heat_map_has_the_share_in_each_cell(show: Open, one: Path) -> None:
    page = show(one).page
    texts = [each.text_content() for each in page.query_selector_all("#plot-passkey-depth-3 .heatmap-label text")]
    assert sorted(text or "" for text in texts) == sorted(["90%", "50%", "10%", "100%", "100%", "100%"])


def test_a_click_on_the_legend_hides_a_method_and_another_shows_it(show: Open, one: Path) -> None:
    page = show(one).page
    names = plot(page, "results", "it.data.map((trace) => trace.name)")
    index = names.index("YaRN")
    entry = page.locator("#plot-results .legend .traces", has_text="YaRN").filter(has_not_text="su")
    for visible, count in (("legendonly", 5), (True, 6)):
        entry.locator(".legendtoggle").click()
        page.wait_for_timeout(700)  # a second click within half a second would be a double click
        assert plot(page, "results", f"it._fullData[{index}].visible") == visible
        assert len(page.query_selector_all("#plot-results .scatterlayer .trace")) == count


@pytest.mark.parametrize(
    ("name", "axis", "before"),
    [("results", "y", "log"), ("results", "x", "log"), ("convergence", "x", "linear"), ("wavelengths", "y", "log")],
)
def test_an_axis_turns_linear_and_back(show: Open, one: Path, name: str, axis: str, before: str) -> None:
    page = show(one).page
    button = page.locator("figure", has=page.locator(f"#plot-{name}")).locator(f"[data-axis={axis}]")
    other = {"log": "linear", "linear": "log"}[before]
    first = plot(page, name, "[it._fullLayout.annotations, it._fullLayout.shapes].map((l) => l.length)")
    places = plot(page, name, f"(it.layout.annotations || []).map((note) => note.{axis})")
    for kind in (other, before):
        button.click()
        page.wait_for_timeout(50)
        assert plot(page, name, f"it._fullLayout.{axis}axis.type") == kind
        assert button.get_attribute("aria-pressed") == str(kind == "log").lower()
        assert drawn(page)[name] > 0
        low, high = plot(page, name, f"it._fullLayout.{axis}axis.range")
        assert low < high
    assert plot(page, name, "[it._fullLayout.annotations, it._fullLayout.shapes].map((l) => l.length)") == first
    back = plot(page, name, f"(it.layout.annotations || []).map((note) => note.{axis})")
    assert back == pytest.approx(places)


@pytest.mark.parametrize(("scheme", "start"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 23, 26)")])
def test_the_theme_follows_the_system_until_it_is_switched(show: Open, one: Path, scheme: str, start: str) -> None:
    page = show(one, color_scheme=scheme).page
    paper, ink = "getComputedStyle(document.body).backgroundColor", "getComputedStyle(document.body).color"
    colours = []
    for _ in range(3):
        colours.append(page.evaluate(paper))
        title = page.evaluate("getComputedStyle(document.querySelector('#plot-results .xtitle')).fill")
        assert title == page.evaluate(ink)
        page.locator("#theme").click()
        page.wait_for_timeout(50)
    assert colours[0] == colours[2] == start
    assert colours[1] != start


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("which", ["one", "two"])
def test_nothing_is_wider_than_the_screen(
    show: Open, request: pytest.FixtureRequest, tmp_path: Path, which: str, width: int
) -> None:
    page = show(request.getfixturevalue(which), width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map((e) => e.getBoundingClientRect().width)"
    )
    assert max(widths) <= width
    picture = page.screenshot(full_page=True, path=tmp_path / f"{which}-{width}.png")
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_is_light_and_without_switches(show: Open, one: Path, tmp_path: Path, scheme: str) -> None:
    page = show(one, color_scheme=scheme).page
    page.locator("#theme").click()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(100)
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()") == "#ffffff"
    title = page.evaluate("getComputedStyle(document.querySelector('#plot-results .xtitle')).fill")
    assert title == "rgb(28, 30, 33)"
    assert not page.locator("button:visible").count()
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map((e) => e.getBoundingClientRect().width)"
    )
    assert max(widths) <= 680
    page.screenshot(full_page=True, path=tmp_path / "print.png")
    printed = page.pdf(path=tmp_path / "page.pdf", format="A4", print_background=True)
    assert printed.startswith(b"%PDF")


def test_hostile_names_run_nothing(show: Open, tmp_path: Path) -> None:
    run = further(make_run(tmp_path / "run", name=HOSTILE, document=HOSTILE, method=HOSTILE))
    page = show(write_report(run)).page
    assert page.title().startswith(HOSTILE)
    assert page.locator("img").count() == 0
    names = [each.text_content() for each in page.query_selector_all("#plot-results .legendtext")]
    assert HOSTILE in names


def test_a_run_full_of_hostile_texts_runs_nothing_and_asks_for_nothing(show: Open, tmp_path: Path) -> None:
    run = further(make_run(tmp_path / "run", name=RUNS, document=RUNS, method=RUNS))
    for path in run.rglob("*.json"):
        data = json.loads(path.read_text())
        data.pop("crc", None)  # as of a run of an earlier version, which anybody may write
        text = json.dumps(data)
        for own in ("arc_easy", "my texts"):
            text = text.replace(own, json.dumps(RUNS)[1:-1])
        path.write_text(text)
    seen = show(write_report(run))
    dialogs: list[str] = []
    seen.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    for place in seen.page.query_selector_all("summary"):
        place.click()
    seen.page.hover("#plot-results")
    seen.page.wait_for_timeout(300)
    assert RUNS in seen.page.inner_text("body")
    assert dialogs == []
    assert seen.page.evaluate("typeof window.hostile") == "undefined"
    assert seen.page.locator("img, iframe, object, embed, form, base, link").count() == 0
    assert not [href for href in seen.page.eval_on_selector_all("a", "all => all.map(each => each.href)") if href]


def test_a_script_that_is_not_the_pages_own_is_not_run(browser: Browser, one: Path, tmp_path: Path) -> None:
    page, changed = browser.new_page(), tmp_path / "changed.html"
    changed.write_text(
        one.read_text().replace(
            "</main>", "</main><script>window.hostile = 1</script><img src=x onerror='hostile = 1'>"
        )
    )
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(changed.as_uri())
    page.wait_for_selector(".plot .main-svg")
    assert page.evaluate("typeof window.hostile") == "undefined"
    assert any("Content Security Policy" in text for text in said)
    page.close()
