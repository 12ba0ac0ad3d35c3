"""Sampling against the distributions it should have; every random number comes from a fixed seed, so nothing flakes."""

from __future__ import annotations

import itertools

import pytest
import torch

import sampling
from errors import InputError
from sampling import ACCEPT, DRAFT, TOKEN, Sampling, SamplingParams, accept, choose, draw, penalised, uniform, verify

V = 6
TRIALS = 100_000


def p_value(tokens: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square test of draws against their distribution: the chance of a fit this bad when they do come from it."""
    counts = torch.bincount(tokens, minlength=probs.shape[0]).double()
    assert counts[probs == 0].sum() == 0, "a token of probability zero was drawn"
    counts, probs = counts[probs > 0], probs[probs > 0].double()
    expected = probs / probs.sum() * tokens.shape[0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(probs) - 1) / 2).double(), statistic / 2).item()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].abs().item()


def one_hot(*tokens: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float()


# --- probabilities ----------------------------------------------------------------------------------------------------


def sampling_of(params: list[SamplingParams]) -> Sampling:
    return Sampling.of(params, torch.arange(len(params)))


def probabilities(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    return sampling.probabilities(logits, sampling_of(params))


def kept(probs: list[float], top_p: float) -> list[float]:
    return probabilities(torch.tensor([probs]).log(), [SamplingParams(1.0, top_p)])[0].tolist()


def test_temperature_divides_the_logits():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    params = [SamplingParams(temperature) for temperature in (0.5, 1.0, 3.0)]
    expected = (logits / torch.tensor([0.5, 1.0, 3.0])[:, None]).softmax(-1)
    torch.testing.assert_close(probabilities(logits, params), expected)


def test_temperature_zero_puts_all_on_the_first_of_the_best():
    logits = torch.tensor([[1.0, 3, 2, 3, 0, 0], [0, 0, 0, 0, 0, 9]])
    assert probabilities(logits, [SamplingParams(0.0, 0.5)] * 2).equal(one_hot(1, 5))


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-45])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature):
    logits = torch.tensor([[10.0, 500, 30, -7, 0, 499]])
    assert probabilities(logits, [SamplingParams(temperature)]).equal(one_hot(1))


@pytest.mark.parametrize(
    "top_p, expected",
    [
        (1.0, [0.3, 0.05, 0.5, 0.15]),
        (0.96, [0.3, 0.05, 0.5, 0.15]),
        (0.94, [0.3 / 0.95, 0, 0.5 / 0.95, 0.15 / 0.95]),
        (0.51, [0.375, 0, 0.625, 0]),
        (0.49, [0, 0, 1, 0]),
        (1e-6, [0, 0, 1, 0]),
        (1e-50, [0, 0, 1, 0]),  # zero in fp32
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, expected):
    assert kept([0.3, 0.05, 0.5, 0.15], top_p) == pytest.approx(expected, abs=1e-6)


def test_top_p_among_equals_keeps_as_many_as_it_needs():
    for top_p, n in ((0.1, 1), (0.25, 1), (0.26, 2), (0.6, 3), (0.9, 4)):
        assert kept([0.25] * 4, top_p) == pytest.approx([1 / n] * n + [0] * (4 - n))


def test_rows_are_independent_of_their_neighbours_settings():
    """Each kind of row with every other kind beside it, bit for bit as alone."""
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 3
    logits[0, 5] = logits[0].max()  # a draw for the greedy row
    params = [SamplingParams(0.0), SamplingParams(1.0), SamplingParams(0.7, 0.9), SamplingParams(2.0, 0.3)]
    together = probabilities(logits, params)
    for row in range(4):
        assert probabilities(logits[row : row + 1], params[row : row + 1])[0].equal(together[row]), params[row]
    torch.testing.assert_close(together.sum(-1), torch.ones(4))


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_mix_is_splitmix64():
    """The first two numbers of the generator's published example, seed 1234567."""
    step = 0x9E3779B97F4A7C15 - 2**64
    state = torch.tensor([1234567 + step, 1234567 + 2 * step + 2**64])
    assert sampling.mix(state).tolist() == [6457827717110365317, 3203168211198807973]


def test_uniform_is_flat_and_never_zero_or_one(monkeypatch):
    seed = torch.arange(TRIALS)
    u = uniform(seed, seed * 0 + 5, 2, TOKEN)
    assert p_value((u.flatten() * 50).long(), torch.ones(50)) > 0.001
    for bits in (0, -1):  # the hashes that come closest to either end
        monkeypatch.setattr(sampling, "mix", lambda x, bits=bits: torch.full_like(x, bits))
        assert 0 < uniform(seed[:1], seed[:1], 1, TOKEN).item() < 1


def test_seeds_positions_streams_and_tokens_are_uncorrelated():
    seed, position = torch.arange(30_000), torch.arange(30_000) % 97
    numbers = {
        "these": uniform(seed, position, 2, TOKEN),
        "next seed": uniform(seed + 1, position, 2, TOKEN),
        "next request": uniform(seed + (1 << 32), position, 2, TOKEN),
        "next position": uniform(seed, position + 1, 2, TOKEN),
        "accept": uniform(seed, position, 2, ACCEPT),
        "draft": uniform(seed, position, 2, DRAFT),
    }
    for (a, x), (b, y) in itertools.combinations(numbers.items(), 2):
        assert correlation(x, y) < 5 / 60_000**0.5, (a, b)
        assert correlation(x[:, 0], y[:, 1]) < 5 / 30_000**0.5, (a, b)
    assert correlation(*numbers["these"].T) < 5 / 30_000**0.5


# --- draw -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [TOKEN, DRAFT])
@pytest.mark.parametrize("vary", ["seed", "position", "request"])
def test_draws_have_the_distribution(vary, stream):
    probs = torch.tensor([0.4, 0.3, 0.0, 0.2, 0.099, 0.001])
    i, same = torch.arange(TRIALS), torch.full((TRIALS,), 3)
    seed, position = {"seed": (i, same), "position": (same, i), "request": (same + (i << 32), same)}[vary]
    assert p_value(draw(probs.expand(TRIALS, V), seed, position, stream), probs) > 0.001
    scaled = 0.1 * probs  # need not sum to one
    assert p_value(draw(scaled.expand(TRIALS, V), seed, position + 1, stream), probs) > 0.001


@pytest.mark.parametrize("streams, step", [((TOKEN, TOKEN), 1), ((TOKEN, DRAFT), 0), ((DRAFT, DRAFT), 1)])
def test_draws_of_a_sequence_are_independent(streams, step):
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    seed, position = torch.arange(TRIALS), torch.zeros(TRIALS).long()
    first = draw(probs.expand(TRIALS, V), seed, position, streams[0])
    second = draw(probs.expand(TRIALS, V), seed, position + step, streams[1])
    assert p_value(V * first + second, torch.outer(probs, probs).flatten()) > 0.001


def test_draws_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(3)
    probs = torch.randn(32, 50, generator=generator).softmax(-1)
    seed = torch.randint(2**63 - 1, (32,), generator=generator)
    position = torch.randint(1000, (32,), generator=generator)
    together = draw(probs, seed, position, TOKEN)
    alone = [draw(probs[i : i + 1], seed[i : i + 1], position[i : i + 1], TOKEN).item() for i in range(32)]
    assert together.tolist() == alone
    order = torch.randperm(32, generator=generator)
    assert draw(probs[order], seed[order], position[order], TOKEN).equal(together[order])


# --- speculative acceptance -------------------------------------------------------------------------------------------

# A language of two tokens a text: the first is drawn from FIRST, the second from SECOND[first]. The drafter believes
# otherwise, and about token 5 of the first it is quite wrong.
FIRST = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1, 0.0])
SECOND = torch.randn(V, V, generator=torch.Generator().manual_seed(4)).softmax(-1)
DRAFT_FIRST = torch.tensor([0.1, 0.3, 0.2, 0.0, 0.3, 0.1])
DRAFT_SECOND = torch.randn(V, V, generator=torch.Generator().manual_seed(5)).softmax(-1)


def accept_always(p, q, drafts, seed, position):
    B, N = drafts.shape
    last = draw(p[:, N], seed, position + N, TOKEN)
    return torch.cat([drafts, last[:, None]], dim=1), torch.full((B,), N)


def resample_from_p(p, q, drafts, seed, position):
    tokens, n = accept(p, q, drafts, seed, position)
    batch = torch.arange(len(n))
    tokens[batch, n] = draw(p[batch, n], seed, position + n, TOKEN)
    return tokens, n


def two_tokens(N: int, rule=accept, stream: int = DRAFT) -> torch.Tensor:
    """TRIALS texts of two tokens, decoded with N drafts a step as the engine does: their numbers 0 .. V * V - 1."""
    seed = torch.arange(TRIALS)
    batch = torch.arange(TRIALS)
    text = torch.zeros(TRIALS, 2 + N, dtype=torch.int64)
    length = torch.zeros(TRIALS, dtype=torch.int64)

    def given(first: torch.Tensor, second: torch.Tensor, previous: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """The distribution at index `at` of a text; what comes after two tokens does not matter."""
        return torch.where((at == 0)[:, None], first, second[previous])

    for _ in range(2):  # a step yields one token or more
        previous = text[batch, (length - 1).clamp(min=0)]
        p, q, drafts = torch.zeros(TRIALS, N + 1, V), torch.zeros(TRIALS, N, V), text.new_zeros(TRIALS, N)
        p[:, 0] = given(FIRST, SECOND, previous, length)
        for k in range(N):
            q[:, k] = given(DRAFT_FIRST, DRAFT_SECOND, previous, length + k)
            drafts[:, k] = previous = draw(q[:, k], seed, 10 + length + k, stream)
            p[:, k + 1] = given(FIRST, SECOND, previous, length + k + 1)
        new, n_accepted = rule(p, q, drafts, seed, 10 + length)
        for k in range(N + 1):
            wanted = (k <= n_accepted) & (length + k < 2)
            text[batch[wanted], length[wanted] + k] = new[wanted, k]
        length = (length + n_accepted + 1).clamp(max=2)
    assert length.eq(2).all()
    return V * text[:, 0] + text[:, 1]


def fit(texts: torch.Tensor) -> tuple[float, float, float]:
    """p-values of the first token, the second, and both together."""
    joint = FIRST[:, None] * SECOND
    return p_value(texts // V, FIRST), p_value(texts % V, joint.sum(0)), p_value(texts, joint.flatten())


@pytest.mark.parametrize("N", [0, 1, 2])
def test_speculative_decoding_has_the_models_distribution(N):
    assert min(fit(two_tokens(N))) > 0.001


@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize(
    "wrong",
    [{"rule": accept_always}, {"rule": resample_from_p}, {"stream": TOKEN}],
    ids=["accept always", "resample from p", "drafts share their numbers with tokens"],
)
def test_the_test_above_finds_wrong_rules(N, wrong):
    try:
        values = fit(two_tokens(N, **wrong))
    except AssertionError as error:
        assert "probability zero" in str(error)
    else:
        assert min(values) < 1e-6


@pytest.mark.parametrize("N", [1, 3])
def test_right_drafts_all_stay_and_wrong_ones_all_go(N):
    seed = torch.arange(100)
    p = one_hot(*range(N + 1)).expand(100, N + 1, V)
    drafts = torch.arange(N).expand(100, N)
    tokens, n_accepted = accept(p, p[:, :N], drafts, seed, seed)
    assert n_accepted.eq(N).all() and tokens.equal(torch.arange(N + 1).expand(100, N + 1))
    tokens, n_accepted = accept(p, p[:, 1:], drafts + 1, seed, seed)
    assert n_accepted.eq(0).all() and tokens[:, 0].eq(0).all()


def test_a_drafter_that_equals_the_model_is_always_accepted():
    seed = torch.arange(TRIALS)
    p = SECOND[seed % V][:, None].expand(-1, 2, -1)
    drafts = draw(p[:, 0], seed, seed * 0, DRAFT)[:, None]
    assert accept(p, p[:, :1], drafts, seed, seed * 0)[1].eq(1).all()


def test_a_residual_lost_to_rounding_yields_no_impossible_token(monkeypatch):
    """p below q everywhere, as when both should be equal, and the one u in billions that rejects the draft."""
    q = torch.tensor([[[0.0, 0.25, 0.25, 0.5, 0, 0]]])
    p = torch.cat([q * (1 - 1e-6), one_hot(0)[None]], dim=1)
    real = sampling.uniform
    nearly_one = torch.full((1, 1), 1 - 2.0**-33).double()
    monkeypatch.setattr(sampling, "uniform", lambda *a: nearly_one if a[3] == ACCEPT else real(*a))
    zero = torch.zeros(1).long()
    tokens, n_accepted = accept(p, q, torch.tensor([[1]]), zero, zero)
    assert n_accepted.item() == 0 and p[0, 0, tokens[0, 0]] > 0


def test_acceptance_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(6)
    p = torch.randn(16, 3, V, generator=generator).softmax(-1)
    q = torch.randn(16, 2, V, generator=generator).softmax(-1)
    drafts, seed, position = (torch.randint(V, shape, generator=generator) for shape in ((16, 2), (16,), (16,)))
    tokens, n_accepted = accept(p, q, drafts, seed, position)
    assert len(n_accepted.unique()) > 1
    for i in range(16):
        one = slice(i, i + 1)
        token, n = accept(p[one], q[one], drafts[one], seed[one], position[one])
        assert n == n_accepted[i] and token.equal(tokens[one])


@pytest.mark.parametrize("N", [0, 1, 3])
def test_greedy_rows_need_no_distributions(N):
    """An argmax says what the acceptance rule says of one-hot distributions, whatever q is: nobody keeps it then."""
    generator = torch.Generator().manual_seed(7)
    B = 400
    logits = torch.randn(B, N + 1, V, generator=generator)
    right = torch.rand(B, N, generator=generator) < 0.7
    drafts = torch.where(right, logits[:, :N].argmax(-1), torch.randint(V, (B, N), generator=generator))
    position = torch.arange(B)
    params = [SamplingParams(0.0)] * B
    tokens, n_accepted = verify(logits, None, drafts, sampling_of(params), position)
    assert len(n_accepted.unique()) == N + 1
    mixed = sampling_of([*params[:-1], SamplingParams(1.0)])
    for q in (torch.zeros(B, N, V), torch.ones(B, N, V), torch.rand(B, N, V, generator=generator)):
        others, n = verify(logits, q, drafts, mixed, position)
        assert n[:-1].equal(n_accepted[:-1])
        for row in range(B - 1):
            assert tokens[row, : n[row] + 1].equal(others[row, : n[row] + 1])


def test_choose_is_draw_of_probabilities():
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(8))
    position = torch.arange(9)
    for params in ([SamplingParams(0.0)] * 9, [SamplingParams(0.0), SamplingParams(1.0), SamplingParams(0.7, 0.8)] * 3):
        token, probs = choose(logits, sampling_of(params), position, DRAFT)
        expected = probabilities(logits, params)
        assert token.equal(draw(expected, torch.arange(9), position, DRAFT))
        assert (probs is None and params[1].temperature == 0) or probs.equal(expected)


def test_all_positions_of_a_row_share_its_settings():
    logits = torch.randn(4, 3, 30, generator=torch.Generator().manual_seed(9)) * 3
    params = [SamplingParams(0.0), SamplingParams(1.0), SamplingParams(0.7, 0.9), SamplingParams(2.0, min_p=0.1)]
    together = probabilities(logits, params)
    for i in range(3):
        assert together[:, i].equal(probabilities(logits[:, i], params))
    seen = torch.rand(4, 3, 30, generator=torch.Generator().manual_seed(10)) < 0.5
    punished = sampling_of([SamplingParams(0.0, repetition_penalty=1 + i) for i in range(4)])
    for i in range(3):
        assert penalised(logits, punished, seen)[:, i].equal(penalised(logits[:, i], punished, seen[:, i]))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} is "):
        SamplingParams(**{name: value})
