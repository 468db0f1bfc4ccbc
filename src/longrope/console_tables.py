"""The tables that commands show on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from longrope.errors import plural
from longrope.lengths import format_length
from longrope.report.style import duration_text
from longrope.runs import lower_is_better

if TYPE_CHECKING:
    from longrope.doctor.examine import Finding
    from longrope.export.said import Said
    from longrope.factors import FactorTable


def results_table(results: Sequence[Mapping[str, Any]], *, title: str, measure: str = "perplexity") -> Table:
    """Methods by length; of each length the best in bold, and marked with ~ what is not told apart from it."""
    lengths = sorted({result["length"] for result in results})
    methods = list(dict.fromkeys(result["method"] for result in results))
    values = {(result["method"], result["length"]): result["value"] for result in results}
    choose = min if lower_is_better(measure) else max
    close = {(result["method"], result["length"]) for result in results if _not_told_apart(result)}
    best = {
        length: choose(
            (values[method, length] for method in methods if values.get((method, length)) is not None), default=None
        )
        for length in lengths
    }
    told = "~ not told apart from the best" if close else None
    table = Table(title=title, title_justify="left", min_width=len(title), caption=told, caption_justify="left")
    table.add_column("method")
    for length in lengths:
        table.add_column(format_length(length), justify="right")
    for method in methods:
        marks = ["~" if (method, length) in close else "" for length in lengths]
        cells = [_cell(values.get((method, length)), best[length]) for length in lengths]
        table.add_row(method, *(Text.assemble(mark, cell) for mark, cell in zip(marks, cells, strict=True)))
    return table


def _not_told_apart(result: Mapping[str, Any]) -> bool:
    """Whether there is a difference from the best, and its paired interval reaches zero, or there is none."""
    against = result.get("against_best") or {}
    interval = against.get("ci")
    return bool(against.get("value")) and (interval is None or interval[0] <= 0 <= interval[1])


def _cell(value: float | None, best: float | None) -> Text:
    if value is None:
        return Text("-")
    text = f"{value:.4g}" if value >= 1000 else f"{value:.3f}"
    return Text(text, style="bold" if value == best else "")


def tasks_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """lm-eval's metrics by task."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, found in tasks.items():
        for metric, value in found.items():
            if not metric.endswith("_stderr") and isinstance(value, int | float):
                error = found.get(f"{metric}_stderr")
                told = f"{error:.4f}" if isinstance(error, int | float) else ""
                table.add_row(task, metric, f"{value:.4f}", told)
    return table


def tasks_by_method_table(results: Sequence[Mapping[str, Any]], *, title: str) -> Table:
    """The first of lm-eval's metrics of every task, by method."""
    firsts: list[dict[str, float | None]] = []
    for result in results:
        tasks = result["details"]["tasks"]
        first = {task: next(iter(found.items()), None) for task, found in tasks.items()}
        firsts.append({f"{task} {metric[0]}": metric[1] for task, metric in first.items() if metric})
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("method")
    columns = list(dict.fromkeys(name for found in firsts for name in found))
    for name in columns:
        table.add_column(name, justify="right")
    for result, found in zip(results, firsts, strict=True):
        cells = [found.get(name) for name in columns]
        table.add_row(result["method"], *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    return table


def factors_table(table: FactorTable) -> Table:
    """Rows of a factor table, one line each."""
    title = (
        f"{table.model or 'factors'}: base {table.rope_theta:g}, {table.rotary_dim} rotary dimensions, original length "
    )
    shown = Table(title=title + format_length(table.original_length), title_justify="left")
    for name in ("up to", "start tokens", "attention factor", "first", "middle", "last"):
        shown.add_column(name, justify="right")
    for row in table.rows:
        middle = row.rescale[len(row.rescale) // 2]
        cells = [
            f"{row.attention_factor:.4f}",
            *(f"{value:.4g}" for value in (row.rescale[0], middle, row.rescale[-1])),
        ]
        shown.add_row(format_length(row.up_to), str(row.start_tokens), *cells)
    return shown


def findings_table(findings: Sequence[Finding]) -> Table:
    """What a doctor found, a line each."""
    shown = Table(title_justify="left")
    for name in ("", "finding", "what", "mend"):
        shown.add_column(name, overflow="fold")
    for finding in findings:
        mend = finding.do + (" (--fix does)" if finding.fixed else "")
        shown.add_row(finding.severity, finding.name, finding.what, mend)
    return shown


def said_table(said: Sequence[Said]) -> Table:
    """What an export says when it is read back."""
    shown = Table(title_justify="left")
    for name in ("", "", "what"):
        shown.add_column(name, overflow="fold")
    verdicts = {True: Text("ok"), False: Text("wrong", style="bold"), None: Text()}
    for each in said:
        shown.add_row(verdicts[each.ok], each.name, each.what)
    return shown


def costs_table(costs: Sequence[Mapping[str, Any]]) -> Table:
    """The stages of an extension with what each costs at most."""
    total = sum(cost["tokens"] for cost in costs)
    shown = Table(title=f"{len(costs)} steps, {total:,} token-passes at most", title_justify="left")
    shown.add_column("step")
    shown.add_column("token-passes", justify="right")
    shown.add_column("made of")
    for cost in costs:
        shown.add_row(cost["method"], f"{cost['tokens']:,}", cost["made_of"])
    return shown


def plan_table(document: Mapping[str, Any]) -> Table:
    """The stages of a plan: what each takes of a device, how long, and whether it fits."""
    settings = document["settings"]
    title = f"{document['model']}, {document['parameters']:,} parameters, to {format_length(settings['to'])}"
    shown = Table(title=title, title_justify="left", caption=_assumed(settings), caption_justify="left")
    for name in ("stage", "tokens", "PFLOP", "GB", "time"):
        shown.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    shown.add_column("fits, and how", overflow="fold")
    for each in document["results"]:
        time = "-" if each["hours"] is None else duration_text(3600 * each["hours"])
        work = each["flops"] / 1e15
        petas = f"{work:,.0f}" if work >= 100 else f"{work:.3g}"
        parts = sorted(each["memory"].items(), key=lambda part: -part[1])
        made_of = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts if value >= 5e7)
        how = f"{'yes' if each['fits'] else 'NO'}: {each['layout']}" + (f" ({made_of})" if made_of else "")
        how += f"; it would with {each['advice']}" if each["advice"] else ""
        amount = f"{each['value'] / 1e9:.1f}" if each["memory"] else "-"
        shown.add_row(each["method"], f"{each['tokens'] / 1e6:,.1f}M", petas, amount, time, how)
    return shown


def _assumed(settings: Mapping[str, Any]) -> str:
    """What hours were computed from."""
    room = f"{settings['gpus']}, of each {settings['bytes_each'] / 1e9:.1f} GB for tensors (GB: of one device)"
    if rates := settings.get("measured_rates"):
        told = ", ".join(f"{name} {rates[name] / 1e9:.3g}" for name in ("matrices", "attention", "written"))
        return f"{room}; rates measured here, in G a second: {told}"
    if settings.get("mfu") is None:
        return f"{room}; no hours: --flops says how fast a device is"
    told = ", ".join(f"{kind} {share:.0%}" for kind, share in settings["mfu"].items())
    peak = f"{settings['peak_flops'] / 1e12:.0f} TFLOP/s"
    return f"{room}; computed, not measured: assumed of a peak of {peak} (--mfu) {told}"


def documents_table(described: Mapping[str, Any]) -> Table:
    """What `longrope documents` found: windows by length, and a histogram of lengths."""
    title = plural(described["documents"], "document")
    title += f", {described['tokens']:,} tokens, the longest {described['longest']:,}"
    shown = Table(title=title, title_justify="left")
    for name in ("at least", "documents", "windows"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    most = max((row["documents"] for row in described["lengths"]), default=0) or 1
    for row in described["lengths"]:
        bar = "\u2588" * round(30 * row["documents"] / most)
        shown.add_row(format_length(row["length"]), f"{row['documents']:,}", f"{row['windows']:,}", bar)
    return shown
