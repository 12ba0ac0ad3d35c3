"""CUDA graphs: a whole decoding step launched by one call, where its kernels one by one would keep the host busy."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """
    Runs functions without arguments, and replays what they did.

    Under each key, the first call runs the function, which also compiles its kernels, and then records it; later calls
    launch the recording. It reads and writes the memory it was recorded with, so the function's inputs must be tensors
    that stay where they are, and each launch overwrites the outputs of the last.

    All recordings share one pool of memory, as only one runs at a time. A large batch recorded first leaves room that
    smaller ones fit into; a job starts with its rows full, so that is the usual order. Under torchrun every rank makes
    the same calls, hence the same recordings.
    """

    def __init__(self) -> None:
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """What `function` returns: its own tensors on the first call under `key`, then always the recording's."""
        if key in self.recorded:
            graph, outputs = self.recorded[key]
            graph.replay()
            return outputs
        outputs = function()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call CUDA meanwhile.
        options = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **options):
            static = function()
        self.recorded[key] = graph, static
        return outputs


def padded(n_rows: int, max_batch_size: int) -> int:
    """The batch size that n_rows run at: as they are up to 8, then multiples of 8, so that few graphs are recorded."""
    return n_rows if n_rows <= 8 else min(-(-n_rows // 8) * 8, max_batch_size)
