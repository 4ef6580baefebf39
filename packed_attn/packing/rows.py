"""Pieces of documents end to end: the flat columns of packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.plan import Packs
from packed_attn.packing.prefixes import learned_labels
from packed_attn.packing.sources import DOCUMENTS, IGNORED_LABEL, MASK_COLUMNS, Source

if TYPE_CHECKING:
    import pyarrow as pa


def token_columns(
    source: Source, packs: Packs, pieces: slice, integer: type[np.signedinteger] = np.int64
) -> dict[str, Any]:
    """Per-token columns of a run of pieces, each flat, as numpy where it can be (else Arrow).

    Args:
        integer: dtype of the columns that are made here; labels may be wider, as their ids are.

    Returns:
        `input_ids` in the dtype of the source; `labels`, -100 at the start of every piece and
        where a mask says so; `position_ids`; then the source's other columns. With shared prefixes,
        `input_ids` and `labels` alone: -100 at the start of roots, and positions follow from the
        pieces' parents, without which they would be misread.
    """
    from packed_attn.packing import compiled

    documents, lengths = packs.order[pieces], packs.lengths[pieces]
    starts = source.starts[documents] + packs.starts[pieces]
    values = {n: c.gather_flat(documents, starts, lengths) for n, c in source.columns.items()}
    input_ids = values.pop("input_ids")
    if not isinstance(input_ids, np.ndarray) and input_ids.type == "null":
        input_ids = np.empty(0, np.int64)
    piece_starts = np.cumsum(lengths) - lengths
    known = {n: _as_numpy(values[n]) for n in ("labels", *MASK_COLUMNS) if n in values}
    labels = learned_labels({"input_ids": _as_numpy(input_ids), **known}, integer)
    if packs.trees is not None:
        labels[piece_starts[packs.trees.parents[pieces] < 0]] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels}
    labels[piece_starts] = IGNORED_LABEL
    positions = np.empty(int(lengths.sum()), integer)
    compiled.count_up(lengths, positions)
    columns = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    return columns | {name: v for name, v in values.items() if name != "labels"}


def document_columns(
    source: Source, documents: NDArray[np.int64], keep: tuple[str, ...]
) -> dict[str, Any]:
    """Columns with one value a document: `documents` where `keep` has it, and kept scalars."""
    columns: dict[str, Any] = {n: c.take(documents) for n, c in source.kept.items()}
    return {DOCUMENTS: documents, **columns} if DOCUMENTS in keep else columns


def _as_numpy(values: NDArray[Any] | pa.Array) -> NDArray[Any]:
    return values if isinstance(values, np.ndarray) else values.to_numpy(zero_copy_only=False)
