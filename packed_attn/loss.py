"""Losses of packed batches per document: what a Trainer needs to weigh and to report documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from packed_attn.collator import IGNORE_INDEX, LossWeighting, without_first_labels
from packed_attn.layout import DocumentLayout


class PackedLoss:
    """The loss of packed batches, for Trainer's `compute_loss_func` and its evaluation.

        loss = PackedLoss(model, "document")
        Trainer(
            model, args, train_dataset=packs, eval_dataset=packs,
            data_collator=PackedCollator(loss_weighting="document"),
            compute_loss_func=loss,
            compute_metrics=loss.compute_metrics,
            preprocess_logits_for_metrics=loss.preprocess_logits_for_metrics,
        )

    `"token"` is the mean over target tokens, as without packing. `"document"` is the mean over
    documents of their own token means: each counts the same whatever its length. Both are exact
    over gradient accumulation and over processes, because Trainer counts what the collator lets it
    count; the collator must therefore be told the same weighting, and a mismatch raises.

    Evaluation gets `loss_per_token` and `loss_per_document`, over all packs together. Unpacked
    evaluation with one document a batch reports the second as its `eval_loss`.

    Args:
        model: a patched model, or a wrapper around one.
        weighting: "token" or "document".

    Raises:
        ValueError: the model is not patched, or an unknown weighting.
    """

    def __init__(self, model: nn.Module, weighting: LossWeighting = "token") -> None:
        if weighting not in get_args(LossWeighting):
            raise ValueError(f"weighting must be 'token' or 'document', got {weighting!r}")
        from packed_attn_patches import patched_module

        self.weighting = weighting
        self._batch = _LatestBatch()
        patched = patched_module(model)
        patched.register_forward_pre_hook(self._batch.arrives, with_kwargs=True, prepend=True)
        patched.register_forward_hook(self._batch.is_packed, with_kwargs=True)

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of one micro-batch, divided by the count of the whole step where it is given.

        Args:
            outputs: the model's, with `logits` `[B, T, vocabulary]`.
            labels: int64 `[B, T]`, -100 where nothing is learned.
            num_items_in_batch: target tokens, or documents with targets, of all micro-batches.

        Raises:
            ValueError: no labels, or a collator of another weighting.
        """
        if labels is None:
            raise ValueError("labels are missing: PackedLoss has nothing to compare the logits to")
        if num_items_in_batch is not None and self._batch.weighting != self.weighting:
            raise ValueError(
                f"PackedLoss weighs by {self.weighting}, but the collator counts "
                f"{self._batch.weighting}s: use PackedCollator(loss_weighting={self.weighting!r})"
            )
        sums, counts = self._per_document(outputs["logits"], labels)
        if self.weighting == "document":
            total, items = (sums / counts.clamp(min=1)).sum(), (counts > 0).sum()
        else:
            total, items = sums.sum(), counts.sum()
        return total / (items if num_items_in_batch is None else num_items_in_batch)

    def preprocess_logits_for_metrics(self, logits: Any, labels: Tensor) -> Tensor:
        """Logits to float64 `[1, num_documents, 2]`: each document's summed loss and targets."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        sums, counts = self._per_document(logits, labels)
        return torch.stack([sums.double(), counts.double()], dim=-1)[None]

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """`loss_per_token` and `loss_per_document` in nats, and how many of either there were."""
        sums, counts = np.moveaxis(np.asarray(prediction.predictions), -1, 0)
        kept = counts > 0  # Trainer fills the rows of unlike batches up with -100
        sums, counts = sums[kept], counts[kept]
        return {
            "loss_per_token": float(sums.sum() / counts.sum()),
            "loss_per_document": float((sums / counts).mean()),
            "tokens": float(counts.sum()),
            "documents": float(counts.size),
        }

    def _per_document(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = self._batch.layout
        if layout is None:
            # A batch without boundaries: every row is one document.
            rows, tokens = labels.shape
            layout = DocumentLayout.from_lengths([tokens] * rows, device=labels.device)
        return document_losses(logits, labels, layout)


def document_losses(
    logits: Tensor, labels: Tensor, layout: DocumentLayout
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of target tokens of each document.

    Args:
        logits: `[B, T, vocabulary]`; the token before predicts.
        labels: int64 `[B, T]`, -100 where nothing is learned. A document's first token is predicted
            by no other, whatever its label.
        layout: the documents of the `B * T` tokens.

    Returns:
        float32 `[num_documents]`, in nats, differentiable, and int64 `[num_documents]`.
    """
    layout = layout.to(labels.device)
    targets = without_first_labels(labels, layout).flatten()[1:]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1)[:-1].float(),
        targets.to(logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="none",
    )
    document = layout.document_ids[1:].long().to(logits.device)
    sums = losses.new_zeros(layout.num_documents).index_add(0, document, losses)
    learned = (targets != IGNORE_INDEX).long().to(logits.device)
    return sums, learned.new_zeros(layout.num_documents).index_add(0, document, learned)


class _LatestBatch:
    """Hooks that remember the documents of the latest forward, which the loss follows at once."""

    def __init__(self) -> None:
        self.layout: DocumentLayout | None = None
        self.weighting: Literal["token", "document"] = "token"

    def arrives(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counted = kwargs.get("shift_labels")
        by_document = isinstance(counted, Tensor) and counted.ndim == 1
        self.weighting = "document" if by_document else "token"

    def is_packed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        self.layout = kwargs.get("layout")

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": None, "weighting": self.weighting}
