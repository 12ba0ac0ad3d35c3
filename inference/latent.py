"""
The small steps of MLA around its attention (V3 paper, 2.1.1), each in one pass over memory, as in fused.py: rotary
embedding, the latents that are cached, and the two halves of wkv_b.

Dimension letters: M tokens (B rows of S), H local heads, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim. `rotation` [M, R / 2, 2] holds cos and sin of each rotary pair's angle in fp32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from attention import Splits, cache_write
from config import BLOCK_SIZE
from fused import outputs, own_groups, quantised_ref, result, store_normed
from gpu import cdiv, on_hopper, pdl_options
from kernel import UE8M0, Quantised, act_quant, on_gpu
from kernel_parts import prefetch, quantise_groups

_GROUP = tl.constexpr(BLOCK_SIZE)


# --- rotary embedding -------------------------------------------------------------------------------------------------


@triton.jit
def rotated(x, rotation, PAIRS: tl.constexpr):
    """x [rows, 2 * PAIRS] fp32, rotation [rows or 1, 2 * PAIRS] -> x with its pairs turned."""
    x0, x1 = tl.split(tl.reshape(x, (x.shape[0], PAIRS, 2)))
    cos, sin = tl.split(tl.reshape(rotation, (rotation.shape[0], PAIRS, 2)))
    return tl.reshape(tl.join(x0 * cos - x1 * sin, x0 * sin + x1 * cos), (x.shape[0], 2 * PAIRS))


def apply_rotary_ref(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x [M, heads, R] -> the pairs (x0, x1), (x2, x3), ... turned: (x0 cos - x1 sin, x0 sin + x1 cos)."""
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, None].unbind(-1)
    return torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1).flatten(-2).to(x.dtype)


def rotate_query_ref(q: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """q [M, H, N + R] -> q, the last R of each head turned, in place if q is contiguous."""
    q, R = q.contiguous(), 2 * rotation.shape[-2]
    q[..., -R:] = apply_rotary_ref(q[..., -R:], rotation)
    return q


@triton.jit
def rotate_query_kernel(
    q_ptr, rotation_ptr, H, q_stride, QK: tl.constexpr, R: tl.constexpr,
    BLOCK_H: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H heads of one token. Reads and writes R of each head's N + R elements, 2 bytes each."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    col = tl.arange(0, 2 * PAIRS)
    rotation = tl.load(rotation_ptr + m * R + col, mask=col < R, other=0.0)
    ptrs = q_ptr + m * q_stride + heads[:, None] * QK + (QK - R) + col[None, :]
    inside = (heads < H)[:, None] & (col < R)[None, :]
    x = tl.load(ptrs, mask=inside, other=0.0)
    tl.store(ptrs, rotated(x.to(tl.float32), rotation[None, :], PAIRS).to(x.dtype), mask=inside)


def rotate_query(q: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """See rotate_query_ref; on a GPU always in place. A token's heads lie together."""
    if not on_gpu(q):
        return rotate_query_ref(q, rotation)
    M, H, QK = q.shape
    R = 2 * rotation.shape[-2]
    block_h = min(triton.next_power_of_2(H), 32)
    rotate_query_kernel[(M, cdiv(H, block_h))](
        q, rotation.contiguous(), H, q.stride(0), QK, R, block_h, triton.next_power_of_2(R) // 2,
        num_warps=4, **pdl_options(q.device),
    )  # fmt: skip
    return q


# --- the latents of MLA -----------------------------------------------------------------------------------------------


def latents_ref(
    y: torch.Tensor, q_weight: torch.Tensor | None, kv_weight: torch.Tensor, rotation: torch.Tensor,
    cache: torch.Tensor | None, rows: torch.Tensor, positions: torch.Tensor, *, kv_at: int, eps: float,
    quantise: bool = False, scale_fmt: str | None = None, keep: bool = True,
):  # fmt: skip
    """
    y [M, ...], of which the columns from 0 are the query's latent (unless q_weight is None) and those from kv_at on the
    C of the key's and value's latent and the R of the rotary key -> q [M, q_lora_rank] or None, kv [M, C + R]:

        q = norm(y_q) * q_weight,  kv = [norm(y_c) * kv_weight, rotary(y_pe)]

    q is Quantised on request. kv is also written to cache [rows, length, C + R], where rows [B], positions [B, S] say
    and the position is inside it (see cache_write).
    """
    C, R = kv_weight.shape[0], 2 * rotation.shape[-2]
    q = None
    if q_weight is not None:
        q = F.rms_norm(y[:, : q_weight.shape[0]], q_weight.shape, q_weight, eps)
        q = quantised_ref(q, scale_fmt, keep) if quantise else q
    latent, k_pe = y[:, kv_at : kv_at + C + R].split([C, R], dim=-1)
    kv = torch.cat([F.rms_norm(latent, (C,), kv_weight, eps), apply_rotary_ref(k_pe[:, None], rotation)[:, 0]], dim=-1)
    if cache is not None:
        cache_write(cache, kv.view(*positions.shape, -1), rows, positions)
    return q, kv


@triton.jit
def query_latent(
    y_ptr, weight_ptr, q_ptr, values_ptr, scale_ptr, m, M, part, eps, RANK: tl.constexpr, KEEP: tl.constexpr,
    QUANTISE: tl.constexpr, UE8M0: tl.constexpr, GROUPS: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, GROUPS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    groups = part * OWN + tl.arange(0, OWN)
    own_cols = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    weight = tl.load(weight_ptr + own_cols, mask=own_cols < RANK, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(y_ptr + cols, mask=cols < RANK, other=0.0).to(tl.float32)
    own = x
    if OWN < GROUPS:
        own = tl.load(y_ptr + own_cols, mask=own_cols < RANK, other=0.0).to(tl.float32)
    store_normed(
        own, tl.sum(x * x) / RANK, weight, q_ptr, values_ptr, scale_ptr, m, M, eps, groups, own_cols, RANK,
        y_ptr.dtype.element_ty, KEEP, QUANTISE, UE8M0,
    )  # fmt: skip


@triton.jit
def key_value_latent(
    y_ptr, weight_ptr, rotation_ptr, kv_ptr, cache_ptr, rows_ptr, positions_ptr, m, S, row_stride, token_stride, length,
    eps, C: tl.constexpr, R: tl.constexpr, CACHE: tl.constexpr, KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, 2 * PAIRS)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    rotation = tl.load(rotation_ptr + m * R + r, mask=r < R, other=0.0)
    if CACHE:
        position = tl.load(positions_ptr + m).to(tl.int64)
        row = tl.load(rows_ptr + m // S).to(tl.int64)
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(y_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    k_pe = tl.load(y_ptr + C + r, mask=r < R, other=0.0).to(tl.float32)
    latent = (x * tl.rsqrt(tl.sum(x * x) / C + eps) * weight).to(y_ptr.dtype.element_ty)
    k_pe = tl.reshape(rotated(k_pe[None, :], rotation[None, :], PAIRS), (2 * PAIRS,)).to(y_ptr.dtype.element_ty)
    if KEEP:
        tl.store(kv_ptr + m * (C + R) + c, latent, mask=c < C)
        tl.store(kv_ptr + m * (C + R) + C + r, k_pe, mask=r < R)
    if CACHE:
        entry_ptr = cache_ptr + row * row_stride + position * token_stride
        tl.store(entry_ptr + c, latent.to(cache_ptr.dtype.element_ty), mask=(c < C) & (position < length))
        tl.store(entry_ptr + C + r, k_pe.to(cache_ptr.dtype.element_ty), mask=(r < R) & (position < length))


@triton.jit
def latents_kernel(
    y_ptr, q_weight_ptr, kv_weight_ptr, rotation_ptr, q_ptr, values_ptr, scale_ptr, kv_ptr,
    cache_ptr, rows_ptr, positions_ptr, M, S, y_stride, row_stride, token_stride, length, eps,
    Q_RANK: tl.constexpr, KV_AT: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr, CACHE: tl.constexpr,
    GROUPS: tl.constexpr, OWN: tl.constexpr, BLOCK_C: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    Programs of a token, side by side: one for the key and value latent with the rotary key, and for the query latent
    one for each OWN of its GROUPS, as in add_rms_norm_kernel.

    For one token 1.3 us on an H200, latency. What was there before the step is loaded before the wait: from memory it
    takes longer than what was just written. Without a query latent the next kernel is let in at once, which saves
    V2-Lite's step 18 us; with one, when a product follows, that would cost one rank of 8, of 11 layers, 16.
    """
    m = tl.program_id(0).to(tl.int64)
    y_ptr += m * y_stride
    if tl.program_id(1) == 0:
        key_value_latent(
            y_ptr + KV_AT, kv_weight_ptr, rotation_ptr, kv_ptr, cache_ptr, rows_ptr, positions_ptr, m, S,
            row_stride, token_stride, length, eps, C, R, CACHE, True, BLOCK_C, PAIRS, Q_RANK == 0, PDL,
        )  # fmt: skip
    elif Q_RANK > 0:
        query_latent(
            y_ptr, q_weight_ptr, q_ptr, values_ptr, scale_ptr, m, M, tl.program_id(1) - 1, eps, Q_RANK, KEEP, QUANTISE,
            UE8M0, GROUPS, OWN, PDL,
        )  # fmt: skip


def latents(
    y: torch.Tensor, q_weight: torch.Tensor | None, kv_weight: torch.Tensor, rotation: torch.Tensor,
    cache: torch.Tensor | None, rows: torch.Tensor, positions: torch.Tensor, *, kv_at: int, eps: float,
    quantise: bool = False, scale_fmt: str | None = None, keep: bool = True,
):  # fmt: skip
    """See latents_ref. A cache's last dimension is contiguous."""
    if not on_gpu(y):
        options = {"kv_at": kv_at, "eps": eps, "quantise": quantise, "scale_fmt": scale_fmt, "keep": keep}
        return latents_ref(y, q_weight, kv_weight, rotation, cache, rows, positions, **options)
    M, C, R = y.shape[0], kv_weight.shape[0], 2 * rotation.shape[-2]
    q_rank = 0 if q_weight is None else q_weight.shape[0]
    quantise = quantise and q_rank > 0
    q, values, scale = outputs(y, (M, q_rank), quantise, keep) if q_rank else (None, None, None)
    kv = y.new_empty(M, C + R)
    row_stride, token_stride, length = (0, 0, 0) if cache is None else (*cache.stride()[:2], cache.shape[1])
    groups = triton.next_power_of_2(max(cdiv(q_rank, BLOCK_SIZE), 1))
    own = own_groups(M, groups, quantise)
    latents_kernel[(M, 1 + cdiv(cdiv(q_rank, BLOCK_SIZE), own))](
        y, q_weight, kv_weight, rotation.contiguous(), q, values, scale, kv,
        cache, rows.contiguous(), positions.contiguous(), M, positions.shape[-1], y.stride(0), row_stride, token_stride,
        length, eps, q_rank, kv_at, C, R, q is not None, quantise, scale_fmt == UE8M0, cache is not None,
        groups, own, triton.next_power_of_2(C), triton.next_power_of_2(R) // 2, num_warps=4, **pdl_options(y.device),
    )  # fmt: skip
    return result(q, values, scale), kv


def join_keys_ref(kv: torch.Tensor, k_pe: torch.Tensor, N: int) -> torch.Tensor:
    """kv [M, H, N + V] and the rotary keys k_pe [M, R] -> k [M, H, N + R] = [kv[:N], k_pe] of each head."""
    return torch.cat([kv[..., :N], k_pe[:, None].expand(-1, kv.shape[1], -1)], dim=-1)


@triton.jit
def join_keys_kernel(
    kv_ptr, k_pe_ptr, k_ptr, k_pe_stride, H: tl.constexpr, N: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """
    One program: BLOCK_H heads of one token. 2 N bytes a head read, 2 (N + R) written: at about 83 % of an H200's
    bandwidth for 8,192 tokens.
    """
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    n, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    head = (m * H + h)[:, None]
    inside = (h < H)[:, None] & (n < N)[None, :]
    tl.store(k_ptr + head * (N + R) + n, tl.load(kv_ptr + head * (N + V) + n, mask=inside, other=0.0), mask=inside)
    k_pe = tl.load(k_pe_ptr + m * k_pe_stride + r, mask=r < R, other=0.0)
    k_pe = tl.broadcast_to(k_pe[None, :], (BLOCK_H, BLOCK_R))
    tl.store(k_ptr + head * (N + R) + N + r[None, :], k_pe, mask=(h < H)[:, None] & (r < R)[None, :])


def join_keys(kv: torch.Tensor, k_pe: torch.Tensor, N: int) -> torch.Tensor:
    """See join_keys_ref."""
    if not on_gpu(kv):
        return join_keys_ref(kv, k_pe, N)
    (M, H, both), R = kv.shape, k_pe.shape[1]
    k = kv.new_empty(M, H, N + R)
    block_h = min(triton.next_power_of_2(H), 16)
    join_keys_kernel[(M, cdiv(H, block_h))](
        kv.contiguous(), k_pe, k, k_pe.stride(0), H, N, both - N, R, block_h, triton.next_power_of_2(N),
        triton.next_power_of_2(R), num_warps=4,
    )  # fmt: skip
    return k


# --- the halves of wkv_b, for attention inside the latent space -------------------------------------------------------


def block_sizes(M: int, fp32: bool) -> tuple[int, int]:
    """Tokens and outputs a program: fp32 products do not use the tensor cores, and are unrolled."""
    return (16, 32) if fp32 else (min(max(triton.next_power_of_2(M), 16), 64), 128)


def absorb_query_ref(q: torch.Tensor, w_uk: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """q [M, H, N + R], w_uk [H, N, C] -> [q_nope W_UK, rotary(q_pe)] [M, H, C + R]."""
    q_nope, q_pe = q.split([w_uk.shape[1], 2 * rotation.shape[-2]], dim=-1)
    return torch.cat([torch.einsum("mhn,hnc->mhc", q_nope, w_uk), apply_rotary_ref(q_pe, rotation)], dim=-1)


def absorb_beside_latents_ref(
    y: torch.Tensor, w_uk: torch.Tensor, kv_weight: torch.Tensor, rotation: torch.Tensor, cache: torch.Tensor,
    rows: torch.Tensor, positions: torch.Tensor, *, kv_at: int, eps: float,
):  # fmt: skip
    """absorb_query of the queries that y [M, ...] begins with, a head after the other; and latents of the rest."""
    latents_ref(y, None, kv_weight, rotation, cache, rows, positions, kv_at=kv_at, eps=eps)
    return absorb_query_ref(own_heads(y, w_uk, rotation), w_uk, rotation)


def own_heads(y: torch.Tensor, w_uk: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """y [M, ...] -> [M, H, N + R] of its first columns."""
    H, QK = w_uk.shape[0], w_uk.shape[1] + 2 * rotation.shape[-2]
    return y[:, : H * QK].unflatten(1, (H, QK))


@triton.jit
def absorb_query_kernel(
    q_ptr, w_ptr, rotation_ptr, out_ptr, kv_weight_ptr, cache_ptr, rows_ptr, positions_ptr, M, S, q_stride, head_stride,
    row_stride, cache_row, cache_token, length, eps, H: tl.constexpr, N: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, KV_AT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LATENT: tl.constexpr, PAIRS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: BLOCK_M tokens of one head, BLOCK_C outputs; the first also turns the head's rotary part. Bound by
    reading W_UK (2 * H * N * C bytes), which does not depend on the kernel before and so does not wait for it: on an
    H200 5.5 us for V3's 16.8 MB, 71 % of the bandwidth.

    With KV_AT programs after the last head's each cache a token's latents, as latents_kernel does.
    """
    if KV_AT > 0:
        beside = tl.program_id(0) - H
        if beside >= 0:
            m = ((beside * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)).to(tl.int64)
            if m < M:
                key_value_latent(
                    q_ptr + m * q_stride + KV_AT, kv_weight_ptr, rotation_ptr, q_ptr, cache_ptr, rows_ptr,
                    positions_ptr, m, S, cache_row, cache_token, length, eps, C, R, True, False, LATENT, PAIRS, False,
                    PDL,
                )  # fmt: skip
            return
    h, first_c = tl.program_id(0), tl.program_id(1) * BLOCK_C
    n, c = tl.arange(0, BLOCK_N), first_c + tl.arange(0, BLOCK_C)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    w_ptrs = w_ptr + h.to(tl.int64) * head_stride + n[:, None] * row_stride + c[None, :]
    w = tl.load(w_ptrs, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    r = tl.arange(0, 2 * PAIRS)
    rotary = (m < M)[:, None] & (r < R)[None, :] & (first_c == 0)
    rotation = tl.load(rotation_ptr + m.to(tl.int64)[:, None] * R + r[None, :], mask=rotary, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = m.to(tl.int64)[:, None] * H + h
    q_ptrs = q_ptr + m.to(tl.int64)[:, None] * q_stride + h * (N + R)
    q = tl.load(q_ptrs + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
    out = tl.dot(q, w, input_precision=PRECISION)
    out_ptrs = out_ptr + head * (C + R) + c[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])
    if first_c == 0:
        q_pe = tl.load(q_ptrs + N + r[None, :], mask=rotary, other=0.0).to(tl.float32)
        q_pe = rotated(q_pe, rotation, PAIRS).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + head * (C + R) + C + r[None, :], q_pe, mask=rotary)


def absorb_query(q: torch.Tensor, w_uk: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """See absorb_query_ref. w_uk may be any view whose last dimension is contiguous; a token's heads lie together."""
    if not on_gpu(q):
        return absorb_query_ref(q, w_uk, rotation)
    return launch_absorb(q, w_uk, rotation)


def absorb_beside_latents(
    y: torch.Tensor, w_uk: torch.Tensor, kv_weight: torch.Tensor, rotation: torch.Tensor, cache: torch.Tensor,
    rows: torch.Tensor, positions: torch.Tensor, *, kv_at: int, eps: float,
):  # fmt: skip
    """
    See absorb_beside_latents_ref. One launch, as neither needs the other: V2-Lite's step of 8 and 64 rows takes 33 and
    31 us less. For one token two, of which the second loads its weights during the first: 1.66 -> 1.60 ms.
    """
    if not on_gpu(y):
        return absorb_beside_latents_ref(y, w_uk, kv_weight, rotation, cache, rows, positions, kv_at=kv_at, eps=eps)
    q = own_heads(y, w_uk, rotation)
    if len(y) == 1:
        latents(y, None, kv_weight, rotation, cache, rows, positions, kv_at=kv_at, eps=eps)
        return absorb_query(q, w_uk, rotation)
    return launch_absorb(q, w_uk, rotation, (kv_weight, cache, rows.contiguous(), positions.contiguous()), kv_at, eps)


def launch_absorb(
    q: torch.Tensor, w_uk: torch.Tensor, rotation: torch.Tensor, latent: tuple[torch.Tensor, ...] | None = None,
    kv_at: int = 0, eps: float = 0.0,
):  # fmt: skip
    """latent: kv_weight, cache, rows, positions of absorb_beside_latents, kv_at columns behind q's first."""
    (M, H, _), (_, N, C), R = q.shape, w_uk.shape, 2 * rotation.shape[-2]
    out = q.new_empty(M, H, C + R)
    block_m, block_c = block_sizes(M, q.dtype == torch.float32)
    if H * C < 128 * 132:  # fewer programs than multiprocessors: narrower ones
        block_c //= 2
    _, cache, _, positions = latent or (None,) * 4
    where = (1, 0, 0, 0) if latent is None else (positions.shape[1], *cache.stride()[:2], cache.shape[1])
    S, row_stride, token_stride, length = where
    blocks = cdiv(C, block_c), cdiv(M, block_m)
    beside = cdiv(M, blocks[0] * blocks[1]) if latent else 0
    absorb_query_kernel[(H + beside, *blocks)](
        q, w_uk, rotation.contiguous(), out, *(latent or (None,) * 4), M, S, q.stride(0), w_uk.stride(0),
        w_uk.stride(1), row_stride, token_stride, length, eps, H, N, C, R, kv_at,
        "ieee" if q.dtype == torch.float32 else "tf32", block_m, max(triton.next_power_of_2(N), 16), block_c,
        triton.next_power_of_2(C), triton.next_power_of_2(R) // 2, num_warps=4, **pdl_options(q.device),
    )  # fmt: skip
    return out


def merge_ref(splits: Splits) -> torch.Tensor:
    """-> attention over all keys [B, S, H, C], in fp32: the parts' mean with weights 2^lse."""
    weight = (splits.lse * math.log(2)).softmax(1)
    return torch.einsum("bnsh,bnshc->bshc", weight, splits.parts.float())


def expand_value_ref(
    o: torch.Tensor | Splits, w_uv: torch.Tensor, quantise: bool = False, scale_fmt: str | None = None,
    keep: bool = True,
):  # fmt: skip
    """o [B, S, H, C], or its Splits, w_uv [H, V, C] -> o W_UV^T of each head, [M, H * V], Quantised on request."""
    if isinstance(o, Splits):
        x = torch.einsum("bshc,hvc->bshv", merge_ref(o), w_uv.float()).to(w_uv.dtype)
    else:
        x = torch.einsum("bshc,hvc->bshv", o, w_uv)
    x = x.flatten(2).flatten(0, 1)
    return quantised_ref(x, scale_fmt, keep) if quantise else x


@triton.jit
def expand_value_kernel(
    o_ptr, lse_ptr, w_ptr, out_ptr, values_ptr, scale_ptr, M, S, splits, head_stride, row_stride, H: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr,
    PRECISION: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: TOKENS tokens of one head, BLOCK_V outputs. Bound by reading W_UV (2 * H * V * C bytes).

    The tensor cores take 16 rows or more, and decoding has fewer tokens: the splits of attention's keys are rows too,
    and their products, not they, are merged (merge_ref), without a launch of its own. On an H200 7 us for V3's 16.8 MB
    and a token of 17 splits, 56 % of the bandwidth.
    """
    h = tl.program_id(0)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if PDL:
        row = h.to(tl.int64) * head_stride + tl.minimum(v, V - 1)[:, None] * row_stride
        prefetch(w_ptr + row + tl.minimum(tl.arange(0, LINES) * 64, C - 1)[None, :])
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i = tl.arange(0, TOKENS * SPLITS)
    token = tl.program_id(2) * TOKENS + i // SPLITS
    there = (token < M) & (i % SPLITS < splits)
    at = ((token // S * splits + i % SPLITS) * S + token % S).to(tl.int64) * H + h
    if SPLITS > 1:
        lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
    acc = tl.zeros((TOKENS * SPLITS, BLOCK_V), dtype=tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        o = tl.load(o_ptr + at[:, None] * C + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        w_ptrs = w_ptr + h.to(tl.int64) * head_stride + v[None, :] * row_stride + c[:, None]
        w = tl.load(w_ptrs, mask=(v < V)[None, :] & (c < C)[:, None], other=0.0)
        acc = tl.dot(o, w, acc, input_precision=PRECISION)
    if SPLITS > 1:  # only now: the loads above wait for nothing
        lse = tl.reshape(lse, (TOKENS, SPLITS))
        most = tl.max(lse, 1)  # -inf past the last token
        weight = tl.exp2(lse - tl.where(most == float("-inf"), 0.0, most)[:, None])
        total = tl.sum(weight, 1)
        weight /= tl.where(total == 0, 1.0, total)[:, None]
        acc = tl.sum(tl.reshape(acc, (TOKENS, SPLITS, BLOCK_V)) * weight[:, :, None], 1)
    m = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    out = acc.to(o_ptr.dtype.element_ty)
    cells = (m.to(tl.int64) * H + h)[:, None] * V + v[None, :]
    inside = (m < M)[:, None] & (v < V)[None, :]
    if KEEP:
        tl.store(out_ptr + cells, out, mask=inside)
    if QUANTISE:
        values, scale = quantise_groups(out.to(tl.float32), UE8M0)
        tl.store(values_ptr + cells, values.to(values_ptr.dtype.element_ty), mask=inside)
        group = (h * V + tl.program_id(1) * BLOCK_V) // BLOCK_V
        tl.store(scale_ptr + group.to(tl.int64) * M + m, scale, mask=m < M)


def expand_value(
    o: torch.Tensor | Splits, w_uv: torch.Tensor, quantise: bool = False, scale_fmt: str | None = None,
    keep: bool = True,
):  # fmt: skip
    """See expand_value_ref. w_uv may be any view whose last dimension is contiguous."""
    parts, lse = o if isinstance(o, Splits) else (o[:, None], None)
    if not on_gpu(parts):
        return expand_value_ref(o, w_uv, quantise, scale_fmt, keep)
    (B, splits, S, H, C), V = parts.shape, w_uv.shape[1]
    M, slots, fp32 = B * S, triton.next_power_of_2(splits), parts.dtype == torch.float32
    if quantise and V % BLOCK_SIZE:  # groups that span heads
        x = expand_value(o, w_uv)
        return Quantised(x if keep else None, *act_quant(x, scale_fmt))
    block_m, block_v = block_sizes(M * slots, fp32)
    if quantise:
        block_v = BLOCK_SIZE
    elif H * V < 128 * 132:  # fewer programs than multiprocessors: narrower ones
        block_v = 32
    tokens = max(block_m // slots, 1)
    num_stages = (4 if on_hopper(parts.device) else 3) - (tokens * slots > 64)  # what shared memory holds
    out, values, scale = outputs(parts, (M, H * V), quantise, keep)
    expand_value_kernel[(H, cdiv(V, block_v), cdiv(M, tokens))](
        parts.contiguous(), lse, w_uv, out, values, scale, M, S, splits, w_uv.stride(0), w_uv.stride(1), H, V, C,
        out is not None, quantise, scale_fmt == UE8M0, "ieee" if fp32 else "tf32", tokens, slots, block_v,
        32 if fp32 else 128, triton.next_power_of_2(cdiv(C, 64)),
        num_warps=4, num_stages=num_stages, **pdl_options(parts.device),
        enable_fp_fusion=False,  # threads that hold copies of a merged sum must agree on its last bit
    )  # fmt: skip
    return result(out, values, scale)
