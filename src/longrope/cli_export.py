"""`longrope export` and `longrope verify`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from longrope.cli_options import (
    Factors,
    Model,
    Shared,
    one_table,
    runs_a_model,
)

# Weights are read as they are, and small parts of them are run on the CPU.
_NOT_RUN = ("seed", "device", "dtype", "attention", "rope_precision", "threads", "quantize")
Engine = Annotated[str, typer.Option(help="transformers, vllm, sglang, mlx, or gguf for llama.cpp.")]


@runs_a_model(*_NOT_RUN)
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The new folder.")],
    factors: Factors = None,
    engine: Engine = "transformers",
    window: Annotated[
        str, typer.Option(help="long (safe everywhere), dynamic (both rows, by length) or short.")
    ] = "long",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of matrices in a GGUF: f32, f16 (the default), bf16 or q8_0.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Leave out what the engine cannot express, and measure what that costs.")
    ] = False,
    documents: Annotated[
        list[str] | None, typer.Option("--documents", "-d", metavar="D", help="To measure that on; stdlib by default.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the folder to a repository of the Hub.")
    ] = None,
    *,
    shared: Shared,
) -> None:
    """A checkpoint for an engine, verified as written."""
    from longrope.console import err, print_json
    from longrope.export.run import export as run_export

    options = replace(shared.options(), device="cpu")
    written = run_export(
        model,
        factors[0] if factors and len(factors) == 1 and factors != ["none"] else one_table(factors),
        out,
        engine=engine,
        window=window,
        dtype=dtype,
        force=force,
        documents=documents or None,
        push=push,
        options=options,
    )
    if shared.as_json:
        settings = {"engine": engine, "window": window, "out": str(out)}
        print_json({"command": "export", "model": model, "settings": settings, "results": []})
    else:
        err.print(f"checkpoint: {written}", soft_wrap=True)


@runs_a_model(*_NOT_RUN, "original_length")
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An exported folder, or a .gguf file in one.")],
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was made of: compare weights and logits, too.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Whose rules hold; by default the one it was made for.")] = None,
    *,
    shared: Shared,
) -> None:
    """Whether an export says what it should, and what its engine will do with it; exit code 1 when it does not."""
    from longrope.console import err, print_json
    from longrope.console_tables import said_table
    from longrope.export.verify import verify as run_verify

    options = replace(shared.options(), device="cpu", dtype="float32")
    said = run_verify(path, against=against, engine=engine, options=options)
    if shared.as_json:
        settings: dict[str, Any] = {"path": str(path), "engine": engine}
        told: dict[str, Any] = {"command": "verify", "model": against, "settings": settings, "results": []}
        print_json(told | {"said": [each.told() for each in said]})
    elif not shared.quiet:
        err.print(said_table(said))
    if any(each.ok is False for each in said):
        raise typer.Exit(1)
