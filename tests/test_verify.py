"""packed-attn verify and inspect: every kind of damage is found, and named by shard and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from packed_attn.cli import main
from packed_attn.offline import pack_files, read_manifest, verify
from packed_attn.offline.files import sha256_of
from packed_attn.offline.manifest import write_manifest

CAPACITY = 32


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Three shards or more of documents of 1 to 60 tokens."""
    rng = np.random.default_rng(0)
    source = tmp_path / "data.jsonl"
    with open(source, "w") as file:
        for length in rng.integers(1, 60, 40):
            tokens = rng.integers(1, 100, length).tolist()
            mask = rng.integers(0, 2, length).tolist()
            file.write(json.dumps({"input_ids": tokens, "completion_mask": mask}) + "\n")
    pack_files([source], tmp_path / "out", CAPACITY, shard_tokens=12 * CAPACITY)
    return tmp_path / "out"


def alter_rows(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> str:
    """Writes the second shard anew with changed rows, with hashes that fit; returns its name."""
    manifest = read_manifest(folder)
    shard = manifest["shards"][1]
    table = pq.read_table(folder / shard["file"])
    rows = table.to_pylist()
    change(rows)
    pq.write_table(
        pa.Table.from_pylist(rows, table.schema), folder / shard["file"], row_group_size=5
    )
    shard["sha256"] = sha256_of(folder / shard["file"])
    del manifest["format"], manifest["manifest_sha256"]
    write_manifest(folder, manifest)
    return shard["file"]


def test_whole_shards_hold(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(verify(packed)) == []
    assert main(["verify", str(packed)]) == 0
    assert "every hash, count and boundary holds" in capsys.readouterr().out
    alter_rows(packed, lambda rows: None)  # the tool of the tests below is no damage itself
    assert list(verify(packed)) == []


def restart(rows: list[dict[str, Any]]) -> None:
    rows[7]["position_ids"][3] = 0


def learn_first(rows: list[dict[str, Any]]) -> None:
    last = rows[7]["seq_lengths"][-1]
    rows[7]["labels"][-last] = rows[7]["input_ids"][-last]


def other_label(rows: list[dict[str, Any]]) -> None:
    rows[7]["labels"][1] = 1000


def other_length(rows: list[dict[str, Any]]) -> None:
    rows[7]["seq_lengths"][0] += 1


def empty_document(rows: list[dict[str, Any]]) -> None:
    rows[7]["seq_lengths"].append(0)


def short_labels(rows: list[dict[str, Any]]) -> None:
    rows[7]["labels"].pop()


def over_capacity(rows: list[dict[str, Any]]) -> None:
    for name in rows[7]:
        rows[7][name] = rows[7][name] + rows[6][name]


def merge_documents(rows: list[dict[str, Any]]) -> None:
    """Two documents as one: positions go on, so only the count and the positions tell."""
    row = next(row for row in rows if len(row["seq_lengths"]) > 1)
    row["seq_lengths"][:2] = [sum(row["seq_lengths"][:2])]


def repeat_row(rows: list[dict[str, Any]]) -> None:
    rows.append(rows[7])


def lose_row(rows: list[dict[str, Any]]) -> None:
    rows.pop()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (restart, "row 7: position_ids hold 0 where 3 belongs"),
        (learn_first, "row 7: the first label of a document is"),
        (other_label, "row 7: a label is neither its token nor -100"),
        (other_length, "row 7: seq_lengths add to"),
        (empty_document, "row 7: a document without tokens"),
        (short_labels, "row 7: "),
        (over_capacity, f"over the capacity {CAPACITY}"),
        (merge_documents, "position_ids hold 0 where"),
        (repeat_row, "the manifest says 12"),
        (lose_row, "has 11 packs, the manifest says 12"),
    ],
)
def test_damaged_rows_are_named(
    packed: Path,
    change: Callable[[Any], None],
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = alter_rows(packed, change)
    assert main(["verify", str(packed)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{name}: ") and fault in line for line in lines), lines
    assert lines[-1].endswith("faults")


def test_one_flipped_bit_is_found(packed: Path) -> None:
    path = packed / read_manifest(packed)["shards"][2]["file"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path.name}: altered since it was written (sha256 differs)" in list(verify(packed))


def test_a_truncated_shard(packed: Path) -> None:
    path = packed / read_manifest(packed)["shards"][0]["file"]
    path.write_bytes(path.read_bytes()[:-50])
    faults = list(verify(packed))
    assert any(fault.startswith(f"{path.name}: cannot be read: ") for fault in faults), faults


def test_missing_and_additional_shards(packed: Path) -> None:
    first, second = (shard["file"] for shard in read_manifest(packed)["shards"][:2])
    (packed / first).rename(packed / "train-99999-of-00003.parquet")
    assert list(verify(packed)) == [
        f"{first}: missing",
        "train-99999-of-00003.parquet: not in the manifest",
    ]
    assert (packed / second).exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m["settings"].update(capacity=10**6), "altered since it was written"),
        (lambda m: m["settings"].update(capacity=9), "row 0: 32 tokens, over the capacity 9"),
        (lambda m: m["shards"][0].update(tokens=1), "tokens, the manifest says 1"),
        (lambda m: m["shards"].pop(), "not in the manifest"),
        (lambda m: m["shards"][0].pop("file"), "cannot be read as one: KeyError 'file'"),
        (lambda m: m["report"].update(packs=1), "the report has 1 packs, its shards have"),
        (lambda m: m["report"].update(packed_tokens=1), "the report does not hold: report must"),
    ],
)
def test_an_altered_manifest(packed: Path, change: Callable[[Any], object], fault: str) -> None:
    manifest = read_manifest(packed)
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))
    faults = list(verify(packed))
    assert faults[0] == "manifest.json: altered since it was written (its own sha256 differs)"
    assert any(fault in one for one in faults), faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no manifest.json: nothing was packed there"),
        ("{", "manifest.json is not JSON"),
        ("[]", "must be a manifest of 'packed-attn shards 1'"),
        ('{"format": "other"}', "must be a manifest of 'packed-attn shards 1'"),
    ],
)
def test_folders_that_hold_no_shards(
    tmp_path: Path, text: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    for command in ("verify", "inspect"):
        assert main([command, str(tmp_path)]) == 2
        assert words in capsys.readouterr().err


def test_a_run_that_has_not_ended(packed: Path) -> None:
    (packed / "manifest.json").unlink()
    (packed / ".packing").mkdir()
    with pytest.raises(ValueError, match=r"has no manifest.json: its run has not ended"):
        list(verify(packed))


def test_inspect_prints_the_report(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert "packs of 32 tokens (bfd, overflow=split)" in printed
    assert "from         data.jsonl (input_ids)" in printed
    assert main(["inspect", str(packed), "--picture", str(packed.parent / "packs.png")]) == 0
    assert (packed.parent / "packs.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_manifest(packed)


def test_inspect_compares_with_truncation(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(packed), "--max-length", "8"]) == 0
    printed = capsys.readouterr().out
    lengths = [
        n
        for shard in read_manifest(packed)["shards"]
        for row in pq.read_table(packed / shard["file"])["seq_lengths"].to_pylist()
        for n in row
    ]
    assert f"{sum(max(n - 8, 0) for n in lengths):,} (" in printed.split("truncated to 8")[1]
    assert main(["inspect", str(packed), "--max-length", "0"]) == 2
    assert "max_length must be an integer of at least 1" in capsys.readouterr().err


def test_any_damage_of_a_byte_is_found(packed: Path) -> None:
    """Wherever it is, and whatever the reader of the damaged file raises."""
    rng = np.random.default_rng(0)
    for path in sorted(packed.iterdir()):
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 60).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                found = list(verify(packed))
            except ValueError as error:
                found = [str(error)]
            assert found or json.loads(damaged) == json.loads(whole), (path.name, place)
        path.write_bytes(whole)
    assert list(verify(packed)) == []


def test_what_arrow_raises_for_a_damaged_file_is_a_fault(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    monkeypatch.setattr(import_module("packed_attn.offline.verify"), "_row_groups", fails)
    assert any(
        "cannot be read: Integers with more than 64 bits" in fault for fault in verify(packed)
    )
