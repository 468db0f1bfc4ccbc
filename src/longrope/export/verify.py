"""What an exported folder or file says when it is read back, and what its engine will do with it."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope.checkpoint import FACTORS_FILE, LoadOptions, model_source
from longrope.configs import language_part, table_from_config
from longrope.doctor.examine import examine, read_config
from longrope.errors import UserError
from longrope.export.engines import check_names, row_of_engine
from longrope.export.gguf_file import import_gguf
from longrope.export.skeleton import skeleton
from longrope.export.transformers import verify_config
from longrope.factors import FactorTable
from longrope.model import load_model

# Logits of the same weights in two programs, of f32 and of rounded weights
_SAME, _ROUNDED = 0.02, 0.5
_REGIMES = {
    "transformers": "transformers uses the long factors for a batch whose longest text is beyond {original} tokens",
    "vllm": "vLLM uses the long factors for everything where --max-model-len is beyond {original} tokens",
    "sglang": "SGLang uses one list of factors at every length",
    "mlx": "mlx-lm uses the long factors at every length",
    "gguf": "llama.cpp uses the long factors for everything where its context (-c) is beyond {original} tokens",
}
_IGNORED = {
    "transformers": "short_mscale and long_mscale",
    "vllm": "attention_factor and factor: it reads short_mscale and long_mscale",
    "sglang": "attention_factor and factor: it reads short_mscale and long_mscale",
    "mlx": "short_factor and attention_factor: it computes that from the lengths",
    "gguf": "nothing that is in the file",
}


@dataclass(frozen=True)
class Said:
    """One thing that was looked at: ok, or not, or None for what is good to know."""

    name: str
    ok: bool | None
    what: str

    def told(self) -> dict[str, Any]:
        """As a document."""
        return dict(vars(self))


def verify(
    path: str | Path, *, against: str | None = None, engine: str | None = None, options: LoadOptions | None = None
) -> list[Said]:
    """Read an exported folder or GGUF file back; each thing that was looked at is ok, is not, or only said.

    path: the folder or the file. options: how the model is loaded, on the CPU in float32 by default.
    against: the MODEL it was made of, with whose weights and factors it is compared; its logits, too, where the engine
    is installed. engine: whose rules hold; by default the one that it was exported for. Raises UserError for what is no
    export.
    """
    path, options = Path(path), options or LoadOptions(device="cpu", dtype="float32")
    if not path.exists():
        raise UserError("verify", got=f"{path}, which does not exist", rule="it is an export", do="check the path")
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if files and files[0].suffix == ".gguf":
        beside = files[0].parent / FACTORS_FILE
        table = FactorTable.load(beside) if beside.is_file() else None
        return list(_gguf(files[0], table, against, options))
    return list(_folder(path, against, engine, options))


def _window(table: FactorTable) -> str:
    rows = table.rows
    if rows[-1].up_to <= table.original_length:
        return "short"
    return "long" if rows[0].rescale == rows[-1].rescale else "dynamic"


def _folder(path: Path, against: str | None, engine: str | None, options: LoadOptions) -> Iterator[Said]:
    _, config, folder = read_config(path)
    served = folder.table
    if served is None:
        got, rule = f"{path} without {FACTORS_FILE}", "an export has it beside config.json"
        raise UserError("verify", got=got, rule=rule, do="use doctor for a configuration alone")
    engine = engine or str(served.provenance.get("engine", "transformers"))
    check_names(engine, window := str(served.provenance.get("window", _window(served))))
    written = table_from_config(language_part(config))
    yield _same_factors(served, written.rows[0].rescale, written.rows[-1].rescale)
    lengths = written.original_length, written.rows[-1].up_to
    wanted = served.original_length, served.rows[-1].up_to
    yield Said("lengths", lengths == wanted, f"original {lengths[0]}, longest {lengths[1]}")
    yield _attention(served, written.rows[-1].attention_factor, config, engine)
    original = served.original_length
    alike = written.rows[0].rescale == written.rows[-1].rescale
    told = f"both lists are equal: {engine} has one regime" if alike else _REGIMES[engine].format(original=original)
    yield Said("regime", None, told)
    yield Said("ignored", None, f"{engine} ignores {_IGNORED[engine]}")
    errors = [finding for finding in examine(config, folder) if finding.severity == "error"]
    yield Said(
        "configuration", not errors, "; ".join(finding.what for finding in errors) or "the doctor finds no errors"
    )
    try:
        loaded = skeleton(str(path), options)
        same = table_from_config(language_part(config))
        verify_config(path, loaded, same)
        yield Said("rotation", True, "stock transformers rotates by these factors on both sides of the boundary")
    except UserError as error:
        yield Said("rotation", False, str(error))
    if against is not None:
        yield from _beside(path, against, served, engine, window, options)


def _same_factors(served: FactorTable, short: tuple[float, ...], long: tuple[float, ...]) -> Said:
    pairs = [(served.rows[0].rescale, short), (served.rows[-1].rescale, long)]
    same = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-6) for a, b in pairs)
    return Said("factors", same, "those of factors.json" if same else "others than those of factors.json")


def _attention(served: FactorTable, found: float, config: Mapping[str, Any], engine: str) -> Said:
    rope = language_part(config).get("rope_parameters") or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, Mapping) else {}
    first, last = served.rows[0].attention_factor, served.rows[-1].attention_factor
    if engine in ("vllm", "sglang"):
        given = [rope.get("short_mscale"), rope.get("long_mscale")]
        same = all(isinstance(a, int | float) and math.isclose(a, b) for a, b in zip(given, (first, last), strict=True))
        return Said("attention factor", same, f"short_mscale {given[0]}, long_mscale {given[1]}")
    return Said("attention factor", math.isclose(found, last, rel_tol=1e-6), f"{found:.6g}")


def _beside(
    path: Path, against: str, served: FactorTable, engine: str, window: str, options: LoadOptions
) -> Iterator[Said]:
    """An export beside the model it was made of: weights, and logits on both sides of the boundary."""
    source = Path(model_source(against))
    if source.is_dir():
        names = sorted(each.name for each in source.glob("*.safetensors"))
        same = names == sorted(each.name for each in path.glob("*.safetensors")) and all(
            _same_bytes(source / name, path / name) for name in names
        )
        yield Said("weights", same, "those of the model, byte for byte" if same else "others than those of the model")
    ours, stock = (
        load_model(against, options),
        load_model(str(path), LoadOptions(**{**vars(options), "own_factors": False})),
    )
    ours.check(served)
    longest = served.rows[-1].up_to
    gap = 0.0
    for length in sorted(
        {min(32, longest), min(served.original_length, 512), min(served.original_length + 1, longest)}
    ):
        if length > 4096:
            continue  # a text of a real model's boundary takes minutes: its factors were compared
        ids = torch.arange(length)[None] % ours.model.config.get_text_config().vocab_size
        row = row_of_engine(served, "transformers", window, length, longest)
        stock.widen_window(length)
        ours.widen_window(length)
        with ours.patch() as patch, torch.inference_mode():
            patch.install(row)
            whole: Any = ours.model
            other: Any = stock.model
            gap = max(gap, float((whole(ids).logits - other(ids).logits).abs().max()))
    yield Said("logits", gap < _SAME, f"largest gap of stock transformers to ours {gap:.2g}")
    if engine in ("vllm", "sglang"):
        yield Said("engine", None, f"{engine} itself was not run: its rules were read in its source")


def _same_bytes(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as one, second.open("rb") as other:
        while piece := one.read(2**24):
            if piece != other.read(2**24):
                return False
    return True


def gguf_fields(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """(metadata, factor tensors) of a GGUF file. Raises UserError for a file that is none."""
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
        tensors = {each.name: np.array(each.data) for each in reader.tensors if each.name.startswith("rope_")}
    except (ValueError, KeyError, IndexError, OSError) as error:
        got, rule = f"{path} ({' '.join(str(error).split())[:120]})", "it is a whole GGUF file"
        raise UserError("verify", got=got, rule=rule, do="export it again") from None
    return fields, tensors


def _gguf(path: Path, served: FactorTable | None, against: str | None, options: LoadOptions) -> Iterator[Said]:
    fields, tensors = gguf_fields(path)
    family = str(fields.get("general.architecture"))

    def value(name: str) -> Any:
        return fields.get(f"{family}.{name}")

    if served is None:
        got = f"{path} without {FACTORS_FILE} beside it"
        raise UserError("verify", got=got, rule="an export has it", do="give the folder that was exported")
    window = str(served.provenance.get("window", _window(served)))
    always = tensors.get("rope_freqs.weight")
    ones = np.ones(served.rotary_dim // 2)
    short = tensors.get("rope_factors_short.weight", ones if always is None else always)
    long = tensors.get("rope_factors_long.weight", ones if always is None else always)
    rows = served.rows
    same = np.allclose(long, rows[-1].rescale, rtol=1e-6) and (
        window != "dynamic" or np.allclose(short, rows[0].rescale, rtol=1e-6)
    )
    yield Said("factors", bool(same), f"{', '.join(sorted(tensors)) or 'none, which are all 1'}")
    context = value("context_length")
    yield Said("lengths", context == rows[-1].up_to, f"context {context}")
    factor = value("rope.scaling.attn_factor")
    found = 1.0 if factor is None else float(factor)
    yield Said("attention factor", math.isclose(found, rows[-1].attention_factor, rel_tol=1e-6), f"{found:.6g}")
    both = "rope_factors_long.weight" in tensors
    original = value("rope.scaling.original_context_length")
    yield Said("original length", not both or original == served.original_length, f"{original}")
    forbidden = [name for name in ("rope.scaling.factor",) if value(name) is not None] + (
        ["rope_freqs.weight beside the lists"] if both and always is not None else []
    )
    yield Said("configuration", not forbidden, ", ".join(forbidden) or "nothing that scales a second time")
    told = _REGIMES["gguf"].format(original=original) if both else "llama.cpp uses these factors at every length"
    yield Said("regime", None, told)
    if against is not None:
        yield from _llama_cpp(path, against, served, window, options)


def open_llama(path: Path, context: int, threads: int | None = None) -> Any:
    """llama.cpp on a GGUF file with a context of so many tokens, all of whose logits it keeps.

    Without its kernels for weights that are laid out anew: those for AMX end the process on q8_0 (llama-cpp-python
    0.3.36), and what is compared here are the file's numbers.
    """
    from llama_cpp import Llama, llama_cpp

    own = llama_cpp.llama_model_default_params

    def plain() -> Any:
        given = own()
        given.use_extra_bufts = False
        return given

    llama_cpp.llama_model_default_params = plain
    try:
        return Llama(
            str(path), n_ctx=context, n_batch=context, n_threads=threads, logits_all=True, verbose=False, seed=0
        )
    finally:
        llama_cpp.llama_model_default_params = own


def _llama_cpp(path: Path, against: str, served: FactorTable, window: str, options: LoadOptions) -> Iterator[Said]:
    """Logits of llama.cpp beside ours, where llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        yield Said("engine", None, "llama-cpp-python is not installed: llama.cpp itself was not run")
        return
    ours = load_model(against, options)
    ours.check(served)
    rounded = not path.name.endswith("-f32.gguf")
    longest = served.rows[-1].up_to
    for context in sorted({min(served.original_length, 512), min(served.original_length + 64, longest, 4096)}):
        length = max(8, context - 8)
        ids = [int(token) for token in torch.arange(length) % ours.model.config.get_text_config().vocab_size]
        engine = open_llama(path, context)
        engine.eval(ids)
        theirs = np.array(engine.scores[:length])
        with ours.patch() as patch, torch.inference_mode():
            patch.install(row_of_engine(served, "gguf", window, length, context))
            whole: Any = ours.model
            logits = whole(torch.tensor([ids])).logits[0].float().numpy()
        engine.close()
        gap = float(np.abs(logits - theirs[:, : logits.shape[1]]).max())
        limit = _ROUNDED if rounded else _SAME
        yield Said("logits", gap < limit, f"largest gap of llama.cpp to ours {gap:.2g}, with a context of {context}")
