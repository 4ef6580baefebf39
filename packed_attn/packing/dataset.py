"""Documents to packed rows: a Hugging Face data set in, a Hugging Face data set of packs out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.columns import ListColumn, as_dataset, list_columns, require_aligned
from packed_attn.packing.plan import Overflow, Packs, Strategy, pack_lengths
from packed_attn.packing.report import PackingReport, log_report

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

IGNORED_LABEL = -100
INT32_MAX = 2**31 - 1  # Arrow's list offsets
MASK_COLUMNS = ("completion_mask", "assistant_masks")  # TRL's names
WRITTEN_COLUMNS = ("position_ids", "seq_lengths")
TOKENS_PER_BATCH = 2**18  # tokens materialised at a time: few enough to stay in a CPU cache


def pack_dataset(
    dataset: Dataset | Sequence[Any],
    capacity: int,
    *,
    strategy: Strategy = "bfd",
    overflow: Overflow = "split",
    on_report: Callable[[PackingReport], object] = log_report,
) -> Dataset:
    """Packs tokenised documents into rows of at most `capacity` tokens.

    The rows have:

        input_ids      the documents end to end, in the dtype they came in
        labels         int64: the input's `labels` if it has them, else input_ids with -100 where a
                       `completion_mask` or `assistant_masks` is 0; and -100 at the first token of
                       every document, so that the shifted loss never crosses a boundary
        position_ids   int64: 0, 1, 2, ... in every document
        seq_lengths    int64: lengths of the documents in the row (TRL's name and meaning)
        others         every list column with one value per token is packed alongside

    `position_ids` and `seq_lengths` say the same twice because Hugging Face's Trainer drops columns
    that a model's forward does not name: `position_ids` survives it.

    An `attention_mask` of ones says nothing and is dropped; where it has zeros, before or behind
    the ones, those tokens are padding and are left out (`report.padding_tokens`). Columns that do
    not belong to tokens (text, messages, ids) are dropped with a warning that names them.

    Memory: the plan needs a few dozen bytes a document, and packs are written some hundred
    thousand tokens at a time. A data set on disk is packed to disk, into the cache folder beside
    it, where packing it again the same way finds it (as with `Dataset.map`); one in memory stays
    in memory.

    Args:
        dataset: a `datasets.Dataset` with a list column `input_ids`, a list of dicts with that key,
            or a list of token lists.
        capacity: tokens a row holds.
        strategy, overflow: as in `pack_lengths`; documents are rows.
        on_report: called with the `PackingReport`. By default it is logged, as a warning when
            tokens or labels were lost: `on_report=reports.append` keeps it, `print` shows it.

    Raises:
        ValueError: no `input_ids`, a column of numbers whose length differs from input_ids' (row
            and column named), null tokens, an attention_mask with holes, a data set that is packed
            already, and what `pack_lengths` refuses.
        NotImplementedError: a streaming data set.
    """
    source = _read(as_dataset(dataset))
    packs = pack_lengths(source.lengths, capacity, strategy=strategy, overflow=overflow)
    _warn_of_dropped(source.dropped)
    report = packs.report
    padding = source.padding_tokens
    on_report(replace(report, tokens=report.tokens + padding, padding_tokens=padding))
    return _write(source, packs)


@dataclass(frozen=True, eq=False)
class _Source:
    """Documents to pack: the data set, its per-token columns, and the documents inside the rows.

    `starts` and `lengths`, int64 `[num_documents]`, leave padding out. `dropped` names the columns
    that are not per token.
    """

    dataset: Dataset
    columns: dict[str, ListColumn]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    dropped: list[str]

    @property
    def padding_tokens(self) -> int:
        return int(self.columns["input_ids"].lengths.sum() - self.lengths.sum())


def _read(dataset: Dataset) -> _Source:
    for name in WRITTEN_COLUMNS:
        if name in dataset.column_names:
            raise ValueError(
                f"dataset must not have a {name!r} column: either it is packed already, or packing "
                "would overwrite positions of its own; remove the column to pack it anyway"
            )
    lists = list_columns(dataset)
    input_ids = _checked_input_ids(dataset, lists)
    aligned = {
        name: column
        for name, column in lists.items()
        if require_aligned(column, input_ids.lengths, "input_ids")
    }
    for name in ("input_ids", "labels", "attention_mask", *MASK_COLUMNS):
        if name in aligned:
            _require_integers(aligned[name])
    dropped = [name for name in dataset.column_names if name not in aligned]
    mask = aligned.pop("attention_mask", None)
    if mask is None:
        starts, lengths = np.zeros_like(input_ids.lengths), input_ids.lengths
    else:
        starts, lengths = _unpadded(mask)
    return _Source(dataset, aligned, starts, lengths, dropped)


def _checked_input_ids(dataset: Dataset, lists: dict[str, ListColumn]) -> ListColumn:
    if "input_ids" not in lists:
        found = ", ".join(dataset.column_names) or "none"
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


def _write(source: _Source, packs: Packs) -> Dataset:
    """Materialises the packs, batch by batch: on disk if the input is on disk, else in memory."""
    import datasets

    features = datasets.Features.from_arrow_schema(_pack_table(source, packs, 0, 0).schema)
    if not packs.num_packs:
        rows = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    elif source.dataset.cache_files:
        rows = _write_to_disk(source, packs, features)
    else:
        rows = _write_to_memory(source, packs)
    format_ = source.dataset.format
    return rows.with_format(format_["type"], **format_["format_kwargs"])


def _write_to_memory(source: _Source, packs: Packs) -> Dataset:
    """Without `Dataset.map`, whose growing buffer would copy every token once more."""
    import datasets
    import pyarrow as pa

    step = _packs_per_batch(packs)
    firsts = datasets.utils.tqdm(range(0, packs.num_packs, step), desc="Packing", unit="batches")
    tables = [_pack_table(source, packs, i, min(i + step, packs.num_packs)) for i in firsts]
    return datasets.Dataset(pa.concat_tables(tables), fingerprint=_fingerprint(source, packs))


def _write_to_disk(source: _Source, packs: Packs, features: Any) -> Dataset:
    """By `Dataset.map`, which writes to a temporary file first and finds what it wrote before."""
    import datasets

    fingerprint = _fingerprint(source, packs)
    folder = os.path.dirname(source.dataset.cache_files[0]["filename"])

    def make_packs(batch: pa.Table) -> pa.Table:
        numbers = batch.column("pack")
        return _pack_table(source, packs, numbers[0].as_py(), numbers[-1].as_py() + 1)

    numbers = datasets.Dataset.from_dict({"pack": np.arange(packs.num_packs)})
    return numbers.with_format("arrow").map(
        make_packs,
        batched=True,
        batch_size=_packs_per_batch(packs),
        remove_columns=["pack"],
        features=features,
        cache_file_name=os.path.join(folder, f"packed-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc="Packing",
    )


def _fingerprint(source: _Source, packs: Packs) -> str:
    """Names the result by what it was made from; left to itself, datasets pickles every token."""
    from datasets.fingerprint import Hasher

    from packed_attn import __version__

    report, given = packs.report, source.dataset._fingerprint
    return Hasher.hash([given, report.strategy, report.overflow, packs.capacity, __version__])


def _packs_per_batch(packs: Packs) -> int:
    return max(1, TOKENS_PER_BATCH // packs.capacity)


def _pack_table(source: _Source, packs: Packs, first: int, stop: int) -> pa.Table:
    """The rows for packs `first : stop`."""
    import pyarrow as pa

    pieces = slice(packs.offsets[first], packs.offsets[stop])
    rows, lengths = packs.order[pieces], packs.lengths[pieces]
    starts = source.starts[rows] + packs.starts[pieces]
    values = {name: c.gather(rows, starts, lengths) for name, c in source.columns.items()}
    total = int(lengths.sum())
    piece_starts = np.cumsum(lengths) - lengths
    pack_pieces = packs.offsets[first : stop + 1] - packs.offsets[first]
    pack_tokens = np.append(piece_starts, total)[pack_pieces]
    if total > INT32_MAX:
        raise ValueError(f"a row must hold at most {INT32_MAX} tokens, but a pack has {total}")
    positions = pa.array(np.arange(total) - np.repeat(piece_starts, lengths))
    input_ids = values.pop("input_ids")
    if pa.types.is_null(input_ids.type):
        input_ids = input_ids.cast(pa.int64())
    labels = _labels(input_ids, values, piece_starts)
    columns = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    table = {name: _list_array(pack_tokens, column) for name, column in columns.items()}
    table["seq_lengths"] = _list_array(pack_pieces, pa.array(lengths))
    for name, column in values.items():
        table.setdefault(name, _list_array(pack_tokens, column))
    return pa.table(table)


def _labels(
    input_ids: pa.Array, values: dict[str, pa.Array], piece_starts: NDArray[np.int64]
) -> pa.Array:
    """int64 labels, with -100 at the start of every document and where a mask says so."""
    import pyarrow as pa

    given = values.get("labels", input_ids)
    labels = given.to_numpy(zero_copy_only=False).astype(np.int64)
    if "labels" not in values:
        for name in MASK_COLUMNS:
            if name in values:
                labels[values[name].to_numpy(zero_copy_only=False) == 0] = IGNORED_LABEL
    labels[piece_starts] = IGNORED_LABEL
    return pa.array(labels)


def _list_array(offsets: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _warn_of_dropped(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"pack_dataset leaves out columns that do not have one value per token: "
            f"{', '.join(names)}",
            stacklevel=3,
        )
