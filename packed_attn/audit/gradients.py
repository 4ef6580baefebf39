"""What a document depends on: the gradient of its outputs in its own embeddings and in others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packed_attn.audit.conventions import AuditBatch
from packed_attn.audit.embeddings import Embeddings
from packed_attn.audit.subject import Subject, accepts, kwargs_alone


def gradients_by_document(
    subject: Subject,
    batch: AuditBatch,
    which: Sequence[int] | None = None,
    *,
    backwards: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """For each document: (gradient of its outputs in its own embeddings, and in all others').

    Args:
        which: the documents whose outputs are differentiated, all by default.
        backwards: how many there are at least: other ranks may have a part in each.
    """
    found = []
    spans = subject.spans(batch)
    which = range(len(spans)) if which is None else which
    runs = [*which, *[which[-1]] * (backwards - len(which))]
    with torch.enable_grad(), Embeddings(subject.model) as embeddings:
        logits = subject.packed(batch)
        for run, index in enumerate(runs, start=1):
            loss = _weighted(logits[slice(*spans[index])])
            parts = embeddings.gradients(loss, retain_graph=run < len(runs))
            found.append(_own_and_others(parts, subject.pools, index))
    return found[: len(which)]


def gradient_alone(subject: Subject, index: int, *, checkpointing: bool) -> Tensor:
    """The gradient of a document's outputs in its embeddings, run by itself.

    What checkpointing computes again would find the cache of the first time (RoFormer), so there is
    none, as a Trainer has it.
    """
    kwargs: dict[str, Any] = {**kwargs_alone(subject.documents[index])}
    if checkpointing and accepts(subject.model, "use_cache"):
        kwargs["use_cache"] = False
    with torch.enable_grad(), Embeddings(subject.model) as embeddings:
        output = subject.run(kwargs)
        loss = _weighted(subject.flat(output))
        return _own_and_others(embeddings.gradients(loss), subject.pools, index)[0]


def reached(subject: Subject, own: Sequence[Tensor]) -> float:
    """The largest gradient of a document's outputs in its own embeddings.

    Raises:
        NotImplementedError: there is none, so a gradient of 0 elsewhere would prove nothing.
    """
    scale = max(map(largest, own))
    if scale == 0:
        raise NotImplementedError(
            f"no gradient of {type(subject.model).__name__} reaches its embeddings: an audit "
            "cannot tell what its outputs depend on"
        )
    return scale


def _own_and_others(
    parts: Sequence[tuple[Tensor, Tensor]], pools: Sequence[Tensor], index: int
) -> tuple[Tensor, Tensor]:
    every = torch.cat(list(pools))
    own = [g[torch.isin(ids, pools[index])] for ids, g in parts]
    others = [g[torch.isin(ids, every) & ~torch.isin(ids, pools[index])] for ids, g in parts]
    return torch.cat(own), torch.cat(others)


def _weighted(rows: Tensor) -> Tensor:
    """One number that depends on every output, each with a weight of its own."""
    weights = torch.linspace(-1, 1, rows.numel(), device=rows.device)
    return (rows.flatten() * weights.to(rows.dtype)).sum()


def largest(x: Tensor) -> float:
    """The largest magnitude; a NaN counts as infinite."""
    if x.numel() == 0:
        return 0.0
    return float(torch.nan_to_num(x.double().abs(), nan=torch.inf).max())


def difference(x: Tensor, y: Tensor) -> float:
    """The largest difference; a NaN or Inf on one side alone counts as infinite."""
    return 0.0 if torch.equal(x, y) else largest(x.double() - y.double())
