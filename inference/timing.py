"""How long something takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

REPEATS = 5  # of a timing; the median counts


def time_of(run: Callable[[], Any], steps: int, on_gpu: bool) -> float:
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


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, which has run before, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog may ask about events meanwhile
        run()
    return graph.replay
