"""The Hopper kernels in an interpreter of Gluon (`tests/gluon/`): exact, isolated, confined.

Every case runs through the launches that a Hopper GPU takes, under schedules that a seed makes.
Kernels that are broken on purpose must be found out. The other kernels of a call run in triton's
interpreter, so that these tests need a process started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "needs a process started with TRITON_INTERPRET=1 (make test)", allow_module_level=True
    )

from packed_attn_kernels import configurations, hopper_launch, launch
from packed_attn_kernels.configurations import (
    HOPPER,
    HOPPER_CANDIDATES,
    Halves,
    HopperConfiguration,
)

import tests.gluon.hopper
from packed_attn import attention
from packed_attn.backends import triton as backend
from tests.cases import BY_NAME, Case, Inputs
from tests.gluon import Kernel, interpreted
from tests.gluon.machine import Deadlock, Fault
from tests.oracle import assert_confined, assert_exact, assert_isolated, run

MODULES = ("hopper_walk", "hopper_blocks", "hopper_forward", "hopper_backward")
# Each block's place in the rings is taken by others of its item.
LONG = Case("long", (530, 70), num_heads=2, num_kv_heads=1)
# A tree over many blocks, whose tiles begin inside of them; answers have answers, and there are
# documents and another tree beside it.
LONG_FOREST = Case(
    "long_forest", (70, 300, 40, 130, 5, 260, 70, 200, 33), (-1, -1, 1, 1, 3, 1, -1, -1, 7),
    num_heads=2, num_kv_heads=1,
)  # fmt: skip
# Fewer than the items of most cases, so that programs go through several.
MULTIPROCESSORS = 3
# Of the forward: what the launch takes, then candidates.
FORMS = [
    pytest.param((head_dim, form), id=f"head_dim_{head_dim}_form_{n}")
    for head_dim, chosen in HOPPER.items()
    for n, form in enumerate((chosen, *HOPPER_CANDIDATES[head_dim]))
]
CHOSEN = [form for form in FORMS if str(form.id).endswith("form_0")]
CANDIDATES = [
    pytest.param(*form.values, id=form.id, marks=pytest.mark.slow)
    for form in FORMS
    if form not in CHOSEN
]


def _case(entry: str, head_dim: int, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Case:
    """A case of the table; one of another name has results of its own (`oracle._clean`)."""
    case = (BY_NAME | {x.name: x for x in (LONG, LONG_FOREST)})[entry]
    return replace(case, **{"head_dim": head_dim, "dtype": dtype} | fields)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Launches take this CPU for a Hopper GPU; gives the names of the kernels that ran."""
    with _hopper(monkeypatch) as ran:
        yield ran


@contextmanager
def _hopper(
    monkeypatch: pytest.MonkeyPatch, edits: tuple[tuple[str, str], ...] = ()
) -> Iterator[list[str]]:
    ran: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        real = getattr(launch, f"launch_hopper_{name}")

        def run_it(*arguments: Any) -> Any:
            ran.append(name)
            return real(*arguments)

        return run_it

    for name in ("forward", "backward"):
        monkeypatch.setattr(launch, f"launch_hopper_{name}", noted(name))
    reasons = hopper_launch.reasons_against_hopper_kernel
    everything = itertools.product(HOPPER, (2,), get_args(Halves))
    monkeypatch.setattr(configurations, "HOPPER_FORWARD", frozenset(everything))
    monkeypatch.setattr(hopper_launch, "INTERPRETED", False)
    monkeypatch.setattr(hopper_launch, "_kernel_reasons", lambda *x: reasons(*x[:2], (9, 0)))
    monkeypatch.setattr(hopper_launch, "_multiprocessors", lambda _: MULTIPROCESSORS)
    # As on a GPU that has it.
    monkeypatch.setattr(
        backend,
        "_backward",
        lambda request, _: "split" if request.confine_nonfinite else "fused",
    )
    with interpreted(*(f"packed_attn_kernels.{name}" for name in MODULES), edits=edits):
        yield ran


EXACT = (
    "long",
    "mixed",
    "two_longer_than_a_tile",
    "hundreds_of_tiny",
    "empty_documents",
    "no_tokens",
    "one_token",
    "padding_between",
    "all_padding",
    "multi_query",
    "group_of_three",
    "strided",
    "bidirectional",
    "window_left_long",
    "window_both",
    "chunk_window",
    "prefix",
    "softmax_scale",
    "sinks_padding",
    "lse_gradient_padding",
)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", EXACT)
def test_exact(hopper: list[str], name: str, head_dim: int) -> None:
    case = _case(name, head_dim)
    assert_exact("triton", case, "cpu")
    assert hopper == ([] if sum(case.lengths) == 0 else ["forward", "backward"])


FORESTS = ("forest_nested", "forest_many_answers", "forest_long", "forest_padding", "long_forest")


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [*FORESTS, "forest_bidirectional"])
def test_forests_are_exact(hopper: list[str], name: str, head_dim: int) -> None:
    assert_exact("triton", _case(name, head_dim), "cpu")
    assert hopper == ["forward", "backward"]


WINDOWS: dict[str, dict[str, Any]] = {
    "forest_window": {},
    "forest_chunk": {},
    "forest_sinks_softcap": {"window_size": (9, 0)},
    "long_forest": {"window_size": (200, 0)},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_forests_with_windows_take_the_forward_alone(hopper: list[str], name: str) -> None:
    """Both halves of the rule decide."""
    case = _case(name, 128, name=f"{name} and a window", **WINDOWS[name])
    assert_exact("triton", case, "cpu")
    assert hopper == ["forward"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_siblings_cost_nothing(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """Blocks that are copied: those of the prompt for each answer, not those of other answers."""
    copied = []
    real = tests.gluon.hopper.tma.async_copy_global_to_shared

    def counted(descriptor: Any, *rest: Any) -> None:
        copied.append(tuple(descriptor.block_type.shape))
        real(descriptor, *rest)

    monkeypatch.setattr(tests.gluon.hopper.tma, "async_copy_global_to_shared", counted)
    counts = []
    for answers in (1, 3, 5):
        case = Case(
            "siblings", (256, *[256] * answers), (-1, *[0] * answers), num_heads=1, num_kv_heads=1,
            head_dim=head_dim, dtype=torch.bfloat16,
        )  # fmt: skip
        inputs = case.inputs()
        copied.clear()
        with monkeypatch.context() as patch, _hopper(patch):
            attention(inputs.q, inputs.k, inputs.v, case.layout(), backend="triton")
        block = (HOPPER[head_dim].BLOCK_N, head_dim)
        counts.append(copied.count(block) // 2)
    per_answer = (128 + 256 + 2 * 256) // HOPPER[head_dim].BLOCK_N
    assert counts[2] - counts[1] == counts[1] - counts[0] == 2 * per_answer


def test_forests_are_isolated(hopper: list[str]) -> None:
    assert_isolated("triton", _case("forest_nested", 64), "cpu")
    assert "backward" in hopper


def test_softcap_has_the_forward_alone(hopper: list[str]) -> None:
    assert_exact("triton", _case("softcap", 64), "cpu")
    assert hopper == ["forward"]


def test_float16(hopper: list[str]) -> None:
    assert_exact("triton", _case("sinks_window", 128, torch.float16), "cpu")
    assert hopper == ["forward", "backward"]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["mixed", "two_longer_than_a_tile"])
def test_isolated(hopper: list[str], name: str, head_dim: int) -> None:
    assert_isolated("triton", _case(name, head_dim), "cpu")
    assert set(hopper) == {"forward", "backward"}


@pytest.fixture
def form(
    request: pytest.FixtureRequest, hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Each form of the forward that is in a table; gives its head_dim."""
    head_dim, chosen = request.param
    monkeypatch.setitem(HOPPER, head_dim, chosen)
    yield head_dim
    assert "forward" in hopper


SMALL_HEADS = {"num_heads": 2, "num_kv_heads": 1}


@pytest.mark.parametrize(
    "name",
    [
        "sinks_window",
        "forest_nested",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("long", "long_forest")),
    ],
)
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_forms_are_exact(form: int, request: pytest.FixtureRequest, name: str) -> None:
    assert_exact("triton", _case(name, form, name=request.node.name, **SMALL_HEADS), "cpu")


@pytest.mark.parametrize(
    "name",
    [
        "longer_than_a_tile",
        "forest_nested",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("long", "long_forest")),
    ],
)
@pytest.mark.parametrize("form", [*CHOSEN, *CANDIDATES], indirect=True)
def test_forms_are_confined(form: int, request: pytest.FixtureRequest, name: str) -> None:
    """A second kernel repairs tiles that a NaN reached: all other rows keep their bits."""
    assert_confined("triton", _case(name, form, name=request.node.name, **SMALL_HEADS), "cpu")


@pytest.fixture
def both_backwards(
    hopper: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case, Inputs], list[tuple[Tensor, Tensor]]]:
    """Each gradient by the Hopper backward and by the portable split one."""

    def gradients(case: Case, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
        found = run("triton", case, inputs, "cpu").grads
        assert hopper == ["forward", "backward"]
        monkeypatch.setattr(backend, "_backward", lambda *_: "split")
        portable = run("triton", case, inputs, "cpu").grads
        assert hopper == ["forward", "backward", "forward"]
        return [(found[name], portable[name]) for name in found]

    return gradients


# A document's tokens, and the one with a NaN.
@pytest.mark.parametrize(
    ("name", "document", "broken"), [("padding_between", (68, 82), 70), ("forest_nested", None, 30)]
)
def test_a_backward_that_is_not_finite_is_done_again(
    both_backwards: Any, name: str, document: tuple[int, int] | None, broken: int
) -> None:
    """A NaN that reached every row leaves no trace: gradients are the portable ones, to the bit,
    with NaNs in its own document alone."""
    case = _case(name, 64)
    inputs = case.inputs()
    inputs.k[broken, 1, 5] = float("nan")
    for done_again, portable in both_backwards(case, inputs):
        torch.testing.assert_close(done_again, portable, rtol=0, atol=0, equal_nan=True)
        if document is not None:
            start, stop = document
            assert done_again[start:stop].isnan().any()
            assert not done_again[:start].isnan().any()
            assert not done_again[stop:].isnan().any()


def test_a_finite_backward_is_not_done_again(both_backwards: Any) -> None:
    case = _case("padding_between", 64)
    for found, portable in both_backwards(case, case.inputs()):
        assert not torch.equal(found, portable), "products are rounded elsewhere"


@pytest.mark.parametrize("seed", range(1, 6))
def test_schedules(hopper: list[str], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Another order of what runs beside each other gives out, lse, dk and dv to the bit."""
    case = _case("two_longer_than_a_tile", 128)
    first = run("triton", case, case.inputs(), "cpu")
    monkeypatch.setattr(Kernel, "seed", seed)
    other = run("triton", case, case.inputs(), "cpu")
    assert torch.equal(first.out, other.out)
    assert torch.equal(first.lse, other.lse)
    for name in ("k", "v"):
        assert torch.equal(first.grads[name], other.grads[name])
    torch.testing.assert_close(first.grads["q"], other.grads["q"], rtol=1e-2, atol=1e-2)


AHEAD = HopperConfiguration(128, 2, q_slots=2, out_in_q=True, ahead=True)
CARRIED = replace(AHEAD, carried=True, turns=True)

# What is broken: the lines of a kernel, what stands there instead, what comes of it.
BROKEN: dict[str, tuple[str, str, type[BaseException]]] = {
    "v's place is never free": (
        """\
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(at % STAGES))
    return s, acc, m, l""",
        """\
    acc = warpgroup_mma_wait(0, deps=[sums])
    return s, acc, m, l""",
        Deadlock,
    ),
    "v's place is free before the product": (
        """\
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(at % STAGES))
    return s""",
        """\
    mbarrier.arrive(v_empty.index(at % STAGES))
    acc = warpgroup_mma_wait(0, deps=[sums])
    return s""",
        Fault,
    ),
    "k is not waited for": (
        "    mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1)\n    none",
        "    none",
        Fault,
    ),
    "ahead: q is not waited for": ("    mbarrier.wait(q_full.index(theirs), phase)\n", "", Fault),
    "ahead: k is not waited for": (
        """\
    if item >= 0:
        mbarrier.wait(k_full.index(after % STAGES), (after // STAGES) & 1)
""",
        "",
        Fault,
    ),
    "ahead: the item before gives its scores": (
        "theirs, mine)),\n        k.index(slot)",
        "mine, mine)),\n        k.index(slot)",
        AssertionError,
    ),
    "carried: v is not waited for": (
        "    mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)\n    acc = ",
        "    acc = ",
        Fault,
    ),
    "carried: v's place is free before its product": (
        """\
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index(ended % STAGES))
""",
        """\
    mbarrier.arrive(v_empty.index(ended % STAGES))
    acc = warpgroup_mma_wait(0, deps=[sums])
""",
        Fault,
    ),
    "carried: sums are not scaled": (
        """\
    mbarrier.arrive(v_empty.index(ended % STAGES))
    acc *= gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
""",
        "    mbarrier.arrive(v_empty.index(ended % STAGES))\n",
        AssertionError,
    ),
    "carried: a turn does not end": (
        "    mbarrier.arrive(turns.index(1 - half))",
        "    pass",
        Deadlock,
    ),
    "the other phase": ("phase = (at // STAGES + 1) & 1", "phase = 0", Deadlock),
    "a row sees a key too many": (
        "past >> 3\n",
        "(past + 1) >> 3\n",
        AssertionError,
    ),
    "nothing is masked": (
        's = gl.where(sees, s, -float("inf"))\n    return s, factor',
        "pass\n    return s, factor",
        AssertionError,
    ),
    "q is overwritten": (
        "            _wait_for_place(q_empty, done, Q_SLOTS)\n            intervals",
        "            intervals",
        Fault,
    ),
    "out is written after q": (
        """\
            fence_async_shared()
            barrier()
            mbarrier.arrive(q_empty""",
        """\
            barrier()
            mbarrier.arrive(q_empty""",
        Fault,
    ),
    "forest: intervals of keys are not waited for": (
        """\
    if MASKED and QUERY_HALF:
        mbarrier.wait(v_full.index(at % STAGES), (at // STAGES) & 1)
    # Before""",
        "    # Before",
        Fault,
    ),
    "forest: a block counts as full where one row sees it": (
        "mask=there, other=FAR) <= first\n",
        "mask=there, other=FAR) <= last\n",
        AssertionError,
    ),
    "forest: a block is skipped where one row does not see it": (
        "mask=there, other=FAR) <= last\n",
        "mask=there, other=FAR) <= first\n",
        AssertionError,
    ),
    "ds is not fenced": (
        "    fence_async_shared()\n    mbarrier.arrive(ds_full.index(pair))",
        "    mbarrier.arrive(ds_full.index(pair))",
        Fault,
    ),
    "ds of the other warpgroup is not waited for": (
        "    mbarrier.wait(ds_full.index(pair), (n // 2) & 1)\n",
        "",
        Fault,
    ),
    "a share is overwritten": (
        "    tma.store_wait(0)\n    _barrier()\n    shares",
        "    _barrier()\n    shares",
        Fault,
    ),
    "a share goes to another head": (
        "row = ((number + g * padded_queries + at)",
        "row = ((number + at)",
        AssertionError,
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_found_out(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    old, new, error = BROKEN[what]
    case = _case("long_forest" if "forest" in what else "long", 128, name=what)
    if what.startswith("ahead"):
        monkeypatch.setitem(HOPPER, 128, AHEAD)
    if what.startswith("carried"):
        monkeypatch.setitem(HOPPER, 128, CARRIED)
    if what == "out is written after q":
        monkeypatch.setitem(HOPPER, 128, HopperConfiguration(128, 2, q_slots=2, out_in_q=True))
    if "forest" in what:  # a single full block is masked where rounds are of two
        monkeypatch.setitem(HOPPER, 128, HopperConfiguration(128, 2, unrolled=1))
    with _hopper(monkeypatch, ((old, new),)), pytest.raises(error):
        assert_exact("triton", case, "cpu")
