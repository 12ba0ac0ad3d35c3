"""
The folder that a converter writes: files of weights on their way, the journal of what is done, and what goes with them.

Files carry the suffix ".incomplete" until they are whole and synced; config.json comes last, and then the journal goes.
No reader takes a folder with a journal or without config.json for a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint import CONFIG_FILE, INDEX_FILE, JOURNAL
from errors import InputError
from gpu import cdiv
from safetensors_io import INCOMPLETE, Layout, SafetensorsWriter, reporting, sync_folder

HASH_BYTES = 1 << 20
SUMS_FILE = "SHA256SUMS"

# What lies beside the weights is copied, but for what is written anew and for the weights in other formats.
ANEW = (CONFIG_FILE, INDEX_FILE, SUMS_FILE)
WEIGHTS = tuple(
    f".{end}" for end in "safetensors bin pt pth ckpt pkl pickle h5 msgpack onnx gguf npz index.json".split()
)
MAX_COPIED_BYTES = 256 << 20  # of a file, which is in memory meanwhile; the largest tokenizers take a tenth of it


class Target(NamedTuple):
    """A place in the output: rows `first` up to `last` of the tensor `name` in `file`."""

    file: str
    name: str
    first: int
    last: int


class OutputFile(SafetensorsWriter):
    """
    A file of weights on its way: `end` is up to where it has no gap, and so far its checksum may be taken; it is whole
    when it has its `sha256`.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str]):
        super().__init__(path, layout, metadata)
        self.end = self.data_start
        self.sha256: str | None = None
        self._beyond: dict[int, int] = {}  # of what is written after a gap: where each part starts -> where it ends
        self._checksum, self._hashed = hashlib.sha256(), 0

    def nbytes(self, target: Target) -> int:
        return (target.last - target.first) * self.layout.row_bytes(target.name)

    def missing(self) -> int:
        """Bytes that the disk has still to find for it, in whole pages."""
        for path in (self.path, self.temporary):
            if os.path.exists(path):
                return max(0, self.size - path.stat().st_blocks * 512)
        return cdiv(self.size, 4096) * 4096

    def settle(self, target: Target) -> None:
        """Count rows as written."""
        start = self.start(target.name, target.first)
        self._beyond[start] = start + self.nbytes(target)
        while self.end in self._beyond:
            self.end = self._beyond.pop(self.end)

    def resume(self) -> bool:
        """Find the file again as an earlier run left it; returns whether that began it and did not end it."""
        if self.end == self.data_start and not self._beyond:
            return False
        if self.sha256 and self.temporary.exists():  # stopped between the journal and the new name
            self.temporary.rename(self.path)
        path = self.path if self.sha256 else self.temporary
        if not path.exists() or path.stat().st_size != self.size:
            raise InputError(f"{path}: changed since an interrupted run began it")
        if not self.sha256:
            self.open()
        return not self.sha256

    def hash_to(self, end: int, stopped: Callable[[], bool]) -> None:
        """Read the file back for its checksum, up to byte `end`."""
        while self._hashed < end and not stopped():
            with reporting(self.temporary, "cannot be read"):
                data = os.pread(self._fd, min(HASH_BYTES, end - self._hashed), self._hashed)
            if not data:
                raise InputError(f"{self.temporary}: ends at byte {self._hashed}; was it changed by another program?")
            self._checksum.update(data)
            self._hashed += len(data)
        if self._hashed == self.size:
            self.sha256 = self._checksum.hexdigest()


class Journal:
    """
    What is safe on the disk of an unfinished folder: a line of JSON that says of which conversion, then one for each
    round, `{"pieces": how many are done, "sha256": of files that are whole, "results": of the pieces since the last}`.
    `records` are those there already. Raises InputError when it is another conversion's, or in use.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path = folder / JOURNAL
        with reporting(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no waiting for a pipe
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b")
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a file")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{folder}: another process is writing it") from None
            lines = self._file.read().split(b"\n")
            self._file.seek(-len(lines.pop()), os.SEEK_END)  # a line that was cut short was not yet believed
            self._file.truncate()
            sync_folder(folder)
        damaged = InputError(f"{self.path}: damaged; remove {folder} and start over")
        try:
            found, *self.records = [json.loads(line) for line in lines] or [None]
        except (ValueError, RecursionError):
            raise damaged from None
        types = {"pieces": int, "sha256": dict, "results": list}
        if any(type(r) is not dict or {key: type(value) for key, value in r.items()} != types for r in self.records):
            raise damaged
        if found is None:
            self.append(identity)
        elif not isinstance(found, dict) or found.keys() != identity.keys():
            raise damaged
        elif found["input"] != identity["input"] and found["settings"] == identity["settings"]:
            raise InputError(f"{folder}: the input has changed since an interrupted run began this; remove it")
        elif found != identity:
            raise InputError(f"{folder}: an interrupted run with other flags or another input began this; remove it")

    def append(self, record: dict[str, Any]) -> None:
        with reporting(self.path):
            self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        with reporting(self.path):
            sync_folder(self.path.parent)
            self.path.unlink()
            sync_folder(self.path.parent)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written at first cannot be now
            self._file.close()


def companions(source: Path) -> list[Path]:
    """The tokenizer, generation settings, chat template, licence, code and whatever else is a file."""
    return sorted(file for file in source.iterdir() if file.name not in ANEW and is_copied(file))


def is_copied(file: Path) -> bool:
    named = file.name.isprintable() and "\\" not in file.name and not file.name.endswith((INCOMPLETE, *WEIGHTS))
    return named and file.is_file() and file.stat().st_size <= MAX_COPIED_BYTES


def left_out(source: Path) -> list[str]:
    """What of a folder is neither copied nor written anew nor read."""
    known = (*ANEW, JOURNAL)
    others = (file for file in source.iterdir() if file.name not in known and not is_copied(file))
    return sorted(file.name.encode("unicode_escape").decode() for file in others if file.suffix != ".safetensors")


def free_bytes(folder: Path) -> int:
    """On the disk where a folder is or will be."""
    folder = Path(os.path.realpath(folder))
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if os.path.exists(path))).free


def drop_cache(path: Path) -> None:
    """Have the system forget what it holds of a file, so that reading it reads the disk."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_file(path: Path) -> bytes:
    with reporting(path, "cannot be read"):
        return path.read_bytes()


def to_json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it."""
    temporary = path.with_name(path.name + INCOMPLETE)
    with reporting(path):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
