"""
The least that a step can take, from the config alone: every weight and cache byte it needs read once, or its
arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from config import ModelArgs
from parallel import Parallel
from plan import BANDWIDTH, Part, cache_bytes, weight_parts

FP8_PFLOPS, BF16_PFLOPS = 1.2, 0.767  # what the best dense GEMMs reach on an H200, measured


def experts_hit(args: ModelArgs, tokens: int) -> float:
    """Share of the experts that so many tokens need, each choosing K of E evenly: 1 - (1 - K / E) ** tokens."""
    if not args.n_routed_experts:
        return 0.0
    return 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** tokens


def decode_bytes(
    args: ModelArgs, parallel: Parallel, rows: int, length: int, drafts: int, hit: float | None = None
) -> float:
    """
    What a rank reads at least in one step of `rows` rows that see `length` tokens each, when it needs the share `hit`
    of a layer's experts; by default as many as an even router would choose.
    """
    hit = experts_hit(args, rows * (1 + drafts)) if hit is None else hit
    split = parallel.world_size, parallel.expert_parallel
    tokens, used = rows * (1 + drafts), min(drafts, args.n_mtp_layers)
    main = weight_parts(replace(args, n_mtp_layers=0), *split)
    moe_layers = args.n_layers - args.n_dense_layers
    expert_bytes = main["routed experts"].nbytes / max(moe_layers, 1)  # of one layer
    mtp = weight_parts(replace(args, n_mtp_layers=used), *split)["MTP"].nbytes
    total = sum(part.nbytes for name, part in main.items() if name not in ("embedding", "MTP"))
    total += main["embedding"].read * tokens + main["head"].nbytes * drafts + mtp  # each draft reads the head again
    total -= (moe_layers + used) * expert_bytes * (1 - hit)
    return total + cache_bytes(args, args.n_layers + used, rows, length)


def prefill_flops(args: ModelArgs, world_size: int, rows: int, length: int) -> tuple[float, float]:
    """
    Multiplications and additions that a rank makes at least for `rows` prompts of `length` tokens: in FP8, in bf16.

    Two for each active parameter and token; attention 2 * H * (D_k + D_v) for each pair of a token and one it sees;
    the head for the last tokens only.
    """
    parts = weight_parts(replace(args, n_mtp_layers=0))
    head, embedding = parts["head"].parameters, parts["embedding"].active
    active = sum(parts.values(), Part()).active - head - embedding
    wide = args.n_layers * args.n_heads * (args.qk_nope_head_dim + args.v_head_dim) * args.kv_lora_rank  # wkv_b
    wide += parts["gates"].parameters
    if args.dtype != "fp8":
        wide = active
    pairs = rows * length * (length + 1) / 2
    attention = 2 * args.n_layers * args.n_heads * (args.qk_head_dim + args.v_head_dim) * pairs
    tokens = rows * length
    return 2 * tokens * (active - wide) / world_size, (2 * tokens * wide + attention + 2 * rows * head) / world_size


def floor_seconds(nbytes: float, fp8_flops: float = 0.0, flops: float = 0.0) -> float:
    """The longer of reading and computing, at the rates of an H200."""
    return max(nbytes / (BANDWIDTH * 1e12), fp8_flops / (FP8_PFLOPS * 1e15) + flops / (BF16_PFLOPS * 1e15))
