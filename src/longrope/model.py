"""Load a checkpoint; with patch.py the only place that knows transformers' internals."""

from __future__ import annotations

import hashlib
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import constants, get_session
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longrope.convert import RopeConfig, rope_config, table_from_config
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors
from longrope.patch import CHOOSE_ROPE, Patch, check_frequencies

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
    attention: str = "auto"
    """transformers' attn_implementation: sdpa, eager, flash_attention_2, ...; auto is sdpa where the class has it."""
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

    def check(self, factors: FactorTable | RopeFactors) -> None:
        """Raise UserError unless the factors are for this model."""
        if isinstance(factors, FactorTable):
            rope = self.rope
            factors.check_model(
                rope_theta=rope.rope_theta, rotary_dim=rope.rotary_dim, original_length=rope.original_length
            )

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
        if has_local_layers(config):
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
        whole: Any = self.model
        decoder = whole.get_decoder()
        if decoder is whole:  # Llama 4 names a place that its decoder has in the multimodal model only
            decoder = whole.model
        outputs = decoder(input_ids=ids, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        size = max(1, _CHUNK_LOGITS // (self.model.config.get_text_config().vocab_size * ids.shape[0]))
        with _answering(decoder, outputs):
            for start in range(0, ids.shape[1], size):
                outputs.last_hidden_state = hidden[:, start : start + size]
                yield start, whole(input_ids=ids[:, start : start + size], use_cache=False).logits


@contextmanager
def _answering(decoder: nn.Module, outputs: Any) -> Iterator[None]:
    """Let a decoder answer with outputs that are there, so that the rest of the class's own forward runs alone."""
    own = vars(decoder).get("forward")  # accelerate puts one beside that of the class
    vars(decoder)["forward"] = lambda *args, **kwargs: outputs
    try:
        yield
    finally:
        del vars(decoder)["forward"]
        if own is not None:
            vars(decoder)["forward"] = own


def load_model(name: str, options: LoadOptions | None = None) -> LoadedModel:
    """Load MODEL: a folder, a Hub id, or `tiny`. Raises UserError for what cannot be loaded or extended."""
    options = options or LoadOptions()
    source = model_source(name)
    config = _load_config(name, source, options)
    table = beside_weights(source)
    original = options.original_length or (table.original_length if table else None)
    described = config.get_text_config().to_dict()
    _check_has_rope(name, described)
    rope = rope_config(described, original_length=original)
    own = table_from_config(described, original_length=original)
    model, notes = _load_weights(name, source, config, options)
    check_frequencies(model, rope.rope_theta, own.rows[0])
    loaded = LoadedModel(
        name=name,
        model=model,
        tokenizer=load_tokenizer(name, trust_remote_code=options.trust_remote_code),
        rope=rope,
        own=own,
        table=table,
        fingerprint=_fingerprint(model, options),
        options=options,
        notes=notes,
    )
    if table:
        loaded.check(table)
    _check_answers(loaded)  # refuses now, not after minutes, a class that cannot be extended
    return loaded


def has_local_layers(config: Any) -> bool:
    """Whether only some layers of a transformers text config have its sliding window: then it is as it should be."""
    return "full_attention" in (getattr(config, "layer_types", None) or ())


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
        rule = "a model folder has one"
        raise UserError("model", got=f"folder {name} without config.json", rule=rule, do="give a checkpoint's folder")
    if folder.is_file():
        raise UserError("model", got=f"file {name}", rule="a model is a folder or a Hub id", do="give its folder")
    if not folder.is_dir() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        rule = f"a model is a folder, a Hub id or {TINY}"
        raise UserError("model", got=f"{name}, which does not exist", rule=rule, do="check the path")
    try:
        config = _from_pretrained(AutoConfig, source, options.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, TypeError, ... for a bad config
        raise _unloadable(name, error, folder.is_dir()) from None
    classes = getattr(config, "architectures", None) or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)]
    classes = [classes] if isinstance(classes, str) else classes
    remote = options.trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not remote and not set(classes) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise UserError(
            "model",
            got=f"{name}, a {classes[0] or config.model_type}",
            rule="only causal language models of transformers can be extended",
            do="give a ...ForCausalLM checkpoint",
        )
    return config


def _from_pretrained(factory: Any, source: str, trust_remote_code: bool, **options: Any) -> Any:
    """What a transformers Auto class makes of a MODEL: of a folder, or of a Hub id, without a network from the cache.

    The Hub is asked once first: transformers repeats every request that fails for half a minute.
    """
    options |= {"trust_remote_code": trust_remote_code, "local_files_only": Path(source).is_dir() or not _hub_answers()}
    return factory.from_pretrained(source, **options)


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, no name service, a proxy that refuses, offline mode: each has its own
        return False
    return True


def _check_has_rope(name: str, described: Mapping[str, Any]) -> None:
    """Raise UserError for a configuration without a RoPE, before the weights are read."""
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


def _check_files(name: str, folder: Path) -> None:
    """Raise UserError for a folder without safetensors, or with one that is not whole."""
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise UserError(
            "model",
            got=f"{name} with {found[0]}",
            rule="weights are read from safetensors only",
            do="restore the .safetensors files, or convert the checkpoint with save_pretrained",
        )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):  # reads the header and compares it with the size of the file
                pass
        except (SafetensorError, OSError) as error:
            rule = "a safetensors file is whole"
            raise UserError("model", got=f"{path} ({error})", rule=rule, do="copy or download it again") from None


def _load_weights(name: str, source: str, config: Any, options: LoadOptions) -> tuple[PreTrainedModel, list[str]]:
    """The model in eval mode, and what is to be said of its weights."""
    folder = Path(source)
    if folder.is_dir():
        _check_files(name, folder)
    placement = options.placement
    on_cuda = placement != "cpu" and torch.cuda.is_available()
    auto = torch.bfloat16 if on_cuda else torch.float32
    try:
        model, info = _from_pretrained(
            AutoModelForCausalLM,
            source,
            options.trust_remote_code,
            config=config,
            dtype=_DTYPES.get(options.dtype, auto),
            attn_implementation=None if options.attention == "auto" else options.attention,
            device_map=placement if placement in _PLACEMENTS else {"": placement},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # safetensors, transformers, accelerate and torch each raise their own for bad files
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
def _check_answers(loaded: LoadedModel) -> None:
    """Raise UserError unless logits by chunk are the model's own, and factors change them, on a few tokens."""
    ids = torch.arange(1, 8, device=loaded.device)[None] % loaded.model.config.get_text_config().vocab_size
    whole = loaded.model(input_ids=ids, use_cache=False).logits
    try:
        [(_, chunk)] = loaded.logits(ids)
    except (AttributeError, TypeError, ValueError) as error:
        chunk = torch.full_like(whole, torch.nan)
        logger.debug("logits by chunk: %s", error)
    if not torch.allclose(chunk, whole, rtol=1e-3, atol=1e-3):
        raise _unusable(loaded, "whose logits cannot be computed by chunk", "they follow from the last hidden state")
    with loaded.patch() as patch:
        patch.install(RopeFactors(up_to=8, rescale=(2.0,) * loaded.rope.shape.pairs))
        if torch.equal(loaded.model(input_ids=ids, use_cache=False).logits, whole):
            raise _unusable(loaded, "which does not use its RoPE", "only a model with RoPE can be extended")


def _unusable(loaded: LoadedModel, why: str, rule: str) -> UserError:
    got, do = f"{type(loaded.model).__name__}, {why}", "choose another model; this class cannot be extended"
    return UserError("model", got=got, rule=rule, do=do)
