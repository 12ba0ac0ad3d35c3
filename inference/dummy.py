"""Weights for timing a model that is not there: random, made on its device, and as well behaved as trained ones."""

from __future__ import annotations

import torch

from kernel import E4M3
from model import Transformer

SPREAD = 100  # deviation of e4m3 values: 448, their largest, is then as rare as in a quantised normal block
CHUNK = 1 << 26  # numbers made at a time


@torch.no_grad()
def fill_dummy(model: Transformer) -> None:
    """
    Random weights, in place: norms 1, embedding N(0, 1), linears N(0, 1 / fan_in), so that a vector of size 1 an
    element stays one. FP8 values are N(0, SPREAD^2) with scales that differ by block. Gate biases are small.

    What every rank has whole (gates, above all: ranks must agree on the experts) is the same on all; slices differ.
    """
    with torch.device("meta"):
        whole = {name: p.shape for name, p in Transformer(model.args).named_parameters()}
    generator = torch.Generator(model.embed.weight.device)
    for i, (name, p) in enumerate(model.named_parameters()):
        generator.manual_seed(i if p.shape == whole.get(name) else i + (1 + model.parallel.rank) * 10**6)
        weight = model.get_parameter(name.removesuffix("scale") + "weight" if name.endswith(".scale") else name)
        fan_in = weight.shape[-1]
        if name.endswith(".scale"):
            p.uniform_(0.75, 1.25, generator=generator).mul_(fan_in**-0.5 / SPREAD)
        elif p.dtype == E4M3:
            for chunk in p.view(-1).split(CHUNK):
                values = torch.empty(chunk.shape, dtype=torch.bfloat16, device=p.device)
                chunk.copy_(values.normal_(0, SPREAD, generator=generator).clamp_(-448, 448))
        elif name.endswith(".bias"):
            p.normal_(0, 0.01, generator=generator)
        elif p.dim() == 1:
            p.fill_(1)
        else:
            p.normal_(0, 1 if name == "embed.weight" else fan_in**-0.5, generator=generator)
