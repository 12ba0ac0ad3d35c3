"""benchmarks/timeline.py: the clocks that it puts into a copy of the kernels."""

import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from timeline import clocked, copy_with_clocks, spans  # noqa: E402

# All kernels of the copy that take PDL have clocks; compiled for Hopper, one reads them so often as it prints.
COMPILE = """
import inspect, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import attention, fused, kernel, latent, one_token, routing
modules = attention, fused, kernel, latent, one_token, routing
found = {name: x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")}
kernels = [x for x in found.values() if "PDL" in getattr(x, "arg_names", ())]
for x in kernels:
    assert "clock_ptr" in x.arg_names and inspect.getsource(x.fn).count("clock_end = ") == 1, x
assert len(kernels) > 10
types = {"q_ptr": "*bf16", "rotation_ptr": "*fp32", "H": "i32", "q_stride": "i32", "clock_ptr": "i64"}
sizes = {"QK": 192, "R": 64, "BLOCK_H": 16, "PAIRS": 32, "PDL": True}
source = ASTSource(latent.rotate_query_kernel, types | dict.fromkeys(sizes, "constexpr"), sizes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
print(compiled.asm["ptx"].count("globaltimer"))
"""


def test_every_kernel_that_waits_has_clocks(tmp_path):
    copy_with_clocks(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "3"  # at its beginning, after its wait, at its end


def test_the_rest_stays_as_it_is():
    for path in (BENCHMARKS.parent / "inference").glob("*.py"):
        source = path.read_text()
        lines = iter(clocked(source).replace("PDL: tl.constexpr, clock_ptr", "PDL: tl.constexpr").splitlines())
        assert all(line in lines for line in source.splitlines()), path


def test_spans():
    """Two layers of two kernels of two programs, of which one of each first kernel's returns early."""
    clocks, at = torch.zeros(4, 5, 3, dtype=torch.int64), iter(range(10**6, 10**9, 10**5))

    def replay() -> None:
        start = next(at)
        clocks[0::2, 1] = start + torch.tensor([[100, 400, 2000], [5100, 5400, 8000]])
        clocks[1::2, 0] = start + torch.tensor([[1500, 2400, 5000], [6500, 8400, 11000]])
        clocks[1::2, 3] = start + torch.tensor([[1800, 2600, 4000], [6800, 8600, 10000]])

    clocks[0::2, 4] = 1  # an older replay's
    found = spans(replay, ["norm", "product"] * 2, clocks)
    assert found == {
        ("norm", "product", "norm"): [[-0.5, 0.6, 3.0]],
        ("product", "norm", "product"): [[0.1, 0.4, 3.0]],
        ("norm", "product", ""): [[-1.5, 0.6, 3.0]],
    }


def test_it_needs_a_gpu():
    command = [sys.executable, BENCHMARKS / "timeline.py", "--config", "configs/config_16B.json", "--dummy-weights"]
    run = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: a timeline is of a model's step"), run.stderr
