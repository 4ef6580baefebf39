"""Where tasks run: in this process, in worker processes, or on Ray. The results are the same."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from packed_attn.offline.job import FolderLock, Job
from packed_attn.processes import clean_processes

Engine = Literal["local", "ray"]
Task = Callable[[Job, int], dict[str, Any]]

# What tasks import when they first need it, or Arrow and numba do.
PRELOAD = (
    "packed_attn.offline.pack",
    "packed_attn.packing.compiled",
    "transformers.models.auto.tokenization_auto",
    "pyarrow.parquet",
    "pyarrow.pandas_compat",
    "pandas",
    "numba.typed",
    "scipy.linalg",
)


def run_tasks(
    task: Task,
    job: Job,
    numbers: Sequence[int],
    *,
    workers: int,
    engine: Engine,
    lock: FolderLock | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs `task(job, number)` for each number; gives numbers and results as they are ready.

    Args:
        task: a module-level function.
        lock: held by worker processes as well, each until it is gone.

    Raises:
        OSError: a worker died.
        ImportError: Ray is asked for and not installed.
        Exception: what a task raised; the others are not begun any more.
    """
    if not numbers:
        return iter(())
    if engine == "ray":
        return _on_ray(task, job, numbers, workers)
    if workers == 1:
        return ((number, task(job, number)) for number in numbers)
    return _in_processes(task, job, numbers, min(workers, len(numbers)), lock)


def _in_processes(
    task: Task, job: Job, numbers: Sequence[int], workers: int, lock: FolderLock | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    context = clean_processes(*PRELOAD)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_die_with_parent, initargs=(lock,)
    )
    try:
        futures: dict[Future[dict[str, Any]], int] = {
            pool.submit(task, job, number): number for number in numbers
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker died (killed, or out of memory); what is whole is kept: run again with "
            "--resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _die_with_parent(lock: FolderLock | None) -> None:
    """Ends this worker, and its hold of the lock, when the main process is gone, even killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("this is the main process, which has no parent to follow")

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(
    task: Task, job: Job, numbers: Sequence[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Ray Data maps the task over the numbers; the folder must be one that all nodes see."""
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray: pip install 'packed-attn[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers))
    pool = ray.data.TaskPoolStrategy(size=workers)
    for row in rows.map(_RayTask(task, job), compute=pool).iter_rows():
        if row["kind"]:
            raise OSError(row["errno"], row["text"]) if row["errno"] else ValueError(row["text"])
        yield int(row["number"]), json.loads(row["text"])


class _RayTask:
    """The task, as Ray Data calls it: a row with a number in, a row with its result out.

    What is wrong with the input comes back as a row too: Ray would wrap the exception in its own.
    """

    def __init__(self, task: Task, job: Job) -> None:
        self._task, self._job = task, job

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        try:
            text, kind, code = json.dumps(self._task(self._job, number)), "", 0
        except (ValueError, OSError) as error:
            text, kind = str(error), type(error).__name__
            code = error.errno or errno.EIO if isinstance(error, OSError) else 0
        return {"number": number, "text": text, "kind": kind, "errno": code}
