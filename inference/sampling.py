"""
Choosing the next token. Every draw comes from a hash of (seed, position, token), so a row's randomness depends neither
on its neighbours in the batch nor on the device, and needs no state.

Dimension letters: B rows, N drafts a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from errors import InputError

TOKEN, ACCEPT, DRAFT = range(3)  # independent streams of random numbers at each position


@dataclass(frozen=True)
class SamplingParams:
    """
    How a completion is sampled; names and meanings as in vLLM.

    temperature 0 is greedy. top_k keeps the likeliest k tokens (0: all), min_p those at least min_p times as likely as
    the best, top_p of what is left the likeliest that together reach it. repetition_penalty divides the logit of a
    token already in the prompt or completion, or multiplies it when negative. stop: the completion ends before any of
    these strings. logprobs: report each token's log-probability and those of so many likeliest ones.
    """

    temperature: float = 0.2
    top_p: float = 1.0
    max_tokens: int = 200
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a setting that makes no sense."""
        for name, wrong, wanted in (
            ("temperature", not 0 <= self.temperature <= 100, "a number from 0 (greedy) to 100"),
            ("top_p", not 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("max_tokens", self.max_tokens < 1, "at least 1"),
            ("seed", not 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1"),
            ("top_k", self.top_k < 0, "0 (all tokens) or more"),
            ("min_p", not 0 <= self.min_p < 1, "a number from 0 to less than 1"),
            ("repetition_penalty", not 0 < self.repetition_penalty <= 100, "a number above 0, at most 100"),
            ("stop", isinstance(self.stop, str) or not all(self.stop), "a tuple of strings that are not empty"),
            ("logprobs", self.logprobs is not None and not 0 <= self.logprobs <= 100, "0 to 100 alternatives"),
        ):
            if wrong:
                raise InputError(f"{name} is {getattr(self, name)!r}, wanted {wanted}")

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out before drawing."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def mix(x: torch.Tensor) -> torch.Tensor:
    """The splitmix64 finaliser: a bijection of 64-bit integers whose output bits all depend on all input bits."""

    def shift(x: torch.Tensor, n: int) -> torch.Tensor:  # logical, where >> on int64 is arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shift(x, 31)


def uniform(seed: torch.Tensor, position: torch.Tensor, n: int, stream: int) -> torch.Tensor:
    """n numbers in (0, 1) for each seed [B] and position [B]: [B, n] in fp64."""
    key = mix(mix(mix(seed) + position) + stream)
    bits = mix(key[:, None] + torch.arange(n, device=seed.device) * (0x9E3779B97F4A7C15 - 2**64))
    return ((bits & 0xFFFFFFFF).double() + 0.5) * 2.0**-32


def probabilities(
    logits: torch.Tensor, params: list[SamplingParams], seen: torch.Tensor | None = None
) -> torch.Tensor:
    """
    logits [B, V] fp32 -> the distribution [B, V] that row b is drawn from; all on the best token when greedy.

    seen [B, V]: the tokens that repetition_penalty is for; None when no row has one.
    """

    def column(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), device=logits.device, dtype=torch.float32)[:, None]

    if seen is not None:
        penalty = column(p.repetition_penalty for p in params)
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    best = logits.argmax(-1, keepdim=True)
    greedy = torch.zeros_like(logits).scatter_(-1, best, 1.0)
    if all(p.temperature == 0 for p in params):
        return greedy
    probs = (logits / column(max(p.temperature, 1e-5) for p in params)).softmax(-1)  # colder is greedy in fp32
    if any(p.cuts for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        kept = rank < column(p.top_k or torch.inf for p in params)
        kept &= ordered >= column(p.min_p for p in params) * ordered[:, :1]
        ordered = ordered.where(kept, 0)
        top_p = column(p.top_p if p.top_p < 1 else torch.inf for p in params)
        dropped = ordered.cumsum(-1) - ordered >= top_p * ordered.sum(-1, keepdim=True)  # likelier ones reach it
        dropped[:, 0] = False
        cut = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(dropped, 0))
        # Rows without limits stay bit for bit what they are without such neighbours.
        probs = torch.where(column(p.cuts for p in params) > 0, cut / cut.sum(-1, keepdim=True), probs)
    return torch.where(column(p.temperature for p in params) == 0, greedy, probs)


def draw(probs: torch.Tensor, seed: torch.Tensor | None, position: torch.Tensor, stream: int) -> torch.Tensor:
    """
    One token from each row of probs [B, V], which need not sum to one: [B]. Without a seed, the likeliest.

    An exponential race: with E_v ~ Exp(1) the smallest E_v / p_v belongs to token v with probability p_v.
    """
    if seed is None:
        return probs.argmax(-1)
    race = -torch.log(uniform(seed, position, probs.shape[-1], stream))
    return (probs / race).argmax(-1)


def accept(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, seed: torch.Tensor | None, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The acceptance rule of speculative sampling (arXiv:2302.01318, algorithm 2): draft i, drawn from q_i, stays with
    probability min(1, p_i / q_i). At the first that does not, the token is drawn from max(p_i - q_i, 0) instead; when
    all stay, one more comes from p_N. Each token is then distributed exactly as if drawn from p.

    p [B, N + 1, V], q [B, N, V], drafts [B, N], seed [B], position [B] of the first draft -> tokens [B, N + 1], of
    which the first n_accepted [B] + 1 count. Without a seed all rows are greedy: p and q have all on one token.
    """
    B, N = drafts.shape
    p_draft = p[:, :N].gather(-1, drafts[..., None])[..., 0]
    q_draft = q.gather(-1, drafts[..., None])[..., 0]
    u: torch.Tensor | float = 0.0
    if seed is not None:
        at = position[:, None] + torch.arange(N, device=p.device)
        u = uniform(seed.repeat_interleave(N), at.flatten(), 1, ACCEPT).view(B, N)
    n_accepted = (u * q_draft < p_draft).long().cumprod(1).sum(1)
    batch = torch.arange(B, device=p.device)
    residual = torch.cat([(p[:, :N] - q).clamp(min=0), p[:, N:]], dim=1)
    # Where p and q are equal up to rounding, nothing may be left of the residual.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)[batch, n_accepted]
    tokens = torch.cat([drafts, drafts.new_zeros(B, 1)], dim=1)
    tokens[batch, n_accepted] = draw(residual, seed, position + n_accepted, TOKEN)
    return tokens, n_accepted
