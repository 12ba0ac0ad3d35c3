"""
A training save as a checkpoint in the format DeepSeek-V3 is released in: FP8 weights in 128 x 128 blocks with their
scales, bf16 elsewhere, Hugging Face names, tokenizer and configs.

    python tiny/export.py --run tiny/data/run --tokenizer tiny/data/tokenizer --out tiny/checkpoint

--bf16 writes the same weights unquantised, to compare with.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

import torch
from safetensors.torch import load_file

from checkpoint import tensor_specs
from config import ModelArgs, read_json
from errors import Arguments, InputError, run_command
from kernel import E4M3, weight_quant
from model import Transformer
from safetensors_io import Layout, SafetensorsWriter
from text import load_tokenizer

CONFIG = Path(__file__).with_name("config.json")
# What the tokenizer's ids 0 and 1 are; sampling defaults as the released models have them.
GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.2}


def released(args: ModelArgs, model: Transformer) -> dict[str, torch.Tensor]:
    """The tensors of a release from a model's parameters: by HF's names, in the specs' types."""
    weights = model.weights()
    out: dict[str, torch.Tensor] = {}
    for spec in tensor_specs(args).values():
        if spec.is_scale:
            continue  # made with its weight
        weight = weights[spec.name].detach().reshape(spec.shape)  # which may be a view of several
        if spec.dtype == E4M3:
            out[spec.hf_name], out[spec.hf_name + "_scale_inv"] = weight_quant(weight.float(), args.scale_fmt)
        else:
            # The router is kept in fp32 by the model, and released in bf16 but for its bias.
            wide = spec.name.endswith("gate.bias") or args.dtype == "fp32"
            out[spec.hf_name] = weight.to(torch.float32 if wide else torch.bfloat16).contiguous()
    for i in range(args.n_layers, args.n_layers + args.n_mtp_layers):
        out[f"model.layers.{i}.embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
        out[f"model.layers.{i}.shared_head.head.weight"] = out["lm_head.weight"].clone()
    return out


def main() -> None:
    parser = Arguments(description="Write a training save as an FP8 Hugging Face checkpoint.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of tiny/train.py's saves")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE")
    parser.add_argument("--bf16", action="store_true", help="do not quantise")
    options = parser.parse_args()
    state = options.run / "state.safetensors"
    if not state.is_file():
        raise InputError(f"{state}: no such file; tiny/train.py writes it")
    load_tokenizer(options.tokenizer)
    config = read_json(options.config)
    if options.bf16:
        del config["quantization_config"]
    args = ModelArgs.from_hf(config)
    model = Transformer(replace(args, dtype="fp32", scale_fmt=None))
    model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in load_file(state).items() if name.startswith("model.")}
    )
    options.out.mkdir(parents=True, exist_ok=True)
    tensors = released(args, model)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(options.out / "model.safetensors", Layout(layout), {}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.tokenizer / name, options.out / name)
    (options.out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    (options.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
