"""
Checkpoints: which tensors a model has, how each is split over ranks, and reading them from a folder into a model.

Two kinds of folder are read: a Hugging Face one as downloaded, and convert.py's, where rank r of N has its slices in
`model{r}-mp{N}.safetensors` under our names. Both carry a config.json. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from config import BLOCK_SIZE, ModelArgs, read_json
from errors import InputError, problems
from gpu import cdiv
from kernel import E4M3, weight_dequant
from loading import Piece, Slices, load, pieces_of
from parallel import Parallel
from safetensors_io import DTYPE_NAMES, SafetensorsFile, StoredTensor

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
JOURNAL = "conversion.incomplete"  # what a converter has done so far of a folder that it has not finished
SHARD_FILE = re.compile(r"model(\d{1,4})-mp(\d{1,4})\.safetensors")
# What an index may name: a file that cannot lead out of the folder.
PLAIN_FILE = re.compile(r"[\w.+=@ -]{1,200}\.safetensors", re.ASCII)
MAX_EXPERTS = 10**6  # in all layers; DeepSeek-V3 has 15,872
MAX_RANKS = 1024
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


# --- the tensors of a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """
    One tensor of a model, whole: its name here and in Hugging Face's files, its shape, and the type the model keeps it
    in (a checkpoint may store it narrower, never wider).

    Ranks cut dimension `split` into equal runs of whole `unit`s: a head, a block of scales. None: every rank has all.
    A routed expert's tensors know which `expert` of `n_experts` they belong to.
    """

    name: str
    hf_name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    split: int | None = None
    unit: int = 1
    expert: int | None = None
    n_experts: int = 0

    @property
    def is_scale(self) -> bool:
        return self.name.endswith(".scale")

    @property
    def scale_name(self) -> str:
        """Name of the scale that belongs to this weight if it is in FP8."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        widened = self.dtype == torch.float32 and not self.is_scale
        return (self.dtype, torch.bfloat16) if widened else (self.dtype,)


@functools.lru_cache(maxsize=2)  # half a second for DeepSeek-V3's 91,989 tensors
def tensor_specs(args: ModelArgs) -> Mapping[str, TensorSpec]:
    """Every tensor a checkpoint of these args has, by our name. Raises InputError when they are too many to be true."""
    specs: dict[str, TensorSpec] = {}
    wide = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    heads, dim, experts = args.n_heads, args.dim, args.n_routed_experts
    n_layers = args.n_layers + args.n_mtp_layers
    if n_layers * (experts + 1) > MAX_EXPERTS:
        raise InputError(f"config: {n_layers} layers of {experts} experts are more than any checkpoint has")

    def add(ours: str, theirs: str, *shape: int, dtype: torch.dtype = wide, **how: int | None) -> None:
        specs[ours] = TensorSpec(ours, theirs, shape, dtype, n_experts=experts, **how)

    def norm(ours: str, theirs: str, size: int) -> None:
        add(f"{ours}.weight", f"{theirs}.weight", size)

    def linear(ours: str, theirs: str, *shape: int, unit: int = 1, **how: int | None) -> None:
        """A quantised weight, and in FP8 its scales. Slices then hold whole blocks, so that scales split alike."""
        if args.dtype != "fp8":
            add(f"{ours}.weight", f"{theirs}.weight", *shape, unit=unit, **how)
            return
        unit = math.lcm(unit, BLOCK_SIZE)
        add(f"{ours}.weight", f"{theirs}.weight", *shape, dtype=E4M3, unit=unit, **how)
        blocks, unit = (cdiv(size, BLOCK_SIZE) for size in shape), unit // BLOCK_SIZE
        add(f"{ours}.scale", f"{theirs}.weight_scale_inv", *blocks, dtype=torch.float32, unit=unit, **how)

    def mlp(ours: str, theirs: str, inter_dim: int, **how: int) -> None:
        linear(f"{ours}.w1", f"{theirs}.gate_proj", inter_dim, dim, split=0, **how)
        linear(f"{ours}.w2", f"{theirs}.down_proj", dim, inter_dim, split=1, **how)
        linear(f"{ours}.w3", f"{theirs}.up_proj", inter_dim, dim, split=0, **how)

    def attention(ours: str, theirs: str) -> None:
        q_head, kv_head, v_head = args.qk_head_dim, args.qk_nope_head_dim + args.v_head_dim, args.v_head_dim
        if args.q_lora_rank == 0:
            linear(f"{ours}.wq", f"{theirs}.q_proj", heads * q_head, dim, split=0, unit=q_head)
        else:
            linear(f"{ours}.wq_a", f"{theirs}.q_a_proj", args.q_lora_rank, dim)
            norm(f"{ours}.q_norm", f"{theirs}.q_a_layernorm", args.q_lora_rank)
            linear(f"{ours}.wq_b", f"{theirs}.q_b_proj", heads * q_head, args.q_lora_rank, split=0, unit=q_head)
        linear(f"{ours}.wkv_a", f"{theirs}.kv_a_proj_with_mqa", args.cache_dim, dim)
        norm(f"{ours}.kv_norm", f"{theirs}.kv_a_layernorm", args.kv_lora_rank)
        linear(f"{ours}.wkv_b", f"{theirs}.kv_b_proj", heads * kv_head, args.kv_lora_rank, split=0, unit=kv_head)
        linear(f"{ours}.wo", f"{theirs}.o_proj", dim, heads * v_head, split=1, unit=v_head)

    def block(ours: str, theirs: str, dense: bool) -> None:
        norm(f"{ours}.attn_norm", f"{theirs}.input_layernorm", dim)
        attention(f"{ours}.attn", f"{theirs}.self_attn")
        norm(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", dim)
        ffn, theirs = f"{ours}.ffn", f"{theirs}.mlp"
        if dense:
            mlp(ffn, theirs, args.inter_dim)
            return
        add(f"{ffn}.gate.weight", f"{theirs}.gate.weight", experts, dim, dtype=torch.float32)
        if args.score_func == "sigmoid":
            add(f"{ffn}.gate.bias", f"{theirs}.gate.e_score_correction_bias", experts, dtype=torch.float32)
        for i in range(experts):
            mlp(f"{ffn}.experts.{i}", f"{theirs}.experts.{i}", args.moe_inter_dim, expert=i)
        if args.n_shared_experts:
            shared_dim = args.n_shared_experts * args.moe_inter_dim
            mlp(f"{ffn}.shared_experts", f"{theirs}.shared_experts", shared_dim)

    add("embed.weight", "model.embed_tokens.weight", args.vocab_size, dim, split=0)
    for i in range(args.n_layers):
        block(f"layers.{i}", f"model.layers.{i}", dense=i < args.n_dense_layers)
    norm("norm", "model.norm", dim)
    add("head.weight", "lm_head.weight", args.vocab_size, dim, split=0)
    for i in range(args.n_mtp_layers):
        ours, theirs = f"mtp.{i}", f"model.layers.{args.n_layers + i}"
        block(ours, theirs, dense=False)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm(f"{ours}.{name}", f"{theirs}.{name}", dim)
        add(f"{ours}.eh_proj.weight", f"{theirs}.eh_proj.weight", dim, 2 * dim)
    return specs


def repeated(args: ModelArgs) -> dict[str, str]:
    """Hugging Face names of the tensors that an MTP layer's files hold once more -> the tensor that each repeats."""
    originals = {}
    for i in range(args.n_layers, args.n_layers + args.n_mtp_layers):
        originals[f"model.layers.{i}.embed_tokens.weight"] = "model.embed_tokens.weight"
        originals[f"model.layers.{i}.shared_head.head.weight"] = "lm_head.weight"
    return originals


def skippable(args: ModelArgs) -> dict[str, str]:
    """Hugging Face names that a checkpoint may have and that are not needed -> why."""
    n_layers = args.n_layers + args.n_mtp_layers
    reasons = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": "computed from the config" for i in range(n_layers)}
    return reasons | {name: f"repeats {original}" for name, original in repeated(args).items()}


# --- splitting --------------------------------------------------------------------------------------------------------


def shard(spec: TensorSpec, mp: int, rank: int, expert_parallel: bool) -> tuple[slice, ...] | None:
    """
    The part of a tensor that rank `rank` of `mp` holds, a slice per dimension; None when it holds nothing of it.

    Ranks hold consecutive parts. With `expert_parallel` those of the experts are whole experts, by default slices of
    each expert. `check_split` says beforehand whether the parts are equal.
    """
    slices = [slice(0, size) for size in spec.shape]
    if spec.expert is not None and expert_parallel:
        return tuple(slices) if spec.expert // (spec.n_experts // mp) == rank else None
    if spec.split is not None:
        size = spec.shape[spec.split] // mp
        slices[spec.split] = slice(rank * size, (rank + 1) * size)
    return tuple(slices)


def shard_shape(spec: TensorSpec, mp: int, rank: int, expert_parallel: bool) -> tuple[int, ...] | None:
    slices = shard(spec, mp, rank, expert_parallel)
    return None if slices is None else tuple(part.stop - part.start for part in slices)


def check_split(args: ModelArgs, mp: int, expert_parallel: bool) -> None:
    """Raises InputError naming the first tensor that does not divide over `mp` ranks, and the numbers that do."""
    cuts: dict[tuple[int, int], str] = {}  # size, unit -> where; the thousands of experts have few different ones
    for spec in tensor_specs(args).values():
        if spec.expert is not None and expert_parallel:
            layer = spec.name.split(f".{spec.expert}.")[0]
            cuts.setdefault((spec.n_experts, 1), f"{layer}: {spec.n_experts} experts")
        elif spec.split is not None:
            size = spec.shape[spec.split]
            cuts.setdefault((size, spec.unit), f"{spec.name}: {size} {('rows', 'columns')[spec.split]}")

    def divides(n: int) -> bool:
        return n == 1 or all(size % (n * unit) == 0 for size, unit in cuts)

    if not divides(mp):
        unit, what = next((unit, what) for (size, unit), what in cuts.items() if size % (mp * unit))
        pieces = f" in multiples of {unit}" if unit > 1 else ""
        numbers = ", ".join(str(n) for n in range(1, min(args.n_heads, MAX_RANKS) + 1) if divides(n))
        raise InputError(f"{what} cannot be split over {mp} ranks{pieces}; numbers of ranks that work: {numbers}")


# --- reading ----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """
    A folder of weights, opened: headers are read and checked, data is read only when asked for.

    path; args: the ModelArgs in its config.json, or in `config` when given. kind: "hf" or "shards". mp and
    expert_parallel: how shards were split. tensors: what is stored, by the name it is stored under; of shards, one
    rank's, by default 0's (see `open_rank`). files: those opened so far, by name.

    Raises InputError when the folder is not a complete checkpoint, or a file in it is damaged.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None):
        self.path = Path(path)
        try:
            names = sorted(entry.name for entry in self.path.iterdir())
        except FileNotFoundError:
            raise InputError(f"{self.path}: no such folder") from None
        except OSError as error:
            raise InputError(f"{self.path}: not a folder that can be read: {error.strerror}") from None
        if not names:
            raise InputError(f"{self.path}: the folder is empty")
        if JOURNAL in names:
            raise InputError(
                f"{self.path}: not a complete checkpoint: its conversion was interrupted or is still running; the same "
                "command as before goes on with it"
            )
        if config is None and CONFIG_FILE not in names:
            raise InputError(f"{self.path}: no {CONFIG_FILE}: not a checkpoint, or a conversion that was interrupted")
        self.args = ModelArgs.load(self.path / CONFIG_FILE if config is None else config)
        self.mp = 1
        self.expert_parallel = False
        self.files: dict[str, SafetensorsFile] = {}
        shards = {name: (int(m[1]), int(m[2])) for name in names if (m := SHARD_FILE.fullmatch(name))}
        if INDEX_FILE in names or SINGLE_FILE in names:
            if shards:
                raise InputError(f"{self.path}: holds both {min(shards)} and a Hugging Face checkpoint; keep one")
            self.kind = "hf"
            self.tensors = self._indexed() if INDEX_FILE in names else self._open(SINGLE_FILE).tensors
        elif shards:
            self.kind = "shards"
            self.mp = max(mp for _, mp in shards.values())
            expected = {f"model{rank}-mp{self.mp}.safetensors" for rank in range(self.mp)}
            if set(shards) != expected:
                found = [f"{name} is missing" for name in sorted(expected - set(shards))]
                found += [f"{name} belongs to another conversion" for name in sorted(set(shards) - expected)]
                raise problems(f"{self.path}: not one complete set of shards", found)
            self.open_rank(0)
        elif pickles := [name for name in names if name.endswith(PICKLES)]:
            raise InputError(f"{self.path}: {pickles[0]} is a pickle; only safetensors files are read")
        else:
            raise InputError(f"{self.path}: no {SINGLE_FILE}, {INDEX_FILE} or model0-mp1.safetensors")
        layers, experts = self.args.n_layers + self.args.n_mtp_layers, self.args.n_routed_experts
        # Listing every tensor of a model that is far larger than the folder would take more memory than the folder has.
        if layers * (experts + 1) > 2 * self.mp * len(self.tensors) + 1000:
            found = f"{layers} layers of {experts} experts, but {len(self.tensors)} tensors"
            raise InputError(f"{self.path}: does not fit its config: {found}")

    def close(self) -> None:
        """No tensor is read any more."""
        for file in self.files.values():
            file.close()

    def _open(self, name: str) -> SafetensorsFile:
        # Links are followed, as the Hugging Face cache consists of them; devices and pipes are not files.
        if not (self.path / name).is_file():
            raise InputError(f"{self.path / name}: {'not a file' if (self.path / name).exists() else 'no such file'}")
        self.files[name] = SafetensorsFile(self.path / name)
        return self.files[name]

    def _indexed(self) -> dict[str, StoredTensor]:
        """The tensors of every file that the index names; the index and the files must agree."""
        index = read_json(self.path / INDEX_FILE).get("weight_map")
        where = f"{self.path / INDEX_FILE}"
        if not isinstance(index, dict) or not index:
            raise InputError(f"{where}: no weight_map with tensors in it")
        if outside := [file for file in index.values() if not (isinstance(file, str) and PLAIN_FILE.fullmatch(file))]:
            raise InputError(f"{where}: {outside[0]!r} is not the plain name of a .safetensors file in this folder")
        file_names = sorted(set(index.values()))
        if SINGLE_FILE not in file_names and (self.path / SINGLE_FILE).exists():
            raise InputError(f"{where}: does not name {SINGLE_FILE}, which is there too; keep one of them")
        if absent := [file for file in file_names if not (self.path / file).is_file()]:
            raise problems(f"{where}: names files that do not exist", absent)
        files = {name: self._open(name) for name in file_names}
        found = [f"{name} is not in {file}" for name, file in index.items() if name not in files[file].tensors]
        found += [
            f"{name} is in {file.path.name} and not in the index"
            for file in files.values()
            for name in file.tensors
            if index.get(name) != file.path.name
        ]
        if found:
            raise problems(f"{where}: does not agree with the files", found)
        return {name: files[file].tensors[name] for name, file in index.items()}

    def open_rank(self, rank: int) -> None:
        """Of converted shards, take those of this rank."""
        file = self._open(f"model{rank}-mp{self.mp}.safetensors")
        said = {key: file.metadata.get(key) for key in ("mp", "rank", "experts")}
        if said["experts"] not in ("tensor", "expert") or (said["mp"], said["rank"]) != (str(self.mp), str(rank)):
            raise InputError(f"{file.path}: its metadata says {said}; it was not written by convert.py or was renamed")
        self.expert_parallel = said["experts"] == "expert"
        self.tensors = file.tensors

    def stored_name(self, spec: TensorSpec) -> str:
        return spec.hf_name if self.kind == "hf" else spec.name

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A stored tensor, or the part of it that `slices` cut out, on the CPU. Raises InputError as read_into."""
        return self.tensors[name].file.read(name, slices)

    def check(self, world_size: int = 1, rank: int = 0, expert_parallel: bool = False) -> None:
        """
        Raises InputError unless this rank of so many can load it: everything there, nothing else, as `args` want it.

        Shards must have been made for this number of ranks and this way to split experts; opens this rank's.
        """
        if self.kind == "hf":
            check_split(self.args, world_size, expert_parallel)
        elif self.mp != world_size:
            raise InputError(
                f"{self.path}: converted for {self.mp} rank{'s' * (self.mp > 1)} and run with {world_size}; start it "
                f"with torchrun --nproc-per-node {self.mp} (over several nodes, their sum), or convert it again"
            )
        elif self.expert_parallel != expert_parallel:
            how = "with" if self.expert_parallel else "without"
            raise InputError(f"{self.path}: converted {how} --expert-parallel; run it {how} that too")
        else:
            self.open_rank(rank)
        wanted = {}
        for spec in tensor_specs(self.args).values():
            shape = spec.shape if self.kind == "hf" else shard_shape(spec, self.mp, rank, expert_parallel)
            if shape is not None:
                wanted[self.stored_name(spec)] = spec, shape
        if found := list(self._problems(wanted)):
            raise problems(f"{self.path}: does not fit its config", found)

    def _problems(self, wanted: dict[str, tuple[TensorSpec, tuple[int, ...]]]) -> Iterator[str]:
        """Of the tensors wanted, by the name stored: what is missing, of another shape or type, or not wanted."""
        missing = {name: spec for name, (spec, _) in wanted.items() if name not in self.tensors}
        mtp = [name for name, (spec, _) in wanted.items() if spec.name.startswith("mtp.")]
        if mtp and missing.keys() >= set(mtp):
            yield (
                f"{mtp[0]} and all else of the {self.args.n_mtp_layers} MTP layer(s) is missing: set "
                "num_nextn_predict_layers to 0 in config.json if this checkpoint comes without them"
            )
            missing = {name: spec for name, spec in missing.items() if name not in mtp}
        for name, spec in missing.items():
            yield f"{name}{', the scale of an FP8 weight,' if spec.is_scale else ''} is missing"
        for name, (spec, shape) in wanted.items():
            if (stored := self.tensors.get(name)) is None:
                continue
            if stored.shape != shape:
                yield f"{name} has shape {list(stored.shape)}, wanted {list(shape)}"
            if stored.dtype not in spec.stored_dtypes:
                types = " or ".join(DTYPE_NAMES[dtype] for dtype in spec.stored_dtypes)
                yield f"{name} is {DTYPE_NAMES[stored.dtype]}, wanted {types}"
        known = skippable(self.args) if self.kind == "hf" else {}
        for name in self.tensors:
            if name not in wanted and name not in known:
                yield f"{name[:200]!r} is not a tensor of this model"


# --- filling a model --------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_model(model: nn.Module, checkpoint: Checkpoint, parallel: Parallel, progress: bool = True) -> None:
    """
    Fill every parameter of `model` (a Transformer, allocated, not initialised) with this rank's slices.

    A weight stored in FP8 whose parameter is not is dequantised on its device; otherwise types may be widened. A model
    without MTP modules leaves those of the checkpoint unread. Several threads read, in the order of the files.

    Raises InputError when the checkpoint does not fit (see Checkpoint.check) or a parameter is narrower than stored.
    """
    split = parallel.world_size, parallel.rank, parallel.expert_parallel
    checkpoint.check(*split)
    specs = tensor_specs(checkpoint.args)
    targets = {name: target.detach() for name, target in model.weights().items()}
    filled = {target.untyped_storage().data_ptr() for target in targets.values()}
    unfilled = [name for name, whole in model.named_parameters() if whole.untyped_storage().data_ptr() not in filled]
    assert not unfilled and targets.keys() <= specs.keys(), f"{unfilled[:10]=} {list(targets.keys() - specs.keys())=}"

    def stored(spec: TensorSpec) -> StoredTensor:
        return checkpoint.tensors[checkpoint.stored_name(spec)]

    def cut(spec: TensorSpec) -> Slices:
        slices = shard(spec, *split) if checkpoint.kind == "hf" else None
        return slices or tuple(slice(0, size) for size in stored(spec).shape)

    one_at_a_time = threading.Lock()

    def convert(spec: TensorSpec) -> int:
        """
        A tensor whose type changes on the way, or that does not lie in one piece, read whole: few, unless the model is
        wider than the checkpoint.
        """
        target = targets[spec.name]
        value = checkpoint.read(checkpoint.stored_name(spec), cut(spec))
        with one_at_a_time:
            if value.dtype == E4M3 != target.dtype:
                scale = specs[spec.scale_name]
                scale = checkpoint.read(checkpoint.stored_name(scale), cut(scale))
                value = weight_dequant(value.to(target.device), scale.to(target.device), target.dtype)
            target.copy_(value.view(target.shape))
        return target.nbytes

    pieces: list[Piece] = []
    conversions: list[Callable[[], int]] = []
    for spec in sorted((specs[name] for name in targets), key=lambda spec: stored(spec).position):
        target, wanted = targets[spec.name], shard_shape(spec, *split)
        assert target.numel() == math.prod(wanted), f"{spec.name}: {target.shape=} {wanted=}"
        have, keep = stored(spec).dtype, target.dtype
        if have == keep and target.shape == wanted:
            pieces += pieces_of(checkpoint.stored_name(spec), stored(spec), cut(spec), target)
        elif have in (keep, E4M3) or keep == torch.float32:
            conversions.append(functools.partial(convert, spec))
        else:
            names = DTYPE_NAMES[have], DTYPE_NAMES[keep]
            raise InputError(f"{checkpoint.path}: {spec.name} is stored as {names[0]}, which {names[1]} cannot hold")
    total = sum(target.nbytes for target in targets.values())
    hidden = not progress or parallel.rank > 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hidden) as bar:
        for nbytes in load(pieces, conversions):
            bar.update(nbytes)
