"""The interval rule against masks written out token by token, from paths and positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packed_attn import DocumentLayout, Visibility
from tests.cases import SMALL, Case

WINDOWS = st.tuples(st.integers(-1, 6), st.integers(-1, 6))
CHUNKS = st.one_of(st.none(), st.integers(1, 7))


def _mask(case: Case) -> Tensor:
    """bool `[total_queries, total_keys]`, one pair of tokens at a time."""
    queries = _tokens(case, case.lengths)
    keys = _tokens(case, case.lengths if case.key_lengths is None else case.key_lengths)
    mask = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for i, (query_document, query_place) in enumerate(queries):
        for j, (key_document, key_place) in enumerate(keys):
            mask[i, j] = _sees(case, query_document, query_place, key_document, key_place)
    return mask


def _tokens(case: Case, lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(document, position on its path) of every token of the stream."""

    def before(document: int) -> int:
        return sum(lengths[d] for d in _path(case, document)[:-1])

    return [(d, before(d) + place) for d, n in enumerate(lengths) for place in range(n)]


def _path(case: Case, document: int) -> list[int]:
    parent = -1 if case.parents is None else case.parents[document]
    return [*(_path(case, parent) if parent >= 0 else []), document]


def _sees(case: Case, document: int, i: int, key_document: int, j: int) -> bool:
    if key_document not in _path(case, document):
        return False
    if case.padding is not None and (case.padding[document] or case.padding[key_document]):
        return False
    if case.key_lengths is not None:
        i += case.key_lengths[document] - case.lengths[document]
    left, right = case.window_size
    ahead = 0 if case.causal else right
    in_prefix = case.prefix_lengths is not None and j < case.prefix_lengths[document]
    if ahead >= 0 and j > i + ahead and not in_prefix:
        return False
    if left >= 0 and j < i - left:
        return False
    return case.chunk_size is None or i // case.chunk_size == j // case.chunk_size


def _visibility(case: Case) -> Visibility:
    return case.layout().visibility(
        case.causal,
        case.window_size,
        chunk_size=case.chunk_size,
        prefix_lengths=case.prefix_lengths,
        key_layout=case.key_layout(),
    )


def _by_query(visibility: Visibility) -> Tensor:
    """What key_start and key_stop alone say."""
    j = torch.arange(visibility.query_start.numel())
    return (visibility.key_start[:, None] <= j) & (j < visibility.key_stop[:, None])


def _by_key(visibility: Visibility) -> Tensor:
    """What query_start and query_stop alone say."""
    i = torch.arange(visibility.key_start.numel())[:, None]
    return (visibility.query_start <= i) & (i < visibility.query_stop)


def _assert_is(visibility: Visibility, mask: Tensor) -> None:
    """The rule gives the mask, and `halves` promises no more than is true."""
    assert torch.equal(visibility.dense(), mask)
    assert torch.equal(_by_query(visibility) & _by_key(visibility), mask)
    if visibility.halves == "either":
        assert torch.equal(_by_query(visibility), mask)
    if visibility.halves in ("either", "query"):
        assert torch.equal(_by_key(visibility), mask)
    total_queries, total_keys = mask.shape
    for x, length, stop in (
        (visibility.key_start, total_queries, total_keys),
        (visibility.key_stop, total_queries, total_keys),
        (visibility.query_start, total_keys, total_queries),
        (visibility.query_stop, total_keys, total_queries),
    ):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
        assert x.shape == (length,)
        if length:
            assert 0 <= int(x.min()) <= int(x.max()) <= stop
    assert (visibility.key_start <= visibility.key_stop).all()
    assert (visibility.query_start <= visibility.query_stop).all()


@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_named_cases(case: Case) -> None:
    _assert_is(_visibility(case), _mask(case))


@st.composite
def forests(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents in depth-first order, empty documents among them."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    parents: list[int] = []
    branch: list[int] = []
    for document in range(len(lengths)):
        depth = draw(st.integers(0, len(branch)))
        parents.append(branch[depth - 1] if depth else -1)
        branch = [*branch[:depth], document]
    return tuple(lengths), tuple(parents)


@given(st.lists(st.integers(0, 7), max_size=6), st.booleans(), WINDOWS, CHUNKS, st.data())
def test_any_documents(lengths, causal, window, chunk, data: st.DataObject) -> None:
    padding = data.draw(st.tuples(*[st.booleans()] * len(lengths)))
    prefix = data.draw(st.none() | st.tuples(*[st.integers(0, 9)] * len(lengths)))
    case = Case(
        "any",
        tuple(lengths),
        padding=padding,
        causal=causal,
        window_size=window,
        chunk_size=chunk,
        prefix_lengths=prefix,
    )
    visibility = _visibility(case)
    assert visibility.halves == "either"
    _assert_is(visibility, _mask(case))


@given(st.lists(st.tuples(*[st.integers(0, 7)] * 2), max_size=6), st.booleans(), WINDOWS, CHUNKS)
def test_any_cross_attention(pairs, causal, window, chunk) -> None:
    case = Case(
        "any",
        tuple(n for n, _ in pairs),
        key_lengths=tuple(n for _, n in pairs),
        causal=causal,
        window_size=window,
        chunk_size=chunk,
    )
    _assert_is(_visibility(case), _mask(case))


@given(forests(), st.booleans(), WINDOWS, CHUNKS)
def test_any_forest(forest, causal, window, chunk) -> None:
    lengths, parents = forest
    case = Case(
        "any", lengths, parents=parents, causal=causal, window_size=window, chunk_size=chunk
    )
    visibility = _visibility(case)
    assert visibility.halves == ("both" if window[0] >= 0 or chunk is not None else "query")
    _assert_is(visibility, _mask(case))


def test_padding_on_one_side_of_cross_attention() -> None:
    """Neither half may see it, or `halves` would be wrong."""
    queries = DocumentLayout.from_lengths([2, 3], padding=[True, False])
    keys = DocumentLayout.from_lengths([4, 1], padding=[False, False])
    for layout, key_layout in ((queries, keys), (keys, queries)):
        visibility = layout.visibility(causal=False, key_layout=key_layout)
        mask = torch.zeros(layout.total_tokens, key_layout.total_tokens, dtype=torch.bool)
        mask[layout.starts[1] :, key_layout.starts[1] :] = True
        _assert_is(visibility, mask)


def test_two_rows_are_exact() -> None:
    rows = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]])
    visibility = DocumentLayout.from_position_ids(rows).visibility()
    alone = [torch.ones(n, n).tril() for n in (3, 1, 2, 2)]
    _assert_is(visibility, torch.block_diag(*alone).bool())


def test_picture_of_the_docstring() -> None:
    mask = DocumentLayout.from_lengths([2, 3]).visibility().dense().int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_one_object_per_kind() -> None:
    layout = DocumentLayout.from_lengths([5, 3])
    keys = DocumentLayout.from_lengths([2, 9])
    assert layout.visibility() is layout.visibility(True)
    # Causal is a right side of 0, whatever the right side says.
    assert layout.visibility() is layout.visibility(False, (-1, 0))
    assert layout.visibility() is layout.visibility(True, (-1, 7))
    assert layout.visibility(window_size=(3, 0)) is layout.visibility(window_size=(3, 0))
    assert layout.visibility(chunk_size=2) is layout.visibility(chunk_size=2)
    assert layout.visibility(key_layout=keys) is layout.visibility(key_layout=keys)
    kinds = [
        layout.visibility(),
        layout.visibility(False),
        layout.visibility(window_size=(3, 0)),
        layout.visibility(chunk_size=2),
        layout.visibility(key_layout=keys),
        layout.visibility(key_layout=DocumentLayout.from_lengths([3, 9])),
    ]
    assert len({id(kind) for kind in kinds}) == len(kinds)


def test_prefixes_are_not_mixed_up() -> None:
    layout = DocumentLayout.from_lengths([5, 3])
    short = layout.visibility(prefix_lengths=torch.tensor([1, 1])).dense()
    long = layout.visibility(prefix_lengths=torch.tensor([4, 3])).dense()
    assert long.sum() > short.sum()


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1])
def test_huge_windows_and_chunks_do_not_overflow(huge: int) -> None:
    layout = DocumentLayout.from_lengths([5, 3])
    plain = layout.visibility().dense()
    assert torch.equal(layout.visibility(window_size=(huge, huge)).dense(), plain)
    assert torch.equal(layout.visibility(chunk_size=huge).dense(), plain)
    every = layout.visibility(False).dense()
    assert torch.equal(layout.visibility(False, (huge, huge)).dense(), every)


@pytest.mark.parametrize(
    "window", [(-2, 0), (0, -5), (1,), (1, 2, 3), 4, None, (1.0, 0), (True, 0)]
)
def test_bad_window(window) -> None:
    with pytest.raises(ValueError, match="window_size must hold two integers of at least -1"):
        DocumentLayout.from_lengths([3]).visibility(window_size=window)


@pytest.mark.parametrize("chunk", [0, -1, 2.5, True])
def test_bad_chunk(chunk) -> None:
    with pytest.raises(ValueError, match=f"chunk_size must be an integer .* got {chunk}"):
        DocumentLayout.from_lengths([3]).visibility(chunk_size=chunk)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ([1, 2], r"prefix_lengths must have shape \[1\], got \[2\]"),
        (torch.tensor([[1]]), r"prefix_lengths must have shape \[1\], got \[1, 1\]"),
        ([-1], "prefix_lengths must not be negative, got -1"),
        ([1.5], "prefix_lengths must be integers, got 1.5"),
        ([True], "prefix_lengths must be integers, got True"),
        (torch.tensor([1.5]), "prefix_lengths must be integers, got torch.float32"),
    ],
)
def test_bad_prefix(prefix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentLayout.from_lengths([3]).visibility(prefix_lengths=prefix)


def test_layouts_that_do_not_match() -> None:
    layout = DocumentLayout.from_lengths([3, 4])
    with pytest.raises(ValueError, match="layout has 2 documents, but key_layout has 1"):
        layout.visibility(key_layout=DocumentLayout.from_lengths([7]))
    forest = DocumentLayout.from_lengths([3, 4], parents=[-1, 0])
    for call in (
        lambda: forest.visibility(key_layout=layout),
        lambda: layout.visibility(key_layout=forest),
        lambda: forest.visibility(prefix_lengths=[1, 1]),
    ):
        with pytest.raises(NotImplementedError, match="a forest has neither prefix_lengths nor"):
            call()


def test_what_a_backend_derived_stays_with_its_device() -> None:
    layout = DocumentLayout.from_lengths([3, 4])
    layout.visibility().once("tiles", lambda: "of the CPU")
    assert layout.to("meta").visibility().once("tiles", lambda: "of meta") == "of meta"
    assert layout.visibility().once("tiles", lambda: "made again") == "of the CPU"
