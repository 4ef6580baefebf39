"""attention(): its errors, and which backend it selects."""

from __future__ import annotations

import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention, backends
from packed_attn.request import AttentionRequest

LAYOUT = DocumentLayout.from_lengths([3, 5])


def _qkv(total: int = 8, heads: int = 4, kv_heads: int = 2, dim: int = 16) -> dict[str, Any]:
    return {
        "q": torch.randn(total, heads, dim),
        "k": torch.randn(total, kv_heads, dim),
        "v": torch.randn(total, kv_heads, dim),
        "layout": LAYOUT,
    }


def test_signature() -> None:
    parameters = inspect.signature(attention).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert [name for name in parameters if name not in defaults] == ["q", "k", "v", "layout"]
    assert defaults == {
        "key_layout": None,
        "causal": True,
        "window_size": (-1, -1),
        "chunk_size": None,
        "prefix_lengths": None,
        "softmax_scale": None,
        "softcap": None,
        "sinks": None,
        "alibi_slopes": None,
        "bias": None,
        "key_indices": None,
        "dropout_p": 0.0,
        "dropout_seed": None,
        "deterministic": False,
        "backend": "auto",
        "return_lse": False,
        "confine_nonfinite": False,
    }


@pytest.mark.parametrize("backend", ["auto", *backends.BACKENDS])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout": DocumentLayout.from_lengths([3, 6])},
            "layout covers 9 tokens, but q has 8",
        ),
        ({"layout": [0, 3, 8]}, "layout must be a DocumentLayout, got list"),
        ({"layout": LAYOUT.to("meta")}, "layout is on meta, but q is on cpu"),
        (
            {"key_layout": DocumentLayout.from_lengths([3, 6])},
            "key_layout covers 9 tokens, but k has 8",
        ),
        (
            {"key_layout": DocumentLayout.from_lengths([8])},
            "layout has 2 documents, but key_layout has 1",
        ),
        ({"key_layout": (0, 8)}, "key_layout must be a DocumentLayout, got tuple"),
        ({"bias": torch.zeros(4, 6)}, r"bias must have shape .* num_heads 4, got \[4, 6\]"),
        ({"bias": torch.zeros(3, 5)}, r"bias must have shape .* num_heads 4, got \[3, 5\]"),
        ({"bias": torch.zeros(4, 5).long()}, "bias must be a floating point tensor, got .*int64"),
        ({"bias": torch.zeros(4, 5, device="meta")}, "bias is on meta, but q is on cpu"),
        (
            {"key_indices": torch.zeros(7, 2).long()},
            r"key_indices must have shape .* total_queries 8, got \[7, 2\]",
        ),
        ({"key_indices": torch.zeros(8, 2)}, "must be an int32 or int64 tensor, got .*float32"),
        (
            {"key_indices": torch.zeros(8, 2, dtype=torch.int32, device="meta")},
            "key_indices is on meta, but q is on cpu",
        ),
        ({"k": torch.randn(9, 2, 16)}, r"k is \[9, 2, 16\] and v \[8, 2, 16\]"),
        (
            {"k": torch.randn(9, 2, 16), "v": torch.randn(9, 2, 16)},
            "layout covers 8 tokens, but k has 9",
        ),
        ({"q": torch.randn(1, 8, 4, 16)}, r"q must have shape .* got \[1, 8, 4, 16\]"),
        ({"v": torch.randn(8, 32)}, r"v must have shape .* got \[8, 32\]"),
        ({"k": torch.randn(8, 2, 24)}, "k has head_dim 24, but q has 16"),
        (
            {"q": torch.randn(8, 3, 16)},
            "num_heads must be a positive multiple of num_kv_heads, got 3 and 2",
        ),
        ({"q": torch.randn(8, 0, 16)}, "positive multiple of num_kv_heads, got 0 and 2"),
        (
            {name: torch.randn(8, 2, 0) for name in "qkv"},
            "head_dim must be at least 1, but q has 0 and v 0",
        ),
        (
            {"v": torch.randn(8, 2, 16, dtype=torch.float64)},
            "q, k and v must share a dtype, but v is torch.float64 and q torch.float32",
        ),
        (
            {name: torch.ones(8, 2, 16, dtype=torch.int64) for name in "qkv"},
            "q must be floating point of at least 16 bits, got torch.int64",
        ),
        (
            {"k": torch.randn(8, 2, 16, device="meta")},
            "q, k and v must share a device, but k is on meta and q on cpu",
        ),
        ({"sinks": torch.zeros(2)}, r"sinks must have shape \[num_heads\] = \[4\], got \[2\]"),
        ({"sinks": torch.zeros(4, device="meta")}, "sinks is on meta, but q is on cpu"),
        ({"alibi_slopes": torch.zeros(2, 4)}, r"alibi_slopes must have shape .* got \[2, 4\]"),
        ({"softmax_scale": -0.1}, "softmax_scale must be positive and finite, got -0.1"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be positive and finite, got inf"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
        ({"softcap": 0.0}, "softcap must be positive and finite, or None for off, got 0.0"),
        ({"softcap": -3.0}, "softcap must be positive and finite, or None for off, got -3.0"),
        ({"softcap": float("nan")}, "softcap must be positive and finite, .* got nan"),
        ({"window_size": (-2, 0)}, r"window_size must hold two integers .* got \(-2, 0\)"),
        ({"window_size": 128}, "window_size must hold two integers .* got 128"),
        ({"window_size": (0, -2)}, r"window_size must hold two integers .* got \(0, -2\)"),
        ({"window_size": (1.5, 0)}, r"window_size must hold two integers .* got \(1.5, 0\)"),
        ({"window_size": (1, 0, 0)}, r"window_size must hold two integers .* got \(1, 0, 0\)"),
        ({"q": numpy.zeros((8, 4, 16))}, "q must be a tensor, got ndarray"),
        ({"v": None}, "v must be a tensor, got NoneType"),
        (
            {"key_layout": LAYOUT.to("meta")},
            "key_layout is on meta, but k is on cpu: use layout.to",
        ),
        ({"sinks": [0.0] * 4}, "sinks must be a floating point tensor, got list"),
        (
            {"alibi_slopes": torch.zeros(4, dtype=torch.int64)},
            "alibi_slopes must be a floating point tensor, got torch.int64",
        ),
        ({"alibi_slopes": torch.zeros(4, device="meta")}, "alibi_slopes is on meta, but q is on"),
        ({"softmax_scale": "0.1"}, "softmax_scale must be a number, got '0.1'"),
        ({"softmax_scale": 0.0}, "softmax_scale must be positive and finite, got 0.0"),
        ({"softcap": True}, "softcap must be a number, or None for off, got True"),
        ({"softcap": float("inf")}, "softcap must be positive and finite, .* got inf"),
        ({"dropout_p": "0.1"}, r"dropout_p must be in \[0, 1\), got '0.1'"),
        ({"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\), got 1.5"),
        ({"chunk_size": 2.5}, "chunk_size must be an integer of at least 1, got 2.5"),
        ({"prefix_lengths": [1, -2]}, "prefix_lengths must not be negative, got -2"),
        ({"prefix_lengths": [1.0, 2.0]}, "prefix_lengths must be integers, got 1.0"),
        ({"prefix_lengths": [[1], [2]]}, r"prefix_lengths must be integers, got \[1\]"),
        ({"prefix_lengths": 1}, "prefix_lengths must be one-dimensional, got 1"),
        ({"key_layout": []}, "key_layout must be a DocumentLayout, got list"),
        ({"causal": None}, "causal must be True or False, got None"),
        ({"causal": "False"}, "causal must be True or False, got 'False'"),
        ({"return_lse": 1}, "return_lse must be True or False, got 1"),
        (
            {name: torch.ones(8, 2, 16).to(torch.float8_e4m3fn) for name in "qkv"},
            "q must be floating point of at least 16 bits, got torch.float8_e4m3fn",
        ),
        (
            {"q": torch.randn(8, 4, 16, dtype=torch.complex64)},
            "q, k and v must share a dtype|q must be floating point",
        ),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
        ({"prefix_lengths": [1]}, r"prefix_lengths must have shape \[2\], got \[1\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\), got -0.1"),
        ({"dropout_p": float("nan")}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"dropout_seed": 7}, r"dropout_seed must be an int64 tensor of shape \[1\], got 7"),
        (
            {"dropout_seed": torch.zeros(1, dtype=torch.int32)},
            r"dropout_seed must be an int64 tensor .* got torch.int32 of shape \[1\]",
        ),
        (
            {"dropout_seed": torch.zeros((), dtype=torch.int64)},
            r"dropout_seed must be an int64 tensor .* got torch.int64 of shape \[\]",
        ),
        (
            {"dropout_seed": torch.zeros(1, dtype=torch.int64, device="meta")},
            "dropout_seed is on meta, but q is on cpu",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changes: dict[str, Any], message: str, backend: str) -> None:
    """The same error whatever the backend, before any of them is asked."""
    with pytest.raises(ValueError, match=message):
        attention(**{**_qkv(), **changes}, backend=backend)


def test_forests_have_no_prefix_and_no_key_layout() -> None:
    forest = DocumentLayout.from_lengths([3, 5], parents=[-1, 0])
    for change in ({"prefix_lengths": [1, 1]}, {"key_layout": LAYOUT}):
        with pytest.raises(NotImplementedError, match="give the shared prefix as a document"):
            attention(**{**_qkv(), "layout": forest, **change})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_any_strides_are_read(backend: str) -> None:
    """Slices, transposes, expanded heads and a last dimension with a stride, to the bit."""
    inputs = _qkv()
    wanted = attention(**inputs, backend=backend)
    fused = torch.cat([inputs[name] for name in "qkv"], dim=1)
    views = {
        "slices": dict(zip("qkv", fused.split([4, 2, 2], dim=1))),
        "heads first": {n: inputs[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "qkv"},
        "last dimension": {n: inputs[n].mT.contiguous().mT for n in "qkv"},
        "every other": {n: inputs[n].repeat_interleave(2, dim=2)[..., ::2] for n in "qkv"},
    }
    for name, qkv in views.items():
        assert torch.equal(attention(**{**inputs, **qkv}, backend=backend), wanted), name
    one = {n: inputs[n][:, :1].expand(-1, 2, -1) for n in "kv"}
    wanted = attention(**{**inputs, **{n: x.contiguous() for n, x in one.items()}})
    assert torch.equal(attention(**{**inputs, **one}), wanted)


def test_any_head_dim_runs_somewhere() -> None:
    """A head_dim that is no multiple of 8 is a reason on backends that need one, and no error."""
    inputs = _qkv(dim=12)
    assert attention(**inputs).shape == (8, 4, 12)
    with pytest.raises(NotImplementedError, match="head_dim must be a multiple of 8"):
        attention(**inputs, backend="triton")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*reference.*'cudnn'"):
        attention(**_qkv(), backend="cudnn")


def test_lse_only_when_asked() -> None:
    inputs = _qkv()
    for backend in ("auto", "reference"):
        out = attention(**inputs, backend=backend)
        assert isinstance(out, Tensor)
        again, lse = attention(**inputs, backend=backend, return_lse=True)
        assert torch.equal(out, again)
        assert (lse.shape, lse.dtype) == ((4, 8), torch.float32)


class _Fake:
    """A backend that counts its runs and gives its own number."""

    def __init__(self, number: float, *reasons: str) -> None:
        self.number, self.reasons, self.runs = number, list(reasons), 0
        self.request: AttentionRequest | None = None

    def reasons_against(self, request: AttentionRequest) -> list[str]:
        return self.reasons

    def run(self, request: AttentionRequest) -> tuple[Tensor, Tensor | None]:
        self.runs += 1
        self.request = request
        return torch.full_like(request.q, self.number), None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch):
    """Puts fake backends in the place of the table."""

    def replace(**fakes: _Fake) -> dict[str, _Fake]:
        monkeypatch.setattr(backends, "BACKENDS", tuple(fakes))
        monkeypatch.setattr(backends, "load", fakes.__getitem__)
        return fakes

    return replace


def test_auto_takes_the_first_that_can(table) -> None:
    fakes = table(gpu=_Fake(1.0, "no GPU"), fast=_Fake(2.0), slow=_Fake(3.0))
    assert (attention(**_qkv()) == 2.0).all()
    assert [fake.runs for fake in fakes.values()] == [0, 1, 0]


def test_named_backend_is_taken_out_of_order(table) -> None:
    fakes = table(fast=_Fake(2.0), slow=_Fake(3.0))
    assert (attention(**_qkv(), backend="slow") == 3.0).all()
    assert fakes["fast"].runs == 0


def test_named_backend_never_falls_back(table) -> None:
    fakes = table(gpu=_Fake(1.0, "no GPU", "no float32"), slow=_Fake(3.0))
    with pytest.raises(NotImplementedError, match="'gpu' cannot run this: no GPU; no float32"):
        attention(**_qkv(), backend="gpu")
    assert not any(fake.runs for fake in fakes.values())


def test_error_lists_every_backend_with_its_reasons(table) -> None:
    table(gpu=_Fake(1.0, "no GPU", "no float32"), cpu=_Fake(2.0, "no softcap"))
    with pytest.raises(NotImplementedError) as raised:
        attention(**_qkv())
    assert str(raised.value).splitlines() == [
        "no backend can run this:",
        "  gpu: no GPU; no float32",
        "  cpu: no softcap",
    ]


def test_backends_get_the_checked_request(table) -> None:
    fakes = table(only=_Fake(1.0))
    attention(**_qkv(), window_size=[3, 0], confine_nonfinite=True)  # type: ignore[arg-type]
    request = fakes["only"].request
    assert request is not None
    assert request.softmax_scale == 0.25
    assert request.window_size == (3, 0)
    assert request.keys is request.layout
    assert request.confine_nonfinite
    assert request.visibility() is LAYOUT.visibility(window_size=(3, 0))
    assert (request.num_heads, request.num_kv_heads) == (4, 2)


def test_the_last_backend_has_no_reasons_against_anything() -> None:
    """So auto always finds one, and the order is the documented one."""
    assert backends.BACKENDS[-1] == "reference"
    assert backends.BACKENDS.index("triton") < backends.BACKENDS.index("cpu")


def test_auto_on_the_reference_of_a_gpu_warns_once_with_reasons(table) -> None:
    """By name it runs in silence."""
    fakes = table(gpu=_Fake(1.0, "no float64"), reference=_Fake(2.0))
    others = dict.fromkeys(("k", "v", "sinks", "alibi_slopes", "bias"))
    request: Any = SimpleNamespace(q=SimpleNamespace(is_cuda=True), **others)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            assert backends.select("auto", request) is fakes["reference"]
            assert backends.select("reference", request) is fakes["reference"]
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "runs its reference on a GPU" in message
    assert message.endswith("No other can run this:\n  gpu: no float64")


def _derivative(transform: str, inputs: dict[str, Any], backend: str) -> Tensor:
    """A derivative in q by one of torch.func's transforms or by dual numbers."""
    rest = {name: x for name, x in inputs.items() if name != "q"}
    # Made anew inside: what a layout keeps must not belong to the transform.
    layout = DocumentLayout.from_lengths(LAYOUT.lengths, padding=[False, False])
    rest["layout"] = layout

    def loss(q: Tensor) -> Tensor:
        return attention(q, **rest, window_size=(2, 0), backend=backend).square().sum()

    if transform == "grad":
        derivative = torch.func.grad(loss)(inputs["q"])
        kept, plain = (x.visibility(window_size=(2, 0)).key_start for x in (layout, LAYOUT))
        assert torch.equal(kept, plain)
        return derivative
    tangent = torch.ones_like(inputs["q"])
    if transform == "jvp":
        return torch.func.jvp(loss, (inputs["q"],), (tangent,))[1]
    if transform == "vmap":
        return torch.vmap(loss)(inputs["q"][None])[0]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs["q"], tangent)
        found = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
        assert found is not None
        return found


@pytest.mark.parametrize("backend", backends.BACKENDS[:-1])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual numbers"])
def test_transforms_are_exact_or_refused(transform: str, backend: str) -> None:
    """A custom operator leaves tangents out without a word: the reference alone runs."""
    inputs = {n: x.double() if n in "qkv" else x for n, x in _qkv().items()}
    leaf = inputs["q"].clone().requires_grad_()
    loss = attention(**{**inputs, "q": leaf}, window_size=(2, 0)).square().sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    wanted = {"grad": gradient, "vmap": loss.detach()}.get(transform, gradient.sum())
    for runs in ("auto", "reference"):
        torch.testing.assert_close(_derivative(transform, inputs, runs), wanted)
    reason = "forward-mode derivative" if transform == "dual numbers" else "torch.func"
    with pytest.raises(NotImplementedError, match=reason):
        _derivative(transform, inputs, backend)


def test_second_derivatives_are_exact_or_refused() -> None:
    inputs = _qkv()
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    for backend in ("auto", "cpu"):
        for output in attention(**inputs, backend=backend, return_lse=True):
            with pytest.raises(NotImplementedError, match=r"no second derivative .*'reference'"):
                torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
            torch.autograd.grad(output.square().sum(), leaves[0], retain_graph=True)
    out = attention(**inputs, backend="reference")
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), leaves[1])[0].any()


@pytest.mark.parametrize(
    "kind",
    [{}, {"window_size": (2, 0)}, {"prefix_lengths": [1, 2]}, {"key_layout": LAYOUT}],
    ids=str,
)
@pytest.mark.parametrize("made_inside", [False, True])
def test_a_layout_of_inference_mode_trains(kind: dict[str, Any], made_inside: bool) -> None:
    """What a layout keeps from an evaluation serves the training after it."""
    inputs = {**_qkv(), "layout": DocumentLayout.from_lengths([3, 5])}
    with torch.inference_mode():
        if made_inside:
            inputs["layout"] = DocumentLayout.from_lengths([3, 5], padding=[False, True])
        attention(**inputs, **kind)
    out = attention(**{**inputs, "q": inputs["q"].requires_grad_()}, **kind)
    assert torch.autograd.grad(out.sum(), inputs["q"])[0].any()


def test_auto_is_a_listed_backend_to_the_bit() -> None:
    inputs = _qkv()
    out = attention(**inputs)
    ran = []
    for name in backends.BACKENDS:
        try:
            ran.append(attention(**inputs, backend=name))
        except NotImplementedError:
            continue
    assert torch.equal(ran[0], out)
