"""Tiny random models of every accepted family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
WINDOW = {"sliding_window": 8}

# One entry per family with what is special about it; windows are short enough to matter.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, **WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, **WINDOW, "max_window_layers": 1},
    "qwen3_moe": EXPERTS,
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "gemma": {},
    "gemma2": {**WINDOW, "query_pre_attn_scalar": 16},
    "gemma3_text": {**WINDOW, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    "phi3": WINDOW,
    "gpt_oss": {**WINDOW, **EXPERTS},
    "olmo2": {},
    "granite": {},
    "smollm3": {},
}

# Families that run on documents batched by length.
UNPACKED: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "time_step_rank": 4, "expand": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4, "window_size": 8},
    "bart": {"decoder_layers": 2, "decoder_ffn_dim": 96, "d_model": 64, "dropout": 0.0},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of `family`."""
    return AutoConfig.for_model(
        family, **{**SMALL, **{**FAMILIES, **UNPACKED}.get(family, {}), **overrides}
    )


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of `family` in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    # transformers 5.17 takes sdpa for gemma2 and leaves its softcap out.
    implementation = "eager" if family == "gemma2" else None
    config = tiny_config(family, **overrides)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
