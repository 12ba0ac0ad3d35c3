"""
Cast an FP8 Hugging Face checkpoint to BF16, for GPUs without FP8 units and for fine-tuning:

    python inference/fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR [--device auto|cuda|cpu]
        [--verify]

Every FP8 weight becomes weight * scale in BF16 and its scale is dropped; all other tensors keep type and value. Files
keep their names and their tensors. Run again after an interruption, it goes on where it stopped (see conversion.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cast import SCALE, cast_folder, dequantise, open_source
from config import BLOCK_SIZE
from conversion import Piece, Reader
from errors import InputError, run_command
from kernel import E4M3, cdiv
from parallel import choose_device


def cast(source: Path, target: Path, device: torch.device, verify: bool = False) -> None:
    """
    Write `target`, a BF16 Hugging Face checkpoint, from the FP8 one in `source`, computing on `device`.

    Raises InputError, before anything is written, when the source is not in FP8 or does not fit its config.
    """
    checkpoint = open_source(source)
    if checkpoint.args.dtype != "fp8":
        raise InputError(f"{source}: not an FP8 checkpoint: its config.json has no quantization_config")
    checkpoint.check()
    reader = Reader(checkpoint)

    def compute(piece: Piece) -> tuple[list[torch.Tensor], None]:
        rows = reader.read(piece)
        if rows.dtype == E4M3:
            blocks = slice(piece.first // BLOCK_SIZE, cdiv(piece.last, BLOCK_SIZE))
            scale = checkpoint.read(piece.name + SCALE, (blocks,))
            rows = dequantise(rows.to(device), scale.to(device))
        return [rows], None

    layouts = {
        name: {name: (torch.bfloat16 if tensor.dtype == E4M3 else tensor.dtype, tensor.shape)}
        for name, tensor in checkpoint.tensors.items()
        if not name.endswith(SCALE)
    }
    settings = {"command": "fp8_cast_bf16", "device": device.type}
    cast_folder(checkpoint, target, layouts, compute, None, settings, verify)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cast an FP8 Hugging Face checkpoint to BF16.")
    add = parser.add_argument
    add("--input-fp8-hf-path", type=Path, required=True, help="folder as downloaded")
    add("--output-bf16-hf-path", type=Path, required=True, help="folder to write: new, empty, or to go on with")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--verify", action="store_true", help="then read both folders again and compare; of a finished one, only that")
    args = parser.parse_args()
    device = torch.device(choose_device(args.device))
    cast(args.input_fp8_hf_path, args.output_bf16_hf_path, device, args.verify)


if __name__ == "__main__":
    run_command(main)
