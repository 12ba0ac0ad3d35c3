"""Batch generation: a file of prompts in, JSON lines out, in the same order. An interrupted job can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from checkpoint import Checkpoint
from config import ModelArgs, unique
from engine import Request
from errors import InputError, drop_output, is_first
from llm import LLM, check_ids, completion
from parallel import choose_device, join_ranks
from sampling import SamplingParams
from text import check_messages, encode, load_tokenizer

Item = dict[str, Any]  # {"prompt": text} or {"messages": [..]}; a result has its index and what was generated besides


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> list[str]:
    """The file's lines."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at U+2028 and others
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it holds) of each line of a .jsonl file, empty ones left out; InputError for a bad one."""
    for number, line in enumerate(read_text(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            item = json.loads(line, object_pairs_hook=unique)
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{where}: half of a surrogate pair, which is no character") from None
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(item, dict) or len({"prompt", "messages"} & item.keys()) != 1:
            raise InputError(f'{where}: wanted an object with either "prompt" or "messages"')
        yield where, item


def read_prompts(path: str) -> list[Item]:
    """[{"prompt": text}] or [{"messages": [..]}] from a text file, a prompt a line, or from .jsonl."""
    prompts: list[Item] = []
    if not path.lower().endswith(".jsonl"):
        prompts += [{"prompt": line} for line in read_text(Path(path)) if line.strip()]
        if prompts and re.match(r'\s*\{\s*"(prompt|messages)"\s*:', prompts[0]["prompt"]):
            print(f"{path}: taken as text; only a file named .jsonl is read as JSON lines", file=sys.stderr)
    else:
        for where, item in read_lines(Path(path)):
            if len(item) > 1:
                other = next(key for key in item if key not in ("prompt", "messages"))
                raise InputError(f'{where}: {json.dumps(other)} is not known; a line has "prompt" or "messages" alone')
            if "messages" in item:
                check_messages(item["messages"], where)
            elif not isinstance(item["prompt"], str) or not item["prompt"]:
                raise InputError(f'{where}: "prompt" should be text, and some')
            prompts.append(item)
    if not prompts:
        raise InputError(f"--input-file {path}: no prompts in it")
    return prompts


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """
    The JSON lines of --output-file. Each is added to FILE.incomplete as soon as its prompt is finished; at the end they
    are sorted and FILE takes its place, so that FILE is always whole, and a killed job loses nothing. FILE.incomplete
    is locked for the time of the job.
    """

    def __init__(self, path: str | None, input_file: Path, prompts: list[Item], resume: bool):
        """
        Raises InputError when nothing could be written there, another job does, or `resume` finds results of other
        prompts.
        """
        # What a link points to is replaced, not the link.
        self.path = None if path is None else Path(os.path.realpath(path))
        self.done: dict[int, Item] = {}
        if self.path is None:
            return
        folder = self.path.parent
        if not folder.is_dir():
            raise InputError(f"--output-file {path}: no folder {folder}")
        self.partial, self.ordered = (Path(f"{self.path}.incomplete{end}") for end in ("", ".sorted"))
        self.kept = f"what is finished is in {self.partial}, and --resume goes on"
        files = self.path, self.partial, self.ordered
        if not os.access(folder, os.W_OK | os.X_OK) or any(os.path.lexists(f) and not f.is_file() for f in files):
            raise InputError(f"--output-file {path}: not a file that can be written")
        try:
            self.ordered.exists()  # the longest of the names
        except OSError as error:
            raise InputError(f"--output-file {path}: {error.strerror}") from None
        if Path(os.path.realpath(input_file)) in files:
            raise InputError(f"--output-file {path}: it would overwrite --input-file {input_file}")
        self.file = self._open(self.partial) if self.partial.exists() else None
        self.source = None  # of what is resumed
        if resume:
            self.source = self.partial if self.file and self._mend() else self.path
            if self.source.exists():
                try:
                    self._read(self.source, prompts)
                except InputError as error:
                    raise InputError(f"--resume: {error}; without --resume the job begins anew") from None
        self.seen = self._state()

    def _open(self, path: Path) -> FileIO:
        """`path` to add to, unbuffered. Raises InputError when it cannot be opened, or another job has it."""
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115, it stays open
        except OSError as error:
            raise InputError(f"--output-file {self.path}: {path}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--output-file {self.path}: another job is writing {path}") from None
        except OSError:  # a file system without locks
            pass
        return file

    def _state(self) -> list[tuple[int, ...]]:
        """By which to know FILE and FILE.incomplete again; one that is empty is as good as none."""
        stats = [os.stat(path) for path in (self.path, self.partial) if path.exists()]
        return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats if stat.st_size]

    def _mend(self) -> bool:
        """Cut off the last line of FILE.incomplete, torn by a kill, maybe amid a character; whether others are left."""
        with self._writing("it cannot be resumed"):
            whole = self.partial.read_bytes().rfind(b"\n") + 1
            os.truncate(self.partial, whole)
        return whole > 0

    def _read(self, path: Path, prompts: list[Item]) -> None:
        for where, item in read_lines(path):
            index = item.get("index")
            known = type(index) is int and 0 <= index < len(prompts)
            whole = type(item.get("completion")) is str and type(item.get("token_ids")) is list
            if not known or not whole or not item.items() >= prompts[index].items():
                raise InputError(f"{where} is no result of this input file")
            self.done[index] = item

    def begin(self) -> None:
        """
        From here on FILE.incomplete is this job's: it holds what is resumed, or nothing yet. Raises InputError when
        another job has written since this one looked.
        """
        if self.path is None:
            return
        self.file = self.file or self._open(self.partial)
        if self._state() != self.seen:
            if not self.partial.stat().st_size:  # made just now
                self.partial.unlink()
            raise InputError(f"--output-file {self.path}: another job has written it meanwhile")
        with self._writing("nothing is lost"):
            if self.source == self.path:
                self.file = self._open(self.ordered)
                self.file.truncate(0)
                self._write(self.file, self._in_order())
                os.replace(self.ordered, self.partial)
            elif self.source is None:
                self.file.truncate(0)

    def add(self, index: int, item: Item) -> None:
        self.done[index] = item
        if self.path is not None:
            with self._writing(self.kept):
                self._write(self.file, [item])

    def finish(self, interrupted: bool) -> None:
        """
        Put the results in order and in their place. Those of an interrupted job do not take the place of an earlier
        one's.
        """
        if self.path is None:
            return
        earlier = self.path.exists() and self.path.stat().st_size > 0
        if interrupted and earlier and self.source != self.path:  # it is a job's before this one
            if not self.done:
                self.partial.unlink(missing_ok=True)
            return
        with self._writing(self.kept):
            with open(self.ordered, "wb", buffering=0) as file:
                self._write(file, self._in_order())
            os.replace(self.ordered, self.path)
            self.partial.unlink(missing_ok=True)

    def _in_order(self) -> list[Item]:
        return [self.done[index] for index in sorted(self.done)]

    def _write(self, file: FileIO, items: list[Item]) -> None:
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items).encode()
        while lines:
            lines = lines[file.write(lines) :]

    @contextmanager
    def _writing(self, consequence: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"--output-file {self.path}: {error.strerror}; {consequence}") from None


def result(index: int, prompt: Item, request: Request) -> Item:
    done = completion(request)
    item = {
        "index": index,
        **prompt,
        "completion": done.text,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": len(done.token_ids),
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
    }
    if request.params.logprobs is not None:
        item["logprobs"] = [{"logprob": own, "top": top} for own, top in done.logprobs]
    return item


# --- the job ----------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """
    What a batch is to do, which is rank 0's to say: other ranks may find another file under that name, or a part of it,
    if it is a pipe. done: the prompts that are finished.
    """

    prompts: list[list[int]]
    params: SamplingParams
    done: set[int]
    max_batch_size: int
    max_seq_len: int


def make_job(
    args: Namespace, params: SamplingParams, prompts: list[Item], done: set[int], model: ModelArgs,
    tokenizer: PreTrainedTokenizerFast,
) -> Job:  # fmt: skip
    """Raises InputError for a prompt that the model or the cache cannot take."""
    shown = tqdm(prompts, desc="tokens", leave=False, delay=1)
    ids = [encode(tokenizer, item.get("prompt") or item["messages"], args.system) for item in shown]
    max_seq_len = args.max_seq_len or min(max(map(len, ids)) + params.max_tokens, model.max_seq_len)
    for number, prompt in enumerate(ids, 1):
        check_ids(prompt, model, max_seq_len, f"{args.input_file}: prompt {number}")
    return Job(ids, params, done, min(args.max_batch_size or model.max_batch_size, len(ids)), max_seq_len)


def batch(args: Namespace, params: SamplingParams, load: Callable[..., LLM], status: Callable[..., str]) -> None:
    """
    Complete every prompt of --input-file, print each result as it is finished and write all to --output-file. Ctrl-C
    writes what is finished, and ends in KeyboardInterrupt.
    """
    first, job = is_first(), None
    if first:
        prompts = read_prompts(args.input_file)
        results = Results(args.output_file, Path(args.input_file), prompts, args.resume)
        if params.logprobs is not None and any("logprobs" not in item for item in results.done.values()):
            raise InputError(f"--resume --logprobs: results in {args.output_file} are without; leave --resume out")
    checkpoint, tokenizer = Checkpoint(args.ckpt_path, args.config), load_tokenizer(args.ckpt_path)
    if first:
        job = make_job(args, params, prompts, set(results.done), checkpoint.args, tokenizer)
    parallel, _ = join_ranks(choose_device(args.device))
    job = parallel.broadcast_object(job)
    if len(job.done) == len(job.prompts):
        if first:
            results.begin()
            results.finish(interrupted=False)
            print("every prompt is finished: there is nothing to do", file=sys.stderr)
        return
    sizes = {"max_batch_size": job.max_batch_size, "max_seq_len": job.max_seq_len}
    llm = load(args, checkpoint, tokenizer, **sizes)
    requests = [Request(ids, job.params, index) for index, ids in enumerate(job.prompts) if index not in job.done]
    if first:
        results.begin()

    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if first and not signals:
            with suppress(OSError):  # past Python's buffers: it may be amid a line of the bar
                os.write(2, b"\nstopping after this step ...\n")
        signals.append(number)

    def stopping() -> bool:
        """Called between two steps, and so also the bar's sign of life."""
        bar.set_postfix_str(f"{llm.stats.prefill_tokens} + {llm.stats.new_tokens} tokens", refresh=False)
        bar.update(0)
        return bool(signals)

    previous = signal.signal(signal.SIGINT, on_signal)
    start = time.perf_counter()
    try:
        counts = {"total": len(job.prompts), "initial": len(job.done)}
        with tqdm(**counts, desc="prompts", miniters=0, mininterval=0.5, disable=not first) as bar:
            for request, _ in llm.run(requests, stopping):
                if request.finish_reason in ("stop", "length"):
                    bar.update()
                    if first:
                        item = result(request.index, prompts[request.index], request)
                        asked = item.get("prompt") or item["messages"][-1]["content"]
                        results.add(request.index, item)
                        try:
                            bar.write(f"Prompt: {asked}\nCompletion: {item['completion']}\n")
                        except BrokenPipeError:  # Ctrl-C ends `| tee`, too
                            if not signals:
                                raise
                            drop_output()
        interrupted = any(request.finish_reason == "interrupted" for request in requests)
        if first:
            results.finish(interrupted)
    finally:
        signal.signal(signal.SIGINT, previous)
    if first:
        print(f"[{status(llm.stats, requests, time.perf_counter() - start)}]", file=sys.stderr)
    if interrupted:
        finished = f"{len(results.done)} of {len(prompts)} prompts are finished" if first else ""
        raise KeyboardInterrupt(finished + "; --resume goes on" * bool(args.output_file))
