"""RULER's answers: what a tokenizer makes of a reference, and which references an output holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from unicodedata import category, normalize

from longrope.errors import UserError, shown
from longrope.evaluate.ruler_samples import Sample
from longrope.evaluate.ruler_tasks import QUESTIONS, builders
from longrope.windows import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHANGED = {"Mn", "Cc", "Cf", "Zs", "Zl", "Zp"}  # marks on letters, controls, invisible characters, spaces


def clean(output: str) -> str:
    """An output with its control characters as line ends and without space around it, as published."""
    return re.sub(r"[\x00-\x1f]", "\n", output).strip()


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The clean text of token ids."""
    return clean(str(tokenizer.decode(list(ids), skip_special_tokens=True)))


def written(tokenizer: PreTrainedTokenizerBase, reference: str) -> str | None:
    """A reference as it stands in an output of the tokenizer's; None where the tokenizer cannot write it.

    Tokenizers normalise (NFC, NFKC, lower case, no accents) and decode with spaces of their own (`7a72 - 4e9c`), and
    control characters of outputs become line ends. Most give back what they got.
    """
    ids = token_ids(tokenizer, reference)
    text = decoded(tokenizer, ids)
    # It cannot where a token is the unknown one, or where decoding lacks more than normalising takes away. For that
    # both texts are brought to the coarsest of the forms above: no tokenizer need be asked how it normalises, and one
    # letter, digit or mark that was left out or stands as <unk> makes them differ.
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    return None if unknown or not text or _coarse(text) != _coarse(reference) else text


def score(task: str, output: str, references: Sequence[str], made: Sequence[str | None] = ()) -> float:
    """Share of the references found in an output, whatever their case; for questions 1 when any of them is.

    made: each of them as `written`, which counts as well.
    """
    text = output.lower()
    spellings = zip(references, made or references, strict=True)
    found = [any(each is not None and each.lower() in text for each in either) for either in spellings]
    return float(any(found)) if task in QUESTIONS else sum(found) / len(found)


def check_written(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError, with the tasks, where the tokenizer lets no output reach the whole score of a sample."""
    tasks = dict.fromkeys(sample.task for sample in samples)
    failed: dict[str, str] = {}
    for sample in samples:
        builder = builders(sample)[0]
        references = builder.build(builder.least).references  # the same in every form and at every size
        lacking = [each for each in references if written(tokenizer, each) is None]
        # Of a question's answers one is enough.
        if lacking and (sample.task not in QUESTIONS or len(lacking) == len(references)):
            failed.setdefault(sample.task, lacking[0])
    if not failed:
        return
    others = [task for task in tasks if task not in failed]
    ways = [f"measure only {','.join(others)}"] if others else []
    ways += ["take such questions out"] if any(task in QUESTIONS for task in failed) else []
    raise UserError(
        "tokenizer",
        got=f"one that cannot write answers of {', '.join(failed)}, such as {shown(next(iter(failed.values())))}",
        rule="what cannot be written is never found",
        do=", or ".join(ways or ["measure a model whose tokenizer can"]),
    )


def _coarse(text: str) -> str:
    """A text without what tokenizers change in one: case, forms of characters, accents, controls and spaces."""
    folded = normalize("NFKD", normalize("NFKD", text).casefold())
    return "".join(letter for letter in folded if category(letter) not in _CHANGED)
