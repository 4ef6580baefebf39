"""Checks packed shards against their manifest: hashes, counts, every boundary of documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.errors import first_line
from packed_attn.offline.files import sha256_of
from packed_attn.offline.manifest import is_unaltered, read_manifest, report_of
from packed_attn.packing.columns import ListColumn, table_columns
from packed_attn.packing.sources import IGNORED_LABEL
from packed_attn.trees import Forest

REQUIRED = ("input_ids", "labels", "position_ids", "seq_lengths")
REQUIRED_SHARED = ("input_ids", "labels", "seq_lengths", "parents", "ends")
PER_PIECE = ("seq_lengths", "parents", "ends")
COUNTS = ("packs", "documents", "tokens")


def verify(folder: str | Path) -> Iterator[str]:
    """The faults of a folder of shards, each naming the file, and the row where there is one.

    Raises:
        ValueError: a folder without a manifest, or with one that cannot be read.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not is_unaltered(manifest):
        yield "manifest.json: altered since it was written (its own sha256 differs)"
    try:
        yield from _faults(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        yield f"manifest.json: cannot be read as one: {type(error).__name__} {error}"


def _faults(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    totals: Counter[str] = Counter()
    for shard in manifest["shards"]:
        totals.update({name: shard[name] for name in COUNTS})
        for fault in _shard_faults(folder / shard["file"], shard, manifest["settings"]):
            yield f"{shard['file']}: {fault}"
    named = {shard["file"] for shard in manifest["shards"]}
    for path in sorted(folder.glob("*.parquet")):
        if path.name not in named:
            yield f"{path.name}: not in the manifest"
    yield from _report_faults(manifest, totals)


def _report_faults(manifest: dict[str, Any], totals: Counter[str]) -> Iterator[str]:
    try:
        report = report_of(manifest)
    except (ValueError, TypeError, KeyError) as error:
        yield f"manifest.json: the report does not hold: {error}"
        return
    of_report = {"packs": report.packs, "documents": report.pieces, "tokens": report.packed_tokens}
    for name, figure in of_report.items():
        if figure != totals[name]:
            yield f"manifest.json: the report has {figure} {name}, its shards have {totals[name]}"


def _shard_faults(path: Path, shard: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    if not path.exists():
        yield "missing"
        return
    if sha256_of(path) != shard["sha256"]:
        yield "altered since it was written (sha256 differs)"
    counts: Counter[str] = Counter()
    shares = settings["share_prefixes"]
    try:
        for first, table in _row_groups(path):
            required = REQUIRED_SHARED if shares else REQUIRED
            missing = [name for name in required if name not in table.column_names]
            if missing:
                yield f"no column {missing[0]!r}"
                return
            columns = table_columns(table)
            yield from _row_faults(columns, first, settings)
            counts["packs"] += table.num_rows
            documents = columns["ends" if shares else "seq_lengths"]
            counts["documents"] += int(documents.lengths.sum())
            counts["tokens"] += int(columns["input_ids"].lengths.sum())
    except Exception as error:  # Arrow raises many things for a damaged file
        yield f"cannot be read: {first_line(error)}"
        return
    for name in COUNTS:
        if counts[name] != shard[name]:
            yield f"has {counts[name]} {name}, the manifest says {shard[name]}"


def _row_groups(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    first = 0
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number, use_threads=False)
            yield first, table
            first += table.num_rows


def _row_faults(
    columns: dict[str, ListColumn], first: int, settings: dict[str, Any]
) -> Iterator[str]:
    """Faults of the rows of one table; those of columns first, as the others rest on them."""
    tokens = columns["input_ids"].lengths
    for name, column in columns.items():
        odd = np.flatnonzero(column.lengths != tokens)
        if name not in PER_PIECE and odd.size:
            row = odd[0]
            yield (
                f"row {first + row}: {column.lengths[row]} values in {name!r} for "
                f"{tokens[row]} tokens"
            )
            return
    over = np.flatnonzero(tokens > settings["capacity"])
    if over.size:
        yield (
            f"row {first + over[0]}: {tokens[over[0]]} tokens, over the capacity "
            f"{settings['capacity']}"
        )
    pieces = _flat(columns["seq_lengths"])
    row_of_piece = np.repeat(np.arange(tokens.size), columns["seq_lengths"].lengths)
    sums = np.bincount(row_of_piece, weights=pieces, minlength=tokens.size).astype(np.int64)
    odd = np.flatnonzero(sums != tokens)
    if odd.size:
        yield f"row {first + odd[0]}: seq_lengths add to {sums[odd[0]]}, not {tokens[odd[0]]}"
        return
    if (pieces < 1).any():
        yield f"row {first + row_of_piece[np.argmax(pieces < 1)]}: a document without tokens"
        return
    if settings["share_prefixes"]:
        yield from _shared_faults(columns, pieces, first, settings)
    else:
        yield from _boundary_faults(columns, pieces, first, settings)


def _boundary_faults(
    columns: dict[str, ListColumn],
    pieces: NDArray[np.int64],
    first: int,
    settings: dict[str, Any],
) -> Iterator[str]:
    """What must hold at every boundary: positions restart, and no loss crosses it."""
    tokens = columns["input_ids"].lengths
    begins = np.cumsum(pieces) - pieces
    row_ends = np.cumsum(tokens)

    def row_of(token: int) -> int:
        return first + int(np.searchsorted(row_ends, token, side="right"))

    positions = _flat(columns["position_ids"])
    wanted = np.arange(positions.size) - np.repeat(begins, pieces)
    odd = np.flatnonzero(positions != wanted)
    if odd.size:
        at = odd[0]
        yield f"row {row_of(at)}: position_ids hold {positions[at]} where {wanted[at]} belongs"
    labels = _flat(columns["labels"])
    crossing = begins[labels[begins] != IGNORED_LABEL]
    if crossing.size:
        yield (
            f"row {row_of(crossing[0])}: the first label of a document is "
            f"{labels[crossing[0]]}, not {IGNORED_LABEL}: the loss would cross a boundary"
        )
    if "labels" not in settings["columns"]:
        odd = np.flatnonzero((labels != IGNORED_LABEL) & (labels != _flat(columns["input_ids"])))
        if odd.size:
            yield f"row {row_of(odd[0])}: a label is neither its token nor {IGNORED_LABEL}"


def _shared_faults(
    columns: dict[str, ListColumn],
    pieces: NDArray[np.int64],
    first: int,
    settings: dict[str, Any],
) -> Iterator[str]:
    """What must hold of the trees of a row: what continues what, and that no piece is nobody's."""
    names = ("seq_lengths", "parents", "ends", "input_ids", "labels")
    rows = {name: _by_row(columns[name]) for name in names}
    for row in range(columns["input_ids"].lengths.size):
        lengths, parents, ends, tokens, labels = (rows[name][row] for name in names)
        place = f"row {first + row}"
        if parents.size != lengths.size:
            yield f"{place}: {parents.size} parents for {lengths.size} pieces"
            continue
        try:
            Forest.build(lengths.tolist(), parents.tolist())
        except ValueError as error:
            yield f"{place}: {error}"
            continue
        leaves = np.setdiff1d(np.arange(lengths.size), parents)
        if ends.size == 0 or ends.min() < 0 or ends.max() >= lengths.size:
            yield f"{place}: a document ends in no piece of the row"
        elif np.setdiff1d(leaves, ends).size:
            yield f"{place}: piece {np.setdiff1d(leaves, ends)[0]} is no document's"
        roots = (np.cumsum(lengths) - lengths)[parents < 0]
        if (labels[roots] != IGNORED_LABEL).any():
            yield (
                f"{place}: the first label of a document is "
                f"{labels[roots][labels[roots] != IGNORED_LABEL][0]}, not {IGNORED_LABEL}: the "
                "loss would cross a boundary"
            )
        if (
            "labels" not in settings["columns"]
            and ((labels != IGNORED_LABEL) & (labels != tokens)).any()
        ):
            yield f"{place}: a label is neither its token nor {IGNORED_LABEL}"


def _by_row(column: ListColumn) -> list[NDArray[np.int64]]:
    return np.split(_flat(column), np.cumsum(column.lengths)[:-1])


def _flat(column: ListColumn) -> NDArray[np.int64]:
    """All values of a column."""
    rows = np.arange(column.lengths.size)
    values = column.gather(rows, np.zeros_like(rows), column.lengths)
    return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
