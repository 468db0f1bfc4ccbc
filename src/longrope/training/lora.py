"""LoRA by PEFT: low-rank adapters on every linear layer; embeddings and norms are trained whole where asked."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from longrope.errors import UserError, plural

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSettings:
    """rank: of the adapters, scaled by 2. embeddings, norms: trained whole beside them. merge: into the weights."""

    rank: int
    embeddings: bool = False
    norms: bool = False
    merge: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError("--lora", got=self.rank, rule="a rank is at least 1", do="give one such as 16")


def with_lora(model: Any, settings: LoraSettings, seed: int, *, quantized: bool = False) -> Any:
    """The model with adapters drawn from a seed, equal in all processes; the rest frozen.

    What is trained is in float32: steps of 1e-5 would round to nothing on norms in bfloat16. quantized: of a base of
    few bits, the rest is in float32, too (QLoRA). Raises UserError where PEFT is not installed.
    """
    try:
        peft = import_module("peft")
    except ImportError as error:
        do = 'install it with: pip install "longrope[lora]"'
        raise UserError("--lora", got=f"no PEFT here ({error})", rule="adapters are PEFT's", do=do) from None
    whole = []
    tied = settings.embeddings and model.config.get_text_config().tie_word_embeddings is True
    if settings.embeddings:
        whole.append(_name_of(model, model.get_input_embeddings()))
    if tied:  # PEFT knows embeddings by their names: by either of the two it trains both as one
        whole.append(_name_of(model, model.get_output_embeddings()))
    if settings.norms:
        names = {
            name.rpartition(".")[2] for name, module in model.named_modules() if "norm" in type(module).__name__.lower()
        }
        whole += sorted(names)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules="all-linear",
        exclude_modules=[*_read_by_kernels(model), *_routers(model)] or None,
        modules_to_save=whole or None,
        task_type="CAUSAL_LM",
        # Else the copy that is trained would no longer be the output projection.
        ensure_weight_tying=tied,
    )
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)  # PEFT draws from torch's own generator
        warnings.simplefilter("ignore", FutureWarning)  # of names in transformers that PEFT still uses
        warnings.filterwarnings("ignore", "The following .*_pattern keys did not match")  # which it made itself
        made = peft.get_peft_model(model, config)
    if tied and not made.peft_config["default"].modules_to_tie:
        rule = "embeddings that are also the output projection are trained as one"
        got = f"{type(model).__name__}, whose tied embeddings have names that PEFT does not know"
        raise UserError("--embeddings", got=got, rule=rule, do="leave it out")
    if left := _without_adapters(made):
        logger.info("no adapters on %s, such as %s", plural(len(left), "linear layer"), left[0])
    for weight in made.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # PEFT does so for adapters alone
    return made


def merged(model: Any, adapter: Path) -> Any:
    """The model with adapters merged into its weights: its own ones, or those that were saved where it has none."""
    if not hasattr(model, "merge_and_unload"):
        model = import_module("peft").PeftModel.from_pretrained(model, adapter)
    return model.merge_and_unload()


def _read_by_kernels(model: Any) -> list[str]:
    """Projections that state-space layers hand to their kernels as weights: an adapter on one would do nothing."""
    mixers = [name for name, module in model.named_modules() if hasattr(module, "conv1d")]
    return [f"{name}.out_proj" for name in mixers]


def _routers(model: Any) -> list[str]:
    """Linear layers that return something else than a product (PhiMoE's router), as seen in a pass of two tokens."""
    kinds = {name: each for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    own = {name: each for name, each in kinds.items() if type(each).forward is not torch.nn.Linear.forward}
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            found.append(name)

    hooks = [each.register_forward_hook(lambda *seen, name=name: look(name, seen[-1])) for name, each in own.items()]
    try:
        if own:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _without_adapters(made: Any) -> list[str]:
    """Linear layers that have none: PEFT leaves out dense and shared parts of some mixtures of experts."""
    base = made.get_base_model()
    head = base.get_output_embeddings()
    alone = {name for name, each in base.named_modules() if isinstance(each, torch.nn.Linear) and each is not head}
    inside = (".base_layer", ".default", ".original_module")
    made_by_peft = {name for name in alone if name.endswith(inside) or "lora_" in name or "modules_to_save" in name}
    return sorted(alone - made_by_peft)


def _name_of(model: Any, wanted: Any) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0].rpartition(".")[2]
