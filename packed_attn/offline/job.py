"""One run of the offline packer: what it was asked for, and what its folder holds.

    out/
      train-00000-of-00012.parquet   shards of packs, under their names once they are whole
      manifest.json                  the last thing written: the run is done
      .packing/                      gone when the run is done
        job.json                     the first thing written: what was asked for
        lock
        tokens-00000.arrow, .json    documents of one part of the input, tokenised
        plan-order.npy, ..., plan.json
        shard-00000.json             sha256 and counts of a shard that is whole

Every result is a JSON file, written last: what has none is done again.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from packed_attn.offline.contents import joint_digest, same_stamp
from packed_attn.offline.files import read_json, remove_temporary_files, write_json
from packed_attn.offline.formats import Format
from packed_attn.offline.inputs import Part
from packed_attn.packing.plan import Overflow, Strategy

MANIFEST = "manifest.json"
WORK = ".packing"
LOCK_SECONDS = 10.0  # a killed run's workers notice within a fraction of one
INPUT_DIGESTS = "input_sha256"  # of the settings in a manifest


@dataclass(frozen=True)
class TokenizerIdentity:
    """What tells a tokenizer from another: its name, and a hash of all that decides its tokens."""

    name: str
    kind: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Job:
    """What a run was asked for: all that its output depends on, and where it goes.

    Attributes:
        output: the folder.
        parts: stretches of the inputs, tokenised one at a time.
        part_bytes: bytes of input in a part.
        inputs: name and bytes of each input; stamps: what changes when one does (`contents`).
        kind: what the records are.
        columns: columns of tokens that documents have; names: those that records must have.
        tokenizer: None where documents are tokens already.
        capacity, strategy, overflow, seed, max_loss, multiple: as in `pack_lengths`.
        learnable_only: whether documents of which no token has a label are left out.
        share_prefixes, min_shared: whether documents that begin alike share those tokens, and how
            many that must save.
        packs_per_shard: packs in every shard but the last.
        skip_bad: whether records that cannot be read are counted and left out.
        version: of packed-attn.
    """

    output: str
    parts: tuple[Part, ...]
    part_bytes: int
    inputs: tuple[tuple[str, int], ...]
    stamps: tuple[str | None, ...]
    kind: Format
    columns: tuple[str, ...]
    names: tuple[str, ...] | None
    tokenizer: TokenizerIdentity | None
    capacity: int
    strategy: Strategy
    overflow: Overflow
    seed: int | None
    learnable_only: bool
    share_prefixes: bool
    min_shared: int
    max_loss: float | None
    multiple: int
    packs_per_shard: int
    skip_bad: bool
    version: str

    @property
    def work(self) -> Path:
        return Path(self.output) / WORK

    def tokens_file(self, part: int) -> Path:
        return self.work / f"tokens-{part:05}.arrow"

    def tokens_result(self, part: int) -> Path:
        return self.work / f"tokens-{part:05}.json"

    def shard_result(self, shard: int) -> Path:
        return self.work / f"shard-{shard:05}.json"

    def settings(self) -> dict[str, Any]:
        """The job as JSON reads it back, without the folder, which may be moved."""
        lists = {"parts": [asdict(part) for part in self.parts]}
        lists |= {"inputs": [list(entry) for entry in self.inputs], "columns": list(self.columns)}
        lists |= {"stamps": list(self.stamps)}
        names = None if self.names is None else list(self.names)
        tokenizer = None if self.tokenizer is None else asdict(self.tokenizer)
        settings = {**vars(self), **lists, "names": names, "tokenizer": tokenizer}
        del settings["output"]
        return settings

    def public_settings(self) -> dict[str, Any]:
        """What the manifest says of the job: nothing that another machine would say otherwise."""
        settings = self.settings()
        for name in ("parts", "stamps", "names", "max_loss"):
            del settings[name]
        settings["inputs"] = [[Path(name).name, size] for name, size in self.inputs]
        return settings

    def input_digests(self, digests: Sequence[str]) -> list[str]:
        """A digest for each input, of those of all parts."""
        of_parts = [(part.path, digest) for part, digest in zip(self.parts, digests)]
        return [joint_digest(d for path, d in of_parts if path == name) for name, _ in self.inputs]


def shard_name(shard: int, shards: int) -> str:
    """`train-00003-of-00012.parquet`, which `datasets.load_dataset` takes for the train split."""
    return f"train-{shard:05}-of-{shards:05}.parquet"


# Digests of parts, by their numbers: `contents.digest_of`.
Digests = Callable[[Sequence[int], "FolderLock | None"], list[str]]


@contextmanager
def open_folder(job: Job, digests: Digests, *, resume: bool) -> Iterator[FolderLock | None]:
    """Takes the output folder for this run alone; None where the run is done already.

    If the run is refused for what it was given (a ValueError), whatever runs of this job made is
    removed. If it breaks down otherwise, what is whole stays for `resume`.

    Args:
        digests: reads parts of the inputs again, where nothing quicker tells what is in them.

    Raises:
        ValueError: a folder that holds something else, a run that has not ended (without `resume`)
            or was asked for something else (with it), or in which another run is at work.
    """
    folder = Path(job.output)
    _check_folder(folder, resume)
    if (folder / MANIFEST).exists():
        before = read_json(folder / MANIFEST).get("settings", {})
        known = before.get(INPUT_DIGESTS)
        _check_same(before, {**job.public_settings(), INPUT_DIGESTS: known}, job)
        now = job.input_digests(digests(range(len(job.parts)), None))
        _refuse_changed(job, [name for (name, _), a, b in zip(job.inputs, known, now) if a != b])
        yield None
        return
    made = not folder.exists()
    job.work.mkdir(parents=True, exist_ok=True)
    with _locked(job.work / "lock") as lock:
        note = job.work / "job.json"
        before = read_json(note) if note.exists() else None
        if before is not None:
            _check_same(before, {**job.settings(), "stamps": before.get("stamps")}, job)
            _refuse_changed(job, changed_inputs(job, before["stamps"], job.stamps, digests, lock))
        if before != job.settings():
            write_json(note, job.settings())
        remove_temporary_files(folder)
        remove_temporary_files(job.work)
        try:
            yield lock
        except ValueError:
            _remove_run(folder, made)
            raise


def changed_inputs(
    job: Job,
    before: Sequence[str | None],
    now: Sequence[str | None],
    digests: Digests,
    lock: FolderLock | None,
) -> list[str]:
    """Inputs that are not what the parts which are tokenised were read from.

    Parts that are not tokenised yet may be others: then all come from what is there now.

    Args:
        before, now: stamps of the inputs.
    """
    same = {
        path: same_stamp(old, new)
        for (path, _), old, new in zip(job.inputs, before, now, strict=True)
    }
    doubtful = [
        number
        for number, part in enumerate(job.parts)
        if not same[part.path] and job.tokens_result(number).exists()
    ]
    changed = [
        job.parts[number].path
        for number, digest in zip(doubtful, digests(doubtful, lock))
        if digest != read_json(job.tokens_result(number))["digest"]
    ]
    return list(dict.fromkeys(changed))


def _refuse_changed(job: Job, inputs: list[str]) -> None:
    if inputs:
        raise ValueError(
            f"output {job.output} holds a run that read other contents of {', '.join(inputs)}: "
            "give it what that run was given, or another folder"
        )


def _check_folder(folder: Path, resume: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output {folder} must be a folder, but it is a file")
    names = {path.name for path in folder.iterdir()}
    ours = WORK in names or MANIFEST in names
    if names and not ours:
        raise ValueError(
            f"output {folder} must be empty or hold a run of this command, but it holds "
            f"{', '.join(sorted(names)[:3])}"
        )
    if MANIFEST in names and not resume:
        raise ValueError(f"output {folder} holds a finished run: give another folder or remove it")
    if (folder / WORK / "job.json").exists() and not resume:
        raise ValueError(
            f"output {folder} holds a run that has not ended: continue it with --resume, or remove "
            "the folder"
        )


def _check_same(before: dict[str, Any], now: dict[str, Any], job: Job) -> None:
    """Refuses to continue a run that was asked for something else."""
    unknown = [name for name in now if name not in before]
    if unknown:
        raise ValueError(
            f"output {job.output} holds a run of another version of packed-attn, which did not "
            f"note {', '.join(unknown)}: give another folder, or remove this one"
        )
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        raise ValueError(
            f"output {job.output} holds a run with other {', '.join(other)}: give it what that run "
            "was given, or another folder"
        )


@dataclass(frozen=True)
class FolderLock:
    """The right to write a folder: held until this process, and all it was given to, are gone.

    It is given as an argument of a process that starts; no other way pickles it.
    """

    descriptor: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _given, (DupFd(self.descriptor),)


def _given(duplicate: Any) -> FolderLock:
    return FolderLock(duplicate.detach())


@contextmanager
def _locked(path: Path) -> Iterator[FolderLock]:
    """Holds a lock that dies with this process and the workers that it was given to."""
    with open(path, "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"output {path.parents[1]} is being written by another run"
                    ) from None
                time.sleep(0.02)
        yield FolderLock(file.fileno())


def _remove_run(folder: Path, made: bool) -> None:
    """Removes the run's files, and the folder if the run made it."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    for path in folder.glob("train-*-of-*.parquet"):
        path.unlink(missing_ok=True)
    remove_temporary_files(folder)
    if made:
        folder.rmdir()
