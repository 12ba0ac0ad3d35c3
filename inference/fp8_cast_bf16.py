"""
Cast an FP8 Hugging Face checkpoint to BF16, for GPUs without FP8 units and for fine-tuning:

    python inference/fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR [--device auto|cuda|cpu]

Every FP8 weight becomes weight * scale in BF16 and its scale is dropped; all other tensors keep type and value. Files
keep their names and their tensors. Memory holds one tensor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cast import cast_folder, open_source
from errors import InputError, run_command
from kernel import E4M3, weight_dequant
from parallel import choose_device


def cast(source: Path, target: Path, device: torch.device) -> None:
    """
    Write `target`, a BF16 Hugging Face checkpoint, from the FP8 one in `source`, computing on `device`.

    Raises InputError, before anything is written, when the source is not in FP8 or does not fit its config.
    """
    checkpoint = open_source(source)
    if checkpoint.args.dtype != "fp8":
        raise InputError(f"{source}: not an FP8 checkpoint: its config.json has no quantization_config")
    checkpoint.check()

    def compute(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        if value.dtype == E4M3:
            scale = checkpoint.read(name + "_scale_inv")
            value = weight_dequant(value.to(device), scale.to(device))
        return {name: value}

    layouts = {
        name: {name: (torch.bfloat16 if tensor.dtype == E4M3 else tensor.dtype, tensor.shape)}
        for name, tensor in checkpoint.tensors.items()
        if not name.endswith("_scale_inv")
    }
    print(cast_folder(checkpoint, target, layouts, compute, quantization=None))


def main() -> None:
    parser = argparse.ArgumentParser(description="Cast an FP8 Hugging Face checkpoint to BF16.")
    parser.add_argument("--input-fp8-hf-path", type=Path, required=True, help="folder as downloaded")
    parser.add_argument("--output-bf16-hf-path", type=Path, required=True, help="folder to write: new or empty")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    args = parser.parse_args()
    cast(args.input_fp8_hf_path, args.output_bf16_hf_path, torch.device(choose_device(args.device)))


if __name__ == "__main__":
    run_command(main)
