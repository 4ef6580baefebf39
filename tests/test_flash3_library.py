"""flash-attn 3's operators as a peer of benchmarks: a stand-in that has their schemas.

What is tested is what the operators are given, what becomes of their answer, its gradient, and that
a compiler sees through; their kernels need a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import flash3_library
from packed_attn import DocumentLayout, attention
from packed_attn.backends import flash3, machine
from tests.cases import BY_NAME
from tests.oracle import assert_exact, reasons_against
from tests.standins import _answer

# As xformers 0.0.34 registers them.
FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0., bool deterministic=False, int sm_margin=0) -> "
    "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)
CASES = ("mixed", "window_both", "softcap", "cross", "padding_between", "strided", "lse_gradient")
Calls = list[dict[str, Any]]


@pytest.fixture(scope="module")
def operators() -> Iterator[Calls]:
    """The stand-in's calls; the operators stay registered while the module's tests run."""
    calls: Calls = []
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FORWARD)
    library.define(BACKWARD)

    def forward(*args: Any) -> Any:
        given = _named("fwd", args)
        calls.append(given)
        assert given["num_splits"] == 1
        out, lse = _attend(given["q"], given["k"], given["v"], given)
        return out, lse, out.new_empty(0), out.new_empty(0)

    def backward(*args: Any) -> Any:
        given = _named("bwd", args)
        calls.append(given)
        dout, q = given["dout"], given["q"]
        assert dout.stride(-1) == 1
        # Below autograd an operator has no gradients; a thread of its own starts above it.
        with ThreadPoolExecutor(1) as above:
            out, lse, found = above.submit(_gradients, given).result()
        assert torch.equal(out, given["out"])
        assert torch.equal(lse, given["softmax_lse"])
        grads = [given[name] for name in ("dq", "dk", "dv")]
        for into, grad in zip(grads, found):
            into.copy_(grad)
        return *grads, *[q.new_empty(0)] * 5

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    yield calls
    library._destroy()


def _named(operator: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments by the schema's names, defaults filled in."""
    schema = getattr(torch.ops.flash_attn_3, operator).default._schema
    defaults = {x.name: x.default_value for x in schema.arguments}
    return defaults | dict(zip(defaults, args))


def _gradients(given: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    leaves = [given[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, lse = _attend(*leaves, given)
    return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, given["dout"])


def _attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out, lse = _answer(
        q, k, v, options["cu_seqlens_q"], options["cu_seqlens_k"], options["max_seqlen_q"],
        options["max_seqlen_k"], options["softmax_scale"], options["is_causal"],
        (options["window_size_left"], options["window_size_right"]), options["softcap"],
    )  # fmt: skip
    return out, lse.float()


@pytest.fixture
def library(operators: Calls, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The library is loaded, on a CPU that passes for a Hopper GPU."""
    loaded: list[str] = []
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv(flash3_library.VARIABLE, "flash_attn_3/_C.so")
    monkeypatch.setattr(machine, "_failures", {})
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    monkeypatch.setattr(flash3, "_has_softcap", lambda _: True)
    flash3_library.load()
    assert loaded == ["flash_attn_3/_C.so"]
    operators.clear()
    return operators


@pytest.mark.parametrize("name", CASES)
def test_exact(library: Calls, name: str) -> None:
    case = replace(BY_NAME[name], dtype=torch.bfloat16)
    assert reasons_against("flash3", case, "cpu") == []
    assert_exact("flash3", case, "cpu")
    assert any("dout" in call for call in library), "its backward was asked"


def test_arguments(library: Calls) -> None:
    """Bounds, scale and determinism reach both operators by name."""
    layout = DocumentLayout.from_lengths([3, 6])
    q = torch.randn(9, 4, 32, dtype=torch.float16, requires_grad=True)
    kv = torch.randn(9, 2, 32, dtype=torch.float16)
    options = {"window_size": (2, 0), "softmax_scale": 0.5, "deterministic": True}
    attention(q, kv, kv, layout, backend="flash3", **options).sum().backward()
    forward, backward = library
    for call in (forward, backward):
        assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 3, 9]
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (6, 6)
        assert (call["softmax_scale"], call["is_causal"]) == (0.5, True)
        assert (call["window_size_left"], call["window_size_right"]) == (2, 0)
    assert backward["deterministic"]


def test_our_operators_are_whole(library: Calls) -> None:
    """Fakes, autograd and aliasing, as torch checks them."""
    function = machine.function(flash3.MODULE, flash3.FUNCTION)
    q, k, v = (torch.randn(5, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    numbers = (3, 3, 0.25, True, -1, 0, 0.0, False)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        flash3_library._forward, (q, k, v, bounds, bounds, *numbers), test_utils=tests
    )
    out, lse = function(q, k, v, bounds, bounds, 3, 3, causal=True, return_attn_probs=True)
    assert (out.shape, lse.shape) == (q.shape, (2, 5))
    (grad,) = torch.autograd.grad(lse.sum(), q, allow_unused=True)
    assert grad is None, "the gradient of lse is ignored"


def test_compiled_without_a_break(library: Calls) -> None:
    layout = DocumentLayout.from_lengths([4, 5])
    q, k, v = (torch.randn(9, 2, 16, dtype=torch.bfloat16) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, layout, backend="flash3")

    want = attend(q, k, v)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), want)


def test_without_a_name_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flash3_library.VARIABLE, raising=False)
    monkeypatch.setattr(torch.ops, "load_library", pytest.fail)
    flash3_library.load()
