"""What a layout keeps of what follows from it: numbering, keys, and how facts move to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packed_attn.trees import ForestTensors
from packed_attn.visibility import Visibility

# Documents shorter than this on average are cheaper to number all at once than one by one.
SHORT = 128


def count_up(lengths: tuple[int, ...], total: int) -> NDArray[np.int64]:
    """0, 1, 2, ... for each document, end to end: int64 `[total]`."""
    if total > SHORT * len(lengths):
        longest = np.arange(max(lengths))
        return np.concatenate([longest[:n] for n in lengths])
    token = np.arange(total)
    starts = np.cumsum(np.asarray(lengths, np.int64)) - lengths
    return token - np.repeat(starts, lengths)


def sent(x: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """`x` on `device`; what a GPU gets from the host it gets in its turn, and nothing waits.

    A CUDA graph would copy from the same place of the host again, whatever is there by then: in a
    capture the copy is one that waits, which CUDA refuses.
    """
    up = x.device.type == "cpu" and device.type == "cuda"
    if not up or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return x.to(device, non_blocking=non_blocking)
    return x.pin_memory().to(device, non_blocking=True)


def holds_tensor(part: Any) -> bool:
    """Whether a part of a key is a caller's tensor, as `prefix_key` makes one."""
    return isinstance(part, tuple) and any(isinstance(x, Tensor) for x in part)


def own_facts(derived: Mapping[Any, Any], layouts: type) -> Iterator[tuple[Any, Any]]:
    """What follows from a layout alone: no copies elsewhere, nothing of a caller's tensor or of
    another of `layouts`."""
    for key, value in derived.items():
        parts = (key,) if isinstance(key, str) else key
        others = any(isinstance(part, layouts) or holds_tensor(part) for part in parts)
        if parts[0] != "to" and not others:
            yield key, value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A derived fact with its tensors mapped; facts of the host as they are.

    What backends derived from a mask stays behind: it is of the tensors that the mask had.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Visibility | ForestTensors):
        columns = {f.name: getattr(value, f.name) for f in fields(value)}
        mapped: dict[str, Any] = {
            k: function(x) for k, x in columns.items() if isinstance(x, Tensor)
        }
        if isinstance(value, Visibility):
            mapped["_derived"] = {}
        return replace(value, **mapped)
    return value


def prefix_key(prefix_lengths: Sequence[int] | Tensor | None) -> Any:
    """What stands for these prefixes in a cache: their values, or a tensor as it is now."""
    if prefix_lengths is None:
        return None
    if isinstance(prefix_lengths, Tensor):
        # The key keeps the tensor alive, and its version tells when it was written to. One of
        # inference mode has no version: it is never known to be the same.
        is_known = not prefix_lengths.is_inference()
        return prefix_lengths, prefix_lengths._version if is_known else object()
    return tuple(prefix_lengths)
