"""Load a checkpoint; with patch.py the only place that knows transformers' internals."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longrope.convert import RopeConfig, rope_config, table_from_config
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.patch import Patch, check_frequencies

logger = logging.getLogger(__name__)

TINY = "tiny"
FACTORS_FILE = "factors.json"
# Logits of one chunk stay near this many numbers, whatever the vocabulary: 128 MiB in float32.
_CHUNK_LOGITS = 2**25
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded and run."""

    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:N, mps; balanced or sequential spread it over all GPUs."""
    dtype: str = "auto"
    """auto (CPU: float32 weights under bf16 autocast; CUDA: bfloat16), float32, bfloat16 or float16."""
    attention: str = "sdpa"
    """transformers' attn_implementation: sdpa, eager, flash_attention_2, flex_attention."""
    original_length: int | None = None
    """Trained length in tokens, where the checkpoint does not say it right."""
    trust_remote_code: bool = False
    rope_precision: str = "float32"
    """dtype of angles: float32 as in every engine, or float64."""

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, ("auto", *_DTYPES))
        _one_of("--rope-precision", self.rope_precision, tuple(_PRECISIONS))

    @property
    def placement(self) -> str:
        """The device, `auto` resolved."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class LoadedModel:
    """A causal language model with RoPE, its tokenizer, and what is known of its RoPE.

    own: the checkpoint's own scaling as a table (factors of 1 where it is not scaled).
    table: the factors.json beside the weights, if any: then it is what the checkpoint means by itself.
    fingerprint: changes with the configuration, the weights and the dtype; equal runs need equal ones.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rope: RopeConfig
    own: FactorTable
    table: FactorTable | None
    fingerprint: str
    options: LoadOptions
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return cast(torch.device, self.model.get_input_embeddings().weight.device)

    def patch(self) -> Patch:
        """A handle that puts factors on this model; nothing changes until its `install`."""
        return Patch(self.model, self.rope.shape, precision=_PRECISIONS[self.options.rope_precision])

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 autocast for float32 weights on CPU under `--dtype auto`, else nothing."""
        if self.options.dtype == "auto" and self.device.type == "cpu":
            return cast(AbstractContextManager[None], torch.autocast("cpu", dtype=torch.bfloat16))
        return nullcontext()

    def widen_window(self, target: int) -> None:
        """Widen a sliding window that every layer has to `target` tokens, and note it; local layers stay."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window is None or window >= target:
            return
        if "full_attention" in (getattr(config, "layer_types", None) or ()):
            self.notes.append(f"local layers keep their sliding window of {window} tokens")
            return
        for holder in (config, *self.model.modules()):
            if getattr(holder, "sliding_window", None) == window:
                setattr(holder, "sliding_window", target)  # noqa: B010  (an attribute that only some classes declare)
        self.notes.append(f"sliding window widened from {window} to {target} tokens")

    def logits(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits (B, t, V) of ids (B, T) in chunks, each with the position of its first token.

        The decoder runs once over all T tokens and keeps no cache; only the model's own tail, from the last hidden
        state to logits, runs by chunk, so that the logits of a whole window are never in memory.
        """
        decoder = cast(nn.Module, getattr(self.model, self.model.base_model_prefix))
        outputs = decoder(input_ids=ids, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        size = max(1, _CHUNK_LOGITS // (self.model.config.get_text_config().vocab_size * ids.shape[0]))
        tail = _Tail(outputs)
        setattr(self.model, self.model.base_model_prefix, tail)
        try:
            for start in range(0, ids.shape[1], size):
                tail.hidden = hidden[:, start : start + size]
                yield start, self.model(input_ids=ids[:, start : start + size], use_cache=False).logits
        finally:
            setattr(self.model, self.model.base_model_prefix, decoder)


class _Tail(nn.Module):
    """Answers for the decoder with hidden states that are there, so that the class's own forward does the rest."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs
        self.hidden: Tensor = outputs.last_hidden_state

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.last_hidden_state = self.hidden
        return self.outputs


def load_model(name: str, options: LoadOptions | None = None) -> LoadedModel:
    """Load MODEL: a folder, a Hub id, or `tiny`. Raises UserError for what cannot be loaded or extended."""
    options = options or LoadOptions()
    source = model_source(name)
    config = _load_config(name, source, options)
    table = beside_weights(source)
    original = options.original_length or (table.original_length if table else None)
    described = config.get_text_config().to_dict()
    rope = rope_config(described, original_length=original)
    own = table_from_config(described, original_length=original)
    model = _load_weights(name, source, config, options)
    check_frequencies(model, rope.rope_theta, own.rows[0])
    if table:
        table.check_model(rope_theta=rope.rope_theta, rotary_dim=rope.rotary_dim, original_length=rope.original_length)
    loaded = LoadedModel(
        name=name,
        model=model,
        tokenizer=_load_tokenizer(name, source, options),
        rope=rope,
        own=own,
        table=table,
        fingerprint=_fingerprint(model, options),
        options=options,
    )
    loaded.patch().undo()  # refuses now, not after minutes, a class that cannot be extended
    _check_tail(loaded)
    return loaded


def model_source(name: str) -> str:
    """What transformers loads for a MODEL: the folder of `tiny`, or the name itself."""
    return str(files("longrope") / "assets" / TINY) if name == TINY else name


def beside_weights(source: str) -> FactorTable | None:
    """The factor table of a checkpoint of ours: factors.json beside its config.json."""
    path = Path(source) / FACTORS_FILE
    return FactorTable.load(path) if path.is_file() else None


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(flag, got=repr(value), rule=f"it is one of {', '.join(allowed)}", do="choose one of them")


def _load_config(name: str, source: str, options: LoadOptions) -> Any:
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        rule = "a model folder has a config.json"
        raise UserError("model", got=f"folder {name} without one", rule=rule, do="give the folder of a checkpoint")
    if folder.is_file():
        raise UserError("model", got=f"file {name}", rule="a model is a folder or a Hub id", do="give its folder")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError, ... for a bad config
        raise _unloadable(name, error, folder.is_dir()) from None
    classes = getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    remote = options.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not remote and not set(classes) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            "model",
            got=f"{name}, a {classes[0] or config.model_type}",
            rule="only causal language models of transformers can be extended",
            do="give a ...ForCausalLM checkpoint",
        )
    return config


def _unloadable(name: str, error: Exception, is_folder: bool) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        do = "give --trust-remote-code if you trust its author"
    elif is_folder:
        do = "restore the checkpoint's files"
    else:
        do = "check the name, or give the folder of a downloaded checkpoint"
    rule = "it is a transformers checkpoint in a folder or on the Hub"
    return UserError("model", got=f"{name} ({type(error).__name__}: {reason[:200]})", rule=rule, do=do)


def _load_weights(name: str, source: str, config: Any, options: LoadOptions) -> PreTrainedModel:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise UserError(
            "model",
            got=f"{name} with {found[0]}",
            rule="weights are read from safetensors only",
            do="restore the .safetensors files, or convert the checkpoint with save_pretrained",
        )
    placement = options.placement
    on_cuda = placement != "cpu" and torch.cuda.is_available()
    auto = torch.bfloat16 if on_cuda else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=_DTYPES.get(options.dtype, auto),
            attn_implementation=options.attention,
            device_map=placement if placement in _PLACEMENTS else {"": placement},
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, transformers, accelerate and torch each raise their own for bad files
        raise _unloadable(name, error, folder.is_dir()) from None
    model, info = loaded
    if lost := sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(
            "model",
            got=f"{name} without weights for {len(lost)} tensors, the first {lost[0]}",
            rule="every weight is in the checkpoint",
            do="restore the missing .safetensors files",
        )
    return cast(PreTrainedModel, model.eval().requires_grad_(False))


def _load_tokenizer(name: str, source: str, options: LoadOptions) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # as for the configuration
        raise _unloadable(f"{name}'s tokenizer", error, Path(source).is_dir()) from None
    return cast(PreTrainedTokenizerBase, tokenizer)


def _fingerprint(model: PreTrainedModel, options: LoadOptions) -> str:
    """Hash of the configuration, of a sample of every weight, and of what else changes results."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    digest.update(f"{options.dtype} {options.rope_precision} {transformers.__version__.split('.')[0]}".encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + bytes(sample.contiguous().view(torch.uint8).numpy().tobytes()))
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def _check_tail(loaded: LoadedModel) -> None:
    """Raise UserError unless logits by chunk are the model's logits, bit for bit on a few tokens."""
    ids = torch.arange(1, 8, device=loaded.device)[None] % loaded.model.config.get_text_config().vocab_size
    whole = loaded.model(input_ids=ids, use_cache=False).logits
    try:
        [(_, chunk)] = loaded.logits(ids)
    except (AttributeError, TypeError, ValueError) as error:
        chunk = torch.full_like(whole, torch.nan)
        logger.debug("logits by chunk: %s", error)
    if not torch.allclose(chunk, whole, rtol=1e-3, atol=1e-3):
        raise UserError(
            "model",
            got=f"{type(loaded.model).__name__}, whose logits cannot be computed by chunk",
            rule="the class computes logits from its decoder's last hidden state",
            do="this class cannot be extended; please report it",
        )


def own_row(loaded: LoadedModel, length: int) -> RopeFactors | None:
    """The factors that the checkpoint itself means at a length: its factors.json, else its configuration.

    None where it means none: an unscaled checkpoint, or a length beyond its table.
    """
    table = loaded.table or (loaded.own if loaded.rope.scaling != "default" else None)
    return table.row_for(length) if table and length <= table.rows[-1].up_to else None
