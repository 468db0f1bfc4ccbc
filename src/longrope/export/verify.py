"""What an exported folder or file says when it is read back, and what its engine will do with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope.checkpoint import LoadOptions, as_model
from longrope.configs import language_part, table_from_config
from longrope.doctor.examine import examine, read_config
from longrope.errors import UserError
from longrope.export.beside import beside_llama_cpp, beside_model
from longrope.export.engines import (
    check_family,
    check_names,
    engine_attention_factors,
    losses,
    missing_keys,
)
from longrope.export.gguf_file import check_architecture, check_graph, import_gguf
from longrope.export.said import Said
from longrope.export.skeleton import skeleton
from longrope.export.transformers import verify_config
from longrope.factors import FACTORS, FactorTable

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


def verify(
    path: str | Path,
    *,
    against: str | Path | None = None,
    engine: str | None = None,
    options: LoadOptions | None = None,
) -> list[Said]:
    """Read an exported folder or GGUF file back; each thing that was looked at is ok, is not, or only said.

    path: the folder or the file. options: how the model is loaded, on the CPU in float32 by default.
    against: the MODEL it was made of, with whose weights and factors it is compared; its logits, too, where the engine
    is installed. engine: whose rules hold; by default the one that it was exported for. Raises UserError for what is no
    export.
    """
    path, options = Path(path), options or LoadOptions(device="cpu", dtype="float32")
    against = None if against is None else as_model(against)
    if not path.exists():
        raise UserError("verify", got=f"{path}, which does not exist", rule="it is an export", do="check the path")
    path = path.parent if path.name == "config.json" else path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if files and files[0].suffix == ".gguf":
        beside = files[0].parent / FACTORS
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
        got, rule = f"{path} without {FACTORS}", "an export has it beside config.json"
        raise UserError("verify", got=got, rule=rule, do="use doctor for a configuration alone")
    engine = engine or str(served.provenance.get("engine", "transformers"))
    check_names(engine, window := str(served.provenance.get("window", _window(served))))
    text = language_part(config)
    try:
        written = table_from_config(text)
    except UserError as error:
        yield Said("factors", False, str(error))
        return
    yield _same_factors(served, written)
    lengths = written.original_length, written.rows[-1].up_to
    wanted = served.original_length, served.rows[-1].up_to
    told = f"original {lengths[0]}, longest {lengths[1]}"
    same = lengths == wanted
    yield Said("lengths", same, told if same else f"{told}; factors.json has {wanted[0]} and {wanted[1]}")
    if lacking := missing_keys(text, served, engine):
        yield Said("keys", False, f"{engine} does not find {', '.join(lacking)} as factors.json has it")
    yield _attention(written, served, text, engine)
    yield from _cannot(served, engine, window, text)
    if engine == "gguf":
        yield from _no_gguf(path, config, text, served)
    alike = written.rows[0].rescale == written.rows[-1].rescale
    regime = _REGIMES[engine].format(original=served.original_length)
    yield Said("regime", None, f"both lists are equal: {engine} has one regime" if alike else regime)
    yield Said("ignored", None, f"{engine} ignores {_IGNORED[engine]}")
    errors = [finding for finding in examine(config, folder) if finding.severity == "error"]
    yield Said(
        "configuration", not errors, "; ".join(finding.what for finding in errors) or "the doctor finds no errors"
    )
    try:
        verify_config(path, skeleton(str(path), options), written)
        yield Said("rotation", True, "stock transformers rotates by these factors on both sides of the boundary")
    except UserError as error:
        yield Said("rotation", False, str(error))
    if against is not None:
        yield from beside_model(path, against, served, engine, window, options)


def _same_factors(served: FactorTable, written: FactorTable) -> Said:
    pairs = [(served.rows[0].rescale, written.rows[0].rescale), (served.rows[-1].rescale, written.rows[-1].rescale)]
    same = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-6) for a, b in pairs)
    return Said("factors", same, "those of factors.json" if same else "others than those of factors.json")


def _attention(written: FactorTable, served: FactorTable, text: Mapping[str, Any], engine: str) -> Said:
    """Whether the attention factors that an engine comes to are those of the table that it is to serve."""
    found = engine_attention_factors(text, written, engine)
    wanted = served.rows[0].attention_factor, served.rows[-1].attention_factor
    same = all(a is not None and math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, wanted, strict=True))
    told = " and ".join("none" if each is None else f"{each:.6g}" for each in dict.fromkeys(found))
    return Said("attention factor", same, f"{told} in {engine}")


def _cannot(served: FactorTable, engine: str, window: str, text: Mapping[str, Any]) -> Iterator[Said]:
    """What an engine cannot do with a table, or at all with a model."""
    try:
        check_family(engine, text)
    except UserError as error:
        yield Said("engine", False, str(error))
    for loss in losses(served, engine, window, str(text.get("model_type"))):
        if not loss.startswith("attention factor"):  # which is compared by itself
            yield Said("engine", False, loss)


def _no_gguf(path: Path, config: Mapping[str, Any], text: Mapping[str, Any], served: FactorTable) -> Iterator[Said]:
    """Why no GGUF file can be made of a folder: llama.cpp's graphs of most classes use no factors."""
    try:
        check_architecture(config, path)
        if "hidden_act" in text:  # else it is the class's, silu in all that are written
            check_graph(text, served)
    except UserError as error:
        yield Said("engine", False, str(error))


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
        got = f"{path} without {FACTORS} beside it"
        raise UserError("verify", got=got, rule="an export has it", do="give the folder that was exported")
    window = str(served.provenance.get("window", _window(served)))
    always = tensors.get("rope_freqs.weight")
    ones = np.ones(served.rotary_dim // 2)
    short = tensors.get("rope_factors_short.weight", ones if always is None else always)
    long = tensors.get("rope_factors_long.weight", ones if always is None else always)
    rows = served.rows
    pairs = [(short, rows[0].rescale), (long, rows[-1].rescale)]
    same = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-6) for a, b in pairs)
    yield Said("factors", same, f"{', '.join(sorted(tensors)) or 'none, which are all 1'}")
    theta, turned = value("rope.freq_base"), value("rope.dimension_count")
    same = turned == served.rotary_dim and theta is not None and math.isclose(theta, served.rope_theta, rel_tol=1e-6)
    yield Said("rotation", same, f"rope_theta {theta} of {turned} dimensions")
    context = value("context_length")
    yield Said("lengths", context == rows[-1].up_to, f"context {context}")
    factor = value("rope.scaling.attn_factor")
    found = 1.0 if factor is None else float(factor)
    yield Said("attention factor", math.isclose(found, rows[-1].attention_factor, rel_tol=1e-6), f"{found:.6g}")
    both = "rope_factors_long.weight" in tensors
    original = value("rope.scaling.original_context_length")
    yield Said("original length", not both or original == served.original_length, _or_none(original))
    kind = value("rope.scaling.type")
    yield Said("scaling", kind == ("longrope" if both else None), _or_none(kind))
    forbidden = [] if value("rope.scaling.factor") is None else ["rope.scaling.factor"]
    forbidden += ["rope_freqs.weight beside the lists"] if both and always is not None else []
    yield Said("configuration", not forbidden, ", ".join(forbidden) or "nothing that scales a second time")
    told = _REGIMES["gguf"].format(original=original) if both else "llama.cpp uses these factors at every length"
    yield Said("regime", None, told)
    if against is not None:
        yield from beside_llama_cpp(path, against, served, window, options)


def _or_none(value: object) -> str:
    """What a file says, or that it says nothing."""
    return "none is written" if value is None else f"{value}"
