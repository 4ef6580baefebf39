"""Best-fit-decreasing over a bounded window of a stream: documents in, packs out.

The window is planned whole; full packs leave it, and the documents of the poorly filled ones wait
for the next documents to fill their gaps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import best_fit_decreasing
from packed_attn.packing.plan import sum_by_pack
from packed_attn.packing.sources import IGNORED_LABEL, MASK_COLUMNS

FULL = 0.999  # of capacity: a pack that leaves the window at once
LONGEST_WAIT = 8  # windows that a document may be passed over


@dataclass(frozen=True, eq=False)
class Piece:
    """A document, or a part of one over capacity, on its way into a pack.

    Attributes:
        document: number of the document in its stream, from 0.
        columns: `input_ids` and what is aligned with it, each `[length]`.
    """

    document: int
    columns: dict[str, NDArray[Any]]

    @property
    def length(self) -> int:
        return self.columns["input_ids"].size


@dataclass(eq=False)
class Window:
    """The pieces that wait for a pack.

    Args:
        capacity: tokens a pack holds.
        lookahead: pieces that the window holds before it is planned.
        pool: the pieces, in the order in which they came.
    """

    capacity: int
    lookahead: int
    pool: list[Piece] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.pool) >= self.lookahead

    def release(self, *, everything: bool) -> list[list[Piece]]:
        """Takes packs out of the window, in the order of their earliest documents.

        Packs at least 0.999 full leave, the fuller half always, and so does a pack with a document
        that eight windows' worth of documents have passed; at the end of a stream all leave.
        """
        lengths = np.array([piece.length for piece in self.pool], np.int64)
        order, placed, offsets = best_fit_decreasing(lengths, self.capacity)
        members = [order[first:stop] for first, stop in pairwise(offsets.tolist())]
        fills = sum_by_pack(placed, offsets)
        leave = np.ones(fills.size, bool) if everything else self._leaving(members, fills)
        out = [np.sort(pieces) for pieces, leaves in zip(members, leave) if leaves]
        packs = [[self.pool[i] for i in pieces] for pieces in sorted(out, key=lambda p: p[0])]
        kept = np.ones(len(self.pool), bool)
        for pieces in out:
            kept[pieces] = False
        self.pool = [piece for piece, stays in zip(self.pool, kept) if stays]
        return packs

    def _leaving(self, members: list[NDArray[np.int64]], fills: NDArray[Any]) -> NDArray[np.bool_]:
        leave = fills >= FULL * self.capacity
        fullest = np.argsort(-fills, kind="stable")[: (fills.size + 1) // 2]
        leave[fullest] = True
        newest = self.pool[-1].document
        oldest = np.array([self.pool[pieces.min()].document for pieces in members])
        return leave | (newest - oldest > LONGEST_WAIT * self.lookahead)


def assemble(pack: list[Piece]) -> dict[str, NDArray[Any]]:
    """One row of what `pack_dataset` writes, as numpy arrays.

    Returns:
        `input_ids`, `labels`, `position_ids`, int64 `[tokens]`; `seq_lengths`, int64 `[pieces]`;
        the other columns, `[tokens]`.
    """
    names = pack[0].columns
    row = {name: np.concatenate([piece.columns[name] for piece in pack]) for name in names}
    lengths = np.array([piece.length for piece in pack], np.int64)
    firsts = np.cumsum(lengths) - lengths
    tokens = row["input_ids"]
    if "labels" in row:
        labels = row["labels"].astype(np.int64)
    else:
        labels = tokens.astype(np.int64)
        for name in MASK_COLUMNS:
            if name in row:
                labels[row[name] == 0] = IGNORED_LABEL
    labels[firsts] = IGNORED_LABEL
    positions = np.arange(tokens.size) - np.repeat(firsts, lengths)
    written = {"labels": labels, "position_ids": positions, "seq_lengths": lengths}
    return {"input_ids": tokens, **written, **{n: v for n, v in row.items() if n not in written}}
