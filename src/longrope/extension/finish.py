"""The end of an extension: the checkpoint with its whole table, and what it is worth on documents held out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope.describe import describe_options, metrics
from longrope.errors import UserError
from longrope.evaluate.passkey import PasskeyMeasure
from longrope.evaluate.recorded import measure_methods, measure_run
from longrope.export.card import extension_card, front_matter
from longrope.export.transformers import checkpoint_folder, config_of, copy_checkpoint
from longrope.extension.going import Extension
from longrope.extension.plan import measured_lengths
from longrope.factors import FactorTable
from longrope.files import write_atomically
from longrope.folders import replaced_folder
from longrope.model import LoadedModel
from longrope.runs import CHECKPOINT, RunFolder
from longrope.training.written import write_factors
from longrope.windows import windows_of

logger = logging.getLogger(__name__)

PASSKEY = "passkey"
"""Folder of an extension's measurement of passkeys, a run of its own."""
_OF_TRAINING = ("dtype", "torch_dtype", "tie_word_embeddings")


def write_checkpoint(going: Extension, table: FactorTable) -> None:
    """checkpoint/: the weights of the last stage with the whole table."""
    going.watching.stage("writing the checkpoint")
    loaded = going.model(going.base)
    folder_of_base = checkpoint_folder(loaded)
    config = config_of(folder_of_base)  # no row of an earlier stage is in it
    source = folder_of_base if going.current == going.base else Path(going.current)
    with replaced_folder(going.run / CHECKPOINT) as folder:
        copy_checkpoint(source, folder)
        write_atomically(folder / "config.json", json.dumps(as_trained(config, config_of(source)), indent=2) + "\n")
        write_factors(folder, loaded, table)
        write_atomically(
            folder / "README.md", extension_card(going.base, table, going.told(), front_matter(folder_of_base))
        )


def as_trained(config: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """The base's config.json with what a training changes in it beside the factors, in that of its text as well.

    That is the dtype of the weights, and whether embeddings are tied: adapters on one of two tied ones untie them.
    """
    made = {key: value for key, value in config.items() if key not in _OF_TRAINING[:2] or not _says_dtype(trained)}
    made |= {key: value for key, value in trained.items() if key in _OF_TRAINING}
    inner, other = config.get("text_config"), trained.get("text_config")
    if isinstance(inner, Mapping) and isinstance(other, Mapping):
        made["text_config"] = as_trained(inner, other)
    return made


def _says_dtype(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has a dtype, under either name: then it is the only one."""
    return any(config.get(key) is not None for key in _OF_TRAINING[:2])


def _holds(passkey: PasskeyMeasure, loaded: LoadedModel, length: int) -> bool:
    """Whether a window holds a passkey's prompt at all, which one of a few dozen tokens does not.

    Nor does any where the tokenizer cannot write the key.
    """
    try:
        passkey.items(loaded, length)
    except UserError as error:
        logger.info("no passkeys at %d tokens: %s", length, error)
        return False
    return True


def measure(going: Extension, run: RunFolder, table: FactorTable) -> dict[str, Any]:
    """Perplexity and passkeys of the checkpoint by length, and the base model's perplexity where it was trained."""
    going.watching.stage("measuring")
    wanted, original = going.plan.measures, going.original_length
    lengths = measured_lengths(going.plan, [table.original_length, *table.lengths])
    base = going.model(going.base)
    windows = {each: windows_of(base, going.texts.unseen, each, wanted.windows, going.seed) for each in lengths}
    results = []
    if original in lengths:
        results += measure_methods(base, {original: windows[original]}, ("none",), {}, run)
    own = going.model(str(going.run / CHECKPOINT))
    results += measure_methods(own, windows, (), {"longrope": table}, run)
    settings = {"lengths": lengths, "seed": going.seed, **describe_options(own)}
    if wanted.passkey:
        passkey = PasskeyMeasure(tries=wanted.passkey, seed=going.seed)
        rows = {("longrope", each): table.row_for(each) for each in lengths if _holds(passkey, own, each)}
        with going.watching.measuring() as on_step:
            if rows:
                measure_run("extend", own, passkey, rows, settings, out=going.run / PASSKEY, on_step=on_step)
    listed = [window for each in lengths for window in windows[each]]
    return metrics("extend", own, settings, results, documents=listed)
