"""Llama 4's layers without RoPE scale queries by their place in the row: here, in the document.

The scale (Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025) is 1 up to `floor_scale`
tokens, 8192, so that a pack must be longer before a document is scaled for its neighbours' length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.layout import DocumentLayout
from packed_attn_patches.forwards import ModuleForward


def scaling_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The attention layers that count places in the row."""
    return tuple(
        module
        for module in model.modules()
        if hasattr(module, "floor_scale") and not getattr(module, "use_rope", True)
    )


class ScalingForward(ModuleForward):
    """The forward of such a layer; set as the instance's `forward`."""

    def __call__(self, *args: Any, layout: DocumentLayout | None = None, **kwargs: Any) -> Any:
        if layout is None:
            return self.function(self.module, *args, **kwargs)
        if not self.module.attn_temperature_tuning:
            return self.function(self.module, *args, layout=layout, **kwargs)
        scale = _scale(layout, self.module)
        unscaled = _View(self.module, attn_temperature_tuning=False)
        return self.function(
            unscaled, *args, layout=layout, packed_attn_query_scale=scale, **kwargs
        )


def _scale(layout: DocumentLayout, module: Any) -> Tensor:
    """float32 `[total_tokens]`, in the terms of the model's own code."""
    count = layout.position_ids.float() + 1.0
    return torch.log1p(torch.floor(count / module.floor_scale)) * module.attn_scale + 1.0


class _View:
    """A module with some attributes of another value, for one call; the module keeps its own."""

    def __init__(self, module: nn.Module, **values: Any) -> None:
        self.__dict__.update(values, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)
