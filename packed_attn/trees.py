"""Forests of documents: which document goes on from which, as facts of the host and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Forest:
    """Host facts of a forest, per document."""

    parents: tuple[int, ...]
    path_offset: tuple[int, ...]  # tokens before the document on its path from the root
    subtree_stop: tuple[int, ...]  # one past the last token of the document's subtree
    depth: int  # most ancestors that a document has

    def path(self, document: int) -> tuple[int, ...]:
        path = [document]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    @staticmethod
    def build(lengths: Sequence[int], parents: Sequence[int]) -> Forest:
        """Checks that parents come before their children, depth-first, and derives the rest."""
        offset, stop, at, depth = [0] * len(lengths), [0] * len(lengths), 0, 0
        branch: list[int] = []  # the path of the document before this one
        for d, (n, p) in enumerate(zip(lengths, parents)):
            if not -1 <= p < d:
                raise ValueError(
                    f"parents must point to an earlier document or be -1, but parents[{d}] is {p}"
                )
            while branch and branch[-1] != p:
                branch.pop()
            if p >= 0 and not branch:
                raise ValueError(
                    "documents of a forest must stand in depth-first order, "
                    f"but document {d} continues {p} after another branch has begun"
                )
            branch.append(d)
            offset[d] = 0 if p < 0 else offset[p] + lengths[p]
            at += n
            for ancestor in branch:
                stop[ancestor] = at
            depth = max(depth, len(branch) - 1)
        return Forest(tuple(parents), tuple(offset), tuple(stop), depth)


@dataclass(frozen=True, eq=False)
class Paths:
    """A forest as plain documents: each path from a root to where nothing goes on, end to end.

    Documents without tokens are on no path of their own; the root that padding is has none.

        P        documents P, A, B: paths P A and P B; the second P is a copy
        |- A
        |- B

    Attributes:
        cu_seqlens: int64 `[num_paths + 1]`.
        tokens: int64 `[cu_seqlens[-1]]`, the token of the stream that stands there.
        copies: bool `[cu_seqlens[-1]]`, whether an earlier path has the token too. Every token
            that is not padding is there once without being a copy.
    """

    cu_seqlens: NDArray[np.int64]
    tokens: NDArray[np.int64]
    copies: NDArray[np.bool_]

    @staticmethod
    def of(cu_seqlens: NDArray[np.int64], forest: Forest, padding: NDArray[np.bool_]) -> Paths:
        """The paths of documents `cu_seqlens[d] : cu_seqlens[d + 1]` that are not padding."""
        start, stop, lengths = cu_seqlens[:-1], cu_seqlens[1:], np.diff(cu_seqlens)
        parents, offset = np.array(forest.parents, np.int64), np.array(forest.path_offset, np.int64)
        goes_on = np.array(forest.subtree_stop, np.int64) > stop
        ends = np.flatnonzero(~goes_on & (lengths > 0) & ~padding)
        cu = np.append(0, np.cumsum(offset[ends] + lengths[ends]))
        tokens = np.empty(cu[-1], np.int64)
        document, path = ends, cu[:-1]
        while document.size:
            n = lengths[document]
            place = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            tokens[np.repeat(path + offset[document], n) + place] = (
                np.repeat(start[document], n) + place
            )
            above = parents[document]
            document, path = above[above >= 0], path[above >= 0]
        # Documents stand depth-first, so what is new on a path stands behind the last one's end.
        before = np.append(0, stop[ends[:-1]])[: ends.size]
        return Paths(cu, tokens, tokens < np.repeat(before, np.diff(cu)))


@dataclass(frozen=True, eq=False)
class ForestTensors:
    """What masks need of a forest, int64 `[num_documents]`, on the layout's device."""

    path_offset: Tensor
    subtree_stop: Tensor
    depth: int
