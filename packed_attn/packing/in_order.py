"""Placements that keep the order of the input: cut where a pack is full, or close the pack."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def wrap(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], ...]:
    """Documents end to end, cut every `capacity` tokens: order, starts, lengths, offsets."""
    order, starts, pieces = cut(lengths, capacity, (np.cumsum(lengths) - lengths) % capacity)
    tokens_before = np.cumsum(pieces) - pieces
    pack_starts = np.arange(0, int(pieces.sum()), capacity)
    offsets = np.append(np.searchsorted(tokens_before, pack_starts), pieces.size)
    return order, starts, pieces, offsets


def next_fit(
    lengths: NDArray[np.int64], documents: NDArray[np.int64], capacity: int, most: int
) -> NDArray[np.int64]:
    """Fills one pack at a time, and closes it at the first item that it has no room for.

    Args:
        lengths: int64 `[num_items]`, each in 1..capacity.
        documents: int64 `[num_items]`, documents that each item counts for.
        capacity: tokens a pack holds.
        most: documents a pack takes.

    Returns:
        offsets, int64 `[num_packs + 1]`: pack p holds the items `offsets[p] : offsets[p + 1]`.
    """
    from packed_attn.packing import compiled

    if not lengths.size:
        return np.zeros(1, np.int64)
    opens = compiled.next_fit(lengths, documents, capacity, most)
    return np.append(np.flatnonzero(opens), lengths.size)


def cut(
    lengths: NDArray[np.int64], capacity: int, phase: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Documents to pieces of at most `capacity` tokens, in input order: order, starts, lengths.

    `phase`, `[num_documents]`, is how many tokens before its own start a document's cuts count
    from: 0 cuts it at multiples of capacity, its place in a pack cuts it where that pack ends.
    """
    pieces = np.where(lengths > 0, -(-(phase + lengths) // capacity), 0)
    order = np.repeat(np.arange(lengths.size), pieces)
    nth = np.arange(order.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cuts = nth * capacity - phase[order]
    starts = np.maximum(cuts, 0)
    stops = np.minimum(cuts + capacity, lengths[order])
    return order, starts, stops - starts
