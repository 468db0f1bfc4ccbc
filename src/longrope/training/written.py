"""What a training writes at its end: a transformers folder with its factors, whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longrope.checkpoint import DTYPES
from longrope.convert import to_transformers_config
from longrope.errors import UserError
from longrope.export.card import front_matter, training_card
from longrope.export.transformers import checkpoint_folder, extended_config, lengthen_tokenizer
from longrope.factors import FACTORS, FactorTable
from longrope.files import write_atomically
from longrope.model import LoadedModel

logger = logging.getLogger(__name__)


def write_checkpoint(
    folder: Path,
    model: Any,
    loaded: LoadedModel,
    table: FactorTable,
    trained: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> None:
    """A transformers folder with its factors.json; config.json has the factors too, where it can express them.

    trained: the run's settings, for the model card. weights: those to be written instead of the model's own, where
    these are shards. dtype: of the written weights, that of training by default.
    """
    if dtype is not None:
        weights = _cast(model.state_dict() if weights is None else weights, DTYPES[dtype])
    model.save_pretrained(folder, state_dict=weights)
    if dtype is not None:  # transformers says that of the model, which stays as it was trained
        config = json.loads((folder / "config.json").read_text())
        write_atomically(folder / "config.json", json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    loaded.tokenizer.save_pretrained(str(folder))
    write_factors(folder, loaded, table)
    card = training_card(loaded.name, table, trained, front_matter(checkpoint_folder(loaded)))
    write_atomically(folder / "README.md", card)


def write_beside_adapters(folder: Path, loaded: LoadedModel, table: FactorTable, trained: Mapping[str, Any]) -> None:
    """The factors and the model card of a folder into which PEFT has written adapters."""
    table.to_be_given_away().save(folder / FACTORS)
    card = training_card(loaded.name, table, trained, front_matter(folder), apart=True)
    write_atomically(folder / "README.md", card)


def _cast(weights: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Weights in another dtype; what shares its memory with another one, as tied embeddings do, still does."""
    made: dict[tuple[int, torch.Size], Any] = {}
    cast = {}
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight = made.setdefault((weight.data_ptr(), weight.shape), weight.to(dtype))
        cast[name] = weight
    return cast


def write_factors(folder: Path, loaded: LoadedModel, table: FactorTable) -> None:
    """The factors of a transformers folder: its factors.json, and config.json where that can express them."""
    table.to_be_given_away().save(folder / FACTORS)
    last = table.rows[-1]
    lengthen_tokenizer(folder / "tokenizer_config.json", last.up_to)
    alone = len(table.rows) == 1 and last.up_to > table.original_length
    long = replace(table, rows=(last.with_values(up_to=table.original_length), last)) if alone else table
    try:
        keys = to_transformers_config(long)
    except UserError as error:
        logger.info("config.json keeps the window of the base, %s is what counts: %s", FACTORS, error)
        return
    config = json.loads((folder / "config.json").read_text())
    write_atomically(folder / "config.json", json.dumps(extended_config(config, keys, loaded), indent=2) + "\n")
