"""
Tiny random Hugging Face checkpoints, and transformers' own model of each as the oracle.

Nothing here uses the code under test: modules and tensor names come from transformers, FP8 blocks are computed in plain
torch, files are written with safetensors' own functions. No two sizes in a config are equal unless the model's class
ties them, so a swapped pair cannot go unnoticed.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer

# Operations this small are slower on two threads than on one, and much slower on cores that others use too.
torch.set_num_threads(1)

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "a mixture of experts answers the question",
    "one two three",
]

# Eight heads over two ranks leave every quantised weight on 128-wide boundaries, so the FP8 variants split by 2.
COMMON: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "kv_lora_rank": 128,
    "max_position_embeddings": 2560,
    "moe_intermediate_size": 256,
    "moe_layer_freq": 1,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "q_lora_rank": 640,
    "qk_nope_head_dim": 96,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 520,
}
KINDS: dict[str, dict[str, Any]] = {
    "v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "n_group": 4,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 5,
        "num_nextn_predict_layers": 0,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    },
    "v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "aux_loss_alpha": 0.001,
        "n_group": 4,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 16.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
    },
    "v2lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "aux_loss_alpha": 0.001,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "q_lora_rank": None,
        "rope_scaling": COMMON["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "topk_group": 1,
        "topk_method": "greedy",
    },
}

# As little as still has MTP, groups, a bias, unaligned edge blocks, and splits over two ranks.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 256,
    "n_group": 2,
    "n_routed_experts": 4,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "topk_group": 1,
    "v_head_dim": 128,
    "vocab_size": 328,
}


def make_hf(
    folder: str | Path,
    kind: str,
    dtype: str = "fp32",
    *,
    mtp: int = 0,
    yarn: bool = True,
    scale_fmt: str | None = None,
    shards: int = 1,
    style: str = "released",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """
    Write a checkpoint of `kind` ("v3", "v2", "v2lite") as `dtype` ("fp32", "bf16", "fp8") and return its folder.

    `mtp` appends MTP layers (v3 only), `shards` > 1 writes an index, `style` "transformers" writes config.json
    as transformers saves it instead of as DeepSeek released it, `overrides` replace fields of the released config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = COMMON | KINDS[kind] | overrides
    if mtp:
        config["num_nextn_predict_layers"] = mtp
    if not yarn:
        config["rope_scaling"] = None
    config["torch_dtype"] = "float32" if dtype == "fp32" else "bfloat16"
    state = random_state(config, mtp, seed)
    if dtype != "fp32":
        # The released files keep the correction bias in fp32.
        state = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in state.items()}
    if dtype == "fp8":
        state = quantise(state, scale_fmt)
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        } | ({"scale_fmt": scale_fmt} if scale_fmt else {})
    write_weights(folder, state, shards)
    if style == "transformers":
        hf_config(config).save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2))
    write_tokenizer(folder)
    return folder


def hf_config(config: dict[str, Any]) -> Any:
    """transformers' own config object for the contents of a config.json."""
    config = copy.deepcopy(config)  # transformers adds to the nested dicts
    return AutoConfig.for_model(config.pop("model_type"), **config)


def random_state(config: dict[str, Any], mtp: int, seed: int) -> dict[str, torch.Tensor]:
    """fp32 tensors under their released names, wide enough that routing and logits vary strongly with the input."""
    hf = hf_config(config)
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32)
    state = dict(model.state_dict())
    dim, vocab = hf.hidden_size, hf.vocab_size
    for i in range(mtp):
        name = f"model.layers.{hf.num_hidden_layers + i}."
        block = DeepseekV3DecoderLayer(hf, hf.num_hidden_layers)  # any MoE layer's number
        state |= {name + key: value for key, value in block.state_dict().items()}
        state |= {name + f"{norm}.weight": torch.empty(dim) for norm in ("enorm", "hnorm", "shared_head.norm")}
        state[name + "eh_proj.weight"] = torch.empty(dim, 2 * dim)
    state = {name: value.contiguous() for key, tensor in state.items() for name, value in unstack(key, tensor)}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(state.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            state[name] = 0.3 * noise if name.endswith("correction_bias") else 1 + 0.2 * noise
        else:
            state[name] = noise * (0.5 if "embed_tokens" in name else 0.1 if "mlp.gate." in name else 0.06)
    for i in range(mtp):
        name = f"model.layers.{hf.num_hidden_layers + i}."
        state[name + "embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        state[name + "shared_head.head.weight"] = state["lm_head.weight"].clone()
    assert state["lm_head.weight"].shape == (vocab, dim)
    return state


def unstack(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """transformers holds experts as [E, 2 * inter, dim] and [E, dim, inter]; files hold one tensor per expert."""
    if name.endswith("experts.gate_up_proj"):
        base = name.removesuffix("gate_up_proj")
        half = tensor.shape[1] // 2
        return [
            (f"{base}{i}.{part}.weight", rows)
            for i, both in enumerate(tensor)
            for part, rows in (("gate_proj", both[:half]), ("up_proj", both[half:]))
        ]
    if name.endswith("experts.down_proj"):
        base = name.removesuffix("down_proj")
        return [(f"{base}{i}.down_proj.weight", weight) for i, weight in enumerate(tensor)]
    return [(name, tensor)]


def is_quantised(name: str) -> bool:
    """Whether the released FP8 checkpoints hold this tensor in e4m3."""
    linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
    return linear and not name.endswith("eh_proj.weight")


def quantise(state: dict[str, torch.Tensor], scale_fmt: str | None = None) -> dict[str, torch.Tensor]:
    """Every linear weight in e4m3 with the scale of each 128 x 128 block (edge blocks as if padded with zeros)."""
    out = {}
    for name, tensor in state.items():
        if not is_quantised(name):
            out[name] = tensor
            continue
        blocks = to_blocks(tensor.float())  # [rows, columns, 128, 128]
        scale = blocks.abs().amax((2, 3)).clamp(min=1e-12) / 448
        if scale_fmt == "ue8m0":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        codes = (blocks / scale[:, :, None, None]).clamp(-448, 448)
        out[name] = from_blocks(codes, tensor.shape).to(torch.float8_e4m3fn)
        out[name + "_scale_inv"] = scale
    return out


def dequantise(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Every e4m3 weight times its scale, multiplied in float64 and rounded once to `dtype`; scales dropped."""
    out = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = state[name + "_scale_inv"].double()[:, :, None, None]
            tensor = from_blocks(to_blocks(tensor.double()) * scale, tensor.shape).to(dtype)
        if not name.endswith("_scale_inv"):
            out[name] = tensor
    return out


def to_blocks(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N / 128), ceil(K / 128), 128, 128], edges padded with zeros."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    padded = weight.new_zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return padded.view(rows, 128, columns, 128).transpose(1, 2)


def from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    whole = blocks.transpose(1, 2).reshape(blocks.shape[0] * 128, blocks.shape[1] * 128)
    return whole[: shape[0], : shape[1]].contiguous()


def write_weights(folder: Path, state: dict[str, torch.Tensor], shards: int = 1) -> None:
    """One file, or `shards` files dealt in turn (so a weight and its scale lie in different ones) and an index."""
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files: dict[str, dict[str, torch.Tensor]] = {}
    for i, name in enumerate(sorted(state)):
        files.setdefault(f"model-{i % shards + 1:05}-of-{shards:06}.safetensors", {})[name] = state[name]
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, as stored."""
    state = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(file)
    return state


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit: NaN and -0.0 count, unlike in torch.equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with DeepSeek's special tokens, its chat template and a generation config."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2560,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def oracle(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a checkpoint in `dtype`, FP8 weights dequantised in float64; MTP layers left out."""
    config = json.loads((Path(folder) / "config.json").read_text())
    config.pop("quantization_config", None)
    hf = hf_config(config)
    state = {
        name: tensor if name.endswith("correction_bias") else tensor.to(dtype)
        for name, tensor in dequantise(read_weights(folder), dtype).items()
        if layer_number(name) < hf.num_hidden_layers
    }
    model_class = type(AutoModelForCausalLM.from_config(hf))
    model, info = model_class.from_pretrained(
        None, config=hf, state_dict=state, dtype=dtype, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def layer_number(name: str) -> int:
    """The layer a tensor belongs to by its released name, -1 outside the layers."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else -1


def mtp_oracle(folder: str | Path, main_model: Any) -> Any:
    """transformers' MtpModel of a v3 checkpoint made with `mtp=N`, on top of `oracle(folder)`. Not for FP8 folders."""
    main_model.config.name_or_path = str(folder)
    # The library finds MTP tensors by this pattern, which names the released model's layer.
    layers = range(main_model.config.num_hidden_layers, main_model.config.num_hidden_layers + 8)
    main_model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{n}\..*" for n in layers]
    return MtpModel.from_pretrained(main_model).eval()
