"""Encoder-decoders on packs: source and target documents, each pair run as it would be alone.

A batch packs both sides: `input_ids` with boundaries by any convention in use, and
`decoder_input_ids`, `labels` or both with boundaries by the same names behind `decoder_`:
`decoder_layout`, `decoder_cu_seq_lens_q`, `decoder_seq_idx`, an integer `decoder_attention_mask` or
`decoder_position_ids` that restart. Document d of one side belongs to document d of the other.
The model runs on right-padded batches of pairs of like lengths and its rows are put back, so cross
attention, positions and the shift of labels to decoder inputs never see a neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from packed_attn.buckets import Bucket, Spans, pair_buckets
from packed_attn.collator import IGNORE_INDEX
from packed_attn.host_values import is_padding
from packed_attn.layout import DocumentLayout
from packed_attn_patches.adapters import refuse_adapters
from packed_attn_patches.boundaries import BOUNDARY_NAMES, rows_and_layout
from packed_attn_patches.families import HIDES_PADDING_IDS, Route
from packed_attn_patches.inputs import LayoutHook, named
from packed_attn_patches.unpack import (
    CALL_TOKENS,
    REPLACED,
    PackedCalls,
    UnpackedForward,
    in_rows,
    no_rows,
    plan_on_device,
    put,
    real_rows,
)

DECODER = "decoder_"
_TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


@dataclass(frozen=True)
class PairHook(LayoutHook):
    """The forward pre-hook of an encoder-decoder: one layout for each side, or none for both."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = named(module, args, kwargs)
        if given is None:
            return None
        kwargs = given
        target = {k.removeprefix(DECODER): v for k, v in kwargs.items() if k.startswith(DECODER)}
        if target.get("input_ids") is None and target.get("inputs_embeds") is None:
            target["input_ids"] = kwargs.get("labels")
        sides = {"input_ids": _read("input_ids", kwargs)}
        sides["decoder_input_ids"] = _read("decoder_input_ids", target)
        if all(side is None for side in sides.values()):
            return (), kwargs
        for name, side in sides.items():
            if side is None:
                raise ValueError(_one_sided(name, kwargs))
        if self.code is not None:
            self.code.see(module)
        refuse_adapters(module, same_rows=False)
        return (), _packed(kwargs, *sides.values())  # type: ignore[arg-type]


def _read(name: str, kwargs: Mapping[str, Any]) -> tuple[int, DocumentLayout] | None:
    """Rows and boundaries of one side; errors say which."""
    try:
        return rows_and_layout(kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _one_sided(name: str, kwargs: Mapping[str, Any]) -> str:
    """Why a batch with boundaries on one side alone is refused; `name` is the other."""
    if kwargs.get("encoder_outputs") is not None:
        return (
            "encoder_outputs were made elsewhere, so their documents cannot be told: give "
            "input_ids to a packed forward"
        )
    prefix = DECODER if name.startswith(DECODER) else ""
    return (
        f"the batch packs documents on one side, but tells no boundaries of {name}: give "
        f"{prefix}layout, {prefix}cu_seq_lens_q, {prefix}seq_idx or {prefix}position_ids"
    )


def _packed(
    kwargs: Mapping[str, Any],
    source: tuple[int, DocumentLayout],
    target: tuple[int, DocumentLayout],
) -> dict[str, Any]:
    """The arguments of a packed forward: both layouts in place of what they were read from."""
    _check_pairs(source, target)
    _check_shift(kwargs, target[1])
    gone = {*BOUNDARY_NAMES, *(DECODER + name for name in BOUNDARY_NAMES)}
    packed = {name: value for name, value in kwargs.items() if name not in gone}
    return {**packed, "layout": source[1], "decoder_layout": target[1], "use_cache": False}


def _check_pairs(source: tuple[int, DocumentLayout], target: tuple[int, DocumentLayout]) -> None:
    """Every document has both sides, in the same row."""
    for _, layout in (source, target):
        if layout.is_forest:
            raise NotImplementedError(
                "an encoder-decoder runs on pairs of documents, where a document cannot go on "
                "from another: it takes plain packs, but no forest (parents)"
            )
    a, b = _per_row(*source), _per_row(*target)
    if a != b:
        raise ValueError(
            "input_ids and decoder_input_ids must have the same documents in each row, but "
            f"their rows have {a} and {b} documents"
        )
    lengths = zip(_real_lengths(source[1]), _real_lengths(target[1]))
    for document, pair in enumerate(lengths):
        if 0 in pair and any(pair):
            raise ValueError(
                f"document {document} has {pair[0]} tokens of input_ids and {pair[1]} of "
                "decoder_input_ids: a pair needs both"
            )


def _per_row(rows: int, layout: DocumentLayout) -> list[int]:
    """How many documents each row has, padding not counted."""
    width = layout.total_tokens // rows
    counts = [0] * rows
    for d, start in enumerate(layout.starts):
        if not is_padding(layout, d):
            counts[min(start // width, rows - 1)] += 1
    return counts


def _real_lengths(layout: DocumentLayout) -> list[int]:
    return [n for d, n in enumerate(layout.lengths) if not is_padding(layout, d)]


def _check_shift(kwargs: Mapping[str, Any], target: DocumentLayout) -> None:
    """decoder_input_ids that were shifted over the row hold a label of the document before."""
    ids, labels = kwargs.get("decoder_input_ids"), kwargs.get("labels")
    if ids is None or labels is None:
        return
    ids, labels = ids.flatten(), labels.flatten()
    starts = target.cu_seqlens[:-1].long().to(ids.device)
    ends = target.cu_seqlens[1:].long().to(ids.device) - 1
    real = ends >= starts
    starts, ends = starts[real], ends[real]
    first, own, before = ids[starts], labels[ends], labels[ends].roll(1)
    # Where all begin alike, or with their own last label, a shift over the row changes nothing.
    leaked = (first[1:] == before[1:]) & (first[1:] != own[1:]) & (first[1:] != first[:1])
    message = (
        "decoder_input_ids begin a document with the last label of the document before: they were "
        "shifted over the row; leave them out, and the model shifts the labels of each document"
    )
    if leaked.is_cuda:
        # Checked on the device: reading the answer here would make every step wait for it.
        torch.ops.aten._assert_async.msg(~leaked.any(), message)
    elif bool(leaked.any()):
        raise ValueError(message)


class PairedForward(UnpackedForward):
    """An encoder-decoder's forward that runs packed batches in batches of pairs by length."""

    def entered(
        self,
        *args: Any,
        layout: DocumentLayout | None = None,
        decoder_layout: DocumentLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if layout is None or decoder_layout is None:
            return self.once(args, kwargs)
        return self.run(_Pairs.of(self, layout, decoder_layout, kwargs), kwargs)


@dataclass(frozen=True)
class _Side:
    """One stream: its documents, its shape and the arguments that have a row a token of it."""

    layout: DocumentLayout
    rows: int
    tokens: int
    values: dict[str, Tensor]

    def spans(self) -> Spans:
        """The documents with tokens that are not padding."""
        layout = self.layout
        kept = [d for d, n in enumerate(layout.lengths) if n and not is_padding(layout, d)]
        starts, lengths = np.array(layout.starts, np.int64), np.array(layout.lengths, np.int64)
        return Spans(starts[kept], lengths[kept], layout.total_tokens)

    def put_back(self, name: str, parts: list[tuple[Bucket, Tensor]]) -> Tensor:
        """Bucket rows `[batch, length, ...]` -> `[B, T, ...]`."""
        return in_rows(name, parts, self.layout, self.rows)


@dataclass(frozen=True)
class _Pairs(PackedCalls):
    """One packed forward: both sides, and all arguments that belong to neither."""

    forward: PairedForward
    source: _Side
    target: _Side
    others: dict[str, Any]
    num_items: Any

    @staticmethod
    def of(
        forward: PairedForward,
        layout: DocumentLayout,
        decoder_layout: DocumentLayout,
        kwargs: Mapping[str, Any],
    ) -> _Pairs:
        shaped = [_shape(kwargs, ("input_ids", "inputs_embeds")), _shape(kwargs, _TARGETS)]
        sides = [_Side(x, *s, {}) for x, s in zip((layout, decoder_layout), shaped)]
        others: dict[str, Any] = {"use_cache": False}
        for name, value in kwargs.items():
            if name.removeprefix(DECODER) in (*REPLACED, "position_ids"):
                continue
            side = sides[name.startswith(DECODER) or name in _TARGETS]
            if not isinstance(value, Tensor):
                others[name] = value
            elif value.shape[:2] == (side.rows, side.tokens):
                side.values[name] = value.flatten(0, 1)
            else:
                raise no_rows(name, value, forward.module)
        source, target = sides
        return _Pairs(forward, source, target, others, kwargs.get("num_items_in_batch"))

    def planned(self) -> list[tuple[Bucket, Bucket]]:
        route = self.forward.route
        self.forward.check_text(self.source.values.get("input_ids"), self.source.layout)
        pairs = pair_buckets(
            self.source.spans(),
            self.target.spans(),
            pad_lengths=self._may_pad(),
            call_tokens=1 if route is Route.UNPACK_SINGLE else CALL_TOKENS,
        )
        sides = self.source.layout.device, self.target.layout.device
        moved = [plan_on_device(side, device) for side, device in zip(zip(*pairs), sides)]
        return list(zip(*moved))

    def tokens_in(self, batch: tuple[Bucket, Bucket]) -> int:
        return sum(side.batch * side.length for side in batch)

    def inputs(self, batch: tuple[Bucket, Bucket]) -> dict[str, Any]:
        return {**self.others, **self._source(batch[0]), **self._target(batch[1])}

    def _may_pad(self) -> bool:
        """A token whose whole window is hidden for its ids sees all of a row, padding too."""
        config: Any = self.forward.module.config
        if not self.forward.pads(self.source.layout, self.target.layout):
            return False
        decoder: Any = getattr(config, "decoder", config)
        window = getattr(decoder, "sliding_window", None)
        if config.model_type not in HIDES_PADDING_IDS or not window:
            return True
        values, hidden = self.target.values, (IGNORE_INDEX, self.forward.pad_token_id())
        ids = [values[name] for name in ("labels", "decoder_input_ids") if name in values]
        return not any(_has_run([x == h for h in hidden if h is not None], window) for x in ids)

    def _source(self, bucket: Bucket) -> dict[str, Tensor]:
        inputs = {name: bucket.rows(value) for name, value in self.source.values.items()}
        if bucket.pads is not None:
            inputs["attention_mask"] = real_rows(bucket, self.source.layout.device)
            self._pad("input_ids", inputs, bucket)
        return inputs

    def _target(self, bucket: Bucket) -> dict[str, Tensor]:
        """A decoder is causal: what stands in its padding reaches no document."""
        inputs = {name: bucket.rows(value) for name, value in self.target.values.items()}
        self._pad("decoder_input_ids", inputs, bucket)
        if "labels" in inputs:
            put(inputs["labels"], bucket.pads, IGNORE_INDEX)
        return inputs

    def _pad(self, name: str, inputs: dict[str, Tensor], bucket: Bucket) -> None:
        """Puts padding ids where padding is: some models count their positions by it."""
        if name in inputs:
            put(inputs[name], bucket.pads, self.forward.pad_token_id() or 0)

    def put_back(self, name: str, parts: list[tuple[tuple[Bucket, Bucket], Tensor]]) -> Tensor:
        if name.startswith("encoder_"):
            return self.source.put_back(name, [(source, value) for (source, _), value in parts])
        return self.target.put_back(name, [(target, value) for (_, target), value in parts])

    def lengths(self, batch: tuple[Bucket, Bucket]) -> Tensor:
        return batch[0].rows(self.source.layout.lengths_alone)

    def targets(self, batch: tuple[Bucket, Bucket]) -> Tensor:
        labels = self.target.values["labels"]
        real = batch[1].real(labels.device)[1]
        return (labels.index_select(0, real) != IGNORE_INDEX).sum()


def _has_run(masks: list[Tensor], length: int) -> bool:
    """Whether `length` tokens in a row are in one of the masks bool `[T]`."""
    counts = nn.functional.pad(torch.stack(masks).any(0).cumsum(0), (1, 0))
    return bool((counts[length:] - counts[:-length] == length).any())


def _shape(kwargs: Mapping[str, Any], names: tuple[str, ...]) -> tuple[int, int]:
    shaped = next(kwargs[name] for name in names if kwargs.get(name) is not None)
    return shaped.shape[0], shaped.shape[1]
