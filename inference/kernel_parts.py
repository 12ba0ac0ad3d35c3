"""
What several kernels are made of: the scales of DeepSeek-V3's FP8 blocks (V3 paper, 3.3), by which a block's numbers are
divided, the gated activation, and a prefetch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from config import UE8M0

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
MIN_AMAX = 1e-4  # keeps the scale of an all-zero group away from 0
_E4M3_MAX, _MIN_AMAX = tl.constexpr(E4M3_MAX), tl.constexpr(MIN_AMAX)  # as kernels see them


def scale_of_ref(amax: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """s = max(amax, 1e-4) / 448, for ue8m0 rounded up to a power of two: s = 2 ** ceil(log2 s)."""
    # A tensor divisor: torch divides by a Python number on CUDA through its reciprocal, which rounds differently.
    scale = amax.clamp(min=MIN_AMAX) / torch.full_like(amax, E4M3_MAX)
    if scale_fmt == UE8M0:
        bits = scale.view(torch.int32)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0)) << 23).view(torch.float32)
    return scale


@triton.jit
def scale_of(amax, UE8M0: tl.constexpr):
    scale = tl.math.div_rn(tl.maximum(amax, _MIN_AMAX), _E4M3_MAX)
    if UE8M0:
        bits = scale.to(tl.int32, bitcast=True)
        scale = (((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def quantise_groups(x, UE8M0: tl.constexpr):
    """
    x [groups, 128] fp32 -> x / s, to be cast to e4m3, and s [groups], as act_quant does.

    A division is 10 instructions and a branch. One a group, r = 1 / s, does: with q = x r, q - (q s - x) r is x / s
    rounded once, and of zeros it keeps the sign.
    """
    scale = scale_of(tl.max(tl.abs(x), 1), UE8M0)
    inverse = tl.math.div_rn(1.0, scale)[:, None]
    quotient = x * inverse
    excess = tl.fma(quotient, scale[:, None], x * -1.0)  # Triton's -x is 0 - x, which has no negative zero
    return tl.fma(excess, inverse * -1.0, quotient), scale


@triton.jit
def silu_times(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up in fp32, rounded to DTYPE where separate operations would round, but for the product."""
    gate = gate.to(DTYPE).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(DTYPE).to(tl.float32) * up.to(DTYPE).to(tl.float32)


@triton.jit
def prefetch(ptrs):
    """Start fetching the cache lines at `ptrs` into L2."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
