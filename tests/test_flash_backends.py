"""flash-attn 2, 3, 4 and torch's varlen attention, against modules that stand in for them.

What is tested is what we hand over, what we make of the answer and what we refuse; the kernels
themselves need a GPU.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention
from packed_attn.backends import flash, flash2, flash3, flash4, load, machine, torch_varlen
from packed_attn.request import AttentionRequest, checked_request
from tests.cases import BY_NAME, SMALL, Case
from tests.oracle import assert_exact, reasons_against
from tests.standins import STANDINS, Recorder, install

NAMES = tuple(STANDINS)
# Every case in half precision, which is all that these kernels run.
HALF = [c if c.dtype != torch.float32 else replace(c, dtype=torch.bfloat16) for c in SMALL]
FEW = (
    "mixed one_token_among_empty no_tokens padding_between all_padding strided window_both softcap "
    "sinks_padding lse_gradient lse_gradient_padding cross cross_window cross_padding fp16"
)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend in turn, its stand-in installed."""
    install(request.param, monkeypatch)
    return request.param


def _inputs(dtype: torch.dtype = torch.bfloat16, **sizes: int) -> dict[str, Any]:
    heads, kv_heads, dim = sizes.get("heads", 4), sizes.get("kv_heads", 2), sizes.get("dim", 32)
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(9, heads, dim, generator=generator).to(dtype)

    return {
        "q": draw(heads, dim),
        "k": draw(kv_heads, dim),
        "v": draw(kv_heads, sizes.get("value_dim", dim)),
        "layout": DocumentLayout.from_lengths([3, 6]),
    }


def _request(inputs: dict[str, Any], **changes: Any) -> AttentionRequest:
    options: dict[str, Any] = {
        "key_layout": None,
        "causal": True,
        "window_size": (-1, -1),
        "chunk_size": None,
        "prefix_lengths": None,
        "softmax_scale": None,
        "softcap": None,
        "sinks": None,
        "alibi_slopes": None,
        "dropout_p": 0.0,
        "deterministic": False,
        "return_lse": False,
        "confine_nonfinite": False,
    }
    return checked_request(**inputs, **(options | changes))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[] if c.name in FEW.split() else [pytest.mark.slow])
        for c in HALF
    ],
)
def test_exact_or_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding, rows without keys, empty documents: the answer is ours to the last rule."""
    for name in NAMES:
        install(name, monkeypatch)
        if not reasons_against(name, case, "cpu"):
            assert_exact(name, case, "cpu")


@pytest.mark.parametrize("window", [(2, -1), (-1, 6), (2, 6), (0, 4), (30, 5)], ids=str)
def test_windows_of_more_queries_than_keys(
    name: str, window: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries before the first key see what the window says."""
    case = Case(
        "more queries",
        (21, 3),
        key_lengths=(4, 2),
        causal=False,
        window_size=window,
        dtype=torch.bfloat16,
    )
    assert_exact(name, case, "cpu")


RUNS = {
    "flash2": {"mixed", "alibi", "window_both", "softcap", "cross"},
    "flash3": {"mixed", "window_both", "softcap", "cross"},
    "flash4": {"mixed", "window_both", "softcap", "cross", "sinks", "value_head_dim_smaller"},
    "torch_varlen": {"mixed", "window_both", "cross"},
}
FEATURES = (
    *("mixed", "alibi", "window_both", "softcap", "cross", "sinks"),
    *("value_head_dim_smaller", "forest", "chunk", "prefix", "dropout"),
)


def test_what_each_runs(name: str) -> None:
    half = {case.name: case for case in HALF}
    runs = {f for f in FEATURES if not _without_lse(name, half[f])}
    assert runs == RUNS[name]


def _without_lse(name: str, case: Case) -> list[str]:
    """Reasons against the case when lse is not asked for."""
    inputs = case.inputs()
    request = _request(
        {"q": inputs.q, "k": inputs.k, "v": inputs.v, "layout": case.layout()},
        key_layout=case.key_layout(),
        sinks=inputs.sinks,
        **inputs.kwargs(),
        **case.kwargs(),
    )
    return load(name).reasons_against(request)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"causal": True, "window": (-1, 0)}),
        ({"causal": False}, {"causal": False, "window": (-1, -1)}),
        ({"window_size": (2, 0)}, {"causal": True, "window": (2, 0)}),
        ({"window_size": (2, 1), "causal": False}, {"causal": False, "window": (2, 1)}),
        ({"window_size": (2**40, 2**40), "causal": False}, {"causal": False, "window": (-1, -1)}),
        ({"softmax_scale": 0.5}, {"scale": 0.5}),
        ({"softcap": 5.0}, {"softcap": 5.0}),
        ({"deterministic": True}, {"deterministic": True}),
        ({"return_lse": True}, {"lse": True}),
    ],
    ids=str,
)
def test_arguments(options: dict, wanted: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keyword by keyword, what each function is given."""
    for name in NAMES:
        recorder = install(name, monkeypatch)
        inputs = _inputs()
        if load(name).reasons_against(_request(inputs, **options)):
            assert name == "torch_varlen"
            assert set(options) & {"softcap", "deterministic"}
            continue
        attention(**inputs, backend=name, **options)
        (call,) = recorder.calls
        got = _read(name, call)
        assert got["q"].data_ptr() == inputs["q"].data_ptr(), "no copy where none is needed"
        assert torch.equal(got["cu_q"], torch.tensor([0, 3, 9], dtype=torch.int32))
        assert got["cu_k"] is got["cu_q"]
        assert got["longest"] == (6, 6)
        defaults = {"scale": 32**-0.5, "softcap": 0.0, "deterministic": False, "lse": False}
        for key, value in (defaults | wanted).items():
            assert got[key] == value or got[key] is None, f"{name}: {key}"


def _read(name: str, call: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by one set of names; None where the function has no such argument."""
    if name == "torch_varlen":
        window = call["window_size"]
        aux = call["return_aux"]
        return {
            "q": call["query"],
            "cu_q": call["cu_seq_q"],
            "cu_k": call["cu_seq_k"],
            "longest": (call["max_q"], call["max_k"]),
            "window": window,
            "causal": window[1] == 0,
            "scale": call["scale"],
            "softcap": None,
            "deterministic": None,
            "lse": aux is not None and aux.lse,
        }
    left, right = call["window_size"]
    return {
        "q": call["q"],
        "cu_q": call["cu_seqlens_q"],
        "cu_k": call["cu_seqlens_k"],
        "longest": (call["max_seqlen_q"], call["max_seqlen_k"]),
        "window": (-1 if left is None else left, -1 if right is None else right),
        "causal": call["causal"],
        "scale": call["softmax_scale"],
        "softcap": call["softcap"],
        "deterministic": call["deterministic"],
        "lse": call.get("return_attn_probs", call.get("return_lse")),
    }


def test_cross_attention_hands_over_both_sides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = install(name, monkeypatch)
    inputs = _inputs()
    inputs["q"] = inputs["q"][:5]
    inputs["layout"] = DocumentLayout.from_lengths([4, 1])
    attention(**inputs, key_layout=DocumentLayout.from_lengths([2, 7]), backend=name)
    got = _read(name, recorder.calls[0])
    assert (got["cu_q"].tolist(), got["cu_k"].tolist()) == ([0, 4, 5], [0, 2, 9])
    assert got["longest"] == (4, 7)


def test_padding_may_hold_anything(name: str) -> None:
    """NaN in padding, in its inputs and its gradient, reaches nothing; the kernel never sees it."""
    inputs = _inputs()
    inputs["layout"] = DocumentLayout.from_lengths([3, 6], padding=[False, True])
    leaves = {}
    for key in "qkv":
        leaves[key] = inputs[key].index_fill(0, torch.arange(3, 9), torch.nan).requires_grad_()
    out, lse = attention(**(inputs | leaves), backend=name, return_lse=True)
    grad_out = torch.ones_like(out).index_fill(0, torch.arange(3, 9), torch.nan)
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out)
    assert out.isfinite().all()
    assert not out[3:].any()
    assert (lse[:, 3:] == -torch.inf).all()
    for grad in grads:
        assert grad.isfinite().all()
        assert not grad[3:].any()
    assert grads[2][:3].any()


def test_lse_has_its_gradient_or_raises(name: str) -> None:
    """flash-attn 2, 3 and torch leave the gradient of lse out, silently: it is made up for, and
    with a softcap a loss that uses lse raises."""
    inputs = _inputs()
    q = inputs["q"].requires_grad_()
    if not load(name).reasons_against(_request(inputs, softcap=4.0)):
        out, lse = attention(**inputs, backend=name, return_lse=True, softcap=4.0)
        torch.autograd.grad(out.sum(), q, retain_graph=True)
        if name != "flash4":
            with pytest.raises(NotImplementedError, match=f"'{name}' gives no gradient to lse"):
                (out.sum() + lse.sum()).backward()
    _, lse = attention(**inputs, backend=name, return_lse=True)
    _, want_lse = attention(**inputs, backend="reference", return_lse=True)
    (got,), (want,) = (torch.autograd.grad(x.sum(), q) for x in (lse, want_lse))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chunk_size": 4}, "has no chunks"),
        ({"prefix_lengths": [1, 2]}, "has no prefix mask"),
        ({"dropout_p": 0.5}, "drops other weights than dropout_seed says"),
        ({"confine_nonfinite": True}, "confine_nonfinite"),
        ({"layout": DocumentLayout.from_lengths([3, 6], parents=[-1, 0])}, "has no forests"),
    ],
    ids=str,
)
def test_refused_by_all(name: str, changes: dict, reason: str) -> None:
    with pytest.raises(NotImplementedError) as raised:
        attention(**(_inputs() | changes), backend=name)
    assert reason in str(raised.value)
    assert str(raised.value).startswith(f"backend {name!r} cannot run this: ")


def test_refused_sizes_and_dtypes(name: str) -> None:
    for inputs, reason in (
        (_inputs(torch.float32), "runs bfloat16 and float16, not torch.float32"),
        (_inputs(dim=20), "head_dim must be a multiple of 8 from 8 to 256, not 20"),
        (_inputs(dim=264), "head_dim must be a multiple of 8 from 8 to 256, not 264"),
    ):
        assert reason in load(name).reasons_against(_request(inputs))


def test_refused_value_head_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    latent, other = _inputs(dim=192, value_dim=128), _inputs(dim=64, value_dim=128)
    for backend in (flash2, torch_varlen):
        install(backend.__name__.rpartition(".")[2], monkeypatch)
        (reason,) = backend.reasons_against(_request(latent))
        assert reason == "value head_dim must be head_dim, but they are 128 and 192"
    install("flash3", monkeypatch)
    assert flash3.reasons_against(_request(latent)) == []
    (reason,) = flash3.reasons_against(_request(other))
    assert "but they are 128 and 64" in reason
    install("flash4", monkeypatch)
    assert flash4.reasons_against(_request(other)) == []
    install("flash4", monkeypatch, major=10)
    assert flash4.reasons_against(_request(latent)) == []
    (reason,) = flash4.reasons_against(_request(_inputs(dim=192, value_dim=192)))
    assert reason.endswith("not (192, 192)")
    largest = _request(_inputs(dim=256), softcap=1.0, sinks=torch.zeros(4))
    assert flash4.reasons_against(largest) == [
        "on Blackwell has no softcap at head_dim 256",
        "on Blackwell has no sinks at head_dim 256",
    ]


def test_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one kernel cannot do and another can."""
    slopes = torch.ones(4)
    install("flash2", monkeypatch)
    assert flash2.reasons_against(_request(_inputs(), alibi_slopes=slopes)) == []
    learned = _request(_inputs(), alibi_slopes=slopes.clone().requires_grad_(), return_lse=True)
    assert flash2.reasons_against(learned) == [
        "gives no gradient to alibi_slopes",
        "its lse is shifted with alibi_slopes",
    ]
    install("flash3", monkeypatch)
    (reason,) = flash3.reasons_against(_request(_inputs(dim=256), deterministic=True))
    assert reason == "its backward is deterministic up to head_dim 192, not 256"
    install("torch_varlen", monkeypatch)
    deterministic = _request(_inputs(), deterministic=True)
    (reason,) = torch_varlen.reasons_against(deterministic)
    assert "torch.use_deterministic_algorithms" in reason
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch_varlen.reasons_against(deterministic) == []


def test_older_versions_lack_reasons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are known by the parameters of their functions."""

    def without(name: str, *missing: str) -> None:
        found = machine.takes

        def fewer(module: str, function: str, parameter: str) -> bool:
            return parameter not in missing and found(module, function, parameter)

        install(name, monkeypatch)
        monkeypatch.setattr(machine, "takes", fewer)

    with_lse = _request(_inputs(), return_lse=True)
    without("flash3", "return_attn_probs")
    assert flash3.reasons_against(_request(_inputs())) == []
    (reason,) = flash3.reasons_against(with_lse)
    assert "does not return lse" in reason
    without("flash4", "learnable_sink")
    assert flash4.reasons_against(with_lse) == []
    (reason,) = flash4.reasons_against(_request(_inputs(), sinks=torch.zeros(4)))
    assert "gives no gradient to sinks" in reason
    without("flash4", "return_lse")
    (reason,) = flash4.reasons_against(with_lse)
    assert "older than" in reason
    without("torch_varlen", "enable_gqa")
    (reason,) = torch_varlen.reasons_against(with_lse)
    assert reason == f"torch {torch.__version__} has no grouped queries in varlen_attn"
    assert torch_varlen.reasons_against(_request(_inputs(kv_heads=4))) == []


def test_an_older_flash4_ignores_the_gradient_of_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    install("flash4", monkeypatch)
    found = machine.takes
    monkeypatch.setattr(machine, "takes", lambda m, f, p: p != "dlse" and found(m, f, p))
    inputs = _inputs()
    inputs["q"].requires_grad_()
    _, lse = attention(**inputs, backend="flash4", return_lse=True, softcap=4.0)
    with pytest.raises(NotImplementedError, match="backend 'flash4' gives no gradient to lse"):
        lse.sum().backward()


@pytest.mark.parametrize("backend", [flash2, torch_varlen], ids=["flash2", "torch_varlen"])
def test_where_the_backward_of_flash2_would_fault(backend, monkeypatch) -> None:
    """(tokens + 128 x documents) x heads x rounded head_dim below 2^31, to the token."""
    install(backend.__name__.rpartition(".")[2], monkeypatch)

    def against(tokens: int, heads: int, dim: int) -> list[str]:
        x = torch.empty(1, heads, dim, dtype=torch.bfloat16).expand(tokens, heads, dim)
        request = _request(_inputs())
        layout = DocumentLayout.from_lengths([tokens - 1, 1])
        return backend.reasons_against(replace(request, q=x, k=x, v=x, layout=layout))

    # 72 rounds to 96, 136 to 192: 2^31 / (64 x 96) and 2^31 / (64 x 192), rounded up, less 256.
    assert against(349_269, 64, 72) == []
    (reason,) = against(349_270, 64, 72)
    assert reason == (
        "its backward faults from 2^31 elements on, and (349270 tokens + 128 x 2 documents) "
        "x 64 heads x 96 are 2147487744"
    )
    assert against(174_506, 64, 136) == []
    assert against(174_507, 64, 136) != []


def test_too_many_documents_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(65536, 1, 8, dtype=torch.float16)
    for documents, refused in ((65535, False), (65536, True)):
        lengths = [1] * documents
        inputs = {"q": x[:documents], "k": x[:documents], "v": x[:documents]}
        request = _request(inputs | {"layout": DocumentLayout.from_lengths(lengths)})
        reasons = flash.grid_reasons(request)
        assert reasons == (
            ["takes at most 65535 documents, but the layout has 65536"] if refused else []
        )


def test_host_lengths_are_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a layer: on a GPU each read waits for the device."""
    reads = []
    to_list = Tensor.tolist
    inputs = _inputs()
    inputs["layout"] = DocumentLayout(torch.tensor([0, 3, 9], dtype=torch.int32), 9)
    layout = inputs["layout"]

    def counted(x: Tensor) -> Any:
        reads.extend([x] if x is layout.cu_seqlens else [])
        return to_list(x)

    monkeypatch.setattr(Tensor, "tolist", counted)
    for _ in range(3):
        request = _request(inputs)
        flash._call(request, request.q, request.k, request.v)
    assert len(reads) == 1


def torchs_varlen() -> Any:
    """torch's module, as the stand-in and `_inputs` have it."""
    from torch.nn.attention import varlen

    if "enable_gqa" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch has no grouped queries in varlen_attn, and is refused there")
    return varlen


def test_the_stand_in_has_torchs_signature() -> None:
    varlen = torchs_varlen()

    real = inspect.signature(varlen.varlen_attn).parameters
    ours = inspect.signature(STANDINS["torch_varlen"][1][0]).parameters
    assert list(real) == list(ours)
    for parameter in real.values():
        assert parameter.default == ours[parameter.name].default
        assert parameter.kind == ours[parameter.name].kind
    assert varlen.AuxRequest._fields == ("lse",)


def test_torch_varlen_calls_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function takes our arguments as far as its own operator, which needs CUDA."""
    torchs_varlen()
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    with pytest.raises((NotImplementedError, RuntimeError), match="_flash_attention_forward"):
        attention(**_inputs(), backend="torch_varlen", return_lse=True)


def test_without_a_gpu_no_package_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_loaded", lambda module: pytest.fail(module))
    for backend in (flash2, flash3, flash4):
        assert backend.reasons_against(_request(_inputs())) == [
            "needs a CUDA device, but q is on cpu"
        ]


@pytest.mark.parametrize("backend", [flash2, flash3, flash4], ids=["flash2", "flash3", "flash4"])
def test_missing_and_broken_packages(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request(_inputs())
    monkeypatch.setattr(machine, "gpu_reasons", lambda *_, **__: [])
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, backend.MODULE.partition(".")[0], None)
        (reason,) = backend.reasons_against(request)
        assert reason.endswith("is not installed")

    def broken(module: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(machine, "_loaded", broken)
    (reason,) = backend.reasons_against(request)
    assert reason.endswith("does not import: ImportError: undefined symbol: _ZN3c10")


def test_compiled_without_a_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler finds the function of a module that was imported while it traced."""
    module, (function, *_) = STANDINS[name]

    @functools.wraps(function)
    def attend(q: Tensor, *_: Any, **__: Any) -> Any:  # one that it sees through
        return (2 * q, None) if name == "flash4" else 2 * q

    monkeypatch.setattr(sys.modules[module], function.__name__, attend)
    inputs = _inputs(dim=16, heads=2)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs, backend=name), 2 * inputs["q"])


def test_a_package_that_is_not_there_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer of every step asks."""
    asked: list[str] = []

    def missing(module: str) -> Any:
        asked.append(module)
        raise ModuleNotFoundError(name=module)

    monkeypatch.setattr(machine, "_failures", {})
    monkeypatch.setattr(machine, "import_module", missing)
    found = [machine.package_reasons("not_there", "not-there") for _ in range(3)]
    assert found == [["not-there is not installed"]] * 3
    assert asked == ["not_there"]


def test_flash4_alone_is_no_flash2(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a namespace."""
    install("flash4", monkeypatch)
    assert flash4.reasons_against(_request(_inputs())) == []
    assert flash2.reasons_against(_request(_inputs())) == ["flash-attn is not installed"]


BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"layout": DocumentLayout.from_lengths([3, 7])}, "layout covers 10 tokens, but q has 9"),
    ({"k": torch.ones(9, 2, 40, dtype=torch.bfloat16)}, "k has head_dim 40, but q has 32"),
    ({"v": torch.ones(9, 2, 32)}, "q, k and v must share a dtype"),
    ({"q": torch.ones(9, 3, 32, dtype=torch.bfloat16)}, "positive multiple of num_kv_heads"),
    ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
    ({"softcap": 0.0}, "softcap must be positive and finite, or None for off, got 0.0"),
    ({"window_size": (-2, 0)}, "window_size must hold two integers of at least -1"),
    ({"sinks": torch.zeros(3)}, "sinks must have shape [num_heads] = [4], got [3]"),
    ({"alibi_slopes": torch.zeros(2)}, "alibi_slopes must have shape [num_heads] = [4], got [2]"),
    ({"dropout_p": 1.5}, "dropout_p must be in [0, 1), got 1.5"),
    ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_INPUT, ids=[m for _, m in BAD_INPUT])
def test_bad_input_is_one_error_everywhere(
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked before any backend is asked."""
    recorders: list[Recorder] = [install(name, monkeypatch) for name in NAMES]
    for backend in (*NAMES, "triton", "flex", "cpu", "reference", "auto"):
        with pytest.raises(ValueError, match=re.escape(message)):
            attention(**(_inputs() | changes), backend=backend)
    assert not any(recorder.calls for recorder in recorders)


def test_gpu_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, by build, by compute capability."""
    request = _request(_inputs())
    assert machine.gpu_reasons(request) == ["needs a CUDA device, but q is on cpu"]

    class _OnGpu:
        class q:
            device = torch.device("cuda", 0)

    found: Any = _OnGpu()
    monkeypatch.setattr(machine, "capability", lambda _: (7, 5))
    assert machine.gpu_reasons(found) == [
        "needs compute capability 8.0 or newer, but cuda:0 has 7.5"
    ]
    monkeypatch.setattr(machine, "capability", lambda _: (8, 9))
    assert machine.gpu_reasons(found) == []
    assert machine.gpu_reasons(found, majors=(10, 9)) == [
        "needs compute capability 9.x or 10.x, but cuda:0 has 8.9"
    ]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert machine.gpu_reasons(found) == ["has not been matched to ROCm (6.4)"]


def test_cases_of_the_fast_run_exist() -> None:
    assert set(FEW.split()) <= set(BY_NAME)


def test_a_build_of_flash3_without_softcap_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so only by raising, and not where a softcap is all that the request lacks."""
    asks = flash3._has_softcap.__wrapped__
    recorder = install("flash3", monkeypatch)
    assert asks(torch.device("cpu"))
    assert [call["softcap"] for call in recorder.calls] == [1.0]

    def without(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("This flash attention build does not support softcap")

    monkeypatch.setattr(sys.modules[flash3.MODULE], flash3.FUNCTION, without)
    assert not asks(torch.device("cpu"))
    monkeypatch.setattr(flash3, "_has_softcap", lambda _: False)
    capped = _request(_inputs(), softcap=5.0)
    assert flash3.reasons_against(capped) == ["this build of flash-attn 3 has no softcap"]
    assert flash3.reasons_against(replace(capped, softcap=None)) == []
