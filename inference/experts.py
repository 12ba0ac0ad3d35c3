"""
The gated products of DeepSeekMoE (V3 paper, 2.1.2): of one MLP for all tokens, and of each expert for those that chose
it, all experts in one launch.

Dimension letters: M tokens, D dim, I inner width, E local experts, K choices a token, P = M * K (token, choice) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.backends.mkldnn import flags

from config import BLOCK_SIZE
from fused import silu_mul, silu_mul_ref
from gpu import cdiv
from grouped import PAIRS, launch_grouped, takes
from kernel import E4M3, W8A16, Quantised, fp8_gemm, launch_gemm, linear, on_gpu, quantised
from routing import Routing

FEW = 64  # tokens up to which a product is bound by reading the weights
# Inner width from which shared experts begin while tokens are routed: it pays for 1,408 and 2,048, but a rank's slices
# of 256 fill the GPU once, unevenly while the gate's programs are there, which costs one rank of 8 30 us of 690.
WIDE = 1024


def gate_and_up(
    x: torch.Tensor | Quantised, weight: torch.Tensor, scale: torch.Tensor | None, scale_fmt: str | None
) -> torch.Tensor:
    """x [M, D], weight [2, I, D] (w1 and w3), scale [2, ...] or None -> x w1^T and x w3^T [M, 2, I]."""
    if scale is None:
        y = linear(x, weight.flatten(0, 1))
    else:
        halves = zip(weight, scale, strict=True)
        y = torch.cat([linear(x, half, half_scale, scale_fmt) for half, half_scale in halves], dim=1)
    return y.unflatten(1, (2, -1))


def gated_linear_ref(
    x: torch.Tensor | Quantised, weight: torch.Tensor, scale: torch.Tensor | None, scale_fmt: str | None
) -> torch.Tensor:
    """x [M, D], weight [2, I, D] (w1 and w3), scale [2, ...] or None -> silu(x w1^T) * (x w3^T) [M, I]."""
    return silu_mul_ref(gate_and_up(x, weight, scale, scale_fmt))


def gated_linear(
    x: torch.Tensor | Quantised, weight: torch.Tensor, scale: torch.Tensor | None, scale_fmt: str | None
) -> torch.Tensor | Quantised:
    """See gated_linear_ref. With scales, the result comes Quantised from a GPU, unless scale_fmt is W8A16."""
    if not on_gpu(x):
        return gated_linear_ref(x, weight, scale, scale_fmt)
    inter = weight.shape[1]
    if scale is None or scale_fmt == W8A16:
        if scale is None and x.shape[0] > FEW:
            return silu_mul(linear(x, weight.flatten(0, 1)).unflatten(1, (2, inter)))
        y = x.new_empty(x.shape[0], inter)
        launch_gemm(x, None, weight, scale, y, gated=True)
        return y
    x, values, x_scale = quantised(x, scale_fmt)
    M = values.shape[0]
    if M > FEW and inter % BLOCK_SIZE == 0:
        y = fp8_gemm(values, x_scale, weight.flatten(0, 1), scale.flatten(0, 1))
        return silu_mul(y.unflatten(1, (2, inter)), True, scale_fmt, keep=False)
    h, h_scale = values.new_empty(M, inter), x_scale.new_empty(cdiv(inter, BLOCK_SIZE), M).t()
    launch_gemm(values, x_scale, weight, scale, h, h_scale, scale_fmt, gated=True)
    return Quantised(None, h, h_scale)


def pair_block(x: torch.Tensor, pairs: int, n_local: int, w13: torch.Tensor, scale_fmt: str | None) -> int:
    """
    How many pairs a tile takes: one of one or two tokens'; about what each of n_local experts has on average; and PAIRS
    where grouped.py takes their weights. The reference takes all of an expert's.
    """
    if not on_gpu(x):
        return pairs
    mean, fp8 = pairs // n_local, w13.dtype == E4M3
    # Of two tokens few experts are chosen twice: faster so in BF16, and in FP8 256 wide, but not 2,048, on an H200.
    if len(x) == 1 or (len(x) == 2 and (not fp8 or (scale_fmt != W8A16 and w13.shape[-2] < WIDE))):
        return 1
    if mean > FEW and scale_fmt != W8A16 and takes(w13):
        return PAIRS
    return 16 if mean <= 16 else 32 if mean <= 32 or x.dtype == torch.float32 else FEW if fp8 or mean <= FEW else 128


def expert_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, w: torch.Tensor, w_scale: torch.Tensor | None, y: torch.Tensor,
    routing: Routing, block: int, pair_weights: torch.Tensor | None = None, gated: bool = False,
) -> None:  # fmt: skip
    """
    x [P, K] in the routing's order, w [E, N, K] -> y [P, N]: x w^T with each pair's expert, in that order; or, with
    pair_weights [M, K'], in the pairs' own and times their weights. gated: w [E, 2, N, K], not in tiles of PAIRS.
    """
    if block == PAIRS:
        launch_grouped(x, x_scale, w, w_scale, y, routing, pair_weights)
        return
    options = {"routing": routing, "top_k": 1, "block": block, "gathered": True, "pair_weights": pair_weights}
    launch_gemm(x, x_scale, w, w_scale, y, gated=gated, **options)


Scaled = tuple[torch.Tensor, torch.Tensor | None]  # a weight, and its scales if it is in e4m3


def experts_ref(
    x: torch.Tensor | Quantised, w13: Scaled, w2: Scaled, scale_fmt: str | None, weights: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """
    x [M, D], w13 [E, 2, I, D], w2 [E, D, I], weights [M, K] -> weight * expert(x) of each choice, [M, K, D]: their sum
    is left to the next norm. Choices that other ranks' experts serve are zero.
    """
    M, K = weights.shape
    x = x.x if isinstance(x, Quantised) else x
    tiles = zip(*(part.tolist() for part in routing[1:]), strict=True)
    tiles = [(e, stop - start) for e, start, stop in tiles if e >= 0]  # one follows the other
    if not tiles:
        return x.new_zeros(M, K, x.shape[1])
    chosen, sizes = zip(*tiles, strict=True)

    def grouped(product: Callable, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        if weight.requires_grad:  # one gradient for the whole stack, where each weight[e] would have one of its size
            weight = weight.unbind()
        parts = zip(chosen, x.split(sizes), strict=True)
        return torch.cat([product(x, weight[e], None if scale is None else scale[e], scale_fmt) for e, x in parts])

    # For a row or two oneDNN prepares a product longer than PyTorch's own takes.
    with flags(False, None, None, None) if sum(sizes) <= 2 * len(sizes) else nullcontext():
        h = silu_mul_ref(grouped(gate_and_up, x[routing.order[: sum(sizes)] // K], *w13))
        y = grouped(linear, h, *w2)
    y = F.pad(y, (0, 0, 0, M * K - len(y)))[routing.order.argsort()].unflatten(0, (M, K))  # back in the pairs' order
    return (y.float() * weights[..., None]).to(x.dtype)


def experts(
    x: torch.Tensor | Quantised,
    w13: Scaled,
    w2: Scaled,
    scale_fmt: str | None,
    weights: torch.Tensor,
    routing: Routing,
    block: int,
    everywhere: bool = True,
    n_shared: int = 0,
) -> torch.Tensor:
    """
    See experts_ref. `block`: pairs of a tile of the routing. `everywhere`: no choice is another rank's. n_shared: how
    many of the experts, the first, all tokens choose as their last choices, with weight 1. x was there before the
    routing was begun: the products of shared experts do not wait for that.
    """
    if not on_gpu(x):
        return experts_ref(x, w13, w2, scale_fmt, weights, routing)
    (w13, w13_scale), (w2, w2_scale) = w13, w2
    (M, K), (inter, D) = weights.shape, w13.shape[-2:]
    P = M * K
    fp8 = w13_scale is not None and scale_fmt != W8A16
    given = quantised(x, scale_fmt) if fp8 else x
    x, x_scale = given[1:] if fp8 else (x, None)
    dtype = torch.bfloat16 if fp8 else x.dtype
    terms = (torch.empty if everywhere else torch.zeros)(M, K, D, dtype=dtype, device=x.device)
    if block >= FEW and inter % BLOCK_SIZE == 0:
        # Many tokens: gathered first, as the copy engine takes only neighbours. For the shared experts' products the
        # library is faster, and nothing is gathered; their pairs come first.
        for i in range(n_shared):
            h = gated_linear(given, w13[i], None if w13_scale is None else w13_scale[i], scale_fmt)
            term = K - n_shared + i
            if w2_scale is None:
                torch.mm(h, w2[i].T, out=terms[:, term])
            else:
                unit = torch.int64 if D % 4 == 0 else dtype  # copies take half as long, eight bytes at a time
                terms.view(unit)[:, term] = linear(h, w2[i], w2_scale[i], scale_fmt).view(unit)
        served, first = M * n_shared, n_shared * cdiv(M, block)
        # Copies, as kernels are compiled anew for what does not begin at a multiple of 16 bytes.
        order, tile_expert = routing.order[served:].clone(), routing.tile_expert[first:].clone()
        routing = Routing(order, tile_expert, routing.tile_start[first:] - served, routing.tile_stop[first:] - served)
        P, tokens = P - served, order // K
        x = x.view(torch.uint8)[tokens].view(E4M3) if fp8 else x[tokens]
        x_scale = x_scale.t()[:, tokens].t() if fp8 else None
        if w13_scale is None:
            h, h_scale = x.new_empty(P, inter), None
            expert_gemm(x, None, w13, None, h, routing, block, gated=True)
        else:  # gate and up are one wide product: faster, though its results are read once more
            y = torch.empty(P, 2 * inter, dtype=dtype, device=x.device)
            expert_gemm(x, x_scale, w13.flatten(1, 2), w13_scale.flatten(1, 2), y, routing, block)
            h = silu_mul(y.unflatten(1, (2, inter)), fp8, scale_fmt, keep=False)
            h, h_scale = h[1:] if fp8 else (h, None)
    else:
        h = x.new_empty(P, inter)
        h_scale = torch.empty(cdiv(inter, BLOCK_SIZE), P, device=x.device).t() if fp8 else None
        pairs = {"routing": routing, "top_k": K, "block": block, "n_shared": n_shared}
        launch_gemm(x, x_scale, w13, w13_scale, h, h_scale, scale_fmt, gated=True, **pairs)
    expert_gemm(h, h_scale, w2, w2_scale, terms.flatten(0, 1), routing, block, weights)
    return terms
