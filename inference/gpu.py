"""What a GPU is and has, as far as launching kernels depends on it."""

from __future__ import annotations

import functools
from typing import Any

import torch


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache
def counters(device: torch.device) -> torch.Tensor:
    """
    [65536] int32, all zero between kernels: where programs that share a result count themselves in, so that the last
    to arrive finishes it. That one leaves its counter at zero again.
    """
    return torch.zeros(65536, dtype=torch.int32, device=device)


# A place where one program leaves a number for another holds EMPTY, all bits set, before and, once it is read, after.
# No number that was rounded is EMPTY, as a NaN so made has other bits: its coming is all that a reader waits for.
EMPTY = -1


@functools.lru_cache
def places(device: torch.device) -> torch.Tensor:
    """[65536] int32, all EMPTY between kernels: where programs leave numbers for each other (fused.py)."""
    return torch.full((65536,), EMPTY, dtype=torch.int32, device=device)


@functools.lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability: (8, 0) for an A100, (9, 0) for an H100 or H200. (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_e4m3(device: torch.device) -> bool:
    """Whether Triton can read and write e4m3 here: GPUs from 8.9 on. PyTorch itself can anywhere."""
    return device.type != "cuda" or capability(device) >= (8, 9)


def on_hopper(device: torch.device) -> bool:
    """
    Whether this GPU has what Hopper brought: the copy engine, programmatic dependent launch, 227 KiB of shared memory.
    Blackwell's consumer cards, from 12.0 on, have 99 KiB like Ada's.
    """
    return (9, 0) <= capability(device) < (12, 0)


def pdl_options(device: torch.device) -> dict[str, Any]:
    """
    Programmatic dependent launch: a kernel may start while the one before it drains, and waits (gdc_wait) before it
    reads what that one wrote. Before that it may load what is older: weights, and where a step's tokens stand. Not
    under a profiler, to which their times would seem to overlap.

    Products let the next kernel start (gdc_launch_dependents) at once. The small kernels do so only after their own
    wait, but for latents_kernel without a query latent, and for routing where experts are wide: where each lets in the
    next at once, programs of several coming kernels fill the multiprocessors unevenly.

    What a kernel waited for before it let in the next is there for that one without a wait. The gate lets in routing
    once the experts' input is complete; so shared experts, which need nothing else, begin while tokens are routed.
    """
    if on_hopper(device) and not torch.autograd._profiler_enabled():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
