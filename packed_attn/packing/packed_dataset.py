"""A packed data set as an index: rows are put together when they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from packed_attn.loaders import epoch_that_begins, warn_if_repeated
from packed_attn.packing.arguments import checked_whole
from packed_attn.packing.columns import as_dataset
from packed_attn.packing.dataset import (
    PlanOptions,
    plan_source,
    shared_prefixes,
    without_documents,
)
from packed_attn.packing.plan import Packs, Share
from packed_attn.packing.report import PackingReport, log_report
from packed_attn.packing.rows import document_columns, token_columns
from packed_attn.packing.sources import DOCUMENTS, Source, TokenFile, read_source

if TYPE_CHECKING:
    from datasets import Dataset


class PackPart(NamedTuple):
    """The pieces `first : stop` of one pack, as an index of a `PackedDataset`."""

    pack: int
    first: int
    stop: int


class PackedDataset(TorchDataset):
    """Packed rows of a tokenised data set, for a DataLoader, without writing them anywhere.

    A row is a dict of what `pack_dataset` writes (`input_ids`, `labels`, `position_ids`,
    `seq_lengths`, other per-token columns, kept columns; with shared prefixes what `pack_dataset`
    says of those), as numpy arrays (kept columns as lists).
    It is put together from the source in time that grows with the row alone.

        rows = PackedDataset(dataset, 8192, seed=0)
        loader = DataLoader(rows, collate_fn=PackedCollator(), shuffle=False, num_workers=2)

    With a seed, `set_epoch` plans anew: other packs in another order, the same for the same seed
    and epoch. DataLoader workers follow it, persistent ones too. The epochs of Hugging Face's
    Trainer and accelerate, those of a resumed run too, it follows by itself. Trainer's
    `remove_unused_columns` may be on or off, but must be off with shared prefixes: boundaries that
    were dropped are an error in the collator.

    Copies in other processes hold the source and the settings, and plan for themselves: what is
    pickled is small where the source is on disk (a data set that was loaded from disk, or a
    `TokenFile`). A list is copied into Arrow once.

    Args:
        data: a `datasets.Dataset` with `input_ids`, a `TokenFile`, a list of dicts with that key or
            a list of token lists.
        capacity: tokens a row holds.
        keep: as in `pack_dataset`; `"documents"`, the numbers of a row's documents in the source,
            is kept unless told otherwise.
        on_report: called once with the `PackingReport`, as in `pack_dataset`.
        options: `PlanOptions`.

    Raises:
        ValueError, NotImplementedError: as `pack_dataset`.
    """

    def __init__(
        self,
        data: Dataset | TokenFile | Sequence[Any],
        capacity: int,
        *,
        keep: Sequence[str] = (DOCUMENTS,),
        on_report: Callable[[PackingReport], object] = log_report,
        **options: Unpack[PlanOptions],
    ) -> None:
        self._data = data if isinstance(data, TokenFile) else as_dataset(data)
        self._capacity = capacity
        self._keep = tuple(without_documents(keep)) + (DOCUMENTS,) * (DOCUMENTS in keep)
        self._options = options
        epoch = checked_whole("epoch", options.get("epoch", 0), 0)
        # In shared memory: workers that live on see the main process' set_epoch.
        self._epoch = torch.tensor([epoch]).share_memory_()
        self._source: Source | None = None
        self._share: Share | None = None
        self._planned: tuple[int, Packs] | None = None
        on_report(self.packs.report)

    @property
    def packs(self) -> Packs:
        """The plan of this epoch; row i is pack i."""
        epoch = self.epoch
        if self._planned is None or (self._planned[0] != epoch and "seed" in self._options):
            options: PlanOptions = {**self._options, "epoch": epoch}
            source = self.source
            plan = plan_source(self._data, source, self._capacity, options, self._share)
            self._planned = epoch, plan
        return self._planned[1]

    @property
    def source(self) -> Source:
        """The documents and their columns."""
        if self._source is None:
            self._source = read_source(self._data, without_documents(self._keep))
            self._share = shared_prefixes(self._data, self._source, self._options)
        return self._source

    @property
    def report(self) -> PackingReport:
        """Where every document and token of this epoch's plan went."""
        return self.packs.report

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Plans anew for an epoch, from the seed; without a seed the plan stays."""
        self._epoch.fill_(checked_whole("epoch", epoch, 0))

    def __len__(self) -> int:
        caller = sys._getframe(1)
        epoch = epoch_that_begins(caller)
        if epoch is not None:
            self.set_epoch(epoch)
        if caller.f_code.co_name == "__iter__":  # a sampler's, in the main process
            warn_if_repeated()
        return self.packs.num_packs

    def __getitem__(self, index: int | PackPart) -> dict[str, Any]:
        packs = self.packs
        pieces = self._pieces(packs, index)
        columns = token_columns(self.source, packs, pieces)
        row = {name: _out_of_arrow(values) for name, values in columns.items()}
        row["seq_lengths"], documents = packs.lengths[pieces], packs.order[pieces]
        if packs.trees is not None:
            pack = int(index) % packs.num_packs  # type: ignore[arg-type]
            first, stop = packs.trees.offsets[pack : pack + 2]
            row["parents"], row["ends"] = packs.trees.parents[pieces], packs.trees.ends[first:stop]
            documents = packs.trees.documents[first:stop]
        return row | document_columns(self.source, documents, self._keep)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None, "_share": None, "_planned": None}

    def _pieces(self, packs: Packs, index: int | PackPart) -> slice:
        pack, *part = index if isinstance(index, PackPart) else (int(index),)
        if not -packs.num_packs <= pack < packs.num_packs:
            raise IndexError(f"index must be below {packs.num_packs} packs, got {pack}")
        pack %= packs.num_packs
        begin, end = int(packs.offsets[pack]), int(packs.offsets[pack + 1])
        if not part:
            return slice(begin, end)
        if packs.trees is not None:
            raise NotImplementedError(
                f"pack {pack} shares prefixes, which a part of it would lose: take whole packs"
            )
        first, stop = part
        if not 0 <= first < stop <= end - begin:
            raise IndexError(
                f"pack {pack} has {end - begin} pieces, so it has no pieces {first}:{stop}"
            )
        return slice(begin + first, begin + stop)


def _out_of_arrow(values: Any) -> Any:
    """Booleans as numpy; strings and values with nulls, which Arrow holds, as a list."""
    if isinstance(values, np.ndarray):
        return values
    if values.type == "bool" and not values.null_count:
        return values.to_numpy(zero_copy_only=False)
    return values.to_pylist()
