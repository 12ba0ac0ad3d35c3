"""
Convert a Hugging Face checkpoint into one file per rank, so that each rank reads its own and nothing else:

    python inference/convert.py --hf-ckpt-path DIR --save-path DIR --model-parallel N [--expert-parallel]

The input is read once, tensor by tensor: every rank's slice is written at its place in that rank's file, and memory
holds one tensor. Types and values are unchanged.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from checkpoint import CONFIG_FILE, Checkpoint, check_split, shard, shard_shape, skippable, tensor_specs
from errors import InputError, run_command
from output import copy_file, copy_other_files, new_folder
from safetensors_io import SafetensorsWriter


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


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint into one file per rank.")
    parser.add_argument("--hf-ckpt-path", type=Path, required=True, help="folder as downloaded from Hugging Face")
    parser.add_argument("--save-path", type=Path, required=True, help="folder to write: new or empty")
    parser.add_argument("--model-parallel", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--n-experts", type=positive, metavar="N", help="checked against the config when given")
    parser.add_argument("--expert-parallel", action="store_true", help="whole experts per rank, not slices of each")
    args = parser.parse_args()
    convert(args.hf_ckpt_path, args.save_path, args.model_parallel, args.expert_parallel, args.n_experts)


if __name__ == "__main__":
    run_command(main)
