"""Processes that start clean."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def clean_processes(*preload: str) -> ForkServerContext:
    """A context whose processes are forked from a server without threads.

    A fork of this process would have its locks as they are and none of the threads that hold them:
    a child then waits for ever, once in many thousand starts. The server is one for the whole
    process; it imports `preload` when it starts, so that a child costs a fraction of a second.

    Args:
        preload: modules; those that cannot be imported are left to the child.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context
