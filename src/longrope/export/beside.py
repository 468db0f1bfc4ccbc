"""An export beside the model it was made of: weights, and logits of the engine itself where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longrope.checkpoint import LoadOptions, model_source
from longrope.export.engines import row_of_engine
from longrope.export.said import Said
from longrope.factors import FactorTable, RopeFactors
from longrope.model import LoadedModel, load_model

# Logits of the same weights in two programs, of f32 and of rounded weights
_SAME, _ROUNDED = 0.02, 0.5
# A text of a real model's boundary takes minutes; factors are compared for every length
_LONGEST = 4096


def beside_model(
    path: Path, against: str, served: FactorTable, engine: str, window: str, options: LoadOptions
) -> Iterator[Said]:
    """A folder: weights byte for byte, and logits of stock transformers and of mlx-lm on both sides of the boundary."""
    source = Path(model_source(against))
    if source.is_dir():
        names = sorted(each.name for each in source.glob("*.safetensors"))
        same = names == sorted(each.name for each in path.glob("*.safetensors")) and all(
            _same_bytes(source / name, path / name) for name in names
        )
        yield Said("weights", same, "those of the model, byte for byte" if same else "others than those of the model")
    ours = load_model(against, options)
    ours.check(served)
    longest = served.rows[-1].up_to
    stock: Any = load_model(str(path), LoadOptions(**{**vars(options), "own_factors": False}))
    beyond = min(served.original_length + 1, longest)
    lengths = sorted({min(32, longest), min(served.original_length, 512), *([beyond] if beyond <= _LONGEST else [])})
    gap = 0.0
    for length in lengths:
        stock.widen_window(length)
        row = row_of_engine(served, "transformers", window, length, longest)
        with torch.inference_mode():
            theirs = stock.model(torch.tensor([_ids(ours, length)])).logits[0].float().numpy()
        gap = max(gap, _gap(ours, row, theirs))
    told = f"largest gap of stock transformers to ours {gap:.2g}, at {' and '.join(map(str, lengths))} tokens"
    if beyond > _LONGEST and served.rows[0].rescale != served.rows[-1].rescale:
        told += ": the long factors, used from a longer text on, were not run"
    yield Said("logits", gap < _SAME, told)
    if engine in ("vllm", "sglang"):
        yield Said("engine", None, f"{engine} itself was not run: its rules were read in its source")
    elif engine == "mlx":
        yield _mlx(path, ours, served, lengths)


def _ids(ours: LoadedModel, length: int) -> list[int]:
    vocabulary = ours.model.config.get_text_config().vocab_size
    return [token % vocabulary for token in range(length)]


def _gap(ours: LoadedModel, row: RopeFactors, theirs: NDArray[Any]) -> float:
    """Largest difference of an engine's logits (T, V or more) of `_ids` to ours under a row."""
    ours.widen_window(row.up_to)
    with ours.patch() as patch, torch.inference_mode():
        patch.install(row)
        whole: Any = ours.model
        mine = whole(torch.tensor([_ids(ours, len(theirs))])).logits[0].float().numpy()
    return float(np.abs(mine - theirs[:, : mine.shape[1]]).max())


def _mlx(path: Path, ours: LoadedModel, served: FactorTable, lengths: list[int]) -> Said:
    """Logits of mlx-lm, which has the long factors at every length, in float32."""
    if importlib.util.find_spec("mlx_lm") is None:
        return Said("engine", None, "mlx-lm is not installed: it was not run")
    import mlx.core as mx
    from mlx_lm.utils import load_model as load

    gap = 0.0
    try:
        model = load(path, lazy=True)[0]
        model.set_dtype(mx.float32)
        for length in lengths:
            theirs = np.array(model(mx.array([_ids(ours, length)])).astype(mx.float32))[0]
            gap = max(gap, _gap(ours, served.rows[-1], theirs))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Said("logits", False, f"mlx-lm does not load it: {' '.join(str(error).split())[:160]}")
    return Said("logits", gap < _SAME, f"largest gap of mlx-lm to ours {gap:.2g}")


def _same_bytes(first: Path, second: Path) -> bool:
    if first.stat().st_size != second.stat().st_size:
        return False
    with first.open("rb") as one, second.open("rb") as other:
        while piece := one.read(2**24):
            if piece != other.read(2**24):
                return False
    return True


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


def beside_llama_cpp(
    path: Path, against: str, served: FactorTable, window: str, options: LoadOptions
) -> Iterator[Said]:
    """Logits of llama.cpp beside ours, where llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        yield Said("engine", None, "llama-cpp-python is not installed: llama.cpp itself was not run")
        return
    ours = load_model(against, options)
    ours.check(served)
    limit = _SAME if path.name.endswith("-f32.gguf") else _ROUNDED
    longest = served.rows[-1].up_to
    for wanted in sorted({min(served.original_length, 512), min(served.original_length + 64, longest, _LONGEST)}):
        length = max(8, wanted - 8)
        engine = open_llama(path, wanted)
        context = int(engine.n_ctx())  # more than was asked for: it rounds up
        engine.eval(_ids(ours, length))
        gap = _gap(ours, row_of_engine(served, "gguf", window, length, context), np.array(engine.scores[:length]))
        engine.close()
        yield Said("logits", gap < limit, f"largest gap of llama.cpp to ours {gap:.2g}, with a context of {context}")
