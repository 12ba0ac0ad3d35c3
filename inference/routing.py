"""
Where each token goes in a mixture of experts (V3 paper, 2.1.2): scores, choice, and the order in which a grouped GEMM
takes the chosen pairs (token, expert).

Decoding is bound by latency, so what can share a launch does. Nothing here waits for the host: all shapes follow from
the number of tokens.

Dimension letters: M tokens, D dim, S slices of D, E routed experts, K n_activated_experts, K' = K + shared experts that
every token takes, P = M * K' pairs, T tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from gpu import cdiv, counters, pdl_options
from kernel import linear_fp32, on_gpu
from kernel_parts import prefetch

_LAST = tl.constexpr(0x7FFFFFFF)
_LOWEST = tl.constexpr(-0x80000000)

FEW_TOKENS = 8  # up to here the gate's product is a sum of elementwise products
FEW_PAIRS = 4096  # up to here each program compares its pairs with all
CHUNK = 512  # pairs a program sorts beyond that


class Routing(NamedTuple):
    """
    The pairs m * K' + k by expert, in tiles of at most `block` pairs of one expert, as a grouped GEMM takes them.

    order [P] int32: the pairs, by local expert; those of other ranks' experts come last. tile_expert [T] int32: each
    tile's local expert, -1 where there is no tile. Its pairs are order[tile_start : tile_stop], [T] int32 each.
    """

    order: torch.Tensor
    tile_expert: torch.Tensor
    tile_start: torch.Tensor
    tile_stop: torch.Tensor


def tile_count(pairs: int, n_local: int, block: int) -> int:
    """Tiles that suffice however the pairs fall: one an expert and one more for each full block, but no empty ones."""
    return min(pairs, n_local + pairs // block)


# --- scores -----------------------------------------------------------------------------------------------------------


def gate_scores_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [M, D], weight [E, D] fp32 -> x W^T in fp32, as a sum that `route` makes: [S, M, E], here of one term."""
    with torch.autocast(x.device.type, enabled=False):  # fp32 under a trainer's autocast too
        return F.linear(x.float(), weight)[None]


@triton.jit
def few_scores_kernel(
    x_ptr, w_ptr, y_ptr, M, E, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_E experts for all of the few tokens. Bound by reading W (4 * E * D bytes), all in flight."""
    m, e = tl.arange(0, BLOCK_M)[:, None], (tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E))[None, :]
    if PDL:
        for first in tl.static_range(0, D, BLOCK_D):
            line = first + tl.arange(0, BLOCK_D // 32)[:, None] * 32
            prefetch(w_ptr + tl.minimum(e, E - 1) * D + tl.minimum(line, D - 1))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, BLOCK_E, BLOCK_D), dtype=tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, None, :]
        # Of three dimensions, and 4 numbers a thread, as acc: products of what a thread loads itself. Else each would
        # pass through shared memory, and the next loads wait for that.
        w = tl.load(w_ptr + e[:, :, None] * D + d, mask=(e < E)[:, :, None] & (d < D), other=0.0)
        x_ptrs = tl.max_contiguous(x_ptr + m[:, :, None] * D + d, [1, 1, 4])
        x = tl.load(x_ptrs, mask=(m < M)[:, :, None] & (d < D), other=0.0)
        acc += x.to(tl.float32) * w
    tl.store(y_ptr + m * E + e, tl.sum(acc, 2), mask=(m < M) & (e < E))


@triton.jit
def split_scores_kernel(
    x_ptr, w_ptr, y_ptr, M, E, D, SLICE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: a BLOCK_M x BLOCK_E tile of x W^T over SLICE of D.

    The tensor cores take bf16, so w = hi + lo, both bf16: exact for a weight that was bf16, within 2^-17 for others.
    """
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    if PDL:
        line = tl.program_id(1) * SLICE + tl.arange(0, triton.next_power_of_2(SLICE // 32)) * 32
        prefetch(w_ptr + tl.minimum(e, E - 1)[:, None] * D + tl.minimum(line, D - 1)[None, :])
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    for first in range(0, SLICE, BLOCK_D):
        d = tl.program_id(1) * SLICE + first + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + m[:, None] * D + d[None, :], mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(w_ptr + e[None, :] * D + d[:, None], mask=(e < E)[None, :] & (d < D)[:, None], other=0.0)
        hi = w.to(tl.bfloat16)
        acc = tl.dot(x, hi, acc)
        acc = tl.dot(x, (w - hi.to(tl.float32)).to(tl.bfloat16), acc)
    cells = m[:, None] * E + e[None, :]
    inside = (m < M)[:, None] & (e < E)[None, :]
    tl.store(y_ptr + tl.program_id(1) * M * E + cells, acc, mask=inside)


def gate_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See gate_scores_ref."""
    (M, D), E = x.shape, weight.shape[0]
    if not on_gpu(x) or (x.dtype == torch.float32 and M > FEW_TOKENS):
        return gate_scores_ref(x, weight)
    x = x.contiguous()
    if M <= FEW_TOKENS:
        y = torch.empty(1, M, E, dtype=torch.float32, device=x.device)
        block_e = 1 if E <= 132 else 2  # about as many programs as multiprocessors
        few_scores_kernel[(cdiv(E, block_e),)](
            x, weight, y, M, E, D, triton.next_power_of_2(M), block_e, min(triton.next_power_of_2(D), 1024),
            num_warps=8, **pdl_options(x.device),
        )  # fmt: skip
    elif M <= 256:
        block_m, block_e, block_d = min(triton.next_power_of_2(M), 64), 16, 128
        tiles = cdiv(E, block_e) * cdiv(M, block_m)
        steps = cdiv(cdiv(D, block_d), max(132 // tiles, 1))  # of each slice
        slices = cdiv(cdiv(D, block_d), steps)
        y = torch.empty(slices, M, E, dtype=torch.float32, device=x.device)
        split_scores_kernel[(cdiv(E, block_e), slices, cdiv(M, block_m))](
            x, weight, y, M, E, D, steps * block_d, block_m, block_e, block_d,
            num_warps=4, num_stages=3, **pdl_options(x.device),
        )  # fmt: skip
    else:
        hi = weight.bfloat16()
        both = linear_fp32(x, torch.cat([hi, (weight - hi).bfloat16()]))
        y = (both[:, :E] + both[:, E:])[None]
    return y


# --- choice -----------------------------------------------------------------------------------------------------------


def route_ref(
    logits: torch.Tensor, bias: torch.Tensor | None, *, score_func: str, n_groups: int, n_limited_groups: int,
    top_k: int, route_scale: float, n_shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    logits [S, M, E], of which the sum counts, bias [E] or None -> weights [M, K'] fp32, indices [M, K'] int32.

    Scores s = sigmoid or softmax of the logits. The choice is on s + bias: a group of experts scores the sum of its two
    best (without a bias its best), the n_limited_groups best groups stay, and the top K of them are chosen, the best
    first and of equal ones the one with the lower index. The weights come from s alone, so the bias, which balances the
    load without an auxiliary loss, decides where a token goes and never what it receives.

    The shared experts follow, as experts -n_shared, ..., -1, with weight 1.
    """
    logits = logits.sum(0)
    scores = logits.sigmoid() if score_func == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if n_groups > 1:
        groups = choice.unflatten(-1, (n_groups, -1))
        group_scores = groups.amax(-1) if bias is None else groups.topk(2, -1).values.sum(-1)
        kept = group_scores.argsort(dim=-1, descending=True, stable=True)[:, :n_limited_groups]
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
        choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
    indices = choice.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights = scores.gather(-1, indices)
    if score_func == "sigmoid":
        weights = weights / weights.sum(-1, keepdim=True)
    weights = F.pad(weights * route_scale, (0, n_shared), value=1.0)
    shared = torch.arange(-n_shared, 0, device=indices.device)
    return weights, torch.cat([indices, shared.expand(len(indices), -1)], dim=1).int()


@triton.jit
def sortable(x):
    """int32 keys that order as x [fp32] does. A warp finds the largest of its threads' int32 in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _LAST)


@triton.jit
def value_of(key):
    return (key ^ ((key >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def load_sum(ptrs, stride, mask, other, SLICES: tl.constexpr):
    """The sum of SLICES numbers each, `stride` apart, in their order; `other` where there are none."""
    total = tl.load(ptrs, mask=mask, other=other)
    for s in tl.static_range(1, SLICES):
        total += tl.load(ptrs + s * stride, mask=mask, other=0.0)
    return total


@triton.jit
def sort_few(
    index, order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, P, first, n_local, PAIRS: tl.constexpr,
):  # fmt: skip
    """index [PAIRS]: the expert of each of a token's pairs, a tile each: its place is how many come before it."""
    pair = tl.arange(0, PAIRS)
    local = (index >= first) & (index < first + n_local)
    expert = tl.where(pair < P, tl.where(local, index - first, n_local), n_local + 1)
    earlier = (expert[None, :] == expert[:, None]) & (pair[None, :] < pair[:, None])
    place = tl.sum(((expert[None, :] < expert[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order_ptr + place, pair, mask=pair < P)
    tl.store(tile_expert_ptr + place, tl.where(local, expert, -1), mask=pair < P)
    tl.store(tile_start_ptr + place, tl.where(local, place, 0), mask=pair < P)
    tl.store(tile_stop_ptr + place, tl.where(local, place + 1, 0), mask=pair < P)


@triton.jit(do_not_specialize=["M"])
def route_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr,
    M, first, n_local, route_scale, SLICES: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, N_GROUPS: tl.constexpr, KEPT: tl.constexpr,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, SORT: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_K: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: one token, its scores as [GROUPS, MEMBERS]. With SORT, the only token, its pairs are sorted too.
    2.9 us on an H200 for V3's 256 experts, latency: choosing is K searches for the largest, one after the other, of
    equal ones the first.
    """
    m = tl.program_id(0)
    logits_ptr += m * E
    group, member = tl.arange(0, GROUPS), tl.arange(0, MEMBERS)
    expert = group[:, None] * (E // N_GROUPS) + member[None, :]
    inside = (group < N_GROUPS)[:, None] & (member < E // N_GROUPS)[None, :]
    if PDL and EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if BIAS:
        bias = tl.load(bias_ptr + expert, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    logits = load_sum(logits_ptr + expert, M * E, inside, float("-inf"), SLICES)
    if SIGMOID:
        choice = 1 / (1 + tl.exp(-logits))
    else:
        highest = tl.max(logits)
        total = tl.sum(tl.exp(logits - highest))
        choice = tl.exp(logits - highest) / total
    if BIAS:
        choice += bias
    key = tl.where(inside, sortable(choice), _LOWEST)

    if N_GROUPS > KEPT:
        best = tl.max(key, 1)
        group_score = value_of(best)
        if BIAS:
            at = tl.min(tl.where(key == best[:, None], member[None, :], _LAST), 1)
            group_score += value_of(tl.max(tl.where(member[None, :] == at[:, None], _LOWEST, key), 1))
        group_key = tl.where(group < N_GROUPS, sortable(group_score), _LOWEST)
        equal = group_key[None, :] == group_key[:, None]
        better = (group_key[None, :] > group_key[:, None]) | (equal & (group[None, :] < group[:, None]))
        dropped = (tl.sum(better.to(tl.int32), 1) >= KEPT)[:, None]
        key = tl.where(inside & dropped, sortable(tl.full((GROUPS, MEMBERS), float("-inf"), tl.float32)), key)

    column = tl.arange(0, BLOCK_K)
    index = column - COLUMNS  # of the shared experts
    for k in tl.static_range(K):
        best = tl.min(tl.where(key == tl.max(key), expert, _LAST))
        index = tl.where(column == k, best, index)
        key = tl.where(expert == best, _LOWEST, key)
    chosen = load_sum(logits_ptr + index, M * E, column < K, float("-inf"), SLICES)
    if SIGMOID:
        weight = 1 / (1 + tl.exp(-chosen))
        weight /= tl.sum(weight)
    else:
        weight = tl.exp(chosen - highest) / total
    weight = tl.where(column < K, weight * route_scale, 1.0)
    tl.store(weights_ptr + m * COLUMNS + column, weight, mask=column < COLUMNS)
    tl.store(indices_ptr + m * COLUMNS + column, index, mask=column < COLUMNS)

    if SORT:
        sort_few(
            index, order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, COLUMNS, first, n_local, BLOCK_K
        )  # fmt: skip


def launch_route(
    logits: torch.Tensor, bias: torch.Tensor | None, early: bool = False, routing: Routing | None = None,
    first: int = 0, n_local: int = 0, *, score_func: str, n_groups: int, n_limited_groups: int, top_k: int,
    route_scale: float, n_shared: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (S, M, E), columns = logits.shape, top_k + n_shared
    weights = torch.empty(M, columns, dtype=torch.float32, device=logits.device)
    indices = torch.empty(M, columns, dtype=torch.int32, device=logits.device)
    route_kernel[(M,)](
        logits, bias, weights, indices, *(routing or (None,) * 4), M, first, n_local, route_scale, S, E, top_k, columns,
        n_groups, n_limited_groups, score_func == "sigmoid", bias is not None, routing is not None,
        triton.next_power_of_2(n_groups), triton.next_power_of_2(E // n_groups), triton.next_power_of_2(columns),
        early, num_warps=1, **pdl_options(logits.device),
    )  # fmt: skip
    return weights, indices


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, early: bool = False, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """See route_ref, whose options it takes; for `early`, route_and_sort."""
    if not on_gpu(logits):
        return route_ref(logits, bias, **options)
    return launch_route(logits.contiguous(), bias, early, **options)


# --- order ------------------------------------------------------------------------------------------------------------


def sort_pairs_ref(indices: torch.Tensor, first: int, n_local: int, block: int) -> Routing:
    """indices [M, K'] -> the Routing of the pairs of the experts [first, first + n_local); stable."""
    expert = indices.flatten() - first
    expert = expert.where((expert >= 0) & (expert < n_local), n_local)
    counts = torch.zeros(n_local + 1, dtype=torch.long, device=indices.device)
    counts = counts.scatter_add(0, expert.long(), torch.ones_like(expert, dtype=torch.long))[:n_local]
    starts, tiles = counts.cumsum(0) - counts, -(-counts // block)
    # Tile t is the nth of the expert whose tiles begin at or before it and end after it.
    t = torch.arange(tile_count(len(expert), n_local, block), device=indices.device)
    owner = torch.searchsorted(tiles.cumsum(0), t, right=True)
    used, at = owner < n_local, owner.clamp(max=n_local - 1)
    start = starts[at] + (t - (tiles.cumsum(0) - tiles)[at]) * block
    stop = torch.minimum(start + block, (starts + counts)[at])
    tiles_of = (at.where(used, -1), start.where(used, 0), stop.where(used, 0))
    return Routing(expert.argsort(stable=True).int(), *(x.int() for x in tiles_of))


@triton.jit
def load_experts(indices_ptr, pair, P, first, n_local, NONE: tl.constexpr):
    """The local expert of each pair, n_local for another rank's, NONE past the last pair."""
    expert = tl.load(indices_ptr + pair, mask=pair < P, other=0) - first
    expert = tl.where((expert >= 0) & (expert < n_local), expert, n_local)
    return tl.where(pair < P, expert, NONE)


@triton.jit
def store_tiles(
    total, start, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, n_local, n_tiles, BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """The tiles of experts that have `total` [BINS] pairs each, from `start` [BINS] on."""
    bins = tl.arange(0, BINS)
    tiles = tl.where(bins < n_local, (total + BLOCK - 1) // BLOCK, 0)
    first_tile = tl.cumsum(tiles, 0) - tiles
    for nth in range(0, tl.max(tiles)):
        tile_start = start + nth * BLOCK
        tl.store(tile_expert_ptr + first_tile + nth, bins, mask=nth < tiles)
        tl.store(tile_start_ptr + first_tile + nth, tile_start, mask=nth < tiles)
        tl.store(tile_stop_ptr + first_tile + nth, tl.minimum(tile_start + BLOCK, start + total), mask=nth < tiles)
    for tile in range(tl.sum(tiles), n_tiles, BINS):
        tl.store(tile_expert_ptr + tile + bins, tl.full((BINS,), -1, tl.int32), mask=tile + bins < n_tiles)
        tl.store(tile_start_ptr + tile + bins, tl.zeros((BINS,), tl.int32), mask=tile + bins < n_tiles)
        tl.store(tile_stop_ptr + tile + bins, tl.zeros((BINS,), tl.int32), mask=tile + bins < n_tiles)


@triton.jit
def pairs_before(
    indices_ptr, pair, start, P, first, n_local, SPAN: tl.constexpr, STEP: tl.constexpr, NONE: tl.constexpr
):
    """
    How many of the SPAN pairs from `start` on come before each of `pair` [OWN]: lower experts', its own's earlier ones.

    Compared [STEP, OWN] at a time; a thread counts for its own pairs and first meets another at the end.
    """
    key = load_experts(indices_ptr, pair, P, first, n_local, NONE) * SPAN + pair - start
    before = tl.zeros((STEP, pair.shape[0]), dtype=tl.int32)
    for offset in range(0, SPAN, STEP):
        other = offset + tl.arange(0, STEP)
        other_key = load_experts(indices_ptr, start + other, P, first, n_local, NONE) * SPAN + other
        before += (other_key[:, None] < key[None, :]).to(tl.int32)
    return tl.sum(before, 0)


@triton.jit
def sum_counts(counts_ptr, n_chunks, BINS: tl.constexpr, ROWS: tl.constexpr):
    """counts [n_chunks, BINS] -> [BINS], ROWS chunks at a time: each thread sums on its own until the end."""
    total = tl.zeros((ROWS, BINS), dtype=tl.int32)
    for other in range(0, n_chunks, ROWS):
        chunks = other + tl.arange(0, ROWS)
        cells = counts_ptr + chunks[:, None] * BINS + tl.arange(0, BINS)[None, :]
        total += tl.load(cells, mask=(chunks < n_chunks)[:, None], other=0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def sort_kernel(
    indices_ptr, order_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, P, first, n_local, n_tiles,
    BLOCK: tl.constexpr, PAIRS: tl.constexpr, BINS: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: the places of OWN pairs, each as many as come before it. The first program: the tiles. None waits for
    another.
    """
    if PDL:
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if tl.program_id(0) == 0:
        total = tl.histogram(load_experts(indices_ptr, tl.arange(0, PAIRS), P, first, n_local, BINS - 1), BINS)
        start = tl.cumsum(total, 0) - total
        store_tiles(total, start, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, n_local, n_tiles, BLOCK, BINS)
    else:
        pair = (tl.program_id(0) - 1) * OWN + tl.arange(0, OWN)
        place = pairs_before(indices_ptr, pair, 0, P, first, n_local, PAIRS, STEP, BINS - 1)
        tl.store(order_ptr + place, pair, mask=pair < P)


@triton.jit
def count_kernel(
    indices_ptr, counts_ptr, starts_ptr, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, counter_ptr,
    P, first, n_local, n_tiles, n_chunks, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the pairs of each expert in a chunk. The last one knows all, and where experts and tiles begin."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, bins = tl.program_id(0), tl.arange(0, BINS)
    expert = load_experts(indices_ptr, chunk * CHUNK + tl.arange(0, CHUNK), P, first, n_local, BINS - 1)
    tl.store(counts_ptr + chunk * BINS + bins, tl.histogram(expert, BINS))
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == n_chunks - 1:
        total = sum_counts(counts_ptr, n_chunks, BINS, ROWS)
        start = tl.cumsum(total, 0) - total
        tl.store(starts_ptr + bins, start)
        store_tiles(total, start, tile_expert_ptr, tile_start_ptr, tile_stop_ptr, n_local, n_tiles, BLOCK, BINS)
        tl.store(counter_ptr, 0)


@triton.jit
def place_kernel(
    indices_ptr, counts_ptr, starts_ptr, bases_ptr, order_ptr, P, first, n_local,
    CHUNK: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """
    One program: the places of a chunk's pairs, each as many as come before it: all of lower experts, its own expert's
    in the chunks before, and those in this chunk.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk, bins = tl.program_id(0), tl.arange(0, BINS)
    count = tl.load(counts_ptr + chunk * BINS + bins)
    lower = tl.cumsum(count, 0) - count  # in this chunk, so counted twice
    base = tl.load(starts_ptr + bins) + sum_counts(counts_ptr, chunk, BINS, ROWS) - lower
    tl.store(bases_ptr + chunk * BINS + bins, base)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    before = pairs_before(indices_ptr, pair, chunk * CHUNK, P, first, n_local, CHUNK, 16, BINS - 1)
    tl.debug_barrier()
    expert = load_experts(indices_ptr, pair, P, first, n_local, BINS - 1)
    place = tl.load(bases_ptr + chunk * BINS + expert, mask=pair < P, other=0) + before
    tl.store(order_ptr + place, pair, mask=pair < P)


def empty_routing(P: int, n_local: int, block: int, device: torch.device) -> Routing:
    T = tile_count(P, n_local, block)
    return Routing(*(torch.empty(n, dtype=torch.int32, device=device) for n in (P, T, T, T)))


def sort_pairs(indices: torch.Tensor, first: int, n_local: int, block: int, early: bool = False) -> Routing:
    """See sort_pairs_ref; for `early`, route_and_sort."""
    if not on_gpu(indices):
        return sort_pairs_ref(indices, first, n_local, block)
    indices, P, device = indices.int().contiguous(), indices.numel(), indices.device
    routing = empty_routing(P, n_local, block, device)
    order, *tiles = routing
    n_tiles, bins, options = len(tiles[0]), triton.next_power_of_2(n_local + 2), pdl_options(device)
    if P <= FEW_PAIRS:
        pairs, own = triton.next_power_of_2(P), 32
        sort_kernel[(1 + cdiv(P, own),)](
            indices, order, *tiles, P, first, n_local, n_tiles, block, pairs, bins, own, min(pairs, 512),
            early, num_warps=8, **options,
        )  # fmt: skip
        return routing
    chunks, rows = cdiv(P, CHUNK), max(8192 // bins, 1)
    counts, bases = torch.empty(2, chunks, bins, dtype=torch.int32, device=device)
    starts = torch.empty(bins, dtype=torch.int32, device=device)
    count_kernel[(chunks,)](
        indices, counts, starts, *tiles, counters(device), P, first, n_local, n_tiles, chunks, block, CHUNK, bins, rows,
        num_warps=8, **options,
    )  # fmt: skip
    place_kernel[(chunks,)](
        indices, counts, starts, bases, order, P, first, n_local, CHUNK, bins, rows, num_warps=8, **options
    )
    return routing


def route_and_sort(
    logits: torch.Tensor, bias: torch.Tensor | None, *, first: int, n_local: int, block: int, early: bool = False,
    **options,
) -> tuple[torch.Tensor, torch.Tensor, Routing]:  # fmt: skip
    """
    `route`, then `sort_pairs`: weights, indices, Routing. For one token, a tile a pair, in one launch. early: the
    kernel that follows may start at once, for what does not depend on the routing (see gpu.py).
    """
    if on_gpu(logits) and logits.shape[1] == 1 == block:
        routing = empty_routing(options["top_k"] + options.get("n_shared", 0), n_local, block, logits.device)
        return *launch_route(logits.contiguous(), bias, early, routing, first, n_local, **options), routing
    weights, indices = route(logits, bias, early, **options)
    return weights, indices, sort_pairs(indices, first, n_local, block, early)
