"""Lengths to packs: which tokens of which document go where, as plain numpy arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packed_attn.packing.account import (
    Fates,
    document_figures,
    fill_histogram,
    length_figures,
    shared_figures,
)
from packed_attn.packing.arguments import (
    check_choice,
    check_share,
    checked_column,
    checked_lengths,
    checked_whole,
)
from packed_attn.packing.best_fit import Histogram
from packed_attn.packing.evened import evened
from packed_attn.packing.forest import ForestPlan
from packed_attn.packing.in_order import cut, wrap
from packed_attn.packing.placement import Constraints, Strategy, in_random_order, place
from packed_attn.packing.report import PackingReport
from packed_attn.packing.shared import Plan, Trees, attention_pairs, place_forest, with_rests

Overflow = Literal["split", "truncate", "drop", "error"]
# From tokens that each document begins with, int64 `[num_documents]`, 0 for those left out.
Share = Callable[[NDArray[np.int64]], ForestPlan]


@dataclass(frozen=True, eq=False)
class Packs:
    """Which tokens of which documents form which pack.

    Piece i is tokens `starts[i] : starts[i] + lengths[i]` of document `order[i]`, and the pieces
    `offsets[p] : offsets[p + 1]` form pack p. A piece of a cut document is a document of its own.
    Where prefixes are shared, a piece is tokens that several documents may have, and `trees` says
    which pieces each document is made of.

    Attributes:
        order: int64 `[num_pieces]`, the document of each piece, or one of those that have it.
        starts: int64 `[num_pieces]`, where the piece begins inside its document.
        lengths: int64 `[num_pieces]`, at least 1.
        offsets: int64 `[num_packs + 1]`, from 0 to num_pieces.
        report: where every document and token went.
        trees: how pieces go on from each other; None without shared prefixes.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    report: PackingReport
    trees: Trees | None = None

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
        return sum_by_pack(self.lengths, self.offsets)

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document in the packs, shared ones counted for each that has them."""
        return self.lengths if self.trees is None else self.trees.lengths

    @property
    def attention_pairs(self) -> NDArray[np.int64]:
        """Query-key pairs of each piece, int64 `[num_pieces]`, as length^2 counts a document's."""
        if self.trees is None:
            return self.lengths**2
        return attention_pairs(self.lengths, self.starts, self.trees.parents)

    def digest(self) -> str:
        """sha256 of the plan, in hex: two plans with one digest put every token in one place."""
        digest = hashlib.sha256(str(self.capacity).encode())
        trees = [] if self.trees is None else [getattr(self.trees, f.name) for f in fields(Trees)]
        for array in (self.offsets, self.order, self.starts, self.lengths, *trees):
            digest.update(array.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


def pack_lengths(
    lengths: ArrayLike,
    capacity: int,
    *,
    strategy: Strategy = "bfd",
    overflow: Overflow = "split",
    learned: ArrayLike | None = None,
    seed: int | None = None,
    epoch: int = 0,
    max_documents: int | None = None,
    align: int = 1,
    together: ArrayLike | None = None,
    apart: ArrayLike | None = None,
    max_loss: float | None = None,
    share: Share | None = None,
    multiple: int = 1,
) -> Packs:
    """Plans packs of at most `capacity` tokens from the lengths of documents.

        "bfd"       best-fit-decreasing over the whole set, which keeps every document that fits
                    whole. Packs stand in the order in which they were opened, which is longest
                    document first, unless a seed shuffles them; inside a pack the longest
                    document comes first, equal lengths in input order
        "optimal"   for sets where bfd stays more than 1 % above the bound, such as documents of a
                    third of the capacity: a linear program over whole packs, which takes seconds
                    and scipy. Never more packs than bfd
        "next_fit"  keeps the input's order: a pack is closed at the first document that it has no
                    room for
        "wrapped"   lays the documents end to end in input order and cuts every `capacity` tokens:
                    every pack but the last is full, and documents that cross a cut are split

    Documents over capacity:

        "split"      are cut: by wrapped wherever a pack ends, by the others into pieces of
                     `capacity` tokens and a rest
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
        learned: for each document, how many of the tokens that it takes have a label: documents
            with none are left out, and the report counts learned and masked tokens.
        seed, epoch: with a seed, packs are shuffled, and by bfd and optimal equally long documents
            change places first, so that packs differ from epoch to epoch. The same pair gives the
            same plan.
        max_documents: most documents (pieces) in a pack.
        align: documents begin at multiples of this many tokens, so each takes a multiple of it as
            room; `PackedCollator(align=...)` fills the room with padding.
        together: integers `[num_documents]`: documents with one number of at least 0 share a pack;
            negative ones are free.
        apart: the same, but no two documents with one number share a pack. Planned in Python, one
            document at a time.
        max_loss: share of the tokens that may be lost (cut off, dropped, or lost as labels).
        share: plans what documents begin with in common, which then stands in a pack once. It is
            given how many tokens each document begins with (int64 `[num_documents]`, at most the
            capacity, 0 for those left out) and returns their `ForestPlan`:
            `lambda lengths: plan_prompts(lengths, prompt_ids, prompt_lengths)`. Trees over capacity
            are split with their prefix repeated. Masked tokens are counted by data sets alone.
        multiple: packs come to a multiple of this: those with the most documents are cut in two,
            between documents. Processes x batch makes them divide without a pack that runs twice.

    Raises:
        PackingLossError: more is lost than `max_loss`.
        NotImplementedError: a constraint that the strategy does not keep.
        ValueError: capacity below 1, lengths that are negative, not integers or not
            one-dimensional, an unknown strategy or overflow, a capacity that align does not divide,
            documents that must share a pack and do not fit, fewer documents than a multiple of
            packs takes, or under `overflow="error"` a document over capacity.
    """
    request = _Request(
        checked_whole("capacity", capacity),
        strategy,
        overflow,
        None if seed is None else checked_whole("seed", seed, 0),
        checked_whole("epoch", epoch, 0),
        checked_whole("align", align),
        checked_whole("multiple", multiple),
    )
    check_share("max_loss", max_loss)
    given = checked_lengths(lengths)
    constraints = Constraints(
        None if max_documents is None else checked_whole("max_documents", max_documents),
        None if together is None else checked_column("together", together, given.size),
        None if apart is None else checked_column("apart", apart, given.size),
    )
    _check_kept(strategy, constraints)
    if request.multiple > 1 and constraints.together is not None:
        raise NotImplementedError("multiple cuts packs, which could part what together joins")
    fates = _fates(given, learned, request)
    if share is None:
        plan = _plan(fates, constraints, request)
    else:
        _check_shares(constraints, request)
        plan = _plan_shared(fates.kept, share, request)
    packs = _reported(evened(plan, request.multiple), fates, request)
    packs.report.require(max_loss)
    return packs


@dataclass(frozen=True, eq=False)
class _Request:
    """Settings of a plan, checked."""

    capacity: int
    strategy: Strategy
    overflow: Overflow
    seed: int | None
    epoch: int
    align: int
    multiple: int

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, Strategy)
        check_choice("overflow", self.overflow, Overflow)
        if self.capacity % self.align:
            raise ValueError(f"align must divide capacity, got {self.align} and {self.capacity}")

    @property
    def units(self) -> int:
        """What a pack holds, in steps of `align`."""
        return self.capacity // self.align

    def random(self, use: int) -> np.random.Generator:
        """Random numbers for one of several uses, the same for the same seed and epoch."""
        return np.random.default_rng([self.seed or 0, self.epoch, use])


def _check_shares(constraints: Constraints, request: _Request) -> None:
    """Refuses what whole trees do not keep."""
    settings = {"strategy='wrapped'": request.strategy == "wrapped", "align": request.align > 1}
    for name in ("max_documents", "together", "apart"):
        settings[name] = getattr(constraints, name) is not None
    for name, given in settings.items():
        if given:
            raise NotImplementedError(
                f"documents that share prefixes are placed as whole trees, without {name}"
            )


def _check_kept(strategy: Strategy, constraints: Constraints) -> None:
    """Refuses constraints that the strategy does not keep."""
    keeps = {
        "bfd": ("max_documents", "together", "apart"),
        "next_fit": ("max_documents", "together"),
        "optimal": ("together",),
        "wrapped": (),
    }[strategy]
    for name in ("max_documents", "together", "apart"):
        if getattr(constraints, name) is not None and name not in keeps:
            raise NotImplementedError(f"strategy={strategy!r} does not keep {name}; 'bfd' does")


def _fates(given: NDArray[np.int64], learned: Any, request: _Request) -> Fates:
    histogram = Histogram.of(given)
    kept = given
    if histogram.longest > request.capacity:
        kept = _kept_lengths(given, request.capacity, request.overflow)
    if learned is None:
        return Fates(given, kept, histogram)
    learned = checked_column("learned", learned, given.size)
    odd = np.flatnonzero((learned < 0) | (learned > given))
    if odd.size:
        raise ValueError(
            f"learned must be from 0 to the document's length, but learned[{odd[0]}] is "
            f"{learned[odd[0]]} and lengths[{odd[0]}] is {given[odd[0]]}"
        )
    return Fates(given, np.where(learned > 0, kept, 0), histogram, learned)


def _kept_lengths(
    lengths: NDArray[np.int64], capacity: int, overflow: Overflow
) -> NDArray[np.int64]:
    """Tokens that each document takes where some are over capacity; 0 leaves it out."""
    if overflow == "split":
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


def _plan(fates: Fates, constraints: Constraints, request: _Request) -> Plan:
    kept = fates.kept
    histogram = fates.histogram if kept is fates.given else Histogram.of(kept)
    if request.seed is None:
        return _plan_in_order(kept, histogram, constraints, request)
    if request.strategy in ("wrapped", "next_fit"):  # they keep the order of documents
        return _shuffled(_plan_in_order(kept, histogram, constraints, request), request)
    documents = request.random(0).permutation(kept.size)
    constraints = constraints.of(documents)
    plan = _plan_in_order(kept[documents], histogram, constraints, request)
    return _shuffled(replace(plan, order=documents[plan.order]), request)


def _plan_shared(kept: NDArray[np.int64], share: Share, request: _Request) -> Plan:
    forest = share(np.minimum(kept, request.capacity))
    if forest.ends.size != kept.size:
        raise ValueError(
            f"share must plan all {kept.size} documents, but it planned {forest.ends.size}"
        )
    order, starts, lengths = _rests(kept, request.capacity)
    forest = with_rests(forest, order, starts, lengths)
    random = None if request.seed is None else request.random
    plan = place_forest(forest, request.capacity, request.strategy, random)
    assert plan.trees is not None
    ended = plan.trees.documents
    late = np.flatnonzero(ended >= kept.size)
    ended[late] = order[ended[late] - kept.size]
    return plan


def _rests(kept: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], ...]:
    """What documents have beyond their first `capacity` tokens: document, start and length."""
    long = np.flatnonzero(kept > capacity)
    order, starts, lengths = cut(kept[long] - capacity, capacity, np.zeros_like(long))
    return long[order], starts + capacity, lengths


def _plan_in_order(
    kept: NDArray[np.int64], histogram: Histogram, constraints: Constraints, request: _Request
) -> Plan:
    if request.strategy == "wrapped":
        return _wrapped(kept, request)
    order = starts = None  # every document is one piece, unless it has to be cut
    pieces = kept
    whole = not histogram.has_zeros and histogram.longest <= request.capacity
    if not whole:
        order, starts, pieces = cut(kept, request.capacity, np.zeros_like(kept))
        constraints = constraints.of(order)
    sizes = pieces if request.align == 1 else -(-pieces // request.align)
    if not whole or request.align > 1:
        histogram = Histogram.of(sizes)
    placed = place(sizes, histogram, request.units, request.strategy, constraints)
    at = placed.order
    in_order = placed.sizes if request.align == 1 else None
    return Plan(
        at if order is None else order[at],
        np.zeros_like(at) if starts is None else starts[at],
        pieces[at] if in_order is None else in_order,
        placed.offsets,
        histogram,
        placed.bound,
    )


def _wrapped(kept: NDArray[np.int64], request: _Request) -> Plan:
    order, starts, sizes, offsets = wrap(-(-kept // request.align), request.units)
    starts = starts * request.align
    lengths = np.minimum(sizes * request.align, kept[order] - starts)
    bound = -(-int(sizes.sum()) // request.units)
    return Plan(order, starts, lengths, offsets, Histogram.of(sizes), bound)


def _shuffled(plan: Plan, request: _Request) -> Plan:
    """The same packs in random order."""
    moved, offsets = in_random_order(plan.offsets, request.random(1))
    return replace(
        plan,
        order=plan.order[moved],
        starts=plan.starts[moved],
        lengths=plan.lengths[moved],
        offsets=offsets,
    )


def _reported(plan: Plan, fates: Fates, request: _Request) -> Packs:
    documents = plan.order if plan.trees is None else plan.trees.documents
    pieces = plan.sizes if request.align == 1 else Histogram.of(plan.lengths)
    if plan.trees is not None:
        pieces = Histogram.of(plan.trees.lengths)
    whole = fates.all_whole(documents.size)
    packed = plan.sizes.total * request.align
    figures = {
        **document_figures(fates, documents, whole),
        **length_figures(pieces if whole else fates.histogram, pieces, request.capacity),
    }
    if plan.trees is not None:
        pairs = attention_pairs(plan.lengths, plan.starts, plan.trees.parents)
        packed = int(plan.lengths.sum())
        figures |= shared_figures(figures, packed, int(pairs.sum()))
    report = PackingReport(
        strategy=request.strategy,
        overflow=request.overflow,
        capacity=request.capacity,
        packs=plan.offsets.size - 1,
        pieces=documents.size,
        lower_bound=plan.bound,
        fill_histogram=fill_histogram(sum_by_pack(plan.lengths, plan.offsets), request.capacity),
        **figures,
    )
    report = replace(report, alignment_tokens=packed - report.packed_tokens)
    return Packs(plan.order, plan.starts, plan.lengths, plan.offsets, report, plan.trees)


def sum_by_pack(values: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of one value a piece, int64 `[num_packs]`."""
    return np.add.reduceat(values, offsets[:-1]) if offsets.size > 1 else np.empty(0, np.int64)
