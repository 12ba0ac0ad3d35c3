"""
The decoding loop: exact with any drafts, any batch and any chunking, nothing computed twice, nothing left behind.
Launching ahead and padding to the sizes of CUDA graphs are the same on the CPU, where a launch is the computation.
"""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from checkpoints import make_hf, oracle, read_weights, write_weights
from engine import Engine, Request, Stats
from errors import InputError
from graphs import padded
from llm import LLM, completion
from sampling import SamplingParams
from test_sampling import p_value
from text import StreamDecoder

# Two layers that decode in milliseconds.
TINY = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "kv_lora_rank": 64,
    "moe_intermediate_size": 80,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 112,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
}
LENGTH = 128  # of the cache, in most tests
VOCAB = 520


def foreseeing(folder: Path, mtp: int, **overrides) -> Path:
    """
    A checkpoint whose drafts are often right and often wrong: the next token hangs mostly on the last one, and the
    MTP modules pass that one's embedding through.
    """
    make_hf(folder, "v3", mtp=mtp, **TINY | overrides)
    state = read_weights(folder)
    for name, tensor in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 0.3
        elif name.endswith("eh_proj.weight"):
            tensor *= 0.3
            tensor[:, : TINY["hidden_size"]] += torch.eye(TINY["hidden_size"])
        elif name.endswith("shared_head.norm.weight"):
            tensor.copy_(state["model.norm.weight"])
        elif name.endswith("enorm.weight"):
            tensor.fill_(1)
    write_weights(folder, state)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return foreseeing(tmp_path_factory.mktemp("engine") / "two", mtp=2)


@pytest.fixture(scope="module")
def one_module(tmp_path_factory) -> Path:
    return foreseeing(tmp_path_factory.mktemp("engine") / "one", mtp=1)


def load(folder: Path, **options) -> LLM:
    """Without stop tokens, so that lengths are what the test says."""
    llm = LLM(folder, **{"device": "cpu", "max_batch_size": 4, "max_seq_len": LENGTH, "mtp": 0} | options)
    llm.engine.stop_ids = frozenset()
    return llm


def random_prompts(n: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Ragged, from one token on."""
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def greedy(n: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=n)


def tokens(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(prompts, params)]


def finish(llm: LLM, requests: list[Request], **options) -> list[list[int]]:
    for _ in llm.engine.run(requests, **options):
        pass
    return [request.tokens for request in requests]


def fresh_stats(llm: LLM) -> Stats:
    n = llm.engine.n_drafts
    llm.engine.stats = Stats(drafted=[0] * n, accepted=[0] * n)
    return llm.engine.stats


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v3", "v2", "v2lite"])
def test_generate_equals_transformers(tmp_path, kind):
    overrides = {name: size for name, size in TINY.items() if (kind, name) != ("v2lite", "q_lora_rank")}
    folder = make_hf(tmp_path, kind, mtp=1 if kind == "v3" else 0, **overrides | {"num_hidden_layers": 3})
    llm, reference = load(folder, max_seq_len=160, mtp=None), oracle(folder)
    reference.generation_config.eos_token_id = None
    for prompt in ("one two three", random_prompts(1, 90, seed=7)[0]):
        ids = torch.tensor([llm.encode(prompt)])
        whole = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0]
        (completion,) = llm.generate([prompt], greedy(64))
        assert completion.token_ids == whole[ids.shape[1] :].tolist() and len(completion.token_ids) == 64
        assert completion.prompt_tokens == ids.shape[1] and completion.finish_reason == "length"
        assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        with torch.no_grad():
            logprobs = reference(whole[None]).logits.log_softmax(-1)
        expected = logprobs[0, :-1].gather(-1, whole[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(llm.logprobs(whole.tolist())), expected, atol=1e-4, rtol=1e-4)


def test_logprobs_of_short_and_of_bad_input(folder):
    llm = load(folder)
    assert llm.logprobs([5]) == []
    for ids, complaint in (
        ([], "empty"),
        ([5, VOCAB], f"token {VOCAB}"),
        ([5, -1], "token -1"),
        ([5] * (LENGTH + 1), "128"),
    ):
        with pytest.raises(InputError, match=complaint):
            llm.logprobs(ids)


# --- drafts never change what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_greedy_is_the_same_with_drafts(folder, mtp, rows):
    prompts = random_prompts(30 if rows > 1 else 6, 40)
    expected = tokens(load(folder), prompts, greedy(14))
    llm = load(folder, mtp=mtp, max_batch_size=rows)
    assert tokens(llm, prompts, greedy(14)) == expected
    stats = llm.stats
    assert stats.row_tokens == stats.new_tokens - len(prompts), "what is drafted past the end is not gained"
    assert llm.engine.n_drafts == mtp == len(stats.accepted)
    assert 0.1 < stats.accepted[0] / stats.drafted[0] < 0.95, "the checkpoint should draft well, and not too well"


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("mtp", [0, 1, 3])
def test_the_caches_end(folder, mtp, run_ahead):
    """Prompt and completion together fill the cache, to the last token of it. A step too many stays inside."""
    prompts = [[5, 6, 7, 8, 9] * 30] * 4
    prompts = [prompt[:n] for prompt, n in zip(prompts, (LENGTH - 1, LENGTH - 2, LENGTH - 9, LENGTH - 30), strict=True)]
    longer = load(folder, max_seq_len=2 * LENGTH)
    expected = [tokens(longer, [prompt], greedy(LENGTH - len(prompt)))[0] for prompt in prompts]
    llm = load(folder, mtp=mtp)
    llm.engine.run_ahead = run_ahead
    completions = llm.generate([*prompts, *prompts[::-1]], greedy(200))
    assert [c.token_ids for c in completions] == [*expected, *expected[::-1]]
    assert {c.finish_reason for c in completions} == {"length"}
    with pytest.raises(InputError, match="cache holds 128"):
        llm.generate([[5] * LENGTH])


def draft_from(llm: LLM, monkeypatch, prompts: list[list[int]], n: int, right) -> list[list[int]]:
    """
    Replace the modules' drafts by the true continuations of the prompts, or where `right(position)` says no by a wrong
    token; returns the continuations of n tokens.
    """
    engine = llm.engine
    truth = [p + t for p, t in zip(prompts, tokens(llm, prompts, greedy(n + engine.n_drafts)), strict=True)]

    in_row: dict[int, int] = {}  # whose continuation each row of the cache is

    def admit(requests):
        admitted = Engine._admit(engine, requests)
        in_row.update({request.row: request.index for request in admitted})
        return admitted

    def draft(h, known, last, ends, step, sampling):
        drafts = known.new_zeros(len(h), engine.n_drafts)
        for b, (row, at) in enumerate(zip(step.rows.tolist(), (step.positions[:, 0] + last + 2).tolist(), strict=True)):
            for k in range(engine.n_drafts):
                token = (truth[in_row[row]] + [0] * LENGTH)[at + k]
                drafts[b, k] = token if right(at + k) else (token + 1) % VOCAB
        return drafts

    monkeypatch.setattr(engine, "_admit", admit)
    monkeypatch.setattr(engine.decoder, "_draft", draft)
    fresh_stats(llm)
    return [whole[len(p) : len(p) + n] for p, whole in zip(prompts, truth, strict=True)]


@pytest.mark.parametrize("mtp", [1, 2, 3])
def test_right_drafts_give_all_tokens_and_wrong_ones_one(folder, monkeypatch, mtp):
    prompts = random_prompts(4, 30, seed=1)
    llm, n = load(folder, mtp=mtp), 13  # 12 after the prefill's: whole steps of 2, 3 and 4 tokens
    expected = draft_from(llm, monkeypatch, prompts, n, right=lambda position: True)
    assert tokens(llm, prompts, greedy(n)) == expected
    assert llm.stats.tokens_per_step == mtp + 1 and llm.stats.steps == 12 // (mtp + 1)
    assert llm.stats.accepted == llm.stats.drafted == [4 * 12 // (mtp + 1)] * mtp

    monkeypatch.undo()
    expected = draft_from(llm, monkeypatch, prompts, n, right=lambda position: False)
    assert tokens(llm, prompts, greedy(n)) == expected
    assert llm.stats.tokens_per_step == 1 and llm.stats.steps == 12
    assert llm.stats.accepted == [0] * mtp and llm.stats.drafted == [48] + [0] * (mtp - 1)
    assert llm.stats.new_tokens == 4 * n


def test_rows_accept_different_numbers(folder, monkeypatch):
    """Drafts right at two positions of three, through fewer rows than prompts, to different limits."""
    prompts = random_prompts(12, 30, seed=2)
    llm = load(folder, mtp=3)
    expected = draft_from(llm, monkeypatch, prompts, 20, right=lambda position: position % 3)
    requests = [Request(p, greedy(20 - i), i) for i, p in enumerate(prompts)]
    assert finish(llm, requests) == [ids[: 20 - i] for i, ids in enumerate(expected)]
    assert 1.5 < llm.stats.tokens_per_step < 3


@pytest.mark.parametrize("chunk", [5, 4096])
@pytest.mark.parametrize("n_modules", [1, 2])
def test_drafts_are_what_the_modules_say(folder, one_module, chunk, n_modules):
    """
    The drafts' distributions against the modules run over the whole text without a cache. A stale or shifted entry of
    the modules' caches would change no output, only make the drafts worse.
    """
    rows, path = (4, one_module) if n_modules == 1 else (1, folder)
    llm = load(path, mtp=3, prefill_chunk=chunk, max_batch_size=rows)
    model, params, checked = llm.model, SamplingParams(0.3, max_tokens=8), 0
    # A chunk that ends one token before its prompt leaves the second module to guess.
    prompts = [prompt for prompt in random_prompts(10, 20, seed=3) if len(prompt) % 5 != 1]

    @torch.inference_mode()
    def distributions(ids: list[int], drafts: list[int]) -> torch.Tensor:
        """Of each draft after ids, given those before it."""
        h, following, probs = model.hidden(torch.tensor([ids[:-1]]), model.step((1, len(ids) - 1))), ids[1:], []
        for k in range(3):
            read, h = h, model.draft(min(k, n_modules - 1), h, torch.tensor([following]), model.step(h.shape[:2]))
            probs.append((model.logits(h[0, -1:])[0] / params.temperature).softmax(-1))
            following = [*following, drafts[k]]
            if k + 1 < n_modules:
                following = following[1:]
            else:  # the last module's own output stands for the hidden state at one more position
                h = torch.cat([read, h[:, -1:]], dim=1)
        return torch.stack(probs)

    for request, _ in llm.engine.run([Request(p, params, i) for i, p in enumerate(prompts)]):
        if request.finish_reason is None:
            # So do rejected drafts: what its cache then holds stays.
            exact = 3 if n_modules == 1 or len(request.tokens) == 1 else 1
            found = llm.engine.decoder.draft_probs[request.row, :exact]
            drafts = llm.engine.decoder.tokens[request.row, 1:].tolist()
            torch.testing.assert_close(found, distributions(request.ids, drafts)[:exact], atol=1e-4, rtol=1e-3)
            checked += exact
    assert checked > 25 and llm.stats.accepted[0] > 3


@pytest.mark.parametrize("mtp", [0, 2])
def test_the_chunk_size_changes_nothing(folder, mtp):
    prompts = random_prompts(8, 50, seed=4)
    results = []
    for chunk in (1, 7, 4096):
        llm = load(folder, mtp=mtp, prefill_chunk=chunk)
        results.append(tokens(llm, prompts, greedy(6)))
        assert llm.stats.prefill_tokens == sum(map(len, prompts))
    assert results[0] == results[1] == results[2]


def test_prompts_are_prefilled_whole_where_they_fit(folder, monkeypatch):
    """Together as long as a chunk holds them, else one after another, not in slices side by side."""
    llm, shapes = load(folder, mtp=0, prefill_chunk=32), []
    prefill = llm.engine.decoder.prefill

    def seen(rows: list[int], starts: list[int], lengths: list[int], tokens: list[list[int]], *rest: Any) -> Any:
        shapes.append((len(rows), len(tokens[0]), sum(lengths)))
        return prefill(rows, starts, lengths, tokens, *rest)

    monkeypatch.setattr(llm.engine.decoder, "prefill", seen)
    finish(llm, [Request(list(range(5, 5 + n)), greedy(2)) for n in (30, 8, 40, 5)])
    assert shapes == [(2, 8, 13), (1, 30, 30), (1, 32, 32), (1, 8, 8)]
    # A token more for each of several long rows: no more keys at once than one row may have.
    long = [Request(list(range(llm.engine.max_seq_len - 1)), greedy(1), cached=llm.engine.max_seq_len - 2)] * 3
    assert len(llm.engine._prefill_part(long)) == 1


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mtp", [0, 2])
def test_sampled_completions_have_the_models_distribution(tmp_path, mtp):
    """The second and third token of a completion, the first that drafts decide on, on a vocabulary of 8."""
    llm = load(foreseeing(tmp_path, mtp=2, vocab_size=8), mtp=mtp, max_batch_size=128)
    prompt, params, n = [3, 4, 5], SamplingParams(0.4, 0.95, max_tokens=3, seed=1), 2048
    texts = torch.tensor(finish(llm, [Request(prompt, params, i) for i in range(n)]))

    def next_token(ids: list[int]) -> torch.Tensor:
        probs = (llm.model(torch.tensor([ids]))[0] / params.temperature).softmax(-1)
        ordered, order = probs.sort(descending=True)
        kept = order[ordered.cumsum(-1) - ordered < params.top_p]
        return torch.zeros(8).index_put((kept,), probs[kept] / probs[kept].sum())

    first = next_token(prompt)
    second = torch.stack([next_token([*prompt, i]) for i in range(8)])
    third = torch.stack([next_token([*prompt, i, j]) for i in range(8) for j in range(8)]).view(8, 8, 8)
    joint = first[:, None] * second
    assert p_value(texts[:, 0], first) > 0.001
    assert p_value(texts[:, 0] * 8 + texts[:, 1], joint.flatten()) > 0.001
    assert p_value(texts[:, 1] * 8 + texts[:, 2], (joint[..., None] * third).sum(0).flatten()) > 0.001
    if mtp:
        assert 0.2 < llm.stats.accepted[0] / llm.stats.drafted[0] < 0.95


@pytest.mark.parametrize("mtp", [0, 2])
def test_a_prompts_samples_do_not_depend_on_the_batch(folder, mtp):
    prompts = random_prompts(9, 20, seed=5)
    kinds = [SamplingParams(1.0, 1.0, 10, 3), SamplingParams(0.7, 0.8, 7, 3), greedy(12)]

    def requests() -> list[Request]:
        return [Request(prompt, kinds[i % 3], i) for i, prompt in enumerate(prompts)]

    together = finish(load(folder, mtp=mtp), requests())
    llm = load(folder, mtp=mtp, max_batch_size=1)
    assert [finish(llm, [request])[0] for request in requests()] == together
    assert finish(load(folder, mtp=mtp, max_batch_size=9, prefill_chunk=40), requests()[::-1])[::-1] == together


def test_the_seed_decides(folder):
    prompts = [[5, 6, 7]] * 3 + [[8, 9]]

    def run(seed: int) -> list[list[int]]:
        return tokens(load(folder, mtp=1), prompts, SamplingParams(1.0, max_tokens=8, seed=seed))

    first = run(1)
    assert run(1) == first
    assert all(a != b for a, b in zip(run(2), first, strict=True))
    assert len({*map(tuple, first)}) == 4, "equal prompts of one batch are drawn apart"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_stay_full(folder):
    """64 prompts through 4 rows: all the same as one at a time, in hardly more steps than their tokens need."""
    prompts = random_prompts(64, 60, seed=6)
    rng = random.Random(0)
    limits = [rng.choice((1, 2, 3, 5, 8, 13, 17)) for _ in prompts]

    def requests() -> list[Request]:
        return [Request(p, greedy(n), i) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]

    alone = load(folder, max_batch_size=1)
    expected = [finish(alone, [request])[0] for request in requests()]
    llm, running = load(folder), requests()
    finished = [request.index for request, _ in llm.engine.run(running) if request.finish_reason]
    assert [request.tokens for request in running] == expected
    assert [len(ids) for ids in expected] == limits
    assert sorted(finished) == list(range(64)) != finished
    assert llm.stats.new_tokens == sum(limits) == alone.stats.new_tokens
    assert llm.stats.steps <= 1.15 * sum(limits) / 4
    assert sorted(llm.engine.free) == [0, 1, 2, 3]


def test_results_are_in_the_order_of_the_prompts(folder):
    prompts = [[i] * (40 - 4 * i) for i in range(2, 10)]
    completions = load(folder).generate(prompts, greedy(3))
    assert [c.prompt_tokens for c in completions] == [len(p) for p in prompts]
    assert [c.token_ids for c in completions] == [load(folder).generate([p], greedy(3))[0].token_ids for p in prompts]


@pytest.mark.parametrize("mtp", [0, 2])
def test_finish_reasons(folder, mtp):
    llm = load(folder, mtp=mtp)
    prompt = [5, 6, 7]
    (whole,) = llm.generate([prompt], greedy(12))
    assert whole.finish_reason == "length"
    stop = next(token for token in whole.token_ids[3:] if token not in whole.token_ids[:3])
    at = whole.token_ids.index(stop)
    llm.engine.stop_ids = frozenset({stop, 1})
    fresh_stats(llm)
    (stopped,) = llm.generate([prompt], greedy(12))
    assert stopped.finish_reason == "stop" and stopped.token_ids == whole.token_ids[:at]
    assert llm.stats.new_tokens == at
    llm.engine.stop_ids = frozenset({whole.token_ids[0]})
    (nothing,) = llm.generate([prompt], greedy(12))
    assert (nothing.finish_reason, nothing.token_ids, nothing.text) == ("stop", [], "")
    assert [c.finish_reason for c in llm.generate([prompt], greedy(1))] == ["stop"]


def test_stop_tokens_come_from_the_folder(folder):
    assert LLM(folder, device="cpu", max_seq_len=LENGTH).engine.stop_ids == {1}


# --- a step ahead, and CUDA graphs ------------------------------------------------------------------------------------


class Replays:
    """Stands in for Graphs: runs again what was given first under each key, as a graph does, kernel by kernel."""

    def __init__(self):
        self.recorded: dict[Hashable, Callable] = {}
        self.runs = 0

    def run(self, key: Hashable, function: Callable):
        self.runs += 1
        return self.recorded.setdefault(key, function)()


def with_replays(llm: LLM, run_ahead: bool = True) -> LLM:
    llm.engine.decoder.graphs = Replays()
    llm.engine.run_ahead = run_ahead
    return llm


def all_sorts_of_requests(n: int, seed: int = 0) -> list[Request]:
    """Prompts and limits of many lengths; every setting there is, in changing company."""
    rng = random.Random(seed)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 7, "logprobs": 2},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.5, "min_p": 0.02, "repetition_penalty": 1.2},
    ]
    return [
        Request(prompt, SamplingParams(**rng.choice(kinds), max_tokens=rng.choice((1, 2, 5, 9, 14))), i)
        for i, prompt in enumerate(random_prompts(n, 30, seed))
    ]


def outcome(requests: list[Request]) -> tuple[list[tuple], torch.Tensor]:
    """What must not change; and log-probabilities, which round otherwise in a batch of another size."""
    alternatives = [[[i for i, _ in top] for _, top in r.logprobs] for r in requests]
    values = [value for r in requests for own, top in r.logprobs for value in (own, *(value for _, value in top))]
    exact = [(r.tokens, r.finish_reason, ids) for r, ids in zip(requests, alternatives, strict=True)]
    return exact, torch.tensor(values)


@pytest.mark.parametrize("mtp", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_a_step_ahead_and_graphs_change_nothing(folder, mtp, rows):
    """Also where rows end without notice, at a stop token or because whoever reads has enough."""

    def run(llm: LLM) -> tuple[list[tuple], torch.Tensor, Stats]:
        llm.engine.stop_ids = frozenset(range(40))
        requests = all_sorts_of_requests(9 if rows == 1 else 60)
        for request, _ in llm.engine.run(requests):
            if request.index % 5 == 0 and len(request.tokens) >= 4:
                request.finish_reason = "stop"
        assert sorted(llm.engine.free) == list(range(rows))
        return *outcome(requests), llm.stats

    expected, logprobs, plain = run(load(folder, mtp=mtp, max_batch_size=rows))
    assert {reason for _, reason, _ in expected} == {"stop", "length"}
    llm = with_replays(load(folder, mtp=mtp, max_batch_size=rows))
    found, values, ahead = run(llm)
    assert found == expected
    torch.testing.assert_close(values, logprobs, atol=1e-4, rtol=0)
    assert (ahead.new_tokens, ahead.row_tokens, ahead.accepted) == (plain.new_tokens, plain.row_tokens, plain.accepted)
    graphs = llm.engine.decoder.graphs
    assert graphs.runs == ahead.steps and {size for size, _ in graphs.recorded} <= {*range(1, 9), 16, 20}
    assert found == run(with_replays(load(folder, mtp=mtp, max_batch_size=rows), run_ahead=False))[0]


def test_sizes_of_graphs():
    assert [padded(n, 64) for n in (1, 5, 8, 9, 16, 17, 63, 64)] == [1, 5, 8, 16, 16, 24, 64, 64]
    assert [padded(n, 20) for n in (8, 9, 17, 20)] == [8, 16, 20, 20]


@pytest.mark.parametrize("mtp", [0, 2])
def test_steps_are_launched_ahead_when_that_costs_nothing(folder, mtp, monkeypatch):
    """As many steps as otherwise, and most launched before the last one's results were read."""
    prompts = random_prompts(12, 9, seed=8)
    plain, llm = load(folder, mtp=mtp), load(folder, mtp=mtp)
    llm.engine.run_ahead, order = True, []
    for name in ("_launch", "_read"):
        real = getattr(llm.engine, name)
        monkeypatch.setattr(llm.engine, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    assert tokens(llm, prompts, greedy(25)) == tokens(plain, prompts, greedy(25))
    assert llm.stats == plain.stats and order.count("_launch") == order.count("_read") == llm.stats.steps
    under_way = sum(order[:i].count("_launch") - order[:i].count("_read") == 2 for i in range(len(order)))
    assert under_way > 0.6 * llm.stats.steps


def test_a_step_ahead_of_an_interrupt_is_forgotten(folder):
    fresh, llm = load(folder, mtp=2), load(folder, mtp=2, max_batch_size=1, keep_prefix=True)
    llm.engine.run_ahead = True
    prompt = random_prompts(1, 30, seed=9)[0]
    whole = turn(fresh, prompt, n=50)[0]
    for asked in (4, 6):
        partial, _ = turn(llm, prompt, n=50, interrupted=After(asked))
        assert 0 < len(partial) < 50 and partial == whole[: len(partial)]
        longer = [*prompt, *partial, 11, 12]
        answer, prefilled = turn(llm, longer)
        assert answer == turn(fresh, longer)[0] and prefilled <= 3


def test_rows_that_pad_a_graph_hold_nothing_any_more(folder):
    """Nine of sixteen rows live, so that a graph for sixteen writes to the seven whose conversations may go on."""
    llm, fresh = with_replays(load(folder, mtp=2, max_batch_size=16, keep_prefix=True)), load(folder, mtp=2)
    prompts = [[i] * 30 for i in range(2, 18)]
    answers = finish(llm, [Request(prompt, greedy(4), i) for i, prompt in enumerate(prompts)])
    finish(llm, [Request([*prompts[i], *answers[i], 9], greedy(60), i) for i in range(9)])
    assert llm.engine.decoder.position[llm.engine.free[:7]].eq(0).all(), "else their own cache would be read, too"
    for prompt, answer in zip(prompts, answers, strict=True):
        longer = [*prompt, *answer, 7]
        assert turn(llm, longer)[0] == turn(fresh, longer)[0]


def all_stay(logits, q, drafts, sampling, position):
    """A rule for drafts as benchmarks need one, whose random weights would accept nothing."""
    return logits.argmax(-1), torch.full_like(position, drafts.shape[1])


def test_the_rule_for_drafts_can_be_replaced(folder):
    model = load(folder, mtp=2).model
    engine = Engine(model, 2, LENGTH, n_drafts=2, verify=all_stay)
    for _ in engine.run([Request([5, 6], greedy(10), i) for i in range(2)]):
        pass
    assert engine.stats.accepted == engine.stats.drafted == [6, 6] and engine.stats.steps == 3


@pytest.mark.parametrize("damaged", range(3))
@pytest.mark.parametrize("accepted", range(3))
def test_logits_that_are_no_numbers_are_an_error_where_they_are_used(folder, monkeypatch, accepted, damaged):
    model = load(folder, mtp=2).model
    logits = model.logits

    def with_nan(h):
        found = logits(h)
        if found.shape[1] == 3:  # a step's; modules and prompts have one of a row
            found[1, damaged] = torch.nan
        return found

    def some_stay(logits, q, drafts, sampling, position):
        return torch.full_like(position, 7)[:, None].repeat(1, 3), torch.full_like(position, accepted)

    monkeypatch.setattr(model, "logits", with_nan)
    engine = Engine(model, 2, LENGTH, n_drafts=2, verify=some_stay)
    run = engine.run([Request([5, 6], greedy(5), i) for i in range(2)])
    if damaged > accepted:
        assert list(run) and engine.stats.steps
    else:
        with pytest.raises(InputError, match="NaN or infinite logits"):
            list(run)


def test_a_step_too_many_stays_inside_the_cache(folder):
    """A row is full, which the host has not seen, and with its drafts the next step would begin past the end."""
    engine = Engine(load(folder, mtp=2).model, 2, LENGTH, n_drafts=2, run_ahead=True, verify=all_stay)
    requests = [Request([5] * (LENGTH - 2), greedy(99)), Request([6] * 3, greedy(30))]
    for _ in engine.run(requests):
        assert engine.decoder.position.max() < LENGTH
    assert [len(request.tokens) for request in requests] == [2, 30]


# --- turns of a conversation ------------------------------------------------------------------------------------------


def turn(llm: LLM, prompt: list[int], n: int = 9, **options) -> tuple[list[int], int]:
    """The answer and how many tokens were prefilled for it."""
    before = llm.stats.prefill_tokens
    return finish(llm, [Request(prompt, greedy(n))], **options)[0], llm.stats.prefill_tokens - before


def test_a_forgotten_conversation_is_prefilled_whole(folder):
    llm = load(folder, keep_prefix=True)
    assert [turn(llm, [5] * 30)[1], turn(llm, [5] * 40)[1]] == [30, 10]
    llm.engine.forget()
    assert turn(llm, [5] * 40)[1] == 40


def test_one_stream_at_a_time(folder):
    llm = load(folder)
    first = llm.stream([5, 6], greedy(20))
    next(first)
    for again in (lambda: next(llm.stream([5], greedy(3))), lambda: llm.generate([[5]], greedy(3))):
        with pytest.raises(InputError, match="another stream"):
            again()
    first.close()
    assert tokens(llm, [[5, 6]], greedy(9)) == tokens(load(folder), [[5, 6]], greedy(9))


@pytest.mark.parametrize("at", ["admit", "prefill", "step"])
def test_rows_are_free_again_after_an_interrupt_at_any_time(folder, monkeypatch, at):
    llm = load(folder, mtp=1, max_batch_size=2)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.decoder, at, lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5], [6], [7]], greedy(9))
    assert sorted(llm.engine.free) == [0, 1]
    assert tokens(llm, [[5], [6], [7]], greedy(9)) == tokens(load(folder), [[5], [6], [7]], greedy(9))


def test_ways_to_give_prompts_and_settings(folder):
    llm = load(folder)
    expected = tokens(llm, [[5, 6], [7]], greedy(4))
    assert tokens(llm, [5, 6], greedy(4)) == expected[:1]
    assert tokens(llm, [torch.tensor([5, 6]), (7,)], greedy(4)) == expected
    assert tokens(llm, [[5, 6], [7]], [greedy(4), greedy(2)]) == [expected[0], expected[1][:2]]
    with pytest.raises(InputError, match="2 prompts and 1 SamplingParams"):
        llm.generate([[5], [6]], [greedy(4)])
    for wrong in ({"temperature": 0}, 5, [{"temperature": 0}]):
        with pytest.raises(InputError, match="wanted SamplingParams, for all prompts or for each"):
            llm.generate([[5]], wrong)
    with pytest.raises(InputError, match="a prompt is b'text', wanted text, token ids or messages"):
        llm.generate(b"text")
    assert SamplingParams(logprobs=True).logprobs is not True, "topk takes whole numbers alone"


class After:
    """`interrupted` that says so when asked for the n-th time."""

    def __init__(self, n: int):
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("mtp", [0, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_second_turn_prefills_only_what_is_new(folder, mtp, rows):
    llm = load(folder, mtp=mtp, max_batch_size=rows, keep_prefix=True)
    fresh = load(folder, mtp=mtp)
    prompt = random_prompts(1, 40, seed=9)[0]
    answer, prefilled = turn(llm, prompt)
    assert prefilled == len(prompt)
    for new in ([11, 12, 13], [14]):
        prompt = [*prompt, *answer, *new]
        answer, prefilled = turn(llm, prompt)
        assert len(new) <= prefilled <= len(new) + 1  # an answer's last token may not have been read yet
        assert answer == turn(fresh, prompt)[0]
    again, prefilled = turn(llm, prompt)
    assert again == answer and prefilled == 1
    changed = [*prompt[:5], 77, *prompt[6:]]
    answer, prefilled = turn(llm, changed)
    assert answer == turn(fresh, changed)[0] and prefilled == len(prompt) - 5
    assert turn(fresh, prompt)[1] == len(prompt), "without keep_prefix all is read again"


def test_the_row_with_the_longest_common_prefix_is_taken(folder):
    llm = load(folder, max_batch_size=2, keep_prefix=True)
    a, b = [5] * 20, [6] * 30
    answers = finish(llm, [Request(a, greedy(4)), Request(b, greedy(4))])
    for prompt, answer in ((a, answers[0]), (b, answers[1]), (a, answers[0])):
        assert turn(llm, [*prompt, *answer, 7], n=2)[1] <= 2


@pytest.mark.parametrize("mtp", [0, 2])
def test_interrupts_keep_the_cache_right(folder, mtp):
    llm = load(folder, mtp=mtp, max_batch_size=1, keep_prefix=True, prefill_chunk=8)
    fresh = load(folder, mtp=mtp)
    prompt = random_prompts(1, 1, seed=1)[0] * 30
    request = Request(prompt, greedy(50))
    finish(llm, [request], interrupted=After(3))  # asked once a pass: in the third of four chunks
    assert (request.finish_reason, request.tokens, llm.stats.prefill_tokens) == ("interrupted", [], 24)

    partial, prefilled = turn(llm, prompt, n=50, interrupted=After(5))
    whole = turn(fresh, prompt, n=50)[0]
    assert 0 < len(partial) < 50 and partial == whole[: len(partial)] and prefilled == 6
    prompt = [*prompt, *partial, 11, 12]
    answer, prefilled = turn(llm, prompt)
    assert answer == turn(fresh, prompt)[0] and prefilled <= 3

    # A caller that stops listening leaves the engine just as usable.
    stream = llm.engine.run([Request(prompt, greedy(50))])
    for _ in range(4):
        request, _ = next(stream)
    stream.close()
    prompt = [*request.ids, 13]
    answer, prefilled = turn(llm, prompt)
    assert answer == turn(fresh, prompt)[0] and prefilled <= 2


def test_an_interrupt_ends_what_waits_too(folder):
    llm = load(folder, max_batch_size=2)
    requests = [Request(p, greedy(30 if i else 2), i) for i, p in enumerate(random_prompts(6, 9))]
    finish(llm, requests, interrupted=After(6))
    assert [r.finish_reason for r in requests] == ["length"] + ["interrupted"] * 5
    assert [bool(r.tokens) for r in requests] == [True] * 3 + [False] * 3
    assert sorted(llm.engine.free) == [0, 1]
    assert completion(requests[5]).finish_reason == "interrupted"


def test_chat_and_stream_say_what_generate_says(folder):
    llm = load(folder, mtp=2, keep_prefix=True)
    messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": "one two"}]
    ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert llm.encode(messages) == ids and llm.encode("one two", "brief") == ids
    expected = load(folder).generate([ids], greedy(20))[0]
    assert llm.chat(messages, greedy(20)) == expected
    pieces = [*llm.stream(messages, greedy(20))]
    assert "".join(text for text, _ in pieces) == expected.text
    assert pieces[-1][1].tokens == expected.token_ids and len(pieces) > 5
    longer = [*messages, {"role": "assistant", "content": expected.text}, {"role": "user", "content": "three"}]
    before = llm.stats.prefill_tokens
    assert llm.chat(longer, greedy(5)) == load(folder).chat(longer, greedy(5))
    assert llm.stats.prefill_tokens - before <= len(llm.encode(longer)) - len(ids)


# --- memory -----------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """Of all tensors there are, storage by storage."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not x.is_meta]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_only_the_cache_grows_with_its_length(folder):
    llm = load(folder, mtp=2)
    before, others = live_bytes(), []
    for length in (64, 2048):
        engine = Engine(llm.model, 3, length, n_drafts=2)
        for _ in engine.run([Request([5, 6, 7], greedy(9), i) for i in range(4)]):
            pass
        layers, per_token = TINY["num_hidden_layers"] + 2, TINY["kv_lora_rank"] + TINY["qk_rope_head_dim"]
        assert engine.decoder.cache.nbytes == layers * 3 * length * per_token * 4
        others.append(live_bytes() - before - engine.decoder.cache.nbytes)
        del engine, _
    assert others[0] == others[1] >= 3 * 2 * VOCAB * 4


# --- streaming --------------------------------------------------------------------------------------------------------


def test_streamed_words_keep_their_spaces():
    """Some tokenizers drop the space before the first token that they decode."""
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "teen": 2}))
    words.decoder = decoders.Metaspace()
    decoder = StreamDecoder(PreTrainedTokenizerFast(tokenizer_object=words))
    assert [decoder.add([i]) for i in (0, 1, 2, 0)] == ["one", " two", "teen", " one"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_streamed_text_is_the_whole_text(folder, size):
    tokenizer = load(folder).tokenizer
    text = "one äöü, 世界 and 🙂🙂 \N{REPLACEMENT CHARACTER} the quick é"
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids[7:7] = [tokenizer.eos_token_id]
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(pieces) + decoder.end() == text
    assert "".join(pieces).count("\N{REPLACEMENT CHARACTER}") == 1, "halves of characters are held back"
    assert len([piece for piece in pieces if piece]) > len(ids) / size / 3
    rng = random.Random(size)
    for _ in range(50):  # mostly broken UTF-8
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30)]
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.add(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert "".join(pieces) + decoder.end() == tokenizer.decode(ids, skip_special_tokens=True)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

SHIPPED = Path(__file__).resolve().parents[1] / "tiny" / "checkpoint"


def shipped(rows: int, mtp: int, **options) -> LLM:
    return LLM(SHIPPED, device="cuda", max_batch_size=rows, max_seq_len=256, mtp=mtp, **options)


def questions(llm: LLM, n: int, params: list[SamplingParams]) -> list[Request]:
    words = "kiln violin person furnace dog river song wheel horse bread".split()
    asked = [f"{start} {word}?" for start in ("What is a", "Tell me, what is a", "Define") for word in words]
    return [Request(llm.encode(asked[i % 30]), params[i % len(params)], i) for i in range(n)]


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("mtp", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_gpu_graphs_equal_the_kernels_one_by_one(rows, mtp, sampled):
    """Through fewer rows than prompts. Then once more, and nothing is recorded a second time."""
    params = [greedy(30), greedy(12)]
    if sampled:
        params += [SamplingParams(1.0, max_tokens=20), SamplingParams(0.7, 0.9, 25), SamplingParams(0.8, top_k=9)]
        params += [SamplingParams(0.0, repetition_penalty=1.3), SamplingParams(1.0, min_p=0.1, logprobs=2)]
    llm, one_by_one = shipped(rows, mtp), with_replays(shipped(rows, mtp))
    expected = finish(one_by_one, questions(one_by_one, 3 * rows, params))
    assert finish(llm, questions(llm, 3 * rows, params)) == expected
    recorded = dict(llm.engine.decoder.graphs.recorded)
    assert recorded.keys() == one_by_one.engine.decoder.graphs.recorded.keys()
    assert finish(llm, questions(llm, 3 * rows, params)) == expected
    assert llm.engine.decoder.graphs.recorded == recorded


@pytest.mark.gpu
@pytest.mark.parametrize("mtp", [0, 1])
def test_gpu_without_graphs_answers_the_same(mtp):
    """Nearly: without padding and with shorter bounds other kernels may be chosen, which round otherwise."""
    llm, eager = shipped(20, mtp), shipped(20, mtp, cuda_graph=False)
    assert eager.engine.decoder.graphs is None
    answers = finish(llm, questions(llm, 60, [greedy(40)]))
    others = finish(eager, questions(eager, 60, [greedy(40)]))
    assert sum(a == b for a, b in zip(answers, others, strict=True)) >= 54


@pytest.mark.gpu
@pytest.mark.parametrize("params", [greedy(40), SamplingParams(0.8, 0.9, 40)], ids=["greedy", "sampled"])
def test_gpu_a_steady_step_waits_for_nothing(params, monkeypatch):
    llm = shipped(4, 1)
    llm.engine.stop_ids = frozenset()
    finish(llm, questions(llm, 4, [params]))  # records
    real, launched = llm.engine.decoder.step, []

    def step(rows, spare, kind, kv_len):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return real(rows, spare, kind, kv_len)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            launched.append(kv_len)

    monkeypatch.setattr(llm.engine.decoder, "step", step)
    finish(llm, questions(llm, 4, [params]))
    assert len(launched) > 15
