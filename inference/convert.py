"""
Convert a Hugging Face checkpoint into one file per rank, so that each rank reads its own and nothing else:

    python inference/convert.py --hf-ckpt-path DIR --save-path DIR --model-parallel N [--expert-parallel] [--verify]

The input is read once, piece by piece: every rank's slice is written at its place in that rank's file. Types and values
are unchanged, so the way back gives the same tensors, bit for bit:

    python inference/convert.py --to-hf --shards-path DIR --save-path DIR [--verify]

Run again after an interruption, either goes on where it stopped (see conversion.py).
"""

# ruff: noqa: E402  (flags are answered before the imports that take seconds)
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from errors import Arguments, InputError, answer_flags, positive, run_command


def parse_arguments() -> Namespace:
    parser = Arguments(description="Convert a Hugging Face checkpoint into one file per rank, and back.")
    add = parser.add_argument
    add("--hf-ckpt-path", type=Path, metavar="DIR", help="folder as downloaded from Hugging Face")
    add("--save-path", type=Path, required=True, metavar="DIR", help="folder to write: new, empty, or to go on with")
    add("--model-parallel", type=positive, metavar="N", help="number of ranks")
    add("--n-experts", type=positive, metavar="N", help="checked against the config when given")
    add("--expert-parallel", action="store_true", help="whole experts per rank, not slices of each")
    add("--to-hf", action="store_true", help="the way back, from --shards-path")
    add("--shards-path", type=Path, metavar="DIR", help="with --to-hf: folder that convert.py wrote")
    add("--verify", action="store_true", help="then read both folders again and compare; of a finished one, only that")
    args = parser.parse_args()
    forward = args.hf_ckpt_path, args.model_parallel
    if args.to_hf:
        if args.shards_path is None or any((*forward, args.n_experts, args.expert_parallel)):
            parser.error("--to-hf takes --shards-path, --save-path and --verify, and nothing else")
    elif None in forward or args.shards_path is not None:
        parser.error("--hf-ckpt-path and --model-parallel are required, or --to-hf with --shards-path")
    return args


if __name__ == "__main__":
    answer_flags(parse_arguments)

import math
from collections.abc import Iterator

import torch

from checkpoint import (
    CONFIG_FILE,
    SINGLE_FILE,
    Checkpoint,
    TensorSpec,
    check_split,
    repeated,
    shard,
    shard_shape,
    skippable,
    tensor_specs,
)
from conversion import Conversion, Piece, Reader, cut, open_hf, same_bits
from output import Target, read_file
from safetensors_io import Layout, StoredTensor, Tensors

MAX_FILE_BYTES = 5 * 10**9  # of the Hugging Face files that --to-hf writes, where no tensor is larger


def convert(
    source: Path,
    target: Path,
    mp: int,
    expert_parallel: bool = False,
    n_experts: int | None = None,
    verify: bool = False,
) -> None:
    """
    Write `target` with model{rank}-mp{mp}.safetensors for every rank, config.json and the tokenizer's files.

    Raises InputError, before anything is written, when the source does not fit its config or cannot be split so.
    """
    checkpoint = open_hf(source, "convert")
    args = checkpoint.args
    if n_experts is not None and n_experts != args.n_routed_experts:
        raise InputError(f"--n-experts is {n_experts} but {source} has {args.n_routed_experts}; it may be left out")
    checkpoint.check(mp, expert_parallel=expert_parallel)

    # The order of the files to write, the widest types first; among these that of the files to read.
    stored = {spec: checkpoint.tensors[spec.hf_name] for spec in tensor_specs(args).values()}
    specs = sorted(stored, key=lambda spec: (-stored[spec].dtype.itemsize, stored[spec].position))
    by_name = {spec.hf_name: spec for spec in specs}
    names = [f"model{rank}-mp{mp}.safetensors" for rank in range(mp)]
    experts = "expert" if expert_parallel else "tensor"
    files = {}
    layout = Layout({})
    for rank, name in enumerate(names):
        shapes = {spec: shard_shape(spec, mp, rank, expert_parallel) for spec in specs}
        tensors = {spec.name: (stored[spec].dtype, shape) for spec, shape in shapes.items() if shape is not None}
        layout = layout if layout.tensors == tensors else Layout(tensors)  # most often the same for all ranks
        files[name] = layout, {"mp": str(mp), "rank": str(rank), "experts": experts}

    reader = Reader(checkpoint)

    def parts(piece: Piece) -> Iterator[tuple[Target, tuple[slice, ...]]]:
        """Where a piece goes, and what of it."""
        spec = by_name[piece.name]
        for rank, name in enumerate(names):
            for rows, here, columns in overlap(spec, piece, mp, rank, expert_parallel):
                yield Target(name, spec.name, rows.start, rows.stop), (here, *columns)

    def compute(piece: Piece) -> tuple[list[torch.Tensor], None]:
        rows = reader.read(piece)
        return [rows[part] for _, part in parts(piece)], None

    Conversion(
        checkpoint,
        target,
        settings={"command": "convert", "model_parallel": mp, "experts": experts},
        verb="converting",
        files=files,
        pieces=[piece for spec in specs for piece in cut(spec.hf_name, stored[spec].dtype, spec.shape)],
        targets=lambda piece: [target for target, _ in parts(piece)],
        compute=compute,
        outcomes={spec.hf_name: outcome(spec, mp, expert_parallel) for spec in specs} | skipped(checkpoint),
        config=read_file(checkpoint.path / CONFIG_FILE),
        indexed=False,
    ).run(verify)


def to_hf(source: Path, target: Path, verify: bool = False) -> None:
    """
    Write `target`, the Hugging Face folder that `source`, convert.py's output for any number of ranks, was made from.

    The MTP layers' copies of the embedding and the head are written again. Raises InputError, before anything is
    written, when the shards are incomplete, of several conversions, or do not fit their config.
    """
    checkpoint = Checkpoint(source)
    args, mp, expert_parallel = checkpoint.args, checkpoint.mp, checkpoint.expert_parallel
    if checkpoint.kind != "shards":
        raise InputError(f"{source}: a Hugging Face folder already; --to-hf takes a folder that convert.py wrote")
    check_split(args, mp, expert_parallel)
    ranks = []
    for rank in range(mp):
        checkpoint.check(mp, rank, expert_parallel)
        ranks.append(checkpoint.tensors)

    specs = tensor_specs(args)
    by_name = {spec.hf_name: spec for spec in specs.values()}
    by_name |= {copy: by_name[name] for copy, name in repeated(args).items()}
    groups: list[Tensors] = [{}]
    size = 0
    for name, spec in by_name.items():
        dtypes = {tensors[spec.name].dtype for tensors in ranks if spec.name in tensors}
        if len(dtypes) > 1:
            raise InputError(f"{source}: {spec.name} has different types in different ranks' files")
        dtype = dtypes.pop()
        nbytes = math.prod(spec.shape) * dtype.itemsize
        if size + nbytes > MAX_FILE_BYTES and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = dtype, spec.shape
        size += nbytes
    layouts = {
        f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else SINGLE_FILE: Layout(tensors)
        for number, tensors in enumerate(groups, 1)
    }
    file_of = {name: file for file, layout in layouts.items() for name in layout.tensors}

    def compute(piece: Piece) -> tuple[list[torch.Tensor], None]:
        return [read_whole(by_name[piece.name], piece, ranks, expert_parallel)], None

    Conversion(
        checkpoint,
        target,
        settings={"command": "convert --to-hf"},
        verb="converting",
        files={name: (layout, {}) for name, layout in layouts.items()},
        pieces=[p for layout in layouts.values() for name, what in layout.tensors.items() for p in cut(name, *what)],
        targets=lambda piece: [Target(file_of[piece.name], *piece)],
        compute=compute,
        outcomes={name: outcome(spec, mp, expert_parallel) for name, spec in specs.items()},
        config=read_file(checkpoint.path / CONFIG_FILE),
        indexed=len(layouts) > 1,
    ).run(verify)


def read_whole(
    spec: TensorSpec, piece: Piece, ranks: list[dict[str, StoredTensor]], expert_parallel: bool
) -> torch.Tensor:
    """Rows of a tensor, put together from the ranks' files. Raises InputError where copies of the same differ."""
    whole = None
    for rank, tensors in enumerate(ranks):
        for rows, here, columns in overlap(spec, piece, len(ranks), rank, expert_parallel):
            stored = tensors[spec.name]
            part = stored.file.read(spec.name, (rows,))
            if whole is None:
                whole = torch.empty(piece.last - piece.first, *spec.shape[1:], dtype=part.dtype)
            elif part.shape == whole.shape and not same_bits(whole, part):  # a tensor that every rank has
                raise InputError(f"{stored.file.path}: {spec.name} is not what it is in other ranks' files")
            whole[(here, *columns)] = part
    assert whole is not None, spec.name
    return whole


def overlap(
    spec: TensorSpec, piece: Piece, mp: int, rank: int, expert_parallel: bool
) -> Iterator[tuple[slice, slice, tuple[slice, ...]]]:
    """What of a piece a rank has, if anything: rows as the rank counts them and as the piece does, and columns."""
    if (slices := shard(spec, mp, rank, expert_parallel)) is not None:
        own, *columns = slices
        first, last = max(piece.first, own.start), min(piece.last, own.stop)
        if first < last:
            rows, here = (slice(first - start, last - start) for start in (own.start, piece.first))
            yield rows, here, tuple(columns)


def outcome(spec: TensorSpec, mp: int, expert_parallel: bool) -> str:
    whole = mp == 1 or spec.split is None or (expert_parallel and spec.expert is not None)  # wherever any of it is
    return "copied" if whole else "converted"


def skipped(checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors of the folder that the model does not need -> why. Those that are said to repeat others are compared."""
    originals, tensors = repeated(checkpoint.args), checkpoint.tensors
    reasons = {name: why for name, why in skippable(checkpoint.args).items() if name in tensors}
    for name in reasons.keys() & originals.keys():
        copy, original = tensors[name], tensors[originals[name]]
        cuts = [(slice(first, last),) for _, first, last in cut(name, original.dtype, original.shape)]
        if (copy.dtype, copy.shape) != (original.dtype, original.shape) or not all(
            same_bits(copy.file.read(name, rows), original.file.read(originals[name], rows)) for rows in cuts
        ):
            reasons[name] = f"differs from {originals[name]}, which the model uses in its place"
    return reasons


def main() -> None:
    args = parse_arguments()
    if args.to_hf:
        to_hf(args.shards_path, args.save_path, args.verify)
    else:
        flags = args.model_parallel, args.expert_parallel, args.n_experts, args.verify
        convert(args.hf_ckpt_path, args.save_path, *flags)


if __name__ == "__main__":
    run_command(main)
