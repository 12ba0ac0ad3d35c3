"""Tensor parallelism: which slice of the model this process holds, and the two collectives that join the slices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Parallel:
    """
    Rank `rank` of `world_size`; the default is a single process.

    `expert_parallel`: a rank holds whole routed experts instead of a slice of each. `group` is the process group of
    the collectives (None: the default one).
    """

    rank: int = 0
    world_size: int = 1
    expert_parallel: bool = False
    group: dist.ProcessGroup | None = None

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
