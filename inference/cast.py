"""What fp8_cast_bf16.py and bf16_cast_fp8.py share: a Hugging Face folder rewritten tensor by tensor, file by file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from config import ModelArgs, read_json
from errors import InputError
from output import copy_other_files, new_folder, write_index, write_json
from safetensors_io import SafetensorsWriter

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def open_source(source: Path) -> Checkpoint:
    checkpoint = Checkpoint(source)
    if checkpoint.kind != "hf":
        raise InputError(f"{source}: already converted, for {checkpoint.mp} ranks; cast the Hugging Face folder")
    return checkpoint


def cast_folder(
    checkpoint: Checkpoint,
    target: Path,
    layouts: dict[str, Layout],
    compute: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    quantization: dict[str, Any] | None,
) -> str:
    """
    Write `target`, where each tensor of `layouts` becomes the tensors it lays out; `compute` makes them of its value.

    They go into the file of the same name as the one it came from. The new config.json has `quantization` as its
    quantization_config, or none. Returns the summary. Memory holds one tensor and what it becomes.
    """
    began = time.perf_counter()
    source, config = checkpoint.path, cast_config(read_json(checkpoint.path / CONFIG_FILE), quantization)
    ModelArgs.from_hf(config)  # what is written must be readable again
    files: dict[str, list[str]] = {}
    for name in sorted(layouts, key=lambda name: checkpoint.tensors[name].position):
        files.setdefault(checkpoint.tensors[name].file.path.name, []).append(name)
    total = sum(checkpoint.tensors[name].nbytes for name in layouts)
    written = 0
    weight_map = {}
    with new_folder(target, source) as folder:
        with tqdm(total=total, unit="B", unit_scale=True, desc="casting", leave=False) as bar:
            for file_name, names in files.items():
                layout = {new: what for name in names for new, what in layouts[name].items()}
                with SafetensorsWriter(folder / file_name, layout, {}) as writer:
                    for name in names:
                        for new, value in compute(name, checkpoint.read(name)).items():
                            writer.write(new, value)
                            written += value.nbytes
                        bar.update(checkpoint.tensors[name].nbytes)
                weight_map |= dict.fromkeys(layout, file_name)
        if (source / INDEX_FILE).exists():
            write_index(folder, weight_map, written)
        copy_other_files(source, folder)
        write_json(folder / CONFIG_FILE, config)
    seconds = time.perf_counter() - began
    return (
        f"{target}: {len(weight_map)} tensors, {total / 1e9:.3f} GB read and {written / 1e9:.3f} GB written in "
        f"{seconds:.1f} s, {written / 1e9 / seconds:.2f} GB/s"
    )


def cast_config(config: dict[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """The config.json of a cast folder: without auto_map, as the code that it names is not copied."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    kept = {key: "bfloat16" if key in ("dtype", "torch_dtype") else value for key, value in kept.items()}
    return kept if quantization is None else kept | {"quantization_config": quantization}
