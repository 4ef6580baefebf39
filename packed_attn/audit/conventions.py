"""Which boundaries an audited batch carries, and in which mode the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packed_attn.layout import DocumentLayout

# Tokens of padding behind each row of a padded batch.
TAIL = 7
_CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Convention:
    """One way in which a batch may tell its documents.

    Attributes:
        columns: what the batch carries beside input_ids, by the names of `_columns`.
        rows: rows of the batch; documents end at row ends.
        tail: tokens of padding behind each row, hidden by the mask where there is one.
        use_cache: passed on; None leaves it at the model's default.
        training: whether the model runs in train mode.
        checkpointing: whether it runs with gradient checkpointing.
    """

    columns: tuple[str, ...]
    rows: int = 1
    tail: int = 0
    use_cache: bool | None = None
    training: bool = False
    checkpointing: bool = False


CONVENTIONS: dict[str, Convention] = {
    "packed batch": Convention(("position_ids", *_CU_SEQ_LENS, "seq_idx", "layout")),
    "position_ids, no cache": Convention(("position_ids",), use_cache=False),
    "position_ids": Convention(("position_ids",)),
    "position_ids and a mask of ones": Convention(("position_ids", "attention_mask")),
    "cu_seq_lens": Convention(("position_ids", *_CU_SEQ_LENS), use_cache=False),
    "cu_seq_lens and seq_idx": Convention(
        ("position_ids", *_CU_SEQ_LENS, "seq_idx"), use_cache=False
    ),
    "segment mask": Convention(("segment_mask",)),
    "two rows": Convention(("position_ids",), rows=2, use_cache=False),
    "padded tail": Convention(("position_ids", "attention_mask"), tail=TAIL),
    "train mode": Convention(("position_ids",), training=True),
    "checkpointing": Convention(("position_ids",), training=True, checkpointing=True),
    "no boundaries": Convention(()),
}
# What a matrix shows: every convention that tells the documents.
TELLING = tuple(name for name in CONVENTIONS if name != "no boundaries")


class Pair(NamedTuple):
    """A document of an encoder-decoder, int64 `[length]` each."""

    source: Tensor
    target: Tensor


Document = Tensor | Pair


@dataclass(frozen=True)
class AuditBatch:
    """One packed batch.

    Attributes:
        kwargs: what the model is called with.
        layout: its documents, of the batch's `rows * tokens` tokens, on the CPU.
        rows, tokens: shape of input_ids.
        places: for each document given, its index in `layout`.
        target: of an encoder-decoder, the decoder's stream; the other fields are of the encoder's.
    """

    kwargs: dict[str, Any]
    layout: DocumentLayout
    rows: int
    tokens: int
    places: tuple[int, ...]
    target: AuditBatch | None = None

    @property
    def output(self) -> AuditBatch:
        """The stream whose tokens have outputs."""
        return self.target or self

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each document given, in the stream of tokens."""
        starts, lengths = self.layout.starts, self.layout.lengths
        return [(starts[p], starts[p] + lengths[p]) for p in self.places]


def packed_batch(
    documents: Sequence[Document], filler: Tensor, pad_token: int, convention: Convention
) -> AuditBatch:
    """The batch of `documents` by `convention`.

    Args:
        documents: int64 `[length]` each, on the model's device.
        filler: token ids that no document has; where rows differ in length, a document made of
            them completes the shorter.
        pad_token: what padding is made of.
    """
    pairs = [d for d in documents if isinstance(d, Pair)]
    if not pairs:
        tensors = [d for d in documents if isinstance(d, Tensor)]
        return _stream(tensors, filler, pad_token, convention)
    # A row that is completed on one side has a document more, which the other side needs too.
    options = {"completed": convention.rows > 1}
    source = _stream([d.source for d in pairs], filler, pad_token, convention, **options)
    target = _stream([d.target for d in pairs], filler, pad_token, convention, **options)
    kwargs = {f"decoder_{k}": v for k, v in target.kwargs.items() if k != "use_cache"}
    return replace(source, kwargs={**source.kwargs, **kwargs}, target=target)


def _stream(
    documents: Sequence[Tensor],
    filler: Tensor,
    pad_token: int,
    convention: Convention,
    *,
    completed: bool = False,
) -> AuditBatch:
    """The batch of documents of one stream; `completed`: every row ends in a filler."""
    rows: list[list[int]] = [
        list(range(r, len(documents), convention.rows)) for r in range(convention.rows)
    ]
    width = max(sum(len(documents[d]) for d in row) for row in rows) + int(completed)
    parts: list[Tensor] = []
    padding: list[bool] = []
    places = [0] * len(documents)
    for row in rows:
        missing = width - sum(len(documents[d]) for d in row)
        for d in row:
            places[d] = len(parts)
            parts.append(documents[d])
            padding.append(False)
        if missing:
            parts.append(filler[torch.arange(missing) % len(filler)])
            padding.append(False)
        if convention.tail:
            parts.append(filler.new_full((convention.tail,), pad_token))
            padding.append(True)
    layout = DocumentLayout.from_lengths([len(part) for part in parts], padding=padding)
    shape = (convention.rows, width + convention.tail)
    kwargs: dict[str, Any] = {"input_ids": torch.cat(parts).view(shape)}
    device = kwargs["input_ids"].device
    columns = _columns(layout, shape)
    for name in convention.columns:
        value = columns[name]
        key = "attention_mask" if name == "segment_mask" else name
        kwargs[key] = value if isinstance(value, int) else value.to(device)
    if convention.use_cache is not None:
        kwargs["use_cache"] = convention.use_cache
    return AuditBatch(kwargs, layout, *shape, tuple(places))


def _columns(layout: DocumentLayout, shape: tuple[int, int]) -> dict[str, Any]:
    """Everything that a batch may carry to tell its documents."""
    padding = layout.padding_tokens
    hidden = torch.zeros(shape, dtype=torch.bool) if padding is None else padding.view(shape)
    return {
        "position_ids": layout.position_ids.view(shape),
        "cu_seq_lens_q": layout.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens,
        "max_length_q": layout.max_seqlen,
        "max_length_k": layout.max_seqlen,
        "seq_idx": layout.document_ids.view(shape),
        "layout": layout,
        "attention_mask": (~hidden).long(),
        "segment_mask": (layout.document_ids.view(shape).long() + 1).masked_fill(hidden, 0),
    }
