"""Documents to packed rows: a Hugging Face data set in, a Hugging Face data set of packs out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.columns import as_dataset
from packed_attn.packing.plan import Overflow, Packs, Share, Strategy, pack_lengths
from packed_attn.packing.prefixes import MIN_SHARED, SharedPrefixes
from packed_attn.packing.report import PackingReport, log_report
from packed_attn.packing.rows import document_columns, token_columns
from packed_attn.packing.sources import (
    DOCUMENTS,
    Source,
    TokenFile,
    integer_column,
    learned_in,
    learned_tokens,
    read_source,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

INT32_MAX = 2**31 - 1  # Arrow's list offsets
TOKENS_PER_BATCH = 2**18  # tokens materialised at a time: few enough to stay in a CPU cache


class PlanOptions(TypedDict, total=False):
    """How a data set is planned, all optional.

    strategy, overflow, max_documents, align, max_loss, seed, epoch, multiple: as in `pack_lengths`.
    together, apart: names of integer columns, one value a document, as in `pack_lengths`.
    learnable_only: leave out documents without a token to learn from (no label but -100, or no
        mask but 0), and count masked tokens. It reads all labels; planning reads none otherwise.
    share_prefixes: documents that begin alike (with the same tokens and labels) share those tokens
        in a pack: they stand there once, and what follows them goes on from them.
    prompt_ids, prompt_lengths: names of integer columns, one value a document, instead: documents
        with one id of at least 0 share that many first tokens, which is checked.
    min_shared: tokens that sharing must save, 16 unless told otherwise.
    """

    strategy: Strategy
    overflow: Overflow
    max_documents: int | None
    align: int
    max_loss: float | None
    seed: int | None
    epoch: int
    multiple: int
    together: str | None
    apart: str | None
    learnable_only: bool
    share_prefixes: bool
    prompt_ids: str | None
    prompt_lengths: str | None
    min_shared: int


# Options that `pack_lengths` does not know.
SHARING = ("share_prefixes", "prompt_ids", "prompt_lengths", "min_shared")


def pack_dataset(
    dataset: Dataset | TokenFile | Sequence[Any],
    capacity: int,
    *,
    keep: Sequence[str] = (),
    num_proc: int | None = None,
    on_report: Callable[[PackingReport], object] = log_report,
    **options: Unpack[PlanOptions],
) -> Dataset:
    """Packs tokenised documents into rows of at most `capacity` tokens.

    The rows have:

        input_ids      the documents end to end, in the dtype they came in
        labels         int32, or as wide as they came: the input's `labels` if it has them, else
                       input_ids with -100 where a `completion_mask` or `assistant_masks` is 0; and
                       -100 at the first token of every document, so that the shifted loss never
                       crosses a boundary
        position_ids   int32: 0, 1, 2, ... in every document
        seq_lengths    int32: lengths of the documents in the row (TRL's name and meaning)
        others         every list column with one value per token is packed alongside

    With shared prefixes, `seq_lengths` are those of pieces, and there are instead of position_ids
    and other columns:

        parents        int32: the piece of the row that each piece continues, -1 for none
        ends           int32: the piece in which each document of the row ends

    Such rows are for `PackedCollator` and `PackedLoss`, and Trainer needs
    `remove_unused_columns=False`.

    int32 makes 12 bytes a token to write and read where int64 makes 20; `datasets` and collators
    hand it on as int64.
    `position_ids` and `seq_lengths` say the same twice because Hugging Face's Trainer drops columns
    that a model's forward does not name: `position_ids` survives it.

    An `attention_mask` of ones says nothing and is dropped; where it has zeros, before or behind
    the ones, those tokens are padding and are left out (`report.padding_tokens`). Columns that do
    not belong to tokens (text, messages, ids) are dropped with a warning that names them, unless
    `keep` does.

    Memory: the plan needs a few dozen bytes a document, and packs are written some hundred
    thousand tokens at a time. A data set on disk is packed to disk, into the cache folder beside
    it, where packing it again the same way finds it (as with `Dataset.map`); one in memory stays
    in memory.

    Args:
        dataset: a `datasets.Dataset` with a list column `input_ids`, a list of dicts with that key,
            or a list of token lists; or a `TokenFile`.
        capacity: tokens a row holds.
        keep: columns with one value a document that go along, as one list a row with a value for
            each document in it; `"documents"` is the number of the document in the input.
        num_proc: processes that write a data set on disk.
        options: `PlanOptions`.
        on_report: called with the `PackingReport`. By default it is logged, as a warning when
            tokens or labels were lost: `on_report=reports.append` keeps it, `print` shows it.

    Raises:
        ValueError: no `input_ids`, a column of numbers whose length differs from input_ids' (row
            and column named), null tokens, an attention_mask with holes, a data set that is packed
            already, and what `pack_lengths` refuses.
        NotImplementedError: a streaming data set.
    """
    data = dataset if isinstance(dataset, TokenFile) else as_dataset(dataset)
    source = read_source(data, without_documents(keep))
    packs = plan_source(data, source, capacity, options, shared_prefixes(data, source, options))
    _warn_of_dropped(source.dropped)
    on_report(packs.report)
    return _write(data, source, packs, tuple(keep), num_proc, options)


def without_documents(keep: Sequence[str]) -> list[str]:
    """The columns that `keep` names."""
    if isinstance(keep, str):
        raise ValueError(f"keep must be a list of names, got {keep!r}")
    return [name for name in keep if name != DOCUMENTS]


def shared_prefixes(
    data: Dataset | TokenFile, source: Source, options: PlanOptions
) -> SharedPrefixes | None:
    """What plans the prefixes that a source's documents share; None where they share none.

    Raises:
        ValueError: half of the options, or a column that is none or that cannot be shared.
    """
    names = [options.get(name) for name in ("prompt_ids", "prompt_lengths")]
    least = options.get("min_shared", MIN_SHARED)
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise ValueError(f"min_shared must be an integer of at least 1, got {least!r}")
    if names == [None, None]:
        return SharedPrefixes(source, least) if options.get("share_prefixes") else None
    if None in names or options.get("share_prefixes"):
        raise ValueError(
            "prompt_ids and prompt_lengths must be given together and without share_prefixes, got "
            f"{names[0]!r} and {names[1]!r}"
        )
    ids, lengths = (
        integer_column(data, argument, str(name))
        for argument, name in zip(("prompt_ids", "prompt_lengths"), names)
    )
    return SharedPrefixes(source, least, ids, lengths)


def plan_source(
    data: Dataset | TokenFile,
    source: Source,
    capacity: int,
    options: PlanOptions,
    share: Share | None = None,
) -> Packs:
    """`pack_lengths` for the documents of a source; the report counts the source's padding.

    Args:
        share: what `shared_prefixes` made of the options.
    """
    arguments: dict[str, Any] = {k: v for k, v in options.items() if k not in SHARING}
    for argument in ("together", "apart"):
        if arguments.get(argument) is not None:
            arguments[argument] = integer_column(data, argument, arguments[argument])
    if arguments.pop("learnable_only", False):
        longest = capacity if options.get("overflow") == "truncate" else None
        arguments["learned"] = learned_tokens(source, longest)
    packs = pack_lengths(source.lengths, capacity, share=share, **arguments)
    padding, report = source.padding_tokens, packs.report
    if packs.trees is not None and "learned" in arguments:
        firsts = packs.trees.parents < 0
        learned = learned_in(source, packs.order, packs.starts, packs.lengths, firsts)
        report = replace(report, masked_tokens=report.packed_tokens - learned)
    report = replace(report, tokens=report.tokens + padding, padding_tokens=padding)
    return replace(packs, report=report)


def _write(
    data: Dataset | TokenFile,
    source: Source,
    packs: Packs,
    keep: tuple[str, ...],
    num_proc: int | None,
    options: PlanOptions,
) -> Dataset:
    """Materialises the packs, batch by batch: on disk if the input is on disk, else in memory."""
    import datasets

    rows = PackedRows(data, source, packs, keep)
    features = datasets.Features.from_arrow_schema(rows.table(0, 0).schema)
    if isinstance(data, TokenFile):
        return _write_to_memory(rows, None)
    fingerprint = _fingerprint(data, packs, keep, options)
    if not packs.num_packs:
        packed = datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    elif data.cache_files:
        packed = _write_to_disk(rows, features, fingerprint, num_proc)
    else:
        packed = _write_to_memory(rows, fingerprint)
    return packed.with_format(data.format["type"], **data.format["format_kwargs"])


def _write_to_memory(rows: PackedRows, fingerprint: str | None) -> Dataset:
    """Without `Dataset.map`, whose growing buffer would copy every token once more."""
    import datasets
    import pyarrow as pa

    step, stop = rows.packs_per_batch, max(rows.packs.num_packs, 1)
    firsts = datasets.utils.tqdm(range(0, stop, step), desc="Packing", unit="batches")
    tables = [rows.table(i, min(i + step, rows.packs.num_packs)) for i in firsts]
    return datasets.Dataset(pa.concat_tables(tables), fingerprint=fingerprint)


def _write_to_disk(
    rows: PackedRows, features: Any, fingerprint: str, num_proc: int | None
) -> Dataset:
    """By `Dataset.map`, which writes to a temporary file first and finds what it wrote before."""
    import datasets

    folder = os.path.dirname(rows.data.cache_files[0]["filename"])
    numbers = datasets.Dataset.from_dict({"pack": np.arange(rows.packs.num_packs)})
    return numbers.with_format("arrow").map(
        rows,
        batched=True,
        batch_size=rows.packs_per_batch,
        remove_columns=["pack"],
        features=features,
        cache_file_name=os.path.join(folder, f"packed-{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        num_proc=num_proc,
        desc="Packing",
    )


def _fingerprint(data: Dataset, packs: Packs, keep: tuple[str, ...], options: PlanOptions) -> str:
    """Names the result by what it was made from; left to itself, datasets pickles every token."""
    from datasets.fingerprint import Hasher

    from packed_attn import __version__

    settings = sorted((name, str(value)) for name, value in options.items())
    given = [data._fingerprint, packs.digest(), list(keep), settings, __version__]
    return Hasher.hash(given)


@dataclass(eq=False)
class PackedRows:
    """Makes Arrow tables of packs; crosses to other processes without the tokens on disk."""

    data: Any
    source: Source | None
    packs: Packs
    keep: tuple[str, ...]

    def __getstate__(self) -> dict[str, Any]:
        # A data set on disk pickles as its path; views of its buffers would pickle every token.
        return {**self.__dict__, "source": None}

    def __call__(self, batch: pa.Table) -> pa.Table:
        numbers = batch.column("pack")
        return self.table(numbers[0].as_py(), numbers[-1].as_py() + 1)

    @property
    def packs_per_batch(self) -> int:
        return max(1, TOKENS_PER_BATCH // self.packs.capacity)

    def table(self, first: int, stop: int) -> pa.Table:
        """The rows for packs `first : stop`."""
        import pyarrow as pa

        if self.source is None:
            self.source = read_source(self.data, without_documents(self.keep))
        offsets = self.packs.offsets[first : stop + 1]
        pieces = slice(int(offsets[0]), int(offsets[-1]))
        lengths = self.packs.lengths[pieces]
        ends = np.append(0, np.cumsum(lengths))
        if ends[-1] > INT32_MAX:
            raise ValueError(
                f"a row must hold at most {INT32_MAX} tokens, but a pack has {ends[-1]}"
            )
        pack_pieces = offsets - offsets[0]
        pack_tokens = ends[pack_pieces]
        table = {}
        for name, values in token_columns(self.source, self.packs, pieces, np.int32).items():
            table[name] = _list_array(pack_tokens, values)
            if name == "position_ids":
                table["seq_lengths"] = _list_array(pack_pieces, lengths.astype(np.int32))
        documents, pack_documents, trees = self.packs.order[pieces], pack_pieces, self.packs.trees
        if trees is not None:
            bounds = trees.offsets[first : stop + 1]
            inside = slice(int(bounds[0]), int(bounds[-1]))
            documents, pack_documents = trees.documents[inside], bounds - bounds[0]
            table["seq_lengths"] = _list_array(pack_pieces, lengths.astype(np.int32))
            table["parents"] = _list_array(pack_pieces, trees.parents[pieces].astype(np.int32))
            table["ends"] = _list_array(pack_documents, trees.ends[inside].astype(np.int32))
        for name, values in document_columns(self.source, documents, self.keep).items():
            kept = self.source.kept.get(name)
            table[name] = _list_array(pack_documents, pa.array(values, kept and kept.column.type))
        return pa.table(table)


def _list_array(offsets: NDArray[np.int64], values: Any) -> pa.ListArray:
    import pyarrow as pa

    if isinstance(values, np.ndarray):
        values = pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _warn_of_dropped(names: list[str]) -> None:
    if names:
        warnings.warn(
            f"pack_dataset leaves out columns that do not have one value per token: "
            f"{', '.join(names)}",
            stacklevel=3,
        )
