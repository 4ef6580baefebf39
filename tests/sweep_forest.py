"""A forest held to what "exact" promises: each document as it is alone behind what it continues.

Part of what `sweep.py` checks of one model type, for heads that have outputs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packed_attn import DocumentLayout
from tests.exactness import documents
from tests.sweep import (
    GRADIENTS,
    LOGITS,
    _furthest,
    _gradient_outside,
    _gradients,
    _largest,
    _rows,
    _within,
)

# A prompt with an answer, an empty one and one that has answers itself; a document alone.
LENGTHS, PARENTS = (7, 5, 0, 3, 4, 1, 9), (-1, 0, 0, 0, 3, 3, -1)
LAYOUT = DocumentLayout.from_lengths(LENGTHS, parents=PARENTS)


class StockForest:
    """What a model that is not patched gives for the documents one by one, each with its path."""

    def __init__(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        self.docs = [d.to(device) for d in documents(2, LENGTHS)]
        with torch.no_grad():
            self.alone = torch.cat(self._outputs(model))
        self.scale = float(self.alone.abs().max())
        model.train().zero_grad()
        for outputs, weights in zip(self._outputs(model), self.weights()):
            (outputs * weights).sum().backward()
        self.gradients = _gradients(model)
        model.eval()

    def batch(self) -> dict[str, Any]:
        ids = torch.cat(self.docs)[None]
        return {"input_ids": ids, "layout": LAYOUT.to(ids.device)}

    def weights(self) -> tuple[Tensor, ...]:
        """Of each output, for a loss that every one has a part of its own in."""
        line = torch.linspace(-1, 1, self.alone.numel(), device=self.alone.device)
        return line.view_as(self.alone).split([n for n in LENGTHS if n])

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Of each document's own tokens, `[length, width]`."""
        whole = [torch.cat([self.docs[p] for p in LAYOUT.path(d)]) for d in range(len(LENGTHS))]
        return [
            _rows(model(input_ids=ids[None]))[-n:] for ids, n in zip(whole, LENGTHS, strict=True)
            if n
        ]  # fmt: skip


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
    error = _largest(clean - stock.alone)
    if error > LOGITS * stock.scale:
        return _within(error / stock.scale, LOGITS)
    model.train().zero_grad()
    (_rows(model(**batch)) * torch.cat(stock.weights())).sum().backward()
    model.eval()
    verdict = _within(_furthest(_gradients(model), stock.gradients), GRADIENTS)
    return _isolated(model, stock, clean, error) if verdict == "exact" else verdict


def _isolated(model: nn.Module, stock: StockForest, clean: Tensor, rounding: float) -> str:
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
    bound = 4 * max(rounding, torch.finfo(clean.dtype).eps * stock.scale)
    if worst > bound:
        return f"leaks: moved by {worst / stock.scale:.1e}"
    return "exact" if worst == 0 else "rounding"
