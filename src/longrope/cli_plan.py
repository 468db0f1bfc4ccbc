"""`longrope plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from longrope.cli_options import Json, OriginalLength, Quantize, Quiet, Verbose, begin, length_of
from longrope.lengths import parse_length


def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a config.json, a Hub id, or tiny.")],
    to: Annotated[str, typer.Option("--to", metavar="N", help="Target length, such as 128k.")],
    gpus: Annotated[
        str,
        typer.Option(
            metavar="NxNAME-MEMORY",
            help="Such as 8xH100-80GB; 8x80GB with --flops; cpu is this machine, whose rates are measured.",
        ),
    ] = "cpu",
    flops: Annotated[float | None, typer.Option(metavar="TFLOPS", help="Peak of one device, TFLOP/s in bf16.")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(metavar="X", help="Share of the peak that is reached; by default 0.3 to 0.4 by stage."),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A plan in TOML, or longrope, longrope-mistral, longrope2; by default what the ratio asks for.",
        ),
    ] = None,
    no_finetune: Annotated[bool, typer.Option("--no-finetune", help="One search, no training.")] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters of this rank, not all weights.")
    ] = None,
    quantize: Quantize = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="As search and finetune have it: auto, autocast, float32, bfloat16, float16.")
    ] = "auto",
    original_length: OriginalLength = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Memory, FLOPs and hours of every stage on machines that need not be there; no weights are read."""
    begin(verbose, quiet)
    from longrope.console import err, print_json
    from longrope.console_tables import plan_table
    from longrope.planning.run import plan as run_plan

    told = run_plan(
        model,
        to=parse_length(to),
        gpus=gpus,
        flops=flops,
        mfu=mfu,
        stages=stages,
        train=not no_finetune,
        lora=lora,
        quantize=quantize,
        dtype=dtype,
        original_length=length_of(original_length),
    )
    if as_json:
        print_json(told)
    else:
        err.print(plan_table(told))
