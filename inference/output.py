"""
Writing a checkpoint folder: weights first, then the files that go with them, config.json last.

A folder without config.json is incomplete, and every reader refuses it: a conversion that was killed is never mistaken
for a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from checkpoint import CONFIG_FILE, INDEX_FILE
from errors import InputError
from safetensors_io import INCOMPLETE

# What belongs to a model beside its weights. Code is not copied: nothing here runs code that comes with a checkpoint.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template*.json",
    "LICENSE*",
    "README*",
)


@contextmanager
def new_folder(path: str | Path, source: str | Path) -> Iterator[Path]:
    """
    A new or empty folder to write into, outside `source`. If the body fails, what it wrote is removed again.

    Raises InputError when the folder cannot be made, holds something, or lies inside `source`.
    """
    path, real, real_source = Path(path), Path(os.path.realpath(path)), Path(os.path.realpath(source))
    if real_source in (real, *real.parents):
        raise InputError(f"{path}: the output would lie inside the input, {source}; choose another folder")
    try:
        made = [folder for folder in (real, *real.parents) if not folder.exists()]
        real.mkdir(parents=True, exist_ok=True)
        used = any(real.iterdir())
    except OSError as error:
        raise InputError(f"{path}: cannot be made an output folder: {error.strerror}") from None
    if used:
        hint = "" if (real / CONFIG_FILE).exists() else " (left by an interrupted run? then remove it)"
        raise InputError(f"{path}: the output folder is not empty{hint}; choose another")
    try:
        yield path
    except BaseException:
        for entry in real.iterdir():
            entry.unlink()
        with suppress(OSError):  # a parent that others use by now stays
            for folder in made:
                folder.rmdir()
        raise


def copy_other_files(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer, generation settings, chat template, licence and the like; returns the names."""
    names = {file.name for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for name in sorted(names):
        copy_file(source / name, folder)
    return sorted(names)


def copy_file(file: Path, folder: Path) -> None:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    write_file(folder / file.name, data)


def write_index(folder: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Write the index of a Hugging Face folder: tensor -> file, and the bytes of all tensors together."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_file(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it."""
    temporary = path.with_name(path.name + INCOMPLETE)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
