"""What this GPU reaches at best: a dense product of large bf16 matrices, and a copy of memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from benchmarks.timing import paired_milliseconds

ROUNDS, WARMUP = 15, 20  # an idle card first has to raise its clocks
SIZE, BYTES = 8192, 2**30


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s of the product; TB/s of the copy, what it reads and what it writes together."""

    product_tflops: float
    copy_tb_s: float


def measured_ceilings(device: str, size: int = SIZE, copied: int = BYTES) -> Ceilings:
    """Medians of `ROUNDS`, taken in turns.

    Args:
        size: rows and columns of both factors, which do not fit the cache at the default.
        copied: bytes that the copy reads.
    """
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(copied, device=device, dtype=torch.uint8)
    product, copy = torch.empty_like(left), torch.empty_like(source)
    milliseconds = paired_milliseconds(
        {
            "product": lambda _: torch.mm(left, right, out=product),
            "copy": lambda _: copy.copy_(source),
        },
        device,
        ROUNDS,
        WARMUP,
    )
    median = {name: statistics.median(times) for name, times in milliseconds.items()}
    return Ceilings(
        product_tflops=2 * size**3 / median["product"] / 1e9,
        copy_tb_s=2 * copied / median["copy"] / 1e9,
    )
