"""Passkey retrieval: a five-digit key somewhere in filler, asked for at the end (LongRoPE, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longrope.errors import UserError
from longrope.evaluate.answers import answers
from longrope.evaluate.intervals import share_interval
from longrope.evaluate.measures import Item, Record, Summary
from longrope.evaluate.prompts import inner_ids
from longrope.evaluate.templates import INTRO_FROM, PAPER, SHORT, PasskeyTemplate, describe_template
from longrope.model import LoadedModel

_DECILES = 10


@dataclass(frozen=True)
class PasskeyMeasure:
    """Passkey as a measure: `tries` prompts a length, at depths spread evenly and uniform inside their share.

    template: by default the paper's, without its introduction below 1024 tokens. chat: prompts are turns of the
    tokenizer's chat template.
    """

    tries: int = 10
    seed: int = 0
    template: PasskeyTemplate | None = None
    chat: bool = False

    @property
    def name(self) -> str:
        """As in `Measure`."""
        return "passkey"

    @property
    def settings(self) -> Mapping[str, Any]:
        """As in `Measure`."""
        template = describe_template(self.template)
        return {"tries": self.tries, "seed": self.seed, "chat": self.chat, "template": template}

    @property
    def record_keys(self) -> Mapping[str, type | UnionType]:
        """As in `Measure`."""
        return {"depth": int | float, "found": bool}

    @property
    def batched(self) -> bool:
        """As in `Measure`."""
        return True

    def items(self, loaded: LoadedModel, length: int) -> Sequence[Item]:
        """The prompts of exactly `length` tokens, answer included. Raises UserError when they do not fit."""
        rng = np.random.default_rng(self.seed)
        template = self.template or (SHORT if length < INTRO_FROM else PAPER)
        prompts, depths = [], []
        for index in range(self.tries):
            key = str(rng.integers(10_000, 100_000))
            depths.append((index + float(rng.random())) / self.tries)
            prompts.append(template.prompt(loaded.tokenizer, key, chat=self.chat))
        fixed = max(prompt.size for prompt in prompts)
        if length < fixed:
            raise UserError(
                "passkey",
                got=f"a window of {length} tokens",
                rule=f"the prompt without filler takes {fixed}",
                do=f"measure at {fixed} tokens or more",
            )
        unit = inner_ids(loaded.tokenizer, template.filler.format())
        if not unit:
            rule, do = "it fills the window", "write sentences that this tokenizer has tokens for"
            raise UserError("[passkey] filler", got="no tokens", rule=rule, do=do)
        filler = unit * (length // len(unit) + 1)
        return [
            Item(
                str(index),
                prompt.around(filler[: length - prompt.size], depth),
                {"depth": depth, "answer": len(prompt.answer)},
            )
            for index, (prompt, depth) in enumerate(zip(prompts, depths, strict=True))
        ]

    def run(self, loaded: LoadedModel, items: Sequence[Item]) -> Sequence[Record]:
        """{"depth": within 0 to 1, "found": whether the model would write the key} of each."""
        found, _ = answers(loaded, np.stack([item.ids for item in items]), [item.data["answer"] for item in items])
        return [{"depth": item.data["depth"], "found": bool(each)} for item, each in zip(items, found, strict=True)]

    def summarize(self, length: int, records: Sequence[Record]) -> Summary:
        """The share of keys found, with its Wilson interval; details: `by_depth` [[from, to, share, tries], ...]."""
        found = [bool(record["found"]) for record in records]
        by_depth = []
        for decile in range(_DECILES):
            inside = [bool(record["found"]) for record in records if min(int(record["depth"] * _DECILES), 9) == decile]
            share = sum(inside) / len(inside) if inside else None
            by_depth.append([decile / _DECILES, (decile + 1) / _DECILES, share, len(inside)])
        interval = share_interval(sum(found) / len(found), len(found))
        return Summary(sum(found) / len(found), len(found) * length, interval, {"by_depth": by_depth})


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

    Raises UserError when the prompt does not fit.
    """
    measure = PasskeyMeasure(tries, seed, template)
    records = measure.run(loaded, measure.items(loaded, length))
    found = np.array([bool(record["found"]) for record in records])
    depths = np.array([float(record["depth"]) for record in records])
    return Retrieval(float(found.mean()), tries, share_interval(float(found.mean()), tries), depths, found)
