"""plan.py: its figures against formulas by hand, the model itself and files on disk; what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import convert
import fp8_cast_bf16
import llm
import plan
from checkpoints import SMALL, make_hf
from config import ModelArgs
from errors import run_command
from model import Transformer
from parallel import Parallel

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem.removeprefix("config_") for path in (ROOT / "configs").glob("*.json"))


def config(name: str) -> Path:
    return ROOT / "configs" / f"config_{name}.json"


def parts(name: str, mp: int = 1, expert_parallel: bool = False) -> Mapping[str, plan.Part]:
    return plan.weight_parts(ModelArgs.load(config(name)), mp, expert_parallel)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_hf(tmp_path_factory.mktemp("small"), "v3", "fp8", mtp=1, **SMALL)


@pytest.fixture
def run(capsys, monkeypatch):
    """plan.py with these arguments: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, argv)])
        code = 0
        try:
            run_command(plan.main)
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


# --- against formulas -------------------------------------------------------------------------------------------------

# Attention by hand: queries (through a latent of 1536 and its norm), wkv_a of 512 + 64 and its norm, wkv_b, wo.
V3_ATTENTION = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
V2_ATTENTION = 5120 * 1536 + 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 5120
LITE_ATTENTION = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048

# Embedding, head, last norm; each layer's attention and two norms; dense MLPs; gates, shared and routed experts.
V3 = 2 * 129280 * 7168 + 7168 + 61 * (V3_ATTENTION + 2 * 7168) + 3 * 3 * 7168 * 18432
V3 += 58 * (256 * 7168 + 256 + (1 + 256) * 3 * 7168 * 2048)
V2 = 2 * 102400 * 5120 + 5120 + 60 * (V2_ATTENTION + 2 * 5120) + 3 * 5120 * 12288
V2 += 59 * (160 * 5120 + (2 + 160) * 3 * 5120 * 1536)
LITE = 2 * 102400 * 2048 + 2048 + 27 * (LITE_ATTENTION + 2 * 2048) + 3 * 2048 * 10944
LITE += 26 * (64 * 2048 + (2 + 64) * 3 * 2048 * 1408)

# A token leaves out all but one row of the embedding, and the experts that it does not choose.
V3_ACTIVE = V3 - 129279 * 7168 - 58 * (256 - 8) * 3 * 7168 * 2048
V2_ACTIVE = V2 - 102399 * 5120 - 59 * (160 - 6) * 3 * 5120 * 1536
LITE_ACTIVE = LITE - 102399 * 2048 - 26 * (64 - 6) * 3 * 2048 * 1408

# An MoE layer, three norms, and the projection of two vectors to one.
MTP = V3_ATTENTION + 5 * 7168 + 256 * 7168 + 256 + 257 * 3 * 7168 * 2048 + 2 * 7168 * 7168


@pytest.mark.parametrize(
    "name, total, active, mtp, published",
    [
        ("16B", LITE, LITE_ACTIVE, 0, (15.7, 2.4)),
        ("236B", V2, V2_ACTIVE, 0, (236, 21)),
        ("671B", V3, V3_ACTIVE, MTP, (671, 37)),
        ("v3.1", V3, V3_ACTIVE, MTP, (671, 37)),
    ],
)
def test_parameters(name, total, active, mtp, published):
    main = dict(parts(name))
    apart = main.pop("MTP")
    assert sum(part.parameters for part in main.values()) == total
    assert sum(part.active for part in main.values()) == active
    assert apart.parameters == mtp
    assert (total / 1e9, active / 1e9) == pytest.approx(published, rel=0.025)


def test_bytes_per_token():
    gates = 26 * 64 * 2048
    cache = 27 * 1000 * 576 * 2
    assert plan.bytes_per_token(ModelArgs.load(config("16B")), 1, False, 1000) == 2 * LITE_ACTIVE + 2 * gates + cache
    v3 = ModelArgs.load(config("671B"))
    without = plan.bytes_per_token(replace(v3, n_mtp_layers=0), 1, False, 1000)
    assert plan.bytes_per_token(v3, 1, False, 1000) == without  # no drafts
    # In FP8 a byte a weight and 4 for each 128 x 128 of them; a rank reads its eighth of each of 8 experts.
    expert = 3 * 7168 * 2048
    assert parts("671B", 8)["routed experts"].read == 58 * (expert + expert // 128**2 * 4)
    # Whole experts: of 6 on 4 ranks, some rank has 2.
    assert parts("236B", 4, True)["routed experts"].read == 59 * 2 * 3 * 5120 * 1536 * 2


# --- against the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mp, expert_parallel", [(1, False), (8, False)])
@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_the_models(name, mp, expert_parallel):
    check_memory_of_model(ModelArgs.load(config(name)), mp, expert_parallel)


@pytest.mark.parametrize("dtype", ["fp8", "fp32"])
def test_memory_with_whole_experts_and_fp32(small, dtype):
    args = ModelArgs.load(small / "config.json")
    for mp, expert_parallel in ((2, True), (2, False), (1, False)):
        check_memory_of_model(replace(args, dtype=dtype), mp, expert_parallel)


def check_memory_of_model(args: ModelArgs, mp: int, expert_parallel: bool) -> None:
    needs = plan.memory(args, mp, expert_parallel, max_batch_size=3, max_seq_len=1000)
    with torch.device("meta"):
        model = Transformer(args, Parallel(0, mp, expert_parallel))
        assert needs.cache == model.new_cache(3, 1000).nbytes
    assert needs.weights == sum(p.nbytes for p in model.parameters())
    assert needs.total == needs.weights + needs.cache + needs.workspace


@pytest.mark.parametrize("mtp", [None, 3])
def test_generate_refuses_by_the_same_figures(small, monkeypatch, mtp):
    class Asked(Exception):
        pass

    def check_memory(*figures):
        raise Asked(*figures[:3])

    monkeypatch.setattr(llm, "check_memory", check_memory)
    with pytest.raises(Asked) as asked:
        llm.LLM(small, device="cpu", gemm="fp8", max_batch_size=3, max_seq_len=100, mtp=mtp)
    args = ModelArgs.load(small / "config.json")
    needs = plan.memory(args, max_batch_size=3, max_seq_len=100)
    more = ((mtp or 1) - 1) * plan.SAMPLING_BYTES * 3 * args.vocab_size  # a draft has logits each
    most = plan.memory(args, max_batch_size=3, max_seq_len=100, chunk=300)
    assert most == needs != plan.memory(args, max_batch_size=3, max_seq_len=100, chunk=299)
    assert args.n_mtp_layers == 1 and asked.value.args == (needs.weights, needs.cache, needs.workspace + more)


# --- against files ----------------------------------------------------------------------------------------------------


def data_bytes(file: Path) -> int:
    """Size of a safetensors file less its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_disk_is_the_files(small, tmp_path, expert_parallel):
    fp8 = ModelArgs.load(small / "config.json")
    assert plan.folder_bytes(fp8) == data_bytes(small / "model.safetensors")
    fp8_cast_bf16.cast(small, tmp_path / "bf16", torch.device("cpu"))
    bf16 = ModelArgs.load(tmp_path / "bf16" / "config.json")
    assert plan.folder_bytes(bf16) == data_bytes(tmp_path / "bf16" / "model.safetensors")
    for source, args in ((small, fp8), (tmp_path / "bf16", bf16)):
        target = tmp_path / f"{args.dtype}-shards"
        convert.convert(source, target, 2, expert_parallel)
        for file in ("model0-mp2.safetensors", "model1-mp2.safetensors"):
            assert plan.shard_bytes(args, 2, expert_parallel) == data_bytes(target / file)


# --- the command ------------------------------------------------------------------------------------------------------


def test_report(run):
    code, out, err = run("--config", config("671B"), "--model-parallel", 8, "--gpu-memory", 80, "--max-seq-len", 4096)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    row = next(line for line in lines if line[:2] == ["main", "model"])
    assert row[2:4] == ["671.026", "36.626"]
    assert "does not fit in 80 GB" in out and "--model-parallel 16 is enough" in out
    assert "numbers of ranks that work: 1, 2, 4, 8, 16\n" in out
    assert "not 32, 64: layers.0.ffn.w1.weight: 18432 rows cannot be split in multiples of 128" in out
    needs = plan.bytes_per_token(ModelArgs.load(config("671B")), 8, False, 4096)
    assert f"at least {needs / 4.3e9:.3g} ms" in out and "4.3 TB/s, which a copy reaches on an H200" in out
    enough = run("--config", config("16B"), "--gpu-memory", 80, "--bandwidth", 2)[1]
    assert "\nfits in 80 GB" in enough and "at 2 TB/s\n" in enough and "H200" not in enough
    assert "no number of ranks is enough" in run("--config", config("16B"), "--gpu-memory", 1)[1]


def test_checkpoint_folders(run, small, tmp_path):
    code, out, _ = run("--ckpt-path", small, "--model-parallel", 2)
    assert code == 0 and f"{small}: fp8 weights, 2 ranks\n" in out and "in 1 file, with headers" in out
    convert.convert(small, tmp_path / "shards", 2, expert_parallel=True)
    code, out, _ = run("--ckpt-path", tmp_path / "shards")  # as it was converted
    assert code == 0 and "2 ranks, whole experts each\n" in out and "in 2 files" in out
    code, _, err = run("--ckpt-path", tmp_path / "shards", "--model-parallel", 4)
    assert code == 2 and err.startswith("error: --model-parallel 4: ") and "converted for 2 ranks" in err


def test_transformers_is_not_imported():
    code = "import sys, llm, plan; plan.main(); assert 'transformers' not in sys.modules"
    argv = [sys.executable, "-c", code, "--config", str(config("16B"))]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "inference")}
    process = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert "15.706" in process.stdout


@pytest.mark.parametrize(
    "argv, complaint",
    [
        (
            ["--model-parallel", 3],
            "embed.weight: 102400 rows cannot be split over 3 ranks; numbers of ranks that work: 1",
        ),
        (["--model-parallel", 32, "--expert-parallel"], "3072 rows cannot be split over 32 ranks in multiples of 192"),
        (["--model-parallel", 0], "--model-parallel 0: wanted a positive number"),
        (["--max-batch-size", -1], "--max-batch-size -1: wanted a positive number"),
        (["--max-batch-size", 10**400], "wanted a positive number below 2^31"),
        (["--max-seq-len", 16385], "--max-seq-len 16385: wanted 2 to 16384"),
        (["--max-seq-len", 1], "--max-seq-len 1: wanted 2 to"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: wanted a positive number"),
        (["--bandwidth", 0], "--bandwidth 0.0: wanted a positive number"),
    ],
)
def test_refusals(run, argv, complaint):
    code, out, err = run("--config", config("16B"), *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err


def test_refused_files(run, small, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    fields = json.loads(config("16B").read_text())
    (tmp_path / "unknown.json").write_text(json.dumps(fields | {"n_layer": 3}))
    shutil.copytree(small, tmp_path / "deeper")
    deeper = json.loads((small / "config.json").read_text()) | {"num_hidden_layers": 5}
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(deeper))
    for argv, complaint in (
        (["--ckpt-path", tmp_path / "deeper"], "does not fit its config"),
        (["--config", tmp_path / "absent.json"], "no such file"),
        (["--config", tmp_path], "not a file"),
        (["--config", tmp_path / "list.json"], "wanted a JSON object"),
        (["--config", tmp_path / "unknown.json"], "unknown field 'n_layer'"),
        (["--ckpt-path", tmp_path / "absent"], "no such folder"),
        (["--ckpt-path", tmp_path], "no config.json"),
        (["--ckpt-path", small, "--model-parallel", 3], "embed.weight: 328 rows cannot be split over 3 ranks"),
    ):
        code, out, err = run(*argv)
        assert (code, out) == (2, "") and err.count("\n") == 1 and complaint in err, err
    assert run()[0] == 2
    assert run("--config", config("16B"), "--ckpt-path", small)[0] == 2
