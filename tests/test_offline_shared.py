"""The offline packer with shared prefixes: shards of the rows of pack_dataset, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packed_attn import pack_dataset
from packed_attn.cli import main
from packed_attn.offline import pack_files, read_manifest, report_of, verify
from packed_attn.offline.files import sha256_of
from packed_attn.offline.manifest import write_manifest
from packed_attn.offline.packs import shard_packs
from tests.shared_prompts import answered_questions

CAPACITY = 96


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three parts of input, and shards of a pack each."""
    lines = [json.dumps(d) + "\n" for d in answered_questions()]
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_text("".join(lines[part::3]))
    files = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    options = ["--capacity", str(CAPACITY), "--shard-tokens", str(CAPACITY), "--seed", "1"]
    sharing = ["--share-prefixes", "--min-shared", "4"]
    assert main(["pack", *files, "-o", str(tmp_path / "out"), *options, *sharing]) == 0
    return tmp_path / "out"


def test_shards_hold_the_rows_of_pack_dataset(folder: Path) -> None:
    docs = [d for part in range(3) for d in answered_questions()[part::3]]
    reports: list[Any] = []
    want = pack_dataset(
        docs, CAPACITY, share_prefixes=True, min_shared=4, seed=1, on_report=reports.append
    )
    rows = [
        row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    assert rows == want.to_list()
    assert len(rows) >= 2
    report = report_of(read_manifest(folder))
    assert report.shared_tokens == reports[0].shared_tokens > 100
    assert report.learned_tokens == sum(x != -100 for row in rows for x in row["labels"])
    packs = shard_packs(folder)
    assert sorted(packs.document_lengths.tolist()) == sorted(len(d["input_ids"]) for d in docs)
    assert packs.attention_pairs.sum() == report.attention_cost


def test_any_number_of_workers_writes_the_same_bytes(folder: Path) -> None:
    files = sorted(folder.parent.glob("*.jsonl"))
    again = folder.parent / "again"
    pack_files(files, again, CAPACITY, shard_tokens=CAPACITY, seed=1, share_prefixes=True,
               min_shared=4, workers=2)  # fmt: skip
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("parents", lambda x: [*x[:-1], len(x)], "parents must point to an earlier document"),
        ("parents", lambda x: x[1:], "parents for"),
        ("ends", lambda x: x[:-1], "is no document's"),
        ("ends", lambda x: [99], "a document ends in no piece of the row"),
        ("labels", lambda x: [7, *x[1:]], "the loss would cross a boundary"),
    ],
)
def test_damage_is_found(folder: Path, column: str, change: Any, words: str) -> None:
    assert list(verify(folder)) == []
    manifest = read_manifest(folder)
    shard = manifest["shards"][0]
    table = pq.read_table(folder / shard["file"])
    rows = table.to_pylist()
    rows[0][column] = change(rows[0][column])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / shard["file"])
    shard["sha256"] = sha256_of(folder / shard["file"])
    del manifest["format"], manifest["manifest_sha256"]
    write_manifest(folder, manifest)
    assert any(words in fault for fault in verify(folder)), list(verify(folder))


def test_a_picture_and_a_comparison(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder.parent / "packs.png"
    assert main(["inspect", str(folder), "--picture", str(picture), "--max-length", "20"]) == 0
    assert picture.stat().st_size > 10_000
    assert "computed once for several documents" in capsys.readouterr().out
