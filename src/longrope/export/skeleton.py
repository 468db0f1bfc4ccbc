"""A model of a checkpoint's class and RoPE with next to no weights, which is all that an export looks at."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from longrope.checkpoint import LoadOptions, load_config, load_tokenizer, model_source, read_rope
from longrope.guard import check_files
from longrope.model import LoadedModel, check_answers, load_model
from longrope.patch import check_frequencies

logger = logging.getLogger(__name__)

_VOCABULARY, _WIDTH, _HEADS = 64, 32, 2


def skeleton(name: str, options: LoadOptions) -> LoadedModel:
    """A MODEL as `load_model` gives it, but with a few small random layers in place of its own.

    Its class, head size, rotation and kinds of layers are those of the checkpoint, whose own configuration it carries.
    Where a class does not build like that, the checkpoint itself is loaded. Raises UserError as `load_model` does, but
    for missing weights.
    """
    source = model_source(name)
    config = load_config(name, source, options)
    family = config.get_text_config().model_type
    rope, own, table = read_rope(name, source, config, options)
    check_files(name, source)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            build: Any = AutoModelForCausalLM
            model = build.from_config(small(config), trust_remote_code=options.trust_remote_code).float().eval()
    except Exception as error:  # a class may check anything against anything
        logger.debug("no small %s: %s", family, error)
        return load_model(name, options)
    model.requires_grad_(False)
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    loaded = LoadedModel(name, model, tokenizer, rope, own, table, "skeleton", options.resolved())
    try:
        check_frequencies(model, rope.rope_theta, own.rows[0])
        if table:
            loaded.check(table)
        check_answers(loaded)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        logger.debug("a small %s does not run: %s", family, error)
        return load_model(name, options)
    model.config = config  # what is written is made of the checkpoint's own
    return loaded


def small(config: Any) -> Any:
    """A configuration of the same class and RoPE with few, narrow layers, each kind of layer among them."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    layers = text.num_hidden_layers
    kept = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]) if layers > 1 else 1
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:kept])
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {"num_hidden_layers": kept, "vocab_size": _VOCABULARY, "hidden_size": _HEADS * head}
    sizes |= {"num_attention_heads": _HEADS, "num_key_value_heads": 1, "intermediate_size": _WIDTH, "head_dim": head}
    sizes |= {"num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": _WIDTH, "num_experts_per_tok": 1}
    for name, value in sizes.items():
        if hasattr(text, name) and getattr(text, name) is not None:
            setattr(text, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    if getattr(text, "head_dim", 0) is None:
        text.head_dim = head
    vars(config).pop("quantization_config", None)
    return config
