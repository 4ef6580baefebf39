"""DocumentLayout: every way to build one, what it derives, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from packed_attn import DocumentLayout
from packed_attn.derived import sent
from packed_attn.layout import KEPT_MASKS

LENGTHS = st.lists(st.integers(0, 9), max_size=12)
FILLED = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def _same(a: DocumentLayout, b: DocumentLayout) -> bool:
    pads = [x.padding.tolist() if x.padding is not None else None for x in (a, b)]
    return a.cu_seqlens.tolist() == b.cu_seqlens.tolist() and pads[0] == pads[1]


def test_from_lengths_derives_everything() -> None:
    layout = DocumentLayout.from_lengths([2, 0, 3])
    assert layout.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.total_tokens, layout.num_documents, layout.max_seqlen) == (5, 3, 3)
    assert layout.lengths == (2, 0, 3)
    assert layout.starts == (0, 2, 2)
    assert layout.document_ids.tolist() == [0, 0, 2, 2, 2]
    assert layout.document_ids.dtype == torch.int32
    assert layout.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert layout.position_ids.dtype == torch.int64
    assert layout.parents is None
    assert layout.padding_tokens is None
    assert not layout.is_forest


@pytest.mark.parametrize("lengths", [(3, 1), [3, 1], np.array([3, 1]), torch.tensor([3, 1])])
def test_from_lengths_takes_any_sequence_of_integers(lengths) -> None:
    assert DocumentLayout.from_lengths(lengths).lengths == (3, 1)


def test_forest_positions_continue_the_parent() -> None:
    layout = DocumentLayout.from_lengths([3, 2, 1, 2], parents=[-1, 0, 1, 0])
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert layout.document_ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert layout.path(2) == (0, 1, 2)
    assert layout.path(3) == (0, 3)
    assert layout.is_forest
    assert layout.parents is not None
    assert layout.parents.dtype == torch.int32


def test_forest_from_the_plain_constructor_is_the_same() -> None:
    """A layout rebuilt from its fields has no host facts yet."""
    built = DocumentLayout.from_lengths([3, 2, 1, 2], parents=[-1, 0, 1, 0])
    bare = DocumentLayout(built.cu_seqlens, built.total_tokens, built.parents)
    assert bare.path(2) == (0, 1, 2)
    assert bare.position_ids.tolist() == built.position_ids.tolist()
    assert torch.equal(bare.visibility().dense(), built.visibility().dense())


def test_padding_is_a_document() -> None:
    layout = DocumentLayout.from_lengths([2, 3], padding=[False, True])
    assert layout.padding_tokens is not None
    assert layout.padding_tokens.tolist() == [False, False, True, True, True]
    assert DocumentLayout.from_lengths([2, 3], padding=[False, False]).padding is None


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_empty_layouts(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    assert (layout.total_tokens, layout.num_documents, layout.max_seqlen) == (0, len(lengths), 0)
    assert layout.document_ids.shape == layout.position_ids.shape == (0,)
    assert layout.visibility().dense().shape == (0, 0)
    assert layout.document_starts.shape == (0,)


def test_from_cu_seqlens_takes_int64_and_lists() -> None:
    for cu in (torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5], dtype=torch.int32), [0, 2, 5]):
        layout = DocumentLayout.from_cu_seqlens(cu, total_tokens=5)
        assert layout.lengths == (2, 3)
        assert layout.cu_seqlens.dtype == torch.int32


def test_from_position_ids_rows_end_documents() -> None:
    rows = torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]])
    assert DocumentLayout.from_position_ids(rows).lengths == (3, 1, 2, 1, 1)
    assert DocumentLayout.from_position_ids(rows[0]).lengths == (3, 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_position_ids_do_not_wrap_around(dtype: torch.dtype) -> None:
    """In uint8 255 + 1 is 0: the document after one of 256 tokens would be part of it."""
    ids = torch.cat([torch.arange(256), torch.arange(3)]).to(dtype)
    if dtype == torch.uint8:
        assert ids[256] == ids[255] + 1
    assert DocumentLayout.from_position_ids(ids).lengths == (256, 3)


def test_from_document_ids_rows_end_documents() -> None:
    layout = DocumentLayout.from_document_ids(torch.tensor([[5, 5, 2, -1], [2, 2, 7, 7]]))
    assert layout.lengths == (2, 1, 1, 2, 2)
    assert layout.padding is not None
    assert layout.padding.tolist() == [False, False, True, False, False]


def test_from_attention_mask() -> None:
    padded = DocumentLayout.from_attention_mask(torch.tensor([[0, 0, 1], [1, 1, 0]]))
    assert padded.lengths == (2, 1, 2, 1)
    assert padded.padding is not None
    assert padded.padding.tolist() == [True, False, False, True]
    segments = torch.tensor([[1, 1, 2, 3, 3, 0]])
    assert DocumentLayout.from_attention_mask(segments).lengths == (2, 1, 2, 1)
    ones = torch.ones(2, 3, dtype=torch.bool)
    assert DocumentLayout.from_attention_mask(ones).lengths == (3, 3)
    assert DocumentLayout.from_attention_mask(ones).padding is None


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 4)])
def test_no_tokens_from_any_tensor(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    for build in (
        DocumentLayout.from_position_ids,
        DocumentLayout.from_document_ids,
        DocumentLayout.from_attention_mask,
    ):
        assert build(ids).total_tokens == 0


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, -1], r"lengths must not be negative, but lengths\[1\] is -1"),
        ([3, 1.5], "lengths must be integers, got 1.5"),
        ([3, 2.0], "lengths must be integers, got 2.0"),
        ([3, float("nan")], "lengths must be integers, got nan"),
        ([3, float("inf")], "lengths must be integers, got inf"),
        ([3, True], "lengths must be integers, got True"),
        ([3, "4"], "lengths must be integers, got '4'"),
        (torch.tensor([3.0]), "lengths must be integers, got torch.float32"),
        (torch.tensor([True]), "lengths must be integers, got torch.bool"),
        (torch.tensor([[3]]), r"lengths must be one-dimensional, got shape \[1, 1\]"),
        (np.array([3.0]), "lengths must be integers"),
        ([2**31 - 1, 1], "at most 2147483647 tokens, but lengths add to 2147483648"),
    ],
)
def test_bad_lengths(lengths, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentLayout.from_lengths(lengths)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 3], "cu_seqlens must start at 0, got 1"),
        ([0, 5, 3], r"must not decrease, but cu_seqlens\[1\] is 5 and cu_seqlens\[2\] is 3"),
        ([0, 4], "must end at the number of tokens 9, but it ends at 4"),
        ([0, 12], "must end at the number of tokens 9, but it ends at 12"),
        ([0.0, 9.0], "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.tensor([0, 9], dtype=torch.int16), "must be int32 or int64, got torch.int16"),
        (torch.tensor([[0, 9]]), r"must have shape \[num_documents \+ 1\], got \[1, 2\]"),
        (torch.tensor([], dtype=torch.int32), r"must have shape \[num_documents \+ 1\], got \[0\]"),
        (torch.tensor(0), r"must have shape \[num_documents \+ 1\], got \[\]"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentLayout.from_cu_seqlens(cu_seqlens, total_tokens=9)


@pytest.mark.parametrize(
    ("position_ids", "message"),
    [
        (torch.tensor([0, 1, -1]), "position_ids must not be negative, got -1"),
        (torch.tensor([0, 1, 3]), "row 0 has position 3 at token 2"),
        (torch.tensor([[0, 1], [1, 2]]), "row 1 has position 1 at token 0"),
        (torch.tensor([1, 1, 1, 0, 1]), "row 0 has position 1 at token 0"),
        (torch.tensor([0.0, 1.0]), "position_ids must be integers, got torch.float32"),
        (torch.tensor([False, True]), "position_ids must be integers, got torch.bool"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"shape \[T\] or \[B, T\], got \[1, 2, 3\]"),
    ],
)
def test_bad_position_ids(position_ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentLayout.from_position_ids(position_ids)


def test_ids_that_come_back() -> None:
    with pytest.raises(ValueError, match=r"document_ids must name contiguous.* row 1 has 4 in sev"):
        DocumentLayout.from_document_ids(torch.tensor([[4, 4, 5], [4, 5, 4]]))
    with pytest.raises(ValueError, match=r"attention_mask must name contiguous.* row 0 has 1 in"):
        DocumentLayout.from_attention_mask(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match=r"attention_mask must not be negative, got -2"):
        DocumentLayout.from_attention_mask(torch.tensor([1, -2]))
    with pytest.raises(ValueError, match=r"attention_mask must be integers, got torch.float32"):
        DocumentLayout.from_attention_mask(torch.ones(3))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 0], "parents has 2 entries for 4 documents"),
        ([-1, 2, 0, 0], r"parents must point to an earlier document.* parents\[1\] is 2"),
        ([-1, 1, 0, 0], r"parents must point to an earlier document.* parents\[1\] is 1"),
        ([3, 0, 1, 2], r"parents must point to an earlier document.* parents\[0\] is 3"),
        ([-1, -2, 0, 0], r"parents\[1\] is -2"),
        ([-1, -1, 0, -1], "depth-first order, but document 2 continues 0 after another branch"),
        ([-1, 0, 0, 1], "depth-first order, but document 3 continues 1"),
        ([-1, 0.0, 0, 0], "parents must be integers, got 0.0"),
        ([-1, False, 0, 0], "parents must be integers, got False"),
    ],
)
def test_bad_parents(parents, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DocumentLayout.from_lengths([1, 2, 3, 4], parents=parents)


def test_bad_padding() -> None:
    with pytest.raises(ValueError, match="padding has 1 entries for 2 documents"):
        DocumentLayout.from_lengths([1, 2], padding=[True])
    with pytest.raises(ValueError, match="padding must be booleans, got 2"):
        DocumentLayout.from_lengths([1, 2], padding=[0, 2])


@pytest.mark.parametrize("padding", [(True, False, False), (False, True, False)])
def test_padding_stands_alone_in_a_forest(padding: tuple[bool, ...]) -> None:
    with pytest.raises(ValueError, match=r"padding must be a root without children, but document"):
        DocumentLayout.from_lengths([3, 2, 1], parents=[-1, 0, -1], padding=padding)


@given(LENGTHS)
def test_lengths_and_cu_seqlens_agree(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    assert layout.cu_seqlens.tolist() == [0, *accumulate(lengths)]
    again = DocumentLayout.from_cu_seqlens(layout.cu_seqlens)
    assert _same(layout, again)
    assert again.lengths == tuple(lengths)


@given(LENGTHS)
def test_derived_tensors_match_a_loop(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    assert layout.position_ids.tolist() == [i for n in lengths for i in range(n)]
    assert layout.document_ids.tolist() == [d for d, n in enumerate(lengths) for _ in range(n)]
    assert layout.document_starts.tolist() == [i == 0 for n in lengths for i in range(n)]
    values = torch.arange(100, 100 + len(lengths))
    assert layout.per_token(values).tolist() == [
        100 + d for d, n in enumerate(lengths) for _ in range(n)
    ]


@given(FILLED)
def test_ids_and_positions_give_the_layout_back(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    assert _same(layout, DocumentLayout.from_position_ids(layout.position_ids))
    assert _same(layout, DocumentLayout.from_document_ids(layout.document_ids))
    assert _same(layout, DocumentLayout.from_attention_mask(layout.document_ids + 1))


@given(FILLED, st.data())
def test_padding_comes_back_through_ids(lengths: list[int], data: st.DataObject) -> None:
    # No two neighbours, which would be one run.
    padding = [
        d % 2 == 1 and flag
        for d, flag in enumerate(data.draw(st.tuples(*[st.booleans()] * len(lengths))))
    ]
    layout = DocumentLayout.from_lengths(lengths, padding=padding)
    hidden = layout.per_token(torch.tensor(padding))
    ids = layout.document_ids.masked_fill(hidden, -1)
    assert _same(layout, DocumentLayout.from_document_ids(ids))
    assert _same(layout, DocumentLayout.from_attention_mask(ids + 1))


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_rows_are_one_stream(rows: int, width: int, data: st.DataObject) -> None:
    """A batch of packed rows is the rows' documents end to end."""
    packs = []
    for _ in range(rows):
        cuts = data.draw(st.sets(st.integers(1, width - 1))) if width > 1 else set()
        bounds = [0, *sorted(cuts), width]
        packs.append([b - a for a, b in pairwise(bounds)])
    batch = torch.stack([DocumentLayout.from_lengths(pack).position_ids for pack in packs])
    layout = DocumentLayout.from_position_ids(batch)
    assert layout.lengths == tuple(n for pack in packs for n in pack)


def test_to_keeps_one_copy_per_device() -> None:
    layout = DocumentLayout.from_lengths([2, 3], parents=[-1, 0])
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert layout.to("meta", non_blocking=True) is moved
    assert moved.to("meta") is moved
    assert moved.to("cpu") is layout
    assert moved.parents is not None
    assert moved.parents.device.type == "meta"
    assert moved.position_ids is moved.position_ids
    assert layout.to("cpu:0") is layout


def test_fsdp_hands_a_layer_the_layout_itself() -> None:
    """It walks through dataclasses, without end where copies on two devices know each other, and
    builds them anew for every layer."""
    from torch.distributed.utils import _apply_to_tensors

    layout = DocumentLayout.from_lengths([2, 3], parents=[-1, 0])
    layout.to("meta")
    assert not dataclasses.is_dataclass(layout)
    assert _apply_to_tensors(lambda tensor: tensor, {"layout": layout})["layout"] is layout


def test_host_facts_travel_without_reading_a_device() -> None:
    """A meta tensor has no values to read: what is answered was not read from it."""
    moved = DocumentLayout.from_lengths([2, 3, 1], parents=[-1, 0, 0]).to("meta")
    assert moved.lengths == (2, 3, 1)
    assert moved.starts == (0, 2, 5)
    assert moved.max_seqlen == 3
    assert moved.path(2) == (0, 2)
    assert (moved.total_tokens, moved.num_documents) == (6, 3)
    assert moved.visibility().key_start.shape == (6,)
    assert moved.visibility(window_size=(1, 0)).halves == "both"


def test_lengths_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = DocumentLayout(torch.tensor([0, 2, 5], dtype=torch.int32), 5)
    reads = []
    read = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: reads.append(x) or read(x))
    assert [bare.lengths, bare.lengths, bare.starts, bare.max_seqlen][0] == (2, 3)
    assert len(reads) == 1


@pytest.mark.parametrize("captures", [False, True])
def test_nothing_waits_for_a_gpu_but_a_capture_fails(
    captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph would read the host's page-locked memory again when it holds something else."""
    asked: list[tuple[str, bool]] = []

    class Host:
        device = torch.device("cpu")

        def __init__(self, memory: str) -> None:
            self.memory = memory

        def pin_memory(self) -> Host:
            return Host("page-locked")

        def to(self, device: torch.device, non_blocking: bool) -> None:
            asked.append((self.memory, non_blocking))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captures)
    tensor: Any = Host("pageable")
    sent(tensor, torch.device("cuda"))
    sent(tensor, torch.device("cpu"))
    assert asked == [
        ("pageable", False) if captures else ("page-locked", True),
        ("pageable", False),
    ]


def test_pin_memory_pins_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    layout = DocumentLayout.from_lengths([2, 3, 1], parents=[-1, 0, -1], padding=[0, 0, 1])
    copied = layout.pin_memory()
    assert [id(x) for x in pinned] == [
        id(layout.cu_seqlens),
        id(layout.parents),
        id(layout.padding),
    ]
    assert copied is not layout
    assert copied.path(1) == (0, 1)
    assert _same(copied, layout)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_independent(clone) -> None:
    layout = DocumentLayout.from_lengths([2, 3, 1], parents=[-1, 0, -1], padding=[0, 0, 1])
    before = layout.visibility().dense()
    layout.to("meta")
    copied = clone(layout)
    assert _same(copied, layout)
    assert copied.cu_seqlens is not layout.cu_seqlens
    assert copied.lengths == layout.lengths
    assert copied.path(1) == (0, 1)
    assert copied.total_tokens == 6
    assert torch.equal(copied.visibility().dense(), before)
    assert copied.position_ids is not layout.position_ids


KINDS = ({}, {"window_size": (2, 0)}, {"causal": False, "prefix_lengths": (1, 0, 2)})


@pytest.mark.parametrize(
    "move",
    [lambda x: x, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.to("meta")],
    ids=["here", "pickle", "to"],
)
def test_prepared_masks_move_with_the_layout(move, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([2, 3, 4], padding=[0, 0, 1])
    assert layout.prepare(KINDS) is layout
    dense = [layout.visibility(**kind).dense() for kind in KINDS]
    moved = move(layout)

    def not_again(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("packed_attn.layout.build_visibility", not_again)
    monkeypatch.setattr(DocumentLayout, "_position_ids", not_again)
    monkeypatch.setattr(DocumentLayout, "_document_ids", not_again)
    for kind, wanted in zip(KINDS, dense):
        visibility = moved.visibility(**kind)
        assert visibility.key_stop.device == moved.device
        if moved.device.type == "cpu":
            assert torch.equal(visibility.dense(), wanted)
    assert moved.position_ids.device == moved.document_ids.device == moved.device
    assert moved.prefix((1, 0, 2)) is not None
    with pytest.raises(AssertionError, match="made again"):
        moved.visibility(window_size=(1, 0))


def test_a_prepared_forest_moves_with_its_tensors() -> None:
    layout = DocumentLayout.from_lengths([2, 3, 4], parents=[-1, 0, 0]).prepare()
    moved = layout.to("meta")
    assert moved.forest_tensors().path_offset.device.type == "meta"
    assert moved.forest_tensors().depth == 1


def test_masks_of_prefixes_are_kept() -> None:
    """By values, or by the tensor as it is now."""
    layout = DocumentLayout.from_lengths([4, 3])
    first = layout.visibility(prefix_lengths=[2, 1])
    assert layout.visibility(prefix_lengths=(2, 1)) is first
    assert layout.visibility(prefix_lengths=(2, 2)) is not first
    prefix = torch.tensor([2, 1])
    by_tensor = layout.visibility(prefix_lengths=prefix)
    assert layout.visibility(prefix_lengths=prefix) is by_tensor
    assert torch.equal(by_tensor.dense(), first.dense())
    assert layout.prefix(prefix) is layout.prefix(prefix)
    prefix[1] = 3
    changed = layout.visibility(prefix_lengths=prefix)
    assert changed is not by_tensor
    assert torch.equal(changed.dense(), layout.visibility(prefix_lengths=[2, 3]).dense())


def test_prefixes_of_inference_mode_are_read_each_time() -> None:
    """They have no version that would tell when they were written to."""
    layout = DocumentLayout.from_lengths([4, 3])
    with torch.inference_mode():
        prefix = torch.tensor([2, 1])
        before = layout.visibility(prefix_lengths=prefix).dense()
        prefix[1] = 3
        after = layout.visibility(prefix_lengths=prefix).dense()
    assert torch.equal(before, layout.visibility(prefix_lengths=[2, 1]).dense())
    assert torch.equal(after, layout.visibility(prefix_lengths=[2, 3]).dense())


def test_a_layout_keeps_a_bounded_number_of_masks() -> None:
    layout = DocumentLayout.from_lengths([4, 3])
    causal = layout.visibility()
    for n in range(100):
        layout.visibility(prefix_lengths=torch.tensor([n, 1]))
        layout.prefix(torch.tensor([n, 1]))
        layout.visibility(window_size=(n, 0))
        layout.visibility(key_layout=DocumentLayout.from_lengths([n, 1]))
    assert len(layout._derived) <= 2 * KEPT_MASKS + 5
    assert torch.equal(layout.visibility().dense(), causal.dense())


def test_layout_is_frozen() -> None:
    layout = DocumentLayout.from_lengths([2])
    with pytest.raises(AttributeError):
        layout.total_tokens = 3  # type: ignore[misc]


def test_repr_says_what_it_is() -> None:
    layout = DocumentLayout.from_lengths([2, 3, 4], parents=[-1, 0, -1], padding=[0, 0, 1])
    assert repr(layout) == "DocumentLayout(3 documents, 9 tokens, forest, padding, cpu)"
