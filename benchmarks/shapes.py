"""Models of published shapes with random weights: speed and memory ask for no more."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

END, PADDING = 2, 0
"""Ids of the quickstart's tokenizer, which all of them are used with."""
_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": PADDING}

SHAPES: dict[str, tuple[type[Any], Any]] = {
    "tiny": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=1024,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **_TOKENS,
        ),
    ),
    "SmolLM2-135M": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **_TOKENS,
        ),
    ),
    "1.5B": (  # Qwen2.5-1.5B
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            **_TOKENS,
        ),
    ),
}


def random_model(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model of one of `SHAPES`, the same whenever it is asked for on one machine."""
    family, config = SHAPES[shape]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = family(config)
    model.config.name_or_path = shape
    return model.to(dtype).eval()
