"""A checkpoint for an engine: refused where the engine cannot express the factors, read back before it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope.checkpoint import FACTORS_FILE, LoadOptions, load_options
from longrope.convert import factors_file, read_factors, to_transformers_config
from longrope.errors import UserError
from longrope.export.card import model_card
from longrope.export.costs import measured_costs
from longrope.export.engines import check_names, engine_config, expressible, losses, table_for_window
from longrope.export.gguf_file import check_architecture, write_gguf
from longrope.export.skeleton import skeleton
from longrope.export.transformers import (
    checkpoint_folder,
    config_of,
    copy_checkpoint,
    extended_config,
    lengthen_tokenizer,
    verify_config,
)
from longrope.factors import FactorTable
from longrope.files import disk_errors, write_atomically
from longrope.model import LoadedModel


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
    table = read_factors(factors_file(factors)) if isinstance(factors, str | Path) else factors or loaded.table
    if table is None:
        rule = "an export needs factors"
        raise UserError("--factors", got=f"none, and no {FACTORS_FILE} in {loaded.name}", rule=rule, do="give a run")
    out = Path(out).resolve()
    loaded.check(table)
    folder = checkpoint_folder(loaded)
    config = config_of(folder)
    family = str(loaded.model.config.get_text_config().model_type)
    wanted = table_for_window(table, window)
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
    unfinished = _place(out)
    if engine == "gguf":
        check_architecture(config, folder)
    costs = measured_costs(loaded.name, table, served, engine, window, documents, options) if missing else []
    if engine != "transformers":  # so that `verify` knows whose rules hold
        served = replace(served, provenance={**served.provenance, "engine": engine, "window": window})
    try:
        with disk_errors(out):
            shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
            unfinished.mkdir(parents=True)
            if engine == "gguf":
                name = loaded.name.rstrip("/").rsplit("/", 1)[-1]
                path = unfinished / f"{name}-{dtype}.gguf"
                write_gguf(folder, config, served, path, window=window, dtype=dtype, name=name)
            else:
                copy_checkpoint(folder, unfinished)
                written = engine_config(extended_config(config, keys, loaded), served, engine)
                write_atomically(unfinished / "config.json", json.dumps(written, indent=2) + "\n")
                lengthen_tokenizer(unfinished / "tokenizer_config.json", keys["max_position_embeddings"])
            served.save(unfinished / FACTORS_FILE)
            card = model_card(loaded.name, served, window, engine=engine, left_out=missing, costs=costs)
            write_atomically(unfinished / "README.md", card)
            if engine != "gguf":
                verify_config(unfinished, loaded, read)
            _put_in_place(unfinished, out)
    except OSError as error:  # of no kind that disk_errors has a rule for
        rule, do = "the folder must take the files of a checkpoint", "choose another folder"
        raise UserError("output", got=f"{out} ({error})", rule=rule, do=do) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if push is not None:
        from longrope.export.push import push_folder

        push_folder(out, push)
    return out


def _place(out: Path) -> Path:
    """Where the export is written until it is whole.

    Raises UserError unless `out` is not there, or an empty folder but for what a killed export left.
    """
    # In a folder that is there, which may be a mount point: it can be neither removed nor renamed over.
    unfinished = (out if out.is_dir() else out.parent) / f".{out.name}.unfinished"
    if not out.exists():
        return unfinished
    if not out.is_dir():
        raise UserError("--out", got=f"{out}, which is a file", rule="an export is a new folder", do="choose another")
    with disk_errors(out):
        empty = all(path == unfinished for path in out.iterdir())
    if not empty:
        got = f"{out}, which is not empty"
        raise UserError("--out", got=got, rule="an export is a new folder", do="choose another")
    return unfinished


def _put_in_place(unfinished: Path, out: Path) -> None:
    """Make a whole checkpoint appear at `out`; file by file in a folder, config.json last, or nothing at all."""
    if not out.exists():
        unfinished.rename(out)
        return
    moved: list[Path] = []
    try:
        for path in sorted(unfinished.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            moved.append(path.rename(out / path.name))
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
