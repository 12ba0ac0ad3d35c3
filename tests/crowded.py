"""
Scripts on several ranks, or on several that share one GPU: `torchrun --nproc-per-node 8 crowded.py SCRIPT ARGUMENT...`.

NCCL does not join ranks that share a GPU. Gloo joins them here, symmetric memory is told to allow it, and what small
tensors would go through NCCL inside a CUDA graph goes through symmetric memory too; large sums go by the CPU. Slow, as
ranks that wait for each other take turns on the GPU; what is computed is what as many GPUs would compute.
"""

from __future__ import annotations

import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import parallel
from gpu import cdiv


def run_ranks(n: int, script: str, *arguments: object) -> str:
    """What `n` ranks of a script print. They share a GPU where GPUs are too few, or cannot read each other's memory."""
    pairs = itertools.permutations(range(min(n, torch.cuda.device_count())), 2)
    crowded = torch.cuda.device_count() < n or not all(itertools.starmap(torch.cuda.can_device_access_peer, pairs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command += [__file__] * crowded + [script, *map(str, arguments)]
    path = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def sum_exactly(ranks: parallel.Parallel, x: torch.Tensor) -> torch.Tensor:
    """Of whole numbers below 2^24, such as tokens, or where only one rank's is not 0: through symmetric memory."""
    total = torch.zeros(4 * cdiv(x.numel(), 4), dtype=torch.float32, device=x.device)
    total[: x.numel()] = x.flatten()
    assert ranks.symmetric.takes(total), x.shape
    ranks.symmetric.all_reduce(total)
    return total[: x.numel()].view(x.shape).to(x.dtype)


def all_gather(ranks: parallel.Parallel, x: torch.Tensor) -> torch.Tensor:
    parts = x.new_zeros(*x.shape[:-1], ranks.world_size, x.shape[-1])
    parts[..., ranks.rank, :] = x
    return sum_exactly(ranks, parts).flatten(-2)


def broadcast(ranks: parallel.Parallel, x: torch.Tensor) -> torch.Tensor:
    return x.copy_(sum_exactly(ranks, x if ranks.rank == 0 else torch.zeros_like(x)))


def all_reduce_by_cpu(x: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    total = x.to("cpu", torch.float32)
    dist_all_reduce(total, group=group)
    x.copy_(total)


def all_gather_by_cpu(parts: list[torch.Tensor], x: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    found = [torch.empty(x.shape, dtype=torch.float32) for _ in parts]
    dist_all_gather(found, x.to("cpu", torch.float32), group=group)
    for part, y in zip(parts, found, strict=True):
        part.copy_(y)


dist_all_reduce, dist_all_gather = dist.all_reduce, dist.all_gather


def main() -> None:
    init_process_group = dist.init_process_group
    dist.init_process_group = lambda backend: init_process_group("gloo")
    dist.all_reduce, dist.all_gather = all_reduce_by_cpu, all_gather_by_cpu
    os.environ["LOCAL_RANK"] = "0"
    torch.cuda.can_device_access_peer = lambda *_: True
    parallel.Parallel.all_gather, parallel.Parallel.broadcast = all_gather, broadcast
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
