"""
Reading and writing safetensors files tensor by tensor, so that memory follows the largest tensor and not the model.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets, and
`__metadata__`, a map of strings), and the tensors' bytes one after the other, without gaps. Reads and writes go through
pread/pwrite at computed offsets: unlike a memory map, that keeps the pages already used out of this process's memory,
and a file that shrinks meanwhile is an error and not a crash.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import unique
from errors import InputError

DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "F64": torch.float64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB a call
INCOMPLETE = ".incomplete"  # suffix of a file that is being written
SCALES = ("_scale_inv", ".scale")  # how the names of weights' scales end, in a Hugging Face folder and in shards

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> type and shape


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` counts from the start of the file."""

    file: SafetensorsFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, cut: slice | None) -> tuple[tuple[int, ...], int, int]:
        """Shape, first byte in the file and number of bytes of a run of whole rows; of the tensor for None."""
        if cut is None or not self.shape:
            return self.shape, self.offset, self.nbytes
        first, last, _ = cut.indices(self.shape[0])
        row_bytes = self.nbytes // max(self.shape[0], 1)
        return (last - first, *self.shape[1:]), self.offset + first * row_bytes, (last - first) * row_bytes

    @property
    def position(self) -> tuple[str, int]:
        """Key that sorts tensors as they lie on the disk, so that it reads ahead."""
        return str(self.file.path), self.offset


class SafetensorsFile:
    """
    An open file: `metadata`, and `tensors` by name. The whole header is checked before anything else is believed.

    Raises InputError when the file cannot be read, is cut short, or its header does not describe it exactly.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with reporting(self.path, "cannot be read"):
            self._fd = os.open(self.path, os.O_RDONLY)
        size = os.fstat(self._fd).st_size
        header_bytes = int.from_bytes(self._pread(8, 0), "little") if size >= 8 else size
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise self._garbled(f"its header does not fit into its {size} bytes; is it cut short?")
        try:
            header = json.loads(self._pread(header_bytes, 8), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self._garbled(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._garbled("its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise self._garbled("__metadata__ is not a map of strings")
        self.tensors = self._tensors(header, 8 + header_bytes, size)

    def close(self) -> None:
        """Its tensors refer to it: left to itself it stays open until Python collects cycles."""
        if (fd := self.__dict__.pop("_fd", None)) is not None:
            os.close(fd)

    __del__ = close

    def _tensors(self, header: dict[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
        tensors = {}
        spans = []
        for name, entry in header.items():
            if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
                raise self._garbled(f"tensor {name!r} does not have exactly a dtype, a shape and data_offsets")
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise self._garbled(f"tensor {name!r} is of type {dtype!r}; known types are {', '.join(DTYPES)}")
            if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
                raise self._garbled(f"the shape or data_offsets of tensor {name!r} are not lists of sizes")
            tensors[name] = tensor = StoredTensor(self, DTYPES[dtype], tuple(shape), start + offsets[0])
            if tensor.nbytes != offsets[1] - offsets[0]:
                raise self._garbled(f"tensor {name!r} {shape} needs {tensor.nbytes} bytes and has {offsets}")
            spans.append((*offsets, name))
        end = 0
        for first, last, name in sorted(spans):
            if first != end:
                raise self._garbled(f"tensor {name!r} starts at byte {first}, where {end} was expected")
            end = last
        if start + end != size:
            raise self._garbled(f"it should have {start + end} bytes and has {size}; is it cut short?")
        return tensors

    def _garbled(self, why: str) -> InputError:
        return InputError(f"{self.path}: not a valid safetensors file: {why[:300]}")

    def _pread(self, size: int, offset: int) -> bytearray:
        data = bytearray(size)
        self._read_into(memoryview(data), offset)
        return data

    def _read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            with reporting(self.path, "cannot be read"):
                n = os.preadv(self._fd, [buffer[done : done + MAX_IO_BYTES]], offset + done)
            if n == 0:
                raise InputError(f"{self.path}: ends at byte {offset + done}, before the data its header describes")
            done += n

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """
        The tensor or the part of it that `slices`, one per dimension with step 1, cut out.

        Only the wanted rows are read. Columns are cut from whole rows: a rank's part of a row is smaller than a page.
        """
        shape, _, nbytes = self.tensors[name].rows(slices[0] if slices else None)
        rows = self.read_into(name, slices[0] if slices else None, torch.empty(nbytes, dtype=torch.uint8))
        return rows[(slice(None), *slices[1:])].contiguous() if slices and len(shape) > 1 else rows

    def read_into(self, name: str, cut: slice | None, buffer: torch.Tensor) -> torch.Tensor:
        """
        Read a run of whole rows to the beginning of `buffer`, bytes on the CPU; that part of it, as those rows.

        Raises InputError when the file ends too early or a scale is negative, NaN or infinite.
        """
        tensor = self.tensors[name]
        shape, offset, nbytes = tensor.rows(cut)
        data = buffer[:nbytes]
        self._read_into(memoryview(data.numpy()), offset)
        rows = data.view(tensor.dtype).view(shape)
        if name.endswith(SCALES) and not bool(((rows >= 0) & rows.isfinite()).all()):
            raise InputError(f"{self.path}: {name} has a scale that is negative, NaN or infinite")
        return rows


class Layout:
    """
    Where the tensors of a file go: the widest types first, so that each tensor starts at a multiple of its item size,
    and otherwise in the order given. `offsets` count from the end of the header, `nbytes` is all of the data.
    """

    def __init__(self, tensors: Tensors):
        self.tensors = {name: tensors[name] for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize)}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for name in self.tensors:
            self.offsets[name] = self.nbytes
            self.nbytes += self.size(name)

    def size(self, name: str) -> int:
        dtype, shape = self.tensors[name]
        return math.prod(shape) * dtype.itemsize

    def row_bytes(self, name: str) -> int:
        """Bytes of a row, that is of one index of the first dimension."""
        dtype, shape = self.tensors[name]
        return math.prod(shape[1:]) * dtype.itemsize

    def header(self, metadata: dict[str, str]) -> bytes:
        """All that comes before the data."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
        for name, (dtype, shape) in self.tensors.items():
            span = [self.offsets[name], self.offsets[name] + self.size(name)]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": span}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded


class SafetensorsWriter:
    """
    Writes a file whose layout is known beforehand; rows of its tensors in any order, from any thread.

    The file carries the suffix ".incomplete" until `finish`, which syncs it to disk and renames it. Used as a context
    manager, it is a new file, finished at the end and removed after an exception; `open` also goes on with an old one.
    """

    def __init__(self, path: str | Path, layout: Layout, metadata: dict[str, str]):
        self.path, self.layout, self.metadata = Path(path), layout, metadata
        self.temporary = self.path.with_name(self.path.name + INCOMPLETE)
        self.data_start = len(layout.header(metadata))
        self.size = self.data_start + layout.nbytes
        self._unwritten = layout.nbytes  # counted for the context manager, so for a single thread
        self._fd: int | None = None

    def open(self, flags: int = 0) -> None:
        if self._fd is not None:
            return
        with reporting(self.path):
            self._fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
            os.ftruncate(self._fd, self.size)
        self._pwrite(memoryview(self.layout.header(self.metadata)), 0)

    def start(self, name: str, row: int) -> int:
        """Where in the file a row of a tensor starts."""
        return self.data_start + self.layout.offsets[name] + row * self.layout.row_bytes(name)

    def write(self, name: str, rows: torch.Tensor, first: int = 0) -> None:
        """Write a tensor, or rows of it from `first` on."""
        dtype, shape = self.layout.tensors[name]
        start, end = self.start(name, first), self.start(name, 0) + self.layout.size(name)
        fits = (rows.dtype, rows.shape[1:]) == (dtype, shape[1:]) and start + rows.nbytes <= end
        assert fits, f"{name}: {rows.shape=} from {first=} do not fit into {shape}"
        data = rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._unwritten -= len(data)
        self._pwrite(memoryview(data), start)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            with reporting(self.path):
                done += os.pwrite(self._fd, data[done : done + MAX_IO_BYTES], offset + done)

    def sync(self) -> None:
        with reporting(self.path):
            os.fsync(self._fd)

    def finish(self) -> None:
        self.sync()
        self.close()
        with reporting(self.path):
            self.temporary.rename(self.path)
            sync_folder(self.path.parent)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> SafetensorsWriter:
        self.open(os.O_EXCL)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self._unwritten, f"{self.path}: {self._unwritten} bytes were not written"
            self.finish()
        else:
            self.close()
            self.temporary.unlink(missing_ok=True)


class SystemRefusal(InputError):
    """What the system does not do: no room, no permission, a broken disk."""


@contextlib.contextmanager
def reporting(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """What the system refuses -> SystemRefusal that names the file."""
    try:
        yield
    except OSError as error:
        raise SystemRefusal(f"{path}: {what}: {error.strerror}") from None


def sync_folder(path: Path) -> None:
    """Make the names in a folder as lasting as the files: a rename is not on the disk before its folder is."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**62 for v in values)
