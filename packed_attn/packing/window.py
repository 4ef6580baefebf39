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
from packed_attn.packing.forest import bits, plan_flat
from packed_attn.packing.plan import sum_by_pack
from packed_attn.packing.prefixes import agreeing, learned_labels
from packed_attn.packing.shared import attention_pairs, place_forest
from packed_attn.packing.sources import IGNORED_LABEL

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


@dataclass(frozen=True, eq=False)
class Shared:
    """How a pack's documents share what they begin with, int64 vectors.

    Attributes:
        order, starts, lengths, parents: of each piece: the document in the pack that it is read
            from, where it begins in that, its tokens, and the piece that it continues (-1: none).
        ends: `[num_documents]`, the piece in which each document ends.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    parents: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pack:
    """Documents that leave the window together; `shared` is None where each has its own tokens."""

    documents: list[Piece]
    shared: Shared | None = None

    @property
    def tokens(self) -> int:
        if self.shared is not None:
            return int(self.shared.lengths.sum())
        return sum(piece.length for piece in self.documents)

    @property
    def saved(self) -> tuple[int, int]:
        """Tokens and query-key pairs that copies of what is shared would add."""
        if self.shared is None:
            return 0, 0
        lengths = np.array([piece.length for piece in self.documents], np.int64)
        shared = self.shared
        pairs = attention_pairs(shared.lengths, shared.starts, shared.parents)
        return int(lengths.sum() - shared.lengths.sum()), int((lengths**2).sum() - pairs.sum())


@dataclass(eq=False)
class Window:
    """The pieces that wait for a pack.

    Args:
        capacity: tokens a pack holds.
        lookahead: pieces that the window holds before it is planned.
        pool: the pieces, in the order in which they came.
        min_shared: tokens that sharing a prefix must save; None shares none.
        multiple: packs of the whole stream come to a multiple of this, where documents allow it.
        held: pieces of the pool that only wait for the stream's end, to be cut apart there.
    """

    capacity: int
    lookahead: int
    pool: list[Piece] = field(default_factory=list)
    min_shared: int | None = None
    multiple: int = 1
    held: int = 0

    @property
    def full(self) -> bool:
        return len(self.pool) - self.held >= self.lookahead

    def release(self, *, everything: bool, before: int = 0) -> list[Pack]:
        """Takes packs out of the window, in the order of their earliest documents.

        Packs at least 0.999 full leave, the fuller half always, and so does a pack with a document
        that eight windows' worth of documents have passed; at the end of a stream all leave. Then
        the packs with the most documents are cut in two until there is a `multiple` of packs, for
        which some packs of several documents are held back until the end.

        Args:
            everything: whether the stream has ended.
            before: packs that have left.
        """
        members, fills, shared = self._planned()
        leave = np.ones(fills.size, bool) if everything else self._leaving(members, fills)
        if not everything:
            self._hold_back(members, leave)
        # Documents that share nothing stand in their own order, others as their tree has them.
        out = [
            (pieces if tree is not None else np.sort(pieces), tree)
            for pieces, tree, leaves in zip(members, shared, leave)
            if leaves
        ]
        out.sort(key=lambda pack: pack[0].min())
        packs = [Pack([self.pool[i] for i in pieces], tree) for pieces, tree in out]
        kept = np.ones(len(self.pool), bool)
        for pieces, _ in out:
            kept[pieces] = False
        self.pool = [piece for piece, stays in zip(self.pool, kept) if stays]
        # A window that stayed full would be planned again, for ever.
        self.held = max(self.held, len(self.pool) - self.lookahead + 1)
        return self._evened(packs, before) if everything else packs

    def _planned(self) -> tuple[list[NDArray[np.int64]], NDArray[Any], list[Shared | None]]:
        """Of each pack: its documents by their place in the pool, its tokens, and its tree."""
        lengths = np.array([piece.length for piece in self.pool], np.int64)
        if self.min_shared is None or not self.pool:
            order, placed, offsets = best_fit_decreasing(lengths, self.capacity)
            members = [order[first:stop] for first, stop in pairwise(offsets.tolist())]
            return members, sum_by_pack(placed, offsets), [None] * len(members)
        tokens = bits(np.concatenate([piece.columns["input_ids"] for piece in self.pool]))
        second = np.concatenate([agreeing(piece.columns) for piece in self.pool])
        begins = np.cumsum(lengths) - lengths
        forest = plan_flat(tokens, begins, lengths, self.min_shared, second)
        placed = place_forest(forest, self.capacity, "bfd")
        trees, members, shared = placed.trees, [], []
        assert trees is not None
        for pack, (first, stop) in enumerate(pairwise(placed.offsets.tolist())):
            inside = slice(trees.offsets[pack], trees.offsets[pack + 1])
            documents = trees.documents[inside]
            place = {document: i for i, document in enumerate(documents.tolist())}
            # A piece is read from a document of this pack, which the split may have put elsewhere.
            order = _readers(documents, trees.ends[inside], trees.parents[first:stop])
            members.append(documents)
            shared.append(
                Shared(
                    np.array([place[d] for d in order.tolist()], np.int64),
                    placed.starts[first:stop],
                    placed.lengths[first:stop],
                    trees.parents[first:stop],
                    trees.ends[inside],
                )
            )
        return members, sum_by_pack(placed.lengths, placed.offsets), shared

    def _leaving(self, members: list[NDArray[np.int64]], fills: NDArray[Any]) -> NDArray[np.bool_]:
        leave = fills >= FULL * self.capacity
        fullest = np.argsort(-fills, kind="stable")[: (fills.size + 1) // 2]
        leave[fullest] = True
        newest = self.pool[-1].document
        oldest = np.array([self.pool[pieces.min()].document for pieces in members])
        return leave | (newest - oldest > LONGEST_WAIT * self.lookahead)

    def _hold_back(self, members: list[NDArray[np.int64]], leave: NDArray[np.bool_]) -> None:
        """Lets the newest packs of several documents stay, until `multiple - 1` cuts are left."""
        cuts = np.array([pieces.size - 1 for pieces in members])
        missing = self.multiple - 1 - cuts[~leave].sum()
        self.held = 0
        for pack in sorted(np.flatnonzero(leave & (cuts > 0)), key=lambda p: -members[p].min()):
            if missing <= 0:
                break
            leave[pack] = False
            missing -= cuts[pack]
            self.held += members[pack].size

    def _evened(self, packs: list[Pack], before: int) -> list[Pack]:
        """The last packs of a stream, some cut in two between documents."""
        # A prefix that saves too little for fewer documents stays shared: copies of it could fill
        # a third pack.
        least = None if self.min_shared is None else 1
        while (before + len(packs)) % self.multiple:
            most = max(packs, key=lambda pack: len(pack.documents), default=None)
            if most is None or len(most.documents) < 2:
                break
            packs = [pack for pack in packs if pack is not most]
            half = len(most.documents) // 2
            for part in (most.documents[:half], most.documents[half:]):
                window = Window(self.capacity, self.lookahead, part, least)
                packs += window.release(everything=True)
        return sorted(packs, key=lambda pack: min(piece.document for piece in pack.documents))


def _readers(
    documents: NDArray[np.int64], ends: NDArray[np.int64], parents: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of each piece, a document that it is a part of: int64 `[num_pieces]`."""
    readers = np.full(parents.size, -1)
    readers[ends] = documents
    for piece in range(parents.size - 1, -1, -1):
        if parents[piece] >= 0:
            readers[parents[piece]] = readers[piece]
    return readers


def assemble(pack: Pack) -> dict[str, NDArray[Any]]:
    """One row of what `pack_dataset` writes, as numpy arrays.

    Returns:
        `input_ids`, `labels`, `position_ids`, int64 `[tokens]`; `seq_lengths`, int64 `[pieces]`;
        the other columns, `[tokens]`. With shared prefixes `parents` and `ends` instead of
        positions and other columns.
    """
    if pack.shared is not None:
        return _assemble_shared(pack.documents, pack.shared)
    pieces = pack.documents
    names = pieces[0].columns
    row = {name: np.concatenate([piece.columns[name] for piece in pieces]) for name in names}
    lengths = np.array([piece.length for piece in pieces], np.int64)
    firsts = np.cumsum(lengths) - lengths
    tokens, labels = row["input_ids"], learned_labels(row)
    labels[firsts] = IGNORED_LABEL
    positions = np.arange(tokens.size) - np.repeat(firsts, lengths)
    written = {"labels": labels, "position_ids": positions, "seq_lengths": lengths}
    return {"input_ids": tokens, **written, **{n: v for n, v in row.items() if n not in written}}


def _assemble_shared(documents: list[Piece], shared: Shared) -> dict[str, NDArray[Any]]:
    spans = list(zip(shared.order.tolist(), shared.starts.tolist(), shared.lengths.tolist()))
    columns = {
        name: np.concatenate([documents[d].columns[name][a : a + n] for d, a, n in spans])
        for name in documents[0].columns
    }
    labels = learned_labels(columns)
    firsts = np.cumsum(shared.lengths) - shared.lengths
    labels[firsts[shared.parents < 0]] = IGNORED_LABEL
    return {
        "input_ids": columns["input_ids"],
        "labels": labels,
        "seq_lengths": shared.lengths,
        "parents": shared.parents,
        "ends": shared.ends,
    }
