"""A checkpoint for an engine: refused where the engine cannot express the factors, read back before it is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope.checkpoint import LoadOptions, load_options
from longrope.convert import as_table, factors_file, to_transformers_config
from longrope.errors import UserError
from longrope.export.card import model_card
from longrope.export.costs import measured_costs
from longrope.export.engines import (
    check_family,
    check_names,
    engine_config,
    expressible,
    losses,
    table_for_window,
)
from longrope.export.gguf_file import check_architecture, check_graph, write_gguf
from longrope.export.skeleton import skeleton
from longrope.export.transformers import (
    checkpoint_folder,
    config_of,
    copy_checkpoint,
    extended_config,
    lengthen_tokenizer,
    verify_config,
)
from longrope.factors import FACTORS, FactorTable
from longrope.files import disk_errors, read_json, write_atomically
from longrope.folders import is_free, whole_folder
from longrope.model import LoadedModel
from longrope.runs import METRICS


def export(
    model: str | LoadedModel,
    factors: FactorTable | str | Path | None,
    out: str | Path,
    *,
    engine: str = "transformers",
    window: str = "long",
    dtype: str = "f16",
    force: bool = False,
    documents: Sequence[str] = ("stdlib",),
    push: str | None = None,
    options: LoadOptions | None = None,
    **load: Any,
) -> Path:
    """Write a folder for an engine with the factors, and read it back to check.

    engine: transformers, vllm, sglang, mlx, or gguf for llama.cpp. window: `long` uses the last row at every length,
    safe everywhere; `short` the first; `dynamic` both, each engine in its own way. dtype: of matrices in a GGUF. A
    sliding window that every layer has is widened to the target. The folder's factors.json is the table that is served:
    what our commands measure on the folder is what the engine does. What the engine cannot express is refused; force
    leaves it out, and the card says what that costs, measured on `documents`. push: a repository of the Hub that the
    folder is uploaded to. factors: a table or its file, by default the factors.json beside the weights. options:
    LoadOptions as one object; `load`: its fields. Returns the folder. Raises UserError for factors of another model,
    and an `out` that is not empty or cannot be written.
    """
    check_names(engine, window)
    options = load_options(options, load)
    loaded = model if isinstance(model, LoadedModel) else skeleton(model, options)
    table = loaded.table if factors is None else as_table(factors)
    if table is None:
        rule = "an export needs factors"
        raise UserError("--factors", got=f"none, and no {FACTORS} in {loaded.name}", rule=rule, do="give a run")
    out = Path(out).resolve()
    loaded.check(table)
    folder = checkpoint_folder(loaded)
    config = config_of(folder)
    family = str(loaded.model.config.get_text_config().model_type)
    wanted = table_for_window(table, window)
    known = loaded.model.config.get_text_config().to_dict()
    if engine == "gguf":
        check_architecture(config, folder)
        check_graph(known, wanted)
    check_family(engine, known)
    missing = losses(wanted, engine, window, family)
    served = expressible(wanted, engine, window, family) if missing else wanted
    if missing and not force:
        if engine == "transformers":
            to_transformers_config(wanted)  # says which, and what else there is
        rule = "nothing is dropped silently"
        do = "choose another window or engine, or --force, which leaves it out and measures what that costs"
        raise UserError(f"--engine {engine}", got=missing[0], rule=rule, do=do)
    # transformers reads what is written for other engines, too, with one attention factor
    read = served if engine == "transformers" else expressible(served, "transformers", window, family)
    keys = to_transformers_config(read)
    _check_place(out)
    costs = measured_costs(loaded.name, table, served, engine, window, documents, options) if missing else []
    if engine != "transformers":  # so that `verify` knows whose rules hold
        served = replace(served, provenance={**served.provenance, "engine": engine, "window": window})
    try:
        with whole_folder(out) as unfinished:
            if engine == "gguf":
                name = loaded.name.rstrip("/").rsplit("/", 1)[-1]
                path = unfinished / f"{name}-{dtype}.gguf"
                write_gguf(folder, known, served, path, window=window, dtype=dtype, name=name)
            else:
                copy_checkpoint(folder, unfinished)
                written = engine_config(extended_config(config, keys, loaded), served, engine)
                write_atomically(unfinished / "config.json", json.dumps(written, indent=2) + "\n")
                lengthen_tokenizer(unfinished / "tokenizer_config.json", keys["max_position_embeddings"])
            served.save(unfinished / FACTORS)
            card = model_card(
                loaded.name,
                served,
                window,
                engine=engine,
                family=family,
                dtype=dtype if engine == "gguf" else None,
                left_out=missing,
                costs=costs,
                measured=_measured(factors),
            )
            write_atomically(unfinished / "README.md", card)
            if engine != "gguf":
                verify_config(unfinished, loaded, read)
    except OSError as error:  # of no kind that disk_errors has a rule for
        rule, do = "the folder must take the files of a checkpoint", "choose another folder"
        raise UserError("output", got=f"{out} ({error})", rule=rule, do=do) from None
    if push is not None:
        from longrope.export.push import push_folder

        push_folder(out, push)
    return out


def _measured(factors: object) -> dict[str, Any] | None:
    """The metrics.json beside a file of factors, where they are of a run."""
    path = factors_file(factors).parent / METRICS if isinstance(factors, str | Path) else None
    found = read_json(path, "measurements of the run") if path is not None and path.is_file() else None
    return found if isinstance(found, dict) else None


def _check_place(out: Path) -> None:
    """Raise UserError unless `out` is not there, or an empty folder but for what a killed export left."""
    if out.exists() and not out.is_dir():
        raise UserError("--out", got=f"{out}, which is a file", rule="an export is a new folder", do="choose another")
    with disk_errors(out):
        free = is_free(out)
    if not free:
        got = f"{out}, which is not empty"
        raise UserError("--out", got=got, rule="an export is a new folder", do="choose another")
