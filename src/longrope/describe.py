"""What run folders say of models, windows and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from longrope import __version__
from longrope.documents import Document
from longrope.model import LoadedModel
from longrope.windows import Window, fingerprint

if TYPE_CHECKING:
    from longrope.evaluate.methods import Result

# What a tokenizer says of where its files lie
_PLACES = ("name_or_path", "vocab_file", "merges_file", "tokenizer_file", "is_local", "local_files_only")


def describe_options(loaded: LoadedModel) -> dict[str, Any]:
    """How the model is run, as far as results depend on it."""
    options = loaded.options
    described: dict[str, Any] = {"dtype": options.dtype, "attention": options.attention}
    described |= {"device": loaded.device.type, "rope_precision": options.rope_precision}
    described |= {"quantize": options.quantize} if options.quantize else {}
    return described | ({"threads": torch.get_num_threads()} if loaded.device.type == "cpu" else {})


def describe_model(loaded: LoadedModel) -> dict[str, Any]:
    """The model as run folders name it."""
    return {
        "name": loaded.name,
        "rope_theta": loaded.rope.rope_theta,
        "rotary_dim": loaded.rope.rotary_dim,
        "original_length": loaded.rope.original_length,
        "fingerprint": loaded.fingerprint,
    }


def describe_trained(loaded: LoadedModel) -> dict[str, Any]:
    """The same of a model that a checkpoint is made of, which takes over its tokenizer and generation settings, too."""
    tokenizer, generation = loaded.tokenizer, getattr(loaded.model, "generation_config", None)
    told: list[Any] = [tokenizer_hash(tokenizer)]
    told.append({key: str(value) for key, value in tokenizer.init_kwargs.items() if key not in _PLACES})
    if generation is not None:
        told.append({key: value for key, value in generation.to_dict().items() if value is not None})
        told[-1].pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    return describe_model(loaded) | {"tokenizer_and_generation": f"sha256:{digest}"}


def tokenizer_hash(tokenizer: Any) -> str:
    """Of what a tokenizer makes of texts: its vocabulary and rules, and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    told = [rules, str(tokenizer.chat_template), str(tokenizer.special_tokens_map)]
    return f"sha256:{hashlib.sha256(json.dumps(told).encode()).hexdigest()}"


def describe_windows(windows: Sequence[Window]) -> list[dict[str, Any]]:
    """Windows by document and place; never their text."""
    return [{"name": window.document, "sha256": window.sha256, "start": window.start} for window in windows]


def describe_documents(documents: Sequence[Document]) -> list[dict[str, str]]:
    """Whole documents by name and hash; never their text."""
    return [{"name": document.name, "sha256": document.sha256} for document in documents]


def versions(*more: str) -> dict[str, str]:
    """Of this package and of those that a result depends on."""
    return {"longrope": __version__} | {name: version(name) for name in ("torch", "transformers", *more)}


def metrics(
    command: str,
    loaded: LoadedModel,
    settings: Mapping[str, Any],
    results: Sequence[Result],
    measure: str = "perplexity",
    documents: Sequence[Window] = (),
    items: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON document of a command that measures: metrics.json, and stdout under --json.

    items: hash of what was run, by length or task: results of other runs belong beside these where it is equal. By
    default as the results say it, of the windows of a search apart.
    """
    items = items or _items(results, searched=False)
    searched = _items(results, searched=True)
    return {
        "command": command,
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "settings": dict(settings),
        "documents": fingerprint(documents) if documents else None,
        "versions": versions(),
        "measure": measure,
        **({"items": dict(items)} if items else {}),
        **({"search_items": searched} if searched else {}),
        "results": [result.to_dict() for result in results],
    }


def _items(results: Sequence[Result], *, searched: bool) -> dict[str, str]:
    """Hash of what was run by length: on the windows of a search itself, or on all others."""
    return {
        str(result.length): result.items
        for result in results
        if result.items and (result.windows == "search") == searched
    }
