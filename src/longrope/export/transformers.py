"""A checkpoint that stock transformers loads: the weights as they are, the factors in config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from longrope.checkpoint import model_source
from longrope.configs import SCALING_KEYS
from longrope.errors import UserError
from longrope.factors import FACTORS, FactorTable, RopeFactors
from longrope.files import read_json, write_atomically
from longrope.guard import files_to_copy
from longrope.model import LoadedModel
from longrope.patch import EXTENDED_LAYERS, Layout, ScaledRotary, has_local_layers, rotary_modules, stock_frequencies
from longrope.rope import RopeTensors, cos_sin, inverse_frequencies

_LEFT_BEHIND = ("config.json", "README.md", FACTORS)
_WEIGHTS_OF_OTHERS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def checkpoint_folder(loaded: LoadedModel) -> Path:
    """The folder of a model's files; those of a Hub id are in the local cache, from which it was loaded."""
    folder = Path(model_source(loaded.name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(loaded.name, local_files_only=True))


def copy_checkpoint(folder: Path, out: Path) -> None:
    """Copy what a checkpoint needs beside its config.json: safetensors, tokenizer, generation settings."""
    for path in files_to_copy(folder):
        wanted = path.name not in _LEFT_BEHIND and path.suffix not in _WEIGHTS_OF_OTHERS
        if wanted and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)  # contents, not permissions: a read-only source is no trap


def config_of(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a model's folder."""
    config = read_json(folder / "config.json", "model")
    assert isinstance(config, dict), "the model was loaded from it"
    return config


def extended_config(config: Mapping[str, Any], keys: Mapping[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """A model's config.json with the keys of an extended RoPE, at every place that transformers and others read."""
    extended = dict(config)
    text = dict(extended.get("text_config") or extended)
    rope = dict(keys["rope_parameters"])
    known = loaded.model.config.get_text_config()
    by_type = {kind: value for kind, value in (known.rope_parameters or {}).items() if isinstance(value, Mapping)}
    own = by_type.get(EXTENDED_LAYERS) or known.rope_parameters or {}
    rope |= {key: value for key, value in own.items() if key not in SCALING_KEYS and value is not None}
    parameters: dict[str, Any] = {**by_type, EXTENDED_LAYERS: rope} if by_type else rope
    text |= {"max_position_embeddings": keys["max_position_embeddings"], "rope_theta": keys["rope_theta"]}
    text |= {"rope_parameters": parameters}
    text.pop("rope_scaling", None)
    if not by_type:
        text["rope_scaling"] = rope  # what other engines and transformers 4 read
        text["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    window, target = getattr(known, "sliding_window", None), keys["max_position_embeddings"]
    if window is not None and not has_local_layers(known) and target > loaded.rope.original_length:
        # Also where config.json names none (the class may have its own) and no layer has it (an engine may not ask).
        text["sliding_window"] = max(window, target)
    if getattr(known, "head_dim", 0) is None:  # Mixtral's class computes no scaling without one
        text["head_dim"] = known.hidden_size // known.num_attention_heads
    if extended.get("text_config"):
        return extended | {"text_config": text}
    return text


def lengthen_tokenizer(path: Path, target: int) -> None:
    """Let the tokenizer of a checkpoint pass `target` tokens: with its old maximum a pipeline would cut them off."""
    settings = read_json(path, "tokenizer") if path.is_file() else None
    longest = settings.get("model_max_length") if isinstance(settings, dict) else None
    if isinstance(settings, dict) and isinstance(longest, int | float) and longest < target:
        write_atomically(path, json.dumps(settings | {"model_max_length": target}, indent=2, ensure_ascii=False) + "\n")


def verify_config(folder: Path, loaded: LoadedModel, served: FactorTable) -> None:
    """Raise UserError unless stock transformers, reading the folder, rotates by the factors at every length.

    The class's own rotary embedding is built from the written config.json. Its frequencies, its attention factor and
    the cos and sin that its forward returns must be those of our rows, on both sides of the boundary. No weights are
    read.
    """
    original, longest = served.original_length, served.rows[-1].up_to
    for _, _, module in rotary_modules(loaded.model):
        ours = module if isinstance(module, ScaledRotary) else ScaledRotary(module, loaded.rope.shape)
        name = type(ours.stock).__name__
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=loaded.options.trust_remote_code)
            stock = type(ours.stock)(config.get_text_config())
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a class of its own makes of its config
            got, do = f"{type(error).__name__} ({error}) from {name}", "use --engine transformers"
            rule = "its class must read the config.json that the engine does"
            raise UserError("export", got=got, rule=rule, do=do) from error
        own, read = ({key: each.cpu() for key, each in of.named_buffers()} for of in (ours.stock, stock))
        others = [key for key in own if key.endswith("_inv_freq") and not key.startswith((EXTENDED_LAYERS, "original"))]
        for key in others:
            if key not in read or not torch.allclose(read[key], own[key], rtol=1e-6, atol=0):
                got = f"other frequencies of {key.removesuffix('_inv_freq')} layers from {name}"
                rule, do = "layers that are not extended rotate as before", "use --engine transformers"
                raise UserError("export", got=got, rule=rule, do=do)
        for length in sorted({1, original, min(original + 1, longest), longest}):
            if _rotates_by(stock, served.row_for(length), served.rope_theta, length, ours.layout):
                continue
            one_row = served.rows[0].rescale == served.rows[-1].rescale
            raise UserError(
                "export",
                got=f"other factors from transformers at {length} tokens",
                rule=f"{name} must read back what was written",
                do="this class cannot be exported for transformers; please report it"
                if one_row
                else "use --window long: this class does not change its factors with the length",
            )


@torch.no_grad()
def _rotates_by(stock: torch.nn.Module, row: RopeFactors, rope_theta: float, length: int, layout: Layout) -> bool:
    """Whether a sequence of `length` is rotated by `row`, at a few of its positions."""
    positions = torch.tensor([[*sorted({min(2**power, length) - 1 for power in range(13)}), length - 1]])
    *_, layer_type = stock_frequencies(stock)
    returned = stock(torch.zeros(1, 1, 1), positions, *([layer_type] if layer_type else []))
    frequencies, scaling, _ = stock_frequencies(stock)  # after forward: a class may change them with the length
    expected = inverse_frequencies(rope_theta, torch.tensor(row.rescale, dtype=torch.float32))
    if not torch.allclose(frequencies, expected, rtol=1e-6, atol=0) or abs(scaling - row.attention_factor) > 1e-6:
        return False
    laid_out = layout(*cos_sin(positions, RopeTensors.of((row,), rope_theta)))
    pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (returned, laid_out)), strict=True)
    allowed = 1e-6 * (1 + positions[..., None])  # an angle is as exact as its frequency, times the position
    return all(bool(((theirs - mine).abs() <= allowed).all()) for theirs, mine in pairs)
