"""pack_dataset: rows hold the documents' own tokens, labels and columns, and TRL reads them."""

import json
import logging
import os
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_attn.packing import pack_dataset, pack_lengths

datasets = pytest.importorskip("datasets", reason="packing data sets needs Hugging Face datasets")
datasets.disable_progress_bars()

Dataset = datasets.Dataset


def silent(report: Any) -> None:
    """For tests that expect losses and do not look at the report."""


def documents_of(rows: Any) -> list[dict[str, Any]]:
    """The rows cut back into documents by `seq_lengths`, all columns alike."""
    documents = []
    for row in rows:
        stop = 0
        for length in row["seq_lengths"]:
            start, stop = stop, stop + length
            documents.append(
                {name: v[start:stop] for name, v in row.items() if name != "seq_lengths"}
            )
        assert all(len(v) == stop for name, v in row.items() if name != "seq_lengths")
    return documents


def random_documents(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 1000, rng.integers(0, longest + 1)).tolist() for _ in range(count)]


def in_chunks(rows: dict[str, list[Any]], size: int) -> Any:
    """A data set whose table has many chunks, as `map` and files on disk make them."""
    count = len(next(iter(rows.values())))
    parts = [
        Dataset.from_dict({name: v[i : i + size] for name, v in rows.items()})
        for i in range(0, count, size)
    ]
    return datasets.concatenate_datasets(parts)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=25),
    capacity=st.integers(1, 15),
    strategy=st.sampled_from(["bfd", "wrapped"]),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
    chunk=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_rows_follow_the_plan(lengths, capacity, strategy, overflow, chunk):
    tokens = [[100 * d + t for t in range(n)] for d, n in enumerate(lengths)]
    weights = [[t / 8 for t in ids] for ids in tokens]
    data = in_chunks({"input_ids": tokens, "weights": weights}, chunk)
    options = {"strategy": strategy, "overflow": overflow}
    rows = pack_dataset(data, capacity, **options, on_report=silent)
    packs = pack_lengths(lengths, capacity, **options)
    assert [sum(row["seq_lengths"]) for row in rows] == packs.pack_tokens.tolist()
    documents = documents_of(rows)
    assert len(documents) == packs.num_pieces
    for i, document in enumerate(documents):
        start, stop = packs.starts[i], packs.starts[i] + packs.lengths[i]
        expected = tokens[packs.order[i]][start:stop]
        assert document["input_ids"] == expected
        assert document["labels"] == [-100, *expected[1:]]
        assert document["position_ids"] == list(range(len(expected)))
        assert document["weights"] == [t / 8 for t in expected]


def test_dtypes_and_column_order():
    features = datasets.Features(
        {
            "flags": datasets.List(datasets.Value("bool")),
            "input_ids": datasets.List(datasets.Value("uint16")),
            "labels": datasets.List(datasets.Value("int32")),
        }
    )
    rows = {"flags": [[True, False], [True]], "input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}
    packed = pack_dataset(Dataset.from_dict(rows, features=features), 4)
    assert packed.column_names == ["input_ids", "labels", "position_ids", "seq_lengths", "flags"]
    kinds = {name: feature.feature.dtype for name, feature in packed.features.items()}
    assert kinds == {
        "input_ids": "uint16",
        "labels": "int32",
        "position_ids": "int32",
        "seq_lengths": "int32",
        "flags": "bool",
    }
    assert packed[0]["labels"] == [-100, 2, -100]
    assert packed[0]["flags"] == [True, False, True]


def test_no_id_is_cut_to_fewer_bits():
    large = 2**40 + 7
    packed = pack_dataset([[1, large], [3]], 4)
    assert packed[0]["labels"] == [-100, large, -100]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint64"))})
    unsigned = Dataset.from_dict({"input_ids": [[1, 2**60 + 1], [3]]}, features=features)
    labels = pack_dataset(unsigned, 4)[0]["labels"]
    assert labels == [-100, 2**60 + 1, -100]  # which no float64 holds


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
def test_rows_reach_torch_as_int64(format):
    packed = pack_dataset([[1, 2], [3]], 4).with_format(format)
    assert all(torch.as_tensor(values).dtype == torch.int64 for values in packed[0].values())


def test_labels_of_the_data_set_win_over_its_masks():
    rows = {"input_ids": [[1, 2, 3]], "labels": [[7, 8, -100]], "completion_mask": [[0, 0, 1]]}
    assert pack_dataset(Dataset.from_dict(rows), 8)[0]["labels"] == [-100, 8, -100]


def test_masks_become_labels_as_in_trl():
    rows = {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7]],
        "completion_mask": [[0, 1, 1, 1], [1, 1, 1]],
        "assistant_masks": [[1, 1, 0, 1], [1, 0, 1]],
    }
    packed = pack_dataset(Dataset.from_dict(rows), 8)
    assert packed[0]["labels"] == [-100, 2, -100, 4, -100, -100, 7]
    assert packed[0]["completion_mask"] == [0, 1, 1, 1, 1, 1, 1]
    assert packed[0]["assistant_masks"] == [1, 1, 0, 1, 1, 0, 1]


def test_first_label_of_every_piece_is_ignored():
    packed = pack_dataset([list(range(1, 12))], 4, on_report=silent)
    assert packed["labels"][:] == [[-100, 2, 3, 4], [-100, 6, 7, 8], [-100, 10, 11]]
    assert packed["position_ids"][:] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["Dataset", "dicts", "token lists", "arrays"])
def test_every_kind_of_input_gives_the_same_rows(kind):
    tokens = random_documents(30)
    data = {
        "Dataset": Dataset.from_dict({"input_ids": tokens}),
        "dicts": [{"input_ids": ids} for ids in tokens],
        "token lists": tokens,
        "arrays": [np.array(ids, np.int64) for ids in tokens],
    }[kind]
    packed = pack_dataset(data, 32)
    got = sorted(document["input_ids"] for document in documents_of(packed))
    assert got == sorted(ids for ids in tokens if ids)


def test_selected_shuffled_and_filtered_rows_are_the_ones_packed():
    tokens = random_documents(60)
    data = in_chunks({"input_ids": tokens}, 7).shuffle(seed=3).select(range(5, 40))
    data = data.filter(lambda row: len(row["input_ids"]) > 2)
    expected = sorted(data["input_ids"][:])
    got = sorted(document["input_ids"] for document in documents_of(pack_dataset(data, 25)))
    assert got == expected
    assert len(expected) < 36


def test_fixed_size_and_sliced_lists():
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int64"), length=3)})
    data = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]}, features=features)
    packed = pack_dataset(data.select(range(1, 3)), 6)
    assert packed[0]["input_ids"] == [4, 5, 6, 7, 8, 9]


def test_padding_is_left_out_and_counted():
    rows = {
        "input_ids": [[1, 2, 0, 0], [0, 3, 4, 5], [0, 0, 0, 0], [6, 7, 8, 9]],
        "attention_mask": [[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]],
        "weights": [[1, 2, 0, 0], [0, 3, 4, 5], [0, 0, 0, 0], [6, 7, 8, 9]],
    }
    reports = []
    packed = pack_dataset(Dataset.from_dict(rows), 9, on_report=reports.append)
    assert packed.num_rows == 1
    assert packed[0]["input_ids"] == [6, 7, 8, 9, 3, 4, 5, 1, 2] == packed[0]["weights"]
    assert packed[0]["seq_lengths"] == [4, 3, 2]
    assert "attention_mask" not in packed.column_names
    report = reports[0]
    assert (report.tokens, report.packed_tokens, report.padding_tokens) == (16, 9, 7)
    assert report.empty_documents == 1
    assert report.lossless


@pytest.mark.parametrize(
    "make_empty",
    [
        lambda: [],
        lambda: [[], []],
        lambda: [{"input_ids": [], "completion_mask": []}],
        lambda: Dataset.from_dict({"input_ids": [[1]], "completion_mask": [[1]]}).select([]),
        lambda: Dataset.from_dict({"input_ids": []}),
        lambda: Dataset.from_dict({}),
    ],
)
def test_a_set_without_tokens_gives_an_empty_data_set(make_empty):
    packed = pack_dataset(make_empty(), 8)
    assert packed.num_rows == 0
    assert packed.column_names[:4] == ["input_ids", "labels", "position_ids", "seq_lengths"]
    assert packed.features["labels"].feature.dtype in ("int32", "int64")


def test_other_columns_are_dropped_with_a_warning_that_names_them():
    rows = {"text": ["a", "bc"], "input_ids": [[1], [2, 3]], "id": [0, 1]}
    rows["messages"] = [[{"role": "user"}] * 3] * 2
    with pytest.warns(UserWarning, match="one value per token: text, id, messages"):
        packed = pack_dataset(Dataset.from_dict(rows), 4)
    assert packed.column_names == ["input_ids", "labels", "position_ids", "seq_lengths"]


def test_list_columns_of_any_type_are_kept_when_per_token():
    rows = {"input_ids": [[1, 2], [3]], "words": [["a", "b"], ["c"]]}
    assert pack_dataset(Dataset.from_dict(rows), 4)[0]["words"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a"]}, "must have a list column 'input_ids', but its columns are: text"),
        ({"input_ids": ["a"]}, "must have a list column 'input_ids'"),
        ({"input_ids": [["a"]]}, "column 'input_ids' must be lists of integers, not of string"),
        ({"input_ids": [[1.5]]}, "column 'input_ids' must be lists of integers, not of double"),
        (
            {"input_ids": [[1], None]},
            "input_ids must be a list in every row, but it is null in row 1",
        ),
        ({"input_ids": [[1], [2, None]]}, "column 'input_ids' must hold integers, but row 1"),
        (
            {"input_ids": [[1], [2, 3]], "labels": [[1], [2]]},
            "column 'labels' must have one value for each of input_ids, but in row 1 it has 1 "
            "values and input_ids has 2",
        ),
        (
            {"input_ids": [[1], [2]], "completion_mask": [[1], None]},
            "column 'completion_mask' must have one value for each of input_ids, but in row 1 it "
            "is null",
        ),
        (
            {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
            "attention_mask must be ones in one run with padding around it, but row 0",
        ),
        (
            {"input_ids": [[1], [1, 2]], "attention_mask": [[1], [1, 2]]},
            "attention_mask must hold 0 and 1, but row 1 holds 2",
        ),
        ({"input_ids": [[1]], "seq_lengths": [[1]]}, "must not have a 'seq_lengths' column"),
        ({"input_ids": [[1]], "position_ids": [[0]]}, "must not have a 'position_ids' column"),
        ({"input_ids": [[1]], "parents": [[0]]}, "dataset has a column 'parents', by which rows"),
        (
            {"input_ids": [[1]], "ends": [[0]]},
            "dataset has a column 'ends', by which rows of packs",
        ),
        ({"input_ids": [[1]], "documents": [[0]]}, "dataset has a column 'documents', by which"),
    ],
)
def test_bad_columns_are_named(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_dataset(Dataset.from_dict(rows), 8)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_empty_documents_among_arrays(convert):
    """numpy takes what is empty for floats."""
    documents = [[1, 2, 3], [], [4], []]
    given = [convert(d) for d in documents]
    rows = [{"input_ids": d, "labels": d} for d in given]
    mixed = [d if len(d) else [] for d in given]
    for data in (given, rows, mixed):
        assert pack_dataset(data, 8)["input_ids"][:] == [[1, 2, 3, 4]]


def test_reserved_names_are_free_where_they_go_nowhere(recwarn):
    rows = pack_dataset([{"input_ids": [1, 2], "parents": "a", "documents": ["b"]}], 8)
    assert sorted(rows.column_names) == ["input_ids", "labels", "position_ids", "seq_lengths"]
    for name in ("parents", "ends"):
        with pytest.raises(ValueError, match=f"dataset has a column '{name}', .*: rename the col"):
            pack_dataset([{"input_ids": [1, 2], name: 3}], 8, keep=[name])


def test_bad_data_sets_are_named():
    one = Dataset.from_dict({"input_ids": [[1]]})
    with pytest.raises(ValueError, match="pass one of its splits \\('train'\\)"):
        pack_dataset(datasets.DatasetDict({"train": one}), 8)
    with pytest.raises(NotImplementedError, match="streaming IterableDataset"):
        pack_dataset(one.to_iterable_dataset(), 8)
    with pytest.raises(ValueError, match=r"dicts or token lists, not both, .* document 1 is not"):
        pack_dataset([{"input_ids": [1]}, [2]], 8)
    with pytest.raises(ValueError, match="got str"):
        pack_dataset("text", 8)
    with pytest.raises(ValueError, match="got a mapping"):
        pack_dataset({"input_ids": [[1]]}, 8)
    with pytest.raises(ValueError, match="document 1 has 9 tokens and capacity is 8"):
        pack_dataset([[1], [1] * 9], 8, overflow="error")
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        pack_dataset([[1]], 0)


def test_losses_are_logged_as_warnings(caplog):
    with caplog.at_level(logging.INFO, logger="packed_attn.packing"):
        pack_dataset([[1, 2], [3]], 4)
        pack_dataset([[1, 2, 3, 4, 5]], 4, overflow="truncate")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "1 truncated" in caplog.text


def test_data_on_disk_is_packed_to_disk_and_found_again(tmp_path):
    tokens = random_documents(200)
    Dataset.from_dict({"input_ids": tokens}).save_to_disk(str(tmp_path))
    data = datasets.load_from_disk(str(tmp_path))
    packed = pack_dataset(data, 64)
    files = sorted(tmp_path.glob("packed-*.arrow"))
    assert [Path(file["filename"]) for file in packed.cache_files] == files
    assert len(files) == 1
    written = files[0].stat().st_mtime_ns
    again = pack_dataset(data, 64)
    assert files[0].stat().st_mtime_ns == written
    assert again.to_dict() == packed.to_dict()
    other = pack_dataset(data, 32)
    assert len(list(tmp_path.glob("packed-*.arrow"))) == 2
    assert max(map(sum, other["seq_lengths"])) <= 32


def test_several_batches_of_packs_join(monkeypatch):
    tokens = random_documents(300)
    whole = pack_dataset(tokens, 50).to_dict()
    monkeypatch.setattr("packed_attn.packing.dataset.TOKENS_PER_BATCH", 120)
    monkeypatch.setattr("packed_attn.packing.columns.VALUES_PER_BATCH", 70)
    assert pack_dataset(tokens, 50).to_dict() == whole
    padded = {"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]}
    assert pack_dataset(Dataset.from_dict(padded), 50).to_dict() == whole


def test_format_of_the_input_is_kept():
    data = Dataset.from_dict({"input_ids": [[1, 2], [3]]}).with_format("torch")
    packed = pack_dataset(data, 4)
    assert packed[0]["position_ids"].tolist() == [0, 1, 0]


def test_trl_collator_reads_our_packs():
    sft = pytest.importorskip("trl.trainer.sft_trainer", reason="TRL's collator needs trl")
    packed = pack_dataset(random_documents(40), 32)
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator(packed.to_list())
    joined = {name: list(chain(*packed[name])) for name in packed.column_names}
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name][0].tolist() == joined[name]
    assert batch["cu_seq_lens_q"].diff().tolist() == joined["seq_lengths"]


def test_same_bins_as_trl_packing_the_whole_set():
    data_utils = pytest.importorskip("trl.data_utils", reason="TRL's packer needs trl")
    data = Dataset.from_dict({"input_ids": [ids for ids in random_documents(400) if ids]})
    theirs = data_utils.pack_dataset(data, 64, "bfd", {"batch_size": 400})
    ours = pack_dataset(data, 64)
    assert ours.num_rows == theirs.num_rows
    for packed in (ours, theirs):
        got = sorted(document["input_ids"] for document in documents_of(packed))
        assert got == sorted(data["input_ids"][:])


@pytest.mark.skipif(
    "PACKED_ATTN_DATA" not in os.environ, reason="PACKED_ATTN_DATA names no folder of real data"
)
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_real_text_keeps_every_byte(strategy):
    path = Path(os.environ["PACKED_ATTN_DATA"], "gsm8k_train.jsonl")
    texts = [json.loads(line) for line in path.read_text().splitlines()[:1500]]
    tokens = [list((text["question"] + text["answer"]).encode()) for text in texts]
    masks = [
        [0] * len(text["question"].encode()) + [1] * len(text["answer"].encode()) for text in texts
    ]
    reports = []
    data = Dataset.from_dict({"input_ids": tokens, "completion_mask": masks})
    packed = pack_dataset(data, 2048, strategy=strategy, on_report=reports.append)
    report = reports[0]
    assert report.packed_tokens == sum(map(len, tokens)) == sum(map(sum, packed["seq_lengths"]))
    assert report.fill > 0.97
    if strategy == "bfd":
        got = sorted(document["input_ids"] for document in documents_of(packed))
        assert got == sorted(tokens)
        learned = sum(label != -100 for row in packed["labels"] for label in row)
        assert learned == sum(map(sum, masks))
    else:
        assert list(chain(*packed["input_ids"])) == list(chain(*tokens))
