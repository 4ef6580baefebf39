"""packed-attn pack --resume: packs come from one version of the inputs, or the run is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.kills import documents_in
from packed_attn.offline import contents, pack, pack_files
from packed_attn.offline.files import write_json
from packed_attn.offline.inputs import find_parts, read_part
from packed_attn.offline.job import MANIFEST, WORK

JOB: dict[str, Any] = {"capacity": 16, "part_bytes": 500}
ROWS = 100
CHANGED = "holds a run that read other contents of .*: give it what that run was given"


def write_jsonl(path: Path, rows: Sequence[list[int]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: Sequence[list[int]]) -> Path:
    path = path.with_suffix(".parquet")
    table = pa.table({"input_ids": pa.array(rows, pa.list_(pa.int64()))})
    pq.write_table(table, path, row_group_size=30, compression="none", use_dictionary=False)
    return path


def write_dataset(path: Path, rows: Sequence[list[int]]) -> Path:
    """In parts of a row each: `part_bytes` is not even a kilobyte."""
    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset.from_dict({"input_ids": list(rows)}).save_to_disk(path)
    return path


WRITERS = (write_jsonl, write_parquet, write_dataset)
formats = pytest.mark.parametrize("write", WRITERS)
Write = Callable[[Path, Sequence[list[int]]], Path]


def rows_of(version: int) -> list[list[int]]:
    """Documents of which every version has as many bytes, and which differ near the end alone."""
    return [[1000 + i, 2000 + i + (version if i == ROWS - 2 else 0)] for i in range(ROWS)]


def bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def replace_keeping_times(write: Write, path: Path, rows: Sequence[list[int]]) -> None:
    """Other documents in files of the same size and time of change."""
    times = {file: file.stat().st_mtime_ns for file in (path, *path.rglob("*"))}
    size = bytes_of(path)
    write(path, rows)
    assert bytes_of(path) == size
    for file, time in times.items():
        os.utime(file, ns=(time, time))


def stop_before_plan(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends when all parts are tokenised."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pack, "save_plan", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_files([path], out, **JOB)


def whole(path: Path, out: Path) -> dict[str, bytes]:
    pack_files([path], out, **JOB)
    return contents_of(out)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@formats
@pytest.mark.parametrize("fresh", [contents.FRESH, 0])
def test_changed_inputs_of_the_same_size_and_time_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, fresh: int
) -> None:
    path = write(tmp_path / "data", rows_of(0))
    monkeypatch.setattr(contents, "FRESH", fresh)
    before = whole(path, tmp_path / "finished")
    stop_before_plan(path, tmp_path / "out", monkeypatch)
    made = sorted((tmp_path / "out").rglob("*"))
    replace_keeping_times(write, path, rows_of(1))
    for out in (tmp_path / "out", tmp_path / "finished"):
        with pytest.raises(ValueError, match=CHANGED):
            pack_files([path], out, resume=True, **JOB)
    assert sorted((tmp_path / "out").rglob("*")) == made  # a refusal harms nothing
    assert contents_of(tmp_path / "finished") == before
    replace_keeping_times(write, path, rows_of(0))
    for out in (tmp_path / "out", tmp_path / "finished"):
        pack_files([path], out, resume=True, **JOB)
        assert contents_of(out) == before


@formats
def test_what_nobody_wrote_to_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path = write(tmp_path / "data", rows_of(0))
    monkeypatch.setattr(contents, "FRESH", 0)
    stop_before_plan(path, tmp_path / "out", monkeypatch)

    def read(*_: Any) -> None:
        raise AssertionError("an input was read again")

    monkeypatch.setattr(pack, "digest_part", read)
    monkeypatch.setattr(pack, "tokenize_part", read)
    pack_files([path], tmp_path / "out", resume=True, **JOB)
    monkeypatch.undo()
    assert contents_of(tmp_path / "out") == whole(path, tmp_path / "whole")


@formats
def test_a_restored_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    """Other inodes and times, the same bytes, and a cache that somebody left beside them."""
    path = write(tmp_path / "data", rows_of(0))
    stop_before_plan(path, tmp_path / "out", monkeypatch)
    path.rename(tmp_path / "old")
    write(path, rows_of(0))
    if path.is_dir():
        datasets.load_from_disk(path).map(lambda row: row, load_from_cache_file=False)
    pack_files([path], tmp_path / "out", resume=True, **JOB)
    assert contents_of(tmp_path / "out") == whole(path, tmp_path / "whole")


@formats
@pytest.mark.parametrize("workers", [1, 2])
def test_a_change_between_two_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, workers: int
) -> None:
    path = write(tmp_path / "data", rows_of(0))
    tokenise = pack._Runner.run

    def change_after(self: Any, task: Any, *arguments: Any) -> Any:
        results = tokenise(self, task, *arguments)
        if task is pack.tokenize_part:
            replace_keeping_times(write, path, rows_of(1))
        return results

    monkeypatch.setattr(pack._Runner, "run", change_after)
    with pytest.raises(ValueError, match="was changed while it was read: run again"):
        pack_files([path], tmp_path / "out", workers=workers, **JOB)
    assert not (tmp_path / "out").exists()


def test_a_change_while_a_part_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "data", rows_of(0))

    def change(part: Any) -> Any:
        yield from read_part(part)
        if part.stop == path.stat().st_size:
            replace_keeping_times(write_jsonl, path, rows_of(1))

    monkeypatch.setattr("packed_attn.offline.scratch.read_part", change)
    with pytest.raises(ValueError, match="was changed while it was read: run again"):
        pack_files([path], tmp_path / "out", **JOB)


def test_parts_that_are_not_read_yet_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts then come from what is there now."""
    path = write_jsonl(tmp_path / "data", rows_of(0))
    stop_before_plan(path, tmp_path / "out", monkeypatch)
    last = max((tmp_path / "out" / WORK).glob("tokens-*.json"))
    last.unlink()
    write_jsonl(path, rows_of(1))
    pack_files([path], tmp_path / "out", resume=True, **JOB)
    assert contents_of(tmp_path / "out") == whole(path, tmp_path / "whole")
    assert sum(documents_in(tmp_path / "out").values()) == ROWS


def test_a_digest_holds_all_that_lines_are_read_from(tmp_path: Path) -> None:
    """Wherever parts are cut: what their records are has changed only if their digest has."""
    lines = [json.dumps({"input_ids": list(range(10, 10 + n % 5))}) for n in range(8)]
    text = ("\n".join(lines[:4]) + "\n\n" + "\r\n".join(lines[4:])).encode()
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(text)
    for place in range(len(text)):
        swapped = b"\n" if text[place : place + 1] != b"\n" else b" "
        other.write_bytes(text[:place] + swapped + text[place + 1 :])
        for part, changed in zip(find_parts([path], 17), find_parts([other], 17)):
            records = [[record for _, record in read_part(each)] for each in (part, changed)]
            if records[0] != records[1]:
                assert contents.digest_of(part) != contents.digest_of(changed)


@pytest.mark.parametrize("finished", [True, False])
def test_runs_of_an_older_version_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    path, out = write_jsonl(tmp_path / "data", rows_of(0)), tmp_path / "out"
    if finished:
        whole(path, out)
    else:
        stop_before_plan(path, out, monkeypatch)
    note = out / MANIFEST if finished else out / WORK / "job.json"
    noted = json.loads(note.read_text())
    for name in ("multiple", "part_bytes", "stamps", "input_sha256"):
        noted.get("settings", noted).pop(name, None)
    write_json(note, noted)
    with pytest.raises(
        ValueError, match=r"another version of packed-attn, which did not note .*mult"
    ):
        pack_files([path], out, resume=True, **JOB)
    assert note.exists()
