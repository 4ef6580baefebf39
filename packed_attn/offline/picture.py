"""Draws packed shards: packs as bars of documents with what is empty in grey, and their lengths."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from packed_attn.offline.manifest import read_manifest, report_of

PACKS_DRAWN = 40


def draw_shards(folder: str | Path, picture: str | Path) -> None:
    """Writes a picture of the first packs, of all fills and of all lengths.

    Args:
        folder: what `pack_files` wrote.
        picture: image file; its suffix says which kind.

    Raises:
        ValueError: a folder without a manifest.
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'packed-attn[plot]'") from error
    folder = Path(folder)
    report = report_of(read_manifest(folder))
    figure = Figure(figsize=(10, 8), layout="constrained")
    packs, fills, lengths = figure.subplot_mosaic(
        [["packs", "packs"], ["fills", "lengths"]]
    ).values()
    _draw_packs(packs, list(islice(_document_lengths(folder), PACKS_DRAWN)), report.capacity)
    _draw_histogram(fills, report.fill_histogram, "share of capacity", "packs")
    # The last bin holds what is over capacity.
    _draw_histogram(lengths, report.length_histogram[:-1], "length / capacity", "documents")
    figure.suptitle(
        f"{report.packs:,} packs of {report.capacity:,} tokens, {report.fill:.2%} full; "
        f"padding would take {report.padded_tokens / max(1, report.packed_tokens):.1f}x the tokens"
    )
    figure.savefig(picture)


def _document_lengths(folder: Path) -> Any:
    """The document lengths of each pack, shard by shard, read only as far as asked."""
    import pyarrow.parquet as pq

    for shard in read_manifest(folder)["shards"]:
        with pq.ParquetFile(folder / shard["file"]) as file:
            for batch in file.iter_batches(PACKS_DRAWN, columns=["seq_lengths"]):
                yield from batch.column(0).to_pylist()


def _draw_packs(axes: Any, packs: list[list[int]], capacity: int) -> None:
    rows = range(len(packs))
    axes.barh(rows, [capacity] * len(packs), color="0.85", height=0.8)
    for nth in range(max(map(len, packs))):
        widths = [pack[nth] if nth < len(pack) else 0 for pack in packs]
        starts = [sum(pack[:nth]) for pack in packs]
        axes.barh(rows, widths, left=starts, color=f"C{nth % 10}", height=0.8, edgecolor="white")
    axes.set(xlim=(0, capacity), xlabel="tokens", ylabel="pack", title="first packs; empty in grey")
    axes.invert_yaxis()


def _draw_histogram(axes: Any, counts: Any, xlabel: str, ylabel: str) -> None:
    edges = np.linspace(0, 1, len(counts) + 1)
    axes.stairs(counts, edges, fill=True)
    axes.set(xlim=(0, 1), xlabel=xlabel, ylabel=ylabel)
