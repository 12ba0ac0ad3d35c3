"""
Cast an FP8 Hugging Face checkpoint to BF16, for GPUs without FP8 units and for fine-tuning:

    python inference/fp8_cast_bf16.py --input-fp8-hf-path DIR --output-bf16-hf-path DIR [--device auto|cuda|cpu]
        [--verify]

Every FP8 weight becomes weight * scale in BF16 and its scale is dropped; all other tensors keep type and value. Files
keep their names and their tensors. Run again after an interruption, it goes on where it stopped (see conversion.py).
"""

# ruff: noqa: E402  (flags are answered before the imports that take seconds)
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from errors import Arguments, InputError, answer_flags, run_command


def parse_arguments() -> Namespace:
    parser = Arguments(description="Cast an FP8 Hugging Face checkpoint to BF16.")
    add = parser.add_argument
    add("--input-fp8-hf-path", type=Path, required=True, help="folder as downloaded")
    add("--output-bf16-hf-path", type=Path, required=True, help="folder to write: new, empty, or to go on with")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute")
    add("--verify", action="store_true", help="then read both folders again and compare; of a finished one, only that")
    return parser.parse_args()


if __name__ == "__main__":
    answer_flags(parse_arguments)

from collections.abc import Callable
from typing import Any

import torch

from checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from config import BLOCK_SIZE, ModelArgs, read_json
from conversion import Conversion, Piece, Reader, cut, open_hf
from gpu import cdiv
from kernel import weight_dequant
from output import Target, to_json
from parallel import choose_device
from safetensors_io import Layout, Tensors

SCALE = "_scale_inv"  # what the name of a weight's scale ends in


def cast(source: Path, target: Path, device: torch.device, verify: bool = False) -> None:
    """
    Write `target`, a BF16 Hugging Face checkpoint, from the FP8 one in `source`, computing on `device`.

    Raises InputError, before anything is written, when the source is not in FP8 or does not fit its config.
    """
    checkpoint = open_hf(source, "cast")
    if checkpoint.args.dtype != "fp8":
        raise InputError(f"{source}: not an FP8 checkpoint: its config.json has no quantization_config")
    checkpoint.check()
    reader = Reader(checkpoint)

    def compute(piece: Piece) -> tuple[list[torch.Tensor], None]:
        rows = reader.read(piece)
        if piece.name + SCALE in checkpoint.tensors:
            blocks = slice(piece.first // BLOCK_SIZE, cdiv(piece.last, BLOCK_SIZE))
            scale = checkpoint.read(piece.name + SCALE, (blocks,))
            rows = dequantise(rows.to(device), scale.to(device))
        return [rows], None

    layouts = {
        name: {name: (torch.bfloat16 if name + SCALE in checkpoint.tensors else tensor.dtype, tensor.shape)}
        for name, tensor in checkpoint.tensors.items()
        if not name.endswith(SCALE)
    }
    settings = {"command": "fp8_cast_bf16", "device": device.type}
    cast_folder(checkpoint, target, layouts, compute, None, settings, verify)


def cast_folder(
    checkpoint: Checkpoint,
    target: Path,
    layouts: dict[str, Tensors],
    compute: Callable[[Piece], tuple[list[torch.Tensor], Any]],
    quantization: dict[str, Any] | None,
    settings: dict[str, Any],
    verify: bool,
) -> list[tuple[Piece, Any]]:
    """
    Write `target`, where each tensor named in `layouts` becomes the tensors laid out there: itself in another type or
    the same, and its scale, if so. `compute` makes rows of these of rows of the tensor.

    They go into the file of the same name as the one it came from. The new config.json has `quantization` as its
    quantization_config, or none. Returns the pieces with what `compute` said of each.
    """
    config = read_json(checkpoint.path / CONFIG_FILE)
    if not {"model_type", "architectures"} & config.keys():
        raise InputError(f"{checkpoint.path / CONFIG_FILE}: not Hugging Face's, which a folder to cast needs")
    config |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in config}
    for key in ("quantization_config", "auto_map"):  # auto_map: transformers has the class itself
        config.pop(key, None)
    if quantization:
        config["quantization_config"] = quantization
    ModelArgs.from_hf(config)  # what is written must be readable again

    stored = checkpoint.tensors
    files: dict[str, Tensors] = {}
    # In the order of the file to write, the widest types first; among these in that of the file to read.
    for name in sorted(layouts, key=lambda name: (-layouts[name][name][0].itemsize, stored[name].position)):
        files.setdefault(stored[name].file.path.name, {}).update(layouts[name])
    names = [name for _, tensors in sorted(files.items()) for name in tensors if name in layouts]
    pieces = [piece for name in names for piece in cut(name, stored[name].dtype, stored[name].shape)]

    def targets(piece: Piece) -> list[Target]:
        places = {piece.name: (piece.first, piece.last)}
        places[piece.name + SCALE] = piece.first // BLOCK_SIZE, cdiv(piece.last, BLOCK_SIZE)
        file = stored[piece.name].file.path.name
        return [Target(file, name, *places[name]) for name in layouts[piece.name]]

    outcomes = {}
    for name, tensor in stored.items():
        kept = layouts.get(name) == {name: (tensor.dtype, tensor.shape)}
        outcomes[name] = "copied" if kept else "converted"  # a scale that is not kept becomes part of its weight
    conversion = Conversion(
        checkpoint,
        target,
        settings,
        verb="casting",
        files={name: (Layout(tensors), {}) for name, tensors in sorted(files.items())},
        pieces=pieces,
        targets=targets,
        compute=compute,
        outcomes=outcomes,
        config=to_json(config),
        indexed=(checkpoint.path / INDEX_FILE).exists(),
    )
    return list(zip(pieces, conversion.run(verify), strict=True))


def dequantise(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    w [N, K] e4m3, scale [ceil(N / 128), ceil(K / 128)] -> w * scale in BF16: what kernel.weight_dequant gives, bit for
    bit, and on a CPU several times as fast.

    Torch converts e4m3 number by number. An e4m3 code whose exponent is moved to where FP16 has it is that number over
    256, subnormal ones too, and FP16 is converted by vector instructions.
    """
    if w.is_cuda:
        return weight_dequant(w, scale)
    codes = w.view(torch.int8).to(torch.int16)  # s eeee mmm, s repeated to the left
    x = ((codes << 7) & ~(1 << 14)).view(torch.float16).float()  # s 0 eeee mmm 0000000
    low, high = x.aminmax()
    if max(-low, high) > 448 / 256 or scale.amax() > 2.0**100:  # NaN, which would be 480; or 256 * scale overflows
        return weight_dequant(w, scale)
    spread = (scale * 256).repeat_interleave(BLOCK_SIZE, 1)[:, : w.shape[1]]
    for rows, factors in zip(x.split(BLOCK_SIZE), spread, strict=True):
        rows *= factors
    return x.bfloat16()


def main() -> None:
    args = parse_arguments()
    device = torch.device(choose_device(args.device))
    cast(args.input_fp8_hf_path, args.output_bf16_hf_path, device, args.verify)


if __name__ == "__main__":
    run_command(main)
