"""What the stages of an extension share: who is told, the documents by use, and what the last one has made."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longrope.checkpoint import LoadOptions
from longrope.documents import Document, hold_out, read_sources
from longrope.errors import UserError, plural
from longrope.extension.done import Done, digest
from longrope.extension.plan import Plan, measured_lengths
from longrope.factors import FactorTable
from longrope.model import LoadedModel, load_model
from longrope.windows import token_lengths

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
        """The stages with the seconds that each took, for metrics.json, the card and the page."""
        return [stage.to_dict() | {"seconds": self.done.seconds(stage.name)} for stage in self.plan.stages]

    def hash_of(self, name: str) -> str:
        """Hash of a model's files, or the name of one that is no folder."""
        if name not in self._hashes:
            folder = Path(name)
            self._hashes[name] = digest(folder) if folder.is_dir() else name
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
    used = {document.sha256 for document in (*read, *searched)}
    left = [document for document in held if document.sha256 not in used]
    if not left:
        got, rule = (
            f"{plural(len(held), 'document')}, all of them used before",
            "they are measured on, and seen by no stage",
        )
        raise UserError("--unseen", got=got, rule=rule, do="give other documents")
    return Texts(tuple(documents), False, read, searched, left)


def check_documents(loaded: LoadedModel, plan: Plan, texts: Texts) -> None:
    """Raise UserError, before any stage, for documents that are too short for one."""
    further = next((stage.name for stage in plan.stages if stage.settings.get("documents")), None)
    if further is not None and texts.hold_out:
        got, rule = f"documents of its own in {further}", "then what is held out has to be named"
        raise UserError("--unseen", got=got, rule=rule, do="give documents that no stage reads")
    bos = loaded.tokenizer.bos_token_id is not None
    searched = max((stage.to for stage in plan.stages if stage.do != "finetune"), default=0)
    longest = _longest(loaded, texts.search, searched - bos) + bos
    for stage in plan.stages:
        if stage.do != "finetune" and stage.to > longest:
            got = f"documents to search on, the longest of {longest} tokens"
            rule = f"{stage.name} searches on windows of {stage.to}"
            raise UserError("--documents", got=got, rule=rule, do="give longer documents, or --search-documents")
    ends = [loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id]
    around = sum(each is not None for each in ends)
    for stage in (stage for stage in plan.stages if stage.do == "finetune"):
        sources = stage.settings.get("documents") or []
        own = read_sources(sources, share="search", tokenizer=loaded.tokenizer) if sources else []
        if shared := {each.text for each in own} & {each.text for each in texts.unseen}:
            got, rule = f"{plural(len(shared), 'document')} of {stage.name}", "no stage reads what is measured on"
            raise UserError("--unseen", got=got, rule=rule, do="give other documents")
        used = [*texts.trained, *own]
        longest = _longest(loaded, [each for each in used if not each.prompt], stage.to - around) + around
        if stage.to > longest and not _a_prompt_fits(loaded, used, stage.to - around):
            got = f"documents to train on, the longest of {longest} tokens with its ends"
            raise UserError(
                "--documents", got=got, rule=f"{stage.name} has windows of {stage.to}", do="give longer ones"
            )
    wanted = max(measured_lengths(plan))
    held = _longest(loaded, texts.unseen, wanted - bos) + bos
    if wanted > held:
        got, rule = f"held-out documents, the longest of {held} tokens", f"windows of {wanted} are measured at the end"
        raise UserError("--unseen", got=got, rule=rule, do="give longer ones, or shorter lengths under [measure]")


def _a_prompt_fits(loaded: LoadedModel, documents: Sequence[Document], room: int) -> bool:
    """Whether a prompt fits into so many tokens with its completion: such a document fills no window."""
    prompts = sorted((each for each in documents if each.prompt), key=lambda each: len(each.text))
    return any(token_lengths([document], loaded.tokenizer)[0] <= room for document in prompts)


def _longest(loaded: LoadedModel, documents: Sequence[Document], enough: int) -> int:
    """Tokens of the longest document, or of one that has enough: to tokenize all of them takes a second a megabyte."""
    found = 0
    for document in sorted(documents, key=lambda each: len(each.text), reverse=True):
        found = max(found, *token_lengths([document], loaded.tokenizer))
        if found >= enough:
            break
    return found
