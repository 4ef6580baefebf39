"""Packs to a multiple, for processes to divide: some are cut in two, between documents."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.shared import Plan, Trees

Rows = NDArray[np.int64]  # [num_rows, 3]: pack, its first document in the row, one past the last


def cut_to_multiple(rows: Rows, multiple: int, argument: str, advice: str) -> Rows:
    """Cuts rows with the most documents in two until `multiple` divides their number.

    Args:
        argument, advice: what errors name, and say to do.

    Raises:
        ValueError: fewer documents than rows that it takes.
    """
    missing = -len(rows) % multiple
    documents = int((rows[:, 2] - rows[:, 1]).sum())
    if len(rows) + missing > documents:
        raise ValueError(
            f"{argument} must find a document for each row, but {documents} documents in "
            f"{len(rows)} packs do not fill a multiple of {multiple}: {advice}"
        )
    if not missing:
        return rows
    heap = [(first - stop, pack, first, stop) for pack, first, stop in rows.tolist()]
    heapq.heapify(heap)
    for _ in range(missing):
        _, pack, first, stop = heapq.heappop(heap)
        middle = (first + stop) // 2
        heapq.heappush(heap, (first - middle, pack, first, middle))
        heapq.heappush(heap, (middle - stop, pack, middle, stop))
    return np.array(sorted(row[1:] for row in heap), np.int64)


def evened(plan: Plan, multiple: int) -> Plan:
    """The plan with packs to a multiple; what documents on both sides of a cut share is repeated.

    Raises:
        ValueError: fewer documents than packs that it takes.
    """
    if not (plan.offsets.size - 1) % multiple:
        return plan
    offsets = plan.offsets if plan.trees is None else plan.trees.offsets
    counts = np.diff(offsets)
    rows = np.stack([np.arange(counts.size), np.zeros_like(counts), counts], axis=1)
    rows = cut_to_multiple(rows, multiple, "multiple", "take fewer processes or a smaller batch")
    if plan.trees is None:
        return replace(plan, offsets=np.append(offsets[rows[:, 0]] + rows[:, 1], offsets[-1]))
    return _cut_trees(plan, plan.trees, rows)


def _cut_trees(plan: Plan, trees: Trees, rows: Rows) -> Plan:
    """A plan of the rows: each has the pieces of its own documents."""
    kept: list[NDArray[np.int64]] = []
    parents: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    for pack, first, stop in rows.tolist():
        begin, end = int(plan.offsets[pack]), int(plan.offsets[pack + 1])
        at = int(trees.offsets[pack])
        above, last = trees.parents[begin:end], trees.ends[at + first : at + stop]
        if stop - first < trees.offsets[pack + 1] - at:
            pieces = _on_paths(above, last)
        else:
            pieces = np.arange(above.size)
        place = np.full(above.size + 1, -1)  # one more: what roots continue
        place[pieces] = np.arange(pieces.size)
        kept.append(begin + pieces)
        parents.append(place[above[pieces]])
        ends.append(place[last])
    order = np.concatenate(kept)
    sizes = [pieces.size for pieces in kept]
    new = replace(
        trees,
        parents=np.concatenate(parents),
        ends=np.concatenate(ends),
        offsets=np.append(0, np.cumsum(rows[:, 2] - rows[:, 1])),
    )
    return replace(
        plan,
        order=plan.order[order],
        starts=plan.starts[order],
        lengths=plan.lengths[order],
        offsets=np.append(0, np.cumsum(sizes)),
        trees=new,
    )


def _on_paths(parents: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pieces of a pack that documents with those ends are made of."""
    needed = np.zeros(parents.size, bool)
    needed[ends] = True
    for piece in range(parents.size - 1, -1, -1):
        if needed[piece] and parents[piece] >= 0:
            needed[parents[piece]] = True
    return np.flatnonzero(needed)
