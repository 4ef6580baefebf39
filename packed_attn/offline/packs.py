"""Packed shards as a plan to draw and to compare, from the document lengths that they hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from packed_attn.offline.manifest import read_manifest, report_of
from packed_attn.packing.plan import Packs
from packed_attn.packing.shared import Trees

if TYPE_CHECKING:
    import pyarrow as pa


def shard_packs(folder: str | os.PathLike[str]) -> Packs:
    """The plan that shards hold; reads the columns of boundaries alone, 16 bytes a
    document.

    Args:
        folder: what `pack_files` wrote.

    Raises:
        ValueError: a folder without a manifest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = read_manifest(Path(folder))
    shares = manifest["settings"]["share_prefixes"]
    columns = ["seq_lengths", *(("parents", "ends") if shares else ())]
    table = pa.concat_tables(
        pq.read_table(Path(folder) / shard["file"], columns=columns) for shard in manifest["shards"]
    )
    (pieces, offsets), *links = (_flat(table[name]) for name in columns)
    trees = starts = None
    if links:
        (parents, _), (ends, bounds) = links
        starts, lengths = _path_lengths(pieces, parents, offsets, ends, bounds)
        trees = Trees(parents, np.arange(ends.size), ends, bounds, lengths)
    # Where a piece comes from is not in the shards, and not asked of them.
    return Packs(
        order=np.arange(pieces.size),
        starts=np.zeros_like(pieces) if starts is None else starts,
        lengths=pieces,
        offsets=offsets,
        report=report_of(manifest),
        trees=trees,
    )


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values of all rows, and the offsets of the rows."""
    values = [np.empty(0, np.int64), *(chunk.flatten().to_numpy() for chunk in column.chunks)]
    sizes = [np.zeros(1, np.int64), *(chunk.value_lengths().to_numpy() for chunk in column.chunks)]
    return np.concatenate(values), np.cumsum(np.concatenate(sizes), dtype=np.int64)


def _path_lengths(
    pieces: NDArray[np.int64],
    parents: NDArray[np.int64],
    offsets: NDArray[np.int64],
    ends: NDArray[np.int64],
    bounds: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens before each piece on its path, and those of each document."""
    first = np.repeat(offsets[:-1], np.diff(offsets))
    above = np.where(parents < 0, -1, parents + first).tolist()
    stops: list[int] = []
    for parent, length in zip(above, pieces.tolist()):
        stops.append(length + (stops[parent] if parent >= 0 else 0))
    whole = np.array(stops, np.int64)
    return whole - pieces, whole[ends + np.repeat(offsets[:-1], np.diff(bounds))]
