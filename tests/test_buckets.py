"""Documents batched by length: every token in one place, and rows put back where they came from."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from packed_attn import DocumentLayout
from packed_attn.buckets import PADDED_LENGTH, Plan, Spans, pair_buckets, plan_buckets


@given(
    lengths=st.lists(st.integers(0, 90), max_size=60),
    padding_seed=st.integers(0, 7),
    pad_lengths=st.booleans(),
    view_tokens=st.sampled_from([1, 8, 64]),
    call_tokens=st.sampled_from([1, 64, 4096]),
)
def test_buckets_cover_each_token_once(
    lengths: list[int],
    padding_seed: int,
    pad_lengths: bool,
    view_tokens: int,
    call_tokens: int,
) -> None:
    padding = [(d + padding_seed) % 5 == 0 for d in range(len(lengths))]
    layout = DocumentLayout.from_lengths(lengths, padding=padding)
    plan = plan_buckets(
        layout.cu_seqlens,
        layout.padding,
        pad_lengths=pad_lengths,
        view_tokens=view_tokens,
        call_tokens=call_tokens,
    )
    written = np.sort(_written(plan, layout.total_tokens))
    unseen = [token for start, stop in plan.unseen for token in range(start, stop)]
    assert sorted([*written.tolist(), *unseen]) == list(range(layout.total_tokens))
    if layout.padding_tokens is not None:
        assert layout.padding_tokens.nonzero().flatten().tolist() == unseen
    for bucket in plan.buckets:
        fits = bucket.batch * bucket.length <= call_tokens
        assert fits or bucket.batch == 1
        assert pad_lengths or bucket.pads is None


def _written(plan: Plan, total_tokens: int) -> np.ndarray:
    """Every row's target, padding left out."""
    rows = [np.empty(0, dtype=np.int64)]
    for bucket in plan.buckets:
        if bucket.targets is None:
            rows.append(np.arange(bucket.start, bucket.start + bucket.batch * bucket.length))
        else:
            rows.append(bucket.targets.numpy())
    flat = np.concatenate(rows)
    return flat[flat < total_tokens]


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30), pad_lengths=st.booleans())
def test_rows_and_tokens_agree(lengths: list[int], pad_lengths: bool) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    x = torch.arange(layout.total_tokens)
    plan = plan_buckets(
        layout.cu_seqlens, None, pad_lengths=pad_lengths, view_tokens=16, call_tokens=64
    )
    for bucket in plan.buckets:
        values = bucket.rows(x)
        assert values.shape == (bucket.batch, bucket.length)
        real, tokens = bucket.real(x.device)
        assert torch.equal(values.flatten()[real], tokens)
        # Padding reads its own document, so nothing of another is ever in a row.
        documents = layout.document_ids[values]
        assert bool((documents == documents[:, :1]).all())


@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=40),
    pad_lengths=st.booleans(),
    call_tokens=st.sampled_from([1, 64, 4096]),
)
def test_pairs_are_together_once_and_padded_little(
    lengths: list[tuple[int, int]], pad_lengths: bool, call_tokens: int
) -> None:
    source, target = (_spans([pair[side] for pair in lengths]) for side in (0, 1))
    batches = list(pair_buckets(source, target, pad_lengths=pad_lengths, call_tokens=call_tokens))
    seen: list[tuple[int, int]] = []
    for a, b in batches:
        assert a.batch == b.batch
        firsts = [x.tokens.view(x.batch, x.length)[:, 0].tolist() for x in (a, b)]  # type: ignore
        seen += zip(*firsts)
        rows = a.batch * (a.length + b.length)
        real = sum(len(x.real(torch.device("cpu"))[0]) for x in (a, b))
        assert rows <= (PADDED_LENGTH if pad_lengths else 1) * real
        assert rows <= call_tokens or a.batch == 1
    assert sorted(seen) == list(zip(source.starts.tolist(), target.starts.tolist()))


def _spans(lengths: list[int]) -> Spans:
    ends = np.cumsum([0, *lengths])
    return Spans(ends[:-1], np.array(lengths, np.int64), int(ends[-1]))
