"""loading.py: every byte at its place however it is cut, little host memory, and an end after an error."""

from __future__ import annotations

import contextlib
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import loading
from checkpoints import same_bits
from errors import InputError
from loading import Piece, Staging, batches, load, pieces_of
from safetensors_io import SafetensorsFile

CUTS = {
    "matrix": (slice(0, 300), slice(0, 40)),
    "rows": (slice(100, 225), slice(0, 40)),
    "columns": (slice(0, 300), slice(10, 20)),
    "both": (slice(7, 250), slice(39, 40)),
    "vector": (slice(3, 1000),),
    "fp8": (slice(128, 256), slice(128, 256)),
    "scale": (slice(1, 2), slice(0, 2)),
}


def noise(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randint(0, 64, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)[..., 0]


@pytest.fixture
def stored(tmp_path) -> dict[str, torch.Tensor]:
    wide = {name: noise(300, 40, dtype=torch.bfloat16) for name in ("matrix", "rows", "columns", "both")}
    return wide | {
        "vector": noise(1000, dtype=torch.float32),
        "fp8": noise(257, 384, dtype=torch.float8_e4m3fn),
        "scale": noise(3, 3, dtype=torch.float32),
    }


@pytest.fixture
def file(tmp_path, stored) -> SafetensorsFile:
    save_file(stored, tmp_path / "a.safetensors")
    return SafetensorsFile(tmp_path / "a.safetensors")


def poisoned(file: SafetensorsFile, device: str) -> tuple[dict[str, torch.Tensor], list[Piece]]:
    """A target full of NaN for each cut, and the pieces that fill them."""
    targets, pieces = {}, []
    for name in sorted(CUTS, key=lambda name: file.tensors[name].position):
        shape = [cut.stop - cut.start for cut in CUTS[name]]
        targets[name] = torch.empty(shape, dtype=file.tensors[name].dtype, device=device)
        targets[name].view(torch.uint8).fill_(0xFF)
        pieces += pieces_of(name, file.tensors[name], CUTS[name], targets[name])
    return targets, pieces


@pytest.fixture(params=[3000, 1 << 26], ids=["small staging", "large staging"])
def staging(request, monkeypatch) -> int:
    monkeypatch.setattr(loading, "STAGING_BYTES", request.param)
    return request.param


def test_pieces_fit_the_staging_memory_and_come_in_file_order(file, staging):
    _, pieces = poisoned(file, "cpu")
    found = list(batches(pieces))
    assert [piece for batch in found for piece in batch] == pieces
    assert all(sum(piece.room for piece in batch) <= staging for batch in found)
    positions = [(piece.stored.position, piece.rows.start) for piece in pieces]
    assert positions == sorted(positions)
    assert len(found) == 1 if staging > 1e6 else len(found) > 30


def test_every_target_on_the_cpu(file, stored, staging):
    targets, pieces = poisoned(file, "cpu")
    assert sum(load(pieces)) == sum(target.nbytes for target in targets.values())
    for name, target in targets.items():
        assert same_bits(target, stored[name][CUTS[name]].contiguous()), name


def test_every_target_through_staging_memory(file, stored, staging, monkeypatch):
    """As for a GPU, but for the GPU: dirty memory of just the size, and copies made when the stream is waited for."""
    pending, copy = [], torch.Tensor.copy_

    def later(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not non_blocking:
            return copy(target, source)
        pending.append((target, source))
        return target

    def synchronize() -> None:
        while pending:
            copy(*pending.pop())

    monkeypatch.setattr(torch.Tensor, "copy_", later)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    targets, pieces = poisoned(file, "cpu")
    stage = Staging.__new__(Staging)
    stage.free = queue.SimpleQueue()
    for batch in batches(pieces):
        memory = torch.full([sum(piece.room for piece in batch)], 0xEE, dtype=torch.uint8)
        stage.free.put((memory, SimpleNamespace(synchronize=synchronize)))
        assert stage.fill(batch) == sum(piece.target.nbytes for piece in batch)
        assert stage.free.get_nowait()[0] is memory, "the thread keeps its staging memory"
    for name, target in targets.items():
        assert same_bits(target, stored[name][CUTS[name]].contiguous()), name


@pytest.mark.gpu
def test_every_target_on_the_gpu(file, stored, staging):
    targets, pieces = poisoned(file, "cuda")
    assert sum(load(pieces)) == sum(target.nbytes for target in targets.values())
    for name, target in targets.items():
        assert same_bits(target.cpu(), stored[name][CUTS[name]].contiguous()), name


def test_nothing_is_begun_after_an_error(monkeypatch):
    monkeypatch.setattr(loading.os, "cpu_count", lambda: 2)
    begun, release = [], threading.Event()

    def task(i: int) -> int:
        begun.append(i)
        if i == 1:
            raise InputError("a bad disk")
        if i > 1:
            release.wait(10)
        return 1

    running = load([], [lambda i=i: task(i) for i in range(50)])
    assert next(running) == 1
    threading.Timer(0.2, release.set).start()
    with pytest.raises(InputError, match="a bad disk"):
        next(running)
    assert len(begun) <= 6


def test_a_file_that_shrinks_is_an_error(file, tmp_path):
    path = Path(tmp_path / "a.safetensors")
    _, pieces = poisoned(file, "cpu")
    with open(path, "r+b") as opened:
        opened.truncate(path.stat().st_size // 2)
    with pytest.raises(InputError, match="ends at byte"):
        list(load(pieces))


def test_scales_are_checked(tmp_path):
    save_file({"a.scale": torch.tensor([[1.0, torch.nan]])}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    pieces = pieces_of("a.scale", file.tensors["a.scale"], (slice(0, 1), slice(0, 2)), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"a.safetensors: a.scale has a scale that is negative, NaN or infinite"):
        list(load(list(pieces)))
