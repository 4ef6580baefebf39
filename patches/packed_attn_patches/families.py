"""Which model types are accepted, and the reason against every other model."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from packed_attn_patches.interface import NAMES

ACCEPTED = frozenset({"llama"})


def refusal(model: nn.Module) -> str | None:
    """Why `model` is not patched, as a sentence, or None when it is accepted."""
    if not isinstance(model, PreTrainedModel):
        return (
            "it is not a transformers PreTrainedModel; patch the model inside, before it is wrapped"
        )
    model_type = model.config.model_type
    if model_type not in ACCEPTED:
        return (
            f"model type {model_type!r} is not among those proven exact "
            f"({', '.join(sorted(ACCEPTED))})"
        )
    stock = model.config._attn_implementation
    if stock not in NAMES:
        return f"its attention implementation {stock!r} is not one of {', '.join(NAMES)}"
    return None
