"""MODEL without its weights: its shape from the class itself, on the meta device, and its RoPE."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longrope.checkpoint import LoadOptions, read_rope
from longrope.doctor.examine import files_of, read_config
from longrope.errors import UserError, shown
from longrope.model import LoadedModel, decoder_of, local_alone, without_rope
from longrope.patch import check_has_rotary, has_local_layers
from longrope.planning.shape import ModelShape
from longrope.rotating import said_to_turn_globally
from longrope.search.backward import decoder_layers

logger = logging.getLogger(__name__)

# Types of layers that are no attention: they have a state of one size, or none, and no keys
_WITHOUT_KEYS = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")
_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")


def subject(model: str, options: LoadOptions) -> LoadedModel:
    """A MODEL (a folder, its config.json alone, a Hub id or `tiny`) as it would be loaded, its weights on no device.

    No weights are read and there is no tokenizer. Raises UserError for what could not be extended.
    """
    path, described, _ = read_config(files_of(model))
    family = described.get("model_type")
    if not isinstance(family, str) or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        rule = "a configuration names the model_type of a causal language model of transformers"
        do = "give a ...ForCausalLM checkpoint or its config.json"
        raise UserError("model", got=f"{model} with model_type {family!r}", rule=rule, do=do)
    given = {key: value for key, value in described.items() if key not in ("model_type", "quantization_config")}
    try:
        # Infinity, which JSON has no number for, is written as an object
        config: Any = AutoConfig.for_model(family, **PreTrainedConfig._decode_special_floats(given))
        _check_can_be(config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
        # What transformers makes of the file is the certain form: defaults of a class are in it.
        rope, own, table = read_rope(model, str(path.parent), config, options)
        with torch.device("meta"):
            built: Any = cast(Any, AutoModelForCausalLM).from_config(config)
    except UserError:
        raise
    except Exception as error:  # a class may check anything against anything
        said = " ".join(str(error).split())[:200]
        got, rule = f"{model} ({type(error).__name__}: {said})", f"it describes a {family}"
        raise UserError("config", got=got, rule=rule, do="correct config.json; longrope doctor finds more") from None
    check_has_rotary(built)
    return LoadedModel(
        name=model,
        model=built,
        tokenizer=cast(Any, None),  # nothing is read
        rope=rope,
        own=own,
        table=table,
        fingerprint="no weights",
        options=options,
    )


def _check_can_be(config: Any, name: str) -> None:
    """Raise UserError for sizes that no model has, and for a class, by its name, that rotates no layer to extend."""
    text = config.get_text_config()
    for key in _SIZES:
        size = getattr(text, key, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"config: {key}", got=shown(size), rule="it is at least 1", do="correct config.json")
    if not said_to_turn_globally(text.to_dict()):
        raise local_alone(name)
    if getattr(text, "alibi", False):
        raise without_rope(name)


def shape_of(model: Any, name: str = "") -> ModelShape:
    """What the costs of a transformers model follow from; its weights may be on the meta device."""
    config = model.config.get_text_config()
    layers = decoder_layers(decoder_of(model))
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts") or 0
    chosen = _first(config, "num_experts_per_tok", "moe_topk", "moe_k") or experts
    active = linear = adapters = 0.0
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.dim() < 2:
                continue
            of_experts = parameter.dim() == 3 and parameter.shape[0] == experts
            linear += parameter.numel()
            active += parameter.numel() * (chosen / experts if of_experts else 1.0)
        adapters += sum(each.in_features + each.out_features for each in layer.modules() if isinstance(each, nn.Linear))
    heads = config.num_attention_heads
    kv_heads = _first(config, "num_key_value_heads") or heads
    head_dim = _first(config, "head_dim") or config.hidden_size // heads
    inner = _inner(config, chosen if any(each.dim() == 3 for each in layers[0].parameters()) else 0)
    projections = config.hidden_size * head_dim * 2 * (heads + kv_heads)
    matrices = round((active / len(layers) - projections) / (config.hidden_size * inner))
    names = {name.rpartition(".")[2] for name, _ in layers[-1].named_modules()}
    return ModelShape(
        name=name or type(model).__name__,
        hidden=config.hidden_size,
        layers=len(layers),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=inner,
        inner_matrices=min(3, max(2, matrices)),
        vocabulary=config.vocab_size,
        windows=_windows(config, len(layers)),
        parameters=sum(each.numel() for each in model.parameters()),
        layer_parameters=sum(each.numel() for layer in layers for each in layer.parameters()),
        active=round(active),
        linear=round(linear),
        adapters=round(adapters),
        attention_norms=(heads + kv_heads) * head_dim if {"q_norm", "k_norm"} & names else 0,
    )


def _inner(config: Any, chosen: int) -> int:
    """Width of what one token passes between the halves of an MLP."""
    wide = _first(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * config.hidden_size
    if not chosen:
        return int(wide)
    each = _first(config, "moe_intermediate_size") or wide
    return int(chosen * each + (_first(config, "shared_expert_intermediate_size") or 0))


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """What each layer sees once the model is extended: a window that all of them have is widened, local layers stay.

    Nothing where a layer is no attention.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    if len(kinds) != layers:
        return (None,) * layers
    window = (getattr(config, "sliding_window", None) if has_local_layers(config) else None) or None
    return tuple(0 if kind in _WITHOUT_KEYS else window if "sliding" in kind else None for kind in kinds)


def _first(config: Any, *names: str) -> int | None:
    """The first of some sizes that a configuration has; the largest where each layer has its own."""
    found = (getattr(config, name, None) for name in names)
    return next((int(max(value) if isinstance(value, list | tuple) else value) for value in found if value), None)
