"""Counts where documents and tokens went: the figures of a `PackingReport`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import INT64_MAX, Histogram
from packed_attn.packing.report import FILL_BINS, LENGTH_BINS


@dataclass(frozen=True, eq=False)
class Fates:
    """What each document takes into the packs, int64 `[num_documents]` each.

    Attributes:
        given: its tokens.
        kept: tokens that it takes; 0 leaves it out.
        learned: tokens whose label counts, None where labels are not known.
        histogram: counts the lengths given: what it tells takes no pass over the documents.
    """

    given: NDArray[np.int64]
    kept: NDArray[np.int64]
    histogram: Histogram
    learned: NDArray[np.int64] | None = None

    def all_whole(self, pieces: int) -> bool:
        """Whether, given the number of pieces, every document is known to be one whole piece."""
        if self.learned is not None or self.kept is not self.given:
            return False
        return pieces == self.given.size and not self.histogram.has_zeros


def document_figures(fates: Fates, order: NDArray[np.int64], all_whole: bool) -> dict[str, int]:
    """Documents and tokens by what became of them; `order` is the document of each piece."""
    given, kept, learned = fates.given, fates.kept, fates.learned
    documents, tokens = given.size, fates.histogram.total
    if all_whole:
        return _document_sums(documents, tokens, whole_documents=documents, packed_tokens=tokens)
    has_tokens = given > 0
    out = has_tokens & (kept == 0)
    unlearnable = out & (learned == 0) if learned is not None else np.zeros_like(out)
    dropped = out & ~unlearnable
    truncated = (kept > 0) & (kept < given)
    split = (np.bincount(order, minlength=documents) > 1) & ~truncated
    packed = int(kept.sum())
    in_packs = int(np.count_nonzero(kept))
    return _document_sums(
        documents,
        tokens,
        whole_documents=int(in_packs - truncated.sum() - split.sum()),
        split_documents=int(split.sum()),
        truncated_documents=int(truncated.sum()),
        dropped_documents=int(dropped.sum()),
        empty_documents=int(documents - has_tokens.sum()),
        unlearnable_documents=int(unlearnable.sum()),
        packed_tokens=packed,
        truncated_tokens=int((given - kept)[truncated].sum()),
        dropped_tokens=int(given[dropped].sum()),
        unlearnable_tokens=int(given[unlearnable].sum()),
        masked_tokens=0 if learned is None else packed - int(learned[kept > 0].sum()),
        lost_labels=order.size - in_packs,
    )


def length_figures(documents: Histogram, pieces: Histogram, capacity: int) -> dict[str, Any]:
    """Figures of the lengths of the documents given, and of the pieces in the packs."""
    edges = np.array([capacity * k // LENGTH_BINS for k in range(1, LENGTH_BINS + 1)], np.int64)
    in_bin = np.bincount(
        np.searchsorted(edges, documents.lengths),
        weights=np.where(documents.lengths > 0, documents.counts, 0),
        minlength=LENGTH_BINS + 1,
    )
    return {
        "longest": int(pieces.lengths[-1]) if pieces.lengths.size else 0,
        "attention_cost": _sum_of_squares(pieces),
        "length_histogram": tuple(in_bin.astype(int).tolist()),
    }


def shared_figures(figures: dict[str, Any], tokens: int, pairs: int) -> dict[str, int]:
    """The figures of documents that take `tokens` and `pairs` of attention with prefixes shared."""
    return {
        "packed_tokens": tokens,
        "shared_tokens": figures["packed_tokens"] - tokens,
        "attention_cost": pairs,
        "shared_attention_cost": figures["attention_cost"] - pairs,
        "masked_tokens": 0,
    }


def fill_histogram(pack_tokens: NDArray[np.int64], capacity: int) -> tuple[int, ...]:
    """Packs by fill; float64 divides whole numbers below 2^53 exactly where they divide."""
    bins = np.ceil(pack_tokens.astype(np.float64) * FILL_BINS / capacity).astype(np.int64) - 1
    counts = np.bincount(np.minimum(bins, FILL_BINS - 1), minlength=FILL_BINS)
    return tuple(counts.tolist())


def _document_sums(documents: int, tokens: int, **figures: int) -> dict[str, int]:
    zeros = dict.fromkeys(
        (
            "split_documents",
            "truncated_documents",
            "dropped_documents",
            "empty_documents",
            "truncated_tokens",
            "dropped_tokens",
            "lost_labels",
        ),
        0,
    )
    return {**zeros, "documents": documents, "tokens": tokens, **figures}


def _sum_of_squares(pieces: Histogram) -> int:
    if not pieces.lengths.size:
        return 0
    longest, number = int(pieces.lengths[-1]), int(pieces.counts.sum())
    if longest**2 * number <= INT64_MAX:
        return int(np.dot(pieces.counts, pieces.lengths**2))
    return sum(n * length**2 for length, n in zip(pieces.lengths.tolist(), pieces.counts.tolist()))
