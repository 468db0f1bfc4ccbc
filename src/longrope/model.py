"""A loaded model: factors on and off, logits by chunk. With patch.py and checkpoint.py it alone knows transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrope.baselines import baseline
from longrope.checkpoint import (
    AUTOCAST,
    PRECISIONS,
    LoadOptions,
    as_model,
    load_config,
    load_tokenizer,
    load_weights,
    model_source,
    read_rope,
)
from longrope.configs import RopeConfig
from longrope.errors import UserError
from longrope.factors import FactorTable, RopeFactors, last_row, unscaled
from longrope.modes import torch_as_imported
from longrope.patch import Patch, check_frequencies, global_layers_turn, widen_window
from longrope.vocabulary import guard_vocabulary

logger = logging.getLogger(__name__)

NO_TARGET = -100
"""In place of a token whose loss does not count, as torch's cross-entropy has it."""
# What a configuration says of where and by what it was read; a run resumes after a move or an upgrade.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "_attn_implementation_internal")
_TURN = 3.0  # further than what a checkpoint rotates by itself
_LOADING = threading.Lock()  # transformers switches the initialisation of weights off and on for all threads
# Logits of one chunk stay near this many numbers. On a CPU few, which stay in its cache and are not paged in anew for
# every chunk (measured: a quarter of an evaluation's time at a vocabulary of 32,000); elsewhere 256 MiB in float32.
_CHUNK_LOGITS = {"cpu": 2**22}
_CHUNK_LOGITS_ELSEWHERE = 2**26
# Fewer rows would wait for the output projection's weights to be read rather than compute.
_LEAST_CHUNK = 128


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
    batch_tokens: int = 8192
    """Tokens of short windows that are run together; evaluation halves it when memory runs out."""
    by_chunks: bool = False
    """Whether long windows are run by chunks, because one did not fit whole."""
    under: RopeFactors | None = None
    """What extensions multiply, where that is not what `trained` finds; see `fine_tuned`."""
    checkpoint_from: int | None = None
    """Windows from so many tokens on are differentiated with activation checkpointing; measured at the first one."""
    memory_share: float = 1.0
    """Share of the free memory that is for this model, where several processes use the same."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return cast(torch.device, self.model.get_input_embeddings().weight.device)

    def patch(self) -> Patch:
        """A handle that puts factors on this model; nothing changes until its `install`."""
        return Patch(self.model, self.rope.shape, precision=PRECISIONS[self.options.rope_precision])

    @property
    def meaning(self) -> FactorTable:
        """What the checkpoint means by itself: the factors.json beside its weights, else its configuration."""
        return self.table or self.own

    @property
    def trained(self) -> RopeFactors:
        """What an extension multiplies: factors that the weights were trained with, up to the length of training.

        All 1 and the original length for an unscaled RoPE. They differ from 1 in a second interpolation, and where a
        scaled configuration names no length before scaling (a linear one, mostly): its original length is the scaled.
        YaRN and Llama 3's scaling stretch from the length they call original, also where that is all the configuration
        says, as on Qwen2.5's card.
        """
        if self.under is not None:
            return self.under
        named = self.table is not None or self.rope.original_length < self.rope.max_length
        if named or self.rope.scaling in ("default", "yarn", "llama3"):
            return unscaled(self.rope.shape.pairs, self.rope.original_length)
        own = last_row(self.own, self.rope.original_length)
        return own.with_values(up_to=self.rope.original_length, attention_factor=1.0, start_tokens=0)

    def fine_tuned(self) -> LoadedModel:
        """The same model for a second interpolation: extensions multiply its own longest row, and begin there.

        Raises UserError for a checkpoint that is not extended.
        """
        last = self.meaning.rows[-1]
        if last.up_to <= self.rope.original_length or set(last.rescale) == {1.0}:
            got, rule = f"{self.name}, which is not extended", "a second interpolation is on top of a first"
            do = "give a checkpoint that was fine-tuned with factors, or leave out --stage"
            raise UserError("model", got=got, rule=rule, do=do)
        return replace(self, under=last)

    def baseline(self, method: str, target: int, length: int | None = None) -> RopeFactors:
        """`baselines.baseline` for this model, on top of what its weights were trained with."""
        return self.multiplier(method, target, length).over(self.trained)

    def multiplier(self, method: str, target: int, length: int | None = None) -> RopeFactors:
        """What a baseline multiplies `trained` by.

        In a second interpolation the ratio is that to the length of training; bands of pairs are those of the original
        RoPE (as in the authors' start of that search), since slow pairs turn there as they did in the original window.
        """
        trained, shape = self.trained, self.rope.shape
        scale = trained.up_to / shape.original_length
        at = None if length is None else round(length / scale)
        return baseline(method, shape, round(target / scale), at, trained.up_to).with_values(up_to=target)

    def check(self, factors: FactorTable | RopeFactors) -> None:
        """Raise UserError unless the factors are for this model."""
        if isinstance(factors, FactorTable):
            rope = self.rope
            factors.check_model(
                rope_theta=rope.rope_theta, rotary_dim=rope.rotary_dim, original_length=rope.original_length
            )

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 autocast for float32 weights under `--dtype autocast`, else nothing."""
        if self.options.dtype == AUTOCAST:
            return cast(AbstractContextManager[None], torch.autocast(self.device.type, dtype=torch.bfloat16))
        return nullcontext()

    def looking(self) -> AbstractContextManager[None]:
        """For passes that look at how a class works: in float32 where weights are, unless attention's kernels are not.

        Of flash attention there are kernels for half precision alone.
        """
        return self.autocast() if "flash" in self.options.attention else nullcontext()

    def widen_window(self, target: int) -> None:
        """Widen a sliding window that every layer has to `target` tokens, and note it; local layers stay."""
        note, _ = widen_window(self.model, target)
        if note:
            self.notes.append(note)

    def logits(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Logits (B, t, V) of ids (B, T) in chunks, each with the position of its first token.

        The decoder runs once over all T tokens and keeps no cache; only the model's own tail, from the last hidden
        state to logits, runs by chunk, so that the logits of a whole window are never in memory.
        """
        outputs = self.decoder(input_ids=ids, use_cache=False)
        for start, _, logits in self.tail(outputs, ids):
            yield start, logits

    @property
    def decoder(self) -> Any:
        """The model from token ids to the last hidden state."""
        return decoder_of(self.model)

    def tail(self, outputs: Any, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(position of the first token, hidden states (B, t, D), their logits (B, t, V)) chunk by chunk.

        outputs: what the decoder gave for ids (B, T); it is changed. With gradients enabled, each chunk's hidden states
        are a leaf that asks for its own, so that a loss can be differentiated before the next chunk's logits are made.
        """
        whole: Any = self.model
        hidden: Tensor = outputs.last_hidden_state.detach()
        size = chunk_rows(self.model.config.get_text_config().vocab_size, hidden.device.type) // ids.shape[0] or 1
        with answering(self.decoder, outputs), cast_once(whole.get_output_embeddings()):
            for start in range(0, ids.shape[1], size):
                piece = own_rows(hidden, start, start + size)
                if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                    piece = piece.detach().requires_grad_()
                outputs.last_hidden_state = piece
                yield start, piece, whole(input_ids=ids[:, start : start + size], use_cache=False).logits


def own_rows(hidden: Tensor, start: int, end: int) -> Tensor:
    """Hidden states (B, t, D) of some tokens of (B, T, D), as a tensor of their own.

    Of one window a slice has the stride of the whole in its first dimension, and torch then multiplies it as a batch,
    for which it copies the output projection, transposed, at every chunk: many times the product itself on a CPU.
    """
    return hidden[:, start:end].clone(memory_format=torch.contiguous_format)


def decoder_of(model: Any) -> Any:
    """A causal language model from token ids to the last hidden state."""
    decoder = model.get_decoder()
    # Llama 4 names a place that its decoder has in the multimodal model only, and ModernBERT's output projection is
    # called decoder
    return model.model if decoder is model or decoder is model.get_output_embeddings() else decoder


def answering(decoder: nn.Module, outputs: Any) -> AbstractContextManager[None]:
    """Let a decoder answer with outputs that are there, so that the rest of the class's own forward runs alone."""
    return with_forward(decoder, lambda *args, **kwargs: outputs)


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward pass for a while."""
    own = vars(module).get("forward")  # accelerate puts one beside that of the class
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def chunk_rows(vocabulary: int, device: str) -> int:
    """Tokens whose logits are computed together."""
    return max(_LEAST_CHUNK, _CHUNK_LOGITS.get(device, _CHUNK_LOGITS_ELSEWHERE) // vocabulary)


@contextmanager
def cast_once(head: nn.Module | None) -> Iterator[None]:
    """Give the output projection a weight of autocast's dtype for a while: it would be cast anew for every chunk."""
    weight = None if head is None else head._parameters.get("weight")
    kind = "meta" if weight is None else weight.device.type  # meta: offloaded, fetched at each call
    if head is None or weight is None or kind == "meta" or not torch.is_autocast_enabled(kind):
        yield
        return
    half = weight.detach().to(torch.get_autocast_dtype(kind))
    head._parameters["weight"] = nn.Parameter(half, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        head._parameters["weight"] = weight


def load_model(name: str | Path, options: LoadOptions | None = None) -> LoadedModel:
    """Load MODEL: a folder, a Hub id, or `tiny`. Raises UserError for what cannot be loaded or extended."""
    options = (options or LoadOptions()).resolved()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with _LOADING, torch_as_imported():
        return _load(as_model(name), options)


def _load(name: str, options: LoadOptions) -> LoadedModel:
    source = model_source(name)
    config = load_config(name, source, options)
    rope, own, table = read_rope(name, source, config, options)
    model, notes = load_weights(name, source, config, options)
    check_frequencies(model, rope.rope_theta, own.rows[0])
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    if told := guard_vocabulary(name, model, tokenizer):
        notes.append(told)
    loaded = LoadedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        rope=rope,
        own=own,
        table=table,
        fingerprint=_fingerprint(model, options, table, Path(source)),
        options=options,
        notes=notes,
    )
    if table:
        loaded.check(table)
    with loaded.looking():
        check_answers(loaded)  # refuses now, not after minutes, a class that cannot be extended
    return loaded


def as_loaded(model: str | Path | LoadedModel, options: LoadOptions | None = None) -> LoadedModel:
    """A model that is loaded already as it is, whatever the options, and any other MODEL loaded with them."""
    if not isinstance(model, LoadedModel):
        return load_model(model, options)
    if model.options.threads is not None:
        torch.set_num_threads(model.options.threads)
    return model


def _fingerprint(model: PreTrainedModel, options: LoadOptions, table: FactorTable | None, folder: Path) -> str:
    """Hash of the configuration, the table beside it, a sample of every weight, and of what else changes results.

    Of a folder that brings its own code, which was let run, its files of code are among that.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"{options.dtype} {options.rope_precision} {transformers.__version__.split('.')[0]}".encode())
    digest.update((options.quantize or "").encode())
    digest.update("".join(row.key for row in table.rows).encode() if table else b"")
    for path in sorted(folder.glob("*.py")) if options.trust_remote_code else ():
        digest.update(path.name.encode() + path.read_bytes())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(name.encode() + bytes(sample.contiguous().view(torch.uint8).numpy().tobytes()))
    return f"sha256:{digest.hexdigest()}"


@torch.no_grad()
def check_answers(loaded: LoadedModel) -> None:
    """Raise UserError unless logits by chunk are the model's own, and factors change them, on a few tokens."""
    ids = torch.arange(1, 8, device=loaded.device)[None] % loaded.model.config.get_text_config().vocab_size
    whole = loaded.model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(whole).all()):
        got, rule = f"{loaded.name}, whose weights give values that are not numbers", "logits are finite"
        raise UserError("model", got=got, rule=rule, do="try --dtype float32, or restore the weights")
    try:
        [(_, chunk)] = loaded.logits(ids)
    except (AttributeError, TypeError, ValueError) as error:
        chunk = torch.full_like(whole, torch.nan)
        logger.debug("logits by chunk: %s", error)
    if not torch.allclose(chunk, whole, rtol=1e-3, atol=1e-3):
        name, why = type(loaded.model).__name__, "whose logits cannot be computed by chunk"
        raise _unusable(name, why, "they follow from the last hidden state")
    with loaded.patch() as patch:
        check_turns(loaded.model, loaded.decoder, patch, loaded.own.rows[0], ids)


@torch.no_grad()
def check_turns(model: Any, decoder: nn.Module, patch: Patch, own: RopeFactors, ids: Tensor) -> None:
    """Raise UserError unless factors on a model change what it makes of ids (1, T), in layers that see the whole text.

    own: what it rotates by without any.
    """
    factors = RopeFactors(up_to=ids.shape[1] + 1, rescale=tuple(_TURN * value for value in own.rescale))

    def run(row: RopeFactors | None) -> Tensor:
        patch.install(row)
        return cast(Tensor, model(input_ids=ids, use_cache=False).logits)

    try:
        if torch.equal(run(factors), run(None)):
            raise without_rope(type(model).__name__)
        text = model.config.get_text_config()
        if not global_layers_turn(text, decoder, lambda: run(None), lambda: run(factors)):
            raise local_alone(type(model).__name__)
    finally:
        patch.install(None)


def without_rope(name: str) -> UserError:
    """What is said of a class that does not rotate by the RoPE it has."""
    return _unusable(name, "which does not use its RoPE", "only a model with RoPE can be extended")


def local_alone(name: str) -> UserError:
    """What is said of a class whose layers that see the whole text do not rotate."""
    return _unusable(name, "whose local layers alone use RoPE", "factors extend layers that see the whole text")


def _unusable(name: str, why: str, rule: str) -> UserError:
    do = "choose another model; this class cannot be extended"
    return UserError("model", got=f"{name}, {why}", rule=rule, do=do)
