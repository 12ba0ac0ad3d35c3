"""
The experts' FP8 products for many tokens on Hopper, in Gluon: the level of Triton on which a kernel says which of its
warps do what. kernel.py's gemm_kernel does the same everywhere, with tiles of 64 pairs.

One warp copies, slice after slice of 128 of K, through Hopper's copy engine into shared memory, up to STAGES slices
ahead. Three groups of four warps multiply: each 64 pairs of one expert with the same 128 rows of its weight, so that a
slice of the weight is read once for 192 pairs. They share no step but the hand-over of a slice, which is an mbarrier
each way: `full` when all of it has arrived, `empty` when all three have used it.

Time goes to bytes from L2 more than to products: on an H200 a slice takes 0.42, 0.56 or 0.70 us with one, two or three
groups at work, for 24, 32 or 40 KB. The last is 1,185 TFLOPS; V3's experts, with 256 pairs each, reach 820, gemm_kernel
with a weight read for every 64 pairs 710.

Dimension letters: P pairs in the routing's order, E experts, N outputs, K inputs.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from config import BLOCK_SIZE
from gpu import capability, multiprocessors
from kernel import E4M3

GROUPS = 3  # of warps that multiply, as the kernel lists them
ROWS = 64  # pairs of a group
PAIRS = GROUPS * ROWS  # of a tile
STAGES = 4


def takes(w: torch.Tensor) -> bool:
    """Whether this kernel multiplies with experts w [..., N, K] in e4m3: on Hopper alone, and in whole blocks."""
    return w.dtype == E4M3 and capability(w.device) == (9, 0) and not any(n % BLOCK_SIZE for n in w.shape[-2:])


@gluon.jit
def find_tile(tile, n_all, n_tiles, tile_expert_ptr, tile_start_ptr, tile_stop_ptr):
    """A tile's expert or -1, its pairs from start to stop, and which of the n_tiles blocks of outputs it is."""
    tile = gl.minimum(tile, n_all - 1)
    m_tile = tile // n_tiles
    start, stop = gl.load(tile_start_ptr + m_tile), gl.load(tile_stop_ptr + m_tile)
    return gl.load(tile_expert_ptr + m_tile), start, stop, tile % n_tiles


@gluon.jit
def copy(shared, tiles, x_desc, w_desc, x_scale_ptr, x_scale_m, x_scale_g, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The part of the warp that copies. Scales go one by one: the copy engine wants rows that begin at 16 bytes."""
    x_bufs, x_scale_bufs, w_bufs, full, empty = shared
    n_all, n_tiles, N, slices, tile_expert_ptr, tile_start_ptr, tile_stop_ptr = tiles
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK: gl.constexpr = w_desc.block_type.shape[0]
    slots = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), n_all, gl.num_programs(0)):
        expert, start, stop, n_tile = find_tile(tile, n_all, n_tiles, tile_expert_ptr, tile_start_ptr, tile_stop_ptr)
        if expert >= 0:
            groups = gl.cdiv(stop - start, ROWS)
            w_row = expert * N + n_tile * BLOCK
            for g in range(slices):
                ready = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                for i in gl.static_range(GROUPS):
                    place = gl.minimum(start + i * ROWS + slots, stop - 1)
                    x_scale_ptrs = x_scale_ptr + place * x_scale_m + g * x_scale_g
                    async_copy.async_copy_global_to_shared(x_scale_bufs.index(stage * GROUPS + i), x_scale_ptrs)
                async_copy.mbarrier_arrive(ready, increment_count=False)
                for i in gl.static_range(GROUPS):
                    mbarrier.expect(ready, (BLOCK + (i + 1) * ROWS) * BLOCK, pred=groups == i + 1)
                tma.async_copy_global_to_shared(w_desc, [w_row, g * BLOCK], ready, w_bufs.index(stage))
                for i in gl.static_range(GROUPS):
                    x_buf = x_bufs.index(stage * GROUPS + i)
                    tma.async_copy_global_to_shared(
                        x_desc, [start + i * ROWS, g * BLOCK], ready, x_buf, pred=groups > i
                    )
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def multiply(shared, tiles, out, group, SCATTER: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """The part of one group of warps. One without pairs waits for slices all the same, and hands them back."""
    x_bufs, x_scale_bufs, w_bufs, full, empty = shared
    n_all, n_tiles, N, slices, tile_expert_ptr, tile_start_ptr, tile_stop_ptr = tiles
    w_scale_ptr, y_ptr, order_ptr, pair_weight_ptr = out
    ROWS: gl.constexpr = x_bufs.type.shape[1]
    BLOCK: gl.constexpr = w_bufs.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    column: gl.constexpr = gl.SliceLayout(1, layout)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])  # 256 bytes of a row by neighbours
    slots = gl.arange(0, ROWS, gl.SliceLayout(1, rows))
    cols = gl.arange(0, BLOCK, gl.SliceLayout(0, rows))
    own = gl.arange(0, ROWS, column)
    part = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout)
    x_scale = gl.full([ROWS], 0.0, gl.float32, column)
    stage, phase = 0, 0
    coming = find_tile(gl.program_id(0), n_all, n_tiles, tile_expert_ptr, tile_start_ptr, tile_stop_ptr)
    for tile in range(gl.program_id(0), n_all, gl.num_programs(0)):
        expert, start, stop, n_tile = coming
        next_tile = tile + gl.num_programs(0)
        coming = find_tile(next_tile, n_all, n_tiles, tile_expert_ptr, tile_start_ptr, tile_stop_ptr)
        if expert >= 0:
            start += group * ROWS
            w_scale_ptrs = w_scale_ptr + (expert * n_tiles + n_tile) * slices
            w_scale = gl.load(w_scale_ptrs)
            if SCATTER:
                pair = gl.load(order_ptr + gl.minimum(start + own, stop - 1))
                pair_weight = gl.load(pair_weight_ptr + pair)[:, None]
            acc = gl.full([ROWS, BLOCK], 0.0, gl.float32, layout)
            for g in range(slices):
                next_w_scale = gl.load(w_scale_ptrs + gl.minimum(g + 1, slices - 1))
                mbarrier.wait(full.index(stage), phase)
                if start < stop:
                    x, w = x_bufs.index(stage * GROUPS + group), w_bufs.index(stage).permute((1, 0))
                    running = warpgroup_mma(x, w, part, use_acc=False, is_async=True)
                    x_scale = x_scale_bufs.index(stage * GROUPS + group).load(column)
                    part = warpgroup_mma_wait(0, deps=[running])
                mbarrier.arrive(empty.index(stage), count=1)
                acc += part * (x_scale * w_scale)[:, None]
                w_scale = next_w_scale
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            row = gl.minimum(start + slots, stop - 1)
            if SCATTER:
                row = gl.load(order_ptr + row)
                acc *= pair_weight
            y_ptrs = y_ptr + row.to(gl.int64)[:, None] * N + (n_tile * BLOCK + cols)[None, :]
            y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), rows)
            gl.store(y_ptrs, y, mask=(start + slots < stop)[:, None])


@gluon.jit(do_not_specialize_on_alignment=["n_all", "x_scale_g"])  # they follow the prompt, and nothing is gained
def grouped_kernel(
    x_desc, w_desc, x_scale_ptr, w_scale_ptr, y_ptr, order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr,
    pair_weight_ptr, n_all, n_tiles, N, slices, x_scale_m, x_scale_g,
    SCATTER: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """
    y[p, n] = sum over slices g of K: x_scale[p, g] * w_scale[e, n // 128, g] * sum(x[p, k] * w[e, n, k] for k in g)

    of the pair's expert e, the outer sum in fp32. n_all tiles of up to 192 pairs of one expert and 128 outputs, by as
    many programs as there are multiprocessors.
    """
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK: gl.constexpr = w_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUPS, ROWS, BLOCK], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK, BLOCK], w_desc.layout)
    scales: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_scale_bufs = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, ROWS], scales)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=33)  # the copy engine, and 32 threads that copy scales
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()  # the copy engine is to find them so
    shared = (x_bufs, x_scale_bufs, w_bufs, full, empty)
    tiles = (n_all, n_tiles, N, slices, tile_expert_ptr, tile_start_ptr, tile_stop_ptr)
    out = (w_scale_ptr, y_ptr, order_ptr, pair_weight_ptr)
    gl.warp_specialize(
        [
            (multiply, (shared, tiles, out, gl.to_tensor(0), SCATTER, GROUPS, STAGES)),
            (multiply, (shared, tiles, out, gl.to_tensor(1), SCATTER, GROUPS, STAGES)),
            (multiply, (shared, tiles, out, gl.to_tensor(2), SCATTER, GROUPS, STAGES)),
            (copy, (shared, tiles, x_desc, w_desc, x_scale_ptr, x_scale_m, x_scale_g, GROUPS, STAGES)),
        ],
        [4, 4, 1],
        [152, 152, 40],
    )


def launch_grouped(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    y: torch.Tensor,
    routing: tuple[torch.Tensor, ...],
    pair_weights: torch.Tensor | None = None,
) -> None:
    """
    Run grouped_kernel, whose reference is fp8_gemm_ref for each expert: x [P, K] e4m3 with x_scale [P, K / 128],
    w [E, N, K] e4m3 with w_scale [E, N / 128, K / 128] -> y [P, N]. routing: order, tile_expert, tile_start, tile_stop,
    for tiles of 1 to PAIRS pairs; x has their order, and so has y, but with pair_weights it has the pairs', each
    multiplied by its weight. Raises ValueError for weights that the kernel does not take.
    """
    if x_scale is None or not takes(w):
        raise ValueError(f"launch_grouped: {w.dtype} weights {tuple(w.shape)} on {w.device} are not for this kernel")
    N, K = w.shape[-2:]
    order, *tiles = routing
    n_tiles = N // BLOCK_SIZE
    swizzled = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_SIZE], gl.float8e4nv)
    grouped_kernel[(multiprocessors(x.device),)](
        TensorDescriptor.from_tensor(x, [ROWS, BLOCK_SIZE], swizzled),
        TensorDescriptor.from_tensor(w.flatten(0, 1), [BLOCK_SIZE, BLOCK_SIZE], swizzled),
        x_scale, w_scale, y, order, *tiles, y if pair_weights is None else pair_weights,
        len(tiles[0]) * n_tiles, n_tiles, N, K // BLOCK_SIZE, *x_scale.stride(),
        pair_weights is not None, GROUPS, STAGES, num_warps=4, maxnreg=128,
    )  # fmt: skip
