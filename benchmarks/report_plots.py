"""The plots of the report, as PNG. Each function gives the Markdown that shows its plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.attention_figures import US, WAYS, Attention, Missing, Timed, Way
from benchmarks.goals import BY_LETTER
from benchmarks.model import DEVICES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOUR = "#111827"
COLOURS = {
    US: "#1d4ed8",
    "FA2": "#c2410c",
    "FA3": "#15803d",
    "FA4": "#65a30d",
    "cuDNN": "#7c3aed",
    "torch varlen": "#d97706",
    "flex": "#0891b2",
    "padded": "#9ca3af",
    "contaminated": "#d1d5db",
}
IN_ROOFLINE = ("FA2", "FA3", "FA4", "cuDNN", US)


def speed(attention: Attention, path: Path) -> str:
    """Useful TFLOP/s in each regime of packing; the range that was predicted for ours."""
    figure, panels = _panels("useful TFLOP/s")
    for axes, way in zip(panels, WAYS):
        ours = _bars(axes, attention, way, attention.tflops)
        ranges = [attention.predicted_tflops(case, way) for _, case in ours]
        if ours:
            axes.errorbar(
                [x for x, _ in ours],
                [(low + high) / 2 for low, high in ranges],
                yerr=[(high - low) / 2 for low, high in ranges],
                color=LINE_COLOUR,
                capsize=3,
                linewidth=1,
                linestyle="none",
                label="predicted for packed-attn",
            )
    return _saved(figure, panels, path, "TFLOP/s by regime, and the range that the model predicts")


def host(attention: Attention, path: Path) -> str:
    """Microseconds of the host in each regime of packing."""

    def microseconds(case: str, way: Way, timed: Timed) -> float | None:
        row = next(row for row in attention.rows[case] if row.candidate == timed.candidate)
        if row.host_us is None:
            return None
        return row.host_us[0] if way == "forward" else row.host_us[1] - row.host_us[0]

    figure, panels = _panels("microseconds until an eager call returns")
    for axes, way in zip(panels, WAYS):
        _bars(axes, attention, way, microseconds)
        axes.set_yscale("log")
    return _saved(figure, panels, path, "Host time by regime")


def roofline(attention: Attention, path: Path) -> str:
    """Every case under the two ceilings of the card."""
    ceilings = attention.ceilings
    if ceilings is None:
        device = DEVICES["H200" if "H200" in attention.machine["gpu"] else "H100"]
        compute, copy = device.flops / 1e12, device.bandwidth / 1e12
        whose = f"the data sheet's ceilings of {device.name}: the run measured none"
    else:
        compute, copy = ceilings.product_tflops, ceilings.copy_tb_s
        whose = "the card's measured ceilings"
    figure, panels = _panels("useful TFLOP/s")
    for axes, way in zip(panels, WAYS):
        intensities = [compute / copy]
        for heading in IN_ROOFLINE:
            points = {
                case: (attention.intensity(case, way), attention.tflops(case, way, found))
                for case in attention.cases
                if isinstance(found := attention.timed(case, way, heading), Timed)
            }
            if not points:
                continue
            ours = heading == US
            axes.scatter(
                *zip(*points.values()),
                color=COLOURS[heading],
                label=heading,
                s=36 if ours else 18,
                zorder=3 if ours else 2,
            )
            intensities += [x for x, _ in points.values()]
            for letter, case in BY_LETTER.items() if ours else ():
                if case in points:
                    axes.annotate(letter, points[case], (4, 4), textcoords="offset points")
        span = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
        axes.plot(span, np.minimum(compute, copy * span), color=LINE_COLOUR, label="ceiling")
        axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must move", title=way)
    caption = (
        f"TFLOP/s against arithmetic intensity under {whose}: "
        f"{compute:.4g} TFLOP/s and {copy:.3g} TB/s"
    )
    return _saved(figure, panels, path, caption)


def memory(attention: Attention, path: Path) -> str:
    """Peak memory against the longest document, in packs of one shape and size."""
    cases = [case for case in attention.cases if _is_plain(case)]
    series = {heading: _peaks(attention, cases, heading) for heading in COLOURS}
    if not any(series.values()):
        return "Not measured: attention.json holds no peak memory, which takes a CUDA device."
    figure = _figure((7, 4.5))
    axes = figure.add_subplot()
    for name, points in series.items():
        if points:
            axes.plot(*zip(*sorted(points)), marker="o", color=COLOURS[name], label=name)
    ends = sorted(
        (attention.cases[case]["longest"], attention.result_bytes(case) / 2**20) for case in cases
    )
    axes.plot(*zip(*ends), color=LINE_COLOUR, linestyle="--", label="out, lse and gradients")
    axes.set(
        xscale="log",
        xlabel="tokens of the longest document",
        ylabel="MiB above the inputs",
    )
    axes.set_ylim(bottom=0)
    return _saved(figure, [axes], path, "Peak memory of a forward and backward")


def _is_plain(case: str) -> bool:
    """Llama's shape and mask, whatever the documents; a forest has none of the peers."""
    return case.startswith("llama3_8b/") and case.count("/") == 1 and not case.endswith("forest")


def _peaks(attention: Attention, cases: Sequence[str], heading: str) -> list[tuple[int, float]]:
    """(tokens of the longest document, MiB of the heading's leanest candidate)."""
    points = []
    for case in cases:
        peaks = [row.peak_bytes for row in attention.under(case, heading) if row.peak_bytes]
        if peaks:
            points.append((attention.cases[case]["longest"], min(peaks) / 2**20))
    return points


def _bars(
    axes: Axes,
    attention: Attention,
    way: Way,
    height: Callable[[str, Way, Timed], float | None],
) -> list[tuple[float, str]]:
    """A group of bars for each regime that was run; where ours stand, and the case."""
    cases = [(letter, case) for letter, case in BY_LETTER.items() if case in attention.cases]
    width, ours = 0.8 / len(COLOURS), []
    for n, (heading, colour) in enumerate(COLOURS.items()):
        bars = []
        for at, (_, case) in enumerate(cases):
            found = attention.timed(case, way, heading)
            tall = None if isinstance(found, Missing) else height(case, way, found)
            if tall is not None:
                bars.append((at + (n - len(COLOURS) / 2) * width, tall, case))
        if bars:
            xs, heights, at_cases = zip(*bars)
            axes.bar(xs, heights, width, color=colour, label=heading)
            ours += zip(xs, at_cases) if heading == US else ()
    axes.set_xticks(range(len(cases)), [f"{k}\n{case.split('/')[-1]}" for k, case in cases])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(way)
    return ours


def _panels(ylabel: str) -> tuple[Figure, list[Axes]]:
    figure = _figure((13, 4.5))
    panels = [figure.add_subplot(1, 2, number) for number in (1, 2)]
    panels[0].set_ylabel(ylabel)
    return figure, panels


def _figure(size: tuple[float, float]) -> Figure:
    """A figure of its own: the caller's pyplot and its backend are left alone."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=130, layout="constrained")


def _saved(figure: Figure, panels: Sequence[Axes], path: Path, caption: str) -> str:
    from matplotlib.ticker import NullFormatter

    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        for scaled in (axes.xaxis, axes.yaxis):
            if scaled.get_scale() == "log":
                scaled.set_major_formatter("{x:g}")
                scaled.set_minor_formatter(NullFormatter())
        if axes.get_yscale() == "log":  # whole decades, so that two ticks have labels at least
            low, high = np.log10(axes.get_ylim())
            axes.set_ylim(10 ** np.floor(low), 10 ** np.ceil(high))
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=5
        )
    figure.savefig(path)
    return f"![{caption}]({path.name})\n\n{caption}."
