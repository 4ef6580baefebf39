"""Documents to pack, wherever they lie: a data set, a token file or lists, and their columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from packed_attn.packing.arguments import checked_column
from packed_attn.packing.columns import (
    ListColumn,
    ScalarColumn,
    list_columns,
    require_aligned,
    scalar_column,
)

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED_LABEL = -100
MASK_COLUMNS = ("completion_mask", "assistant_masks")  # TRL's names
WRITTEN_COLUMNS = ("position_ids", "seq_lengths")
# What a row with shared prefixes holds of a document, besides its tokens.
LABEL_COLUMNS = ("labels", *MASK_COLUMNS)
TOKEN_COLUMNS = ("input_ids", "attention_mask", *LABEL_COLUMNS)
DOCUMENTS = "documents"  # the name under which rows say which documents they hold
# What else rows of packs say of their documents: no column of the documents' own can have the name.
RESERVED_COLUMNS = ("parents", "ends", DOCUMENTS)


@dataclass(frozen=True)
class TokenFile:
    """Documents end to end in a flat binary file, which is memory-mapped and never read whole.

    Args:
        path: the file of token ids, nothing else in it.
        offsets: int `[num_documents + 1]`, or the path of a `.npy` file with them: document d is
            tokens `offsets[d] : offsets[d + 1]`.
        dtype: of one token.
        columns: per-token columns in files of the same length, by name: (path, dtype).

    Raises (when it is opened):
        ValueError: a file whose size its dtype does not divide, offsets that do not start at 0 or
            that fall, or a file that ends before the last offset. Every file is named.
        FileNotFoundError: a file that is missing.
    """

    path: str | os.PathLike[str]
    offsets: ArrayLike | str | os.PathLike[str]
    dtype: str | np.dtype = "uint16"
    columns: Mapping[str, tuple[str | os.PathLike[str], str | np.dtype]] = field(
        default_factory=dict
    )

    def open(self) -> dict[str, ListColumn]:
        """The columns, `input_ids` first, as views of the mapped files."""
        offsets = self._offsets()
        files = {"input_ids": (self.path, self.dtype), **self.columns}
        return {name: self._column(name, *file, offsets) for name, file in files.items()}

    def _offsets(self) -> NDArray[np.int64]:
        given = self.offsets
        if isinstance(given, str | os.PathLike):
            given = np.load(given, mmap_mode="r")
        offsets = checked_column("offsets", given, np.size(given))
        if not offsets.size or offsets[0] != 0:
            raise ValueError(f"offsets must start at 0, got {offsets[:1].tolist()}")
        falls = np.flatnonzero(np.diff(offsets) < 0)
        if falls.size:
            at = int(falls[0])
            raise ValueError(
                f"offsets must not fall, but offsets[{at + 1}] is {offsets[at + 1]} after "
                f"{offsets[at]}"
            )
        return offsets

    def _column(self, name: str, path: Any, dtype: Any, offsets: NDArray[np.int64]) -> ListColumn:
        import pyarrow as pa

        size, width = os.path.getsize(path), np.dtype(dtype).itemsize
        if size % width:
            raise ValueError(f"{path} has {size} bytes, which {np.dtype(dtype)} does not divide")
        if size // width < offsets[-1]:
            raise ValueError(
                f"{path} ends after {size // width} tokens, but offsets end at {offsets[-1]}"
            )
        values = np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
        lengths = np.diff(offsets)
        kind = pa.from_numpy_dtype(np.dtype(dtype))
        chunk = np.zeros_like(lengths)
        return ListColumn(name, kind, [np.asarray(values)], chunk, offsets[:-1], lengths)


@dataclass(frozen=True, eq=False)
class Source:
    """Documents to pack: their per-token columns, and where they lie inside the rows.

    Attributes:
        columns: per-token columns by name, `input_ids` among them, no attention_mask.
        starts, lengths: int64 `[num_documents]`: the tokens of each row that are not padding.
        kept: columns with one value a document that go along, by name.
        dropped: names of the columns that do not.
    """

    columns: dict[str, ListColumn]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    kept: dict[str, ScalarColumn]
    dropped: list[str]

    @property
    def padding_tokens(self) -> int:
        return int(self.columns["input_ids"].lengths.sum() - self.lengths.sum())


def read_source(data: Dataset | TokenFile, keep: Sequence[str] = ()) -> Source:
    """Finds the columns of a data set and checks them; nothing is copied.

    Args:
        data: a `datasets.Dataset` (see `as_dataset`) or a `TokenFile`.
        keep: columns with one value a document that go along (`"documents"` is not among them).

    Raises:
        ValueError: as `pack_dataset`, and a name in `keep` that is no column.
    """
    if isinstance(data, TokenFile):
        lists, names = data.open(), ["input_ids", *data.columns]
    else:
        lists, names = list_columns(data), data.column_names
    _check_names(names, keep)
    input_ids = _checked_input_ids(names, lists)
    aligned = {
        name: column
        for name, column in lists.items()
        if name not in keep and require_aligned(column, input_ids.lengths, "input_ids")
    }
    for name in TOKEN_COLUMNS:
        if name in aligned:
            _require_integers(aligned[name])
    for name in RESERVED_COLUMNS:
        if name in aligned or name in keep:
            raise ValueError(f"dataset has a column {name!r}, {reserved(name)}")
    dropped = [name for name in names if name not in aligned and name not in keep]
    mask = aligned.pop("attention_mask", None)
    if mask is None:
        starts, lengths = np.zeros_like(input_ids.lengths), input_ids.lengths
    else:
        starts, lengths = _unpadded(mask)
    kept = {} if isinstance(data, TokenFile) else {n: scalar_column(data, n) for n in keep}
    return Source(aligned, starts, lengths, kept, dropped)


def reserved(name: str) -> str:
    """Why no column of documents that goes along can have one of the reserved names."""
    says = {
        "parents": "what each piece of a row continues, where prefixes are shared",
        "ends": "where each document of a row ends, where prefixes are shared",
        DOCUMENTS: "which documents a row holds",
    }
    return (
        f"by which rows of packs say {says[name]}: rename the column before packing (reserved are "
        f"{', '.join((*WRITTEN_COLUMNS, *RESERVED_COLUMNS))})"
    )


def integer_column(data: Dataset | TokenFile, argument: str, name: str) -> NDArray[np.int64]:
    """A column with one integer a document, which `argument` names, as int64."""
    if isinstance(data, TokenFile) or name not in data.column_names:
        raise ValueError(f"{argument} must name a column, got {name!r}")
    values = data.with_format("numpy")[name][:]
    return checked_column(argument, values, data.num_rows)


def learned_tokens(source: Source, longest: int | None = None) -> NDArray[np.int64]:
    """Tokens of each document that a label counts for, int64 `[num_documents]`.

    A first token is not among them: nothing before it predicts it.

    Args:
        longest: count in the first `longest` tokens of each document; None counts all.
    """
    lengths = source.lengths if longest is None else np.minimum(source.lengths, longest)
    if not any(name in source.columns for name in LABEL_COLUMNS):
        return np.maximum(lengths - 1, 0)
    learned = np.zeros_like(lengths)
    for documents in _batches(lengths):
        sizes = lengths[documents]
        counts = learned_flags(source, documents, source.starts[documents], sizes)
        counts[(np.cumsum(sizes) - sizes)[sizes > 0]] = False
        ends = np.append(0, np.cumsum(counts))[np.append(0, np.cumsum(sizes))]
        learned[documents] = np.diff(ends)
    return learned


def learned_in(
    source: Source,
    documents: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    is_first: NDArray[np.bool_],
) -> int:
    """How many tokens of some pieces a label counts for.

    Args:
        documents, starts, lengths: int64 `[num_pieces]`.
        is_first: bool `[num_pieces]`, whether nothing stands before a piece that could predict its
            first token.
    """
    learned = 0
    for pieces in _batches(lengths):
        place = (documents[pieces], source.starts[documents[pieces]] + starts[pieces])
        counts = learned_flags(source, *place, lengths[pieces])
        begins = np.cumsum(lengths[pieces]) - lengths[pieces]
        counts[begins[is_first[pieces]]] = False
        learned += int(counts.sum())
    return learned


def learned_flags(
    source: Source,
    documents: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether each token of some pieces has a label, bool `[sum(lengths)]`; `starts` in rows."""
    flags = np.ones(int(lengths.sum()), bool)
    names = [n for n in LABEL_COLUMNS if n in source.columns]
    for name in names[:1] if names[:1] == ["labels"] else names:
        values = source.columns[name].gather(documents, starts, lengths)
        flags &= values.to_numpy(zero_copy_only=False) != (IGNORED_LABEL if name == "labels" else 0)
    return flags


def _batches(lengths: NDArray[np.int64], tokens: int = 2**20) -> Iterator[NDArray[np.int64]]:
    """Documents in runs of about a million tokens."""
    batch = np.cumsum(lengths) // tokens
    edges = np.flatnonzero(np.diff(batch, prepend=-1, append=-2))
    for first, stop in pairwise(edges):
        yield np.arange(first, stop)


def _check_names(names: Sequence[str], keep: Sequence[str]) -> None:
    for name in WRITTEN_COLUMNS:
        if name in names:
            raise ValueError(
                f"dataset must not have a {name!r} column: either it is packed already, or packing "
                "would overwrite positions of its own; remove the column to pack it anyway"
            )
    for name in keep:
        if name in TOKEN_COLUMNS:
            raise ValueError(
                f"keep must name columns with one value a document, but {name!r} is one that "
                "packing reads token by token"
            )
        if name not in names:
            raise ValueError(f"keep must name columns, but {name!r} is not among {list(names)}")


def _checked_input_ids(names: Sequence[str], lists: dict[str, ListColumn]) -> ListColumn:
    if "input_ids" not in lists:
        found = ", ".join(names) or "none"
        raise ValueError(
            f"dataset must have a list column 'input_ids', but its columns are: {found}; "
            "tokenise it before packing"
        )
    column = lists["input_ids"]
    nulls = np.flatnonzero(column.lengths < 0)
    if nulls.size:
        raise ValueError(f"input_ids must be a list in every row, but it is null in row {nulls[0]}")
    return column


def _require_integers(column: ListColumn) -> None:
    """Refuses a column that packing computes with if it holds anything but integers or booleans."""
    import pyarrow.types as types

    kind = column.value_type
    only_empty_lists = types.is_null(kind) and not column.lengths.any()
    if not (types.is_integer(kind) or types.is_boolean(kind) or only_empty_lists):
        raise ValueError(f"column {column.name!r} must be lists of integers, not of {kind}")
    row = column.row_with_null()
    if row is not None:
        raise ValueError(f"column {column.name!r} must hold integers, but row {row} holds a null")


def _unpadded(mask: ListColumn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the ones of each row's attention_mask begin, and how many there are."""
    starts, lengths = np.zeros_like(mask.lengths), mask.lengths.copy()
    for first, values, sizes in mask.batches():
        ones = np.flatnonzero(values)
        if ones.size == values.size and (values == 1).all():
            continue
        row_of_value = np.repeat(np.arange(sizes.size), sizes)
        odd = np.flatnonzero((values != 0) & (values != 1))
        if odd.size:
            raise ValueError(
                f"attention_mask must hold 0 and 1, but row {first + row_of_value[odd[0]]} holds "
                f"{values[odd[0]]}; split rows that hold several documents before packing"
            )
        count = np.bincount(row_of_value[ones], minlength=sizes.size)
        row_start = np.cumsum(sizes) - sizes
        seen = np.flatnonzero(count)
        at = np.searchsorted(ones, row_start[seen])
        first_one, last_one = ones[at], ones[at + count[seen] - 1]
        holes = seen[last_one - first_one + 1 != count[seen]]
        if holes.size:
            raise ValueError(
                "attention_mask must be ones in one run with padding around it, but row "
                f"{first + holes[0]} has zeros between ones"
            )
        starts[first + seen] = first_one - row_start[seen]
        lengths[first : first + sizes.size] = count
    return starts, lengths
