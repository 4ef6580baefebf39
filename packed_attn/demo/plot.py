"""The picture of the planted secret."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from packed_attn.demo.secret import SecretResult

NAIVE_COLOUR, PACKED_COLOUR, FLOOR_COLOUR = "#c2410c", "#1d4ed8", "#111827"


def plot_secret(result: SecretResult, path: Path) -> None:
    """Draws both loss curves and the line that a document by itself cannot go below, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure with its own canvas leaves the caller's pyplot and its backend alone.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    floor = f"ln({result.alphabet}): what a document alone can reach"
    axes.axhline(
        result.floor, color=FLOOR_COLOUR, linestyle="--", linewidth=1.2, label=floor, zorder=3
    )
    axes.plot(*_smoothed(result.naive), color=NAIVE_COLOUR, linewidth=2, label="naive packing")
    axes.plot(*_smoothed(result.packed), color=PACKED_COLOUR, linewidth=2, label="packed-attn")
    axes.set(
        title="A key in one document, repeated by the next: only a leak can learn it",
        xlabel="training step",
        ylabel="loss on the repeated key (nats per letter)",
        ylim=(0, 1.25 * result.floor),
    )
    axes.set_xlim(0, max(len(result.naive), len(result.packed)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path)


def _smoothed(losses: Sequence[float], points: int = 150) -> tuple[list[float], list[float]]:
    """Steps and losses, averaged over equal stretches so that noise does not hide the curve."""
    width = max(1, len(losses) // points)
    stretches = [losses[at : at + width] for at in range(0, len(losses), width)]
    steps = [at + (len(s) + 1) / 2 for at, s in zip(range(0, len(losses), width), stretches)]
    return steps, [sum(s) / len(s) for s in stretches]
