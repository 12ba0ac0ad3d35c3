"""
Attention over the latent cache of MLA (V2 paper, 2.1).

Dimension letters: B rows of the batch, S query tokens a row, T cached tokens, H local heads, C kv_lora_rank,
R qk_rope_head_dim, D_k = qk_nope_head_dim + R, D_v = v_head_dim.

A query at position p sees the keys at positions 0..p of its own row, and that is the only mask there is: a chunk of a
prompt, one new token and several drafted ones differ only in `positions`. What the cache holds past a row's last
position is garbage, NaN even, so the kernels never load it: a weight of zero does not keep NaN out of a sum.

Each operation is three neighbours, as in kernel.py. The kernels are flash attention (arXiv:2205.14135): going through
the keys tile by tile, each query keeps the largest score so far, m, the total of 2^(score - m), and acc, the values
summed with these weights; when m grows, total and acc shrink by alpha = 2^(m_old - m_new). The scale has log2(e) in it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import capability, cdiv, multiprocessors, on_hopper, pdl_options
from kernel import on_gpu
from kernel_parts import prefetch
from many_queries import SIDE, launch_many_queries, takes

LOG2_E = math.log2(math.e)
CUDNN_HEADS = (192, 128)  # D_k, D_v for which cuDNN is faster than prefill_attention_kernel
MOST_SPLITS = 128  # of the keys: each is a row of expand_value_kernel's product, whose shared memory holds no more


def padded(n: int) -> int:
    """The side of a tile that holds n: a power of two, and at least 16 for tl.dot."""
    return max(16, triton.next_power_of_2(n))


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_write(cache: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """
    cache[rows[b], positions[b, s]] = kv[b, s], for cache [rows, length, C + R], kv [B, S, C + R], positions [B, S].

    Positions past the cache's end are not written; each row's first position must be inside.
    """
    inside = positions < cache.shape[1]
    # What must not be written becomes a repetition of the row's first token: no host sync, no out-of-range write.
    source = torch.arange(kv.shape[1], device=kv.device).where(inside, 0)
    kv = kv.gather(1, source[..., None].expand_as(kv))
    cache[rows[:, None], positions.gather(1, source)] = kv.to(cache.dtype)


def causal_mask(positions: torch.Tensor, kv_len: int) -> torch.Tensor:
    """positions [B, S] -> [B, 1, S, kv_len], True where key t <= positions[b, s]."""
    return torch.arange(kv_len, device=positions.device) <= positions[:, None, :, None]


# --- prefill: keys and values of each head ----------------------------------------------------------------------------


def prefill_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [B, S, H, D_k], k [B, T, H, D_k], v [B, T, H, D_v] -> softmax(q k^T scale, t <= position) v [B, S, H, D_v]."""
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    scores = scores.masked_fill(~causal_mask(positions, k.shape[1]), -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.float()).to(q.dtype)


@triton.jit
def prefill_tiles(
    m, total, acc, q, q_rest, position, k_ptr, v_ptr, k_t, v_t, begin, end, scale, D_K: tl.constexpr, D_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The keys begin..end go into m, total and acc. Without MASKED they are whole tiles that every query sees."""
    tile, d, rest, d_v = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_REST), tl.arange(0, BLOCK_V)
    k_ptrs = k_ptr + tl.cast(begin, tl.int64) * k_t + (tile * k_t)[:, None]
    v_ptrs = v_ptr + tl.cast(begin, tl.int64) * v_t + (tile * v_t)[:, None]
    for start in range(begin, end, BLOCK_T):
        t = start + tile
        there = (t < end if MASKED else t >= 0)[:, None]
        k = tl.load(k_ptrs + d[None, :], mask=there & (d < D_K)[None, :], other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee")
        if D_K > BLOCK_K:
            k = tl.load(k_ptrs + BLOCK_K + rest[None, :], mask=there & (rest < D_K - BLOCK_K)[None, :], other=0.0)
            s = tl.dot(q_rest, k.T, s, input_precision="ieee")
        if MASKED:
            s = tl.where(t[None, :] <= position[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        m = m_new
        v = tl.load(v_ptrs + d_v[None, :], mask=there & (d_v < D_V)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        k_ptrs += BLOCK_T * k_t
        v_ptrs += BLOCK_T * v_t
    return m, total, acc


@triton.jit
def prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, out_ptr, S, T, H, scale, q_b, q_s, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    D_K: tl.constexpr, D_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """
    One program: BLOCK_M queries of one head. Bound by the tensor cores: 2 * (D_k + D_v) operations a query and key.

    A tile's side is a power of two, so D_k is taken in two parts, of BLOCK_K and what remains: 192 = 128 + 64.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the most keys first
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q_ptr += b * q_b + h * q_h
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h

    # Keys 0..whole are seen by all queries of the tile, whole..end by some.
    first = tl.load(positions_ptr + b * S).to(tl.int32) + tile * BLOCK_M
    whole = tl.minimum(first + 1, T) // BLOCK_T * BLOCK_T
    end = tl.minimum(first + tl.minimum(BLOCK_M, S - tile * BLOCK_M), T)
    position = tl.minimum(first + tl.arange(0, BLOCK_M), end - 1)

    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d, rest, d_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_REST), tl.arange(0, BLOCK_V)
    q_ptrs, inside = q_ptr + (i.to(tl.int64) * q_s)[:, None], (i < S)[:, None]
    q = tl.load(q_ptrs + d[None, :], mask=inside & (d < D_K)[None, :], other=0.0)
    q_rest = tl.load(q_ptrs + BLOCK_K + rest[None, :], mask=inside & (rest < D_K - BLOCK_K)[None, :], other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    m, total, acc = prefill_tiles(
        m, total, acc, q, q_rest, position, k_ptr, v_ptr, k_t, v_t, 0, whole, scale,
        D_K, D_V, BLOCK_K, BLOCK_REST, BLOCK_V, BLOCK_T, False,
    )  # fmt: skip
    m, total, acc = prefill_tiles(
        m, total, acc, q, q_rest, position, k_ptr, v_ptr, k_t, v_t, whole, end, scale,
        D_K, D_V, BLOCK_K, BLOCK_REST, BLOCK_V, BLOCK_T, True,
    )  # fmt: skip
    out_ptrs = out_ptr + ((b * S + i) * H + h)[:, None] * D_V + d_v[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside & (d_v < D_V)[None, :])


class PrefillConfig(NamedTuple):
    """block_m queries a program, tiles of block_t keys."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


def prefill_config(dtype: torch.dtype, hopper: bool) -> PrefillConfig:
    """How to run prefill_attention_kernel."""
    if dtype == torch.float32:
        return PrefillConfig(16, 32, num_warps=4, num_stages=2)
    if not hopper:  # as little as 99 KiB of shared memory
        return PrefillConfig(64, 32, num_warps=4, num_stages=2)
    return PrefillConfig(128, 64, num_warps=8, num_stages=3)


def launch_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float, config: PrefillConfig
) -> torch.Tensor:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (B, S, H, D_k), (T, D_v) = q.shape, (k.shape[1], v.shape[-1])
    block_k = max(16, 1 << D_k.bit_length() - 1)  # the largest power of two within D_k
    out = q.new_empty(B, S, H, D_v)
    prefill_attention_kernel[(cdiv(S, config.block_m), H, B)](
        q, k, v, positions.contiguous(), out, S, T, H, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], D_k, D_v, block_k, padded(max(D_k - block_k, 1)), padded(D_v), config.block_m, config.block_t,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """
    See prefill_attention_ref. A row's positions follow one another, the first below T; where T == S, all start at 0.
    """
    if not on_gpu(q):
        return prefill_attention_ref(q, k, v, positions, scale)
    # cuDNN's causal mask is for queries that start where the keys do; it takes no single key.
    from_start, heads = 1 < q.shape[1] == k.shape[1], (q.shape[-1], v.shape[-1])
    if from_start and heads == CUDNN_HEADS and q.dtype == torch.bfloat16 and capability(q.device) == (9, 0):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    return launch_prefill(q, k, v, positions, scale, prefill_config(q.dtype, on_hopper(q.device)))


# --- decode: inside the latent space ----------------------------------------------------------------------------------


def latent_attention_ref(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, kv_len: int, scale: float, C: int
) -> torch.Tensor:
    """
    q [B, S, H, C + R], cache [rows, length, C + R] -> softmax(q kv^T * scale, t <= position) kv[:C] [B, S, H, C]:
    one key head and one value head shared by all query heads. Reads the first `kv_len` entries of each row.
    """
    kv = cache[rows, :kv_len].float()
    scores = torch.einsum("bshd,btd->bhst", q.float(), kv) * scale
    scores = scores.masked_fill(~causal_mask(positions, kv_len), -torch.inf)
    return torch.einsum("bhst,btc->bshc", scores.softmax(-1), kv[..., :C]).to(q.dtype)


@triton.jit
def latent_tile(ptr, stride, t, columns, n_columns: tl.constexpr):
    """[t, columns] of a cache's row; before its start, its first entry: a mask would cost each load 3 instructions."""
    ptrs = ptr + (tl.maximum(t, 0) * stride)[:, None] + columns[None, :]
    return tl.load(ptrs, mask=(columns < n_columns)[None, :], other=0.0)


@triton.jit
def latent_attention_kernel(
    q_ptr, cache_ptr, rows_ptr, positions_ptr, out_ptr, lse_ptr, S, length, scale,
    q_b, q_s, q_h, cache_row, cache_t, H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, C_PAD: tl.constexpr,
    R_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: BLOCK_M of a row's S * H queries (token and head), over one of the equal splits of the keys they see.

    With SPLIT there are several, and each leaves lse = m + log2(total) with its result. Up to about 64 queries a key,
    bound by reading the cache, 2 (C + R) bytes a key (on an H200, the bandwidth of a copy for 128 rows of 4,096 keys;
    for one of 1,024 5 % of it: latency); beyond, by the tensor cores, 2 (2 C + R) operations a query and key.

    A warp adds the C + R products of a score one after the other, 16 at a time. So the columns are taken in two halves,
    whose sums do not wait for each other.
    """
    split, splits, b = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    HALF: tl.constexpr = C_PAD // 2
    c, r = tl.arange(0, HALF), tl.arange(0, R_PAD)
    row = tl.load(rows_ptr + b)
    position = tl.load(positions_ptr + b * S + i // H, mask=i < S * H, other=0)
    position = tl.minimum(position, length - 1).to(tl.int32)
    # Tiles count back from the last key that is seen: none reaches past it, but one before a row's start.
    seen = tl.max(position, 0) + 1
    tiles = tl.cdiv(seen, BLOCK_T)
    first, end = tiles * split // splits, tiles * (split + 1) // splits
    cache_ptr += row.to(tl.int64) * cache_row
    if PDL:  # the query is what the wait is for: the step, and all keys but the newest, were there before
        t = tl.maximum(seen - (first + 1) * BLOCK_T + tl.arange(0, BLOCK_T), 0)
        line = tl.minimum(tl.arange(0, triton.next_power_of_2((C + R + 63) // 64)) * 64, C + R - 1)
        prefetch(cache_ptr + (t * cache_t)[:, None] + line[None, :])
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    q_ptrs = q_ptr + b.to(tl.int64) * q_b + (i // H * q_s + i % H * q_h)[:, None]
    q_lo = tl.load(q_ptrs + c[None, :], mask=(i < S * H)[:, None] & (c < C)[None, :], other=0.0)
    q_hi = tl.load(q_ptrs + HALF + c[None, :], mask=(i < S * H)[:, None] & (c < C - HALF)[None, :], other=0.0)
    q_r = tl.load(q_ptrs + C + r[None, :], mask=(i < S * H)[:, None] & (r < R)[None, :], other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc_lo = tl.zeros((BLOCK_M, HALF), tl.float32)
    acc_hi = acc_lo
    for tile in range(first, end):
        t = seen - (tile + 1) * BLOCK_T + tl.arange(0, BLOCK_T)
        kv_lo = latent_tile(cache_ptr, cache_t, t, c, C)
        kv_hi = latent_tile(cache_ptr + HALF, cache_t, t, c, C - HALF)
        kv_r = latent_tile(cache_ptr + C, cache_t, t, r, R)
        s_lo = tl.dot(q_lo, kv_lo.T, input_precision="ieee")
        s_hi = tl.dot(q_hi, kv_hi.T, input_precision="ieee")
        s_hi = tl.dot(q_r, kv_r.T, s_hi, input_precision="ieee")
        seen_here = (t >= 0)[None, :] & (t[None, :] <= position[:, None])
        s = tl.where(seen_here, s_lo * scale + s_hi * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query may see no key of a tile
        p = tl.exp2(s - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        total = total * alpha + tl.sum(p, 1)
        m = m_new
        p = p.to(kv_lo.dtype)
        acc_lo = tl.dot(p, kv_lo, acc_lo * alpha[:, None], input_precision="ieee")
        acc_hi = tl.dot(p, kv_hi, acc_hi * alpha[:, None], input_precision="ieee")

    at = (b * splits + split).to(tl.int64) * S * H + i
    share = 1 / tl.where(total == 0, 1.0, total)[:, None]
    out_ptrs, inside = out_ptr + at[:, None] * C + c[None, :], (i < S * H)[:, None]
    tl.store(out_ptrs, (acc_lo * share).to(out_ptr.dtype.element_ty), mask=inside & (c < C)[None, :])
    tl.store(out_ptrs + HALF, (acc_hi * share).to(out_ptr.dtype.element_ty), mask=inside & (c < C - HALF)[None, :])
    if SPLIT:
        tl.store(lse_ptr + at, tl.where(total == 0, float("-inf"), m + tl.log2(total)), mask=i < S * H)


class Splits(NamedTuple):
    """
    The attention of B rows of S queries over each split of the keys, [B, splits, S, H, C], and lse [B, splits, S, H],
    log2 of its softmax's denominator. Where a split has no key that is -inf, and its part zero.
    """

    parts: torch.Tensor
    lse: torch.Tensor


class LatentConfig(NamedTuple):
    """
    block_m queries a program, tiles of block_t keys. `many`: by many_queries_kernel, whose warps and stages are its
    own.
    """

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    many: bool = False


def latent_config(
    B: int, queries: int, kv_len: int, dtype: torch.dtype, hopper: bool, many: bool = False
) -> LatentConfig:
    """How to run latent attention for B rows of `queries` = S * H. `many`: whether many_queries_kernel takes them."""
    if dtype == torch.float32:
        return LatentConfig(16, 16, num_warps=8, num_stages=1)
    if not hopper:  # as little as 99 KiB of shared memory
        return LatentConfig(16, 32, num_warps=4, num_stages=2)
    if B * cdiv(queries, 16) == 1 and kv_len <= 2048:  # V2-Lite's step takes 18 us less
        return LatentConfig(16, 32, num_warps=4, num_stages=3)
    if queries <= 16 or B * cdiv(queries, 16) <= 16:
        return LatentConfig(16, 64, num_warps=4, num_stages=3)
    if many and B * cdiv(queries, 32) > 16:
        return LatentConfig(SIDE, SIDE, num_warps=8, num_stages=2, many=True)
    return LatentConfig(32, 64, num_warps=8, num_stages=3)


@functools.lru_cache(4096)
def latent_splits(blocks: int, tiles: int, slots: int) -> int:
    """
    Into how many splits to cut the keys when each is worked on by `blocks` programs, of which `slots` run at a time.

    The time is that of the waves of programs, each 1 / n long for n splits, and about n / 64 more to merge. `tiles`
    bounds n; how long the rows really are is known on the device only.
    """
    return min(range(1, min(tiles, MOST_SPLITS) + 1), key=lambda n: cdiv(blocks * n, slots) / n * (1 + n / 64))


def launch_latent(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, scale: float, C: int,
    config: LatentConfig, splits: int,
) -> torch.Tensor | Splits:  # fmt: skip
    (B, S, H, _), R = q.shape, cache.shape[-1] - C
    parts = q.new_empty(B, splits, S, H, C)
    lse = q.new_empty(B, splits, S, H, dtype=torch.float32) if splits > 1 else None
    rows, positions, scale = rows.contiguous(), positions.contiguous(), scale * LOG2_E
    if config.many:
        launch_many_queries(q, cache, rows, positions, scale, C, parts, lse)
    else:
        latent_attention_kernel[(cdiv(S * H, config.block_m), splits, B)](
            q, cache, rows, positions, parts, lse, S, cache.shape[1], scale, *q.stride()[:3], *cache.stride()[:2],
            H, C, R, C_PAD=max(padded(C), 32), R_PAD=padded(R), BLOCK_M=config.block_m, BLOCK_T=config.block_t,
            SPLIT=splits > 1, num_warps=config.num_warps, num_stages=config.num_stages, **pdl_options(q.device),
        )  # fmt: skip
    return parts[:, 0] if lse is None else Splits(parts, lse)


def latent_attention(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, kv_len: int, scale: float,
    C: int,
) -> torch.Tensor | Splits:  # fmt: skip
    """
    See latent_attention_ref; where the keys are split, Splits, which expand_value merges. Work follows `positions`,
    read on the device; kv_len only decides how finely it is split.
    """
    if not on_gpu(q):
        return latent_attention_ref(q, cache, rows, positions, kv_len, scale, C)
    B, S, H, _ = q.shape
    kv_len = min(kv_len, cache.shape[1])
    config = latent_config(B, S * H, kv_len, q.dtype, on_hopper(q.device), takes(q, cache, C))
    tiles = cdiv(kv_len, config.block_t)
    splits = latent_splits(B * cdiv(S * H, config.block_m), tiles, multiprocessors(q.device))
    return launch_latent(q, cache, rows, positions, scale, C, config, splits)
