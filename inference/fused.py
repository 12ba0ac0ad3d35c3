"""
The small steps between the matrix products of a layer, each in one pass over memory.

At batch 1 they cost latency: one kernel each, every load in flight before the first is used. In prefill they cost
bandwidth: bytes read + bytes written, 4.3 TB/s on an H200. Where an FP8 product follows, they leave the activation
quantised, and with `keep=False` do not write it in its own type at all.

Those of attention are in latent.py. Dimension letters: M tokens, D dim, P terms of a sum, K any width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from config import BLOCK_SIZE
from gpu import EMPTY, cdiv, counters, multiprocessors, pdl_options, places
from kernel import E4M3, UE8M0, Quantised, act_quant_ref, on_gpu
from kernel_parts import quantise_groups

_GROUP, _EMPTY = tl.constexpr(BLOCK_SIZE), tl.constexpr(EMPTY)


# --- shared by the kernels and by the references ----------------------------------------------------------------------


@triton.jit
def store_normed(
    x, mean_square, weight, h_ptr, values_ptr, scale_ptr, m, M, eps, groups, cols, D: tl.constexpr, DTYPE: tl.constexpr,
    KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr,
):  # fmt: skip
    """h = x / sqrt(mean_square + eps) * weight, rounded to DTYPE, of token m as [groups, 128]; itself and quantised."""
    inside = cols < D
    h = (x * tl.rsqrt(mean_square + eps) * weight).to(DTYPE)
    if KEEP:
        tl.store(h_ptr + m * D + cols, h, mask=inside)
    if QUANTISE:
        values, scale = quantise_groups(h.to(tl.float32), UE8M0)
        tl.store(values_ptr + m * D + cols, values.to(values_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + groups.to(tl.int64) * M + m, scale, mask=groups * _GROUP < D)


def quantised_ref(x: torch.Tensor, scale_fmt: str | None, keep: bool = True) -> Quantised:
    """x [M, K] -> x (or None), and its e4m3 form."""
    values, scale = act_quant_ref(x, scale_fmt)
    return Quantised(x if keep else None, values, scale.t().contiguous().t())


def outputs(x: torch.Tensor, shape: tuple[int, int], quantise: bool, keep: bool) -> tuple:
    """Memory for an [M, K] result: itself (or None), its e4m3 values and their scales (or None and None)."""
    (M, K), own = shape, None
    if keep or not quantise:
        own = x.new_empty(M, K)
    if not quantise:
        return own, None, None
    # Column-major scales: a tile of the product reads the scales of its tokens for one group next to each other.
    return own, x.new_empty(M, K, dtype=E4M3), x.new_empty(cdiv(K, BLOCK_SIZE), M, dtype=torch.float32).t()


def result(own: torch.Tensor | None, values: torch.Tensor | None, scale: torch.Tensor | None):
    return own if values is None else Quantised(own, values, scale)


# --- residual add and norm --------------------------------------------------------------------------------------------


def add_rms_norm_ref(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
    quantise: bool = False, scale_fmt: str | None = None, keep: bool = True,
):  # fmt: skip
    """
    x [M, D], delta None, [M, D] or [M, P, D] -> x' [M, D] and h [M, D], Quantised on request:

        x' = x + sum over the P terms,  h = x' / sqrt(mean(x'^2) + eps) * weight

    Both in fp32 and rounded once to x's type; h is the norm of the rounded x'.
    """
    if delta is not None:
        total = x.float()
        for term in delta.view(x.shape[0], -1, x.shape[1]).unbind(1):
            total = total + term.float()
        x = total.to(x.dtype)
    h = F.rms_norm(x, weight.shape, weight, eps)
    return x, quantised_ref(h, scale_fmt, keep) if quantise else h


class Ranks(NamedTuple):
    """
    The ranks that a norm sums its terms over. buffers: the address of each one's memory, at `offset` of which it takes
    what others leave for it. two_shot: each token's sum is made by one rank for all, not by each for itself.
    """

    rank: int = 0
    world_size: int = 1
    buffers: tuple[int, ...] = (0,)
    offset: int = 0
    two_shot: bool = False


@triton.jit
def inbox(address, offset, DTYPE: tl.constexpr):
    """Where others leave numbers of type DTYPE."""
    BITS: tl.constexpr = tl.int16 if DTYPE.primitive_bitwidth == 16 else tl.int32
    return tl.multiple_of((address + offset).to(tl.pointer_type(BITS)), 16)


@triton.jit
def send(ptrs, x, inside, DTYPE: tl.constexpr):
    tl.store(ptrs, x.to(DTYPE).to(ptrs.dtype.element_ty, bitcast=True), mask=inside)


@triton.jit
def receive(x, ptrs, stride, inside, N: tl.constexpr, DTYPE: tl.constexpr):
    """x + the N numbers left at each of `ptrs`, `stride` apart, one after the other; when all are there."""
    total, waiting = x, 1
    while waiting > 0:
        total, absent = x, tl.zeros_like(x).to(tl.int32)
        for i in tl.static_range(N):
            found = tl.load(ptrs + i * stride, mask=inside, other=0, volatile=True)
            absent |= (found == _EMPTY).to(tl.int32)
            total += found.to(DTYPE, bitcast=True).to(tl.float32)
        waiting = tl.max(absent)
    tl.debug_barrier()  # threads that read the same number have it
    for i in tl.static_range(N):
        tl.store(ptrs + i * stride, _EMPTY, mask=inside)
    return total


@triton.jit
def sum_over_ranks(
    x, terms, buffers, offset, m, M, cols, D: tl.constexpr, DTYPE: tl.constexpr, RANK: tl.constexpr,
    WORLD: tl.constexpr, TWO_SHOT: tl.constexpr,
):  # fmt: skip
    """
    x + the sum of the ranks' `terms` of token m, each rounded to DTYPE, in the ranks' order. In one shot every rank
    leaves its terms with all. In two the tokens are dealt out: a rank leaves its terms with the token's own, which
    leaves the sum with all.
    """
    inside = cols < D
    own = inbox(buffers[RANK], offset, DTYPE)
    if not TWO_SHOT:
        for i in tl.static_range(WORLD):
            send(inbox(buffers[i], offset, DTYPE) + (RANK * M + m) * D + cols, terms, inside, DTYPE)
        return receive(x, own + m * D + cols, M * D, inside, WORLD, DTYPE)
    dealt = tl.cdiv(M, WORLD)
    address = buffers[0]
    for i in tl.static_range(1, WORLD):
        address = tl.where(m % WORLD == i, buffers[i], address)
    send(inbox(address, offset, DTYPE) + (RANK * dealt + m // WORLD) * D + cols, terms, inside, DTYPE)
    sums_at = (WORLD * dealt + m) * D
    if m % WORLD == RANK:
        total = receive(x, own + (m // WORLD) * D + cols, dealt * D, inside, WORLD, DTYPE)
        for i in tl.static_range(WORLD):
            send(inbox(buffers[i], offset, DTYPE) + sums_at + cols, total, inside, DTYPE)
    return receive(tl.zeros_like(x), own + sums_at + cols, 0, inside, 1, DTYPE)


@triton.jit
def sum_over_parts(x, places_ptr, m, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """The sum of the numbers x of the PARTS programs of token m, in their order, to each of them."""
    part, others = tl.program_id(1), tl.arange(0, PADDED)
    there = others < PARTS
    ptrs = places_ptr + m * PARTS * PARTS + others
    send(ptrs + others * (PARTS - 1) + part, tl.zeros((PADDED,), tl.float32) + x, there, tl.float32)
    return tl.sum(receive(tl.zeros((PADDED,), tl.float32), ptrs + part * PARTS, 0, there, 1, tl.float32))


@triton.jit
def add_terms(total, delta_ptr, m, cols, D: tl.constexpr, TERMS: tl.constexpr):
    for term in tl.static_range(TERMS):
        total += tl.load(delta_ptr + (m * TERMS + term) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, h_ptr, values_ptr, scale_ptr, places_ptr, buffers, offset, M, eps,
    D: tl.constexpr, TERMS: tl.constexpr, KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr, TWO_SHOT: tl.constexpr, GROUPS: tl.constexpr, OWN: tl.constexpr,
    PARTS: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: OWN groups of 128 of one token's GROUPS, of which it is one of PARTS. For the mean it reads all of
    them, which is cheaper than to wait for the others; but not where it waits for other ranks anyway.

    2 bytes an element read for x and each term, 2 + 1 or 2 + 2 written: at 83 % of an H200's bandwidth for 8,192 tokens
    and 9 terms. For one token latency.
    """
    m = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * OWN + tl.arange(0, OWN)
    own_cols = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    weight = tl.load(weight_ptr + own_cols, mask=own_cols < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if WORLD > 1:
        own = tl.load(x_ptr + m * D + own_cols, mask=own_cols < D, other=0.0).to(tl.float32)
        terms = add_terms(tl.zeros_like(own), delta_ptr, m, own_cols, D, TERMS)
        own = sum_over_ranks(own, terms, buffers, offset, m, M, own_cols, D, dtype, RANK, WORLD, TWO_SHOT)
        own = own.to(dtype).to(tl.float32)
        x = own
    else:
        cols = tl.arange(0, GROUPS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        x = tl.load(x_ptr + m * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        x = add_terms(x, delta_ptr, m, cols, D, TERMS).to(dtype).to(tl.float32)
        own = x
        if OWN < GROUPS:
            own = tl.load(x_ptr + m * D + own_cols, mask=own_cols < D, other=0.0).to(tl.float32)
            own = add_terms(own, delta_ptr, m, own_cols, D, TERMS).to(dtype).to(tl.float32)
    if TERMS > 0:
        tl.store(sum_ptr + m * D + own_cols, own.to(dtype), mask=own_cols < D)
    square = tl.sum(x * x)
    if WORLD > 1 and PARTS > 1:
        square = sum_over_parts(square, places_ptr, m, PARTS, PADDED)
    store_normed(
        own, square / D, weight, h_ptr, values_ptr, scale_ptr, m, M, eps, groups, own_cols, D, dtype, KEEP, QUANTISE,
        UE8M0,
    )  # fmt: skip


def own_groups(M: int, groups: int, quantise: bool, slots: int | None = None) -> int:
    """
    How many of a token's `groups` a program normalises, both powers of two: of few tokens an eighth, where they are
    quantised, which alone keeps a multiprocessor busy for a microsecond or two.

    `slots`, where the sum is over ranks: how many programs surely run at a time, as they wait for each other.
    """
    if slots is not None:
        parts = min(groups // 4, slots // M) if groups > 16 else 1
    else:
        parts = min(8, 32 // M) if quantise else 1
    return triton.next_power_of_2(cdiv(groups, max(parts, 1)))


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
    quantise: bool = False, scale_fmt: str | None = None, keep: bool = True, ranks: Ranks | None = None,
):  # fmt: skip
    """
    See add_rms_norm_ref. Without a delta x' is x itself, not a copy. With `ranks` the sum is over all ranks' terms.

    Two sums over ranks in a row take different memory: one that has the others' terms of the second knows that all
    have read the first's, whose memory the third takes.
    """
    if not on_gpu(x):
        return add_rms_norm_ref(x, delta, weight, eps, quantise, scale_fmt, keep)
    M, D = x.shape
    x = x.contiguous()
    total, terms = x, 0
    if delta is not None:
        delta, total = delta.contiguous(), torch.empty_like(x)
        terms = delta.numel() // x.numel()
    h, values, scale = outputs(x, (M, D), quantise, keep)
    ranks = ranks or Ranks()
    groups, alone = triton.next_power_of_2(cdiv(D, BLOCK_SIZE)), ranks.world_size == 1
    own = own_groups(M, groups, quantise, None if alone else multiprocessors(x.device))
    parts = cdiv(cdiv(D, BLOCK_SIZE), own)
    wide = groups if alone else own
    num_warps = min(max(wide // (4 if alone and (own < groups or 16 < M <= 256) else 2), 1), 32)  # 16 or 8 numbers each
    # Allowed more registers than it needs, it loads all terms before it adds the first.
    maxnreg = min(2048 // num_warps, 128 if M <= 8 else 64) if M <= 128 else None
    add_rms_norm_kernel[(M, parts)](
        x, delta, weight, total, h, values, scale, places(x.device), ranks.buffers, ranks.offset,
        M, eps, D, terms, h is not None, quantise, scale_fmt == UE8M0, ranks.rank, ranks.world_size, ranks.two_shot,
        groups, own, parts, triton.next_power_of_2(parts), num_warps=num_warps, maxnreg=maxnreg,
        **pdl_options(x.device),
    )  # fmt: skip
    return total, result(h, values, scale)


def sum_terms_ref(terms: torch.Tensor) -> torch.Tensor:
    """terms [M, P, D] -> their sum [M, D] in fp32, rounded once."""
    return terms.sum(1, dtype=torch.float32).to(terms.dtype)


@triton.jit
def sum_terms_kernel(terms_ptr, out_ptr, D, TERMS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program: BLOCK columns of one token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for term in tl.static_range(TERMS):
        total += tl.load(terms_ptr + (m * TERMS + term) * D + col, mask=col < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * D + col, total.to(out_ptr.dtype.element_ty), mask=col < D)


def sum_terms(terms: torch.Tensor) -> torch.Tensor:
    """See sum_terms_ref."""
    if not on_gpu(terms):
        return sum_terms_ref(terms)
    terms = terms.contiguous()
    M, P, D = terms.shape
    out = terms.new_empty(M, D)
    sum_terms_kernel[(M, cdiv(D, 1024))](terms, out, D, P, 1024, num_warps=4, **pdl_options(terms.device))
    return out


# --- the gate of an MLP -----------------------------------------------------------------------------------------------


def silu_mul_ref(y: torch.Tensor, quantise: bool = False, scale_fmt: str | None = None, keep: bool = True):
    """y [M, 2, inter] -> silu(y[:, 0]) * y[:, 1] [M, inter], each factor rounded to y's type, Quantised on request."""
    x = F.silu(y[:, 0]) * y[:, 1]
    return quantised_ref(x, scale_fmt, keep) if quantise else x


@triton.jit
def silu_mul_kernel(
    y_ptr, out_ptr, values_ptr, scale_ptr, M, INTER: tl.constexpr,
    KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK groups of 128, which may be of several tokens. Reads 4 bytes an output, writes 1 or 2."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    per_token = tl.cdiv(INTER, _GROUP)
    m, group = (item // per_token).to(tl.int64), item % per_token
    cols = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    inside = (m < M)[:, None] & (cols < INTER)
    gate_ptrs = y_ptr + (2 * INTER * m)[:, None] + cols
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + INTER, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1 + tl.exp(-gate))).to(y_ptr.dtype.element_ty)
    x = (silu.to(tl.float32) * up).to(y_ptr.dtype.element_ty)
    cells = (INTER * m)[:, None] + cols
    if KEEP:
        tl.store(out_ptr + cells, x, mask=inside)
    if QUANTISE:
        values, scale = quantise_groups(x.to(tl.float32), UE8M0)
        tl.store(values_ptr + cells, values.to(values_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + group.to(tl.int64) * M + m, scale, mask=m < M)


def silu_mul(y: torch.Tensor, quantise: bool = False, scale_fmt: str | None = None, keep: bool = True):
    """See silu_mul_ref."""
    if not on_gpu(y):
        return silu_mul_ref(y, quantise, scale_fmt, keep)
    M, _, inter = y.shape
    out, values, scale = outputs(y, (M, inter), quantise, keep)
    items = M * cdiv(inter, BLOCK_SIZE)
    block = 4 if items <= 4096 else 16
    silu_mul_kernel[(cdiv(items, block),)](
        y.contiguous(), out, values, scale, M, inter, out is not None, quantise, scale_fmt == UE8M0, block,
        num_warps=2 if block == 4 else 4, **pdl_options(y.device),
    )  # fmt: skip
    return result(out, values, scale)


# --- the likeliest token ----------------------------------------------------------------------------------------------


def argmax_ref(x: torch.Tensor) -> torch.Tensor:
    """x [B, V] -> the index of each row's largest number, of equal ones the first: [B] int64."""
    return x.argmax(-1)


@triton.jit
def argmax_kernel(
    x_ptr, out_ptr, best_ptr, where_ptr, counter_ptr, V, CHUNKS: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """One program: BLOCK_V numbers of a row, of CHUNKS; the last one compares the chunks."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b, chunk = tl.program_id(0), tl.program_id(1)
    v = chunk * BLOCK_V + tl.arange(0, BLOCK_V)
    x = tl.load(x_ptr + b.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    best, where = tl.max(x, 0, return_indices=True)
    tl.store(best_ptr + b * CHUNKS + chunk, best)
    tl.store(where_ptr + b * CHUNKS + chunk, chunk * BLOCK_V + where)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + b, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
        chunks = tl.arange(0, CHUNKS)
        there = chunks < tl.num_programs(1)
        cells = b * CHUNKS + chunks
        all_best = tl.load(best_ptr + cells, mask=there, other=float("-inf"), cache_modifier=".cg")
        all_where = tl.load(where_ptr + cells, mask=there, other=0, cache_modifier=".cg")
        _, first = tl.max(all_best, 0, return_indices=True)
        found = tl.sum(tl.where(chunks == first, all_where, 0))
        tl.store(out_ptr + b, tl.minimum(found, V - 1).to(tl.int64))  # a token, even of nothing but NaN
        tl.store(counter_ptr + b, 0)


def argmax(x: torch.Tensor) -> torch.Tensor:
    """See argmax_ref."""
    if not on_gpu(x) or x.shape[0] > 4096:
        return argmax_ref(x)
    x = x.contiguous()
    B, V = x.shape
    block_v = 2048
    chunks = cdiv(V, block_v)
    padded = triton.next_power_of_2(chunks)
    out = torch.empty(B, dtype=torch.int64, device=x.device)
    best, where = x.new_empty(B, padded), torch.empty(B, padded, dtype=torch.int32, device=x.device)
    argmax_kernel[(B, chunks)](
        x, out, best, where, counters(x.device), V, padded, block_v, num_warps=4, **pdl_options(x.device)
    )
    return out
