"""The input embeddings of a model: as autograd leaves, or poisoned, for the tokens of one document.

A forward may embed its tokens in several calls and any order, so tokens are known by their ids,
which no two documents of an audit share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Embeddings:
    """A context in which embeddings are autograd leaves, and those of some token ids a value.

    Args:
        model: the model whose input embeddings are watched.
        poison: (ids, value) of the tokens whose embeddings become `value`.

    Raises (on leaving):
        NotImplementedError: the model embedded no token through its input embeddings.
    """

    def __init__(self, model: nn.Module, poison: tuple[Tensor, float] | None = None) -> None:
        self._model = model
        self._modules = token_embeddings(model)
        self._poison = poison
        self._calls: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> Embeddings:
        self._handles = [
            module.register_forward_hook(self._replace, with_kwargs=True)
            for module in self._modules
        ]
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None and not self._calls:
            raise NotImplementedError(
                f"{type(self._model).__name__} does not call its input embeddings "
                f"({type(self._modules[0]).__name__}): an audit cannot follow its tokens"
            )

    def gradients(self, loss: Tensor, *, retain_graph: bool = False) -> list[tuple[Tensor, Tensor]]:
        """(ids, gradient) of each embedding call that the loss depends on."""
        gradients = torch.autograd.grad(
            loss,
            [leaf for _, leaf in self._calls],
            allow_unused=True,
            retain_graph=retain_graph,
        )
        return [(ids, g) for (ids, _), g in zip(self._calls, gradients) if g is not None]

    def _replace(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        ids = args[0] if args else next(iter(kwargs.values()))
        leaf = output.detach().clone()
        if self._poison is not None:
            poisoned, value = self._poison
            leaf[torch.isin(ids, poisoned)] = value
        leaf.requires_grad_(torch.is_grad_enabled())
        self._calls.append((ids, leaf))
        return leaf.clone()  # CTRL scales what it gets in place


def token_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that embed token ids: one, or one a side of an encoder-decoder."""
    found = [input_embeddings(model)]
    for side in ("get_encoder", "get_decoder"):
        part = getattr(model, side)() if hasattr(model, side) else None
        if isinstance(part, nn.Module) and part is not model:
            found += [m for m in _tables(part) if m not in found]
    return found


def _tables(part: nn.Module) -> list[nn.Module]:
    """The token embeddings of an encoder or decoder; none of a part that takes no tokens."""
    if getattr(part, "main_input_name", "input_ids") != "input_ids":
        return []
    found = _named_embeddings(part)
    return [] if found is None else [found]


def input_embeddings(model: nn.Module) -> nn.Module:
    """The module that embeds token ids: `get_input_embeddings()`, else the first nn.Embedding.

    Raises:
        ValueError: there is none.
    """
    # T5 names a module that its encoder shares the weight of and does not call.
    get_encoder = getattr(model, "get_encoder", None)
    encoder = None if get_encoder is None else get_encoder()
    if getattr(encoder, "main_input_name", None) != "input_ids":
        encoder = None
    for owner in (encoder, model):
        found = _named_embeddings(owner)
        if found is not None:
            return found
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module
    raise ValueError(
        f"an audit needs a model with token embeddings, but {type(model).__name__} has none: "
        "a model without a text path packs no documents"
    )


def _named_embeddings(owner: Any) -> nn.Module | None:
    """What a transformers model says that its token embeddings are."""
    getter = getattr(owner, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        found = getter()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None
