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
    documents=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), max_size=30),
    pad_lengths=st.booleans(),
    call_tokens=st.sampled_from([1, 64, 4096]),
)
def test_a_forest_is_batched_by_its_paths(
    documents: list[tuple[int, int]], pad_lengths: bool, call_tokens: int
) -> None:
    """Each row is one path; each token is written once, and no path is part of another."""
    lengths, parents, padding = _forest(documents)
    layout = DocumentLayout.from_lengths(lengths, parents=parents, padding=padding)
    plan = plan_buckets(
        layout.cu_seqlens,
        layout.padding,
        pad_lengths=pad_lengths,
        view_tokens=1,
        call_tokens=call_tokens,
        parents=layout.parents,
    )
    written = np.sort(_written(plan, layout.total_tokens)).tolist()
    hidden = layout.padding_flags
    assert written == (~hidden).nonzero().flatten().tolist()
    rows: list[tuple[int, ...]] = []
    token = torch.arange(layout.total_tokens)
    for bucket in plan.buckets:
        values = bucket.rows(token)
        real, tokens = bucket.real(token.device)
        assert bucket.targets is not None
        assert torch.equal(bucket.targets[real], tokens)
        assert torch.equal(values.flatten()[real], tokens)
        pads = torch.zeros(values.numel(), dtype=torch.bool)
        if bucket.pads is not None:
            pads[bucket.pads] = True
        rows += [tuple(r[~p].tolist()) for r, p in zip(values, pads.view_as(values))]
    of_path = {
        tuple(t for p in layout.path(d) for t in token.split(lengths)[p].tolist()): d
        for d in range(layout.num_documents)
        if not padding[d]
    }
    assert all(row in of_path for row in rows)
    assert len(rows) == len({*rows})
    assert not any(a != b and b[: len(a)] == a for a in rows for b in rows)


def _forest(documents: list[tuple[int, int]]) -> tuple[list[int], list[int], list[bool]]:
    """Lengths, parents and padding: each document goes so many steps up from the one before."""
    lengths, parents, padding = [], [], []
    branch: list[int] = []
    for d, (length, up) in enumerate(documents):
        branch = branch[: max(0, len(branch) - up)]
        hidden = not branch and length == 9
        lengths.append(length)
        parents.append(branch[-1] if branch else -1)
        padding.append(hidden)
        if not hidden:
            branch.append(d)
    return lengths, parents, padding


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
