"""Work on many model types, each in a child process with a memory limit and a time limit.

A model of an untried type may ask for more memory than there is, hang, or change transformers'
state; in a child it can do neither harm nor wrong to the next one. Children start from a server
that has imported transformers already, so one costs a fraction of a second.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from packed_attn.processes import clean_processes

GIGABYTE = 1 << 30


def in_children(
    function: Callable[..., Any],
    items: Sequence[tuple[Any, ...]],
    *,
    processes: int = 2,
    memory: int = 8 * GIGABYTE,
    seconds: float = 300,
) -> Iterator[Any]:
    """`function(*item)` of each item in a process of its own.

    Args:
        function: a module-level function; what it takes and returns must pickle.
        processes: how many run at a time.
        memory: bytes of address space of each child.
        seconds: after which a child is ended.

    Yields:
        the result for each item, in their order, or the `ChildFailed` that it ended in.
    """
    context = clean_processes("packed_attn_patches")

    def one(item: tuple[Any, ...]) -> Any:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_run, args=(theirs, memory, function, item), daemon=True)
        child.start()
        theirs.close()
        try:
            return _received(ours, seconds)
        finally:
            child.kill()
            child.join()

    with ThreadPoolExecutor(processes) as pool:
        yield from pool.map(one, items)


class ChildFailed(Exception):
    """A child process that raised, died or took too long; the message says which."""


def _received(connection: Any, seconds: float) -> Any:
    if not connection.poll(seconds):
        return ChildFailed(f"no result after {seconds:g} s")
    try:
        return connection.recv()
    except EOFError:
        return ChildFailed("the process died without a word")


def _run(connection: Any, memory: int, function: Callable[..., Any], item: tuple[Any, ...]) -> None:
    """In the child: the limit first, then the work; any failure becomes the result."""
    import torch

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    torch.set_num_threads(1)
    try:
        result = function(*item)
    except BaseException as error:  # whatever ends a child is what its parent wants to know
        result = ChildFailed(f"{type(error).__name__}: {error}")
    connection.send(result)
