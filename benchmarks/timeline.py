"""
When each kernel of a decoding step on one Hopper GPU begins, is past its wait for the one before, and ends:

    python benchmarks/timeline.py --config configs/config_16B.json --dummy-weights --batch-size 1

takes the options of inference/benchmark.py. A profiler would have to launch the kernels one by one, without the overlap
that makes the step fast. So this runs a copy of inference/, in which each program of a kernel reads the GPU's clock and
leaves what it read in memory; a step takes up to 3 % longer. Kernels without PDL among their arguments, cuBLAS's among
them, have no clock: their time is the next one's.
"""

from __future__ import annotations

import ast
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LAUNCHES, PROGRAMS = 1024, 4096  # of a step, and of a launch, whose clocks there is room for
REPLAYS = 30
CLOCK = "tl.extra.cuda.globaltimer()"
BEGIN = f"    clock_begin = {CLOCK}\n    clock_waited = clock_begin\n"
END = f"""
    tl.debug_barrier()
    clock_end = {CLOCK}
    clock_row = tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * tl.program_id(2))
    if clock_row < {PROGRAMS}:
        clock_ptrs = clock_ptr.to(tl.pointer_type(tl.int64)) + clock_row * 3
        tl.store(clock_ptrs, clock_begin)
        tl.store(clock_ptrs + 1, clock_waited)
        tl.store(clock_ptrs + 2, clock_end)
"""
# Appended to gpu.py, whose pdl_options each of these launches asks once.
HAND_OUT = f"""

import sys

CLOCKS, LAUNCHED, options_without_clock = [], [], pdl_options


def pdl_options(device: torch.device) -> dict[str, Any]:
    if not CLOCKS:
        CLOCKS.append(torch.zeros({LAUNCHES}, {PROGRAMS}, 3, dtype=torch.int64, device=device))
    LAUNCHED.append(sys._getframe(1).f_code.co_name)
    return options_without_clock(device) | {{"clock_ptr": CLOCKS[0][min(len(LAUNCHED), {LAUNCHES}) - 1].data_ptr()}}
"""


def clocked(source: str) -> str:
    """A module's source, with clocks in its kernels that take PDL."""
    lines = source.splitlines(keepends=True)
    for function in reversed(ast.parse(source).body):
        if not (isinstance(function, ast.FunctionDef) and function.name.endswith("_kernel")):
            continue
        if "PDL" not in (argument.arg for argument in function.args.args):
            continue
        first, last = function.lineno - 1, function.end_lineno
        body = function.body[1 if ast.get_docstring(function) else 0].lineno - 1
        head = "".join(lines[first:body]).replace("PDL: tl.constexpr", "PDL: tl.constexpr, clock_ptr", 1)
        rest = []
        for line in lines[body:last]:
            rest.append(line)
            if line.strip() == "tl.extra.cuda.gdc_wait()":
                rest.append(f"{line[: line.index('tl.')]}clock_waited = {CLOCK}\n")
        lines[first:last] = [head, BEGIN, *rest, END]
    return "".join(lines)


def copy_with_clocks(folder: Path) -> None:
    for path in (ROOT / "inference").glob("*.py"):
        (folder / path.name).write_text(clocked(path.read_text()) + HAND_OUT * (path.name == "gpu.py"))


def spans(replay: Callable[[], object], names: list[str], clocks: torch.Tensor) -> dict[tuple, list[list[float]]]:
    """
    When the launches `names` of a step began, were past their waits and ended, in us after the one before ended:
    medians of REPLAYS, by the launch's name and its neighbours'. clocks [launch, program, 3]: a replay's ns.
    """
    found: dict[int, list[tuple[int, ...]]] = {}
    for _ in range(REPLAYS):
        replay()
        clocks.zero_()
        replay()
        ended = None
        for i in range(len(names)):
            begin, waited, end = clocks[i][clocks[i, :, 0] > 0].T  # of the programs that came to their end
            times = begin.min().item(), waited.max().item(), end.max().item()
            if ended is not None:
                found.setdefault(i, []).append(tuple(time - ended for time in times))
            ended = times[2]
    kinds: dict[tuple, list[list[float]]] = {}
    for i, times in found.items():
        medians = [statistics.median(column) / 1e3 for column in zip(*times, strict=True)]
        kinds.setdefault((*names, "")[i - 1 : i + 2], []).append(medians)
    return kinds


@torch.inference_mode()
def main() -> None:
    import gpu
    from benchmark import build, decode_pass, parse_arguments
    from benchmark_kernels import captured, time_of
    from errors import InputError

    options = parse_arguments()
    if options.kernels or not torch.cuda.is_available() or not gpu.on_hopper(torch.device("cuda")):
        raise InputError("a timeline is of a model's step, by --config or --ckpt-path, on a Hopper GPU")
    bench = build(options)
    for rows in options.batch_size:
        step = decode_pass(bench, rows, options.prompt_len[0])

        def run(step=step) -> None:
            gpu.LAUNCHED.clear()
            step()

        run()
        if (launches := len(gpu.LAUNCHED)) > LAUNCHES:
            raise InputError(f"{launches} launches a step, and room for {LAUNCHES}: fewer layers, by --n-layers")
        replay = captured(run)
        kinds = spans(replay, list(gpu.LAUNCHED), gpu.CLOCKS[0])
        step_us = time_of(replay, options.steps, True) * 1e6
        print(f"{rows} rows: {step_us:,.0f} us a step. us after the one before ended:")
        print(f"  count  {'kernel, by what launches it':28} {'after':20} begins  past its wait    ends")
        for (before, name, _), times in kinds.items():
            begin, waited, end = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"  {len(times):5}  {name:28} {before:20} {begin:6.2f}  {waited:13.2f}  {end:6.2f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        copy_with_clocks(Path(folder))
        sys.path.insert(0, folder)
        from errors import run_command

        run_command(main)
