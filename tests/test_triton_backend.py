"""The triton backend: what it refuses and why, and that it runs what it accepts.

Under TRITON_INTERPRET=1 (a process of its own in `make test`) and on CUDA it runs; elsewhere its
first reason is the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packed_attn import DocumentLayout, attention
from packed_attn.backends import machine, triton
from packed_attn.request import AttentionRequest, checked_request

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def request_with(
    dtype: torch.dtype = torch.float32, dim: int = 16, device: str = "cpu", **changes: Any
) -> AttentionRequest:
    """Two documents of 3 and 2 tokens, two heads."""
    x = torch.ones(5, 2, dim, dtype=dtype, device=device)
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
        "deterministic": True,
        "return_lse": True,
        "confine_nonfinite": True,
    }
    layout = DocumentLayout.from_lengths([3, 2], device=device)
    return checked_request(x, x, x, layout, **(options | changes))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (request_with(dtype=torch.float64), "not torch.float64"),
        (request_with(dim=12), "head_dim must be a multiple of 8 from 8 to 256, not 12"),
        (request_with(dim=264), "head_dim must be a multiple of 8 from 8 to 256, not 264"),
        (
            request_with(alibi_slopes=torch.ones(2, requires_grad=True)),
            "gives no gradient in alibi_slopes, which requires one",
        ),
    ],
)
def test_refusals_name_the_value(request_: AttentionRequest, reason: str) -> None:
    assert any(reason in given for given in triton.reasons_against(request_))


def test_refuses_the_cpu_without_the_interpreter() -> None:
    """In a process of its own, and without importing triton or the kernels."""
    code = (
        "import sys, torch\n"
        "from packed_attn import DocumentLayout, attention\n"
        "x = torch.ones(5, 2, 16)\n"
        "try:\n"
        "    attention(x, x, x, DocumentLayout.from_lengths([3, 2]), backend='triton')\n"
        "except NotImplementedError as error:\n"
        "    print(error)\n"
        "print(sorted({'triton', 'packed_attn_kernels'} & sys.modules.keys()))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    said, loaded = ran.stdout.splitlines()
    assert "needs a CUDA device, but q is on cpu" in said
    assert loaded == "[]"


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "HAS_TRITON", False)
    assert triton.reasons_against(request_with()) == ["triton is not installed"]


@pytest.mark.skipif(not RUNS, reason="needs CUDA, or a process with TRITON_INTERPRET=1 (make test)")
def test_runs_through_attention() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert triton.reasons_against(request_with(device=device)) == []
    layout = DocumentLayout.from_lengths([3, 2], device=device)
    q, k, v = torch.randn(3, 5, 2, 16, device=device).unbind()
    want, want_lse = attention(q, k, v, layout, backend="reference", return_lse=True)
    out, lse = attention(q, k, v, layout, backend="triton", return_lse=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert torch.equal(attention(q, k, v, layout, backend="triton"), out)
    assert triton.run(request_with(device=device, return_lse=False))[1] is None


PLAIN = dict.fromkeys(("has_softcap", "has_alibi", "has_dropout"), False) | {
    "softmax_scale": 0.1,
    "halves": "either",
}


@pytest.mark.skipif(RUNS, reason="kernels run here")
@pytest.mark.parametrize(
    ("found", "hip", "compiler", "wanted"),
    [
        ((7, 5), None, (3, 6), ["needs compute capability 8.0 or newer, but cuda:0 has 7.5"]),
        ((8, 0), None, (3, 6), []),
        ((12, 0), None, (3, 6), []),
        ((9, 4), "6.4", (3, 6), ["has not been matched to ROCm (6.4)"]),
        (
            (10, 3),
            None,
            (3, 7),
            ["triton 3.7 fails to compile half precision for compute capability 10.x, 3.8 does"],
        ),
        ((10, 0), None, (3, 8), []),
        ((10, 0), None, None, []),
    ],
)
def test_gpus_that_it_takes(
    found: tuple[int, int],
    hip: str | None,
    compiler: tuple[int, int] | None,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "capability", lambda _: found)
    monkeypatch.setattr(machine, "version", {"triton": compiler}.get)
    monkeypatch.setattr(torch.version, "hip", hip)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    request: Any = SimpleNamespace(q=q)
    assert triton._machine_reasons(request) == wanted
    q.dtype = torch.float32
    assert triton._machine_reasons(request) == (wanted if found[0] != 10 else [])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Gluon is not interpreted")
@pytest.mark.parametrize(
    ("wanted", "head_dim", "capability", "changed"),
    [
        ("fused", 128, (9, 0), {}),
        ("split", 128, (10, 0), {}),
        ("split", 128, (8, 0), {}),
        ("fused", 64, (9, 0), {}),
        ("split", 256, (9, 0), {}),
        ("split", 128, (9, 0), {"softmax_scale": -0.1}),
        ("split", 128, (9, 0), {"has_softcap": True}),
        ("split", 128, (9, 0), {"has_dropout": True}),
        ("fused", 128, (9, 0), {"halves": "query"}),
        ("split", 128, (9, 0), {"halves": "both"}),
    ],
)
def test_backward_that_was_measured_to_be_faster(
    wanted: str, head_dim: int, capability: tuple[int, int], changed: dict[str, Any]
) -> None:
    from packed_attn_kernels import faster_backward

    q, k = torch.empty(4096, 4, head_dim).bfloat16(), torch.empty(4096, 2, head_dim).bfloat16()
    assert faster_backward(q, k, k, capability, **PLAIN | changed) == wanted
    if wanted == "fused":
        # One token's row is 4 bytes longer than a copy's alignment allows.
        shifted = torch.empty(64, 4 * head_dim + 2).bfloat16()[:, : 4 * head_dim].view(64, 4, -1)
        assert faster_backward(shifted, k, k, capability, **PLAIN | changed) == "split"
