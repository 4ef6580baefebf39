"""Forests of documents: which document goes on from which, as facts of the host and as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class ForestTensors:
    """What masks need of a forest, int64 `[num_documents]`, on the layout's device."""

    path_offset: Tensor
    subtree_stop: Tensor
    depth: int
