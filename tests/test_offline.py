"""packed-attn pack: the rows of pack_dataset, the same bytes always, and nothing lost by a kill."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from benchmarks.kills import Case, documents_in, killed_runs, summary
from packed_attn import PackedCollator, pack_dataset
from packed_attn.cli import main
from packed_attn.offline import files, job, pack_files, read_manifest, report_of
from packed_attn.offline.engines import run_tasks
from packed_attn.offline.job import WORK, FolderLock, Job
from packed_attn.packing import PackingLossError
from packed_attn.processes import clean_processes
from tests.small_tokenizer import prose, save_tokenizer

CAPACITY = 96
JOB = {"capacity": CAPACITY, "part_bytes": 3000, "shard_tokens": 12 * CAPACITY}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def records() -> list[dict[str, str]]:
    """Pairs of uneven lengths, some of them over capacity, of several bytes a character."""
    paragraphs = [p.strip() for p in prose() if p.strip()]
    return [{"prompt": f"{i} — why?\n", "completion": p} for i, p in enumerate(paragraphs)][:90]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    write_lines(path, records())
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), "utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokenised(name: str) -> list[dict[str, list[int]]]:
    """The documents, tokenised by hand."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    documents = []
    for record in records():
        prompt = len(tokenizer(record["prompt"])["input_ids"])
        ids = tokenizer(record["prompt"] + record["completion"] + "</s>")["input_ids"]
        mask = [int(i >= prompt) for i in range(len(ids))]
        documents.append({"input_ids": ids, "completion_mask": mask})
    return documents


def test_shards_hold_the_rows_of_pack_dataset(tmp_path: Path, lines: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    manifest = pack_files([lines], out, tokenizer=tokenizer, **JOB)
    rows = datasets.load_dataset(
        "parquet", data_files=str(out / "*.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    reports: list[Any] = []
    wanted = pack_dataset(tokenised(tokenizer), CAPACITY, on_report=reports.append)
    assert len(manifest["shards"]) > 4
    assert set(rows.column_names) == set(wanted.column_names)
    assert [dict(row) for row in rows] == [
        {name: row[name] for name in rows.column_names} for row in wanted
    ]
    report = report_of(manifest)
    assert {**report.to_dict(), "masked_tokens": 0} == reports[0].to_dict()
    labels = sum(label != -100 for row in rows for label in row["labels"])
    assert report.learned_tokens - report.lost_labels <= labels <= report.learned_tokens
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["manifest.json", *(shard["file"] for shard in manifest["shards"])]
    )
    batch = PackedCollator(capacity=CAPACITY)([rows[0], rows[len(rows) - 1]])
    assert batch["input_ids"].shape == (1, 2 * CAPACITY)


def test_the_folder_loads_by_its_name(tmp_path: Path, lines: Path, tokenizer: str) -> None:
    pack_files([lines], tmp_path / "out", tokenizer=tokenizer, **{**JOB, "shard_tokens": 10**6})
    rows = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "c"))
    assert list(rows) == ["train"]
    assert rows["train"].num_rows == read_manifest(tmp_path / "out")["shards"][0]["packs"]


@pytest.mark.parametrize("workers", [2, 8])
def test_workers_do_not_change_a_byte(
    tmp_path: Path, lines: Path, tokenizer: str, workers: int
) -> None:
    pack_files([lines], tmp_path / "one", tokenizer=tokenizer, seed=7, **JOB)
    pack_files([lines], tmp_path / "many", tokenizer=tokenizer, seed=7, workers=workers, **JOB)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_every_kind_of_input_gives_the_same_shards(
    tmp_path: Path, lines: Path, tokenizer: str
) -> None:
    data = datasets.Dataset.from_list(records())
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "data.parquet", batch_size=20)
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "a.jsonl", records()[:40])
    pq.write_table(pa.Table.from_pylist(records()[40:]), tmp_path / "folder" / "b.parquet")
    hashes = []
    for name in (lines, "saved", "data.parquet", "folder"):
        job = {**JOB, "part_bytes": 20_000 if name == "saved" else 3000}
        out = tmp_path / f"out-{Path(name).name}"
        manifest = pack_files([tmp_path / name], out, tokenizer=tokenizer, **job)
        hashes.append([shard["sha256"] for shard in manifest["shards"]])
    assert len(hashes[0]) > 4
    assert all(one == hashes[0] for one in hashes)


@pytest.mark.parametrize("part_bytes", [1, 7, 100, 10**6])
def test_parts_cut_lines_nowhere(tmp_path: Path, part_bytes: int) -> None:
    """A line belongs to one part, wherever the cuts fall, with and without a last newline."""
    text = '{"input_ids": [1, 2]}\r\n\n{"input_ids": [3]}\n\n\n{"input_ids": [4, 5, 6]}'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pack_files([tmp_path / "a.jsonl"], tmp_path / "out", 8, part_bytes=part_bytes)
    assert documents_in(tmp_path / "out") == Counter([(1, 2), (3,), (4, 5, 6)])


def test_tokens_with_labels_need_no_tokenizer(tmp_path: Path) -> None:
    given = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "id": "a"},
        {"input_ids": [0, 4, 5], "labels": [-100, -100, 9], "attention_mask": [0, 1, 1], "id": "b"},
        {"input_ids": [6], "labels": [-100], "id": "c"},
    ]
    for record in given[::2]:
        record["attention_mask"] = [1] * len(record["input_ids"])
    path = write_lines(tmp_path / "a.jsonl", given)
    manifest = pack_files([path], tmp_path / "out", 4, learnable_only=True)
    report = report_of(manifest)
    assert (report.padding_tokens, report.unlearnable_documents, report.learned_tokens) == (1, 1, 3)
    rows = pq.read_table(tmp_path / "out" / "train-00000-of-00001.parquet").to_pylist()
    assert [row["labels"] for row in rows] == [[-100, 2, 3], [-100, 9]]
    assert manifest["settings"]["tokenizer"] is None


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
def test_overflow_and_max_loss(tmp_path: Path, overflow: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [1] * n} for n in (5, 12, 3)])
    report = report_of(pack_files([path], tmp_path / "out", 8, overflow=overflow))
    assert report.packed_tokens == (16 if overflow == "truncate" else 8)
    with pytest.raises(PackingLossError, match="max_loss allows"):
        pack_files([path], tmp_path / "other", 8, overflow=overflow, max_loss=0.1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_runs_lose_nothing(
    tmp_path: Path, lines: Path, tokenizer: str, workers: int
) -> None:
    """The full count is in benchmarks/results/offline.json, by bench_offline.py."""
    case = Case({**JOB, "inputs": [lines], "tokenizer": tokenizer}, tmp_path / "runs")
    runs = list(killed_runs(case, 6, workers=workers, seed=workers))
    figures = summary(runs)
    assert figures["tokens_lost"] == figures["tokens_duplicated"] == 0
    assert figures["runs_with_other_bytes"] == 0
    assert figures["most_shards_redone"] <= workers
    wanted = pack_dataset(tokenised(tokenizer), CAPACITY)
    assert sum(map(len, wanted["input_ids"])) == sum(
        len(tokens) * n for tokens, n in documents_in(tmp_path / "runs" / "whole").items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hundred_killed_runs_lose_nothing(
    tmp_path: Path, lines: Path, tokenizer: str, workers: int
) -> None:
    case = Case({**JOB, "inputs": [lines], "tokenizer": tokenizer}, tmp_path / "runs")
    figures = summary(list(killed_runs(case, 100, workers=workers, seed=10 + workers)))
    assert figures["tokens_lost"] == figures["tokens_duplicated"] == 0
    assert figures["runs_with_other_bytes"] == 0
    assert figures["most_shards_redone"] <= workers


def hold(lock: FolderLock, begun: Any, done: Any) -> None:
    begun.set()
    done.wait(60)


def test_a_worker_holds_the_lock_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that follows a killed one waits for the workers that have not noticed yet."""
    monkeypatch.setattr(job, "LOCK_SECONDS", 0.1)
    context = clean_processes()
    begun, done = context.Event(), context.Event()
    with job._locked(tmp_path / "lock") as lock:
        worker = context.Process(target=hold, args=(lock, begun, done), daemon=True)
        worker.start()
        assert begun.wait(60)
    with (
        pytest.raises(ValueError, match="is being written by another run"),
        job._locked(tmp_path / "lock"),
    ):
        pass
    done.set()
    worker.join()
    with job._locked(tmp_path / "lock"):
        pass


def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, lines: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_files([lines], tmp_path / "whole", tokenizer=tokenizer, **JOB)
    out = tmp_path / "out"
    full, flush = [], os.fsync

    def full_disk(descriptor: int) -> None:
        # Once, and not before two shards are whole, whatever else was flushed until then.
        if not full and len(list(out.glob("*.parquet"))) == 2:
            full.append(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"no space is left for .*: what is whole is kept; make room"):
        pack_files([lines], out, tokenizer=tokenizer, **JOB)
    monkeypatch.undo()
    assert not list(out.rglob(f"{files.TEMPORARY}*"))
    kept = [path.name for path in out.glob("*.parquet")]
    assert kept
    assert all(
        (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in kept
    )
    with pytest.raises(ValueError, match="a run that has not ended: continue it with --resume"):
        pack_files([lines], out, tokenizer=tokenizer, **JOB)
    pack_files([lines], out, tokenizer=tokenizer, resume=True, **JOB)
    assert contents(out) == contents(tmp_path / "whole")


def test_resuming_something_else_is_refused_and_harms_nothing(
    tmp_path: Path, lines: Path, tokenizer: str
) -> None:
    out = tmp_path / "out"
    pack_files([lines], out, tokenizer=tokenizer, **JOB)
    whole = contents(out)
    with pytest.raises(ValueError, match="holds a finished run: give another folder"):
        pack_files([lines], out, tokenizer=tokenizer, **JOB)
    with pytest.raises(ValueError, match="holds a run with other capacity, packs_per_shard"):
        pack_files([lines], out, tokenizer=tokenizer, resume=True, **{**JOB, "capacity": 64})
    assert contents(out) == whole
    pack_files([lines], out, tokenizer=tokenizer, resume=True, **JOB)  # done already
    assert contents(out) == whole


def test_resuming_on_changed_input_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [i]} for i in range(50)])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("packed_attn.offline.pack.save_plan", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_files([path], tmp_path / "out", 8)
    monkeypatch.undo()
    write_lines(path, [{"input_ids": [i + 1]} for i in range(50)])
    with pytest.raises(ValueError, match="holds a run with other parts, inputs"):
        pack_files([path], tmp_path / "out", 8, resume=True)
    assert (tmp_path / "out" / WORK / "job.json").exists()


def test_two_runs_in_one_folder(tmp_path: Path, monkeypatch: Any) -> None:
    import fcntl

    path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [1]}])
    monkeypatch.setattr("packed_attn.offline.job.LOCK_SECONDS", 0.0)
    work = tmp_path / "out" / WORK
    work.mkdir(parents=True)
    with open(work / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another run"):
            pack_files([path], tmp_path / "out", 8)
    pack_files([path], tmp_path / "out", 8)


def die(job: Job, number: int) -> dict[str, Any]:
    os._exit(9)


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a worker died .* run again with --resume"):
        list(run_tasks(die, None, [0, 1], workers=2, engine="local"))  # type: ignore[arg-type]


def test_bad_lines_are_counted_where_asked(tmp_path: Path, tokenizer: str) -> None:
    good = [json.dumps(record) for record in records()[:30]]
    text = [*good[:10], "{broken", *good[10:20], '{"prompt": "a"}', "[1]", *good[20:]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(text))
    for part_bytes in (500, 10**6):
        out = tmp_path / f"out-{part_bytes}"
        job = {**JOB, "part_bytes": part_bytes}
        manifest = pack_files([path], out, tokenizer=tokenizer, skip_bad=True, **job)
        assert report_of(manifest).unreadable_documents == 3
        assert report_of(manifest).documents == 33
        assert [place.split(": ")[0] for place in manifest["unreadable"]] == [
            f"{path} line {n}" for n in (11, 22, 23)
        ]
        with pytest.raises(ValueError, match=r"a.jsonl line 11: malformed JSON: .*--skip-bad"):
            pack_files([path], tmp_path / "refused", tokenizer=tokenizer, **job)
        assert not (tmp_path / "refused").exists()


def test_what_no_record_can_hold_is_counted_where_it_stands(tmp_path: Path) -> None:
    lines = ['{"input_ids": [1, 2], "completion_mask": [0, 1]}'] * 5
    lines[1] = "[" * 100_000
    lines[2] = '{"input_ids": [1, 3000000000], "completion_mask": [0, 1]}'
    lines[3] = '{"input_ids": [1, 2], "completion_mask": [0, 256]}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    manifest = pack_files([path], tmp_path / "out", 8, skip_bad=True)
    assert report_of(manifest).unreadable_documents == 3
    _, huge, mask = manifest["unreadable"]
    assert huge == f"{path} line 3: input_ids must fit in 32 bits, but holds 3000000000"
    assert mask == f"{path} line 4: completion_mask must fit in 8 bits, but holds 256"
    path.write_text("\n".join(lines[2:]))
    with pytest.raises(ValueError, match=r"a.jsonl line 1: input_ids must fit in 32 bits"):
        pack_files([path], tmp_path / "refused", 8)


def damaged_parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def damaged_inside(folder: Path) -> Path:
    path = folder / "a.parquet"
    texts = [f"some text {i}" for i in range(3000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content[at : at + 200] = bytes(200)
    path.write_bytes(content)
    return path


def saved_splits(folder: Path) -> Path:
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})})
    data.save_to_disk(folder / "splits")
    return folder / "splits"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: f / "none.jsonl", "input .*none.jsonl does not exist"),
        (lambda f: write_lines(f / "a.jsonl", []), "inputs must hold documents, but .* is empty"),
        (lambda f: write_lines(f / "a.jsonl", ["a"]), "line 1: a record must be an object"),
        (lambda f: write_lines(f / "a.json", []), "jq -c"),
        (lambda f: write_lines(f / "a.csv", []), "must be .jsonl, .ndjson, .parquet or a folder"),
        (lambda f: write_lines(f / "a.jsonl", [{"text": ""}, {"text": 1}]), "line 2: text must be"),
        (lambda f: write_lines(f / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}]}]),
         "line 1: a conversation must have a turn of the assistant"),
        (lambda f: write_lines(f / "a.jsonl", [{"question": "a"}]), "none of TRL's"),
        (lambda f: (f / "empty").mkdir() or f / "empty", "must hold .jsonl, .ndjson, .parquet"),
        (damaged_parquet, "a.parquet is not a whole Parquet file"),
        (damaged_inside, "a.parquet is damaged: row group 2 cannot be read"),
        (saved_splits, "holds the splits train: give one, such as"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    tokenizer: str,
    make: Callable[[Path], Path],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [str(make(tmp_path)), "--tokenizer", tokenizer, "--capacity", "32", "-o", str(out)]
    capsys.readouterr()  # what making the input printed
    assert main(["pack", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("packed-attn: ")
    assert "\n" not in error
    assert re.search(words, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--capacity", "0"], "capacity must be at least 1"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--strategy", "best"], "strategy must be one of"),
        (["--overflow", "wrap"], "overflow must be one of"),
        (["--engine", "dask"], "engine must be one of"),
        (["--tokenizer", "/no/such/folder"], "tokenizer /no/such/folder cannot be loaded"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    lines: Path,
    tokenizer: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    out = tmp_path / "out"
    given = [str(lines), "--tokenizer", tokenizer, "--capacity", "64", "-o", str(out), *arguments]
    assert main(["pack", *given]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_a_tokenizer_must_be_given_for_text(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer must be given for documents of prompt and"):
        pack_files([lines], tmp_path / "out", 64)


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "tokenizer", chat_template=None)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(ValueError, match=r"a.jsonl line 1: tokenizer .* has no chat template"):
        pack_files([path], tmp_path / "out", 64, tokenizer=name)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold a run of this command, but it hol"):
        pack_files([lines], out, 64, tokenizer=save_tokenizer(tmp_path / "t"))
    assert contents(out) == {"thesis.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, but it is a file"):
        pack_files([lines], tmp_path / "file", 64, tokenizer=str(tmp_path / "t"))


def test_an_empty_folder_stays_after_a_refusal(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [1]}, {"input_ids": "x"}])
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="line 2"):
        pack_files([path], tmp_path / "out", 64)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_command_prints_the_report(
    tmp_path: Path, lines: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--tokenizer", tokenizer, "--capacity", "64", "-o", str(out), "--workers", "2"]
    assert main(["pack", str(lines), *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("plan ")
    assert printed.endswith(f"1 shards in {out}\n")


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path: Path, lines: Path, tokenizer: str) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        pack_files([lines], tmp_path / "local", tokenizer=tokenizer, **JOB)
        pack_files([lines], tmp_path / "ray", tokenizer=tokenizer, engine="ray", workers=2, **JOB)
        assert contents(tmp_path / "local") == contents(tmp_path / "ray")
        path = write_lines(tmp_path / "a.jsonl", [{"input_ids": [1]}, {"input_ids": "x"}])
        with pytest.raises(ValueError, match=r"a.jsonl line 2: .*a list of token ids"):
            pack_files([path], tmp_path / "out", 8, engine="ray")
        assert not (tmp_path / "out").exists()
    finally:
        ray.shutdown()


def test_nothing_else_is_needed_afterwards(tmp_path: Path, lines: Path, tokenizer: str) -> None:
    """The scratch files are gone, and removing the input harms nothing."""
    copy = shutil.copy(lines, tmp_path / "copy.jsonl")
    pack_files([copy], tmp_path / "out", tokenizer=tokenizer, **JOB)
    os.remove(copy)
    assert not (tmp_path / "out" / WORK).exists()
    assert main(["verify", str(tmp_path / "out")]) == 0
