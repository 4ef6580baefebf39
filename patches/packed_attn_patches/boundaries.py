"""What a batch says of its documents: keyword arguments in, one DocumentLayout out, or a reason.

A forward is packed when its batch says so by any convention in use: `layout`, `cu_seq_lens_q` or
its like, `seq_idx`, a segment mask, or `position_ids` that restart. Every convention that is
present must agree, and what would be left out silently raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from packed_attn.layout import DocumentLayout
from packed_attn_patches.interface import is_empty_mask

# Boundaries that the layout replaces; a layer that still saw them could act on them a second time.
BOUNDARY_NAMES = (
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "cu_seqlens",
    "seq_idx",
    "document_paths",
)

# In the order in which they are believed.
CU_SEQLENS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")

# Read where there is no layout; the mask is read beside one too.
_READ = (*CU_SEQLENS, "seq_idx", "position_ids")

# What tells boundaries elsewhere, and nothing in a forward reads.
_UNREAD = ("seq_lengths", "document_ids", "segment_ids", "cu_seqlens_q", "cu_seqlens_k", "parents")

# transformers 5.24 renamed the argument.
CACHE_NAMES = ("past_key_values", "cache")

# Arguments and outputs that hold a past to go on from.
PASTS = (*CACHE_NAMES, "cache_params", "mems", "state", "rnn_state", "rope_deltas")

NO_PAST = (
    "a packed forward neither goes on from tokens nor fills a cache: generate from documents "
    "alone, or from padded rows"
)


_of_documents_alone: ContextVar[bool] = ContextVar("of_documents_alone", default=False)


@contextmanager
def documents_alone() -> Iterator[None]:
    """Around calls on batches in which each row is one document: inner models look for no
    boundaries, which would wait for the device at every one."""
    token = _of_documents_alone.set(True)
    try:
        yield
    finally:
        _of_documents_alone.reset(token)


@dataclass(frozen=True)
class BatchShape:
    """Shape and device of a forward's tokens."""

    rows: int
    tokens: int
    device: torch.device

    @staticmethod
    def of(kwargs: Mapping[str, Any]) -> BatchShape | None:
        for name in ("input_ids", "inputs_embeds"):
            x = kwargs.get(name)
            if x is not None:
                return BatchShape(x.shape[0], x.shape[1], x.device)
        return None


def rows_and_layout(kwargs: Mapping[str, Any]) -> tuple[int, DocumentLayout] | None:
    """(rows, the layout on the tokens' device) of a packed forward, or None for any other."""
    batch = BatchShape.of(kwargs)
    layout = None if batch is None else packed_layout(batch, kwargs)
    return None if batch is None or layout is None else (batch.rows, layout.to(batch.device))


def packed_layout(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout | None:
    """The layout of a packed forward, or None for one that is not packed.

    Raises:
        ValueError: boundaries that do not cover the tokens or contradict each other, or a packed
            batch beside a KV cache.
        NotImplementedError: under torch.jit.trace.
    """
    if _of_documents_alone.get():
        return None
    if batch.tokens > 1:  # one more token of a generation has little to be read
        kwargs = _on_host(kwargs)
    found = {name: read(batch, kwargs) for name, read in _CONVENTIONS.items()}
    found = {name: layout for name, layout in found.items() if layout is not None}
    if not found:
        _refuse_restarts_of_rotary_ids(kwargs)
        _refuse_unread(kwargs)
        return None
    name, layout = next(iter(found.items()))
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"{name} packs documents, but torch.jit.trace would keep the boundaries of this batch "
            "for all others: use torch.compile"
        )
    _check_total(name, layout, batch)
    _check_rows(name, layout, batch)
    _check_agreement(name, layout, found)
    _check_positions(name, layout, batch, kwargs)
    _check_mask(name, layout, batch, kwargs)
    _check_cache(name, kwargs)
    return layout


def _on_host(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what is going to be read on the CPU: a GPU is waited for once, and not at
    every number that is asked for."""
    mask = {"attention_mask": _plain_mask(kwargs)}
    given = mask if kwargs.get("layout") is not None else {n: kwargs.get(n) for n in _READ} | mask
    # One tensor under two names stays one.
    copies = {id(x): x.cpu() for x in given.values() if isinstance(x, Tensor)}
    return {**kwargs, **{n: copies[id(x)] for n, x in given.items() if id(x) in copies}}


def traced_layout(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout:
    """The layout of a forward that is being recorded: lengths are not read, which would compile
    anew for every batch, and what is to be checked is asserted where the tensors are."""
    layout: DocumentLayout = kwargs["layout"].traced()
    _check_total("layout", layout, batch)
    _check_positions("layout", layout, batch, kwargs)
    _check_cache("layout", kwargs)
    begins = layout.document_ids.view(batch.rows, batch.tokens)[1:, 0]
    before = layout.document_ids.view(batch.rows, batch.tokens)[:-1, -1]
    _assert(begins != before, "layout has a document that crosses from one row to the next")
    _refuse_other_masks("layout", batch, kwargs)
    mask = _plain_mask(kwargs)
    if mask is not None:
        _assert(mask <= 1, "attention_mask has segments beside a layout: leave it out")
        hidden = layout.padding_tokens
        seen = mask != 0 if hidden is None else (mask != 0) | hidden.view_as(mask)
        _assert(seen, "attention_mask hides tokens that are no padding of the layout")
    return layout


def _assert(agree: Tensor, message: str) -> None:
    """Raises on the device, where reading the answer would wait for it or break a graph."""
    torch.ops.aten._assert_async.msg(agree.all(), message)


def _check_total(name: str, layout: DocumentLayout, batch: BatchShape) -> None:
    """Every token is in a document."""
    if layout.total_tokens != batch.rows * batch.tokens:
        raise ValueError(
            f"{name} covers {layout.total_tokens} tokens, but the batch has "
            f"{batch.rows} x {batch.tokens}"
        )


def _check_cache(name: str, kwargs: Mapping[str, Any]) -> None:
    """Nothing came before the documents, and nobody waits for a cache to go on from."""
    cache = next((n for n in PASTS if kwargs.get(n) is not None), None)
    if cache is not None:
        raise ValueError(f"{name} packs documents, but {cache} was given, and {NO_PAST}")


def _from_layout(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout | None:
    return kwargs.get("layout")


def _from_cu_seqlens(
    name: str, batch: BatchShape, kwargs: Mapping[str, Any]
) -> DocumentLayout | None:
    if kwargs.get("layout") is not None or kwargs.get(name) is None:
        return None  # the collator wrote both, and a second reading would wait for the device
    if any(kwargs[name] is kwargs.get(other) for other in CU_SEQLENS[: CU_SEQLENS.index(name)]):
        return None
    return DocumentLayout.from_cu_seqlens(kwargs[name], total_tokens=batch.rows * batch.tokens)


def _from_seq_idx(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout | None:
    if kwargs.get("layout") is not None or kwargs.get("seq_idx") is None:
        return None
    return DocumentLayout.from_document_ids(kwargs["seq_idx"])


def _from_segment_mask(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout | None:
    """An attention_mask of segment numbers, such as 1 1 2 2 2 0."""
    mask = _plain_mask(kwargs)
    if mask is None or mask.dtype == torch.bool or mask.numel() == 0 or float(mask.max()) <= 1:
        return None
    if not bool((mask == mask.long()).all()):
        raise ValueError("attention_mask has numbers above 1 that are no whole ones: of segments?")
    return DocumentLayout.from_attention_mask(mask.long())


def _from_position_ids(batch: BatchShape, kwargs: Mapping[str, Any]) -> DocumentLayout | None:
    """position_ids that restart between two tokens that the mask keeps."""
    position_ids = kwargs.get("position_ids")
    if kwargs.get("layout") is not None or position_ids is None or position_ids.ndim != 2:
        return None
    if kwargs.get("attention_mask") is not None and _plain_mask(kwargs) is None:
        return None  # a mask that is made already says who sees whom, and hides where padding is
    if batch.tokens < 2 or position_ids.shape[1] != batch.tokens:
        return None
    rows = position_ids.expand(batch.rows, -1)
    real = _real_tokens(batch, kwargs)
    restarts = rows[:, 1:] != rows[:, :-1] + 1
    if real is None:
        return DocumentLayout.from_position_ids(rows) if bool(restarts.any()) else None
    # Left padding restarts positions too, but only beside a token that the mask hides.
    if real.shape != rows.shape or not bool((restarts & real[:, 1:] & real[:, :-1]).any()):
        return None
    starts = torch.ones_like(real)
    starts[:, 1:] = (restarts & real[:, 1:]) | (real[:, 1:] != real[:, :-1])
    ids = starts.flatten().cumsum(0).view_as(rows)
    return DocumentLayout.from_document_ids(torch.where(real, ids, -1))


def _refuse_restarts_of_rotary_ids(kwargs: Mapping[str, Any]) -> None:
    """Rotary ids `[3 or 4, B, T]` that go back to 0 may be packs: a guess could leak."""
    ids = kwargs.get("position_ids")
    if ids is None or ids.ndim != 3 or _plain_mask(kwargs) is not None or ids.shape[-1] < 2:
        return
    if bool(((ids[0, :, 1:] == 0) & (ids[0, :, :-1] != 0)).any()):
        raise ValueError(
            f"position_ids of shape {list(ids.shape)} go back to 0, as packed documents do: "
            "give their boundaries as layout, cu_seq_lens_q or seq_idx"
        )


def _refuse_unread(kwargs: Mapping[str, Any]) -> None:
    """Boundaries by names that no model reads: the row would run as one document."""
    name = next((name for name in _UNREAD if kwargs.get(name) is not None), None)
    if name is not None:
        raise ValueError(
            f"the batch tells documents by {name}, which nothing in a forward reads: give their "
            "boundaries as layout, cu_seq_lens_q, seq_idx or position_ids, as PackedCollator does"
        )


# In the order in which they are believed; all that are present must agree.
_CONVENTIONS: dict[str, Callable[[BatchShape, Mapping[str, Any]], DocumentLayout | None]] = {
    "layout": _from_layout,
    **{name: partial(_from_cu_seqlens, name) for name in CU_SEQLENS},
    "seq_idx": _from_seq_idx,
    "attention_mask": _from_segment_mask,
    "position_ids": _from_position_ids,
}


def _plain_mask(kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _real_tokens(batch: BatchShape, kwargs: Mapping[str, Any]) -> Tensor | None:
    mask = _plain_mask(kwargs)
    if mask is None:
        return None
    # A mask may begin with the tokens of a cache.
    return (mask[:, -batch.tokens :] != 0).expand(batch.rows, -1)


def _check_rows(name: str, layout: DocumentLayout, batch: BatchShape) -> None:
    """Documents end at row ends."""
    if batch.rows == 1:
        return
    begins = set(layout.starts) | {layout.total_tokens}
    for row in range(1, batch.rows):
        if row * batch.tokens not in begins:
            raise ValueError(f"{name} has a document that crosses from row {row - 1} to row {row}")
    for d, start in enumerate(layout.starts if layout.is_forest else ()):
        parent = layout.parent(d)
        if parent >= 0 and layout.starts[parent] // batch.tokens != start // batch.tokens:
            raise ValueError(
                f"{name} has document {d} in row {start // batch.tokens}, but what it continues, "
                f"document {parent}, in row {layout.starts[parent] // batch.tokens}"
            )


def _check_agreement(
    name: str, layout: DocumentLayout, found: Mapping[str, DocumentLayout]
) -> None:
    """Every convention that is present tells the same documents."""
    if len(found) == 1:
        return  # lengths that are still on a device would be read for nothing
    lengths = tuple(n for n in layout.lengths if n)
    for other_name, other in found.items():
        if tuple(n for n in other.lengths if n) != lengths:
            raise ValueError(
                f"{other_name} contradicts {name}: documents of {other.lengths} "
                f"and {layout.lengths} tokens"
            )


def _check_mask(
    name: str, layout: DocumentLayout, batch: BatchShape, kwargs: Mapping[str, Any]
) -> None:
    """Only padding is hidden."""
    _refuse_other_masks(name, batch, kwargs)
    mask = _plain_mask(kwargs)
    if mask is None:
        return
    hidden, padding = mask == 0, layout.to(mask.device).padding_tokens
    if padding is not None:
        hidden = hidden & ~padding.view(batch.rows, batch.tokens)
    if bool(hidden.any()):
        raise ValueError(
            f"{name} packs documents, but attention_mask hides tokens that are no padding of it: "
            "mark padding in the layout or leave the mask out"
        )


def _refuse_other_masks(name: str, batch: BatchShape, kwargs: Mapping[str, Any]) -> None:
    """Masks beside boundaries that are no 0/1 for each token: a layout says who sees whom, so they
    would be left out."""
    given = kwargs.get("attention_mask")
    for mask in given.values() if isinstance(given, Mapping) else (given,):
        if not isinstance(mask, Tensor) or is_empty_mask(mask):
            continue
        if mask.ndim == 2 and mask.shape[1] == batch.tokens and mask.shape[0] in (1, batch.rows):
            continue
        raise ValueError(
            f"{name} packs documents of {batch.rows} x {batch.tokens} tokens, but attention_mask "
            f"has shape {list(mask.shape)}: leave out one of the two"
        )


def _check_positions(
    name: str, layout: DocumentLayout, batch: BatchShape, kwargs: Mapping[str, Any]
) -> None:
    """position_ids count as the layout does; padding may count as it likes."""
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.ndim != 2:
        return
    there = layout.to(position_ids.device)
    agree = position_ids == there.position_ids.view(batch.rows, batch.tokens)
    padding = there.padding_tokens
    if padding is not None:
        agree |= padding.view_as(agree)
    message = f"position_ids contradict {name}: positions restart at other tokens"
    if agree.is_cuda or torch.compiler.is_compiling():
        _assert(agree, message)
    elif not bool(agree.all()):
        raise ValueError(message)
