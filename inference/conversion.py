"""
What the converters share: a folder is rewritten in pieces, goes on after an interruption, and is compared.

A conversion is a list of pieces, each some rows of a tensor, in the order in which the files hold them. Threads read,
compute and write a few pieces at a time, so memory follows the piece and not the tensor or the model. Behind them other
threads read what is written back from the system's cache for the checksums, sync it, and then note in the folder's
journal how many pieces are done. A run that is stopped, however that happens, is continued there by the same command,
and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from checkpoint import CONFIG_FILE, INDEX_FILE, JOURNAL, Checkpoint, check_scale
from config import BLOCK_SIZE
from errors import InputError, problems
from output import (
    SUMS_FILE,
    Journal,
    OutputFile,
    Target,
    companions,
    drop_cache,
    free_bytes,
    read_file,
    to_json,
    write_file,
)
from safetensors_io import Layout, SafetensorsFile, sync_folder

PIECE_BYTES = 1 << 20  # of a tensor as stored: larger ones leave the processor's cache between reading and writing
ROUND_BYTES = 256 << 20  # written between two lines of the journal, at least
AHEAD_BYTES = 1 << 30  # written before its checksum is taken, at most: as much as the system's cache surely holds
WORKERS = max(3, min(8, os.cpu_count() or 1))


class Piece(NamedTuple):
    """Rows `first` up to `last` of the tensor `name`."""

    name: str
    first: int
    last: int


class Reader(threading.local):
    """
    Reads pieces, each thread into memory of its own that it uses again: to be given new memory for every piece takes as
    long as to read it.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, piece: Piece) -> torch.Tensor:
        """A piece as stored, until the next one is read in the same thread. Raises InputError as Checkpoint.read."""
        name, rows = piece.name, slice(piece.first, piece.last)
        stored = self.checkpoint.tensors[name]
        if (nbytes := stored.rows(rows)[2]) > len(self.buffer):
            self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        values = stored.file.read_into(name, rows, self.buffer)
        if name.endswith("_scale_inv"):
            check_scale(stored.file.path, name, values)
        return values


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


class Run:
    """
    One run of a conversion. `results` are those of the pieces that are written; of these the first `done` are in the
    journal or about to be, the rest is `unnoted`.
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
        with Journal(self.target, self._identity()) as self.journal, contextlib.ExitStack() as stack:
            for file in self.files.values():
                stack.callback(file.close)
            self._take_over()
            before = self._written()
            try:
                self._write_weights()
                self._write_other_files()
            except InputError as error:
                left, free = self.total - self._written(), free_bytes(self.target)
                raise InputError(
                    f"{error}; {left:,} bytes are still to be written and {free:,} are free; the same command goes on "
                    f"from here, or remove {self.target}"
                ) from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"the same command goes on from here, or remove {self.target}") from None
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
        layout = hashlib.sha256()
        for file in self.files.values():
            layout.update(f"{file.path.name} {file.header_sha256}\n".encode())
        for piece in self.conversion.pieces:
            layout.update(f"{piece.name} {piece.first} {piece.last}\n".encode())
        return {
            "settings": self.conversion.settings,
            "input": {name: [stats[name].st_size, stats[name].st_mtime_ns] for name in sorted(stats)},
            "config": hashlib.sha256(self.conversion.config).hexdigest(),
            "layout": layout.hexdigest(),
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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, NaN and -0.0 included."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(*(x.cpu().contiguous().view(-1).view(torch.uint8) for x in (a, b)))
