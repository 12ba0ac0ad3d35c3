"""ModelArgs: what is read from each kind of config, and that nothing which changes the model is read past."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import DeepseekV3Config, FineGrainedFP8Config

from checkpoints import COMMON, KINDS, hf_config
from config import ModelArgs, read_json
from errors import InputError

CONFIGS = Path(__file__).parent.parent / "configs"

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# The fields of the released config.json files that say something about the model.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "ep_size": 1,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V3_1 = V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}
V2 = {name: V3[name] for name in V3 if name not in ("quantization_config", "num_nextn_predict_layers", "ep_size")} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "pretraining_tp": 1,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "use_cache": True,
    "vocab_size": 102400,
}
V2_LITE = V2 | {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_scaling": YARN | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "unsloth_fixed": True,
    "vocab_size": 163840,
}
MOONLIGHT = {name: KIMI_K2[name] for name in KIMI_K2 if name not in ("rope_scaling", "quantization_config")} | {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "routed_scaling_factor": 2.446,
}


@pytest.mark.parametrize(
    ("name", "released"),
    [("671B", V3), ("v3.1", V3_1), ("236B", V2), ("16B", V2_LITE)],
    ids=["V3", "V3.1", "V2", "V2-Lite"],
)
def test_shipped_configs_are_the_released_ones(name, released):
    """Except for max_seq_len: ours bounds the cache to what fits beside the weights, the released field is 163840."""
    shipped, theirs = ModelArgs.load(CONFIGS / f"config_{name}.json"), ModelArgs.from_hf(released)
    assert theirs.max_seq_len == 163840
    assert shipped == replace(theirs, max_seq_len=shipped.max_seq_len)


def test_every_shipped_config_is_checked_against_a_released_one():
    assert len(list(CONFIGS.glob("*.json"))) == 4


def test_other_models_of_the_class():
    kimi = ModelArgs.from_hf(KIMI_K2)
    assert (kimi.n_routed_experts, kimi.n_heads, kimi.n_expert_groups, kimi.n_limited_groups) == (384, 64, 1, 1)
    assert (kimi.rope_factor, kimi.rope_theta, kimi.beta_fast, kimi.dtype) == (32, 50000, 1, "fp8")
    moonlight = ModelArgs.from_hf(MOONLIGHT)
    assert (moonlight.q_lora_rank, moonlight.score_func, moonlight.dtype) == (0, "sigmoid", "bf16")
    assert (moonlight.norm_eps, moonlight.rope_factor, moonlight.route_scale) == (1e-5, 1.0, 2.446)
    renamed_mtp = {name: V3[name] for name in V3 if name != "num_nextn_predict_layers"} | {"num_mtp_layers": 2}
    assert ModelArgs.from_hf(renamed_mtp).n_mtp_layers == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("yarn", [True, False])
def test_config_saved_by_transformers(tmp_path, kind, yarn):
    config = COMMON | KINDS[kind] | ({} if yarn else {"rope_scaling": None})
    hf_config(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_theta" not in saved and "torch_dtype" not in saved
    assert ModelArgs.from_hf(tmp_path / "config.json") == ModelArgs.from_hf(config)


def test_config_class_of_transformers(tmp_path):
    DeepseekV3Config(rope_parameters=YARN | {"rope_theta": 12345.0}, rms_norm_eps=1e-5).save_pretrained(tmp_path)
    args = ModelArgs.load(tmp_path / "config.json")
    assert args == replace(
        ModelArgs.from_hf(V3),
        dtype="bf16",
        max_seq_len=4096,
        n_mtp_layers=args.n_mtp_layers,
        norm_eps=1e-5,
        rope_theta=12345.0,
    )


def test_own_json_round_trip(tmp_path):
    args = ModelArgs.from_hf(V3_1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(asdict(args)))
    assert ModelArgs.load(path) == args
    path.write_text(json.dumps(V3_1))
    assert ModelArgs.load(path) == args


def test_the_fp8_config_that_transformers_writes(tmp_path):
    config = DeepseekV3Config(**without(V3_1, "quantization_config", "auto_map", "architectures", "model_type"))
    config.architectures = V3_1["architectures"]
    config.quantization_config = FineGrainedFP8Config(weight_block_size=(128, 128)).to_dict()
    config.save_pretrained(tmp_path)
    args = ModelArgs.from_hf(tmp_path / "config.json")
    assert (args.dtype, args.scale_fmt) == ("fp8", None)


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        # What this model does not compute.
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"head_dim": 128}, "head_dim"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"torch_dtype": "float16"}, "torch_dtype"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "linear"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 0.707}}, "mscale_all_dim"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "weight_block_size"),
        ({"quantization_config": FP8 | {"quant_method": "awq"}}, "quant_method"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme"),
        ({"quantization_config": FP8 | {"scale_fmt": "e8m3"}}, "scale_fmt"),
        ({"quantization_config": FP8 | {"zero_point": True}}, "zero_point"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, wanted a number from"),
        ({"max_position_embeddings": 1}, "max_position_embeddings is 1, wanted an integer of at least 2, below 2"),
        # Contradictions.
        ({"topk_method": "group_limited_greedy"}, "topk_method"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"scoring_func": "softmax"}, "topk_method"),
        ({"model_type": "deepseek_v2"}, "model_type"),
        ({"dtype": "float32"}, "dtype"),
        ({"num_mtp_layers": 3}, "num_mtp_layers"),
        ({"rope_parameters": YARN | {"rope_theta": 5e5}}, "rope_theta"),
        ({"rope_parameters": YARN | {"factor": 99}}, "rope_parameters = .*99.* contradict"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast"),
        ({"quantization_config": FP8 | {"dequantize": True}}, "dequantize"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok"),  # 4 of 8 groups of 32 hold 128
        ({"n_routed_experts": 252}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"n_routed_experts": 8, "num_experts_per_tok": 2}, "n_group"),  # a sigmoid group is scored by its two best
        # Unknown fields and wrong types or values of known ones.
        ({"sliding_window": 4096}, "sliding_window"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"num_hidden_layers": "61"}, "num_hidden_layers"),
        ({"num_hidden_layers": 3.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": -7168}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": [7168]}, "hidden_size"),
        ({"n_group": 0}, "n_group"),
        ({"n_group": ""}, "n_group"),
        ({"q_lora_rank": False}, "q_lora_rank"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": YARN | {"beta_fast": 1e308}}, "beta_fast"),
        ({"rope_scaling": YARN | {"beta_slow": 1e-320}}, "beta_slow"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"factor": "40"}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}}, "beta_slow"),
        ({"rope_scaling": without(YARN, "factor")}, "rope_scaling.factor"),
        ({"rope_scaling": without(YARN, "mscale")}, "mscale"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 4096.5}}, "original_max_position_embeddings"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"quantization_config": without(FP8, "weight_block_size")}, "weight_block_size"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype"),
        ({"architectures": "DeepseekV3ForCausalLM"}, "architecture"),
        ({"architectures": [["DeepseekV3ForCausalLM"]]}, "architecture"),
        ({"model_type": {}}, "model_type"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_hf_field_refused_by_name(change, named):
    with pytest.raises(InputError, match=rf"^config: .*\b{named}\b"):
        ModelArgs.from_hf(V3 | change)


@pytest.mark.parametrize("change", [{"norm_topk_prob": True}, {"topk_method": "noaux_tc"}])
def test_softmax_gate_refuses_what_sigmoid_implies(change):
    with pytest.raises(InputError, match=next(iter(change))):
        ModelArgs.from_hf(V2 | change)


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "n_routed_experts", "max_position_embeddings"])
def test_missing_hf_field(name):
    with pytest.raises(InputError, match=f"no '{name}'"):
        ModelArgs.from_hf(without(V3, name))


@pytest.mark.parametrize("source", [{"architectures": ["LlamaForCausalLM"]}, {"model_type": "llama"}, {}])
def test_unsupported_architecture_lists_the_supported(source):
    with pytest.raises(InputError, match="DeepseekV2ForCausalLM, DeepseekV3ForCausalLM") as caught:
        ModelArgs.from_hf(source | {"hidden_size": 4096})
    assert not source or "lama" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 7168}, "hidden_size"),
        ({"dim": "7168"}, "dim"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "bf16"}, "scale_fmt"),
        ({"scale_fmt": True}, "scale_fmt"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"n_activated_experts": 129}, "n_activated_experts"),
    ],
    ids=str,
)
def test_own_field_refused_by_name(change, named):
    own = asdict(ModelArgs.from_hf(V3_1))
    with pytest.raises(InputError, match=rf"^config: .*\b{named}\b"):
        ModelArgs.from_dict(own | change)
    with pytest.raises(InputError, match="no 'n_heads'"):
        ModelArgs.from_dict(without(own, "n_heads"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[1, 2]", "list"),
        (b"{", "JSON"),
        (b"", "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b'{"dim": 1' + b"0" * 5000 + b"}", "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
    ids=["list", "cut", "empty", "not text", "long number", "deep"],
)
def test_not_a_config_file(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(InputError, match=said) as caught:
        ModelArgs.load(path)
    assert str(path) in str(caught.value)


def test_no_config_file(tmp_path):
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            read_json(path)


def test_a_number_without_a_point_is_a_float_where_one_belongs():
    args = ModelArgs.from_hf(V3_1 | {"routed_scaling_factor": 10**25, "rope_theta": 10000})
    assert (type(args.route_scale), type(args.rope_theta)) == (float, float) and args.route_scale == 1e25
