"""
From files into a model's memory at the speed of the disk: several threads read, in the order of the files.

On a CPU the parameter's own memory is what is read into. For a GPU each thread has pinned staging memory and a stream:
while one waits for the file, the copies of others run. A thread fills its staging memory with a batch of pieces of
tensors, sends them off, and waits; host memory stays at READERS * STAGING_BYTES, whatever the model's size.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from gpu import cdiv
from safetensors_io import StoredTensor

READERS = 8
STAGING_BYTES = 64 << 20
ALIGNMENT = 512  # of pieces in staging memory

Slices = tuple[slice, ...]


def aligned(nbytes: int) -> int:
    return cdiv(nbytes, ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """
    Rows of a stored tensor on their way into `target`, which has its type. Whole rows are read, as a rank's part of a
    row is smaller than a page, and `columns` of them kept, None meaning all.
    """

    name: str
    stored: StoredTensor
    rows: slice
    columns: slice | None
    target: torch.Tensor

    @property
    def room(self) -> int:
        """Bytes of staging memory: for the rows as read, and behind them for the columns that are kept."""
        kept = 0 if self.columns is None else aligned(self.target.nbytes)
        return aligned(self.stored.rows(self.rows)[2]) + kept

    def read(self, buffer: torch.Tensor) -> torch.Tensor:
        """What `target` is to hold, read into `buffer` (bytes)."""
        value = self.stored.file.read_into(self.name, self.rows, buffer)
        if self.columns is None:
            return value
        behind = buffer[aligned(value.nbytes) :][: self.target.nbytes]
        return behind.view(value.dtype).view(self.target.shape).copy_(value[:, self.columns])


def pieces_of(name: str, stored: StoredTensor, slices: Slices, target: torch.Tensor) -> Iterator[Piece]:
    """The part of a tensor that `slices` cut out, in pieces that fit the staging memory, or are one row."""
    first, last, _ = slices[0].indices(stored.shape[0])
    columns = slices[1] if len(slices) > 1 and target.shape[1] != stored.shape[1] else None
    row_bytes = stored.nbytes // max(stored.shape[0], 1) * (1 if columns is None else 2)
    step = max(1, (STAGING_BYTES - 2 * ALIGNMENT) // max(row_bytes, 1))
    for row in range(first, last, step):
        end = min(row + step, last)
        yield Piece(name, stored, slice(row, end), columns, target[row - first : end - first])


def batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Runs of pieces that fit the staging memory together, or are alone."""
    batch: list[Piece] = []
    room = 0
    for piece in pieces:
        if batch and room + piece.room > STAGING_BYTES:
            yield batch
            batch, room = [], 0
        batch.append(piece)
        room += piece.room
    if batch:
        yield batch


def fill_directly(batch: list[Piece]) -> int:
    """Fill targets on the CPU; how many bytes they hold."""
    for piece in batch:
        straight = piece.columns is None and piece.target.is_contiguous()
        memory = piece.target.view(-1) if straight else torch.empty(piece.room, dtype=torch.uint8)
        value = piece.read(memory.view(torch.uint8))
        if not straight:
            piece.target.copy_(value)
    return sum(piece.target.nbytes for piece in batch)


class Staging:
    """Pinned memory and a stream for each thread."""

    def __init__(self, device: torch.device, n_threads: int, room: int):
        self.free: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Stream]] = queue.SimpleQueue()
        for _ in range(n_threads):
            memory, stream = torch.empty(room, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))  # whatever was to be written there is
            self.free.put((memory, stream))

    def fill(self, batch: list[Piece]) -> int:
        """Fill targets on the GPU; how many bytes they hold. Each copy runs while the next piece is read."""
        memory, stream = self.free.get()
        try:
            with torch.cuda.stream(stream):
                start = 0
                for piece in batch:
                    piece.target.copy_(piece.read(memory[start:]), non_blocking=True)
                    start += piece.room
        finally:
            stream.synchronize()
            self.free.put((memory, stream))
        return sum(piece.target.nbytes for piece in batch)


def load(pieces: Sequence[Piece], others: Sequence[Callable[[], int]] = ()) -> Iterator[int]:
    """
    Fill the pieces' targets, and call `others`, in several threads; yields the bytes that each batch or call filled.

    After an error, or Ctrl-C, what is being read is finished and no more begun.
    """
    batched = list(batches(pieces))
    if not batched and not others:
        return
    n_threads = min(READERS, os.cpu_count() or 1, len(batched) + len(others))
    fill = fill_directly
    if batched and batched[0][0].target.is_cuda:
        room = max(sum(piece.room for piece in batch) for batch in batched)
        fill = Staging(batched[0][0].target.device, n_threads, room).fill
    # A thread begins on GPU 0, and kernels are launched on the thread's GPU wherever their tensors are.
    here = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else (None, ())
    executor = ThreadPoolExecutor(n_threads, initializer=here[0], initargs=here[1])
    try:
        futures = [executor.submit(fill, batch) for batch in batched]
        futures += [executor.submit(other) for other in others]
        for future in futures:
            yield future.result()
    finally:
        executor.shutdown(cancel_futures=True)
