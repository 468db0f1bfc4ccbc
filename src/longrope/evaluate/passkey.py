"""Passkey retrieval: a five-digit key somewhere in filler, asked for at the end (LongRoPE, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from longrope.errors import UserError
from longrope.evaluate.perplexity import in_batches
from longrope.model import LoadedModel


@dataclass(frozen=True)
class PasskeyTemplate:
    """The pieces of a prompt; {key} stands for the key. The answer is the key after the question."""

    intro: str
    filler: str
    statement: str
    question: str

    def pieces(self, tokenizer: PreTrainedTokenizerBase, key: str) -> dict[str, list[int]]:
        """Token ids of every piece, and of the answer as it follows the question."""

        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        question = ids(self.question)
        answer = ids(f"{self.question} {key}")[len(question) :]
        statement = ids(self.statement.format(key=key))
        return {
            "intro": ids(self.intro) if self.intro else [],
            "filler": ids(self.filler),
            "statement": statement,
            "question": question,
            "answer": answer,
        }


PAPER = PasskeyTemplate(
    intro="There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n",
    filler="The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    statement="The pass key is {key}. Remember it. {key} is the pass key.\n",
    question="\nWhat is the pass key? The pass key is",
)
# Without the introduction, for windows of a few hundred tokens.
SHORT = PasskeyTemplate(intro="", filler=PAPER.filler, statement=PAPER.statement, question=PAPER.question)


@dataclass(frozen=True)
class Retrieval:
    """Share of keys found, of `tries`, with its 95% Wilson interval; `depths` and `found` are those of each try."""

    value: float
    tries: int
    ci: tuple[float, float]
    depths: NDArray[np.float64]
    found: NDArray[np.bool_]


def passkey(
    loaded: LoadedModel, length: int, *, tries: int = 10, seed: int = 0, template: PasskeyTemplate | None = None
) -> Retrieval:
    """Passkey accuracy with prompts of exactly `length` tokens, answer included, under the factors the model carries.

    The key counts as found when every one of its tokens is the most likely one after the right ones before it, which
    is when greedy decoding writes it. Raises UserError when the prompt does not fit.
    """
    prompts, answers, depths = make_prompts(loaded, length, tries=tries, seed=seed, template=template)
    found = _found(loaded, prompts, answers)
    return Retrieval(float(found.mean()), tries, wilson_interval(int(found.sum()), tries), depths, found)


def make_prompts(
    loaded: LoadedModel, length: int, *, tries: int, seed: int, template: PasskeyTemplate | None = None
) -> tuple[NDArray[np.int64], list[list[int]], NDArray[np.float64]]:
    """Token ids (tries, length) of prompts with their answers, the answers' own, and depths (tries,) within 0 to 1.

    Raises UserError when the prompt does not fit.
    """
    rng = np.random.default_rng(seed)
    chosen = template or (SHORT if length < 1024 else PAPER)
    prompts, depths, answers = [], [], []
    for index in range(tries):
        key = str(rng.integers(10_000, 100_000))
        depth = (index + float(rng.random())) / tries  # uniform, and spread evenly
        prompt, answer = _prompt(chosen.pieces(loaded.tokenizer, key), loaded.tokenizer, length, depth)
        prompts.append(prompt)
        answers.append(answer)
        depths.append(depth)
    return np.array(prompts), answers, np.array(depths)


def _prompt(
    pieces: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, length: int, depth: float
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with its answer, `length` in all, and the answer's."""
    head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    fixed = sum(len(pieces[name]) for name in ("intro", "statement", "question", "answer")) + len(head)
    free = length - fixed
    if free < 0:
        raise UserError(
            "passkey",
            got=f"a window of {length} tokens",
            rule=f"the prompt without filler takes {fixed}",
            do=f"measure at {fixed} tokens or more",
        )
    filler = (pieces["filler"] * (free // len(pieces["filler"]) + 1))[:free]
    cut = int(depth * free)
    body = filler[:cut] + pieces["statement"] + filler[cut:]
    return head + pieces["intro"] + body + pieces["question"] + pieces["answer"], pieces["answer"]


def _found(loaded: LoadedModel, prompts: NDArray[np.int64], answers: Sequence[list[int]]) -> NDArray[np.bool_]:
    """Whether each prompt (N, T) ends in the answer that the model would write."""
    longest = max(len(answer) for answer in answers)

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), loaded.autocast():
            ids = ids.to(loaded.device)
            logits: torch.Tensor = loaded.model(input_ids=ids, use_cache=False, logits_to_keep=longest + 1).logits
            return (logits[:, :-1].argmax(-1) == ids[:, -longest:]).cpu()

    right = in_batches(loaded, run, torch.from_numpy(prompts))
    return np.array([bool(row[-len(answer) :].all()) for row, answer in zip(right, answers, strict=True)])


def wilson_interval(successes: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927), which stays within 0 and 1 and is no point at 0% or 100%."""
    share, spread = successes / tries, z * z / tries
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / tries + spread / (4 * tries)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
