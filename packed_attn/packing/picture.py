"""A picture of a plan: its packs, its lengths, and the same data padded, truncated and packed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.comparison import Comparison, compare
from packed_attn.packing.plan import Packs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WASTE = "#d9d9d9"
LOST = "#c0392b"
SHARED = "#59a14f"
SHOWN = 24  # rows of tokens that a panel shows
LARGEST = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw_packs(
    packs: Packs, path: str | os.PathLike[str], *, max_length: int | None = None
) -> None:
    """Writes a PNG (or what the path's ending says) that shows a plan.

    Above, rows of tokens for the same documents, to one scale: each padded to the longest, each cut
    at `max_length`, and packed. Colours are documents (in packs with shared prefixes: pieces), grey
    is padding, red what truncation loses. Below, how long documents are, and the tokens that each
    way computes; green are tokens that stand in a pack once for several documents.

    Args:
        packs: a plan with at least one pack.
        path: where the picture goes.
        max_length: where truncation cuts, as in `compare`, which has these figures as text.

    Raises:
        ValueError: a plan without packs.
        ImportError: matplotlib is not installed.
    """
    if not packs.num_packs:
        raise ValueError("packs must hold at least one pack to be drawn, got none")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing packs needs matplotlib: pip install 'packed-attn[plot]'"
        ) from error
    comparison = compare(packs, max_length)
    cut = comparison.max_length
    figure = Figure(figsize=(13, 8.5), layout="constrained", dpi=110)
    grid = figure.add_gridspec(2, 3, height_ratios=(1.25, 1))
    rows = [figure.add_subplot(grid[0, column]) for column in range(3)]
    _draw_rows(rows, packs, cut)
    _draw_lengths(figure.add_subplot(grid[1, :2]), packs, cut)
    _draw_tokens(figure.add_subplot(grid[1, 2]), comparison, packs.report.shared_tokens)
    report = packs.report
    figure.suptitle(
        f"{report.pieces:,} documents in {report.packs:,} packs of {report.capacity:,} tokens "
        f"({report.strategy}): {report.fill:.2%} full, {report.gap:.2%} over the lower bound",
        fontsize=14,
    )
    figure.savefig(path)


def _draw_rows(axes: list[Axes], packs: Packs, cut: int) -> None:
    """Documents spread over all lengths, alone and cut, and packs spread over the plan."""
    report = packs.report
    shown = np.unique(np.linspace(0, packs.num_packs - 1, SHOWN).astype(int))
    in_packs = [packs.lengths[packs.offsets[p] : packs.offsets[p + 1]] for p in shown]
    documents = packs.document_lengths
    spread = np.unique(np.linspace(0, documents.size - 1, SHOWN).astype(int))
    lengths = np.random.default_rng(0).permutation(np.sort(documents)[spread])
    alone = [lengths[i : i + 1] for i in range(lengths.size)]
    longest = int(lengths.max())
    width = max(report.capacity, longest, cut)
    panels = (
        (f"padded to the longest, {longest:,}", alone, longest, None),
        (f"truncated to {cut:,}", [np.minimum(n, cut) for n in alone], cut, alone),
        (f"packed to {report.capacity:,}", in_packs, report.capacity, None),
    )
    for axis, (title, rows, stop, before) in zip(axes, panels):
        _draw_panel(axis, rows, stop)
        if before is not None:
            lost = np.array([max(int(n[0]) - cut, 0) for n in before])
            _bars(axis, np.arange(len(before)), lost, np.full(lost.size, cut), LOST)
        axis.set_title(title)
        axis.set_xlim(0, width)
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("rows")


def _draw_panel(axis: Axes, rows: list[NDArray[np.int64]], stop: int) -> None:
    from matplotlib import colormaps

    tab20 = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = tab20[:14] + tab20[16:]  # without its greys: grey is waste
    ends = [np.cumsum(row) for row in rows]
    fills = np.array([end[-1] for end in ends])
    _bars(axis, np.arange(len(rows)), stop - fills, fills, WASTE)
    number = 0
    for y, (row, end) in enumerate(zip(rows, ends)):
        colour = [colours[(number + k) % len(colours)] for k in range(row.size)]
        _bars(axis, np.full(row.size, y), row, end - row, colour)
        number += row.size
    axis.invert_yaxis()
    axis.set_yticks([])
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _bars(axis: Axes, y: Any, width: Any, left: Any, colour: Any) -> None:
    axis.barh(y, width, left=left, height=0.86, color=colour, edgecolor="white", linewidth=0.3)


def _draw_lengths(axis: Axes, packs: Packs, cut: int) -> None:
    axis.hist(packs.document_lengths, bins=80, color="#4c78a8")
    axis.axvline(cut, color=LOST, linestyle="--", linewidth=1.2, label=f"truncated at {cut:,}")
    axis.set_yscale("log")
    axis.set_title("lengths of documents")
    axis.set_xlabel("tokens")
    axis.set_ylabel("documents (log)")
    axis.legend(frameon=False)


def _draw_tokens(axis: Axes, comparison: Comparison, shared: int) -> None:
    """What each way computes: memory for activations grows with these tokens."""
    real = np.array([way.tokens for way in comparison.ways])
    computed = np.array([way.computed_tokens for way in comparison.ways])
    lost = np.array([way.lost_tokens for way in comparison.ways])
    axis.bar(range(3), real, color="#4c78a8", label="documents")
    axis.bar(range(3), computed - real, bottom=real, color=WASTE, label="padding")
    axis.bar(range(3), lost, bottom=computed, color=LOST, label="lost", hatch="//", alpha=0.75)
    above = computed + lost
    if shared:
        axis.bar(2, shared, bottom=above[2], color=SHARED, label="shared", hatch="..", alpha=0.75)
        above[2] += shared
    for x, height in enumerate(above):
        axis.annotate(_short(computed[x]), (x, height), ha="center", va="bottom", fontsize=10)
    axis.set_xticks(range(3), [way.name for way in comparison.ways])
    axis.set_title("tokens computed: memory grows with them")
    axis.set_ylim(0, 1.12 * above.max())
    axis.yaxis.set_major_formatter(lambda value, _: _short(value))
    axis.legend(frameon=False)


def _short(value: float) -> str:
    """1234567 as 1.2M."""
    for size, letter in LARGEST:
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"
