"""
How fast the converters are against `cp` of the same folder on the same disk, and how much memory they take:

    python benchmarks/converters.py --folder DIR [--rounds 3] [--layers 2] [--experts 192]

writes a synthetic checkpoint with DeepSeek-V3's tensor sizes, of so many layers and experts, into DIR. A round is then
`cp`, convert.py, convert.py --to-hf, fp8_cast_bf16.py and bf16_cast_fp8.py, each in a process of its own under
`/usr/bin/time -v`, with the input out of the system's cache before and the output synced to the disk at the end. The
last line is JSON with the medians.

Rates are of bytes read and written together, so that a cast, which writes twice what it reads or half of it, compares.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "inference"))

from checkpoint import INDEX_FILE, tensor_specs  # noqa: E402
from config import ModelArgs  # noqa: E402
from errors import Arguments, positive, run_command  # noqa: E402
from kernel import E4M3  # noqa: E402
from output import drop_cache  # noqa: E402
from safetensors_io import Layout, SafetensorsWriter, Tensors  # noqa: E402

FILE_BYTES = 4_300_000_000  # as the released folders have them


def synthetic(folder: Path, args: ModelArgs, config: dict, seed: int = 0) -> Path:
    """A Hugging Face folder of random weights: the names, shapes and types of `args`, no tensor twice the same."""
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[Tensors] = [{}]
    size = 0
    for spec in tensor_specs(args).values():
        dtype = torch.bfloat16 if spec.name.endswith("gate.weight") else spec.dtype
        nbytes = torch.Size(spec.shape).numel() * dtype.itemsize
        if size + nbytes > FILE_BYTES and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][spec.hf_name] = dtype, spec.shape
        size += nbytes
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1 << 22, generator=generator)
    stock = {dtype: noise.to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    stock[E4M3] = (noise * 64).to(E4M3)
    count = 0

    def rows(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal count
        count += 1
        numel = torch.Size(shape).numel()
        values = stock[dtype].view(torch.uint8 if dtype == E4M3 else dtype).roll(count * 4099)
        return values.repeat(-(-numel // len(values)))[:numel].view(dtype).view(shape)

    weight_map = {}
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):06}.safetensors"
        with SafetensorsWriter(folder / name, Layout(tensors), {}) as writer:
            for key, (dtype, shape) in tensors.items():
                step = max(1, (64 << 20) // (torch.Size(shape[1:]).numel() * dtype.itemsize))
                for first in range(0, shape[0], step):
                    values = rows(dtype, (min(step, shape[0] - first), *shape[1:]))
                    writer.write(key, values.abs() * 1e-4 if key.endswith("_scale_inv") else values, first)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def v3_config(layers: int, experts: int) -> dict:
    """DeepSeek-V3's config.json, with fewer layers, the first of them dense, and fewer experts."""
    args = ModelArgs.load(ROOT / "configs" / "config_671B.json")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.inter_dim,
        "moe_intermediate_size": args.moe_inter_dim,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1,
        "num_attention_heads": args.n_heads,
        "n_routed_experts": experts,
        "n_shared_experts": args.n_shared_experts,
        "num_experts_per_tok": args.n_activated_experts,
        "n_group": args.n_expert_groups,
        "topk_group": args.n_limited_groups,
        "routed_scaling_factor": args.route_scale,
        "scoring_func": args.score_func,
        "q_lora_rank": args.q_lora_rank,
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_nope_head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim,
        "v_head_dim": args.v_head_dim,
        "max_position_embeddings": args.max_seq_len,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def timed(command: list, source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time and GB of peak memory of a command that makes `target` of `source`."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    for path in source.iterdir():
        drop_cache(path)
    report = source.parent / "time.txt"
    began = time.perf_counter()
    # A process started by this one counts this one's memory as its own peak; one that `time` starts does not.
    line = ["/usr/bin/time", "-v", "-o", report, *command]
    done = subprocess.run(list(map(str, line)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    os.sync()
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{command}: {done.stderr[-2000:]}")
    said = dict(line.strip().rsplit(": ", 1) for line in report.read_text().splitlines())
    cpu = sum(float(said[f"{kind} time (seconds)"]) for kind in ("User", "System"))
    return seconds, cpu, int(said["Maximum resident set size (kbytes)"]) * 1024 / 1e9


def main() -> None:
    parser = Arguments(description="Rate and memory of the converters against cp.")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; takes 4 times the input")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N")
    parser.add_argument("--layers", type=positive, default=2, metavar="N", help="the first is dense (default 2)")
    parser.add_argument("--experts", type=positive, default=192, metavar="N", help="of a layer (default 192: 13 GB)")
    parser.add_argument("--model-parallel", type=positive, default=8, metavar="N")
    options = parser.parse_args()
    fp8, copy, shards, back, bf16, again = (
        options.folder / name for name in ("fp8", "copy", "shards", "back", "bf16", "again")
    )
    config = v3_config(options.layers, options.experts)
    synthetic(fp8, ModelArgs.from_hf(config), config)
    scripts = {path.stem: [sys.executable, path] for path in (ROOT / "inference").glob("*.py")}
    convert, cast, quantise = (scripts[name] for name in ("convert", "fp8_cast_bf16", "bf16_cast_fp8"))
    cpu = ["--device", "cpu"]
    cases = {  # name -> command, what it reads, what it writes, what is not needed any more
        "cp": (["cp", "-r", fp8, copy], fp8, copy, [copy]),
        "convert": (
            [*convert, "--hf-ckpt-path", fp8, "--save-path", shards, "--model-parallel", options.model_parallel],
            fp8,
            shards,
            [],
        ),
        "convert --to-hf": (
            [*convert, "--to-hf", "--shards-path", shards, "--save-path", back],
            shards,
            back,
            [shards, back],
        ),
        "fp8_cast_bf16": (
            [*cast, "--input-fp8-hf-path", fp8, "--output-bf16-hf-path", bf16, *cpu],
            fp8,
            bf16,
            [],
        ),
        "bf16_cast_fp8": (
            [*quantise, "--input-bf16-hf-path", bf16, "--output-fp8-hf-path", again, *cpu],
            bf16,
            again,
            [bf16, again],
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    peaks = dict.fromkeys(cases, 0.0)
    for number in range(1, options.rounds + 1):
        for name, (command, source, target, remove) in cases.items():
            seconds, cpu, peak = timed(command, source, target)
            moved = (folder_bytes(source) + folder_bytes(target)) / 1e9
            rates[name].append(moved / seconds)
            peaks[name] = max(peaks[name], peak)
            line = f"round {number}  {name:16} {moved:6.1f} GB moved in {seconds:6.1f} s, {cpu:6.1f} s of CPU time"
            print(f"{line}  {rates[name][-1]:5.2f} GB/s  peak memory {peak:.2f} GB", flush=True)
            for folder in remove:
                shutil.rmtree(folder)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name in cases:
        print(f"{name:16} {medians[name]:5.2f} GB/s  {medians[name] / medians['cp']:5.0%} of cp")
    shutil.rmtree(fp8)
    result = {"gb_per_s": medians, "of_cp": {name: medians[name] / medians["cp"] for name in cases}, "peak_gb": peaks}
    print(json.dumps(result | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    run_command(main)
