"""Dropout of attention weights by a counter: what a seed drops, and nothing else decides.

The weight of (head h, query token i, key token j) draws the first word r of

    Philox4x32-10, key = (low, high 32 bits of the seed), counter = (i, j, h, 0)

and is kept, scaled by 1 / (1 - dropout_p), if and only if r >= threshold(dropout_p). i and j count
tokens of the packed stream: what a neighbour holds changes no draw, and every backend, forward and
backward, draws the same.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def keep(seed: Tensor, i: Tensor, j: Tensor, h: Tensor, dropout_p: float) -> Tensor:
    """Which weights are kept, bool, in the shape to which i, j and h broadcast.

    Args:
        seed: int64 `[1]`.
        i, j: int64, query and key tokens of the packed stream.
        h: int64, query heads.
        dropout_p: in [0, 1).
    """
    key = (seed & WORD, (seed >> 32) & WORD)
    return philox(key, (i, j, h, torch.zeros_like(seed)))[0] >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """The smallest word that keeps a weight: `dropout_p * 2^32`, rounded, and a word itself."""
    return min(round(dropout_p * 2**32), WORD)


def drawn_seed(device: torch.device) -> Tensor:
    """int64 `[1]` from the device's default generator: legal in a CUDA graph, and the same again
    where activation checkpointing restores the generator's state."""
    return torch.randint(2**63 - 1, (1,), device=device)


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox4x32-10. All words are int64 in [0, 2^32), and broadcast:
    the first two rounds then cost no more than the vectors that they read."""
    c0, c1, c2, c3 = counter
    for r in range(ROUNDS):
        k0, k1 = ((k + r * step) & WORD for k, step in zip(key, KEY_STEPS))
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product. int64 wraps around, which changes none of its bits."""
    product = word * multiplier
    return (product >> 32) & WORD, product & WORD
