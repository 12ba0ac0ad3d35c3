"""
Chat and batch generation from a DeepSeek-V3 checkpoint.

    python inference/generate.py --ckpt-path DIR --interactive
    torchrun --nproc-per-node 8 inference/generate.py --ckpt-path DIR --input-file prompts.txt --output-file out.jsonl
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import InputError, run_command

if TYPE_CHECKING:  # torch and transformers take seconds to import; --help and a wrong flag should not wait for them
    from engine import Request, Stats
    from llm import LLM
    from sampling import SamplingParams


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(description="Chat with a DeepSeek-V3 checkpoint, or complete a file of prompts.")
    add = parser.add_argument
    add("--ckpt-path", required=True, metavar="DIR", help="Hugging Face folder as downloaded, or convert.py's output")
    add("--config", metavar="FILE", help="model config; by default the folder's config.json")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--interactive", action="store_true", help="chat; /clear starts over, /exit or Ctrl-D ends")
    mode.add_argument("--input-file", metavar="FILE", help="a prompt a line, or .jsonl with prompt or messages")
    add("--output-file", metavar="FILE", help="write results as JSON lines, in input order (with --input-file)")
    add("--max-new-tokens", type=positive, default=200, metavar="N", help="tokens of a completion (default 200)")
    add("--temperature", type=float, default=0.2, metavar="T", help="0 is greedy (default 0.2)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens reaching this (default 1)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same output (default 0)")
    add("--system", metavar="TEXT", help="system message of every conversation")
    add("--max-seq-len", type=positive, metavar="N", help="tokens of prompt and completion the cache holds")
    add("--max-batch-size", type=positive, metavar="N", help="rows of the cache (default: the config's; chat: 1)")
    add("--prefill-chunk", type=positive, default=4096, metavar="N", help="prompt tokens a pass (default 4096)")
    add("--mtp", type=int, metavar="N", help="drafted tokens a step (default: one per MTP module; 0 is off)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--gemm", choices=("auto", "fp8", "bf16"), default="auto", help="arithmetic of FP8 weights (default auto)")
    add("--expert-parallel", action="store_true", help="whole experts per rank instead of a slice of each")
    args = parser.parse_args()
    if args.output_file and args.interactive:
        parser.error("--output-file goes with --input-file")
    if args.mtp is not None and args.mtp < 0:
        parser.error("--mtp: wanted 0 or more")
    return args


def is_first() -> bool:
    """Whether this is the only process, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def load(args: Namespace, **sizes: Any) -> LLM:
    from llm import LLM

    return LLM(
        args.ckpt_path,
        args.config,
        device=args.device,
        gemm=args.gemm,
        expert_parallel=args.expert_parallel,
        mtp=args.mtp,
        prefill_chunk=args.prefill_chunk,
        verbose=True,
        **sizes,
    )


def status(stats: Stats, prompt_tokens: int, new_tokens: int, seconds: float) -> str:
    """One line on what was done, how fast, and how well the drafts did."""
    line = f"[{prompt_tokens} + {new_tokens} tokens, {seconds:.1f} s, {new_tokens / max(seconds, 1e-9):.1f} tokens/s"
    if stats.drafted and stats.drafted[0]:
        shares = ", ".join(f"{a / max(n, 1):.0%}" for a, n in zip(stats.accepted, stats.drafted, strict=True))
        line += f", {stats.tokens_per_step:.2f} tokens a step, drafts accepted {shares}"
    return line + "]"


# --- batch ------------------------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[dict[str, Any]]:
    """[{"prompt": text}] or [{"messages": [..]}] from a text file, a prompt a line, or from .jsonl."""
    from text import check_messages

    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at U+2028 and others
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--input-file {path}: not readable as text: {error}") from None
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not path.endswith(".jsonl"):
            prompts.append({"prompt": line})
            continue
        where = f"{path} line {number}"
        try:
            item = json.loads(line)
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: half of a surrogate pair, which is no character") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(item, dict) or len({"prompt", "messages"} & item.keys()) != 1:
            raise InputError(f'{where}: wanted an object with either "prompt" or "messages"')
        if "messages" in item:
            prompts.append({"messages": check_messages(item["messages"], where)})
        elif isinstance(item["prompt"], str) and item["prompt"]:
            prompts.append({"prompt": item["prompt"]})
        else:
            raise InputError(f'{where}: "prompt" should be text')
    if not prompts:
        raise InputError(f"--input-file {path}: no prompts in it")
    return prompts


def check_output(path: str) -> None:
    """Raises InputError when results could not be written there: better before the work than after it."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise InputError(f"--output-file {path}: no folder {folder}")
    if Path(path).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"--output-file {path}: not a file that can be written")


def batch(args: Namespace, params: SamplingParams) -> None:
    """Complete every prompt of --input-file; print the results, and write them to --output-file."""
    from tqdm import tqdm

    from checkpoint import Checkpoint
    from engine import Request
    from llm import check_ids
    from text import encode_chat, encode_prompt, load_tokenizer

    prompts = read_prompts(args.input_file)
    if args.output_file and is_first():
        check_output(args.output_file)
    model_args = Checkpoint(args.ckpt_path, args.config).args
    tokenizer = load_tokenizer(args.ckpt_path)
    ids = [
        encode_prompt(tokenizer, item["prompt"], args.system)
        if "prompt" in item
        else encode_chat(tokenizer, with_system(item["messages"], args.system))
        for item in prompts
    ]
    longest = max(map(len, ids))
    max_seq_len = args.max_seq_len or min(longest + params.max_tokens, model_args.max_seq_len)
    rows = min(args.max_batch_size or model_args.max_batch_size, len(ids))
    for number, prompt in enumerate(ids, 1):
        check_ids(prompt, model_args.vocab_size, max_seq_len, f"{args.input_file}: prompt {number}")
    llm = load(args, max_batch_size=rows, max_seq_len=max_seq_len)
    requests = [Request(prompt, params, index) for index, prompt in enumerate(ids)]

    start = time.perf_counter()
    with tqdm(total=len(requests), desc="prompts", disable=llm.parallel.rank > 0) as bar:
        for request, _ in llm.engine.run(requests):
            bar.update(request.finish_reason is not None)
    seconds = time.perf_counter() - start
    if llm.parallel.rank == 0:
        report(llm, prompts, requests, args.output_file)
        stats = llm.stats
        print(status(stats, sum(map(len, ids)), stats.new_tokens, seconds), file=sys.stderr)


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The conversation, with --system in front unless it brings its own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def report(llm: LLM, prompts: list[dict[str, Any]], requests: list[Request], output_file: str | None) -> None:
    """Write the JSON lines, whole or not at all, and print each prompt with its completion."""
    completions = [llm.completion(request) for request in requests]
    lines = [
        item
        | {
            "completion": completion.text,
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        }
        for item, completion in zip(prompts, completions, strict=True)
    ]
    try:
        if output_file:
            write_lines(output_file, lines)
    finally:  # what could not be written is printed all the same
        for item, completion in zip(prompts, completions, strict=True):
            print(f"Prompt: {item.get('prompt') or item['messages'][-1]['content']}\nCompletion: {completion.text}\n")


def write_lines(path: str, items: list[dict[str, Any]]) -> None:
    partial = Path(f"{path}.incomplete")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"--output-file {path}: {error.strerror}") from None


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(args: Namespace, params: SamplingParams) -> None:
    """A conversation at the keyboard of rank 0; every rank follows it."""
    from terminal import Terminal

    llm = load(args, max_batch_size=args.max_batch_size or 1, max_seq_len=args.max_seq_len, keep_prefix=True)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    with Terminal(enabled=llm.parallel.rank == 0) as terminal:
        while True:
            line = llm.parallel.broadcast_object(terminal.read_line() if llm.parallel.rank == 0 else None)
            if line is None or line == "/exit":
                return
            if line == "/clear":
                messages = list(opening)
                terminal.note("the conversation starts over")
            elif line.startswith("/"):
                terminal.note(f"{line.split()[0]} is not a command; /clear starts over, /exit or Ctrl-D ends")
            elif line:
                try:
                    prompt = llm.encode([*messages, {"role": "user", "content": line}])
                except InputError as error:  # most often a conversation longer than the cache
                    terminal.note(f"{error} (/clear starts over)")
                    continue
                answer = say(llm, prompt, params, terminal.write, terminal.interrupted)
                messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def say(
    llm: LLM, prompt: list[int], params: SamplingParams, write: Callable[[str], None], interrupted: Callable[[], bool]
) -> str:
    """Stream one answer and the status line after it; returns the answer."""
    from engine import Stats

    n = llm.engine.n_drafts
    llm.engine.stats = Stats(drafted=[0] * n, accepted=[0] * n)
    start, answer = time.perf_counter(), ""
    for piece, request in llm.stream(prompt, params, interrupted):  # noqa: B007, its last state is used below
        answer += piece
        write(piece)
    seconds = time.perf_counter() - start
    write("\n")
    if llm.parallel.rank == 0:
        line = status(llm.stats, len(prompt), len(request.tokens), seconds)
        ended = {"length": ", cut at the limit", "interrupted": ", interrupted"}.get(request.finish_reason or "", "")
        print(line.removesuffix("]") + ended + "]", file=sys.stderr)
    return answer


def main() -> None:
    args = parse_arguments()
    if is_first():
        print("starting ...", file=sys.stderr, flush=True)
    from sampling import SamplingParams

    params = SamplingParams(args.temperature, args.top_p, args.max_new_tokens, args.seed)
    (chat if args.interactive else batch)(args, params)


if __name__ == "__main__":
    run_command(main)
