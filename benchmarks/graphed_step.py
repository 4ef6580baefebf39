"""A whole training step as one CUDA graph, replayed with other documents in the same capacity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from packed_attn import DocumentLayout


class Capturing(Protocol):
    """What `benchmarks.graphs.Capture` does, or a stand-in for it."""

    def graph(self, call: Callable[[], object]) -> Callable[[], object]: ...


# (batches, number of targets) -> token mean of the loss, after the optimizer's step
Run = Callable[[list[dict[str, Any]], Tensor], Tensor]


class GraphedStep:
    """A step over one pack, captured once; a call copies its batch into the graph's inputs.

    The shapes of a graph stand still: capacity tokens, and a fixed number of documents, of which
    those past the batch's own are empty. The layout inside knows nothing on the host, so the graph
    holds what follows from its boundaries too: positions, intervals, lists of tiles.
    """

    def __init__(self, run: Run, batch: dict[str, Any], documents: int, capture: Capturing) -> None:
        """Captures `run` on a batch as `PackedCollator` makes it, on the device.

        Args:
            documents: the most that a batch may have.

        Raises:
            RuntimeError: something in the step waits for the device.
        """
        self._documents = documents
        self._inputs = static_inputs(batch, documents)
        self._loss = torch.empty(0)

        def step() -> None:
            self._loss = run([self._arguments()], self._inputs["targets"])

        self._replay = capture.graph(step)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """One step on `batch`; its loss, which the next call writes over."""
        for name, x in static_inputs(batch, self._documents).items():
            self._inputs[name].copy_(x)
        self._replay()
        return self._loss

    def _arguments(self) -> dict[str, Any]:
        tokens = {name: self._inputs[name] for name in ("input_ids", "labels", "position_ids")}
        cu, padding = self._inputs["cu_seqlens"], self._inputs["padding"]
        return tokens | {"layout": DocumentLayout(cu, tokens["labels"].numel(), None, padding)}


def static_inputs(batch: dict[str, Any], documents: int) -> dict[str, Tensor]:
    """Copies of what a step reads, of the same shapes for every batch of a capacity.

    Raises:
        ValueError: the batch has more than `documents` documents.
    """
    layout: DocumentLayout = batch["layout"]
    spare = documents - layout.num_documents
    if spare < 0:
        raise ValueError(
            f"the graph holds {documents} documents, but the batch has {layout.num_documents}"
        )
    padding = layout.padding
    if padding is None:
        padding = torch.zeros_like(layout.cu_seqlens[:-1], dtype=torch.bool)
    copied = {name: batch[name].clone() for name in ("input_ids", "labels", "position_ids")}
    return copied | {
        "cu_seqlens": pad(layout.cu_seqlens, (0, spare), value=layout.total_tokens),
        "padding": pad(padding, (0, spare), value=False),
        "targets": (batch["labels"][:, 1:] != -100).sum(),
    }
