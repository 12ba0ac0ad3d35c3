"""
Sums through symmetric memory: on GPUs against the ranks' terms added in fp64, by `torchrun test_symmetric.py`; on a
CPU those in norms, and when they are used at all.
"""

from __future__ import annotations

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import parallel
from config import ModelArgs
from crowded import run_ranks
from dummy import fill_dummy
from fused import Ranks
from gpu import EMPTY
from interpreter import interpret, needs_interpreter
from kernel import Quantised
from model import Transformer
from parallel import (
    INBOX_BYTES,
    ONE_SHOT_BYTES,
    TWO_SHOT_BYTES,
    Parallel,
    SymmetricMemory,
    join_ranks,
    leave_ranks,
    share_memory,
)
from test_fused import assert_near, assert_quantised, norm

ROOT = Path(__file__).parents[1]
TOKENS = (1, 2, 3, 7, 8, 9, 64, 65, 511, 512, 1170, 1171, 4096)
DIM = 7168
ODD = ((1,), (8,), (5, 3, 8), (1023, 9), (129, 130), (3, 7, 1))  # of these some are left to NCCL


# --- on several GPUs: every rank runs this ----------------------------------------------------------------------------


def part(shape: tuple[int, ...], dtype: torch.dtype, seed: int, rank: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1000 * seed + rank)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def check(ranks: Parallel, found: torch.Tensor, seed: int) -> None:
    """Against the sum in fp64: every addition rounds once. And the same bits everywhere."""
    parts = [part(found.shape, found.dtype, seed, rank, found.device).double() for rank in range(ranks.world_size)]
    unit = torch.finfo(found.dtype).eps / 2
    bound = 1.02 * unit * (ranks.world_size - 1) * sum(x.abs() for x in parts) + 1e-30
    assert bool(((found.double() - sum(parts)).abs() <= bound).all()), f"{found.shape=} {found.dtype=}"
    everyone = [torch.empty_like(found) for _ in range(ranks.world_size)]
    dist.all_gather(everyone, found)
    bits = torch.int16 if found.dtype == torch.bfloat16 else torch.int32
    assert all(torch.equal(x.view(bits), found.view(bits)) for x in everyone), f"{found.shape=}: ranks differ"


@dataclass
class Norms:
    """Norms that sum their terms over the ranks, against fp64."""

    ranks: Parallel
    device: torch.device
    weights: dict = field(default_factory=dict)

    def weight(self, x: torch.Tensor) -> torch.Tensor:
        """The same for the same type; made before a graph records its use."""
        key = x.shape[1:], x.dtype
        if key not in self.weights:
            self.weights[key] = part(*key, 7, 0, self.device)
        return self.weights[key]

    def inputs(self, seed: int, tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """x, and each rank's terms; now and then with the NaN that stands for nothing there yet."""
        x = part((tokens, dim), dtype, seed, 99, self.device)
        terms = [part((tokens, 3, dim), dtype, seed, rank, self.device) for rank in range(self.ranks.world_size)]
        if seed % 10 == 9 and self.device.type == "cuda":  # elsewhere it stays as it is when added to
            terms[seed % len(terms)].view(torch.int16 if dtype == torch.bfloat16 else torch.int32)[-1, :, 5] = EMPTY
        return [x, *terms]

    def found(self, x: torch.Tensor, *terms: torch.Tensor, half: int) -> tuple[torch.Tensor, Quantised]:
        assert self.ranks.symmetric.ranks(x, half) is not None
        return self.ranks.add_rms_norm(x, terms[self.ranks.rank], self.weight(x), 1e-6, half, quantise=True)

    def check_found(self, found: tuple[torch.Tensor, Quantised], x: torch.Tensor, *terms: torch.Tensor) -> None:
        total, case = x.float(), (x.shape, x.dtype)
        for y in terms:
            total = total + sum(y.float().unbind(1)).to(x.dtype).float()
        total = total.to(x.dtype)
        assert torch.equal(found[0].nan_to_num(7), total.nan_to_num(7)), case
        (h, values, scale), fine = found[1], total.isfinite().all(1)
        assert h[~fine].isnan().all()
        assert_near(h[fine], norm(total[fine], self.weight(x)), case)
        values = values.view(torch.uint8)[fine].view(values.dtype)
        assert_quantised(Quantised(None, values, scale[fine]), h[fine], None, case)
        if self.device.type == "cuda":
            everyone = [torch.empty_like(h) for _ in terms]
            dist.all_gather(everyone, h)
            assert all(torch.equal(y[fine], h[fine]) for y in everyone), case

    def check(self, tokens: list[int], dtypes: list[torch.dtype], n: int = 200, dims: tuple[int, ...] = (DIM, 200)):
        """Both halves in turn, and ranks that are late."""
        done = []
        for seed in range(n):
            dtype = dtypes[seed % len(dtypes)]
            most = TWO_SHOT_BYTES // (DIM * dtype.itemsize) - 8
            given = self.inputs(seed, min(tokens[seed % len(tokens)], most), dims[seed % 7 == 6], dtype)
            if seed % 50 == self.ranks.rank and self.device.type == "cuda":
                torch.cuda._sleep(2_000_000)
            done.append((self.found(*given, half=seed % 2), *given))
        for case in done:
            self.check_found(*case)

    def check_graph(self, tokens: int) -> None:
        static = self.inputs(0, tokens, DIM, torch.bfloat16)
        self.weight(static[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = [self.found(*static, half=half) for half in (0, 1)]
        for replay in range(50):
            for tensor, given in zip(static, self.inputs(replay, tokens, DIM, torch.bfloat16), strict=True):
                tensor.copy_(given)
            graph.replay()
            for found in outputs:
                self.check_found(found, *static)


def rank_main() -> None:
    ranks, device = join_ranks("cuda")
    assert ranks.symmetric is not None, ranks.sums
    through_nccl, nccl = [], dist.all_reduce
    dist.all_reduce = lambda x, group=None: (through_nccl.append(x.shape), nccl(x, group=group))

    def summed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
        x = part(shape, dtype, seed, ranks.rank, device)
        assert ranks.all_reduce(x) is x
        return x

    shapes = [(tokens, DIM) for tokens in TOKENS] + list(ODD)
    for seed, shape in enumerate(shapes):
        for dtype in (torch.bfloat16, torch.float32):
            check(ranks, summed(shape, dtype, seed), seed)
    large = sum(tokens * DIM * size > TWO_SHOT_BYTES for tokens in TOKENS for size in (2, 4))
    odd = sum(torch.Size(shape).numel() * size % 16 > 0 for shape in ODD for size in (2, 4))
    assert len(through_nccl) == large + odd, through_nccl

    # Of several terms: their sums in fp32, rounded once, are what the ranks add.
    terms = part((9, 9, DIM), torch.bfloat16, 0, ranks.rank, device)
    wanted = ranks.all_reduce(terms.sum(1, dtype=torch.float32).bfloat16())
    off = (ranks.sum_terms(terms).double() - wanted.double()).abs()
    assert bool((off <= 2.0**-6 * wanted.abs().clamp(min=1)).all()), off.max()

    norms = Norms(ranks, device)
    norms.check([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 33, 64, 65, 130, 512, 1170], [torch.bfloat16] * 5 + [torch.float32])
    norms.check_graph(4)
    norms.check_graph(64)

    # Many in a row, no rank waiting for another in between: a rank that is late reads what it should.
    results = []
    for seed in range(300):
        if seed % 50 == ranks.rank:
            torch.cuda._sleep(2_000_000)
        results.append(summed((TOKENS[seed % 9], DIM), torch.bfloat16, seed))
    for seed, result in enumerate(results):
        check(ranks, result, seed)

    inputs = [torch.zeros(tokens, DIM, dtype=torch.bfloat16, device=device) for tokens in (1, 8, 64, 512)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = [ranks.all_reduce(x.clone()) for x in inputs]
    for replay in range(5):
        for i, x in enumerate(inputs):
            x.copy_(part(x.shape, x.dtype, 10 * replay + i, ranks.rank, device))
        graph.replay()
        for i, output in enumerate(outputs):
            check(ranks, output, 10 * replay + i)
    torch.cuda.synchronize()
    print(f"rank {ranks.rank}: {ranks.sums}", flush=True)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("jobs")
@pytest.mark.parametrize("n", [2, 4, 8])
def test_sums_on_gpus(n):
    assert run_ranks(n, __file__).count("through shared GPU memory") == n


# --- the same norms on a CPU, through memory that processes share -----------------------------------------------------


def interpreted(folder: str, rank: str, world_size: str) -> None:
    memory = object.__new__(SymmetricMemory)
    paths = [f"{folder}/{i}" for i in range(int(world_size))]
    shared = [torch.from_file(path, True, 2 * INBOX_BYTES, dtype=torch.uint8) for path in paths]
    memory.handle = SimpleNamespace(rank=int(rank), world_size=len(shared), buffer_ptrs=[x.data_ptr() for x in shared])
    norms = Norms(Parallel(int(rank), len(shared), symmetric=memory), torch.device("cpu"))
    norms.check([1, 3, 5, 2, 6], [torch.float32], n=12)  # from 5 on in two shots
    print("interpreted")


@needs_interpreter
@pytest.mark.parametrize("n", [2, 4])
def test_norms_over_ranks_in_the_interpreter(n, tmp_path):
    for rank in range(n):
        (tmp_path / str(rank)).write_bytes(b"\xff" * 2 * INBOX_BYTES)
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(interpret, __file__, str(tmp_path), str(rank), str(n)) for rank in range(n)]
    assert all(rank.result() == "interpreted" for rank in ranks)


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, taken",
    [
        (torch.zeros(1, DIM, dtype=torch.bfloat16), True),
        (torch.zeros(TWO_SHOT_BYTES // 4), True),
        (torch.zeros(TWO_SHOT_BYTES // 4 + 4), False),
        (torch.zeros(4), True),
        (torch.zeros(5), False),
        (torch.zeros(9)[1:], False),
        (torch.zeros(12)[4:], True),
        (torch.zeros(0), False),
        (torch.zeros(8, 8).t(), False),
        (torch.zeros(8, dtype=torch.int64), False),
        (torch.zeros(8, dtype=torch.float64), False),
    ],
)
def test_what_goes_through_it(x, taken):
    assert SymmetricMemory.takes(None, x) is taken


@pytest.mark.parametrize("nbytes, one_shot", [(16, True), (ONE_SHOT_BYTES, True), (ONE_SHOT_BYTES + 16, False)])
def test_one_or_two_shots(monkeypatch, nbytes, one_shot):
    """The kernel gets the data in shared memory, in the caller's type and shape, and the caller's tensor as output."""
    memory = SymmetricMemory.__new__(SymmetricMemory)
    memory.group_name, memory.buffer = "0", torch.full((TWO_SHOT_BYTES,), 0xEE, dtype=torch.uint8)
    calls = []

    def kernel(name):
        def op(shared, how, group_name, out):
            assert (how, group_name) == ("sum", "0") and shared.shape == out.shape and shared.dtype == out.dtype
            assert shared.data_ptr() == memory.buffer.data_ptr() and torch.equal(shared, given)
            calls.append(name)
            out.copy_(3 * shared)

        return op

    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_out", kernel("one"), raising=False)
    monkeypatch.setattr(torch.ops.symm_mem, "two_shot_all_reduce_out", kernel("two"), raising=False)
    ranks, x = Parallel(0, 2, symmetric=memory), torch.randn(nbytes // 8, 2)
    given = x.clone()
    assert ranks.all_reduce(x) is x and torch.equal(x, 3 * given)
    terms = torch.randn(nbytes // 8, 5, 2)
    given = terms.sum(1)
    assert torch.equal(ranks.sum_terms(terms), 3 * given)
    given = x.clone()
    assert ranks.sum_terms(x) is x and torch.equal(x, 3 * given)
    assert calls == ["one" if one_shot else "two"] * 3


def test_sums_in_norms_take_the_halves_in_turn(monkeypatch):
    """From pass to pass, with and without drafts: a half that is written again at once may still be read."""
    halves: list[int] = []
    norm = Parallel.add_rms_norm

    def noted(self, x, terms, weight, eps, half, **options):
        halves.extend([] if terms is None else [half])
        return norm(self, x, terms, weight, eps, half, **options)

    monkeypatch.setattr(Parallel, "add_rms_norm", noted)
    args = replace(ModelArgs.load(ROOT / "tiny" / "config.json"), dtype="bf16", n_mtp_layers=2)
    model = Transformer(args)
    fill_dummy(model)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    step = model.step((2, 3))
    with torch.inference_mode():
        for drafts in (0, 1, 2, 0):
            h = model.hidden(tokens, step)
            for i in range(drafts):
                h = model.draft(i, h, tokens, step)
    assert len(halves) == 4 * 2 * args.n_layers + 3 * 2
    assert all(a != b for a, b in itertools.pairwise(halves)), halves


@pytest.mark.parametrize("grad", [False, True])
def test_a_norm_without_its_kernel_leaves_the_sum_to_the_ranks(monkeypatch, grad):
    """The reference of add_rms_norm knows no ranks: on a CPU, or under a gradient, which kernels do not have."""
    memory = object.__new__(SymmetricMemory)
    monkeypatch.setattr(SymmetricMemory, "ranks", lambda *_: pytest.fail("asked for ranks"))
    monkeypatch.setattr(Parallel, "sum_terms", lambda _, terms: 3 * terms.sum(1))
    x, terms, weight = torch.randn(2, 8).requires_grad_(grad), torch.randn(2, 4, 8), torch.ones(8)
    total, _ = Parallel(0, 2, symmetric=memory).add_rms_norm(x, terms, weight, 1e-6, 0)
    torch.testing.assert_close(total, x + 3 * terms.sum(1))


@pytest.mark.parametrize(
    "tokens, two_shot", [(1, False), (9, False), (10, True), (64, True), (1160, True), (1171, None), (4096, None)]
)
def test_where_norms_leave_their_terms(tokens, two_shot):
    """Each half apart, in one or two shots by size, and beyond the memory's not at all."""
    memory = SymmetricMemory.__new__(SymmetricMemory)
    memory.handle = SimpleNamespace(rank=3, world_size=4, buffer_ptrs=[16, 32, 48, 64])
    found = [memory.ranks(torch.empty(tokens, DIM, dtype=torch.bfloat16), half) for half in (0, 1)]
    if two_shot is None:
        assert found == [None, None]
    else:
        assert found == [Ranks(3, 4, (16, 32, 48, 64), offset, two_shot) for offset in (0, INBOX_BYTES)]


class Refusing(SymmetricMemory):
    def __init__(self, group, device):
        raise RuntimeError("pidfd_getfd: not permitted\nmore")


@pytest.mark.parametrize(
    "world_size, local, peers, refuse, others, reason",
    [
        (3, 3, True, False, "", "for (2, 4, 8) ranks"),
        (16, 8, True, False, "", "for (2, 4, 8) ranks"),
        (4, 2, True, False, "", "different hosts"),
        (4, 4, False, False, "", "not every GPU can access"),
        (4, 4, True, True, "", "pidfd_getfd: not permitted"),
        (4, 4, True, False, "rank 2 failed", "rank 2 failed"),
        (4, 4, True, False, "", None),
    ],
)
def test_when_it_is_not_used(monkeypatch, world_size, local, peers, refuse, others, reason):
    class Granting(SymmetricMemory):
        def __init__(self, group, device):
            pass

    def gather(found, own, group):
        found[:] = [own] * world_size
        found[2] = found[2] or others

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: peers or (i, j) != (3, 1))
    monkeypatch.setattr(parallel, "SymmetricMemory", Refusing if refuse else Granting)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    memory, line = share_memory(None, torch.device("cuda"))
    if reason is None:
        assert memory is not None and line == "sums of up to 16 MB through shared GPU memory"
    else:
        assert memory is None and line.startswith("sums through NCCL: ") and reason in line and "\n" not in line


if __name__ == "__main__" and len(sys.argv) > 1:
    interpreted(*sys.argv[1:])
elif __name__ == "__main__":
    rank_main()
    leave_ranks()
