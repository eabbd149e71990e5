"""Make a Hugging Face folder, which vLLM serves, out of a GGUF of a small Llama.

A script, run with the Python of the engine's environment: nothing here imports orla_lg, and what it imports
inside its functions is only there. With ``--shape`` it writes a made-up heavier model instead: configuration
and tokenizer without weights, to be served with weights of noise where only the time matters.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["SHAPES", "ModelShape", "main"]

FLOAT = "bfloat16"
SPECIAL = 3  # a GGUF's type of tokens such as <|im_start|>


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The size of a made-up Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


SHAPES = {
    "dummy-0.5b": ModelShape(1024, 4096, 26, 16, 4),
    "dummy-1b": ModelShape(2048, 8192, 16, 32, 8),
}

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder whole or not at all; exit status 1 and a line on stderr if the GGUF is another kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    args = parser.parse_args(argv)
    staging = Path(tempfile.mkdtemp(prefix=f"{args.folder.name}.converting-", dir=args.folder.parent))
    try:
        convert(args.gguf, staging, SHAPES.get(args.shape))
        staging.chmod(0o755)
        staging.rename(args.folder)
    except ValueError as exc:
        print(exc, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return 0


def convert(path: Path, folder: Path, shape: ModelShape | None) -> None:
    """Fill *folder* from the GGUF at *path*."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    values = {key: field.contents() for key, field in reader.fields.items()}
    kind = (values.get("general.architecture"), values.get("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ValueError(f"{path} has architecture and tokenizer {kind}; only ('llama', 'smollm') can be converted")
    config = configuration(values, shape)
    _write_json(folder / "config.json", config)
    ends = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(folder / "generation_config.json", {key: config[key] for key in ends})
    _write_tokenizer(values, folder)
    if shape is None:
        _write_weights(reader.tensors, config, folder)


def configuration(values: Mapping[str, Any], shape: ModelShape | None) -> dict[str, Any]:
    """Return what belongs into ``config.json``."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": values["tokenizer.ggml.bos_token_id"],
        "eos_token_id": values["tokenizer.ggml.eos_token_id"],
        "pad_token_id": values["tokenizer.ggml.padding_token_id"],
        "hidden_size": values["llama.embedding_length"],
        "intermediate_size": values["llama.feed_forward_length"],
        "num_hidden_layers": values["llama.block_count"],
        "num_attention_heads": values["llama.attention.head_count"],
        "num_key_value_heads": values["llama.attention.head_count_kv"],
        "max_position_embeddings": values["llama.context_length"],
        "rms_norm_eps": round(float(values["llama.attention.layer_norm_rms_epsilon"]), 9),
        "rope_theta": float(values["llama.rope.freq_base"]),
        "vocab_size": values["llama.vocab_size"],
        "tie_word_embeddings": True,
        "torch_dtype": FLOAT,
    }
    if shape is not None:
        config |= {field: getattr(shape, field) for field in ModelShape.__slots__}
    return {**config, "head_dim": config["hidden_size"] // config["num_attention_heads"]}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


# The tokenizer: BPE over bytes, digits one by one ----------------------------------------------------------


def _write_tokenizer(values: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ", 1)) for pair in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    template = values["tokenizer.chat_template"]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{field: tokens[values[f"tokenizer.ggml.{name}_token_id"]] for field, name in names.items()},
            "model_max_length": values["llama.context_length"],
            "chat_template": template,
        },
    )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


# The weights ----------------------------------------------------------------------------------------------


def _write_weights(tensors: Sequence[Any], config: Mapping[str, Any], folder: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tensors:
        size = [int(count) for count in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).astype("float32").reshape(size)
        role = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if role in heads:
            values = unpermute(values, heads[role])
        weights[weight_name(tensor.name)] = torch.tensor(values).to(getattr(torch, FLOAT))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})


def weight_name(name: str) -> str:
    """Return the name that Transformers has for a GGUF's tensor."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{MODULES[parts[2]]}.weight"
    return f"{OUTSIDE_LAYERS[parts[0]]}.weight"


def unpermute(values: Any, heads: int) -> Any:
    """Undo GGUF's order of a head's rows, which interleaves the two halves that the rotation pairs up."""
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


if __name__ == "__main__":
    sys.exit(main())
