"""Machines as `--gpus` names them: how many devices, the memory of each, and its peak in bf16."""

from __future__ import annotations

import re
from dataclasses import dataclass

from longrope.errors import UserError

_GIGABYTE = 1e9
# Dense bf16 FLOP/s with float32 sums, as the makers state them.
_PEAKS = {
    "A100-40GB": 312e12,
    "A100-80GB": 312e12,
    "L40S-48GB": 362e12,
    "RTX4090-24GB": 165e12,
    "H100-80GB": 989e12,
    "H200-141GB": 989e12,
    "B200-180GB": 2250e12,
}
_USABLE = 0.9
"""Share of a GPU's memory that tensors may fill: the rest is CUDA's, the libraries', and gaps between blocks."""
GPUS_A_NODE = 8
"""How many one machine of a cluster has."""
_FORM = re.compile(r"(?:(\d{1,5})x)?((?:[A-Za-z][\w]*-)?(\d{1,4})GB)", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """count: devices. bytes_each: memory of one that tensors may fill. peak: FLOP/s of one, None where nobody said."""

    name: str
    count: int
    bytes_each: float
    peak: float | None
    kind: str = "cuda"


def machine_of(text: str, peak: float | None = None) -> Machine:
    """The machine of words such as `8xH100-80GB`, or `8x80GB` with the peak of one device in FLOP/s given apart.

    Raises UserError for a device that is not known and does not say its memory alone.
    """
    match = _FORM.fullmatch(text.strip())
    known = {name.lower(): name for name in _PEAKS}
    if match is None or int(match[1] or 1) < 1 or int(match[3]) < 1:
        raise _unknown(text)
    name = match[2]
    if "-" in name:
        if name.lower() not in known:
            raise _unknown(text)
        name = known[name.lower()]
        peak = peak or _PEAKS[name]
    count = int(match[1] or 1)
    return Machine(f"{count}x{name}", count, _USABLE * _GIGABYTE * int(match[3]), peak)


def _unknown(text: str) -> UserError:
    rule = f"it is a number of devices and one of {', '.join(_PEAKS)}, or their memory alone such as 8x80GB, or cpu"
    return UserError("--gpus", got=repr(text), rule=rule, do="write it like 8xH100-80GB, or 8x80GB with --flops")
