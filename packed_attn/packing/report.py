"""What packing and truncating did to every document and token, as sums that balance."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger("packed_attn.packing")

LENGTH_BINS = 32  # of equal width up to the capacity, and one for what is over it
FILL_BINS = 20
SHADES = " ▁▂▃▄▅▆▇█"


class PackingLossError(ValueError):
    """More was lost than `max_loss` allows; `report` says what."""

    def __init__(self, message: str, report: PackingReport) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> Any:
        return type(self), (*self.args, self.report)


@dataclass(frozen=True)
class PackingReport:
    """Where every document and every token of a packed set went.

    Two sums always balance; the constructor refuses figures that do not:

        documents = whole + split + truncated + dropped + empty + unlearnable + unreadable
        tokens    = packed + shared + truncated + dropped + unlearnable + padding

    and packed tokens are learned or masked.

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
        unlearnable_documents: documents left out because no token of theirs has a label.
        unreadable_documents: documents left out because the input could not be read (malformed
            lines, where a reader was told to skip them); their tokens are unknown.
        tokens: tokens given.
        packed_tokens: tokens in the packs.
        shared_tokens: tokens of packed documents that stand in a pack already, as another's.
        truncated_tokens: tokens cut off truncated documents.
        dropped_tokens: tokens of dropped documents.
        unlearnable_tokens: tokens of unlearnable documents.
        padding_tokens: padding in the input, which no pack holds (data sets only).
        masked_tokens: packed tokens that no label counts for, as far as labels were given.
        alignment_tokens: room that `align` keeps free behind documents.
        lost_labels: first tokens of the second and later pieces: nothing before them is left that
            could predict them, so their labels no longer count. Tokens whose label was masked
            already are among them.
        lower_bound: packs that no plan of the same pieces (of the same trees, where prefixes are
            shared) does without: Martello and Toth's L2, or what `max_documents` or `apart` force
            where that is more. `wrapped` cuts anywhere, so there it is ceil(tokens / capacity).
        longest: tokens of the longest piece.
        attention_cost: query-key pairs of attention inside documents: the sum of length^2, a
            shared prefix counted once.
        shared_attention_cost: what the sum would be more with a copy of it for each document.
        length_histogram: documents with tokens by length: LENGTH_BINS bins of equal width up to
            the capacity, upper edges `capacity * k // LENGTH_BINS` included, then those over it.
        fill_histogram: packs by fill, FILL_BINS bins of equal width, upper edges included.
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
    lower_bound: int
    longest: int
    attention_cost: int
    length_histogram: tuple[int, ...]
    fill_histogram: tuple[int, ...]
    unlearnable_documents: int = 0
    unreadable_documents: int = 0
    unlearnable_tokens: int = 0
    padding_tokens: int = 0
    masked_tokens: int = 0
    alignment_tokens: int = 0
    shared_tokens: int = 0
    shared_attention_cost: int = 0

    def __post_init__(self) -> None:
        documents = sum(self._document_parts().values())
        tokens = sum(self._token_parts().values())
        if documents != self.documents or tokens != self.tokens:
            raise ValueError(
                f"report must balance, but accounts for {documents} of {self.documents} documents "
                f"and {tokens} of {self.tokens} tokens"
            )

    @classmethod
    def merged(cls, reports: Sequence[PackingReport]) -> PackingReport:
        """The report of sets packed one after another, such as shards, to the same capacity.

        The lower bound is that of the tokens alone, or of the set with the highest one: bounds of
        parts do not add up.
        """
        if not reports:
            raise ValueError("reports must hold at least one report, got none")
        first = reports[0]
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            column = [getattr(report, name) for report in reports]
            if name in ("strategy", "overflow", "capacity"):
                if len(set(column)) > 1:
                    raise ValueError(f"reports must have one {name}, got {sorted(set(column))}")
                values[name] = column[0]
            elif name.endswith("_histogram"):
                values[name] = tuple(map(sum, zip(*column, strict=True)))
            else:
                values[name] = max(column) if name in ("longest", "lower_bound") else sum(column)
        by_tokens = -(-values["packed_tokens"] // first.capacity)
        return cls(**{**values, "lower_bound": max(values["lower_bound"], by_tokens)})

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> PackingReport:
        """The report that `to_dict` wrote; figures that do not balance are refused."""
        names = {field.name for field in fields(cls)}
        if set(figures) != names:
            odd = sorted(set(figures) ^ names)
            raise ValueError(f"figures must be those of to_dict, but differ in: {', '.join(odd)}")
        values: dict[str, Any] = dict(figures)
        for name in ("length_histogram", "fill_histogram"):
            values[name] = tuple(values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, of types that JSON has."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @property
    def fill(self) -> float:
        """Tokens in the packs / tokens the packs could hold; 0.0 without packs."""
        return self.packed_tokens / (self.packs * self.capacity) if self.packs else 0.0

    @property
    def gap(self) -> float:
        """Packs beyond the lower bound / lower bound: no plan could save more than this."""
        return self.packs / self.lower_bound - 1 if self.packs else 0.0

    @property
    def learned_tokens(self) -> int:
        """Packed tokens that a label counts for, as far as labels were given."""
        return self.packed_tokens - self.masked_tokens

    @property
    def padded_tokens(self) -> int:
        """Tokens of the same pieces, each padded to the longest, instead of packed."""
        return self.pieces * self.longest

    @property
    def padded_attention_cost(self) -> int:
        """`attention_cost` of the same pieces, each padded to the longest."""
        return self.pieces * self.longest**2

    @property
    def loss(self) -> float:
        """Share of the tokens (padding aside) that are cut off, dropped, or lost as labels."""
        lost = self.truncated_tokens + self.dropped_tokens + self.lost_labels
        return lost / (self.tokens - self.padding_tokens) if lost else 0.0

    @property
    def lossless(self) -> bool:
        """Whether every token and every label that could be learned is in the packs."""
        return not (
            self.truncated_tokens
            or self.dropped_tokens
            or self.lost_labels
            or self.unreadable_documents
        )

    def require(self, max_loss: float | None) -> None:
        """Raises `PackingLossError` where more than `max_loss` (a share of the tokens) is lost."""
        if max_loss is not None and self.loss > max_loss:
            raise PackingLossError(
                f"max_loss allows {max_loss:.4%} of the tokens to be lost, but packing loses "
                f"{self.loss:.4%}:\n{self}",
                self,
            )

    def rows(self) -> list[tuple[str, str]]:
        """What a reader wants to see, as (name, text) pairs."""
        rows = [
            (
                "plan",
                f"{self.packs:,} packs of {self.capacity:,} tokens ({self.strategy}, "
                f"overflow={self.overflow}), {self.fill:.2%} full",
            ),
            ("lower bound", f"{self.lower_bound:,} packs; the plan has {self.gap:.3%} more"),
            ("documents", _sum_line(self.documents, self._document_parts())),
            ("tokens", _sum_line(self.tokens, self._token_parts())),
            ("lost labels", f"{self.lost_labels:,} (first tokens after a cut)"),
        ]
        if self.masked_tokens:
            parts = {"learned": self.learned_tokens, "masked": self.masked_tokens}
            rows.append(("labels", _sum_line(self.packed_tokens, parts)))
        if self.shared_tokens:
            rows.append(("shared", self._shared_line()))
        if self.alignment_tokens:
            rows.append(("alignment", f"{self.alignment_tokens:,} tokens of room kept free"))
        if self.pieces:
            saved = self.padded_attention_cost / self.attention_cost
            rows += [
                ("padded", f"{self.padded_tokens:,} tokens if padded to {self.longest:,} instead"),
                ("attention", f"{self.attention_cost:.3g} pairs, padded {saved:,.1f}x as many"),
                ("lengths", f"|{_bars(self.length_histogram)}| 0 to capacity, and over"),
                ("fills", f"|{_bars(self.fill_histogram)}| 0 to 100 %"),
            ]
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<13}{text}" for name, text in self.rows())

    def __rich__(self) -> Table:
        """The same rows as a table, for `rich.print`."""
        from rich.table import Table

        table = Table(show_header=False, title="packing report", title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        for name, text in self.rows():
            lost = name == "lost labels" and self.lost_labels
            short = name in ("documents", "tokens") and (
                self.truncated_documents or self.dropped_documents or self.unreadable_documents
            )
            table.add_row(name, text, style="yellow" if lost or short else None)
        return table

    def _shared_line(self) -> str:
        tokens = self.packed_tokens + self.shared_tokens
        pairs = self.attention_cost + self.shared_attention_cost
        return (
            f"{self.shared_tokens:,} tokens computed once for several documents: "
            f"{self.shared_tokens / tokens:.1%} of the tokens and "
            f"{self.shared_attention_cost / pairs:.1%} of attention saved"
        )

    def _document_parts(self) -> dict[str, int]:
        return {
            "whole": self.whole_documents,
            "split": self.split_documents,
            "truncated": self.truncated_documents,
            "dropped": self.dropped_documents,
            "empty": self.empty_documents,
            "unlearnable": self.unlearnable_documents,
            "unreadable": self.unreadable_documents,
        }

    def _token_parts(self) -> dict[str, int]:
        return {
            "packed": self.packed_tokens,
            "shared": self.shared_tokens,
            "truncated": self.truncated_tokens,
            "dropped": self.dropped_tokens,
            "unlearnable": self.unlearnable_tokens,
            "padding": self.padding_tokens,
        }


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
        truncation_mode: which side `max_length` kept.
    """

    examples: int
    truncated_examples: int
    emptied_examples: int
    tokens: dict[str, int]
    lost_tokens: dict[str, int]
    truncation_mode: str = "keep_start"

    @property
    def loss(self) -> float:
        """Share of the tokens that is cut off."""
        lost = sum(self.lost_tokens.values())
        return lost / sum(self.tokens.values()) if lost else 0.0

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
            f"({self.emptied_examples:,} emptied, {self.truncation_mode}); "
            f"tokens lost: {parts or 'none'} ({self.loss:.2%})"
        )


def log_report(report: PackingReport | TruncationReport) -> None:
    """Logs a report: a warning when something was lost, so that no loss is silent."""
    logger.log(logging.INFO if report.lossless else logging.WARNING, "%s", report)


def _sum_line(total: int, parts: Mapping[str, int]) -> str:
    """`10 = 7 whole + 3 split`, leaving out parts that are zero."""
    return f"{total:,} = " + (" + ".join(f"{n:,} {name}" for name, n in parts.items() if n) or "0")


def _bars(counts: Sequence[int]) -> str:
    """A bar of eight steps for each count; whatever is not 0 shows."""
    highest = max(counts)
    return "".join(SHADES[-(-count * (len(SHADES) - 1) // highest)] for count in counts)
