"""Who divides rows among processes: the data set, accelerate, or nobody yet.

To divide twice loses documents, not to divide repeats them, and neither shows. accelerate divides
a stream's rows in one of three ways:

    dispatch     one process fetches, and stacks batches for the others. Packs cannot be stacked
    by files     a Hugging Face stream: ranks have unlike numbers of rows, and wait for each other
    in turn      each process reads every row and keeps its own; the first come again at the end

The rows of a data set with a length it divides in turn, by their numbers.
"""

from __future__ import annotations

import logging
import os
import sys
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch

logger = logging.getLogger(__name__)
_WARNED: WeakSet[Any] = WeakSet()

NO_DISPATCH = (
    "TrainingArguments(accelerator_config={'dispatch_batches': False}) or "
    "DataLoaderConfiguration(dispatch_batches=False)"
)


def processes() -> int:
    """How many processes train."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def checked_ranks(rank: int | None, world_size: int | None) -> tuple[int | None, int]:
    """The pair, or (None, 1) where neither is given.

    Raises:
        ValueError: one without the other, or a rank outside the world.
    """
    if rank is None and world_size is None:
        return None, 1
    if rank is None or world_size is None or not 0 <= rank < world_size:
        raise ValueError(
            "rank and world_size must be given together, with 0 <= rank < world_size, got "
            f"{rank!r} and {world_size!r}"
        )
    return rank, world_size


def require_ranks_if_distributed(rank: int | None) -> None:
    """Raises ValueError where several processes train and nobody said who divides."""
    if rank is None and processes() > 1:
        raise ValueError(
            f"rank and world_size must be given in a run of {processes()} processes: those of the "
            "process behind a plain DataLoader, or rank=0, world_size=1 where accelerate or "
            "Trainer divide the rows"
        )


def check_loader(loader: Any, world_size: int) -> None:
    """Whether what accelerate made of the DataLoader gives every process packs of its own, once.

    Raises:
        ValueError: it would stack packs, or divide what was divided already.
    """
    accelerate: Any = sys.modules.get("accelerate.data_loader")
    if accelerate is None:
        return
    if isinstance(loader, accelerate.DataLoaderDispatcher) and loader.state.num_processes > 1:
        raise ValueError(
            "accelerate would let one process fetch packs and stack them for the others, which "
            "packs of unlike documents cannot be: let every process fetch its own, by "
            f"{NO_DISPATCH}"
        )
    if isinstance(loader, accelerate.IterableDatasetShard) and world_size > 1:
        raise ValueError(
            f"documents must be divided among ranks once, but these are those of one rank of "
            f"{world_size} already, and accelerate would drop most of their rows: use rank=0, "
            "world_size=1 where accelerate or Trainer divide the rows"
        )


def rows_divided_at_once(loader: Any) -> int | None:
    """Rows that accelerate reads before it gives each process its own; None where it does not."""
    accelerate: Any = sys.modules.get("accelerate.data_loader")
    if accelerate is None or not isinstance(loader, accelerate.IterableDatasetShard):
        return None
    if loader.drop_last:  # which leaves the rest out, by the user's choice
        return 1
    return loader.batch_size * (1 if loader.split_batches else loader.num_processes)


def epoch_that_begins(caller: FrameType) -> int | None:
    """The epoch, where the caller is accelerate's shuffling sampler and begins one; else None.

    Of several processes, and where batches of an epoch are skipped, accelerate tells the epoch to
    this sampler alone, not to the data set.
    """
    accelerate: Any = sys.modules.get("accelerate.data_loader")
    sampler: Any = caller.f_locals.get("self")
    begins = caller.f_code.co_name == "__iter__"
    if accelerate is None or not begins:
        return None
    return sampler.epoch if isinstance(sampler, accelerate.SeedableRandomSampler) else None


def warn_if_uneven(rows: int, multiple: int) -> None:
    """Says what accelerate does with a stream that had too few documents to divide."""
    if rows % multiple:
        logger.warning(
            "%d rows do not divide into batches of all processes, %d rows at a time, and no pack "
            "of several documents is left to be cut: accelerate repeats %d of the first rows. "
            "dataloader_drop_last=True leaves the last ones out instead",
            rows,
            multiple,
            -rows % multiple,
        )


def warn_if_repeated() -> None:
    """Says, once for each loader, that accelerate gives rows of a data set to two processes.

    It fills the last batch of every process from the first rows. Only frames of the main process
    know: a collator in a worker says nothing.
    """
    accelerate: Any = sys.modules.get("accelerate.data_loader")
    if accelerate is None or processes() == 1:
        return
    loader = _calling(accelerate.DataLoaderShard)
    sampler: Any = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, accelerate.SkipBatchSampler):
        sampler = sampler.batch_sampler
    if not isinstance(sampler, accelerate.BatchSamplerShard) or sampler in _WARNED:
        return
    if sampler.drop_last or not sampler.even_batches:
        return
    rows = len(loader.dataset)
    together = sampler.batch_size * (1 if sampler.split_batches else sampler.num_processes)
    if rows % together:
        _WARNED.add(sampler)
        logger.warning(
            "%d rows do not divide into batches of all processes, %d rows at a time: accelerate "
            "repeats %d of them at the end of an epoch. multiple=%d of pack_dataset or "
            "PackedDataset cuts packs until they divide; dataloader_drop_last=True leaves the last "
            "ones out",
            rows,
            together,
            -rows % together,
            together,
        )


def refuse_undivided_stream() -> None:
    """For a collator: refuses a Hugging Face stream of packs that several processes would read.

    Raises:
        ValueError: see the ways above.
    """
    if processes() == 1:
        return
    from torch.utils.data._utils.fetch import _BaseDatasetFetcher

    dataset: Any = getattr(_calling(_BaseDatasetFetcher), "dataset", None)
    accelerate: Any = sys.modules.get("accelerate")
    if accelerate is not None and isinstance(dataset, accelerate.data_loader.IterableDatasetShard):
        dataset = dataset.dataset
    if not is_hugging_face(dataset):
        return
    prepared = accelerate is not None and bool(accelerate.state.PartialState._shared_state)
    if dataset._distributed is not None and not prepared:
        return  # split_dataset_by_node, behind a plain DataLoader
    raise ValueError(
        f"a Hugging Face stream of packs must not be divided among {processes()} processes by "
        "accelerate or by nobody: one process would stack packs for the others, ranks would have "
        "unlike numbers of packs and wait for each other, or packs would come twice. Give the "
        "stream to PackedIterableDataset(stream, capacity, rank=0, world_size=1) and let every "
        f"process fetch its own rows, by {NO_DISPATCH}, or load the packs without streaming"
    )


def is_hugging_face(source: Any) -> bool:
    """A streaming data set of datasets, which must have been imported to make one."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(source, datasets.IterableDataset)


def _calling(kind: type) -> Any:
    """The nearest caller's `self` of a kind; None without one."""
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, kind):
            return caller
        frame = frame.f_back
    return None
