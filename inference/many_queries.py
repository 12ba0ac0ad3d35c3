"""
latent_attention (attention.py) on Hopper where many queries share a key: those of 128 or 64 heads, or drafts. In Gluon,
as grouped.py, which lets two groups of warps do different things at a time.

The two groups take tiles of 64 keys in turn. A tile's group scores it, raises the largest scores so far, and hands its
weights to the other group through shared memory. With these weights each group sums half of the values' channels. No
product is made twice, and one group multiplies while the other finds weights. A third group copies: each half of a
tile gives way to the next but one as soon as it has been summed, and the weights take the place of the tile's rotary
keys, which only its scores needed.

Bound by the tensor cores, and by shared memory, which both operands of most products come from: 64 x 4,096 keys and 128
heads take 117 to 135 us (620 to 540 TFLOPS), latent_attention_kernel, in which both groups computed all scores, 261.

Dimension letters as in attention.py.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gpu import capability, cdiv

SIDE = 64  # queries and keys of a tile


def takes(q: torch.Tensor, cache: torch.Tensor, C: int) -> bool:
    """
    Whether this kernel is for these: shared memory holds two tiles of just the released models' keys, which Hopper's
    copy engine brings.
    """
    fits = q.dtype == cache.dtype == torch.bfloat16 and (C, cache.shape[-1] - C) == (512, 64)
    aligned = cache.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in cache.stride()[:-1])
    return capability(q.device) == (9, 0) and fits and aligned and cache.stride(-1) == 1


@gluon.jit
def copy(tiles, keys, c_desc, r_desc, row):
    """The part of the warps that copy: the owner's half of a tile's channels, then the other and the rotary keys."""
    c_bufs, r_bufs, full, empty = tiles
    seen, first, end = keys
    SIDE: gl.constexpr = c_bufs.type.shape[1]
    HALF: gl.constexpr = c_bufs.type.shape[2]
    R: gl.constexpr = r_bufs.type.shape[2]
    owner, phase = 0, 1  # all places begin empty
    for tile in range(first, end):
        t = seen - (tile + 1) * SIDE
        for i in gl.static_range(2):
            half = owner ^ i
            place = 2 * owner + half
            mbarrier.wait(empty.index(place), phase)
            ready = full.index(place)
            mbarrier.expect(ready, (HALF + i * R) * SIDE * 2)
            tma.async_copy_global_to_shared(c_desc, [row, t, half * HALF], ready, c_bufs.index(place))
            if i == 1:  # the other group has used the weights there
                tma.async_copy_global_to_shared(r_desc, [row, t, 2 * HALF], ready, r_bufs.index(owner))
        phase ^= owner
        owner ^= 1


@gluon.jit
def load_queries(column, width: gl.constexpr, SIDE: gl.constexpr, layout: gl.constexpr, queries):
    """[SIDE, width] of a row's queries from `first_query` and `column` on, zero past the last."""
    q_ptr, first_query, n_queries, H, q_s, q_h = queries
    i = first_query + gl.arange(0, SIDE, gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, width, gl.SliceLayout(0, layout))
    ptrs = q_ptr + (i // H * q_s + i % H * q_h)[:, None] + columns[None, :]
    return gl.load(ptrs, mask=(i < n_queries)[:, None], other=0.0)


@gluon.jit
def score(asked, tiles, group: gl.constexpr, phase, s):
    """Start multiplying the queries with the keys of the group's tile: three products."""
    q_bufs, q_r = asked
    c_bufs, r_bufs, full, _ = tiles
    # Not the constant it is, or else the compiler holds the addresses of all steps in registers.
    own = gl.inline_asm_elementwise(
        "mov.u32 $0, $1;", "=r,r", [gl.to_tensor(group)], dtype=gl.int32, is_pure=False, pack=1
    )
    mbarrier.wait(full.index(3 * group), phase)
    keys = c_bufs.index(3 * own).permute((1, 0))
    s = warpgroup_mma(q_bufs.index(own), keys, s, use_acc=False, is_async=True)
    mbarrier.wait(full.index(1 + group), phase)
    keys = c_bufs.index(1 + own).permute((1, 0))
    s = warpgroup_mma(q_bufs.index(1 - own), keys, s, is_async=True)
    return warpgroup_mma(q_r, r_bufs.index(own).permute((1, 0)), s, is_async=True)


@gluon.jit
def take(tiles, handed, group: gl.constexpr, phase, m, total, acc):
    """Take up the other group's m, and start adding its tile's values."""
    c_bufs, r_bufs, _, _ = tiles
    m_bufs, ready = handed
    mbarrier.wait(ready.index(1 - group), phase)
    m_new = m_bufs.index(1 - group).load(m.type.layout)
    alpha = gl.exp2(m - m_new)
    acc = warpgroup_mma_wait(3, deps=[acc])  # else the assembler takes acc for in use, and waits for the scores too
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))[:, None]
    adding = warpgroup_mma(r_bufs.index(1 - group), c_bufs.index(2 - group), acc, is_async=True)
    return m_new, total * alpha, adding


@gluon.jit
def attend(given, group: gl.constexpr, SPLIT: gl.constexpr):
    """
    The part of a group of warps. The second one's scores are on their way while it takes up the first one's tile.

    A group hands on m only after it has read the other's, whose place is then free again. Weights give theirs back
    through `empty`, as the keys that follow there do.
    """
    asked, tiles, handed, ends, queries, keys, positions, out, scale = given
    q_bufs, q_r = asked
    c_bufs, r_bufs, _, empty = tiles
    m_bufs, ready = handed
    total_bufs, loaded, done = ends
    _, first_query, n_queries, H, _, _ = queries
    seen, first, end = keys
    positions_ptr, length, least = positions
    out_ptr, lse_ptr = out
    SIDE: gl.constexpr = c_bufs.type.shape[1]
    HALF: gl.constexpr = c_bufs.type.shape[2]
    dtype: gl.constexpr = c_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_bufs.index(group).store(load_queries(group * HALF, HALF, SIDE, wide, queries))
    if group == 0:
        q_r.store(load_queries(2 * HALF, q_r.type.shape[1], SIDE, narrow, queries))
    fence_async_shared()
    mbarrier.arrive(loaded, count=1)
    i = first_query + gl.arange(0, SIDE, s_rows)
    position = gl.load(positions_ptr + i // H, mask=i < n_queries, other=0)
    position = gl.minimum(position, length - 1).to(gl.int32)
    m = gl.full([SIDE], -1e38, gl.float32, s_rows)  # less than any score, but finite: a query may see no key of a tile
    total = gl.full([SIDE], 0.0, gl.float32, s_rows)
    acc = gl.full([SIDE, HALF], 0.0, gl.float32, o_layout)
    s = gl.full([SIDE, SIDE], 0.0, gl.float32, s_layout)
    mbarrier.wait(loaded, 0)

    phase = 0
    for tile in range(first + group, end, 2):
        adding = acc
        if group == 0:
            s = warpgroup_mma_wait(0, deps=[score(asked, tiles, group, phase, s)])
        else:
            scoring = score(asked, tiles, group, phase, s)
            m, total, adding = take(tiles, handed, group, phase, m, total, acc)
            s = warpgroup_mma_wait(1, deps=[scoring])

        t = seen - (tile + 1) * SIDE
        if (t < 0) | (t + SIDE - 1 > least):
            ts = t + gl.arange(0, SIDE, gl.SliceLayout(0, s_layout))
            s = gl.where((ts >= 0)[None, :] & (ts[None, :] <= position[:, None]), s, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - m_new[:, None])
        alpha = gl.exp2(m - m_new)
        total = total * alpha + gl.sum(p, 1)
        m = m_new
        weights = p.to(dtype)
        r_bufs.index(group).store(weights)
        m_bufs.index(group).store(m)
        fence_async_shared()
        mbarrier.arrive(ready.index(group), count=1)
        if group == 1:
            acc = warpgroup_mma_wait(0, deps=[adding])
            mbarrier.arrive(empty.index(1), count=1)

        acc *= gl.convert_layout(alpha, o_rows)[:, None]
        adding = warpgroup_mma(gl.convert_layout(weights, p_layout), c_bufs.index(3 * group), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(empty.index(3 * group), count=1)
        if group == 0:  # noqa: SIM102, only this is known to the compiler
            if tile + 1 < end:
                m, total, adding = take(tiles, handed, group, phase, m, total, acc)
                acc = warpgroup_mma_wait(0, deps=[adding])
                mbarrier.arrive(empty.index(2), count=1)
        phase ^= 1
    if group == 1:  # noqa: SIM102, as above
        if (end - first) % 2 == 1:
            m, total, adding = take(tiles, handed, group, phase, m, total, acc)
            acc = warpgroup_mma_wait(0, deps=[adding])

    total_bufs.index(group).store(total)
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    total += total_bufs.index(1 - group).load(s_rows)
    whole = gl.where(total == 0, 1.0, total)
    acc /= gl.convert_layout(whole, o_rows)[:, None]
    if SPLIT and group == 0:
        lse = gl.where(total == 0, float("-inf"), m + gl.log2(whole))
        gl.store(lse_ptr + i, lse, mask=i < n_queries)
    # Whole rows, not fours of neighbours, by way of the queries' place: 53 us, not 59.
    q_bufs.index(group).store(acc.to(dtype))
    i_out = first_query + gl.arange(0, SIDE, gl.SliceLayout(1, wide))
    columns = group * HALF + gl.arange(0, HALF, gl.SliceLayout(0, wide))
    out_ptrs = out_ptr + i_out[:, None] * (2 * HALF) + columns[None, :]
    gl.store(out_ptrs, q_bufs.index(group).load(wide), mask=(i_out < n_queries)[:, None])


@gluon.jit
def many_queries_kernel(
    c_desc, r_desc, q_ptr, rows_ptr, positions_ptr, out_ptr, lse_ptr, S, H, length, scale, q_b, q_s, q_h,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """latent_attention_kernel for tiles of SIDE queries and keys, by three times 4 warps. scale > 0."""
    SIDE: gl.constexpr = c_desc.block_type.shape[1]
    HALF: gl.constexpr = c_desc.block_type.shape[2]
    R: gl.constexpr = r_desc.block_type.shape[2]
    dtype: gl.constexpr = c_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    split, splits, b = gl.program_id(1), gl.num_programs(1), gl.program_id(2)
    first_query, n_queries = gl.program_id(0) * SIDE, S * H
    i = first_query + gl.arange(0, SIDE, gl.BlockedLayout([1], [32], [4], [0]))
    positions_ptr += b * S
    position = gl.load(positions_ptr + gl.minimum(i, n_queries - 1) // H)
    position = gl.minimum(position, length - 1).to(gl.int32)
    seen, least = gl.max(position, 0) + 1, gl.min(position, 0)
    tiles = gl.cdiv(seen, SIDE)
    first, end = tiles * split // splits, tiles * (split + 1) // splits

    q_bufs = gl.allocate_shared_memory(dtype, [2, SIDE, HALF], swizzled)
    q_r = gl.allocate_shared_memory(dtype, [SIDE, R], swizzled)
    c_bufs = gl.allocate_shared_memory(dtype, [4, SIDE, HALF], swizzled)  # halves of two tiles
    r_bufs = gl.allocate_shared_memory(dtype, [2, SIDE, R], swizzled)  # and their rotary keys, then their weights
    m_bufs = gl.allocate_shared_memory(gl.float32, [2, SIDE], plain)
    total_bufs = gl.allocate_shared_memory(gl.float32, [2, SIDE], plain)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for place in gl.static_range(4):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    for group in gl.static_range(2):
        mbarrier.init(ready.index(group), count=1)
    mbarrier.init(loaded, count=2)
    mbarrier.init(done, count=2)
    fence_async_shared()  # the copy engine is to find them so

    row = gl.load(rows_ptr + b).to(gl.int32)
    at = (b * splits + split).to(gl.int64) * n_queries
    asked, handed, ends = (q_bufs, q_r), (m_bufs, ready), (total_bufs, loaded, done)
    places, keys, positions = (c_bufs, r_bufs, full, empty), (seen, first, end), (positions_ptr, length, least)
    queries = (q_ptr + b.to(gl.int64) * q_b, first_query, n_queries, H, q_s, q_h)
    out = (out_ptr + at * (2 * HALF), lse_ptr + at if SPLIT else lse_ptr)
    given = (asked, places, handed, ends, queries, keys, positions, out, scale)
    gl.warp_specialize(
        [
            (copy, (places, keys, c_desc, r_desc, row)),
            (attend, (given, 0, SPLIT)),
            (attend, (given, 1, SPLIT)),
        ],
        [4, 4],
        [240, 240],
    )


def launch_many_queries(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, scale: float, C: int,
    parts: torch.Tensor, lse: torch.Tensor | None,
) -> None:  # fmt: skip
    """
    Run many_queries_kernel, whose reference is latent_attention_ref: into parts [B, splits, S, H, C], where there are
    several splits with their lse [B, splits, S, H]. The scale has log2(e) in it.
    """
    (B, S, H, _), R = q.shape, cache.shape[-1] - C
    swizzled = gl.NVMMASharedLayout(128, 16, 3)
    many_queries_kernel[(cdiv(S * H, SIDE), parts.shape[1], B)](
        TensorDescriptor.from_tensor(cache, [1, SIDE, C // 2], swizzled),
        TensorDescriptor.from_tensor(cache, [1, SIDE, R], swizzled),
        q, rows, positions, parts, lse, S, H, cache.shape[1], scale, *q.stride()[:3],
        SPLIT=lse is not None, num_warps=4, maxnreg=168,
    )  # fmt: skip
