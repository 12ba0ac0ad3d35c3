"""benchmark.py: its floors against the published figures, its dummy weights, its output, what it refuses."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import benchmark
import benchmark_kernels
from checkpoints import SMALL, make_hf
from config import ModelArgs
from dummy import fill_dummy
from errors import run_command
from kernel import E4M3, weight_dequant_ref
from model import Gate, Transformer
from parallel import Parallel
from plan import decode_bytes, experts_hit, floor_seconds, prefill_flops
from sampling import Sampling, SamplingParams

ROOT = Path(__file__).parents[1]
CONFIG = {
    "vocab_size": 520,
    "dim": 512,
    "inter_dim": 768,
    "moe_inter_dim": 256,
    "n_layers": 4,
    "n_dense_layers": 1,
    "n_heads": 4,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "n_activated_experts": 4,
    "route_scale": 2.5,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "q_lora_rank": 256,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
    "score_func": "sigmoid",
    "n_mtp_layers": 1,
    "dtype": "fp8",
}


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """benchmark.py with these arguments: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, argv)])
        code = 0
        try:
            run_command(benchmark.main)
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run


# --- floors -----------------------------------------------------------------------------------------------------------


def cut(name: str, n_layers: int | None = None) -> ModelArgs:
    args = ModelArgs.load(ROOT / "configs" / f"config_{name}.json")
    return replace(args, n_layers=n_layers or args.n_layers)


@pytest.mark.parametrize(
    "args, gpus, rows, ms",
    [
        (cut("671B", 8), 1, 1, 1.56),
        (cut("671B", 8), 1, 8, 4.10),
        (cut("671B", 8), 1, 64, 12.69),
        (cut("16B"), 1, 1, 1.15),
        (cut("671B", 16), 4, 1, 0.735),
    ],
)
def test_decode_floors(args, gpus, rows, ms):
    """At 4.30 TB/s, with 1,024 tokens cached."""
    found = floor_seconds(decode_bytes(args, Parallel(0, gpus), rows, 1024, 0)) * 1e3
    assert found == pytest.approx(ms, rel=0.005)


def test_prefill_floor():
    """V3's 3 dense and 5 MoE layers by hand, 8 prompts of 1,024 tokens."""
    fp8, wide = prefill_flops(cut("671B", 8), 1, 8, 1024)
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 16384 * 7168
    weights = 8 * attention + 3 * 3 * 7168 * 18432 + 5 * 9 * 3 * 7168 * 2048
    norms_and_biases = 8 * (2 * 7168 + 1536 + 512) + 7168 + 5 * 256
    assert fp8 == 2 * 8192 * (weights + norms_and_biases - 5 * 256)
    scores = 2 * 8 * 128 * (192 + 128) * 8 * 1024 * 1025 / 2
    wkv_b, gates, head = 8 * 32768 * 512, 5 * (256 * 7168 + 256), 7168 * 129280
    assert wide == 2 * 8192 * (wkv_b + gates) + scores + 2 * 8 * head
    assert prefill_flops(cut("671B", 8), 4, 8, 1024) == (fp8 / 4, wide / 4)
    assert floor_seconds(0, 1.2e15, 0.767e15) == pytest.approx(2)
    assert floor_seconds(4.3e12, 1.2e14) == pytest.approx(1), "the longer of reading and computing"
    assert prefill_flops(cut("16B"), 1, 8, 1024)[0] == 0


def test_drafts_read_the_modules_and_the_head_again():
    args, parallel = cut("671B", 8), Parallel()
    more = decode_bytes(args, parallel, 1, 1024, 1, 0.5) - decode_bytes(args, parallel, 1, 1024, 0, 0.5)
    block = 187_107_328 - 16_777_216 + 2 * 16_777_216  # attention, wkv_b in bf16
    experts = (1 + 256 * 0.5) * 3 * 7168 * 2048
    head_and_projection = 2 * (129280 * 7168 + 7168 * 14336)
    gate_norms_cache = 256 * 7168 * 4 + 8 * 7168 * 2 + 1024 * 1152
    assert more == pytest.approx(block + experts + head_and_projection + gate_norms_cache, rel=1e-3)


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_experts_hit(tokens):
    args = cut("671B")
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(400, tokens, 256, generator=generator).topk(8).indices
    hit = torch.zeros(400, 256).scatter(1, chosen.flatten(1), 1).mean().item()
    assert experts_hit(args, tokens) == pytest.approx(hit, rel=0.01)
    assert experts_hit(replace(args, n_routed_experts=0, n_dense_layers=61, n_mtp_layers=0), 5) == 0


# --- dummy weights ----------------------------------------------------------------------------------------------------


def dummy(parallel: Parallel = Parallel(), **fields: object) -> Transformer:  # noqa: B008, frozen
    args = ModelArgs.from_dict(CONFIG | fields)
    model = Transformer(args, parallel)
    for parameter in model.parameters():
        parameter.view(torch.uint8).fill_(0xFF)
    fill_dummy(model)
    return model


@torch.inference_mode()
def test_dummy_weights_behave():
    """Sizes stay, and tokens spread over the experts. The FP8 model as its dequantised twin, which a CPU can run."""
    model = dummy(dtype="bf16")
    tokens = torch.randint(520, (8, 32), generator=torch.Generator().manual_seed(0))
    loads = benchmark.expert_loads(model, lambda: model.hidden(tokens, model.step(tokens.shape)))
    assert len(loads) == 3 and all(load.sum() == 8 * 32 * 4 for load in loads)
    for load in loads:
        assert load.max() < 3 * load.float().mean() and (load > 0).float().mean() > 0.9, load
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, Gate))
    h = model.hidden(tokens, model.step(tokens.shape)).float()
    assert 0.9 < h.square().mean().sqrt() < 1.1 and h.isfinite().all(), "a norm's output"
    assert torch.corrcoef(h[:, -1]).fill_diagonal_(0).abs().max() < 0.5, "rows stay distinct"
    logits = model.logits(h.bfloat16()[:, -1])
    assert 0.5 < logits.std() < 2 and len(set(logits.argmax(-1).tolist())) > 4


def test_dummy_values():
    model = dummy()
    parameters = dict(model.named_parameters())
    for name, p in parameters.items():
        assert p.float().isfinite().all(), name
        if p.dtype == E4M3:
            scale = parameters[name.removesuffix("weight") + "scale"]
            for weight, scales in zip(p.view(-1, *p.shape[-2:]), scale.view(-1, *scale.shape[-2:]), strict=True):
                wide = weight_dequant_ref(weight, scales, torch.float32)
                assert wide.std() == pytest.approx(p.shape[-1] ** -0.5, rel=0.2), name
            assert p.float().abs().max() > 300 and len(scale.unique()) == scale.numel()
        elif name.endswith("norm.weight"):
            assert (p == 1).all(), name
        elif name.endswith("gate.weight"):
            assert p.std() == pytest.approx(512**-0.5, rel=0.1)
    assert parameters["embed.weight"].float().std() == pytest.approx(1, rel=0.05)
    assert 0 < parameters["layers.1.ffn.gate.bias"].abs().max() < 0.1


def test_dummy_ranks_agree_on_what_they_share():
    one, two = (dict(dummy(Parallel(rank, 2), dtype="bf16").named_parameters()) for rank in (0, 1))
    whole = dict(dummy(dtype="bf16").named_parameters())
    for name in one:
        shared = one[name].shape == whole[name].shape
        assert torch.equal(one[name], two[name]) is shared, name
        assert not shared or torch.equal(one[name], whole[name]), name
    assert {"layers.1.ffn.gate.weight", "mtp.0.eh_proj.weight"} <= {n for n in one if torch.equal(one[n], two[n])}


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.85, 1.0])
def test_the_accept_rate(rate):
    B, N, V = 4000, 3, 11
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, N + 1, V, generator=generator)
    drafts = torch.randint(V, (B, N), generator=generator)
    sampling = Sampling.of([SamplingParams(0.0)] * B, torch.arange(B))
    new, n = benchmark.accepting(rate)(logits, None, drafts, sampling, torch.full((B,), 7))
    for i in range(N):  # of those that kept the first i
        assert abs(int((n > i).sum()) - rate * int((n >= i).sum())) <= 4 * math.sqrt(rate * (1 - rate) * B)
    best = logits.argmax(-1)
    for row in range(50):
        kept = int(n[row])
        assert new[row, :kept].equal(drafts[row, :kept]) and new[row, kept] == best[row, kept]
    _, m = benchmark.accepting(rate)(logits, None, drafts, sampling, torch.full((B,), 8))
    assert rate in (0, 1) or not torch.equal(n, m)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_seq_len", "largest"), [(None, (64, 1 + (benchmark.WARM_STEPS + 6) * 2)), (2048, (64, 2048))]
)
def test_the_case_that_memory_is_checked_for(max_seq_len, largest):
    """--max-seq-len is that of every case, so then the one of the most rows; else tokens count as well."""
    options = argparse.Namespace(batch_size=[1, 64], prompt_len=[1], prefill=[(1, 1000)], steps=2, mtp=1)
    options.max_seq_len = max_seq_len
    args = ModelArgs.load(ROOT / "configs/config_16B.json")
    assert benchmark.largest_case(options, args) == largest
    options.prefill = [(1, 2000)]
    assert benchmark.largest_case(options, args) == (largest if max_seq_len else (1, 2001))


def test_it_prints_every_case_and_json(run, config, tmp_path):
    trace = tmp_path / "trace.json"
    argv = "--dummy-weights --n-layers 3 --batch-size 1 3 --prompt-len 20 --prefill 2x24 --steps 3".split()
    code, out, err = run("--config", config, *argv, "--mtp", 2, "--accept-rate", 1, "--profile", trace)
    assert code == 0, err
    lines = out.splitlines()
    found = json.loads(lines[-1])
    assert [case["case"] for case in found["cases"]] == ["decode 1 x 20", "decode 3 x 20", "prefill 2 x 24"]
    assert (found["n_layers"], found["mtp"], found["gpus"], found["dtype"], found["device"]) == (3, 2, 1, "bf16", "CPU")
    parts = {"import", "allocate", "weights", "compile", "capture", "first_token", "weights_gb_per_s"}
    assert set(found["startup"]) == parts
    assert found["startup"]["first_token"] > found["startup"]["weights"] > 0
    one, three, prefill = found["cases"]
    assert one["tokens_per_step"] == three["tokens_per_step"] == 3.0, "every draft is accepted"
    for rows, case in ((1, one), (3, three)):
        assert case["tokens_per_s"] == pytest.approx(rows * 3 / case["engine_ms"] * 1e3)
        assert 4 / 32 <= case["experts_hit"] <= 1 and case["ms"] > 0
    assert prefill["tokens_per_s"] == pytest.approx(48 / prefill["ms"] * 1e3)
    assert all(case["floor_ms"] is None and case["over_floor"] is None for case in found["cases"]), "unknown on a CPU"
    table = next(line for line in lines if "tokens/s" in line)
    assert "floor" not in table and "engine ms" in table
    assert [Path(path).name for path in found["traces"]] == ["trace-decode1x20.json", "trace-prefill2x24.json"]
    for path in found["traces"]:
        assert json.loads(Path(path).read_text())["traceEvents"]
    assert out.count("us a step in") == 2 and "aten::" in out


def test_real_weights(run, tmp_path):
    folder = make_hf(tmp_path / "real", "v3", "bf16", mtp=1, **SMALL)
    code, out, err = run("--ckpt-path", folder, *"--batch-size 2 --prompt-len 9 --prefill --steps 2 --mtp 1".split())
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    assert [case["case"] for case in found["cases"]] == ["decode 2 x 9"]
    assert 1 <= found["cases"][0]["tokens_per_step"] <= 2


def test_one_rank_alone(run, config):
    config.write_text(json.dumps(CONFIG | {"dtype": "bf16"}))  # its FP8 blocks would not split
    argv = "--dummy-weights --batch-size 2 --prompt-len 20 --prefill 2x24 --steps 2 --mtp 1 --alone-of 2".split()
    code, out, err = run("--config", config, *argv)
    assert code == 0, err
    assert "rank 0 of 2 alone: no sums over the ranks" in out
    found = json.loads(out.splitlines()[-1])
    assert (found["gpus"], found["alone_of"]) == (1, 2)
    assert [case["case"] for case in found["cases"]] == ["decode 2 x 20", "prefill 2 x 24"]
    code, out, err = run("--config", config, *argv[:-2])
    assert found["weights_gb"] < 0.6 * json.loads(out.splitlines()[-1])["weights_gb"], "half, and what all ranks have"


def test_a_lone_rank_computes_its_share(monkeypatch):
    """As a rank of two does that gets nothing from the other: of a sum its own terms, of the logits its own."""
    ranks, lone = Parallel(0, 2), benchmark.LoneRank(0, 2)
    monkeypatch.setattr(dist, "all_reduce", lambda x, group: None)
    monkeypatch.setattr(dist, "all_gather", lambda parts, x, group: [part.copy_(x) for part in parts])
    monkeypatch.setattr(dist, "broadcast", lambda x, source, group: None)
    found = []
    for parallel in (ranks, lone):
        model = dummy(parallel, dtype="fp32")
        tokens = torch.arange(12).view(2, 6)
        with torch.inference_mode():
            step = model.step(tokens.shape)
            h = model.hidden(tokens, step)
            found.append((h, model.logits(h), model.draft(0, h, tokens, step)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[1][1].shape == (2, 6, 520)
    bench = SimpleNamespace(args=model.args, options=SimpleNamespace(alone_of=2))
    assert max(map(max, benchmark.prompts(bench, 9, 99))) < 260, "it has no embedding of the others"
    x = torch.randn(3, 4)
    assert lone.broadcast(x) is x and lone.all_reduce(x) is x


def test_peers_stand_next_to_our_figures(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    options = SimpleNamespace(config=Path("configs/config_671B.json"), mtp=0, alone_of=None)
    bench = SimpleNamespace(on_gpu=True, options=options, args=cut("671B", 8), parallel=Parallel())
    figures = {"engine_ms": 2.0, "tokens_per_s": 500.0}
    ours = benchmark.result(bench, "decode 1 x 1024", 1.9e-3, 1.56e-3, **figures)
    assert (ours.vllm_ms, ours.demo_ms, ours.target_ms) == (2.52, 24.8, 1.85)
    assert ours.over_floor == pytest.approx(1.9 / 1.56) and ours.peak_gb == 5
    assert "2.52" in benchmark.report([ours]) and "target ms" in benchmark.report([ours])
    assert benchmark.result(bench, "decode 3 x 1024", 1.9e-3, 1.56e-3, **figures).vllm_ms is None
    drafting = SimpleNamespace(config=options.config, mtp=1, alone_of=None)
    alone = SimpleNamespace(config=options.config, mtp=0, alone_of=1)
    changes = {"parallel": Parallel(0, 4)}, {"args": cut("671B", 9)}, {"options": drafting}, {"options": alone}
    for change in changes:
        other = SimpleNamespace(**vars(bench) | change)
        assert benchmark.result(other, "decode 1 x 1024", 1.9e-3, 1.56e-3, **figures).vllm_ms is None
    monkeypatch.setattr(benchmark, "PEERS", Path("nowhere.json"))
    alone = benchmark.result(bench, "decode 1 x 1024", 1.9e-3, 1.56e-3, **figures)
    assert alone.vllm_ms is None and alone.over_floor == ours.over_floor, "inference/ may be all there is"


BAD = {
    "config without weights": (["--config", "CONFIG"], "add --dummy-weights"),
    "no such config": (["--config", "nowhere.json", "--dummy-weights"], "nowhere.json: no such file"),
    "no such checkpoint": (["--ckpt-path", "nowhere"], "nowhere: no such folder"),
    "a cut checkpoint": (["--ckpt-path", "nowhere", "--n-layers", 2], "--n-layers cuts dummy weights only"),
    "prefill": (["--config", "CONFIG", "--dummy-weights", "--prefill", "8*4"], "wanted ROWSxTOKENS"),
    "empty prefill": (["--config", "CONFIG", "--dummy-weights", "--prefill", "0x4"], "wanted ROWSxTOKENS"),
    "no case": (["--config", "CONFIG", "--dummy-weights", "--batch-size", "--prefill"], "nothing to time"),
    "drafts": (["--config", "CONFIG", "--dummy-weights", "--mtp", -1], "--mtp -1: wanted 0 to 16"),
    "one rank of a checkpoint": (["--ckpt-path", "nowhere", "--alone-of", 2], "--alone-of is for dummy weights"),
    "one rank of one": (["--config", "CONFIG", "--dummy-weights", "--alone-of", 1], "one rank is alone without it"),
    "one rank of too many": (["--config", "CONFIG", "--dummy-weights", "--alone-of", 3], "over 3 ranks"),
    "acceptance": (["--config", "CONFIG", "--dummy-weights", "--mtp", 1, "--accept-rate", 2], "wanted 0 to 1"),
    "acceptance without drafts": (["--config", "CONFIG", "--dummy-weights", "--accept-rate", 0.5], "and --mtp"),
    "a short cache": (
        ["--config", "CONFIG", "--dummy-weights", "--max-seq-len", 9, "--prefill", "8x1024"],
        "--prefill needs 1025 tokens; --max-seq-len is 9",
    ),
    "a short cache by itself": (
        ["--config", "CONFIG", "--dummy-weights", "--max-seq-len", 9],
        "--prompt-len, with --ste",
    ),
    "a trace in no folder": (["--config", "CONFIG", "--dummy-weights", "--profile", "none/x"], "--profile none/x"),
    "a trace without a name": (["--config", "CONFIG", "--dummy-weights", "--profile", ""], "--profile .: not a file"),
    "a cache too long": (["--config", "CONFIG", "--dummy-weights", "--max-seq-len", 99999], "99999: the model has"),
    "layers it has not": (["--config", "CONFIG", "--dummy-weights", "--n-layers", 99], "--n-layers 99: the model has"),
    "too long": (["--config", "CONFIG", "--dummy-weights", "--prompt-len", 99999], "positions"),
    "no modules": (["--config", "16B", "--dummy-weights", "--mtp", 1, "--n-layers", 1], "has no MTP modules"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(run, config, case):
    argv, message = BAD[case]
    named = {"CONFIG": config, "16B": ROOT / "configs" / "config_16B.json"}
    code, out, err = run(*(named.get(arg, arg) for arg in argv))
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and message in err and not out


# --- kernels ----------------------------------------------------------------------------------------------------------


def test_kernels_run_over_cold_operands():
    device = torch.device("cpu")
    timing = benchmark_kernels.gemm(4, 256, 384, device, cold_bytes=300_000)
    assert timing.shape == "256 x 384, M 4" and timing.us > 0
    assert timing.tflops == pytest.approx(2 * 4 * 256 * 384 / timing.us / 1e6)
    timing = benchmark_kernels.mla(4, 2, 64, 2, device, cold_bytes=300_000)
    assert timing.tb_per_s == pytest.approx(2 * 64 * 576 * 2 / timing.us / 1e6)
    assert [benchmark_kernels.copies(n, 256) for n in (1, 100, 128, 256, 1000)] == [256, 3, 2, 2, 2]
    _, weights = benchmark_kernels.gemm_operands(1, 128, 256, 3, device)
    assert len({w.data_ptr() for w, _ in weights}) == len({s.data_ptr() for _, s in weights}) == 3


def test_every_peer_is_met(monkeypatch):
    made = benchmark_kernels.Timing
    monkeypatch.setattr(benchmark_kernels, "gemm", lambda M, N, K, device: made("gemm", f"{N} {K} {M}", 1, 1, 1))
    monkeypatch.setattr(benchmark_kernels, "grouped_gemm", lambda *case: made("grouped", str(case[:4]), 1, 1, 1))
    monkeypatch.setattr(benchmark_kernels, "moe", lambda *case: made("moe", str(case[:5]), 1, 1, 1))
    monkeypatch.setattr(benchmark_kernels, "mla", lambda *case: made("mla", str(case[:4]), 1, 1, 1))
    monkeypatch.setattr(benchmark_kernels, "all_reduce", lambda *case: made("sum", str(case[:2]), 1, 1, 1))
    found = list(benchmark_kernels.timings(Parallel(), torch.device("cpu")))
    peers = {timing.shape: timing.peer_us for timing in found}
    assert (peers["4096 7168 8"], peers["512 7168 1"], peers["(128, 64, 4096, 2)"]) == (11.9, None, 268)
    assert peers["(32, 1024, 4096, 7168)"] == 1606
    assert len(found) == 7 * 5 + 2 + 4 + 9 * 2
    four = list(benchmark_kernels.timings(Parallel(0, 4), torch.device("cpu")))
    assert [timing.peer_us for timing in four] == [22.8, 22.5, 28.7, 69.2, 310]
    assert all(t.peer_us is None for t in benchmark_kernels.timings(Parallel(0, 2), torch.device("cpu")))


def test_grouped_kernels_are_set_up_as_the_model_does(monkeypatch):
    """All but the launch, which needs a GPU."""
    monkeypatch.setattr(benchmark_kernels, "COLD_BYTES", 1)
    monkeypatch.setattr(benchmark_kernels, "timed", lambda kernel, shape, calls, *_: (kernel, shape, len(calls)))
    cpu = torch.device("cpu")
    assert benchmark_kernels.grouped_gemm(3, 4, 128, 256, cpu) == ("grouped_gemm", "3 x 128 x 256, 4 rows each", 2)
    assert benchmark_kernels.moe(5, 8, 2, 128, 256, cpu)[0::2] == ("experts", 2)


@pytest.mark.gpu
@pytest.mark.xdist_group("jobs")
def test_on_a_gpu():
    argv = [ROOT / "inference" / "benchmark.py", "--config", ROOT / "configs" / "config_671B.json", "--dummy-weights"]
    argv += "--n-layers 4 --batch-size 1 8 --prompt-len 64 --prefill 2x128 --mtp 1 --accept-rate 0.85".split()
    result = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    for case in found["cases"]:
        assert case["over_floor"] > 0.9, "faster than its floor: the floor is wrong, or something was not run"
    assert found["cases"][1]["max_over_mean"] < 16 and found["startup"]["weights"] < 30
