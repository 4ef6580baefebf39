"""Where documents come from: JSON lines, Parquet files and saved Hugging Face data sets, in parts.

Parts do not depend on the number of workers, and none is read before its turn. JSON lines are cut
at byte offsets: a line belongs to the part in which it begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, SupportsInt

from packed_attn.errors import first_line
from packed_attn.offline.files import CHUNK_BYTES

ROWS_PER_BATCH = 1000
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Part:
    """A stretch of one input.

    Attributes:
        path: the file, or the folder of a saved data set.
        kind: how it is read.
        start, stop: bytes of JSON lines, row groups of Parquet, rows of a saved data set.
        size: bytes (of a saved data set: rows), to show progress by.
    """

    path: str
    kind: Literal["jsonl", "parquet", "dataset"]
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a record stands, as `data.jsonl line 7`."""

    path: str
    unit: Literal["line", "row"]
    number: int
    before: SupportsInt = 0

    def __str__(self) -> str:
        return f"{self.path} {self.unit} {int(self.before) + self.number}"


@dataclass(frozen=True)
class Bad:
    """What stands in for a record that cannot be read: the reason."""

    reason: str


def find_parts(paths: Sequence[str | Path], part_bytes: int) -> list[Part]:
    """The parts of the inputs, in the order of the paths; folders of files in the order of names.

    Raises:
        ValueError: no input, a path that does not exist or is of another kind, a Parquet file that
            is not whole, a data set of several splits.
    """
    parts = [part for path in paths for part in _parts_of(Path(path), part_bytes)]
    if not parts:
        raise ValueError(f"inputs must hold documents, but {', '.join(map(str, paths))} is empty")
    return parts


def read_part(part: Part) -> Iterator[tuple[Place, Any]]:
    """The records of a part, or a `Bad` for each that cannot be read, with their places."""
    reader = {"jsonl": _read_lines, "parquet": _read_row_groups, "dataset": _read_rows}[part.kind]
    yield from reader(part)


def parquet_file(path: str) -> Any:
    """A Parquet file, opened.

    Raises:
        ValueError: it is not whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a whole Parquet file ({os.path.getsize(path)} bytes): "
            f"{first_line(error)}"
        ) from error


def saved_dataset(path: str) -> Any:
    """What `Dataset.save_to_disk` wrote.

    Raises:
        ValueError: it is not whole.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(path).with_format(None)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole saved data set: {first_line(error)}") from error


def _parts_of(path: Path, part_bytes: int) -> list[Part]:
    if not path.exists():
        raise ValueError(f"input {path} does not exist")
    if path.is_dir():
        return _parts_of_folder(path, part_bytes)
    kind = SUFFIXES.get(path.suffix)
    if kind is None:
        advice = (
            "; a JSON list becomes JSON lines by `jq -c '.[]'`" if path.suffix == ".json" else ""
        )
        raise ValueError(
            f"input {path} must be {', '.join(SUFFIXES)} or a folder that Dataset.save_to_disk "
            f"wrote{advice}"
        )
    return _parquet_parts(path) if kind == "parquet" else _line_parts(path, part_bytes)


def _parts_of_folder(path: Path, part_bytes: int) -> list[Part]:
    if (path / "dataset_dict.json").exists():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(
            f"input {path} holds the splits {', '.join(splits)}: give one, such as "
            f"{path / splits[0]}"
        )
    if (path / "dataset_info.json").exists():
        rows = len(saved_dataset(str(path)))
        step = max(1, part_bytes // 1024)  # a row is about a kilobyte
        edges = [*range(0, rows, step), rows]
        return [Part(str(path), "dataset", a, b, b - a) for a, b in pairwise(edges)]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise ValueError(
            f"input {path} must hold {', '.join(SUFFIXES)} files or a saved data set, but has none"
        )
    return [part for file in files for part in _parts_of(file, part_bytes)]


def _line_parts(path: Path, part_bytes: int) -> list[Part]:
    size = path.stat().st_size
    edges = [*range(0, size, part_bytes), size]
    return [Part(str(path), "jsonl", a, b, b - a) for a, b in pairwise(edges)]


def _parquet_parts(path: Path) -> list[Part]:
    metadata = parquet_file(str(path)).metadata
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [Part(str(path), "parquet", i, i + 1, size) for i, size in enumerate(sizes)]


def _read_lines(part: Part) -> Iterator[tuple[Place, Any]]:
    lines_before = _LinesBefore(part)
    with open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the end of a line that began before
        number = 0
        while file.tell() < part.stop and (line := file.readline()):
            number += 1
            if line.strip():
                yield Place(part.path, "line", number, lines_before), _record_of(line)


def _record_of(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON's, UTF-8's, and thousands of brackets
        return Bad(f"malformed JSON: {error}")


class _LinesBefore:
    """How many lines begin before a part: a pass over the file, so made only when asked."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def __int__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        lines, chunk = 0, b"\n"
        with open(self._part.path, "rb") as file:
            for at in range(0, self._part.start, CHUNK_BYTES):
                chunk = file.read(min(CHUNK_BYTES, self._part.start - at))
                lines += chunk.count(b"\n")
        return lines + (not chunk.endswith(b"\n"))


def _read_row_groups(part: Part) -> Iterator[tuple[Place, Any]]:
    import pyarrow as pa

    file = parquet_file(part.path)
    row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    groups = list(range(part.start, part.stop))
    try:
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, use_threads=False):
            for record in batch.to_pylist():
                yield Place(part.path, "row", row), record
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{part.path} is damaged: row group {part.start} cannot be read: {first_line(error)}"
        ) from error


def _read_rows(part: Part) -> Iterator[tuple[Place, Any]]:
    rows = saved_dataset(part.path).select(range(part.start, part.stop))
    for row, record in enumerate(rows, part.start):
        yield Place(part.path, "row", row), record
