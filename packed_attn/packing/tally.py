"""A running count of where the documents and tokens of a stream go."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.plan import Overflow
from packed_attn.packing.report import FILL_BINS, LENGTH_BINS, PackingReport
from packed_attn.packing.sources import IGNORED_LABEL


@dataclass
class Tally:
    """The figures of a `PackingReport`, by its names, counted document by document.

    The lower bound is that of the tokens alone: a stream's lengths are not kept.
    """

    capacity: int
    overflow: Overflow
    shares: bool = False  # masked tokens are then counted pack by pack
    documents: int = 0
    whole_documents: int = 0
    split_documents: int = 0
    truncated_documents: int = 0
    dropped_documents: int = 0
    empty_documents: int = 0
    unlearnable_documents: int = 0
    tokens: int = 0
    packed_tokens: int = 0
    truncated_tokens: int = 0
    dropped_tokens: int = 0
    unlearnable_tokens: int = 0
    padding_tokens: int = 0
    masked_tokens: int = 0
    pieces: int = 0
    lost_labels: int = 0
    packs: int = 0
    longest: int = 0
    attention_cost: int = 0
    shared_tokens: int = 0
    shared_attention_cost: int = 0
    length_histogram: list[int] = field(default_factory=lambda: [0] * (LENGTH_BINS + 1))
    fill_histogram: list[int] = field(default_factory=lambda: [0] * FILL_BINS)

    def count_document(
        self, where: str, length: int, padding: int, learned: int | None
    ) -> list[tuple[int, int]]:
        """Counts a document and says which of its tokens go into packs, as ranges.

        Args:
            where: what errors call it.
            length, padding: its tokens, and what was left out around them.
            learned: how many of the tokens that it may take have a label; None if all.

        Raises:
            ValueError: a document over capacity, under `overflow="error"`.
        """
        if length > self.capacity and self.overflow == "error":
            raise ValueError(
                f"documents must not be over capacity under overflow='error', but {where} has "
                f"{length} tokens and capacity is {self.capacity}"
            )
        self.documents += 1
        self.tokens += length + padding
        self.padding_tokens += padding
        bin_of_length = min(LENGTH_BINS, -(-length * LENGTH_BINS // self.capacity) - 1)
        self.length_histogram[bin_of_length] += length > 0
        kept = self._keep(length, learned)
        cuts = [(i, min(i + self.capacity, kept)) for i in range(0, kept, self.capacity)]
        self.packed_tokens += kept
        if learned is not None and kept and not self.shares:
            self.masked_tokens += kept - learned
        self.pieces += len(cuts)
        self.lost_labels += max(0, len(cuts) - 1)
        self.longest = max(self.longest, min(kept, self.capacity))
        self.attention_cost += sum((stop - first) ** 2 for first, stop in cuts)
        return cuts

    def count_pack(self, tokens: int, shared: int = 0, shared_cost: int = 0) -> None:
        """Counts a pack that was made, and what copies of its shared prefixes would add to it."""
        self.packs += 1
        self.packed_tokens -= shared
        self.shared_tokens += shared
        self.attention_cost -= shared_cost
        self.shared_attention_cost += shared_cost
        self.fill_histogram[-(-tokens * FILL_BINS // self.capacity) - 1] += 1

    def count_masked(self, labels: NDArray[np.int64]) -> None:
        """Counts the tokens of a pack with shared prefixes that have no label."""
        self.masked_tokens += int((labels == IGNORED_LABEL).sum())

    def report(self) -> PackingReport:
        """The report of a stream packed by best-fit-decreasing in windows."""
        figures = asdict(self)
        del figures["shares"]
        for name in ("length_histogram", "fill_histogram"):
            figures[name] = tuple(figures[name])
        bound = -(-self.packed_tokens // self.capacity)
        return PackingReport(strategy="bfd", lower_bound=bound, **figures)

    def _keep(self, length: int, learned: int | None) -> int:
        if not length:
            self.empty_documents += 1
        elif learned == 0:
            self.unlearnable_documents += 1
            self.unlearnable_tokens += length
            return 0
        elif length <= self.capacity:
            self.whole_documents += 1
        elif self.overflow == "split":
            self.split_documents += 1
        elif self.overflow == "truncate":
            self.truncated_documents += 1
            self.truncated_tokens += length - self.capacity
            return self.capacity
        else:
            self.dropped_documents += 1
            self.dropped_tokens += length
            return 0
        return length
