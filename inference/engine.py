"""
The decoding loop: requests wait in a queue, each takes a free row of the cache, and all live rows advance together,
each at its own position. Drafting with the MTP modules (V3 paper, 2.2) is the same step with more than one query token.

One step of a row whose tokens up to position p - 1 are cached, x_p being its newest token and d_1..d_N its drafts:

    verify  the model reads x_p, d_1, .., d_N at positions p..p+N; its logits there give the distributions of the
            tokens at p+1..p+N+1. The first n drafts are accepted, then one more token is drawn: n + 1 new tokens.
    draft   the modules read the hidden states of p..p+n with the tokens that followed, and draft N tokens anew.

Rejected positions need no undoing: their cache entries lie beyond the row's position, so nothing sees them until they
are overwritten. Every rank runs this same loop; the tokens are rank 0's.

Dimension letters: B rows in this pass, S tokens a row, N drafts, V vocabulary, D dim.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from model import Step, Transformer
from sampling import DRAFT, TOKEN, SamplingParams, accept, draw, probabilities

# A token's log-probability, and the likeliest tokens (id, log-probability) in its place: the model's, before sampling.
TokenLogprobs = tuple[float, list[tuple[int, float]]]
News = tuple["Request", list[int], list[TokenLogprobs]]  # a request, its new tokens, and theirs if asked for


@dataclass
class Request:
    """A prompt and what became of it. `index` tells requests with the same seed apart."""

    prompt: list[int]
    params: SamplingParams
    index: int = 0
    tokens: list[int] = field(default_factory=list)  # generated so far, without the stop token
    text: str = ""  # the same as text, kept by LLM.run
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of `tokens`, if asked for
    finish_reason: Literal["stop", "length", "interrupted"] | None = None
    first_token_seconds: float = 0.0
    row: int = -1
    cached: int = 0  # tokens of prompt + tokens whose latents are in the cache
    drafts: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tokens


@dataclass
class Stats:
    """Counted since the engine was made, or since `Engine.stats` was last replaced."""

    prefill_tokens: int = 0  # prompt tokens run through the model; a reused prefix is not
    new_tokens: int = 0
    steps: int = 0  # decode passes of the model
    row_steps: int = 0  # live rows, summed over those passes
    row_tokens: int = 0  # tokens that these yielded
    drafted: list[int] = field(default_factory=list)  # per draft position: how often it came up for a decision
    accepted: list[int] = field(default_factory=list)  # and was accepted

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a live row gains in a decode pass."""
        return self.row_tokens / max(self.row_steps, 1)


class Engine:
    """
    Decodes with `model` over a cache of `max_batch_size` rows of `max_seq_len` tokens.

    n_drafts: drafted tokens a step; more than the model has modules reuse the last one. prefill_chunk: prompt tokens a
    pass, over all rows. keep_prefix: a prompt that begins like what a free row still holds prefills only the rest.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch_size: int,
        max_seq_len: int,
        stop_ids: frozenset[int] = frozenset(),
        n_drafts: int = 0,
        prefill_chunk: int = 4096,
        keep_prefix: bool = False,
    ):
        self.model = model
        self.max_seq_len = max_seq_len
        self.stop_ids = stop_ids
        self.n_drafts = n_drafts if len(model.mtp) else 0
        self.prefill_chunk = prefill_chunk
        self.keep_prefix = keep_prefix
        self.device = model.embed.weight.device
        self.cache = model.new_cache(max_batch_size, max_seq_len)
        self.contents: list[list[int]] = [[] for _ in range(max_batch_size)]  # token ids that each row's cache holds
        self.free = list(range(max_batch_size))
        # The distributions the standing drafts were drawn from: [rows, N, V].
        vocab = model.args.vocab_size
        self.draft_probs = torch.zeros(max_batch_size, self.n_drafts, vocab, device=self.device)
        self.stats = Stats(drafted=[0] * self.n_drafts, accepted=[0] * self.n_drafts)

    def run(
        self, requests: Iterable[Request], interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, list[int]]]:
        """
        Decode all requests; yields (request, its new tokens) as they come, finish_reason being set with the last.
        Whoever takes them may set it too, to end a request.

        `interrupted` is asked on rank 0 once a step and ends what is live and waiting. A prompt must be shorter than
        max_seq_len: prompt and completion together are at most that long.
        """
        waiting, live = deque(requests), []
        start = time.perf_counter()
        try:
            while waiting or live:
                admitted = [self._admit(waiting.popleft()) for _ in range(min(len(self.free), len(waiting)))]
                live += admitted
                news, stopped = self._prefill(admitted, interrupted) if admitted else self._decode(live, interrupted)
                for request, tokens, logprobs in news:
                    request.first_token_seconds = request.first_token_seconds or time.perf_counter() - start
                    yield request, self._take(request, tokens, logprobs)
                    if request.finish_reason:
                        live.remove(request)
                        self._release(request)
                if stopped:
                    for request in [*live, *waiting]:
                        request.finish_reason = "interrupted"
                    return
        finally:
            for request in live:
                self._release(request)

    # --- rows of the cache ---

    def _admit(self, request: Request) -> Request:
        """Give the request a free row: the one that already holds most of its prompt."""

        def common(row: int) -> int:
            held = self.contents[row] if self.keep_prefix else []
            limit = min(len(held), len(request.prompt) - 1)  # the last token is always run, for its logits
            return next((i for i in range(limit) if held[i] != request.prompt[i]), limit)

        request.row = max(self.free, key=common)
        request.cached = common(request.row)
        self.free.remove(request.row)
        return request

    def _release(self, request: Request) -> None:
        self.contents[request.row] = request.ids[: request.cached]
        self.free.append(request.row)

    def _take(self, request: Request, tokens: list[int], logprobs: list[TokenLogprobs]) -> list[int]:
        """Append new tokens up to a stop token or the request's limit; returns those that count."""
        limit = min(len(request.prompt) + request.params.max_tokens, self.max_seq_len)
        taken: list[int] = []
        for token in tokens:
            if token in self.stop_ids:
                request.finish_reason = "stop"
                break
            taken.append(token)
            if len(request.ids) + len(taken) >= limit:
                request.finish_reason = "length"
                break
        request.tokens += taken
        request.logprobs += logprobs[: len(taken)]
        self.stats.new_tokens += len(taken)
        return taken

    # --- passes of the model ---

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _kv_len(self, starts: list[int], S: int) -> int:
        return min(max(starts) + S, self.max_seq_len)

    def _seeds(self, requests: list[Request]) -> torch.Tensor | None:
        """A seed for each row; None when all are greedy, as then nothing is random."""
        if all(r.params.temperature == 0 for r in requests):
            return None
        return self._tensor([(r.params.seed + (r.index << 32)) % 2**63 for r in requests])

    def _seen(self, requests: list[Request], ahead: torch.Tensor) -> torch.Tensor | None:
        """
        [B, n + 1, V]: the tokens that each row has before its j-th new one, the first j of `ahead` [B, n] counted in.
        None when no row has a repetition penalty.
        """
        if all(r.params.repetition_penalty == 1 for r in requests):
            return None
        B, n = ahead.shape
        seen = torch.zeros(B, n + 1, self.model.args.vocab_size, dtype=torch.bool, device=self.device)
        for row, request in zip(seen, requests, strict=True):
            row[:, request.ids] = True
        for j in range(n):
            seen[torch.arange(B, device=self.device), j + 1 :, ahead[:, j]] = True
        return seen

    def _logprobs(
        self, requests: list[Request], logits: torch.Tensor, tokens: torch.Tensor
    ) -> list[list[TokenLogprobs]]:
        """For logits [B, n, V] and the tokens [B, n] chosen there, what the requests that asked for it report."""
        most = max((r.params.logprobs for r in requests if r.params.logprobs is not None), default=None)
        if most is None:
            return [[] for _ in requests]
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens[..., None])[..., 0].tolist()
        values, ids = (top.tolist() for top in logprobs.topk(most))
        return [
            [
                (own, list(zip(i, v, strict=True))[: r.params.logprobs])
                for own, i, v in zip(chosen[b], ids[b], values[b], strict=True)
            ]
            if r.params.logprobs is not None
            else []
            for b, r in enumerate(requests)
        ]

    def _share(self, interrupted: Callable[[], bool], *parts: torch.Tensor) -> tuple[list[list[int]], bool]:
        """Rank 0's integers, [B, ..] each, joined per row: the one point of a step where the host waits."""
        flag = self._tensor([self.model.parallel.rank == 0 and interrupted()])
        joined = torch.cat([flag, torch.cat(parts, dim=1).flatten()])
        flag, *flat = self.model.parallel.broadcast(joined).tolist()
        width = len(flat) // parts[0].shape[0]
        return [flat[i : i + width] for i in range(0, len(flat), width)], bool(flag)

    @torch.inference_mode()
    def _prefill(self, requests: list[Request], interrupted: Callable[[], bool]) -> tuple[list[News], bool]:
        """Run the requests' prompts in chunks; their first tokens."""
        news: list[News] = []
        stopped = False
        pending = list(requests)
        while pending and not stopped:
            S = max(1, self.prefill_chunk // len(pending))
            S = min(S, max(len(r.prompt) - r.cached for r in pending))
            starts = [r.cached for r in pending]
            lengths = [min(S, len(r.prompt) - r.cached) for r in pending]
            tokens = [r.prompt[s : s + n] + [0] * (S - n) for r, s, n in zip(pending, starts, lengths, strict=True)]
            rows, start_pos, last = self._tensor([r.row for r in pending]), self._tensor(starts), self._tensor(lengths)
            step = self.model.step((len(pending), S), start_pos, rows, self._kv_len(starts, S))
            h = self.model.hidden(self._tensor(tokens), step, self.cache)
            self.stats.prefill_tokens += sum(lengths)

            params = [r.params for r in pending]
            batch = torch.arange(len(pending), device=self.device)
            logits = self.model.logits(h[batch, last - 1])
            seen = self._seen(pending, start_pos.new_zeros(len(pending), 0))
            probs = probabilities(logits, params, None if seen is None else seen[:, 0])
            token = draw(probs, self._seeds(pending), start_pos + last, TOKEN)
            # What follows each token of the chunk: the prompt's own next tokens, and after its end the drawn one.
            ahead = S + self.n_drafts
            known = [r.prompt[s + 1 : s + 1 + ahead] for r, s in zip(pending, starts, strict=True)]
            known = self._tensor([k + [0] * (ahead - len(k)) for k in known])
            done = self._tensor([r.cached + n == len(r.prompt) for r, n in zip(pending, lengths, strict=True)]).bool()
            known[batch, last - 1] = torch.where(done, token, known[batch, last - 1])
            drafts = self._draft(pending, h, known, last - 1, done, step)
            values, stopped = self._share(interrupted, token[:, None], drafts)
            logprobs = self._logprobs(pending, logits[:, None], token[:, None])
            for r, n, (first, *draft), logprob in zip(pending, lengths, values, logprobs, strict=True):
                r.cached += n
                if r.cached == len(r.prompt):
                    r.drafts = draft
                    news.append((r, [first], logprob))
            pending = [r for r in pending if r.cached < len(r.prompt)]
        return news, stopped

    @torch.inference_mode()
    def _decode(self, requests: list[Request], interrupted: Callable[[], bool]) -> tuple[list[News], bool]:
        """One step of all live rows: verify the standing drafts, draw one token more, draft anew."""
        B, N = len(requests), self.n_drafts
        starts = [r.cached for r in requests]
        rows, start_pos = self._tensor([r.row for r in requests]), self._tensor(starts)
        tokens = self._tensor([[r.ids[-1], *r.drafts] for r in requests])
        step = self.model.step((B, N + 1), start_pos, rows, self._kv_len(starts, N + 1))
        h = self.model.hidden(tokens, step, self.cache)

        params = [r.params for r in requests for _ in range(N + 1)]
        logits, seen = self.model.logits(h), self._seen(requests, tokens[:, 1:])
        probs = probabilities(logits.flatten(0, 1), params, None if seen is None else seen.flatten(0, 1))
        probs = probs.unflatten(0, (B, N + 1))
        new, n_accepted = accept(probs, self.draft_probs[rows], tokens[:, 1:], self._seeds(requests), start_pos + 1)
        known = torch.cat([new, new.new_zeros(B, N)], dim=1)
        drafts = self._draft(requests, h, known, n_accepted, torch.ones_like(rows).bool(), step)
        values, stopped = self._share(interrupted, n_accepted[:, None], new, drafts)
        logprobs = self._logprobs(requests, logits, new)
        news: list[News] = []
        for r, (n, *ids), logprob in zip(requests, values, logprobs, strict=True):
            r.cached += n + 1
            r.drafts = ids[N + 1 :]
            news.append((r, ids[: n + 1], logprob))
            for i in range(min(n + 1, N)):
                self.stats.drafted[i] += 1
                self.stats.accepted[i] += i < n
            self.stats.row_tokens += n + 1
        self.stats.steps += 1
        self.stats.row_steps += B
        return news, stopped

    def _draft(
        self,
        requests: list[Request],
        h: torch.Tensor,
        known: torch.Tensor,
        last: torch.Tensor,
        ends: torch.Tensor,
        step: Step,
    ) -> torch.Tensor:
        """
        Draft N tokens a row: [B, N]; their distributions go to draft_probs.

        h [B, S, D]: hidden states of the pass just made at `step`. known [B, S + N]: the token after each, up to index
        last [B]; where the row `ends` [B] there, drafts fill in the rest, else it is known too (a chunk amid a prompt).
        Module k reads h' of module k - 1 with the tokens k + 1 further on; its cache fills alongside the model's. Past
        the last module, its own output stands in for the next position's hidden state.
        """
        n_modules = len(self.model.mtp)
        B, S, _ = h.shape
        batch = torch.arange(B, device=self.device)
        drafts = known.new_zeros(B, self.n_drafts)
        start_pos, rows = step.positions[:, 0], step.rows
        bound = min(step.kv_len + self.n_drafts, self.max_seq_len)
        for k in range(self.n_drafts):
            if k < n_modules:
                h = self.model.draft(k, h, known[:, k : k + S], step, self.cache)
                out = h[batch, last]
            else:
                position = (start_pos + last + 1 + k - n_modules).clamp(max=self.max_seq_len - 1)
                one = self.model.step((B, 1), position, rows, bound)
                out = self.model.draft(n_modules - 1, out[:, None], drafts[:, k - 1 : k], one, self.cache)[:, 0]
            probs = probabilities(self.model.logits(out), [r.params for r in requests])
            drafts[:, k] = draw(probs, self._seeds(requests), start_pos + last + 2 + k, DRAFT)
            self.draft_probs[rows, k] = probs
            known[batch, last + 1 + k] = drafts[:, k].where(ends, known[batch, last + 1 + k])
        return drafts
