"""PackedDataset: the rows of pack_dataset by index, from any source, in any process, any epoch."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from packed_attn import PackedCollator, PackedDataset, TokenFile, pack_dataset, patch_model
from packed_attn.packing import PackPart
from tests.models import tiny_model

datasets.disable_progress_bars()
Dataset = datasets.Dataset


def silent(report: Any) -> None:
    """For tests that do not look at the report."""


packed_by_index = partial(PackedDataset, on_report=silent)
materialised = partial(pack_dataset, on_report=silent)


def some_documents(count: int = 60, seed: int = 0) -> dict[str, list[Any]]:
    """Columns of all kinds: tokens from 1 up that name their document."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, count).tolist()
    return {
        "input_ids": [[100 * d + t + 1 for t in range(n)] for d, n in enumerate(lengths)],
        "completion_mask": [[int(t > n // 2) for t in range(n)] for n in lengths],
        "weights": [[t / 4 for t in range(n)] for n in lengths],
        "words": [[f"w{t}" for t in range(n)] for n in lengths],
        "source": [f"s{d % 3}" for d in range(count)],
        "score": [d / 2 for d in range(count)],
    }


def as_lists(row: dict[str, Any]) -> dict[str, list[Any]]:
    return {n: v.tolist() if isinstance(v, np.ndarray) else list(v) for n, v in row.items()}


def token_file(folder: Path, columns: dict[str, list[Any]], **changes: Any) -> TokenFile:
    flat = np.concatenate([np.array(ids, np.uint16) for ids in columns["input_ids"]])
    flat.tofile(folder / "tokens.bin")
    mask = np.concatenate([np.array(m, np.uint8) for m in columns["completion_mask"]])
    mask.tofile(folder / "mask.bin")
    offsets = np.append(0, np.cumsum([len(ids) for ids in columns["input_ids"]]))
    np.save(folder / "offsets.npy", offsets)
    settings_ = {
        "path": folder / "tokens.bin",
        "offsets": folder / "offsets.npy",
        "columns": {"completion_mask": (folder / "mask.bin", np.uint8)},
    }
    return TokenFile(**{**settings_, **changes})


@given(
    count=st.integers(1, 40),
    capacity=st.integers(1, 30),
    strategy=st.sampled_from(["bfd", "wrapped", "next_fit"]),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
)
@settings(max_examples=12)
def test_rows_are_those_of_pack_dataset(count, capacity, strategy, overflow):
    data = Dataset.from_dict(some_documents(count))
    options: dict[str, Any] = {"strategy": strategy, "overflow": overflow}
    keep = ["documents", "source", "score"]
    rows = packed_by_index(data, capacity, keep=keep, **options)
    packed = materialised(data, capacity, keep=keep, **options)
    assert len(rows) == packed.num_rows
    for i in range(len(rows)):
        assert as_lists(rows[i]) == packed[i]


def test_rows_say_which_documents_they_hold_and_keep_their_scalars():
    columns = some_documents()
    rows = packed_by_index(Dataset.from_dict(columns), 30, keep=["documents", "source"])
    seen: Counter[int] = Counter()
    for i in range(len(rows)):
        row = as_lists(rows[i])
        assert row["source"] == [columns["source"][d] for d in row["documents"]]
        stop = 0
        for document, length in zip(row["documents"], row["seq_lengths"]):
            start, stop = stop, stop + length
            assert row["input_ids"][start:stop] == columns["input_ids"][document]
            seen[document] += 1
    assert seen == Counter(d for d, ids in enumerate(columns["input_ids"]) if ids)


@pytest.mark.parametrize("kind", ["dicts", "token lists", "selected", "token file"])
def test_every_source_gives_the_same_rows(kind, tmp_path):
    columns = some_documents()
    columns = {name: columns[name] for name in ("input_ids", "completion_mask")}
    if kind == "token lists":
        columns.pop("completion_mask")
    expected = packed_by_index(Dataset.from_dict(columns), 25)
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    source: Any = {
        "dicts": lambda: rows,
        "token lists": lambda: columns["input_ids"],
        "selected": lambda: (
            Dataset.from_dict(columns).select(range(59, -1, -1)).select(range(59, -1, -1))
        ),
        "token file": lambda: token_file(tmp_path, columns),
    }[kind]()
    given_rows = packed_by_index(source, 25)
    assert len(given_rows) == len(expected)
    for i in range(len(expected)):
        assert as_lists(given_rows[i]) == as_lists(expected[i])
    if kind == "token file":
        packed = materialised(source, 25)
        assert packed.to_list() == [
            {name: values for name, values in as_lists(row).items() if name != "documents"}
            for row in map(expected.__getitem__, range(len(expected)))
        ]


def test_parts_of_a_pack_are_rows_of_their_own():
    rows = packed_by_index([[1, 2, 3], [4, 5], [6]], 6)
    assert as_lists(rows[PackPart(0, 0, 1)])["input_ids"] == [1, 2, 3]
    assert as_lists(rows[PackPart(0, 1, 3)])["seq_lengths"] == [2, 1]
    assert as_lists(rows[-1]) == as_lists(rows[0])
    with pytest.raises(IndexError, match="index must be below 1 packs, got 1"):
        rows[1]
    with pytest.raises(IndexError, match="pack 0 has 3 pieces, so it has no pieces 1:4"):
        rows[PackPart(0, 1, 4)]


def test_epochs_plan_anew_from_the_seed():
    documents = [[d] * (1 + d % 5) for d in range(100)]
    rows = packed_by_index(documents, 16, seed=4)
    first = [as_lists(rows[i]) for i in range(len(rows))]
    rows.set_epoch(1)
    second = [as_lists(rows[i]) for i in range(len(rows))]
    assert first != second
    tokens = [Counter(t for row in epoch for t in row["input_ids"]) for epoch in (first, second)]
    assert tokens[0] == tokens[1]
    rows.set_epoch(0)
    assert [as_lists(rows[i]) for i in range(len(rows))] == first
    still = packed_by_index(documents, 16)
    before = still.packs
    still.set_epoch(3)
    assert still.packs is before


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_dataloader_workers_follow_the_epoch(context):
    documents = [[d + 1] * (1 + d % 5) for d in range(40)]
    rows = packed_by_index(documents, 16, seed=4)
    loader = DataLoader(
        rows,
        collate_fn=PackedCollator(),
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        got = [batch["input_ids"][0].tolist() for batch in loader]
        assert got == [rows[i]["input_ids"].tolist() for i in range(len(rows))]


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerate_plans_epochs_anew_and_resumes_them(ranks):
    """It tells some epochs to its sampler alone: those of several ranks, and of resumed runs."""
    documents = [[d] * (1 + d % 13) for d in range(1, 60)]

    def prepared(rank):
        rows = packed_by_index(documents, 30, seed=4)
        assert len(rows) % 2 == 0
        loader = DataLoader(rows, shuffle=True, generator=torch.Generator(), collate_fn=list)
        settings = {"num_processes": ranks, "process_index": rank, "put_on_device": False}
        return prepare_data_loader(loader, use_seedable_sampler=True, data_seed=0, **settings)

    def documents_of(loader, epoch):
        loader.set_epoch(epoch)
        return [row["documents"].tolist() for (row,) in loader]

    resumed = [skip_first_batches(prepared(rank), 3) for rank in range(ranks)]
    loaders = [prepared(rank) for rank in range(ranks)]
    epochs = [[documents_of(loader, epoch) for loader in loaders] for epoch in range(2)]
    for epoch in epochs:
        seen = sorted(d for rank in epoch for row in rank for d in row)
        assert seen == list(range(len(documents)))
    first, second = ({tuple(row) for rank in epoch for row in rank} for epoch in epochs)
    assert first != second
    assert [documents_of(loader, 1) for loader in resumed] == [rank[3:] for rank in epochs[1]]


def test_copies_are_small_where_the_source_is_on_disk(tmp_path):
    columns = some_documents(600)
    Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data"))
    sources = [
        datasets.load_from_disk(str(tmp_path / "data")),
        token_file(tmp_path, columns, dtype="uint16"),
    ]
    for source in sources:
        rows = packed_by_index(source, 64, seed=1)
        rows.set_epoch(2)
        copy = pickle.dumps(rows)
        assert len(copy) < 20_000
        other = pickle.loads(copy)
        assert other.packs.digest() == rows.packs.digest()
        assert as_lists(other[5]) == as_lists(rows[5])


@pytest.mark.parametrize("num_proc", [2])
def test_several_processes_write_the_same_rows(num_proc, tmp_path):
    Dataset.from_dict(some_documents(300)).save_to_disk(str(tmp_path / "data"))
    data = datasets.load_from_disk(str(tmp_path / "data"))
    keep = ["documents", "source"]
    alone = materialised(datasets.Dataset.from_dict(data.to_dict()), 64, keep=keep)
    together = materialised(data, 64, keep=keep, num_proc=num_proc)
    assert together.to_dict() == alone.to_dict()


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_trainer_takes_it_with_either_setting(remove_unused_columns, tmp_path):
    model = patch_model(tiny_model("llama"))
    rows = packed_by_index([[d % 60 + 1] * (2 + d % 9) for d in range(40)], 32, seed=0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to=[],
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=remove_unused_columns,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=PackedCollator())
    assert np.isfinite(trainer.train().training_loss)


def test_constraints_may_be_columns():
    data = Dataset.from_dict(
        {
            "input_ids": [[1, 2], [3], [4, 5], [6]],
            "pair": [0, 1, 0, -1],
            "answer": [7, 7, -1, 7],
        }
    )
    rows = packed_by_index(data, 6, together="pair", apart="answer")
    packs = [set(rows[i]["documents"].tolist()) for i in range(len(rows))]
    assert sorted(map(sorted, packs)) == [[0, 2], [1], [3]]
    with pytest.raises(ValueError, match="together must name a column, got 'none'"):
        packed_by_index(data, 6, together="none")


@pytest.mark.parametrize(
    ("columns", "learned"),
    [
        ({"input_ids": [[1, 2, 3], [4]]}, [2, 0]),
        ({"input_ids": [[1, 2], [3, 4]], "labels": [[1, -100], [3, 4]]}, [0, 1]),
        (
            {
                "input_ids": [[1, 2, 3], [3, 4], []],
                "completion_mask": [[1, 0, 0], [0, 1], []],
                "assistant_masks": [[1, 1, 1], [1, 1], []],
            },
            [0, 1, 0],
        ),
        ({"input_ids": [[1, 2, 3]], "labels": [[-100, -100, 3]]}, [0]),
    ],
)
def test_documents_with_nothing_to_learn_are_left_out(columns, learned):
    rows = packed_by_index(columns_as_data(columns), 2, overflow="truncate", learnable_only=True)
    report = rows.report
    lengths = [len(ids) for ids in columns["input_ids"]]
    left_out = [n for n, k in zip(lengths, learned) if n and not k]
    kept = [min(k, 1) for k in learned]  # a pack of two tokens learns at most its second
    assert report.unlearnable_documents == len(left_out)
    assert report.unlearnable_tokens == sum(left_out)
    assert report.learned_tokens == sum(kept)
    labels = [label for i in range(len(rows)) for label in rows[i]["labels"].tolist()]
    assert sum(label != -100 for label in labels) == sum(kept)


def columns_as_data(columns: dict[str, list[Any]]) -> Any:
    return Dataset.from_dict(columns)


def test_collator_aligns_documents():
    rows = packed_by_index([[1, 2, 3], [4, 5, 6, 7], [8]], 12, align=4)
    batch = PackedCollator(capacity=12, align=4, pad_token_id=9)([rows[0]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 4, 5, 6, 7, 8, 9, 9, 9]]
    layout = batch["layout"]
    assert layout.lengths == (3, 1, 4, 1, 3)
    assert layout.padding.tolist() == [False, True, False, False, True]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 5, 6, 7, *[-100] * 4]]
    with pytest.raises(ValueError, match="feature 0 has 12 tokens, over the capacity 8"):
        PackedCollator(capacity=8, align=4)([rows[0]])


def test_collator_widens_narrow_tokens(tmp_path):
    columns = {"input_ids": [[65_000, 65_535], [7]], "completion_mask": [[1, 1], [1]]}
    batch = PackedCollator()([packed_by_index(token_file(tmp_path, columns), 8)[0]])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[65_000, 65_535, 7]]
    assert batch["labels"].tolist() == [[-100, 65_535, -100]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": [1, 2]}, "offsets must start at 0, got [1]"),
        ({"offsets": []}, "offsets must start at 0, got []"),
        ({"offsets": [0, 3, 2]}, "offsets must not fall, but offsets[2] is 2 after 3"),
        ({"offsets": [0, 0.5]}, "offsets must be integers, but offsets[1] is 0.5"),
        ({"offsets": [0, 10**6]}, "tokens, but offsets end at 1000000"),
        ({"dtype": "V7"}, "bytes, which |V7 does not divide"),
    ],
)
def test_bad_token_files_are_named(changes, words, tmp_path):
    columns = {"input_ids": [[1, 2, 3], [4]], "completion_mask": [[1, 1, 1], [1]]}
    with pytest.raises(ValueError, match=re.escape(words)):
        packed_by_index(token_file(tmp_path, columns, **changes), 8)
    with pytest.raises(FileNotFoundError):
        packed_by_index(TokenFile(tmp_path / "missing.bin", [0, 1]), 8)


def test_bad_settings_are_named():
    data = Dataset.from_dict({"input_ids": [[1]], "id": [0]})
    with pytest.raises(ValueError, match="keep must name columns, but 'idx' is not among"):
        packed_by_index(data, 8, keep=["idx"])
    for name in ("input_ids", "attention_mask", "labels", "completion_mask", "assistant_masks"):
        with pytest.raises(ValueError, match=f"one value a document, but '{name}' is one that"):
            packed_by_index(data, 8, keep=[name])
    with pytest.raises(ValueError, match="keep must be a list of names, got 'id'"):
        packed_by_index(data, 8, keep="id")
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        packed_by_index(data, 8).set_epoch(-1)
    with pytest.raises(TypeError, match="strategem"):
        packed_by_index(data, 8, strategem="bfd")
    assert len(packed_by_index([], 8)) == 0
    assert len(packed_by_index([[], []], 8)) == 0
