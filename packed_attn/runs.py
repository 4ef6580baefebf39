"""Where documents begin in rows of positions or of numbers of documents."""

from __future__ import annotations

import torch
from torch import Tensor


def integer_rows(ids: Tensor, name: str) -> Tensor:
    """`[T]` or `[B, T]` integers as int64 `[B, T]`: narrow types would wrap around."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape [T] or [B, T], got {list(ids.shape)}")
    return (ids if ids.ndim == 2 else ids[None]).long()


def starts_of_counts(rows: Tensor) -> Tensor:
    """bool `[B, T]`: where the count of position ids begins again, and where a row begins.

    Raises:
        ValueError: a negative position, or a document that does not count up from 0.
    """
    if (rows < 0).any():
        raise ValueError(f"position_ids must not be negative, got {int(rows.min())}")
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1] + 1
    wrong = (starts & (rows != 0)).nonzero()
    if wrong.numel():
        row, column = wrong[0].tolist()
        raise ValueError(
            "position_ids must count up from 0 inside each document, "
            f"but row {row} has position {int(rows[row, column])} at token {column} "
            "where a document begins or the count jumps"
        )
    return starts


def starts_of_runs(rows: Tensor, name: str) -> Tensor:
    """bool `[B, T]`: where a run of equal values begins.

    Raises:
        ValueError: a value that is not negative and comes back in a row after another one.
    """
    starts = torch.ones_like(rows, dtype=torch.bool)
    starts[:, 1:] = rows[:, 1:] != rows[:, :-1]
    for r, row in enumerate(rows):
        heads = row[starts[r]]
        values, counts = heads[heads >= 0].unique(return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{name} must name contiguous tokens, "
                f"but row {r} has {int(values[counts > 1][0])} in several places"
            )
    return starts
