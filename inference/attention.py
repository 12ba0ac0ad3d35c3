"""
Attention over the latent cache of MLA (V2 paper, 2.1).

Dimension letters: B rows of the batch, S query tokens a row, T cached tokens, H local heads, C kv_lora_rank,
R qk_rope_head_dim, D_k = qk_nope_head_dim + R, D_v = v_head_dim.

A query at position p sees the keys at positions 0..p of its own row, and that is the only mask there is: a chunk of a
prompt, one new token and several drafted ones differ only in `positions`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def cache_write(cache: torch.Tensor, kv: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """
    cache[rows[b], positions[b, s]] = kv[b, s], for cache [rows, length, C + R], kv [B, S, C + R], positions [B, S].

    Positions past the cache's end are not written; each row's first position must be inside.
    """
    inside = positions < cache.shape[1]
    # What must not be written becomes a repetition of the row's first token: no host sync, no out-of-range write.
    source = torch.arange(kv.shape[1], device=kv.device).where(inside, 0)
    kv = kv.gather(1, source[..., None].expand_as(kv))
    cache[rows[:, None], positions.gather(1, source)] = kv.to(cache.dtype)


def causal_mask(positions: torch.Tensor, kv_len: int) -> torch.Tensor:
    """positions [B, S] -> [B, 1, S, kv_len], True where key t <= positions[b, s]."""
    return torch.arange(kv_len, device=positions.device) <= positions[:, None, :, None]


def prefill_attention_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """q [B, S, H, D_k], k [B, T, H, D_k], v [B, T, H, D_v] -> softmax(q k^T scale, t <= position) v [B, S, H, D_v]."""
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    scores = scores.masked_fill(~causal_mask(positions, k.shape[1]), -torch.inf)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1), v.float()).to(q.dtype)


def prefill_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, scale: float
) -> torch.Tensor:
    """See prefill_attention_ref."""
    if not q.is_cuda:
        return prefill_attention_ref(q, k, v, positions, scale)
    mask = causal_mask(positions, k.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def latent_attention_ref(
    q: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, kv_len: int, scale: float, C: int
) -> torch.Tensor:
    """
    q [B, S, H, C + R], cache [rows, length, C + R] -> softmax(q kv^T * scale, t <= position) kv[:C] [B, S, H, C]:
    one key head and one value head shared by all query heads. Reads the first `kv_len` entries of each row.
    """
    kv = cache[rows, :kv_len].float()
    scores = torch.einsum("bshd,btd->bhst", q.float(), kv) * scale
    scores = scores.masked_fill(~causal_mask(positions, kv_len), -torch.inf)
    return torch.einsum("bhst,btc->bshc", scores.softmax(-1), kv[..., :C]).to(q.dtype)


latent_attention = latent_attention_ref
