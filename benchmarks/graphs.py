"""CUDA graphs of calls: what is timed then are kernels, not the Python that starts them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

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
            RuntimeError: the call waits for the device, or does what else a capture forbids.
        """
        self.run(lambda: [call() for _ in range(WARMUP)])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self._pool)
            try:
                call()
            except BaseException:
                with suppress(RuntimeError):
                    graph.capture_end()
                _renew_generator()
                raise
            graph.capture_end()
        torch.cuda.synchronize()
        return graph.replay

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
