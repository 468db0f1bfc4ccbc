"""Text from a model with factors: what `longrope generate` and `longrope chat` write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer, TextStreamer

from longrope.errors import UserError, first_line
from longrope.model import LoadedModel
from longrope.runtime.applied import Applied
from longrope.runtime.caches import CACHE, RoomyCache, by_place, cache_of, makes_its_own
from longrope.windows import bos_of, token_ids

_CACHES = ("device", "offloaded", "quantized")
# New tokens where nothing is asked for
_DEFAULT_NEW = 256


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely at temperature 0, else drawn; seed fixes what is drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _within("--temperature", self.temperature, 0, 100)
        _within("--top-p", self.top_p, 1e-6, 1)
        if self.beams > 1 and self.temperature > 0:
            rule = "beams are of the most likely texts"
            raise UserError("--beams", got=f"{self.beams} with a temperature", rule=rule, do="leave out one of them")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            flag, value = ("--top-p", self.top_p) if self.top_p < 1 else ("--top-k", self.top_k)
            got, rule = f"{value} at temperature 0", "that takes the most likely token, and draws none"
            raise UserError(flag, got=got, rule=rule, do="give a --temperature above 0, or leave it out")

    def settings(self) -> dict[str, Any]:
        """As transformers' generation settings have them."""
        if not self.temperature:
            return {"do_sample": False, "num_beams": self.beams}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k or None}
        return {"do_sample": True, **drawn}


def _within(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(flag, got=value, rule=f"it is from {low:g} to {high:g}", do="choose a value between")


@dataclass(frozen=True)
class Made:
    """A text that was generated.

    prompt: its tokens. tokens: the new ones. recomputed: tokens that switches ran again. first: seconds until the
    first new token, which is the time of the prompt; seconds: of all.
    """

    text: str
    prompt: int
    tokens: list[int]
    recomputed: int
    first: float
    seconds: float
    cache: Any = field(repr=False, default=None)

    def told(self) -> dict[str, Any]:
        """As a document."""
        kept = ("text", "prompt", "tokens", "recomputed")
        rounded = {"first": round(self.first, 3), "seconds": round(self.seconds, 3)}
        return {name: getattr(self, name) for name in kept} | rounded


class _Clock(BaseStreamer):
    """Notes when the first token comes; passes everything on."""

    def __init__(self, onward: BaseStreamer | None) -> None:
        self.onward, self.begun = onward, time.perf_counter()
        self.first: float | None = None
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if not self.prompt and self.first is None:
            self.first = time.perf_counter() - self.begun
        self.prompt = False
        if self.onward is not None:
            self.onward.put(value)  # type: ignore[no-untyped-call]

    def end(self) -> None:
        if self.onward is not None:
            self.onward.end()  # type: ignore[no-untyped-call]


class Writer(TextStreamer):
    """Gives a text to `write` as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take in what can no longer change."""
        self.write(text)


def ends_of_text(loaded: LoadedModel) -> list[int]:
    """Tokens that end a text: those of the checkpoint's generation settings, and the tokenizer's."""
    model: Any = loaded.model
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (*named, loaded.tokenizer.eos_token_id) if type(token) is int})


def check_text(text: str) -> None:
    """Raise UserError for what was read from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("prompt", got="bytes that are no text", rule="a prompt is UTF-8", do="convert it") from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with BOS where the tokenizer has one, as windows have it. Raises UserError for none."""
    check_text(text)
    ids = bos_of(tokenizer) + token_ids(tokenizer, text)
    if not ids:
        raise UserError("prompt", got="an empty text", rule="a text goes on from something", do="write something")
    return ids


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, instead: str = "use generate"
) -> list[int]:
    """Token ids of a conversation up to where the assistant begins. Raises UserError where there is no template.

    instead: what the user can do without one.
    """
    if tokenizer.chat_template is None:
        rule = "a conversation needs the tokenizer's chat template"
        raise UserError("model", got="a tokenizer without one", rule=rule, do=f"{instead}, or give an instruct model")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and it comes with the model
        rule = "it writes these turns"
        raise UserError("chat template", got=first_line(error), rule=rule, do=instead) from None
    return token_ids(tokenizer, str(text))


def write_text(
    loaded: LoadedModel,
    applied: Applied,
    ids: Sequence[int],
    *,
    new: int | None = None,
    sampling: Sampling | None = None,
    cache: str = "device",
    earlier: Any = None,
    write: Callable[[str], None] | None = None,
) -> Made:
    """Let a model with factors go on from token ids.

    new: the most new tokens; by default 256, or as many as the table has room for. cache: where keys and values lie,
    device, offloaded or quantized. earlier: the cache of a text that these ids go on from. write: takes the text as it
    comes. Raises UserError for what does not fit into the table or the memory.
    """
    sampling, model = sampling or Sampling(), loaded.model
    end = applied.reach
    if new is None:
        new = max(1, min(_DEFAULT_NEW, end - len(ids)))
    ends = ends_of_text(loaded)
    own: Any = model
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **sampling.settings()
    )
    given = torch.tensor([list(ids)], device=loaded.device)
    more = _cache(cache, loaded)
    if earlier is not None:
        more = {CACHE: earlier}
    elif cache == "device" and sampling.beams == 1 and not makes_its_own(model):
        more = {CACHE: RoomyCache(model.config.get_text_config(), len(ids) + new)}
    clock = _Clock(Writer(loaded.tokenizer, write) if write is not None else None) if sampling.beams == 1 else None
    before, begun = applied.recomputed, time.perf_counter()
    own_settings, own.generation_config = own.generation_config, settings  # what is not given here has defaults
    try:
        # Sampling draws from torch's own generator: what it draws is the seed's, and others find it as it was.
        with torch.random.fork_rng(), torch.inference_mode(), loaded.autocast():
            torch.manual_seed(sampling.seed)
            made = own.generate(
                given,
                attention_mask=torch.ones_like(given),
                streamer=clock,
                return_dict_in_generate=True,
                **more,
            )
    finally:
        own.generation_config = own_settings
    seconds = time.perf_counter() - begun
    tokens = made.sequences[0, len(ids) :].tolist()
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    first = clock.first if clock is not None and clock.first is not None else seconds
    if clock is None and write is not None:
        write(str(text))
    recomputed = applied.recomputed - before
    return Made(str(text), len(ids), tokens, recomputed, first, seconds, cache_of(made))


def _cache(kind: str, loaded: LoadedModel) -> dict[str, Any]:
    if kind not in _CACHES:
        raise UserError("--cache", got=repr(kind), rule=f"it is one of {', '.join(_CACHES)}", do="choose one of them")
    if kind != "device" and makes_its_own(loaded.model):
        got, rule = repr(kind), f"{type(loaded.model).__name__} has a cache of its own kind"
        raise UserError("--cache", got=got, rule=rule, do="leave it out")
    if kind == "offloaded" and loaded.device.type == "cpu":
        rule = "on a CPU the cache is in host memory anyway"
        raise UserError("--cache", got=repr(kind), rule=rule, do="leave it out, or use quantized")
    if kind == "quantized":  # in 8 bits of transformers' own, which need no other package
        return {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    return {"cache_implementation": "offloaded"} if kind == "offloaded" else {}


class Conversation:
    """A chat, turn by turn; the cache of the turns before goes on where the template writes them as before."""

    def __init__(self, loaded: LoadedModel, applied: Applied, system: str | None = None, **how: Any) -> None:
        self.loaded, self.applied, self.how = loaded, applied, how
        self.messages = [{"role": "system", "content": system}] if system else []
        self._system = list(self.messages)
        self._ids: list[int] = []
        self._cache: Any = None

    def say(self, text: str, write: Callable[[str], None] | None = None) -> Made:
        """The answer to a turn. A turn that is refused is not part of the conversation."""
        check_text(text)
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = chat_ids(self.loaded.tokenizer, turns)
        made = write_text(self.loaded, self.applied, ids, earlier=self._reusable(ids), write=write, **self.how)
        self.messages = [*turns, {"role": "assistant", "content": made.text}]
        self._ids, self._cache = [*ids, *made.tokens], made.cache
        return made

    def reset(self) -> None:
        """Begin anew."""
        self.messages, self._ids, self._cache = list(self._system), [], None

    def _reusable(self, ids: list[int]) -> Any:
        """The cache cut to what a new text has in common with the last; None where nothing can be kept."""
        cache, self._cache = self._cache, None
        if cache is None or any(cache.is_sliding) or not by_place(cache):
            return None
        kept = min(cache.get_seq_length(), len(ids) - 1)
        same = next((at for at in range(kept) if ids[at] != self._ids[at]), kept)
        if not same:
            return None
        cache.crop(same - cache.get_seq_length())
        return cache
