"""`longrope search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longrope.cli_options import (
    Documents,
    Model,
    Out,
    Shared,
    Windows,
    Workers,
    runs_a_model,
)
from longrope.errors import UserError
from longrope.lengths import parse_length


@runs_a_model()
def search(
    model: Model,
    to: Annotated[str, typer.Option("--to", metavar="N", help="Target length, such as 32k.")],
    documents: Documents,
    unseen: Annotated[list[str] | None, typer.Option(metavar="D", help="Documents that are only measured.")] = None,
    out: Out = None,
    method: Annotated[
        str, typer.Option(help="hybrid (seeds, gradient, short evolution), gradient, or evolution: Algorithm 1.")
    ] = "hybrid",
    objective: Annotated[
        str, typer.Option(help="perplexity, needle: the answer to a needle's question, or both.")
    ] = "perplexity",
    space: Annotated[
        str, typer.Option(help="longrope, or longrope2: from the real critical dimension on, NTK below.")
    ] = "longrope",
    start_tokens: Annotated[
        str | None, typer.Option(metavar="N|search", help="Start tokens; by default search in evolution, else 0.")
    ] = None,
    attention_factor: Annotated[
        str | None,
        typer.Option(
            metavar="RULE", help="su, yarn, none, a number or search; by default su in evolution, else search."
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="STAGE",
            help="second: on top of the checkpoint's own factors; recovery: for a length that they reach.",
        ),
    ] = None,
    search_length: Annotated[
        str | None,
        typer.Option(metavar="N", help="Search at this shorter length; a few evaluations at --to decide."),
    ] = None,
    needle_depth: Annotated[
        str, typer.Option(metavar="DEPTH", help="Where needles are: spread, or start, as in LongRoPE2.")
    ] = "spread",
    needle_digits: Annotated[int, typer.Option(metavar="N", help="Of the needle's number.")] = 7,
    needle_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file with the needle's texts, as for evaluate needle."),
    ] = None,
    race: Annotated[bool, typer.Option("--race", help="In evolution: drop children that cannot become parents.")] = (
        False
    ),
    init: Annotated[
        list[Path] | None, typer.Option(metavar="FACTORS", help="Factors as one more seed. Repeatable.")
    ] = None,
    factors: Annotated[
        str | None, typer.Option(metavar="none", help="none: ignore the factors.json beside the weights.")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="At most so many evaluations of all search windows.")
    ] = None,
    token_passes: Annotated[
        str | None, typer.Option(metavar="N", help="At most so many token-passes, such as 4m (k = 1024).")
    ] = None,
    hours: Annotated[
        float | None, typer.Option(metavar="H", help="At most so many hours, counted over resumes.")
    ] = None,
    workers: Workers = None,
    windows: Windows = None,
    gradient_windows: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Gradients on N further windows; by default 0, 64 with fewer than 4 --windows.",
        ),
    ] = None,
    *,
    shared: Shared,
) -> None:
    """Search rescale factors for one target length. The same command resumes; a larger budget continues."""
    target = parse_length(to)
    if factors not in (None, "none"):
        raise UserError("--factors", got=repr(factors), rule="a search takes only none here", do="give it as --init")
    from longrope.convert import as_table

    seeds = [as_table(path) for path in init or []]
    from longrope.console import err, print_json, resume_with, search_progress
    from longrope.console_tables import factors_table, results_table
    from longrope.files import read_object
    from longrope.runs import FACTORS, METRICS, default_run_path
    from longrope.search.driver import search as run_search

    path = out or default_run_path("search", model, target)
    resume_with()
    with search_progress(shared.quiet) as on_progress:
        table = run_search(
            model,
            to=target,
            documents=documents,
            unseen=unseen or [],
            out=path,
            init=seeds,
            workers=workers,
            options=shared.options(own_factors=factors is None),
            on_progress=on_progress,
            method=method,
            objective=objective,
            space=space,
            start_tokens=start_tokens,
            attention_factor=attention_factor,
            stage=stage,
            search_length=None if search_length is None else parse_length(search_length),
            needle_depth=needle_depth,
            needle_digits=needle_digits,
            needle_template=needle_template,
            race=race,
            evaluations=evaluations,
            token_passes=_token_passes(token_passes),
            hours=hours,
            windows=windows,
            gradient_windows=gradient_windows,
            seed=shared.seed,
        )
    measured = read_object(path / METRICS, "measurements of the run")
    if shared.as_json:
        print_json(measured)
        return
    err.print(factors_table(table))
    for name in ("search", "unseen"):
        if chosen := [result for result in measured["results"] if result["windows"] == name]:
            err.print(results_table(chosen, title=f"perplexity, {name} windows"))
    err.print(f"factors: {path / FACTORS}", soft_wrap=True)


def _token_passes(text: str | None) -> int | None:
    """A number of token-passes, written as lengths are. Raises UserError for anything else."""
    try:
        return None if text is None else parse_length(text)
    except UserError:
        rule = "it is a positive whole number, with k for 1024 or m for 1024k"
        raise UserError("--token-passes", got=repr(text), rule=rule, do="write it like 500000, 900k or 4m") from None
