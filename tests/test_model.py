"""The model against transformers' own, and every way of feeding it tokens against every other."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import attention
import fused
import kernel
import latent
import many_queries
import model as model_module
import one_token
import routing
from checkpoint import Checkpoint, load_model, tensor_specs
from checkpoints import COMMON, KINDS, SMALL, dequantise, hf_config, make_hf, mtp_oracle, oracle
from config import ModelArgs
from dummy import fill_dummy
from fused import quantised_ref
from kernel import E4M3, Quantised, weight_dequant_ref, weight_quant
from model import Gate, Linear, RMSNorm, Transformer, rotary_frequencies
from parallel import Parallel

LENGTH = 96  # past the 64 tokens after which the tiny models' YaRN differs from plain rotary embeddings
SUMMED_DIFFERENTLY = 1e-5  # fp32, the same sums in another order: measured up to 2e-6


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """make_hf, once for the same arguments."""

    @functools.cache
    def make(kind: str, dtype: str = "fp32", **options):
        return make_hf(tmp_path_factory.mktemp(kind), kind, dtype, **options)

    return make


@pytest.fixture(scope="module")
def load(hf_folder):
    """Our model of such a checkpoint, in memory as the config says or as `memory` ("bf16") says."""

    @functools.cache
    def cached(kind: str, dtype: str = "fp32", memory: str | None = None, **options) -> Transformer:
        checkpoint = Checkpoint(hf_folder(kind, dtype, **options))
        args = checkpoint.args
        if memory not in (None, args.dtype):
            args = replace(args, dtype=memory, scale_fmt=None)
        model = Transformer(args)
        for parameter in model.parameters():
            parameter.view(torch.uint8).fill_(0xFF)  # NaN in every type here: what is not loaded shows
        load_model(model, checkpoint, Parallel(), progress=False)
        return model

    return cached


@pytest.fixture(scope="module")
def v3(load):
    return load("v3")


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 520, shape, generator=torch.Generator().manual_seed(seed))


def both_errors(x: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """The relative errors in the Euclidean and in the maximum norm; NaN if there is one."""
    assert x.shape == wanted.shape
    diff = (x - wanted).double()
    return torch.stack([diff.norm() / wanted.norm(), diff.abs().max() / wanted.abs().max()]).tolist()


def error(x: torch.Tensor, wanted: torch.Tensor) -> float:
    """The larger of the two."""
    return max(both_errors(x, wanted), key=lambda value: (value != value, value))


def greedy(model: Transformer, tokens: torch.Tensor, new: int) -> torch.Tensor:
    """tokens [B, S] -> [B, S + new]: prefill, then one token at a time."""
    cache = model.new_cache(tokens.shape[0], tokens.shape[1] + new)
    logits = model(tokens, 0, cache)
    for _ in range(new):
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        if tokens.shape[1] < cache.shape[2]:
            logits = model(tokens[:, -1:], tokens.shape[1] - 1, cache)
    return tokens


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens(hf_folder, load, kind, yarn):
    model, theirs = load(kind, yarn=yarn), oracle(hf_folder(kind, yarn=yarn))
    tokens = random_tokens(3, LENGTH)
    with torch.inference_mode():
        assert error(model(tokens, all_positions=True), theirs(tokens).logits) < 1e-4
        theirs.generation_config.eos_token_id = None
        wanted = theirs.generate(tokens[:2], max_new_tokens=64, do_sample=False, pad_token_id=2)
    assert torch.equal(greedy(model, tokens[:2], 64), wanted)


def test_norm_epsilons(hf_folder, load):
    """The norms of the latents do not follow rms_norm_eps, all others do."""
    options = {"rms_norm_eps": 0.05}
    tokens = random_tokens(1, 20)
    with torch.inference_mode():
        wanted = oracle(hf_folder("v3", **options))(tokens).logits
    assert error(load("v3", **options)(tokens, all_positions=True), wanted) < 1e-4


def test_mtp_logits(hf_folder, load):
    folder, model = hf_folder("v3", mtp=2), load("v3", mtp=2)
    theirs = oracle(folder)
    modules = mtp_oracle(folder, theirs)
    tokens = random_tokens(2, LENGTH)
    first, second, third = tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]
    positions = torch.arange(LENGTH - 2).expand(2, -1)
    with torch.inference_mode():
        h = theirs.model(first).last_hidden_state
        wanted = []
        for i, following in enumerate((second, third)):
            # What newer releases of transformers call modules.forward_layer(i, ...).
            embedded = modules.embed_tokens(following)
            masks = modules.create_masks_for_mtp_layer(i, embedded, None, positions)
            where = {"position_ids": positions, "position_embeddings": modules.rotary_emb(embedded, positions)}
            h = modules.layers[i](embedded, h, past_key_values=None, **where, **masks)
            wanted.append(modules._project_to_logits(h))

    step = model.step(first.shape)
    h = model.hidden(first, step)
    for i, following in enumerate((second, third)):
        h = model.draft(i, h, following, step)
        assert error(model.logits(h), wanted[i]) < 1e-4

    # And over a cache in two parts: each module keeps its own.
    cache = model.new_cache(2, LENGTH)
    for part in (slice(0, 50), slice(50, LENGTH - 2)):
        step = model.step(first[:, part].shape, part.start)
        h = model.hidden(first[:, part], step, cache)
        for i, following in enumerate((second, third)):
            h = model.draft(i, h, following[:, part], step, cache)
            assert error(model.logits(h), wanted[i][:, part]) < 1e-4


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 40, "beta_fast": 32, "beta_slow": 1, "rope_theta": 10000.0},
        {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "rope_theta": 50000.0},  # Kimi-K2
    ],
    ids=["V3", "Kimi-K2"],
)
def test_yarn_at_released_sizes(rope):
    mscale = {"mscale": 1.0, "mscale_all_dim": 1.0}
    rope = rope | mscale | {"rope_type": "yarn", "original_max_position_embeddings": 4096}
    config = {name: value for name, value in COMMON.items() if not name.startswith("rope_")} | KINDS["v3"]
    config |= {"qk_rope_head_dim": 64, "rope_parameters": rope}
    wanted, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](hf_config(config), torch.device("cpu"))
    assert attention_factor == 1.0
    args = ModelArgs.from_hf(config)
    assert torch.allclose(rotary_frequencies(args), wanted, rtol=1e-6, atol=0)
    m = 0.1 * math.log(rope["factor"]) + 1
    softmax_scale = Transformer(replace(args, n_layers=1)).layers[0].attn.softmax_scale
    assert softmax_scale == pytest.approx((96 + 64) ** -0.5 * m * m, rel=1e-12)


def test_rotation_follows_each_rows_positions(v3):
    """Against cos and sin of each position's angle; padding may lie past all positions that count."""
    angle = rotary_frequencies(v3.args)
    for start_pos, S, kv_len in ((torch.tensor([0, 6]), 5, 7), (torch.tensor([3, 40]), 1, 41), (63, 1, 64)):
        step = v3.step((2, S), start_pos, kv_len=kv_len)
        for position, found in zip(step.positions.flatten().tolist(), step.rotation, strict=True):
            if position < kv_len:
                assert torch.equal(found, torch.stack([(position * angle).cos(), (position * angle).sin()], dim=-1))
        wanted = torch.as_tensor(start_pos).expand(2)[:, None] + torch.arange(S)
        assert torch.equal(step.positions, wanted)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_prefill(load, kind):
    model, tokens = load(kind), random_tokens(2, LENGTH)
    whole = model(tokens, all_positions=True)
    cache = model.new_cache(2, LENGTH)
    assert error(model(tokens[:, :60], 0, cache, all_positions=True), whole[:, :60]) < SUMMED_DIFFERENTLY
    steps = [model(tokens[:, i : i + 1], i, cache) for i in range(60, LENGTH)]
    assert error(torch.stack(steps, 1), whole[:, 60:]) < SUMMED_DIFFERENTLY


@pytest.mark.parametrize("sizes", [(1, 7, 40, 2, 46), (95, 1), (32, 32, 32), (1, 95)], ids=str)
def test_chunked_prefill_equals_whole(v3, sizes):
    tokens = random_tokens(2, LENGTH)
    cache = v3.new_cache(2, LENGTH)
    done, parts = 0, []
    for size in sizes:
        parts.append(v3(tokens[:, done : done + size], done, cache, all_positions=True))
        done += size
    assert done == LENGTH
    assert error(torch.cat(parts, 1), v3(tokens, all_positions=True)) < SUMMED_DIFFERENTLY


@pytest.mark.parametrize("kind", KINDS)
def test_absorbed_equals_expanded(load, kind):
    model = load(kind)
    attn, args = model.layers[1].attn, model.args
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * 5, args.dim, generator=generator)
    prefix = torch.randn(3, 80, args.cache_dim, generator=generator)
    step = model.step((3, 5), torch.tensor([0, 31, 75]), kv_len=80)
    caches = prefix.clone(), prefix.clone()
    absorbed, expanded = (attn(x, step, cache, absorb) for cache, absorb in zip(caches, (True, False), strict=True))
    assert error(absorbed, expanded) < SUMMED_DIFFERENTLY
    assert torch.equal(*caches) and not torch.equal(caches[0], prefix)


def test_the_cheaper_of_the_two_is_taken(v3):
    """By torch's own count of the operations, at shapes on both sides of the line."""
    attn = v3.layers[1].attn
    cache = torch.zeros(1, 400, v3.args.cache_dim)

    def operations(S: int, kv_len: int, absorb: bool | None) -> int:
        step = v3.step((1, S), torch.tensor([kv_len - S]), kv_len=kv_len)
        with FlopCounterMode(display=False) as counter:
            attn(torch.zeros(S, v3.args.dim), step, cache, absorb)
        return counter.get_total_flops()

    chosen = set()
    for S, kv_len in ((1, 1), (1, 2), (1, 300), (2, 8), (20, 40), (90, 400), (100, 400), (300, 400), (80, 80)):
        absorbed, expanded = (operations(S, kv_len, absorb) for absorb in (True, False))
        assert operations(S, kv_len, None) == min(absorbed, expanded), (S, kv_len)
        assert attn.absorb(S, kv_len) == (absorbed < expanded), (S, kv_len)
        chosen.add(absorbed < expanded)
    assert chosen == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_one_by_one(load, kind):
    model, lengths, new = load(kind), [70, 9, 33], 8
    prompts = [random_tokens(1, n, seed=n) for n in lengths]
    alone = [greedy(model, prompt, new) for prompt in prompts]

    batch = random_tokens(3, max(lengths), seed=99)  # the padding is tokens like any other
    for row, prompt in zip(batch, prompts, strict=True):
        row[: prompt.shape[1]] = prompt
    ends = torch.tensor(lengths)
    cache = model.new_cache(3, max(lengths) + new)
    logits = model(batch, 0, cache, lengths=ends)
    for row, prompt in enumerate(prompts):
        assert error(logits[row], model(prompt)[0]) < SUMMED_DIFFERENTLY
    for i in range(new):
        token = logits.argmax(-1)
        assert token.tolist() == [whole[0, n + i].item() for whole, n in zip(alone, lengths, strict=True)]
        logits = model(token[:, None], ends + i, cache, kv_len=max(lengths) + i + 1)
    for row, whole in enumerate(alone):
        assert error(logits[row], model(whole)[0]) < SUMMED_DIFFERENTLY


def prefilled(model: Transformer, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """A cache of `length` that has seen all of `tokens`."""
    cache = model.new_cache(tokens.shape[0], length)
    model(tokens, 0, cache)
    return cache


def test_several_tokens_at_any_position(v3):
    """Three tokens a row, each row at its own position, as when drafts are verified. What lies beyond is rewritten."""
    tokens, start = random_tokens(4, LENGTH), torch.tensor([0, 17, 63, 93])
    whole = v3(tokens, all_positions=True)
    cache = prefilled(v3, tokens, LENGTH)
    window = start[:, None] + torch.arange(3)
    logits = v3(tokens.gather(1, window), start, cache, kv_len=LENGTH, all_positions=True)
    wanted = whole.gather(1, window[..., None].expand_as(logits))
    assert error(logits, wanted) < SUMMED_DIFFERENTLY
    for row, first in enumerate(start.tolist()):
        one = v3(tokens[row : row + 1, first : first + 3], first, cache[:, row : row + 1], all_positions=True)
        assert error(one[0], wanted[row]) < SUMMED_DIFFERENTLY


def test_rollback(v3):
    """Drafts that were rejected leave nothing behind: the next tokens overwrite them, position by position."""
    tokens, drafts = random_tokens(2, 60), random_tokens(2, 5, seed=1)
    cache, clean = prefilled(v3, tokens[:, :40], 80), prefilled(v3, tokens[:, :40], 80)
    v3(drafts, 40, cache)
    accepted = torch.tensor([41, 40])  # of row 0 one draft is taken, which then is its token
    tokens[0, 40] = drafts[0, 0]
    v3(tokens[:1, 40:41], 40, clean[:, :1])
    for i in range(4):
        token = tokens.gather(1, (accepted + i)[:, None])
        logits, wanted = (v3(token, accepted + i, c, kv_len=46) for c in (cache, clean))
        assert error(logits, wanted) < SUMMED_DIFFERENTLY


def test_cache_rows_in_any_order(v3):
    tokens, rows = random_tokens(3, 50), torch.tensor([4, 0, 2])
    cache = v3.new_cache(5, 50)
    wanted = v3(tokens, all_positions=True)
    assert error(v3(tokens[:, :40], 0, cache, rows=rows, all_positions=True), wanted[:, :40]) < SUMMED_DIFFERENTLY
    assert not cache[:, [1, 3]].any() and cache[:, rows].any(-1).sum() == v3.args.n_layers * 3 * 40
    for i in range(40, 50):
        some = [2, 0] if i % 2 else [0, 2]  # row 1 of the batch is finished and costs nothing
        logits = v3(tokens[some, i : i + 1], i, cache, rows=rows[some])
        assert error(logits, wanted[some, i]) < SUMMED_DIFFERENTLY


@pytest.mark.parametrize("absorb", [True, False], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("start", [38, torch.tensor([38, 10])], ids=["number", "tensor"])
def test_writes_past_the_end_are_dropped(v3, monkeypatch, absorb, start):
    """Drafting near the end of the cache: five tokens of which two fit in row 0."""
    monkeypatch.setattr("model.MLA.absorb", lambda self, seqlen, kv_len: absorb)
    tokens, more = random_tokens(2, 40), random_tokens(2, 5, seed=1)
    tight, roomy = prefilled(v3, tokens[:, :38], 40), prefilled(v3, tokens[:, :38], 60)
    kv_len = None if isinstance(start, int) else 43
    logits, wanted = (v3(more, start, cache, kv_len=kv_len, all_positions=True) for cache in (tight, roomy))
    assert error(logits[0, :2], wanted[0, :2]) < SUMMED_DIFFERENTLY
    fits = 2 if isinstance(start, int) else 5
    assert error(logits[1, :fits], wanted[1, :fits]) < SUMMED_DIFFERENTLY
    assert torch.allclose(tight, roomy[:, :, :40], rtol=1e-4, atol=1e-4)
    assert not torch.equal(tight, prefilled(v3, tokens[:, :38], 40))


@pytest.mark.parametrize("S", [1, 6, 60])
def test_garbage_past_a_rows_end_is_never_seen(v3, S):
    """What another request left in the cache has weight zero, not a small one."""
    tokens, start = random_tokens(2, 70), torch.tensor([10, 3])
    clean = prefilled(v3, tokens[:, :10], 80)
    clean[:, 1, 3:] = 0
    dirty = clean.clone()
    dirty[:, 0, 10:] = 1e4
    dirty[:, 1, 3:] = -1e4
    window = tokens.gather(1, start[:, None] + torch.arange(S))
    results = [v3(window, start, cache, kv_len=80, all_positions=True) for cache in (clean, dirty)]
    assert torch.equal(*results)


def test_kv_len_bounds_work_and_never_results(v3):
    tokens, start = random_tokens(2, 40), torch.tensor([20, 31])
    window = tokens.gather(1, start[:, None] + torch.arange(4))
    cache = prefilled(v3, tokens[:, :31], 64)
    tightest = v3(window, start, cache, kv_len=35, all_positions=True)
    for kv_len in (36, 50, 64, 1000):
        assert error(v3(window, start, cache, kv_len=kv_len, all_positions=True), tightest) < SUMMED_DIFFERENTLY
    with pytest.raises(ValueError, match="kv_len"):
        v3(window, start, cache)


def test_last_position_is_one_of_all(v3):
    tokens, lengths = random_tokens(3, 20), torch.tensor([20, 1, 13])
    whole = v3(tokens, all_positions=True)
    assert whole.dtype == torch.float32 and whole.shape == (3, 20, 520)
    assert error(v3(tokens), whole[:, -1]) < SUMMED_DIFFERENTLY
    assert error(v3(tokens, lengths=lengths), whole[torch.arange(3), lengths - 1]) < SUMMED_DIFFERENTLY


def test_cache_layout(v3, load):
    assert v3.new_cache(3, 17).shape == (3, 3, 17, 128 + 32)
    assert load("v3", mtp=2).new_cache(3, 17).shape == (5, 3, 17, 160)
    assert load("v3", "bf16").new_cache(1, 1).dtype == torch.bfloat16


# --- FP8 and BF16 -----------------------------------------------------------------------------------------------------


# What quantised activations cost a random model, whose routing flips easily: median cosine over the positions, measured
# with both kinds of scales and two seeds at least (0.9847, 0.9602, 0.9939). Dequantised to bf16: 0.9993.
FP8_FLOOR = {"v3": 0.975, "v2": 0.94, "v2lite": 0.99}


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_and_bf16_stay_near_fp32(hf_folder, load, kind, scale_fmt):
    options = {"scale_fmt": scale_fmt} if scale_fmt else {}
    tokens = random_tokens(2, LENGTH)
    with torch.inference_mode():
        exact = oracle(hf_folder(kind, "fp8", **options))(tokens).logits
    for memory, floor in (("fp8", FP8_FLOOR[kind]), ("bf16", 0.998)):
        logits = load(kind, "fp8", memory=memory, **options)(tokens, all_positions=True)
        assert torch.cosine_similarity(logits, exact, dim=-1).median() > floor


def without_nan(model: Transformer) -> Transformer:
    """A copy with zeros where no tensor of the checkpoint was loaded to: it fills up a block of scales of wqkv_a."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if name.endswith("wqkv_a.weight"):
            parameter.view(torch.uint8).masked_fill_(parameter.float().isnan(), 0)
    return model


def rounded_to_e4m3(x: torch.Tensor, scale_fmt: str | None) -> torch.Tensor:
    """x [M, K], K a multiple of 128, as an FP8 product sees it, in float64."""
    groups = x.double().unflatten(-1, (-1, 128))
    s = groups.abs().amax(-1, keepdim=True).float() / torch.tensor(448.0)
    s = torch.exp2(torch.ceil(torch.log2(s))) if scale_fmt else s
    return ((groups.float() / s).to(torch.float8_e4m3fn).double() * s.double()).flatten(-2)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_linears_quantise_their_inputs(load, monkeypatch, scale_fmt):
    """Each one, given its input: the float64 product of the dequantised weight and the input rounded to e4m3."""
    errors, quantised_before = [], []

    def check(x, weight, scale=None, scale_fmt=None, linear=kernel.linear):
        y = linear(x, weight, scale, scale_fmt)
        if scale is not None:
            quantised_before.append(isinstance(x, Quantised))
            rounded = rounded_to_e4m3(x.x if isinstance(x, Quantised) else x, scale_fmt)
            errors.append(error(y, rounded @ dequantised(weight, scale).T))
        return y

    monkeypatch.setattr("model.linear", check)
    monkeypatch.setattr("experts.linear", check)
    # What was quantised where it was computed is kept in its own type too, to compare with.
    for module in ("fused", "latent"):
        monkeypatch.setattr(f"{module}.quantised_ref", lambda x, scale_fmt, keep: quantised_ref(x, scale_fmt))
    model = without_nan(load("v3", "fp8", **({"scale_fmt": scale_fmt} if scale_fmt else {})))
    model(random_tokens(2, LENGTH))
    # wqkv_a, wq_b and wo of 3 layers; w1, w3 and w2 of a dense layer's MLP and, in two, of 12 experts and a shared one.
    assert len(errors) == 3 * 3 + 3 * (1 + 2 * (12 + 1))
    assert max(errors) < 2.0**-8  # y is rounded to bf16
    assert sum(quantised_before) == 3 * 2 + 2  # by the norms before wqkv_a, wq_b and the dense layer's w1 and w3


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return dequantise({"w": weight, "w_scale_inv": scale}, torch.float64)["w"]


@pytest.mark.parametrize("kind", KINDS)
def test_fp8_weights_and_scales_are_where_they_belong(hf_folder, kind, monkeypatch):
    """With its linears computed exactly and activations in fp32, the FP8 model is transformers' of the same weights."""

    def exact_linear(x, weight, scale=None, scale_fmt=None):
        return torch.nn.functional.linear(x, weight if scale is None else dequantised(weight, scale).float())

    monkeypatch.setattr("model.linear", exact_linear)
    monkeypatch.setattr("experts.linear", exact_linear)
    for module in ("fused", "latent"):
        monkeypatch.setattr(f"{module}.quantised_ref", lambda x, *_: x)
    checkpoint = Checkpoint(hf_folder(kind, "fp8"))
    model, tokens = Transformer(checkpoint.args), random_tokens(2, LENGTH)
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    load_model(model, checkpoint, Parallel(), progress=False)
    with torch.inference_mode():
        wanted = oracle(checkpoint.path)(tokens).logits
    assert error(model(tokens, all_positions=True), wanted) < 1e-4


def test_scale_fmt_reaches_every_linear(load, monkeypatch):
    """By what is asked of those that quantise, and by the scales they give."""
    calls = []

    def record(x, scale_fmt=None):
        y, scale = kernel.act_quant_ref(x, scale_fmt)
        calls.append((scale_fmt, bool((scale.log2() == scale.log2().round()).all())))
        return y, scale

    monkeypatch.setattr("kernel.act_quant", record)  # in front of a product
    monkeypatch.setattr("fused.act_quant_ref", record)  # where the activation is computed
    tokens = random_tokens(1, 40)
    for scale_fmt in (None, "ue8m0"):
        calls.clear()
        model = load("v3", "fp8", scale_fmt=scale_fmt, mtp=1)
        step = model.step(tokens.shape)
        model.draft(0, model.hidden(tokens, step), tokens, step)
        # 4 blocks: before wqkv_a, wq_b, wo and the feed-forward part. Of that the dense one takes it as it comes, and
        # quantises before w2; as 40 tokens reach every expert, each quantises what it gets for w1, w3 and w2.
        assert len(calls) == 4 * 4 + 1 + 3 * 3 * (12 + 1)
        assert set(calls) == {(scale_fmt, scale_fmt == "ue8m0")}


def test_what_is_in_fp8(load):
    """All linears but embedding, head, eh_proj and the gate; and wkv_b, which is dequantised for its two halves."""
    model = load("v3", "fp8", mtp=1)
    wide = {name for name, module in model.named_modules() if isinstance(module, Linear) and module.scale is None}
    attns = [f"layers.{i}.attn" for i in range(3)] + ["mtp.0.attn"]
    assert wide == {"head", "mtp.0.eh_proj"} | {f"{attn}.wkv_b" for attn in attns}
    dtypes = {parameter.dtype for parameter in load("v3", "bf16").parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("kind", [*KINDS, "small"])
def test_parameters_are_the_checkpoints_tensors(load, kind, dtype):
    """Each tensor of a checkpoint has one place, of its shape and type, and no other tensor's is in it."""
    options = {"v3": {"mtp": 2}, "small": {"mtp": 1, **SMALL}}.get(kind, {})
    model = load("v3" if kind == "small" else kind, dtype, **options)
    args = model.args
    wanted = {name: (spec.shape, spec.dtype) for name, spec in tensor_specs(args).items()}
    if dtype == "fp8":  # wkv_b is dequantised as it is read
        wide = {name: (shape, torch.bfloat16) for name, (shape, _) in wanted.items() if name.endswith(".wkv_b.weight")}
        wanted = {name: where for name, where in (wanted | wide).items() if not name.endswith(".wkv_b.scale")}
    found = {name: (joined(name, place.shape), place.dtype) for name, place in model.weights().items()}
    assert found == wanted

    taken = {p.data_ptr(): torch.zeros(p.numel(), dtype=torch.int32) for p in model.parameters()}
    for place in model.weights().values():
        marks = taken[place.untyped_storage().data_ptr()]
        marks.as_strided(place.shape, place.stride(), place.storage_offset()).add_(1)
    for name, parameter in model.named_parameters():
        marks = taken[parameter.data_ptr()].view(parameter.shape)
        if name.endswith("wqkv_a.weight"):  # in FP8 both parts are filled up to whole blocks
            unit, q_rows = 128 if dtype == "fp8" else 1, args.q_lora_rank or args.n_heads * args.qk_head_dim
            used = torch.arange(-(-q_rows // unit) * unit + -(-args.cache_dim // unit) * unit)
            kv_at = -(-q_rows // unit) * unit
            used = (used < q_rows) | ((used >= kv_at) & (used < kv_at + args.cache_dim))
            assert torch.equal(marks, used.int()[:, None].expand_as(marks)), name
        else:
            assert (marks == 1).all(), name


def joined(name: str, shape: torch.Size) -> tuple[int, ...]:
    """The shape in a checkpoint of where it goes: several shared experts, stacked here, are one wide MLP there."""
    if len(shape) < 3:
        return tuple(shape)
    assert ".shared_experts." in name
    a, b, c = shape
    return (a, b * c) if ".w2." in name else (a * b, c)


def decisive_model(args: ModelArgs, device: str) -> Transformer:
    """
    An FP8 model of random weights in which no rounding sends a token to another expert: its embedding is mainly one of
    E orthogonal ones, and its gate ranks the experts by how far they are, in a circle, from that direction's.
    """
    with torch.device(device):
        model = Transformer(args)
    generator = torch.Generator(device).manual_seed(0)
    E, parameters = args.n_routed_experts, dict(model.named_parameters())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    for name, parameter in parameters.items():
        if name.endswith("weight") and parameter.dtype == E4M3:
            scales = parameters[name.removesuffix("weight") + "scale"]
            matrices = zip(parameter.view(-1, *parameter.shape[-2:]), scales.view(-1, *scales.shape[-2:]), strict=True)
            for weight, scale in matrices:
                values, scale_of_it = weight_quant(normal(*weight.shape) * weight.shape[1] ** -0.5, args.scale_fmt)
                weight.copy_(values), scale.copy_(scale_of_it)
        elif parameter.dim() == 1:
            parameter.copy_(normal(*parameter.shape) * 0.1 + (0 if name.endswith("bias") else 1))
        elif not name.endswith("scale"):
            parameter.copy_(normal(*parameter.shape) * parameter.shape[-1] ** -0.5)
    directions = torch.linalg.qr(normal(args.dim, E))[0].T * args.dim**0.5
    model.embed.weight.copy_(4 * directions[torch.arange(args.vocab_size) % E] + normal(args.vocab_size, args.dim))
    preference = torch.linspace(4, -4, E)[(torch.arange(E)[:, None] - torch.arange(E)) % E].to(device)
    for layer in model.layers:
        if not layer.dense:
            layer.ffn.gate.weight.copy_(preference @ directions / args.dim)
            layer.ffn.gate.bias.zero_()
    return model


def dequantised_model(model: Transformer) -> Transformer:
    """Of the same numbers in bf16."""
    with torch.device(model.embed.weight.device):
        wide = Transformer(replace(model.args, dtype="bf16", scale_fmt=None))
    weights = model.weights()
    for name, place in wide.weights().items():
        weight = weights[name]
        if weight.dtype == E4M3:
            weight = weight_dequant_ref(weight, weights[name.removesuffix("weight") + "scale"])
        place.copy_(weight)
    return wide


# Of 16 experts, with everything else as wide as V3's on a GPU; a dense layer and an MoE layer.
V3_LIKE = {"n_layers": 2, "n_dense_layers": 1, "n_routed_experts": 16, "n_expert_groups": 4, "n_limited_groups": 2}
V3_LIKE |= {"n_activated_experts": 4, "vocab_size": 4096, "n_mtp_layers": 0}
NARROW = {"dim": 1024, "inter_dim": 640, "moe_inter_dim": 256, "n_heads": 4, "q_lora_rank": 384, "kv_lora_rank": 128}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_fp8_arithmetic_is_that_of_the_references_and_near_bf16(monkeypatch, device, scale_fmt):
    """Prefill and decoding: logits by kernels, by the references on the same device, and of the dequantised weights."""
    args = ModelArgs.load(Path(__file__).parents[1] / "configs" / "config_671B.json")
    args = replace(args, scale_fmt=scale_fmt, **V3_LIKE, **(NARROW if device == "cpu" else {}))
    model = decisive_model(args, device)
    tokens = torch.randint(4096, (2, 100), generator=torch.Generator().manual_seed(0)).to(device)

    def run(model: Transformer) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of all positions, and the choices of the MoE layer."""
        indices = []
        hook = model.layers[1].ffn.gate.register_forward_hook(lambda *called: indices.append(called[2][1][:, :4]))
        cache = model.new_cache(2, 100)
        parts = [model(tokens[:, a:b], a, cache, all_positions=True) for a, b in ((0, 90), (90, 97))]
        parts += [model(tokens[:, i : i + 1], i, cache, all_positions=True) for i in (97, 98, 99)]
        hook.remove()
        return torch.cat(parts, 1), torch.cat(indices)

    found, chosen = run(model)
    assert found.isfinite().all() and len(chosen.unique()) == 16
    with monkeypatch.context() as patch:
        for module in ("kernel", "fused", "latent", "routing", "experts", "attention"):
            patch.setattr(f"{module}.on_gpu", lambda x: False)
        by_references, chosen_by_references = run(model)
    wide, chosen_in_bf16 = run(dequantised_model(model))
    assert torch.equal(chosen.sort(-1).values, chosen_by_references.sort(-1).values)
    assert torch.equal(chosen.sort(-1).values, chosen_in_bf16.sort(-1).values)
    # Each rounding to e4m3 goes either way for a last bit before it, so the two differ; both are as near to the exact.
    off, off_by_references = found - wide, by_references - wide
    assert off.norm() < 1.02 * off_by_references.norm()
    assert (off.norm(dim=-1) < 1.15 * off_by_references.norm(dim=-1)).all()
    if device == "cpu":
        assert torch.cosine_similarity(found, by_references, dim=-1).min() > 0.9999
    assert torch.cosine_similarity(found, wide, dim=-1).min() > 0.999


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_fp32(load, kind):
    """Prefill, chunks, ragged decoding: on the GPU as on the CPU."""
    model, tokens = load(kind), random_tokens(2, LENGTH)
    wanted = model(tokens, all_positions=True)
    model, tokens = copy.deepcopy(model).cuda(), tokens.cuda()
    cache = model.new_cache(2, LENGTH)
    parts = [model(tokens[:, a:b], a, cache, all_positions=True) for a, b in ((0, 50), (50, 80))]
    assert error(torch.cat(parts, 1).cpu(), wanted[:, :80]) < 1e-4
    start = torch.tensor([80, 33], device="cuda")
    for i in range(8):
        token = tokens.gather(1, (start + i)[:, None])
        logits = model(token, start + i, cache, kv_len=88)
        assert error(logits.cpu(), torch.stack([wanted[0, 80 + i], wanted[1, 33 + i]])) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "scale_fmt"), [("bf16", None), ("fp8", None), ("fp8", "ue8m0")])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_bf16_and_fp8(load, kind, dtype, scale_fmt):
    options = {"scale_fmt": scale_fmt} if scale_fmt else {}
    model, tokens = load(kind, dtype, **options), random_tokens(2, LENGTH)
    wanted = model(tokens, all_positions=True)
    found = copy.deepcopy(model).cuda()(tokens.cuda(), all_positions=True).cpu()
    assert found.isfinite().all()
    assert torch.cosine_similarity(found, wanted, dim=-1).median() > (0.998 if dtype == "bf16" else FP8_FLOOR[kind])


def on_cpu(value):
    if isinstance(value, tuple):
        parts = map(on_cpu, value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.cpu() if isinstance(value, torch.Tensor) else value


def as_tensor(y: torch.Tensor | Quantised) -> torch.Tensor:
    if not isinstance(y, Quantised):
        return y
    return y.values.float() * y.scale.repeat_interleave(128, 1)[:, : y.values.shape[1]]


@pytest.mark.gpu
@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_fp8_products_in_their_places(load, monkeypatch, kind, scale_fmt):
    """Each of the model's products on the GPU, given the inputs that it gets there: as on the CPU."""
    # In the Euclidean and the maximum norm. Rounded to bf16; to e4m3, half a step of 2^-3; and products of e4m3 of
    # which some were rounded to a neighbour: 2^-6.75 in the mean, see test_experts.py.
    allowed = {"linear": (2.0**-9, 2.0**-7), "gated_linear": (2.0**-5, 2.0**-4 * 1.1), "experts": (2.0**-6, 2.0**-4)}
    errors = {name: [] for name in allowed}

    def compare(name: str, op):
        def run(*inputs, **options):
            found = op(*inputs, **options)
            wanted = as_tensor(op(*map(on_cpu, inputs), **options))
            errors[name].append(both_errors(as_tensor(on_cpu(found)).float(), wanted.float()))
            return found

        return run

    for name in allowed:
        monkeypatch.setattr(model_module, name, compare(name, getattr(model_module, name)))
    model = load(kind, "fp8", **({"scale_fmt": scale_fmt} if scale_fmt else {}))
    model = without_nan(model).cuda()
    for length in (1, 3, LENGTH):
        model(random_tokens(2, length).cuda())
    for name, most in allowed.items():
        assert errors[name], name
        assert all(a < b for found in errors[name] for a, b in zip(found, most, strict=True)), (name, errors[name])


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["16B", "671B"])
def test_gpu_any_number_of_tokens(config):
    """
    Kernels are cut by how many there are: all cuts compile, and a row is decoded as it is alone, but for rounding and
    the choices of experts that change with it. Another row's would be off by sqrt(2).
    """
    torch.manual_seed(0)
    args = ModelArgs.load(Path(__file__).parents[1] / "configs" / f"config_{config}.json")
    model = Transformer(replace(args, n_layers=2, n_dense_layers=1, n_mtp_layers=0, n_routed_experts=64)).cuda()
    fill_dummy(model)
    tokens = torch.randint(args.vocab_size, (65, 2), device="cuda")
    with torch.inference_mode():
        cache = model.new_cache(65, 64).normal_()
        for S in (1, 2):
            found = {}
            for B in (*range(1, 13), 16, 17, 31, 33, 64, 65):
                step = model.step((B, S), torch.full((B,), 50, device="cuda"), kv_len=50 + S)
                found[B] = model.hidden(tokens[:B, :S], step, cache.clone())[0].float()
            off = {B: ((h - found[1]).norm() / found[1].norm()).item() for B, h in found.items()}
            assert max(off.values()) < 0.2, off
        for S in (*range(1, 13), 16, 17, 31, 33, 64, 65, 129):
            h = model.hidden(tokens.view(1, -1)[:, :S], model.step((1, S)), model.new_cache(1, S))
            assert h.isfinite().all(), S


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["16B", "671B"])
def test_gpu_kernels_that_start_before_others_end(config, monkeypatch):
    """A step's graph, in which they overlap, gives to the bit what its kernels give one by one."""
    args = ModelArgs.load(Path(__file__).parents[1] / "configs" / f"config_{config}.json")
    args = replace(args, n_layers=3, n_dense_layers=1, n_mtp_layers=0, n_routed_experts=64)
    model, modules = Transformer(args).cuda(), (attention, fused, kernel, latent, many_queries, one_token, routing)
    fill_dummy(model)
    launches = [module for module in modules if hasattr(module, "pdl_options")]
    assert len(launches) > 5
    with torch.inference_mode():
        for B in (1, 2, 8, 40):
            cache = model.new_cache(B, 512).normal_()
            tokens, start_pos = torch.randint(args.vocab_size, (B, 1)).cuda(), torch.full((B,), 500, device="cuda")

            def run(cache=cache, tokens=tokens, start_pos=start_pos) -> torch.Tensor:
                return model(tokens, start_pos, cache, kv_len=512)

            with monkeypatch.context() as patch:
                for module in launches:
                    patch.setattr(module, "pdl_options", lambda _: {"PDL": False})
                wanted = run()
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                found = run()
            for _ in range(20):
                found.fill_(torch.nan)
                graph.replay()
                graph.replay()
                assert torch.equal(found, wanted), B


# --- the gate ---------------------------------------------------------------------------------------------------------

GATES = {
    "v3": {"score_func": "sigmoid", "n_routed_experts": 24, "n_expert_groups": 6, "n_limited_groups": 3},
    "v2": {"score_func": "softmax", "n_routed_experts": 24, "n_expert_groups": 6, "n_limited_groups": 2},
    "kimi": {"score_func": "sigmoid", "n_routed_experts": 24, "n_expert_groups": 1, "n_limited_groups": 1},
    "v2lite": {"score_func": "softmax", "n_routed_experts": 24, "n_expert_groups": 1, "n_limited_groups": 1},
}


def gate_args(kind: str) -> ModelArgs:
    return replace(ModelArgs.from_hf(COMMON | KINDS["v3"]), n_activated_experts=5, route_scale=1.7, **GATES[kind])


def make_gate(kind: str, seed: int = 0) -> Gate:
    gate = Gate(gate_args(kind))
    generator = torch.Generator().manual_seed(seed)
    gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 0.1)
    if gate.bias is not None:
        gate.bias.copy_(torch.randn(gate.bias.shape, generator=generator) * 0.3)
    return gate


def routes(gate: Gate, args: ModelArgs, x: torch.Tensor) -> list[dict[int, float]]:
    """Expert -> weight for each token, one token, group and expert at a time in float64."""
    all_routes = []
    size = args.n_routed_experts // args.n_expert_groups
    for row in x.double() @ gate.weight.double().T:
        sigmoid = args.score_func == "sigmoid"
        exp = [math.exp(value) for value in row.tolist()]
        scores = [e / (1 + e) if sigmoid else e / sum(exp) for e in exp]
        bias = gate.bias.tolist() if sigmoid else [0.0] * len(scores)
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
        groups = [sorted(choice[g * size : (g + 1) * size], reverse=True) for g in range(args.n_expert_groups)]
        best = sorted(range(len(groups)), key=lambda g: -sum(groups[g][: 2 if sigmoid else 1]))
        allowed = [e for e in range(len(scores)) if e // size in best[: args.n_limited_groups]]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: args.n_activated_experts]
        total = sum(scores[e] for e in chosen) if sigmoid else 1.0
        all_routes.append({e: scores[e] / total * args.route_scale for e in chosen})
    return all_routes


@pytest.mark.parametrize("lift", [0.0, -5.0, 5.0])
@pytest.mark.parametrize("kind", GATES)
def test_gate_against_plain_float64(kind, lift):
    """Also with a bias that makes every choice score negative: groups left out must not come back as zeros."""
    gate, args = make_gate(kind), gate_args(kind)
    if gate.bias is not None:
        gate.bias += lift
    x = torch.randn(200, args.dim, generator=torch.Generator().manual_seed(1))
    weights, indices, _ = gate(x)
    assert weights.dtype == torch.float32
    for row_weights, row_indices, wanted in zip(weights.tolist(), indices.tolist(), routes(gate, args, x), strict=True):
        assert dict(zip(row_indices, row_weights, strict=True)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["v3", "kimi"])
def test_bias_decides_where_and_never_how_much(kind):
    gate, args = make_gate(kind), gate_args(kind)
    x = torch.randn(300, args.dim, generator=torch.Generator().manual_seed(1))
    gate.bias.zero_()
    weights, indices, _ = gate(x)
    gate.bias.copy_(torch.randn(24, generator=torch.Generator().manual_seed(2)) * 0.02)
    moved_weights, moved_indices, _ = gate(x)
    same = (indices.sort(-1).values == moved_indices.sort(-1).values).all(-1)
    assert 50 < same.sum() < 300
    order, moved_order = indices.argsort(-1), moved_indices.argsort(-1)
    assert torch.allclose(weights.gather(1, order)[same], moved_weights.gather(1, moved_order)[same], rtol=1e-6)
    gate.bias[7] = 100.0
    assert (gate(x)[1] == 7).any(-1).all()
    assert torch.allclose(gate(x)[0].sum(-1), torch.tensor(args.route_scale))


def test_router_stays_in_fp32(load):
    """Of a bf16 model, and under autocast: bit for bit what an fp32 gate makes of the same bf16 input."""
    model = load("v3", "bf16")
    gate, args = model.layers[1].ffn.gate, model.args
    x = torch.randn(100, args.dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    fp32 = Gate(replace(args, dtype="fp32"), n_shared=args.n_shared_experts)
    fp32.load_state_dict({name: tensor.float() for name, tensor in gate.state_dict().items()})
    weights, indices, _ = fp32(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = gate(x)
    for found in (gate(x), under_autocast):
        assert torch.equal(found[0], weights) and torch.equal(found[1], indices)
    assert weights.dtype == torch.float32


def test_rms_norm_in_bf16_is_computed_in_fp32():
    norm = RMSNorm(64, ModelArgs.from_hf(COMMON | KINDS["v3"]))
    x = (torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    norm.weight.copy_(torch.linspace(0.5, 1.5, 64))
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert ((norm(x).double() - wanted).abs() <= 2.0**-8 * 1.01 * wanted.abs()).all()
