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
from gpu import cdiv, counters, pdl_options
from kernel import E4M3, UE8M0, Quantised, act_quant_ref, on_gpu
from kernel_parts import quantise_groups

_GROUP = tl.constexpr(BLOCK_SIZE)


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
    The ranks that a norm sums its terms over, and what they share: device addresses of each rank's memory, at `offset`
    of which the rows lie, and of its signals, a word for each token and rank. epochs: sums so far, for each token.
    """

    rank: int = 0
    world_size: int = 1
    buffers: int = 0
    signals: int = 0
    offset: int = 0
    epochs: torch.Tensor | None = None


@triton.jit
def meet(signals_ptr, epoch_ptr, RANK: tl.constexpr, WORLD: tl.constexpr):
    """
    What each rank's program stored before is there for all of them after it. A rank writes the number of the meeting
    into its word at every other, and waits for that number, or one later, in theirs.
    """
    ranks = tl.arange(0, WORLD)
    epoch = tl.load(epoch_ptr) + 1
    theirs = tl.load(signals_ptr + ranks).to(tl.pointer_type(tl.int32)) + tl.program_id(0) * WORLD + RANK
    own = tl.load(signals_ptr + RANK).to(tl.pointer_type(tl.int32)) + tl.program_id(0) * WORLD + ranks
    tl.debug_barrier()
    tl.atomic_xchg(theirs, epoch + tl.zeros_like(ranks), sem="release", scope="sys")
    while tl.min(tl.atomic_add(own, tl.zeros_like(ranks), sem="acquire", scope="sys") - epoch, 0) < 0:
        pass
    tl.store(epoch_ptr, epoch)
    tl.debug_barrier()


@triton.jit
def shared_row(buffers_ptr, rank, offset, like_ptr):
    """Where a rank's rows lie."""
    return tl.multiple_of((tl.load(buffers_ptr + rank) + offset).to(like_ptr.dtype), 16)


@triton.jit
def add_terms(total, delta_ptr, m, cols, D: tl.constexpr, TERMS: tl.constexpr):
    for term in tl.static_range(TERMS):
        total += tl.load(delta_ptr + (m * TERMS + term) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    return total


@triton.jit
def add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, h_ptr, values_ptr, scale_ptr, buffers, signals, offset, epochs_ptr, M, eps,
    D: tl.constexpr, TERMS: tl.constexpr, KEEP: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr,
    RANK: tl.constexpr, WORLD: tl.constexpr, GROUPS: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: OWN groups of 128 of one token's GROUPS; all of them for the mean, which is cheaper than to wait for
    others. 2 bytes an element read for x and each term, 2 + 1 or 2 + 2 written: at 83 % of an H200's bandwidth for
    8,192 tokens and 9 terms. For one token of 7,168 channels latency: 2 us, with 9 terms 4.4.

    With WORLD ranks each stores the sum of its own terms, and adds those of all in the ranks' order.
    """
    m = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, GROUPS)[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    groups = tl.program_id(1) * OWN + tl.arange(0, OWN)
    own_cols = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    weight = tl.load(weight_ptr + own_cols, mask=own_cols < D, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + m * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    if WORLD > 1:
        buffers_ptr = buffers.to(tl.pointer_type(tl.uint64))
        own_ptr = shared_row(buffers_ptr, RANK, offset, x_ptr)
        own_sum = add_terms(tl.zeros_like(x), delta_ptr, m, cols, D, TERMS)
        tl.store(own_ptr + m * D + cols, own_sum.to(dtype), mask=cols < D)
        meet(signals.to(tl.pointer_type(tl.uint64)), epochs_ptr + m, RANK, WORLD)
        for rank in tl.static_range(WORLD):
            peer_ptr = shared_row(buffers_ptr, rank, offset, x_ptr)
            x += tl.load(peer_ptr + m * D + cols, mask=cols < D, other=0.0, cache_modifier=".cg").to(tl.float32)
        x = x.to(dtype).to(tl.float32)
    else:
        x = add_terms(x, delta_ptr, m, cols, D, TERMS).to(dtype).to(tl.float32)
    own = x
    if OWN < GROUPS:
        own = tl.load(x_ptr + m * D + own_cols, mask=own_cols < D, other=0.0).to(tl.float32)
        own = add_terms(own, delta_ptr, m, own_cols, D, TERMS).to(dtype).to(tl.float32)
    if TERMS > 0:
        tl.store(sum_ptr + m * D + own_cols, own.to(dtype), mask=own_cols < D)
    store_normed(
        own, tl.sum(x * x) / D, weight, h_ptr, values_ptr, scale_ptr, m, M, eps, groups, own_cols, D, dtype, KEEP,
        QUANTISE, UE8M0,
    )  # fmt: skip


def own_groups(M: int, groups: int, quantise: bool) -> int:
    """
    How many of a token's `groups` a program normalises: of few tokens an eighth, where they are quantised, which alone
    keeps a multiprocessor busy for a microsecond or two.
    """
    return max(groups // min(8, max(32 // M, 1)), 1) if quantise else groups


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float,
    quantise: bool = False, scale_fmt: str | None = None, keep: bool = True, ranks: Ranks | None = None,
):  # fmt: skip
    """
    See add_rms_norm_ref. Without a delta x' is x itself, not a copy. With `ranks` the sum is over all ranks' terms.

    Two sums in a row take different memory: a rank that has met the others in the second knows that all have read the
    first, whose memory the third takes.
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
    groups = triton.next_power_of_2(cdiv(D, BLOCK_SIZE))
    own = own_groups(M, groups, quantise and ranks.world_size == 1)
    num_warps = min(max(groups // (4 if own < groups or 16 < M <= 256 else 2), 1), 32)  # 16 or 8 elements a thread
    add_rms_norm_kernel[(M, cdiv(cdiv(D, BLOCK_SIZE), own))](
        x, delta, weight, total, h, values, scale, ranks.buffers, ranks.signals, ranks.offset, ranks.epochs,
        M, eps, D, terms, h is not None, quantise, scale_fmt == UE8M0, ranks.rank, ranks.world_size, groups, own,
        num_warps=num_warps, **pdl_options(x.device),
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


def sum_terms(terms: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See sum_terms_ref; `out`: contiguous memory for the sum."""
    if not on_gpu(terms):
        total = sum_terms_ref(terms)
        return total if out is None else out.copy_(total)
    terms = terms.contiguous()
    M, P, D = terms.shape
    out = terms.new_empty(M, D) if out is None else out
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
