"""Packed rows from a stream of documents, with a state that continues exactly.

    documents -> this shard's documents -> window -> packs -> rows

A shard is one DataLoader worker of one rank. Its state is the window as it was before it was last
planned, the place in the source at that moment, and how many packs have left since: reading on from
there plans the same packs again.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from packed_attn.loaders import (
    check_loader,
    checked_ranks,
    is_hugging_face,
    require_ranks_if_distributed,
    rows_divided_at_once,
    warn_if_uneven,
)
from packed_attn.packing.arguments import check_choice, checked_whole
from packed_attn.packing.documents import DocumentReader, count_learned, unpacked
from packed_attn.packing.forest import check_min_shared
from packed_attn.packing.plan import Overflow
from packed_attn.packing.prefixes import MIN_SHARED, require_shareable
from packed_attn.packing.report import PackingReport, log_report
from packed_attn.packing.tally import Tally
from packed_attn.packing.window import Pack, Piece, Window, assemble

Row = dict[str, NDArray[Any]]
State = dict[str, Any]


class PackedIterableDataset(IterableDataset[Row]):
    """Packs a stream of tokenised documents into rows of at most `capacity` tokens.

    A window of `lookahead` documents is packed by best-fit-decreasing. Full packs leave it; the
    documents of poorly filled ones go back and wait for the next documents, at most eight windows
    long. Rows come in the order of their earliest documents, so a shuffled source gives shuffled
    rows: shuffle there (`IterableDataset.shuffle` of datasets); `set_epoch` is passed on to it.

    Rows are those of `pack_dataset` as numpy arrays, for `PackedCollator`: `input_ids`, `labels`,
    `position_ids`, `seq_lengths` and every column with one number per token.

    Every document goes to one DataLoader worker of one rank: document i of the stream to shard
    i mod (workers x ranks); a Hugging Face IterableDataset divides itself, by files where it can.
    Each shard has a window of its own.

    Where accelerate or Trainer divide rows among processes, every process gets as many rows and
    every document is in one of them: at the end of a pass packs are cut in two, between documents,
    until the rows divide.

    State, in three ways, all exact at every row:

        no workers                   `state_dict()` and `load_state_dict()` of this data set
        torchdata StatefulDataLoader its own, with any number of workers
        a plain DataLoader           `skip_batches(n)`, with any number of workers: plans the
                                     first n batches again without making them

    Args:
        source: tokenised documents (mappings with `input_ids`, or token ids): a sequence, another
            iterable that can be iterated again, a function that returns an iterator, or a Hugging
            Face IterableDataset. It must give the same documents every time (in an epoch). Packs
            (rows with `seq_lengths`, as `pack_dataset` writes them) are taken apart into their
            documents and packed again.
        capacity: tokens a row holds.
        lookahead: documents in the window, at least 1. Memory is theirs.
        overflow: what happens to documents over capacity, as in `pack_lengths`.
        learnable_only: leave out documents of which no token has a label (`labels`,
            `completion_mask`, `assistant_masks`; a first token never has one).
        share_prefixes: documents in the window that begin alike share those tokens in a pack, as in
            `pack_dataset`. Documents of one prompt should stand close together in the stream.
        min_shared: tokens that sharing must save.
        rank, world_size: which of how many processes this is, where the data set itself divides the
            documents among processes (behind a plain DataLoader). `rank=0, world_size=1` gives
            every process all rows, for accelerate and Trainer, which divide rows themselves. A run
            of one process needs neither; a run of several must say, because to divide twice would
            lose documents and not to divide would repeat them.
        on_report: called at the end of a pass, in each worker, with its shard's `PackingReport`.
            By default it is logged, as a warning when tokens or labels were lost.

    Raises:
        ValueError: bad arguments, a source that can be iterated once only, a run of several
            processes without rank and world_size; while iterating, documents that cannot be read
            (`documents.DocumentReader`) or, under `overflow="error"`, do not fit; a state of
            another worker or setting.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        capacity: int,
        *,
        lookahead: int = 1000,
        overflow: Overflow = "split",
        learnable_only: bool = False,
        share_prefixes: bool = False,
        min_shared: int = MIN_SHARED,
        rank: int | None = None,
        world_size: int | None = None,
        on_report: Callable[[PackingReport], object] = log_report,
    ) -> None:
        super().__init__()
        _check_source(source)
        check_choice("overflow", overflow, Overflow)
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 1:
            raise ValueError(f"lookahead must be an integer of at least 1, got {lookahead!r}")
        check_min_shared(min_shared)
        self.capacity = checked_whole("capacity", capacity)
        self.min_shared = min_shared if share_prefixes else None
        self.lookahead = lookahead
        self.overflow: Overflow = overflow
        self.learnable_only = learnable_only
        self.on_report = on_report
        self._rank, self._world_size = checked_ranks(rank, world_size)
        self._source: Any = _divided_by_rank(source, self._rank, self._world_size)
        self._epoch = 0
        self._multiple = 1  # of rows, for which accelerate waits before it divides them
        self._shard: _Shard | None = None  # the one being iterated
        self._start: State | None = None  # where the next iteration begins
        self._skip: tuple[int, int, bool] | None = None

    def __iter__(self) -> Iterator[Row]:
        # Not a generator: the state to start from is taken here, once, and not at the first row.
        require_ranks_if_distributed(self._rank)
        start, self._start = self._start, None
        skip, self._skip = self._skip, None
        worker, workers = _worker()
        if skip is None:
            shard = self._make_shard(worker, workers, start)
        else:
            shard = self._after_skip(worker, workers, skip)
        self._shard = shard
        return iter(()) if shard is None else self._rows(shard)

    def state_dict(self) -> State:
        """Where the iteration stands: plain numbers, lists and numpy arrays.

        It holds the documents that wait in the window (those of poorly filled packs; a few per
        cent of `lookahead`), and the source's own state if it has one that is exact.
        """
        if self._start is not None:
            return self._start
        shard = self._shard or self._make_shard(*_worker(), None)
        return {**self._settings(), "epoch": self._epoch, **shard.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """The next iteration continues where the state was taken; later ones start anew.

        Raises:
            ValueError: a state that was taken with other settings; while iterating, one of a run
                whose rows do not divide as accelerate divides those of this one.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise ValueError(
                    f"state must be of a data set with {name}={value!r}, but it was taken with "
                    f"{state.get(name)!r}"
                )
        self._start, self._skip = state, None
        self.set_epoch(state["epoch"])

    def skip_batches(self, batches: int, *, batch_size: int = 1, drop_last: bool = False) -> None:
        """The next iteration starts behind the first batches that a plain DataLoader gave.

        Each worker plans all workers' packs up to there, without making rows, and takes over from
        the worker whose turn it would be: give the new DataLoader as many workers as the old.

        Args:
            batches: batches that the DataLoader gave since the beginning of the epoch.
            batch_size, drop_last: the DataLoader's.

        Raises:
            ValueError: batches below 0 or batch_size below 1.
        """
        if batches < 0 or batch_size < 1:
            raise ValueError(
                "batches must be at least 0 and batch_size at least 1, "
                f"got {batches} and {batch_size}"
            )
        self._skip, self._start = (batches, batch_size, drop_last), None

    def set_epoch(self, epoch: int) -> None:
        """Tells the source which epoch it is, if it asks (a shuffled Hugging Face data set).

        Raises:
            ValueError: the caller is accelerate in a run of several processes, about to stack packs
                or to divide among ranks what was divided already.
        """
        # The one call that accelerate makes in every process before it asks for the first batch.
        loader = sys._getframe(1).f_locals.get("self")
        check_loader(loader, self._world_size)
        self._multiple = rows_divided_at_once(loader) or self._multiple
        self._epoch = epoch
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)

    def _rows(self, shard: _Shard) -> Iterator[Row]:
        yield from map(assemble, shard.packs())
        self.on_report(shard.report())

    def _settings(self) -> State:
        return {
            "capacity": self.capacity,
            "lookahead": self.lookahead,
            "overflow": self.overflow,
            "learnable_only": self.learnable_only,
            "min_shared": self.min_shared,
            "rank": self._rank or 0,
            "world_size": self._world_size,
        }

    def _make_shard(self, worker: int, workers: int, state: State | None) -> _Shard:
        ours = (worker, workers)
        if _divides_among_workers(self._source):  # by worker here, and by rank already
            index, count = 0, 1
        else:
            index = (self._rank or 0) * workers + worker
            count = self._world_size * workers
        if state is not None and tuple(state["worker"]) != ours:
            raise ValueError(
                f"state must be of worker {worker} of {workers}, but it was taken in worker "
                f"{state['worker'][0]} of {state['worker'][1]}; use as many workers as then"
            )
        if state is not None:
            # Those of versions that held nothing back for accelerate do not say so.
            state = {"held": 0, "multiple": 1, **state}
        multiple = self._multiple if state is None else state["multiple"]
        if multiple % self._multiple:
            raise ValueError(
                f"state must be of a run whose rows come to a multiple of {self._multiple}, as "
                f"accelerate divides them now, but it was taken where it is {multiple}"
                ": go on with that run's processes and batch, or begin the epoch anew"
            )
        shard = _Shard(self, index, count, ours, multiple)
        if state is not None:
            shard.load_state_dict(state)
        return shard

    def _after_skip(self, worker: int, workers: int, skip: tuple[int, int, bool]) -> _Shard | None:
        """The shard that this worker goes on with, or None where none is left for it."""
        if workers > 1 and _divides_among_workers(self._source):
            raise NotImplementedError(
                "skip_batches needs every worker's documents, and a Hugging Face IterableDataset "
                "shows a worker its own only: use torchdata's StatefulDataLoader"
            )
        batches, batch_size, drop_last = skip
        turns = deque(self._make_shard(w, workers, None) for w in range(workers))
        # DataLoader asks its workers in turn and leaves out those that have ended.
        while batches and turns:
            shard = turns.popleft()
            rows = shard.skip(batch_size)
            if rows and not (drop_last and rows < batch_size):
                batches -= 1
                turns.append(shard)
        return turns[worker] if worker < len(turns) else None


class _Shard:
    """One worker's documents, packed: the pass over them and its state.

    Args:
        data: the data set.
        index, count: takes the source's documents index, index + count, index + 2 count, ...
        worker: (number of the worker, number of workers).
        multiple: of rows that a pass gives, where its documents allow it.
    """

    def __init__(
        self,
        data: PackedIterableDataset,
        index: int,
        count: int,
        worker: tuple[int, int],
        multiple: int,
    ) -> None:
        self._source: Any = data._source
        self._learnable_only = data.learnable_only
        self._longest = data.capacity if data.overflow == "truncate" else None
        self._index, self._count, self._worker = index, count, worker
        self._window = Window(
            data.capacity, data.lookahead, min_shared=data.min_shared, multiple=multiple
        )
        self._reader = DocumentReader()
        self._tally = Tally(data.capacity, data.overflow, shares=data.min_shared is not None)
        self._position = 0  # documents of the source that have been read, other shards' included
        self._released = 0  # packs since the mark
        self._mark = self._take_mark()
        self._packs = self._release_packs()

    def packs(self) -> Iterator[Pack]:
        """The packs from where the shard stands."""
        return self._packs

    def skip(self, packs: int) -> int:
        """Passes over that many packs, or as many as are left; returns how many."""
        return sum(1 for _ in zip(range(packs), self._packs))

    def report(self) -> PackingReport:
        """Where the documents and tokens read so far went; balances at the end of a pass."""
        return self._tally.report()

    def state_dict(self) -> State:
        return {**self._mark, "released": self._released}

    def load_state_dict(self, state: State) -> None:
        self._window.pool, self._window.held = _pieces_of_state(state["pool"]), state["held"]
        self._reader = DocumentReader(state["columns"] and tuple(state["columns"]))
        self._tally = Tally(**state["tally"])
        self._position = state["position"]
        self._released = state["released"]
        if state["source"] is not None:
            self._source = _with_state(self._source, state["source"])
        self._mark = {name: state[name] for name in self._mark}

    def _take_mark(self) -> State:
        """The state, but for the packs released since."""
        exact = self._position and _has_exact_state(self._source)
        return {
            "worker": list(self._worker),
            "position": self._position,
            "source": self._source.state_dict() if exact else None,
            "columns": self._reader.names and list(self._reader.names),
            "pool": _state_of_pieces(self._window.pool),
            "held": self._window.held,
            "multiple": self._window.multiple,
            "tally": asdict(self._tally),
        }

    def _release_packs(self) -> Iterator[Pack]:
        documents = self._documents()
        ended = False
        while not ended:
            ended = self._fill_window(documents)
            packs = self._window.release(everything=ended, before=self._tally.packs)
            for pack in packs:
                self._tally.count_pack(pack.tokens, *pack.saved)
                if pack.shared is not None and self._learnable_only:
                    self._tally.count_masked(assemble(pack)["labels"])
            for pack in packs[self._released :]:
                self._released += 1
                yield pack
            if not ended:
                self._released = 0
                self._mark = self._take_mark()
        warn_if_uneven(self._tally.packs, self._window.multiple)

    def _fill_window(self, documents: Iterator[tuple[int, Any]]) -> bool:
        """Reads until the window is full; True at the end of the stream."""
        while not self._window.full:
            number, given = next(documents, (-1, None))
            if number < 0:
                return True
            for where, document in unpacked(number, given):
                self._take(where, document)
        return False

    def _take(self, where: str, given: Any) -> None:
        """Puts a document into the window, in as many pieces as it takes."""
        columns, padding = self._reader.read(where, given)
        length = columns["input_ids"].size
        learned = None
        if self._learnable_only:
            learned = count_learned(columns, self._longest)
        if self._window.min_shared is not None:
            require_shareable(columns)
        number = self._tally.documents
        for first, stop in self._tally.count_document(where, length, padding, learned):
            cut = {name: values[first:stop] for name, values in columns.items()}
            self._window.pool.append(Piece(number, cut))

    def _documents(self) -> Iterator[tuple[int, Any]]:
        """This shard's documents from the position on, with their numbers in the source."""
        start = self._position
        if _is_indexable(self._source):
            first = start + (self._index - start) % self._count
            numbered = ((i, self._source[i]) for i in range(first, len(self._source), self._count))
        else:
            documents: Any = self._source() if callable(self._source) else self._source
            passed_over = 0 if self._mark["source"] is not None else start
            numbered = enumerate(islice(documents, passed_over, None), start)
        for number, given in numbered:
            self._position = number + 1
            if number % self._count == self._index:
                yield number, given


def _with_state(source: Any, state: State) -> Any:
    """The source, set to give the documents that were left when the state was taken."""
    if is_hugging_face(source):
        # Every later pass over one with a state would start there again, so a copy gets it; not
        # copy.copy, which datasets gives the attributes of the original themselves.
        original, source = source, object.__new__(type(source))
        source.__dict__.update(original.__dict__)
    source.load_state_dict(state)
    return source


def _is_indexable(source: Any) -> bool:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _has_exact_state(source: Any) -> bool:
    """Whether a source has a state from which it gives exactly the documents that are left.

    A Hugging Face data set with a shuffle buffer has a state without the buffer: its documents
    would be lost.
    """
    if not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
        return False
    return not is_hugging_face(source) or not _has_shuffle_buffer(source._ex_iterable)


def _has_shuffle_buffer(examples: Any) -> bool:
    if type(examples).__name__.startswith("BufferShuffled"):
        return True
    inner = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return any(_has_shuffle_buffer(one) for one in inner if one is not None)


def _divides_among_workers(source: Any) -> bool:
    return is_hugging_face(source)


def _divided_by_rank(source: Any, rank: int | None, world_size: int) -> Any:
    if world_size == 1 or not is_hugging_face(source):
        return source
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(source, rank=rank or 0, world_size=world_size)


def _worker() -> tuple[int, int]:
    """This DataLoader worker's number, and how many there are."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _state_of_pieces(pieces: list[Piece]) -> State:
    """Tensors, which torch.load takes without trusting the file."""
    names = pieces[0].columns if pieces else ()
    columns = {name: np.concatenate([p.columns[name] for p in pieces]) for name in names}
    return {
        "documents": [piece.document for piece in pieces],
        "lengths": [piece.length for piece in pieces],
        "columns": {name: torch.from_numpy(values) for name, values in columns.items()},
    }


def _pieces_of_state(state: State) -> list[Piece]:
    stops = np.cumsum(state["lengths"]).tolist()
    columns = {
        name: np.split(values.numpy(), stops[:-1]) for name, values in state["columns"].items()
    }
    return [
        Piece(document, {name: parts[i] for name, parts in columns.items()})
        for i, document in enumerate(state["documents"])
    ]


def _check_source(source: Any) -> None:
    if isinstance(source, Iterator):
        raise ValueError(
            "source must be something that can be iterated again, but it is an iterator "
            f"({type(source).__name__}): pass the function that makes it"
        )
    readable = callable(source) or isinstance(source, Iterable) or _is_indexable(source)
    if not readable or isinstance(source, Mapping | str | bytes):
        raise ValueError(
            "source must be an iterable of documents or a function that returns one, got "
            f"{type(source).__name__}"
        )
