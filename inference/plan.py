"""
What a model takes, from its config alone: parameters, memory of each rank, disk, ranks it splits over, and the fewest
milliseconds a token can take. No weight is read.

    python inference/plan.py --config configs/config_671B.json --model-parallel 8 --gpu-memory 141

GB are 10^9 bytes. Every figure is of the tensors that checkpoint.py lists; generate.py refuses by the same ones.
"""

# ruff: noqa: E402  (flags are answered before the imports that take seconds)
from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from errors import Arguments, InputError, answer_flags, run_command

DEFAULT_MAX_SEQ_LEN = 16384  # where neither the user nor the prompts say; at 70 KB a token V3's cache is 1.1 GB a row
SAMPLING_BYTES = 80  # a logit, with top-p: 40 (measured), and as much again in the memory of the CUDA graphs
BANDWIDTH = 4.30  # TB/s that a copy reaches on an H200, measured
FP8_PFLOPS, BF16_PFLOPS = 1.2, 0.767  # what the best dense GEMMs reach there, measured
NODE = 8  # GPUs: more ranks than this come in whole nodes


def parse_arguments() -> Namespace:
    parser = Arguments(description="What a model takes: memory, disk, GPUs, time a token. Loads nothing.")
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config", type=Path, metavar="FILE", help="model config, ours or Hugging Face's")
    model.add_argument("--ckpt-path", type=Path, metavar="DIR", help="checkpoint; its headers are checked too")
    add("--model-parallel", type=int, metavar="N", help="ranks (default: those the checkpoint was converted for, or 1)")
    add("--expert-parallel", action="store_true", help="whole experts per rank instead of a slice of each")
    add("--max-batch-size", type=int, metavar="N", help="rows of the cache (default: the config's)")
    add("--max-seq-len", type=int, metavar="N", help=f"tokens of a row (default {DEFAULT_MAX_SEQ_LEN} or the config's)")
    add("--gpu-memory", type=float, metavar="GB", help="say whether a rank fits in this")
    bandwidth = f"of memory (default {BANDWIDTH}, an H200's)"
    add("--bandwidth", type=float, default=BANDWIDTH, metavar="TB_PER_S", help=bandwidth)
    args = parser.parse_args()
    for name in ("model_parallel", "max_batch_size", "max_seq_len", "gpu_memory", "bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 2**31:
            raise InputError(f"--{name.replace('_', '-')} {value}: wanted a positive number below 2^31")
    return args


if __name__ == "__main__":
    answer_flags(parse_arguments)

import functools
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

from checkpoint import MAX_RANKS, Checkpoint, TensorSpec, check_split, shard_shape, tensor_specs
from config import BLOCK_SIZE, PREFILL_CHUNK, ModelArgs
from gpu import cdiv
from model import compute_dtype
from parallel import Parallel

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


class Memory(NamedTuple):
    """Bytes that a rank needs."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)


def used_by_token(spec: TensorSpec, shape: tuple[int, ...], chosen: int) -> int:
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
    K_here = cdiv(K, mp) if expert_parallel else K
    for spec in tensor_specs(args).values():
        part = parts[next(part for part, pattern in PARTS.items() if pattern in f".{spec.name}")]
        if not spec.is_scale:
            part.parameters += math.prod(spec.shape)
            part.active += used_by_token(spec, spec.shape, K)
        shape, itemsize = shard_shape(spec, mp, 0, expert_parallel), spec.dtype.itemsize
        if ".wkv_b." in spec.name:  # is dequantised as it is loaded
            shape, itemsize = None if spec.is_scale else shape, compute_dtype(args).itemsize
        if shape is not None:
            part.nbytes += math.prod(shape) * itemsize
            part.read += used_by_token(spec, shape, K_here) * itemsize
    return parts


def cache_length(args: ModelArgs, wanted: int | None) -> int:
    """Tokens of a row of the cache. Raises InputError for more than the config allows, or fewer than 2."""
    length = min(args.max_seq_len, DEFAULT_MAX_SEQ_LEN) if wanted is None else wanted
    if not 2 <= length <= args.max_seq_len:
        raise InputError(f"--max-seq-len {length}: wanted 2 to {args.max_seq_len}, what the config allows")
    return length


def cache_bytes(args: ModelArgs, n_layers: int, max_batch_size: int, max_seq_len: int) -> int:
    """A latent and a rotary key per layer and token; every rank has all of it, as its heads share them."""
    return n_layers * max_batch_size * max_seq_len * args.cache_dim * compute_dtype(args).itemsize


def padding_bytes(args: ModelArgs, mp: int) -> int:
    """In FP8 the rows of wq_a (or wq) and of wkv_a, which lie in one matrix, are each filled up to whole blocks."""
    rows = args.q_lora_rank or args.n_heads // mp * args.qk_head_dim, args.cache_dim
    padding = sum(-size % BLOCK_SIZE for size in rows) if args.dtype == "fp8" else 0
    return (args.n_layers + args.n_mtp_layers) * padding * args.dim


def workspace_bytes(
    args: ModelArgs, world_size: int, max_batch_size: int, max_seq_len: int, chunk: int, drafts: int
) -> int:
    """
    Activations of the largest prefill pass: some 8 vectors of `dim` for each of `chunk` tokens; for each expert that
    it chose the token itself, the expert's term and 3 vectors of an expert's width; expanded keys and values of as many
    tokens as one pass sees; and what sampling makes of each row's logits, of the next token and after each draft.
    """
    heads = args.n_heads // world_size
    choices = args.n_activated_experts + args.n_shared_experts
    tokens = chunk * (16 * args.dim + choices * (4 * args.dim + 6 * args.moe_inter_dim // world_size))
    keys = 2 * max(chunk, max_seq_len) * heads * (args.qk_head_dim + args.v_head_dim) * 2
    return tokens + keys + SAMPLING_BYTES * max_batch_size * (1 + drafts) * args.vocab_size


def memory(
    args: ModelArgs,
    mp: int = 1,
    expert_parallel: bool = False,
    *,
    max_batch_size: int,
    max_seq_len: int,
    chunk: int = PREFILL_CHUNK,
    drafts: int | None = None,
) -> Memory:
    """
    What a rank of `mp` needs to run a model of these args, whose `dtype` is that of the weights in memory. drafts: by
    default as many as there are MTP modules.
    """
    drafts = args.n_mtp_layers if drafts is None else drafts
    chunk = min(chunk, max_batch_size * max_seq_len)  # no pass takes more tokens than the cache holds
    weights = sum(part.nbytes for part in weight_parts(args, mp, expert_parallel).values()) + padding_bytes(args, mp)
    cache = cache_bytes(args, args.n_layers + args.n_mtp_layers, max_batch_size, max_seq_len)
    return Memory(weights, cache, workspace_bytes(args, mp, max_batch_size, max_seq_len, chunk, drafts))


# --- disk -------------------------------------------------------------------------------------------------------------


def shard_bytes(args: ModelArgs, mp: int, expert_parallel: bool = False) -> int:
    """Tensors of one of convert.py's `mp` files; all are equally large."""
    total = 0
    for spec in tensor_specs(args).values():
        if (shape := shard_shape(spec, mp, 0, expert_parallel)) is not None:
            # The gate's weight is widened only when it is loaded.
            dtype = compute_dtype(args) if spec.name.endswith(".gate.weight") else spec.dtype
            total += math.prod(shape) * dtype.itemsize
    return total


def folder_bytes(args: ModelArgs) -> int:
    """Tensors of a Hugging Face folder, in which each MTP layer repeats the embedding and the head."""
    repeated = 2 * args.n_mtp_layers * args.vocab_size * args.dim
    return shard_bytes(args, 1) + repeated * compute_dtype(args).itemsize


# --- splits and speed -------------------------------------------------------------------------------------------------


def splits(args: ModelArgs, expert_parallel: bool) -> dict[str, list[int]]:
    """Numbers of ranks up to one a head, within a node or whole nodes: under "" what works, the others by why not."""
    first = replace(args, n_layers=min(args.n_layers, args.n_dense_layers + 1))  # later layers are cut like these
    found: dict[str, list[int]] = {"": []}
    for mp in range(1, min(args.n_heads, MAX_RANKS) + 1):
        if mp <= NODE or mp % NODE == 0:
            why = ""
            try:
                check_split(first, mp, expert_parallel)
            except InputError as error:
                why = str(error).partition(";")[0].replace(f" over {mp} ranks", "")
            found.setdefault(why, []).append(mp)
    return found


def bytes_per_token(args: ModelArgs, mp: int, expert_parallel: bool, seq_len: int) -> int:
    """What a rank reads at least to decode a token of one sequence of `seq_len`, without drafts: weights and cache."""
    parts = weight_parts(args, mp, expert_parallel)
    weights = sum(part.read for name, part in parts.items() if name != "MTP")
    return weights + cache_bytes(args, args.n_layers, 1, seq_len)


def experts_hit(args: ModelArgs, tokens: int) -> float:
    """Share of the experts that so many tokens need, each choosing K of E evenly: 1 - (1 - K / E) ** tokens."""
    if not args.n_routed_experts:
        return 0.0
    return 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** tokens


def decode_bytes(
    args: ModelArgs, parallel: Parallel, rows: int, length: int, drafts: int, hit: float | None = None
) -> float:
    """
    What a rank reads at least in one step of `rows` rows that see `length` tokens each, when it needs the share `hit`
    of a layer's experts; by default as many as an even router would choose.
    """
    tokens, used = rows * (1 + drafts), min(drafts, args.n_mtp_layers)
    hit = experts_hit(args, tokens) if hit is None else hit
    parts = weight_parts(replace(args, n_mtp_layers=used), parallel.world_size, parallel.expert_parallel)
    moe_layers = args.n_layers - args.n_dense_layers
    expert_bytes = parts["routed experts"].nbytes / max(moe_layers, 1)  # of one layer
    total = sum(part.nbytes for name, part in parts.items() if name != "embedding")
    total += parts["embedding"].read * tokens + parts["head"].nbytes * drafts  # each draft reads the head again
    total -= (moe_layers + used) * expert_bytes * (1 - hit)
    return total + cache_bytes(args, args.n_layers + used, rows, length)


def prefill_flops(args: ModelArgs, world_size: int, rows: int, length: int) -> tuple[float, float]:
    """
    Multiplications and additions that a rank makes at least for `rows` prompts of `length` tokens: in FP8, in bf16.

    Two for each active parameter and token; attention 2 * H * (D_k + D_v) for each pair of a token and one it sees;
    the head for the last tokens only.
    """
    parts = weight_parts(replace(args, n_mtp_layers=0))
    head, embedding = parts["head"].parameters, parts["embedding"].active
    active = sum(part.active for part in parts.values()) - head - embedding
    wide = args.n_layers * args.n_heads * (args.qk_nope_head_dim + args.v_head_dim) * args.kv_lora_rank  # wkv_b
    wide += parts["gates"].parameters
    if args.dtype != "fp8":
        wide = active
    pairs = rows * length * (length + 1) / 2
    attention = 2 * args.n_layers * args.n_heads * (args.qk_head_dim + args.v_head_dim) * pairs
    tokens = rows * length
    return 2 * tokens * (active - wide) / world_size, (2 * tokens * wide + attention + 2 * rows * head) / world_size


def floor_seconds(nbytes: float, fp8_flops: float = 0.0, flops: float = 0.0) -> float:
    """The longer of reading and computing, at the rates of an H200."""
    return max(nbytes / (BANDWIDTH * 1e12), fp8_flops / (FP8_PFLOPS * 1e15) + flops / (BF16_PFLOPS * 1e15))


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
    parts = {name: astuple(part) for name, part in weight_parts(args, mp, expert_parallel).items()}
    mtp = parts.pop("MTP")
    needs = memory(args, mp, expert_parallel, max_batch_size=max_batch_size, max_seq_len=max_seq_len)
    cache = needs.cache, cache_bytes(args, args.n_layers, 1, max_seq_len)
    rows = [(name, *part) for name, part in parts.items() if any(part)]
    rows.append(("main model", *map(sum, zip(*parts.values(), strict=True))))
    if any(mtp):
        rows.append((f"MTP ({args.n_mtp_layers})", *mtp[:3], 0))
    rows.append((f"cache, {max_batch_size} x {max_seq_len} tokens", 0, 0, *cache))
    rows.append(("workspace", 0, 0, needs.workspace, 0))
    rows.append(("a rank, in all", 0, 0, needs.total, bytes_per_token(args, mp, expert_parallel, max_seq_len)))
    titles = "", "10^9 parameters", "of a token", "GB a rank", "GB read a token"
    return table([titles, *((name, *map(in_units, figures)) for name, *figures in rows)])


def disk_table(args: ModelArgs, mp: int, expert_parallel: bool) -> str:
    """Formats in columns: as stored, and of FP8 its cast to BF16."""
    formats = [args] if args.dtype != "fp8" else [args, replace(args, dtype="bf16", scale_fmt=None)]
    repeats = ", MTP's repeated embedding and head included" if args.n_mtp_layers else ""
    columns = [("GB on disk", f"Hugging Face folder{repeats}", f"shards for {mp}, in all", "shards, each")]
    for format in formats:
        shard = shard_bytes(format, mp, expert_parallel)
        columns.append((format.dtype, *map(in_units, (folder_bytes(format), mp * shard, shard))))
    return table(list(zip(*columns, strict=True)))


def fit(args: ModelArgs, mp: int, expert_parallel: bool, working: list[int], gpu_memory: float, **sizes: int) -> str:
    """Whether a rank fits into so many GB, and if not which of the `working` numbers of ranks is enough."""

    def spare(ranks: int) -> float:
        return gpu_memory - memory(args, ranks, expert_parallel, **sizes).total / 1e9

    if (left := spare(mp)) >= 0:
        return f"fits in {gpu_memory:g} GB, {left:.1f} GB left"
    enough = next((n for n in working if n > mp and spare(n) >= 0), None)
    advice = "no number of ranks is enough" if enough is None else f"--model-parallel {enough} is enough"
    return f"does not fit in {gpu_memory:g} GB, {-left:.1f} GB too much: {advice}"


def main() -> None:
    options = parse_arguments()
    mp, expert_parallel = options.model_parallel, options.expert_parallel
    if options.ckpt_path:
        checkpoint = Checkpoint(options.ckpt_path)
        model, mp = checkpoint.args, mp or checkpoint.mp
        expert_parallel = expert_parallel or checkpoint.expert_parallel
        if checkpoint.kind != "hf" and mp != checkpoint.mp:
            made = f"{options.ckpt_path} was converted for {checkpoint.mp} rank{'s' * (checkpoint.mp > 1)}"
            raise InputError(f"--model-parallel {mp}: {made}; leave the flag out, or give the folder it was made from")
        checkpoint.check(mp, 0, expert_parallel)
    else:
        model, mp = ModelArgs.load(options.config), mp or 1
    check_split(model, mp, expert_parallel)
    max_seq_len = cache_length(model, options.max_seq_len)
    sizes = {"max_batch_size": options.max_batch_size or model.max_batch_size, "max_seq_len": max_seq_len}
    how = ", whole experts each" if expert_parallel and mp > 1 else ""
    print(f"{options.config or options.ckpt_path}: {model.dtype} weights, {mp} rank{'s' * (mp > 1)}{how}\n", flush=True)
    print(model_table(model, mp, expert_parallel, **sizes))
    ranks = splits(model, expert_parallel)
    working = ranks.pop("")
    if options.gpu_memory:
        print(fit(model, mp, expert_parallel, working, options.gpu_memory, **sizes))
    print(f"\n{disk_table(model, mp, expert_parallel)}")
    if options.ckpt_path:
        files = [file for file in options.ckpt_path.glob("*.safetensors") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"{options.ckpt_path} has {in_units(size)} in {len(files)} file{'s' * (len(files) > 1)}, with headers")
    print(f"\nnumbers of ranks that work: {', '.join(map(str, working))}")
    for why, numbers in ranks.items():
        print(f"  not {', '.join(map(str, numbers))}: {why}")
    seconds = bytes_per_token(model, mp, expert_parallel, max_seq_len) / (options.bandwidth * 1e12)
    whose = ", which a copy reaches on an H200" if options.bandwidth == BANDWIDTH else ""
    print(
        f"\nbatch 1 at {max_seq_len} tokens, no drafts: at least {seconds * 1e3:.3g} ms a token (at most "
        f"{1 / seconds:.4g} tokens/s), for reading alone at {options.bandwidth:g} TB/s{whose}"
    )


if __name__ == "__main__":
    run_command(main)
