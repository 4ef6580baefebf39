"""Which model types are accepted and by which route, and the reason against every other model."""

from __future__ import annotations

from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from packed_attn_patches.interface import NAMES


class Route(Enum):
    """How a model is made exact."""

    INTERFACE = "its attention layers take the layout"
    UNPACK_CAUSAL = "it runs on documents batched by length, right-padded"
    UNPACK = "it runs on documents batched by equal length"


# Proven exact through the attention interface.
INTERFACE = frozenset({"llama"})
# Proven exact unpacked: outputs never depend on later tokens, so right padding reaches nothing.
UNPACK_CAUSAL = frozenset({"mamba", "bloom", "gpt_neo", "bart"})


def route(model: nn.Module, on_unknown: str) -> Route:
    """How to make `model` exact.

    Raises:
        NotImplementedError: it is not known to be exact, with the reason and the ways out.
    """
    if not isinstance(model, PreTrainedModel):
        raise _refused(
            model, "it is not a transformers PreTrainedModel; patch the model inside its wrapper"
        )
    model_type = model.config.model_type
    if model_type in INTERFACE:
        stock = model.config._attn_implementation
        if stock not in NAMES:
            known = ", ".join(NAMES)
            raise _refused(model, f"its attention implementation {stock!r} is not one of {known}")
        return Route.INTERFACE
    if model_type in UNPACK_CAUSAL:
        return Route.UNPACK_CAUSAL
    if on_unknown == "unpack":
        return Route.UNPACK
    raise _refused(
        model,
        f"model type {model_type!r} is not among those proven exact. on_unknown='unpack' runs it "
        "on documents batched by equal length, exact and slower; audit(model) shows what leaks",
    )


def _refused(model: nn.Module, reason: str) -> NotImplementedError:
    return NotImplementedError(f"patch_model refuses {type(model).__name__}: {reason}")
