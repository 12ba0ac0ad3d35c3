"""
DeepSeek-V3 in the order of its paper (arXiv:2412.19437): MLA (2.1.1), DeepSeekMoE (2.1.2), multi-token prediction
(2.2). V2 and V2-Lite are the same model with other numbers.

Dimension letters: B rows of the batch, S tokens a row in this pass, M = B * S tokens, D dim, H local heads, C
kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim, E routed experts, K n_activated_experts and, where
they are served alike, the shared ones, P terms whose sum is left to the next norm.

Parameters are allocated here and filled by checkpoint.py. What reads the same input lies in one matrix and is one
product: wq_a and wkv_a, w1 and w3; `Transformer.weights` says where each tensor of a checkpoint is.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import latent_attention, prefill_attention
from config import BLOCK_SIZE, ModelArgs
from experts import WIDE, experts, gated_linear, pair_block
from gpu import cdiv
from kernel import E4M3, W8A16, Quantised, linear, linear_fp32
from latent import absorb_beside_latents, absorb_query, expand_value, join_keys, latents, rotate_query
from parallel import Parallel
from routing import Routing, gate_scores, route_and_sort

Activation = torch.Tensor | Quantised  # in front of an FP8 product a norm leaves it quantised too
Weights = Iterator[tuple[str, torch.Tensor]]  # name within the module -> where it lies

# The published modelling code leaves the norms of the two latents at this epsilon, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def compute_dtype(args: ModelArgs) -> torch.dtype:
    """The type of activations, and of every weight that is not in FP8."""
    return torch.float32 if args.dtype == "fp32" else torch.bfloat16


# Parameters in which several tensors of a checkpoint lie; the modules that hold them tell them apart.
STACKED = re.compile(r"\.(wqkv_a|w13)\.|\.experts\.w2\.")


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


# --- embedding, linears, norm -----------------------------------------------------------------------------------------


class ParallelEmbedding(nn.Module):
    """A slice of the vocabulary on each rank; tokens outside it contribute zero to the sum over the ranks."""

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__()
        self.parallel = parallel
        self.weight = parameter(args.vocab_size // parallel.world_size, args.dim, dtype=compute_dtype(args))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, S] -> [B, S, D]."""
        if self.parallel.world_size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.parallel.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        return self.parallel.all_reduce(F.embedding(local.where(mine, 0), self.weight) * mine[..., None])


class Linear(nn.Module):
    """
    y = x W^T, W [out_features, in_features]: in FP8 with a scale per 128 x 128 block when `args.dtype` is "fp8",
    unless `quantized` is false. With `stack`, weights of this shape are stacked: [*stack, out, in].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        args: ModelArgs,
        quantized: bool = True,
        stack: tuple[int, ...] = (),
    ):
        super().__init__()
        self.fp8 = quantized and args.dtype == "fp8"
        self.quantises = self.fp8 and args.activation_scheme == "dynamic"  # its inputs
        self.scale_fmt = args.scale_fmt if self.quantises else W8A16
        if self.fp8:
            blocks = cdiv(out_features, BLOCK_SIZE), cdiv(in_features, BLOCK_SIZE)
            self.weight = parameter(*stack, out_features, in_features, dtype=E4M3)
            self.scale = parameter(*stack, *blocks, dtype=torch.float32)
        else:
            self.weight = parameter(*stack, out_features, in_features, dtype=compute_dtype(args))
            self.scale = None

    def forward(self, x: Activation) -> torch.Tensor:
        return linear(x, self.weight, self.scale, self.scale_fmt)

    def weights(self) -> Weights:
        yield "weight", self.weight
        if self.scale is not None:
            yield "scale", self.scale


class ColumnParallelLinear(Linear):
    """Each rank computes out_features / world_size of the outputs."""

    def __init__(
        self, in_features: int, out_features: int, args: ModelArgs, parallel: Parallel, quantized: bool = True
    ):
        super().__init__(in_features, out_features // parallel.world_size, args, quantized)


class RowParallelLinear(Linear):
    """Each rank holds in_features / world_size of the inputs; the sum over the ranks is left to the caller."""

    def __init__(self, in_features: int, out_features: int, args: ModelArgs, parallel: Parallel):
        super().__init__(in_features // parallel.world_size, out_features, args)


class RMSNorm(nn.Module):
    """
    y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32. `half`: 0 and 1 in turn for those that sum terms over
    ranks one after the other (Parallel.add_rms_norm).
    """

    def __init__(
        self,
        dim: int,
        args: ModelArgs,
        eps: float | None = None,
        before_fp8: bool = False,
        half: int = 1,
        parallel: Parallel | None = None,
    ):
        super().__init__()
        self.half, self.parallel = half, parallel or Parallel()
        self.eps = args.norm_eps if eps is None else eps
        self.weight = parameter(dim, dtype=compute_dtype(args))
        self.quantise = before_fp8 and args.dtype == "fp8" and args.activation_scheme == "dynamic"
        self.scale_fmt = args.scale_fmt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def after(self, x: torch.Tensor, terms: torch.Tensor | None, keep: bool = True) -> tuple[torch.Tensor, Activation]:
        """
        x [M, D] and what is to be added to it, [M, D] or [M, P, D] -> the sum, and its norm: where an FP8 product
        follows, as that takes it and unless `keep` only so.
        """
        options = {"quantise": self.quantise, "scale_fmt": self.scale_fmt, "keep": keep}
        return self.parallel.add_rms_norm(x, terms, self.weight, self.eps, self.half, **options)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def rotary_frequencies(args: ModelArgs) -> torch.Tensor:
    """
    Angle per position of each rotary pair, [R / 2] in fp32: theta ** (-2i / R), and with YaRN (arXiv:2309.00071, 3.2)
    divided by rope_factor for the pairs that turn fewer than beta_slow times in original_seq_len tokens, unchanged for
    those that turn more than beta_fast times, and blended linearly between.
    """
    R = args.qk_rope_head_dim
    frequency = args.rope_theta ** -(torch.arange(0, R, 2, dtype=torch.float64) / R)
    if args.rope_factor > 1:

        def pair_turning(times: float) -> float:
            return R * math.log(args.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(args.rope_theta))

        low = max(math.floor(pair_turning(args.beta_fast)), 0)
        high = min(math.ceil(pair_turning(args.beta_slow)), R - 1)
        ramp = (torch.arange(R // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
        frequency *= 1 - (1 - 1 / args.rope_factor) * ramp.clamp(0, 1)
    return frequency.float()


@functools.lru_cache
def rotations(args: ModelArgs, length: int, device: torch.device) -> torch.Tensor:
    """[length, R / 2, 2] in fp32: cos and sin of each rotary pair's angle at each position."""
    with torch.inference_mode(False):  # a trainer may meet it later
        angle = torch.arange(length, device=device)[:, None] * rotary_frequencies(args).to(device)
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


@dataclass(frozen=True)
class Step:
    """
    Where the tokens of one forward pass stand: token s of row b is at position start_pos[b] + s of cache row rows[b].

    positions: [B, S]. rotation: [M, R / 2, 2], cos and sin of each rotary pair's angle. rows: [B]. kv_len: a bound,
    known to the host, on the cached positions that any row sees; it limits work, never results.
    """

    positions: torch.Tensor
    rotation: torch.Tensor
    rows: torch.Tensor
    kv_len: int


# --- attention --------------------------------------------------------------------------------------------------------


class MLA(nn.Module):
    """
    Multi-head latent attention (2.1.1). Keys and values of all heads are linear in one latent per token,
    c = kv_norm(W_DKV x) of C numbers, plus one rotary key of R numbers shared by the heads: only these are cached.

        q_h = [q_nope, rotary(q_pe)],  k_h = [W_UK_h c, rotary(k_pe)],  v_h = W_UV_h c
    """

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__()
        self.n_local_heads = args.n_heads // parallel.world_size
        self.q_lora_rank = args.q_lora_rank
        self.kv_lora_rank = args.kv_lora_rank
        self.qk_nope_head_dim = args.qk_nope_head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        # wq_a (wq, without a query latent) and wkv_a as one: scales are for whole blocks, so wkv_a begins with one.
        self.q_rows = self.q_lora_rank or self.n_local_heads * args.qk_head_dim
        unit = BLOCK_SIZE if args.dtype == "fp8" else 1
        self.kv_at = cdiv(self.q_rows, unit) * unit
        self.wqkv_a = Linear(args.dim, cdiv(self.kv_at + args.cache_dim, unit) * unit, args)
        if self.q_lora_rank:
            self.q_norm = RMSNorm(self.q_lora_rank, args, LATENT_NORM_EPS)
            self.wq_b = ColumnParallelLinear(self.q_lora_rank, args.n_heads * args.qk_head_dim, args, parallel)
        self.kv_norm = RMSNorm(self.kv_lora_rank, args, LATENT_NORM_EPS)
        # Never in FP8: decoding multiplies with its two halves, W_UK and W_UV, apart; it is dequantised as it is read.
        heads_out = args.n_heads * (args.qk_nope_head_dim + args.v_head_dim)
        self.wkv_b = ColumnParallelLinear(self.kv_lora_rank, heads_out, args, parallel, quantized=False)
        self.wo = RowParallelLinear(args.n_heads * args.v_head_dim, args.dim, args, parallel)
        # YaRN sharpens the softmax as the context grows (V2 paper, 3.1.4): m = 0.1 * mscale * ln(factor) + 1.
        m = 0.1 * args.mscale * math.log(args.rope_factor) + 1
        self.softmax_scale = args.qk_head_dim**-0.5 * m * m

    def absorb(self, seqlen: int, kv_len: int) -> bool:
        """
        Whether attending inside the latent space takes less arithmetic than expanding keys and values.

        Multiply-adds a head, expanded: T * C * (N + V) to expand T tokens, then S * T * (N + R + V). Absorbed:
        S * C * (N + V) to move queries in and results out, then S * T * (2C + R).
        """
        C, N, V = self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim
        return seqlen * kv_len * (2 * C - N - V) + seqlen * C * (N + V) < kv_len * C * (N + V)

    def forward(self, x: Activation, step: Step, cache: torch.Tensor | None, absorb: bool | None = None):
        """
        x [M, D], cache [rows, length, C + R] -> [M, D], this rank's part of the sum; writes the new tokens' latents
        into the cache.

        Without a cache the tokens see each other only. `absorb` forces one of the two equal ways to compute.
        """
        (B, S), C = step.positions.shape, self.kv_lora_rank
        w_uk, w_uv = self.wkv_b.weight.view(self.n_local_heads, -1, C).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=1
        )
        kv_len = S if cache is None else min(step.kv_len, cache.shape[1])  # tokens past the cache's end are not in it
        absorb = cache is not None and (self.absorb(S, kv_len) if absorb is None else absorb)
        quantised = {"quantise": self.wo.quantises, "scale_fmt": self.wo.scale_fmt, "keep": False}
        given = self.kv_norm.weight, step.rotation, cache, step.rows, step.positions
        options = {"kv_at": self.kv_at, "eps": LATENT_NORM_EPS}
        y = self.wqkv_a(x)
        if absorb and not self.q_lora_rank:
            q = absorb_beside_latents(y, w_uk, *given, **options)
        else:
            q_norm = self.q_norm.weight if self.q_lora_rank else None
            q, kv = latents(y, q_norm, *given, **options, **quantised)
            q = (self.wq_b(q) if self.q_lora_rank else y[:, : self.q_rows]).unflatten(1, (self.n_local_heads, -1))
            q = absorb_query(q, w_uk, step.rotation) if absorb else rotate_query(q, step.rotation)
        q = q.unflatten(0, (B, S))
        if absorb:
            o = latent_attention(q, cache, step.rows, step.positions, kv_len, self.softmax_scale, C)
            o = expand_value(o, w_uv, **quantised)
        else:
            kv = kv.unflatten(0, (B, S)) if cache is None else cache[step.rows, :kv_len]
            latent, k_pe = kv.split([C, self.qk_rope_head_dim], dim=-1)
            expanded = linear(latent.flatten(0, 1), self.wkv_b.weight).unflatten(1, (self.n_local_heads, -1))
            k = join_keys(expanded, k_pe.flatten(0, 1), self.qk_nope_head_dim).unflatten(0, (B, kv_len))
            v = expanded[..., self.qk_nope_head_dim :].unflatten(0, (B, kv_len))
            o = prefill_attention(q, k, v, step.positions, self.softmax_scale).flatten(2).flatten(0, 1)
        return self.wo(o)

    def weights(self) -> Weights:
        first, rest = self.q_rows, self.kv_at + self.kv_lora_rank + self.qk_rope_head_dim
        name = "wq_a" if self.q_lora_rank else "wq"
        yield f"{name}.weight", self.wqkv_a.weight[:first]
        yield "wkv_a.weight", self.wqkv_a.weight[self.kv_at : rest]
        if self.wqkv_a.scale is not None:
            yield f"{name}.scale", self.wqkv_a.scale[: cdiv(first, BLOCK_SIZE)]
            yield "wkv_a.scale", self.wqkv_a.scale[self.kv_at // BLOCK_SIZE : cdiv(rest, BLOCK_SIZE)]


# --- feed-forward: MLP, gate, experts ---------------------------------------------------------------------------------


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x), split over the ranks; the sum over the ranks is left to the caller."""

    def __init__(self, dim: int, inter_dim: int, args: ModelArgs, parallel: Parallel):
        super().__init__()
        self.w13 = Linear(dim, inter_dim // parallel.world_size, args, stack=(2,))
        self.w2 = RowParallelLinear(inter_dim, dim, args, parallel)

    def forward(self, x: Activation) -> torch.Tensor:
        return self.w2(gated_linear(x, self.w13.weight, self.w13.scale, self.w13.scale_fmt))

    def weights(self) -> Weights:
        for kind, both in self.w13.weights():
            yield f"w1.{kind}", both[0]
            yield f"w3.{kind}", both[1]


class Gate(nn.Module):
    """
    Chooses K experts a token (2.1.2). Scores s = sigmoid or softmax of x W^T, in fp32.

    The choice is on s + bias: a group of experts scores the sum of its two best (without a bias its best), the
    n_limited_groups best groups stay, and the top K of them are chosen. The weights come from s alone, so the bias,
    which balances the load without an auxiliary loss, decides where a token goes and never what it receives.

    `n_shared` shared experts, -n_shared to -1, are every token's last choices, with weight 1.
    """

    def __init__(self, args: ModelArgs, n_shared: int = 0):
        super().__init__()
        self.weight = parameter(args.n_routed_experts, args.dim, dtype=torch.float32)
        sigmoid = args.score_func == "sigmoid"
        self.bias = parameter(args.n_routed_experts, dtype=torch.float32) if sigmoid else None
        self.n_choices = args.n_activated_experts + n_shared
        self.options = {
            "score_func": args.score_func,
            "n_groups": args.n_expert_groups,
            "n_limited_groups": args.n_limited_groups,
            "top_k": args.n_activated_experts,
            "route_scale": args.route_scale,
            "n_shared": n_shared,
        }

    def forward(
        self, x: torch.Tensor, first: int = 0, n_local: int = 1, block: int = 16, early: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """
        x [M, D] -> weights [M, K] fp32, indices [M, K], and the pairs that go to the experts [first, first + n_local),
        in tiles of `block`. early: see route_and_sort.
        """
        where = {"first": first, "n_local": n_local, "block": block, "early": early}
        return route_and_sort(gate_scores(x, self.weight), self.bias, **where, **self.options)


class Experts(nn.Module):
    """
    `n_shared` shared experts of a layer and behind them the routed ones, stacked. A rank holds a slice of each, or with
    `expert_parallel` whole ones: experts [first, first + n_local). Either way the ranks' results add up.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel, n_shared: int):
        super().__init__()
        split, self.n_shared = parallel.world_size, n_shared
        self.n_routed = args.n_routed_experts // split if parallel.expert_parallel else args.n_routed_experts
        self.n_local = self.n_routed + n_shared
        self.n_others = args.n_routed_experts - self.n_routed
        self.first = (parallel.rank * self.n_routed if parallel.expert_parallel else 0) - n_shared
        inter_dim = args.moe_inter_dim if parallel.expert_parallel else args.moe_inter_dim // split
        self.w13 = Linear(args.dim, inter_dim, args, stack=(self.n_local, 2))
        self.w2 = Linear(inter_dim, args.dim, args, stack=(self.n_local,))

    def forward(self, x: Activation, weights: torch.Tensor, routing: Routing, block: int) -> torch.Tensor:
        """x [M, D], weights [M, K] -> weight * expert(x) for each choice, [M, K, D]."""
        w13, w2 = (self.w13.weight, self.w13.scale), (self.w2.weight, self.w2.scale)
        placed = {"everywhere": self.n_others == 0, "n_shared": self.n_shared}
        return experts(x, w13, w2, self.w2.scale_fmt, weights, routing, block, **placed)

    def weights(self) -> Weights:
        for i in range(self.n_shared, self.n_local):
            for kind, both in self.w13.weights():
                yield f"{self.first + i}.w1.{kind}", both[i, 0]
                yield f"{self.first + i}.w3.{kind}", both[i, 1]
            for kind, stacked in self.w2.weights():
                yield f"{self.first + i}.w2.{kind}", stacked[i]


class MoE(nn.Module):
    """
    DeepSeekMoE (2.1.2): routed experts for the tokens that chose them, and shared experts for all. The shared ones are
    one wide MLP in a checkpoint; a rank that holds a slice of each expert serves its slice of that like more experts.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__()
        n_shared, split = args.n_shared_experts, parallel.world_size
        whole_blocks = args.dtype != "fp8" or args.moe_inter_dim // split % BLOCK_SIZE == 0
        alike = (split == 1 or not parallel.expert_parallel) and (n_shared == 1 or whole_blocks)
        self.n_alike = n_shared if alike else 0
        self.gate = Gate(args, self.n_alike)
        self.experts = Experts(args, parallel, self.n_alike)
        apart = n_shared - self.n_alike
        self.shared_experts = MLP(args.dim, apart * args.moe_inter_dim, args, parallel) if apart else None

    def forward(self, x: Activation) -> torch.Tensor:
        """x [M, D] -> [M, P, D], terms of this rank's part of the sum."""
        h = x.x if isinstance(x, Quantised) else x
        experts = self.experts
        n_pairs, n_experts, w13 = h.shape[0] * self.gate.n_choices, experts.n_local + experts.n_others, experts.w13
        block = pair_block(h, n_pairs, n_experts, w13.weight, w13.scale_fmt)
        early = self.n_alike > 0 and w13.weight.shape[-2] >= WIDE
        weights, _, routing = self.gate(h, experts.first, experts.n_local, block, early)
        terms = experts(x, weights, routing, block)
        if self.shared_experts is not None:
            terms = torch.cat([terms, self.shared_experts(x)[:, None]], dim=1)
        return terms

    def weights(self) -> Weights:
        if not self.n_alike:
            return
        for kind, both in self.experts.w13.weights():
            w1, w3 = both[: self.n_alike].unbind(1)
            yield f"shared_experts.w1.{kind}", w1.squeeze(0)
            yield f"shared_experts.w3.{kind}", w3.squeeze(0)
        for kind, stacked in self.experts.w2.weights():  # [D, n_shared, I]: their columns side by side
            yield f"shared_experts.w2.{kind}", stacked[: self.n_alike].transpose(0, 1).squeeze(1)


# --- the model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """
    x += attn(norm(x)); x += ffn(norm(x)), with one sum over the ranks in each half. The last addition is left to the
    norm that follows, which reads x anyway.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel, dense: bool):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args, before_fp8=True, parallel=parallel)
        self.attn = MLA(args, parallel)
        self.ffn_norm = RMSNorm(args.dim, args, before_fp8=True, half=0, parallel=parallel)
        self.ffn = MLP(args.dim, args.inter_dim, args, parallel) if dense else MoE(args, parallel)
        self.dense = dense

    def forward(
        self, x: torch.Tensor, terms: torch.Tensor | None, step: Step, cache: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, D] and what is to be added to it -> the same, after this block."""
        x, h = self.attn_norm.after(x, terms, keep=False)
        x, h = self.ffn_norm.after(x, self.attn(h, step, cache), keep=not self.dense)
        return x, self.ffn(h)


class MTP(Block):
    """
    A multi-token prediction module (2.2): from h_i, the model's output at position i after its final norm, and the
    token that follows, h'_i = norm(Block(eh_proj([enorm(embed(t_{i+1})), hnorm(h_i)]))), whose logits are for t_{i+2}.
    The next module takes h' in place of h. Embedding and head are the main model's.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__(args, parallel, dense=False)
        self.enorm = RMSNorm(args.dim, args)
        self.hnorm = RMSNorm(args.dim, args)
        self.eh_proj = Linear(2 * args.dim, args.dim, args, quantized=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(args.dim, args, parallel=parallel)})

    def forward(self, h: torch.Tensor, embedded: torch.Tensor, step: Step, cache: torch.Tensor | None) -> torch.Tensor:
        """h [B, S, D] at positions i, embedded [B, S, D] the tokens at i + 1 -> h' [B, S, D]."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1).flatten(0, 1))
        return self.shared_head["norm"].after(*super().forward(x, None, step, cache))[1].view_as(h)


class Transformer(nn.Module):
    """`args.dtype` is the format of the weights in memory, which may differ from the checkpoint's (see load_model)."""

    def __init__(self, args: ModelArgs, parallel: Parallel | None = None):
        super().__init__()
        self.args = args
        self.parallel = parallel = parallel or Parallel()
        self.embed = ParallelEmbedding(args, parallel)
        self.layers = nn.ModuleList(Block(args, parallel, dense=i < args.n_dense_layers) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args, parallel=parallel)
        self.head = ColumnParallelLinear(args.dim, args.vocab_size, args, parallel, quantized=False)
        self.mtp = nn.ModuleList(MTP(args, parallel) for _ in range(args.n_mtp_layers))

    def weights(self) -> dict[str, torch.Tensor]:
        """Name of each tensor of a checkpoint that this rank has -> the part of a parameter that it goes to."""
        found = {}
        for prefix, module in self.named_modules():
            knows = prefix and hasattr(module, "weights")
            parts = module.weights() if knows else module.named_parameters(recurse=False)
            found |= {f"{prefix}.{name}": tensor for name, tensor in parts}
        return {name: tensor for name, tensor in found.items() if not STACKED.search(name)}

    def new_cache(self, max_batch_size: int, max_seq_len: int) -> torch.Tensor:
        """[n_layers + n_mtp_layers, max_batch_size, max_seq_len, C + R], on the model's device."""
        layers = len(self.layers) + len(self.mtp)
        weight = self.embed.weight
        return weight.new_zeros(layers, max_batch_size, max_seq_len, self.args.cache_dim)

    def step(
        self,
        shape: tuple[int, int],
        start_pos: torch.Tensor | int = 0,
        rows: torch.Tensor | None = None,
        kv_len: int | None = None,
    ) -> Step:
        """
        The Step of a pass over tokens of `shape` [B, S].

        start_pos: [B], each row's first position, or one for all. rows: [B] cache rows, by default 0..B-1. kv_len: at
        least start_pos + S of every row that counts; needed when start_pos is a tensor.
        """
        (B, S), device = shape, self.embed.weight.device
        if kv_len is None:
            if isinstance(start_pos, torch.Tensor):
                raise ValueError("kv_len is needed with a start_pos tensor: reading its maximum would stall the device")
            kv_len = start_pos + S
        start_pos = torch.as_tensor(start_pos, device=device)
        positions = start_pos.expand(B)[:, None].contiguous()
        table = rotations(self.args, 1 << (kv_len - 1).bit_length(), device)  # of few lengths
        known = positions
        if S > 1:
            positions = positions + torch.arange(S, device=device)
            known = positions.clamp(max=len(table) - 1)  # padding may lie past all that counts
        rows = torch.arange(B, device=device) if rows is None else rows
        return Step(positions, table[known.flatten()], rows, kv_len)

    def hidden(self, tokens: torch.Tensor, step: Step, cache: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [B, S] -> [B, S, D] after the final norm: what the head and the first MTP module take."""
        x, terms = self.embed(tokens).flatten(0, 1), None
        for i, layer in enumerate(self.layers):
            x, terms = layer(x, terms, step, None if cache is None else cache[i])
        return self.norm.after(x, terms)[1].unflatten(0, tokens.shape)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h [..., D] -> [..., vocab_size] in fp32, complete on every rank."""
        logits = linear_fp32(h.flatten(0, -2), self.head.weight)
        return self.parallel.all_gather(logits).unflatten(0, h.shape[:-1])

    def draft(
        self, i: int, h: torch.Tensor, next_tokens: torch.Tensor, step: Step, cache: torch.Tensor | None = None
    ) -> torch.Tensor:
        """MTP module i: h [B, S, D] and the tokens [B, S] one position on -> its h' [B, S, D], for `logits`."""
        own = None if cache is None else cache[len(self.layers) + i]
        return self.mtp[i](h, self.embed(next_tokens), step, own)

    def forward(
        self,
        tokens: torch.Tensor,
        start_pos: torch.Tensor | int = 0,
        cache: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        kv_len: int | None = None,
        lengths: torch.Tensor | None = None,
        all_positions: bool = False,
    ) -> torch.Tensor:
        """
        tokens [B, S] -> logits in fp32: [B, vocab_size] at each row's last token, or [B, S, vocab_size] at all.

        lengths: [B] tokens of each row that count when the rest is padding on the right; by default S. See `step` for
        start_pos, rows and kv_len.
        """
        h = self.hidden(tokens, self.step(tokens.shape, start_pos, rows, kv_len), cache)
        if not all_positions:
            h = h[:, -1] if lengths is None else h[torch.arange(h.shape[0], device=h.device), lengths - 1]
        return self.logits(h)
