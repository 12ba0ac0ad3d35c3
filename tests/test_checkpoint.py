"""Names, shapes and splits of every tensor, reading damaged and complete folders, and filling a model from them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import shutil
import struct
import types
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoint import Checkpoint, check_split, load_model, shard, shard_shape, skippable, tensor_specs
from checkpoints import SMALL, dequantise, make_hf, read_weights, same_bits
from config import ModelArgs
from convert import convert
from errors import InputError
from kernel import E4M3
from model import Transformer
from parallel import Parallel
from safetensors_io import Layout, SafetensorsFile, SafetensorsWriter

V3_FOLDERS = {
    "fp8": {"dtype": "fp8", "mtp": 2, "shards": 3},
    "bf16": {"dtype": "bf16", "mtp": 1, "style": "transformers"},
    "fp32": {"dtype": "fp32", "yarn": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint folders by kind and dtype, each made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, dtype: str) -> Path:
        if (kind, dtype) not in made:
            options = V3_FOLDERS[dtype] if kind == "v3" else {"dtype": dtype, "shards": 2}
            made[kind, dtype] = make_hf(tmp_path_factory.mktemp(f"{kind}-{dtype}"), kind, **options)
        return made[kind, dtype]

    return get


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_hf(tmp_path_factory.mktemp("small"), "v3", "fp8", mtp=1, shards=2, **SMALL)


def copy_of(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


ALL = [("v3", "fp8"), ("v3", "bf16"), ("v3", "fp32"), ("v2", "bf16"), ("v2lite", "fp32"), ("v2lite", "fp8")]


# --- names and shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, dtype", ALL)
def test_specs_are_exactly_the_tensors_of_the_files(folder, kind, dtype):
    args = ModelArgs.load(folder(kind, dtype) / "config.json")
    stored = read_weights(folder(kind, dtype))
    specs = {spec.hf_name: spec for spec in tensor_specs(args).values()}
    assert len(specs) == len(tensor_specs(args))
    repeats = {name for name in stored if name.endswith(("embed_tokens.weight", "head.weight")) and ".layers." in name}
    assert specs.keys() == stored.keys() - repeats
    assert repeats <= skippable(args).keys()
    assert len(repeats) == 2 * args.n_mtp_layers
    for name, spec in specs.items():
        assert spec.shape == stored[name].shape, name
        assert stored[name].dtype in spec.stored_dtypes, name
    Checkpoint(folder(kind, dtype)).check()


def test_released_models_have_their_published_number_of_tensors():
    """91,991 names in DeepSeek-V3's index, of which two repeat embedding and head; 671B parameters and an MTP layer."""
    specs = tensor_specs(ModelArgs.load(Path(__file__).parents[1] / "configs" / "config_671B.json"))
    assert len(specs) == 91_989
    sizes = Counter()
    for spec in specs.values():
        if not spec.is_scale:
            sizes[spec.name.split(".")[0]] += math.prod(spec.shape)
    assert sizes.pop("mtp") == pytest.approx(11.6e9, rel=0.01)
    assert sum(sizes.values()) == pytest.approx(671.0e9, rel=1e-3)


def test_a_config_of_too_many_tensors_is_refused(small, tmp_path):
    config = json.loads((small / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    with pytest.raises(InputError, match="1000000001 layers of 4 experts"):
        tensor_specs(ModelArgs.from_hf(config))


# --- splitting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(
    "kind, dtype, mp", [("v3", "fp8", 2), ("v3", "bf16", 4), ("v2", "bf16", 4), ("v2lite", "fp32", 2)]
)
def test_the_ranks_parts_make_up_the_whole(folder, kind, dtype, mp, expert_parallel):
    args = ModelArgs.load(folder(kind, dtype) / "config.json")
    check_split(args, mp, expert_parallel)
    specs = tensor_specs(args)
    for spec in specs.values():
        parts = [shard(spec, mp, rank, expert_parallel) for rank in range(mp)]
        holders = [part for part in parts if part is not None]
        seen = torch.zeros(spec.shape, dtype=torch.uint8)
        for part in holders:
            seen[part] += 1
        if spec.split is None and spec.expert is None:
            assert len(holders) == mp and (seen == mp).all(), spec.name
        else:
            assert (seen == 1).all(), spec.name
        if spec.expert is not None and expert_parallel:
            per_rank = args.n_routed_experts // mp
            assert [part is not None for part in parts] == [rank == spec.expert // per_rank for rank in range(mp)]
        if spec.dtype == E4M3:  # scales cover exactly the blocks of their weight's slice
            for rank, part in enumerate(parts):
                blocks = shard(specs[spec.scale_name], mp, rank, expert_parallel)
                assert (part is None) == (blocks is None)
                for rows, scales in zip(part or (), blocks or (), strict=True):
                    assert (scales.start, scales.stop) == (rows.start / 128, math.ceil(rows.stop / 128)), spec.name


def test_splits_follow_the_layers_roles(folder):
    """Rows of what widens, columns of what narrows; whole heads."""
    args = ModelArgs.load(folder("v3", "fp32") / "config.json")
    specs = tensor_specs(args)
    shapes = {name: shard_shape(specs[f"layers.1.{name}.weight"], 4, 3, False) for name in (
        "attn.wq_a", "attn.wq_b", "attn.wkv_a", "attn.wkv_b", "attn.wo", "ffn.gate", "ffn.experts.5.w1",
        "ffn.experts.5.w2", "ffn.experts.5.w3", "ffn.shared_experts.w2",
    )}  # fmt: skip
    assert shapes == {
        "attn.wq_a": (640, 384),
        "attn.wq_b": (2 * 128, 640),
        "attn.wkv_a": (160, 384),
        "attn.wkv_b": (2 * 160, 128),
        "attn.wo": (384, 2 * 64),
        "ffn.gate": (12, 384),
        "ffn.experts.5.w1": (64, 384),
        "ffn.experts.5.w2": (384, 64),
        "ffn.experts.5.w3": (64, 384),
        "ffn.shared_experts.w2": (384, 64),
    }
    assert shard(specs["embed.weight"], 4, 1, False)[0] == slice(130, 260)


@pytest.mark.parametrize(
    "overrides, dtype, mp, expert_parallel, message",
    [
        ({"vocab_size": 522}, "bf16", 4, False, "embed.weight: 522 rows cannot be split over 4 ranks; .*work: 1, 2$"),
        (
            {},
            "bf16",
            5,
            False,
            "embed.weight: 520 rows|layers.0.attn.wq_b.weight: 1024 rows .* 5 ranks .*: 1, 2, 4, 8$",
        ),
        ({}, "bf16", 16, False, "work: 1, 2, 4, 8$"),
        ({}, "fp8", 4, False, "layers.0.attn.wkv_b.weight: 1280 rows .* in multiples of 640; .* work: 1, 2$"),
        ({"intermediate_size": 772}, "bf16", 8, False, "layers.0.ffn.w1.weight: 772 rows .* 8 ranks; .*: 1, 2, 4$"),
        ({"intermediate_size": 700}, "fp8", 2, False, "layers.0.ffn.w1.weight: 700 rows .* multiples of 128; .*: 1$"),
        ({}, "bf16", 8, True, "layers.1.ffn.experts: 12 experts cannot be split over 8 ranks; .* work: 1, 2, 4$"),
    ],
)
def test_a_split_that_does_not_divide_names_the_tensor_and_what_works(
    folder, overrides, dtype, mp, expert_parallel, message
):
    config = json.loads((folder("v3", dtype) / "config.json").read_text()) | overrides
    with pytest.raises(InputError, match=message):
        check_split(ModelArgs.from_hf(config), mp, expert_parallel)
    check_split(ModelArgs.from_hf(config), 1, expert_parallel)


# --- the file format --------------------------------------------------------------------------------------------------


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    make = {
        "e4m3": torch.randn(5, 7, generator=generator).to(E4M3),
        "bf16": torch.randn(3, 2, generator=generator).bfloat16(),
        "fp32": torch.randn(11, generator=generator),
        "long": torch.arange(3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    return {name: make[name] for name in sorted(make)}


def test_files_written_here_are_read_by_the_library_and_back(tmp_path):
    tensors = some_tensors()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(tmp_path / "a.safetensors", Layout(layout), {"rank": "3"}) as writer:
        for name in reversed(layout):  # in another order than the file's
            assert not (tmp_path / "a.safetensors").exists()
            writer.write(name, tensors[name])
    library = load_file(tmp_path / "a.safetensors")
    ours = SafetensorsFile(tmp_path / "a.safetensors")
    assert library.keys() == ours.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(library[name], tensor) and same_bits(ours.read(name), tensor)
        assert ours.tensors[name].offset % tensor.dtype.itemsize == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == ours.metadata == {"format": "pt", "rank": "3"}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_slices_are_those_of_the_library(tmp_path):
    save_file(some_tensors(), tmp_path / "a.safetensors")
    ours = SafetensorsFile(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        for rows, columns in itertools.product(
            [slice(0, 5), slice(1, 4), slice(4, 5), slice(2, 2)], [slice(0, 7), slice(3, 6)]
        ):
            assert same_bits(ours.read("e4m3", (rows, columns)), file.get_tensor("e4m3")[rows, columns])
        assert same_bits(ours.read("fp32", (slice(2, 9),)), file.get_slice("fp32")[2:9])


def test_a_failed_write_leaves_no_file(tmp_path):
    layout = Layout({"x": (torch.float32, (2,))})
    with pytest.raises(KeyboardInterrupt), SafetensorsWriter(tmp_path / "a.safetensors", layout, {}):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="not written"), SafetensorsWriter(tmp_path / "a.safetensors", layout, {}):
        pass
    assert not (tmp_path / "a.safetensors").exists()


def test_any_truncation_is_an_input_error(tmp_path):
    save_file(some_tensors(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "a.safetensors").read_bytes()
    for size in range(len(data)):
        (tmp_path / "b.safetensors").write_bytes(data[:size])
        with pytest.raises(InputError, match=r"b.safetensors: not a valid safetensors file"):
            SafetensorsFile(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(data + b"\0")
    with pytest.raises(InputError, match=r"should have .* bytes"):
        SafetensorsFile(tmp_path / "b.safetensors")


def test_garbled_headers_are_input_errors_or_harmless(tmp_path):
    """Random bytes changed in the header: what is accepted must still be readable to the last tensor."""
    save_file(some_tensors(), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    random_ = random.Random(0)
    refused = 0
    for _ in range(1000):
        garbled = bytearray(data)
        for _ in range(random_.choice([1, 1, 2, 5])):
            garbled[random_.randrange(header)] = random_.choice([random_.randrange(256), *b'0123456789{}[]",:-e'])
        (tmp_path / "b.safetensors").write_bytes(garbled)
        try:
            file = SafetensorsFile(tmp_path / "b.safetensors")
        except InputError:
            refused += 1
        else:
            for name, tensor in file.tensors.items():
                assert file.read(name).shape == tensor.shape
    assert refused > 700


@pytest.mark.parametrize(
    "header, message",
    [
        (b"[]", "not a JSON object"),
        (b"{" * 100_000, "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"__metadata__": {"a": 1}}', "not a map of strings"),
        (b'{"a": 1}', "does not have exactly"),
        (b'{"%s": 1}' % (b"n" * 5000), "tensor 'nnn"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "does not have exactly"),
        (b'{"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}', "type 'F31'"),
        (b'{"a": {"dtype": {}, "shape": [1], "data_offsets": [0, 4]}}', "type {}"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "not lists of sizes"),
        (b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "not lists of sizes"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "not lists of sizes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "not lists of sizes"),
        (b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 4]}}' % (b"9" * 5000), "not JSON|not lists"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "needs 8 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "needs 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "starts at byte 4"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "starts at byte 0",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
            b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "appears twice",
        ),
        (b"{}", "should have"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=message) as error:
        SafetensorsFile(tmp_path / "a.safetensors")
    assert len(str(error.value)) < 600


def test_a_file_cut_after_it_was_opened_is_an_input_error(small, tmp_path):
    copied = copy_of(small, tmp_path / "copy")
    checkpoint = Checkpoint(copied)
    for file in copied.glob("*.safetensors"):
        os.truncate(file, 20_000)
    with pytest.raises(InputError, match="ends at byte 20000"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


# --- folders that are not complete checkpoints ------------------------------------------------------------------------


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_tensors(folder: Path, change) -> None:
    """Apply `change` to a dict of all tensors and write them as a single file."""
    tensors = read_weights(folder)
    change(tensors)
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
FILE = "model-00002-of-000002.safetensors"


def remove_all(folder):
    for file in folder.iterdir():
        file.unlink()


def only_pickle(folder):
    for file in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def drop_mtp(folder):
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name])


BAD_FOLDERS = {
    "missing": (shutil.rmtree, "no such folder"),
    "empty": (remove_all, "the folder is empty"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json: not a checkpoint, or a conversion that was"),
    "no weights": (
        lambda f: [p.unlink() for p in f.glob("model*")],
        "no model.safetensors, model.safetensors.index.json",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "no model.safetensors, model.safetensors.ind",
    ),
    "pickle": (only_pickle, "pytorch_model.bin is a pickle; only safetensors"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "a field twice": (
        lambda f: (f / "config.json").write_text('{"vocab_size": 1, ' + (f / "config.json").read_text().lstrip("{ \n")),
        "config.json: not readable as JSON: a name appears twice",
    ),
    "config is wrong": (lambda f: edit_config(f, hidden_size=2**31), "config.json: hidden_size is 2147483648, wanted"),
    "llama": (
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"]),
        "'LlamaForCausalLM'.*supported are Deepseek",
    ),
    "index is not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("x"),
        "index.json: not readable as",
    ),
    "index is a list": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "wanted a JSON object"),
    "index is empty": (lambda f: edit_index(f, dict.clear), "no weight_map with tensors in it"),
    "index names a missing file": (lambda f: (f / FILE).unlink(), f"names files that do not exist: {FILE}"),
    "index lacks a tensor": (lambda f: edit_index(f, lambda m: m.pop(EXPERT)), f"{EXPERT} is in .* not in the index"),
    "index has one more": (lambda f: edit_index(f, lambda m: m.update(x=FILE)), f"x is not in {FILE}"),
    "index names another file": (
        lambda f: edit_index(
            f, lambda m: m.update({EXPERT: FILE if m[EXPERT] != FILE else FILE.replace("2-", "1-", 1)})
        ),
        f"{EXPERT} is not in",
    ),
    "single file beside the index": (
        lambda f: shutil.copy(f / FILE, f / "model.safetensors"),
        "does not name model.safetensors, which is there too",
    ),
    "truncated": (lambda f: os.truncate(f / FILE, 100_000), f"{FILE}: not a valid safetensors file: .* cut short"),
    "empty file": (lambda f: os.truncate(f / FILE, 0), f"{FILE}: not a valid safetensors file"),
    "a web page": (lambda f: (f / FILE).write_text("<html>" * 9), f"{FILE}: not a valid safetensors file"),
    "a folder in place of a file": (
        lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()),
        f"names files that do not exist: {FILE}",
    ),
    "tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(EXPERT)), f"fit its config: {EXPERT} is missing$"),
    "tensor extra": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(1))),
        "fit its config: 'extra' is not a tensor of this model$",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()})),
        rf"{EXPERT} has shape \[255, 128\], wanted \[256, 128\]$",
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT: t[EXPERT].bfloat16()})),
        f"{EXPERT} is BF16, wanted F8_E4M3$",
    ),
    "norm too wide for the model": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})),
        "model.norm.weight is F32, wanted BF16$",
    ),
    "half precision gate": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(4, 128).half()})),
        "model.layers.1.mlp.gate.weight is F16, wanted F32 or BF16$",
    ),
    "scale missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(EXPERT + "_scale_inv")),
        f"{EXPERT}_scale_inv, the scale of an FP8 weight, is missing$",
    ),
    "scale of the wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 2)})),
        r"has shape \[1, 2\], wanted \[2, 1\]$",
    ),
    "MTP dropped": (drop_mtp, "MTP layer.* missing: set num_nextn_predict_layers to 0 in config.json if [^;]*$"),
    "FP8 weights under a BF16 config": (
        lambda f: edit_config(f, quantization_config=None),
        "is F8_E4M3, wanted BF16; ",
    ),
    "a layer less": (lambda f: edit_config(f, num_hidden_layers=1), "is not a tensor of this model; and "),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_clear_error(small, tmp_path, case):
    change, message = BAD_FOLDERS[case]
    copied = copy_of(small, tmp_path / "copy")
    Checkpoint(copied).check()
    change(copied)
    with pytest.raises(InputError, match=message) as error:
        Checkpoint(copied).check()
    assert str(copied) in str(error.value) or case == "llama"


def test_all_problems_are_reported_at_once_and_ten_shown(small, tmp_path):
    copied = copy_of(small, tmp_path / "copy")

    def change(tensors):
        for name in [name for name in tensors if ".experts." in name and "scale" in name]:
            del tensors[name]
        tensors |= {"surplus": torch.zeros(1), "lm_head.weight": torch.zeros(7)}

    edit_tensors(copied, change)
    with pytest.raises(InputError) as error:
        Checkpoint(copied).check()
    found = str(error.value).split(": ", 2)[-1].split("; ")
    # 2 MoE layers of 4 experts of 3 weights without scales, one surplus, one of the wrong shape and dtype.
    assert len(found) == 11 and found[-1] == f"and {2 * 4 * 3 + 3 - 10} more"


OUTSIDE = ["../elsewhere.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..", "", None, 3, "config.json"]


@pytest.mark.parametrize("name", [*OUTSIDE, "x" * 300 + ".safetensors", "\ud800.safetensors"])
def test_an_index_cannot_lead_out_of_the_folder(small, tmp_path, name):
    copied = copy_of(small, tmp_path / "copy")
    shutil.copy(copied / FILE, tmp_path / "elsewhere.safetensors")
    edit_index(copied, lambda m: m.update({EXPERT: name}))
    with pytest.raises(InputError, match=r"not the plain name of a .safetensors file in this folder"):
        Checkpoint(copied)


def test_the_linked_files_of_the_hub_cache_are_read(small, tmp_path):
    copied = copy_of(small, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in copied.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    Checkpoint(tmp_path / "snapshot").check()
    (tmp_path / "snapshot" / FILE).unlink()
    (tmp_path / "snapshot" / FILE).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"names files that do not exist: {FILE}"):
        Checkpoint(tmp_path / "snapshot")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_no_scale_is_refused_when_read(small, tmp_path, value):
    copied = copy_of(small, tmp_path / "copy")
    edit_tensors(copied, lambda t: t[EXPERT + "_scale_inv"].fill_(value))
    checkpoint = Checkpoint(copied)
    checkpoint.check()
    with pytest.raises(InputError, match=f"{EXPERT}_scale_inv has a scale that is negative, NaN or infinite"):
        checkpoint.read(EXPERT + "_scale_inv")
    model = Transformer(checkpoint.args)
    with pytest.raises(InputError, match="negative, NaN or infinite"):
        load_model(model, checkpoint, Parallel(), progress=False)


def test_a_zero_scale_is_an_all_zero_block(small, tmp_path):
    copied = copy_of(small, tmp_path / "copy")
    edit_tensors(copied, lambda t: t[EXPERT + "_scale_inv"].zero_())
    assert not Checkpoint(copied).read(EXPERT + "_scale_inv").any()


def test_what_is_not_needed_may_be_there_or_not(small, tmp_path):
    copied = copy_of(small, tmp_path / "copy")
    edit_tensors(copied, lambda t: t.pop("model.layers.2.embed_tokens.weight"))
    Checkpoint(copied).check()
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    tensors = read_weights(copied) | inv_freq
    save_file(tensors, copied / "model.safetensors")
    Checkpoint(copied).check()


# --- converted shards -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(small, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "mp2"
    convert(small, target, 2, expert_parallel=True)
    return target


def test_shards_say_how_they_were_split(converted):
    checkpoint = Checkpoint(converted)
    assert (checkpoint.kind, checkpoint.mp, checkpoint.expert_parallel) == ("shards", 2, True)
    for rank in range(2):
        checkpoint.check(2, rank, expert_parallel=True)
    assert "layers.1.ffn.experts.2.w1.weight" in checkpoint.tensors
    assert "layers.1.ffn.experts.1.w1.weight" not in checkpoint.tensors


@pytest.mark.parametrize("world_size", [1, 4])
def test_another_number_of_ranks_than_the_shards_is_refused(converted, world_size):
    message = f"converted for 2 ranks and run with {world_size}; start it with torchrun --nproc-per-node 2"
    with pytest.raises(InputError, match=message):
        Checkpoint(converted).check(world_size, world_size - 1, expert_parallel=True)
    with pytest.raises(InputError, match="converted with --expert-parallel; run it with that too"):
        Checkpoint(converted).check(2, 0)


SHARD_DAMAGE = {
    "a shard missing": (lambda f: (f / "model1-mp2.safetensors").unlink(), "model1-mp2.safetensors is missing"),
    "a shard of another run": (
        lambda f: shutil.copy(f / "model1-mp2.safetensors", f / "model0-mp1.safetensors"),
        "model0-mp1.safetensors belongs to another conversion",
    ),
    "a shard under another rank's name": (
        lambda f: shutil.copy(f / "model1-mp2.safetensors", f / "model0-mp2.safetensors"),
        "its metadata says .*'rank': '1'.* was renamed",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json: .*conversion that was interrupted"),
    "still being written": (
        lambda f: (
            (f / "config.json").unlink(),
            (f / "model1-mp2.safetensors").rename(f / "model1-mp2.safetensors.incomplete"),
        ),
        "no config.json: .*conversion that was interrupted",
    ),
    "beside a Hugging Face file": (
        lambda f: shutil.copy(f / "model1-mp2.safetensors", f / "model.safetensors"),
        "holds both model0-mp2.safetensors and a Hugging Face checkpoint",
    ),
}


@pytest.mark.parametrize("case", SHARD_DAMAGE)
def test_a_damaged_conversion_is_one_clear_error(converted, tmp_path, case):
    change, message = SHARD_DAMAGE[case]
    copied = copy_of(converted, tmp_path / "copy")
    change(copied)
    with pytest.raises(InputError, match=message):
        Checkpoint(copied)


# --- filling a model --------------------------------------------------------------------------------------------------


@functools.cache
def weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A Hugging Face folder's tensors as stored, and dequantised."""
    stored = read_weights(path)
    return stored, dequantise(stored)


def expected_slice(path: Path, args: ModelArgs, name: str, place: torch.Tensor, rank: int) -> torch.Tensor:
    """What goes to `place`, cut by hand from a whole tensor of an HF folder."""
    stored, exact = weights(path)
    hf_name = tensor_specs(args)[name].hf_name
    whole = (stored if place.dtype == E4M3 or name.endswith(".scale") else exact)[hf_name]
    shape = place.shape
    if len(shape) == 3:  # several shared experts, which are one wide MLP in the checkpoint
        assert ".shared_experts." in name and args.n_shared_experts in shape[:2]
        shape = (shape[0], shape[1] * shape[2]) if ".w2." in name else (shape[0] * shape[1], shape[2])
    for dim, size in enumerate(shape):
        if whole.shape[dim] != size:
            whole = whole.narrow(dim, rank * size, size)
    return whole.to(place.dtype).view(place.shape)


def poisoned_model(args: ModelArgs, parallel: Parallel) -> Transformer:
    model = Transformer(args, parallel)
    for parameter in model.parameters():
        parameter.view(torch.uint8).fill_(0xFF)  # NaN in every float type
    return model


@pytest.mark.parametrize("source", ["hf", "shards"])
@pytest.mark.parametrize(
    "kind, dtype, mp, expert_parallel",
    [
        ("v3", "fp8", 1, False),
        ("v3", "fp8", 2, False),
        ("v3", "bf16", 4, True),
        ("v2lite", "fp32", 2, True),
        ("v2", "bf16", 4, False),
    ],
)
def test_every_parameter_gets_its_slice(folder, tmp_path, source, kind, dtype, mp, expert_parallel):
    path = source_path = folder(kind, dtype)
    if source == "shards":
        convert(path, tmp_path / "converted", mp, expert_parallel)
        path = tmp_path / "converted"
    for rank in {0, mp - 1}:
        checkpoint, parallel = Checkpoint(path), Parallel(rank, mp, expert_parallel)
        model = poisoned_model(checkpoint.args, parallel)
        load_model(model, checkpoint, parallel, progress=False)
        experts = range(checkpoint.args.n_routed_experts)
        if expert_parallel:
            experts = experts[rank * len(experts) // mp : (rank + 1) * len(experts) // mp]
        places = model.weights()
        assert places.keys() == {
            spec.name
            for spec in tensor_specs(checkpoint.args).values()
            if (spec.expert is None or spec.expert in experts) and not spec.name.endswith(".wkv_b.scale")
        }
        for name, place in places.items():
            assert same_bits(place, expected_slice(source_path, checkpoint.args, name, place, rank)), name


def test_an_fp8_checkpoint_fills_a_wider_model(folder):
    """As on GPUs without FP8 units: every weight dequantised, norms and the rest widened."""
    checkpoint = Checkpoint(folder("v3", "fp8"))
    _, stored = weights(folder("v3", "fp8"))
    for dtype in ("bf16", "fp32"):
        fields = dict(checkpoint.args.__dict__) | {"dtype": dtype, "n_mtp_layers": 0}
        args = ModelArgs(**fields)
        model = poisoned_model(args, Parallel())
        load_model(model, checkpoint, Parallel(), progress=False)
        specs = tensor_specs(args)
        for name, place in model.weights().items():
            wide = dtype == "fp32" or ".gate." in name
            assert place.dtype == (torch.float32 if wide else torch.bfloat16)
            # One rounding in fp32 and one in bf16 against one in float64.
            wanted = stored[specs[name].hf_name].double()
            assert ((place.double() - wanted).abs() <= wanted.abs() * 2**-8).all(), name
            if dtype == "fp32":
                assert torch.equal(place, wanted.float()), name
        experts = model.layers[2].ffn.experts.w2.weight
        assert experts.shape == (12 + 1, 384, 256)  # and the shared one
        wanted = [stored[f"model.layers.2.mlp.experts.{i}.down_proj.weight"] for i in range(12)]
        wanted = torch.stack([stored["model.layers.2.mlp.shared_experts.down_proj.weight"], *wanted])
        torch.testing.assert_close(experts.float(), wanted.float(), rtol=2**-8, atol=0)


def test_a_model_narrower_than_the_checkpoint_is_refused(folder):
    checkpoint = Checkpoint(folder("v3", "fp32"))
    args = ModelArgs(**(dict(checkpoint.args.__dict__) | {"dtype": "bf16"}))
    with pytest.raises(InputError, match="is stored as F32, which BF16 cannot hold"):
        load_model(Transformer(args), checkpoint, Parallel(), progress=False)


def test_a_parameter_that_no_tensor_fills_is_a_bug(small):
    checkpoint = Checkpoint(small)
    model = Transformer(checkpoint.args)
    model.register_parameter("forgotten", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(AssertionError, match="forgotten"):
        load_model(model, checkpoint, Parallel(), progress=False)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_rank_reads_its_slices_only(folder, monkeypatch, expert_parallel):
    """Rows and whole experts of other ranks are not read; of column slices, whole rows are."""
    read = []
    original = SafetensorsFile._read_into
    checkpoint, parallel = Checkpoint(folder("v3", "bf16")), Parallel(3, 4, expert_parallel)
    model = Transformer(checkpoint.args, parallel)
    monkeypatch.setattr(SafetensorsFile, "_read_into", lambda *a: (read.append(len(a[1])), original(*a)))
    load_model(model, checkpoint, parallel, progress=False)
    expected = 0
    for spec in tensor_specs(checkpoint.args).values():
        if (slices := shard(spec, 4, 3, expert_parallel)) is not None:
            rows = slices[0].stop - slices[0].start
            expected += checkpoint.tensors[spec.hf_name].nbytes * rows // spec.shape[0]
    assert sum(read) == expected


def test_loading_shows_progress_on_rank_0(small, capsys):
    checkpoint = Checkpoint(small)
    load_model(Transformer(checkpoint.args), checkpoint, Parallel())
    out, err = capsys.readouterr()
    assert out == "" and "loading: 100%" in err
    stand_in = types.SimpleNamespace(rank=1, world_size=2, expert_parallel=True)
    load_model(Transformer(checkpoint.args, Parallel(1, 2, True)), checkpoint, stand_in)
    assert capsys.readouterr().err == ""
