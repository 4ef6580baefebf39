"""A matrix as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from packed_attn.audit.matrix import SIDES, Matrix, MatrixRow
from packed_attn.audit.words import COLUMNS, WORDS


def to_markdown(matrix: Matrix, command: str) -> str:
    """The page: versions, counts by convention, then a row a model.

    Args:
        command: what wrote the page, shown on it.
    """
    facts = matrix.facts
    parts = [
        "# Models by convention",
        f"Written by `{command}`; do not edit. {len(matrix.rows)} architectures of transformers "
        f"{facts['transformers']}, tiny random weights, torch {facts['torch']}, packed-attn "
        f"{facts['packed-attn']}, {facts['date']}, {facts['processor']}.",
        "Stock and patched models get packed rows of documents of 5, 1, 37 and 24 tokens, and "
        "`audit` says whether each document gets what it gets alone.",
        _legend(matrix),
        "## Counts",
        _counts(matrix),
        "## Every model",
        "Each cell is *stock → patched*.",
        _models(matrix),
        _reasons(matrix),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _legend(matrix: Matrix) -> str:
    verdicts = [(f"**{w.letter}**", w.word, w.meaning) for w in WORDS.values()]
    columns = [(COLUMNS[c][0], COLUMNS[c][1]) for c in matrix.conventions]
    return "\n\n".join(
        [
            _table(("", "word", "meaning"), verdicts),
            _table(("column", "the batch carries"), columns),
        ]
    )


def _counts(matrix: Matrix) -> str:
    shown = [v for v in WORDS if any(c.verdict == v for s in SIDES for c in matrix.cells(s))]
    head = ["convention", *(f"{side}: {WORDS[v].word}" for side in SIDES for v in shown)]
    rows = [
        [
            COLUMNS[c][1],
            *(str(matrix.counts(side, c).get(v, 0)) for side in SIDES for v in shown),
        ]
        for c in matrix.conventions
    ]
    return _table(head, rows)


def _models(matrix: Matrix) -> str:
    heads = {row.head for row in matrix.rows}
    named = ["model type", *(COLUMNS[c][0] for c in matrix.conventions), "stock leaks first in"]
    rows = [
        [_name(row, heads), *(_letters(row, c) for c in matrix.conventions), _first_leak(row)]
        for row in matrix.rows
    ]
    return _table(named, rows)


def _reasons(matrix: Matrix) -> str:
    """Why a patched model is not exact, once for each reason of each model."""
    heads = {row.head for row in matrix.rows}
    lines = []
    for row in matrix.rows:
        details = {
            cell.detail: WORDS[cell.verdict].word
            for cell in row.patched.values()
            if cell.detail and cell.verdict not in ("isolated", "isolated up to rounding")
        }
        lines += [f"- `{_name(row, heads)}` {word}: {_plain(d)}" for d, word in details.items()]
    return "\n\n".join(["## Reasons against patched models", "\n".join(lines)]) if lines else ""


def _name(row: MatrixRow, heads: set[str]) -> str:
    return row.name if len(heads) == 1 else f"{row.name} ({row.head})"


def _letters(row: MatrixRow, convention: str) -> str:
    cells = [getattr(row, side).get(convention) for side in SIDES]
    return " → ".join(WORDS[cell.verdict].letter for cell in cells if cell is not None)


def _first_leak(row: MatrixRow) -> str:
    leaks = [c.detail for c in row.stock.values() if c.verdict.startswith("leaks") and c.detail]
    return f"`{leaks[0]}`" if leaks else ""


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
