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

from checkpoint import CONFIG_FILE, INDEX_FILE, JOURNAL, Checkpoint
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
    left_out,
    read_file,
    to_json,
    write_file,
)
from safetensors_io import SCALES, Layout, SafetensorsFile, SystemRefusal, reporting

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
        return stored.file.read_into(name, rows, self.buffer)


def open_hf(source: Path, verb: str) -> Checkpoint:
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise InputError(f"{source}: already converted, for {checkpoint.mp} ranks; {verb} the Hugging Face folder")
    return checkpoint


def cut(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[Piece]:
    """The pieces of a tensor: whole blocks of 128 rows, as many as PIECE_BYTES hold and at least one."""
    if not shape or not math.prod(shape):
        raise InputError(f"{name} has shape {list(shape)}: it has no rows that could be converted")
    block_bytes = math.prod(shape[1:]) * dtype.itemsize * BLOCK_SIZE
    rows = max(1, PIECE_BYTES // block_bytes) * BLOCK_SIZE
    for first in range(0, shape[0], rows):
        yield Piece(name, first, min(first + rows, shape[0]))


@dataclass
class Conversion:
    """
    checkpoint, target: the folders. settings: all else that decides the output. verb: for the progress bar.
    files: layout and metadata of each file to write. pieces: the work. The rows of a tensor come in their order; where
    the tensors come in the order of their file too, its checksum can follow the writing closely.
    targets: where a piece goes. compute: the rows that go there, and what is to be reported of the piece (JSON).
    outcomes: every tensor of the input -> "converted", "copied", or why it is skipped.
    config: the new config.json. indexed: whether an index is written.

    `results` are those of the pieces that are written; of these the first `done` are in the journal or about to be, the
    rest is `unnoted`.
    """

    checkpoint: Checkpoint
    target: Path
    settings: dict[str, Any]
    verb: str
    files: dict[str, tuple[Layout, dict[str, str]]]
    pieces: list[Piece]
    targets: Callable[[Piece], list[Target]]
    compute: Callable[[Piece], tuple[list[torch.Tensor], Any]]
    outcomes: dict[str, str]
    config: bytes
    indexed: bool

    def __post_init__(self):
        self.target, self.source, self.inputs = Path(self.target), self.checkpoint.path, self.checkpoint.files.values()
        real, real_source = Path(os.path.realpath(self.target)), Path(os.path.realpath(self.source))
        if real_source in (real, *real.parents):
            inside = f"the output would lie inside the input, {self.source}"
            raise InputError(f"{self.target}: {inside}; choose another folder")
        stored = {name for file in self.inputs for name in file.tensors}
        assert stored == self.outcomes.keys(), "a tensor of the input is not accounted for"
        self.outputs = {name: OutputFile(self.target / name, *what) for name, what in self.files.items()}
        self.total = sum(file.size for file in self.outputs.values())
        with reporting(self.source, "cannot be read"):
            self.companions = companions(self.source)
        self.results: list[Any] = []
        self.done = 0
        self.unnoted: set[OutputFile] = set()
        self.unnoted_bytes = 0
        self.round: Future | None = None
        self.stopped = False

    def run(self, verify: bool = False) -> list[Any]:
        """
        Write the folder, or go on with it where an interrupted run of the same conversion stopped. With `verify`, then
        read input and output again and compare them; of a folder that is finished already do only that.

        Prints what became of the input's tensors, and a summary. Returns what `compute` reported, piece by piece.
        Raises InputError, before anything is written, when the folder cannot be this conversion's or the disk is too
        small.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for each worker
        try:
            self._check_scales()
            finished = os.path.exists(self.target / CONFIG_FILE) and not os.path.lexists(self.target / JOURNAL)
            if not (verify and finished):
                self._write()
            if verify:
                self._verify()
            return self.results
        finally:
            torch.set_num_threads(threads)

    def _write(self) -> None:
        began = time.perf_counter()
        self._check_folder()
        with Journal(self.target, self._identity()) as self.journal, contextlib.ExitStack() as stack:
            for file in self.outputs.values():
                stack.callback(file.close)
            self._take_over()
            before = self._written()
            try:
                self._write_weights()
                self._write_other_files()
            except SystemRefusal as error:
                left, free = self.total - self._written(), free_bytes(self.target)
                raise InputError(
                    f"{error}; {left:,} bytes are still to be written and {free:,} are free; the same command goes on "
                    f"from here, or remove {self.target}"
                ) from None
            except InputError as error:
                raise InputError(f"{error}; remove {self.target}, which is not finished") from None
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"the same command goes on from here, or remove {self.target}") from None
        done = "converted", "copied"
        skipped = {name: why for name, why in self.outcomes.items() if why not in done}
        for name, why in skipped.items():
            print(f"skipped {name}: {why}")
        if others := left_out(self.source):
            print(f"not copied: {', '.join(others)}")
        counts = [f"{list(self.outcomes.values()).count(word)} {word}" for word in done] + [f"{len(skipped)} skipped"]
        print(f"{self.source}: of {len(self.outcomes)} tensors {', '.join(counts)}")
        self._summarise("written", began, self.total - before)

    def _written(self) -> int:
        return sum(file.end for file in self.outputs.values())

    def _bar(self, verb: str, initial: int = 0) -> tqdm:
        return tqdm(total=self.total, initial=initial, unit="B", unit_scale=True, desc=verb, leave=False)

    def _summarise(self, verb: str, began: float, nbytes: int) -> None:
        seconds = time.perf_counter() - began
        tensors = sum(len(layout.tensors) for layout, _ in self.files.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        what = f"{tensors} tensors in {len(self.files)} files, {nbytes / 1e9:.3f} GB {verb}"
        rate = f"{nbytes / 1e9 / seconds:.2f} GB/s, peak memory {peak / 1e6:.0f} MB"
        print(f"{self.target}: {what} in {seconds:.1f} s, {rate}")

    # The folder

    def _check_scales(self) -> None:
        """Raises InputError for a scale that cannot be one: here, as a file half written would be of no use."""
        scales = [(file, name) for file in self.inputs for name in file.tensors if name.endswith(SCALES)]
        for file, name in tqdm(scales, desc="scales", leave=False, delay=1):
            file.read(name)  # which checks it

    def _check_folder(self) -> None:
        """Raises InputError unless the folder is new, empty or an unfinished one, with room for what is to come."""
        with reporting(self.target, "cannot be made an output folder"):
            entries = os.listdir(self.target) if os.path.lexists(self.target) else []
            if entries and JOURNAL not in entries:
                raise InputError(f"{self.target}: the output folder is not empty; choose another")
            needed = sum(file.missing() for file in self.outputs.values()) + len(self.config)
            for path in self.companions:
                needed += path.stat().st_size
                with reporting(path, "cannot be read"):
                    path.open("rb").close()
            if needed > (free := free_bytes(self.target)):
                raise InputError(f"{self.target}: {needed:,} bytes are to be written and only {free:,} are free")
            self.target.mkdir(parents=True, exist_ok=True)

    def _identity(self) -> dict[str, Any]:
        """What a run has in common with the one that it goes on from."""
        stats = {file.path.name: os.stat(file.path) for file in self.inputs}
        plan = hashlib.sha256()
        for name, (layout, metadata) in self.files.items():
            plan.update(f"{name} {layout.tensors} {metadata}\n".encode())
        for piece in self.pieces:
            plan.update(f"{piece.name} {piece.first} {piece.last}\n".encode())
        return {
            "settings": self.settings,
            "input": {name: [stats[name].st_size, stats[name].st_mtime_ns] for name in sorted(stats)},
            "config": hashlib.sha256(self.config).hexdigest(),
            "layout": plan.hexdigest(),
        }

    def _take_over(self) -> None:
        """Go on from what the journal says is done."""
        digests = {}
        for record in self.journal.records:
            self.done = record["pieces"]
            self.results += record["results"]
            digests |= record["sha256"]
        if len(self.results) != self.done or self.done > len(self.pieces) or digests.keys() - self.outputs:
            raise InputError(f"{self.journal.path}: damaged; remove {self.target} and start over")
        for name, digest in digests.items():
            self.outputs[name].sha256 = str(digest)
        for piece in self.pieces[: self.done]:
            for target in self.targets(piece):
                self.outputs[target.file].settle(target)
        self.unnoted = {file for file in self.outputs.values() if file.resume()}

    # The weights

    def _write_weights(self) -> None:
        """
        This thread hands out the pieces and takes note of them in their order, `workers` read, compute and write them;
        `notary` makes sure of them, round after round, with the help of `helpers`.
        """
        workers, self.helpers, self.notary = (ThreadPoolExecutor(n) for n in (WORKERS, WORKERS, 1))
        with self._bar(self.verb, self._written()) as bar, self.helpers, self.notary, workers:
            try:
                for targets in self._each(workers, self._tasks(), self._write_rows, bar):
                    for target in targets:
                        file = self.outputs[target.file]
                        file.settle(target)
                        self.unnoted.add(file)
                        self.unnoted_bytes += file.nbytes(target)
                    if self.unnoted_bytes >= ROUND_BYTES:
                        self._start_round(wait=self.unnoted_bytes >= AHEAD_BYTES)
                self._start_round(wait=True)
                self.round.result()
            except BaseException:
                self.stopped = True
                raise

    def _tasks(self) -> Iterator[Piece]:
        for piece in self.pieces[self.done :]:
            for target in self.targets(piece):
                self.outputs[target.file].open()
            yield piece

    def _write_rows(self, target: Target, rows: torch.Tensor) -> None:
        assert len(rows) == target.last - target.first, target
        self.outputs[target.file].write(target.name, rows, target.first)

    def _each(
        self, workers: ThreadPoolExecutor, pieces: Iterable[Piece], use: Callable[..., Any], bar: tqdm
    ) -> Iterator[dict[Target, Any]]:
        """For each piece what `use` returns of every target and the rows that go there."""

        def work(piece: Piece) -> tuple[dict[Target, Any], Any]:
            rows, result = self.compute(piece)
            return {target: use(target, r) for target, r in zip(self.targets(piece), rows, strict=True)}, result

        for used, result in in_order(workers, work, pieces):
            self.results.append(result)
            bar.update(sum(self.outputs[target.file].nbytes(target) for target in used))
            yield used

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
        tasks += [self.helpers.submit(file.sync) for file in ends]
        for task in tasks:
            task.result()
        if self.stopped:
            return
        digests = {file.path.name: file.sha256 for file in ends if file.sha256}
        self.journal.append({"pieces": done, "sha256": digests, "results": results})
        for name in digests:
            self.outputs[name].finish()

    # The rest

    def _other_files(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of what goes with the weights, config.json last."""
        for path in self.companions:
            yield path.name, read_file(path)
        if self.indexed:
            weight_map = {name: file for file, (layout, _) in self.files.items() for name in layout.tensors}
            size = sum(layout.nbytes for layout, _ in self.files.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            yield INDEX_FILE, to_json(index)
        yield CONFIG_FILE, self.config

    def _write_other_files(self) -> None:
        sums = {name: file.sha256 for name, file in self.outputs.items()}
        for name, data in self._other_files():
            sums[name] = hashlib.sha256(data).hexdigest()
            if name == CONFIG_FILE:
                lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
                write_file(self.target / SUMS_FILE, "".join(lines).encode())
            write_file(self.target / name, data)
        self.journal.remove()

    # Comparing

    def _verify(self) -> None:
        """Raises InputError when a tensor's type, shape or values or another file are not what the input makes them."""
        began = time.perf_counter()
        for file in (*self.inputs, *self.outputs.values()):
            drop_cache(file.path)
        written = {name: SafetensorsFile(self.target / name) for name in self.files}
        found = []
        for name, (layout, metadata) in self.files.items():
            tensors = {key: (tensor.dtype, tensor.shape) for key, tensor in written[name].tensors.items()}
            if tensors != layout.tensors or written[name].metadata != {"format": "pt"} | metadata:
                found.append(f"{name} has other tensors, types, shapes or metadata")
        if not found:
            found = self._different_tensors(written)
        lines = read_file(self.target / SUMS_FILE).decode(errors="replace").splitlines()
        sums, others = {line[66:]: line[:64] for line in lines}, []
        for name, data in self._other_files():
            others.append(name)
            if read_file(self.target / name) != data:
                found.append(name)
                continue
            if sums.get(name, digest := hashlib.sha256(data).hexdigest()) != digest:
                found.append(f"{SUMS_FILE} has another checksum of {name}")
        if list(sums) != sorted([*self.files, *others]):
            found.append(f"{SUMS_FILE} lists other files")
        strays = {path.name for path in self.target.glob("*.safetensors")} - self.files.keys()
        found += [f"{name} does not belong here" for name in sorted(strays)]
        if found:
            raise problems(f"{self.target}: not what {self.source} becomes", found)
        self._summarise("verified", began, self.total)

    def _different_tensors(self, written: dict[str, SafetensorsFile]) -> list[str]:
        def same(target: Target, rows: torch.Tensor) -> bool:
            return same_bits(rows, written[target.file].read(target.name, (slice(target.first, target.last),)))

        self.results, found = [], {}  # each tensor named once
        with self._bar("verifying") as bar, ThreadPoolExecutor(WORKERS) as workers:
            for compared in self._each(workers, self.pieces, same, bar):
                found |= {f"{t.name} in {t.file} has other values": None for t, equal in compared.items() if not equal}
        return list(found)


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
