"""CUDA graphs of calls: what is timed then are kernels, not the Python that starts them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

WARMUP = 2


class Capture:
    """Captures calls on one side stream into graphs that share one pool of memory.

    Nobody may read what a captured call has made: the next graph writes over it. Autograd runs a
    backward on the streams of its forward, so the forward of a captured backward belongs on
    `stream` too.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a replay of the kernels that it launches.

        `torch.cuda.graph` is not used: it empties the allocator's cache at each capture, and after
        one that fails it leaves the side stream the current one.

        Raises:
            RuntimeError: the call waits for the device, or does what else a capture forbids, or a
                replay does not make anew what the call returned, a tensor or several.
        """
        self.run(lambda: [call() for _ in range(WARMUP)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool)
            try:
                result = call()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                _renew_generator()
                raise
            graph.capture_end()
        self._check(graph, result)
        return graph.replay

    def _check(self, graph: torch.cuda.CUDAGraph, result: object) -> None:
        """A kernel that went to another stream ran once and is not in the graph."""
        several = result if isinstance(result, tuple | list) else (result,)
        tensors = [x.detach() for x in several if isinstance(x, Tensor)]
        for x in tensors:
            x.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        if not all(bool(x.isfinite().all()) for x in tensors):
            raise RuntimeError("the graph does not hold all that the call ran")

    def run(self, call: Callable[[], object]) -> object:
        """What a call gives that ran on the side stream, with all its work done."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            result = call()
        torch.cuda.synchronize()
        return result


def _renew_generator() -> None:
    """A failed capture leaves torch's generator waiting for the capture's end, and random numbers
    would raise ever after."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    with suppress(RuntimeError):  # what the capture stumbled over is the error to tell
        generator.graphsafe_set_state(torch.Generator(generator.device).graphsafe_get_state())
