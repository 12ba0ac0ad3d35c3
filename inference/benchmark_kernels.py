"""
Every kernel alone, at the shapes of benchmarks/peers.json: `python inference/benchmark.py --kernels`, under torchrun
for the all-reduce. Calls stand in one CUDA graph and go round over COLD_BYTES of different weights (or caches), more
than any L2 cache holds, so each finds its own in memory only. (W_UV, behind attention, is one for all.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from attention import latent_attention
from errors import InputError, is_first
from experts import expert_gemm, experts, pair_block
from gpu import cdiv, has_e4m3
from kernel import E4M3, act_quant, fp8_gemm, has_block_scaled_library, library_gemm
from latent import expand_value
from parallel import Parallel, choose_device, join_ranks
from plan import table
from routing import sort_pairs

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers.json"
COLD_BYTES = 256_000_000
REPEATS = 5  # of a timing; the median counts
C, R = 512, 64  # the latent and the rotary key of the MLA cases

Call = Callable[[], Any]
Calls = list[Call]  # of one kernel, each with operands of its own


def time_of(run: Call, steps: int, on_gpu: bool) -> float:
    """Seconds of one run when `steps` follow each other: the median of REPEATS."""
    found = []
    for _ in range(REPEATS):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / steps)
        else:
            begin = time.perf_counter()
            for _ in range(steps):
                run()
            found.append((time.perf_counter() - begin) / steps)
    return statistics.median(found)


def captured(run: Call) -> Call:
    """`run`, which has run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog may ask about events meanwhile
        run()
    return graph.replay


@dataclass
class Timing:
    """One kernel at one shape. library_us: cuBLASLt's, or NCCL's."""

    kernel: str
    shape: str
    us: float
    tb_per_s: float
    tflops: float
    peer_us: float | None = None
    library_us: float | None = None


def seconds_of(calls: Calls, on_gpu: bool) -> float:
    """
    Seconds of one call, when all of them follow each other in rounds: a median. As many rounds as take 20 ms, which
    ranks that wait for each other must not choose for themselves.
    """

    def run() -> None:
        for call in calls:
            call()

    run()  # compiles
    replay = captured(run) if on_gpu else run
    rounds = 50 if dist.is_initialized() else max(1, int(0.02 / time_of(replay, 1, on_gpu)))
    return time_of(replay, rounds, on_gpu) / len(calls)


def timed(
    kernel: str, shape: str, calls: Calls, nbytes: int, flops: int, device: torch.device,
    library: Calls | None = None, besides: Calls | None = None,
) -> Timing:  # fmt: skip
    """
    A call moves `nbytes` and makes `flops` operations; `library`: the same calls of the vendor's. `besides`: the part
    of `calls` that is not the kernel's; its time is subtracted.
    """
    on_gpu = device.type == "cuda"
    us = (seconds_of(calls, on_gpu) - (seconds_of(besides, on_gpu) if besides else 0)) * 1e6
    library_us = seconds_of(library, on_gpu) * 1e6 if library else None
    return Timing(kernel, shape, us, nbytes / us / 1e6, flops / us / 1e6, library_us=library_us)


def copies(nbytes: int, cold_bytes: int) -> int:
    """How many different operands of this size it takes so that none stays in a cache."""
    return max(2, cdiv(cold_bytes, nbytes))


def random_fp8(*shape: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [.., N, K] and their scales."""
    *stack, N, K = shape
    values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 100).clamp_(-448, 448).to(E4M3)
    return values, torch.rand(*stack, cdiv(N, 128), cdiv(K, 128), device=device) / 1000


def gemm_operands(M: int, N: int, K: int, n: int, device: torch.device) -> tuple[Any, list[Any]]:
    """An activation [M, K] with its scales, and `n` weights [N, K] with theirs."""
    a = act_quant(torch.randn(M, K, dtype=torch.bfloat16, device=device))
    weight, scale = random_fp8(N, K, device=device)
    return a, [(weight.clone(), scale.clone()) for _ in range(n)]


def gemm(M: int, N: int, K: int, device: torch.device, cold_bytes: int = COLD_BYTES) -> Timing:
    """y = x W^T, blocks of 128 x 128: reads N * K bytes, makes 2 * M * N * K operations."""
    (a, a_scale), weights = gemm_operands(M, N, K, copies(N * K, cold_bytes), device)
    library = None
    if has_block_scaled_library(device) and M > 1 and N % 128 == 0:  # what cuBLASLt takes
        column_major = a_scale.t().contiguous().t()
        library = [lambda w=w, s=s: library_gemm(a, column_major, w, s) for w, s in weights]
    calls = [lambda w=w, s=s: fp8_gemm(a, a_scale, w, s) for w, s in weights]
    nbytes = N * K + M * K + 2 * M * N
    return timed("fp8_gemm", f"{N} x {K}, M {M}", calls, nbytes, 2 * M * N * K, device, library)


def mla(heads: int, rows: int, length: int, queries: int, device: torch.device, cold_bytes: int = COLD_BYTES) -> Timing:
    """
    Attention inside the latent space: reads rows * length * (C + R) numbers of 2 bytes. As the expansion of its values
    merges its splits, the time is what it adds to an expansion.
    """
    nbytes = rows * length * (C + R) * 2
    q = torch.randn(rows, queries, heads, C + R, dtype=torch.bfloat16, device=device)
    cache = torch.randn(rows, length, C + R, dtype=torch.bfloat16, device=device)
    caches = [cache.clone() for _ in range(copies(nbytes, cold_bytes))]
    which = torch.arange(rows, device=device)
    positions = torch.arange(length - queries, length, device=device).expand(rows, -1).contiguous()
    w_uv, o = torch.randn(heads, 128, C).to(q), torch.randn(rows, queries, heads, C).to(q)
    attend = partial(latent_attention, q, rows=which, positions=positions, kv_len=length, scale=(128 + R) ** -0.5, C=C)
    calls = [lambda c=c: expand_value(attend(cache=c), w_uv) for c in caches]
    expansions = [lambda: expand_value(o, w_uv)] * len(calls)
    flops = 2 * rows * queries * heads * length * (2 * C + R)
    shape = f"{heads} heads, {rows} x {length}, {queries} queries"
    return timed("latent_attention", shape, calls, nbytes, flops, device, besides=expansions)


def grouped_gemm(E: int, rows: int, N: int, K: int, device: torch.device) -> Timing:
    """E products at once, each of `rows` tokens, which lie side by side."""
    x, x_scale = act_quant(torch.randn(E * rows, K, dtype=torch.bfloat16, device=device))
    weights = [random_fp8(E, N, K, device=device) for _ in range(copies(E * N * K, COLD_BYTES))]
    block = pair_block(x, E * rows, E, weights[0][0], None)
    routing = sort_pairs(torch.arange(E, device=device).repeat_interleave(rows)[:, None], 0, E, block)
    y = torch.empty(E * rows, N, dtype=torch.bfloat16, device=device)
    calls = [lambda w=w, s=s: expert_gemm(x, x_scale, w, s, y, routing, block) for w, s in weights]
    shape = f"{E} x {N} x {K}, {rows} rows each"
    return timed("grouped_gemm", shape, calls, E * N * K + x.nbytes + y.nbytes, 2 * E * rows * N * K, device)


def moe(tokens: int, E: int, top_k: int, inter: int, D: int, device: torch.device) -> Timing:
    """
    A layer's experts for tokens that each choose `top_k` of E and one that all share: the choice made, both products.
    """
    x = torch.randn(tokens, D, dtype=torch.bfloat16, device=device)
    chosen = torch.rand(tokens, E, device=device).topk(top_k).indices
    chosen = torch.cat([chosen, torch.full((tokens, 1), E, device=device)], dim=1)
    pairs, hit = chosen.numel(), chosen.unique().numel()
    share = torch.rand(tokens, top_k + 1, device=device)
    n = copies(hit * 3 * inter * D, COLD_BYTES)
    weights = [(random_fp8(E + 1, 2, inter, D, device=device), random_fp8(E + 1, D, inter, device=device))]
    weights += [tuple((w.clone(), s.clone()) for w, s in weights[0]) for _ in range(n - 1)]
    block = pair_block(x, pairs, E + 1, weights[0][0][0], None)
    routing = sort_pairs(chosen, 0, E + 1, block)
    calls = [lambda w13=w13, w2=w2: experts(x, w13, w2, None, share, routing, block) for w13, w2 in weights]
    shape = f"{tokens} tokens, {top_k} + 1 of {E} + 1 experts, {inter} x {D}"
    return timed("experts", shape, calls, hit * 3 * inter * D, 6 * pairs * inter * D, device)


def all_reduce(tokens: int, dim: int, parallel: Parallel, device: torch.device) -> Timing:
    """The sum over the ranks of a hidden state per token; TB/s are of one rank's data."""
    x = torch.zeros(tokens, dim, dtype=torch.bfloat16, device=device)  # stays zero, however often it is summed
    ours, library = [lambda: parallel.all_reduce(x)] * 20, [lambda: dist.all_reduce(x, group=parallel.group)] * 20
    return timed("all_reduce", f"{tokens} x {dim}", ours, x.nbytes, 0, device, library)


def timings(parallel: Parallel, device: torch.device) -> Iterator[Timing]:
    """Each case of peers.json, with the peer's figure."""
    peers = json.loads(PEERS.read_text())

    def known(kernel: str, separator: str = " x ") -> Iterator[tuple[Any, ...]]:
        """The numbers of a shape, and the peer's us by what is left open."""
        for shape, times in peers[kernel]["us"].items():
            yield *map(int, shape.split(separator)), times

    if parallel.world_size > 1:
        for dim, times in known("all_reduce"):
            for tokens in (1, 8, 64, 512, 4096):
                us = times.get(str(tokens)) if parallel.world_size == 4 else None
                yield replace(all_reduce(tokens, dim, parallel, device), peer_us=us)
        return  # the rest is a matter of one GPU
    for N, K, times in known("fp8_gemm"):
        for M in (1, 8, 64, 128, 4096):
            yield replace(gemm(M, N, K, device), peer_us=times.get(str(M)))
    for E, N, K, times in known("grouped_gemm"):
        for rows, us in times.items():
            yield replace(grouped_gemm(E, int(rows), N, K, device), peer_us=us)
    for tokens in (1, 8, 64, 4096):  # of the 671B model, at 8 GPUs
        yield moe(tokens, 256, 8, 256, 7168, device)
    for heads, rows, length, times in known("mla_decode", ", "):
        for queries, us in times.items():
            yield replace(mla(heads, rows, length, int(queries), device), peer_us=us)


def figure(value: float | None, style: str = ".3g") -> str:
    return "" if value is None else f"{value:{style}}" if value < 1000 else f"{value:,.0f}"


@torch.inference_mode()
def run_kernels(options: argparse.Namespace) -> None:
    parallel, device = join_ranks(choose_device(options.device))
    if device.type != "cuda" or not has_e4m3(device):
        raise InputError("--kernels: there is no CUDA GPU with FP8 units here to time them on")
    if not PEERS.exists():
        raise InputError(f"{PEERS}: no such file; --kernels times the shapes in it")
    found = list(timings(parallel, device))
    if not is_first():
        return
    rows = [("", "us", "TB/s", "TFLOPS", "peer us", "x peer", "library us")]
    for t in found:
        us, tflops, peer_us, library_us = (figure(v, ".1f") for v in (t.us, t.tflops, t.peer_us, t.library_us))
        ratio = "" if t.peer_us is None else f"{t.us / t.peer_us:.2f}"
        rows.append((f"{t.kernel} {t.shape}", us, f"{t.tb_per_s:.2f}", tflops, peer_us, ratio, library_us))
    ratios = [t.us / t.peer_us for t in found if t.peer_us]
    about = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "gpus": parallel.world_size}
    print(f"{about['device']}, torch {about['torch']}; cold weights, in a CUDA graph\n")
    print(table(rows))
    if ratios:
        print(f"\nus / peer's us: median {statistics.median(ratios):.2f}, worst {max(ratios):.2f}")
    print(json.dumps(about | {"kernels": [asdict(timing) for timing in found]}))
