"""The plan on disk, and the shards that are written from it, each by whichever worker takes it."""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from packed_attn.offline.files import read_json, sha256_of, whole_file, write_json
from packed_attn.offline.job import Job, shard_name
from packed_attn.offline.scratch import token_columns
from packed_attn.packing.dataset import PackedRows
from packed_attn.packing.plan import Packs
from packed_attn.packing.report import PackingReport
from packed_attn.packing.shared import Trees
from packed_attn.packing.sources import Source

ARRAYS = ("order", "starts", "lengths", "offsets")
TREES = tuple(field.name for field in fields(Trees))
PLAN = "plan.json"


def save_plan(job: Job, packs: Packs) -> dict[str, Any]:
    """Writes the plan for the workers to map; returns (and writes) what is known of it."""
    arrays = {name: getattr(packs, name) for name in ARRAYS}
    if packs.trees is not None:
        arrays |= {f"trees-{name}": getattr(packs.trees, name) for name in TREES}
    for name, array in arrays.items():
        with whole_file(job.work / f"plan-{name}.npy") as path, open(path, "wb") as file:
            np.save(file, array)
    plan = {
        "digest": packs.digest(),
        "packs": len(packs),
        "shards": -(-len(packs) // job.packs_per_shard),
        "report": packs.report.to_dict(),
    }
    write_json(job.work / PLAN, plan)
    return plan


def write_shard(job: Job, number: int) -> dict[str, Any]:
    """Writes one shard and its result: file, sha256, and counts of what is in it."""
    import pyarrow.parquet as pq

    plan = read_json(job.work / PLAN)
    rows = _open_plan(job, plan["digest"])
    packs, step = rows.packs, rows.packs_per_batch
    first = number * job.packs_per_shard
    stop = min(first + job.packs_per_shard, len(packs))
    name = shard_name(number, plan["shards"])
    with whole_file(Path(job.output) / name) as path:
        schema = rows.table(first, first).schema
        # Token ids hardly repeat enough for a dictionary; zstd finds what order there is.
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
            for begin in range(first, stop, step):
                writer.write_table(rows.table(begin, min(begin + step, stop)))
        digest, size = sha256_of(path), path.stat().st_size
    pieces = slice(int(packs.offsets[first]), int(packs.offsets[stop]))
    documents = packs.offsets if packs.trees is None else packs.trees.offsets
    result = {
        "file": name,
        "sha256": digest,
        "bytes": size,
        "packs": stop - first,
        "documents": int(documents[stop] - documents[first]),
        "tokens": int(packs.lengths[pieces].sum()),
    }
    write_json(job.shard_result(number), result)
    return result


@lru_cache(maxsize=1)
def _open_plan(job: Job, digest: str) -> PackedRows:
    """The plan and the documents, mapped once in a process."""

    def mapped(name: str) -> Any:
        return np.load(job.work / f"plan-{name}.npy", mmap_mode="r")

    report = PackingReport.from_dict(read_json(job.work / PLAN)["report"])
    trees = Trees(*(mapped(f"trees-{name}") for name in TREES)) if job.share_prefixes else None
    arrays = {name: mapped(name) for name in ARRAYS}
    packs = Packs(**arrays, report=report, trees=trees)
    return PackedRows(None, scratch_source(job), packs, keep=())


def scratch_source(job: Job) -> Source:
    """The tokenised documents, mapped."""
    columns = token_columns(job)
    lengths = columns["input_ids"].lengths
    return Source(columns, np.zeros_like(lengths), lengths, kept={}, dropped=[])
