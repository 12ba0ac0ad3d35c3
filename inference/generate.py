"""
Chat and batch generation from a DeepSeek-V3 checkpoint.

    python inference/generate.py --ckpt-path DIR --interactive
    torchrun --nproc-per-node 8 inference/generate.py --ckpt-path DIR --input-file prompts.txt --output-file out.jsonl
"""

# ruff: noqa: E402  (flags are answered before the imports that take seconds)
from __future__ import annotations

import os
import sys
import time
from argparse import Namespace

from config import GEMMS, MAX_DRAFTS, PREFILL_CHUNK
from errors import Arguments, InputError, answer_flags, is_first, positive, run_command

# Matrices of this width are multiplied before a second CPU thread has woken up: the tiny model decodes at 170 tokens/s
# with one thread and 90 with two (EPYC, 2 cores).
SMALL_DIM = 512


def parse_arguments() -> Namespace:
    parser = Arguments(description="Chat with a DeepSeek-V3 checkpoint, or complete a file of prompts.")
    add = parser.add_argument
    add("--ckpt-path", required=True, metavar="DIR", help="Hugging Face folder as downloaded, or convert.py's output")
    add("--config", metavar="FILE", help="model config; by default the folder's config.json")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--interactive", action="store_true", help="chat; /clear starts over, /exit or Ctrl-D ends")
    mode.add_argument("--input-file", metavar="FILE", help="a prompt a line, or .jsonl with prompt or messages")
    add("--output-file", metavar="FILE", help="write results as JSON lines, in input order (with --input-file)")
    add("--resume", action="store_true", help="keep the results that --output-file has, of an interrupted job")
    add("--logprobs", type=int, metavar="N", help="write each token's log-probability and the N likeliest tokens'")
    longest = "tokens of a completion (default 200)"
    add("--max-new-tokens", dest="max_tokens", type=positive, default=200, metavar="N", help=longest)
    add("--temperature", type=float, default=0.2, metavar="T", help="0 is greedy (default 0.2)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens reaching this (default 1)")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens (default 0: all)")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop tokens less likely than P times the best")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="of tokens already there (default 1: none)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a completion before this; may be repeated")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same output (default 0)")
    add("--system", metavar="TEXT", help="system message of every conversation")
    add("--max-seq-len", type=positive, metavar="N", help="tokens of prompt and completion the cache holds")
    add("--max-batch-size", type=positive, metavar="N", help="rows of the cache (default: the config's; chat: 1)")
    chunk = f"prompt tokens a pass (default {PREFILL_CHUNK})"
    add("--prefill-chunk", type=positive, default=PREFILL_CHUNK, metavar="N", help=chunk)
    add("--mtp", type=int, metavar="N", help="drafted tokens a step (default: one per MTP module; 0 is off)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--gemm", choices=GEMMS, default="auto", help="arithmetic of FP8 weights (default auto)")
    add("--no-cuda-graph", dest="cuda_graph", action="store_false", help="launch a step's kernels one by one")
    add("--expert-parallel", action="store_true", help="whole experts per rank instead of a slice of each")
    args = parser.parse_args()
    if args.interactive and (args.output_file or args.logprobs is not None):
        parser.error("--output-file and --logprobs go with --input-file")
    if not args.output_file and (args.resume or args.logprobs is not None):
        parser.error("--resume and --logprobs go with --output-file")
    for flag, text in (("--system", args.system or ""), ("--stop", "".join(args.stop))):
        if any("\ud800" <= c <= "\udfff" for c in text):
            parser.error(f"{flag}: not UTF-8 text")
    if "" in args.stop:
        parser.error("--stop: wanted text that is not empty")
    if args.mtp is not None and not 0 <= args.mtp <= MAX_DRAFTS:
        parser.error(f"--mtp: wanted 0 to {MAX_DRAFTS}")
    return args


if __name__ == "__main__":
    answer_flags(parse_arguments)
    if is_first() and sys.stderr.isatty():  # importing takes seconds
        print("starting ...", file=sys.stderr, flush=True)
    # OpenMP's waiting threads spin by default: with another program on one core, decoding is then 20 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from batch import batch
from checkpoint import Checkpoint
from engine import Request, Stats
from llm import LLM
from parallel import leave_ranks
from sampling import SamplingParams
from terminal import Terminal
from text import load_tokenizer


def load(args: Namespace, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> LLM:
    same = ("device", "gemm", "expert_parallel", "mtp", "prefill_chunk", "cuda_graph")
    options = {name: getattr(args, name) for name in same}
    llm = LLM(checkpoint, tokenizer=tokenizer, verbose=True, **options, **sizes)
    if llm.model.args.dim <= SMALL_DIM:
        torch.set_num_threads(1)
    return llm


def status(stats: Stats, requests: list[Request], seconds: float) -> str:
    """One line on what was done, how fast, and how well the drafts did."""
    started = [r.first_token_seconds for r in requests if r.tokens] or [0.0]
    new = sum(len(r.tokens) for r in requests)
    asked = sum(len(r.prompt) for r in requests if r.first_token_seconds)
    line = f"{asked} + {new} tokens, {seconds:.1f} s, first after "
    line += f"{sum(started) / len(started):.2f} s, {new / max(seconds, 1e-9):.1f} tokens/s"
    if stats.drafted and stats.drafted[0]:
        shares = ", ".join(f"{a / n:.0%}" if n else "-" for a, n in zip(stats.accepted, stats.drafted, strict=True))
        line += f", {stats.tokens_per_step:.2f} tokens a step, drafts accepted {shares}"
    return line


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(args: Namespace, params: SamplingParams) -> None:
    """A conversation at the keyboard of rank 0; every rank follows it."""
    checkpoint, tokenizer = Checkpoint(args.ckpt_path, args.config), load_tokenizer(args.ckpt_path)
    if not tokenizer.chat_template:
        raise InputError(
            f"--interactive: the tokenizer in {args.ckpt_path} has no chat_template; --input-file continues plain text"
        )
    sizes = {"max_batch_size": args.max_batch_size or 1, "max_seq_len": args.max_seq_len}
    llm = load(args, checkpoint, tokenizer, **sizes, keep_prefix=True)
    messages = []
    with Terminal(enabled=llm.parallel.rank == 0) as terminal:
        while True:
            line = llm.parallel.broadcast_object(terminal.read_line() if llm.parallel.rank == 0 else None)
            if line is None or line == "/exit":
                return
            if line == "/clear":
                messages = []
                llm.engine.forget()
                terminal.note("the conversation starts over")
            elif line.split()[0:1] == ["/clear"]:
                terminal.note("/clear takes nothing after it")
            elif line.startswith("/"):
                terminal.note(f"{line.split()[0]} is not a command; /clear starts over, /exit or Ctrl-D ends")
            elif line:
                asked = {"role": "user", "content": line}
                try:
                    prompt = llm.encode([*messages, asked], args.system)
                except InputError as error:  # most often a conversation longer than the cache
                    terminal.note(f"{error} (/clear starts over)")
                    continue
                answer = say(llm, prompt, params, terminal)
                messages += [asked, {"role": "assistant", "content": answer}]


def say(llm: LLM, prompt: list[int], params: SamplingParams, terminal: Terminal) -> str:
    """Stream one answer and the status line after it; returns the answer."""
    n = llm.engine.n_drafts
    llm.engine.stats = Stats(drafted=[0] * n, accepted=[0] * n)
    start = time.perf_counter()
    for piece, request in llm.stream(prompt, params, terminal.interrupted):  # noqa: B007, its last state is used below
        terminal.write(piece)
    seconds = time.perf_counter() - start
    terminal.write("\n")
    ended = {"length": ", cut at the limit", "interrupted": ", interrupted"}.get(request.finish_reason or "", "")
    terminal.note(status(llm.stats, [request], seconds) + ended)
    return request.text


def main() -> None:
    args = parse_arguments()
    args.stop = tuple(args.stop)
    try:
        params = SamplingParams(**{field.name: getattr(args, field.name) for field in fields(SamplingParams)})
    except InputError as error:  # names the field, as Python's callers know it
        name, rest = str(error).split(" ", 1)
        raise InputError(f"--{name.replace('_', '-')} {rest}") from None
    if args.interactive:
        chat(args, params)
    else:
        batch(args, params, load, status)


if __name__ == "__main__":
    run_command(main)
    leave_ranks()
