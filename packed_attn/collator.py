"""Features to one batch dict: packs or documents become one row with its boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packed_attn.layout import DocumentLayout
from packed_attn.loaders import refuse_undivided_stream, warn_if_repeated
from packed_attn.logps import IGNORE_INDEX

COMPILED_TOKENS = 2**14  # of a batch for which numba, half a second to import, is worth having
LossWeighting = Literal["token", "document"]
# A token is learned where its mask is 1: TRL's names, in the order in which they apply.
LOSS_MASKS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class PackedCollator:
    """Concatenates a batch's features into one row `[1, T]` and says where documents are.

    Args:
        features: what one feature is. `"packs"` (default): documents end to end, with boundaries
            in `seq_lengths` (document lengths, as TRL and `pack_dataset` write them) or in
            `position_ids` that restart at 0; with shared prefixes also in `parents` and `ends`, as
            `pack_dataset` writes them. `"documents"`: one document each (padding-free batches).
        pad_to_multiple_of: pad the row to a multiple of this many tokens.
        capacity: pad the row to this many tokens per feature, so that every batch has one shape.
        pad_token_id: what padding is made of.
        loss_weighting: what the loss is a mean over. `"document"` adds `shift_labels`, int64
            `[1, 1, num_documents]`, 1 where a document has something to learn and else -100, by
            which Trainer counts documents instead of tokens; `PackedLoss` then weighs them.
        align: give each document a multiple of this many tokens as room, padding behind it; packs
            planned with `pack_lengths(align=...)` stay within capacity.
        encoder_decoder: `labels` are documents of a decoder, one for each of `input_ids`, of any
            lengths: a pack has them end to end, with `decoder_seq_lengths`.
        decoder_capacity: pad the labels to this many tokens per feature.
        decoder_start_token_id: also emit `decoder_input_ids`: each document's labels behind this
            token, for losses that are computed outside the model (label smoothing).

    Padding is a document of its own, with labels -100, that sees nothing and is seen by nobody. The
    first label of each document is -100 (with shared prefixes: that of each root), so that the
    shifted loss never crosses a boundary.
    Without `labels`, they are copies of `input_ids`, -100 where a `completion_mask` or
    `assistant_masks` is 0.

    Returns (from a call with a list of mappings):
        `input_ids`, `labels`, `position_ids` int64 `[1, T]`; `cu_seq_lens_q`, `cu_seq_lens_k`
        int32 `[num_documents + 1]`; `max_length_q`, `max_length_k` int; `seq_idx` int32 `[1, T]`;
        `layout`, a `DocumentLayout`. With shared prefixes `document_paths`, int64
        `[1, 2, num_pairs]`, in place of the boundaries that stock attention reads. What only
        `layout` does not say has a first dimension of 1: accelerate cuts every tensor of a stream's
        batch there, also in one process. There is no attention_mask: one of ones beside packed
        positions makes stock transformers leak. Of an encoder-decoder, `labels` int64 `[1, S]`
        keep the first of each document, because a model shifts none of them away, and
        `decoder_layout` says where their documents are.

    Raises (from a call):
        ValueError: a feature without boundaries under `"packs"`, columns of different lengths,
            boundaries that contradict each other, or a pack over capacity.
        NotImplementedError: shared prefixes with `align`.
    """

    features: Literal["packs", "documents"] = "packs"
    pad_to_multiple_of: int | None = None
    capacity: int | None = None
    pad_token_id: int = 0
    loss_weighting: LossWeighting = "token"
    align: int = 1
    encoder_decoder: bool = False
    decoder_capacity: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.loss_weighting not in get_args(LossWeighting):
            raise ValueError(
                f"loss_weighting must be 'token' or 'document', got {self.loss_weighting!r}"
            )
        if self.features not in ("packs", "documents"):
            raise ValueError(f"features must be 'packs' or 'documents', got {self.features!r}")
        if self.encoder_decoder and self.loss_weighting == "document":
            raise ValueError("loss_weighting='document' is of one stream: not of encoder_decoder")
        for name in ("decoder_capacity", "decoder_start_token_id"):
            if getattr(self, name) is not None and not self.encoder_decoder:
                raise ValueError(f"{name} needs encoder_decoder=True")
        for name in ("pad_to_multiple_of", "capacity", "align", "decoder_capacity"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        refuse_undivided_stream()
        warn_if_repeated()
        if self.encoder_decoder:
            return self._pairs(features)
        rows = [self._row(index, feature) for index, feature in enumerate(features)]
        lengths = [n for row in rows for n in row.lengths]
        padding = [flag for r in rows for flag in r.padding or (False,) * len(r.lengths)]
        total = self._padded_length(rows)
        beyond = total - sum(lengths)
        if beyond:
            lengths, padding = [*lengths, beyond], [*padding, True]
        links = _joined_parents(rows, len(lengths))
        layout = DocumentLayout.from_lengths(lengths, parents=links, padding=padding)
        if total >= COMPILED_TOKENS and links is None:
            _number_tokens(layout)
        _ = layout.padding_flags  # which a compiled model reads
        _check_positions(rows, layout)
        input_ids, labels = self._tokens(rows, layout)
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": layout.position_ids[None],
        }
        if layout.is_forest:
            paths = torch.from_numpy(_document_paths(rows, layout))
            counts = _path_counts(paths, labels[0], layout)
            by_document = counts.new_ones(counts.numel()).masked_fill(counts == 0, IGNORE_INDEX)
            every = counts.new_ones(1, int(counts.sum()))
            counted = by_document[None, None] if self.loss_weighting == "document" else every
            return batch | {
                "layout": layout,
                "document_paths": paths[None],
                "shift_labels": counted,
            }
        longest = layout.max_seqlen
        batch |= {
            "cu_seq_lens_q": layout.cu_seqlens,
            "cu_seq_lens_k": layout.cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
            "seq_idx": layout.document_ids[None],
            "layout": layout,
        }
        if self.loss_weighting == "document":
            batch["shift_labels"] = _document_counts(labels[0], layout)[None, None]
        return batch

    def _tokens(self, rows: Sequence[_Row], layout: DocumentLayout) -> tuple[Tensor, Tensor]:
        """input_ids and labels `[1, T]`: one copy a token, which widens narrow ones on the way."""
        total = layout.total_tokens
        input_ids = np.empty(total, np.int64)
        # One place more: where empty documents at the end of the row begin.
        labels = np.empty(total + 1, np.int64)
        at = 0
        for row in rows:
            stop = at + row.input_ids.size
            input_ids[at:stop], labels[at:stop] = row.input_ids, row.labels
            at = stop
        input_ids[at:], labels[at:] = self.pad_token_id, IGNORE_INDEX
        starts = layout.cu_seqlens.numpy()[:-1]
        if layout.is_forest:
            starts = starts[layout.forest_tensors().path_offset.numpy() == 0]
        labels[starts] = IGNORE_INDEX
        return torch.from_numpy(input_ids)[None], torch.from_numpy(labels[:total])[None]

    def _pairs(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of two streams: each is collated as if it were the only one."""
        alone = replace(
            self, encoder_decoder=False, decoder_capacity=None, decoder_start_token_id=None
        )
        targets = replace(alone, capacity=self.decoder_capacity, pad_token_id=IGNORE_INDEX)
        batch = alone([{k: v for k, v in f.items() if k != "labels"} for f in features])
        try:
            target = targets([_target(index, feature) for index, feature in enumerate(features)])
            if self.features == "packs":
                _check_pairs(features)
        except ValueError as error:
            raise ValueError(f"of labels, the input_ids of a decoder: {error}") from None
        batch["labels"], batch["decoder_layout"] = target["input_ids"], target["layout"]
        if self.decoder_start_token_id is not None:
            inputs = batch["labels"].roll(1)
            inputs.masked_fill_(inputs == IGNORE_INDEX, self.pad_token_id)
            starts = target["layout"].document_starts[None]
            batch["decoder_input_ids"] = inputs.masked_fill_(starts, self.decoder_start_token_id)
        return batch

    def _row(self, index: int, feature: Mapping[str, Any]) -> _Row:
        if "input_ids" not in feature:
            raise ValueError(
                f"feature {index} has no input_ids, only {sorted(feature)}: "
                "tokenise the dataset before packing it"
            )
        input_ids = _tokens(index, "input_ids", feature["input_ids"])
        labels = _labels(index, feature, input_ids)
        if self.features == "documents":
            keep = _real_tokens(index, feature, input_ids)
            return self._with_room(_Row(input_ids[keep], labels[keep], (int(keep.sum()),)))
        lengths, position_ids = _boundaries(index, feature, input_ids.size)
        parents, ends = _links(index, feature, len(lengths))
        row = _Row(input_ids, labels, lengths, (), position_ids, parents, ends)
        row = self._with_room(row)
        tokens = row.input_ids.size
        if self.capacity is not None and tokens > self.capacity:
            raise ValueError(
                f"feature {index} has {tokens} tokens, over the capacity {self.capacity}"
            )
        return row

    def _with_room(self, row: _Row) -> _Row:
        """The row with padding behind each document up to a multiple of `align`."""
        if self.align == 1 or not any(n % self.align for n in row.lengths):
            return row
        if row.parents is not None:
            raise NotImplementedError(
                "align gives documents room of their own, which would part a shared prefix from "
                "what continues it: collate packs with shared prefixes without align"
            )
        _check_positions([row], DocumentLayout.from_lengths(row.lengths))
        lengths, padding = [], []
        for n in row.lengths:
            room = -n % self.align
            lengths += [n, room] if room else [n]
            padding += [False, True] if room else [False]
        real = ~np.repeat(padding, lengths)
        input_ids = np.full(real.size, self.pad_token_id)
        labels = np.full(real.size, IGNORE_INDEX)
        input_ids[real], labels[real] = row.input_ids, row.labels
        return _Row(input_ids, labels, tuple(lengths), tuple(padding))

    def _padded_length(self, rows: Sequence[_Row]) -> int:
        total = sum(row.input_ids.size for row in rows)
        if self.capacity is not None:
            if total > self.capacity * len(rows):
                raise ValueError(
                    f"the batch has {total} tokens, over {len(rows)} features "
                    f"of capacity {self.capacity}"
                )
            total = self.capacity * len(rows)
        multiple = self.pad_to_multiple_of or 1
        return -(-total // multiple) * multiple


def _document_counts(labels: Tensor, layout: DocumentLayout) -> Tensor:
    """int64 `[num_documents]`: 1 where a document has a label, else -100."""
    learned = torch.zeros(layout.num_documents, dtype=torch.long)
    learned[layout.document_ids[labels != IGNORE_INDEX].long()] = 1
    return learned.masked_fill(learned == 0, IGNORE_INDEX)


def _target(index: int, feature: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's side of a feature under the names of any other."""
    if feature.get("labels") is None:
        raise ValueError(f"feature {index} has no labels, only {sorted(feature)}")
    target = {"input_ids": feature["labels"]}
    for name in ("seq_lengths", "position_ids"):
        if feature.get(f"decoder_{name}") is not None:
            target[name] = feature[f"decoder_{name}"]
    return target


def _check_pairs(features: Sequence[Mapping[str, Any]]) -> None:
    """Each pack has as many documents on one side as on the other."""
    for index, feature in enumerate(features):
        counts = [
            len(_boundaries(index, side, _tokens(index, "input_ids", side["input_ids"]).size)[0])
            for side in (feature, _target(index, feature))
        ]
        if counts[0] != counts[1]:
            raise ValueError(
                f"feature {index} has {counts[1]} documents, but its input_ids have {counts[0]}"
            )


def _joined_parents(rows: Sequence[_Row], documents: int) -> list[int] | None:
    """Parents in the batch, of padding too; None where no row shares prefixes."""
    if all(row.parents is None for row in rows):
        return None
    parents = np.full(documents, -1)
    at = 0
    for row in rows:
        stop = at + len(row.lengths)
        if row.parents is not None:
            parents[at:stop] = np.where(row.parents < 0, -1, row.parents + at)
        at = stop
    return parents.tolist()


def _document_paths(rows: Sequence[_Row], layout: DocumentLayout) -> NDArray[np.int64]:
    """(document, document of the layout) pairs, int64 `[2, num_pairs]`, documents in order."""
    pairs, at, number = [], 0, 0
    for row in rows:
        ends = np.arange(len(row.lengths)) if row.ends is None else row.ends
        for end in ends.tolist():
            if row.ends is None and row.padding and row.padding[end]:
                continue
            pairs += [(number, piece) for piece in layout.path(at + end)]
            number += 1
        at += len(row.lengths)
    return np.array(pairs, np.int64).reshape(-1, 2).T.copy()


def _path_counts(paths: Tensor, labels: Tensor, layout: DocumentLayout) -> Tensor:
    """int64 `[num_documents]`: how many labels each document has along its path."""
    piece = layout.document_ids[labels != IGNORE_INDEX].long()
    counts = torch.bincount(piece, minlength=layout.num_documents)
    number = int(paths[0, -1]) + 1 if paths.numel() else 0
    return counts.new_zeros(number).index_add(0, paths[0], counts[paths[1]])


def _links(
    index: int, feature: Mapping[str, Any], documents: int
) -> tuple[Integers | None, Integers | None]:
    """`parents` and `ends` of a feature, checked as far as they index."""
    given = {name: feature[name] for name in ("parents", "ends") if feature.get(name) is not None}
    if not given:
        return None, None
    if len(given) < 2:
        raise ValueError(
            f"feature {index} must have parents and ends together, but has {', '.join(given)} "
            "alone: they say how prefixes are shared, so a column of another meaning needs another "
            "name"
        )
    parents, ends = (_tokens(index, name, values) for name, values in given.items())
    if parents.size != documents:
        raise ValueError(
            f"feature {index} has {documents} documents in seq_lengths, but {parents.size} parents"
        )
    if parents.size and not (parents.min() >= -1 and parents.max() < documents):
        raise ValueError(
            f"feature {index} must have parents from -1 to {documents - 1}, got {parents.min()} "
            f"to {parents.max()}"
        )
    if ends.size and not (ends.min() >= 0 and ends.max() < documents):
        raise ValueError(
            f"feature {index} must have ends from 0 to {documents - 1}, got {ends.min()} to "
            f"{ends.max()}"
        )
    return parents, ends


Integers = NDArray[np.integer | np.bool_]


@dataclass(frozen=True, eq=False)
class _Row:
    """One feature, in numpy: its calls on arrays of this size cost a fraction of torch's."""

    input_ids: Integers
    labels: Integers
    lengths: tuple[int, ...]
    padding: tuple[bool, ...] = ()  # of each document; empty is none
    position_ids: Integers | None = None  # as the feature has them, to be compared with `lengths`
    parents: Integers | None = None  # what each document continues, where prefixes are shared
    ends: Integers | None = None  # the document of the row in which each of the data ends


def _tokens(index: int, name: str, values: Any) -> Integers:
    """One-dimensional integers in the type that they have, or int64 of a list."""
    if isinstance(values, Tensor):
        tokens = values.detach().cpu().numpy().ravel()
    else:
        tokens = np.asarray(values).ravel()
    if tokens.dtype.kind in "iub":
        return tokens
    if tokens.size:
        raise ValueError(f"feature {index} must have integers as {name}, got {tokens.dtype}")
    return tokens.astype(np.int64)


def _aligned(index: int, name: str, values: Any, tokens: int) -> Integers:
    column = _tokens(index, name, values)
    if column.size != tokens:
        raise ValueError(
            f"feature {index} has {tokens} input_ids, but {column.size} {name}: "
            "they must be of one length"
        )
    return column


def _labels(index: int, feature: Mapping[str, Any], input_ids: Integers) -> Integers:
    if feature.get("labels") is not None:
        return _aligned(index, "labels", feature["labels"], input_ids.size)
    labels = input_ids
    for name in LOSS_MASKS:
        if feature.get(name) is not None:
            mask = _aligned(index, name, feature[name], input_ids.size)
            labels = np.where(mask == 0, np.int64(IGNORE_INDEX), labels)
    return labels


def _real_tokens(index: int, feature: Mapping[str, Any], input_ids: Integers) -> NDArray[np.bool_]:
    if feature.get("attention_mask") is None:
        return np.ones(input_ids.size, bool)
    return _aligned(index, "attention_mask", feature["attention_mask"], input_ids.size) != 0


def _check_positions(rows: Sequence[_Row], layout: DocumentLayout) -> None:
    """Compares given position_ids with those that the lengths make; rows begin the layout."""
    at, position_ids = 0, layout.position_ids.numpy()
    for index, row in enumerate(rows):
        stop = at + row.input_ids.size
        given = row.position_ids
        if given is not None and (given != position_ids[at:stop]).any():
            positions = DocumentLayout.from_position_ids(_as_tensor(given)).lengths
            raise ValueError(
                f"feature {index} has position_ids that contradict its seq_lengths: "
                f"{positions} and {row.lengths}"
            )
        at = stop


def _number_tokens(layout: DocumentLayout) -> None:
    """Makes the layout's position_ids and document_ids, in one compiled pass."""
    from packed_attn.packing.compiled import number_tokens

    position_ids = np.empty(layout.total_tokens, np.int64)
    document_ids = np.empty(layout.total_tokens, np.int32)
    number_tokens(np.array(layout.lengths), position_ids, document_ids)
    layout._derived["position_ids"] = torch.from_numpy(position_ids)
    layout._derived["document_ids"] = torch.from_numpy(document_ids)


def _as_tensor(integers: Integers) -> Tensor:
    # A copy: torch warns about arrays that may not be written to, such as Arrow's.
    return torch.from_numpy(integers.astype(np.int64))


def _boundaries(
    index: int, feature: Mapping[str, Any], tokens: int
) -> tuple[tuple[int, ...], Integers | None]:
    """Document lengths of one pack, and position_ids that are still to be compared with them."""
    position_ids = None
    if feature.get("position_ids") is not None:
        position_ids = _aligned(index, "position_ids", feature["position_ids"], tokens)
    if feature.get("seq_lengths") is not None:
        lengths = tuple(_tokens(index, "seq_lengths", feature["seq_lengths"]).tolist())
        if sum(lengths) != tokens:
            raise ValueError(
                f"feature {index} has {tokens} input_ids, but seq_lengths add to {sum(lengths)}"
            )
        return lengths, position_ids
    if position_ids is not None:
        return DocumentLayout.from_position_ids(_as_tensor(position_ids)).lengths, None
    raise ValueError(
        f"feature {index} has no boundaries (seq_lengths or position_ids), only "
        f"{sorted(feature)}: without them its documents would see each other. HF Trainer drops "
        "columns that the model's forward does not name; pack_dataset writes position_ids, "
        "which survive. If each feature is one document, use PackedCollator('documents')"
    )
