"""Work in several gloo processes on this machine, for tests."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(ranks: int, work: Callable[..., None], *args: Any) -> list[Any]:
    """What `work(*args)` returns in each of several gloo processes, by rank.

    Forked: importing everything again would take longer than the tests.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (ranks, folder, work, args), ranks, start_method="fork")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _process(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    torch.save(work(*args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
