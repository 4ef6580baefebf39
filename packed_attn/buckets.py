"""Documents batched by length: which of them are computed together, without a mask over them all.

A plan is a pure function of the lengths, and the last few are kept: one serves all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from packed_attn.derived import sent
from packed_attn.trees import Forest, Paths

# How many times a document's length may be padded to join a batch of gathered documents.
PADDED_LENGTH = 1.25


@dataclass(frozen=True, eq=False)
class Bucket:
    """Documents that are one batch: `batch` times `length` rows, the shorter ones padded.

    Attributes:
        batch, length: documents, and rows of each.
        start: first token of documents that stand end to end and are read as a view.
        tokens: int64 `[batch * length]`, the token that each row reads, or None for a view. A row
            of padding reads its own document's last token.
        targets: int64 `[batch * length]`, where each row is written, or None for a view. Rows of
            padding, and copies, go to `total_tokens`, one past the stream.
        pads: int64, the rows of padding, or None.
        kept: int64, the rows that are written, or None for all: neither padding nor tokens that are
            written from another path of a forest.
    """

    batch: int
    length: int
    start: int = 0
    tokens: Tensor | None = None
    targets: Tensor | None = None
    pads: Tensor | None = None
    kept: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Its rows of x `[total_tokens, ...]`: `[batch, length, ...]`, a view or a copy."""
        if self.tokens is None:
            rows = x.narrow(0, self.start, self.batch * self.length)
        else:
            rows = x.index_select(0, self.tokens)
        return rows.unflatten(0, (self.batch, self.length))

    def real(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, tokens), int64: the rows that are written, and the token that each one is."""
        rows = self.kept
        if rows is None:
            rows = torch.arange(self.batch * self.length, device=device)
        tokens = rows + self.start if self.tokens is None else self.tokens[rows]
        return rows, tokens


def on_device(buckets: Sequence[Bucket], device: torch.device) -> list[Bucket]:
    """The same buckets with their indices on `device`, in one transfer; targets stay behind."""
    if device.type == "cpu":
        return list(buckets)
    columns = [(b.tokens, b.pads, b.kept) for b in buckets]
    given = [x for of_bucket in columns for x in of_bucket if x is not None]
    if not given:
        return list(buckets)
    parts = iter(sent(torch.cat(given), device).split([x.numel() for x in given]))
    moved = [[None if x is None else next(parts) for x in of_bucket] for of_bucket in columns]
    return [
        replace(bucket, tokens=tokens, targets=None, pads=pads, kept=kept)
        for bucket, (tokens, pads, kept) in zip(buckets, moved)
    ]


@dataclass(frozen=True, eq=False)
class Plan:
    """All documents in buckets; `unseen` are the (start, stop) spans that no document covers."""

    buckets: tuple[Bucket, ...]
    unseen: tuple[tuple[int, int], ...]


def plan_buckets(
    cu_seqlens: Tensor,
    padding: Tensor | None,
    *,
    pad_lengths: bool,
    view_tokens: int,
    call_tokens: int,
    parents: Tensor | None = None,
) -> Plan:
    """How to compute these documents, or the paths of a forest: what is shared, in each of them.

    Args:
        cu_seqlens: int32 `[num_documents + 1]`, CPU.
        padding: bool `[num_documents]` or None.
        pad_lengths: let documents of unlike length share a batch; needs a causal mask, which
            hides the padding behind every document from its tokens.
        view_tokens: from how many tokens on equal neighbours are read where they lie; below, a
            call's fixed cost outweighs gathering them.
        call_tokens: tokens of one bucket, if it has more than one document.
        parents: int32 `[num_documents]` or None, as in `DocumentLayout`.
    """
    return _cached_plan(
        cu_seqlens.to(torch.int32).numpy().tobytes(),
        None if padding is None else padding.numpy().tobytes(),
        pad_lengths,
        view_tokens,
        call_tokens,
        None if parents is None else parents.to(torch.int32).numpy().tobytes(),
    )


@lru_cache(maxsize=8)
def _cached_plan(
    cu_seqlens: bytes,
    padding: bytes | None,
    pad_lengths: bool,
    view_tokens: int,
    call_tokens: int,
    parents: bytes | None,
) -> Plan:
    cu = np.frombuffer(cu_seqlens, dtype=np.int32).astype(np.int64)
    starts, lengths = cu[:-1], np.diff(cu)
    skipped = np.zeros(len(lengths), dtype=bool)
    if padding is not None:
        skipped = np.frombuffer(padding, dtype=bool)
    unseen = tuple((int(a), int(a + n)) for a, n in zip(starts[skipped], lengths[skipped]))
    paths, buckets = None, []
    if parents is not None:
        links = np.frombuffer(parents, dtype=np.int32)
        paths = Paths.of(cu, Forest.build(lengths.tolist(), links.tolist()), skipped)
        starts, lengths = paths.cu_seqlens[:-1], np.diff(paths.cu_seqlens)
    else:
        kept = ~skipped & (lengths > 0)
        starts, lengths = starts[kept], lengths[kept]
        buckets, rest = _views(starts, lengths, view_tokens, call_tokens)
        starts, lengths = starts[rest], lengths[rest]
    padded_length = PADDED_LENGTH if pad_lengths else 1.0
    gathered = _gathered(starts, lengths, padded_length, call_tokens, int(cu[-1]), paths)
    return Plan((*buckets, *gathered), unseen)


def _views(
    starts: np.ndarray, lengths: np.ndarray, view_tokens: int, call_tokens: int
) -> tuple[list[Bucket], np.ndarray]:
    """Runs of equal documents end to end that are long enough to be read where they lie.

    Returns:
        their buckets, and which documents are left over.
    """
    same = (lengths[1:] == lengths[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1])
    firsts = np.flatnonzero(np.concatenate([np.ones(min(len(lengths), 1), dtype=bool), ~same]))
    counts = np.diff(np.append(firsts, len(lengths)))
    in_place = counts * lengths[firsts] >= view_tokens
    buckets = []
    for first, count in zip(firsts[in_place].tolist(), counts[in_place].tolist()):
        start, length = int(starts[first]), int(lengths[first])
        step = max(1, call_tokens // length)
        for at in range(0, count, step):
            buckets.append(Bucket(min(step, count - at), length, start=start + at * length))
    return buckets, np.repeat(~in_place, counts)


def _gathered(
    starts: np.ndarray,
    lengths: np.ndarray,
    padded_length: float,
    call_tokens: int,
    total_tokens: int,
    paths: Paths | None,
) -> Iterator[Bucket]:
    """Documents of like length together, longest first."""
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[order], lengths[order]
    host = lengths.tolist()
    first = 0
    for i in range(1, len(host) + 1):
        longest = host[first]
        full = (i - first + 1) * longest > call_tokens
        if i == len(host) or full or host[i] * padded_length < longest:
            yield gathered_bucket(starts[first:i], lengths[first:i], total_tokens, paths)
            first = i


def pair_buckets(
    sources: Spans, targets: Spans, *, pad_lengths: bool, call_tokens: int
) -> Iterator[tuple[Bucket, Bucket]]:
    """Batches of (source, target) pairs: document d of one stream belongs to d of the other.

    Args:
        sources, targets: the same number of documents, each of a token or more.
        pad_lengths: let pairs of unlike lengths share a batch, so long as its rows are at most
            `PADDED_LENGTH` times its tokens; otherwise both lengths are equal in a batch.
        call_tokens: rows of both sides in one batch, if it has more than one pair.
    """
    # The side with more tokens decides which pairs are alike.
    sides = sorted((sources, targets), key=lambda side: int(side.lengths.sum()))
    order = np.lexsort([-side.lengths for side in sides])
    pairs = list(zip(sources.lengths[order].tolist(), targets.lengths[order].tolist()))
    first = tokens = longest_source = longest_target = 0
    for i, (source, target) in enumerate([*pairs, (0, 0)]):
        wider = max(longest_source, source), max(longest_target, target)
        rows, real = (i - first + 1) * sum(wider), tokens + source + target
        alike = rows <= PADDED_LENGTH * real if pad_lengths else (source, target) in pairs[first:i]
        if i > first and (i == len(pairs) or rows > call_tokens or not alike):
            batch = order[first:i]
            yield sources.bucket(batch), targets.bucket(batch)
            first, real, wider = i, source + target, (source, target)
        tokens, (longest_source, longest_target) = real, wider


@dataclass(frozen=True, eq=False)
class Spans:
    """Documents of one stream: int64 `starts` and `lengths`, and the tokens of the stream."""

    starts: np.ndarray
    lengths: np.ndarray
    total_tokens: int

    def bucket(self, documents: np.ndarray) -> Bucket:
        """One batch of some of them, each padded to the longest."""
        return gathered_bucket(self.starts[documents], self.lengths[documents], self.total_tokens)


def gathered_bucket(
    starts: np.ndarray, lengths: np.ndarray, total_tokens: int, paths: Paths | None = None
) -> Bucket:
    """One batch of documents, or of paths where they are given, each padded to the longest."""
    length = int(lengths.max())
    place = np.arange(length)
    tokens = starts[:, None] + np.minimum(place, lengths[:, None] - 1)
    left_out = is_pad = place >= lengths[:, None]
    if paths is not None:
        left_out, tokens = is_pad | paths.copies[tokens], paths.tokens[tokens]
    pads = np.flatnonzero(is_pad)
    targets = np.where(left_out, total_tokens, tokens)
    return Bucket(
        len(starts),
        length,
        tokens=torch.from_numpy(tokens.ravel()),
        targets=torch.from_numpy(targets.ravel()),
        pads=torch.from_numpy(pads) if len(pads) else None,
        kept=torch.from_numpy(np.flatnonzero(~left_out)) if left_out.any() else None,
    )
