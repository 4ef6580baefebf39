"""A matrix as one HTML page that needs nothing else: no network, no script to be read."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from packed_attn.audit.matrix import SIDES, Cell, Matrix, MatrixRow
from packed_attn.audit.words import COLUMNS, WORDS


def to_html(matrix: Matrix, command: str) -> str:
    """The page: a legend, counts, and a row a model, stock beside patched.

    Every cell says its verdict in a word, so colour is never needed; headings and model names
    stay in sight; the filter box narrows the rows to those that hold all of its words.

    Args:
        command: what wrote the page, shown on it.
    """
    template = files("packed_attn.audit").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "FACTS": _facts(matrix, command),
        "LEGEND": _legend(matrix),
        "COUNTS": _counts(matrix),
        "HEAD": _head(matrix),
        "ROWS": "\n".join(_row(row, matrix) for row in matrix.rows),
        "SHOWN": f"{len(matrix.rows)} of {len(matrix.rows)} models",
    }
    for name, part in parts.items():
        template = template.replace(f"<!--{name}-->", part)
    return template


def _facts(matrix: Matrix, command: str) -> str:
    facts = matrix.facts
    versions = ", ".join(f"{name} {facts[name]}" for name in ("transformers", "torch"))
    return (
        f"{len(matrix.rows)} models, packed-attn {escape(facts['packed-attn'])}, "
        f"{escape(versions)}, {escape(facts['date'])}, {escape(facts['processor'])}; "
        f"<code>{escape(command)}</code> took {matrix.seconds:,.0f} s"
    )


def _legend(matrix: Matrix) -> str:
    lines = [
        f"<dt>{_chip(verdict)}</dt><dd>{escape(word.meaning)}</dd>"
        for verdict, word in WORDS.items()
    ]
    columns = [
        f"<dt>{escape(COLUMNS[c][0])}</dt><dd>{escape(COLUMNS[c][1])}</dd>"
        for c in matrix.conventions
    ]
    return f"<dl>{''.join(lines)}</dl><dl>{''.join(columns)}</dl>"


def _counts(matrix: Matrix) -> str:
    shown = [v for v in WORDS if any(c.verdict == v for s in SIDES for c in matrix.cells(s))]
    sides = "".join(f'<th colspan="{len(shown)}" scope="colgroup">{s}</th>' for s in SIDES)
    words = "".join(f'<th scope="col">{escape(WORDS[v].word)}</th>' for v in shown) * len(SIDES)
    rows = []
    for convention in matrix.conventions:
        counts = [matrix.counts(s, convention).get(v, 0) for s in SIDES for v in shown]
        cells = "".join(f"<td>{count or ''}</td>" for count in counts)
        rows.append(f'<tr><th scope="row">{escape(COLUMNS[convention][1])}</th>{cells}</tr>')
    return (
        f'<thead><tr><th rowspan="2" scope="col">the batch carries</th>{sides}</tr>'
        f"<tr>{words}</tr></thead><tbody>{''.join(rows)}</tbody>"
    )


def _head(matrix: Matrix) -> str:
    groups = "".join(
        f'<th colspan="2" scope="colgroup" title="{escape(COLUMNS[c][1])}">'
        f"{escape(COLUMNS[c][0])}</th>"
        for c in matrix.conventions
    )
    sides = "".join(f'<th scope="col">{side}</th>' for side in SIDES) * len(matrix.conventions)
    return (
        f'<tr><th rowspan="2" scope="col" class="name">model</th>{groups}'
        f'<th rowspan="2" scope="col">why</th></tr><tr>{sides}</tr>'
    )


def _row(row: MatrixRow, matrix: Matrix) -> str:
    cells = "".join(
        _cell(getattr(row, side).get(convention), side)
        for convention in matrix.conventions
        for side in SIDES
    )
    name = f"<code>{escape(row.name)}</code><small>{escape(row.model_class or row.head)}</small>"
    return (
        f'<tr><th scope="row" class="name">{name}</th>{cells}<td class="why">{_why(row)}</td></tr>'
    )


def _cell(cell: Cell | None, side: str) -> str:
    if cell is None:
        return f'<td class="{side}"></td>'
    title = f' title="{escape(cell.detail)}"' if cell.detail else ""
    return (
        f'<td class="{side} {_kind(cell.verdict)}"{title}>{escape(WORDS[cell.verdict].word)}</td>'
    )


def _why(row: MatrixRow) -> str:
    """What leaks first or what was said, each once, and the notes."""
    found = {
        f"{side}, {WORDS[cell.verdict].word}: {cell.detail}": None
        for side in SIDES
        for cell in getattr(row, side).values()
        if cell.detail
    }
    lines = [*found, *(f"note: {note}" for note in row.notes)]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{escape(lines[0][:60])}</summary><ul>{items}</ul></details>"


def _chip(verdict: str) -> str:
    return f'<span class="chip {_kind(verdict)}">{escape(WORDS[verdict].word)}</span>'


def _kind(verdict: str) -> str:
    """The class that colours a verdict."""
    return "v-" + verdict.replace(" ", "-").lower()
