"""A tokenizer.json as GGUF has it: byte-level BPE, and BPE with byte fallback as sentencepiece made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope.errors import UserError
from longrope.files import read_json

# Kinds of tokens, as llama.cpp numbers them
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# What splits a text before byte-level BPE -> llama.cpp's name of it
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",  # noqa: E501
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",  # noqa: E501
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their kinds and scores, merges, and what llama.cpp calls the way in which a text is split."""

    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: Mapping[str, int] = field(default_factory=dict)
    begins_with_bos: bool = False
    space_prefix: bool = False
    template: str | None = None

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any]) -> Vocabulary:
        """The tokenizer of a checkpoint's folder, padded to the `vocab_size` of its configuration.

        Raises UserError for one that GGUF cannot hold.
        """
        size = int(config["vocab_size"])
        described = read_json(folder / "tokenizer.json", "tokenizer")
        beside = folder / "tokenizer_config.json"
        settings = read_json(beside, "tokenizer") if beside.is_file() else {}
        if not isinstance(described, dict) or not isinstance(settings, dict):
            raise _cannot("a tokenizer.json that is no object", "save the tokenizer again with transformers")
        model = described.get("model") or {}
        if model.get("type") != "BPE":
            raise _cannot(f"a tokenizer of type {model.get('type')}", "only BPE can be written")
        vocabulary: dict[str, int] = dict(model["vocab"])
        added = {int(each["id"]): each for each in described.get("added_tokens") or ()}
        merges = [" ".join(each) if isinstance(each, list) else str(each) for each in model.get("merges") or ()]
        tokens, kinds = [f"[PAD{index}]" for index in range(size)], [_UNUSED] * size
        for token, index in vocabulary.items():
            if index < size:
                tokens[index], kinds[index] = token, _NORMAL
        for index, each in added.items():
            if index < size:
                tokens[index], kinds[index] = str(each["content"]), _CONTROL if each.get("special") else _USER
        rest: dict[str, Any] = {
            "special": _special(settings, config, tokens),
            "begins_with_bos": _begins_with_bos(described, settings),
            "template": _template(folder, settings),
        }
        if model.get("byte_fallback"):
            return cls._sentencepiece(described, model, tokens, kinds, merges, rest)
        pre = _split_name(described, merges)
        # llama.cpp does not load an empty list; this one changes no tokenization, as no token is called so
        return cls("gpt2", pre, tokens, kinds, None, merges or ["` ~"], **rest)

    @classmethod
    def _sentencepiece(
        cls,
        described: Mapping[str, Any],
        model: Mapping[str, Any],
        tokens: list[str],
        kinds: list[int],
        merges: list[str],
        rest: dict[str, Any],
    ) -> Vocabulary:
        rank: dict[str, int] = {}
        for index, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), index)
        for index, token in enumerate(tokens):
            if token == model.get("unk_token"):
                kinds[index] = _UNKNOWN
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[index] = _BYTE
        # Tokens that no merge makes are single characters; sentencepiece gives what is merged first the highest score
        scores = [-float(rank.get(token, len(merges))) for token in tokens]
        told = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
        prefix = '"Prepend"' in told or '"always"' in told or '"first"' in told
        kinds_of = {str(part.get("type")) for part in (*_parts(described, "normalizer"), *_splitters(described))}
        if other := sorted(kinds_of - {"Prepend", "Replace", "Metaspace"}):
            raise _cannot(
                f"a tokenizer with {' and '.join(other)} before its merges", "only sentencepiece's way is known"
            )
        return cls("llama", "default", tokens, kinds, scores, None, **rest, space_prefix=prefix)

    def write(self, writer: Any) -> None:
        """Put it into a GGUF file that is being written."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_prefix)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.begins_with_bos)
        if self.template:
            writer.add_chat_template(self.template)


def _special(settings: Mapping[str, Any], config: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    found = {}
    for name in ("bos", "eos", "unk", "pad"):
        # Without one llama.cpp takes a number of its own for the end of a text: that of GPT-2 or of Llama 2
        known = config.get(f"{name}_token_id")
        known = known[0] if isinstance(known, list) and known else known
        if isinstance(known, int) and 0 <= known < len(tokens):
            found[name] = known
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str) and text in tokens:
            found[name] = tokens.index(text)
    return found


def _begins_with_bos(described: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    if isinstance(settings.get("add_bos_token"), bool):
        return bool(settings["add_bos_token"])
    bos = settings.get("bos_token")
    text = bos.get("content") if isinstance(bos, Mapping) else bos
    # A template of the post-processor that begins with it
    return f'[{{"SpecialToken": {{"id": "{text}"' in json.dumps(described.get("post_processor"), ensure_ascii=False)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((each.get("template") for each in template if each.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _parts(described: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json, whether there is one or a sequence."""
    step = described.get(name) or {}
    steps = step.get("normalizers") or step.get("pretokenizers") or [step]
    return [each for each in steps if each]


def _splitters(described: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _parts(described, "pre_tokenizer")


def _split_name(described: Mapping[str, Any], merges: list[str]) -> str:
    """llama.cpp's name of how byte-level BPE splits a text. Raises UserError for a way that it has none for."""
    if changed := sorted({str(part.get("type")) for part in _parts(described, "normalizer")} - {"NFC"}):
        raise _cannot(f"a tokenizer that changes texts by {' and '.join(changed)}", "llama.cpp has no such step")
    parts = _splitters(described)
    kinds = [part.get("type") for part in parts]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(byte_level) == 1 and not byte_level[0].get("add_prefix_space"):
        own = bool(byte_level[0].get("use_regex", True))
        whole = bool((described.get("model") or {}).get("ignore_merges"))
        if not merges:
            return "gpt-2"  # every byte is a token, however a text is split
        if kinds == ["ByteLevel"] and own and not whole:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own and not whole and parts[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own:
            name = _SPLITS.get(str(parts[0]["pattern"].get("Regex")))
            if name is not None and (name == "llama-bpe" or not whole):  # llama.cpp does that for this name alone
                return name
    raise _cannot(
        "a tokenizer that splits texts in a way of its own", "llama.cpp's converter may know it; add the factors"
    )


def _cannot(got: str, do: str) -> UserError:
    return UserError("--engine gguf", got=got, rule="llama.cpp must split texts as the tokenizer does", do=do)
