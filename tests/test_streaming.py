"""PackedIterableDataset: every token once, well filled, and continued exactly from every row."""

from __future__ import annotations

import os
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from packed_attn import PackedCollator, PackedIterableDataset, pack_dataset, pack_lengths
from packed_attn.packing import PackingReport
from tests.processes import server

SOURCES = ("list", "function", "hugging_face", "hugging_face_shuffled", "hugging_face_files")


def lognormal(documents: int, *, mean: float = 500, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1.0, documents).astype(np.int64))


def numbered(lengths: Any) -> list[dict[str, list[int]]]:
    """Documents whose tokens are all different, so that a row says which tokens it holds."""
    starts = np.cumsum(lengths) - np.asarray(lengths)
    return [{"input_ids": list(range(s, s + n))} for s, n in zip(starts.tolist(), lengths)]


class NumberedFunction:
    """A function that returns an iterator, picklable."""

    def __init__(self, documents: list[Any]) -> None:
        self.documents = documents

    def __call__(self) -> Iterator[Any]:
        return iter(self.documents)


def from_files(files: list[list[Any]]) -> Iterator[Any]:
    for file in files:
        yield from file


def make_source(kind: str, documents: list[Any]) -> Any:
    if kind == "list":
        return documents
    if kind == "function":
        return NumberedFunction(documents)
    if kind == "hugging_face_files":  # five files, to be divided among workers
        files = [documents[i::5] for i in range(5)]
        return datasets.IterableDataset.from_generator(from_files, gen_kwargs={"files": files})
    stream = datasets.Dataset.from_list(documents).to_iterable_dataset(num_shards=4)
    return stream.shuffle(seed=3, buffer_size=16) if "shuffled" in kind else stream


def stream(source: Any, capacity: int = 256, lookahead: int = 16, **options: Any) -> Any:
    options.setdefault("on_report", ignore)
    return PackedIterableDataset(source, capacity, lookahead=lookahead, **options)


def ignore(report: PackingReport) -> None:
    pass


def as_lists(rows: list[Any]) -> list[Any]:
    """Rows (or batches of rows) as plain values, to compare to the bit."""
    return [
        as_lists(row) if isinstance(row, list) else {name: row[name].tolist() for name in row}
        for row in rows
    ]


def tokens_of(rows: list[Any]) -> list[int]:
    return sorted(token for row in rows for token in row["input_ids"].tolist())


def same(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(("lookahead", "bound"), [(1000, 0.995), (10_000, 0.998)])
@pytest.mark.parametrize("capacity", [2048, 8192])
def test_fill_is_near_the_bound(lookahead: int, bound: float, capacity: int) -> None:
    lengths = np.minimum(lognormal(20_000), capacity)
    documents = [np.zeros(n, np.int8) for n in lengths]
    rows = sum(1 for _ in stream(documents, capacity, lookahead))
    assert -(-int(lengths.sum()) // capacity) / rows >= bound


@given(
    lengths=st.lists(st.integers(0, 40), max_size=60),
    capacity=st.integers(1, 24),
    lookahead=st.integers(1, 12),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
)
def test_every_token_is_in_one_place(
    lengths: list[int], capacity: int, lookahead: int, overflow: Any
) -> None:
    documents, reports = numbered(lengths), []
    packed = stream(documents, capacity, lookahead, overflow=overflow, on_report=reports.append)
    rows = list(packed)
    kept = [
        document["input_ids"][: None if overflow == "split" else capacity]
        for document in documents
        if overflow != "drop" or len(document["input_ids"]) <= capacity
    ]
    assert tokens_of(rows) == [token for document in kept for token in document]
    for row in rows:
        assert row["seq_lengths"].sum() == row["input_ids"].size <= capacity
        assert row["seq_lengths"].min() > 0
        firsts = row["position_ids"] == 0
        assert (np.flatnonzero(firsts) == np.cumsum([0, *row["seq_lengths"][:-1]])).all()
        assert (np.diff(row["input_ids"])[~firsts[1:]] == 1).all()  # order inside a document
        assert (row["labels"] == np.where(firsts, -100, row["input_ids"])).all()
    (report,) = reports
    assert report.packs == len(rows)
    assert report.packed_tokens == sum(map(len, kept))
    whole = pack_lengths(lengths, capacity, overflow=overflow).report.to_dict()
    differing = {"packs", "lower_bound", "fill_histogram"}  # by the window, and its known bound
    figures = report.to_dict()
    assert {n: v for n, v in figures.items() if n not in differing} == {
        n: v for n, v in whole.items() if n not in differing
    }
    assert sum(report.fill_histogram) == len(rows)


def test_rows_are_those_of_pack_dataset() -> None:
    """With a window as large as the stream both plan the same packs, and write the same rows."""
    rng = np.random.default_rng(0)
    documents = numbered(rng.integers(1, 50, 40).tolist())
    for document in documents:
        size = len(document["input_ids"])
        document["completion_mask"] = rng.integers(0, 2, size).tolist()
        document["weights"] = rng.random(size).tolist()
    ours = as_lists(list(stream(documents, 64, 100)))
    theirs = pack_dataset(documents, 64)

    def pieces(row: Any) -> list[Any]:
        stops = np.cumsum(row["seq_lengths"])
        names = sorted(name for name in row if name != "seq_lengths")
        return sorted(
            [row[name][stop - n : stop] for name in names]
            for stop, n in zip(stops, row["seq_lengths"])
        )

    assert sorted(map(pieces, ours)) == sorted(map(pieces, theirs))
    assert list(ours[0]) == list(theirs.column_names)


def test_rows_feed_the_collator() -> None:
    packed = stream(numbered(lognormal(100, mean=30).tolist()))
    batches = list(DataLoader(packed, batch_size=2, collate_fn=PackedCollator(capacity=256)))
    assert all(batch["input_ids"].shape == (1, 512) for batch in batches[:-1])
    assert sum(batch["layout"].lengths[-1] == 0 for batch in batches) == 0


def test_rows_follow_the_stream_and_no_document_waits_for_long() -> None:
    """Documents of just over half the capacity never fill a pack, so one of them must not wait
    behind all that follow."""
    lengths = [51] + [52, 48] * 500
    rows = list(stream(numbered(lengths), 100, lookahead=10))
    firsts = [int(row["input_ids"][0]) for row in rows]
    assert firsts.index(0) <= 9 * 10
    assert np.mean(np.abs(np.argsort(firsts) - np.arange(len(firsts)))) < 2


def test_documents_without_labels_are_left_out_when_asked() -> None:
    reports: list[PackingReport] = []
    documents = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 0]},
        {"input_ids": [6, 7], "completion_mask": [1, 0]},  # a first token has no label
    ]
    (row,) = stream(documents, learnable_only=True, on_report=reports.append)
    assert row["input_ids"].tolist() == [1, 2, 3]
    assert (reports[0].unlearnable_documents, reports[0].unlearnable_tokens) == (2, 4)
    assert (reports[0].learned_tokens, reports[0].masked_tokens) == (1, 2)
    (row,) = stream(documents)
    assert row["seq_lengths"].tolist() == [3, 2, 2]


@pytest.mark.parametrize("kind", SOURCES)
def test_continues_from_every_row(kind: str) -> None:
    documents = numbered([*lognormal(60, mean=60).tolist(), 700])
    packed = stream(make_source(kind, documents))
    rows = as_lists(list(packed))
    assert tokens_of(list(packed)) == tokens_of(
        [{"input_ids": np.concatenate([document["input_ids"] for document in documents])}]
    )
    for step in range(len(rows) + 1):
        iterator = iter(packed)
        for _ in range(step):
            next(iterator)
        state = pickle.loads(pickle.dumps(packed.state_dict()))
        resumed = stream(make_source(kind, documents))
        resumed.load_state_dict(state)
        assert as_lists(list(resumed)) == rows[step:], step
        assert as_lists(list(resumed)) == rows  # and the pass after it is a whole one


def test_a_state_of_a_resumed_pass() -> None:
    documents = numbered(lognormal(60, mean=60).tolist())
    packed = stream(NumberedFunction(documents))
    rows = as_lists(list(packed))
    seen = []
    for _ in rows:  # stopped and continued after every row
        seen.append(next(iter(packed)))
        state, packed = packed.state_dict(), stream(NumberedFunction(documents))
        packed.load_state_dict(state)
        assert packed.state_dict() is state
    assert as_lists(seen) == rows
    assert list(packed) == []


@pytest.mark.parametrize("share", [False, True])
def test_a_state_of_a_version_that_held_nothing_back(share: bool) -> None:
    documents = numbered([*lognormal(60, mean=40).tolist(), 256])
    packed = stream(documents, lookahead=4, share_prefixes=share)
    rows = list(packed)
    iterator = iter(packed)
    for step in range(len(rows) + 1):
        state = {n: v for n, v in packed.state_dict().items() if n not in ("held", "multiple")}
        resumed = stream(documents, lookahead=4, share_prefixes=share)
        resumed.load_state_dict(state)
        assert tokens_of(list(resumed)) == tokens_of(rows[step:])
        next(iterator, None)


def test_a_state_of_rows_that_do_not_divide_is_refused() -> None:
    packed = stream(numbered([10] * 9), 20)
    state = packed.state_dict()
    IterableDatasetShard(packed, 2, False, 2, 0).set_epoch(0)
    packed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"multiple of 4, .* taken where it is 1:"):
        list(packed)
    assert len(list(packed)) % 4 == 0
    state = packed.state_dict()
    IterableDatasetShard(packed, 1, False, 2, 0).set_epoch(0)  # 2 divides 4
    packed.load_state_dict(state)
    assert not list(packed)


def test_state_is_small_and_loads_without_trust(tmp_path: Path) -> None:
    """It holds poorly filled packs' documents, not the window, in types of torch and Python."""
    lengths = lognormal(4000)
    packed = stream(numbered(lengths.tolist()), 4096, 1000)
    iterator = iter(packed)
    for _ in range(300):
        next(iterator)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(state["pool"]["documents"]) < 100
    resumed = stream(numbered(lengths.tolist()), 4096, 1000)
    resumed.load_state_dict(state)
    assert as_lists([next(iter(resumed))]) == as_lists([next(iterator)])


def test_a_source_with_a_state_is_not_read_again() -> None:
    read: list[int] = []

    def count(document: Any) -> Any:
        read.append(document["input_ids"][0])
        return document

    documents = numbered([10] * 200)
    source = datasets.Dataset.from_list(documents).to_iterable_dataset().map(count)
    packed = stream(source, 100, 20)
    iterator = iter(packed)
    for _ in range(10):
        next(iterator)
    state = packed.state_dict()
    rest = as_lists(list(iterator))
    read.clear()
    packed.load_state_dict(state)
    assert as_lists(list(packed)) == rest
    assert min(read) > 0


STEPS = (0, 1, 5, 13, 21)


def check_stateful_loader(workers: int, documents: list[Any], steps: Any, kind: str) -> int:
    """Stops and continues a StatefulDataLoader at the given steps; returns how many it has."""

    def loader() -> Any:
        source = make_source(kind, documents)
        return StatefulDataLoader(
            stream(source), batch_size=1, num_workers=workers, collate_fn=same
        )

    whole, states = [], []
    first = loader()
    iterator = iter(first)
    states.append(first.state_dict())
    for batch in iterator:
        whole.extend(as_lists([batch]))
        states.append(first.state_dict())
    assert tokens_of([{"input_ids": np.array(row["input_ids"])} for b in whole for row in b]) == (
        list(range(sum(len(document["input_ids"]) for document in documents)))
    )
    for step in steps(len(whole)):
        resumed = loader()
        resumed.load_state_dict(pickle.loads(pickle.dumps(states[step])))
        assert as_lists(list(resumed)) == whole[step:], (workers, step)
    return len(whole)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_stateful_loader_continues(workers: int) -> None:
    documents = numbered(lognormal(120, mean=60).tolist())
    check_stateful_loader(
        workers, documents, lambda n: [*STEPS[: 5 if workers < 4 else 3], n - 1], "function"
    )


def test_stateful_loader_continues_a_hugging_face_stream() -> None:
    documents = numbered(lognormal(120, mean=60).tolist())
    check_stateful_loader(2, documents, lambda n: [3, n - 2], "hugging_face_files")


def check_plain_loader(workers: int, documents: list[Any], steps: Any, batch_size: int) -> int:
    """Skips to the given steps under a plain DataLoader; returns how many batches it gives."""

    def batches(skipped: int) -> list[Any]:
        packed = stream(NumberedFunction(documents))
        packed.skip_batches(skipped, batch_size=batch_size)
        return as_lists(list(DataLoader(packed, batch_size, num_workers=workers, collate_fn=same)))

    whole = batches(0)
    for step in steps(len(whole)):
        assert batches(step) == whole[step:], (workers, step)
    return len(whole)


@pytest.mark.parametrize(("workers", "batch_size"), [(0, 1), (0, 3), (2, 2), (4, 1)])
def test_plain_loader_continues(workers: int, batch_size: int) -> None:
    """To the last batch, where some workers have ended before others."""
    # Every fourth document is long, so that one worker has more rows than the others.
    lengths = [200 if i % 4 == 1 else 40 for i in range(100)]
    check_plain_loader(workers, numbered(lengths), lambda n: [1, 6, n - 3, n - 1, n], batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_every_step_of_a_run_of_200(workers: int) -> None:
    """The figures of a run are in benchmarks/results/streaming.json, by bench_streaming.py."""
    assert min(continue_at_every_step(workers)) >= 200


def continue_at_every_step(workers: int) -> tuple[int, int]:
    """Steps of a StatefulDataLoader and of a plain one, each stopped and continued at every one."""
    documents = numbered(lognormal(950, mean=60).tolist())
    stateful = check_stateful_loader(workers, documents, range_to, "function")
    return stateful, check_plain_loader(workers, documents, range_to, 1)


def range_to(steps: int) -> range:
    return range(steps + 1)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_the_documents(kind: str, world_size: int) -> None:
    documents = numbered(lognormal(60, mean=60).tolist())
    rows = [
        row
        for rank in range(world_size)
        for row in stream(make_source(kind, documents), rank=rank, world_size=world_size)
    ]
    assert tokens_of(rows) == list(range(sum(len(d["input_ids"]) for d in documents)))


def test_a_run_of_several_processes_must_say_who_divides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="rank and world_size must be given in a run of 2"):
        iter(stream(numbered([3])))
    assert len(list(stream(numbered([3]), rank=0, world_size=1))) == 1


def test_accelerate_with_two_processes() -> None:
    context = server()
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=accelerate_rank, args=(rank, port, results), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    (_, own_0, shared_0), (_, own_1, shared_1) = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    everything = list(range(int(lognormal(90, mean=60).sum())))
    assert sorted(chain(*own_0, *own_1)) == everything
    assert sorted(chain(*shared_0, *shared_1)) == everything
    assert len(shared_0) == len(shared_1)


def accelerate_rank(rank: int, port: int, results: Any) -> None:
    """One process of two: reads its rows both ways, stops and continues at every one."""
    warnings.simplefilter("ignore")  # pytest does not see them to collect
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2")
    config = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    documents = numbered(lognormal(90, mean=60).tolist())

    def loader(rank: int, world_size: int) -> Any:
        packed = stream(NumberedFunction(documents), rank=rank, world_size=world_size)
        return StatefulDataLoader(packed, batch_size=1, collate_fn=same)

    def tokens(batches: Any) -> list[list[int]]:
        return [row["input_ids"].tolist() for batch in batches for row in batch]

    # The data set divides the documents: behind a plain StatefulDataLoader.
    own: list[list[int]] = []
    states = []
    first = loader(accelerator.process_index, accelerator.num_processes)
    for batch in first:
        own += tokens([batch])
        states.append(first.state_dict())
    for step, state in enumerate(states, 1):
        resumed = loader(rank, 2)
        resumed.load_state_dict(state)
        assert tokens(resumed) == own[step:]
    # accelerate divides the rows: every process packs all documents and takes its share.
    shared = tokens(accelerator.prepare(loader(0, 1)))
    for step in range(1, len(shared)):
        resumed = skip_first_batches(accelerator.prepare(loader(0, 1)), step)
        assert tokens(resumed) == shared[step:]
    results.put((rank, own, shared))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_set_epoch_reaches_the_source() -> None:
    documents = numbered(lognormal(60, mean=60).tolist())
    packed = stream(make_source("hugging_face_shuffled", documents))
    first = as_lists(list(packed))
    packed.set_epoch(1)
    second = as_lists(list(packed))
    assert first != second
    iterator = iter(packed)
    next(iterator)
    resumed = stream(make_source("hugging_face_shuffled", documents))
    resumed.load_state_dict(packed.state_dict())
    assert as_lists(list(resumed)) == second[1:]


def test_padding_is_left_out_and_counted() -> None:
    reports: list[PackingReport] = []
    documents = [
        {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1]},
        {"input_ids": [7, 8, 0], "attention_mask": torch.tensor([1, 1, 0])},
    ]
    (row,) = stream(documents, on_report=reports.append)
    assert row["input_ids"].tolist() == [5, 6, 7, 8]
    assert (reports[0].padding_tokens, reports[0].packed_tokens) == (3, 4)
    assert "attention_mask" not in row


def test_other_columns_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="leaves out columns .* text, id"):
        (row,) = stream([{"input_ids": [1, 2], "text": "a b", "id": 3}])
    assert sorted(row) == ["input_ids", "labels", "position_ids", "seq_lengths"]


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([{"text": "a"}], "document 0 has no input_ids, only"),
        ([[1], [[1], [2]]], "document 1 must hold a list of integers as its input_ids"),
        ([[1.5]], "document 0 must hold integers in input_ids"),
        ([{"input_ids": [1], "labels": [1, 2]}], "1 input_ids but 2 values in 'labels'"),
        ([{"input_ids": [1], "labels": [1]}, [2]], "document 1 must have the columns input_ids, l"),
        ([{"input_ids": [1, 2], "position_ids": [1, 1]}], "must not have 'position_ids'"),
        ([{"input_ids": [1, 2], "parents": [1, 1]}], "document 0 has a column 'parents', by which"),
        ([{"input_ids": [1] * 3, "attention_mask": [1, 0, 1]}], "ones in one run"),
        (["text"], "document 0 must hold a list of token ids"),
    ],
)
def test_bad_documents(documents: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        list(stream(documents))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: stream(iter([[1]])), "source must be something that can be iterated again"),
        (lambda: stream({"input_ids": [[1]]}), "source must be an iterable of documents"),
        (lambda: stream(3), "source must be an iterable of documents"),
        (lambda: stream([[1]], capacity=0), "capacity must be at least 1"),
        (lambda: stream([[1]], lookahead=0), "lookahead must be an integer of at least 1, got 0"),
        (lambda: stream([[1]], overflow="wrap"), "overflow must be one of"),
        (lambda: stream([[1]], rank=2, world_size=2), "0 <= rank < world_size, got 2 and 2"),
        (lambda: stream([[1]], rank=0), "must be given together"),
        (lambda: stream([[1]]).skip_batches(-1), "batches must be at least 0"),
        (
            lambda: list(stream([[1], [2, 3]], 1, overflow="error")),
            "document 1 has 2 tokens and capacity is 1",
        ),
        (
            lambda: stream([[1]], 8).load_state_dict(stream([[1]], 9).state_dict()),
            "state must be of a data set with capacity=8, but it was taken with 9",
        ),
    ],
)
def test_bad_arguments(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_state_of_another_worker_count() -> None:
    packed = stream(numbered([3, 4]))
    state = packed.state_dict()
    loader = DataLoader(packed, batch_size=None, num_workers=2)
    packed.load_state_dict(state)
    with pytest.raises(ValueError, match="it was taken in worker 0 of 1; use as many workers"):
        list(loader)


def test_empty_streams() -> None:
    assert list(stream([])) == []
    assert list(stream([[], []])) == []
    with pytest.raises(StopIteration):
        next(iter(stream([])))
