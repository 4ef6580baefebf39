"""Packed shards as a plan to draw and to compare, from the document lengths that they hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from packed_attn.offline.manifest import read_manifest, report_of
from packed_attn.packing.plan import Packs


def shard_packs(folder: str | os.PathLike[str]) -> Packs:
    """The plan that shards hold; reads one column of them, 16 bytes a document.

    Args:
        folder: what `pack_files` wrote.

    Raises:
        ValueError: a folder without a manifest.
    """
    import pyarrow.parquet as pq

    manifest = read_manifest(Path(folder))
    lengths, documents = [], [np.zeros(1, np.int64)]
    for shard in manifest["shards"]:
        table = pq.read_table(Path(folder) / shard["file"], columns=["seq_lengths"])
        for chunk in table.column(0).chunks:
            lengths.append(chunk.flatten().to_numpy())
            documents.append(chunk.value_lengths().to_numpy())
    pieces = np.concatenate(lengths).astype(np.int64)
    offsets = np.cumsum(np.concatenate(documents), dtype=np.int64)
    # Where a piece comes from is not in the shards, and not asked of them.
    return Packs(
        order=np.arange(pieces.size),
        starts=np.zeros_like(pieces),
        lengths=pieces,
        offsets=offsets,
        report=report_of(manifest),
    )
