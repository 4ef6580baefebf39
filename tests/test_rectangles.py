"""Plans of rectangles: each pair that the mask rule shows is in one of them, once, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packed_attn import DocumentLayout, rectangles
from packed_attn.rectangles import Limits, MaskKind, Plan, plan_rectangles
from tests.cases import COMBINED, SMALL, Case

LENGTHS = st.lists(st.integers(0, 40), max_size=8)
LIMITS = st.builds(
    Limits,
    view_tokens=st.sampled_from([1, 8, 64]),
    call_tokens=st.sampled_from([1, 64, 4096]),
    pair_elements=st.sampled_from([1, 3]),
    elements=st.sampled_from([1, 200, 10**6]),
    holds_scores=st.booleans(),
)
SIDE = st.sampled_from([-1, 0, 1, 5, 30])
CHUNKS = st.sampled_from([None, 1, 7, 16])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that short documents are cut."""
    rectangles._cached_plan.cache_clear()
    for name, value in (("BAND_ROWS", 6), ("HELD_ROWS", 5), ("FEWEST_ROWS", 3)):
        monkeypatch.setattr(rectangles, name, value)


@pytest.mark.parametrize("case", [*SMALL, *COMBINED], ids=lambda case: case.name)
def test_named_cases(case: Case) -> None:
    layout, keys = case.layout(), case.key_layout()
    right = 0 if case.causal else case.window_size[1]
    kind = MaskKind(case.window_size[0], right, case.chunk_size, case.alibi)
    limits = Limits(16, 64, pair_elements=2, elements=300, holds_scores=case.softcap is not None)
    _check(layout, keys, kind, limits, case.prefix_lengths)


@given(lengths=LENGTHS, left=SIDE, right=SIDE, chunk=CHUNKS, limits=LIMITS, seed=st.integers(0, 9))
def test_any_documents(lengths, left, right, chunk, limits, seed) -> None:
    padding = [(d + seed) % 4 == 0 for d in range(len(lengths))]
    layout = DocumentLayout.from_lengths(lengths, padding=padding)
    prefix = tuple((n * seed) // 5 for n in lengths) if seed % 2 else None
    _check(layout, None, MaskKind(left, right, chunk, seed % 3 == 0), limits, prefix)


@given(pairs=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6), left=SIDE,
       right=SIDE, chunk=CHUNKS, limits=LIMITS)  # fmt: skip
def test_any_cross_attention(pairs, left, right, chunk, limits) -> None:
    layout = DocumentLayout.from_lengths([n for n, _ in pairs])
    keys = DocumentLayout.from_lengths([m for _, m in pairs])
    _check(layout, keys, MaskKind(left, right, chunk), limits, None)


@given(lengths=LENGTHS, left=SIDE, right=SIDE, chunk=CHUNKS, limits=LIMITS, data=st.data())
def test_any_forest(lengths, left, right, chunk, limits, data) -> None:
    parents: list[int] = []
    for d in range(len(lengths)):
        path = [d - 1] if d else []
        while path and parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        parents.append(data.draw(st.sampled_from([-1, *path])))
    layout = DocumentLayout.from_lengths(lengths, parents=parents)
    by_distance = data.draw(st.booleans())
    _check(layout, None, MaskKind(left, right, chunk, by_distance), limits, None)


def _check(
    layout: DocumentLayout,
    keys: DocumentLayout | None,
    kind: MaskKind,
    limits: Limits,
    prefix: tuple[int, ...] | None,
) -> None:
    plan = plan_rectangles(
        layout.cu_seqlens,
        None if keys is None else keys.cu_seqlens,
        layout.parents,
        layout.padding,
        None if keys is None else keys.padding,
        layout.prefix(prefix),
        kind,
        limits,
    )
    mask: dict[str, Any] = {
        "causal": kind.right == 0,
        "window_size": (kind.left, kind.right),
        "chunk_size": kind.chunk_size,
        "prefix_lengths": prefix,
    }
    wanted = layout.visibility(**mask, key_layout=keys).dense()
    times = _times_seen(plan, wanted.shape, kind)
    assert torch.equal(times, wanted.long())
    _check_overlaps(plan, wanted.shape)
    smallest = rectangles.FEWEST_ROWS * limits.pair_elements
    for call in plan.calls:
        batch, n, m = call.queries.batch, call.queries.length, call.keys.length
        if call.hides or limits.holds_scores:
            held = batch * n * m * limits.pair_elements
            cut = call.is_causal and not limits.holds_scores
            assert cut or held <= max(limits.elements, smallest * m)


def _times_seen(plan: Plan, shape: torch.Size, kind: MaskKind) -> Tensor:
    """How often each pair is computed and shown, int64 `[queries, keys]`."""
    times = torch.zeros(shape, dtype=torch.long)
    for call in plan.calls:
        visible = call.visible(kind)
        assert call.hides or bool(visible.all())
        if call.is_causal:
            square = torch.ones(call.queries.length, call.keys.length, dtype=torch.bool)
            assert torch.equal(visible[0], square.tril())
        visible = visible.expand(call.queries.batch, -1, -1)
        rows, columns = (_real(bucket) for bucket in (call.queries, call.keys))
        for b in range(call.queries.batch):
            real_rows, real_columns = rows[b] >= 0, columns[b] >= 0
            hidden = visible[b][real_rows][:, ~real_columns]
            assert not hidden.any(), "a token sees a column of padding"
            seen = visible[b][real_rows][:, real_columns].long()
            at = rows[b][real_rows][:, None], columns[b][real_columns][None, :]
            times.index_put_(at, seen, accumulate=True)
    return times


def _real(bucket) -> Tensor:
    """int64 `[batch, length]`: the token of each row, -1 for padding."""
    tokens = torch.full((bucket.batch * bucket.length,), -1)
    rows, real = bucket.real(torch.device("cpu"))
    tokens[rows] = real
    return tokens.view(bucket.batch, bucket.length)


def _check_overlaps(plan: Plan, shape: torch.Size) -> None:
    """No token is twice in a call; where it is in several, the plan says so."""
    for side, total, overlap, unseen in (
        ("queries", shape[0], plan.queries_overlap, plan.unseen_queries),
        ("keys", shape[1], plan.keys_overlap, plan.unseen_keys),
    ):
        counts = torch.zeros(total, dtype=torch.long)
        for call in plan.calls:
            tokens = _real(getattr(call, side)).flatten()
            tokens = tokens[tokens >= 0]
            assert tokens.unique().numel() == tokens.numel()
            counts[tokens] += 1
        assert bool((counts > 1).any()) == overlap
        assert [t for a, b in unseen for t in range(a, b)] == (counts == 0).nonzero()[:, 0].tolist()
