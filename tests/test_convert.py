"""convert.py and fp8_cast_bf16.py: their output bit by bit, what transformers makes of it, and how they fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bf16_cast_fp8
import convert
import fp8_cast_bf16
from checkpoint import INDEX_FILE, Checkpoint, shard, tensor_specs
from checkpoints import SMALL, dequantise, make_hf, oracle, read_weights, same_bits
from config import ModelArgs
from errors import run_command
from fp8_cast_bf16 import dequantise as dequantise_for_cast
from kernel import weight_dequant

ROOT = Path(__file__).parents[1]
SUMMARY = r"GB/s, peak memory \d+ MB"
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """FP8, MTP, three files, with the other files that published folders have."""
    folder = make_hf(tmp_path_factory.mktemp("small"), "v3", "fp8", mtp=1, shards=3, **SMALL)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in (
        "LICENSE-MODEL",
        "README.md",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "old.bin",
        "notes.txt",
    ):
        (folder / name).write_text(f"the contents of {name}")
    (folder / "inference").mkdir()
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command's main as its script does: (exit code, stdout, stderr without the progress bar)."""

    def run(module, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
        code = 0
        try:
            run_command(module.main)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err.rpartition("\r")[2]

    return run


def convert_argv(source: Path, target: Path, mp: int = 2) -> list:
    return ["--hf-ckpt-path", source, "--save-path", target, "--model-parallel", mp]


def cast_argv(source: Path, target: Path) -> list:
    return ["--input-fp8-hf-path", source, "--output-bf16-hf-path", target, "--device", "cpu"]


def to_hf_argv(source: Path, target: Path) -> list:
    return ["--to-hf", "--shards-path", source, "--save-path", target]


COMMANDS = {"convert": (convert, convert_argv), "cast": (fp8_cast_bf16, cast_argv)}
both = pytest.mark.parametrize("command", COMMANDS)


# --- convert ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, dtype, mp, expert_parallel",
    [("v3", "fp8", 2, False), ("v3", "fp8", 2, True), ("v2", "bf16", 4, False), ("v2lite", "bf16", 1, False)],
)
def test_shards_hold_every_slice_bit_for_bit(tmp_path, run, kind, dtype, mp, expert_parallel):
    source = make_hf(tmp_path / "hf", kind, dtype, mtp=2 if kind == "v3" else 0, shards=2)
    target = tmp_path / "new" / "shards"
    flags = ["--n-experts", ModelArgs.load(source / "config.json").n_routed_experts]
    code, out, err = run(convert, *convert_argv(source, target, mp), *flags, *["--expert-parallel"] * expert_parallel)
    assert (code, err) == (0, "")
    *skipped, counts, summary = out.splitlines()
    specs = tensor_specs(ModelArgs.load(source / "config.json"))
    stored = read_weights(source)
    n, n_skipped = (int(re.search(rf"(\d+) {word}", counts)[1]) for word in ("tensors", "skipped"))
    whole = sum(s.split is None or (expert_parallel and s.expert is not None) for s in specs.values())
    whole = len(specs) if mp == 1 else whole
    assert (n, n_skipped) == (len(stored), len(skipped))
    assert f"{len(specs) - whole} converted, {whole} copied" in counts
    assert re.fullmatch(rf"{target}: \d+ tensors in {mp} files, 0\.0\d+ GB written in .* s, .*{SUMMARY}", summary)
    assert {line.split()[1].rstrip(":") for line in skipped} == stored.keys() - {
        spec.hf_name for spec in specs.values()
    }
    assert all(": repeats " in line for line in skipped)
    for rank in range(mp):
        tensors = load_file(target / f"model{rank}-mp{mp}.safetensors")
        expected = {}
        for spec in specs.values():
            if (part := shard(spec, mp, rank, expert_parallel)) is not None:
                expected[spec.name] = stored[spec.hf_name][part]
        assert tensors.keys() == expected.keys()
        assert all(same_bits(tensors[name], expected[name]) for name in expected)
        with safe_open(target / f"model{rank}-mp{mp}.safetensors", "pt") as file:
            experts = "expert" if expert_parallel else "tensor"
            assert file.metadata() == {"format": "pt", "mp": str(mp), "rank": str(rank), "experts": experts}
    Checkpoint(target).check(mp, 0, expert_parallel)


def test_a_converted_folder_is_complete(small, tmp_path, run):
    code, *_ = run(convert, *convert_argv(small, tmp_path / "out"))
    assert code == 0
    names = ["LICENSE-MODEL", "README.md", "SHA256SUMS", "chat_template.jinja", "config.json"]
    names += ["configuration_deepseek.py", "generation_config.json", "notes.txt"]
    names += ["model0-mp2.safetensors", "model1-mp2.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(names)
    for name in names:
        if not name.endswith(".safetensors") and name != "SHA256SUMS":
            assert (tmp_path / "out" / name).read_bytes() == (small / name).read_bytes()


LAYOUTS = {  # name -> kind, stored type, MTP layers, format of scales; with blocks at the edge that are not whole
    "V2-Lite": ("v2lite", "bf16", 0, None),
    "V2": ("v2", "bf16", 0, None),
    "V3": ("v3", "fp8", 1, None),
    "V3.1": ("v3", "fp8", 1, "ue8m0"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_through_every_converter(tmp_path, run, name):
    """FP8 and BF16 folders of each model, either of which is made of the other, to shards and back."""
    kind, dtype, mtp, scale_fmt = LAYOUTS[name]
    sizes = {key: value for key, value in SMALL.items() if not (name == "V2-Lite" and key == "q_lora_rank")}
    source = make_hf(tmp_path / dtype, kind, dtype, mtp=mtp, scale_fmt=scale_fmt, shards=3, **sizes)
    fmt = ["--scale-fmt", scale_fmt] if scale_fmt else []
    to_bf16 = fp8_cast_bf16, ["--input-fp8-hf-path", tmp_path / "fp8", "--output-bf16-hf-path", tmp_path / "bf16"]
    to_fp8 = bf16_cast_fp8, ["--input-bf16-hf-path", tmp_path / "bf16", "--output-fp8-hf-path", tmp_path / "fp8", *fmt]
    module, argv = to_bf16 if dtype == "fp8" else to_fp8
    assert run(module, *argv, "--device", "cpu", "--verify")[0] == 0
    if dtype == "fp8":
        argv = [tmp_path / "again" if arg == tmp_path / "fp8" else arg for arg in to_fp8[1]]
        code, out, _ = run(bf16_cast_fp8, *argv, "--device", "cpu", "--verify")
        assert code == 0 and re.search(r"\d+ weights quantised; cast back to BF16, \d+ are what they were", out)
    stored = read_weights(source)
    assert any(t.shape[0] % 128 for n, t in stored.items() if n.endswith("kv_a_proj_with_mqa.weight"))
    for folder in ("fp8", "bf16"):
        shards, back = tmp_path / f"{folder}-2", tmp_path / f"{folder}-back"
        code, out, _ = run(convert, *convert_argv(tmp_path / folder, shards), "--verify")
        assert code == 0 and out.count(": repeats ") == 2 * mtp
        assert run(convert, *to_hf_argv(shards, back), "--verify")[0] == 0
        before, after = read_weights(tmp_path / folder), read_weights(back)
        assert before.keys() == after.keys() and len(before) > 35
        assert all(same_bits(before[key], after[key]) for key in before)
        copies = [key for key in before if key.endswith(".2.embed_tokens.weight")]
        assert len(copies) == mtp


# --- the way back -----------------------------------------------------------------------------------------------------

# Everything divides over four ranks in whole blocks of 128.
WIDE = SMALL | {
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "v_head_dim": 64,
}


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("mp", [1, 2, 4])
@pytest.mark.parametrize("kind, dtype, file_bytes", [("v3", "fp8", 300_000), ("v2", "bf16", 5 * 10**9)])
def test_shards_become_the_folder_they_were_made_from(
    tmp_path, run, monkeypatch, kind, dtype, file_bytes, mp, expert_parallel
):
    source = make_hf(tmp_path / "hf", kind, dtype, mtp=2 if kind == "v3" else 0, shards=2, **WIDE)
    (source / "LICENSE-MODEL").write_text("the licence")
    run(convert, *convert_argv(source, tmp_path / "shards", mp), *["--expert-parallel"] * expert_parallel)
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", file_bytes)
    target = tmp_path / "back"
    code, out, err = run(convert, *to_hf_argv(tmp_path / "shards", target))
    stored, back = read_weights(source), read_weights(target)
    assert (code, err) == (0, "")
    assert re.search(rf"{target}: {len(stored)} tensors in \d+ files, .*{SUMMARY}\n$", out)
    assert back.keys() == stored.keys()
    assert all(same_bits(back[name], stored[name]) for name in stored)
    Checkpoint(target).check()

    files = sorted(target.glob("*.safetensors"))
    if kind == "v2":
        assert [file.name for file in files] == ["model.safetensors"] and not (target / INDEX_FILE).exists()
    else:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        assert len(files) > 3 and [file.name for file in files] == names
        for file in files:
            sizes = [tensor.nbytes for tensor in load_file(file).values()]
            assert sum(sizes) <= file_bytes or len(sizes) == 1
        total_size = json.loads((target / INDEX_FILE).read_text())["metadata"]["total_size"]
        assert total_size == sum(tensor.nbytes for tensor in stored.values())
    others = [file.name for file in source.iterdir() if file.suffix != ".safetensors" and file.name != INDEX_FILE]
    assert "config.json" in others and "LICENSE-MODEL" in others
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in others)
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_way_back_of_v2_lite_in_fp32_leaves_out_what_is_computed(tmp_path, run):
    source = make_hf(tmp_path / "hf", "v2lite", "fp32", shards=2, **WIDE | {"q_lora_rank": None})
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(source, lambda t: t.update({frequencies: torch.ones(32)}))
    run(convert, *convert_argv(source, tmp_path / "shards"))
    assert run(convert, *to_hf_argv(tmp_path / "shards", tmp_path / "back"))[0] == 0
    stored, back = read_weights(source), read_weights(tmp_path / "back")
    assert back.keys() == stored.keys() - {frequencies}
    assert all(same_bits(back[name], stored[name]) for name in back)


def test_the_way_back_refuses_bad_shards_and_leaves_nothing(small, tmp_path, run):
    one, shards, quantised = tmp_path / "one", tmp_path / "shards", tmp_path / "quantised"
    run(convert, *convert_argv(small, one, 1))
    run(convert, *convert_argv(small, quantised))
    run(convert, *convert_argv(make_hf(tmp_path / "fp32", "v3", "fp32", **SMALL), shards))

    def narrow(folder: Path) -> None:
        path = folder / "model1-mp2.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        save_file(tensors | {"embed.weight": tensors["embed.weight"].bfloat16()}, path, metadata)

    def no_number(folder: Path) -> None:
        path = folder / "model1-mp2.safetensors"
        shutil.copytree(quantised, folder, dirs_exist_ok=True)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["layers.1.attn.wo.scale"][0, 0] = torch.nan
        save_file(tensors, path, metadata)

    def three(folder: Path) -> None:
        for rank in range(2):
            (folder / f"model{rank}-mp2.safetensors").unlink()
        for rank in range(3):
            metadata = {"mp": "3", "rank": str(rank), "experts": "tensor"}
            save_file({"embed.weight": torch.zeros(1)}, folder / f"model{rank}-mp3.safetensors", metadata)

    for change, message in (
        (lambda f: (f / "config.json").unlink(), "no config.json: not a checkpoint, or a conversion that was"),
        (lambda f: (f / "model1-mp2.safetensors").unlink(), "not one complete set of shards: model1-mp2"),
        (lambda f: shutil.copy(f / "model0-mp2.safetensors", f / "model1-mp2.safetensors"), "or was renamed"),
        (lambda f: os.truncate(f / "model1-mp2.safetensors", 99_999), "is it cut short"),
        (no_number, "has a scale that is negative, NaN or infinite"),
        (narrow, "embed.weight has different types in different ranks' files"),
        (three, "cannot be split over 3 ranks"),
    ):
        source = Path(shutil.copytree(shards, tmp_path / "in"))
        change(source)
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run(convert, *to_hf_argv(source, tmp_path / "a" / "out"))
        assert (code, out, err.count("\n")) == (2, "", 1) and message in err, err
        assert sorted(tmp_path.rglob("*")) == before
        shutil.rmtree(source)

    for argv, message in (
        (to_hf_argv(small, tmp_path / "x"), "a Hugging Face folder already"),
        ([*to_hf_argv(one, tmp_path / "x"), "--model-parallel", 2], "and nothing else"),
        (["--to-hf", "--save-path", tmp_path / "x"], "--to-hf takes --shards-path"),
        (["--shards-path", one, "--save-path", tmp_path / "x"], "or --to-hf with --shards-path"),
        (["--hf-ckpt-path", small, "--save-path", tmp_path / "x"], "--model-parallel are required"),
        (to_hf_argv(one, one / "out"), "would lie inside the input"),
    ):
        code, _, err = run(convert, *argv)
        assert code == 2 and message in err, err
        assert not (tmp_path / "x").exists()


# --- cast -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N, K", [(16, 256), (300, 130), (1, 1), (129, 128)])
def test_dequantise_is_weight_dequant_bit_for_bit(N, K):
    codes = torch.arange(256, dtype=torch.uint8).repeat(-(-N * K // 256))[: N * K].view(N, K)
    generator = torch.Generator().manual_seed(0)
    shape = -(-N // 128), -(-K // 128)
    for numbers in (True, False):
        w = torch.where((codes & 127 == 127) & numbers, 0, codes).view(torch.float8_e4m3fn)
        for factor in (1e-4, 1e-38, 1e-45, 1e30, 3e38):
            scale = factor * torch.rand(shape, generator=generator)
            assert same_bits(dequantise_for_cast(w, scale), weight_dequant(w, scale)), factor
        assert same_bits(dequantise_for_cast(w, torch.zeros(shape)), weight_dequant(w, torch.zeros(shape)))


@pytest.fixture(scope="module", params=[None, "ue8m0"])
def casted(request, tmp_path_factory) -> tuple[Path, Path]:
    """An FP8 folder of full variety and its BF16 copy."""
    folder = tmp_path_factory.mktemp("cast")
    source = make_hf(folder / "fp8", "v3", "fp8", mtp=1, shards=4, scale_fmt=request.param)
    fp8_cast_bf16.cast(source, folder / "bf16", torch.device("cpu"))
    return source, folder / "bf16"


def test_cast_weights_are_the_dequantised_ones_rounded_once(casted):
    source, target = casted
    stored, cast = read_weights(source), read_weights(target)
    exact = dequantise(stored, torch.float64)
    assert cast.keys() == exact.keys()
    for name, tensor in cast.items():
        if stored[name].dtype != torch.float8_e4m3fn:
            assert same_bits(tensor, stored[name]), name
            continue
        assert tensor.dtype == torch.bfloat16
        # The product of 4 and 24 significant bits is first rounded to fp32, so a tie may fall to the other side.
        rounded = exact[name].bfloat16()
        assert (tensor != rounded).float().mean() < 1e-3, name
        assert ((tensor.double() - exact[name]).abs() <= exact[name].abs() * (2**-8 + 2**-20)).all(), name
        if ModelArgs.load(source / "config.json").scale_fmt == "ue8m0":  # powers of two: nothing to round
            assert torch.equal(tensor.double(), exact[name]), name


def test_cast_files_index_and_config(casted):
    source, target = casted
    before, after = (json.loads((folder / INDEX_FILE).read_text()) for folder in casted)
    assert after["weight_map"] == {
        name: file for name, file in before["weight_map"].items() if not name.endswith("_scale_inv")
    }
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_weights(target).values())
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, where in after["weight_map"].items() if where == file.name}
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    assert list(json.loads((target / "config.json").read_text()).items()) == list(config.items())
    assert sorted(os.listdir(target)) == sorted([*os.listdir(source), "SHA256SUMS"])
    checkpoint = Checkpoint(target)
    checkpoint.check(2)
    assert checkpoint.args.dtype == "bf16"


def test_transformers_loads_the_cast_folder(casted):
    source, target = casted
    model, info = AutoModelForCausalLM.from_pretrained(
        target, output_loading_info=True, attn_implementation="eager", dtype="auto"
    )
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in info["unexpected_keys"])  # MTP, which it leaves out
    tokens = torch.randint(0, 520, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = oracle(source, torch.bfloat16).float()(tokens).logits
        logits = model.float()(tokens).logits
    # One weight in thousands may be rounded to the other side of a tie; powers of two leave nothing to round.
    most = 0 if ModelArgs.load(source / "config.json").scale_fmt == "ue8m0" else 2e-3
    assert (logits - wanted).norm() / wanted.norm() <= most
    assert AutoTokenizer.from_pretrained(target)("the fox").input_ids[0] == 0


@pytest.mark.parametrize("style", ["released", "transformers"])
def test_cast_keeps_the_key_of_the_type_and_names_no_missing_code(small, tmp_path, run, style):
    source = make_hf(tmp_path / "fp8", "v3", "fp8", style=style, **SMALL)
    config = json.loads((source / "config.json").read_text())
    key = {"released": "torch_dtype", "transformers": "dtype"}[style]
    assert {"torch_dtype", "dtype"} & config.keys() == {key}
    (source / "config.json").write_text(json.dumps(config | {key: "float32", "auto_map": {"AutoConfig": "x.X"}}))
    code, out, err = run(fp8_cast_bf16, *cast_argv(source, tmp_path / "bf16"))
    assert (code, err) == (0, "") and re.search(SUMMARY + "\n$", out)
    result = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert result == {name: value for name, value in config.items() if name != "quantization_config"} | {
        key: "bfloat16"
    }
    assert not (tmp_path / "bf16" / INDEX_FILE).exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", trust_remote_code=True)


def test_cast_output_holds_everything_but_other_weights_and_folders(small, tmp_path, run):
    code, out, _ = run(fp8_cast_bf16, *cast_argv(small, tmp_path / "out"))
    assert code == 0 and "not copied: inference, old.bin\n" in out
    missing = set(os.listdir(small)) - set(os.listdir(tmp_path / "out"))
    assert missing == {"old.bin", "inference"}
    for name in ("configuration_deepseek.py", "notes.txt"):
        assert (tmp_path / "out" / name).read_text() == f"the contents of {name}"


def test_a_file_that_held_only_scales_disappears(tmp_path, run):
    source = make_hf(tmp_path / "fp8", "v3", "fp8", **SMALL)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files = {name: "b.safetensors" if name.endswith("_scale_inv") else "a.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, source / file)
    (source / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert run(fp8_cast_bf16, *cast_argv(source, tmp_path / "out"))[0] == 0
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["a.safetensors"]
    Checkpoint(tmp_path / "out").check()


# --- bad input --------------------------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    tensors = read_weights(folder)
    change(tensors)
    for file in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def replace(path: Path, make) -> None:
    old = path.rename(path.with_suffix(".old"))
    make(path)
    old.unlink()


def many_experts(folder: Path) -> str:
    config = json.loads((folder / "config.old").read_text())
    return json.dumps(config | {"n_routed_experts": 300_000})


def spoil_scale(tensors: dict[str, torch.Tensor]) -> None:
    if WEIGHT + "_scale_inv" in tensors:
        tensors[WEIGHT + "_scale_inv"][-1, -1] = torch.nan


DAMAGE = {
    "missing folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "missing file": (lambda f: (f / "model-00003-of-000003.safetensors").unlink(), "names files that do not exist"),
    "truncated": (lambda f: os.truncate(f / "model-00001-of-000003.safetensors", 99_999), "is it cut short?"),
    "scale missing": (
        lambda f: edit(f, lambda t: t.pop(WEIGHT + "_scale_inv")),
        "the scale of an FP8 weight, is missing",
    ),
    "tensor missing": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "a scale of NaN": (lambda f: edit(f, spoil_scale), "has a scale that is negative, NaN or infinite"),
    "config is a pipe": (lambda f: replace(f / "config.json", os.mkfifo), "config.json: not a file"),
    "config without an end": (
        lambda f: replace(f / "config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json: not a file",
    ),
    "index of a terabyte": (lambda f: os.truncate(f / INDEX_FILE, 10**12), "no configuration or index is that long"),
    "a million experts": (
        lambda f: replace(f / "config.json", lambda path: path.write_text(many_experts(f))),
        "3 layers of 300000 experts, but 121 tensors",
    ),
    "Llama": (
        lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'),
        "LlamaForCausalLM.* not supported",
    ),
}


@both
@pytest.mark.parametrize("case", DAMAGE)
def test_bad_input_is_one_line_and_leaves_nothing(small, tmp_path, run, command, case):
    change, message = DAMAGE[case]
    source = Path(shutil.copytree(small, tmp_path / "in"))
    change(source)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    module, argv = COMMANDS[command]
    code, out, err = run(module, *argv(source, tmp_path / "a" / "b" / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@both
def test_output_folders_that_are_refused(small, tmp_path, run, command):
    module, argv = COMMANDS[command]
    source = Path(shutil.copytree(small, tmp_path / "in"))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "something").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("in")
    for target, message in {
        "in": "would lie inside the input",
        "in/out": "would lie inside the input",
        "in/../in/x/y": "would lie inside the input",
        "link/out": "would lie inside the input",
        "used": "not empty",
        "file": "cannot be made an output folder",
        "file/out": "cannot be made an output folder",
        "x" * 300: "cannot be made an output folder",
    }.items():
        before = sorted(tmp_path.rglob("*"))
        code, _, err = run(module, *argv(source, tmp_path / target))
        assert code == 2 and message in err and err.count("\n") == 1, target
        assert sorted(tmp_path.rglob("*")) == before, target


@pytest.mark.parametrize("name, tensor, message", [
    ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.tensor(1.0), r"inv_freq has shape \[\]"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(5, 0), r"inv_freq has shape \[5, 0\]"),
    ("model.layers.2.embed_tokens.weight", torch.tensor(1.0), r"embed_tokens.weight has shape \[\]"),
    ("model.layers.2.embed_tokens.weight", torch.ones(5, 4, dtype=torch.float8_e4m3fn), None),
])  # fmt: skip
def test_tensors_that_no_model_needs_may_be_anything(small, tmp_path, run, name, tensor, message):
    """convert.py skips them, the cast copies them or says that it cannot."""
    source = Path(shutil.copytree(small, tmp_path / "in"))
    index = json.loads((source / INDEX_FILE).read_text())
    file = index["weight_map"].setdefault(name, "model-00001-of-000003.safetensors")
    save_file(load_file(source / file) | {name: tensor}, source / file, {"format": "pt"})
    (source / INDEX_FILE).write_text(json.dumps(index))
    code, out, err = run(convert, *convert_argv(source, tmp_path / "shards"))
    assert code == 0 and f"skipped {name}: " in out, err
    code, _, err = run(fp8_cast_bf16, *cast_argv(source, tmp_path / "bf16"))
    if message:
        assert code == 2 and re.search(message, err) and err.count("\n") == 1, err
    else:
        assert code == 0 and same_bits(read_weights(tmp_path / "bf16")[name], tensor), err


def test_arguments_that_do_not_fit_the_checkpoint(small, tmp_path, run):
    converted = tmp_path / "converted"
    assert run(convert, *convert_argv(small, converted, 1))[0] == 0
    bf16 = make_hf(tmp_path / "bf16", "v3", "bf16", **SMALL)
    for module, argv, message in (
        (convert, [*convert_argv(small, tmp_path / "x"), "--n-experts", 5], "--n-experts is 5 but .* has 4"),
        (convert, convert_argv(small, tmp_path / "x", 3), "rows cannot be split over 3 ranks.* that work: 1, 2"),
        (convert, [*convert_argv(bf16, tmp_path / "x", 3), "--expert-parallel"], "cannot be split over 3 ranks"),
        (convert, convert_argv(small, tmp_path / "x", 0), "--model-parallel"),
        (convert, convert_argv(converted, tmp_path / "x"), "already converted, for 1 ranks"),
        (fp8_cast_bf16, cast_argv(converted, tmp_path / "x"), "already converted, for 1 ranks"),
        (fp8_cast_bf16, cast_argv(bf16, tmp_path / "x"), "not an FP8 checkpoint: its config.json has no quantization"),
        (fp8_cast_bf16, [*cast_argv(small, tmp_path / "x"), "--device", "tpu"], "invalid choice: 'tpu'"),
    ):
        code, _, err = run(module, *argv)
        assert code == 2 and re.search(message, err), err
        assert not (tmp_path / "x").exists()


@both
def test_the_command_line_itself(small, tmp_path, command):
    """In a process of its own: a good run, then the same again, refused without a traceback."""
    module, argv = COMMANDS[command]
    line = [sys.executable, str(ROOT / "inference" / f"{module.__name__}.py"), *map(str, argv(small, tmp_path / "out"))]
    good = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert good.returncode == 0 and "%|" in good.stderr and re.search(SUMMARY, good.stdout), good.stderr
    again = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"error: {tmp_path / 'out'}: the output folder is not empty; choose another\n"
