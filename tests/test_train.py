"""Training the tiny model for a few steps on the CPU: it learns, resumes exactly, balances, stops on a bad loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import export
import train
from checkpoints import dequantise, mtp_oracle, oracle, read_weights, write_tokenizer
from config import ModelArgs
from errors import InputError
from llm import LLM

ROWS, SEQ_LEN = 4, 24


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """tiny/config.json, smaller."""
    config = json.loads(train.CONFIG.read_text())
    config |= {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "vocab_size": 384}
    config |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 2}
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """300 short conversations of few tokens, each from BOS."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    talks = [np.concatenate([[0], np.arange(5, 15) + 20 * rng.integers(3), [1]]) for _ in range(300)]
    np.save(folder / "train.npy", np.concatenate(talks).astype(np.uint16))
    return folder


@pytest.fixture
def run(config, data, monkeypatch):
    def run(out: Path, *more: str) -> None:
        arguments = ["--data", data, "--out", out, "--config", config, "--rows", ROWS, "--seq-len", SEQ_LEN]
        arguments += ["--steps", 8, "--warmup", 2, "--save-every", 2, "--device", "cpu", *more]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()

    return run


def test_a_stopped_run_ends_as_an_unstopped_one(run, tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", "--stop-after", "3")
    run(tmp_path / "parts")
    whole, parts = load_file(tmp_path / "whole/state.safetensors"), load_file(tmp_path / "parts/state.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    run(tmp_path / "shorter", "--stop-after", "7")  # the comparison can fail
    shorter = load_file(tmp_path / "shorter/state.safetensors")
    assert not torch.equal(whole["model.head.weight"], shorter["model.head.weight"])


def test_learns(run, tmp_path):
    run(tmp_path, "--steps", "40", "--lr", "0.01", "--save-every", "100")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["mtp"] < 0.7 * log[0]["mtp"]


def test_a_bad_loss_stops_and_keeps_the_last_save(run, tmp_path, monkeypatch):
    real, steps = train.losses, []

    def broken(model, tokens):
        steps.append(1)
        main, mtp = real(model, tokens)
        return main * (torch.nan if len(steps) == 6 else 1), mtp

    monkeypatch.setattr(train, "losses", broken)
    with pytest.raises(InputError, match=r"nan at step 5; .* keeps the save of step 4"):
        run(tmp_path)
    kept = load_file(tmp_path / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    monkeypatch.setattr(train, "losses", real)
    run(tmp_path)  # goes on from step 4


def test_mtp_loss_is_for_the_token_after_next(config):
    """Against transformers-free arithmetic: shift the labels by hand."""
    args = ModelArgs.from_hf(config)
    model = train.new_model(args, torch.device("cpu"), 1)
    tokens = torch.randint(5, args.vocab_size, (2, 10 + 1 + 1))
    main, mtp = train.losses(model, tokens)
    step = model.step((2, 10))
    h = model.hidden(tokens[:, :10], step)
    first = model.logits(h).log_softmax(-1).gather(-1, tokens[:, 1:11, None]).mean()
    second = model.logits(model.draft(0, h, tokens[:, 1:11], step)).log_softmax(-1).gather(-1, tokens[:, 2:12, None])
    torch.testing.assert_close(main, -first)
    torch.testing.assert_close(mtp, -second.mean())


def test_biases_move_against_the_load(config):
    model = train.new_model(ModelArgs.from_hf(config), torch.device("cpu"), 0)
    balancer = train.Balancer(model)
    gate = balancer.gates[0]
    _, indices, _ = gate(torch.randn(50, 128))
    assert (indices[:, 2] == -1).all()  # the shared expert, which no bias concerns
    load = indices[:, :2].flatten().bincount(minlength=8).float()
    worst = balancer.update(0.001)
    assert worst == pytest.approx((load.max() / load.mean()).item())
    torch.testing.assert_close(gate.bias.data, 0.001 * (load.mean() - load).sign())
    before = gate.bias.clone()
    balancer.loads[0] += 1  # an even load moves nothing
    balancer.update(0.001)
    assert torch.equal(gate.bias, before)


def test_every_epoch_has_every_token_once_in_another_order():
    tokens = np.concatenate([[0, *range(10 * i + 1, 10 * i + 10)] for i in range(12)]).astype(np.uint16)
    stream = train.batches(tokens, rows=2, seq_len=10, ahead=2, seed=0, start=0)  # 5 batches of 24 an epoch
    first, second = (torch.cat([next(stream) for _ in range(5)]).flatten() for _ in range(2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(tokens.tolist())
    assert not torch.equal(first, second)
    again = train.batches(tokens, rows=2, seq_len=10, ahead=2, seed=0, start=7)
    stream = train.batches(tokens, rows=2, seq_len=10, ahead=2, seed=0, start=0)
    assert torch.equal(next(again), [next(stream) for _ in range(8)][7])


def test_export_is_what_was_trained(run, config, tmp_path, monkeypatch):
    """transformers, reading the exported checkpoint, computes the trained model's logits, and its MTP module's."""
    run(tmp_path / "run")
    write_tokenizer(tmp_path)
    folders = {}
    for kind in ("fp8", "bf16"):
        folders[kind] = tmp_path / kind
        arguments = ["--run", tmp_path / "run", "--tokenizer", tmp_path, "--out", folders[kind], "--config", config]
        arguments += ["--bf16"] if kind == "bf16" else []
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        export.main()
    trained = train.new_model(ModelArgs.from_hf(config), torch.device("cpu"), 0)
    state = load_file(tmp_path / "run/state.safetensors")
    # Rounded as the checkpoint is: otherwise a rounding can send a token to another expert.
    rounded = {name: t if name.endswith("gate.bias") else t.bfloat16().float() for name, t in state.items()}
    trained.load_state_dict({name.removeprefix("model."): t for name, t in rounded.items() if name[:6] == "model."})
    tokens = torch.randint(5, 384, (1, 30))
    with torch.inference_mode():
        expected = trained(tokens, all_positions=True)
        theirs = oracle(folders["bf16"])
        assert (theirs(tokens).logits - expected).norm() < 1e-4 * expected.norm()
        mtp = mtp_oracle(folders["bf16"], theirs)
        h = theirs.model(tokens[:, :-1]).last_hidden_state
        drafted = mtp._project_to_logits(mtp.forward_layer(0, h, torch.arange(29)[None], None, input_ids=tokens[:, 1:]))
        step = trained.step((1, 29))
        mine = trained.logits(trained.draft(0, trained.hidden(tokens[:, :-1], step), tokens[:, 1:], step))
        assert (drafted - mine).norm() < 1e-4 * mine.norm()
    whole, quantised = read_weights(folders["bf16"]), dequantise(read_weights(folders["fp8"]))
    for name, weight in whole.items():
        assert (quantised[name].float() - weight.float()).norm() <= 0.04 * weight.float().norm(), name
    assert LLM(folders["fp8"], device="cpu", max_batch_size=1, max_seq_len=64).generate([[0, 5, 6]])


def test_missing_data_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"train.npy: no such file; tiny/corpus.py makes it"):
        train.main()
