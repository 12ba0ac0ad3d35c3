"""The scales of DeepSeek-V3's FP8 blocks (V3 paper, 3.3): what the largest of a block's numbers is divided by."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from config import UE8M0

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # keeps the scale of an all-zero group away from 0


def scale_of_ref(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """s = max(amax, 1e-4) / 448, for ue8m0 rounded up to a power of two: s = 2 ** ceil(log2 s)."""
    # A tensor divisor: torch divides by a Python number on CUDA through its reciprocal, which rounds differently.
    scale = amax.clamp(min=MIN_AMAX) / torch.full_like(amax, E4M3_MAX)
    if scale_fmt == UE8M0:
        bits = scale.view(torch.int32)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)
    return scale


@triton.jit
def scale_of(amax, MIN_AMAX: tl.constexpr, E4M3_MAX: tl.constexpr, UE8M0: tl.constexpr):
    scale = tl.math.div_rn(tl.maximum(amax, MIN_AMAX), E4M3_MAX)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return scale
