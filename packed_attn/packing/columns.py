"""List columns of an Arrow table, read piece by piece without copying the table.

A document is a row. A `ListColumn` knows where each row's values lie in the column's flat buffers
(memory-mapped files included), so gathering pieces copies those pieces and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

VALUES_PER_BATCH = 2**20


@dataclass(frozen=True, eq=False)
class ListColumn:
    """One list column, as the flat values of its chunks and the place of every row in them.

    Attributes:
        name: the column's name.
        value_type: type of one value.
        chunks: flat values of each chunk: numpy where Arrow's buffer can be read as such, else
            Arrow (booleans, strings, values with nulls).
        chunk: int64 `[num_rows]`, the chunk of each row.
        starts: int64 `[num_rows]`, where the row begins in its chunk.
        lengths: int64 `[num_rows]`; -1 is a null row.
    """

    name: str
    value_type: pa.DataType
    chunks: list[Any]
    chunk: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def gather(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> pa.Array:
        """The values `starts[i] : starts[i] + lengths[i]` of row `rows[i]`, end to end."""
        import pyarrow as pa

        values = self.gather_flat(rows, starts, lengths)
        return pa.array(values) if isinstance(values, np.ndarray) else values

    def gather_flat(
        self, rows: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[Any] | pa.Array:
        """`gather`, as numpy where the chunks are."""
        import pyarrow as pa

        if not rows.size:
            return pa.array([], self.value_type)
        first = self.starts[rows] + starts
        begins, ends = first.tolist(), (first + lengths).tolist()
        # One slice and one memcpy a piece: for documents of ordinary length this outruns an index
        # array with an entry per token, and needs no memory for it.
        if self._in_numpy and len(self.chunks) == 1:
            (values,) = self.chunks
            return np.concatenate([values[a:b] for a, b in zip(begins, ends)])
        pieces = zip(self.chunk[rows].tolist(), begins, ends)
        if self._in_numpy:
            return np.concatenate([self.chunks[c][a:b] for c, a, b in pieces])
        return pa.concat_arrays([self._arrow(c).slice(a, b - a) for c, a, b in pieces])

    def flat(self, *, end_to_end: bool = False) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """All values in one numpy array, and where each row begins in it.

        A column of one chunk of numbers is read where it lies; of others this is a copy.

        Args:
            end_to_end: copy, so that rows lie one behind the other.
        """
        if self._in_numpy and len(self.chunks) == 1 and not end_to_end:
            return self.chunks[0], self.starts
        rows, lengths = np.arange(self.lengths.size), np.maximum(self.lengths, 0)
        values = self.gather(rows, np.zeros_like(rows), lengths).to_numpy(zero_copy_only=False)
        return values, np.cumsum(lengths) - lengths

    def batches(self) -> Iterator[tuple[int, NDArray[Any], NDArray[np.int64]]]:
        """About a million values at a time: first row, values end to end, lengths of rows."""
        batch_of_row = np.cumsum(self.lengths) // VALUES_PER_BATCH
        edges = [0, *(np.flatnonzero(np.diff(batch_of_row)) + 1).tolist(), self.lengths.size]
        for first, stop in pairwise(edges):
            rows = np.arange(first, stop)
            values = self.gather(rows, np.zeros_like(rows), self.lengths[rows])
            yield first, values.to_numpy(zero_copy_only=False), self.lengths[rows]

    def row_with_null(self) -> int | None:
        """The first row with a null among its values, or None."""
        import pyarrow.types as types

        if types.is_null(self.value_type):
            return None
        for number, values in enumerate(self.chunks):
            if isinstance(values, np.ndarray) or not values.null_count:
                continue
            nulls = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            stops = self.starts + self.lengths
            holds = np.searchsorted(nulls, stops) > np.searchsorted(nulls, self.starts)
            rows = np.flatnonzero(holds & (self.chunk == number))
            if rows.size:
                return int(rows[0])
        return None

    @cached_property
    def _in_numpy(self) -> bool:
        return all(isinstance(values, np.ndarray) for values in self.chunks)

    def _arrow(self, chunk: int) -> pa.Array:
        import pyarrow as pa

        values = self.chunks[chunk]
        return pa.array(values) if isinstance(values, np.ndarray) else values


@dataclass(frozen=True, eq=False)
class ScalarColumn:
    """A column with one value a row, read row by row.

    Attributes:
        column: the values in the table's order.
        rows: int64 `[num_rows]`, the table's row of each row; None where they are the same.
    """

    column: pa.ChunkedArray
    rows: NDArray[np.int64] | None

    def take(self, rows: NDArray[np.int64]) -> list[Any]:
        """The values of some rows, as Python objects."""
        at = rows if self.rows is None else self.rows[rows]
        # One by one: `ChunkedArray.take` may join all chunks first.
        return [self.column[i].as_py() for i in at.tolist()]


def scalar_column(dataset: Dataset, name: str) -> ScalarColumn:
    """A column of a data set that is not per token, rows in the data set's own order."""
    indices = dataset._indices
    rows = None if indices is None else indices.column(0).to_numpy()
    return ScalarColumn(dataset.data.column(name), rows)


def list_columns(dataset: Dataset) -> dict[str, ListColumn]:
    """The list columns of a data set by name, rows in the data set's own order."""
    # The only place that says which rows a selected, shuffled or filtered data set shows; the
    # public way to learn it, flatten_indices, copies every row.
    indices = dataset._indices
    rows = None if indices is None else indices.column(0).to_numpy()
    table = dataset.data
    return {
        name: _list_column(name, table.column(name), rows)
        for name in dataset.column_names
        if _is_list(table.schema.field(name).type)
    }


def table_columns(table: pa.Table) -> dict[str, ListColumn]:
    """The list columns of an Arrow table by name."""
    return {
        name: _list_column(name, table.column(name), None)
        for name in table.column_names
        if _is_list(table.schema.field(name).type)
    }


def require_aligned(column: ListColumn, lengths: NDArray[np.int64], name: str) -> bool:
    """Whether a column has one value for each value of column `name`, whose lengths are given.

    Raises:
        ValueError: a column of numbers with another length in some row. Other lists (messages,
            tools) say nothing about tokens, so they answer False.
    """
    import pyarrow.types as types

    other = np.flatnonzero(column.lengths != lengths)
    if not other.size:
        return True
    value_type = column.value_type
    if not (
        types.is_integer(value_type)
        or types.is_floating(value_type)
        or types.is_boolean(value_type)
    ):
        return False
    row = int(other[0])
    has = "is null" if column.lengths[row] < 0 else f"has {column.lengths[row]} values"
    raise ValueError(
        f"column {column.name!r} must have one value for each of {name}, but in row {row} it "
        f"{has} and {name} has {lengths[row]}; remove the column if it is not per token"
    )


def as_dataset(data: Any, argument: str = "dataset") -> Dataset:
    """A `datasets.Dataset` of what the user gave: a Dataset, dicts of columns, or token lists.

    Raises:
        ValueError: anything else, or a list that mixes dicts and token lists.
        NotImplementedError: a streaming data set.
        ImportError: Hugging Face `datasets` is not installed.
    """
    datasets = _import_datasets()
    if isinstance(data, datasets.Dataset):
        kinds = data.data.schema.types
        untyped = not data.num_rows and all(str(kind) == "null" for kind in kinds)
        return _without_rows(data.column_names) if untyped else data
    if isinstance(data, datasets.IterableDataset):
        raise NotImplementedError(
            f"{argument} is a streaming IterableDataset, and packing needs every length before it "
            "places the first document: load it without streaming, or pack `list(d.take(n))`"
        )
    if isinstance(data, Mapping):
        splits = ", ".join(map(repr, data)) if isinstance(data, datasets.DatasetDict) else ""
        raise ValueError(
            f"{argument} must be one Dataset or a list of documents, got "
            + (f"a DatasetDict: pass one of its splits ({splits})" if splits else "a mapping")
        )
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        raise ValueError(
            f"{argument} must be a datasets.Dataset, a list of dicts or a list of token lists, "
            f"got {type(data).__name__}"
        )
    return _from_list(data, argument)


def _from_list(data: Sequence[Any], argument: str) -> Dataset:
    datasets = _import_datasets()
    if not data:
        return _without_rows([])
    as_dicts = [isinstance(document, Mapping) for document in data]
    if all(as_dicts):
        names = list(dict.fromkeys(name for document in data for name in document))
        return datasets.Dataset.from_dict(
            {name: _of_one_type([document.get(name) for document in data]) for name in names}
        )
    if any(as_dicts):
        raise ValueError(
            f"{argument} must hold dicts or token lists, not both, but document 0 is "
            f"{type(data[0]).__name__} and document {as_dicts.index(not as_dicts[0])} is not"
        )
    return datasets.Dataset.from_dict({"input_ids": _of_one_type(list(data))})


def _of_one_type(values: list[Any]) -> list[Any]:
    """Values of documents with those that are empty, which numpy takes for floats, in the type of
    the arrays or tensors among them."""
    typed = (v for v in values if hasattr(v, "dtype") and getattr(v, "ndim", 0) and len(v))
    first = next(typed, None)
    if first is None:
        return values
    return [first[:0] if hasattr(v, "__len__") and not len(v) else v for v in values]


def _without_rows(names: Sequence[str]) -> Dataset:
    """An empty data set with the given columns and `input_ids`, all lists of integers."""
    datasets = _import_datasets()
    names = list(dict.fromkeys(["input_ids", *names]))
    integers = datasets.List(datasets.Value("int64"))
    features = datasets.Features(dict.fromkeys(names, integers))
    return datasets.Dataset.from_dict({name: [] for name in names}, features=features)


def _list_column(name: str, column: pa.ChunkedArray, rows: NDArray[np.int64] | None) -> ListColumn:
    chunks, starts, lengths = [], [], []
    for chunk in column.chunks:
        first, length = _row_places(chunk)
        if chunk.null_count:
            length = np.where(chunk.is_null().to_numpy(zero_copy_only=False), -1, length)
        chunks.append(_flat_values(chunk))
        starts.append(first)
        lengths.append(length)
    sizes = [length.size for length in lengths]
    places = (
        np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        np.concatenate([np.empty(0, np.int64), *starts]),
        np.concatenate([np.empty(0, np.int64), *lengths]),
    )
    if rows is not None:
        places = (places[0][rows], places[1][rows], places[2][rows])
    return ListColumn(name, column.type.value_type, chunks, *places)


def _row_places(chunk: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the rows of a list array begin in `chunk.values`, and how long they are."""
    import pyarrow.types as types

    if types.is_fixed_size_list(chunk.type):
        size = chunk.type.list_size
        first = (chunk.offset + np.arange(len(chunk), dtype=np.int64)) * size
        return first, np.full(len(chunk), size, np.int64)
    offsets = chunk.offsets.to_numpy().astype(np.int64)
    return offsets[:-1], np.diff(offsets)


def _flat_values(chunk: pa.Array) -> Any:
    """`chunk.values` as a numpy view where that copies nothing, else as it is."""
    import pyarrow.types as types

    values, kind = chunk.values, chunk.type.value_type
    if (types.is_integer(kind) or types.is_floating(kind)) and not values.null_count:
        return values.to_numpy(zero_copy_only=True)
    return values


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "packing a data set needs Hugging Face datasets: pip install 'packed-attn[hf]' "
            "(pack_lengths alone needs only numpy)"
        ) from error
    return datasets
