"""
Writing a checkpoint folder: what the converters share.

A conversion is a list of pieces, each some rows of a tensor, in the order in which the files hold them. Threads read,
compute and write a few pieces at a time, so memory follows the piece and not the tensor or the model. Behind them runs
a second row of threads: it reads what is written back from the system's cache for the checksums, syncs it, and then
notes in the folder's journal how many pieces are done. A run that is stopped, however that happens, is continued there
by the same command, and ends with the same bytes.

Files carry the suffix ".incomplete" until they are whole and synced; config.json comes last, then the journal goes. No
reader takes a folder with a journal or without config.json for a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from checkpoint import CONFIG_FILE, INDEX_FILE, JOURNAL
from config import BLOCK_SIZE
from errors import InputError, problems
from kernel import cdiv
from safetensors_io import INCOMPLETE, Layout, SafetensorsFile, SafetensorsWriter, sync_folder

PIECE_BYTES = 4 << 20  # of a tensor as stored: enough to keep the disk busy, little enough for the processor's cache
ROUND_BYTES = 256 << 20  # written between two lines of the journal, at least
AHEAD_BYTES = 1 << 30  # written before its checksum is taken, at most: as much as the system's cache surely holds
HASH_BYTES = 1 << 20
WORKERS = max(2, min(8, os.cpu_count() or 1))
SUMS_FILE = "SHA256SUMS"

# What belongs to a model beside its weights. Code is not copied: nothing here runs code that comes with a checkpoint.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*.json",
    "LICENSE*",
    "README*",
)


# --- what a conversion is ---------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Rows `first` up to `last` of the tensor `name`."""

    name: str
    first: int
    last: int


class Target(NamedTuple):
    """A place in the output: rows `first` up to `last` of the tensor `name` in `file`."""

    file: str
    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Conversion:
    """
    source: the input folder; inputs: its files. settings: all else that decides the output.
    files: layout and metadata of each file to write. pieces: the work. The rows of a tensor come in their order; where
    the tensors come in the order of their file too, its checksum can follow the writing closely.
    targets: where a piece goes. compute: the rows that go there, and what is to be reported of the piece (JSON).
    outcomes: every tensor of the input -> "converted", "copied", or why it is skipped.
    config: the new config.json. indexed: whether an index is written. verb: for the progress bar.
    """

    source: Path
    inputs: list[SafetensorsFile]
    settings: dict[str, Any]
    files: dict[str, tuple[Layout, dict[str, str]]]
    pieces: list[Piece]
    targets: Callable[[Piece], list[Target]]
    compute: Callable[[Piece], tuple[list[torch.Tensor], Any]]
    outcomes: dict[str, str]
    config: bytes
    indexed: bool
    verb: str


def cut(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The pieces of a tensor: whole blocks of 128 rows, as many as PIECE_BYTES hold and at least one."""
    block_bytes = math.prod(shape[1:]) * dtype.itemsize * BLOCK_SIZE
    rows = max(1, PIECE_BYTES // block_bytes) * BLOCK_SIZE
    for first in range(0, shape[0], rows):
        yield Piece(name, first, min(first + rows, shape[0]))


def convert_folder(conversion: Conversion, target: Path, verify: bool = False) -> list[Any]:
    """
    Write the folder, or go on with it where an interrupted run of the same conversion stopped. With `verify`, then read
    input and output again and compare them; of a folder that is finished already do only that.

    Prints what became of the input's tensors, and a summary. Returns what `compute` reported, piece by piece. Raises
    InputError, before anything is written, when the folder cannot be this conversion's or the disk is too small.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for each worker
    try:
        run = Run(conversion, Path(target))
        finished = os.path.exists(run.target / CONFIG_FILE) and not os.path.lexists(run.target / JOURNAL)
        if not (verify and finished):
            run.write()
        if verify:
            run.verify()
        return run.results
    finally:
        torch.set_num_threads(threads)


# --- running it -------------------------------------------------------------------------------------------------------


class Run:
    """
    One run of a conversion: of its pieces the first `done` are safe on the disk, those after them are `unnoted`, and
    `results` are those of both.
    """

    def __init__(self, conversion: Conversion, target: Path):
        self.conversion, self.target, self.source = conversion, target, conversion.source
        real, real_source = Path(os.path.realpath(target)), Path(os.path.realpath(self.source))
        if real_source in (real, *real.parents):
            raise InputError(f"{target}: the output would lie inside the input, {self.source}; choose another folder")
        stored = {name for file in conversion.inputs for name in file.tensors}
        assert stored == conversion.outcomes.keys(), "a tensor of the input is not accounted for"
        self.files = {name: OutputFile(target / name, *what) for name, what in conversion.files.items()}
        self.total = sum(file.size for file in self.files.values())
        self.results: list[Any] = []
        self.done = 0
        self.unnoted: set[OutputFile] = set()
        self.unnoted_bytes = 0
        self.round: Future | None = None
        self.stopped = False

    def write(self) -> None:
        began = time.perf_counter()
        self._check_folder()
        self.journal = Journal(self.target, self._identity())
        try:
            self._take_over()
            before = self._written()
            self._write_weights()
            self._write_other_files()
        except InputError as error:
            raise InputError(
                f"{error}; {self.total - self._written():,} bytes are still to be written and "
                f"{free_bytes(self.target):,} are free; the same command goes on from here, or remove {self.target}"
            ) from None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command goes on from here, or remove {self.target}") from None
        finally:
            self.journal.close()
            for file in self.files.values():
                file.close()
        self._report(time.perf_counter() - began, self.total - before)

    def _written(self) -> int:
        return sum(file.end for file in self.files.values())

    # The folder

    def _check_folder(self) -> None:
        """Raises InputError unless the folder is new, empty or an unfinished one, with room for what is to come."""
        try:
            entries = os.listdir(self.target) if os.path.lexists(self.target) else []
        except OSError as error:
            raise InputError(f"{self.target}: cannot be made an output folder: {error.strerror}") from None
        if entries and JOURNAL not in entries:
            raise InputError(f"{self.target}: the output folder is not empty; choose another")
        needed = sum(file.missing() for file in self.files.values()) + len(self.conversion.config)
        needed += sum(path.stat().st_size for path in companions(self.source))
        if needed > (free := free_bytes(self.target)):
            raise InputError(f"{self.target}: {needed:,} bytes are to be written and only {free:,} are free")
        try:
            self.target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.target}: cannot be made an output folder: {error.strerror}") from None

    def _identity(self) -> dict[str, Any]:
        """What a run has in common with the one that it goes on from."""
        stats = {file.path.name: os.stat(file.path) for file in self.conversion.inputs}
        headers = hashlib.sha256("".join(file.header_sha256 for file in self.files.values()).encode())
        return {
            "settings": self.conversion.settings,
            "input": {name: [stats[name].st_size, stats[name].st_mtime_ns] for name in sorted(stats)},
            "config": hashlib.sha256(self.conversion.config).hexdigest(),
            "output": headers.hexdigest(),
        }

    def _take_over(self) -> None:
        """Go on from what the journal says is done."""
        digests = {}
        for record in self.journal.records:
            self.done = record["pieces"]
            self.results += record["results"]
            digests |= record["sha256"]
        if len(self.results) != self.done or self.done > len(self.conversion.pieces) or digests.keys() - self.files:
            raise InputError(f"{self.journal.path}: damaged; remove {self.target} and start over")
        for name, digest in digests.items():
            self.files[name].sha256 = str(digest)
        for piece in self.conversion.pieces[: self.done]:
            for target in self.conversion.targets(piece):
                self.files[target.file].settle(target)
        for file in self.files.values():
            if file.resume():
                self.unnoted.add(file)

    # The weights

    def _write_weights(self) -> None:
        """
        This thread hands out the pieces and takes note of them in their order, `workers` read, compute and write them;
        `notary` makes sure of them, round after round, with the help of `helpers`.
        """
        bar = tqdm(total=self.total, initial=self._written(), unit="B", unit_scale=True, leave=False)
        bar.set_description(self.conversion.verb)
        workers, helpers, self.notary = (ThreadPoolExecutor(n) for n in (WORKERS, WORKERS, 1))
        self.helpers = helpers
        with bar, helpers, self.notary, workers:
            try:
                for targets, result in in_order(workers, self._work, self._tasks()):
                    self.results.append(result)
                    for target in targets:
                        file = self.files[target.file]
                        file.settle(target)
                        self.unnoted.add(file)
                        self.unnoted_bytes += file.nbytes(target)
                        bar.update(file.nbytes(target))
                    if self.unnoted_bytes >= ROUND_BYTES:
                        self._start_round(wait=self.unnoted_bytes >= AHEAD_BYTES)
                self._start_round(wait=True)
                self.round.result()
            except BaseException:
                self.stopped = True
                raise

    def _tasks(self) -> Iterator[tuple[Piece, list[Target]]]:
        for piece in self.conversion.pieces[self.done :]:
            targets = self.conversion.targets(piece)
            for target in targets:
                self.files[target.file].open()
            yield piece, targets

    def _work(self, task: tuple[Piece, list[Target]]) -> tuple[list[Target], Any]:
        piece, targets = task
        tensors, result = self.conversion.compute(piece)
        for target, rows in zip(targets, tensors, strict=True):
            assert len(rows) == target.last - target.first, target
            self.files[target.file].writer.write(target.name, rows, target.first)
        return targets, result

    def _start_round(self, wait: bool) -> None:
        """Have what is unnoted made sure of, when the last round is over."""
        if self.round is not None:
            if not (wait or self.round.done()):
                return
            self.round.result()
        new = self.results[self.done :]
        self.done = len(self.results)
        self.round = self.notary.submit(self._make_sure, {file: file.end for file in self.unnoted}, self.done, new)
        self.unnoted, self.unnoted_bytes = set(), 0

    def _make_sure(self, ends: dict[OutputFile, int], done: int, results: list[Any]) -> None:
        """Take the files' checksums up to `ends`, sync them, and only then note so many pieces as done."""
        tasks = [self.helpers.submit(file.hash_to, end, lambda: self.stopped) for file, end in ends.items()]
        tasks += [self.helpers.submit(file.writer.sync) for file in ends]
        for task in tasks:
            task.result()
        if self.stopped:
            return
        whole = {file: file.digest() for file, end in ends.items() if end == file.size}
        digests = {file.path.name: digest for file, digest in whole.items()}
        self.journal.append({"pieces": done, "sha256": digests, "results": results})
        for file, digest in whole.items():
            file.finish(digest)

    # The rest

    def _other_files(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of what goes with the weights, config.json last."""
        for path in companions(self.source):
            yield path.name, read_file(path)
        if self.conversion.indexed:
            weight_map = {name: file for file, (layout, _) in self.conversion.files.items() for name in layout.tensors}
            size = sum(layout.nbytes for layout, _ in self.conversion.files.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            yield INDEX_FILE, to_json(index)
        yield CONFIG_FILE, self.conversion.config

    def _write_other_files(self) -> None:
        sums = {name: file.sha256 for name, file in self.files.items()}
        for name, data in self._other_files():
            sums[name] = hashlib.sha256(data).hexdigest()
            if name == CONFIG_FILE:
                lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
                write_file(self.target / SUMS_FILE, "".join(lines).encode())
            write_file(self.target / name, data)
        sync_folder(self.target)
        self.journal.remove()

    # Saying what was done

    def _report(self, seconds: float, nbytes: int) -> None:
        outcomes = self.conversion.outcomes
        done = "converted", "copied"
        skipped = {name: why for name, why in outcomes.items() if why not in done}
        for name, why in skipped.items():
            print(f"skipped {name}: {why}")
        counts = [f"{list(outcomes.values()).count(word)} {word}" for word in done] + [f"{len(skipped)} skipped"]
        print(f"{self.source}: of {len(outcomes)} tensors {', '.join(counts)}")
        self._summarise("written", seconds, nbytes)

    def _summarise(self, verb: str, seconds: float, nbytes: int) -> None:
        tensors = sum(len(layout.tensors) for layout, _ in self.conversion.files.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        what = f"{tensors} tensors in {len(self.files)} files, {nbytes / 1e9:.3f} GB {verb}"
        print(
            f"{self.target}: {what} in {seconds:.1f} s, "
            f"{nbytes / 1e9 / seconds:.2f} GB/s, peak memory {peak / 1e6:.0f} MB"
        )

    # Comparing

    def verify(self) -> None:
        """Raises InputError when a tensor's type, shape or values or another file are not what the input makes them."""
        began = time.perf_counter()
        for path in [file.path for file in self.conversion.inputs] + [file.path for file in self.files.values()]:
            drop_cache(path)
        written = {name: SafetensorsFile(self.target / name) for name in self.files}
        found = []
        for name, (layout, metadata) in self.conversion.files.items():
            tensors = {key: (tensor.dtype, tensor.shape) for key, tensor in written[name].tensors.items()}
            if tensors != layout.tensors or written[name].metadata != {"format": "pt"} | metadata:
                found.append(f"{name} has other tensors, types, shapes or metadata")
        if not found:
            found = list(dict.fromkeys(self._different_tensors(written)))
        for name, data in self._other_files():
            if read_file(self.target / name) != data:
                found.append(name)
        if found:
            raise problems(f"{self.target}: not what {self.source} becomes", found)
        self._summarise("verified", time.perf_counter() - began, self.total)

    def _different_tensors(self, written: dict[str, SafetensorsFile]) -> Iterator[str]:
        def compare(piece: Piece) -> tuple[list[tuple[Target, bool]], Any]:
            tensors, result = self.conversion.compute(piece)
            same = []
            for target, rows in zip(self.conversion.targets(piece), tensors, strict=True):
                found = written[target.file].read(target.name, (slice(target.first, target.last),))
                same.append((target, same_bits(rows, found)))
            return same, result

        self.results = []
        bar = tqdm(total=self.total, unit="B", unit_scale=True, desc="verifying", leave=False)
        with bar, ThreadPoolExecutor(WORKERS) as workers:
            for compared, result in in_order(workers, compare, self.conversion.pieces):
                self.results.append(result)
                for target, same in compared:
                    bar.update(self.files[target.file].nbytes(target))
                    if not same:
                        yield f"{target.name} in {target.file} has other values"


def in_order(pool: ThreadPoolExecutor, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
    """What `work` makes of each task, in their order; a few at a time are under way."""
    pending: deque[Future] = deque()
    for task in tasks:
        if len(pending) == 2 * WORKERS:
            yield pending.popleft().result()
        pending.append(pool.submit(work, task))
    while pending:
        yield pending.popleft().result()


class OutputFile:
    """
    A file of weights on its way: `end` is up to where it has no gap, and so far its checksum may be taken. `sha256` is
    set when it is whole and noted in the journal.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str]):
        self.path, self.layout, self.metadata = path, layout, metadata
        header = layout.header(metadata)
        self.header_sha256 = hashlib.sha256(header).hexdigest()
        self.size = len(header) + layout.nbytes
        self.data_start = self.end = len(header)
        self.sha256: str | None = None
        self.writer: SafetensorsWriter | None = None
        self._order = list(layout.tensors)
        self._whole = 0  # tensors of the order without a gap
        self._settled: dict[str, int] = {}  # bytes of later ones
        self._checksum, self._hashed = hashlib.sha256(), 0

    def nbytes(self, target: Target) -> int:
        return (target.last - target.first) * self.layout.row_bytes(target.name)

    def missing(self) -> int:
        """Bytes that the disk has still to find for it, in whole pages."""
        for path in (self.path, self.path.with_name(self.path.name + INCOMPLETE)):
            if os.path.exists(path):
                return max(0, self.size - path.stat().st_blocks * 512)
        return cdiv(self.size, 4096) * 4096

    def open(self) -> None:
        if self.writer is None:
            self.writer = SafetensorsWriter(self.path, self.layout, self.metadata, resume=True)

    def settle(self, target: Target) -> None:
        """Count rows as written: those of a tensor in their order, tensors in any."""
        settled, order = self._settled, self._order
        settled[target.name] = settled.get(target.name, 0) + self.nbytes(target)
        while self._whole < len(order) and settled.get(order[self._whole], 0) == self.layout.size(order[self._whole]):
            settled.pop(order[self._whole], None)
            self._whole += 1
        if self._whole == len(order):
            self.end = self.size
        else:
            name = order[self._whole]
            self.end = self.data_start + self.layout.offsets[name] + settled.get(name, 0)

    def resume(self) -> bool:
        """Find the file again as an earlier run left it; returns whether that began it and did not end it."""
        if not (self._whole or self._settled):
            return False
        temporary = self.path.with_name(self.path.name + INCOMPLETE)
        if self.sha256 and temporary.exists():  # stopped between the journal and the new name
            temporary.rename(self.path)
        path = self.path if self.sha256 else temporary
        if not path.exists() or path.stat().st_size != self.size:
            raise InputError(f"{path}: changed since an interrupted run began it")
        if self.sha256:
            return False
        self.open()
        return True

    def hash_to(self, end: int, stopped: Callable[[], bool]) -> None:
        """Read the file back for its checksum, up to byte `end`."""
        while self._hashed < end and not stopped():
            data = self.writer.read_back(min(HASH_BYTES, end - self._hashed), self._hashed)
            self._checksum.update(data)
            self._hashed += len(data)

    def digest(self) -> str:
        assert self._hashed == self.size, self.path
        return self._checksum.hexdigest()

    def finish(self, sha256: str) -> None:
        self.sha256 = sha256
        self.writer.finish()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Journal:
    """
    What is safe on the disk of an unfinished folder: a line of JSON that says of which conversion, then one for each
    round, `{"pieces": how many are done, "sha256": of files that are whole, "results": of the pieces since the last}`.
    `records` are those there already. Raises InputError when it is another conversion's, or in use.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.path = folder / JOURNAL
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(errno.EINVAL, "not a file")
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(self._fd).st_size
            data = os.pread(self._fd, size, 0)
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)  # a line that was cut short was not yet believed
            os.lseek(self._fd, 0, os.SEEK_END)
            sync_folder(folder)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is writing it") from None
        except OSError as error:
            raise self._failed(error) from None
        try:
            found, *self.records = [json.loads(line) for line in data.split(b"\n")[:-1]] or [None]
            wrong = next((key for key in identity if found is not None and found[key] != identity[key]), None)
            types = {"pieces": int, "sha256": dict, "results": list}
            if any({key: type(value) for key, value in record.items()} != types for record in self.records):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{self.path}: damaged; remove {folder} and start over") from None
        if wrong == "input":
            raise InputError(f"{folder}: the input has changed since an interrupted run began this; remove it")
        if wrong is not None:
            raise InputError(f"{folder}: an interrupted run with other flags or another input began this; remove it")
        if found is None:
            self.append(identity)

    def append(self, record: dict[str, Any]) -> None:
        try:
            data = json.dumps(record, separators=(",", ":")).encode() + b"\n"
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed(error) from None

    def remove(self) -> None:
        self.path.unlink()
        sync_folder(self.path.parent)

    def close(self) -> None:
        os.close(self._fd)

    def _failed(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written: {error.strerror}")


# --- files ------------------------------------------------------------------------------------------------------------


def companions(source: Path) -> list[Path]:
    """The tokenizer, generation settings, chat template, licence and the like."""
    found = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name.isprintable() and "\\" not in file.name)


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, NaN and -0.0 included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.cpu().contiguous().view(-1).view(torch.uint8) for x in (a, b)))


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def to_json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it."""
    temporary = path.with_name(path.name + INCOMPLETE)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
