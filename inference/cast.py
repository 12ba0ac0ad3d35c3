"""What fp8_cast_bf16.py and bf16_cast_fp8.py share: a Hugging Face folder rewritten file by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from config import BLOCK_SIZE, ModelArgs, read_json
from conversion import Conversion, Piece, convert_folder, cut
from errors import InputError
from kernel import cdiv, weight_dequant
from output import Target, to_json
from safetensors_io import Layout, Tensors

SCALE = "_scale_inv"  # what the name of a weight's scale ends in


def open_source(source: Path) -> Checkpoint:
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise InputError(f"{source}: already converted, for {checkpoint.mp} ranks; cast the Hugging Face folder")
    return checkpoint


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
    config = cast_config(read_json(checkpoint.path / CONFIG_FILE), quantization)
    ModelArgs.from_hf(config)  # what is written must be readable again
    file_of = {name: tensor.file.path.name for name, tensor in checkpoint.tensors.items()}
    files: dict[str, list[str]] = {}
    # In the order of the file to write, the widest types first; among these in that of the file to read.
    for name in sorted(layouts, key=lambda n: (-layouts[n][n][0].itemsize, checkpoint.tensors[n].position)):
        files.setdefault(file_of[name], []).append(name)
    pieces = []
    for _, names in sorted(files.items()):
        for name in names:
            tensor = checkpoint.tensors[name]
            pieces += cut(name, tensor.dtype, tensor.shape)

    def targets(piece: Piece) -> list[Target]:
        places = {piece.name: (piece.first, piece.last)}
        places[piece.name + SCALE] = piece.first // BLOCK_SIZE, cdiv(piece.last, BLOCK_SIZE)
        return [Target(file_of[piece.name], name, *places[name]) for name in layouts[piece.name]]

    outcomes = {}
    for name, tensor in checkpoint.tensors.items():
        kept = name in layouts and layouts[name] == {name: (tensor.dtype, tensor.shape)}
        outcomes[name] = "copied" if kept else "converted"  # a scale that is not kept becomes part of its weight
    conversion = Conversion(
        source=checkpoint.path,
        inputs=list({tensor.file.path: tensor.file for tensor in checkpoint.tensors.values()}.values()),
        settings=settings,
        files={
            file: (Layout({new: what for name in names for new, what in layouts[name].items()}), {})
            for file, names in sorted(files.items())
        },
        pieces=pieces,
        targets=targets,
        compute=compute,
        outcomes=outcomes,
        config=to_json(config),
        indexed=(checkpoint.path / INDEX_FILE).exists(),
        verb="casting",
    )
    return list(zip(pieces, convert_folder(conversion, target, verify), strict=True))


def cast_config(config: dict[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The config.json of a cast folder: without auto_map, as the code that it names is not copied."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    kept = {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in kept.items()}
    return kept if quantization is None else kept | {"quantization_config": quantization}


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
