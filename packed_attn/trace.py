"""What every module of a model took in and gave out in one forward, to find where two runs part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Trace:
    """A context in which the calls of all modules are recorded, in the order they end.

    Args:
        model: the model whose modules are watched.
        tokens: T; only tensors with a dimension of this size can be compared by token.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.tokens = tokens
        self.calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Trace:
        for path, module in self._model.named_modules():
            name = f"{path or '(model)'} ({type(module).__name__})"
            hook = _Recorder(self, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _Recorder:
    """A forward hook that writes one module's calls into a trace."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.trace = trace
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [t.detach().clone() for t in _tensors((args, kwargs), self.trace.tokens)]
        outputs = [t.detach().clone() for t in _tensors(output, self.trace.tokens)]
        self.trace.calls.append((self.name, inputs, outputs))


def first_leak(clean: Trace, changed: Trace, tokens: Tensor) -> str | None:
    """The first module to end whose inputs at `tokens` agree in both traces and outputs do not.

    Args:
        clean, changed: traces of two runs that differ outside `tokens`.
        tokens: bool `[T]`, the tokens whose values should not have changed.
    """
    for (name, inputs, outputs), (_, inputs_2, outputs_2) in zip(clean.calls, changed.calls):
        if _agree(inputs, inputs_2, tokens) and not _agree(outputs, outputs_2, tokens):
            return name
    return None


def _agree(xs: Sequence[Tensor], ys: Sequence[Tensor], tokens: Tensor) -> bool:
    return all(_equal_at(x, y, tokens) for x, y in zip(xs, ys))


def _equal_at(x: Tensor, y: Tensor, tokens: Tensor) -> bool:
    if x.shape != y.shape:
        return True  # grouped by content: not comparable token by token
    dim = list(x.shape).index(tokens.numel())
    index = tokens.to(x.device).nonzero().flatten()
    return torch.equal(x.index_select(dim, index), y.index_select(dim, index))


def _tensors(value: Any, tokens: int) -> Iterator[Tensor]:
    """Floating tensors with a dimension of `tokens`, inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and tokens in value.shape:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, tokens)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, tokens)
