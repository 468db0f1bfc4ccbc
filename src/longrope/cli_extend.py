"""`longrope extend`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from longrope.cli_options import (
    Documents,
    Model,
    Out,
    Shared,
    Workers,
    runs_a_model,
)
from longrope.lengths import parse_length


@runs_a_model("quantize")
def extend(
    model: Model,
    to: Annotated[str, typer.Option("--to", metavar="N", help="Target length, such as 128k.")],
    documents: Documents,
    unseen: Annotated[
        list[str] | None, typer.Option(metavar="D", help="Documents that are only measured; by default some of -d.")
    ] = None,
    search_documents: Annotated[
        list[str] | None, typer.Option("--search-documents", metavar="D", help="Search on these instead of -d.")
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A plan in TOML, or longrope, longrope-mistral, longrope2; by default what the ratio asks for.",
        ),
    ] = None,
    no_finetune: Annotated[bool, typer.Option("--no-finetune", help="One search, no training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages and their costs, and end.")] = False,
    launcher: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Starts the fine-tuning, such as: torchrun --nproc-per-node 8."),
    ] = None,
    tracker: Annotated[str, typer.Option(help="What Trainer reports to (with commas), or none.")] = "tensorboard",
    workers: Workers = None,
    out: Out = None,
    *,
    shared: Shared,
) -> None:
    """All stages: search, fine-tune, interpolate again, recover the short window. The same command goes on."""
    from longrope.console import err, measuring_progress, print_json, resume_with, search_progress, training_progress
    from longrope.console_tables import costs_table, factors_table, results_table
    from longrope.extension.going import Watching
    from longrope.extension.run import extend as run_extend
    from longrope.factors import FactorTable
    from longrope.runs import CHECKPOINT, FACTORS, REPORT, default_run_path

    target = parse_length(to)
    path = out or default_run_path("extend", model, target)
    if not dry_run:
        resume_with()
    made = run_extend(
        model,
        to=target,
        documents=documents,
        unseen=unseen or [],
        search_documents=search_documents or [],
        stages=stages,
        train=not no_finetune,
        dry_run=dry_run,
        out=path,
        workers=workers,
        launcher=launcher,
        tracker=tracker,
        seed=shared.seed,
        options=shared.options(),
        watching=Watching(
            stage=(lambda text: None) if shared.quiet else lambda text: err.print(text, soft_wrap=True),
            search=partial(search_progress, shared.quiet),
            training=partial(training_progress, shared.quiet),
            measuring=partial(measuring_progress, shared.quiet),
        ),
    )
    if shared.as_json:
        print_json(made)
        return
    if dry_run:
        err.print(costs_table(made["results"]))
        return
    err.print(factors_table(FactorTable.load(path / FACTORS)))
    err.print(results_table(made["results"], title="perplexity on documents that no stage has seen"))
    err.print(f"checkpoint: {path / CHECKPOINT}", soft_wrap=True)
    err.print(f"report: {path / REPORT}", soft_wrap=True)
