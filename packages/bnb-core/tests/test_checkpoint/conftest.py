"""Small checkpoints, written without transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def llama_tensors(layers: int = 2, hidden: int = 64, inner: int = 96, dtype: torch.dtype = torch.bfloat16):
    """Random weights that fit ``LLAMA_CONFIG``."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(0.05).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(50, hidden), "model.norm.weight": normal(hidden)}
    tensors["lm_head.weight"] = normal(50, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", hidden // 2, hidden),
            ("self_attn.v_proj", hidden // 2, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = normal(hidden)
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict, shards: int = 1) -> Path:
    """Write a checkpoint folder in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return folder


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a folder by relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in one file."""
    return write_checkpoint(tmp_path / "llama", llama_tensors(), LLAMA_CONFIG)


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a Llama checkpoint: layers, hidden, inner, dtype, shards, name."""

    def make(name: str = "llama", shards: int = 1, config: dict | None = None, **sizes) -> Path:
        changed = {"num_hidden_layers": sizes.get("layers", 2), "hidden_size": sizes.get("hidden", 64)}
        changed["intermediate_size"] = sizes.get("inner", 96)
        return write_checkpoint(
            tmp_path / name, llama_tensors(**sizes), LLAMA_CONFIG | changed | (config or {}), shards
        )

    return make


@pytest.fixture
def checkpoints():
    """The helpers of this file, which tests cannot import."""

    class Helpers:
        write = staticmethod(write_checkpoint)
        load = staticmethod(load_folder)
        contents = staticmethod(folder_bytes)
        tensors = staticmethod(llama_tensors)
        config = LLAMA_CONFIG

    return Helpers


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that transformers is not installed."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.checkpoint.architecture", None)
