"""Pieces of documents end to end: the flat columns of packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.plan import Packs
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
        where a mask says so; `position_ids`; then the source's other columns.
    """
    from packed_attn.packing import compiled

    documents, lengths = packs.order[pieces], packs.lengths[pieces]
    starts = source.starts[documents] + packs.starts[pieces]
    values = {n: c.gather_flat(documents, starts, lengths) for n, c in source.columns.items()}
    input_ids = values.pop("input_ids")
    if not isinstance(input_ids, np.ndarray) and input_ids.type == "null":
        input_ids = np.empty(0, np.int64)
    piece_starts = np.cumsum(lengths) - lengths
    positions = np.empty(int(lengths.sum()), integer)
    compiled.count_up(lengths, positions)
    columns = {
        "input_ids": input_ids,
        "labels": _labels(input_ids, values, piece_starts, integer),
        "position_ids": positions,
    }
    return columns | {name: v for name, v in values.items() if name != "labels"}


def document_columns(
    source: Source, packs: Packs, pieces: slice, keep: tuple[str, ...]
) -> dict[str, Any]:
    """Columns with one value a piece: `documents` where `keep` has it, and kept scalars."""
    documents = packs.order[pieces]
    columns: dict[str, Any] = {n: c.take(documents) for n, c in source.kept.items()}
    return {DOCUMENTS: documents, **columns} if DOCUMENTS in keep else columns


def _labels(
    input_ids: Any,
    values: dict[str, Any],
    piece_starts: NDArray[np.int64],
    integer: type[np.signedinteger],
) -> NDArray[np.signedinteger]:
    labels = _as_numpy(values.get("labels", input_ids))
    labels = labels.astype(np.promote_types(labels.dtype, integer))
    if "labels" not in values:
        for name in MASK_COLUMNS:
            if name in values:
                labels[_as_numpy(values[name]) == 0] = IGNORED_LABEL
    labels[piece_starts] = IGNORED_LABEL
    return labels


def _as_numpy(values: NDArray[Any] | pa.Array) -> NDArray[Any]:
    return values if isinstance(values, np.ndarray) else values.to_numpy(zero_copy_only=False)
