"""
Gated products and experts: the references against loops over pairs in float64, the kernel against the same equation.

`python test_experts.py` with TRITON_INTERPRET=1 runs the kernel on the CPU, as in test_kernel.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton

from experts import experts, gated_linear, gated_linear_ref, pair_block
from gpu import cdiv, counters
from grouped import PAIRS, launch_grouped, takes
from interpreter import interpret, needs_interpreter
from kernel import E4M3, W8A16, Quantised, act_quant, act_quant_ref, launch_gemm, weight_quant
from one_token import Rows, launch_one_token
from routing import Routing, sort_pairs_ref, tile_count
from test_fused import interpret_bf16_dots, poisoned
from test_kernel import SCALE_FMTS, before_nans, relative, strided_before_nans
from tiles import Tiles


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Normal, with rows and columns of sizes between 1/4 and 4: a neighbour's scale would show."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device=device)
    for dim in (-1, -2)[: x.dim()]:
        sizes = torch.exp2(torch.randint(-2, 3, (x.shape[dim],), generator=generator, device=device).float())
        x *= sizes if dim == -1 else sizes[:, None]
    return x.to(dtype)


def quantised_stack(w: torch.Tensor, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., N, K] -> e4m3 [..., N, K] and the scales of each matrix's blocks."""
    parts = [weight_quant(matrix, scale_fmt) for matrix in w.flatten(0, -3)]
    values, scales = (torch.stack([part[i].view(torch.uint8) if i == 0 else part[i] for part in parts]) for i in (0, 1))
    return values.view(E4M3).view(w.shape), scales.view(*w.shape[:-2], *scales.shape[-2:])


def double(values: torch.Tensor, scale: torch.Tensor | None, rows: int = 128) -> torch.Tensor:
    """A matrix in float64, dequantised if it has scales, each for `rows` x 128."""
    if scale is None:
        return values.double()
    spread = scale.double().repeat_interleave(rows, 0)[: values.shape[0]].repeat_interleave(128, 1)
    return values.double() * spread[:, : values.shape[1]]


def silu_mul_exact(gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """silu(gate) * up in float64, rounded to `dtype` where separate operations round."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x if dtype == torch.float64 else x.to(dtype).double()

    return rounded(rounded(F.silu(rounded(gate))) * rounded(up))


def experts_exact(x, w13, w2, scale_fmt, weights, indices, first, dtype, inner_fp8=True) -> torch.Tensor:
    """
    The equation, expert by expert in float64, for x and weights as the products see them. With scales the inner
    activation is rounded to `dtype` and then, where `inner_fp8`, to e4m3, as it is on the way to w2.
    """
    fp8 = w13[1] is not None
    x = double(x.values, x.scale, rows=1) if fp8 else x.double()
    y = x.new_zeros(*indices.shape, x.shape[1])
    for e in range(len(w13[0])):
        token, choice = (indices == first + e).nonzero(as_tuple=True)
        if not len(token):
            continue
        halves = zip(w13[0][e], w13[1][e] if fp8 else (None, None), strict=True)
        gate, up = (x[token] @ double(w, s).T for w, s in halves)
        h = silu_mul_exact(gate, up, dtype)
        if fp8 and inner_fp8:
            h = double(*act_quant_ref(h.to(dtype), scale_fmt), rows=1)
        down = h @ double(w2[0][e], w2[1][e] if fp8 else None).T
        y[token, choice] = down * weights[token, choice, None].double()
    return y


def choices(M: int, K: int, E: int, how: str, n_shared: int = 0) -> torch.Tensor:
    """[M, K + n_shared] different experts of each token, and the shared ones -n_shared, ..., -1."""
    generator = torch.Generator().manual_seed(M)
    preference = torch.rand(M, E, generator=generator)
    if how == "skewed":  # one expert has all tokens, another none
        preference[:, E // 2], preference[:, 0] = 2.0, -1.0
    shared = torch.arange(-n_shared, 0).expand(M, -1)
    return torch.cat([preference.argsort(1, descending=True)[:, :K], shared], 1).int()


def assert_e4m3_of(
    found: Quantised, gate: torch.Tensor, up: torch.Tensor, near: torch.Tensor | float, dtype, scale_fmt, case=None
) -> None:
    """
    The scales and codes of silu(gate) * up: for each code, some gate and up within `near` of the exact ones, rounded to
    `dtype` three times on the way, have it. Triton's interpreter cuts off for bf16, and loses a carry on the way to
    e4m3 (see test_kernel.py).
    """
    interpreted = triton.knobs.runtime.interpret
    bf16 = 2.0**-7 if interpreted else 2.0**-8
    gates, ups = ([x - off, x + off] for x, off in ((x, near + x.abs() * bf16) for x in (gate, up)))
    corners = torch.stack([F.silu(g) * u for g in gates for u in ups])
    corners = torch.cat([corners * (1 - 2 * bf16), corners * (1 + 2 * bf16)])
    exact, least, most = silu_mul_exact(gate, up, dtype), corners.amin(0), corners.amax(0)

    def group_scales(sizes: torch.Tensor) -> torch.Tensor:
        return F.pad(sizes, (0, -sizes.shape[1] % 128)).unflatten(1, (-1, 128)).amax(2).clamp(min=1e-4) / 448

    scale = found.scale.double()
    smallest = group_scales(torch.where(least * most > 0, torch.minimum(least.abs(), most.abs()), 0.0))
    largest = group_scales(torch.maximum(least.abs(), most.abs()))
    assert scale.shape == largest.shape, case
    if scale_fmt:
        assert (torch.frexp(found.scale)[0] == 0.5).all(), case
    # Between them there is the exact one, in fp32; as a power of two, less than twice as large.
    assert ((scale * (1 + 1e-6) >= smallest) & (scale < (2 if scale_fmt else 1) * largest * (1 + 1e-6))).all(), case

    scale = scale.repeat_interleave(128, 1)[:, : exact.shape[1]]
    least, wanted, most = (ordered_codes(x / scale) for x in (least, exact, most))
    codes = ordered_codes(found.values)
    inside = (least <= codes) & (codes <= most)
    if interpreted:
        inside |= (wanted.abs() < 8) | ((wanted.abs() + 1) & 7 <= 2)  # tiny, or beside a carry
    assert inside.all(), (case, codes[~inside], wanted[~inside])
    assert (codes != wanted).double().mean() < (0.3 if interpreted else 0.1), case


def ordered_codes(x: torch.Tensor) -> torch.Tensor:
    """The e4m3 codes of x as numbers that are in the order of the values."""
    codes = x.clamp(-448, 448).to(E4M3).view(torch.uint8).int() if x.dtype != E4M3 else x.view(torch.uint8).int()
    return torch.where(codes < 128, codes, 128 - codes)


# --- each operation, on any device ------------------------------------------------------------------------------------


def check_gated(device: str, M: int, inter: int, D: int, dtype: torch.dtype, fp8: bool) -> None:
    """gated_linear as it comes out of the dispatch: in `dtype`, or on a GPU with scales Quantised."""
    x, w = random(M, D, dtype=dtype, device=device), random(2, inter, D, seed=1, device=device) / D**0.5
    for scale_fmt in SCALE_FMTS if fp8 else (None,):
        case = (M, inter, D, dtype, scale_fmt)
        weight, scale = quantised_stack(w, scale_fmt) if fp8 else (w.to(dtype), None)
        given = Quantised(x, *act_quant(x, scale_fmt)) if fp8 else x
        with poisoned():
            found = gated_linear(given, weight, scale, scale_fmt)
        x64 = double(given.values, given.scale, rows=1) if fp8 else x.double()
        w64 = [double(half, None if scale is None else scale[i]) for i, half in enumerate(weight)]
        gate, up = (x64 @ half.T for half in w64)
        if isinstance(found, Quantised):
            assert found.x is None and found.values.shape == (M, inter) and found.scale.stride() == (1, M), case
            # FP8 units cut each product off at about 2^-13 of the largest; that is 2.3 * 2^-13 of the terms' norm, rms.
            near = torch.stack([(x64**2 @ (half**2).T).sqrt() for half in w64]).amax(0) * 2.0**-9
            assert_e4m3_of(found, gate, up, near, dtype, scale_fmt, case)
            with poisoned():  # an activation that was not quantised before
                again = gated_linear(x, weight, scale, scale_fmt)
            assert torch.equal(again.values.view(torch.uint8), found.values.view(torch.uint8)), case
        else:
            assert found.dtype == dtype and found.shape == (M, inter), case
            exact = silu_mul_exact(gate, up, dtype)
            assert relative(found, exact) < (2.0**-7 if dtype == torch.bfloat16 else 2e-6), case
        assert not counters(x.device).any()


def check_experts(
    device: str, M: int, E: int, D: int, inter: int, K: int, n_shared: int, blocks, dtype, fp8: bool, most: float,
    hows=("random", "skewed"), scale_fmts=SCALE_FMTS,
) -> None:  # fmt: skip
    """
    All experts at once, then halves of them: the halves add up, and are zero where the other serves.

    In FP8, an inner activation near the middle of two codes may be rounded to either, up to 2^-3 apart, for a product
    that is off by d. That is 2^-13 on FP8 units, which makes sqrt(d 2^-8) after the rounding to bf16, and with e4m3's
    steps of 2^-3 sqrt(sqrt(d 2^-8) 2^-3) = 2^-6.75, about 0.01, in the mean of many pairs. Either rounding is as good:
    what is compared with the products without it has to be as near as the reference.
    """
    x = random(M, D, dtype=dtype, device=device)
    w13 = random((E + n_shared) * 2, inter, D, seed=1, device=device).unflatten(0, (-1, 2)) / D**0.5
    w2 = random(E + n_shared, D, inter, seed=2, device=device) / inter**0.5
    for scale_fmt, how in itertools.product(scale_fmts if fp8 else (None,), hows):
        both = quantised_stack(w13, scale_fmt) if fp8 else (w13.to(dtype), None)
        down = quantised_stack(w2, scale_fmt) if fp8 else (w2.to(dtype), None)
        given = Quantised(x, *act_quant(x, scale_fmt)) if fp8 else x
        indices = choices(M, K, E, how, n_shared)
        weights = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)).to(device) + 0.1
        weights[:, K:] = 1
        exact, wide = (
            experts_exact(given, both, down, scale_fmt, weights, indices.to(device), -n_shared, dtype, inner_fp8)
            for inner_fp8 in (True, False)
        )
        for block in blocks or (pair_block(x, indices.numel(), E + n_shared, both[0], scale_fmt),):
            parts = [(-n_shared, E + n_shared), (-n_shared, E // 2 + n_shared), (E // 2, E - E // 2)]
            results = []
            for first, n_local in parts:
                case = (M, E, D, inter, dtype, scale_fmt, how, block, first)
                routing = Routing(*(t.to(device) for t in sort_pairs_ref(indices, first, n_local, block)))
                some = slice(first + n_shared, first + n_shared + n_local)
                a, b = ((w[some], None if s is None else s[some]) for w, s in (both, down))
                with poisoned():
                    whole = n_local == len(w2)
                    placed = {"everywhere": whole, "n_shared": n_shared if whole else 0}
                    found = experts(given, a, b, scale_fmt, weights, routing, block, **placed)
                assert found.shape == exact.shape and found.dtype == dtype, case
                here = ((indices >= first) & (indices < first + n_local)).to(device)
                assert not found[~here].any(), case
                off = relative(found[here], exact[here])
                assert off < (2.0**-3 if fp8 and here.sum() < 64 else most), (case, off)
                if fp8:
                    assert relative(found[here], wide[here]) < 1.05 * relative(exact[here], wide[here]) + 2.0**-10, case
                pairs = (found[here].double() - exact[here]).norm(dim=1) / exact[here].norm(dim=1)
                assert pairs.max() < min(8 * most, 2.0**-3), (case, pairs.max())
                results.append(found)
            whole, *halves = (result.double() for result in results)
            assert relative(halves[0] + halves[1], whole) < most, (M, E, how, block)
            assert not counters(x.device).any()


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 5])
def test_gated_linear(M):
    check_gated("cpu", M, 200, 300, torch.float32, False)
    check_gated("cpu", M, 200, 300, torch.bfloat16, True)


@pytest.mark.parametrize("M", [1, 20])
def test_experts(M):
    check_experts("cpu", M, 6, 136, 72, 3, 1, (16, 1), torch.float32, False, 2e-6)
    check_experts("cpu", M, 6, 256, 200, 3, 1, (16,), torch.bfloat16, True, 0.01)


def test_pairs_of_a_tile(monkeypatch):
    """On a GPU a power of two, near an expert's mean, that the tensor cores take; tiles are few. On Hopper also 192."""
    x = torch.empty(3, dtype=torch.bfloat16)
    w13 = torch.empty(1, 2, 256, 384, dtype=E4M3)
    assert pair_block(x, 72, 9, w13, None) == 72  # the reference takes an expert's pairs together
    monkeypatch.setattr("experts.on_gpu", lambda _: True)
    blocks = [pair_block(x, 8 * M, 256, w13, None) for M in range(1, 9000)]
    assert blocks == sorted(blocks) and set(blocks) == {16, 32, 64}
    assert {pair_block(x, 6 * M, 64, w13.bfloat16(), W8A16) for M in range(1, 9000)} == {16, 32, 64, 128}
    assert {pair_block(x.float(), 6 * M, 64, w13.float(), W8A16) for M in range(1, 9000)} == {16, 32}
    assert all(tile_count(8 * M, 256, b) <= 256 + 8 * M / b for M, b in zip(range(1, 9000), blocks, strict=True))

    monkeypatch.setattr("grouped.capability", lambda _: (9, 0))
    blocks = [pair_block(x, 8 * M, 256, w13, "ue8m0") for M in range(1, 9000)]
    assert blocks == sorted(blocks) and set(blocks) == {16, 32, 64, PAIRS}
    assert pair_block(x[:1], 8, 256, w13, W8A16) == pair_block(x[:2], 16, 256, w13, None) == 1
    assert pair_block(x[:2], 16, 256, w13.bfloat16(), W8A16) == 1 and pair_block(x[:2], 16, 256, w13, W8A16) == 16
    assert pair_block(x[:2], 16, 256, torch.empty(1, 2, 1024, 384, dtype=E4M3), None) == 16
    assert tile_count(8, 256, 1) == 8  # no more than pairs
    others = (w13, W8A16), (w13.bfloat16(), None), (w13[..., :129, :], None), (w13[..., :129], None)
    for weight, scale_fmt in others:  # for which gemm_kernel alone is there
        assert pair_block(x, 8 * 9000, 256, weight, scale_fmt) in (64, 128)
        with pytest.raises(ValueError, match="not for this kernel"):
            launch_grouped(x, None if scale_fmt == W8A16 else x, weight, x, x, ())
    monkeypatch.setattr("grouped.capability", lambda _: (10, 0))
    assert pair_block(x, 8 * 9000, 256, w13, None) == 64


# --- the kernel through Triton's interpreter --------------------------------------------------------------------------


@needs_interpreter
def test_kernels_in_the_interpreter():
    assert interpret(__file__) == "interpreted"


def interpreted_launches(M: int, E: int, D: int, inter: int, K: int, how: str, tiles: Tiles, n_shared: int = 0) -> None:
    """
    The two products of fp8 experts, of which n_shared are shared, each with the same tiles: given what the kernel
    takes, what it gives.
    """
    x = random(M, D, dtype=torch.bfloat16)
    w13, s13 = quantised_stack(random(2 * E, inter, D, seed=1).unflatten(0, (E, 2)) / D**0.5, None)
    w2, s2 = quantised_stack(random(E, D, inter, seed=2) / inter**0.5, None)
    values, scale = act_quant_ref(x)
    indices, case = choices(M, K, E - n_shared, how, n_shared), (M, E, D, inter, K, how, tiles)
    K += n_shared
    P, block = M * K, tiles.block_m
    routing = sort_pairs_ref(indices, -n_shared, E, block)
    order = routing.order.long()
    expert = (indices.flatten()[order] + n_shared).tolist()
    rows = order // K
    x64 = double(values, scale, rows=1)
    gate, up = (
        torch.stack([x64[m] @ double(w13[e, i], s13[e, i]).T for m, e in zip(rows.tolist(), expert, strict=True)])
        for i in (0, 1)
    )
    column_major = scale.t().contiguous().t()
    options = {"routing": routing, "top_k": K, "block": block, "tiles": tiles}
    weights = [before_nans(t) for t in (w13, s13)]

    # In fp32 nothing is rounded on the way: gathered by the kernel, and rows that were gathered before.
    exact, y = silu_mul_exact(gate, up, torch.float64), before_nans(torch.full((P, inter), torch.nan))
    unread = Routing(*(part.clone() for part in routing))  # before the routing is known
    unread.order[: M * n_shared] = 2**30
    for part in unread[1:]:
        part[: n_shared * cdiv(M, block)] = 2**30
    early = options | {"routing": unread, "n_shared": n_shared}
    launch_gemm(before_nans(values), strided_before_nans(column_major), *weights, y, gated=True, **early)
    assert relative(y, exact) < 2e-6 and (y._base[y.nbytes :] == 0xFF).all(), case
    y.fill_(torch.nan)
    neighbours = before_nans(values.view(torch.uint8)[rows].view(E4M3)), before_nans(scale[rows])
    launch_gemm(*neighbours, *weights, y, gated=True, gathered=True, **options)
    assert relative(y, exact) < 2e-6, case
    both = torch.full((P, 2 * inter), torch.nan)
    if inter % 128 == 0:
        launch_gemm(*neighbours, w13.flatten(1, 2), s13.flatten(1, 2), both, gathered=True, **options)
        assert relative(both, torch.cat([gate, up], 1)) < 2e-6, case

    # A tile is a group of 128, which it quantises.
    if tiles.block_n == 128:
        for scale_fmt in SCALE_FMTS:
            h = torch.full((P, inter), 0x7F, dtype=torch.uint8).view(E4M3)
            h_scale = torch.full((cdiv(inter, 128), P), torch.nan).t()
            inputs = before_nans(values), strided_before_nans(column_major)
            launch_gemm(*inputs, *weights, h, h_scale, scale_fmt, gated=True, **early)
            assert_e4m3_of(Quantised(None, h, h_scale), gate, up, 0.0, torch.float64, scale_fmt, case)

    # Scattered to the pairs' own order, times their weights.
    h, h_scale = act_quant_ref(exact.float())
    pair_weights = torch.rand(M, K, generator=torch.Generator().manual_seed(3)) + 0.1
    h64 = double(h, h_scale, rows=1)
    terms = torch.empty(P, D, dtype=torch.float64)
    terms[order] = torch.stack([h64[i] @ double(w2[e], s2[e]).T for i, e in enumerate(expert)])
    terms *= pair_weights.flatten()[:, None].double()
    out = before_nans(torch.full((P, D), torch.nan))
    down = before_nans(h), before_nans(h_scale), before_nans(w2), before_nans(s2)
    launch_gemm(*down, out, pair_weights=pair_weights, gathered=True, **options)
    assert relative(out, terms) < 2e-6 and (out._base[out.nbytes :] == 0xFF).all(), case
    assert not counters(x.device).any(), case


def check_pair_by_pair(
    device: str, M: int, E: int, D: int, inter: int, K: int, n_shared: int, cuts: list[Rows | None]
) -> None:
    """
    Gate and up of M tokens' pairs: against float64, as nothing is cut off on the way; and quantised. Without shared
    experts the last one is another rank's.

    A number is rounded at most 64 times (16 products of a thread, 28 steps, 5 halvings, 3 parts, scales), by 2^-25 of
    the terms' norm, rms: 2^-22 in all. 8 times that is allowed to each.
    """
    x, w = random(M, D, dtype=torch.bfloat16), random(2 * E, inter, D, seed=1).unflatten(0, (E, 2)) / D**0.5
    chosen = [torch.arange(E - n_shared).roll(m)[-K:] for m in range(M)]
    indices = torch.stack([torch.cat([e, torch.arange(-n_shared, 0)]) for e in chosen]).int()
    routing = sort_pairs_ref(indices, -n_shared, E if n_shared else E - 1, 1)
    chosen, P = routing.tile_expert[routing.tile_expert >= 0].tolist(), indices.numel()
    assert len(chosen) == P - (0 if n_shared else (indices == E - 1).sum())
    token = routing.order[: len(chosen)] // (K + n_shared)
    for read_late in routing[:2]:
        read_late[: n_shared * M] = 2**30
    routing = [t.to(device) for t in routing]
    values, w8 = act_quant_ref(x), quantised_stack(w, None)
    wide = (x.bfloat16(), None), (w.bfloat16(), None)
    for inputs, weight in (wide, (values, w8)):
        rows = double(*inputs, rows=1)[token]
        halves = [
            torch.stack([double(weight[0][e, i], None if weight[1] is None else weight[1][e, i]) for e in chosen])
            for i in (0, 1)
        ]
        gate, up = (torch.einsum("pd, pid -> pi", rows, w64) for w64 in halves)
        norm = torch.stack([torch.einsum("pd, pid -> pi", rows**2, w64**2).sqrt() for w64 in halves]).amax(0)
        operands = [None if t is None else strided_before_nans(t.to(device)) for t in (*inputs, *weight)]
        for cut in cuts:
            case = M, inter, D, cut
            options = {"routing": routing, "top_k": K + n_shared, "n_shared": n_shared, "gated": True, "cut": cut}
            y = before_nans(torch.full((P, inter), torch.nan, device=device))
            launch_one_token(*operands, y, **options)
            assert relative(y[: len(chosen)].cpu(), silu_mul_exact(gate, up, torch.float64)) < 2e-6, case
            assert y[len(chosen) :].isnan().all() and (y._base[y.nbytes :] == 0xFF).all(), case
            for scale_fmt in SCALE_FMTS if weight[1] is not None else ():
                h = torch.full((P, inter), 0x7F, dtype=torch.uint8, device=device).view(E4M3)
                scale = torch.full((cdiv(inter, 128), P), torch.nan, device=device).t()
                launch_one_token(*operands, h, scale, scale_fmt, **options)
                found = Quantised(None, *(t.cpu()[: len(chosen)] for t in (h, scale)))
                assert_e4m3_of(found, gate, up, norm * 2.0**-19, torch.bfloat16, scale_fmt, case)
    assert not counters(operands[0].device).any()


def interpreted() -> None:
    torch.set_num_threads(1)
    interpret_bf16_dots()
    few, many = Tiles(16, 128, 1, 4, 3, True), Tiles(64, 128, 1, 4, 3, False)
    for M, E, D, inter, K, how, tiles in (
        (1, 7, 384, 129, 3, "random", few),
        (3, 5, 1000, 200, 2, "random", few._replace(split=3)),  # 8 slices, the last of 104: 3, 3 and 2
        (5, 3, 640, 128, 2, "skewed", few._replace(split=4)),  # 5 slices: 2, 2, 1 and none
        (20, 4, 300, 128, 2, "skewed", few._replace(block_n=64)),
        (7, 4, 300, 200, 2, "skewed", few._replace(pieces=2)),
        (7, 4, 600, 129, 2, "random", few._replace(split=3, pieces=2)),
        (70, 3, 256, 256, 2, "skewed", many),
        (40, 3, 456, 72, 1, "random", many._replace(block_m=32)),
    ):
        interpreted_launches(M, E, D, inter, K, how, tiles)
    interpreted_launches(1, 5, 384, 72, 2, "random", few, n_shared=1)
    interpreted_launches(18, 5, 300, 128, 1, "skewed", few._replace(split=2), n_shared=2)
    check_pair_by_pair("cpu", 1, 4, 1400, 72, 2, 0, [Rows(8, 1, 2, 96), Rows(32, 3, 1, 96), None])
    check_pair_by_pair("cpu", 1, 4, 304, 129, 1, 1, [Rows(16, 2, 4, 96)])
    check_pair_by_pair("cpu", 2, 4, 304, 72, 2, 0, [Rows(16, 2, 4, 96)])
    check_pair_by_pair("cpu", 3, 5, 300, 40, 2, 2, [Rows(8, 1, 2, 96)])
    for M in (1, 7):
        check_gated("cpu", M, 200, 300, torch.float32, False)
        check_gated("cpu", M, 200, 456, torch.bfloat16, True)
    check_gated("cpu", 66, 128, 256, torch.bfloat16, True)
    check_experts("cpu", 5, 6, 136, 72, 3, 1, (16,), torch.float32, False, 2e-6)
    check_experts("cpu", 70, 4, 72, 128, 2, 1, (64,), torch.float32, False, 2e-6)
    print("interpreted")


# --- the kernel on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("inter", "D"), [(18432, 7168), (2304, 7168), (12288, 5120), (1368, 2048), (200, 456)])
def test_gpu_gated_linear(inter, D):
    """The dense MLPs of the models, whole and an eighth; 1368 = 10944 / 8 is in no whole blocks."""
    for M in (1, 8, 64, 65, 1000) if D < 7168 else (2, 33, 130):
        check_gated("cuda", M, inter, D, torch.bfloat16, True)
    for M in (7, 64, 130):
        check_gated("cuda", M, inter, D, torch.bfloat16, False)


@pytest.mark.gpu
@pytest.mark.parametrize("inter", [2048, 256])
@pytest.mark.parametrize("M", [1, 2, 8, 33, 64, 130, 1000, 4096])
def test_gpu_experts_of_v3s_width(M, inter):
    """32 experts and a shared one, whole and an eighth of each."""
    scale_fmts = ("ue8m0",) if M in (2, 64, 1000) else (None,)
    check_experts("cuda", M, 32, 7168, inter, 8, 1, None, torch.bfloat16, True, 0.02, scale_fmts=scale_fmts)


V2_LITE = [(M, *kind) for M in (1, 7, 16, 65, 1000, 4096) for kind in (("bf16", 1408), ("bf16", 176), ("fp8", 1408))]


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "dtype", "inter"), [*V2_LITE, (1, "fp32", 1408), (65, "fp32", 176)])
def test_gpu_experts_of_v2_lite(M, dtype, inter):
    """64 experts and two shared ones, in bf16, as released; an eighth of an expert is in no whole blocks."""
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    most = {"bf16": 0.005, "fp8": 0.02, "fp32": 1e-5}[dtype]
    check_experts("cuda", M, 64, 2048, inter, 6, 2, None, kind, dtype == "fp8", most, scale_fmts=(None,))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_gpu_experts_in_tiles_of_any_size(block):
    """Also with sizes that fill no block, and the same again: nothing depends on which program comes last."""
    for fp8, inter in ((True, 256), (True, 200), (False, 256)):
        check_experts("cuda", 50, 9, 456, inter, 3, 0, (block,), torch.bfloat16, fp8, 0.02 if fp8 else 0.005)
    x, w = random(3, 7168, dtype=torch.bfloat16, device="cuda"), random(2, 256, 7168, device="cuda")
    weight, scale = quantised_stack(w, None)
    first = gated_linear(x, weight, scale, None)
    for _ in range(50):
        again = gated_linear(x, weight, scale, None)
        assert torch.equal(again.values.view(torch.uint8), first.values.view(torch.uint8))
        assert torch.equal(again.scale, first.scale)
    assert gated_linear_ref(x, weight, scale, None).shape == first.values.shape


@pytest.mark.gpu
@pytest.mark.parametrize(("inter", "D"), [(2048, 7168), (256, 7168), (1408, 2048), (176, 2048), (200, 456)])
def test_gpu_one_token_however_it_is_cut(inter, D):
    """In parts of K ten times: programs finish in any order."""
    cuts = [None, Rows(16, 1, 1, 96), Rows(8, 1, 4, 128), Rows(4, 1, 8, 96), *[Rows(8, 3, 2, 96)] * 10]
    check_pair_by_pair("cuda", 1, 20, D, inter, 6, 0, cuts)
    check_pair_by_pair("cuda", 1, 8, D, inter, 3, 2, cuts[:3])
    check_pair_by_pair("cuda", 2, 8, D, inter, 3, 1, cuts[:3])
    check_pair_by_pair("cuda", 3, 8, D, inter, 3, 0, cuts[:3])


@pytest.mark.gpu
@pytest.mark.parametrize(("inter", "D"), [(2048, 7168), (256, 7168), (200, 456), (129, 1100)])
def test_gpu_two_programs_to_a_tile(inter, D):
    """Two slices of K at a time, each half of its outputs: to the bit what one program makes; twenty times."""
    M, E, K = 40, 48, 4
    w, w_scale = quantised_stack(random(E, 2, inter, D, seed=1, device="cuda") / D**0.5, None)
    x, x_scale = act_quant(random(M, D, dtype=torch.bfloat16, device="cuda"))
    routing = Routing(*(t.cuda() for t in sort_pairs_ref(choices(M, K, E, "skewed"), 0, E, 16)))
    one, two = Tiles(16, 128, 1, 8, 3, True), Tiles(16, 128, 1, 4, 2, True, unroll=2, pieces=2)
    for scale_fmt in SCALE_FMTS:
        found = []
        for tiles in [one, two._replace(stages=3), *[two] * 20]:
            h = torch.full((M * K, inter), 0x7F, dtype=torch.uint8, device="cuda").view(E4M3)
            h_scale = torch.full((cdiv(inter, 128), M * K), torch.nan, device="cuda").t()
            options = {"routing": routing, "top_k": K, "block": 16, "tiles": tiles, "gated": True}
            launch_gemm(x, x_scale, w, w_scale, h, h_scale, scale_fmt, **options)
            found.append((h.view(torch.uint8), h_scale))
        for values, scale in found[1:]:
            assert torch.equal(values, found[0][0]) and torch.equal(scale, found[0][1])
    assert not counters(x.device).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "K"), [(4096, 7168), (512, 7168), (7168, 256), (7168, 2048), (2816, 2048), (128, 128)])
def test_gpu_grouped_is_gemm_kernel_to_the_bit(N, K):
    """Experts with no pair, one, a group's, a tile's, one more or less; twenty times: warps hand over at will."""
    sizes = [0, 1, 63, 64, 65, 0, 128, 129, 191, 192, 193, 1000, 3, 385]
    expert = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    indices = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(0))].int()[:, None]
    P = len(indices)
    w, w_scale = quantised_stack(random(len(sizes), N, K, seed=1, device="cuda") / K**0.5, None)
    x, x_scale = act_quant(random(P, K, dtype=torch.bfloat16, device="cuda"))
    if not takes(w):
        pytest.skip("Hopper's alone")
    x_scale = x_scale.t().contiguous().t()
    pair_weights = torch.rand(P, 1, device="cuda") + 0.1
    tiles, pairs = (Routing(*(t.cuda() for t in sort_pairs_ref(indices, 0, len(sizes), n))) for n in (64, PAIRS))
    for weights in (None, pair_weights):
        wanted, options = torch.empty(P, N, dtype=torch.bfloat16, device="cuda"), {"top_k": 1, "gathered": True}
        launch_gemm(x, x_scale, w, w_scale, wanted, routing=tiles, block=64, pair_weights=weights, **options)
        for _ in range(20):
            found = torch.full_like(wanted, torch.nan)
            launch_grouped(x, x_scale, w, w_scale, found, pairs, weights)
            assert torch.equal(found, wanted), (found != wanted).sum()
        launch_grouped(x, x_scale.contiguous(), w, w_scale, found.fill_(torch.nan), pairs, weights)
        assert torch.equal(found, wanted)


if __name__ == "__main__":
    interpreted()
