"""Packs to a multiple, so that processes get as many and no pack runs twice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from packed_attn import PackedCollator, PackedDataset, pack_dataset, pack_lengths
from packed_attn.cli import main
from packed_attn.offline import pack_files, read_manifest, report_of, verify
from packed_attn.packing import PackingReport

DOCUMENTS = [[d % 90 + 1] * (1 + d % 13) for d in range(60)]


def ignore(report: PackingReport) -> None:
    pass


def documents_of(row: dict[str, Any]) -> list[list[int]]:
    """The documents of a row, of shared prefixes too."""
    stops = np.cumsum(row["seq_lengths"])
    pieces = np.split(np.asarray(row["input_ids"]), stops[:-1])
    if "parents" not in row:
        return [piece.tolist() for piece in pieces]
    paths: list[list[int]] = []
    for piece, parent in zip(pieces, row["parents"]):
        paths.append((paths[parent] if parent >= 0 else []) + piece.tolist())
    return [paths[end] for end in row["ends"]]


@given(
    lengths=st.lists(st.integers(0, 40), max_size=40),
    capacity=st.integers(1, 24),
    multiple=st.integers(1, 9),
    share=st.booleans(),
    seed=st.none() | st.integers(0, 3),
)
def test_every_document_is_in_one_of_a_multiple_of_packs(
    lengths: list[int], capacity: int, multiple: int, share: bool, seed: int | None
) -> None:
    documents = [[1, 2, 3, *range(4 + n % 3, n)][:n] for n in lengths]
    options: dict[str, Any] = {"seed": seed, "share_prefixes": share, "min_shared": 2}
    before = PackedDataset(documents, capacity, on_report=ignore, **options)
    pieces = before.packs.document_lengths.size
    if -(-len(before) // multiple) * multiple > pieces:
        with pytest.raises(ValueError, match=r"multiple must find a document for each row"):
            PackedDataset(documents, capacity, on_report=ignore, multiple=multiple, **options)
        return
    rows = PackedDataset(documents, capacity, on_report=ignore, multiple=multiple, **options)
    assert len(rows) % multiple == 0
    assert 0 <= len(rows) - len(before) < multiple
    for row in (rows[i] for i in range(len(rows))):
        assert 0 < row["input_ids"].size <= capacity
    got, want = (
        sorted(d for i in range(len(r)) for d in documents_of(r[i])) for r in (rows, before)
    )
    assert got == want
    assert rows.report.packed_tokens == sum(rows[i]["input_ids"].size for i in range(len(rows)))


def test_what_may_not_be_cut_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="could part what together joins"):
        pack_lengths([1, 2, 3], 8, together=[0, 0, 0], multiple=2)
    with pytest.raises(ValueError, match="multiple must be at least 1 and below 2\\^62, got 0"):
        pack_lengths([1, 2, 3], 8, multiple=0)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_share_every_document_or_a_warning_says_what_to_set(
    indexed: bool,
    shuffle: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def seen(multiple: int) -> list[int]:
        make: Any = PackedDataset if indexed else pack_dataset
        rows = make(DOCUMENTS, 30, keep=["documents"], multiple=multiple, on_report=ignore)
        documents = []
        for rank in range(4):
            loader = DataLoader(
                rows, 2, shuffle=shuffle, generator=torch.Generator(), collate_fn=collate
            )
            settings = {"num_processes": 4, "process_index": rank, "put_on_device": False}
            prepared = prepare_data_loader(loader, use_seedable_sampler=True, **settings)
            documents += [d for features in prepared for d in features]
        return sorted(documents)

    def collate(features: list[dict[str, Any]]) -> list[int]:
        PackedCollator()(features)
        return [int(d) for feature in features for d in feature["documents"]]

    PartialState()  # older versions make it with the loader, and begin a group of 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    with caplog.at_level(logging.WARNING, "packed_attn.loaders"):
        assert seen(8) == list(range(60))
        assert not caplog.records
        assert len(seen(1)) > 60
    assert len(caplog.records) == 4  # one a rank
    assert "multiple=8 of pack_dataset or PackedDataset" in caplog.text


@pytest.mark.parametrize("share", [[], ["--share-prefixes", "--min-shared", "2"]])
def test_shards_hold_a_multiple_of_packs(tmp_path: Path, share: list[str]) -> None:
    documents = [[1, 2, 3, *row] for row in DOCUMENTS]
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in documents))
    arguments = ["pack", str(path), "-o", str(out), "--capacity", "64", "--shard-tokens", "192"]
    assert main([*arguments, "--multiple", "8", *share]) == 0
    assert list(verify(out)) == []
    assert report_of(read_manifest(out)).packs % 8 == 0
    rows = [
        row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    assert len(rows) % 8 == 0
    assert sorted(d for row in rows for d in documents_of(row)) == sorted(documents)
    with pytest.raises(ValueError, match="holds a run with other multiple"):
        pack_files([path], out, 64, shard_tokens=192, resume=True, share_prefixes=bool(share),
                   min_shared=2 if share else 16)  # fmt: skip


def test_more_packs_than_documents_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1]}\n' * 5)
    with pytest.raises(ValueError, match=r"multiple must find a document for each row, but 5 doc"):
        pack_files([path], tmp_path / "out", 4, multiple=8)
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        pack_files([path], tmp_path / "out", 4, multiple=0)
    assert not (tmp_path / "out").exists()
