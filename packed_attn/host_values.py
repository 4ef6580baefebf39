"""Values that callers give per document, checked and brought to the host."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from packed_attn.layout import DocumentLayout


def to_list(values: Iterable[Any] | Tensor, name: str) -> list[Any]:
    """A one-dimensional tensor or anything iterable as a list."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {list(values.shape)}")
        return values.tolist()
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} must be one-dimensional, got {values!r}")
    return list(values)


def whole_numbers(values: Sequence[int] | Tensor, name: str) -> list[int]:
    """Integers of any type as Python's; a ValueError names what is none."""
    host = to_list(values, name)
    if set(map(type, host)) <= {int}:
        return host
    for value in host:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be integers, got {value!r}")
    return [operator.index(value) for value in host]


def host_prefix(prefix_lengths: Sequence[int] | Tensor | None) -> list[int] | Tensor | None:
    """A tensor as it is, which may be on a device; anything else as integers."""
    if prefix_lengths is None or isinstance(prefix_lengths, Tensor):
        return prefix_lengths
    return whole_numbers(prefix_lengths, "prefix_lengths")


def host_parents(parents: Sequence[int] | Tensor | None, documents: int) -> list[int] | None:
    """One integer a document; None stays None."""
    if parents is None:
        return None
    host = whole_numbers(parents, "parents")
    if len(host) != documents:
        raise ValueError(f"parents has {len(host)} entries for {documents} documents")
    return host


def is_padding(layout: DocumentLayout, document: int) -> bool:
    """Whether a document is padding, read on the host."""
    padding = layout.to("cpu").padding
    return padding is not None and bool(padding[document])


def host_padding(padding: Sequence[bool] | Tensor | None, documents: int) -> list[bool] | None:
    """None when nothing is padding."""
    if padding is None:
        return None
    host = to_list(padding, "padding")
    for value in host if not set(map(type, host)) <= {bool} else ():
        if value not in (False, True):
            raise ValueError(f"padding must be booleans, got {value!r}")
    if len(host) != documents:
        raise ValueError(f"padding has {len(host)} entries for {documents} documents")
    return [bool(value) for value in host] if any(host) else None


def check_padding_stands_alone(parents: list[int], padding: list[bool] | None) -> None:
    """Padding inside a tree would count in the positions of its subtree, yet nobody sees it."""
    for d, p in enumerate(parents if padding is not None else ()):
        if p >= 0 and padding is not None and (padding[d] or padding[p]):
            which = d if padding[d] else p
            raise ValueError(
                f"padding must be a root without children, but document {which} is padding "
                f"and parents[{d}] is {p}"
            )
