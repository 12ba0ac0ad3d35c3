"""
What the tiny model knows and how it behaves: the figures of tiny/README.md.

    python tiny/evaluate.py --ckpt-path tiny/checkpoint --picture tiny/load.png

Asks what the most frequent nouns of WordNet are (tiny/eval/nouns.jsonl), in a phrasing that was trained on and in ones
that were not; on held-out conversations (tiny/eval/heldout.jsonl) measures perplexity, how many drafted tokens are
accepted, and how evenly the experts are loaded. --against compares with another checkpoint, such as the unquantised.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

import torch
from tqdm import tqdm

from checkpoint import Checkpoint
from engine import Request, Stats
from errors import Arguments, positive, run_command
from llm import LLM
from model import Gate
from sampling import SamplingParams
from text import Message

DATA = Path(__file__).with_name("eval")
PICTURES = ".png", ".svg", ".pdf"
GREEDY = SamplingParams(temperature=0, max_tokens=120)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(llm: LLM, prompts: list[str | list[Message]]) -> list[str]:
    """Greedy answers, in order."""
    requests = [Request(llm.encode(prompt), GREEDY, i) for i, prompt in enumerate(prompts)]
    with tqdm(total=len(requests), desc="answers") as bar:
        for request, _ in llm.run(requests):
            bar.update(request.finish_reason is not None)
    return [request.text for request in requests]


def knows(answer: str, glosses: list[str]) -> bool:
    """Whether the answer contains one of the glosses."""
    return any(gloss in answer for gloss in glosses)


def accuracy(llm: LLM, nouns: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of nouns explained rightly: asked as in training, and in held-out phrasings, each noun in one of them."""
    asked = [noun["question"] for noun in nouns] + [n["heldout"][i % len(n["heldout"])] for i, n in enumerate(nouns)]
    right = [knows(answer, noun["glosses"]) for answer, noun in zip(answers(llm, asked), nouns * 2, strict=True)]
    return sum(right[: len(nouns)]) / len(nouns), sum(right[len(nouns) :]) / len(nouns)


def token_ids(llm: LLM, messages: list[Message]) -> list[int]:
    """A whole conversation, the last answer included."""
    return llm.tokenizer.apply_chat_template(messages, return_dict=False)


def perplexity(llm: LLM, conversations: list[list[Message]]) -> float:
    """exp of the mean negative log-probability of a token."""
    values = []
    for messages in tqdm(conversations, desc="perplexity"):
        values += llm.logprobs(token_ids(llm, messages))
    return math.exp(-sum(values) / len(values))


def drafting(llm: LLM, conversations: list[list[Message]]) -> Stats:
    """The engine's counts over greedy answers to every question of the conversations."""
    n = llm.engine.n_drafts
    llm.engine.stats = Stats(drafted=[0] * n, accepted=[0] * n)
    answers(llm, [talk[:i] for talk in conversations for i, turn in enumerate(talk) if turn["role"] == "assistant"])
    return llm.stats


@torch.inference_mode()
def expert_loads(llm: LLM, conversations: list[list[Message]]) -> dict[str, list[int]]:
    """Tokens that each expert of each MoE layer of the model received from the conversations."""
    loads: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in llm.model.named_modules():
        if isinstance(module, Gate) and name.startswith("layers."):
            loads[name.removesuffix(".ffn.gate")] = load = torch.zeros_like(module.bias, dtype=torch.int64)

            def count(gate: Gate, inputs: tuple, outputs: tuple, load: torch.Tensor = load) -> None:
                load += outputs[1][outputs[1] >= 0].bincount(minlength=load.shape[0])  # below 0: the shared ones

            hooks.append(module.register_forward_hook(count))
    for messages in tqdm(conversations, desc="experts"):
        llm.model(torch.tensor([token_ids(llm, messages)], device=llm.model.embed.weight.device))
    for hook in hooks:
        hook.remove()
    return {name: load.tolist() for name, load in loads.items()}


def imbalance(loads: dict[str, list[int]]) -> dict[str, float]:
    """Each layer's largest load over its mean one."""
    return {name: max(load) * len(load) / sum(load) for name, load in loads.items()}


def draw(loads: dict[str, list[int]], path: Path) -> None:
    """A bar chart a layer: each expert's load over the mean, sorted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (2.6 * len(loads), 2.4)
    figure, axes = plt.subplots(1, len(loads), figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for axis, (name, load) in zip(axes[0], loads.items(), strict=True):
        mean = sum(load) / len(load)
        axis.bar(range(len(load)), sorted((n / mean for n in load), reverse=True), width=0.75, color="#4d6bfe")
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_title(f"{name}: max / mean {max(load) / mean:.2f}", fontsize=9)
        axis.set_xticks([])
        axis.margins(x=0.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("tokens / mean", fontsize=9)
    figure.supxlabel(f"the {len(load)} routed experts of each MoE layer, busiest first", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(llm: LLM, other: LLM, conversations: list[list[Message]], nouns: list[dict[str, Any]]) -> dict[str, float]:
    """Perplexity of the other model, and the share of questions that both answer in the same words."""
    asked = [noun["question"] for noun in nouns]
    same = [a == b for a, b in zip(answers(llm, asked), answers(other, asked), strict=True)]
    return {"perplexity_other": perplexity(other, conversations), "same_answers": sum(same) / len(same)}


def main() -> None:
    parser = Arguments(description="Measure the tiny model.")
    parser.add_argument("--ckpt-path", required=True, metavar="DIR")
    parser.add_argument("--against", metavar="DIR", help="compare with this checkpoint")
    parser.add_argument("--nouns", type=positive, default=2000, metavar="N", help="the N most frequent (default 2000)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the experts' load")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=positive, default=64, help="questions at a time")
    options = parser.parse_args()
    if options.picture and (options.picture.suffix not in PICTURES or not options.picture.parent.is_dir()):
        parser.error(f"--picture {options.picture}: wanted {', '.join(PICTURES)} in a folder that exists")
    if options.against:
        Checkpoint(options.against).check()  # before the minutes that the rest takes
    nouns = read_lines(DATA / "nouns.jsonl")[: options.nouns]
    conversations = [item["messages"] for item in read_lines(DATA / "heldout.jsonl")]
    sizes = {"device": options.device, "max_batch_size": options.rows, "max_seq_len": 1024}
    llm = LLM(options.ckpt_path, **sizes)
    trained, held_out = accuracy(llm, nouns)
    stats = drafting(llm, conversations[:200])
    loads = expert_loads(llm, conversations)
    result = {
        "nouns": len(nouns),
        "accuracy": trained,
        "accuracy_heldout_phrasing": held_out,
        "perplexity_heldout": perplexity(llm, conversations),
        "acceptance": [a / max(n, 1) for a, n in zip(stats.accepted, stats.drafted, strict=True)],
        "tokens_per_step": stats.tokens_per_step,
        "imbalance": imbalance(loads),
    }
    if options.against:
        result |= compare(llm, LLM(options.against, **sizes), conversations, nouns[:500])
    print(json.dumps(result, indent=2))
    if options.picture:
        draw(loads, options.picture)


if __name__ == "__main__":
    run_command(main)
