"""Prompt and prefix tuning with PEFT: refused by name, whether it comes before a patch or after it.

Its learned tokens stand before a row and not before each document, and the wrapper keeps
position_ids from the model inside, or shifts them.
"""

from __future__ import annotations

import sys
from typing import Any


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
    So the callers are asked: a wrapper that came after the patch is one of them.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward":
            caller = frame.f_locals.get("self")
            if isinstance(caller, (peft.PeftModel, peft.PeftMixedModel)):
                refuse_learned_tokens(caller)
        frame = frame.f_back
