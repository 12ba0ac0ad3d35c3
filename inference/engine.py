"""
The decoding loop: requests wait in a queue, each takes a free row of the cache, and all live rows advance together,
each at its own position. What a pass of the model does is decode.py's; here is who takes part in it, and when.

On a GPU a step is launched before the results of the last are read: the device has no use for them, and does not wait
while the host prints them. A row that turns out to have ended has then taken part in one step too many, whose tokens
are dropped. Every rank runs this same loop on rank 0's tokens.

Dimension letters: S prompt tokens a row in this pass, N drafts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from config import PREFILL_CHUNK
from decode import Decoder, Flight, TokenLogprobs
from errors import InputError
from model import Transformer
from sampling import Kind, SamplingParams, verify

Launched = tuple[list["Request"], Flight]  # a step under way, and the rows that were live
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
    row: int = -1  # of the cache, while it is live
    cached: int = 0  # tokens of prompt + tokens whose latents are in the cache

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tokens


@dataclass
class Stats:
    """Counted since the engine was made, or since `Engine.stats` was last replaced."""

    prefill_tokens: int = 0  # prompt tokens run through the model; a reused prefix is not
    new_tokens: int = 0
    steps: int = 0  # decode passes of the model, those launched in vain too
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
    cuda_graph: on a GPU, launch a step as one CUDA graph. run_ahead: launch a step before the last one's results are
    read; by default on a GPU. verify: another rule for the drafts than sampling.verify.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch_size: int,
        max_seq_len: int,
        stop_ids: frozenset[int] = frozenset(),
        n_drafts: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
        keep_prefix: bool = False,
        cuda_graph: bool = True,
        run_ahead: bool | None = None,
        verify: Callable = verify,
    ):
        self.parallel = model.parallel
        self.max_seq_len = max_seq_len
        self.stop_ids = stop_ids
        # Fewer in a cache that a step's tokens would fill: prefill_attention takes as many tokens as keys for a start.
        self.n_drafts = max(0, min(n_drafts, max_seq_len - 2)) if len(model.mtp) else 0
        self.prefill_chunk = prefill_chunk
        self.keep_prefix = keep_prefix
        self.decoder = Decoder(model, max_batch_size, max_seq_len, self.n_drafts, cuda_graph, verify)
        self.run_ahead = self.decoder.device.type == "cuda" if run_ahead is None else run_ahead
        self.contents: list[list[int]] = [[] for _ in range(max_batch_size)]  # token ids that each row's cache holds
        self.free = list(range(max_batch_size))
        self.kind: Kind | None = None  # of the live rows; None when they have changed
        self.running = False
        self.stats = Stats(drafted=[0] * self.n_drafts, accepted=[0] * self.n_drafts)

    def run(
        self, requests: Iterable[Request], interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, list[int]]]:
        """
        Decode all requests; yields (request, its new tokens) as they come, finish_reason being set with the last.
        Whoever takes them may set it too, to end a request.

        `interrupted` is asked on rank 0 once a pass and ends what is live and waiting. A prompt must be shorter than
        max_seq_len: prompt and completion together are at most that long. Raises InputError while another run is
        under way: its rows would be taken.
        """
        if self.running:
            raise InputError("another stream is being decoded: take it to its end, or close() it")
        self.running = True
        waiting, live = deque(requests), []
        in_flight: Launched | None = None
        self.decoder.signal(stop=False)
        start = time.perf_counter()
        try:
            while waiting or live:
                prefilling = bool(waiting and self.free and in_flight is None)
                if prefilling:
                    admitted = self._admit([waiting.popleft() for _ in range(min(len(self.free), len(waiting)))])
                    live += admitted
                    passes = self._prefill(admitted, interrupted)
                else:
                    step = in_flight or self._launch(live, None, interrupted)
                    in_flight = self._launch(live, step, interrupted) if self._worth_another(live, waiting) else None
                    passes = [self._read(step)]
                for news, stopped in passes:
                    for request, tokens, logprobs in news:
                        request.first_token_seconds = request.first_token_seconds or time.perf_counter() - start
                        taken = self._take(request, tokens, logprobs)
                        if not prefilling:
                            self._count(len(tokens), len(taken) + (request.finish_reason == "stop"))
                        yield request, taken
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
            self.running = False
            self.free += [row for row in range(len(self.contents)) if row not in self.free]  # taken amid an exception

    # --- rows of the cache ---

    def _admit(self, requests: list[Request]) -> list[Request]:
        """Give each request a free row: the one that already holds most of its prompt."""
        for request in requests:
            common = {row: self._common(row, request.prompt) for row in self.free}
            request.row = max(common, key=common.__getitem__)
            request.cached = common[request.row]
            self.free.remove(request.row)
        seeds = [(r.params.seed + (r.index << 32)) % 2**63 for r in requests]
        rows, params, prompts = zip(*((r.row, r.params, r.prompt) for r in requests), strict=True)
        self.decoder.admit(list(rows), params, seeds, prompts)
        self.kind = None
        return requests

    def _common(self, row: int, prompt: list[int]) -> int:
        """How many tokens of the prompt the row already holds."""
        held = self.contents[row] if self.keep_prefix else []
        limit = min(len(held), len(prompt) - 1)  # the last token is always run, for its logits
        return next((i for i in range(limit) if held[i] != prompt[i]), limit)

    def _release(self, request: Request) -> None:
        self.contents[request.row] = request.ids[: request.cached]
        self.free.append(request.row)
        request.row = -1
        self.kind = None

    def forget(self) -> None:
        """Let no prompt reuse what the rows hold."""
        self.contents = [[] for _ in self.contents]

    def _room(self, request: Request) -> int:
        """How many tokens the request may still gain."""
        limit = min(len(request.prompt) + request.params.max_tokens, self.max_seq_len)
        return limit - len(request.prompt) - len(request.tokens)

    def _take(self, request: Request, tokens: list[int], logprobs: list[TokenLogprobs]) -> list[int]:
        """Append new tokens up to a stop token or the request's limit; returns those that count."""
        room = self._room(request)
        taken: list[int] = []
        for token in tokens:
            if token in self.stop_ids:
                request.finish_reason = "stop"
                break
            taken.append(token)
            if len(taken) == room:
                request.finish_reason = "length"
                break
        request.tokens += taken
        request.logprobs += logprobs[: len(taken)]
        self.stats.new_tokens += len(taken)
        return taken

    def _count(self, new: int, gained: int) -> None:
        """In the statistics: a step gave a row `new` tokens, of which `gained` came before its end."""
        for i in range(min(gained, self.n_drafts)):
            self.stats.drafted[i] += 1
            self.stats.accepted[i] += i < new - 1
        self.stats.row_tokens += gained
        self.stats.row_steps += 1

    # --- passes of the model ---

    def _ask(self, interrupted: Callable[[], bool]) -> None:
        """Tell the device of an interrupt; the results of the next pass carry it to every rank's host."""
        if self.parallel.rank == 0 and interrupted():
            self.decoder.signal(stop=True)

    def _prefill(self, requests: list[Request], interrupted: Callable[[], bool]) -> Iterator[tuple[list[News], bool]]:
        """Run the requests' prompts in chunks; after each the first tokens of those whose prompt ended there."""
        pending = requests
        while pending:
            part = self._prefill_part(pending)
            S = min(self.prefill_chunk, max(len(r.prompt) - r.cached for r in part))
            starts = [r.cached for r in part]
            lengths = [min(S, len(r.prompt) - r.cached) for r in part]
            tokens = [r.prompt[s : s + n] + [0] * (S - n) for r, s, n in zip(part, starts, lengths, strict=True)]
            ahead = S + self.n_drafts
            known = [r.prompt[s + 1 : s + 1 + ahead] for r, s in zip(part, starts, strict=True)]
            known = [k + [0] * (ahead - len(k)) for k in known]
            done = [r.cached + n == len(r.prompt) for r, n in zip(part, lengths, strict=True)]
            self._ask(interrupted)
            kind = Kind.of([r.params for r in part])
            flight = self.decoder.prefill([r.row for r in part], starts, lengths, tokens, known, done, kind)
            self.stats.prefill_tokens += sum(lengths)

            stopped, first = flight.read()
            news: list[News] = []
            for r, n, token, logprob in zip(part, lengths, first, flight.logprobs(), strict=True):
                r.cached += n
                if r.cached == len(r.prompt):
                    news.append((r, token, reported(logprob, r)))
            pending = [r for r in pending if r.cached < len(r.prompt)]
            yield news, stopped

    def _prefill_part(self, pending: list[Request]) -> list[Request]:
        """
        Whom the next pass of a prefill takes: those with least left, as many as fit into a chunk whole. A prompt cut
        into slices costs more, as each expands the keys of all before it, which must fit into memory too.
        """
        pending = sorted(pending, key=lambda r: len(r.prompt) - r.cached)
        keys = max(self.prefill_chunk, self.max_seq_len)
        cached = 0
        for n, r in enumerate(pending):
            left, cached = len(r.prompt) - r.cached, max(cached, r.cached)
            if n and ((n + 1) * left > self.prefill_chunk or (n + 1) * (cached + left) > keys):
                return pending[:n]
        return pending

    def _worth_another(self, live: list[Request], waiting: deque[Request]) -> bool:
        """
        Whether to launch one more step before the results of the one in flight are read: not when a row could be given
        to a waiting request instead, nor when every row reaches its limit.
        """
        ending = sum(self._room(r) <= self.n_drafts + 1 for r in live)
        return self.run_ahead and ending < len(live) and not (waiting and (self.free or ending))

    def _launch(self, live: list[Request], before: Launched | None, interrupted: Callable[[], bool]) -> Launched:
        """A step of the live rows, after the step `before` whose results are not known yet."""
        self._ask(interrupted)
        if self.kind is None:
            self.kind = Kind.of([r.params for r in live])
        spare = self.free[: self.decoder.padding(len(live))]
        for row in spare:
            self.contents[row] = []
        kv_len = max(r.cached for r in live) + (self.n_drafts + 1) * (2 if before else 1)
        self.stats.steps += 1
        return list(live), self.decoder.step([r.row for r in live], spare, self.kind, kv_len)

    def _read(self, step: Launched) -> tuple[list[News], bool]:
        """The step's new tokens, for the requests that are still live."""
        requests, flight = step
        stopped, new = flight.read()
        news: list[News] = []
        for r, tokens, logprob in zip(requests, new, flight.logprobs(), strict=False):  # spare rows are behind these
            if r.row < 0:
                continue
            r.cached += len(tokens)
            news.append((r, tokens, reported(logprob, r)))
        return news, stopped


def reported(logprobs: list[TokenLogprobs], request: Request) -> list[TokenLogprobs]:
    """As many alternatives as the request asked for."""
    n = request.params.logprobs
    return [] if n is None else [(own, top[:n]) for own, top in logprobs]
