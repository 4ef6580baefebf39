"""The dtype that a model computes in, and how far roundings of that dtype carry.

Logits do not say it: autocast, accelerate and some heads return them in float32, computed in half
precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.audit.trace import floats

# Packed against alone, relative to the largest logit: rounding of one computation in two shapes.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}
HALF = (torch.float16, torch.bfloat16)


class Computed:
    """A context in which the dtypes of what all modules return are noted.

    Attributes:
        dtypes: of those that `TOLERANCE` knows.
    """

    def __init__(self, model: nn.Module) -> None:
        self.dtypes: set[torch.dtype] = set()
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Computed:
        self._handles = [m.register_forward_hook(self._note) for m in self._model.modules()]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.dtypes |= {x.dtype for x in floats(output)} & TOLERANCE.keys()

    def coarsest(self, output: Tensor) -> torch.dtype:
        """That of the largest rounding, the model's `output` included."""
        return max({output.dtype, *self.dtypes}, key=lambda dtype: torch.finfo(dtype).eps)
