"""The demo's table, as aligned text for a terminal and as Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence

from packed_attn.demo.rows import RowResult


def render_table(results: Sequence[RowResult], *, markdown: bool = False) -> str:
    """One line per row of the demo, under a header.

    Args:
        results: in the order to print.
        markdown: a Markdown table instead of aligned columns.
    """
    cells = [_header(results), *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = [
        # The first column is words, the others are figures.
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in cells
    ]
    if not markdown:
        rule = ["-" * width for width in widths]
        return "\n".join("  ".join(line) for line in [lines[0], rule, *lines[1:]])
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def render_ratios(results: Sequence[RowResult]) -> str:
    """packed-attn's throughput over that of the other rows, in one sentence."""
    by_row = {result.row: result for result in results}
    packed = by_row["packed"].tokens_per_second
    ratios = [
        f"{packed / other.tokens_per_second:.1f}x of {other.title}"
        for other in results
        if other.row != "packed"
    ]
    return f"packed-attn's real tokens a second: {', '.join(ratios)}."


def _header(results: Sequence[RowResult]) -> list[str]:
    memory = "CUDA" if results[0].device == "cuda" else "process"
    return [
        "",
        "real tokens/s",
        f"peak {memory} MiB",
        "loss",
        "gradient error",
        "tokens that saw another document",
    ]


def _cells(result: RowResult) -> list[str]:
    return [
        result.title,
        f"{result.tokens_per_second:,.0f}",
        f"{result.peak_mib:,.0f}",
        f"{result.loss:.2f}",
        f"{result.gradient_error:.1e}",
        f"{result.leaked_tokens:,} of {result.probe_tokens:,}",
    ]
