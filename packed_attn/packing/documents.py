"""One document of a stream, checked: its tokens and the columns that go with them, as numpy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.sources import (
    IGNORED_LABEL,
    MASK_COLUMNS,
    RESERVED_COLUMNS,
    TOKEN_COLUMNS,
    WRITTEN_COLUMNS,
    reserved,
)

# What rows of `pack_dataset` say of their documents, and documents have no use for.
BOUNDARY_COLUMNS = (*WRITTEN_COLUMNS, *RESERVED_COLUMNS)


class DocumentReader:
    """Reads documents of one stream, which all have the columns of the first.

    Args:
        names: the columns that documents must have, where the stream goes on; None at its start.
    """

    def __init__(self, names: tuple[str, ...] | None = None) -> None:
        self.names = names

    def read(self, where: str, given: Any) -> tuple[dict[str, NDArray[Any]], int]:
        """The columns of one document, `[length]` each, and how much padding was left out.

        Args:
            where: what errors call the document, such as "document 7".
            given: token ids, or a mapping with `input_ids`.

        Raises:
            ValueError: a document that is neither token ids nor a mapping with `input_ids`, columns
                of numbers of another length, columns other than those of the first document, an
                attention_mask with holes, or documents that are packed already.
        """
        columns = _aligned(where, given)
        names = tuple(columns)
        if self.names is None:
            self.names = names
            _warn_of_dropped(given, names)
        if set(names) != set(self.names):
            raise ValueError(
                f"{where} must have the columns {', '.join(sorted(self.names))} with one "
                f"value per token, but has {', '.join(sorted(names))}"
            )
        return _without_padding(where, columns)


def unpacked(number: int, given: Any) -> list[tuple[str, Any]]:
    """The documents of a stream's item, each with what errors call it: itself, or those of a pack.

    Args:
        number: of the item in its stream, from 0.
        given: a document, or a row of `pack_dataset` with `seq_lengths` and, where prefixes are
            shared, `parents` and `ends`. A document that shares its prefix gets a copy of it.

    Raises:
        ValueError: boundaries that contradict the tokens.
    """
    lengths = given.get("seq_lengths") if isinstance(given, Mapping) else None
    if lengths is None:
        return [(f"document {number}", given)]
    stops = np.cumsum(np.asarray(lengths, np.int64))
    spans = list(zip((stops - lengths).tolist(), stops.tolist()))
    columns, others = _divisible(f"pack {number}", given, spans[-1][1] if spans else 0)
    return [
        (
            f"document {i} of pack {number}",
            {n: np.concatenate([v[a:b] for a, b in path]) for n, v in columns.items()} | others,
        )
        for i, path in enumerate(_paths(given, spans))
    ]


def _divisible(
    where: str, pack: Mapping[str, Any], tokens: int
) -> tuple[dict[str, NDArray[Any]], dict[str, None]]:
    """The columns with one value per token, and the names of those that documents cannot have."""
    columns, others = {}, {}
    for name, values in pack.items():
        if name in BOUNDARY_COLUMNS or values is None:
            continue
        sized = hasattr(values, "__len__") and not isinstance(values, str | bytes)
        if sized and len(values) == tokens:
            columns[name] = np.asarray(values)
        elif name in TOKEN_COLUMNS:
            raise ValueError(
                f"{where} must have one value per token in {name!r}, but its seq_lengths add to "
                f"{tokens} and it has {len(values)}"
            )
        else:
            others[name] = None
    return columns, others


def _paths(pack: Mapping[str, Any], spans: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Of each document, the ranges of a pack's tokens that it is made of."""
    if pack.get("parents") is None:
        return [[span] for span in spans]
    parents, paths = [int(p) for p in pack["parents"]], []
    for end in pack["ends"]:
        path = []
        piece = int(end)
        while piece >= 0:
            path.insert(0, spans[piece])
            piece = parents[piece]
        paths.append(path)
    return paths


def count_learned(columns: Mapping[str, NDArray[Any]], longest: int | None = None) -> int:
    """Tokens of a document that a label counts for; a first token is not among them.

    Args:
        columns: what `read` returned.
        longest: count in the first `longest` tokens; None counts all.
    """
    learned = np.ones(columns["input_ids"].size, bool)
    if "labels" in columns:
        learned = columns["labels"] != IGNORED_LABEL
    else:
        for name in MASK_COLUMNS:
            if name in columns:
                learned &= columns[name] != 0
    return int(learned[1:longest].sum())


def _aligned(where: str, given: Any) -> dict[str, NDArray[Any]]:
    document = given if isinstance(given, Mapping) else {"input_ids": given}
    for name in WRITTEN_COLUMNS:
        if name in document:
            raise ValueError(
                f"{where} must not have {name!r}: either it is packed already (of which a stream "
                "takes rows apart that have seq_lengths), or packing would overwrite positions of "
                "its own; remove the column to pack it anyway"
            )
    if document.get("input_ids") is None:
        raise ValueError(
            f"{where} has no input_ids, only {sorted(document)}: tokenise the stream "
            "before packing it"
        )
    tokens = _column(where, "input_ids", document["input_ids"])
    if tokens is None:
        raise ValueError(f"{where} must hold a list of token ids as its input_ids")
    columns = {"input_ids": tokens}
    for name, value in document.items():
        column = None if name == "input_ids" else _column(where, name, value)
        if column is None:
            continue
        if column.size != tokens.size:
            raise ValueError(
                f"{where} has {tokens.size} input_ids but {column.size} values in "
                f"{name!r}; remove the column if it is not per token"
            )
        if name in RESERVED_COLUMNS:
            raise ValueError(f"{where} has a column {name!r}, {reserved(name)}")
        columns[name] = column
    return columns


def _column(where: str, name: str, value: Any) -> NDArray[Any] | None:
    """The values as a vector, or None where they are no list of numbers (text, messages, ids)."""
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty((0, 0))
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iubf"):
        if name in TOKEN_COLUMNS:
            raise ValueError(f"{where} must hold a list of integers as its {name}")
        return None
    if not array.size:
        return array.astype(np.int64)
    if name in TOKEN_COLUMNS and array.dtype.kind == "f":
        raise ValueError(f"{where} must hold integers in {name}, not {array.dtype}")
    return array


def _without_padding(
    where: str, columns: dict[str, NDArray[Any]]
) -> tuple[dict[str, NDArray[Any]], int]:
    """The columns inside the ones of `attention_mask`, without it, and how much is outside."""
    mask = columns.pop("attention_mask", None)
    if mask is None or (mask == 1).all():
        return columns, 0
    ones = np.flatnonzero(mask)
    first, stop = (ones[0], ones[-1] + 1) if ones.size else (0, 0)
    if ((mask != 0) & (mask != 1)).any() or stop - first != ones.size:
        raise ValueError(
            f"{where} must have an attention_mask of ones in one run with padding around "
            "it, but it has other values or zeros between ones"
        )
    kept = {name: column[first:stop] for name, column in columns.items()}
    return kept, int(mask.size - ones.size)


def _warn_of_dropped(given: Any, names: tuple[str, ...]) -> None:
    dropped = [name for name in given if name not in names] if isinstance(given, Mapping) else []
    if dropped:
        warnings.warn(
            "PackedIterableDataset leaves out columns that do not have one number per token: "
            f"{', '.join(map(str, dropped))}",
            stacklevel=2,
        )
