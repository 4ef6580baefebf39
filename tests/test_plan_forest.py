"""plan_forest: every list is its path, each shared prefix is stored once, depth-first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packed_attn import DocumentLayout
from packed_attn.packing.forest import ForestPlan, plan_forest, plan_prompts


def tokens(plan: ForestPlan, lists: list[list[int]], document: int) -> list[int]:
    start = int(plan.starts[document])
    return lists[plan.lists[document]][start : start + int(plan.lengths[document])]


def rebuilt(plan: ForestPlan, lists: list[list[int]], index: int) -> list[int]:
    return [token for d in plan.path(index) for token in tokens(plan, lists, d)]


def test_nested_prefixes() -> None:
    lists = [[1, 2, 3], [1, 2, 4, 5], [1, 6], [7]]
    plan = plan_forest(lists)
    assert [tokens(plan, lists, d) for d in range(plan.num_documents)] == [
        [1],
        [2],
        [3],
        [4, 5],
        [6],
        [7],
    ]
    assert plan.parents.tolist() == [-1, 0, 1, 1, 0, -1]
    assert plan.ends.tolist() == [2, 3, 4, 5]


def test_order_is_that_of_the_lists() -> None:
    """The first tree is that of the first list, whatever its ids."""
    lists = [[9, 8], [1, 2], [9, 7], [1, 3]]
    plan = plan_forest(lists)
    assert [tokens(plan, lists, d) for d in range(plan.num_documents)] == [
        [9],
        [8],
        [7],
        [1],
        [2],
        [3],
    ]


def test_equal_lists_and_lists_that_are_prefixes() -> None:
    lists = [[5, 6], [5, 6], [5, 6, 7], [], [5]]
    plan = plan_forest(lists)
    assert plan.tokens == 3
    assert plan.ends.tolist() == [1, 1, 2, -1, 0]
    assert plan.parents.tolist() == [-1, 0, 1]


def test_small_savings_are_not_worth_a_document() -> None:
    lists = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 9]]
    plan = plan_forest(lists, min_shared=3)
    # [1, 2, 3] saves 3 for two lists; [1] alone would save 2.
    assert plan.lengths.tolist() == [3, 1, 1, 2]
    assert plan.parents.tolist() == [-1, 0, 0, -1]
    plan = plan_forest(lists, min_shared=4)
    assert plan.parents.tolist() == [-1, -1, -1]


def test_a_prefix_too_small_to_share_stays_a_list_of_its_own() -> None:
    lists = [[1], [1, 2, 3]]
    plan = plan_forest(lists, min_shared=2)
    assert plan.parents.tolist() == [-1, -1]
    assert [rebuilt(plan, lists, i) for i in range(2)] == lists


def test_nothing_to_plan() -> None:
    assert plan_forest([]).num_documents == 0
    assert plan_forest([[], []]).ends.tolist() == [-1, -1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=14),
    st.integers(1, 5),
    st.sampled_from([1, 23]),
)
def test_every_list_is_its_path(lists: list[list[int]], min_shared: int, repeats: int) -> None:
    """Also where lists agree over many tokens, which are compared in blocks."""
    lists = [np.repeat(np.array(ids, int), repeats).tolist() for ids in lists]
    plan = plan_forest(lists, min_shared=min_shared)
    assert [rebuilt(plan, lists, i) for i in range(len(lists))] == lists
    assert (plan.lengths > 0).all()
    # A layout takes it: parents first, depth-first.
    DocumentLayout.from_lengths(plan.lengths.tolist(), parents=plan.parents.tolist())
    prefixes = {tuple(ids[:n]) for ids in lists for n in range(1, len(ids) + 1)}
    assert plan.tokens >= len(prefixes)
    if min_shared == 1:
        assert plan.tokens == len(prefixes), "every distinct prefix's last token is stored once"


@pytest.mark.parametrize(
    ("lists", "options", "words"),
    [
        ([[1.5]], {}, "one-dimensional integers, but list 0 is float64"),
        ([[1], [[1]]], {}, "one-dimensional integers, but list 1"),
        ([[-1]], {}, "from 0 to 2\\^32 - 1, but list 0 has -1"),
        ([[2**32]], {}, "from 0 to 2\\^32 - 1"),
        ([[1]], {"min_shared": 0}, "min_shared must be an integer of at least 1, got 0"),
        ([[1]], {"min_shared": True}, "min_shared must be an integer"),
    ],
)
def test_bad_input(lists: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_forest(lists, **options)


def test_arrays_of_any_integer_type() -> None:
    lists = [np.array([1, 2], np.int32), np.array([1, 3], np.uint16)]
    assert plan_forest(lists).tokens == 3


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.uint16()])
def test_arrow_lists_in_several_chunks_and_slices(kind: pa.DataType) -> None:
    lists = [[9, 9], [1, 2, 3], [1, 2, 4], [], [1, 2], [7]]
    whole = pa.array(lists, pa.list_(kind))
    chunks = pa.chunked_array([whole[:2], whole[2:4], whole[4:]])
    wanted = plan_forest(lists[1:])
    for given_lists in (whole[1:], chunks[1:]):
        plan = plan_forest(given_lists)
        for name in ("lengths", "parents", "lists", "starts", "ends"):
            assert getattr(plan, name).tolist() == getattr(wanted, name).tolist(), name


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (pa.array([[1], None], pa.list_(pa.int32())), "must not hold nulls"),
        (pa.array([[1, None]], pa.list_(pa.int32())), "must not hold nulls"),
        (pa.array([[1.5]]), "one-dimensional integers, but the Arrow array is float64"),
        (pa.array([1, 2]), "must be lists of integers, got int64"),
        (pa.array([[-1]]), "from 0 to 2\\^32 - 1, but the Arrow array has -1"),
    ],
)
def test_bad_arrow_lists(lists: pa.Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_forest(lists)


def test_ids_above_two_to_the_31_and_collisions_of_hashes() -> None:
    """Ten thousand lists below one prefix, whose first own tokens are all different."""
    top = 2**32 - 1
    lists = [np.array([5, top - i, i], np.int64) for i in range(10_000)]
    plan = plan_forest(lists)
    assert plan.num_documents == 10_001
    assert plan.lengths[0] == 1
    assert (plan.parents[1:] == 0).all()
    assert plan.lists[1:].tolist() == list(range(10_000))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([3], [0], [-1]), "prompt_lengths must not be negative"),
        (([3], [0, 1], [2]), "prompt_ids must have one entry a document"),
        (([3], [0], [1.5]), "prompt_lengths must be integers"),
    ],
)
def test_bad_prompt_columns(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_prompts(*arguments)


def test_prompts_of_cut_and_empty_documents() -> None:
    """A cut document is all prompt; one left out is nowhere; unlike prompts share the shorter."""
    plan = plan_prompts([4, 4, 0, 6], [7, 7, 7, 7], [5, 5, 5, 4])
    assert plan.lengths.tolist() == [4, 2]
    assert plan.parents.tolist() == [-1, 0]
    assert plan.ends.tolist() == [0, 0, -1, 1]
