"""Log-probabilities of packed documents, those that share prefixes too."""

from __future__ import annotations

import torch
from torch import Tensor

from packed_attn.derived import sent
from packed_attn.layout import DocumentLayout

IGNORE_INDEX = -100


def unpack_logps(logits: Tensor, layout: DocumentLayout, labels: Tensor) -> tuple[Tensor, ...]:
    """The log-probability of each document's own tokens, given all before them on its path.

        layout = DocumentLayout.from_lengths([5, 3, 4], parents=[-1, 0, 0])  # prompt, two answers
        _, chosen, rejected = unpack_logps(model(**batch).logits, layout, batch["input_ids"])
        margin = chosen.sum() - rejected.sum()

    The first token of a document that continues another is predicted by the last token before it
    on its path: a prompt's last token predicts the first of every answer. What a whole path has is
    the sum over `layout.path(document)`.

    Args:
        logits: `[B, T, vocabulary]` or `[B * T, vocabulary]`, of tokens in the layout's order.
        layout: the documents of the `B * T` tokens.
        labels: integers `[B, T]` or `[B * T]`: the token to look up at each place (not shifted);
            -100 is not looked up.

    Returns:
        of each document float32 (of float64 logits float64) `[length]`, in nats, differentiable; 0
        where nothing is looked up, and for a first token that nothing predicts.

    Raises:
        ValueError: logits or labels of another number of tokens.
        NotImplementedError: a share of a pack (`context_parallel`).
    """
    return token_logps(logits, layout, labels)[0].split(layout.lengths)


def token_logps(logits: Tensor, layout: DocumentLayout, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`unpack_logps` in one tensor, and which tokens it looked up, `[total_tokens]` each."""
    if layout.is_share:
        raise NotImplementedError(
            "the layout is a share of a pack (context_parallel), where what a token predicts may "
            "be on another rank: take the loss that the model computes from its shift_labels"
        )
    tokens = layout.total_tokens
    for name, x, places in (
        ("logits", logits, logits.shape[:-1]),
        ("labels", labels, labels.shape),
    ):
        if places.numel() != tokens:
            raise ValueError(f"{name} must be of {tokens} tokens, got shape {list(x.shape)}")
    rows = logits.reshape(tokens, -1)
    rows = rows.log_softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
    before = predecessors(layout.to(rows.device))
    targets = labels.flatten().to(rows.device)
    learned = (targets != IGNORE_INDEX) & (before >= 0)
    found = rows[before.clamp(min=0), targets.clamp(min=0)]
    return torch.where(learned, found, 0.0), learned


def without_first_labels(labels: Tensor, layout: DocumentLayout) -> Tensor:
    """labels with -100 where a document begins: the shifted loss predicts it from the document
    before.

    The first token of a document that continues another keeps its label.

    Args:
        labels: integer `[..., T]` with `layout.total_tokens` elements in stream order.
        layout: the documents.
    """
    layout = layout.to(labels.device)
    first = predecessors(layout) < 0 if layout.is_forest else layout.document_starts
    return labels.masked_fill(first.view(labels.shape), IGNORE_INDEX)


def predecessors(layout: DocumentLayout) -> Tensor:
    """The token before each one on its path, int64 `[total_tokens]`; -1 for a first one."""
    before = torch.arange(-1, layout.total_tokens - 1, device=layout.device)
    if not layout.is_forest:
        return before.masked_fill(layout.document_starts, -1)
    last: list[int] = []  # of each document: the last token of its path
    firsts, values = [], []
    for d, (start, length) in enumerate(zip(layout.starts, layout.lengths)):
        parent = layout.parent(d)
        above = -1 if parent < 0 else last[parent]
        last.append(start + length - 1 if length else above)
        if length:
            firsts.append(start)
            values.append(above)
    places, ahead = sent(torch.tensor([firsts, values]), layout.device)
    before[places] = ahead
    return before
