"""Whether inputs are what they were: stamps to tell it at once, digests where stamps cannot.

A stamp holds what every write to a file changes, also one that sets the time of the last change
back (ctime cannot be set). Equal stamps therefore mean equal contents, and inputs of any size are
compared by them in no time. Copied and restored files have other stamps, and so have those that
were only touched: then the bytes decide.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from packed_attn.offline.files import CHUNK_BYTES
from packed_attn.offline.inputs import ROWS_PER_BATCH, Part, parquet_file, saved_dataset

FRESH = 2 * 10**9  # nanoseconds: two writes of one tick of a file system's clock have one time


def size_of(path: str) -> int:
    """Bytes of an input."""
    return sum(stat.st_size for _, stat in _stats(path))


def stamp_of(path: str) -> str | None:
    """What changes when an input does; None where it was written just now, and may be again."""
    stats = list(_stats(path))
    if max(max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats) > time.time_ns() - FRESH:
        return None
    marks = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in stats]
    return hashlib.sha256(repr(marks).encode()).hexdigest()


def same_stamp(before: str | None, now: str | None) -> bool:
    """Whether an input is certainly what it was."""
    return before is not None and before == now


def digest_of(part: Part) -> str:
    """sha256 of all that the documents of a part are read from, in hex."""
    digest = hashlib.sha256()
    pieces = {"jsonl": _line_bytes, "parquet": _column_bytes, "dataset": _batch_bytes}[part.kind]
    for piece in pieces(part):
        digest.update(piece)
    return digest.hexdigest()


def joint_digest(digests: Iterable[str]) -> str:
    """One digest for an input, of those of its parts."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _stats(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """The files that documents come from: caches beside a saved data set are none of them."""
    place = Path(path)
    files = [place]
    if place.is_dir():
        state = json.loads((place / "state.json").read_text())
        names = sorted(file["filename"] for file in state["_data_files"])
        files = [place / name for name in ("state.json", "dataset_info.json", *names)]
    for file in files:
        yield file.name, file.stat()


def _line_bytes(part: Part) -> Iterator[bytes]:
    """From the byte before the part, which says whether a line begins with it, to the last line's
    end."""
    with open(part.path, "rb") as file:
        file.seek(max(0, part.start - 1))
        yield from _bytes(file, part.stop - file.tell())
        file.seek(part.stop - 1)
        yield file.readline()


def _column_bytes(part: Part) -> Iterator[bytes]:
    """The schema, and the pages of all columns, which are all that row groups consist of."""
    with parquet_file(part.path) as parquet, open(part.path, "rb") as file:
        yield str(parquet.schema_arrow.remove_metadata()).encode()
        for number in range(part.start, part.stop):
            group = parquet.metadata.row_group(number)
            for index in range(group.num_columns):
                column = group.column(index)
                yield f"{column.path_in_schema} {column.compression} {column.num_values}".encode()
                pages = column.dictionary_page_offset, column.data_page_offset
                file.seek(min(place for place in pages if place))  # either may be missing
                yield from _bytes(file, column.total_compressed_size)


def _batch_bytes(part: Part) -> Iterator[Any]:
    rows = saved_dataset(part.path).with_format("arrow")
    for first in range(part.start, part.stop, ROWS_PER_BATCH):
        table = rows[first : min(first + ROWS_PER_BATCH, part.stop)]
        yield str(table.schema.remove_metadata()).encode()
        for batch in table.combine_chunks().to_batches():
            yield batch.serialize()


def _bytes(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        yield chunk
        size -= len(chunk)
