"""
Cast a BF16 Hugging Face checkpoint to FP8, such as one that was fine-tuned in BF16:

    python inference/bf16_cast_fp8.py --input-bf16-hf-path DIR --output-fp8-hf-path DIR [--scale-fmt ue8m0]
        [--device auto|cuda|cpu]

The weights that released FP8 checkpoints hold in FP8 become e4m3 with a scale per 128 x 128 block, which lies beside
its weight as `weight_scale_inv`; all other tensors keep type and value. `--scale-fmt ue8m0` makes the scales powers of
two, as V3.1 has them. Memory holds one tensor.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from cast import cast_folder, open_source
from checkpoint import tensor_specs
from config import BLOCK_SIZE
from errors import InputError, run_command
from kernel import E4M3, MIN_AMAX, UE8M0, weight_dequant, weight_quant
from parallel import choose_device


def cast(source: Path, target: Path, device: torch.device, scale_fmt: str | None = None) -> None:
    """
    Write `target`, an FP8 Hugging Face checkpoint, from the BF16 one in `source`, computing on `device`.

    Raises InputError when the source is not in BF16 or does not fit its config, before anything is written, or when a
    weight is NaN or infinite.
    """
    checkpoint = open_source(source)
    if (dtype := checkpoint.args.dtype) != "bf16":
        raise InputError(f"{source}: {'already in FP8' if dtype == 'fp8' else 'not a BF16 checkpoint: it is ' + dtype}")
    checkpoint.check()
    fp8_args = replace(checkpoint.args, dtype="fp8", scale_fmt=scale_fmt)
    scales = {spec.hf_name: spec.shape for spec in tensor_specs(fp8_args).values() if spec.is_scale}
    exact, most = 0, 0.0

    def compute(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal exact, most
        if name + "_scale_inv" not in scales:
            return {name: value}
        value = value.to(device)
        largest = value.abs().amax()
        if not largest.isfinite():
            raise InputError(f"{checkpoint.tensors[name].file.path}: {name} holds NaN or infinite values")
        quantised, scale = weight_quant(value, scale_fmt)
        error = weight_dequant(quantised, scale).sub_(value).abs_().amax()
        exact += int(error == 0)
        most = max(most, float(error / largest.clamp(min=MIN_AMAX)))
        return {name: quantised, name + "_scale_inv": scale}

    layouts = {}
    for name, tensor in checkpoint.tensors.items():
        layouts[name] = {name: (tensor.dtype, tensor.shape)}
        if (shape := scales.get(name + "_scale_inv")) is not None:
            layouts[name] = {name: (E4M3, tensor.shape), name + "_scale_inv": (torch.float32, shape)}
    quantization = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
    } | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    summary = cast_folder(checkpoint, target, layouts, compute, quantization)
    loss = f"; others differ by up to {most:.2%} of their matrix's largest value" if exact < len(scales) else ""
    print(f"{len(scales)} weights quantised; cast back to BF16, {exact} are what they were{loss}")
    print(summary)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cast a BF16 Hugging Face checkpoint to FP8 in 128 x 128 blocks.")
    parser.add_argument("--input-bf16-hf-path", type=Path, required=True, help="BF16 folder")
    parser.add_argument("--output-fp8-hf-path", type=Path, required=True, help="folder to write: new or empty")
    parser.add_argument("--scale-fmt", choices=(UE8M0,), help="scales rounded up to powers of two (V3.1)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    args = parser.parse_args()
    device = torch.device(choose_device(args.device))
    cast(args.input_bf16_hf_path, args.output_fp8_hf_path, device, args.scale_fmt)


if __name__ == "__main__":
    run_command(main)
