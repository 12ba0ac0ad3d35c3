"""Tensor parallelism: which slice of the model this process holds, and the collectives that join the slices."""

from __future__ import annotations

import atexit
import functools
import gc
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from errors import InputError
from fused import Ranks, add_rms_norm, sum_terms
from gpu import EMPTY, cdiv
from kernel import Quantised, on_gpu

# How long ranks wait for rank 0 between requests: it may sit at a prompt for days.
IDLE_TIMEOUT = timedelta(days=365)
# Of up to so many bytes every rank makes the whole sum; up to the second limit each its share, for all; beyond it NCCL.
# Measured on 4 H200s, with 14 KiB a token, all_reduce: 1 token 7 us (NCCL 23), 64 tokens 12 us (29), 512 tokens 44 us
# (69), 4,096 tokens 294 us (310); norms that sum: 3.6, 11 and 46 us.
ONE_SHOT_BYTES = 128 << 10
TWO_SHOT_BYTES = 16 << 20
INBOX_BYTES = 2 * TWO_SHOT_BYTES  # for a norm: all ranks' terms of a rank's share of the tokens, and all tokens' sums


class SymmetricMemory:
    """
    Memory of this rank that the other GPUs of the host read and write directly, and sums through it.

    Every rank adds in the order of the ranks, in the type of `x` (a norm in fp32), so the sums are the same to the last
    bit on all of them. Sums must be made in the same order on every rank, on one stream; they can be part of a CUDA
    graph. Multicast is not used.
    """

    WORLD_SIZES = (2, 4, 8)  # that the kernels are compiled for

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group_name = group.group_name
        self.buffer = symm_mem.empty(TWO_SHOT_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self.buffer, group)
        self.inboxes = symm_mem.empty(2 * INBOX_BYTES, dtype=torch.uint8, device=device)  # two sums in turn
        self.inboxes.view(torch.int32).fill_(EMPTY)
        torch.cuda.synchronize(device)  # the ranks meet in the next line
        self.handle = symm_mem.rendezvous(self.inboxes, group)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `x` is small enough and laid out for it: the same answer on every rank, as nothing else counts."""
        aligned = x.nbytes % 16 == 0 and x.storage_offset() * x.itemsize % 16 == 0
        summable = x.dtype in (torch.bfloat16, torch.float32) and x.is_contiguous()
        return aligned and summable and 0 < x.nbytes <= TWO_SHOT_BYTES

    def ranks(self, x: torch.Tensor, half: int) -> Ranks | None:
        """Where a norm can sum its terms, of the shape of x [M, D], over the ranks; None if they are too many."""
        rank, world_size = self.handle.rank, self.handle.world_size
        two_shot, M = x.nbytes > ONE_SHOT_BYTES, len(x)
        rows = cdiv(M, world_size) * world_size + M if two_shot else M * world_size
        if rows * x[0].nbytes > INBOX_BYTES:
            return None
        return Ranks(rank, world_size, tuple(self.handle.buffer_ptrs), half * INBOX_BYTES, two_shot)

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum of `x` over the ranks, in place."""
        shared = self.buffer[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        if x.nbytes <= ONE_SHOT_BYTES:
            torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", self.group_name, x)
        else:
            torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", self.group_name, x)


@dataclass(frozen=True)
class Parallel:
    """
    Rank `rank` of `world_size`; the default is a single process.

    `expert_parallel`: a rank holds whole routed experts instead of a slice of each. `group` joins tensors (None: the
    default one), `control` carries Python objects from rank 0 and may wait for ever. `symmetric`: what small sums go
    through, where GPUs can; `sums` says of the choice what a user may want to know.
    """

    rank: int = 0
    world_size: int = 1
    expert_parallel: bool = False
    group: dist.ProcessGroup | None = None
    control: dist.ProcessGroup | None = None
    symmetric: SymmetricMemory | None = None
    sums: str = ""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over the ranks, in place."""
        if self.symmetric is not None and self.symmetric.takes(x):
            self.symmetric.all_reduce(x)
        elif self.world_size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_terms(self, terms: torch.Tensor) -> torch.Tensor:
        """terms [M, P, D], or [M, D] which it may change -> their sum over P and the ranks, [M, D]."""
        return self.all_reduce(terms if terms.dim() == 2 else sum_terms(terms))

    def add_rms_norm(
        self, x: torch.Tensor, terms: torch.Tensor | None, weight: torch.Tensor, eps: float, half: int, **options
    ) -> tuple[torch.Tensor, torch.Tensor | Quantised]:
        """
        fused.add_rms_norm of x, which all ranks have, and of terms [M, D] or [M, P, D], each rank's part of the sum.
        `half`: 0 and 1 in turn.
        """
        ranks = None
        if terms is not None and self.world_size > 1:
            ranks = self.symmetric.ranks(x, half) if self.symmetric is not None and on_gpu(x) else None
            terms = terms if ranks else self.sum_terms(terms)
        return add_rms_norm(x, terms, weight, eps, **options, ranks=ranks)

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
    """ "auto" is CUDA where there is one. Raises InputError for CUDA where there is none, and for other names."""
    if device not in ("auto", "cuda", "cpu"):
        raise InputError(f"--device {device}: wanted auto, cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA GPU is visible here; --device cpu works everywhere")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def share_memory(control: dist.ProcessGroup, device: torch.device) -> tuple[SymmetricMemory | None, str]:
    """Symmetric memory if the ranks can have it, else None, and a line on what sums go through. All ranks agree."""
    world_size = dist.get_world_size()
    if world_size not in SymmetricMemory.WORLD_SIZES:
        return None, f"sums through NCCL: shared memory is for {SymmetricMemory.WORLD_SIZES} ranks"
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != world_size:
        return None, "sums through NCCL: the ranks are on different hosts"
    pairs = ((i, j) for i in range(world_size) for j in range(world_size) if i != j)
    if not all(torch.cuda.can_device_access_peer(i, j) for i, j in pairs):
        return None, "sums through NCCL: not every GPU can access every other's memory"
    try:
        memory, why = SymmetricMemory(dist.group.WORLD, device), ""
    except RuntimeError as error:  # some containers forbid what sharing memory takes
        memory, why = None, str(error).splitlines()[0]
    reasons: list[str] = [""] * world_size
    dist.all_gather_object(reasons, why, group=control)
    if any(reasons):
        return None, f"sums through NCCL: {next(filter(None, reasons))}"
    return memory, f"sums of up to {TWO_SHOT_BYTES >> 20} MB through shared GPU memory"


@functools.lru_cache
def joined(device: torch.device) -> Parallel:
    """This process among torchrun's, once and for all."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # multicast needs rights that containers lack
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    control = dist.new_group(backend="gloo", timeout=IDLE_TIMEOUT)
    # Else gloo's threads now and then abort the process as it ends. Not so NCCL's group: its end waits for the other
    # ranks and for every CUDA graph with a collective, so after an error on one rank none would come; see leave_ranks.
    atexit.register(dist.destroy_process_group, control if device.type == "cuda" else None)
    parallel = Parallel(dist.get_rank(), dist.get_world_size(), control=control)
    if device.type == "cuda":
        symmetric, sums = share_memory(control, device)
        parallel = replace(parallel, symmetric=symmetric, sums=sums)
    return parallel


def join_ranks(device: str, expert_parallel: bool = False) -> tuple[Parallel, torch.device]:
    """
    The Parallel and the device of this process, from torchrun's environment. Without it a single process, on the GPU
    that is current.
    """
    torch_device = torch.device(device)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for name in () if alone else ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name, "")
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise InputError(f"WORLD_SIZE is set, but {name} is {os.environ.get(name)!r}: torchrun sets them all")
        limit = {"RANK": int(os.environ["WORLD_SIZE"]), "MASTER_PORT": 2**16}.get(name)
        if limit and int(value) >= limit:
            raise InputError(f"{name} is {value}, wanted less than {limit}: torchrun sets it")
    if device == "cuda":
        if (local := os.environ.get("LOCAL_RANK")) is not None:
            n = torch.cuda.device_count()
            if not local.isdecimal() or int(local) >= n:
                raise InputError(
                    f"LOCAL_RANK is {local!r}, of {n} GPUs here; torchrun sets it, --nproc-per-node {n} at most"
                )
            torch.cuda.set_device(int(local))
        torch_device = torch.device("cuda", torch.cuda.current_device())
    return replace(Parallel() if alone else joined(torch_device), expert_parallel=expert_parallel), torch_device


def leave_ranks() -> None:
    """At a program's good end, on every rank and with no model left that used the ranks: NCCL warns otherwise."""
    if dist.is_initialized():
        gc.collect()
        atexit.unregister(dist.destroy_process_group)
        dist.destroy_process_group()
        joined.cache_clear()
