"""A checkpoint for an engine: refused where the engine cannot express the factors, read back before it is done."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longrope.checkpoint import LoadOptions, as_model, load_options
from longrope.convert import as_table, factors_file, to_transformers_config
from longrope.errors import UserError
from longrope.export.card import front_matter, model_card
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
from longrope.modes import apart
from longrope.patch import widen_window
from longrope.runs import METRICS, short_name

logger = logging.getLogger(__name__)


@apart
def export(
    model: str | Path | LoadedModel,
    factors: FactorTable | str | Path | None,
    out: str | Path,
    *,
    engine: str = "transformers",
    window: str = "long",
    dtype: str | None = None,
    force: bool = False,
    documents: str | Sequence[str] | None = None,
    push: str | None = None,
    options: LoadOptions | None = None,
    **load: Any,
) -> Path:
    """Write a folder for an engine with the factors, and read it back to check.

    engine: transformers, vllm, sglang, mlx, or gguf for llama.cpp. window: `long` uses the last row at every length,
    safe everywhere; `short` the first; `dynamic` both, each engine in its own way. dtype: of matrices in a GGUF, f16 by
    default; of other engines the weights stay as they are. A sliding window that every layer has is widened to the
    target. The folder's factors.json is the table that is served: what our commands measure on the folder is what the
    engine does. What the engine cannot express is refused; force leaves it out, and the card says what that costs,
    measured on `documents` (stdlib by default). push: a repository of the Hub that the folder is uploaded to. factors:
    a table or its file, by default the factors.json beside the weights. options: LoadOptions as one object; `load`: its
    fields. Returns the folder. Raises UserError for factors of another model, and an `out` that is not empty or cannot
    be written.
    """
    check_names(engine, window)
    matrices = _matrices(engine, dtype)
    if documents is not None and not force:
        got, rule = "documents without --force", "what --force costs is measured on them"
        raise UserError("--documents", got=got, rule=rule, do="leave them out, or give --force")
    options = load_options(options, load)
    loaded = model if isinstance(model, LoadedModel) else skeleton(as_model(model), options)
    table = loaded.table if factors is None else as_table(factors)
    if table is None:
        rule = "an export needs factors"
        raise UserError("--factors", got=f"none, and no {FACTORS} in {loaded.name}", rule=rule, do="give a run")
    out = Path(out).resolve()
    loaded.check(table)
    folder = checkpoint_folder(loaded)
    parts = _for_engine(loaded, table, folder, engine, window, force=force)
    keys = to_transformers_config(parts.read)
    _check_place(out)
    costs: list[dict[str, Any]] = []
    if parts.left_out:
        costs = measured_costs(loaded.name, table, parts.served, engine, window, documents or ["stdlib"], options)
    served = parts.served
    widened = None
    if engine != "gguf" and served.rows[-1].up_to > loaded.rope.original_length:
        widened, as_before = widen_window(loaded.model, served.rows[-1].up_to)
        as_before()
    if engine != "transformers":  # so that `verify` knows whose rules hold
        served = replace(served, provenance={**served.provenance, "engine": engine, "window": window})
    card = model_card(
        loaded.name,
        served,
        window,
        engine=engine,
        family=parts.family,
        dtype=matrices,
        widened=widened,
        left_out=parts.left_out,
        costs=costs,
        measured=_measured(factors),
        about=front_matter(folder),
    )
    try:
        with whole_folder(out) as unfinished:
            if matrices is not None:
                name = short_name(loaded.name)
                path = unfinished / f"{name}-{matrices}.gguf"
                write_gguf(folder, parts.known, served, path, window=window, dtype=matrices, name=name)
            else:
                copy_checkpoint(folder, unfinished)
                kind = type(loaded.model.config.get_text_config())
                computed = isinstance(getattr(kind, "head_dim", None), property)  # Falcon's takes none
                extended = extended_config(config_of(folder), keys, loaded)
                written = engine_config(extended, served, engine, computes_head_dim=computed)
                write_atomically(unfinished / "config.json", json.dumps(written, indent=2) + "\n")
                lengthen_tokenizer(unfinished / "tokenizer_config.json", keys["max_position_embeddings"])
            served.to_be_given_away().save(unfinished / FACTORS)
            write_atomically(unfinished / "README.md", card)
            if engine != "gguf":
                verify_config(unfinished, loaded, parts.read)
    except OSError as error:  # of no kind that disk_errors has a rule for
        rule, do = "the folder must take the files of a checkpoint", "choose another folder"
        raise UserError("output", got=f"{out} ({error})", rule=rule, do=do) from None
    if widened is not None:
        logger.info(widened)
    if push is not None:
        from longrope.export.push import push_folder

        push_folder(out, push)
    return out


@dataclass(frozen=True)
class _ForEngine:
    """What an engine is given of a model and its table.

    family, known: model_type and configuration of the language model, as transformers has it. served: the table that
    the engine serves. read: what transformers reads of it, which has one attention factor whoever it is written for.
    left_out: what the engine cannot express, a sentence each.
    """

    family: str
    known: dict[str, Any]
    served: FactorTable
    read: FactorTable
    left_out: list[str]


def _for_engine(
    loaded: LoadedModel, table: FactorTable, folder: Path, engine: str, window: str, *, force: bool
) -> _ForEngine:
    """Raises UserError for a model that the engine does not run, and, unless forced, for what would be left out."""
    described = loaded.model.config.get_text_config()
    family, known = str(described.model_type), described.to_dict()
    wanted = table_for_window(table, window)
    if engine == "gguf":
        check_architecture(config_of(folder), folder)
        check_graph(known, wanted)
    check_family(engine, known)
    left_out = losses(wanted, engine, window, family)
    if left_out and not force:
        if engine == "transformers":
            to_transformers_config(wanted)  # says which, and what else there is
        rule = "nothing is dropped silently"
        forced = "--force, which leaves it out and measures what that costs"
        do = f"choose another engine, or {forced}"
        if wanted.rows[-1].start_tokens:  # no engine and no window is without them
            do = f"give {forced}"
        elif window == "dynamic":
            do = f"choose --window long, another engine, or {forced}"
        raise UserError(f"--engine {engine}", got=left_out[0], rule=rule, do=do)
    served = expressible(wanted, engine, window, family) if left_out else wanted
    read = served if engine == "transformers" else expressible(served, "transformers", window, family)
    return _ForEngine(family, known, served, read, left_out)


def _matrices(engine: str, dtype: str | None) -> str | None:
    """The type of matrices in a GGUF. Raises UserError for one of another engine, whose weights are copied: None."""
    if engine != "gguf" and dtype is not None:
        got, rule = f"{dtype} for {engine}", "weights are converted for gguf alone, and copied as they are for others"
        raise UserError("--dtype", got=got, rule=rule, do="leave it out, or use --engine gguf")
    return (dtype or "f16") if engine == "gguf" else None


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
