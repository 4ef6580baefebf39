"""The load-balancing loss of routers where a model runs on documents batched by length.

It is a statistic of all tokens of a batch, and no mean of those of smaller batches. So the head's
own function of it is called once, on the routers' logits of the whole pack put back in stream
order. In the batches themselves 0 stands in its place, and leaves the loss that is over targets.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.layout import DocumentLayout
from packed_attn_patches.forwards import with_names

_NAME = "load_balancing_loss_func"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class BalancingLoss:
    """Stands in the place of a head's load-balancing loss, and computes it over a whole pack.

    Args:
        forward: the function that runs a batch, given the model.
        stock: the function of its module that computes the loss.
    """

    def __init__(self, forward: Callable[..., Any], stock: Callable[..., Any]) -> None:
        self._stock = stock
        self._signature = inspect.signature(stock)
        self._asked: dict[str, Any] = {}
        self.function = with_names(forward, lambda _: {_NAME: self._none})

    @staticmethod
    def of(forward: Callable[..., Any], asked: bool) -> BalancingLoss | None:
        """That of a forward which is asked for routers' logits; None if it has no such loss."""
        inner: Any = inspect.unwrap(forward)
        if not asked or not isinstance(inner, FunctionType) or _NAME not in inner.__code__.co_names:
            return None
        return BalancingLoss(forward, inner.__globals__[_NAME])

    def _none(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = self._signature.bind(*args, **kwargs)
        logits = bound.arguments.pop("gate_logits")
        bound.arguments.pop("attention_mask", None)
        self._asked = dict(bound.arguments)
        return torch.zeros((), device=logits[0].device)

    def added(self, model: nn.Module, output: Any, layout: DocumentLayout) -> None:
        """Puts the loss over all real tokens into the output of a packed forward."""
        padding = layout.padding_tokens
        mask = None if padding is None else (~padding).long()[None]
        loss = self._stock(output.router_logits, **self._asked, attention_mask=mask)
        output["aux_loss"] = loss
        if output.get("loss") is not None:
            output["loss"] = output["loss"] + _coefficient(model) * loss.to(output["loss"].device)


def _coefficient(model: Any) -> float:
    """How much of it is part of the model's loss."""
    for place in (model, model.config, model.config.get_text_config()):
        for name in _COEFFICIENTS:
            if hasattr(place, name):
                return getattr(place, name)
    raise NotImplementedError(
        f"{type(model).__name__} does not say by which factor its routers' loss is part of its own "
        "(router_aux_loss_coef): set output_router_logits=False in a packed forward"
    )


def asks_for(model: nn.Module, kwargs: Mapping[str, Any], output: str) -> bool:
    """Whether a forward is to return attentions, or router_logits, of which a loss over the
    routers' choices of the whole batch is made."""
    asked = kwargs.get(f"output_{output}")
    config: Any = model.config
    return bool(getattr(config, f"output_{output}", False) if asked is None else asked)
