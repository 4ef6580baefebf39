"""Packs files of documents into Parquet shards, whatever their size, and survives being killed.

    inputs -> parts -> tokenised documents on disk -> one plan of their lengths -> shards

Both long steps are tasks without an order that any worker may take; what each writes depends on
the job alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from packed_attn import __version__
from packed_attn.offline.contents import size_of, stamp_of
from packed_attn.offline.engines import Engine, Task, run_tasks
from packed_attn.offline.files import read_json
from packed_attn.offline.formats import Tokenize, detect_format
from packed_attn.offline.inputs import Bad, Part, find_parts, read_part
from packed_attn.offline.job import (
    INPUT_DIGESTS,
    FolderLock,
    Job,
    TokenizerIdentity,
    changed_inputs,
    open_folder,
)
from packed_attn.offline.manifest import read_manifest, write_manifest
from packed_attn.offline.progress import Progress
from packed_attn.offline.scratch import (
    digest_part,
    document_figures,
    load_tokenizer,
    tokenize_part,
)
from packed_attn.offline.shards import PLAN, save_plan, scratch_source, write_shard
from packed_attn.packing.arguments import check_choice, checked_whole
from packed_attn.packing.plan import Overflow, Strategy, pack_lengths
from packed_attn.packing.prefixes import MIN_SHARED, SharedPrefixes
from packed_attn.packing.sources import learned_in

SHARD_TOKENS = 2**26
PART_BYTES = 2**24


def pack_files(
    inputs: Sequence[str | Path],
    output: str | Path,
    capacity: int,
    *,
    tokenizer: str | None = None,
    strategy: Strategy = "bfd",
    overflow: Overflow = "split",
    seed: int | None = None,
    learnable_only: bool = False,
    share_prefixes: bool = False,
    min_shared: int = MIN_SHARED,
    max_loss: float | None = None,
    multiple: int = 1,
    skip_bad: bool = False,
    workers: int = 1,
    engine: Engine = "local",
    resume: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    part_bytes: int = PART_BYTES,
    progress: bool = False,
) -> dict[str, Any]:
    """Tokenises, plans and writes shards that `datasets.load_dataset("parquet", ...)` reads.

    The shards hold what `pack_dataset` writes. Their bytes, and the manifest's, are the same for
    any number of workers, and after any number of kills and continued runs.

    Memory: a few dozen bytes a document, and per worker the tokens of one batch; tokens lie on
    disk, in the output folder, until the run is done. With `share_prefixes` also 4 bytes for each
    token, and as many for its label, while the packs are planned.

    Args:
        inputs: .jsonl or .parquet files, folders of them, or what `Dataset.save_to_disk` wrote.
            Columns as in `formats`.
        output: the folder, new or empty.
        capacity: tokens a row holds.
        tokenizer: name or folder, for documents that are not tokens already.
        strategy, overflow, seed, max_loss, multiple: as in `pack_lengths`.
        learnable_only: leave out documents of which no token has a label.
        share_prefixes, min_shared: as in `PlanOptions`.
        skip_bad: count records that cannot be read, and leave them out.
        workers: processes (with Ray: tasks at a time); a script that wants several calls this under
            `if __name__ == "__main__":`.
        engine: "local", or "ray" with a folder that all nodes see.
        resume: continue a run that did not end; parts and shards that are whole are kept. Inputs
            that are not what they were are refused: files that nobody wrote to are known at once,
            copies and restored ones are read again.
        shard_tokens: room for tokens in a shard.
        part_bytes: bytes of input that are tokenised at a time.
        progress: show bars on a terminal's stderr.

    Returns:
        The manifest.

    Raises:
        ValueError: inputs, arguments or records that cannot be used; nothing is left behind.
        OSError: the disk is full, or a worker died; what is whole is left, for `resume`.
    """
    check_choice("engine", engine, Engine)
    workers = checked_whole("workers", workers)
    # A plan of nothing: what is wrong with the settings shows before hours of tokenising.
    options: dict[str, Any] = {"strategy": strategy, "overflow": overflow, "seed": seed}
    pack_lengths([], capacity, max_loss=max_loss, multiple=multiple, **options)
    parts = find_parts(inputs, checked_whole("part_bytes", part_bytes))
    paths = list(dict.fromkeys(part.path for part in parts))
    stamps = tuple(map(stamp_of, paths))  # before anything is read
    described = _describe(parts, tokenizer, skip_bad)
    job = Job(
        output=str(output),
        parts=tuple(parts),
        part_bytes=part_bytes,
        inputs=tuple((path, size_of(path)) for path in paths),
        stamps=stamps,
        capacity=capacity,
        **options,
        learnable_only=learnable_only,
        share_prefixes=share_prefixes,
        min_shared=checked_whole("min_shared", min_shared),
        max_loss=max_loss,
        multiple=multiple,
        packs_per_shard=max(1, checked_whole("shard_tokens", shard_tokens) // capacity),
        skip_bad=skip_bad,
        version=__version__,
        **described,
    )
    runner = _Runner(job, workers, engine, progress)
    try:
        with open_folder(job, runner.digests, resume=resume) as lock:
            if lock is None:
                manifest = read_manifest(Path(output))
            else:
                manifest = _run(job, runner, lock)
        shutil.rmtree(job.work, ignore_errors=True)
        return manifest
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space is left for {output}: what is whole is kept; make room and run again with "
            "--resume",
        ) from error


def _run(job: Job, runner: _Runner, lock: FolderLock) -> dict[str, Any]:
    sizes = [part.size for part in job.parts]
    counts = runner.run(tokenize_part, job.tokens_result, "Tokenising", sizes, lock)
    now = [stamp_of(path) for path, _ in job.inputs]
    changed = changed_inputs(job, job.stamps, now, runner.digests, lock)
    if changed:
        raise ValueError(f"input {', '.join(changed)} was changed while it was read: run again")
    plan = _plan(job, counts)
    packs = [
        min(job.packs_per_shard, plan["packs"] - i * job.packs_per_shard)
        for i in range(plan["shards"])
    ]
    shards = runner.run(write_shard, job.shard_result, "Writing", packs, lock)
    digests = job.input_digests([count["digest"] for count in counts])
    return write_manifest(
        Path(job.output),
        {
            "settings": {**job.public_settings(), INPUT_DIGESTS: digests},
            "plan_sha256": plan["digest"],
            "report": plan["report"],
            "unreadable": [place for count in counts for place in count["places"]][:10],
            "shards": shards,
        },
    )


def _plan(job: Job, counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Plans all packs, or reads the plan of the run that is continued."""
    if (job.work / PLAN).exists():
        return read_json(job.work / PLAN)
    lengths, learned = document_figures(job)
    if not lengths.size:
        raise ValueError(f"inputs must hold documents, but {_names(job)} hold none")
    share = SharedPrefixes(scratch_source(job), job.min_shared) if job.share_prefixes else None
    packs = pack_lengths(
        lengths,
        job.capacity,
        strategy=job.strategy,
        overflow=job.overflow,
        learned=learned if job.learnable_only else None,
        seed=job.seed,
        share=share,
        multiple=job.multiple,
    )
    bad, padding = (sum(count[name] for count in counts) for name in ("bad", "padding"))
    in_packs = int(learned[np.unique(packs.order)].sum())
    if packs.trees is not None:
        firsts = packs.trees.parents < 0
        place = packs.order, packs.starts, packs.lengths
        in_packs = learned_in(scratch_source(job), *place, firsts)
    report = replace(
        packs.report,
        documents=packs.report.documents + bad,
        unreadable_documents=bad,
        tokens=packs.report.tokens + padding,
        padding_tokens=padding,
        masked_tokens=packs.report.packed_tokens - in_packs,
    )
    report.require(job.max_loss)
    if not len(packs):
        raise ValueError(f"inputs must hold documents to pack, but nothing is left:\n{report}")
    return save_plan(job, replace(packs, report=report))


class _Runner:
    """Runs what has no result yet, and shows how far it is."""

    def __init__(self, job: Job, workers: int, engine: Engine, progress: bool) -> None:
        self._job, self._workers, self._progress = job, workers, progress
        self._engine: Engine = engine

    def run(
        self,
        task: Task,
        result_of: Callable[[int], Path],
        title: str,
        sizes: Sequence[int],
        lock: FolderLock,
    ) -> list[dict[str, Any]]:
        """The results of all tasks, in their order."""
        tasks = range(len(sizes))
        results = {i: read_json(result_of(i)) for i in tasks if result_of(i).exists()}
        left = [i for i in tasks if i not in results]
        with Progress(title, sizes, before=results, shown=self._progress) as bar:
            for number, result in self._results(task, left, lock):
                results[number] = result
                bar.done(number, result["documents"])
        return [results[i] for i in tasks]

    def digests(self, parts: Sequence[int], lock: FolderLock | None) -> list[str]:
        """Digests of these parts of the inputs as they are now, in their order."""
        results = {}
        sizes = [part.size for part in self._job.parts]
        done = set(range(len(sizes))).difference(parts)
        with Progress("Comparing", sizes, before=done, shown=self._progress) as bar:
            for number, result in self._results(digest_part, parts, lock):
                results[number] = result["digest"]
                bar.done(number, 0)
        return [results[number] for number in parts]

    def _results(
        self, task: Task, numbers: Sequence[int], lock: FolderLock | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        return run_tasks(
            task, self._job, numbers, workers=self._workers, engine=self._engine, lock=lock
        )


def _describe(parts: Sequence[Part], tokenizer: str | None, skip_bad: bool) -> dict[str, Any]:
    """What the first record that can be read says of all, and which tokenizer this is."""
    loaded = None if tokenizer is None else load_tokenizer(tokenizer)
    for place, record in (entry for part in parts for entry in read_part(part)):
        try:
            if isinstance(record, Bad):
                raise ValueError(record.reason)
            kind = detect_format(record)
            tokenize = Tokenize(kind, None if kind == "input_ids" else loaded)
            columns, _ = tokenize(record)
        except ValueError as error:
            if skip_bad:
                continue
            raise ValueError(f"{place}: {error}") from error
        return {
            "kind": kind,
            "columns": tuple(columns),
            "names": tokenize.names,
            "tokenizer": None if kind == "input_ids" else _identity(str(tokenizer), loaded),
        }
    raise ValueError(f"inputs must hold documents, but {parts[0].path} holds none that can be read")


def _identity(name: str, tokenizer: Any) -> TokenizerIdentity:
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = repr(sorted(tokenizer.get_vocab().items()))
    content = repr((text, tokenizer.chat_template, tokenizer.special_tokens_map))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return TokenizerIdentity(name, type(tokenizer).__name__, len(tokenizer), digest)


def _names(job: Job) -> str:
    return ", ".join(os.path.basename(name) for name, _ in job.inputs)
