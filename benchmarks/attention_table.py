"""The table of one case, as the benchmark prints it and the report repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.attention_report import FAILED, Row
from benchmarks.peers import OURS

HEAD = """\
| candidate | forward, ms | TFLOP/s | to ours | backward, ms | TFLOP/s | to ours | host, us | MiB |
|---|---|---|---|---|---|---|---|---|"""


def case_table(told: dict[str, Any], rows: Sequence[Row]) -> str:
    """What was timed; then what takes no part, and why something failed.

    Args:
        told: of the case, as in `Report.cases`.
        rows: of the same case.
    """
    lines = [f"### {told['name']}: {told['tokens']} tokens, {told['documents']} documents", ""]
    for direction, (fast, slow) in told["predicted, ms"].items():
        lines.append(f"- {direction} predicted for {told['device']}: {fast:.3g} to {slow:.3g} ms")
    ours = next((row for row in rows if row.candidate == OURS), None)
    lines += ["", HEAD, *(_markdown(row, ours) for row in rows if row.forward is not None), ""]
    absent = [row.candidate for row in rows if row.refused and not _failed(row)]
    if absent:
        lines.append(f"- takes no part: {'; '.join(absent)}")
    for row in rows:
        reasons = row.refused if _failed(row) else ()
        lines += [f"- {row.candidate}: {reason[:150]}" for reason in reasons]
        if row.eager and row.eager != ("no CUDA",):
            lines.append(f"- {row.candidate} is eager: {row.eager[0][:150]}")
    return "\n".join(lines).rstrip() + "\n"


def _failed(row: Row) -> bool:
    """Whether a candidate that should have run did not."""
    return any(reason.startswith(FAILED) for reason in row.refused)


def _markdown(row: Row, ours: Row | None) -> str:
    cells = []
    for direction in ("forward", "backward"):
        timing, base = getattr(row, direction), ours and getattr(ours, direction)
        ratio = f"{timing.median / base.median:.2f}x" if base else ""
        cells += [f"{timing.median:.3f}", f"{timing.tflops:.0f}", ratio]
    forward, both = row.host_us or (0.0, 0.0)
    cells.append(f"{forward:.0f} + {both - forward:.0f}")
    cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}")
    mark = ("" if row.exact else ", not exact") + (", eager" if row.eager else "")
    return f"| {row.candidate}{mark} | {' | '.join(cells)} |"
