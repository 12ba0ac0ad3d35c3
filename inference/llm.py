"""A model with its tokenizer and decoding loop, ready to use: what generate.py runs, and the API for notebooks."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoint import Checkpoint, load_model, tensor_specs
from config import GEMMS, MAX_DRAFTS, PREFILL_CHUNK, ModelArgs
from engine import Engine, Request, Stats, TokenLogprobs
from errors import InputError
from gpu import has_e4m3
from model import Transformer
from parallel import Parallel, choose_device, join_ranks
from plan import Memory, cache_length, memory
from sampling import SamplingParams
from text import Message, StopStrings, StreamDecoder, check_messages, encode, load_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt = str | Sequence[int] | list[Message]


@dataclass(frozen=True)
class Completion:
    """
    What became of a prompt. finish_reason: "stop", "length" (a limit was reached) or "interrupted". logprobs: for each
    token its log-probability and the likeliest ones' (id, log-probability), if SamplingParams asked for them.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    logprobs: list[TokenLogprobs]


def weights_in_memory(args: ModelArgs, gemm: str, device: torch.device) -> ModelArgs:
    """
    The args of the model to build: FP8 weights stay FP8 or become bf16, by `gemm`.

    "auto" keeps them on a GPU, and where it has e4m3 units (compute capability 8.9) quantises activations too; "w8a16"
    does not. On a CPU both compute their arithmetic with the references: slow, to compare with. Raises InputError when
    FP8 is asked of a checkpoint or a GPU without.
    """
    if args.dtype != "fp8":
        if gemm in ("fp8", "w8a16"):
            raise InputError(f"--gemm {gemm}: the checkpoint's weights are {args.dtype}")
        return args
    if gemm == "auto":
        gemm = "bf16" if device.type == "cpu" else "fp8" if has_e4m3(device) else "w8a16"
    if gemm == "bf16":
        return replace(args, dtype="bf16", scale_fmt=None)
    if gemm == "w8a16":
        return replace(args, activation_scheme="none")
    if not has_e4m3(device):
        raise InputError(f"--gemm fp8: {torch.cuda.get_device_name(device)} has no FP8 units; use --gemm w8a16")
    return args


def allocate(args: ModelArgs, parallel: Parallel, device: torch.device, **sizes: int) -> tuple[Transformer, Memory]:
    """A model whose weights are not filled in yet, and what it needs. Raises InputError when the GPU has less."""
    needs = memory(args, parallel.world_size, parallel.expert_parallel, **sizes)
    check_memory(*needs, device)
    with torch.device("meta"):
        model = Transformer(args, parallel)
    return model.to_empty(device=device).eval(), needs


class LLM:
    """
    `path`: a Hugging Face folder or convert.py's output. `config`: our JSON or HF's, by default the folder's. Or both
    as an open Checkpoint, and its `tokenizer` if that is loaded.

    Under torchrun every rank makes the same LLM and calls the same methods with the same arguments. Raises InputError
    for everything wrong with the checkpoint, before anything large is allocated.
    """

    def __init__(
        self,
        path: str | Path | Checkpoint,
        config: str | Path | None = None,
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        device: str = "auto",
        gemm: str = "auto",
        expert_parallel: bool = False,
        max_batch_size: int | None = None,
        max_seq_len: int | None = None,
        mtp: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        keep_prefix: bool = False,
        cuda_graph: bool = True,
        verbose: bool = False,
    ):
        start = time.perf_counter()
        checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path, config)
        args = checkpoint.args
        self.tokenizer = load_tokenizer(checkpoint.path) if tokenizer is None else tokenizer
        self.stop_ids = stop_ids(checkpoint.path, self.tokenizer)
        max_batch_size = args.max_batch_size if max_batch_size is None else max_batch_size
        for name, value, low, high in (
            ("max_batch_size", max_batch_size, 1, 2**31),
            ("max_seq_len", 2 if max_seq_len is None else max_seq_len, 2, args.max_seq_len),
            ("prefill_chunk", prefill_chunk, 1, 2**31),
            ("mtp", mtp or 0, 0, MAX_DRAFTS),
        ):
            if type(value) is not int or not low <= value <= high:
                raise InputError(f"--{name.replace('_', '-')} {value!r}: wanted {low} to {high}")
        self.max_seq_len = cache_length(args, max_seq_len)
        if gemm not in GEMMS:
            raise InputError(f"--gemm {gemm}: wanted one of {', '.join(GEMMS)}")
        if mtp and not args.n_mtp_layers:
            raise InputError(f"--mtp {mtp}: the checkpoint has no MTP modules")
        n_drafts = args.n_mtp_layers if mtp is None else mtp

        parallel, torch_device = join_ranks(choose_device(device), expert_parallel)
        if checkpoint.kind == "shards":
            parallel = replace(parallel, expert_parallel=expert_parallel or checkpoint.expert_parallel)
        checkpoint.check(parallel.world_size, parallel.rank, parallel.expert_parallel)
        self.parallel: Parallel = parallel
        # Modules that will not draft are not loaded.
        in_memory = replace(weights_in_memory(args, gemm, torch_device), n_mtp_layers=min(args.n_mtp_layers, n_drafts))
        sizes = {"max_batch_size": max_batch_size, "max_seq_len": self.max_seq_len}
        sizes |= {"chunk": prefill_chunk, "drafts": n_drafts}
        self.model, needs = allocate(in_memory, parallel, torch_device, **sizes)
        if verbose and parallel.rank == 0:
            total = sum(math.prod(spec.shape) for spec in tensor_specs(args).values() if not spec.is_scale)
            print(
                f"{checkpoint.path.resolve().name}: {total / 1e9:.3g}B parameters stored as {args.dtype}, run as "
                f"{in_memory.dtype} on {parallel.world_size} x {torch_device.type}; each holds "
                f"{needs.weights / 1e9:.3g} GB of weights and {needs.cache / 1e9:.3g} GB of cache "
                f"({max_batch_size} x {self.max_seq_len} tokens)",
                file=sys.stderr,
            )
            if parallel.sums:
                print(parallel.sums, file=sys.stderr)
        load_model(self.model, checkpoint, parallel, progress=verbose)
        checkpoint.close()
        options = prefill_chunk, keep_prefix, cuda_graph
        self.engine = Engine(self.model, max_batch_size, self.max_seq_len, self.stop_ids, n_drafts, *options)
        if verbose and parallel.rank == 0:
            print(f"ready after {time.perf_counter() - start:.1f} s", file=sys.stderr)

    @property
    def stats(self) -> Stats:
        return self.engine.stats

    def encode(self, prompt: Prompt, system: str | None = None) -> list[int]:
        """Token ids of a prompt, of a conversation, or as they are. Raises InputError for one that cannot be run."""
        prompt = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # of torch's or NumPy's
        if isinstance(prompt, str):
            ids = encode(self.tokenizer, prompt, system)
        elif isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
            ids = encode(self.tokenizer, check_messages(prompt, "messages"), system)
        elif isinstance(prompt, Iterable) and not isinstance(prompt, bytes):
            ids = list(prompt)
        else:
            raise InputError(f"a prompt is {prompt!r}, wanted text, token ids or messages")
        check_ids(ids, self.model.args, self.max_seq_len)
        return ids

    def run(
        self, requests: Iterable[Request], interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[Request, str]]:
        """
        Decode all requests; yields (request, a piece of its text) as they come, finish_reason being set with the last.
        A request ends before its first stop string. `interrupted`: see Engine.run. Raises InputError for a prompt that
        cannot be run, and a request that has been.
        """
        requests = list(requests)
        for n, request in enumerate(requests):
            check_ids(request.prompt, self.model.args, self.max_seq_len, f"prompt {n}")
        if any(r.tokens or r.finish_reason for r in requests) or len({id(r) for r in requests}) < len(requests):
            raise InputError("a request is run once: make another for the same prompt")
        open_ = {id(r): (StreamDecoder(self.tokenizer), StopStrings(r.params.stop)) for r in requests}
        cut_off = ((r, []) for r in requests if id(r) in open_)  # once the engine is done: by an interrupt
        for request, tokens in chain(self.engine.run(requests, interrupted), cut_off):
            decoder, stop = open_[id(request)]
            if not request.params.stop:
                piece = decoder.add(tokens)
            else:
                piece = ""
                for n, token in enumerate(tokens, 1 - len(tokens)):
                    piece += stop.add(decoder.add([token]))
                    if stop.found:
                        request.finish_reason = "stop"
                        if n < 0:  # drafted tokens after the stop string do not count
                            del request.tokens[n:], request.logprobs[n:]
                            self.engine.stats.new_tokens += n
                            self.engine.stats.row_tokens += n
                        break
            if request.finish_reason:
                del open_[id(request)]
                piece += "" if stop.found else stop.add(decoder.end()) + stop.end()
            request.text += piece
            yield request, piece

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """
        Complete one or several prompts, each a user's message, token ids or messages, in the order given. `params`: for
        all, or one for each.
        """
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        if not isinstance(prompts, Sequence):
            raise InputError(f"prompts are {prompts!r}, wanted one prompt or a list of them")
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], Integral | dict)):
            prompts = [prompts]
        each = [params] * len(prompts) if isinstance(params, SamplingParams | None) else params
        if not isinstance(each, Sequence) or any(not isinstance(q, SamplingParams | None) for q in each):
            raise InputError(f"params are {params!r}, wanted SamplingParams, for all prompts or for each")
        each = [q or SamplingParams() for q in each]
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(each)} SamplingParams")
        requests = [Request(self.encode(p), q, i) for i, (p, q) in enumerate(zip(prompts, each, strict=True))]
        for _ in self.run(requests):
            pass
        return [completion(request) for request in requests]

    def chat(self, messages: list[Message], params: SamplingParams | None = None) -> Completion:
        """The assistant's answer to a conversation."""
        return self.generate([messages], params)[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[str, Request]]:
        """Pieces of the completion's text as they come, each with the request as it stands."""
        for request, piece in self.run([Request(self.encode(prompt), params or SamplingParams())], interrupted):
            yield piece, request

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """
        Log-probability of each token after the first, given those before it, as for a perplexity.

        Raises InputError for ids that the model or the cache cannot take.
        """
        if isinstance(token_ids, str):
            raise InputError("logprobs takes token ids, not text")
        ids = list(token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids)
        check_ids(ids, self.model.args, len(ids) + 1)
        if len(ids) > self.max_seq_len:
            raise InputError(f"{len(ids)} tokens are more than max_seq_len, {self.max_seq_len}")
        model, chunk = self.model, self.engine.prefill_chunk
        tokens = torch.tensor(ids, device=model.embed.weight.device)
        cache, found = model.new_cache(1, len(tokens)), []
        for start in range(0, len(tokens) - 1, chunk):
            part = tokens[:-1][start : start + chunk]
            hidden = model.hidden(part[None], model.step((1, len(part)), start), cache)[0]
            following = tokens[start + 1 : start + 1 + len(part)]
            for h, given in zip(hidden.split(256), following.split(256), strict=True):  # few logits at a time
                found += model.logits(h).log_softmax(-1).gather(-1, given[:, None])[:, 0].tolist()
        return found


def completion(request: Request) -> Completion:
    """What LLM.run made of a request."""
    reason = request.finish_reason or "interrupted"
    return Completion(request.text, request.tokens, len(request.prompt), reason, request.logprobs)


def check_ids(ids: list[int], args: ModelArgs, max_seq_len: int, where: str = "the prompt") -> None:
    """Raises InputError, beginning with `where`, for ids that the model or the cache cannot take."""
    if not ids:
        raise InputError(f"{where} is empty")
    if bad := [id for id in ids if not isinstance(id, Integral) or not 0 <= id < args.vocab_size]:
        raise InputError(f"{where} has token {bad[0]}, outside the model's vocabulary of {args.vocab_size}")
    if len(ids) >= max_seq_len:
        advice = "shorten it or raise --max-seq-len" if max_seq_len < args.max_seq_len else "which is all the model has"
        holds = f"the cache holds {max_seq_len}, completion included"
        raise InputError(f"{where} has {len(ids)} tokens and {holds}; {advice}")


def check_memory(weights: int, cache: int, workspace: int, device: torch.device) -> None:
    """Raises InputError when the GPU has not enough free memory for so many bytes, or the host not even in all."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = weights + cache + workspace
    if needed > free:
        more = "more GPUs (torchrun --nproc-per-node)" if on_gpu else "more memory"
        less = "fewer rows, a smaller --max-seq-len or --prefill-chunk"
        raise InputError(
            f"{device}: needs {needed / 1e9:.1f} GB ({weights / 1e9:.1f} weights, {cache / 1e9:.1f} cache, "
            f"{workspace / 1e9:.1f} workspace) and {free / 1e9:.1f} GB are {'free' if on_gpu else 'there'}; "
            + (f"the weights alone want {more}" if weights > free else f"use {f'{more}, ' * on_gpu}{less}")
        )
