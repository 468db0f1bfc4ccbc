"""The files of a checkpoint: how they are found, checked and loaded by transformers, and what is refused."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longrope.configs import RopeConfig, rope_config, table_from_config
from longrope.errors import UserError
from longrope.factors import FACTORS, FactorTable
from longrope.files import read_json
from longrope.guard import check_attention, check_files, check_sizes
from longrope.hardware import half_is_fast_on_cpu
from longrope.hub import hub_answers
from longrope.patch import CHOOSE_ROPE
from longrope.runs import check_no_run

TINY = "tiny"
"""The MODEL that is embedded."""
CONFIG_ENTRY = "longrope_factors"
"""Of a configuration that was saved with a table on its model."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of weights, by the words of --dtype other than auto and autocast."""
AUTOCAST = "autocast"
"""Of --dtype: float32 weights, bfloat16 where products are computed."""
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
"""Of angles, by the words of --rope-precision."""
_QUANTIZATIONS = ("8bit", "4bit")
_PLACEMENTS = ("balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded and run."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N, mps; balanced or sequential spread it over all GPUs."""
    dtype: str = "auto"
    """auto, autocast (float32 weights under bf16 autocast), float32, bfloat16 or float16.

    auto is bfloat16 on CUDA; on a CPU autocast where the processor multiplies bfloat16, else float32.
    """
    attention: str = "auto"
    """transformers' attn_implementation: sdpa, eager, flash_attention_2, ...; auto is sdpa where the class has it."""
    original_length: int | None = None
    """Trained length in tokens, where the checkpoint does not say it right."""
    trust_remote_code: bool = False
    rope_precision: str = "float32"
    """dtype of angles: float32 as in every engine, or float64."""
    own_factors: bool = True
    """Whether the factors.json beside the weights is read; `--factors none` says no."""
    threads: int | None = None
    """CPU threads of an evaluation, torch's choice by default; results are equal for equal threads."""
    quantize: str | None = None
    """8bit or 4bit: weights of linear layers by bitsandbytes, on CUDA, for bases that do not fit otherwise."""

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, ("auto", AUTOCAST, *DTYPES))
        _check_device(self.device)
        _one_of("--rope-precision", self.rope_precision, tuple(PRECISIONS))
        if self.dtype == "float32" and "flash" in self.attention:
            rule, do = "flash attention has kernels for half precision", "give --dtype autocast or bfloat16"
            raise UserError("--attention", got=f"{self.attention!r} in float32", rule=rule, do=do)
        if self.quantize is not None:
            _check_quantize(self.quantize, on_cuda=self.placement != "cpu" and torch.cuda.is_available())
        if self.threads is not None and self.threads < 1:
            raise UserError("--threads", got=self.threads, rule="it is at least 1", do="leave it out, or give a number")

    @property
    def placement(self) -> str:
        """The device, `auto` resolved."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def resolved(self) -> LoadOptions:
        """The same with the dtype that `auto` is on this machine, which results depend on."""
        if self.dtype != "auto":
            return self
        if self.placement != "cpu" and torch.cuda.is_available():
            return replace(self, dtype="bfloat16")
        fast = self.placement == "cpu" and half_is_fast_on_cpu()
        return replace(self, dtype=AUTOCAST if fast else "float32")


def load_options(options: LoadOptions | None, given: Mapping[str, Any]) -> LoadOptions:
    """Options given whole, or field by field as keywords of a public function; TypeError for other keywords."""
    if unknown := sorted(set(given) - {field.name for field in fields(LoadOptions)}):
        raise TypeError(f"unexpected keyword {unknown[0]!r}")
    return replace(options or LoadOptions(), **given)


def taken(kind: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that are among some keywords, which are taken out of them."""
    return {each.name: keywords.pop(each.name) for each in fields(kind) if each.name in keywords}


def as_model(given: str | Path) -> str:
    """A MODEL as text, which runs and cards name it by; a path that reads `tiny` is a folder, never the word."""
    return f"./{TINY}" if isinstance(given, Path) and str(given) == TINY else str(given)


def model_source(name: str) -> str:
    """What transformers loads for a MODEL: the folder of `tiny`, or the name itself."""
    return str(files("longrope") / "assets" / TINY) if name == TINY else name


def _beside_weights(source: str) -> FactorTable | None:
    """The factor table of a checkpoint of ours: factors.json beside its config.json."""
    path = Path(source) / FACTORS
    return FactorTable.load(path) if path.is_file() else None


def in_config(config: Any) -> FactorTable | None:
    """The factor table that a transformers configuration carries. Raises UserError for one that is damaged."""
    entry = getattr(config, CONFIG_ENTRY, None)
    return None if entry is None else FactorTable.from_dict(entry)


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(flag, got=repr(value), rule=f"it is one of {', '.join(allowed)}", do="choose one of them")


def _check_device(device: str) -> None:
    if device == "auto" or device in _PLACEMENTS:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        rule = "it is auto, cpu, cuda, cuda:N, mps, balanced or sequential"
        raise UserError("--device", got=repr(device), rule=rule, do="choose one of them") from None
    if kind == "cuda" and not torch.cuda.is_available():
        rule = "torch sees no CUDA device here"
        raise UserError("--device", got=repr(device), rule=rule, do="use --device cpu, or install torch for CUDA")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        rule = f"there are {torch.cuda.device_count()} of them, counted from 0"
        raise UserError("--device", got=repr(device), rule=rule, do="choose one of them")


def _check_quantize(quantize: str, *, on_cuda: bool) -> None:
    _one_of("--quantize", quantize, _QUANTIZATIONS)
    if not on_cuda:
        rule = "bitsandbytes quantizes on CUDA"
        raise UserError("--quantize", got=f"{quantize} without CUDA", rule=rule, do="leave it out, or use a GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        do = 'install it with: pip install "longrope[quantize]"'
        raise UserError("--quantize", got=f"{quantize} without bitsandbytes", rule="bitsandbytes does it", do=do)


def _quantization(options: LoadOptions, dtype: torch.dtype) -> Any:
    """How transformers is to quantize the weights: 4 bits as in QLoRA (NF4), computing in `dtype`."""
    if options.quantize is None:
        return None
    make: Any = BitsAndBytesConfig
    if options.quantize == "8bit":
        return make(load_in_8bit=True)
    return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_config(name: str, source: str, options: LoadOptions) -> Any:
    """The configuration of a causal language model. Raises UserError when it is missing, broken or of another kind."""
    folder = Path(source)
    check_no_run(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        rule = "a model folder has one"
        raise UserError("model", got=f"folder {name} without config.json", rule=rule, do="give a checkpoint's folder")
    if folder.is_file():
        raise UserError("model", got=f"file {name}", rule="a model is a folder or a Hub id", do="give its folder")
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        rule = f"a model is a folder, a Hub id or {TINY}"
        raise UserError("model", got=f"{name}, which does not exist", rule=rule, do="check the path")
    check_sizes(name, source, _raw_config(source))
    try:
        config = _from_pretrained(AutoConfig, source, options.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError, ... for a bad config
        raise _unloadable(name, error, folder.is_dir()) from None
    if options.attention == "auto":
        check_attention(name, config)
    classes = getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    classes = [each and str(each) for each in (classes if isinstance(classes, list) else [classes])]
    remote = options.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not remote and not set(classes) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            "model",
            got=f"{name}, a {classes[0] or config.model_type}",
            rule="only causal language models of transformers can be extended",
            do="give a ...ForCausalLM checkpoint",
        )
    return config


def _raw_config(source: str) -> Mapping[str, Any]:
    """The parsed config.json of a folder; nothing of what cannot be read, of which transformers says why."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return {}
    try:
        found = read_json(path, "model")
    except UserError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _from_pretrained(factory: Any, source: str, trust_remote_code: bool, **options: Any) -> Any:
    """What a transformers Auto class makes of a MODEL: of a folder, or of a Hub id, without a network from the cache.

    The Hub is asked once first: transformers repeats every request that fails for half a minute.
    """
    options |= {"trust_remote_code": trust_remote_code, "local_files_only": _is_local(source)}
    return factory.from_pretrained(source, **options)


def _is_local(source: str) -> bool:
    return Path(source).is_dir() or not hub_answers()


def read_rope(
    name: str, source: str, config: Any, options: LoadOptions
) -> tuple[RopeConfig, FactorTable, FactorTable | None]:
    """(RoPE, the checkpoint's own scaling as a table, the table that it was saved with), before weights are read.

    source: the folder of its files, where there is one. config: of transformers. Raises UserError for a model without
    a RoPE that can be extended, and for a table that is damaged.
    """
    described = config.get_text_config().to_dict()
    _check_has_rope(name, described)
    table = (_beside_weights(source) or in_config(config)) if options.own_factors else None
    original = options.original_length or (table.original_length if table else None)
    rope = rope_config(described, original_length=original)
    return rope, table_from_config(described, original_length=original), table


def _check_has_rope(name: str, described: Mapping[str, Any]) -> None:
    if not any(described.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base")):
        got = f"{name}, a {described.get('model_type')} model whose configuration has no RoPE"
        raise UserError("model", got=got, rule="only a model with RoPE can be extended", do=CHOOSE_ROPE)


def _unloadable(name: str, error: Exception, is_folder: bool) -> UserError:
    reason = textwrap.shorten(str(error), 240, placeholder=" ...") or "no reason given"
    if "trust_remote_code" in str(error):
        do = "give --trust-remote-code if you trust its author"
    elif is_folder:
        do = "restore the checkpoint's files"
    else:
        do = "check the name, or give the folder of a downloaded checkpoint"
    rule = "it is a transformers checkpoint in a folder or on the Hub"
    return UserError("model", got=f"{name} ({type(error).__name__}: {reason})", rule=rule, do=do)


def load_weights(name: str, source: str, config: Any, options: LoadOptions) -> tuple[PreTrainedModel, list[str]]:
    """The model in eval mode, and what is to be said of its weights."""
    folder = Path(source)
    check_files(name, source)
    placement = options.placement
    dtype = DTYPES.get(options.resolved().dtype, torch.float32)
    quantization = _quantization(options, dtype)
    try:
        model, info = _from_pretrained(
            AutoModelForCausalLM,
            source,
            options.trust_remote_code,
            config=config,
            dtype=dtype,
            attn_implementation=None if options.attention == "auto" else options.attention,
            device_map=placement if placement in _PLACEMENTS else {"": placement},
            use_safetensors=True,
            adapter_kwargs={"local_files_only": _is_local(source)},  # with PEFT installed, an adapter is asked for too
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            **({"quantization_config": quantization} if quantization else {}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "attn_implementation" in str(error) or "attention implementation" in str(error).lower():
            rule = textwrap.shorten(str(error), 240, placeholder=" ...")
            raise UserError("--attention", got=repr(options.attention), rule=rule, do="use --attention auto") from None
        # safetensors, transformers, accelerate and torch each raise their own for bad files
        raise _unloadable(name, error, folder.is_dir()) from None
    lost, other = sorted(info["missing_keys"]), sorted(str(key[0]) for key in info["mismatched_keys"])
    if lost or other:
        state = "without" if lost else "with another shape of"
        raise UserError(
            "model",
            got=f"{name} {state} {len(lost or other)} of its weights, the first {(lost or other)[0]}",
            rule="every weight is in the checkpoint, in the shape that config.json says",
            do="restore the .safetensors files or config.json",
        )
    unused = sorted(info["unexpected_keys"])
    notes = [f"{len(unused)} weights of the checkpoint are not used, the first {unused[0]}"] if unused else []
    return cast(PreTrainedModel, model.eval().requires_grad_(False)), notes


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a MODEL. Raises UserError when it cannot be loaded."""
    source = model_source(name)
    try:
        tokenizer = _from_pretrained(AutoTokenizer, source, trust_remote_code)
    except Exception as error:  # as for the configuration
        raise _unloadable(f"{name}'s tokenizer", error, Path(source).is_dir()) from None
    return cast(PreTrainedTokenizerBase, tokenizer)
