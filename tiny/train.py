"""
Train the tiny model: DeepSeek-V3's objective (V3 paper, 2.1.2 and 2.2) on the model definition that inference uses.

    python tiny/train.py --data tiny/data --out tiny/data/run

Next-token loss, plus `mtp_weight` times the MTP modules' mean loss for the tokens further on. The experts' load is
balanced without a loss: after each step an expert's bias moves by `bias_speed` against the sign of its excess load.
Weights are kept in fp32 and multiplied in bf16. The same command continues from the last save, with the same result as
a run that was never stopped: the batch of a step depends on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from config import ModelArgs
from errors import Arguments, InputError, positive, run_command
from model import Gate, Transformer
from parallel import choose_device

CONFIG = Path(__file__).with_name("config.json")
BOS = 0


def new_model(args: ModelArgs, device: torch.device, seed: int) -> Transformer:
    """
    The model with fp32 weights: norms 1, biases 0, matrices normal with deviation fan_in ** -0.5, those that write
    into the residual stream (wo, w2) smaller by sqrt(2 * n_layers), so that its size does not grow with depth.
    """
    model = Transformer(replace(args, dtype="fp32", scale_fmt=None)).to(device)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        p.requires_grad = not name.endswith("gate.bias")
        if p.dim() == 1:
            value = torch.zeros(p.shape) if name.endswith("gate.bias") else torch.ones(p.shape)
        else:
            std = p.shape[-1] ** -0.5
            std *= (2 * args.n_layers) ** -0.5 if name.endswith(("wo.weight", "w2.weight")) else 1
            value = torch.randn(p.shape, generator=generator) * std
        p.data.copy_(value)
    return model


def batches(tokens: np.ndarray, rows: int, seq_len: int, ahead: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """
    Batches [rows, seq_len + ahead] from number `start` on, for ever. Each epoch the conversations (each begins with
    BOS) are put in a new order, joined, and cut into rows.
    """
    edges = np.flatnonzero(tokens == BOS)
    documents = np.split(tokens, edges[1:])
    width = seq_len + ahead
    per_epoch = (len(tokens) // width) // rows
    if per_epoch == 0:
        raise InputError(f"the data has {len(tokens)} tokens, less than one batch of {rows} x {width}")
    for epoch in range(start // per_epoch, sys.maxsize):
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        joined = np.concatenate([documents[i] for i in order])[: per_epoch * rows * width]
        for batch in joined.reshape(per_epoch, rows, width)[max(start - epoch * per_epoch, 0) :]:
            yield torch.from_numpy(batch.astype(np.int64))


def losses(model: Transformer, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    tokens [B, S + 1 + n_mtp] -> mean cross entropy of the next tokens, and of the MTP modules': module k predicts the
    token k + 2 on, from the hidden state and the tokens up to k + 1 on.
    """
    S = tokens.shape[1] - 1 - len(model.mtp)
    step = model.step((tokens.shape[0], S))

    def cross_entropy(h: torch.Tensor, shift: int) -> torch.Tensor:
        return F.cross_entropy(model.logits(h).float().flatten(0, 1), tokens[:, shift : shift + S].flatten())

    h = model.hidden(tokens[:, :S], step)
    main, mtp = cross_entropy(h, 1), []
    for k in range(len(model.mtp)):
        h = model.draft(k, h, tokens[:, k + 1 : k + 1 + S], step)
        mtp.append(cross_entropy(h, k + 2))
    return main, torch.stack(mtp).mean() if mtp else torch.zeros_like(main)


class Balancer:
    """Auxiliary-loss-free balancing (V3 paper, 2.1.2): counts each expert's tokens in a step, then moves the biases."""

    def __init__(self, model: Transformer):
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]
        self.loads = [torch.zeros_like(gate.bias, dtype=torch.int64) for gate in self.gates]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.register_forward_hook(self._counter(load))

    @staticmethod
    def _counter(load: torch.Tensor) -> Callable[..., None]:
        def count(gate: Gate, inputs: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
            load.add_(outputs[1][outputs[1] >= 0].bincount(minlength=load.shape[0]))  # below 0: the shared ones

        return count

    @torch.no_grad()
    def update(self, speed: float) -> float:
        """bias += speed * sign(mean load - load). Returns the largest max / mean load of any layer, before."""
        worst = 0.0
        for gate, load in zip(self.gates, self.loads, strict=True):
            mean = load.float().mean()
            gate.bias += speed * (mean - load).sign()
            worst = max(worst, (load.max() / mean).item())
            load.zero_()
        return worst


def learning_rate(step: int, args: Namespace) -> float:
    """Linear warm-up, then half a cosine down to 3% of the peak."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    done = (step - args.warmup) / max(args.steps - args.warmup, 1)
    return args.lr * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))


def state_of(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that training needs to go on, by name: weights, biases and the optimizer's two moments."""
    names = {p: name for name, p in model.named_parameters()}
    state = {f"model.{name}": p.data for p, name in names.items()}
    for p, moments in optimizer.state.items():
        state |= {f"optimizer.{key}.{names[p]}": value for key, value in moments.items()}
    return state


def save(folder: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Write state.safetensors beside its old version, then put it in its place."""
    partial = folder / "state.safetensors.incomplete"
    save_file(state_of(model, optimizer), partial, metadata={"step": str(step)})
    os.replace(partial, folder / "state.safetensors")


def resume(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> int:
    """Load the last save, if there is one; returns the number of steps done."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, safe_open is not a dict
            kind, rest = name.split(".", 1)
            if kind == "model":
                parameters[rest].data.copy_(file.get_tensor(name))
            else:
                key, rest = rest.split(".", 1)
                p = parameters[rest]
                moment = file.get_tensor(name)
                optimizer.state[p][key] = moment if moment.dim() == 0 else moment.to(p.device)
        return int(file.metadata()["step"])


def parse_arguments() -> Namespace:
    parser = Arguments(description="Train the tiny DeepSeek-V3.")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder with train.npy, from tiny/corpus.py")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the saves; an existing one is continued")
    add("--config", type=Path, default=CONFIG, metavar="FILE", help="Hugging Face config (default tiny/config.json)")
    add("--steps", type=positive, default=2000)
    add("--stop-after", type=positive, metavar="N", help="stop and save at this step, to go on another time")
    add("--rows", type=positive, default=256, help="rows of a batch")
    add("--seq-len", type=positive, default=512, help="tokens of a row")
    add("--lr", type=float, default=2.5e-3, help="peak learning rate")
    add("--warmup", type=int, default=150, help="steps up to the peak")
    add("--weight-decay", type=float, default=0.02)
    add("--mtp-weight", type=float, default=0.3, help="of the MTP loss; a third of it in the last third")
    add("--bias-speed", type=float, default=0.001, help="how far a gate bias moves in a step")
    add("--save-every", type=positive, default=500)
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not (args.data / "train.npy").is_file():
        raise InputError(f"{args.data / 'train.npy'}: no such file; tiny/corpus.py makes it")
    model_args = ModelArgs.from_hf(args.config)
    device = torch.device(choose_device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    model = new_model(model_args, device, args.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in weights if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in weights if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    saved = first = resume(args.out, model, optimizer)
    last = min(args.stop_after or args.steps, args.steps)
    balancer = Balancer(model)
    data = batches(
        np.load(args.data / "train.npy", mmap_mode="r"), args.rows, args.seq_len, 1 + len(model.mtp), args.seed, first
    )
    warnings.filterwarnings("ignore", "Mismatch dtype")  # the norms' weights are fp32 and what they norm is not
    log = open(args.out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115, open as long as the program runs
    bar = tqdm(range(first, last), initial=first, total=args.steps, unit="step")
    for step in bar:
        tokens = next(data).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        mtp_weight = args.mtp_weight if step < args.steps * 2 // 3 else args.mtp_weight / 3
        with torch.autocast(device.type, torch.bfloat16):
            main_loss, mtp_loss = losses(model, tokens)
        loss = main_loss + mtp_weight * mtp_loss
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {step}; {args.out} keeps the save of step {saved}")
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        load = balancer.update(args.bias_speed)
        if step % 10 == 0 or step + 1 == last:
            row = {"loss": main_loss.item(), "mtp": mtp_loss.item(), "norm": norm.item(), "load": load}
            bar.set_postfix({key: f"{value:.3f}" for key, value in row.items()})
            log.write(json.dumps({"step": step} | row) + "\n")
            log.flush()
        if (step + 1) % args.save_every == 0 or step + 1 == last:
            save(args.out, saved := step + 1, model, optimizer)
    if first >= last:
        print(f"{args.out} already has {first} of {args.steps} steps")


if __name__ == "__main__":
    run_command(main)
