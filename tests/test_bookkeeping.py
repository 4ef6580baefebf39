"""The bookkeeping kernels in triton's interpreter against the torch operators they stand for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process started with TRITON_INTERPRET=1 (make test)", allow_module_level=True
    )

from packed_attn_kernels import plan_tiles, tile_list
from packed_attn_kernels.bookkeeping import mask_intervals, tile_lists
from packed_attn_kernels.configurations import Problem, capacity
from packed_attn_kernels.tiles import key_blocks
from triton.runtime import interpreter

from packed_attn import DocumentLayout, Visibility, attention, visibility
from tests.cases import LOG_NORMAL, ONE_LONG, SMALL, Case

VECTORS = ("key_start", "key_stop", "query_start", "query_stop", "query_position", "key_position")
# Rows of a tile of the forward, of keys and of dq.
ROWS = (16, 32, 64)
HUNDREDS = {
    "tiny": (1, 2, 0, 3) * 150,
    "of_a_tile": (31, 32, 33, 63, 64, 65) * 4,
    "one": (2100,),
    "empty": (0,) * 300 + (5,) + (0,) * 300,
}


def _masks() -> list[Case]:
    """The cases of SMALL whose documents or mask no earlier one has."""
    seen = {}
    for case in SMALL:
        key = (case.lengths, case.parents, case.padding, case.key_lengths, case.causal)
        key += (case.window_size, case.chunk_size, case.prefix_lengths)
        seen.setdefault(key, case)
    return list(seen.values())


@pytest.mark.parametrize("case", _masks(), ids=lambda case: case.name)
def test_vectors_and_lists_of_named_cases(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, specified = _both(case, monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, ROWS)


@pytest.mark.parametrize("lengths", HUNDREDS.values(), ids=HUNDREDS.keys())
@pytest.mark.parametrize("window", [(-1, 0), (40, 0), (3, 5)])
def test_hundreds_of_documents(lengths, window, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("hundreds", lengths, causal=False, window_size=window)
    launched, specified = _both(case, monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, (128, 64, 32))


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [LOG_NORMAL, ONE_LONG], ids=["log-normal", "16k + 256 x 64"])
def test_batches_of_real_size(lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, specified = _both(Case("real", lengths), monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, (128, 64, 128))


@given(
    st.lists(st.tuples(*[st.integers(0, 70)] * 2, st.booleans(), st.integers(0, 90)), max_size=9),
    st.booleans(),
    st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    st.none() | st.integers(1, 40),
    st.booleans(),
)
@settings(max_examples=15)
def test_any_documents(documents, causal, window, chunk, cross) -> None:
    """Lengths of both sides, padding, prefixes, windows and chunks at once."""
    case = Case(
        "any",
        tuple(n for n, _, _, _ in documents),
        padding=tuple(hidden for _, _, hidden, _ in documents),
        key_lengths=tuple(n for _, n, _, _ in documents) if cross else None,
        prefix_lengths=tuple(n for _, _, _, n in documents),
        causal=causal,
        window_size=window,
        chunk_size=chunk,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        launched, specified = _both(case, monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, (16, 32, 16))


@given(st.data(), st.tuples(st.integers(-1, 40), st.integers(-1, 9)), st.none() | st.integers(1, 9))
@settings(max_examples=15)
def test_any_forest(data: st.DataObject, window, chunk) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    parents, branch = [], []
    for document in range(len(lengths)):
        depth = data.draw(st.integers(0, len(branch)))
        parents.append(branch[depth - 1] if depth else -1)
        branch = [*branch[:depth], document]
    case = Case(
        "any",
        tuple(lengths),
        parents=tuple(parents),
        causal=data.draw(st.booleans()),
        window_size=window,
        chunk_size=chunk,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        launched, specified = _both(case, monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, (16, 16, 32))


def test_more_tiles_than_one_step_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, specified = _both(Case("long", (700, 3, 3500, 90, 1)), monkeypatch)
    _assert_equal(launched, specified)
    _assert_lists(specified, (16, 128, 16))


def test_prefixes_below_0_are_0() -> None:
    """A device does not tell the host of them."""
    cu = torch.tensor([0, 7, 9, 14], dtype=torch.int32)
    below, at = torch.tensor([-3, 1, -(2**31)]), torch.tensor([0, 1, 0])
    for one, other in zip(
        mask_intervals(cu, cu, 14, 14, left=3, right=0, chunk_size=4, prefix=below),
        mask_intervals(cu, cu, 14, 14, left=3, right=0, chunk_size=4, prefix=at),
    ):
        assert torch.equal(one, other)


def test_padding_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = DocumentLayout.from_lengths([2, 3], padding=[True, False])
    keys = DocumentLayout.from_lengths([4, 1])
    for layout, key_layout in ((queries, keys), (keys, queries)):
        _assert_equal(*_both_of(layout, monkeypatch, causal=False, key_layout=key_layout))


@pytest.mark.parametrize("huge", [2**31, 2**63 - 1])
def test_huge_windows_and_chunks(huge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([5, 0, 3])
    keys = DocumentLayout.from_lengths([2, 6, 9])
    for kind in ({"window_size": (huge, huge)}, {"chunk_size": huge}):
        mask: dict[str, Any] = {"causal": False, "key_layout": keys, **kind}
        _assert_equal(*_both_of(layout, monkeypatch, **mask))


def test_boundaries_of_either_integer_type_and_any_stride() -> None:
    wide = torch.tensor([0, 7, 7, 9, 9, 7, 14, 7])[::2]
    narrow = torch.tensor([0, 7, 9, 14], dtype=torch.int32)
    for one, other in zip(
        mask_intervals(wide, wide, 14, 14, left=3, right=0),
        mask_intervals(narrow, narrow, 14, 14, left=3, right=0),
    ):
        assert torch.equal(one, other)


def test_two_launches_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for a mask's vectors, one for its lists, and no operator of torch besides."""
    layout = DocumentLayout.from_lengths([40, 3, 21])
    q, k, v = torch.randn(3, 64, 2, 16).unbind()
    attention(q, k, v, DocumentLayout.from_lengths([64]), backend="triton")  # loads the kernels
    launches = _count_launches(monkeypatch)
    for _ in range(3):
        attention(q, k, v, layout, backend="triton")
        attention(q, k, v, layout, window_size=(9, 0), backend="triton")
    assert launches.count("intervals_kernel") == launches.count("tile_lists_kernel") == 2
    assert launches.count("forward_kernel") == 6
    assert len(launches) == 10


def test_no_operator_besides_the_two() -> None:
    layout = DocumentLayout.from_lengths([40, 3, 21], padding=[False, True, False])
    keys = DocumentLayout.from_lengths([4, 30, 2])
    seen = _Operators()
    with seen:
        vis = layout.visibility(window_size=(9, 0), chunk_size=16, key_layout=keys)
        plan_tiles(vis.key_start, vis.key_stop, vis.query_start, vis.query_stop, PROBLEM)
    assert seen.names == ["packed_attn::mask_intervals", "packed_attn::tile_lists"]


def test_boundaries_change_under_one_grid() -> None:
    """What a CUDA graph replays: the same launch on a tensor that was written anew."""
    cu = torch.zeros(5, dtype=torch.int32)
    for lengths in ((64, 0, 0, 0), (1, 20, 3, 40), (16, 16, 16, 16)):
        cu[1:] = torch.tensor(lengths).cumsum(0)
        key_start, key_stop, _, query_start, query_stop, _ = mask_intervals(
            cu, cu, 64, 64, left=-1, right=0
        )
        want = DocumentLayout.from_lengths(lengths).visibility()
        for got, name in zip((key_start, key_stop, query_start, query_stop), VECTORS):
            assert torch.equal(got, getattr(want, name))


def test_no_launch_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = _count_launches(monkeypatch)
    for lengths in ((), (0, 0)):
        vis = DocumentLayout.from_lengths(lengths).visibility()
        lists = tile_lists(vis.key_start, vis.key_stop, vis.query_start, vis.query_stop, ROWS)
        assert [list(x.shape) for x in lists] == [*[[0, 2]] * 3, [4, 0]]
    assert launches == []


def test_a_compiler_traces_the_kernels_whole() -> None:
    def stop(layout: DocumentLayout) -> Tensor:
        vis = layout.visibility(window_size=(9, 0))
        return vis.key_start + vis.key_stop

    compiled: Any = torch.compile(stop, fullgraph=True, backend="aot_eager")
    for lengths in ((40, 24), (10, 20, 34)):
        want = stop(DocumentLayout.from_lengths(lengths))
        assert torch.equal(compiled(DocumentLayout.from_lengths(lengths)), want)


def test_operators_pass_opcheck() -> None:
    cu = torch.tensor([0, 7, 9, 14], dtype=torch.int32)
    arguments = (cu, cu, None, None, None, [], 14, 14, 0, 3, 0, None)
    torch.library.opcheck(torch.ops.packed_attn.mask_intervals.default, arguments)
    vectors = mask_intervals(cu, cu, 14, 14, left=3, right=0)
    arguments = (vectors[0], vectors[1], vectors[3], vectors[4], 16, 32, 16)
    torch.library.opcheck(torch.ops.packed_attn.tile_lists.default, arguments)


PROBLEM = Problem(
    head_dim=16, value_dim=16, group=1, itemsize=4, halves="either", has_softcap=False,
    has_sinks=False,
)  # fmt: skip


class _Operators(TorchDispatchMode):
    """The names of the operators that run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    launches: list[str] = []
    launch = interpreter.GridExecutor.__call__

    def recorded(executor: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(executor.fn.__name__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", recorded)
    return launches


def _both(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[Visibility, Visibility]:
    mask: dict[str, Any] = {
        "causal": case.causal,
        "window_size": case.window_size,
        "chunk_size": case.chunk_size,
        "prefix_lengths": case.prefix_lengths,
        "key_layout": case.key_layout(),
    }
    return _both_of(case.layout(), monkeypatch, **mask)


def _both_of(
    layout: DocumentLayout, monkeypatch: pytest.MonkeyPatch, **mask: Any
) -> tuple[Visibility, Visibility]:
    """The mask by kernels and by torch operators."""
    fresh = DocumentLayout.from_lengths(
        layout.lengths, parents=layout.parents, padding=layout.padding
    )
    assert visibility._runs_kernels(layout.device)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", _poisoned)
        launched = layout.visibility(**mask)
    with monkeypatch.context() as patch:
        patch.setattr(visibility, "_runs_kernels", lambda device: False)
        return launched, fresh.visibility(**mask)


def _assert_equal(launched: Visibility, specified: Visibility) -> None:
    assert launched.halves == specified.halves
    for name in VECTORS:
        got, want = getattr(launched, name), getattr(specified, name)
        assert got.dtype == torch.int32
        assert torch.equal(got, want), name


def _assert_lists(vis: Visibility, rows: tuple[int, int, int]) -> None:
    """The lists of `tile_list`, entry for entry, out of memory that held something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", _poisoned)
        lists = tile_lists(vis.key_start, vis.key_stop, vis.query_start, vis.query_stop, rows)
    sides = ((vis.key_start, vis.key_stop), (vis.query_start, vis.query_stop))
    for got, (start, stop), block in zip(lists, (*sides, sides[0]), rows):
        assert list(got.shape) == [capacity(start.numel(), block), 2]
        assert torch.equal(got, tile_list(start, stop, block))
    assert torch.equal(lists[3], key_blocks(vis.query_start, vis.query_stop))


def _poisoned(like: Tensor, *size: Any, **options: Any) -> Tensor:
    return torch.full(
        torch.Size(size if size and isinstance(size[0], int) else size[0]),
        -77,
        dtype=options.get("dtype", like.dtype),
        device=like.device,
    )
