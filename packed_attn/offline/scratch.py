"""Tokenised documents between reading and packing: one memory-mapped Arrow file for each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.offline.contents import digest_of
from packed_attn.offline.files import whole_file, write_json
from packed_attn.offline.formats import Columns, Tokenize
from packed_attn.offline.inputs import Bad, read_part
from packed_attn.offline.job import Job, TokenizerIdentity
from packed_attn.packing.columns import ListColumn, table_columns
from packed_attn.packing.documents import count_learned
from packed_attn.packing.sources import MASK_COLUMNS

TOKENS_PER_BATCH = 2**20
PLACES_KEPT = 10  # of records that could not be read, in the manifest
LEARNED = "learned"  # tokens of a document that have a label


def tokenize_part(job: Job, number: int) -> dict[str, Any]:
    """Tokenises one part of the input into its scratch file; returns (and writes) its counts.

    Raises:
        ValueError: a record that cannot be read, with its place, unless the job skips those.
    """
    import pyarrow as pa

    counts: dict[str, Any] = {"documents": 0, "tokens": 0, "padding": 0, "bad": 0, "places": []}
    # Before the part is read: what is written to it meanwhile, or later, gives another one.
    counts["digest"] = digest_of(job.parts[number])
    schema = _schema(job.columns)
    with (
        whole_file(job.tokens_file(number)) as path,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for documents in _batches(job, number, counts):
            writer.write_batch(_record_batch(documents, schema))
    write_json(job.tokens_result(number), counts)
    return counts


def digest_part(job: Job, number: int) -> dict[str, Any]:
    """What a part's documents are read from, as one digest."""
    return {"digest": digest_of(job.parts[number])}


def document_figures(job: Job) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lengths of all documents, and how many of their tokens have a label, `[num_documents]`."""
    lengths, learned = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for number in range(len(job.parts)):
        table = _table(job, number)
        lengths.append(table_columns(table)["input_ids"].lengths)
        learned.append(table[LEARNED].to_numpy().astype(np.int64))
    return np.concatenate(lengths), np.concatenate(learned)


def token_columns(job: Job) -> dict[str, ListColumn]:
    """The columns of all documents, memory-mapped; a few dozen bytes a document in memory."""
    import pyarrow as pa

    columns = table_columns(pa.concat_tables(_table(job, i) for i in range(len(job.parts))))
    # All have the rows of input_ids, in the same batches: one index for all saves memory.
    index = columns["input_ids"]
    return {
        name: replace(index, name=name, value_type=column.value_type, chunks=column.chunks)
        for name, column in columns.items()
    }


def _batches(job: Job, number: int, counts: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Tokenised documents, about a million tokens at a time."""
    tokenizer = None if job.tokenizer is None else _tokenizer(job.tokenizer)
    tokenize = Tokenize(job.kind, tokenizer, job.names)
    longest = job.capacity if job.overflow == "truncate" else None
    batch: list[dict[str, Any]] = []
    tokens = 0
    for place, record in read_part(job.parts[number]):
        try:
            if isinstance(record, Bad):
                raise ValueError(record.reason)
            columns, padding = tokenize(record)
            columns = _stored(columns)
        except ValueError as error:
            _count_bad(job, counts, f"{place}: {error}")
            continue
        length = columns["input_ids"].size
        batch.append({**columns, LEARNED: count_learned(columns, longest)})
        counts["documents"] += 1
        counts["tokens"] += length
        counts["padding"] += padding
        tokens += length
        if tokens >= TOKENS_PER_BATCH:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _count_bad(job: Job, counts: dict[str, Any], problem: str) -> None:
    if not job.skip_bad:
        raise ValueError(f"{problem} (--skip-bad counts such records and leaves them out)")
    counts["bad"] += 1
    if len(counts["places"]) < PLACES_KEPT:
        counts["places"].append(problem)


def _stored(columns: Columns) -> Columns:
    """The columns of a document in the types of the scratch file.

    Raises:
        ValueError: a value that does not fit, such as a token id of more than 31 bits.
    """
    stored = {}
    for name, values in columns.items():
        stored[name] = narrow = values.astype(_kind(name), copy=False)
        odd = np.flatnonzero(narrow != values)
        if odd.size:
            bits = 8 * narrow.itemsize
            raise ValueError(f"{name} must fit in {bits} bits, but holds {values[odd[0]]}")
    return stored


def _kind(name: str) -> np.dtype:
    return np.dtype(np.int8 if name in MASK_COLUMNS else np.int32)


def _schema(columns: Sequence[str]) -> Any:
    import pyarrow as pa

    fields = [(name, pa.list_(pa.from_numpy_dtype(_kind(name)))) for name in columns]
    return pa.schema([*fields, (LEARNED, pa.int64())])


def _record_batch(documents: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    lengths = [document["input_ids"].size for document in documents]
    offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
    arrays = []
    for field in schema:
        values = [document[field.name] for document in documents]
        if field.name == LEARNED:
            arrays.append(pa.array(values, field.type))
        else:
            arrays.append(pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values))))
    return pa.record_batch(arrays, schema=schema)


def _table(job: Job, number: int) -> Any:
    import pyarrow as pa

    with pa.ipc.open_file(pa.memory_map(str(job.tokens_file(number)))) as reader:
        return reader.read_all()


@lru_cache(maxsize=1)
def _tokenizer(identity: TokenizerIdentity) -> Any:
    """One tokenizer a process; the identity tells it from one that had the name before."""
    return load_tokenizer(identity.name)


def load_tokenizer(name: str) -> Any:
    """A tokenizer by its name or folder; its own code is never run.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"tokenizer {name} cannot be loaded: {reason}") from error
