"""Lengths from which on a model computes otherwise, where no document of an audit has them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn


def unreached(model: nn.Module, lengths: Sequence[int]) -> list[str]:
    """A sentence for each, with the lengths that would show it."""
    if "transformers" not in sys.modules:
        return []
    from packed_attn_patches.llama4 import scaling_layers
    from packed_attn_patches.rope import longest_alike, ropes_of

    frequencies = longest_alike(ropes_of(model))
    layers: tuple[Any, ...] = scaling_layers(model)
    scales = [int(layer.floor_scale) - 1 for layer in layers if layer.attn_temperature_tuning]
    found = {
        "its RoPE has other frequencies": frequencies,
        "its queries are scaled": min(scales, default=None),
    }
    return [
        f"{what} in documents of more than {limit} tokens, and the longest one here has "
        f"{max(lengths)}: audit with lengths of {limit + 1} and more besides"
        for what, limit in found.items()
        if limit is not None and max(lengths) <= limit
    ]
