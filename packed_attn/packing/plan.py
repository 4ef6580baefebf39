"""Lengths to packs: which tokens of which document go where, as plain numpy arrays."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packed_attn.packing.best_fit import best_fit_decreasing
from packed_attn.packing.report import PackingReport

Strategy = Literal["bfd", "wrapped"]
Overflow = Literal["split", "truncate", "drop", "error"]
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Packs:
    """Which tokens of which documents form which pack.

    Piece i is tokens `starts[i] : starts[i] + lengths[i]` of document `order[i]`, and the pieces
    `offsets[p] : offsets[p + 1]` form pack p. A piece of a cut document is a document of its own.

    Attributes:
        order: int64 `[num_pieces]`, the document of each piece.
        starts: int64 `[num_pieces]`, where the piece begins inside its document.
        lengths: int64 `[num_pieces]`, at least 1.
        offsets: int64 `[num_packs + 1]`, from 0 to num_pieces.
        report: where every document and token went.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    report: PackingReport

    def __len__(self) -> int:
        return self.num_packs

    @property
    def num_packs(self) -> int:
        return self.offsets.size - 1

    @property
    def num_pieces(self) -> int:
        return self.order.size

    @property
    def capacity(self) -> int:
        """Tokens a pack can hold."""
        return self.report.capacity

    @property
    def fill(self) -> float:
        """Tokens in the packs / tokens the packs could hold; 0.0 without packs."""
        return self.report.fill

    @property
    def pack_tokens(self) -> NDArray[np.int64]:
        """Tokens in each pack, int64 `[num_packs]`."""
        if not self.num_packs:
            return np.empty(0, np.int64)
        return np.add.reduceat(self.lengths, self.offsets[:-1])


def pack_lengths(
    lengths: ArrayLike,
    capacity: int,
    *,
    strategy: Strategy = "bfd",
    overflow: Overflow = "split",
) -> Packs:
    """Plans packs of at most `capacity` tokens from the lengths of documents.

    `"bfd"`, best-fit-decreasing over the whole set, keeps every document that fits whole. Packs
    stand in the order in which they were opened, which is longest document first: shuffle them, as
    trainers do. Inside a pack the longest document comes first, equal lengths in input order.

    `"wrapped"` lays the documents end to end in input order and cuts every `capacity` tokens: every
    pack but the last is full, and documents that cross a cut are split.

    Documents over capacity, under either strategy:

        "split"      are cut: by bfd into pieces of `capacity` tokens and a rest, by wrapped
                     wherever a pack ends
        "truncate"   keep their first `capacity` tokens
        "drop"       are left out
        "error"      raise

    The last three look at a document's own length: `wrapped` goes on cutting what crosses a pack's
    end. Empty documents are left out. `packs.report` counts all of it. The plan is deterministic.

    Args:
        lengths: tokens of each document, `[num_documents]` integers, any of them 0.
        capacity: tokens a pack holds, at least 1.
        strategy: how documents are placed.
        overflow: what happens to documents longer than `capacity`.

    Raises:
        ValueError: capacity below 1, lengths that are negative, not integers or not
            one-dimensional, an unknown strategy or overflow, or under `overflow="error"` a
            document over capacity.
    """
    capacity = _checked_capacity(capacity)
    _check_choice("strategy", strategy, Strategy)
    _check_choice("overflow", overflow, Overflow)
    given = _checked_lengths(lengths)
    kept = _kept_lengths(given, capacity, overflow)
    if strategy == "wrapped":
        order, starts, pieces, offsets = _wrap(kept, capacity)
    elif kept.size and kept.min() > 0 and kept.max() <= capacity:  # every document is one piece
        order, offsets = best_fit_decreasing(kept, capacity)
        starts, pieces = np.zeros_like(order), kept[order]
    else:
        order, starts, pieces = _cut(kept, capacity, np.zeros_like(kept))
        placed, offsets = best_fit_decreasing(pieces, capacity)
        order, starts, pieces = order[placed], starts[placed], pieces[placed]
    report = _account(given, kept, order, offsets, capacity, strategy, overflow)
    return Packs(order, starts, pieces, offsets, report)


def _kept_lengths(
    lengths: NDArray[np.int64], capacity: int, overflow: Overflow
) -> NDArray[np.int64]:
    """Tokens that each document takes into the packs; 0 leaves it out."""
    if overflow == "split" or not lengths.size or lengths.max() <= capacity:
        return lengths
    if overflow == "error":
        document = int(np.argmax(lengths > capacity))
        raise ValueError(
            f"documents must not be over capacity under overflow='error', but document {document} "
            f"has {lengths[document]} tokens and capacity is {capacity}"
        )
    if overflow == "truncate":
        return np.minimum(lengths, capacity)
    return np.where(lengths > capacity, 0, lengths)


def _wrap(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], ...]:
    """Documents end to end, cut every `capacity` tokens: order, starts, lengths, offsets."""
    order, starts, pieces = _cut(lengths, capacity, (np.cumsum(lengths) - lengths) % capacity)
    tokens_before = np.cumsum(pieces) - pieces
    pack_starts = np.arange(0, int(pieces.sum()), capacity)
    offsets = np.append(np.searchsorted(tokens_before, pack_starts), pieces.size)
    return order, starts, pieces, offsets


def _cut(
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


def _account(
    given: NDArray[np.int64],
    kept: NDArray[np.int64],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
    capacity: int,
    strategy: str,
    overflow: str,
) -> PackingReport:
    """Counts where the documents and tokens went."""
    documents, tokens, packed = given.size, int(given.sum()), int(kept.sum())
    empty = documents - np.count_nonzero(given)
    dropped = documents - empty - np.count_nonzero(kept)
    over = np.count_nonzero(kept != given) if packed != tokens else 0
    truncated = over - dropped
    dropped_tokens = int(given[kept == 0].sum()) if dropped else 0
    in_packs = documents - empty - dropped
    split = 0
    if order.size > in_packs:
        split = np.count_nonzero((np.bincount(order, minlength=documents) > 1) & (kept == given))
    return PackingReport(
        strategy=strategy,
        overflow=overflow,
        capacity=capacity,
        packs=offsets.size - 1,
        pieces=order.size,
        documents=documents,
        whole_documents=int(in_packs - split - truncated),
        split_documents=int(split),
        truncated_documents=int(truncated),
        dropped_documents=int(dropped),
        empty_documents=int(empty),
        tokens=tokens,
        packed_tokens=packed,
        truncated_tokens=tokens - packed - dropped_tokens,
        dropped_tokens=dropped_tokens,
        lost_labels=int(order.size - in_packs),
    )


def _checked_capacity(capacity: Any) -> int:
    try:
        whole = operator.index(capacity)
    except TypeError:
        whole = None
    if whole is None or isinstance(capacity, bool):
        raise ValueError(f"capacity must be an integer, got {capacity!r}")
    if not 1 <= whole <= INT64_MAX // 2:
        raise ValueError(f"capacity must be at least 1 and below 2^62, got {whole}")
    return whole


def _check_choice(argument: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        names = ", ".join(repr(name) for name in get_args(choices))
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")


def _checked_lengths(lengths: Any) -> NDArray[np.int64]:
    """The lengths as int64 `[num_documents]`, or a ValueError that names the first bad one."""
    try:
        array = np.asarray(lengths)
    except ValueError as error:
        raise ValueError(f"lengths must be one-dimensional: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional, got shape {array.shape}")
    if not array.size:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(_non_integer(lengths, array.dtype))
    if array.min() < 0:
        document = int(np.argmax(array < 0))
        raise ValueError(
            f"lengths must not be negative, but lengths[{document}] is {array[document]}"
        )
    # The first test is free; the second sums exactly, and only when the first cannot rule it out.
    if int(array.max()) * array.size > INT64_MAX and sum(array.tolist()) > INT64_MAX // 2:
        raise ValueError("lengths must add to less than 2^62 tokens, but they add to more")
    return array.astype(np.int64, copy=False)


def _non_integer(lengths: Sequence[Any], dtype: np.dtype) -> str:
    for document, length in enumerate(lengths):
        if isinstance(length, bool | np.bool_) or not isinstance(length, int | np.integer):
            return f"lengths must be integers, but lengths[{document}] is {length!r}"
    return f"lengths must be integers that fit in 64 bits, got an array of {dtype}"
