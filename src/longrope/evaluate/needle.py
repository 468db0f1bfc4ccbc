"""A needle in a real document: a number told at a depth of the user's own text, asked for at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import UnionType
from typing import Any

import numpy as np

from longrope.documents import Document
from longrope.errors import UserError
from longrope.evaluate.answers import answers
from longrope.evaluate.intervals import share_interval
from longrope.evaluate.measures import Item, Record, Summary
from longrope.evaluate.templates import INTRO_FROM, NEEDLE, SHORT_NEEDLE, NeedleTemplate, describe_template
from longrope.files import finite_or_none
from longrope.model import LoadedModel
from longrope.windows import choose_windows


@dataclass(frozen=True)
class NeedleMeasure:
    """Needle as a measure: `tries` prompts at each of `depths` evenly spaced depths from 0 to 1, at each length.

    documents: where spans are drawn, by the rules of `choose_windows`: one a try, the same at every depth, so that
    depths differ in nothing but depth and the key. digits: of the number. template, chat: as for passkey.
    """

    documents: Sequence[Document]
    depths: int = 10
    tries: int = 3
    digits: int = 7
    seed: int = 0
    template: NeedleTemplate | None = None
    chat: bool = False

    @property
    def name(self) -> str:
        """As in `Measure`."""
        return "needle"

    @property
    def settings(self) -> Mapping[str, Any]:
        """As in `Measure`; also the hash of the documents, of which spans are only drawn by `items`."""
        texts = sha256("".join(sorted(document.sha256 for document in self.documents)).encode())
        counts = {"depths": self.depths, "tries": self.tries, "digits": self.digits, "seed": self.seed}
        wording = {"chat": self.chat, "template": describe_template(self.template)}
        return {**counts, **wording, "documents": f"sha256:{texts.hexdigest()}"}

    @property
    def record_keys(self) -> Mapping[str, type | UnionType]:
        """As in `Measure`."""
        return {"depth": int | float, "found": bool, "loss": int | float | None}

    @property
    def batched(self) -> bool:
        """As in `Measure`."""
        return True

    def items(self, loaded: LoadedModel, length: int) -> Sequence[Item]:
        """The prompts of exactly `length` tokens, answer included, depth by depth.

        Raises UserError when they do not fit, or the documents do not suffice.
        """
        template = self.template or (SHORT_NEEDLE if length < INTRO_FROM else NEEDLE)
        rng = np.random.default_rng(self.seed)
        cells = [(depth, attempt) for depth in range(self.depths) for attempt in range(self.tries)]
        prompts = []
        for _ in cells:
            key = template.names[int(rng.integers(len(template.names)))]
            number = str(rng.integers(10 ** (self.digits - 1), 10**self.digits))
            prompts.append(template.prompt(loaded.tokenizer, key, number, chat=self.chat))
        fixed = max(prompt.size for prompt in prompts)
        if length < fixed + 2:
            raise UserError(
                "needle",
                got=f"a window of {length} tokens",
                rule=f"the prompt without a document takes {fixed}",
                do=f"measure at {fixed + 2} tokens or more",
            )
        spans = self._spans(loaded, length, least=min(prompt.size for prompt in prompts))
        items = []
        for (index, attempt), prompt in zip(cells, prompts, strict=True):
            depth = index / (self.depths - 1) if self.depths > 1 else 0.5
            name, text = spans[attempt]
            ids = prompt.around(text[: length - prompt.size], depth)
            data = {"depth": depth, "answer": len(prompt.answer), "document": name}
            items.append(Item(f"{index}/{attempt}", ids, data))
        return items

    def _spans(self, loaded: LoadedModel, length: int, least: int) -> list[tuple[str, list[int]]]:
        """(hash, token ids) of a document's span for each try, as long as the shortest prompt needs."""
        bos = loaded.tokenizer.bos_token_id is not None
        try:
            windows = choose_windows(
                self.documents, loaded.tokenizer, length=length - least + bos, count=self.tries, seed=self.seed
            )
        except UserError as error:
            raise error.changed(rule=f"{error.rule} (a needle's prompt takes the rest of {length})") from None
        return [(window.sha256, window.ids[bos:].tolist()) for window in windows]

    def run(self, loaded: LoadedModel, items: Sequence[Item]) -> Sequence[Record]:
        """{"depth": 0 to 1, "found": whether the model would write the number, "loss": its nats} of each."""
        sizes = [item.data["answer"] for item in items]
        found, losses = answers(loaded, np.stack([item.ids for item in items]), sizes)
        return [
            {"depth": item.data["depth"], "found": bool(right), "loss": finite_or_none(float(loss))}
            for item, right, loss in zip(items, found, losses, strict=True)
        ]

    def summarize(self, length: int, records: Sequence[Record]) -> Summary:
        """The share of numbers found, with its Wilson interval.

        details: `by_depth` [[depth, share, tries, mean loss or None], ...].
        """
        found = [bool(record["found"]) for record in records]
        by_depth: list[list[float | int | None]] = []
        for depth in sorted({float(record["depth"]) for record in records}):
            cell = [record for record in records if record["depth"] == depth]
            share = sum(bool(record["found"]) for record in cell) / len(cell)
            losses = [record["loss"] for record in cell]
            mean = None if None in losses else math.fsum(losses) / len(cell)
            by_depth.append([depth, share, len(cell), mean])
        interval = share_interval(sum(found) / len(found), len(found))
        return Summary(sum(found) / len(found), len(found) * length, interval, {"by_depth": by_depth})
