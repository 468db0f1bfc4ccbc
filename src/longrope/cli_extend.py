"""`longrope extend`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from longrope.cli_options import (
    Attention,
    Device,
    Documents,
    Dtype,
    Json,
    Model,
    OriginalLength,
    Out,
    Precision,
    Quiet,
    Seed,
    Threads,
    Trust,
    Verbose,
    Workers,
    begin,
    options_of,
)
from longrope.lengths import parse_length


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
            metavar="FILE", help="A plan in TOML, or longrope, longrope2; by default what the ratio asks for."
        ),
    ] = None,
    no_finetune: Annotated[bool, typer.Option("--no-finetune", help="One search, no training.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the stages and their costs, and end.")] = False,
    launcher: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="Starts the fine-tuning, such as: torchrun --nproc-per-node 8."),
    ] = None,
    tracker: Annotated[str, typer.Option(help="Whatever Trainer reports to, or none.")] = "tensorboard",
    workers: Workers = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    original_length: OriginalLength = None,
    rope_precision: Precision = "float32",
    threads: Threads = None,
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """All stages: search, fine-tune, interpolate again, recover the short window. The same command goes on."""
    begin(verbose, quiet)
    from longrope.console import (
        costs_table,
        err,
        factors_table,
        measuring_progress,
        print_json,
        results_table,
        resume_with,
        search_progress,
        training_progress,
    )
    from longrope.extension.going import Watching
    from longrope.extension.run import dry
    from longrope.extension.run import extend as run_extend
    from longrope.factors import FactorTable
    from longrope.runs import FACTORS, default_run_path

    options = options_of(device, dtype, attention, original_length, trust, rope_precision, threads)
    target = parse_length(to)
    if dry_run:
        results = [cost.to_dict() for cost in dry(model, target, stages, train=not no_finetune, options=options)]
        if as_json:
            print_json({"command": "extend", "model": model, "settings": {"to": target}, "results": results})
        else:
            err.print(costs_table(results))
        return
    path = out or default_run_path("extend", model, target)
    resume_with()
    made = run_extend(
        model,
        to=target,
        documents=documents,
        unseen=unseen or [],
        search_documents=search_documents or [],
        stages=stages,
        train=not no_finetune,
        out=path,
        workers=workers,
        launcher=launcher,
        tracker=tracker,
        seed=seed,
        options=options,
        watching=Watching(
            stage=(lambda text: None) if quiet else lambda text: err.print(text, soft_wrap=True),
            search=partial(search_progress, quiet),
            training=partial(training_progress, quiet),
            measuring=partial(measuring_progress, quiet),
        ),
    )
    if as_json:
        print_json(made)
        return
    err.print(factors_table(FactorTable.load(path / FACTORS)))
    err.print(results_table(made["results"], title="perplexity on documents that no stage has seen"))
    err.print(f"checkpoint: {path / 'checkpoint'}", soft_wrap=True)
    err.print(f"report: {path / 'report.html'}", soft_wrap=True)
