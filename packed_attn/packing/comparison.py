"""The same documents three ways, in one report: padded, truncated and packed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.plan import Packs
from packed_attn.packing.truncation import truncation_of

if TYPE_CHECKING:
    from rich.table import Table


def compare(packs: Packs, max_length: int | None = None) -> Comparison:
    """What a plan's documents would cost, and lose, padded or truncated instead of packed.

    Args:
        packs: a plan with at least one pack. A piece of a document that it cut counts as a
            document; what the plan itself lost stands in its own report.
        max_length: where truncation (`truncate(max_length=)`) cuts. By default four of five
            documents stay whole.

    Raises:
        ValueError: a plan without packs, or a `max_length` below 1.
    """
    if not packs.num_packs:
        raise ValueError("packs must hold at least one pack to be compared, got none")
    lengths, report = packs.document_lengths, packs.report
    cut = int(np.quantile(lengths, 0.8)) if max_length is None else max_length
    kept, truncation = truncation_of(lengths, cut)
    padded = _one_a_row("padded", lengths, 0, 0)
    lost = sum(truncation.lost_tokens.values())
    truncated = _one_a_row("truncated", kept, lost, truncation.truncated_examples)
    packed = Way(
        "packed",
        packs.num_packs,
        report.capacity,
        report.packed_tokens,
        0,
        0,
        report.attention_cost,
    )
    return Comparison(cut, padded, truncated, packed)


@dataclass(frozen=True)
class Way:
    """One way to lay documents in rows.

    Attributes:
        name: `"padded"`, `"truncated"` or `"packed"`.
        rows, row_tokens: rows, and tokens of each with its padding.
        tokens: tokens of documents in the rows.
        lost_tokens: tokens of documents that are not.
        cut_documents: documents that lost some.
        attention_cost: query-key pairs: the sum of length^2 over what attention runs on, documents
            in packs (shared prefixes once) and whole rows otherwise.
    """

    name: str
    rows: int
    row_tokens: int
    tokens: int
    lost_tokens: int
    cut_documents: int
    attention_cost: int

    @property
    def computed_tokens(self) -> int:
        """Tokens with padding: memory for activations grows with them."""
        return self.rows * self.row_tokens

    @property
    def loss(self) -> float:
        """Share of the documents' tokens that is lost."""
        return self.lost_tokens / (self.tokens + self.lost_tokens)


@dataclass(frozen=True)
class Comparison:
    """Padding, truncation and packing of the same documents side by side.

    Attributes:
        max_length: where truncation cuts.
        padded, truncated, packed: each way's figures. `print` shows them, and `rich.print` as a
            table.
    """

    max_length: int
    padded: Way
    truncated: Way
    packed: Way

    @property
    def ways(self) -> tuple[Way, Way, Way]:
        return self.padded, self.truncated, self.packed

    def to_dict(self) -> dict[str, Any]:
        """Every figure by name, of types that JSON has."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """A head, and one line of text a way."""
        return [
            ("", "rows", "tokens computed", "real", "tokens lost", "documents cut", "attention"),
            *(
                (
                    f"{way.name} to {way.row_tokens:,}",
                    f"{way.rows:,}",
                    f"{way.computed_tokens:,}",
                    f"{way.tokens / way.computed_tokens:.1%}",
                    f"{way.lost_tokens:,} ({way.loss:.2%})",
                    f"{way.cut_documents:,}",
                    f"{way.attention_cost:.3g}",
                )
                for way in self.ways
            ),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = []
        for name, *cells in rows:
            aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:]))
            lines.append("  ".join((f"{name:<{widths[0]}}", *aligned)))
        return "\n".join(lines)

    def __rich__(self) -> Table:
        """The same rows as a table, for `rich.print`."""
        from rich.table import Table

        head, *ways = self.rows()
        table = Table(title="the same documents", title_justify="left")
        for name in head:
            table.add_column(name, justify="right" if name else "left")
        for cells, way in zip(ways, self.ways):
            table.add_row(*cells, style="yellow" if way.lost_tokens else None)
        return table


def _one_a_row(name: str, lengths: NDArray[np.int64], lost: int, cut: int) -> Way:
    """Each document in a row of its own, padded to the longest."""
    longest = int(lengths.max())
    pairs = lengths.size * longest**2
    return Way(name, lengths.size, longest, int(lengths.sum()), lost, cut, pairs)
