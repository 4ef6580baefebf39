"""What packing and truncating did to every document and token, as sums that balance."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger("packed_attn.packing")


@dataclass(frozen=True)
class PackingReport:
    """Where every document and every token of a packed set went.

    Two sums always balance; the constructor refuses figures that do not:

        documents = whole + split + truncated + dropped + empty
        tokens    = packed + truncated + dropped + padding

    Attributes:
        strategy, overflow, capacity: what `pack_lengths` was asked for.
        packs: packs made.
        pieces: documents inside the packs, where each piece of a cut document counts as one.
        documents: documents given.
        whole_documents: documents packed whole, in one piece.
        split_documents: documents that keep all tokens, but in more than one piece.
        truncated_documents: documents cut short because they were over capacity.
        dropped_documents: documents left out because they were over capacity.
        empty_documents: documents left out because they had no tokens.
        tokens: tokens given.
        packed_tokens: tokens in the packs.
        truncated_tokens: tokens cut off truncated documents.
        dropped_tokens: tokens of dropped documents.
        padding_tokens: padding in the input, which no pack holds (`pack_dataset` only).
        lost_labels: first tokens of the second and later pieces: nothing before them is left that
            could predict them, so their labels no longer count. Tokens whose label was masked
            already are among them.
    """

    strategy: str
    overflow: str
    capacity: int
    packs: int
    pieces: int
    documents: int
    whole_documents: int
    split_documents: int
    truncated_documents: int
    dropped_documents: int
    empty_documents: int
    tokens: int
    packed_tokens: int
    truncated_tokens: int
    dropped_tokens: int
    lost_labels: int
    padding_tokens: int = 0

    def __post_init__(self) -> None:
        documents = (
            self.whole_documents
            + self.split_documents
            + self.truncated_documents
            + self.dropped_documents
            + self.empty_documents
        )
        tokens = (
            self.packed_tokens + self.truncated_tokens + self.dropped_tokens + self.padding_tokens
        )
        if documents != self.documents or tokens != self.tokens:
            raise ValueError(
                f"report must balance, but accounts for {documents} of {self.documents} documents "
                f"and {tokens} of {self.tokens} tokens"
            )

    @property
    def fill(self) -> float:
        """Tokens in the packs / tokens the packs could hold; 0.0 without packs."""
        return self.packed_tokens / (self.packs * self.capacity) if self.packs else 0.0

    @property
    def lower_bound(self) -> int:
        """ceil(packed_tokens / capacity): no plan of the same tokens has fewer packs."""
        return -(-self.packed_tokens // self.capacity)

    @property
    def lossless(self) -> bool:
        """Whether every token and every label that could be learned is in the packs."""
        return not (self.truncated_tokens or self.dropped_tokens or self.lost_labels)

    def __str__(self) -> str:
        documents = _sum_line(
            self.documents,
            whole=self.whole_documents,
            split=self.split_documents,
            truncated=self.truncated_documents,
            dropped=self.dropped_documents,
            empty=self.empty_documents,
        )
        tokens = _sum_line(
            self.tokens,
            packed=self.packed_tokens,
            truncated=self.truncated_tokens,
            dropped=self.dropped_tokens,
            padding=self.padding_tokens,
        )
        return (
            f"{self.packs:,} packs of {self.capacity:,} tokens ({self.strategy}, "
            f"overflow={self.overflow}), {self.fill:.2%} full, lower bound {self.lower_bound:,}\n"
            f"  documents    {documents}\n"
            f"  tokens       {tokens}\n"
            f"  lost labels  {self.lost_labels:,} (first tokens after a cut)"
        )


@dataclass(frozen=True)
class TruncationReport:
    """What truncation cut off.

    Attributes:
        examples: examples given.
        truncated_examples: examples that lost at least one token.
        emptied_examples: examples of which a part that had tokens has none left, such as a
            completion behind a prompt that fills `max_length`: nothing is left to learn from it.
        tokens: tokens given, by part: `input_ids`, or `prompt`, `chosen`, `rejected`, ...
        lost_tokens: tokens cut off, by part.
    """

    examples: int
    truncated_examples: int
    emptied_examples: int
    tokens: dict[str, int]
    lost_tokens: dict[str, int]

    @property
    def lossless(self) -> bool:
        """Whether nothing was cut off."""
        return not any(self.lost_tokens.values())

    def __str__(self) -> str:
        parts = ", ".join(
            f"{part} {self.lost_tokens[part]:,} of {tokens:,}"
            for part, tokens in self.tokens.items()
        )
        return (
            f"truncated {self.truncated_examples:,} of {self.examples:,} examples "
            f"({self.emptied_examples:,} emptied); tokens lost: {parts or 'none'}"
        )


def log_report(report: PackingReport | TruncationReport) -> None:
    """Logs a report: a warning when something was lost, so that no loss is silent."""
    logger.log(logging.INFO if report.lossless else logging.WARNING, "%s", report)


def _sum_line(total: int, **parts: int) -> str:
    """`10 = 7 whole + 3 split`, leaving out parts that are zero."""
    return f"{total:,} = " + (" + ".join(f"{n:,} {name}" for name, n in parts.items() if n) or "0")
