"""`longrope compare`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longrope.cli_options import (
    BatchSize,
    Chat,
    Factors,
    FewShot,
    IncludePath,
    Lengths,
    Limit,
    Model,
    Out,
    Questions,
    Shared,
    Stride,
    Tasks,
    Template,
    UnsafeCode,
    Windows,
    Workers,
    names_of,
    runs_a_model,
)
from longrope.errors import UserError
from longrope.lengths import format_length, parse_lengths

_PROMPTS = ("template", "chat")
# Options of each measure; all others of the command are of every one.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "perplexity": ("documents", "windows", "stride"),
    "passkey": ("tries", *_PROMPTS),
    "needle": ("documents", "depths", "tries", "digits", *_PROMPTS),
    "ruler": ("documents", "tasks", "samples", "questions", *_PROMPTS),
    "harness": ("tasks", "limit", "num_fewshot", "batch_size", "include_path", "unsafe_code", "chat"),
}


@runs_a_model("seed", "quantize")
def compare(
    model: Model,
    lengths: Lengths,
    documents: Annotated[
        list[str] | None,
        typer.Option("--documents", "-d", metavar="D", help="Texts to measure on, or that hide the needles."),
    ] = None,
    measure: Annotated[str, typer.Option(help="perplexity, passkey, needle, ruler or harness.")] = "perplexity",
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,..", help="none, pi, ntk, ntk-cd, dynamic-ntk, yarn, yarn-paper, yarn-rcd, llama3; +su."
        ),
    ] = None,
    factors: Factors = None,
    stage: Annotated[
        str | None, typer.Option(metavar="second", help="second: methods on top of the checkpoint's own factors.")
    ] = None,
    windows: Windows = None,
    stride: Stride = None,
    tries: Annotated[int | None, typer.Option(min=1, help="Prompts of a length (passkey) or a cell (needle).")] = None,
    depths: Annotated[int | None, typer.Option(min=1, help="Of needle: evenly spaced depths; 10 by default.")] = None,
    digits: Annotated[int | None, typer.Option(min=1, help="Of needle: of the number; 7 by default.")] = None,
    tasks: Tasks = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of RULER: of each task; 20 by default.")] = None,
    questions: Questions = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    batch_size: BatchSize = None,
    include_path: IncludePath = None,
    unsafe_code: UnsafeCode = False,
    template: Template = None,
    chat: Chat = False,
    workers: Workers = None,
    out: Out = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Equal seeds give equal results. 0 by default; harness has its own.")
    ] = None,
    *,
    shared: Shared,
) -> None:
    """The table of methods by length, in any measure, on the same items."""
    from longrope.compare import compare as run_compare
    from longrope.console import err, measuring_progress, print_json, resume_with
    from longrope.console_tables import results_table, tasks_by_method_table
    from longrope.evaluate.methods import DEFAULT_METHODS

    wanted = parse_lengths(lengths)
    settings = _of_measure(
        measure,
        documents=documents,
        windows=windows,
        stride=stride,
        tries=tries,
        depths=depths,
        digits=digits,
        tasks=names_of(tasks),
        samples=samples,
        questions=questions,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        include_path=include_path,
        unsafe_code=unsafe_code,
        template=template,
        chat=chat,
    )
    resume_with()
    with measuring_progress(shared.quiet) as on_step:
        measured = run_compare(
            model,
            lengths=wanted,
            measure=measure,
            methods=DEFAULT_METHODS if methods is None else methods,
            factors=factors,
            stage=stage,
            workers=workers,
            out=out,
            options=shared.options(),
            on_step=on_step,
            **({} if seed is None else {"seed": seed}),
            **settings,
        )
    title = f"{measure}, methods set up for {format_length(max(wanted))}"
    if shared.as_json:
        print_json(measured)
    elif measure == "harness":
        err.print(tasks_by_method_table(measured["results"], title=title))
    else:
        err.print(results_table(measured["results"], title=title, measure=measure))


def _of_measure(measure: str, **options: Any) -> dict[str, Any]:
    """The options that were given. Raises UserError for one that the measure does not have."""
    given = {name: value for name, value in options.items() if value not in (None, False)}
    for name in given:
        if measure in _OPTIONS and name not in _OPTIONS[measure]:
            having = ", ".join(each for each, names in _OPTIONS.items() if name in names)
            flag = f"--{name.replace('_', '-')}"
            raise UserError(flag, got=f"--measure {measure}", rule=f"it is an option of {having}", do="leave it out")
    return given
