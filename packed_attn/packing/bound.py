"""The Martello-Toth bound: packs that no plan of the same documents can do without."""

from __future__ import annotations

import numpy as np

from packed_attn.packing.best_fit import Histogram


def lower_bound(histogram: Histogram, capacity: int) -> int:
    """L2 of Martello and Toth: no plan of these documents, uncut, has fewer packs.

    For a threshold a of at most half the capacity, documents longer than capacity - a share with
    none of at least a, those longer than half share with none of their like, and what the shorter
    ones (from a up) need beyond the room left beside those takes packs of its own. L2 is the most
    that any a gives; a = 0 gives ceil(tokens / capacity).

    Args:
        histogram: lengths in 1..capacity, tokens in all below 2^62.

    Source: Martello and Toth, "Lower bounds and reduction procedures for the bin packing problem"
    (1990). Here in time linear in the distinct lengths, on their histogram.
    """
    lengths, counts = histogram.lengths, histogram.counts
    documents = np.append(0, np.cumsum(counts))  # of the first i distinct lengths
    tokens = np.append(0, np.cumsum(counts * lengths))
    half = np.searchsorted(lengths, capacity // 2, side="right")
    smallest = np.append(0, np.arange(half))  # where the short documents of each threshold begin
    thresholds = np.append(0, lengths[:half])
    alone = np.searchsorted(lengths, capacity - thresholds, side="right")
    room_beside = (documents[alone] - documents[half]) * capacity - (tokens[alone] - tokens[half])
    beyond = np.maximum(tokens[half] - tokens[smallest] - room_beside, 0)
    packs = documents[-1] - documents[half] - (-beyond // capacity)
    return int(packs.max())
