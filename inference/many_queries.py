"""
latent_attention (attention.py) on Hopper where many queries share a key: those of 128 or 64 heads, or drafts. In Gluon,
as grouped.py, where the two groups of warps can share the scores.

One tile of 64 keys at a time: each group multiplies the 64 queries with half of its keys, they agree on the largest
score, and then each sums half of the values' channels, weighted by both halves' scores. The next tile is copied
meanwhile. Bound by shared memory, which the scores' products read, then by the tensor cores, which wait for the weights
in between: 64 x 4,096 keys and 128 heads take 190 us (385 TFLOPS). latent_attention_kernel takes 261: there Triton has
both groups compute all scores.

Dimension letters as in attention.py.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gpu import capability

SIDE = 64  # queries and keys of a tile


def takes(q: torch.Tensor, cache: torch.Tensor, C: int) -> bool:
    """
    Whether this kernel is for these: shared memory holds two tiles of just the released models' keys, which are copied
    16 bytes at a time.
    """
    fits = q.dtype == cache.dtype == torch.bfloat16 and (C, cache.shape[-1] - C) == (512, 64)
    aligned = cache.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in cache.stride()[:-1])
    return capability(q.device) == (9, 0) and fits and aligned and cache.stride(-1) == 1


@gluon.jit
def copy_keys(kv_c, kv_r, cache_ptr, cache_t, first, wide: gl.constexpr, narrow: gl.constexpr):
    """Start copying the keys from `first` on, as zeros before their row's start."""
    C: gl.constexpr = kv_c.type.shape[1]
    t = first + gl.arange(0, kv_c.type.shape[0], gl.SliceLayout(1, wide))
    columns = gl.arange(0, C, gl.SliceLayout(0, wide))
    ptrs = cache_ptr + (t * cache_t)[:, None] + columns[None, :]
    async_copy.async_copy_global_to_shared(kv_c, ptrs, mask=(t >= 0)[:, None])
    t = first + gl.arange(0, kv_r.type.shape[0], gl.SliceLayout(1, narrow))
    columns = C + gl.arange(0, kv_r.type.shape[1], gl.SliceLayout(0, narrow))
    ptrs = cache_ptr + (t * cache_t)[:, None] + columns[None, :]
    async_copy.async_copy_global_to_shared(kv_r, ptrs, mask=(t >= 0)[:, None])
    async_copy.commit_group()


@gluon.jit
def load_queries(q_ptr, i, columns, n_queries, H, q_s, q_h):
    """[i, columns] of a row's queries, zero past the last."""
    ptrs = q_ptr + (i // H * q_s + i % H * q_h)[:, None] + columns[None, :]
    return gl.load(ptrs, mask=(i < n_queries)[:, None], other=0.0)


@gluon.jit
def many_queries_kernel(
    q_ptr, cache_ptr, rows_ptr, positions_ptr, out_ptr, lse_ptr, S, H, length, scale,
    q_b, q_s, q_h, cache_row, cache_t, C: gl.constexpr, R: gl.constexpr, SIDE: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """latent_attention_kernel for tiles of SIDE queries and keys, by 8 warps."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SIDE // 2, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    split, splits, b = gl.program_id(1), gl.num_programs(1), gl.program_id(2)
    first_query, n_queries = gl.program_id(0) * SIDE, S * H
    i = first_query + gl.arange(0, SIDE, s_rows)
    position = gl.load(positions_ptr + b * S + i // H, mask=i < n_queries, other=0)
    position = gl.minimum(position, length - 1).to(gl.int32)
    seen = gl.max(position, 0) + 1
    tiles = gl.cdiv(seen, SIDE)
    first, end = tiles * split // splits, tiles * (split + 1) // splits

    c_bufs = gl.allocate_shared_memory(dtype, [2, SIDE, C], swizzled)
    r_bufs = gl.allocate_shared_memory(dtype, [2, SIDE, R], swizzled)
    cache_ptr += gl.load(rows_ptr + b).to(gl.int64) * cache_row
    if first < end:
        copy_keys(c_bufs.index(0), r_bufs.index(0), cache_ptr, cache_t, seen - (first + 1) * SIDE, wide, narrow)
    q_ptr += b.to(gl.int64) * q_b
    i_wide = first_query + gl.arange(0, SIDE, gl.SliceLayout(1, wide))
    i_narrow = first_query + gl.arange(0, SIDE, gl.SliceLayout(1, narrow))
    c, r = gl.arange(0, C, gl.SliceLayout(0, wide)), gl.arange(0, R, gl.SliceLayout(0, narrow))
    q = load_queries(q_ptr, i_wide, c, n_queries, H, q_s, q_h)
    q_c = gl.allocate_shared_memory(dtype, [SIDE, C], swizzled, q)
    q = load_queries(q_ptr, i_narrow, C + r, n_queries, H, q_s, q_h)
    q_r = gl.allocate_shared_memory(dtype, [SIDE, R], swizzled, q)
    weights = gl.allocate_shared_memory(dtype, [SIDE, SIDE], swizzled)

    m = gl.full([SIDE], float("-inf"), gl.float32, s_rows)
    total = gl.full([SIDE], 0.0, gl.float32, s_rows)
    acc = gl.full([SIDE, C], 0.0, gl.float32, o_layout)
    s = gl.full([SIDE, SIDE], 0.0, gl.float32, s_layout)
    for tile in range(first, end):
        stage = (tile - first) % 2
        kv_c, kv_r = c_bufs.index(stage), r_bufs.index(stage)
        async_copy.wait_group(0)
        fence_async_shared()
        running = warpgroup_mma(q_c, kv_c.permute((1, 0)), s, use_acc=False, is_async=True)
        running = warpgroup_mma(q_r, kv_r.permute((1, 0)), running, is_async=True)
        if tile + 1 < end:
            following = seen - (tile + 2) * SIDE
            copy_keys(c_bufs.index(1 - stage), r_bufs.index(1 - stage), cache_ptr, cache_t, following, wide, narrow)
        s = warpgroup_mma_wait(0, deps=[running])
        t = seen - (tile + 1) * SIDE + gl.arange(0, SIDE, gl.SliceLayout(0, s_layout))
        visible = (t >= 0)[None, :] & (t[None, :] <= position[:, None])
        scores = gl.where(visible, s * scale, float("-inf"))
        m_new = gl.maximum(m, gl.max(scores, 1))
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)  # a query may see no key of a tile
        p = gl.exp2(scores - m_finite[:, None])
        alpha = gl.exp2(m - m_finite)
        total = total * alpha + gl.sum(p, 1)
        m = m_new
        weights.store(p.to(dtype))
        acc *= gl.convert_layout(alpha, o_rows)[:, None]
        fence_async_shared()
        running = warpgroup_mma(weights, kv_c, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[running])

    at = (b * splits + split).to(gl.int64) * n_queries
    whole = gl.where(total == 0, 1.0, total)
    acc /= gl.convert_layout(whole, o_rows)[:, None]
    if MERGE:
        i_out = first_query + gl.arange(0, SIDE, o_rows)
        columns = gl.arange(0, C, gl.SliceLayout(0, o_layout))
        inside = (i_out < n_queries) & (first < end)
        gl.store(out_ptr + (at + i_out)[:, None] * C + columns[None, :], acc, mask=inside[:, None])
        lse = gl.where(total == 0, float("-inf"), m + gl.log2(whole))
        gl.store(lse_ptr + at + i, lse, mask=i < n_queries)
    else:
        out = gl.convert_layout(acc.to(dtype), wide)  # two bytes a number: whole rows, not fours of neighbours
        gl.store(out_ptr + (at + i_wide)[:, None] * C + c[None, :], out, mask=(i_wide < n_queries)[:, None])
