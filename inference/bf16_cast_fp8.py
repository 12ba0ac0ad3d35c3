"""
Cast a BF16 Hugging Face checkpoint to FP8, such as one that was fine-tuned in BF16:

    python inference/bf16_cast_fp8.py --input-bf16-hf-path DIR --output-fp8-hf-path DIR [--scale-fmt ue8m0]
        [--device auto|cuda|cpu] [--verify]

The weights that released FP8 checkpoints hold in FP8 become e4m3 with a scale per 128 x 128 block, which lies beside
its weight as `weight_scale_inv`; all other tensors keep type and value. `--scale-fmt ue8m0` makes the scales powers of
two, as V3.1 has them. Run again after an interruption, it goes on where it stopped (see conversion.py).
"""

# ruff: noqa: E402  (flags are answered before the imports that take seconds)
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from config import BLOCK_SIZE, UE8M0
from errors import Arguments, InputError, answer_flags, run_command


def parse_arguments() -> Namespace:
    parser = Arguments(description="Cast a BF16 Hugging Face checkpoint to FP8 in 128 x 128 blocks.")
    add = parser.add_argument
    add("--input-bf16-hf-path", type=Path, required=True, help="BF16 folder")
    add("--output-fp8-hf-path", type=Path, required=True, help="folder to write: new, empty, or to go on with")
    add("--scale-fmt", choices=(UE8M0,), help="scales rounded up to powers of two (V3.1)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--verify", action="store_true", help="then read both folders again and compare; of a finished one, only that")
    return parser.parse_args()


if __name__ == "__main__":
    answer_flags(parse_arguments)

from dataclasses import replace

import torch

from checkpoint import tensor_specs
from conversion import Piece, Reader, open_hf
from fp8_cast_bf16 import SCALE, cast_folder, dequantise
from kernel import E4M3, weight_quant
from kernel_parts import MIN_AMAX
from parallel import choose_device


def cast(source: Path, target: Path, device: torch.device, scale_fmt: str | None = None, verify: bool = False) -> None:
    """
    Write `target`, an FP8 Hugging Face checkpoint, from the BF16 one in `source`, computing on `device`.

    Raises InputError when the source is not in BF16 or does not fit its config, before anything is written, or when a
    weight is NaN or infinite.
    """
    checkpoint = open_hf(source, "cast")
    if (dtype := checkpoint.args.dtype) != "bf16":
        raise InputError(f"{source}: {'already in FP8' if dtype == 'fp8' else 'not a BF16 checkpoint: it is ' + dtype}")
    checkpoint.check()
    fp8_args = replace(checkpoint.args, dtype="fp8", scale_fmt=scale_fmt)
    scales = {spec.hf_name: spec.shape for spec in tensor_specs(fp8_args).values() if spec.is_scale}
    reader = Reader(checkpoint)

    def compute(piece: Piece) -> tuple[list[torch.Tensor], tuple[float, float] | None]:
        """The rows, or their codes and scales with the largest error and the largest value."""
        rows = reader.read(piece)
        if piece.name + SCALE not in scales:
            return [rows], None
        rows = rows.to(device)
        largest = rows.abs().amax()
        if not largest.isfinite():
            path = checkpoint.tensors[piece.name].file.path
            raise InputError(f"{path}: {piece.name} holds NaN or infinite values")
        quantised, scale = weight_quant(rows, scale_fmt)
        error = dequantise(quantised, scale).sub_(rows).abs_().amax()
        return [quantised, scale], (float(error), float(largest))

    layouts = {}
    for name, tensor in checkpoint.tensors.items():
        layouts[name] = {name: (tensor.dtype, tensor.shape)}
        if (shape := scales.get(name + SCALE)) is not None:
            layouts[name] = {name: (E4M3, tensor.shape), name + SCALE: (torch.float32, shape)}
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
    } | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    settings = {"command": "bf16_cast_fp8", "device": device.type, "scale_fmt": scale_fmt}

    found: dict[str, list[float]] = {}  # weight -> largest error, largest value
    for piece, result in cast_folder(checkpoint, target, layouts, compute, quantization, settings, verify):
        if result is not None:
            found[piece.name] = list(map(max, result, found.get(piece.name, result)))
    exact = sum(error == 0 for error, _ in found.values())
    most = max((error / max(size, MIN_AMAX) for error, size in found.values()), default=0.0)
    loss = f"; others differ by up to {most:.2%} of their matrix's largest value" if exact < len(found) else ""
    print(f"{len(found)} weights quantised; cast back to BF16, {exact} are what they were{loss}")


def main() -> None:
    args = parse_arguments()
    device = torch.device(choose_device(args.device))
    cast(args.input_bf16_hf_path, args.output_fp8_hf_path, device, args.scale_fmt, args.verify)


if __name__ == "__main__":
    run_command(main)
