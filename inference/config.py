"""ModelArgs: every number of a model, read from our JSON (configs/*.json) or from a Hugging Face config.json."""

from __future__ import annotations

import json
import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from errors import InputError

MAX_JSON_BYTES = 100_000_000  # the index of DeepSeek-V3 has 9 MB
UE8M0 = "ue8m0"  # the format of scales that are powers of two
BLOCK_SIZE = 128  # weights have one scale per BLOCK_SIZE x BLOCK_SIZE block, activations one per token and BLOCK_SIZE
GEMMS = "auto", "fp8", "w8a16", "bf16"  # ways to multiply with FP8 weights
MAX_DRAFTS = 16
PREFILL_CHUNK = 4096  # prompt tokens a pass, unless another number is asked for

ARCHITECTURES = {"DeepseekV2ForCausalLM": "softmax", "DeepseekV3ForCausalLM": "sigmoid"}
MODEL_TYPES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
}

# Our field -> HF's, where the names differ.
HF_NAMES = {
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "route_scale": "routed_scaling_factor",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "n_mtp_layers": "num_nextn_predict_layers",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "original_seq_len": "rope_scaling.original_max_position_embeddings",
    "rope_factor": "rope_scaling.factor",
    "mscale": "rope_scaling.mscale_all_dim",
}

# HF fields that describe training, bookkeeping or generation and do not change the forward pass.
IGNORED = set(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript transformers_version typical_p
    unsloth_fixed use_bfloat16 use_cache use_return_dict
    """.split()
)

# What transformers adds to an FP8 quantization_config -> the values that change nothing here.
TRANSFORMERS_FP8 = {"dequantize": (False,), "modules_to_convert": (None,), "expert_dtype": ("fp8", None)}


@dataclass(frozen=True)
class ModelArgs:
    """
    Shape and numerics of one model; field names are those of the released `configs/*.json`.

    `dtype` is the format of the linear weights: "fp8" means e4m3 with a scale per 128 x 128 block, and bf16 elsewhere.
    `scale_fmt` "ue8m0" rounds every scale up to a power of two (V3.1). `activation_scheme` "dynamic" quantises what an
    FP8 weight is multiplied with; "none" leaves it as it is, for GPUs without FP8 units. `mscale` is HF's
    `mscale_all_dim`: it scales the softmax, and cos and sin stay unscaled. `rope_factor` 1 means plain rotary
    embeddings, no YaRN.
    """

    vocab_size: int
    dim: int
    inter_dim: int
    moe_inter_dim: int
    n_layers: int
    n_dense_layers: int
    n_heads: int
    n_routed_experts: int
    n_shared_experts: int
    n_activated_experts: int
    route_scale: float
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    n_expert_groups: int = 1
    n_limited_groups: int = 1
    score_func: Literal["softmax", "sigmoid"] = "softmax"
    n_mtp_layers: int = 0
    dtype: Literal["bf16", "fp8", "fp32"] = "bf16"
    scale_fmt: Literal[None, "ue8m0"] = None
    activation_scheme: Literal["dynamic", "none"] = "dynamic"
    norm_eps: float = 1e-6
    max_batch_size: int = 8
    max_seq_len: int = 16384
    original_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the rotary key shared by all heads (V2 paper, 2.1.3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def __post_init__(self) -> None:
        """Raises InputError naming the first field that is of the wrong type, out of range or contradicts another."""
        optional_zero = {"n_dense_layers", "q_lora_rank", "n_mtp_layers", "n_routed_experts", "n_shared_experts"}
        for name, kind in get_type_hints(type(self)).items():
            value, low = getattr(self, name), 0 if name in optional_zero else 2 if name == "max_seq_len" else 1
            if kind is int and (type(value) is not int or not low <= value < 2**31):
                raise InputError(f"config: {name} is {value!r}, wanted an integer of at least {low}, below 2^31")
            if kind is float and (type(value) not in (int, float) or not 1e-30 <= value <= 1e30):
                raise InputError(f"config: {name} is {value!r}, wanted a number from 1e-30 to 1e30")
            if kind is float:  # JSON's integers have no limit, torch's have
                object.__setattr__(self, name, float(value))
            if (allowed := get_args(kind)) and value not in allowed:
                raise InputError(f"config: {name} is {value!r}, wanted one of {allowed}")
        contradictions = [
            (self.n_dense_layers > self.n_layers, f"{self.n_dense_layers=} is more than {self.n_layers=}"),
            (self.qk_rope_head_dim % 2, f"{self.qk_rope_head_dim=} is odd; rotary dimensions come in pairs"),
            (self.rope_factor < 1, f"{self.rope_factor=} is less than 1"),
            (self.beta_fast < self.beta_slow, f"{self.beta_fast=} is less than {self.beta_slow=}"),
            (self.rope_theta <= 1, f"{self.rope_theta=} is not more than 1; rotary pairs would all turn alike"),
            (self.scale_fmt and self.dtype != "fp8", f"{self.scale_fmt=} needs dtype 'fp8', not {self.dtype!r}"),
        ]
        if self.n_dense_layers < self.n_layers or self.n_mtp_layers:
            E, groups, limited = self.n_routed_experts, self.n_expert_groups, self.n_limited_groups
            size = E // groups
            few = f"{self.n_activated_experts=} is more than {self.n_limited_groups=} hold ({size} experts each)"
            one = f"{self.n_expert_groups=} leaves one expert a group; a group's score is the sum of its two best"
            contradictions += [
                (E == 0, f"{self.n_routed_experts=} but {self.n_dense_layers=} of {self.n_layers=}"),
                (E % groups, f"{self.n_routed_experts=} does not divide into {self.n_expert_groups=}"),
                (limited > groups, f"{self.n_limited_groups=} is more than {self.n_expert_groups=}"),
                (self.n_activated_experts > size * limited, few),
                (self.score_func == "sigmoid" and groups > 1 and size < 2, one),
            ]
        for wrong, why in contradictions:
            if wrong:
                raise InputError(f"config: {why}".replace("self.", ""))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelArgs:
        """From our field names. Raises InputError for an unknown or a missing field."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(data) - set(known)):
            raise InputError(f"config: unknown field {unknown[0]!r}; the known ones are {', '.join(known)}")
        if missing := [name for name, field in known.items() if field.default is MISSING and name not in data]:
            raise InputError(f"config: no {missing[0]!r}")
        return cls(**data)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> ModelArgs:
        """
        From a Hugging Face config.json (a path or its contents) of DeepSeek-V2, V3 or a model of the same class.

        Raises InputError for another architecture, an unknown field, or a field whose value this model cannot honour.
        """
        hf = dict(source) if isinstance(source, dict) else read_json(source)
        architecture = _architecture(hf)
        data: dict[str, Any] = {
            "score_func": _pop(hf, "scoring_func", default=ARCHITECTURES[architecture]),
            "n_mtp_layers": _pop(hf, "num_nextn_predict_layers", "num_mtp_layers", default=0),
        }
        for name in ("q_lora_rank", "n_expert_groups", "n_limited_groups", "norm_eps"):
            data[name] = _pop(hf, HF_NAMES.get(name, name), default=getattr(cls, name))
        for field in fields(cls):
            if field.default is MISSING or field.name == "max_seq_len":
                name = HF_NAMES.get(field.name, field.name)
                if name not in hf:
                    raise InputError(f"config: no {name!r}; {architecture} needs it")
                data[field.name] = hf.pop(name)
        data |= _dtype(hf) | _rope(hf)
        _check_routing(hf, data)
        _check_values(hf, data)
        if unknown := sorted(set(hf) - IGNORED):
            raise InputError(f"config: unknown field {unknown[0]!r} = {hf[unknown[0]]!r}; it may change the model")
        try:
            return cls.from_dict(data)
        except InputError as error:
            raise InputError(re.sub(r"\w+", lambda word: HF_NAMES.get(word[0], word[0]), str(error))) from None

    @classmethod
    def load(cls, path: str | Path) -> ModelArgs:
        """From either kind of JSON, told apart by `model_type` / `architectures`, which only HF's has."""
        data = read_json(path)
        try:
            return cls.from_hf(data) if "model_type" in data or "architectures" in data else cls.from_dict(data)
        except InputError as error:
            raise InputError(f"{path}{str(error).removeprefix('config')}") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object without a name that appears twice, of which the last value would hide the others."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError when there is none or it is something else."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise InputError(f"{path}: not a file")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise InputError(f"{path}: {size:,} bytes; no configuration or index is that long")
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: wanted a JSON object, got {type(data).__name__}")
    return data


def _pop(hf: dict[str, Any], *names: str, default: Any) -> Any:
    """The value of a field that goes by any of `names`; absent or null means `default`."""
    given = {name: value for name in names if (value := hf.pop(name, None)) is not None}
    value = next(iter(given.values()), default)
    if len(given) > 1 and any(other != value for other in given.values()):
        raise InputError(f"config: {' and '.join(f'{name} = {other!r}' for name, other in given.items())} contradict")
    return value


def _architecture(hf: dict[str, Any]) -> str:
    model_type = hf.get("model_type")
    if not isinstance(model_type, (str, type(None))):
        raise InputError(f"config: model_type is {model_type!r}, wanted a string")
    names = hf.get("architectures") or [MODEL_TYPES.get(model_type, model_type)]
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise InputError(f"config: architecture {names!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if model_type is not None and MODEL_TYPES.get(model_type, names[0]) != names[0]:
        raise InputError(f"config: model_type {model_type!r} contradicts architecture {names[0]!r}")
    return names[0]


def _dtype(hf: dict[str, Any]) -> dict[str, Any]:
    """`torch_dtype` (or transformers 5's `dtype`) and `quantization_config` -> dtype, scale_fmt."""
    name = _pop(hf, "torch_dtype", "dtype", default="bfloat16")
    dtypes = {"bfloat16": "bf16", "float32": "fp32"}
    if not isinstance(name, str) or name not in dtypes:
        raise InputError(f"config: torch_dtype {name!r} is not supported; supported are {', '.join(dtypes)}")
    quantization = hf.pop("quantization_config", None)
    if quantization is None:
        return {"dtype": dtypes[name]}
    if not isinstance(quantization, dict):
        raise InputError(f"config: quantization_config is {quantization!r}, wanted an object")
    quantization = {"fmt": "e4m3"} | quantization  # transformers leaves `fmt` out of what it writes
    scale_fmt = quantization.pop("scale_fmt", None)
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    for key, value in (wanted | {"weight_block_size": [BLOCK_SIZE, BLOCK_SIZE]}).items():
        if (found := quantization.pop(key, None)) != value:
            raise InputError(f"config: quantization_config.{key} is {found!r}; only {value!r} is supported")
    quantization.pop("modules_to_not_convert", None)  # the weights' own dtypes are checked when they are read
    for key, values in TRANSFORMERS_FP8.items():
        if key in quantization and (found := quantization.pop(key)) not in values:
            raise InputError(f"config: quantization_config.{key} is {found!r}; only {values[0]!r} is supported")
    if quantization:
        raise InputError(f"config: unknown field quantization_config.{min(quantization)}")
    return {"dtype": "fp8", "scale_fmt": None if scale_fmt == "float" else scale_fmt}


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings as released (`rope_theta`, `rope_scaling`) or as transformers 5 writes them."""
    released, rope = hf.pop("rope_scaling", None), hf.pop("rope_parameters", None)
    for given in (released, rope):
        if not isinstance(given, (dict, type(None))):
            raise InputError(f"config: rope_scaling is {given!r}, wanted an object")
    if released and rope and _rope_without_theta(released) != _rope_without_theta(rope):
        raise InputError(f"config: rope_scaling = {released} and rope_parameters = {rope} contradict")
    rope = dict(rope or released or {})
    theta = {"rope_theta": hf.pop("rope_theta", None), "rope_scaling.rope_theta": rope.pop("rope_theta", None)}
    data: dict[str, Any] = {"rope_theta": _pop(theta, *theta, default=10000.0)}
    kind = _pop(rope, "rope_type", "type", default="default")
    if kind == "yarn":
        data |= _yarn(rope)
    elif kind != "default":
        raise InputError(f"config: rope type {kind!r} is not supported; supported are 'default' and 'yarn'")
    left = {name for name, value in rope.items() if value is not None and (name, value) != ("truncate", True)}
    if left:
        raise InputError(f"config: unknown field rope_scaling.{min(left)} = {rope[min(left)]!r}")
    return data


def _rope_without_theta(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in one spelling; the base, which stands beside rope_scaling, is compared apart."""
    names = {"type": "rope_type"}
    return {names.get(key, key): value for key, value in rope.items() if key != "rope_theta" and value is not None}


def _yarn(rope: dict[str, Any]) -> dict[str, Any]:
    names = {"factor": "rope_factor", "original_max_position_embeddings": "original_seq_len"}
    if missing := [name for name in names if rope.get(name) is None]:
        raise InputError(f"config: yarn needs rope_scaling.{missing[0]}")
    names |= {"beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    data = {ours: value for theirs, ours in names.items() if (value := rope.pop(theirs, None)) is not None}
    mscale, mscale_all_dim = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    if mscale != mscale_all_dim or not mscale:
        raise InputError(
            f"config: rope_scaling has mscale {mscale!r} and mscale_all_dim {mscale_all_dim!r}; only equal, non-zero "
            "values are supported (others scale cos and sin)"
        )
    return data | {"mscale": mscale}


def _check_routing(hf: dict[str, Any], data: dict[str, Any]) -> None:
    """`topk_method` and `norm_topk_prob` must say what `score_func` implies (V3: bias and normalised weights)."""
    sigmoid = data["score_func"] == "sigmoid"
    method = hf.pop("topk_method", None)
    if method not in ((None, "noaux_tc") if sigmoid else (None, "greedy", "group_limited_greedy")):
        raise InputError(f"config: topk_method {method!r} contradicts scoring_func {data['score_func']!r}")
    if method == "greedy" or (method is None and not sigmoid):
        data["n_expert_groups"] = data["n_limited_groups"] = 1
    normalised = hf.pop("norm_topk_prob", None)
    if normalised not in (None, sigmoid):
        raise InputError(f"config: norm_topk_prob {normalised} contradicts scoring_func {data['score_func']!r}")


def _check_values(hf: dict[str, Any], data: dict[str, Any]) -> None:
    """Fields with the only values that this model computes. An absent field means the same."""
    nope, rope = data["qk_nope_head_dim"], data["qk_rope_head_dim"]
    allowed = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (False,),
        "moe_layer_freq": (1,),
        "rope_interleave": (True, None),
        "num_key_value_heads": (data["n_heads"], None),
        "head_dim": (rope, None),
        "qk_head_dim": (nope + rope if isinstance(nope, int) and isinstance(rope, int) else None, None),
    }
    for name, values in allowed.items():
        if name in hf and (found := hf.pop(name)) not in values:
            raise InputError(f"config: {name} is {found!r}; this model computes only {values[0]!r}")
