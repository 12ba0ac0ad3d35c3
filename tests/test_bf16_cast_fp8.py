"""bf16_cast_fp8.py: its output bit by bit, the way FP8 -> BF16 -> FP8, who accepts the folder, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

import bf16_cast_fp8
import convert
import fp8_cast_bf16
from checkpoint import INDEX_FILE, Checkpoint
from checkpoints import SMALL, dequantise, is_quantised, make_hf, quantise, read_weights, same_bits, to_blocks
from errors import run_command
from llm import LLM
from sampling import SamplingParams

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_hf(tmp_path_factory.mktemp("small"), "v3", "bf16", mtp=1, **SMALL)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command as its script does: (exit code, stdout, stderr without the progress bar)."""

    def run(source: Path, target: Path, *flags: str) -> tuple[int, str, str]:
        argv = ["--input-bf16-hf-path", source, "--output-fp8-hf-path", target, "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", ["bf16_cast_fp8.py", *map(str, argv)])
        code = 0
        try:
            run_command(bf16_cast_fp8.main)
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err.rpartition("\r")[2]

    return run


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, mtp, scale_fmt", [("v3", 1, None), ("v3", 1, "ue8m0"), ("v2", 0, None), ("v2lite", 0, "ue8m0")]
)
def test_the_folder_is_what_a_released_fp8_one_is(tmp_path, run, kind, mtp, scale_fmt):
    source, target = make_hf(tmp_path / "bf16", kind, "bf16", mtp=mtp, shards=3), tmp_path / "fp8"
    (source / "LICENSE-MODEL").write_text("the licence")
    code, out, err = run(source, target, *(["--scale-fmt", scale_fmt] if scale_fmt else []))
    assert (code, err) == (0, "")

    before, after = read_weights(source), read_weights(target)
    wanted = quantise(before, scale_fmt)
    assert after.keys() == wanted.keys() and len(after) > len(before)
    assert all(same_bits(after[name], wanted[name]) for name in wanted)
    assert any(after[name].shape[0] % 128 for name in after if is_quantised(name))  # blocks at the edge

    index, old = (json.loads((folder / INDEX_FILE).read_text()) for folder in (target, source))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for name, file in index["weight_map"].items():
        assert file == old["weight_map"][name.removesuffix("_scale_inv")]
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file.name}

    released = make_hf(tmp_path / "released", kind, "fp8", mtp=mtp, scale_fmt=scale_fmt)
    config, wanted_config = (json.loads((folder / "config.json").read_text()) for folder in (target, released))
    assert config == wanted_config
    assert AutoConfig.from_pretrained(target).quantization_config == wanted_config["quantization_config"]
    assert sorted(os.listdir(target)) == sorted([*os.listdir(source), "SHA256SUMS"])
    checkpoint = Checkpoint(target)
    checkpoint.check(2)
    assert (checkpoint.args.dtype, checkpoint.args.scale_fmt) == ("fp8", scale_fmt)

    names = [name for name in before if is_quantised(name)]
    back = dequantise(after, torch.bfloat16)
    errors = [float((back[name] - before[name]).abs().max() / before[name].abs().max()) for name in names]
    number, exact, most = re.search(
        r"(\d+) weights quantised; cast back to BF16, (\d+) are what they were; .* ([\d.]+)% of their", out
    ).groups()
    assert (int(number), int(exact)) == (len(names), 0)
    assert 100 * max(errors) == pytest.approx(float(most), abs=0.05)


def test_the_command_line_and_a_run_of_the_model(small, tmp_path):
    line = [sys.executable, ROOT / "inference" / "bf16_cast_fp8.py", "--input-bf16-hf-path", small, "--device", "cpu"]
    line += ["--output-fp8-hf-path", tmp_path / "out"]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and "are what they were" in done.stdout, done.stderr
    for gemm in ("bf16", "fp8"):
        llm = LLM(tmp_path / "out", device="cpu", gemm=gemm, max_seq_len=64)
        (completion,) = llm.generate("the quick brown", SamplingParams(temperature=0.0, max_tokens=6))
        assert completion.token_ids


def test_zeros_and_weights_too_small_for_a_scale_of_their_own(small, tmp_path, run):
    source = Path(shutil.copytree(small, tmp_path / "in"))
    tiny = WEIGHT.replace("up_proj", "down_proj")
    edit(source, lambda t: (t[WEIGHT].zero_(), t[tiny].fill_(-(2.0**-20))))
    assert run(source, tmp_path / "out")[0] == 0
    after = read_weights(tmp_path / "out")
    for name in (WEIGHT, tiny):
        assert torch.equal(after[name + "_scale_inv"], torch.full_like(after[name + "_scale_inv"], 1e-4 / 448))
    assert not after[WEIGHT].float().any()
    assert dequantise(after)[tiny][0, 0] == pytest.approx(-(2.0**-20), rel=2**-4)


# --- FP8 -> BF16 -> FP8 -----------------------------------------------------------------------------------------------


def test_powers_of_two_come_back_byte_for_byte(tmp_path, run):
    first = make_hf(tmp_path / "fp8", "v3", "fp8", mtp=1, scale_fmt="ue8m0", shards=2)
    second = tmp_path / "fp8-2"
    fp8_cast_bf16.cast(first, tmp_path / "bf16", CPU)
    code, out, _ = run(tmp_path / "bf16", second, "--scale-fmt", "ue8m0")
    names = [name for name in read_weights(tmp_path / "bf16") if is_quantised(name)]
    assert code == 0
    assert f"{len(names)} weights quantised; cast back to BF16, {len(names)} are what they were\n" in out
    before, after = read_weights(first), read_weights(second)
    assert before.keys() == after.keys()
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    blocks = other = 0
    for name in before.keys() - {name + suffix for name in names for suffix in ("", "_scale_inv")}:
        assert same_bits(before[name], after[name])
    for name in names:
        # A block whose largest code is 224 or less has a scale that is larger than it needs, and gets the smaller one.
        fits = to_blocks(before[name].float()).abs().amax((2, 3)) > 224
        blocks, other = blocks + fits.numel(), other + int((~fits).sum())
        old, new = to_blocks(before[name].float())[fits], to_blocks(after[name].float())[fits]
        assert same_bits(old, new)
        assert same_bits(before[name + "_scale_inv"][fits], after[name + "_scale_inv"][fits])
    assert 0 < other < blocks / 10
    # Those values are the same all the same, and nothing changes any more.
    fp8_cast_bf16.cast(second, tmp_path / "bf16-2", CPU)
    assert run(tmp_path / "bf16-2", tmp_path / "fp8-3", "--scale-fmt", "ue8m0")[0] == 0
    for a, b in (("bf16", "bf16-2"), ("fp8-2", "fp8-3")):
        files = sorted((tmp_path / a).iterdir())
        assert all(file.read_bytes() == (tmp_path / b / file.name).read_bytes() for file in files)


def test_other_scales_come_back_but_for_the_rounding_to_bf16_and_that_is_said(tmp_path, run):
    source = make_hf(tmp_path / "fp8", "v3", "fp8", **SMALL)  # made of BF16 weights: BF16 holds 448 times each scale
    fp8_cast_bf16.cast(source, tmp_path / "bf16", CPU)
    code, out, _ = run(tmp_path / "bf16", tmp_path / "again")
    before, after = read_weights(source), read_weights(tmp_path / "again")
    names = list(filter(is_quantised, before))
    assert code == 0 and f"BF16, {len(names)} are what they were\n" in out
    assert all(same_bits(before[name], after[name]) for name in before)

    edit(source, lambda t: [t[name + "_scale_inv"].mul_(1.0037) for name in names])
    fp8_cast_bf16.cast(source, tmp_path / "bf16-2", CPU)
    code, out, _ = run(tmp_path / "bf16-2", tmp_path / "again-2")
    before, after = read_weights(source), read_weights(tmp_path / "again-2")
    for name in names:
        assert same_bits(before[name], after[name])
        scale, new = before[name + "_scale_inv"], after[name + "_scale_inv"]
        assert torch.allclose(scale, new, rtol=2**-8, atol=0) and not torch.equal(scale, new)
    most = float(re.search(r"; others differ by up to ([\d.]+)% of their matrix's largest value", out)[1])
    assert code == 0 and 0 < most <= 100 * 2**-7


# --- bad input --------------------------------------------------------------------------------------------------------


def edit(folder: Path, change) -> None:
    tensors = read_weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def our_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(asdict(Checkpoint(folder).args)))


DAMAGE = {
    "missing folder": (shutil.rmtree, "no such folder"),
    "not BF16": (lambda f: set_config(f, torch_dtype="float32"), "not a BF16 checkpoint: it is fp32"),
    "FP32 weight": (lambda f: edit(f, lambda t: t.update({WEIGHT: t[WEIGHT].float()})), "is F32, wanted BF16"),
    "tensor missing": (lambda f: edit(f, lambda t: t.pop(WEIGHT)), f"{WEIGHT} is missing"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 99_999), "is it cut short?"),
    "our config": (our_config, "config.json: not Hugging Face's"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_bad_input_is_one_line_and_leaves_nothing(small, tmp_path, run, case):
    change, message = DAMAGE[case]
    source = Path(shutil.copytree(small, tmp_path / "in"))
    change(source)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    code, out, err = run(source, tmp_path / "a" / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    assert re.search(message, err), err
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_no_number_is_named(small, tmp_path, run, value):
    source = Path(shutil.copytree(small, tmp_path / "in"))
    edit(source, lambda t: t[WEIGHT][3].fill_(value))
    code, out, err = run(source, tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{WEIGHT} holds NaN or infinite values" in err and f"; remove {tmp_path / 'out'}, which" in err


def test_inputs_and_arguments_that_are_refused(small, tmp_path, run):
    fp8 = make_hf(tmp_path / "fp8", "v3", "fp8", **SMALL)
    convert.convert(small, tmp_path / "shards", 1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("precious")
    for source, target, flags, message in (
        (fp8, "x", (), "already in FP8"),
        (tmp_path / "shards", "x", (), "already converted, for 1 ranks"),
        (small, "used", (), "not empty"),
        (small, small / "out", (), "would lie inside the input"),
        (small, "x", ("--scale-fmt", "e8m0"), "invalid choice: 'e8m0'"),
    ):
        before = sorted(tmp_path.rglob("*")), sorted(small.rglob("*"))
        code, _, err = run(source, tmp_path / target, *flags)
        assert code == 2 and message in err, err
        assert (sorted(tmp_path.rglob("*")), sorted(small.rglob("*"))) == before
