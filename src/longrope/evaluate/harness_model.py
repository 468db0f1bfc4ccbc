"""The model that lm-evaluation-harness asks: its own, with every row under the factors that the row's length asks for.

It imports lm_eval, so that only harness.py imports it, and only when it is needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from longrope.errors import UserError
from longrope.evaluate.perplexity import out_of_memory
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel
from longrope.patch import Patch

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_LOGITS = 2**28  # of one batch, near: all of them are in memory, as lm-eval has it
_ROLLING = 1024  # windows handed on together, to be batched by their lengths


class RegimeModel(HFLM):  # type: ignore[misc]  # lm_eval has no types
    """lm-eval's model class for transformers, whose batches hold only rows of the same factors.

    The row of the table is chosen for each request by its own length: the tokens that the model is given to score a
    continuation, or prompt and all tokens that may follow it to write one. table None is the checkpoint as it is.
    batch_size: rows of a batch; None puts rows of like length together, as many as loaded.batch_tokens allows. A batch
    too large for memory is halved. max_length: where prompts are cut, by default where the table, or the checkpoint,
    ends. The model computes as loaded, without autocast, as lm-eval does by itself.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        table: FactorTable | None,
        patch: Patch,
        batch_size: int | None,
        max_length: int | None = None,
    ) -> None:
        self.loaded, self.table, self.patch, self.wanted = loaded, table, patch, batch_size
        longest = max_length or (table.rows[-1].up_to if table else loaded.rope.max_length)
        theirs = logging.getLogger(HFLM.__module__)
        level = theirs.level
        theirs.setLevel(logging.ERROR)  # it warns that the model is loaded already
        try:
            super().__init__(
                pretrained=loaded.model,
                backend="causal",
                tokenizer=_with_padding(loaded),
                max_length=longest,
                batch_size=batch_size or 1,
            )
        finally:
            theirs.setLevel(level)

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm-eval would ask the Hub for a model of this object's name."""
        return {}

    def row(self, length: int) -> RopeFactors | None:
        """The factors of a request of so many tokens; a longer one is cut to the end of the table, as lm-eval does."""
        return self.table.row_for(min(length, self.max_length)) if self.table else None

    def length(self, kind: str, arguments: Sequence[Any]) -> int:
        """Tokens of a request (`Instance.request_type`, `.args`) before any cut; of a rolling one those of its text."""
        if kind == "generate_until":
            return self._generated_length(*arguments)
        if kind == "loglikelihood_rolling":
            return len(self.tok_encode(*arguments))
        context, continuation = arguments
        if context == "":
            return len(self.tok_encode(continuation, add_special_tokens=False))
        return sum(map(len, self._encode_pair(context, continuation))) - 1

    def _generated_length(self, context: str, settings: Mapping[str, Any]) -> int:
        """Prompt and all tokens that may follow. Raises UserError when these leave no room for a prompt."""
        new = normalize_gen_kwargs(dict(settings), self.max_gen_toks)["max_gen_toks"]
        if new >= self.max_length:
            raise UserError(
                "harness",
                got=f"a task that writes up to {new} tokens",
                rule=f"prompt and answer fit into {self.max_length} tokens, where the factors end",
                do="give factors for longer sequences, or set max_gen_toks in the task's generation_kwargs",
            )
        return len(self.tok_encode(context)) + int(new)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt."""
        generate = super().generate_until

        def run(part: Sequence[int]) -> list[str]:
            return cast(list[str], generate([requests[index] for index in part], disable_tqdm))

        return self._by_factors([self._generated_length(*request.args) for request in requests], run)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows as long as the factors reach."""
        self.batch_size_per_gpu = self.wanted or _ROLLING
        return cast(list[float], super().loglikelihood_rolling(requests, disable_tqdm))

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (name, context tokens, continuation tokens)."""
        score = super()._loglikelihood_tokens
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                "harness",
                got=f"a task with a continuation of {longest} tokens",
                rule=f"the factors end at {self.max_length}",
                do="give factors for longer sequences, or choose another task",
            )

        def run(part: Sequence[int]) -> list[tuple[float, bool]]:
            return cast(list[tuple[float, bool]], score([requests[index] for index in part], disable_tqdm=disable_tqdm))

        return self._by_factors([len(context) + len(continued) - 1 for _, context, continued in requests], run)

    def _by_factors(self, lengths: Sequence[int], run: Callable[[Sequence[int]], list[_Answer]]) -> list[_Answer]:
        """What `run` answers for indices of requests of these lengths, asked for one group of equal factors at a time.

        Without a batch size of the user's, lengths of a group also lie within a factor of two.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        for index, length in enumerate(lengths):
            row, bits = self.row(length), 0 if self.wanted else min(length, self.max_length).bit_length()
            groups.setdefault((row.key if row else "", bits), []).append(index)
        answers: dict[int, _Answer] = {}
        for part in groups.values():
            longest = min(max(lengths[index] for index in part), self.max_length)
            self.patch.install(self.row(longest))
            answers |= zip(part, self._if_it_fits(run, part, longest), strict=True)
        return [answers[index] for index in range(len(lengths))]

    def _if_it_fits(
        self, run: Callable[[Sequence[int]], list[_Answer]], part: Sequence[int], longest: int
    ) -> list[_Answer]:
        """run(part) in batches that halve when memory runs out. Raises UserError when one row is too much."""
        vocabulary = self.loaded.model.config.get_text_config().vocab_size
        size = self.wanted or max(1, min(self.loaded.batch_tokens, _LOGITS // vocabulary) // max(longest, 1))
        while True:
            self.batch_size_per_gpu = size
            try:
                return run(part)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if size == 1:
                raise UserError(
                    "memory",
                    got=f"a prompt of {longest} tokens",
                    rule="one prompt must fit into the device's memory",
                    do="use tasks of shorter prompts, a larger device, or --device balanced over several",
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size //= 2
            logger.info("out of memory: going on with %d rows at a time", size)


def _with_padding(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer without a padding token that the model has no weights for: lm-eval then chooses one.

    Padding is masked, so that it does not matter which it is.
    """
    tokenizer = copy.deepcopy(loaded.tokenizer)
    padding: Any = tokenizer.pad_token_id
    if padding is not None and padding >= len(cast(Any, loaded.model.get_input_embeddings()).weight):
        tokenizer.pad_token = None
    return tokenizer
