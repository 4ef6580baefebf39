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
        rows, tokens: shape of the batch; only tensors with a dimension of `rows * tokens`, or a
            first one of `rows` and another of `tokens`, can be compared by token.
    """

    def __init__(self, model: nn.Module, rows: int, tokens: int) -> None:
        self.rows, self.tokens = rows, tokens
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

    def by_token(self, x: Tensor) -> Tensor | None:
        """`x` with the stream of tokens as its first dimension, a view; None where it has none."""
        if self.rows * self.tokens in x.shape:
            return x.movedim(x.shape.index(self.rows * self.tokens), 0)
        if self.rows > 1 and x.shape[:1] == (self.rows,) and self.tokens in x.shape[1:]:
            return x.movedim(x.shape.index(self.tokens, 1), 1).flatten(0, 1)
        return None


class _Recorder:
    """A forward hook that writes one module's calls into a trace."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.trace = trace
        self.name = name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.trace.calls.append((self.name, self._copies((args, kwargs)), self._copies(output)))

    def _copies(self, value: Any) -> list[Tensor]:
        found = (self.trace.by_token(x) for x in floats(value))
        return [x.detach().clone() for x in found if x is not None]


def first_parting(clean: Trace, changed: Trace, tokens: Tensor) -> str | None:
    """The first module to end whose inputs at `tokens` agree in both traces and outputs do not.

    Args:
        clean, changed: traces of two runs that differ outside `tokens`.
        tokens: bool `[rows * tokens]`, the tokens whose values should not have changed.
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
    index = tokens.to(x.device).nonzero().flatten()
    return torch.equal(x.index_select(0, index), y.index_select(0, index))


def floats(value: Any) -> Iterator[Tensor]:
    """Floating tensors inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats(item)
