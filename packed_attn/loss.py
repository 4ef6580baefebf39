"""Losses of packed batches per document: what a Trainer needs to weigh and to report documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from packed_attn.collator import LossWeighting
from packed_attn.layout import DocumentLayout
from packed_attn.logps import token_logps


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

    Packs with shared prefixes need it in either weighting: a token that several documents share
    counts for each of them, and a prompt's last token predicts the first of every answer.

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
        self._evaluated: list[np.ndarray] = []
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
        """Logits to float64 `[1, documents, 2]`: each document's summed loss and targets.

        On several processes Trainer fills logits and labels up to the longest row of any, and
        gathers what comes back, which must have one shape: so there are as many documents on all.
        """
        from accelerate.utils import pad_across_processes

        logits = logits[0] if isinstance(logits, tuple) else logits
        layout = self._batch.layout
        if layout is not None:
            tokens = layout.total_tokens // labels.shape[0]
            logits, labels = logits[:, :tokens], labels[:, :tokens]
        sums, counts = self._per_document(logits, labels)
        found: Any = pad_across_processes(torch.stack([sums.double(), counts.double()], dim=-1))
        return found[None]

    def compute_metrics(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """`loss_per_token` and `loss_per_document` in nats, and how many of either there were.

        Args:
            prediction: of an evaluation, or of a batch of it (`batch_eval_metrics=True`).
            compute_result: whether it is the last; nothing is returned before.

        Raises:
            ValueError: the Trainer was given no `preprocess_logits_for_metrics`.
        """
        given = prediction.predictions
        if not isinstance(given, np.ndarray | Tensor) or given.ndim != 3 or given.shape[-1] != 2:
            raise ValueError(
                "PackedLoss.compute_metrics was given something else than its sums by document: "
                "pass preprocess_logits_for_metrics=loss.preprocess_logits_for_metrics too"
            )
        found = torch.as_tensor(given).reshape(-1, 2)
        found = found[found[:, 1] > 0]  # Trainer fills the rows of unlike batches up with -100
        self._evaluated.append(found.cpu().numpy())
        if not compute_result:
            return {}
        sums, counts = np.concatenate(self._evaluated).T
        self._evaluated.clear()
        return {
            "loss_per_token": float(sums.sum() / counts.sum()),
            "loss_per_document": float((sums / counts).mean()),
            "tokens": float(counts.sum()),
            "documents": float(counts.size),
        }

    def _per_document(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._batch.has_run:
            raise RuntimeError(
                "PackedLoss was made of a model that has not run: where Trainer(model_init=...) "
                "makes another, set trainer.compute_loss_func = PackedLoss(trainer.model) in "
                "on_train_begin of a callback, and trainer.preprocess_logits_for_metrics likewise"
            )
        layout = self._batch.layout
        if layout is None:
            # A batch without boundaries: every row is one document.
            rows, tokens = labels.shape
            layout = DocumentLayout.from_lengths([tokens] * rows, device=labels.device)
        return document_losses(logits, labels, layout, self._batch.paths)


def document_losses(
    logits: Tensor, labels: Tensor, layout: DocumentLayout, paths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and number of target tokens of each document.

    Args:
        logits: `[B, T, vocabulary]`; the token before predicts.
        labels: int64 `[B, T]`, -100 where nothing is learned. A first token that no other of its
            document precedes is not predicted, whatever its label.
        layout: the documents of the `B * T` tokens.
        paths: int64 `[2, num_pairs]`, (document, piece) pairs: which documents of the layout are
            the pieces of a document that shares some (`document_paths[0]` of the collator's batch).
            None: each is a document.

    Returns:
        float32 `[num_documents]`, in nats, differentiable, and int64 `[num_documents]`. With paths
        there are as many entries as pairs, and those past the last document are 0: to count the
        documents would make the host wait for the device.
    """
    layout = layout.to(logits.device)
    piece = layout.document_ids.long()
    logps, learned = token_logps(logits, layout, labels)
    sums = -_summed(logps, piece, layout.num_documents)
    counts = _summed(learned.long(), piece, layout.num_documents)
    if paths is None:
        return sums, counts
    document, piece = paths.to(logits.device)
    number = paths.shape[1]
    return _summed(sums[piece], document, number), _summed(counts[piece], document, number)


def _summed(values: Tensor, index: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add(0, index, values)


class _LatestBatch:
    """Hooks that remember the documents of the latest forward, which the loss follows at once."""

    def __init__(self) -> None:
        self.layout: DocumentLayout | None = None
        self.paths: Tensor | None = None
        self.weighting: Literal["token", "document"] = "token"
        self.has_run = False

    def arrives(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        counted, layout = kwargs.get("shift_labels"), kwargs.get("layout")
        by_document = isinstance(counted, Tensor) and counted.ndim == 3
        self.weighting = "document" if by_document else "token"
        # The model refuses counts that no PackedLoss has taken.
        taken = by_document or (layout is not None and layout.is_forest)
        paths = kwargs.get("document_paths")
        self.paths = None if paths is None else paths[0]
        # Trainer asks Liger to leave the logits out of an evaluation; the loss needs them.
        dropped = ("skip_logits", "shift_labels") if taken else ("skip_logits",)
        return args, {name: value for name, value in kwargs.items() if name not in dropped}

    def is_packed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        self.layout = kwargs.get("layout")
        self.has_run = True

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": None, "paths": None, "weighting": self.weighting, "has_run": False}
