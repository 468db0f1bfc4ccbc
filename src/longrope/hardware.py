"""What the processor of this machine computes fast."""

from __future__ import annotations

import platform
from functools import cache

import torch


@cache
def half_is_fast_on_cpu() -> bool:
    """Whether products of bfloat16 are instructions of this processor (AMX, AVX512-BF16, Arm's BF16).

    Where they are not, torch emulates them, hundreds of times slower than float32 on processors with AVX2 alone.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(each()) for each in asked if each is not None)
