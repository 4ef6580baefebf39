"""A running count of where the documents and tokens of a stream go."""

from __future__ import annotations

from dataclasses import dataclass

from packed_attn.packing.plan import Overflow
from packed_attn.packing.report import PackingReport


@dataclass
class Tally:
    """The figures of a `PackingReport`, by its names, as far as they can be counted on reading."""

    documents: int = 0
    whole_documents: int = 0
    split_documents: int = 0
    truncated_documents: int = 0
    dropped_documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    packed_tokens: int = 0
    truncated_tokens: int = 0
    dropped_tokens: int = 0
    padding_tokens: int = 0
    pieces: int = 0
    lost_labels: int = 0
    packs: int = 0

    def count(
        self, number: int, length: int, padding: int, capacity: int, overflow: Overflow
    ) -> list[tuple[int, int]]:
        """Counts document `number` and says which of its tokens go into packs, as ranges."""
        if length > capacity and overflow == "error":
            raise ValueError(
                f"documents must not be over capacity under overflow='error', but document {number}"
                f" has {length} tokens and capacity is {capacity}"
            )
        self.documents += 1
        self.tokens += length + padding
        self.padding_tokens += padding
        kept = self._keep(length, capacity, overflow)
        cuts = [(i, min(i + capacity, kept)) for i in range(0, kept, capacity)]
        self.packed_tokens += kept
        self.pieces += len(cuts)
        self.lost_labels += max(0, len(cuts) - 1)
        return cuts

    def _keep(self, length: int, capacity: int, overflow: Overflow) -> int:
        if not length:
            self.empty_documents += 1
        elif length <= capacity:
            self.whole_documents += 1
        elif overflow == "split":
            self.split_documents += 1
        elif overflow == "truncate":
            self.truncated_documents += 1
            self.truncated_tokens += length - capacity
            return capacity
        else:
            self.dropped_documents += 1
            self.dropped_tokens += length
            return 0
        return length

    def report(self, capacity: int, overflow: Overflow) -> PackingReport:
        """The report of a stream packed by best-fit-decreasing in windows."""
        return PackingReport(strategy="bfd", overflow=overflow, capacity=capacity, **vars(self))
