"""
Choosing the next token. Every draw comes from a hash of (seed, position, token), so a row's randomness depends neither
on its neighbours in the batch nor on the device, and needs no state.

All of it runs on the device without a look at the values, so that a CUDA graph can hold it. What a batch does not need
is left out by its `Kind`: all-greedy rows only take an argmax.

Dimension letters: B rows, N drafts a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple, get_type_hints

import torch

from errors import InputError
from fused import argmax

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
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, kind in get_type_hints(type(self)).items():
            value, number = getattr(self, name), {float: Real, int: Integral, int | None: Integral | None}.get(kind)
            if number and not isinstance(value, number):
                raise InputError(f"{name} is {value!r}, wanted {'a' if number is Real else 'a whole'} number")
            if number not in (None, Real) and value is not None:
                object.__setattr__(self, name, int(value))  # NumPy's cannot hold what a seed becomes
        texts = type(self.stop) is tuple and all(type(s) is str and s for s in self.stop)
        for name, wrong, wanted in (
            ("temperature", not 0 <= self.temperature <= 100, "a number from 0 (greedy) to 100"),
            ("top_p", not 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("max_tokens", self.max_tokens < 1, "at least 1"),
            ("seed", not 0 <= self.seed < 2**63, "an integer from 0 to 2**63 - 1"),
            ("top_k", not 0 <= self.top_k < 2**31, "0 (all tokens) or more, below 2**31"),
            ("min_p", not 0 <= self.min_p < 1, "a number from 0 to less than 1"),
            ("repetition_penalty", not 0.01 <= self.repetition_penalty <= 100, "a number from 0.01 to 100"),
            ("stop", not texts, "strings that are not empty"),
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


class Kind(NamedTuple):
    """What a batch needs because of at least one of its rows. `logprobs`: the most alternatives that a row reports."""

    random: bool
    cuts: bool
    penalty: bool
    logprobs: int | None

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Kind:
        return cls(
            random=any(p.temperature > 0 for p in params),
            cuts=any(p.temperature > 0 and p.cuts for p in params),
            penalty=any(p.repetition_penalty != 1 for p in params),
            logprobs=max((p.logprobs for p in params if p.logprobs is not None), default=None),
        )


class Sampling(NamedTuple):
    """
    How the rows of a batch are sampled: seed [B], settings [B, 5] fp32 with a column for each of SETTINGS; None where
    `kind` needs neither.
    """

    seed: torch.Tensor | None
    settings: torch.Tensor | None
    kind: Kind

    @classmethod
    def of(cls, params: Sequence[SamplingParams], seed: torch.Tensor) -> Sampling:
        return cls(seed, torch.tensor([setting_values(p) for p in params], device=seed.device), Kind.of(params))

    def column(self, name: str, n_dims: int) -> torch.Tensor:
        """[B, 1, ..] in n_dims dimensions."""
        column = self.settings[:, SETTINGS.index(name)]
        return column.view(-1, *[1] * (n_dims - 1))


SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def setting_values(params: SamplingParams) -> list[float]:
    """One row of Sampling.settings; limits that are off are infinite."""
    p = params
    top_p, top_k = p.top_p if p.top_p < 1 else torch.inf, p.top_k or torch.inf
    return [p.temperature, top_p, top_k, p.min_p, p.repetition_penalty]


def penalised(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None) -> torch.Tensor:
    """logits [B, .., V] with the repetition penalty of tokens `seen` [B, .., V], which is None when no row has one."""
    if seen is None:
        return logits
    penalty = sampling.column("repetition_penalty", logits.dim())
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """logits [B, .., V] fp32 -> the distributions [B, .., V] to draw from; all on the best token where greedy."""
    best = logits.argmax(-1, keepdim=True)
    greedy = torch.zeros_like(logits).scatter_(-1, best, 1.0)
    temperature, top_p, top_k, min_p, _ = (sampling.column(name, logits.dim()) for name in SETTINGS)
    probs = (logits / temperature.clamp(min=1e-5)).softmax(-1)  # colder is greedy in fp32
    if sampling.kind.cuts:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        kept = ordered.masked_fill((rank >= top_k) | (ordered < min_p * ordered[..., :1]), 0)
        dropped = kept.cumsum(-1) - kept >= top_p * kept.sum(-1, keepdim=True)  # likelier ones reach it
        dropped[..., 0] = False
        cut = torch.zeros_like(probs).scatter_(-1, order, kept.masked_fill(dropped, 0))
        # Rows without limits stay bit for bit what they are without such neighbours.
        limited = (top_p < torch.inf) | (top_k < torch.inf) | (min_p > 0)
        probs = torch.where(limited, cut / cut.sum(-1, keepdim=True), probs)
    return torch.where(temperature == 0, greedy, probs)


def draw(probs: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, stream: int) -> torch.Tensor:
    """
    One token from each row of probs [B, V], which need not sum to one: [B].

    An exponential race: with E_v ~ Exp(1) the smallest E_v / p_v belongs to token v with probability p_v.
    """
    race = -torch.log(uniform(seed, position, probs.shape[-1], stream))
    return (probs / race).argmax(-1)


def choose(
    logits: torch.Tensor, sampling: Sampling, position: torch.Tensor, stream: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits [B, V] -> tokens [B], and the distributions [B, V] they were drawn from; None when all rows are greedy."""
    if not sampling.kind.random:
        return argmax(logits), None
    probs = probabilities(logits, sampling)
    return draw(probs, sampling.seed, position, stream), probs


def accept(
    p: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, seed: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The acceptance rule of speculative sampling (arXiv:2302.01318, algorithm 2): draft i, drawn from q_i, stays with
    probability min(1, p_i / q_i). At the first that does not, the token is drawn from max(p_i - q_i, 0) instead; when
    all stay, one more comes from p_N. Each token is then distributed exactly as if drawn from p.

    p [B, N + 1, V], q [B, N, V], drafts [B, N], seed [B], position [B] of the first draft -> tokens [B, N + 1], of
    which the first n_accepted [B] + 1 count. A greedy row has p all on one token; it comes out whatever q is.
    """
    B, N = drafts.shape
    p_draft = p[:, :N].gather(-1, drafts[..., None])[..., 0]
    q_draft = q.gather(-1, drafts[..., None])[..., 0]
    at = position[:, None] + torch.arange(N, device=p.device)
    u = uniform(seed[:, None].expand(B, N).flatten(), at.flatten(), 1, ACCEPT).view(B, N)
    n_accepted = (u * q_draft < p_draft).long().cumprod(1).sum(1)
    batch = torch.arange(B, device=p.device)
    p_next = p[batch, n_accepted]
    if N:
        q_next = q[batch, n_accepted.clamp(max=N - 1)].masked_fill((n_accepted == N)[:, None], 0)
        residual = (p_next - q_next).clamp(min=0)
        # Where p and q are equal up to rounding, nothing may be left of the residual.
        p_next = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p_next)
    tokens = torch.cat([drafts, drafts.new_zeros(B, 1)], dim=1)
    tokens[batch, n_accepted] = draw(p_next, seed, position + n_accepted, TOKEN)
    return tokens, n_accepted


def verify(
    logits: torch.Tensor, q: torch.Tensor, drafts: torch.Tensor, sampling: Sampling, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `accept` for the model's logits [B, N + 1, V]. Greedy rows keep the drafts that are the best token in their place.
    """
    if sampling.kind.random:
        return accept(probabilities(logits, sampling), q, drafts, sampling.seed, position)
    best = argmax(logits.flatten(0, 1)).view(logits.shape[:2])
    return best, (best[:, :-1] == drafts).long().cumprod(1).sum(1)
