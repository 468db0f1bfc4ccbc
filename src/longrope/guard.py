"""What is asked of a checkpoint's files before a library reads them: they are inside, whole, and of a possible size."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from longrope import seals
from longrope.errors import UserError, shown
from longrope.files import read_object

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_WEIGHTS = ".safetensors"
_MOST_LAYERS = 10_000  # a class makes lists and modules of them before anything can be compared with the weights
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("vocab_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "n_inner", *_EXPERTS)
_PACKED = 16  # numbers in one of a quantised weight, at most


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file of a folder lies there, links followed; those of the Hub's cache lie in its blobs."""
    folder, place = folder.resolve(), path.resolve()
    cached = folder.parent.name == "snapshots" and place.is_relative_to(folder.parents[1] / "blobs")
    return cached or place.is_relative_to(folder)


def files_to_copy(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint's folder by name. Raises UserError for a link that leaves it: a copy may be published.

    Weights may be linked, as they are large; they hold nothing but weights.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        if path.suffix != _WEIGHTS and not is_inside(folder, path):
            got, rule = f"{path}, a link to {path.resolve()}", "what is copied lies in the checkpoint's folder"
            raise UserError("model", got=got, rule=rule, do="put the file itself there, or remove the link")
        yield path


def check_files(name: str, source: str) -> None:
    """Raise UserError for a folder without safetensors, with one that is not whole, or that names files elsewhere.

    Also for a checkpoint of a run whose files have changed since the run ended. Weights that are links to another
    folder are told of. Of the Hub nothing is read.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    seals.check_folder(folder)
    if (folder / _ADAPTER).exists():
        rule = "weights are those of one whole model, and an adapter names a base of its own"
        raise UserError("model", got=f"{name} with {_ADAPTER}", rule=rule, do="merge the adapter, or take it out")
    files = _weights(folder)
    if not files:
        found = sorted(path.name for path in folder.glob("*.bin")) or ["no weights"]
        raise UserError(
            "model",
            got=f"{name} with {found[0]}",
            rule="weights are read from safetensors only",
            do="restore the .safetensors files, or convert the checkpoint with save_pretrained",
        )
    if (folder / _INDEX).exists():
        _check_index(folder)
    for path in files:
        try:
            with safe_open(path, "pt"):  # reads the header and compares it with the size of the file
                pass
        except (SafetensorError, OSError) as error:
            rule = "a safetensors file is whole"
            raise UserError("model", got=f"{path} ({error})", rule=rule, do="copy or download it again") from None
        if not is_inside(folder, path):
            logger.info("weights are read from %s, to which %s is a link", path.resolve(), path)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{_WEIGHTS}") if path.is_file() or not path.exists())


def _check_index(folder: Path) -> None:
    """Raise UserError unless the index of shards names safetensors in the folder itself."""
    path, do = folder / _INDEX, "restore the file"
    named = read_object(path, "index of weights").get("weight_map")
    if not isinstance(named, Mapping) or not named:
        raise UserError("index of weights", got=path, rule="weight_map says which file holds which weight", do=do)
    for file in dict.fromkeys(map(str, named.values())):
        if Path(file).name != file or not file.endswith(_WEIGHTS):
            got, rule = f"{path} with {shown(file)}", "weights are safetensors in the checkpoint's folder"
            raise UserError("index of weights", got=got, rule=rule, do=do)
        if not (folder / file).is_file():
            got, rule = f"{path} with {shown(file)}, which does not exist", "every file of weights is there"
            raise UserError("index of weights", got=got, rule=rule, do="copy or download it again")


def check_sizes(name: str, source: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a parsed config.json that describes a model far larger than the weights beside it.

    A class would first be built, and its memory taken, before that is seen. Where there are no weights to compare with,
    only what no model has is refused.
    """
    folder = Path(source)
    tensors, numbers = _count(folder) if folder.is_dir() else (0, 0)
    for part in _parts(config):
        layers = _largest(part, _LAYERS)
        most = min(_MOST_LAYERS, tensors) if tensors else _MOST_LAYERS
        if layers > most:
            raise _too_large(name, "layers", layers, f"of which {most} can be there")
        width = _largest(part, ("hidden_size", "n_embd", "d_model"))
        for key in _WIDTHS:
            size = max(1, width) * _largest(part, (key,))
            if numbers and size > _PACKED * numbers:
                raise _too_large(name, f"weights for its {key}", size, f"and the files hold {numbers:,} in all")


def _count(folder: Path) -> tuple[int, int]:
    """How many tensors, and how many numbers, the weights of a folder say they hold."""
    tensors = numbers = 0
    for path in _weights(folder):
        try:
            with safe_open(path, "pt") as opened:
                keys = list(opened.keys())
                numbers += sum(math.prod(opened.get_slice(key).get_shape()) for key in keys)
                tensors += len(keys)
        except (SafetensorError, OSError):
            continue  # `check_files` says it
    return tensors, numbers


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those inside it, whatever they are called."""
    waiting: list[object] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting += part.values()


def _largest(part: Mapping[str, Any], keys: tuple[str, ...]) -> float:
    values = (part.get(key) for key in keys)
    return max((value for value in values if isinstance(value, int | float) and value > 0), default=0)


def _too_large(name: str, what: str, size: float, rule: str) -> UserError:
    got = f"{name} with {shown(size)} {what}"
    return UserError("model", got=got, rule=f"config.json describes the weights, {rule}", do="restore config.json")


def check_attention(name: str, config: Any) -> None:
    """Raise UserError for a configuration that names a kernel of the Hub: compiled code, which nobody asked for."""
    for part in (config, config.get_text_config()):
        wanted = str(getattr(part, "_attn_implementation", None))
        if "/" in wanted:
            got, rule = f"{name} with attention {shown(wanted)}", "code from elsewhere runs only where it is asked for"
            raise UserError("model", got=got, rule=rule, do="take it out of config.json, or give it as --attention")
