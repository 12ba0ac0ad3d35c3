"""
Cast an FP8 Hugging Face checkpoint to BF16, for GPUs without FP8 units and for fine-tuning:

    python inference/fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR [--device auto|cuda|cpu]

Every FP8 weight becomes weight * scale in BF16 and its scale is dropped; all other tensors keep type and value. Files
keep their names and their tensors. Memory holds one tensor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from config import read_json
from errors import InputError, run_command
from kernel import E4M3, weight_dequant
from output import copy_other_files, new_folder, write_file
from parallel import choose_device
from safetensors_io import SafetensorsWriter, StoredTensor


def cast(source: Path, target: Path, device: torch.device) -> None:
    """
    Write `target`, a BF16 Hugging Face checkpoint, from the FP8 one in `source`, computing on `device`.

    Raises InputError, before anything is written, when the source is not in FP8 or does not fit its config.
    """
    began = time.perf_counter()
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise InputError(f"{source}: already converted, for {checkpoint.mp} ranks; cast the Hugging Face folder")
    if checkpoint.args.dtype != "fp8":
        raise InputError(f"{source}: not an FP8 checkpoint: its config.json has no quantization_config")
    checkpoint.check()

    files: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in sorted(checkpoint.tensors.items(), key=lambda item: item[1].position):
        if not name.endswith("_scale_inv"):
            files.setdefault(tensor.file.path.name, {})[name] = tensor
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    written = 0
    weight_map = {}
    with new_folder(target, source) as folder:
        with tqdm(total=total, unit="B", unit_scale=True, desc="casting", leave=False) as bar:
            for file_name, tensors in files.items():
                types = {name: torch.bfloat16 if t.dtype == E4M3 else t.dtype for name, t in tensors.items()}
                layout = {name: (types[name], tensor.shape) for name, tensor in tensors.items()}
                with SafetensorsWriter(folder / file_name, layout, {}) as writer:
                    for name, tensor in tensors.items():
                        value = checkpoint.read(name)
                        if tensor.dtype == E4M3:
                            scale = checkpoint.read(name + "_scale_inv")
                            value = weight_dequant(value.to(device), scale.to(device))
                        writer.write(name, value)
                        written += value.nbytes
                        weight_map[name] = file_name
                        bar.update(tensor.nbytes)
        if (source / INDEX_FILE).exists():
            index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / INDEX_FILE, index)
        copy_other_files(source, folder)
        write_json(folder / CONFIG_FILE, bf16_config(read_json(source / CONFIG_FILE)))
    seconds = time.perf_counter() - began
    print(
        f"{target}: {len(weight_map)} tensors, {total / 1e9:.3f} GB read and {written / 1e9:.3f} GB written in "
        f"{seconds:.1f} s, {written / 1e9 / seconds:.2f} GB/s"
    )


def bf16_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the BF16 copy: no quantization_config, and no auto_map, as the code it names is not copied."""
    dropped = ("quantization_config", "auto_map")
    kept = {key: value for key, value in config.items() if key not in dropped}
    return {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in kept.items()}


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_file(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Cast an FP8 Hugging Face checkpoint to BF16.")
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, help="folder as downloaded")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, help="folder to write: new or empty")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    args = parser.parse_args()
    cast(args.input_fp8_hf_path, args.output_bf16_hf_path, torch.device(choose_device(args.device)))


if __name__ == "__main__":
    run_command(main)
