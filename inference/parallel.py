"""Tensor parallelism: which slice of the model this process holds, and the collectives that join the slices."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from errors import InputError

# How long ranks wait for rank 0 between requests: it may sit at a prompt for days.
IDLE_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Parallel:
    """
    Rank `rank` of `world_size`; the default is a single process.

    `expert_parallel`: a rank holds whole routed experts instead of a slice of each. `group` joins tensors (None: the
    default one), `control` carries Python objects from rank 0 and may wait for ever.
    """

    rank: int = 0
    world_size: int = 1
    expert_parallel: bool = False
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] on each rank -> [..., world_size * n], in rank order."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """Rank 0's `x` on every rank, in place."""
        if self.world_size > 1:
            dist.broadcast(x, 0, group=self.group)
        return x

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]


def choose_device(device: str) -> str:
    """ "auto" is CUDA where there is one. Raises InputError for CUDA where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA GPU is visible here; --device cpu works everywhere")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def join_ranks(device: str, expert_parallel: bool = False) -> tuple[Parallel, torch.device]:
    """The Parallel and the device of this process, from torchrun's environment; a single process without it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    torch_device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if world_size == 1:
        return Parallel(expert_parallel=expert_parallel), torch_device
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    atexit.register(dist.destroy_process_group)  # else gloo's threads now and then abort the process as it ends
    return Parallel(dist.get_rank(), world_size, expert_parallel, control=control), torch_device
