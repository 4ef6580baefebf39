"""Checks of what `pack_lengths` is given: each error names the argument, the rule and the value."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from packed_attn.packing.best_fit import INT64_MAX


def checked_whole(argument: str, value: Any, least: int = 1) -> int:
    """`value` as an int of at least `least` and below 2^62."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = None
    if whole is None or isinstance(value, bool | np.bool_):
        raise ValueError(f"{argument} must be an integer, got {value!r}")
    if not least <= whole <= INT64_MAX // 2:
        raise ValueError(f"{argument} must be at least {least} and below 2^62, got {whole}")
    return whole


def check_choice(argument: str, value: Any, choices: Any) -> None:
    """Refuses a value that the `Literal` type `choices` does not list."""
    if value not in get_args(choices):
        names = ", ".join(repr(name) for name in get_args(choices))
        raise ValueError(f"{argument} must be one of {names}, got {value!r}")


def check_share(argument: str, value: Any) -> None:
    """Refuses anything but None and a number from 0 to 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{argument} must be a share from 0 to 1 or None, got {value!r}")


def checked_lengths(lengths: Any) -> NDArray[np.int64]:
    """The lengths as int64 `[num_documents]`, or a ValueError that names the first bad one."""
    array = _integers("lengths", lengths)
    if not array.size:
        return np.empty(0, np.int64)
    if array.min() < 0:
        document = int(np.argmax(array < 0))
        raise ValueError(
            f"lengths must not be negative, but lengths[{document}] is {array[document]}"
        )
    # The first test is free; the second sums exactly, and only when the first cannot rule it out.
    if int(array.max()) * array.size > INT64_MAX and sum(array.tolist()) > INT64_MAX // 2:
        raise ValueError("lengths must add to less than 2^62 tokens, but they add to more")
    return array.astype(np.int64, copy=False)


def checked_column(argument: str, values: Any, documents: int) -> NDArray[np.int64]:
    """One integer a document, as int64 `[num_documents]`."""
    array = _integers(argument, values)
    if array.size != documents:
        raise ValueError(
            f"{argument} must have one entry a document, but has {array.size} for {documents}"
        )
    return array.astype(np.int64, copy=False)


def _integers(argument: str, values: Any) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{argument} must be one-dimensional: {error}") from error
    if array.ndim != 1:
        raise ValueError(f"{argument} must be one-dimensional, got shape {array.shape}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(_non_integer(argument, values, array.dtype))
    return array


def _non_integer(argument: str, values: Sequence[Any], dtype: np.dtype) -> str:
    for document, value in enumerate(values):
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            return f"{argument} must be integers, but {argument}[{document}] is {value!r}"
    return f"{argument} must be integers that fit in 64 bits, got an array of {dtype}"
