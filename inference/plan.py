"""
What a model takes, from its config alone: parameters, memory of each rank, disk, ranks it splits over, and the fewest
milliseconds a token can take. No weight is read.

    python inference/plan.py --config configs/config_671B.json --model-parallel 8 --gpu-memory 141

GB are 10^9 bytes. Every figure is of the tensors that checkpoint.py lists; generate.py refuses by the same ones.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import MAX_RANKS, Checkpoint, TensorSpec, check_split, shard_shape, tensor_specs
from config import BLOCK_SIZE, ModelArgs
from errors import InputError, run_command
from kernel import cdiv
from model import compute_dtype

DEFAULT_MAX_SEQ_LEN = 16384  # where neither the user nor the prompts say; at 70 KB a token V3's cache is 1.1 GB a row
PREFILL_CHUNK = 4096  # generate.py's default
BANDWIDTH = 4.30  # TB/s that a copy reaches on an H200, measured
NODE = 8  # GPUs: more ranks than this come in whole nodes

# Part of the model -> what the names of its tensors contain, the first that fits.
PARTS = {
    "MTP": ".mtp.",
    "embedding": ".embed.",
    "attention": ".attn.",
    "gates": ".gate.",
    "routed experts": ".experts.",
    "shared experts": ".shared_experts.",
    "dense MLPs": ".ffn.",
    "head": ".head.",
    "norms": "norm.",
}


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """
    Parameters of a part of the model, whole, and those that one token uses: K experts of each layer, one row of the
    embedding. Bytes of a rank's slices in memory, and those of them that it reads for one token.
    """

    parameters: int = 0
    active: int = 0
    nbytes: int = 0
    read: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(
            self.parameters + other.parameters,
            self.active + other.active,
            self.nbytes + other.nbytes,
            self.read + other.read,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def kept_dtype(spec: TensorSpec, args: ModelArgs) -> torch.dtype | None:
    """The type the model keeps a tensor in; None for the scale of wkv_b, which is dequantised as it is loaded."""
    if ".wkv_b." in spec.name:
        return None if spec.is_scale else compute_dtype(args)
    return spec.dtype


def count_active(spec: TensorSpec, shape: tuple[int, ...], args: ModelArgs, chosen: int) -> int:
    """How many numbers of a tensor, or of a slice of this shape, one token uses when `chosen` experts are here."""
    if spec.name == "embed.weight":
        return shape[1]
    if spec.expert is not None and spec.expert >= chosen:  # all experts are alike: let the first be the chosen
        return 0
    return math.prod(shape)


@functools.lru_cache(maxsize=8)
def weight_parts(args: ModelArgs, mp: int = 1, expert_parallel: bool = False) -> Mapping[str, Part]:
    """
    Each part of the model; bytes are rank 0's of `mp`, which holds as many as any other.

    With `expert_parallel` a token's K experts lie on several ranks, at best spread evenly: the busiest reads K / mp.
    """
    parts = {part: Part() for part in PARTS}
    K = args.n_activated_experts
    for spec in tensor_specs(args).values():
        part = parts[next(part for part, pattern in PARTS.items() if pattern in f".{spec.name}")]
        if not spec.is_scale:
            part.parameters += math.prod(spec.shape)
            part.active += count_active(spec, spec.shape, args, K)
        shape, dtype = shard_shape(spec, mp, 0, expert_parallel), kept_dtype(spec, args)
        if shape is not None and dtype is not None:
            part.nbytes += math.prod(shape) * dtype.itemsize
            part.read += count_active(spec, shape, args, cdiv(K, mp) if expert_parallel else K) * dtype.itemsize
    return parts


def cache_bytes(args: ModelArgs, n_layers: int, max_batch_size: int, max_seq_len: int) -> int:
    """A latent and a rotary key per layer and token; every rank has all of it, as its heads share them."""
    return n_layers * max_batch_size * max_seq_len * args.cache_dim * compute_dtype(args).itemsize


def padding_bytes(args: ModelArgs, mp: int) -> int:
    """In FP8 the rows of wq_a (or wq) and of wkv_a, which lie in one matrix, are each filled up to whole blocks."""
    rows = args.q_lora_rank or args.n_heads // mp * args.qk_head_dim, args.cache_dim
    padding = sum(-size % BLOCK_SIZE for size in rows) if args.dtype == "fp8" else 0
    return (args.n_layers + args.n_mtp_layers) * padding * args.dim


def workspace_bytes(args: ModelArgs, world_size: int, max_batch_size: int, max_seq_len: int, chunk: int) -> int:
    """
    Activations of the largest prefill pass: some 8 vectors of `dim` for each of `chunk` tokens; for each expert that
    it chose the token itself, the expert's term and 3 vectors of an expert's width; expanded keys and values of every
    cached token; and the logits.
    """
    heads = args.n_heads // world_size
    choices = args.n_activated_experts + args.n_shared_experts
    tokens = chunk * (16 * args.dim + choices * (4 * args.dim + 6 * args.moe_inter_dim // world_size))
    keys = 2 * max_batch_size * max_seq_len * heads * (args.qk_head_dim + args.v_head_dim) * 2
    return tokens + min(keys, 8 * 2**30) + 12 * max_batch_size * args.vocab_size


def memory(
    args: ModelArgs,
    mp: int = 1,
    expert_parallel: bool = False,
    *,
    max_batch_size: int,
    max_seq_len: int,
    chunk: int = PREFILL_CHUNK,
) -> Memory:
    """What a rank of `mp` needs to run a model of these args, whose `dtype` is that of the weights in memory."""
    weights = sum(part.nbytes for part in weight_parts(args, mp, expert_parallel).values()) + padding_bytes(args, mp)
    cache = cache_bytes(args, args.n_layers + args.n_mtp_layers, max_batch_size, max_seq_len)
    return Memory(weights, cache, workspace_bytes(args, mp, max_batch_size, max_seq_len, chunk))


# --- disk -------------------------------------------------------------------------------------------------------------


def stored_dtype(spec: TensorSpec, args: ModelArgs) -> torch.dtype:
    """The type of a tensor in the published files: the gate's weight is widened only when it is loaded."""
    return compute_dtype(args) if spec.name.endswith(".gate.weight") else spec.dtype


def folder_bytes(args: ModelArgs) -> int:
    """Tensors of a Hugging Face folder, in which each MTP layer repeats the embedding and the head."""
    specs = tensor_specs(args).values()
    sizes = {spec.name: math.prod(spec.shape) * stored_dtype(spec, args).itemsize for spec in specs}
    return sum(sizes.values()) + args.n_mtp_layers * (sizes["embed.weight"] + sizes["head.weight"])


def shard_bytes(args: ModelArgs, mp: int, expert_parallel: bool = False) -> int:
    """Tensors of one of convert.py's `mp` files; all are equally large."""
    shapes = ((spec, shard_shape(spec, mp, 0, expert_parallel)) for spec in tensor_specs(args).values())
    return sum(math.prod(shape) * stored_dtype(spec, args).itemsize for spec, shape in shapes if shape is not None)


# --- splits and speed -------------------------------------------------------------------------------------------------


def splits(args: ModelArgs, expert_parallel: bool = False) -> Iterator[tuple[int, str | None]]:
    """Numbers of ranks, up to one a head: those within a node and whole nodes; with each why it does not work."""
    first = replace(args, n_layers=min(args.n_layers, args.n_dense_layers + 1))  # later layers are cut like these
    for mp in range(1, min(args.n_heads, MAX_RANKS) + 1):
        if mp <= NODE or mp % NODE == 0:
            try:
                check_split(first, mp, expert_parallel)
                yield mp, None
            except InputError as error:
                yield mp, str(error).partition(";")[0].replace(f" over {mp} ranks", "")


def bytes_per_token(args: ModelArgs, mp: int, expert_parallel: bool, seq_len: int) -> int:
    """What a rank reads at least to decode a token of one sequence of `seq_len`, without drafts: weights and cache."""
    parts = weight_parts(args, mp, expert_parallel)
    weights = sum(part.read for name, part in parts.items() if name != "MTP")
    return weights + cache_bytes(args, args.n_layers, 1, seq_len)


# --- the report -------------------------------------------------------------------------------------------------------


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns aligned: the first on the left, figures on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("   ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def in_units(count: int) -> str:
    """A figure in 10^9, nothing for 0."""
    return f"{count / 1e9:,.3f}" if count else ""


def model_table(args: ModelArgs, mp: int, expert_parallel: bool, max_batch_size: int, max_seq_len: int) -> str:
    parts = dict(weight_parts(args, mp, expert_parallel))
    needs = memory(args, mp, expert_parallel, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    touched = bytes_per_token(args, mp, expert_parallel, max_seq_len)
    mtp = parts.pop("MTP")

    def row(name: str, part: Part) -> tuple[str, ...]:
        return name, *map(in_units, (part.parameters, part.active, part.nbytes, part.read))

    rows = [("", "10^9 parameters", "of a token", "GB a rank", "GB read a token")]
    rows += [row(name, part) for name, part in parts.items() if part.parameters]
    rows.append(row("main model", sum(parts.values(), Part())))
    if mtp.parameters:
        rows.append(row(f"MTP ({args.n_mtp_layers})", replace(mtp, read=0)))
    cache_read = cache_bytes(args, args.n_layers, 1, max_seq_len)
    cache = f"cache, {max_batch_size} x {max_seq_len} tokens"
    rows.append((cache, "", "", in_units(needs.cache), in_units(cache_read)))
    rows.append(("workspace", "", "", in_units(needs.workspace), ""))
    rows.append(("a rank, in all", "", "", in_units(needs.total), in_units(touched)))
    return table(rows)


def disk_table(args: ModelArgs, mp: int, expert_parallel: bool) -> str:
    """Formats in columns: as stored, and of FP8 its cast to BF16."""
    formats = [args] if args.dtype != "fp8" else [args, replace(args, dtype="bf16", scale_fmt=None)]
    shards = [shard_bytes(format, mp, expert_parallel) for format in formats]
    repeats = ", MTP's repeated embedding and head included" if args.n_mtp_layers else ""
    return table(
        [
            ("GB on disk", *(format.dtype for format in formats)),
            (f"Hugging Face folder{repeats}", *(in_units(folder_bytes(format)) for format in formats)),
            (f"shards for {mp}, in all", *(in_units(mp * size) for size in shards)),
            ("shards, each", *map(in_units, shards)),
        ]
    )


def split_table(ranks: list[tuple[int, str | None]]) -> str:
    grouped: dict[str | None, list[int]] = {}
    for mp, why in ranks:
        grouped.setdefault(why, []).append(mp)
    working = grouped.pop(None)
    lines = [f"numbers of ranks that work: {', '.join(map(str, working))}"]
    lines += [f"  not {', '.join(map(str, numbers))}: {why}" for why, numbers in grouped.items()]
    return "\n".join(lines)


def fit(args: ModelArgs, mp: int, expert_parallel: bool, sizes: dict[str, int], gpu_memory: float) -> str:
    """Whether a rank fits into so many GB, and if not how many ranks it takes."""

    def spare(ranks: int) -> float:
        return gpu_memory - memory(args, ranks, expert_parallel, **sizes).total / 1e9

    if (left := spare(mp)) >= 0:
        return f"fits in {gpu_memory:g} GB, {left:.1f} GB left"
    more = (n for n, why in splits(args, expert_parallel) if n > mp and why is None)
    enough = next((n for n in more if spare(n) >= 0), None)
    advice = "no number of ranks is enough" if enough is None else f"--model-parallel {enough} is enough"
    return f"does not fit in {gpu_memory:g} GB, {-left:.1f} GB too much: {advice}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a model takes: memory, disk, GPUs, time a token. Loads nothing.")
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", type=Path, metavar="FILE", help="model config, ours or Hugging Face's")
    model.add_argument("--ckpt-path", type=Path, metavar="DIR", help="checkpoint; its headers are checked too")
    add("--model-parallel", type=int, metavar="N", help="ranks (default: those the checkpoint was converted for, or 1)")
    add("--expert-parallel", action="store_true", help="whole experts per rank instead of a slice of each")
    add("--max-batch-size", type=int, metavar="N", help="rows of the cache (default: the config's)")
    add("--max-seq-len", type=int, metavar="N", help=f"tokens of a row (default {DEFAULT_MAX_SEQ_LEN} or the config's)")
    add("--gpu-memory", type=float, metavar="GB", help="say whether a rank fits in this")
    add(
        "--bandwidth",
        type=float,
        default=BANDWIDTH,
        metavar="TB_PER_S",
        help=f"of memory (default {BANDWIDTH}, an H200's)",
    )
    args = parser.parse_args()
    for name in ("model_parallel", "max_batch_size", "max_seq_len", "gpu_memory", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**31:
            raise InputError(f"--{name.replace('_', '-')} {value}: wanted a positive number below 2^31")
    return args


def main() -> None:
    options = parse_arguments()
    mp, expert_parallel = options.model_parallel, options.expert_parallel
    if options.ckpt_path:
        checkpoint = Checkpoint(options.ckpt_path)
        model, mp = checkpoint.args, mp or checkpoint.mp
        expert_parallel = expert_parallel or checkpoint.expert_parallel
        checkpoint.check(mp, 0, expert_parallel)
    else:
        model, mp = ModelArgs.load(options.config), mp or 1
    check_split(model, mp, expert_parallel)
    max_seq_len = options.max_seq_len or min(model.max_seq_len, DEFAULT_MAX_SEQ_LEN)
    if not 2 <= max_seq_len <= model.max_seq_len:
        raise InputError(f"--max-seq-len {max_seq_len}: wanted 2 to {model.max_seq_len}, what the config allows")
    max_batch_size = options.max_batch_size or model.max_batch_size

    how = ", whole experts each" if expert_parallel and mp > 1 else ""
    print(f"{options.config or options.ckpt_path}: {model.dtype} weights, {mp} rank{'s' * (mp > 1)}{how}\n")
    print(model_table(model, mp, expert_parallel, max_batch_size, max_seq_len))
    if options.gpu_memory:
        sizes = {"max_batch_size": max_batch_size, "max_seq_len": max_seq_len}
        print(fit(model, mp, expert_parallel, sizes, options.gpu_memory))
    print(f"\n{disk_table(model, mp, expert_parallel)}")
    if options.ckpt_path:
        files = [file for file in options.ckpt_path.glob("*.safetensors") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"{options.ckpt_path} has {in_units(size)} in {len(files)} file{'s' * (len(files) > 1)}, with headers")
    print(f"\n{split_table(list(splits(model, expert_parallel)))}\n")
    seconds = bytes_per_token(model, mp, expert_parallel, max_seq_len) / (options.bandwidth * 1e12)
    whose = ", which a copy reaches on an H200" if options.bandwidth == BANDWIDTH else ""
    print(
        f"batch 1 at {max_seq_len} tokens, no drafts: at least {seconds * 1e3:.3g} ms a token (at most "
        f"{1 / seconds:.4g} tokens/s), for reading alone at {options.bandwidth:g} TB/s{whose}"
    )


if __name__ == "__main__":
    run_command(main)
