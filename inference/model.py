"""
DeepSeek-V3 in the order of its paper (arXiv:2412.19437): MLA (2.1.1), DeepSeekMoE (2.1.2), multi-token prediction
(2.2). V2 and V2-Lite are the same model with other numbers.

Dimension letters: B rows of the batch, S tokens a row in this pass, M = B * S tokens, D dim, H local heads, C
kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim, E routed experts, K n_activated_experts.

Parameters are allocated here and filled by checkpoint.py; their names are those of the converted shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import cache_write, latent_attention, prefill_attention
from config import BLOCK_SIZE, ModelArgs
from kernel import E4M3, cdiv, linear, linear_fp32
from parallel import Parallel

# The published modelling code leaves the norms of the two latents at this epsilon, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


def compute_dtype(args: ModelArgs) -> torch.dtype:
    """The type of activations, and of every weight that is not in FP8."""
    return torch.float32 if args.dtype == "fp32" else torch.bfloat16


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
    unless `quantized` is false. With `experts`, that many weights are stacked in front: [experts, out, in].
    """

    def __init__(
        self, in_features: int, out_features: int, args: ModelArgs, quantized: bool = True, experts: int | None = None
    ):
        super().__init__()
        stack = () if experts is None else (experts,)
        self.scale_fmt = args.scale_fmt
        if quantized and args.dtype == "fp8":
            blocks = cdiv(out_features, BLOCK_SIZE), cdiv(in_features, BLOCK_SIZE)
            self.weight = parameter(*stack, out_features, in_features, dtype=E4M3)
            self.scale = parameter(*stack, *blocks, dtype=torch.float32)
        else:
            self.weight = parameter(*stack, out_features, in_features, dtype=compute_dtype(args))
            self.scale = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.scale, self.scale_fmt)

    def unstack(self) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """Each of the stacked weights as a function of its own."""
        scales = [None] * self.weight.shape[0] if self.scale is None else self.scale.unbind()
        return [
            functools.partial(linear, weight=weight, scale=scale, scale_fmt=self.scale_fmt)
            for weight, scale in zip(self.weight.unbind(), scales, strict=True)
        ]


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
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

    def __init__(self, dim: int, args: ModelArgs, eps: float | None = None):
        super().__init__()
        self.eps = args.norm_eps if eps is None else eps
        self.weight = parameter(dim, dtype=compute_dtype(args))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


@functools.lru_cache
def rotary_frequencies(args: ModelArgs, device: torch.device) -> torch.Tensor:
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
    return frequency.float().to(device)


def apply_rotary(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """x [B, S, heads, R], rotation [B, S, R / 2] complex -> the pairs (x0, x1), (x2, x3), ... turned by its angles."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation[:, :, None]).flatten(-2).to(x.dtype)


@dataclass(frozen=True)
class Step:
    """
    Where the tokens of one forward pass stand: token s of row b is at position start_pos[b] + s of cache row rows[b].

    positions: [B, S]. rotation: [B, S, R / 2], e^(i * angle). rows: [B]. kv_len: a bound, known to the host, on the
    cached positions that any row sees; it limits work, never results.
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
        self.parallel = parallel
        self.n_local_heads = args.n_heads // parallel.world_size
        self.q_lora_rank = args.q_lora_rank
        self.kv_lora_rank = args.kv_lora_rank
        self.qk_nope_head_dim = args.qk_nope_head_dim
        self.qk_rope_head_dim = args.qk_rope_head_dim
        self.v_head_dim = args.v_head_dim
        if self.q_lora_rank == 0:
            self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.qk_head_dim, args, parallel)
        else:
            self.wq_a = Linear(args.dim, self.q_lora_rank, args)
            self.q_norm = RMSNorm(self.q_lora_rank, args, LATENT_NORM_EPS)
            self.wq_b = ColumnParallelLinear(self.q_lora_rank, args.n_heads * args.qk_head_dim, args, parallel)
        self.wkv_a = Linear(args.dim, args.cache_dim, args)
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

    def forward(self, x: torch.Tensor, step: Step, cache: torch.Tensor | None, absorb: bool | None = None):
        """
        x [B, S, D], cache [rows, length, C + R] -> [B, S, D]; writes the new tokens' latents into the cache.

        Without a cache the tokens see each other only. `absorb` forces one of the two equal ways to compute.
        """
        B, S, _ = x.shape
        q = self.wq(x) if self.q_lora_rank == 0 else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.view(B, S, self.n_local_heads, -1)
        q_nope, q_pe = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        q_pe = apply_rotary(q_pe, step.rotation)
        latent, k_pe = self.wkv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        k_pe = apply_rotary(k_pe[:, :, None], step.rotation)[:, :, 0]
        kv = torch.cat([self.kv_norm(latent), k_pe], dim=-1)
        if cache is not None:
            cache_write(cache, kv, step.rows, step.positions)
            kv_len = min(step.kv_len, cache.shape[1])  # tokens past the cache's end are not in it

        w_uk, w_uv = self.wkv_b.weight.view(self.n_local_heads, -1, self.kv_lora_rank).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=1
        )
        if cache is not None and (self.absorb(S, kv_len) if absorb is None else absorb):
            q = torch.cat([torch.einsum("bshn,hnc->bshc", q_nope, w_uk), q_pe], dim=-1)
            o = latent_attention(q, cache, step.rows, step.positions, kv_len, self.softmax_scale, self.kv_lora_rank)
            o = torch.einsum("bshc,hvc->bshv", o, w_uv)
        else:
            kv = kv if cache is None else cache[step.rows, :kv_len]
            latent, k_pe = kv.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
            k_pe = k_pe[:, :, None].expand(-1, -1, self.n_local_heads, -1)
            k = torch.cat([torch.einsum("btc,hnc->bthn", latent, w_uk), k_pe], dim=-1)
            v = torch.einsum("btc,hvc->bthv", latent, w_uv)
            q = torch.cat([q_nope, q_pe], dim=-1)
            o = prefill_attention(q, k, v, step.positions, self.softmax_scale)
        return self.parallel.all_reduce(self.wo(o.flatten(2)))


# --- feed-forward: MLP, gate, experts ---------------------------------------------------------------------------------


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x), split over the ranks; the sum over the ranks is left to the caller."""

    def __init__(self, dim: int, inter_dim: int, args: ModelArgs, parallel: Parallel):
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, inter_dim, args, parallel)
        self.w2 = RowParallelLinear(inter_dim, dim, args, parallel)
        self.w3 = ColumnParallelLinear(dim, inter_dim, args, parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Gate(nn.Module):
    """
    Chooses K experts a token (2.1.2). Scores s = sigmoid or softmax of x W^T, in fp32.

    The choice is on s + bias: a group of experts scores the sum of its two best (without a bias its best), the
    n_limited_groups best groups stay, and the top K of them are chosen. The weights come from s alone, so the bias,
    which balances the load without an auxiliary loss, decides where a token goes and never what it receives.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.weight = parameter(args.n_routed_experts, args.dim, dtype=torch.float32)
        sigmoid = args.score_func == "sigmoid"
        self.bias = parameter(args.n_routed_experts, dtype=torch.float32) if sigmoid else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, D] -> weights [M, K] fp32, indices [M, K]."""
        args = self.args
        with torch.autocast(x.device.type, enabled=False):  # fp32 under a trainer's autocast too
            scores = F.linear(x.float(), self.weight)
        scores = scores.sigmoid() if args.score_func == "sigmoid" else scores.softmax(-1)
        choice = scores if self.bias is None else scores + self.bias
        if args.n_expert_groups > 1:
            groups = choice.unflatten(-1, (args.n_expert_groups, -1))
            group_scores = groups.amax(-1) if self.bias is None else groups.topk(2, -1).values.sum(-1)
            kept = group_scores.topk(args.n_limited_groups, -1).indices
            dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
            choice = groups.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
        indices = choice.topk(args.n_activated_experts, -1).indices
        weights = scores.gather(-1, indices)
        if args.score_func == "sigmoid":
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * args.route_scale, indices


class Experts(nn.Module):
    """
    The routed experts of a layer, stacked. A rank holds a slice of each, or with `expert_parallel` whole ones: experts
    [first, first + n_local). Either way the ranks' results add up.
    """

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__()
        split = parallel.world_size
        self.n_local = args.n_routed_experts // split if parallel.expert_parallel else args.n_routed_experts
        self.first = parallel.rank * self.n_local if parallel.expert_parallel else 0
        inter_dim = args.moe_inter_dim if parallel.expert_parallel else args.moe_inter_dim // split
        self.w1 = Linear(args.dim, inter_dim, args, experts=self.n_local)
        self.w2 = Linear(inter_dim, args.dim, args, experts=self.n_local)
        self.w3 = Linear(args.dim, inter_dim, args, experts=self.n_local)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """x [M, D], weights and indices [M, K] -> sum over the chosen experts of weight * expert(x), [M, D] fp32."""
        K = indices.shape[1]
        order = indices.flatten().argsort(stable=True)  # the M * K pairs (token, choice), by expert
        counts = indices.flatten().bincount(minlength=self.first + self.n_local).tolist()
        w1, w2, w3 = self.w1.unstack(), self.w2.unstack(), self.w3.unstack()
        outputs = []
        for expert, x_i in enumerate(x[order // K].split(counts)):
            i = expert - self.first
            if not 0 <= i < self.n_local:
                outputs.append(torch.zeros_like(x_i))  # another rank's
            elif x_i.shape[0]:
                outputs.append(w2[i](F.silu(w1[i](x_i)) * w3[i](x_i)))
        y = torch.cat(outputs)[order.argsort()].unflatten(0, indices.shape)  # back in the tokens' order: [M, K, D]
        return (y.float() * weights[..., None]).sum(1)


class MoE(nn.Module):
    """DeepSeekMoE (2.1.2): routed experts for the tokens that chose them, and shared experts, one wide MLP, for all."""

    def __init__(self, args: ModelArgs, parallel: Parallel):
        super().__init__()
        self.gate = Gate(args)
        self.experts = Experts(args, parallel)
        shared_dim = args.n_shared_experts * args.moe_inter_dim
        self.shared_experts = MLP(args.dim, shared_dim, args, parallel) if shared_dim else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, S, D] -> [B, S, D], this rank's part of the sum."""
        flat = x.flatten(0, 1)
        y = self.experts(flat, *self.gate(flat))
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat).float()
        return y.to(x.dtype).view_as(x)


# --- the model --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x += attn(norm(x)); x += ffn(norm(x)). One sum over the ranks in each half."""

    def __init__(self, args: ModelArgs, parallel: Parallel, dense: bool):
        super().__init__()
        self.parallel = parallel
        self.attn_norm = RMSNorm(args.dim, args)
        self.attn = MLA(args, parallel)
        self.ffn_norm = RMSNorm(args.dim, args)
        self.ffn = MLP(args.dim, args.inter_dim, args, parallel) if dense else MoE(args, parallel)

    def forward(self, x: torch.Tensor, step: Step, cache: torch.Tensor | None) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), step, cache)
        return x + self.parallel.all_reduce(self.ffn(self.ffn_norm(x)))


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
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(args.dim, args)})

    def forward(self, h: torch.Tensor, embedded: torch.Tensor, step: Step, cache: torch.Tensor | None) -> torch.Tensor:
        """h [B, S, D] at positions i, embedded [B, S, D] the tokens at i + 1 -> h' [B, S, D]."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(h)], dim=-1))
        return self.shared_head["norm"](super().forward(x, step, cache))


class Transformer(nn.Module):
    """`args.dtype` is the format of the weights in memory, which may differ from the checkpoint's (see load_model)."""

    def __init__(self, args: ModelArgs, parallel: Parallel | None = None):
        super().__init__()
        self.args = args
        self.parallel = parallel = parallel or Parallel()
        self.embed = ParallelEmbedding(args, parallel)
        self.layers = nn.ModuleList(Block(args, parallel, dense=i < args.n_dense_layers) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args)
        self.head = ColumnParallelLinear(args.dim, args.vocab_size, args, parallel, quantized=False)
        self.mtp = nn.ModuleList(MTP(args, parallel) for _ in range(args.n_mtp_layers))

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
        positions = start_pos.expand(B)[:, None] + torch.arange(S, device=device)
        angle = positions[..., None] * rotary_frequencies(self.args, device)
        rows = torch.arange(B, device=device) if rows is None else rows
        return Step(positions, torch.polar(torch.ones_like(angle), angle), rows, kv_len)

    def hidden(self, tokens: torch.Tensor, step: Step, cache: torch.Tensor | None = None) -> torch.Tensor:
        """tokens [B, S] -> [B, S, D] after the final norm: what the head and the first MTP module take."""
        x = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, step, None if cache is None else cache[i])
        return self.norm(x)

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
