"""PEFT's adapters that look at a row: refused by name, before a patch or after it.

Learned tokens of prompt and prefix tuning stand before a row and not before each document, and the
wrapper keeps position_ids from the model inside, or shifts them. A few adapters mix the tokens of a
row, and some are told a name, a task or a scale for each row, which is lost where documents run in
other rows. All others work on each token by itself.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

# By PEFT's name of the kind: what a packed forward would mix.
_MIXING = {
    "LILY": "weighs its experts by a mean over all tokens of a forward",
    "SHADOW": "runs a network beside the model, which is not told where documents end",
}
_INVOKED = "is switched on from its invocation tokens to the end of a row (aLoRA)"
# What it is told of each row: exact where a pack's rows stay as they are.
_BY_ROW = {"POLY": "its task_ids", "XLORA": "its scales"}


def refuse_learned_tokens(peft_model: Any) -> None:
    """Raises a NotImplementedError where an adapter of a `PeftModel` learns tokens."""
    for name, config in peft_model.peft_config.items():
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"patch_model refuses {type(peft_model).__name__}: its adapter {name!r} is "
                f"{config.peft_type.value}, which puts learned tokens before a row and not before "
                "each document, and drops position_ids; use LoRA, or unpatch_model(model) and "
                "batches without packing"
            )


def refuse_calls_with_learned_tokens() -> None:
    """Raises where the forward that is running was called by a wrapper that learns tokens.

    PEFT tells the model inside nothing of its wrapper, and drops what would tell documents apart.
    """
    for caller in _wrappers_around():
        refuse_learned_tokens(caller)


def _wrappers_around() -> list[Any]:
    """PEFT's wrappers that the forward that is running was called by, the inmost first: one that
    came after the patch is known by nothing else."""
    peft: Any = sys.modules.get("peft")
    found: list[Any] = []
    if peft is None or torch.compiler.is_compiling():
        return found
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            caller = frame.f_locals.get("self")
            if isinstance(caller, (peft.PeftModel, peft.PeftMixedModel)):
                found.append(caller)
        frame = frame.f_back
    return found


def refuse_adapters(model: nn.Module, *, same_rows: bool) -> None:
    """Raises a NotImplementedError where an adapter of `model` would mix documents.

    Args:
        model: PEFT writes the configs of its adapters on it; of a model inside it, which may be
            called past it, they are those of the wrapper that is running.
        same_rows: whether it runs on the rows that PEFT was given.
    """
    owner = model if hasattr(model, "peft_config") else next(iter(_wrappers_around()), None)
    adapters: Any = getattr(owner, "peft_config", None)
    if not isinstance(adapters, dict):
        return
    for name, config in adapters.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        reason = _MIXING.get(kind)
        if getattr(config, "alora_invocation_tokens", None):
            reason = _INVOKED
        if reason is not None:
            raise NotImplementedError(
                f"a packed forward of {type(model).__name__} refuses its adapter {name!r}, which "
                f"{reason}; use LoRA, or padded rows without packing"
            )
        by_row = _BY_ROW.get(kind)
        if by_row is not None and not same_rows:
            raise NotImplementedError(_other_rows(model, f"adapter {name!r} has {by_row}"))
    if not same_rows and not model.training and _has_names(model):
        raise NotImplementedError(_other_rows(model, "adapters have adapter_names"))


def _other_rows(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__} runs documents in other rows than it is given, while its {what} "
        "for each row: use rows without packing, and no padding_free=True"
    )


def _has_names(model: nn.Module) -> bool:
    """Whether PEFT was given adapter_names, which it hands to its layers by hooks."""
    if torch.compiler.is_compiling():
        return False
    return any(
        "adapter_names" in getattr(hook, "keywords", ())
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
