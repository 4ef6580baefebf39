"""The mode in which an audited model runs, and the mode it had before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from packed_attn.errors import first_line

# A model's own checkpointing may be the reentrant kind, which autograd.grad cannot walk.
_CHECKPOINT = partial(checkpoint, use_reentrant=False)
_STATE = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


class NotOffered(Exception):
    """The architecture lacks the mode that a convention asks for."""


@contextmanager
def mode(model: nn.Module, *, training: bool, checkpointing: bool) -> Iterator[list[str]]:
    """Evaluation or train mode, without gradients, and back.

    In train mode every dropout probability is 0, because random masks differ between a packed run
    and a document alone; layers that the model checkpoints use the non-reentrant kind.

    Yields:
        the names of parameters that were all 0 and are random inside (see `_awake`).

    Raises:
        NotOffered: `checkpointing` of an architecture without it.
    """
    saved = [(module, _saved(module)) for module in model.modules()]
    try:
        if checkpointing:
            _checkpointed(model)
        model.train(training)
        if training:
            _without_dropout(model)
        with torch.no_grad(), _statistics_kept(model), _awake(model) as names:
            yield names
    finally:
        for module, state in saved:
            for name in _STATE:
                if name not in state:
                    vars(module).pop(name, None)
            vars(module).update(state)


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """The model's own mode, without gradients; checkpointing is made the non-reentrant kind."""
    saved = [(m, vars(m)[_STATE[2]]) for m in model.modules() if _STATE[2] in vars(m)]
    try:
        for module, _ in saved:
            vars(module)[_STATE[2]] = _CHECKPOINT
        with torch.no_grad(), _statistics_kept(model):
            yield
    finally:
        for module, function in saved:
            vars(module)[_STATE[2]] = function


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Puts back the buffers that forwards write into (running statistics), which an audit's NaN
    would stay in. They are of floats, or counters; quantised weights are neither."""
    buffers = [b for b in model.buffers() if b.is_floating_point() or b.numel() == 1]
    saved = [(b, b.clone()) for b in buffers if not b.is_meta]
    try:
        yield
    finally:
        for buffer, before in saved:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


@contextmanager
def _awake(model: nn.Module) -> Iterator[list[str]]:
    """Small random values, the same each time, in parameters that are all 0.

    A gate or a projection that begins at 0 hides what it multiplies until the first step of
    training. A bias hides nothing, and what a quantiser or a shard holds stays as it is.
    """
    asleep = {
        name: p
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and p.is_floating_point() and not p.is_meta
        if p.numel() and not name.endswith("bias") and not p.any()
    }
    try:
        generator = torch.Generator().manual_seed(0)
        for parameter in asleep.values():
            std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            drawn = torch.empty(parameter.shape).normal_(std=std, generator=generator)
            parameter.copy_(drawn)
        yield list(asleep)
    finally:
        for parameter in asleep.values():
            parameter.zero_()


def drops(model: nn.Module) -> bool:
    """Whether a probability of dropout is above 0."""
    return any(_dropouts(module) for module in model.modules())


def _checkpointed(model: nn.Module) -> None:
    enable: Any = getattr(model, "gradient_checkpointing_enable", None)
    name = type(model).__name__
    if enable is None:
        raise NotOffered(f"{name} offers no gradient checkpointing")
    try:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise NotOffered(first_line(error)) from error


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        for name in _dropouts(module):
            setattr(module, name, 0.0)
        if _STATE[2] in vars(module):
            vars(module)[_STATE[2]] = _CHECKPOINT


def _saved(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k in _STATE or k in _dropouts(module)}


def _dropouts(module: nn.Module) -> list[str]:
    """Names of the module's dropout probabilities above 0, as floats of its own."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, float)
        and 0 < value <= 1
        and ("drop" in name.lower() or (is_dropout and name == "p"))
    ]
