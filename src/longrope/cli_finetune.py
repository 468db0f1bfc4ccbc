"""`longrope finetune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from longrope.cli_options import (
    Factors,
    Model,
    Out,
    Shared,
    one_table,
    runs_a_model,
)
from longrope.errors import plural
from longrope.lengths import parse_length


@runs_a_model()
def finetune(
    model: Model,
    length: Annotated[str, typer.Option("--length", metavar="N", help="Tokens of a window, BOS and EOS included.")],
    documents: Annotated[list[str], typer.Option("--documents", "-d", metavar="D", help="Texts of windows.")],
    factors: Factors = None,
    steps: Annotated[int | None, typer.Option(metavar="S", help="Optimizer steps; a recipe may say them.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="R", help="longrope-llama2 (the default), longrope-mistral or longrope2.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Instead of the recipe's.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine or constant, instead of the recipe's.")] = None,
    warmup: Annotated[int | None, typer.Option(metavar="S", help="Steps of a rising learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="B", help="Windows of a step, over all devices.")] = None,
    weight_decay: Annotated[float | None, typer.Option(metavar="X", help="Instead of the recipe's.")] = None,
    beta1: Annotated[float | None, typer.Option(metavar="X", help="Of Adam, instead of the recipe's.")] = None,
    beta2: Annotated[float | None, typer.Option(metavar="X", help="Of Adam, instead of the recipe's.")] = None,
    clip: Annotated[float | None, typer.Option(metavar="X", help="Norm that gradients are clipped at.")] = None,
    mixed: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Windows packed of short documents under their own factors (LongRoPE2)."),
    ] = None,
    short_documents: Annotated[
        list[str] | None, typer.Option("--short-documents", metavar="D", help="For --mixed; pieces of -d by default.")
    ] = None,
    hold_out: Annotated[
        bool,
        typer.Option("--hold-out", help="Leave out a part of all documents by hash, as extend does."),
    ] = False,
    lora: Annotated[int | None, typer.Option(metavar="RANK", help="Train LoRA adapters of this rank.")] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings/--no-embeddings", help="Of LoRA: train the embeddings, too.")
    ] = False,
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Of LoRA: train the norms, too.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Of LoRA: write a checkpoint with it merged.")] = False,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="By default as memory asks for it."),
    ] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    save_dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="Of the checkpoint: float32, bfloat16 or float16; as trained.")
    ] = None,
    tracker: Annotated[str, typer.Option(help="What Trainer reports to (with commas), or none.")] = "tensorboard",
    out: Out = None,
    *,
    shared: Shared,
) -> None:
    """Train a model on long windows under its factors; a checkpoint with its factors.json comes of it."""
    from longrope.console import err, print_json, resume_with, training_progress
    from longrope.runs import ADAPTER, CHECKPOINT, default_run_path, is_first_process
    from longrope.training.run import finetune as run_finetune

    given: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "schedule": schedule, "warmup": warmup}
    given |= {"beta1": beta1, "beta2": beta2, "clip": clip}
    given |= {"batch": batch, "weight_decay": weight_decay, "mixed": mixed, "short_documents": short_documents or []}
    given |= {
        "hold_out": hold_out,
        "embeddings": embeddings,
        "norms": norms,
        "merge": merge,
        "documents": documents,
        "seed": shared.seed,
    }
    given |= {"gradient_checkpointing": gradient_checkpointing, "save_every": save_every, "keep": keep}
    given |= {"save_dtype": save_dtype}
    options = shared.options(own_factors=factors != ["none"])
    path = out or default_run_path("finetune", model, parse_length(length))
    resume_with()
    with training_progress(shared.quiet) as on_progress:
        made = run_finetune(
            model,
            length=length,
            factors=one_table(factors),
            recipe=recipe,
            lora=lora,
            out=path,
            options=options,
            on_progress=on_progress,
            tracker=tracker,
            **given,
        )
    if not is_first_process():
        return
    if shared.as_json:
        print_json(made)
    else:
        first, last = made["losses"][0], made["losses"][-1]
        err.print(f"{plural(len(made['losses']), 'step')}, loss {first:.4f} -> {last:.4f}")
        written = CHECKPOINT if (path / CHECKPOINT).is_dir() else ADAPTER
        err.print(f"{written}: {path / written}", soft_wrap=True)
