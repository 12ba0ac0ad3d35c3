"""
One token's linears, bound by reading the weights once. Without the tensor cores a warp can ask for 512 bytes of a row
at a time, which an H200's memory serves at 4.7 TB/s, where a pipeline of tiles 128 bytes wide gets 4.2.

Dimension letters: N out features, K in features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from config import BLOCK_SIZE, UE8M0
from gpu import cdiv, counters, pdl_options
from kernel_parts import prefetch, quantise_groups, silu_times

WARPS = 4  # of a program


class Rows(NamedTuple):
    """How one_token_kernel cuts its work."""

    rows: int  # of the weight, of a program: a multiple of WARPS
    split: int  # parts of K
    chunks: int  # of 512 bytes of each row that are asked for at a time
    registers: int  # of a thread, at most: the fewer, the more programs share a multiprocessor


@triton.jit
def one_token_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, y_scale_ptr, partial_ptr, counter_ptr,
    order_ptr, tile_expert_ptr, tile_start_ptr, N, K, x_scale_m, x_scale_g, y_scale_m, y_scale_g,
    FP8: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, CHUNKS: tl.constexpr,
    WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    y = x w^T as in gemm_kernel (kernel.py, whose names these are), for one row of x, or for tiles of one pair. A
    program: ROWS outputs of a TILE, over one of SPLIT parts of K; of each row CHUNKS of 512 bytes are on their way at a
    time. A warp has whole rows and an own copy of x, and so waits for no other.

    On an H200, in V3's step: the experts' gate and up, 264 MB, 3 to 4 us less than gemm_kernel's 69; reading alone is
    59. Not for FP8's other products: e4m3 has to become fp32 here, 2.5 instructions a number, which their short loops
    do not hide.
    """
    PIECES: tl.constexpr = TILE // ROWS
    LINES: tl.constexpr = 4 * triton.next_power_of_2(CHUNKS)  # of 128 bytes
    PER: tl.constexpr = 128 // w_ptr.dtype.element_ty.primitive_bitwidth  # a lane's numbers: 16 bytes
    STEP: tl.constexpr = 32 * PER
    n_tiles = tl.cdiv(N, TILE)
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // (SPLIT * PIECES)
    n_tile = tile % n_tiles
    own = n_tile * TILE + tl.program_id(0) // SPLIT % PIECES * ROWS + tl.arange(0, ROWS)
    n_slices = tl.cdiv(K, BLOCK)
    per_part = tl.cdiv(n_slices, SPLIT)
    begin = part * per_part * BLOCK
    end = tl.minimum(begin + per_part * BLOCK, K)
    k = tl.arange(0, STEP)

    expert = 0
    place = 0
    x_row = 0
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if TOP_K == 0:  # the weights are known: on their way while the kernels before this one finish
            row = tl.minimum(own, N - 1).to(tl.int64)
            column = tl.minimum(begin + tl.arange(0, LINES) * (STEP // 4), K - 1)
            first_lines = w_ptr + row[:, None] * K + column[None, :]
            prefetch(first_lines)
            if HALVES == 2:
                prefetch(first_lines + tl.cast(N, tl.int64) * K)
        tl.extra.cuda.gdc_wait()
    if TOP_K > 0:
        expert = tl.load(tile_expert_ptr + tile // n_tiles)
        if expert < 0:
            return
        place = tl.load(tile_start_ptr + tile // n_tiles)
        x_row = tl.load(order_ptr + place) // TOP_K
    w_row = expert * HALVES * N + tl.minimum(own, N - 1)
    w_ptrs = w_ptr + w_row.to(tl.int64)[:, None] * K + k[None, :]
    up_ptrs = w_ptrs + tl.cast(N, tl.int64) * K
    x_ptrs = x_ptr + tl.cast(x_row, tl.int64) * K + tl.zeros((WARPS, 1), tl.int32) + k[None, :]
    x_scale_ptrs = x_scale_ptr + x_row * x_scale_m
    scale_rows = tl.cdiv(N, BLOCK)
    w_scale_ptrs = w_scale_ptr + (expert * HALVES * scale_rows + n_tile * TILE // BLOCK) * n_slices
    up_scale_ptrs = w_scale_ptrs + scale_rows * n_slices

    acc = tl.zeros((ROWS // WARPS, WARPS, 32), dtype=tl.float32)
    up = acc
    for at in tl.range(begin, end, STEP, loop_unroll_factor=CHUNKS):
        inside = (at + k < end)[None, :]
        w = tl.load(w_ptrs + at, mask=inside, other=0.0)
        if HALVES == 2:
            w_up = tl.load(up_ptrs + at, mask=inside, other=0.0)
        x = tl.load(x_ptrs + at, mask=inside, other=0.0)
        if FP8:
            lane = at + tl.arange(0, 32) * PER
            x_scale = tl.load(x_scale_ptrs + lane // BLOCK * x_scale_g, mask=lane < end, other=0.0)
            scale = x_scale * tl.load(w_scale_ptrs + lane // BLOCK, mask=lane < end, other=0.0)
        x = tl.reshape(x.to(tl.float32), (1, WARPS, 32, PER))
        products = tl.sum(tl.reshape(w.to(tl.float32), (ROWS // WARPS, WARPS, 32, PER)) * x, 3)
        acc += products * scale[None, None, :] if FP8 else products
        if HALVES == 2:
            if FP8:
                scale = x_scale * tl.load(up_scale_ptrs + lane // BLOCK, mask=lane < end, other=0.0)
            products = tl.sum(tl.reshape(w_up.to(tl.float32), (ROWS // WARPS, WARPS, 32, PER)) * x, 3)
            up += products * scale[None, None, :] if FP8 else products
    acc = tl.reshape(tl.sum(acc, 2), (ROWS,))
    if HALVES == 2:
        up = tl.reshape(tl.sum(up, 2), (ROWS,))

    cols = n_tile * TILE + tl.arange(0, TILE)
    if SPLIT * PIECES > 1:  # the program that finishes a tile last sums the parts, in order
        partials = partial_ptr + tile.to(tl.int64) * (SPLIT * HALVES * TILE)
        mine = part * (HALVES * TILE) + own - n_tile * TILE
        tl.store(partials + mine, acc, mask=own < N)
        if HALVES == 2:
            tl.store(partials + TILE + mine, up, mask=own < N)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived < SPLIT * PIECES - 1:
            return
        tl.store(counter_ptr + tile, 0)
        acc = tl.zeros((TILE,), dtype=tl.float32)
        up = acc
        for i in tl.static_range(SPLIT):
            others = partials + i * (HALVES * TILE) + tl.arange(0, TILE)
            acc += tl.load(others, mask=cols < N, other=0.0, cache_modifier=".cg")
            if HALVES == 2:
                up += tl.load(others + TILE, mask=cols < N, other=0.0, cache_modifier=".cg")

    dtype: tl.constexpr = tl.bfloat16 if QUANTISE else y_ptr.dtype.element_ty
    if HALVES == 2:
        acc = silu_times(acc, up, dtype)
    y_ptrs = y_ptr + tl.cast(place, tl.int64) * N + cols
    if QUANTISE:
        group = tl.where(cols < N, acc.to(dtype).to(tl.float32), 0.0)[None, :]
        y, y_scale = quantise_groups(group, UE8M0)
        tl.store(y_ptrs[None, :], y.to(y_ptr.dtype.element_ty), mask=(cols < N)[None, :])
        tl.store(y_scale_ptr + place * y_scale_m + n_tile * y_scale_g + tl.arange(0, 1), y_scale)
    else:
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=cols < N)


def choose_rows(tiles: int, K: int, gated: bool, fp8: bool) -> Rows:
    """tiles: of 128 outputs. Measured on an H200, product by product, inside the step."""
    if fp8:
        return Rows(16, 1, 1, 96) if tiles >= 100 else Rows(8, 2, 1, 64)
    return Rows(4, 1, 4, 96) if gated else Rows(8, cdiv(K, 8192), 4, 96)


def launch_one_token(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    y: torch.Tensor,
    y_scale: torch.Tensor | None = None,
    scale_fmt: str | None = None,
    *,
    gated: bool = False,
    routing: tuple[torch.Tensor, ...] | None = None,
    top_k: int = 0,
    cut: Rows | None = None,
) -> None:
    """Run one_token_kernel: as launch_gemm (kernel.py), for one row of x or for tiles of one pair; not for W8A16."""
    K, N = x.shape[1], w.shape[-2]
    experts = routing[1].numel() if routing else 1
    cut = cut or choose_rows(experts * cdiv(N, BLOCK_SIZE), K, gated, w_scale is not None)
    tile = cut.rows if y_scale is None else BLOCK_SIZE  # what is quantised together
    tiles = experts * cdiv(N, tile)
    count = counters(x.device)
    alone = tile * cut.split == cut.rows
    partial = x.new_empty(0 if alone else tiles * cut.split * (1 + gated) * tile, dtype=torch.float32)
    order, tile_expert, tile_start, _ = routing or (count, count, count, count)
    one_token_kernel[(tiles * tile // cut.rows * cut.split,)](
        x, x if x_scale is None else x_scale, w, w if w_scale is None else w_scale,
        y, y if y_scale is None else y_scale, partial, count, order, tile_expert, tile_start,
        N, K, *((0, 0) if x_scale is None else x_scale.stride()), *((0, 0) if y_scale is None else y_scale.stride()),
        w_scale is not None, 1 + gated, top_k, y_scale is not None, scale_fmt == UE8M0, BLOCK_SIZE,
        tile, cut.rows, cut.split, cut.chunks, WARPS,
        num_warps=WARPS, num_stages=1, maxnreg=cut.registers, **pdl_options(x.device),
    )  # fmt: skip
