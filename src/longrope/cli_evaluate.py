"""`longrope evaluate`: one function a measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli_options import (
    BatchSize,
    Chat,
    Depths,
    Digits,
    Documents,
    Factors,
    FewShot,
    IncludePath,
    Lengths,
    Limit,
    Model,
    OptionalDocuments,
    Questions,
    RulerTasks,
    Samples,
    Shared,
    Stride,
    Template,
    UnsafeCode,
    Windows,
    Workers,
    names_of,
    one_or_none,
    runs_a_model,
)
from longrope.lengths import parse_lengths

evaluate_app = typer.Typer(rich_markup_mode=None, help="Measure a model with factors.")

EvaluateOut = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="DIR", help="A run folder to write; none by default.")
]


@evaluate_app.command("perplexity")
@runs_a_model("quantize")
def evaluate_perplexity(
    model: Model,
    lengths: Lengths,
    documents: Documents,
    factors: Factors = None,
    stride: Stride = None,
    windows: Windows = None,
    workers: Workers = None,
    out: EvaluateOut = None,
    *,
    shared: Shared,
) -> None:
    """Token-weighted perplexity by length and by position, on whole windows or with a sliding window."""
    settings = {"documents": documents, "windows": windows, "stride": stride, "seed": shared.seed}
    _evaluate("perplexity", model, lengths, factors, workers, out, shared, **settings)


@evaluate_app.command("passkey")
@runs_a_model("quantize")
def evaluate_passkey(
    model: Model,
    lengths: Lengths,
    factors: Factors = None,
    tries: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 10,
    template: Template = None,
    chat: Chat = False,
    workers: Workers = None,
    out: EvaluateOut = None,
    *,
    shared: Shared,
) -> None:
    """Share of five-digit keys that the model finds in filler, by length and depth."""
    settings = {"tries": tries, "template": template, "chat": chat, "seed": shared.seed}
    _evaluate("passkey", model, lengths, factors, workers, out, shared, **settings)


@evaluate_app.command("needle")
@runs_a_model("quantize")
def evaluate_needle(
    model: Model,
    lengths: Lengths,
    documents: Documents,
    factors: Factors = None,
    depths: Depths = 10,
    tries: Annotated[int, typer.Option(min=1, help="Prompts at each depth and length.")] = 3,
    digits: Digits = 7,
    template: Template = None,
    chat: Chat = False,
    workers: Workers = None,
    out: EvaluateOut = None,
    *,
    shared: Shared,
) -> None:
    """Share of numbers that the model finds in your own documents, by length and depth."""
    settings = {"documents": documents, "depths": depths, "tries": tries, "digits": digits}
    settings |= {"template": template, "chat": chat, "seed": shared.seed}
    _evaluate("needle", model, lengths, factors, workers, out, shared, **settings)


@evaluate_app.command("ruler")
@runs_a_model("quantize")
def evaluate_ruler(
    model: Model,
    lengths: Lengths,
    factors: Factors = None,
    tasks: RulerTasks = None,
    samples: Samples = 20,
    questions: Questions = None,
    documents: OptionalDocuments = None,
    template: Template = None,
    chat: Chat = False,
    workers: Workers = None,
    out: EvaluateOut = None,
    *,
    shared: Shared,
) -> None:
    """RULER: its thirteen tasks at any length."""
    settings = {"tasks": names_of(tasks), "samples": samples, "questions": questions, "documents": documents or []}
    settings |= {"template": template, "chat": chat, "seed": shared.seed}
    _evaluate("ruler", model, lengths, factors, workers, out, shared, **settings)


@evaluate_app.command("nonuniformity")
@runs_a_model("quantize")
def evaluate_nonuniformity(
    model: Model,
    lengths: Annotated[str, typer.Option("--lengths", metavar="N", help="One length, above the original one.")],
    documents: Documents,
    factors: Factors = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Groups of neighbouring pairs; 8 by default.")] = None,
    windows: Windows = None,
    workers: Workers = None,
    out: EvaluateOut = None,
    *,
    shared: Shared,
) -> None:
    """What non-uniformity gives: perplexity by group of pairs stretched, start tokens kept and attention factor."""
    settings = {"documents": documents, "groups": groups, "windows": windows, "seed": shared.seed}
    _evaluate("nonuniformity", model, lengths, factors, workers, out, shared, **settings)


@evaluate_app.command("harness")
@runs_a_model("seed", "quantize")
def evaluate_harness(
    model: Model,
    tasks: Annotated[
        str, typer.Option(metavar="A,B,..", help="lm-eval tasks, groups, tags or patterns such as mmlu_*.")
    ],
    factors: Factors = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    batch_size: BatchSize = None,
    include_path: IncludePath = None,
    chat: Chat = False,
    unsafe_code: UnsafeCode = False,
    out: EvaluateOut = None,
    seed: Annotated[int | None, typer.Option(min=0, help="By default lm-eval's own, as in published figures.")] = None,
    *,
    shared: Shared,
) -> None:
    """lm-evaluation-harness's tasks, each request under the factors of its own length."""
    from longrope.console import err, print_json, resume_with
    from longrope.console_tables import tasks_table
    from longrope.evaluate.harness_run import evaluate_harness as run_harness

    if out is not None:
        resume_with()
    measured = run_harness(
        model,
        tasks=names_of(tasks) or [],
        factors=one_or_none(factors),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        include_path=include_path,
        chat=chat,
        unsafe_code=unsafe_code,
        seed=seed,
        out=out,
        options=shared.options(),
    )
    if shared.as_json:
        print_json(measured)
    else:
        err.print(tasks_table(measured["results"][0]["details"]["tasks"]))


def _evaluate(
    measure: str,
    model: str,
    lengths: str,
    factors: list[str] | None,
    workers: str | None,
    out: Path | None,
    shared: Shared,
    **given: Any,
) -> None:
    from longrope.console import err, measuring_progress, print_json, resume_with
    from longrope.console_tables import results_table
    from longrope.evaluate.run import evaluate

    if out is not None:
        resume_with()
    with measuring_progress(shared.quiet) as on_step:
        measured = evaluate(
            measure,
            model,
            lengths=parse_lengths(lengths),
            factors=one_or_none(factors),
            workers=workers,
            out=out,
            on_step=on_step,
            options=shared.options(),
            **given,
        )
    if shared.as_json:
        print_json(measured)
    else:
        err.print(results_table(measured["results"], title=measure, measure=measure))
