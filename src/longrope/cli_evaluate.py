"""`longrope evaluate`: one function a measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli_options import (
    Attention,
    Device,
    Documents,
    Dtype,
    Factors,
    Json,
    Lengths,
    Model,
    OriginalLength,
    Precision,
    Quiet,
    Seed,
    Trust,
    Verbose,
    Windows,
    begin,
    one_or_none,
    options_of,
)
from longrope.lengths import parse_lengths

evaluate_app = typer.Typer(rich_markup_mode=None, help="Measure a model with factors.")

EvaluateOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="A run folder to write; none by default.")
]


@evaluate_app.command("perplexity")
def evaluate_perplexity(
    model: Model,
    lengths: Lengths,
    documents: Documents,
    factors: Factors = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Slide a window over whole documents by so many tokens (256 in the papers)."),
    ] = None,
    windows: Windows = None,
    out: EvaluateOut = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    original_length: OriginalLength = None,
    rope_precision: Precision = "float32",
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Token-weighted perplexity by length, on whole windows or with a sliding window."""
    begin(verbose, quiet)
    _evaluate(
        "perplexity",
        model,
        as_json,
        quiet,
        lengths=parse_lengths(lengths),
        factors=one_or_none(factors),
        documents=documents,
        windows=windows,
        stride=stride,
        seed=seed,
        out=out,
        options=options_of(device, dtype, attention, original_length, trust, rope_precision),
    )


@evaluate_app.command("passkey")
def evaluate_passkey(
    model: Model,
    lengths: Lengths,
    factors: Factors = None,
    tries: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 10,
    out: EvaluateOut = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    original_length: OriginalLength = None,
    rope_precision: Precision = "float32",
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Share of five-digit keys that the model finds in filler, by length."""
    begin(verbose, quiet)
    _evaluate(
        "passkey",
        model,
        as_json,
        quiet,
        lengths=parse_lengths(lengths),
        factors=one_or_none(factors),
        tries=tries,
        seed=seed,
        out=out,
        options=options_of(device, dtype, attention, original_length, trust, rope_precision),
    )


def _evaluate(measure: str, model: str, as_json: bool, quiet: bool, **given: Any) -> None:
    from longrope.console import err, measuring_progress, print_json, results_table, resume_with
    from longrope.evaluate.run import evaluate

    if given["out"] is not None:
        resume_with()
    with measuring_progress(quiet) as on_step:
        measured = evaluate(measure, model, on_step=on_step, **given)
    if as_json:
        print_json(measured)
    else:
        err.print(results_table(measured["results"], title=measure))
