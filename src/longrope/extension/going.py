"""What the stages of an extension share: who is told, the documents by use, and what the last one has made."""

from __future__ import annotations

import gc
import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longrope.checkpoint import TINY, LoadOptions
from longrope.documents import Document, hold_out, others, read_sources
from longrope.errors import UserError, first_line, plural
from longrope.extension.done import Done, digest
from longrope.extension.plan import Plan, Stage, measured_lengths, search_settings
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.search.needle import needle_prompts
from longrope.windows import TokenCounts, bos_of, default_window_count, held_windows

logger = logging.getLogger(__name__)

Shown = Callable[[], AbstractContextManager[Any]]
"""A progress bar, as `console` makes one: what is to be called as the work goes on."""


@dataclass(frozen=True)
class Watching:
    """Who is told: of each stage in words, and of searches, trainings and measurements as their own commands do."""

    stage: Callable[[str], None] = logger.info
    search: Shown = nullcontext
    training: Shown = nullcontext
    measuring: Shown = nullcontext


@dataclass(frozen=True)
class Texts:
    """What an extension reads. training: sources to train on, without those held out where `hold_out` says so.

    trained: the documents that this is. search, unseen: those to search on, and to measure on.
    """

    training: tuple[str, ...]
    hold_out: bool
    trained: Sequence[Document]
    search: Sequence[Document]
    unseen: Sequence[Document]


@dataclass
class Extension:
    """An extension going on: what its stages share, and what the last one has made."""

    run: Path
    plan: Plan
    options: LoadOptions
    base: str
    texts: Texts
    seed: int
    workers: str | None
    launcher: Sequence[str]
    tracker: str
    watching: Watching
    done: Done
    original_length: int
    scaling: FactorTable
    """The base model's own, of ones where it has none."""
    tables: dict[int, FactorTable] = field(default_factory=dict)
    """By length, what a first search found."""
    current: str = ""
    """The model as the last fine-tuning left it."""
    table: FactorTable | None = None
    """The factor table of the current model, so far."""
    _hashes: dict[str, str] = field(default_factory=dict)
    _loaded: LoadedModel | None = None

    def model(self, name: str) -> LoadedModel:
        """A model, loaded; the last one is kept, so that searches in a row load it once."""
        if self._loaded is None or self._loaded.name != name:
            self.forget()  # two are never in memory
            self._loaded = load_model(name, self.options)
        return self._loaded

    def forget(self) -> None:
        """Let the loaded model go, before another one or a training takes the memory."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def told(self) -> list[dict[str, Any]]:
        """The stages with the seconds that each took, for metrics.json, the card and the page.

        resumed: of one that was, they are those since it last went on.
        """
        return [
            stage.to_dict()
            | {"seconds": self.done.seconds(stage.name)}
            | ({"resumed": True} if self.done.resumed(stage.name) else {})
            for stage in self.plan.stages
        ]

    def hash_of(self, name: str) -> str:
        """Hash of a model's files, or the name of one that is no folder."""
        if name not in self._hashes:
            folder = Path(name)  # the embedded model is a word, whatever lies in a folder of that name
            self._hashes[name] = digest(folder) if name != TINY and folder.is_dir() else name
        return self._hashes[name]


def texts_of(
    loaded: LoadedModel, documents: Sequence[str], unseen: Sequence[str], search_documents: Sequence[str]
) -> Texts:
    """Documents by use. Raises UserError when there is nothing to train, search or measure on."""
    if not documents:
        raise UserError("--documents", got="none", rule="a model is extended on documents", do="give at least one")
    read = read_sources(documents, share="search", tokenizer=loaded.tokenizer)
    if search_documents and not unseen:
        got, rule = "none, with --search-documents", "what is measured on is neither trained nor searched on"
        raise UserError("--unseen", got=got, rule=rule, do="name documents to measure on")
    searched = read_sources(search_documents, share="search", tokenizer=loaded.tokenizer) if search_documents else read
    if unseen:
        held = read_sources(unseen, share="unseen", tokenizer=loaded.tokenizer)
    elif list(documents) == ["stdlib"]:  # which has its own shares
        held = read_sources(documents, share="unseen")
    else:
        kept, held = hold_out(read)
        return Texts(tuple(documents), True, kept, kept, held)
    left = others(held, [*read, *searched])
    if not left:
        got, rule = (
            f"{plural(len(held), 'document')}, all of them used before",
            "they are measured on, and seen by no stage",
        )
        raise UserError("--unseen", got=got, rule=rule, do="give other documents")
    return Texts(tuple(documents), False, read, searched, left)


def check_documents(loaded: LoadedModel, plan: Plan, texts: Texts, seed: int) -> None:
    """Raise UserError, before any stage, for documents that do not suffice for one, or for the measurements."""
    if texts.hold_out and (apart := next((stage.name for stage in plan.stages if _own_sources(stage)), None)):
        got, rule = f"documents of its own in {apart}", "then what is held out has to be named"
        raise UserError("--unseen", got=got, rule=rule, do="give documents that no stage reads")
    counts = TokenCounts(loaded.tokenizer)
    for stage in plan.stages:
        if stage.do == "finetune":
            _check_trained(loaded, stage, texts, counts)
        else:
            _check_searched(loaded, stage, texts, counts, seed)
    bos = len(bos_of(loaded.tokenizer))
    for length in reversed(measured_lengths(plan, [loaded.rope.original_length])):  # the longest is the first to miss
        count = plan.measures.windows or default_window_count(length)
        held = held_windows(texts.unseen, counts, length=length, count=count)
        if held < count:
            raise UserError(
                "--unseen",
                got=f"held-out documents, {_held_of(texts.unseen, counts, bos, held, length)}",
                rule=f"{plural(count, 'window')} of {length} tokens are measured at the end",
                do="give longer or more of them, or fewer windows or shorter lengths under [measure]",
            )


def _own_sources(stage: Stage) -> list[str]:
    """The documents that a stage alone is trained on."""
    return [source for name in ("documents", "short_documents") for source in stage.settings.get(name, [])]


def _check_searched(loaded: LoadedModel, stage: Stage, texts: Texts, counts: TokenCounts, seed: int) -> None:
    """Raise UserError when the documents do not hold the windows of a search, or one its needle."""
    settings = search_settings(stage, seed)
    bos = len(bos_of(loaded.tokenizer))
    for length, count in settings.whole_windows.items():
        held = held_windows(texts.search, counts, length=length, count=count)
        if held < count:
            raise UserError(
                "--documents",
                got=f"documents to search on, {_held_of(texts.search, counts, bos, held, length)}",
                rule=f"{stage.name} searches on {plural(count, 'window')} of {length} tokens",
                do="give longer or more of them, --search-documents, or a plan with fewer windows",
            )
    if settings.objective != "perplexity":
        try:
            needle_prompts(
                loaded.tokenizer,
                length=settings.to,
                count=settings.window_count,
                seed=seed,
                digits=settings.needle_digits,
                template=settings.needle_template,
            )
        except UserError as error:
            raise error.changed(what=f"{stage.name}: {error.what}") from None


def _check_trained(loaded: LoadedModel, stage: Stage, texts: Texts, counts: TokenCounts) -> None:
    """Raise UserError when a fine-tuning has no window, or reads what is measured on."""
    own, short = (
        read_sources(sources, share="search", tokenizer=loaded.tokenizer) if sources else []
        for sources in (stage.settings.get("documents"), stage.settings.get("short_documents"))
    )
    if shared := {each.text for each in (*own, *short)} & {each.text for each in texts.unseen}:
        got, rule = f"{plural(len(shared), 'document')} of {stage.name}", "no stage reads what is measured on"
        raise UserError("--unseen", got=got, rule=rule, do="give other documents")
    ends = [loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id]
    around = sum(each is not None for each in ends)
    used = [*texts.trained, *own]
    longest = _longest(counts, [each for each in used if each.prompt is None], stage.window - around) + around
    if stage.window > longest and not _a_prompt_fits(counts, used, stage.window - around):
        got = f"documents to train on, the longest of {longest} tokens with its ends"
        rule = f"{stage.name} has windows of {stage.window}"
        raise UserError("--documents", got=got, rule=rule, do="give longer ones")
    packed, original = short or used, loaded.rope.original_length
    prompts = "mixed" in stage.settings and all(each.prompt is not None for each in packed)
    if prompts and not _a_prompt_fits(counts, packed, original - around):
        got = f"{plural(len(packed), 'prompt')} with completions, all of them longer than {original - around} tokens"
        rule = f"mixed windows of {stage.name} are packed of texts within {original} tokens"
        raise UserError("--documents", got=got, rule=rule, do="give the stage short_documents")


def _held_of(documents: Sequence[Document], counts: TokenCounts, bos: int, held: int, length: int) -> str:
    """What documents hold that are too few, in words."""
    longest = max(map(counts, documents), default=0) + bos
    return f"the longest of {longest} tokens, which hold {plural(held, 'window')} of {length}"


def _a_prompt_fits(counts: TokenCounts, documents: Sequence[Document], room: int) -> bool:
    """Whether a prompt fits into so many tokens with its completion: such a document fills no window."""
    completed = [each for each in documents if each.prompt is not None and each.prompt < len(each.text)]
    prompts = sorted(completed, key=lambda each: len(each.text))
    return any(counts(document) <= room for document in prompts)


def _longest(counts: TokenCounts, documents: Sequence[Document], enough: int) -> int:
    """Tokens of the longest document, or of one that has enough: to tokenize all of them takes a second a megabyte."""
    found = 0
    for document in sorted(documents, key=lambda each: len(each.text), reverse=True):
        found = max(found, counts(document))
        if found >= enough:
            break
    return found


def launcher_words(launcher: str | None) -> list[str]:
    """The words of a command that starts the fine-tuning; none without one. Raises UserError for an open quote."""
    try:
        return shlex.split(launcher or "")
    except ValueError as error:
        rule, do = f"it is a command as a shell reads it ({first_line(error).lower()})", "correct its quotes"
        raise UserError("--launcher", got=repr(launcher), rule=rule, do=do) from None
