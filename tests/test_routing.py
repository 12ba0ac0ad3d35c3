"""
Routing: the references against loops over tokens and experts, the kernels against the references.

`python test_routing.py` with TRITON_INTERPRET=1 runs the kernels on the CPU, as in test_kernel.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from gpu import counters
from interpreter import interpret, needs_interpreter
from routing import (
    CHUNK,
    FEW_PAIRS,
    FEW_TOKENS,
    Routing,
    gate_scores,
    gate_scores_ref,
    route,
    route_and_sort,
    route_ref,
    sort_pairs,
    sort_pairs_ref,
    tile_count,
)
from test_fused import interpret_bf16_dots, poisoned, random

V3 = {
    "score_func": "sigmoid", "n_groups": 8, "n_limited_groups": 4, "top_k": 8, "route_scale": 2.5, "n_shared": 1
}  # fmt: skip
V2 = {
    "score_func": "softmax", "n_groups": 8, "n_limited_groups": 3, "top_k": 6, "route_scale": 16.0, "n_shared": 2
}  # fmt: skip
LITE = V2 | {"n_groups": 1, "n_limited_groups": 1, "route_scale": 1.0}
TINY = V3 | {"n_groups": 4, "n_limited_groups": 2, "top_k": 4}
ONE_GROUP = V3 | {"n_groups": 1, "n_limited_groups": 1, "n_shared": 0}
CASES = {"V3": (256, V3), "V2": (160, V2), "V2-Lite": (64, LITE), "tiny": (32, TINY), "384 experts": (384, ONE_GROUP)}


# --- each operation, on any device ------------------------------------------------------------------------------------


def check_scores(device: str, M: int, E: int, D: int, dtype: torch.dtype, exact_weight: bool) -> None:
    x, weight = random(M, D, dtype=dtype).to(device), random(E, D, seed=1).to(device)
    if exact_weight:
        weight = weight.bfloat16().float()
    with poisoned():
        found = gate_scores(x, weight)
    assert found.dtype == torch.float32 and not counters(found.device).any()
    found = found.sum(0)
    wanted = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    # fp32's own rounding; where w = hi + lo in bf16 the 2^-17 that is left of w, or the bits that tensor cores drop.
    in_halves = dtype == torch.bfloat16 and M > FEW_TOKENS
    bound = 2.0**-21 if not in_halves else 2.0**-20 if exact_weight else 2.0**-17
    assert ((found.double() - wanted).abs() <= terms * bound).all(), (M, E, D, dtype)


def check_choice(logits: torch.Tensor, bias: torch.Tensor | None, options: dict, weights, indices) -> None:
    """
    As the reference, but that two experts whose scores are as good as equal may be taken for each other: exponentials
    differ in their last bit between devices.
    """
    K, sigmoid = options["top_k"], options["score_func"] == "sigmoid"
    _, wanted = route_ref(logits[None], bias, **options)
    weights, indices = weights.cpu(), indices.cpu()
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32 and indices.shape == wanted.shape
    assert (indices == wanted).all(1).float().mean() >= 0.99
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    found_choice, wanted_choice = (choice.gather(1, which[:, :K].long()) for which in (indices, wanted))
    assert ((found_choice - wanted_choice).abs() <= 1e-6 * wanted_choice.abs().max()).all()
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    wanted_weights = scores.gather(1, indices[:, :K].long()) * options["route_scale"]
    if sigmoid:
        wanted_weights /= wanted_weights.sum(1, keepdim=True) / options["route_scale"]
    assert torch.allclose(weights[:, :K], wanted_weights, rtol=1e-5, atol=1e-9)
    assert (indices[:, K:] == torch.arange(-options["n_shared"], 0)).all() and (weights[:, K:] == 1).all()


def check_route(device: str, M: int, case: str) -> None:
    E, options = CASES[case]
    logits = random(M, E) * 2
    bias = random(E, seed=1) / 10 - 1.5 if options["score_func"] == "sigmoid" else None  # below 0, as scores are not
    slices = torch.stack([logits - logits.round(), logits.round(), torch.zeros_like(logits)])  # exact, in any order
    inputs = slices.to(device), None if bias is None else bias.to(device)
    with poisoned():
        check_choice(logits, bias, options, *route(*inputs, **options))
    n_shared = options["n_shared"]
    for block, (first, n_local) in itertools.product((1, 16), ((E // 4, E // 2 + 1), (-n_shared, E + n_shared))):
        sorting = {"first": first, "n_local": n_local, "block": block}
        with poisoned():
            weights, indices, routing = route_and_sort(*inputs, **sorting, **options)
        check_choice(logits, bias, options, weights, indices)
        assert_same(routing, sort_pairs_ref(indices.cpu(), **sorting))
        assert not counters(indices.device).any()

    # Whole numbers, so that equal scores are equal everywhere and ties are many.
    for tied in (random(M, E, seed=2).round(), torch.zeros(M, E)):
        even = None if bias is None else torch.full_like(bias, 0.25)
        found = route(tied[None].to(device), None if even is None else even.to(device), **options)[1]
        assert torch.equal(found.cpu(), route_ref(tied[None], even, **options)[1]), case


def assert_same(found: Routing, wanted: Routing) -> None:
    for name, x, y in zip(Routing._fields, found, wanted, strict=True):
        assert x.dtype == torch.int32 and torch.equal(x.cpu(), y), name


def pairs_of(M: int, K: int, E: int) -> dict[str, torch.Tensor]:
    """[M, K] choices, spread in several ways."""
    generator = torch.Generator().manual_seed(M)
    random_choice = torch.rand(M, E, generator=generator).argsort(1)[:, :K]
    return {
        "random": random_choice,
        "one expert has most": torch.where(torch.rand(M, K, generator=generator) < 0.9, E // 2, random_choice),
        "all to one": torch.full((M, K), E - 1),
        "first or last": torch.where(random_choice % 2 == 0, 0, E - 1),
        "some to shared experts": torch.where(random_choice % 3 == 0, -1 - random_choice % 2, random_choice),
    }


def check_sort(device: str, M: int, K: int, E: int, blocks: tuple[int, ...]) -> None:
    for (name, pairs), block in itertools.product(pairs_of(M, K, E).items(), blocks):
        for first, n_local in ((-2, E + 2), (E // 4, E // 2), (E - 1, 1)):
            with poisoned():
                found = sort_pairs(pairs.int().to(device), first, n_local, block)
            try:
                assert_same(found, sort_pairs_ref(pairs.int(), first, n_local, block))
            except AssertionError as error:
                raise AssertionError((name, M, K, E, first, n_local, block)) from error
            assert not counters(found.order.device).any()


# --- references -------------------------------------------------------------------------------------------------------


def test_scores():
    check_scores("cpu", 5, 33, 100, torch.float32, False)
    check_scores("cpu", 5, 33, 100, torch.bfloat16, True)
    with torch.autocast("cpu", torch.bfloat16):
        check_scores("cpu", 5, 33, 100, torch.float32, False)


@pytest.mark.parametrize("case", CASES)
def test_choice_token_by_token(case):
    E, options = CASES[case]
    sigmoid, G, K = options["score_func"] == "sigmoid", options["n_groups"], options["top_k"]
    every_logits = random(20, E) * 2, random(20, E, seed=2).round(), torch.zeros(1, E)
    # A bias below -1: what is dropped must come after what is below 0.
    biases = [random(E, seed=1) / 10, random(E, seed=1) / 10 - 1.5] if sigmoid else [None]
    for logits, bias in itertools.product(every_logits, biases):
        weights, indices = route(logits[None], bias, **options)
        for row, found_weights, found in zip(logits, weights.tolist(), indices.tolist(), strict=True):
            scores = (row.sigmoid() if sigmoid else row.softmax(0)).tolist()
            choice = (torch.tensor(scores) + bias).tolist() if sigmoid else scores
            members = [range(g * E // G, (g + 1) * E // G) for g in range(G)]
            best = [sorted((choice[e] for e in member), reverse=True) for member in members]
            group_score = [(torch.tensor(b[0]) + torch.tensor(b[1])).item() if sigmoid else b[0] for b in best]
            kept = sorted(range(G), key=lambda g: -group_score[g])[: options["n_limited_groups"]]
            allowed = sorted(e for g in kept for e in members[g])
            wanted = sorted(allowed, key=lambda e: -choice[e])[:K]
            assert found == wanted + list(range(-options["n_shared"], 0))
            total = sum(scores[e] for e in wanted) if sigmoid else 1
            wanted_weights = [scores[e] / total * options["route_scale"] for e in wanted]
            assert found_weights == pytest.approx(wanted_weights + [1] * options["n_shared"], rel=1e-5)


@pytest.mark.parametrize(("M", "K", "E"), [(1, 3, 5), (7, 2, 6), (40, 6, 64)])
def test_tiles_hold_every_pair_once(M, K, E):
    for pairs, block in itertools.product(pairs_of(M, K, E).values(), (1, 4, 16)):
        for first, n_local in ((0, E), (1, E // 2), (E - 1, 1)):
            order, tile_expert, tile_start, tile_stop = (x.tolist() for x in sort_pairs(pairs, first, n_local, block))
            assert len(tile_expert) == tile_count(M * K, n_local, block)
            experts = pairs.flatten().tolist()
            wanted = [[p for p, e in enumerate(experts) if e == first + i] for i in range(n_local)]
            found = [[] for _ in range(n_local)]
            for i, start, stop in zip(tile_expert, tile_start, tile_stop, strict=True):
                if i >= 0:
                    assert 0 < stop - start <= block
                    found[i] += order[start:stop]
                    assert len(found[i]) % block == 0 or found[i] == wanted[i]  # only the last is not full
            assert found == wanted and sorted(order) == list(range(M * K))
            n_tiles = sum(-(-len(own) // block) for own in wanted)
            assert tile_expert[n_tiles:] == [-1] * (len(tile_expert) - n_tiles) and -1 not in tile_expert[:n_tiles]


def test_route_and_sort():
    logits, bias = random(2, 6, 32), random(32, seed=1)
    weights, indices, routing = route_and_sort(logits, bias, first=-1, n_local=33, block=16, **TINY)
    wanted = route_ref(logits, bias, **TINY)
    assert torch.equal(weights, wanted[0]) and torch.equal(indices, wanted[1])
    assert_same(routing, sort_pairs_ref(indices, -1, 33, 16))


# --- the kernels through Triton's interpreter -------------------------------------------------------------------------


@needs_interpreter
def test_kernels_in_the_interpreter():
    assert interpret(__file__) == "interpreted"


def interpreted() -> None:
    torch.set_num_threads(1)
    interpret_bf16_dots()
    for M, E, D in ((1, 7, 200), (3, 140, 1030), (FEW_TOKENS, 64, 128), (FEW_TOKENS + 1, 70, 456), (70, 40, 1000)):
        for exact_weight in (True, False):
            check_scores("cpu", M, E, D, torch.bfloat16, exact_weight)
        check_scores("cpu", M, E, D, torch.float32, False)
    check_scores("cpu", 260, 20, 100, torch.bfloat16, False)
    for case, M in itertools.product(CASES, (1, 2, 7)):
        check_route("cpu", M, case)
    check_route("cpu", 30, "tiny")
    for M, K, E in ((1, 9, 257), (5, 3, 12), (14, 9, 257), (64, 9, 66)):
        assert M * K <= FEW_PAIRS
        check_sort("cpu", M, K, E, (16,))
    for M, K, E in ((1370, 3, 12), (500, 9, 33)):
        assert max(FEW_PAIRS, 2 * CHUNK) < M * K
        check_sort("cpu", M, K, E, (64,))
    print("interpreted")


# --- the kernels on a GPU ---------------------------------------------------------------------------------------------

GPU_M = [1, 2, 7, 8, 9, 14, 15, 64, 65, 256, 257, 1000, 4096]


@pytest.mark.gpu
@pytest.mark.parametrize("M", GPU_M)
def test_gpu_scores(M):
    for E, D in ((256, 7168), (160, 5120), (64, 2048), (32, 256), (384, 7168), (33, 200)):
        for dtype, exact_weight in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            check_scores("cuda", M, E, D, dtype, exact_weight)
    x, weight = random(M, 256), random(32, 256, seed=1)
    wanted = gate_scores_ref(x, weight)
    assert torch.allclose(gate_scores_ref(x.cuda(), weight.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("M", GPU_M)
@pytest.mark.parametrize("case", CASES)
def test_gpu_route(case, M):
    check_route("cuda", M, case)


@pytest.mark.gpu
@pytest.mark.parametrize("M", GPU_M)
@pytest.mark.parametrize(("K", "E"), [(9, 257), (8, 66), (5, 33)])
def test_gpu_sort(M, K, E):
    check_sort("cuda", M, K, E, (16, 64, 128))


@pytest.mark.gpu
def test_gpu_sort_again_and_again():
    """Counters left as they were found, and the same order every time."""
    pairs = pairs_of(8192, 9, 257)["random"].int()
    wanted = sort_pairs_ref(pairs, 0, 257, 128)
    logits, bias = random(1, 7, 256), random(256, seed=1)
    first = route_and_sort(logits.cuda(), bias.cuda(), first=-1, n_local=257, block=16, **V3)
    pairs = pairs.cuda()
    for _ in range(50):
        assert_same(sort_pairs(pairs, 0, 257, 128), wanted)
        again = route_and_sort(logits.cuda(), bias.cuda(), first=-1, n_local=257, block=16, **V3)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
        assert all(torch.equal(x, y) for x, y in zip(again[2], first[2], strict=True))


if __name__ == "__main__":
    interpreted()
