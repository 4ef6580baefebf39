"""Routers held fixed, where scores within a rounding would send a token to other experts.

A router's choice of experts is no continuous function. In half precision two scores are often
within a rounding, so that a document may be sent elsewhere in a pack than alone, and its logits
move by more than any bound on rounding allows for. With the choice held, what moves is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from packed_attn.audit.embeddings import token_embeddings
from packed_attn.audit.gradients import largest


class HeldRouting:
    """A context in which the experts of a token are a function of its id.

    A forward embeds its tokens before it routes them, in the same order. Checkpointing routes them
    a second time in the backward, by scores that are those of the first up to a rounding.

    Attributes:
        experts: how many a router may choose from, by the model's config; empty where there are
            none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tables = token_embeddings(model)
        self.experts = _numbers_of_experts(model)
        self.ids = torch.empty(0)
        self.chosen: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> None:
        self.chosen.clear()
        self.undo = ExitStack()
        for table in self.tables:
            handle = table.register_forward_hook(self._note, with_kwargs=True)
            self.undo.callback(handle.remove)
        stock = torch.topk

        def topk(*args: Any, **kwargs: Any) -> Any:
            return self._topk(stock, *args, **kwargs)

        for owner in (torch, Tensor):
            self.undo.enter_context(patch.object(owner, "topk", topk))

    def __exit__(self, *exception: Any) -> None:
        self.undo.close()

    def __deepcopy__(self, memo: Any) -> HeldRouting:
        return self  # one for a model and its copy in float32

    def _note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.ids = (args[0] if args else next(iter(kwargs.values()))).flatten()

    def _topk(
        self, stock: Callable[..., Any], scores: Tensor, k: int, dim: int = -1, **options: Any
    ) -> Any:
        """Of the experts' scores for each token those of its id, of anything else the largest."""
        width = scores.shape[-1]
        of_experts = width in self.experts and k < width and dim % scores.ndim == scores.ndim - 1
        again = torch._C._current_graph_task_id() != -1
        before = [(x, i) for x, i in self.chosen if x.shape == scores.shape and i.shape[1] == k]
        if of_experts and again and before:
            index = min(before, key=lambda b: largest(b[0] - scores.detach()))[1]
        elif of_experts and not again and scores.numel() == self.ids.numel() * width:
            index = (self.ids[:, None] + torch.arange(k, device=self.ids.device)) % width
            self.chosen.append((scores.detach(), index))
        else:
            return stock(scores, k, dim, **options)
        index = index.view(*scores.shape[:-1], k)
        return torch.return_types.topk((scores.gather(-1, index), index))  # type: ignore[call-arg]


def _numbers_of_experts(model: nn.Module) -> set[int]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return set()
    config = config.get_text_config()
    found = {n: v for n, v in vars(config).items() if "expert" in n and type(v) is int and v > 1}
    return {*found.values(), sum(found.values()) if "zero_expert_num" in found else 0} - {0}
