"""
The device's side of decoding: the state of every cache row, and the two passes that advance it. A row whose tokens up
to position p - 1 are cached holds p, its newest token x_p, its drafts d_1..d_N of the next ones, and its settings.

One step of the rows, in which the MTP modules draft (V3 paper, 2.2) and the model has the last word:

    verify  the model reads x_p, d_1, .., d_N at positions p..p+N; its logits there give the distributions of the
            tokens at p+1..p+N+1. The first n drafts are accepted, then one more token is drawn: n + 1 new tokens.
    draft   the modules read the hidden states of p..p+n with the tokens that followed, and draft N tokens anew.

Rejected positions need no undoing: their cache entries lie beyond the row's position, so nothing sees them until they
are overwritten. A step takes what it needs from the state and leaves there what the next one needs. So it can be a CUDA
graph, and be launched before the host knows what came out of the last.

Dimension letters: R cache rows, B rows in this pass, S tokens a row, N drafts, V vocabulary, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from errors import InputError
from graphs import Graphs, padded
from model import Step, Transformer
from sampling import DRAFT, TOKEN, Kind, Sampling, SamplingParams, choose, penalised, setting_values

# A token's log-probability, and the likeliest tokens (id, log-probability) in its place: the model's, before sampling.
TokenLogprobs = tuple[float, list[tuple[int, float]]]


class Output(NamedTuple):
    """
    What a pass tells the host. shared [B, 2 + W + N], rank 0's integers: whether to stop (2 or more when the logits are
    no numbers), n_accepted, the new tokens (W = N + 1; 1 after a prompt), the next drafts. own [B, W], top and top_ids
    [B, W, K]: with Kind.logprobs K, the new tokens' log-probabilities and the K highest.
    """

    shared: torch.Tensor
    own: torch.Tensor | None = None
    top: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None


class Flight:
    """An Output on its way to the host, behind all that was launched before it. Its first `live` rows count."""

    def __init__(self, output: Output, live: int):
        self.live = live
        self.arrived = torch.cuda.Event() if output.shared.is_cuda else None
        self.output = Output(*(None if x is None else x.to("cpu", non_blocking=True) for x in output))  # pinned
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> tuple[bool, list[list[int]]]:
        """
        Waits; whether to stop, and for each row the new tokens that count. The one point where the host waits. Raises
        InputError when logits are NaN, or a prompt's infinite.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = self.output.shared.tolist()
        if any(row[0] > 1 for row in rows[: self.live]):
            raise InputError(
                "the model computes NaN or infinite logits: weights are damaged, or too large for its arithmetic; "
                "compare the checkpoint's files with their published checksums"
            )
        return bool(rows[0][0]), [row[2 : 3 + row[1]] for row in rows]

    def logprobs(self) -> list[list[TokenLogprobs]]:
        """After `read`: of each row's new tokens. Nothing where nobody asked."""
        _, own, top, ids = self.output
        if own is None:
            return [[] for _ in range(self.output.shared.shape[0])]
        pairs = [
            [list(zip(i, v, strict=True)) for i, v in zip(*row, strict=True)]
            for row in zip(ids.tolist(), top.tolist(), strict=True)
        ]
        return [list(zip(*row, strict=True)) for row in zip(own.tolist(), pairs, strict=True)]


class Decoder:
    """
    The cache of R = max_batch_size rows of max_seq_len tokens, and what belongs to its rows.

    verify: the rule that decides on drafts, see sampling.verify.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch_size: int,
        max_seq_len: int,
        n_drafts: int,
        cuda_graph: bool,
        verify: Callable,
    ):
        self.model = model
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.n_drafts = n_drafts
        self.verify = verify
        self.device = model.embed.weight.device
        self.cache = model.new_cache(max_batch_size, max_seq_len)
        # [R, 2 + N]: p, x_p, d_1..d_N. Of it position [R], p, and tokens [R, 1 + N] are views.
        self.state = torch.zeros(max_batch_size, 2 + n_drafts, dtype=torch.int64, device=self.device)
        self.position, self.tokens = self.state[:, 0], self.state[:, 1:]
        # The distributions that drafts were drawn from, [R, N, V]; kept only while a row of the batch is not greedy.
        self.draft_probs = torch.zeros(max_batch_size, n_drafts, model.args.vocab_size, device=self.device)
        everything_off = Sampling.of([SamplingParams(0.0)] * max_batch_size, torch.zeros_like(self.position))
        self.seed, self.settings = everything_off.seed, everything_off.settings  # [R], [R, 5]
        self.seen: torch.Tensor | None = None  # [R, V], tokens that a row has; once a row has a repetition penalty
        self.stop = torch.zeros(1, 1, dtype=torch.int64, device=self.device)  # 1 on rank 0: all ranks are to stop
        self.graphs = Graphs() if cuda_graph and self.device.type == "cuda" else None
        self.batches: dict[int, tuple[list[list[int]], torch.Tensor]] = {}  # by size: see _batch

    def _tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def signal(self, stop: bool) -> None:
        """What the next passes say of it on every rank; rank 0's word counts."""
        self.stop.fill_(stop)

    # --- prompts ---

    @torch.inference_mode()
    def admit(
        self, rows: list[int], params: Sequence[SamplingParams], seeds: list[int], prompts: Sequence[list[int]]
    ) -> None:
        """Settings of rows that are about to be prefilled."""
        index = self._tensor(rows)
        self.seed[index] = self._tensor(seeds)
        self.settings[index] = torch.tensor([setting_values(p) for p in params], device=self.device)
        for row, p, prompt in zip(rows, params, prompts, strict=True):
            if p.repetition_penalty != 1:
                if self.seen is None:
                    size = self.max_batch_size, self.model.args.vocab_size
                    self.seen = torch.zeros(size, dtype=torch.bool, device=self.device)
                self.seen[row] = False
                self.seen[row, prompt] = True

    @torch.inference_mode()
    def prefill(
        self,
        rows: list[int],
        starts: list[int],
        lengths: list[int],
        tokens: list[list[int]],
        known: list[list[int]],
        done: list[bool],
        kind: Kind,
    ) -> Flight:
        """
        Run a chunk of B prompts, from positions `starts` [B]: lengths [B] of tokens [B, S]. known [B, S + N]: what
        follows each token in the prompt. The first new tokens are those of rows where the prompt ends: `done` [B].
        """
        B, S = len(rows), len(tokens[0])
        kv_len = min(max(starts) + S, self.max_seq_len)
        rows, start_pos, length, known = (self._tensor(x) for x in (rows, starts, lengths, known))
        done = self._tensor(done).bool()
        step = self.model.step((B, S), start_pos, rows, kv_len)
        h = self.model.hidden(self._tensor(tokens), step, self.cache)
        batch = torch.arange(B, device=self.device)
        logits = self.model.logits(h[batch, length - 1])
        sampling = self._sampling(rows, kind)
        seen = self.seen[rows] if kind.penalty else None
        token, _ = choose(penalised(logits, sampling, seen), sampling, start_pos + length, TOKEN)
        known[batch, length - 1] = torch.where(done, token, known[batch, length - 1])
        drafts = self._draft(h, known, length - 1, done, step, sampling)
        stop = torch.where(logits.isfinite().all(), self.stop, 2)
        shared = self._share(stop.expand(B, 1), torch.zeros_like(length), token[:, None], drafts)
        self.position[rows] = start_pos + length
        self.tokens[rows] = shared[:, 2:]
        if kind.penalty:
            self.seen[rows[done], shared[done, 2]] = True
        return Flight(self._output(shared, logits[:, None], kind), B)

    # --- steps ---

    def padding(self, n_rows: int) -> int:
        """How many rows a step of n_rows takes in addition, to run at a size that has a graph."""
        return 0 if self.graphs is None else padded(n_rows, self.max_batch_size) - n_rows

    @torch.inference_mode()
    def step(self, rows: list[int], spare: list[int], kind: Kind, kv_len: int) -> Flight:
        """
        One step of the live `rows`, none of which has more than kv_len cached tokens after it. What is cached of the
        free rows `spare`, as many as `padding` says, is overwritten. Nothing here waits for the device.
        """
        batch = self._batch(rows, spare)
        if self.graphs is None:
            output = self._step(batch, kind, min(kv_len, self.max_seq_len))
        else:
            output = self.graphs.run((batch.shape[1], kind), lambda: self._step(batch, kind, self.max_seq_len))
        return Flight(output, len(rows))

    def _batch(self, rows: list[int], spare: list[int]) -> torch.Tensor:
        """
        [2, B]: the rows of a step, and the last position that each may move to. Always the same tensor for the same B,
        as a graph requires; uploaded when it changes.
        """
        values = [[*rows, *spare], [self.max_seq_len - 1] * len(rows) + [0] * len(spare)]
        B = len(values[0])
        if B not in self.batches:
            self.batches[B] = [], torch.empty(2, B, dtype=torch.int64, device=self.device)
        held, batch = self.batches[B]
        if held != values:
            batch.copy_(torch.tensor(values, pin_memory=batch.is_cuda), non_blocking=True)
            self.batches[B] = values, batch
        return batch

    def _step(self, batch: torch.Tensor, kind: Kind, kv_len: int) -> Output:
        """What `step` launches: from the state to the state, all on the device."""
        N = self.n_drafts
        rows, last_position = batch
        state = self.state[rows]
        position, tokens, drafts = state[:, 0], state[:, 1:], state[:, 2:]
        step = self.model.step(tuple(tokens.shape), position, rows, kv_len)
        h = self.model.hidden(tokens, step, self.cache)
        logits = self.model.logits(h)

        sampling = self._sampling(rows, kind)
        seen = None
        if kind.penalty:  # before each new token: those the row has, and the drafts up to there
            seen = [self.seen[rows]]
            for k in range(N):
                seen.append(seen[-1].scatter(1, drafts[:, k : k + 1], True))
            seen = torch.stack(seen, dim=1)
        q = self.draft_probs[rows] if kind.random else None
        following = position + 1
        new, n_accepted = self.verify(penalised(logits, sampling, seen), q, drafts, sampling, following)
        known = torch.cat([new, new.new_zeros(len(new), N)], dim=1) if N else new
        drafts = self._draft(h, known, n_accepted, None, step, sampling)

        wrong = logits[:, :, 0].isnan()  # a NaN anywhere on the way to a position's logits makes all of them NaN
        if N:  # what comes after a draft that was refused is not used
            used = torch.arange(N + 1, device=self.device) <= n_accepted[:, None]
            wrong = (wrong & used).any(1, keepdim=True)
        shared = self._share(torch.add(self.stop, wrong, alpha=2), n_accepted, new, drafts)
        n_accepted, new, drafts = shared[:, 1:2], shared[:, 2 : N + 3], shared[:, N + 3 :]
        position = torch.minimum(following + n_accepted[:, 0], last_position)
        state = torch.cat([position[:, None], new.gather(1, n_accepted), drafts], dim=1)
        self.state.index_copy_(0, rows, state)
        if kind.penalty:
            counts = torch.arange(N + 1, device=self.device) <= n_accepted
            # Not `= True`: a Python value would be copied from the host, which no graph can hold.
            self.seen[rows[:, None], torch.where(counts, new, new[:, :1])] = torch.ones_like(counts)
        return self._output(shared, logits, kind)

    def _draft(
        self,
        h: torch.Tensor,
        known: torch.Tensor,
        last: torch.Tensor,
        ends: torch.Tensor | None,
        step: Step,
        sampling: Sampling,
    ) -> torch.Tensor:
        """
        Draft N tokens a row: [B, N]; their distributions go to draft_probs.

        h [B, S, D]: hidden states of the pass just made at `step`. known [B, S + N]: the token after each, up to index
        last [B]; where the row `ends` [B] there (None: all do), drafts fill in the rest, else it is known too (a chunk
        amid a prompt). Module k reads h' of module k - 1 with the tokens k + 1 further on; its cache fills alongside
        the model's. Past the last module, its own output stands in for the next position's hidden state.
        """
        n_modules = len(self.model.mtp)
        B, S, _ = h.shape
        drafts = known.new_zeros(B, self.n_drafts)
        if not self.n_drafts:
            return drafts
        batch = torch.arange(B, device=self.device)
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
            token, probs = choose(self.model.logits(out), sampling, start_pos + last + 2 + k, DRAFT)
            drafts[:, k] = token
            if probs is not None:
                self.draft_probs[rows, k] = probs
            at = last + 1 + k
            known[batch, at] = token if ends is None else torch.where(ends, token, known[batch, at])
        return drafts

    def _sampling(self, rows: torch.Tensor, kind: Kind) -> Sampling:
        """How `rows` [B] are sampled; nothing is looked up where all just take the best token."""
        plain = not (kind.random or kind.penalty)
        return Sampling(None, None, kind) if plain else Sampling(self.seed[rows], self.settings[rows], kind)

    # --- results ---

    def _share(
        self, stop: torch.Tensor, n_accepted: torch.Tensor, new: torch.Tensor, drafts: torch.Tensor
    ) -> torch.Tensor:
        """Output.shared, of stop [B, 1]. Rank 0's go to all: ranks whose sums round differently cannot drift apart."""
        return self.model.parallel.broadcast(torch.cat([stop, n_accepted[:, None], new, drafts], dim=1))

    def _output(self, shared: torch.Tensor, logits: torch.Tensor, kind: Kind) -> Output:
        """logits [B, W, V] and the new tokens chosen there."""
        if kind.logprobs is None:
            return Output(shared)
        logprobs = logits.log_softmax(-1)
        new = shared[:, 2 : 2 + logits.shape[1]]
        return Output(shared, logprobs.gather(-1, new[..., None])[..., 0], *logprobs.topk(kind.logprobs))
