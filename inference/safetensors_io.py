"""
Reading and writing safetensors files tensor by tensor, so that memory follows the largest tensor and not the model.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, data_offsets, and
`__metadata__`, a map of strings), and the tensors' bytes one after the other, without gaps. Reads and writes go through
pread/pwrite at computed offsets: unlike a memory map, that keeps the pages already used out of this process's memory,
and a file that shrinks meanwhile is an error and not a crash.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

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
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        size = os.fstat(self._fd).st_size
        (header_bytes,) = struct.unpack("<Q", self._pread(8, 0)) if size >= 8 else (size,)
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise self._garbled(f"its header does not fit into its {size} bytes; is it cut short?")
        try:
            header = json.loads(self._pread(header_bytes, 8), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._garbled(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._garbled("its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise self._garbled("__metadata__ is not a map of strings")
        self.tensors = self._tensors(header, 8 + header_bytes, size)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

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
            try:
                n = os.preadv(self._fd, [buffer[done : done + MAX_IO_BYTES]], offset + done)
            except OSError as error:
                raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
            if n == 0:
                raise InputError(f"{self.path}: ends at byte {offset + done}, before the data its header describes")
            done += n

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """
        The tensor or the part of it that `slices`, one per dimension with step 1, cut out.

        Only the wanted rows are read. Columns are cut from whole rows: a rank's part of a row is smaller than a page.
        """
        tensor = self.tensors[name]
        shape, offset = list(tensor.shape), tensor.offset
        if slices and shape:
            first, last, _ = slices[0].indices(shape[0])
            row_bytes = tensor.nbytes // max(shape[0], 1)
            offset += first * row_bytes
            shape[0] = last - first
        data = torch.empty(math.prod(shape) * tensor.dtype.itemsize, dtype=torch.uint8)
        self._read_into(memoryview(data.numpy()), offset)
        rows = data.view(tensor.dtype).view(shape)
        return rows[(slice(None), *slices[1:])].contiguous() if slices and len(shape) > 1 else rows


class SafetensorsWriter:
    """
    Writes a file whose tensors are known beforehand (name -> dtype, shape); each is then written once, in any order.

    The file carries the suffix ".incomplete" until `close`, which syncs it to disk and renames it. Used as a context
    manager: an exception removes it.
    """

    def __init__(
        self, path: str | Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ):
        self.path = Path(path)
        self._temporary = self.path.with_name(self.path.name + INCOMPLETE)
        self._tensors = tensors
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
        end = 0
        # Widest types first: every tensor then starts at a multiple of its item size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            self._offsets[name], end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [self._offsets[name], end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self._unwritten = set(tensors)
        try:
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise self._failed(error) from None
        self._pwrite(memoryview(struct.pack("<Q", len(encoded)) + encoded), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        dtype, shape = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)) and name in self._unwritten, name
        self._unwritten.remove(name)
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._pwrite(memoryview(data), self._data_start + self._offsets[name])

    def close(self) -> None:
        assert not self._unwritten, f"{self.path}: not written: {sorted(self._unwritten)[:10]}"
        try:
            os.fsync(self._fd)
            os.close(self._fd)
            self._temporary.rename(self.path)
        except OSError as error:
            raise self._failed(error) from None

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._fd, data[done : done + MAX_IO_BYTES], offset + done)
            except OSError as error:
                raise self._failed(error) from None

    def _failed(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written: {error.strerror}")

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self.close()
        else:
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**62 for v in values)
