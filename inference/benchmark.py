"""
How fast a model decodes and prefills here, next to the floor: every weight and cache byte that a step needs read once
at BANDWIDTH, or its arithmetic done at the tensor cores' measured rate, whichever takes longer.

    python inference/benchmark.py --config configs/config_671B.json --n-layers 8 --dummy-weights
    torchrun --nproc-per-node 8 inference/benchmark.py --config configs/config_671B.json --dummy-weights --mtp 1
    python inference/benchmark.py --ckpt-path DIR --prefill 1x4096 --profile trace.json
    python inference/benchmark.py --config configs/config_671B.json --dummy-weights --alone-of 8
    python inference/benchmark.py --kernels

Dummy weights are random, made on the device, and behave like trained ones: activations keep their size from layer to
layer, and tokens spread over the experts. What they cannot do is agree with their own drafts, so acceptance is set.
Decoding is timed twice: "device" is the model's pass alone, back to back; "engine" is what a user gets, sampling and
the loop around it included. The last line of the output is the same as one JSON object.
"""

# ruff: noqa: E402  (the clock starts, and flags are answered, before the imports that take seconds)
from __future__ import annotations

import time

STARTED = time.perf_counter()

import re
from argparse import Namespace
from pathlib import Path

from config import GEMMS, MAX_DRAFTS, PREFILL_CHUNK
from errors import Arguments, InputError, answer_flags, is_first, positive, run_command


def batch_of_prompts(text: str) -> tuple[int, int]:
    """ "8x1024" -> (8, 1024)."""
    match = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if not match:
        raise InputError(f"--prefill {text!r}: wanted ROWSxTOKENS, such as 8x1024")
    return int(match[1]), int(match[2])


def parse_arguments() -> Namespace:
    parser = Arguments(description="Decode and prefill speed against the floor; or every kernel's.")
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, metavar="FILE", help="model config; with --dummy-weights")
    what.add_argument("--ckpt-path", type=Path, metavar="DIR", help="checkpoint: its real weights")
    what.add_argument("--kernels", action="store_true", help="time the kernels alone, against the peers' figures")
    add("--dummy-weights", action="store_true", help="random weights, made on the device")
    add("--n-layers", type=positive, metavar="N", help="cut the model to its first N layers (dummy weights)")
    add("--batch-size", type=positive, nargs="*", default=[1, 8, 64], metavar="N", help="decode cases (1 8 64)")
    add("--prompt-len", type=positive, nargs="+", default=[1024], metavar="N", help="tokens cached (1024)")
    add("--prefill", type=batch_of_prompts, nargs="*", metavar="ROWSxTOKENS", help="prefill cases (8x1024 1x8000)")
    add("--mtp", type=int, default=0, metavar="N", help="drafted tokens a step (default 0)")
    add("--accept-rate", type=float, metavar="P", help="share of drafts accepted; by default what the model accepts")
    add("--steps", type=positive, default=20, metavar="N", help="decode steps of a timing (default 20)")
    add("--no-cuda-graph", dest="cuda_graph", action="store_false", help="launch the kernels one by one")
    add("--max-seq-len", type=positive, metavar="N", help="tokens of a row of the cache (default: what a case needs)")
    add("--prefill-chunk", type=positive, default=PREFILL_CHUNK, metavar="N", help="prompt tokens a pass")
    add("--gemm", choices=GEMMS, default="auto", help="arithmetic of FP8 weights (default auto)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--expert-parallel", action="store_true", help="whole experts per rank instead of a slice of each")
    add("--alone-of", type=positive, metavar="N", help="one rank of N by itself, without the sums (dummy weights)")
    add("--profile", type=Path, metavar="FILE", help="chrome traces of a decode case and of prefill, top kernels")
    options = parser.parse_args()
    options.traces = []
    if options.config and not options.dummy_weights:
        raise InputError("--config names no weights: add --dummy-weights, or give --ckpt-path")
    if not options.batch_size and options.prefill == []:
        raise InputError("--batch-size and --prefill name no case: there is nothing to time")
    if options.n_layers and not options.dummy_weights:
        raise InputError("--n-layers cuts dummy weights only: a checkpoint is run whole")
    if options.alone_of and not options.dummy_weights:
        raise InputError("--alone-of is for dummy weights: what a lone rank makes of real ones means nothing")
    if options.alone_of == 1:
        raise InputError("--alone-of 1: one rank is alone without it")
    if not 0 <= options.mtp <= MAX_DRAFTS:
        raise InputError(f"--mtp {options.mtp}: wanted 0 to {MAX_DRAFTS}")
    if options.profile and (options.profile.is_dir() or not options.profile.parent.is_dir()):
        raise InputError(f"--profile {options.profile}: not a file that could be written")
    if options.accept_rate is not None and not (0 <= options.accept_rate <= 1 and options.mtp):
        raise InputError(f"--accept-rate {options.accept_rate}: wanted 0 to 1, and --mtp")
    return options


if __name__ == "__main__":
    answer_flags(parse_arguments)

import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark_kernels import PEERS, captured, figure, run_kernels, time_of
from checkpoint import Checkpoint, check_split, load_model
from config import ModelArgs
from dummy import fill_dummy
from engine import Engine, Request
from fused import add_rms_norm, argmax
from llm import allocate, weights_in_memory
from model import Gate, Transformer
from parallel import Parallel, choose_device, join_ranks, leave_ranks
from plan import decode_bytes, experts_hit, floor_seconds, prefill_flops, table
from sampling import ACCEPT, Sampling, SamplingParams, uniform, verify

WARM_STEPS = 3
PREFILLS = (8, 1024), (1, 8000)  # rows and tokens of the cases, where the model takes them


# --- the model --------------------------------------------------------------------------------------------------------


class LoneRank(Parallel):
    """One rank of several without the others: their terms are missing from its sums, their logits are its own."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def add_rms_norm(self, x, terms, weight, eps, half, **options: Any):
        return add_rms_norm(x, terms, weight, eps, **options)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(*[1] * (x.dim() - 1), self.world_size)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass
class Bench:
    """A model ready to run, and how it came to be."""

    options: Namespace
    args: ModelArgs
    model: Transformer
    parallel: Parallel
    device: torch.device
    startup: dict[str, float]
    weight_bytes: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def build(options: Namespace) -> Bench:
    """Raises InputError for options that contradict each other, and a model that does not fit."""
    startup = {"import": time.perf_counter() - STARTED}
    checkpoint = Checkpoint(options.ckpt_path) if options.ckpt_path else None
    args = checkpoint.args if checkpoint else ModelArgs.load(options.config)
    if options.n_layers:
        if options.n_layers > args.n_layers:
            raise InputError(f"--n-layers {options.n_layers}: the model has {args.n_layers}")
        args = replace(args, n_layers=options.n_layers, n_dense_layers=min(args.n_dense_layers, options.n_layers))
    if options.mtp and not args.n_mtp_layers:
        raise InputError(f"--mtp {options.mtp}: the model has no MTP modules")
    parallel, device = join_ranks(choose_device(options.device), options.expert_parallel)
    if options.alone_of:
        if parallel.world_size > 1:
            raise InputError(f"--alone-of {options.alone_of} times one process: start it without torchrun")
        load = " and a mean load of its experts" if options.expert_parallel else ""
        sums = f"rank 0 of {options.alone_of} alone: no sums over the ranks{load}"
        parallel = LoneRank(0, options.alone_of, options.expert_parallel, sums=sums)
    left_out = []
    if options.prefill is None:
        most = min(args.max_seq_len, options.max_seq_len or args.max_seq_len)  # one of them for the token that follows
        options.prefill = [case for case in PREFILLS if case[1] < most]
        left_out = [f"{rows} x {length}" for rows, length in PREFILLS if length >= most]
    check_split(args, parallel.world_size, parallel.expert_parallel)
    start = time.perf_counter()
    in_memory = replace(weights_in_memory(args, options.gemm, device), n_mtp_layers=min(args.n_mtp_layers, options.mtp))
    rows, length = largest_case(options, args)
    if left_out and is_first():
        print(f"prefill {', '.join(left_out)} left out: the cache has {most} places", file=sys.stderr)
    sizes = {"max_batch_size": rows, "max_seq_len": length, "chunk": options.prefill_chunk, "drafts": options.mtp}
    model, needs = allocate(in_memory, parallel, device, **sizes)
    bench = Bench(options, in_memory, model, parallel, device, startup, needs.weights)
    bench.synchronize()
    startup["allocate"], start = time.perf_counter() - start, time.perf_counter()
    if options.dummy_weights:
        fill_dummy(model)
    else:
        load_model(model, checkpoint, parallel)
    bench.synchronize()
    startup["weights"] = time.perf_counter() - start
    return bench


def decode_length(options: Namespace, length: int) -> int:
    """Tokens of a row of the cache for decoding at `length`: with those of all steps."""
    return length + (WARM_STEPS + options.steps + 4) * (1 + options.mtp)


def largest_case(options: Namespace, args: ModelArgs) -> tuple[int, int]:
    """Rows and tokens of the case whose cache is the largest. Raises InputError for one that the model cannot have."""
    cases = [("--prefill", rows, length + 1) for rows, length in options.prefill]
    if options.batch_size:
        lengths = [decode_length(options, length) for length in options.prompt_len]
        cases += [("--prompt-len, with --steps,", max(options.batch_size), length) for length in lengths]
    if options.max_seq_len and options.max_seq_len > args.max_seq_len:
        raise InputError(f"--max-seq-len {options.max_seq_len}: the model has {args.max_seq_len} positions")
    for flag, _, needed in cases:
        if needed > min(args.max_seq_len, options.max_seq_len or needed):
            allowed = f"--max-seq-len is {options.max_seq_len} and " if options.max_seq_len else ""
            raise InputError(f"{flag} needs {needed} tokens; {allowed}the model has {args.max_seq_len} positions")
    return max(((rows, options.max_seq_len or length) for _, rows, length in cases), key=math.prod)


def prompts(bench: Bench, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens; those that a lone rank has the embedding of."""
    generator = torch.Generator().manual_seed(seed)
    known = bench.args.vocab_size // (bench.options.alone_of or 1)
    return torch.randint(known, (rows, length), generator=generator).tolist()


def requests(bench: Bench, rows: int, length: int, max_tokens: int) -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [Request(prompt, params, i) for i, prompt in enumerate(prompts(bench, rows, length))]


def make_engine(bench: Bench, rows: int, length: int) -> Engine:
    """An engine for so many rows of at most so many tokens, prompt and completion."""
    options = bench.options
    rule = verify if options.accept_rate is None else accepting(options.accept_rate)
    settings = {"prefill_chunk": options.prefill_chunk, "cuda_graph": options.cuda_graph, "verify": rule}
    return Engine(bench.model, rows, options.max_seq_len or length, n_drafts=options.mtp, **settings)


def accepting(rate: float) -> Callable:
    """In place of sampling.verify: greedy, but a draft stays with this probability, whatever the model thinks of it."""

    def rule(logits: torch.Tensor, q: Any, drafts: torch.Tensor, sampling: Sampling, position: torch.Tensor):
        row = torch.arange(len(drafts), device=drafts.device)  # greedy rows come without a seed
        stays = uniform(row, position, drafts.shape[1], ACCEPT) < rate
        n_accepted = stays.long().cumprod(1).sum(1)
        best = argmax(logits.flatten(0, 1)).view(logits.shape[:2])
        kept = torch.arange(best.shape[1], device=best.device) < n_accepted[:, None]
        return torch.where(kept, torch.cat([drafts, best[:, -1:]], dim=1), best), n_accepted

    return rule


# --- timing -----------------------------------------------------------------------------------------------------------


def decode_pass(bench: Bench, rows: int, length: int) -> Callable[[], Any]:
    """
    One step's work on the device at a fixed context, over a cache of random latents: verify `--mtp` drafts, draft
    anew. Tokens are fixed, so every run does the same.
    """
    model, N = bench.model, bench.options.mtp
    cache = model.new_cache(rows, length + 2 * N + 1).normal_()
    tokens = torch.tensor(prompts(bench, rows, 1 + N, seed=1), device=bench.device)
    start_pos, places = torch.full((rows,), length, device=bench.device), torch.arange(rows, device=bench.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        step = model.step((rows, 1 + N), start_pos, places, length + 1 + N)
        h = model.hidden(tokens, step, cache)
        new = argmax(model.logits(h).flatten(0, 1)).view(rows, 1 + N)
        for k in range(N):
            if k >= len(model.mtp):  # the last module goes on alone, from its own output
                h, new = h[:, -1:], new[:, -1:]
                step = model.step((rows, 1), start_pos + N + 1 + k - len(model.mtp), places, length + 1 + 2 * N)
            h = model.draft(min(k, len(model.mtp) - 1), h, new, step, cache)
            new = new.clone()
            new[:, -1] = argmax(model.logits(h[:, -1]))
        return new

    return run


def expert_loads(model: Transformer, run: Callable[[], Any]) -> list[torch.Tensor]:
    """How many tokens each expert of each MoE layer gets in a run."""
    loads: list[torch.Tensor] = []

    def seen(gate: Gate, _: Any, outputs: Any) -> None:
        E = gate.weight.shape[0]
        loads.append(outputs[1][outputs[1] >= 0].bincount(minlength=E))  # below 0: the shared ones

    hooks = [module.register_forward_hook(seen) for module in model.modules() if isinstance(module, Gate)]
    run()
    for hook in hooks:
        hook.remove()
    return loads


@torch.inference_mode()
def start_up(bench: Bench, engine: Engine, rows: int, length: int) -> None:
    """
    Seconds until the first token, and which of them a second, identical batch of requests does not need: "compile" up
    to its first token, "capture" for the decode steps after that.
    """

    def batch() -> tuple[float, float]:
        bench.synchronize()
        start = time.perf_counter()
        first = 0.0
        for _ in engine.run(requests(bench, rows, length, 3 * (1 + bench.options.mtp))):
            first = first or time.perf_counter() - start
        return first, time.perf_counter() - start - first

    before = time.perf_counter() - STARTED
    cold, warm = batch(), batch()
    bench.startup["compile"], bench.startup["capture"] = (max(a - b, 0.0) for a, b in zip(cold, warm, strict=True))
    bench.startup["first_token"] = before + cold[0]


def engine_decode(bench: Bench, engine: Engine, rows: int, length: int) -> tuple[float, float, float]:
    """Seconds a step, tokens a second and tokens a step and row of the decoding loop, prompts of `length` tokens."""
    steps = bench.options.steps
    max_tokens = (WARM_STEPS + steps + 2) * (1 + bench.options.mtp)
    end = engine.stats.row_steps + (WARM_STEPS + steps) * rows
    begun: tuple[float, int] | None = None
    with closing(engine.run(requests(bench, rows, length, max_tokens))) as news:
        for _ in news:
            stats = engine.stats
            if begun is None and stats.row_steps == end - steps * rows:
                begun = time.perf_counter(), stats.row_tokens
            elif begun and stats.row_steps == end:
                seconds, tokens = time.perf_counter() - begun[0], stats.row_tokens - begun[1]
                return seconds / steps, tokens / seconds, tokens / (steps * rows)
    raise AssertionError("the requests ended before the steps did")


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """
    One case; `ms` is a decode step of the device alone, or a whole prefill, one after the other. None: unknown here.
    """

    case: str
    ms: float
    engine_ms: float
    tokens_per_s: float
    rested_ms: float | None = None  # a prefill after a pause: under long load a GPU's power limit lowers its clock
    floor_ms: float | None = None
    over_floor: float | None = None
    peak_gb: float | None = None
    tflops: float | None = None
    tokens_per_step: float | None = None
    experts_hit: float | None = None  # share of a layer's experts that a step needs, drawn by the router
    max_over_mean: float | None = None  # load of the busiest expert
    demo_ms: float | None = None  # what others reach on this case, and what we want
    vllm_ms: float | None = None
    target_ms: float | None = None


def result(bench: Bench, case: str, seconds: float, floor: float, **more: Any) -> Result:
    """A case that is done, said on stderr; with the floor and the peers' figures (peers.json), known on a GPU."""
    if is_first():
        print(f"{case}: {seconds * 1e3:.2f} ms", file=sys.stderr, flush=True)
    if not bench.on_gpu:
        return Result(case, seconds * 1e3, **more)
    more |= {"floor_ms": floor * 1e3, "over_floor": seconds / floor}
    more["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    key = {"config": (bench.options.config or bench.options.ckpt_path).stem, "n_layers": bench.args.n_layers}
    key |= {"gpus": bench.parallel.world_size, "case": case}
    comparable = PEERS.exists() and not (bench.options.mtp or bench.options.alone_of)
    rows = json.loads(PEERS.read_text())["end_to_end"] if comparable else []
    peer = next((row for row in rows if row.items() >= key.items()), {})
    more |= {name: value for name, value in peer.items() if name.endswith("_ms")}
    return Result(case, seconds * 1e3, **more)


def run_decode(bench: Bench, engine: Engine, rows: int, length: int) -> Result:
    drafts, case = bench.options.mtp, f"decode {rows} x {length}"
    run = decode_pass(bench, rows, length)
    loads = [load.float() for load in expert_loads(bench.model, run)]
    replay = captured(run) if bench.on_gpu and bench.options.cuda_graph else run
    replay()
    seconds = time_of(replay, bench.options.steps, bench.on_gpu)
    if bench.options.profile and not bench.options.traces:
        bench.options.traces.append(trace(bench, case, run, 5))
    step_seconds, tokens_per_s, tokens_per_step = engine_decode(bench, engine, rows, length)
    hit = statistics.mean((load > 0).float().mean().item() for load in loads) if loads else None
    floor = floor_seconds(decode_bytes(bench.args, bench.parallel, rows, length, drafts, hit))
    more = {"engine_ms": step_seconds * 1e3, "tokens_per_s": tokens_per_s, "experts_hit": hit}
    if drafts:
        more["tokens_per_step"] = tokens_per_step
    if loads:
        more["max_over_mean"] = statistics.mean((load.max() / load.mean()).item() for load in loads)
    return result(bench, case, seconds, floor, **more)


def rested(run: Callable[[], Any]) -> float:
    """Seconds of a run that follows a second's pause: the median of three."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        time.sleep(1)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def run_prefill(bench: Bench, rows: int, length: int) -> Result:
    case = f"prefill {rows} x {length}"
    engine = make_engine(bench, rows, length + 1)

    def run() -> None:
        for _ in engine.run(requests(bench, rows, length, 1)):
            pass

    run()
    seconds = time_of(run, 1, bench.on_gpu)
    more: dict[str, Any] = {"rested_ms": rested(run) * 1e3} if bench.on_gpu else {}
    if bench.options.profile:
        bench.options.traces.append(trace(bench, case, run, 1))
    flops = prefill_flops(bench.args, bench.parallel.world_size, rows, length)
    hit = experts_hit(bench.args, rows * length)
    floor = floor_seconds(decode_bytes(bench.args, bench.parallel, rows, length, 0, hit), *flops)
    more |= {"tokens_per_s": rows * length / seconds, "tflops": sum(flops) / seconds / 1e12}
    return result(bench, case, seconds, floor, engine_ms=seconds * 1e3, **more)


def trace(bench: Bench, case: str, run: Callable[[], Any], steps: int) -> str:
    """
    Profile some runs: a chrome trace (a file a case), and the kernels that take longest as a table. Kernels are
    launched one by one, so that each one's time is its own.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            run()
        bench.synchronize()
    path = bench.options.profile
    path = path.with_name(f"{path.stem}-{case.replace(' ', '')}{path.suffix or '.json'}")
    if is_first():
        profiler.export_chrome_trace(str(path))
        kind = torch.autograd.DeviceType.CUDA if bench.on_gpu else torch.autograd.DeviceType.CPU
        events = [event for event in profiler.key_averages() if event.device_type == kind]
        name = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
        events.sort(key=lambda event: -getattr(event, name))
        total = sum(getattr(event, name) for event in events) / steps
        rows = [(f"{case}: {total:.0f} us a step in", "us a step", "launches", "share")]
        for event in events[:25]:
            us = getattr(event, name) / steps
            rows.append((event.key[:90], f"{us:.1f}", f"{event.count / steps:g}", f"{us / total:.1%}"))
        print(f"\n{table(rows)}\n{path}\n")
    return str(path)


# --- the report -------------------------------------------------------------------------------------------------------


def report(results: list[Result]) -> str:
    """A row a case; columns in which nothing is known are left out."""
    names = [field.name for field in fields(Result)[1:]]
    names = [name for name in names if any(getattr(r, name) is not None for r in results)]
    rows = [("", *(name.replace("_per_", "/").replace("_", " ") for name in names))]
    return table(rows + [(r.case, *(figure(getattr(r, name)) for name in names)) for r in results])


def main() -> None:
    options = parse_arguments()
    if options.kernels:
        run_kernels(options)
        return
    bench = build(options)
    results, engine = [], None
    for length in options.prompt_len if options.batch_size else []:
        engine = None  # its cache goes before the next one's comes
        engine = make_engine(bench, max(options.batch_size), decode_length(options, length))
        if not results:
            start_up(bench, engine, options.batch_size[0], length)
        results += [run_decode(bench, engine, rows, length) for rows in options.batch_size]
    engine = None
    results += [run_prefill(bench, rows, length) for rows, length in options.prefill]
    if not is_first():
        return
    device = torch.cuda.get_device_name(bench.device) if bench.on_gpu else "CPU"
    gb, startup, gpus = bench.weight_bytes / 1e9, bench.startup, 1 if options.alone_of else bench.parallel.world_size
    startup["weights_gb_per_s"] = gb / startup["weights"]
    about = {"config": str(options.config or options.ckpt_path), "command": sys.argv[1:], "device": device}
    about |= {"n_layers": bench.args.n_layers, "dtype": bench.args.dtype, "gpus": gpus}
    about |= {"alone_of": options.alone_of, "torch": torch.__version__, "mtp": options.mtp}
    about |= {"startup": startup, "weights_gb": gb}
    print("{config}: {n_layers} layers, {dtype}, {gpus} x {device}, torch {torch}, drafts {mtp}".format(**about))
    print(f"{bench.parallel.sums}\n" if bench.parallel.sums else "")
    print(report(results))
    print(f"\nstart-up: {', '.join(f'{name} {figure(value)}' for name, value in startup.items())} (s)")
    print(f"weights: {gb:.3f} GB a rank in {startup['weights']:.2f} s")
    print(json.dumps(about | {"cases": [asdict(result) for result in results], "traces": options.traces}))


if __name__ == "__main__":
    run_command(main)
    leave_ranks()
