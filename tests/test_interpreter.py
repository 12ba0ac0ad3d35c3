"""
The whole model through its Triton kernels, on the CPU by Triton's interpreter: what each hands to the next, in the
model's own shapes and strides. Kernels one by one are in the tests of their files; speed and FP8 need a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import triton

import attention
from checkpoint import Checkpoint, load_model
from checkpoints import make_hf
from interpreter import interpret, needs_interpreter
from model import Transformer
from parallel import Parallel
from sampling import Sampling, SamplingParams, choose


def passes(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a prompt and of its drafts, of a chunk after it, of a single token, and the cache they leave."""
    (B, S), found = tokens.shape, []
    cache, rows = model.new_cache(B + 1, S + 2), torch.tensor([2, 0])
    for start, stop in ((0, S - 3), (S - 3, S - 1), (S - 1, S)):
        step = model.step((B, stop - start), torch.full((B,), start), rows, stop)
        h = model.hidden(tokens[:, start:stop], step, cache)
        found.append(model.logits(h))
        if model.mtp and stop < S:
            found.append(model.logits(model.draft(0, h, tokens[:, start + 1 : stop + 1], step, cache)))
    greedy = Sampling.of([SamplingParams(0.0)] * B, torch.zeros(B, dtype=torch.int64))
    best, _ = choose(found[-1][:, -1], greedy, torch.zeros(B, dtype=torch.int64), 0)
    return [*found, cache, best]


def main(kind: str, folder: str) -> None:
    """Prints the results' largest difference, relative to each one's largest number."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(make_hf(Path(folder), kind, "fp32"))
    model = Transformer(checkpoint.args)
    load_model(model, checkpoint, Parallel(), progress=False)
    tokens = torch.randint(5, 500, (2, 6), generator=torch.Generator().manual_seed(1))
    attention.latent_splits = lambda blocks, tiles, slots: 3  # which decoding leaves to the expansion of values
    found = {}
    for with_kernels in (False, True):
        with triton.knobs.runtime.scope(), torch.inference_mode():
            triton.knobs.runtime.interpret = with_kernels  # what on_gpu asks; the kernels were made interpretable above
            found[with_kernels] = passes(model, tokens)
    assert torch.equal(found[True].pop(), found[False].pop()), "another token is the best"
    pairs = zip(found[True], found[False], strict=True)
    print(max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs))


@needs_interpreter
@pytest.mark.parametrize("kind", ["v3", "v2lite"])
def test_model_in_the_interpreter(kind, tmp_path):
    assert float(interpret(__file__, kind, str(tmp_path))) < 1e-5  # the same sums in another order: measured up to 3e-6


if __name__ == "__main__":
    main(*sys.argv[1:])
