"""
Convert a Hugging Face checkpoint into one file per rank, so that each rank reads its own and nothing else:

    python inference/convert.py --hf-ckpt-path DIR --save-path DIR --model-parallel N [--expert-parallel]

The input is read once, tensor by tensor: every rank's slice is written at its place in that rank's file, and memory
holds one tensor. Types and values are unchanged, so the way back gives the same tensors, bit for bit:

    python inference/convert.py --to-hf --shards-path DIR --save-path DIR
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

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
from errors import InputError, run_command
from output import copy_file, copy_other_files, new_folder, write_index
from safetensors_io import SafetensorsWriter, StoredTensor

MAX_FILE_BYTES = 5 * 10**9  # of the Hugging Face files that --to-hf writes, where no tensor is larger


def convert(source: Path, target: Path, mp: int, expert_parallel: bool = False, n_experts: int | None = None) -> None:
    """
    Write `target` with model{rank}-mp{mp}.safetensors for every rank, config.json and the tokenizer's files.

    Raises InputError, before anything is written, when the source does not fit its config or cannot be split so.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(source)
    args = checkpoint.args
    if checkpoint.kind != "hf":
        raise InputError(f"{source}: already converted, for {checkpoint.mp} ranks; convert the Hugging Face folder")
    if n_experts is not None and n_experts != args.n_routed_experts:
        raise InputError(f"--n-experts is {n_experts} but {source} has {args.n_routed_experts}; it may be left out")
    check_split(args, mp, expert_parallel)
    checkpoint.check()

    specs = sorted(tensor_specs(args).values(), key=lambda spec: checkpoint.tensors[spec.hf_name].position)
    stored = {spec: checkpoint.tensors[spec.hf_name] for spec in specs}
    total = sum(tensor.nbytes for tensor in stored.values())
    with new_folder(target, source) as folder:
        with ExitStack() as stack:
            writers = []
            for rank in range(mp):
                shapes = {spec: shard_shape(spec, mp, rank, expert_parallel) for spec in specs}
                tensors = {
                    spec.name: (stored[spec].dtype, shape) for spec, shape in shapes.items() if shape is not None
                }
                experts = "expert" if expert_parallel else "tensor"
                metadata = {"mp": str(mp), "rank": str(rank), "experts": experts}
                path = folder / f"model{rank}-mp{mp}.safetensors"
                writers.append(stack.enter_context(SafetensorsWriter(path, tensors, metadata)))
            with tqdm(total=total, unit="B", unit_scale=True, desc="converting", leave=False) as bar:
                for spec in specs:
                    tensor = checkpoint.read(spec.hf_name)
                    for rank, writer in enumerate(writers):
                        if (slices := shard(spec, mp, rank, expert_parallel)) is not None:
                            writer.write(spec.name, tensor[slices])
                    bar.update(tensor.nbytes)
        copy_other_files(source, folder)
        copy_file(source / CONFIG_FILE, folder)

    for name, why in skippable(args).items():
        if name in checkpoint.tensors:
            print(f"skipped {name}: {why}")
    seconds = time.perf_counter() - began
    print(
        f"{target}: {len(specs)} tensors for {mp} ranks, {total / 1e9:.3f} GB in {seconds:.1f} s, "
        f"{total / 1e9 / seconds:.2f} GB/s"
    )


def to_hf(source: Path, target: Path) -> None:
    """
    Write `target`, the Hugging Face folder that `source`, convert.py's output for any number of ranks, was made from.

    The MTP layers' copies of the embedding and the head are written again. Raises InputError, before anything is
    written, when the shards are incomplete, of several conversions, or do not fit their config.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(source)
    args, expert_parallel = checkpoint.args, checkpoint.expert_parallel
    if checkpoint.kind != "shards":
        raise InputError(f"{source}: a Hugging Face folder already; --to-hf takes a folder that convert.py wrote")
    check_split(args, checkpoint.mp, expert_parallel)
    ranks = []
    for rank in range(checkpoint.mp):
        checkpoint.check(checkpoint.mp, rank, expert_parallel)
        ranks.append(checkpoint.tensors)

    by_name = {spec.hf_name: spec for spec in tensor_specs(args).values()}
    by_name |= {copy: by_name[name] for copy, name in repeated(args).items()}
    files: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    total = size = 0
    for name, spec in by_name.items():
        dtypes = {tensors[spec.name].dtype for tensors in ranks if spec.name in tensors}
        if len(dtypes) > 1:
            raise InputError(f"{source}: {spec.name} has different types in different ranks' files")
        dtype = dtypes.pop()
        nbytes = math.prod(spec.shape) * dtype.itemsize
        if size + nbytes > MAX_FILE_BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = dtype, spec.shape
        size += nbytes
        total += nbytes
    weight_map = {}
    with new_folder(target, source) as folder:
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", leave=False) as bar:
            for number, layout in enumerate(files, 1):
                file_name = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else SINGLE_FILE
                with SafetensorsWriter(folder / file_name, layout, {}) as writer:
                    for name in layout:
                        tensor = read_whole(by_name[name], ranks, expert_parallel)
                        writer.write(name, tensor)
                        bar.update(tensor.nbytes)
                weight_map |= dict.fromkeys(layout, file_name)
        if len(files) > 1:
            write_index(folder, weight_map, total)
        copy_other_files(source, folder)
        copy_file(source / CONFIG_FILE, folder)
    seconds = time.perf_counter() - began
    print(
        f"{target}: {len(weight_map)} tensors of {checkpoint.mp} ranks in {len(files)} files, {total / 1e9:.3f} GB in "
        f"{seconds:.1f} s, {total / 1e9 / seconds:.2f} GB/s"
    )


def read_whole(spec: TensorSpec, ranks: list[dict[str, StoredTensor]], expert_parallel: bool) -> torch.Tensor:
    """A tensor put together again from the slices in the ranks' files."""
    whole = None
    for rank, tensors in enumerate(ranks):
        if (slices := shard(spec, len(ranks), rank, expert_parallel)) is None:
            continue
        part = tensors[spec.name].file.read(spec.name)
        if part.shape == spec.shape:
            return part
        whole = torch.empty(spec.shape, dtype=part.dtype) if whole is None else whole
        whole[slices] = part
    assert whole is not None, spec.name
    return whole


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint into one file per rank, and back.")
    parser.add_argument("--hf-ckpt-path", type=Path, metavar="DIR", help="folder as downloaded from Hugging Face")
    parser.add_argument("--save-path", type=Path, required=True, metavar="DIR", help="folder to write: new or empty")
    parser.add_argument("--model-parallel", type=positive, metavar="N", help="number of ranks")
    parser.add_argument("--n-experts", type=positive, metavar="N", help="checked against the config when given")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts per rank, not slices of each")
    parser.add_argument("--to-hf", action="store_true", help="the way back, from --shards-path")
    parser.add_argument("--shards-path", type=Path, metavar="DIR", help="with --to-hf: folder that convert.py wrote")
    args = parser.parse_args()
    forward = args.hf_ckpt_path, args.model_parallel
    if args.to_hf:
        if args.shards_path is None or any((*forward, args.n_experts, args.expert_parallel)):
            parser.error("--to-hf takes --shards-path and --save-path, and nothing else")
        to_hf(args.shards_path, args.save_path)
    else:
        if None in forward or args.shards_path is not None:
            parser.error("--hf-ckpt-path and --model-parallel are required, or --to-hf with --shards-path")
        convert(args.hf_ckpt_path, args.save_path, args.model_parallel, args.expert_parallel, args.n_experts)


if __name__ == "__main__":
    run_command(main)
