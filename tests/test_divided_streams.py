"""Streams that accelerate divides among processes: every document once, as many rows for each."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import IterableDatasetShard
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

from packed_attn import PackedCollator, PackedIterableDataset, pack_dataset, patch_model
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_data_parallel import RANKS, as_launched
from tests.test_streaming import as_lists, ignore, lognormal, numbered, stream, tokens_of
from tests.test_trainer import CAPACITY

# Seven packs, which two processes cannot share without one being cut.
DOCUMENTS = [
    [t % 150 for t in d["input_ids"]]
    for d in numbered([40, 20, 30, 33, 63, 50, 13, 60, 25, 38, 45])
]


def divided(packed: PackedIterableDataset, ranks: int, batch: int = 1) -> list[list[Any]]:
    """The rows of every rank, as accelerate takes them from a stream."""
    shards = [IterableDatasetShard(packed, batch, False, ranks, rank) for rank in range(ranks)]
    for shard in shards:
        shard.set_epoch(0)
    return [list(shard) for shard in shards]


@given(
    lengths=st.lists(st.integers(1, 40), max_size=60),
    capacity=st.integers(1, 64),
    lookahead=st.integers(1, 12),
    ranks=st.integers(1, 5),
    batch=st.integers(1, 3),
    share=st.booleans(),
)
def test_every_token_is_in_one_rank(
    lengths: list[int], capacity: int, lookahead: int, ranks: int, batch: int, share: bool
) -> None:
    documents = numbered(lengths)
    packed = stream(documents, capacity, lookahead, share_prefixes=share, min_shared=1)
    shards = divided(packed, ranks, batch)
    assert len({len(rows) for rows in shards}) == 1
    whole = list(packed)
    if len(whole) % (ranks * batch):
        # Nothing was left to be cut; accelerate repeats rows, and the stream says so.
        assert all(row["seq_lengths"].size == 1 for row in whole)
        return
    everything = list(range(sum(lengths)))
    assert tokens_of([row for rows in shards for row in rows]) == everything


def test_uneven_streams_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "packed_attn.loaders"):
        divided(stream(numbered([10, 10, 10]), 10), 2)
    assert "3 rows do not divide" in caplog.text
    caplog.clear()
    shard = IterableDatasetShard(stream(numbered([10, 10, 10]), 10), 1, True, 2, 0)  # type: ignore[arg-type]
    shard.set_epoch(0)
    assert len(list(shard)) == 1
    assert not caplog.records


def test_a_cut_pack_makes_two() -> None:
    """Two of three documents that share a token would save too little to share it alone."""
    documents = [[7], [7], [7, 1, 2, 3, 4]]
    packed = stream(documents, 5, share_prefixes=True, min_shared=2)
    assert len(list(packed)) == 1
    shards = divided(packed, 2)
    assert [len(rows) for rows in shards] == [1, 1]
    assert sum(row["ends"].size for rows in shards for row in rows) == 3


def test_held_documents_cost_no_rows() -> None:
    """Documents are held back by the pack, so that rows stay as well filled."""
    documents = [np.zeros(n, np.int8) for n in np.minimum(lognormal(4000), 2048)]
    packed = stream(documents, 2048, 500)
    alone = len(list(packed))
    rows = sum(map(len, divided(packed, 8, 2)))
    assert alone <= rows < alone + 16
    assert rows % 16 == 0


@pytest.mark.parametrize("share", [False, True])
def test_continues_from_every_row(share: bool) -> None:
    def start() -> Any:
        return stream(documents, 64, 8, share_prefixes=share, min_shared=4)

    documents = [
        {"input_ids": [*range(6), *d["input_ids"]]} for d in numbered(lognormal(50, mean=12))
    ]
    packed = start()
    IterableDatasetShard(packed, 2, False, 4, 0).set_epoch(0)
    rows = as_lists(list(packed))
    assert len(rows) % 8 == 0
    for step in range(0, len(rows) + 1, 4 if share else 1):
        iterator = iter(packed)
        for _ in range(step):
            next(iterator)
        resumed = start()
        resumed.load_state_dict(pickle.loads(pickle.dumps(packed.state_dict())))
        assert as_lists(list(resumed)) == rows[step:], step


@pytest.mark.parametrize("share", [False, True])
def test_packs_are_taken_apart(share: bool) -> None:
    """Packs in, at another capacity out: the documents, their labels and columns are the same."""
    rng = np.random.default_rng(0)
    documents = []
    for i, n in enumerate(rng.integers(1, 30, 40).tolist()):
        ids = [*range(9 * (i % 3), 9 * (i % 3) + 8), *rng.integers(100, 999, n).tolist()]
        documents.append({"input_ids": ids, "completion_mask": [0] * 8 + [1] * n})
    rows = pack_dataset(documents, 80, share_prefixes=share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = list(stream(rows.to_iterable_dataset(), 200))

    def pairs(rows: Any) -> list[Any]:
        found = []
        for row in rows:
            stops = np.cumsum(row["seq_lengths"])
            parts = zip(np.split(row["input_ids"], stops), np.split(row["labels"], stops))
            found += [(ids.tolist(), labels.tolist()) for ids, labels in parts if ids.size]
        return sorted(found)

    assert pairs(again) == pairs(stream(documents, 200))
    assert len(again) < len(rows)


def test_contradicting_packs_are_refused() -> None:
    pack = {"input_ids": [1, 2, 3], "seq_lengths": [2]}
    with pytest.raises(ValueError, match="pack 0 must have one value per token in 'input_ids'"):
        list(stream([pack]))
    with pytest.raises(
        ValueError,
        match=r"it is packed already .*that have seq_lengths",
    ):
        list(stream([{"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]}]))


def source(kind: str, folder: str) -> Any:
    """Documents or packs of a Hugging Face stream, in as many files as there are processes."""
    if kind == "packs":
        return pack_dataset(DOCUMENTS, CAPACITY).to_iterable_dataset(num_shards=RANKS)
    files = []
    for part in range(RANKS):
        lines = [json.dumps({"input_ids": ids}) for ids in DOCUMENTS[part::RANKS]]
        files.append(Path(folder, f"{dist.get_rank()}-{part}.jsonl"))
        files[-1].write_text("\n".join(lines))
    names = [str(file) for file in files]
    return datasets.load_dataset(
        "json", data_files=names, split="train", streaming=True, cache_dir=folder
    )


def prepared(dataset: Any, batch: int = 1, **settings: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    # A Trainer of an earlier test has left its state of one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    as_launched()
    loader = DataLoader(dataset, batch_size=batch, collate_fn=PackedCollator())
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))
    assert accelerator.num_processes == RANKS
    return accelerator.prepare_data_loader(loader)


def trained(kind: str, folder: str, split: bool) -> dict[str, Any]:
    """What this rank ran, its loss and the gradients of all ranks."""
    packed = PackedIterableDataset(
        source(kind, folder), CAPACITY, rank=0, world_size=1, on_report=ignore
    )
    batch = RANKS if split else 1
    loader = prepared(packed, batch, dispatch_batches=False, split_batches=split)
    model: Any = patch_model(tiny_model("llama")).train()
    run = nn.parallel.DistributedDataParallel(model)
    targets = sum(len(ids) - 1 for ids in DOCUMENTS)
    seen, total = [], 0.0
    for batch in loader:
        parts = batch["input_ids"][0].split(batch["layout"].lengths)
        seen.append([ids.tolist() for ids in parts])
        loss = run(**batch, num_items_in_batch=targets).loss
        (loss * RANKS).backward()  # gradients are averaged over ranks
        total += loss.item()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"seen": seen, "loss": total, "gradients": gradients}


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("packs", False),
        pytest.param("json", False, marks=pytest.mark.slow),
        pytest.param("json", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(kind: str, split: bool, tmp_path: Path) -> None:
    model: Any = patch_model(tiny_model("llama")).train()
    targets, want = sum(len(ids) - 1 for ids in DOCUMENTS), 0.0
    for ids in DOCUMENTS:
        tokens = torch.tensor([ids])
        loss = model(input_ids=tokens, labels=tokens, num_items_in_batch=targets).loss
        loss.backward()
        want += loss.item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = in_processes(RANKS, trained, kind, str(tmp_path), split)
    assert len(found[0]["seen"]) == len(found[1]["seen"])
    documents = [ids for rank in found for batch in rank["seen"] for ids in batch]
    assert sorted(documents) == sorted(DOCUMENTS)
    assert sum(rank["loss"] for rank in found) == pytest.approx(want, rel=1e-6)
    for rank in found:
        for name, parameter in model.named_parameters():
            got = rank["gradients"][name]
            torch.testing.assert_close(got, parameter.grad, msg=name, rtol=1e-4, atol=1e-6)


def refused() -> None:
    """A Hugging Face stream of packs itself, in each way in which accelerate divides one."""
    rows = pack_dataset(DOCUMENTS, CAPACITY)
    for shards in (1, RANKS):  # in turn, and by files
        packs = rows.to_iterable_dataset(num_shards=shards)
        loader = prepared(packs, dispatch_batches=False)
        with pytest.raises(ValueError, match=r"Give the\s+stream to PackedIterableDataset"):
            next(iter(loader))
    # Behind a plain DataLoader the user may have divided it.
    own = split_dataset_by_node(rows.to_iterable_dataset(num_shards=RANKS), dist.get_rank(), RANKS)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(list(DataLoader(own, 1, collate_fn=PackedCollator()))) in (3, 4)  # type: ignore[arg-type]
    # Dispatched, the process that fetches says so, and the others end with it.
    loader = prepared(rows.to_iterable_dataset())
    fetches = dist.get_rank() == 0
    with pytest.raises(ValueError if fetches else Exception, match="Give the" if fetches else None):
        next(iter(loader))


def test_streams_of_packs_are_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_processes(RANKS, refused)


def test_loader_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the training process was told holds in its workers."""
    packed = stream(pack_dataset(DOCUMENTS, CAPACITY).to_iterable_dataset(2), CAPACITY)
    rows: list[Any] = []
    for rank in range(RANKS):
        shard = IterableDatasetShard(packed, 1, False, RANKS, rank)
        shard.set_epoch(0)
        rows.append([row for (row,) in DataLoader(shard, 1, num_workers=2, collate_fn=list)])
    assert len(rows[0]) == len(rows[1])
    documents = [
        tokens.tolist()
        for row in rows[0] + rows[1]
        for tokens in np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])
    ]
    assert sorted(documents) == sorted(DOCUMENTS)

    monkeypatch.setenv("WORLD_SIZE", "2")
    packs: Any = pack_dataset(DOCUMENTS, CAPACITY).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"Give the\s+stream to PackedIterableDataset"):
        next(iter(DataLoader(packs, 1, num_workers=1, collate_fn=PackedCollator())))
