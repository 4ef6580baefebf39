"""A forest held to what "exact" promises: each document as it is alone behind what it continues.

Part of what `sweep.py` checks of one model type, for heads that have outputs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packed_attn import DocumentLayout
from tests.exactness import documents
from tests.sweep import _gradient_outside, _rows
from tests.sweep_precision import Alone, Expected, Precision, _gradients, _largest

# A prompt with an answer, an empty one and one that has answers itself; a document alone.
LENGTHS, PARENTS = (7, 5, 0, 3, 4, 1, 9), (-1, 0, 0, 0, 3, 3, -1)
LAYOUT = DocumentLayout.from_lengths(LENGTHS, parents=PARENTS)


class StockForest:
    """What a model that is not patched gives for the documents one by one, each with its path."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        device = next(model.parameters()).device
        self.docs = [d.to(device) for d in documents(2, LENGTHS)]
        self.expected = Expected.of(precision, model, self._alone)

    def batch(self) -> dict[str, Any]:
        ids = torch.cat(self.docs)[None]
        return {"input_ids": ids, "layout": LAYOUT.to(ids.device)}

    def _alone(self, model: nn.Module) -> Alone:
        with torch.no_grad():
            rows = torch.cat(self._outputs(model))
        model.train().zero_grad()
        weights = weights_of(rows).split([n for n in LENGTHS if n])
        losses = [(out * w).sum() for out, w in zip(self._outputs(model), weights)]
        loss = torch.stack(losses).sum()
        loss.backward()
        model.eval()
        return Alone(rows, loss.detach(), _gradients(model))

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Of each document's own tokens, `[length, width]`."""
        whole = [torch.cat([self.docs[p] for p in LAYOUT.path(d)]) for d in range(len(LENGTHS))]
        return [
            _rows(model(input_ids=ids[None]))[-n:] for ids, n in zip(whole, LENGTHS, strict=True)
            if n
        ]  # fmt: skip


def weights_of(outputs: Tensor) -> Tensor:
    """Of each output, for a loss that every one has a part of its own in."""
    return torch.linspace(-1, 1, outputs.numel(), device=outputs.device).view_as(outputs)


def forest(model: nn.Module, stock: StockForest) -> str:
    """Outputs, gradients and isolation; "refused" of a model that says it takes no forest."""
    batch = stock.batch()
    try:
        with torch.no_grad():
            clean = _rows(model(**batch))
    except NotImplementedError as error:
        if "no forest" not in str(error):
            raise
        return "refused"
    verdict = stock.expected.outputs(clean)
    if verdict != "exact":
        return verdict
    model.train().zero_grad()
    (_rows(model(**batch)) * weights_of(clean)).sum().backward()
    model.eval()
    verdict = stock.expected.of_gradients(_gradients(model))
    return _isolated(model, stock, clean) if verdict == "exact" else verdict


def _isolated(model: nn.Module, stock: StockForest, clean: Tensor) -> str:
    """Other tokens in a document change no bit of what does not continue it, and no document has a
    gradient in what is not on its path."""
    batch, worst = stock.batch(), 0.0
    owner = LAYOUT.document_ids
    for d in range(len(LENGTHS)):
        own, path = owner == d, torch.isin(owner, torch.tensor(LAYOUT.path(d)))
        below = torch.tensor([d in LAYOUT.path(int(e)) for e in owner])
        if not own.any():
            continue
        ids = batch["input_ids"].clone()
        ids[0, own] = 3 + (ids[0, own] - 2) % 147
        with torch.no_grad():
            moved = _rows(model(**{**batch, "input_ids": ids})) - clean
        worst = max(worst, _largest(moved[~below]))
        leaked = _gradient_outside(model, batch, own, path)
        if leaked > 0:
            return f"leaks: gradient {leaked:.1e}"
    scale, rounding = stock.expected.scale, _largest(clean - stock.expected.alone.rows)
    bound = 4 * max(rounding, torch.finfo(clean.dtype).eps * scale)
    if worst > bound:
        return f"leaks: moved by {worst / scale:.1e}"
    return "exact" if worst == 0 else "rounding"
