"""RULER: thirteen tasks of retrieval, tracking, counting and question answering at any length (arXiv 2404.06654)."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from longrope.errors import UserError
from longrope.evaluate.generation import greedy
from longrope.evaluate.intervals import effective_tries, share_interval
from longrope.evaluate.measures import Item, Record, Summary
from longrope.evaluate.ruler_answers import check_written, decoded, score, written
from longrope.evaluate.ruler_fit import Encode, encoder, item, needs
from longrope.evaluate.ruler_questions import Question, passages, read_questions
from longrope.evaluate.ruler_samples import Sample
from longrope.evaluate.ruler_tasks import QUESTIONS, TASKS, units
from longrope.evaluate.ruler_texts import ENGLISH, Texts, read_templates
from longrope.model import LoadedModel

logger = logging.getLogger(__name__)

SAMPLES = 20
"""Of each task at each length, unless asked otherwise."""
_SHOWN = 500  # characters of an output that are kept
_CHARACTERS = 16  # of a user's texts for each token of a window: more than any tokenizer needs


@dataclass(frozen=True)
class Ruler:
    """The tasks named, `samples` of each at each length; `Ruler.of` makes one from files.

    chat: prompts go through the tokenizer's chat template. questions: for qa_1 and qa_2, which need them. haystack:
    texts that hide the needles of all but niah_single_1 and niah_multikey_2 and _3; our own sentences where there are
    none. Raises UserError for an unknown task, fewer samples than one, and qa tasks without questions.
    """

    tasks: tuple[str, ...]
    samples: int = SAMPLES
    seed: int = 0
    chat: bool = False
    questions: tuple[Question, ...] = ()
    haystack: tuple[str, ...] = ()
    texts: Texts = field(default_factory=lambda: ENGLISH)  # never changed

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                near = difflib.get_close_matches(task, TASKS, n=3, cutoff=0.5)
                do = f"did you mean {' or '.join(near)}?" if near else "choose some of them"
                raise UserError("--tasks", got=repr(task), rule=f"the tasks are {', '.join(TASKS)}", do=do)
            if task in QUESTIONS and not self._asked(task):
                got = f"{task} without questions for it"
                rule = "it asks those of the user's own set whose context is "
                rule += "one passage" if task == "qa_1" else "a list of passages"
                raise UserError("--tasks", got=got, rule=rule, do="give such questions, or leave the task out")
            if task in QUESTIONS and self._alone(task):
                rule = "the right passages hide among those of other questions"
                raise UserError("questions", got=f"no other passages for {task}", rule=rule, do="give more questions")
        if not self.tasks:
            raise UserError("--tasks", got="none", rule=f"the tasks are {', '.join(TASKS)}", do="name at least one")
        if self.samples < 1:
            raise UserError("--samples", got=self.samples, rule="there is at least one", do="ask for 20")

    @classmethod
    def of(
        cls,
        tasks: Sequence[str] | None = None,
        *,
        samples: int = SAMPLES,
        seed: int = 0,
        chat: bool = False,
        questions: str | Path | None = None,
        haystack: Sequence[str] = (),
        templates: str | Path | None = None,
    ) -> Ruler:
        """From a file of questions (JSONL) and one of texts (TOML); without `tasks`, all that there is something for.

        haystack: texts. Says which tasks it leaves out. Raises UserError for what is wrong with any of them.
        """
        asked = read_questions(questions) if questions is not None else ()
        texts = read_templates(templates) if templates is not None else ENGLISH
        if tasks is None:
            there = {question.task for question in asked}
            tasks = [task for task in TASKS if task not in QUESTIONS or task in there]
            if left_out := [task for task in TASKS if task not in tasks]:
                logger.info("ruler: %s left out: no questions for it were given", " and ".join(left_out))
        return cls(tuple(dict.fromkeys(tasks)), samples, seed, chat, asked, tuple(haystack), texts)

    @property
    def name(self) -> str:
        """As in `longrope evaluate ruler`."""
        return "ruler"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings, texts as hashes."""
        asked = [[each.question, each.answers, each.context] for each in self.questions]
        return {
            "tasks": list(self.tasks),
            "samples": self.samples,
            "seed": self.seed,
            "chat": self.chat,
            "questions": _hash(asked) if asked else None,
            "haystack": _hash(self.haystack) if self.haystack else None,
            "templates": _hash(self.texts) if self.texts != ENGLISH else None,
        }

    @property
    def record_keys(self) -> Mapping[str, type | UnionType]:
        """As in `Measure`."""
        return {"task": str, "score": int | float}

    @property
    def batched(self) -> bool:
        """As in `Measure`."""
        return False

    def items(self, loaded: LoadedModel, length: int) -> Sequence[Item]:
        """Prompts that leave room for their answers, as long as fit into `length` tokens together.

        Raises UserError for answers that the tokenizer cannot write, for tasks that do not fit, with the shortest
        length that does, and without a chat template.
        """
        encode = encoder(loaded.tokenizer, chat=self.chat)
        hay = units(self.haystack, _CHARACTERS * length)
        samples = self._samples(length, hay)
        check_written(samples, loaded.tokenizer)
        self._check_fit(samples, encode, hay)
        return [item(sample, encode) for sample in samples]

    def run(self, loaded: LoadedModel, items: Sequence[Item]) -> Sequence[Record]:
        """Greedy answers, one by one."""
        return [_record(loaded, item) for item in items]

    def summarize(self, length: int, records: Sequence[Record]) -> Summary:
        """Mean over tasks of the mean score (0 to 1), with its interval over samples.

        details: `tasks` with score, samples and, where a short window asked for one, how many had a reduced form;
        `left_out`, the tasks that were not measured.
        """
        by_task: dict[str, list[Record]] = {}
        for record in records:
            by_task.setdefault(record["task"], []).append(record)
        scores = [np.array([record["score"] for record in of_task], dtype=np.float64) for of_task in by_task.values()]
        tasks: dict[str, dict[str, Any]] = {}
        for (task, of_task), values in zip(by_task.items(), scores, strict=True):
            reduced = sum(bool(record.get("reduced")) for record in of_task)
            tasks[task] = {"score": float(values.mean()), "samples": len(values)}
            tasks[task] |= {"reduced": reduced} if reduced else {}
        value = float(np.mean([values.mean() for values in scores]))
        left_out = [task for task in TASKS if task not in tasks]
        ci = share_interval(value, effective_tries([len(values) for values in scores]))
        return Summary(value, length * len(records), ci, {"tasks": tasks, "left_out": left_out})

    def _asked(self, task: str) -> tuple[Question, ...]:
        return tuple(question for question in self.questions if question.task == task)

    def _alone(self, task: str) -> bool:
        """Whether all passages of a task belong to one question."""
        asked = self._asked(task)
        return max(len(question.context) for question in asked) == len(passages(asked))

    def _samples(self, length: int, hay: Sequence[str], tasks: Sequence[str] | None = None) -> list[Sample]:
        samples = []
        for task in tasks or self.tasks:
            asked = self._asked(task)
            count = min(self.samples, len(asked)) if task in QUESTIONS else self.samples
            samples += [Sample(task, length, index, self.seed, self.texts, hay, asked) for index in range(count)]
        return samples

    def _check_fit(self, samples: Sequence[Sample], encode: Encode, hay: Sequence[str]) -> None:
        length = samples[0].length
        failed = list(dict.fromkeys(sample.task for sample in samples if needs(sample, encode) > length))
        if not failed:
            return
        shortest = {task: self._shortest(task, length, encode, hay) for task in failed}
        takes = ", ".join(f"{task} {tokens}" for task, tokens in shortest.items())
        others = [task for task in self.tasks if task not in failed]
        do = f"measure at {max(shortest.values())} tokens or more"
        do += f", or only {','.join(others)}" if others else ""
        raise UserError(
            "ruler",
            got=f"a window of {length} tokens",
            rule=f"a prompt with its answer takes tokens, at the least: {takes}",
            do=do,
        )

    def _shortest(self, task: str, length: int, encode: Encode, hay: Sequence[str]) -> int:
        """The shortest length above this one that was seen to hold all samples of a task."""
        while (needed := max(needs(sample, encode) for sample in self._samples(length, hay, [task]))) > length:
            length = needed
        return length


def _record(loaded: LoadedModel, item: Item) -> Record:
    output = decoded(loaded.tokenizer, greedy(loaded, item.ids, item.data["tokens"]))
    task, references = item.data["task"], item.data["references"]
    made = [written(loaded.tokenizer, each) for each in references]
    record = {
        "task": task,
        "score": score(task, output, references, made),
        "output": output[:_SHOWN],
        "references": references,
    }
    record |= {"written": made} if made != references else {}  # what else was found, to read
    return record | ({"reduced": True} if item.data.get("reduced") else {})


def _hash(content: object) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"
