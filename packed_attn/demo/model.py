"""The demo's model: a Llama of a little over a million parameters with grouped queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

PAD_ID, END_ID = 0, 3  # places of <pad> and <end> in corpus.SPECIAL_TOKENS


def build_model(
    *,
    vocab_size: int,
    capacity: int,
    seed: int,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
) -> LlamaForCausalLM:
    """A randomly initialised model, float32 on the CPU; equal arguments give equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=capacity,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=END_ID,
        # Training needs no cache, and with one stock transformers does not see packed documents.
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model


def move(model: LlamaForCausalLM, device: torch.device) -> LlamaForCausalLM:
    """The same model, on `device`."""
    from torch import nn

    nn.Module.to(model, device)
    return model
