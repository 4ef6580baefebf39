"""Work in several processes on this machine, for tests."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from packed_attn.offline import engines
from packed_attn.processes import clean_processes


def server() -> ForkServerContext:
    """The context of test processes, whose server has imported what they use.

    Started before any other asks for one (see conftest): the first decides what it imports.
    """
    context = clean_processes(
        *engines.PRELOAD,
        "packed_attn_patches",
        "accelerate",
        "datasets",
        "pytest",
        "torchdata.stateful_dataloader",
        "transformers.trainer",
        "trl",
    )
    forkserver.ensure_running()
    return context


def in_processes(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` returns in each of several gloo processes, by rank."""
    server()
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, folder, work, args)
        mp.start_processes(_process, given, ranks, daemon=True, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _process(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # pytest does not see them to collect
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    dist.barrier()  # work that asks nothing of others may end before they have found this rank
    torch.save(work(*args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
