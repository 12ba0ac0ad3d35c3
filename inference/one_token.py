"""
One token's linears, and experts of few tokens one (token, choice) pair at a time: bound by reading the weights once.
Without the tensor cores a warp can ask for 512 bytes of a row at a time, which an H200's memory serves at 4.7 TB/s,
where a pipeline of tiles 128 bytes wide gets 4.2.

Dimension letters: N out features, K in features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from config import BLOCK_SIZE, UE8M0
from gpu import cdiv, counters, pdl_options
from kernel_parts import quantise_groups, silu_times
from tiles import parts

WARPS = 4  # of a program


class Rows(NamedTuple):
    """How one_token_kernel cuts its work."""

    rows: int  # of the weight, of a program: a multiple of WARPS
    split: int  # parts of K
    chunks: int  # of 512 bytes of each row that are asked for at a time: a power of two
    registers: int  # of a thread, at most: the fewer, the more programs share a multiprocessor


@triton.jit
def load_rows(
    ptrs, scale_ptr, scale_step, at, end, FP8: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    ONCE: tl.constexpr,
):  # fmt: skip
    """
    CHUNKS of 512 bytes, 16 a lane, from column `at` on, of the rows at `ptrs` [rows] -> [rows, CHUNKS, numbers], and
    the lanes' scales [CHUNKS, 32]. ONCE: no other program reads these rows.
    """
    PER: tl.constexpr = 128 // ptrs.dtype.element_ty.primitive_bitwidth
    chunk = at + tl.arange(0, CHUNKS) * (32 * PER)
    k = chunk[None, :, None] + tl.arange(0, 32 * PER)[None, None, :]
    policy: tl.constexpr = "evict_first" if ONCE else ""
    rows = tl.load(ptrs[:, None, None] + k, mask=k < end, other=0.0, eviction_policy=policy)
    scale = 1.0
    if FP8:
        lane = chunk[:, None] + tl.arange(0, 32)[None, :] * PER
        scale = tl.load(scale_ptr + lane // BLOCK * scale_step, mask=lane < end, other=0.0)
    return rows, scale


@triton.jit
def add_products(acc, w, w_scale, x, x_scale, FP8: tl.constexpr):
    """acc [rows / WARPS, WARPS, 32] + each lane's part of w x^T, w [rows, CHUNKS, numbers], x [WARPS, CHUNKS, ...]."""
    WARPS: tl.constexpr = x.shape[0]
    CHUNKS: tl.constexpr = x.shape[1]
    x = tl.reshape(x.to(tl.float32), (1, WARPS, CHUNKS, 32, x.shape[2] // 32))
    w = tl.reshape(w.to(tl.float32), (acc.shape[0], WARPS, CHUNKS, 32, x.shape[4]))
    products = tl.sum(w * x, 4)
    if FP8:
        products *= (w_scale * x_scale)[None, None, :, :]
    return acc + tl.sum(products, 2)


@triton.jit
def one_token_kernel(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, y_ptr, y_scale_ptr, partial_ptr, counter_ptr, order_ptr, tile_expert_ptr,
    M, N, K, x_scale_m, x_scale_g, y_scale_m, y_scale_g,
    FP8: tl.constexpr, HALVES: tl.constexpr, TOP_K: tl.constexpr, SHARED: tl.constexpr, QUANTISE: tl.constexpr,
    UE8M0: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    y = x w^T as in gemm_kernel (kernel.py, whose names these are), for one row of x; TOP_K > 0: [P, N], for tiles of
    one pair, with its token's row of x and its expert's weights. A program: ROWS outputs of a TILE, over one of SPLIT
    parts of K; of each row CHUNKS of 512 bytes are on their way at a time. A warp has whole rows and an own copy of x,
    and so waits for no other.

    On an H200, in V3's step: the experts' gate and up, 264 MB, 3 to 4 us less than gemm_kernel's 69; reading alone is
    59. Where the weights are known, the first of them are loaded before the wait; the SHARED experts, which come first,
    wait only with their results, which may take memory that routing still reads. In FP8 few other products are faster
    so (`takes_token`): e4m3 has to become fp32 here, 2.5 instructions a number, which short loops do not hide.
    """
    PIECES: tl.constexpr = TILE // ROWS
    WIDTH: tl.constexpr = CHUNKS * 512 * 8 // w_ptr.dtype.element_ty.primitive_bitwidth
    n_tiles = tl.cdiv(N, TILE)
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // (SPLIT * PIECES)
    n_tile = tile % n_tiles
    own = n_tile * TILE + tl.program_id(0) // SPLIT % PIECES * ROWS + tl.arange(0, ROWS)
    n_slices = tl.cdiv(K, BLOCK)
    per_part = tl.cdiv(n_slices, SPLIT)
    begin = part * per_part * BLOCK
    end = tl.minimum(begin + per_part * BLOCK, K)

    place = tile // n_tiles
    expert, token = place // M, place % M
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if TOP_K > 0:
        if place >= SHARED * M:
            if PDL:
                tl.extra.cuda.gdc_wait()
            expert = tl.load(tile_expert_ptr + place)
            if M > 1:
                token = tl.load(order_ptr + place) // TOP_K
        if expert < 0:
            return
    scale_rows = tl.cdiv(N, BLOCK)
    w_ptrs = w_ptr + (expert * HALVES * N + tl.minimum(own, N - 1)).to(tl.int64) * K
    up_ptrs = w_ptrs + tl.cast(N, tl.int64) * K
    w_scale_ptrs = w_scale_ptr + (expert * HALVES * scale_rows + n_tile * TILE // BLOCK) * n_slices
    up_scale_ptrs = w_scale_ptrs + scale_rows * n_slices
    x_ptrs = x_ptr + token * K + tl.zeros((WARPS,), tl.int32)
    x_scale_ptr += token * x_scale_m

    acc = tl.zeros((ROWS // WARPS, WARPS, 32), dtype=tl.float32)
    up = acc
    if TOP_K == 0:  # the weights are known: on their way while the kernels before this one finish
        w, w_scale = load_rows(w_ptrs, w_scale_ptrs, 1, begin, end, FP8, BLOCK, CHUNKS, True)
        if HALVES == 2:
            w_up, up_scale = load_rows(up_ptrs, up_scale_ptrs, 1, begin, end, FP8, BLOCK, CHUNKS, True)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x, x_scale = load_rows(x_ptrs, x_scale_ptr, x_scale_g, begin, end, FP8, BLOCK, CHUNKS, False)
        acc = add_products(acc, w, w_scale, x, x_scale, FP8)
        if HALVES == 2:
            up = add_products(up, w_up, up_scale, x, x_scale, FP8)
        begin += WIDTH
    for at in range(begin, end, WIDTH):
        w, w_scale = load_rows(w_ptrs, w_scale_ptrs, 1, at, end, FP8, BLOCK, CHUNKS, True)
        if HALVES == 2:
            w_up, up_scale = load_rows(up_ptrs, up_scale_ptrs, 1, at, end, FP8, BLOCK, CHUNKS, True)
        x, x_scale = load_rows(x_ptrs, x_scale_ptr, x_scale_g, at, end, FP8, BLOCK, CHUNKS, False)
        acc = add_products(acc, w, w_scale, x, x_scale, FP8)
        if HALVES == 2:
            up = add_products(up, w_up, up_scale, x, x_scale, FP8)
    acc = tl.reshape(tl.sum(acc, 2), (ROWS,))
    if HALVES == 2:
        up = tl.reshape(tl.sum(up, 2), (ROWS,))

    cols = n_tile * TILE + tl.arange(0, TILE)
    if PDL and SHARED > 0:
        tl.extra.cuda.gdc_wait()
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


def takes_token(N: int, K: int, gated: bool, fp8: bool) -> bool:
    """
    Whether one_token_kernel multiplies a token with N x K weights, or an expert's, faster than gemm_kernel. In FP8,
    other than gate and up, only not too many, in long rows: wo of a rank of 4 or 8 (7168 x 4096, x 2048) 1.2 and 1.1
    us, the latter's dense w2 1.9; but wq_b of one (3072 x 1536) takes 2.3 us longer, the whole wo (7168 x 16384) 2 - 4.
    """
    return gated or not fp8 or (K >= 2048 and N * K <= 2**25)


def choose_rows(tiles: int, K: int, gated: bool, fp8: bool) -> Rows:
    """tiles: of 128 outputs. Measured on an H200, product by product, inside the step."""
    if fp8 and not gated:
        return Rows(8, parts(cdiv(K, BLOCK_SIZE), 72 // tiles), 2, 96)
    if fp8:
        return Rows(16, 1, 1, 96) if tiles >= 100 else Rows(8, 2, 1, 64)
    return Rows(4, 1, 4, 96) if gated else Rows(4 if tiles > 100 else 8, cdiv(K, 8192), 4, 96)


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
    n_shared: int = 0,
    cut: Rows | None = None,
) -> None:
    """
    Run one_token_kernel: as launch_gemm (kernel.py), for one row of x or a routing in tiles of one pair; not for W8A16.
    """
    (M, K), N = x.shape, w.shape[-2]
    order, tile_expert = routing[:2] if routing else (None, None)
    pairs = len(tile_expert) if routing else 1
    cut = cut or choose_rows(pairs * cdiv(N, BLOCK_SIZE), K, gated, w_scale is not None)
    tile = cut.rows if y_scale is None else BLOCK_SIZE  # what is quantised together
    tiles = pairs * cdiv(N, tile)
    alone = tile * cut.split == cut.rows
    partial = x.new_empty(0 if alone else tiles * cut.split * (1 + gated) * tile, dtype=torch.float32)
    one_token_kernel[(tiles * tile // cut.rows * cut.split,)](
        x, x if x_scale is None else x_scale, w, w if w_scale is None else w_scale,
        y, y if y_scale is None else y_scale, partial, counters(x.device), order, tile_expert,
        M, N, K, *((0, 0) if x_scale is None else x_scale.stride()), *((0, 0) if y_scale is None else y_scale.stride()),
        w_scale is not None, 1 + gated, top_k, n_shared, y_scale is not None, scale_fmt == UE8M0, BLOCK_SIZE,
        tile, cut.rows, cut.split, cut.chunks, WARPS,
        num_warps=WARPS, num_stages=1, maxnreg=cut.registers, **pdl_options(x.device),
    )  # fmt: skip
