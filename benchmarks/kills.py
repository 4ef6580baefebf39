"""Runs of the offline packer that are killed with -9 at random moments, continued, and compared."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from packed_attn.offline import pack_files, read_manifest
from packed_attn.offline.engines import PRELOAD
from packed_attn.offline.job import MANIFEST, WORK
from packed_attn.offline.scratch import load_tokenizer
from packed_attn.packing import pack_lengths
from packed_attn.processes import clean_processes

LIMIT = 600  # seconds that any run may take
CONTINUED_KILLED = 0.3  # share of continued runs that are killed once more


@dataclass(frozen=True)
class KilledRun:
    """One run that was killed at least once and then continued to its end.

    Attributes:
        moments: what it was doing at each kill: "starting", "tokenising", "writing" or "ending".
        redone: shards that stood under their names at a kill and were written again.
        tokens_lost, tokens_duplicated: against the documents, counted document by document.
        same_bytes: whether all files are those of a run that nobody killed.
    """

    moments: tuple[str, ...]
    redone: int
    tokens_lost: int
    tokens_duplicated: int
    same_bytes: bool


@dataclass(frozen=True)
class Case:
    """A job for `pack_files`, small enough to be run hundreds of times.

    Attributes:
        arguments: for `pack_files`, without the output.
        folder: where runs are made.
    """

    arguments: dict[str, Any]
    folder: Path


def killed_runs(case: Case, runs: int, *, workers: int, seed: int) -> Iterator[KilledRun]:
    """Kills that many runs at random moments, continues each to its end, and compares.

    Moments are uniform over the time that the last run took which nobody killed: one that the
    machine held up does not make all others end before theirs. A run that ends before its moment
    does not count, and another is made.
    """
    case.folder.mkdir(parents=True, exist_ok=True)
    context = clean_processes(*PRELOAD)
    with ProcessPoolExecutor(1, context, _load, (case,)) as launcher:

        def ends(output: Path, seconds: float | None) -> bool:
            return launcher.submit(_ends, case, output, workers, seconds).result()

        yield from _killed(case.folder, runs, random.Random(seed), ends)


def _killed(
    folder: Path, runs: int, moments: random.Random, ends: Callable[[Path, float | None], bool]
) -> Iterator[KilledRun]:
    whole, output = folder / "whole", folder / "killed"
    seconds = 0.0
    for path in (output, whole):  # the first starts more slowly than all others
        began = time.monotonic()
        ends(path, None)
        seconds = time.monotonic() - began
    shutil.rmtree(output)
    files, documents = _files(whole), documents_in(whole)
    while runs:
        kills, redone = [], 0
        began = time.monotonic()
        while not ends(output, moments.uniform(0, seconds)):
            kills.append(_moment(output))
            before = _shards(output)
            if moments.random() < CONTINUED_KILLED:
                continue
            ends(output, None)
            after = _shards(output)
            redone = max(redone, sum(after[name] != inode for name, inode in before.items()))
            break
        if kills:
            lost, duplicated = _differences(documents, documents_in(output))
            yield KilledRun(tuple(kills), redone, lost, duplicated, _files(output) == files)
            runs -= 1
        else:
            seconds = time.monotonic() - began
        shutil.rmtree(output)


def documents_in(folder: Path) -> Counter[tuple[int, ...]]:
    """The documents of packed shards, each as its tokens, and how often they occur."""
    documents: Counter[tuple[int, ...]] = Counter()
    for shard in read_manifest(folder)["shards"]:
        table = pq.read_table(folder / shard["file"], columns=["input_ids", "seq_lengths"])
        for row in table.to_pylist():
            first = 0
            for length in row["seq_lengths"]:
                documents[tuple(row["input_ids"][first : first + length])] += 1
                first += length
    return documents


def _load(case: Case) -> None:
    """In the launcher: what all runs find loaded."""
    pack_lengths([1], 1)
    load_tokenizer(case.arguments["tokenizer"])


def _serve() -> None:
    """One server for the workers of all runs. One that is killed while it asks for a worker takes
    the server with it, as it would take its own."""
    context = clean_processes(*PRELOAD)
    deadline = time.monotonic() + LIMIT
    while True:
        forkserver.ensure_running()
        probe = context.Process(target=int)
        try:
            probe.start()
        except (OSError, EOFError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
            continue
        probe.join()
        return


def _ends(case: Case, output: Path, workers: int, seconds: float | None) -> bool:
    """In the launcher: packs in a fork, killed after so many seconds; whether it ended before."""
    if workers > 1:
        _serve()
    process = multiprocessing.get_context("fork").Process(
        target=_pack, args=(case, output, workers)
    )
    process.start()
    process.join(LIMIT if seconds is None else seconds)
    process.kill()
    process.join()
    if seconds is None and process.exitcode == -signal.SIGKILL:
        raise RuntimeError(f"a run that nobody kills did not end within {LIMIT} s")
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with status {process.exitcode}")
    return process.exitcode == 0


def _pack(case: Case, output: Path, workers: int) -> None:
    # The launcher's server, which only the launcher may ask whether it is running.
    forkserver._forkserver.ensure_running = lambda: None
    resume = output.exists()
    pack_files(output=output, workers=workers, resume=resume, **case.arguments)


def _moment(output: Path) -> str:
    if (output / MANIFEST).exists():
        return "ending"
    if (output / WORK / "plan.json").exists():
        return "writing"
    return "tokenising" if (output / WORK / "job.json").exists() else "starting"


def _shards(output: Path) -> dict[str, int]:
    """Shards under their names, with what changes when one is written again."""
    return {path.name: path.stat().st_ino for path in output.glob("train-*.parquet")}


def _files(output: Path) -> dict[str, bytes]:
    """All that a run leaves behind."""
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def _differences(wanted: Counter[Any], found: Counter[Any]) -> tuple[int, int]:
    """Tokens of documents that are missing, and of those that are there too often."""
    lost, duplicated = wanted - found, found - wanted
    return _tokens(lost.items()), _tokens(duplicated.items())


def _tokens(documents: Any) -> int:
    return sum(len(tokens) * times for tokens, times in documents)


def summary(runs: Sequence[KilledRun]) -> dict[str, Any]:
    """What a set of runs amounts to."""
    return {
        "runs": len(runs),
        "kills": sum(len(run.moments) for run in runs),
        "kills_by_moment": dict(Counter(moment for run in runs for moment in run.moments)),
        "most_shards_redone": max(run.redone for run in runs),
        "tokens_lost": sum(run.tokens_lost for run in runs),
        "tokens_duplicated": sum(run.tokens_duplicated for run in runs),
        "runs_with_other_bytes": sum(not run.same_bytes for run in runs),
    }
