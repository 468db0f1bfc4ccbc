"""What the page shows of figures, in order: a section a measure, the factors, the convergence; and all its plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longrope.report.by_length import gap_plot, results_plot
from longrope.report.convergence import convergence_plot, convergences_plot
from longrope.report.depths import depth_plots, position_plot, task_plots
from longrope.report.facts import measured_on
from longrope.report.figures import Plot
from longrope.report.merge import merge
from longrope.report.nonuniform import nonuniformity_plots, nonuniformity_tables
from longrope.report.pairs import factors_plot, wavelengths_plot
from longrope.report.read import RunData
from longrope.report.style import slug, title_of
from longrope.report.tables import Table, length_tables
from longrope.report.tasks import harness_plot, harness_table, ruler_table
from longrope.report.trained import training_plot
from longrope.runs import lower_is_better


@dataclass(frozen=True)
class Section:
    """One measure on the page."""

    title: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]


def plots_of(runs: Sequence[RunData]) -> list[Plot]:
    """All plots of one run or of several side by side."""
    return [*(plot for section in measure_sections(runs) for plot in section.plots), *search_plots(runs)]


_CLOSE = ", with ~ what is not told apart from the best of its run (paired 95% interval)"


def measure_sections(runs: Sequence[RunData]) -> list[Section]:
    """A section of each measure that any of the runs has, the first run's first measure first."""
    merged = merge(runs)
    return [_section(merged.of(measure), first=not index) for index, measure in enumerate(merged.measures)]


def search_plots(runs: Sequence[RunData]) -> list[Plot]:
    """Factors, wavelengths, convergence and loss by step of one run or of several."""
    made = [part for run in runs for part in _parts(run)]
    searched = convergence_plot(made[0]) if len(made) == 1 else convergences_plot(made)
    trained = training_plot([part for part in made if part.losses])
    return [plot for plot in (factors_plot(runs), wavelengths_plot(runs), searched, trained) if plot]


def _parts(run: RunData) -> list[RunData]:
    """The runs of an extension's stages; any other run is its own."""
    return [stage.run for stage in run.stages if stage.run] if run.stages else [run]


def _section(run: RunData, *, first: bool) -> Section:
    better = "Lower" if lower_is_better(run.measure) else "Higher"
    close = "" if all(result.told_apart for result in run.results) else _CLOSE
    note = f"{better} is better; the best of each length is bold{close}; — is not finite. {measured_on(run)}".rstrip()
    tables, made = length_tables(run, note), [*_by_length(run, first=first)]
    if run.measure == "perplexity":
        made += [position_plot(run)]
    elif run.measure in ("passkey", "needle"):
        made += depth_plots(run)
    elif run.measure == "ruler":
        tables += [table for table in (ruler_table(run),) if table]
        made += task_plots(run)
    elif run.measure == "harness" and (by_task := harness_table(run)):
        # The mean over tasks by length says little; each task beside the unscaled model says what extension costs.
        tables, made = [by_task], [harness_plot(run)]
    elif run.measure == "nonuniformity" and (studies := nonuniformity_tables(run)):
        tables, made = studies, [*nonuniformity_plots(run)]  # its rows are no methods
    return Section(title_of(run.measure), tuple(tables), tuple(plot for plot in made if plot))


def _by_length(run: RunData, *, first: bool) -> list[Plot | None]:
    """The first measure has its plots in any case; others where there is more than one length."""
    if first:
        return [results_plot(run), gap_plot(run)]
    if len(run.lengths) == 1:
        return []
    name = slug(run.measure)
    return [results_plot(run, f"{name}-results"), gap_plot(run, f"{name}-gap") if run.measure == "perplexity" else None]
