"""Modules that stand in for causal_conv1d, mamba_ssm and flash-linear-attention where none can run.

Each has the signature of the real function, records its arguments, insists on what the real kernel
insists on, and computes the recurrence token by token in plain torch: anew where the boundaries
that it was given say so, and on through all documents where it was given none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.standins import Recorder

CONVOLUTION, SCAN, FUSED = "convolution", "scan", "fused"
GATED_DELTA, KDA = "gated delta", "kda"


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, Recorder]:
    """Puts the named functions where their packages have them; returns what records their calls."""
    recorders: dict[str, Recorder] = {}
    for name in names:
        module, function = FUNCTIONS[name]
        _module(monkeypatch, module)
        recorders[name] = Recorder()
        found = recorders[name](function)
        monkeypatch.setattr(sys.modules[module], function.__name__, found, raising=False)
    return recorders


def _module(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    assert activation in (None, "silu", "swish")
    assert x.shape[1] % 8 == 0
    assert 2 <= weight.shape[1] <= 4
    if seq_idx is not None:
        assert x.stride(1) == 1, "seq_idx is only supported for channel last layout"
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == (x.shape[0], x.shape[2])
        assert seq_idx.is_contiguous()
    out = torch.stack(
        [
            torch.cat([_conv(row[:, a:b], weight, bias) for a, b in _runs(seq_idx, i, row)], 1)
            for i, row in enumerate(x)
        ]
    )
    return F.silu(out) if activation else out


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[channels, T]`."""
    width = weight.shape[1]
    padded = F.pad(x, (width - 1, 0))
    out = sum(weight[:, k, None] * padded[:, k : k + x.shape[1]] for k in range(width))
    assert isinstance(out, Tensor)
    return out if bias is None else out + bias[:, None]


def _runs(seq_idx: Tensor | None, row: int, x: Tensor) -> list[tuple[int, int]]:
    """Where each document begins and ends in a row; `x` has the tokens last."""
    if seq_idx is None:
        return [(0, x.shape[-1])]
    _, counts = seq_idx[row].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    return list(zip([0, *ends], ends))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor:
    assert z is None
    assert initial_states is None
    assert not return_final_states
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == x.shape[:2]
    if dt_bias is not None:
        dt = dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    heads = x.shape[2]
    B, C = (g.repeat_interleave(heads // g.shape[2], dim=2) for g in (B, C))
    rows = []
    for i, row in enumerate(x):
        for a, b in _runs(seq_idx, i, row[:, 0, 0]):
            rows.append(_ssd(row[a:b], dt[i, a:b], A, B[i, a:b], C[i, a:b]))
    out = torch.cat(rows).view_as(x)
    return out if D is None else out + D[:, None] * x


def _ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One document: x `[T, heads, head_dim]`, dt `[T, heads]`, B and C `[T, heads, states]`."""
    state = x.new_zeros(x.shape[1], x.shape[2], B.shape[2])
    out = []
    for t in range(x.shape[0]):
        state = state * (dt[t] * A).exp()[:, None, None]
        state = state + (dt[t, :, None] * x[t])[..., None] * B[t, :, None, :]
        out.append((state * C[t, :, None, :]).sum(-1))
    return torch.stack(out)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    assert headdim is not None
    assert outproj_weight is not None
    assert not norm_before_gate
    rows, tokens, _ = zxbcdt.shape
    heads = D.shape[0]
    inner, wide = heads * headdim, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([inner, wide, heads], dim=-1)
    xbc = xbc.contiguous().transpose(1, 2)
    xbc = causal_conv1d_fn(xbc, conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    states = (wide - inner) // 2 // ngroups
    x, B, C = xbc.transpose(1, 2).split([inner, ngroups * states, ngroups * states], dim=-1)
    grouped = (rows, tokens, ngroups, states)
    y = mamba_chunk_scan_combined(
        x.reshape(rows, tokens, heads, headdim),
        dt,
        A,
        B.reshape(grouped),
        C.reshape(grouped),
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    y = y.flatten(-2) * F.silu(z)
    if rmsnorm_weight is not None:
        groups = y.unflatten(-1, (ngroups, inner // ngroups))
        groups = groups * (groups.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()
        y = groups.flatten(-2) * rmsnorm_weight
    return F.linear(y, outproj_weight, outproj_bias)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert initial_state is None
    assert not output_final_state
    assert scale is None
    assert not kwargs.pop("head_first", False)
    if cu_seqlens is not None:
        assert q.shape[0] == 1, "rows must be flattened to one with cu_seqlens"
        assert cu_seqlens.dtype == torch.int64
        assert (cu_seqlens.diff() > 0).all()
        assert cu_seqlens_cpu is None or torch.equal(cu_seqlens_cpu, cu_seqlens.cpu())
    if use_qk_l2norm_in_kernel:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    groups = v.shape[2] // q.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q * q.shape[-1] ** -0.5, k))
    ends: Sequence[int] = [q.shape[1]] if cu_seqlens is None else cu_seqlens[1:].tolist()
    rows = []
    for row in zip(q, k, v, g, beta):
        rows.append(torch.cat([_delta(*(x[a:b] for x in row)) for a, b in zip([0, *ends], ends)]))
    return torch.stack(rows), None


def _delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One document: q and k `[T, heads, key_dim]`, g `[T, heads]` or `[T, heads, key_dim]`."""
    g = g if g.ndim == 3 else g[..., None]
    state = v.new_zeros(k.shape[1], k.shape[2], v.shape[2])
    out = []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[..., None]
        seen = (state * k[t][..., None]).sum(-2)
        state = state + k[t][..., None] * (beta[t, :, None] * (v[t] - seen))[:, None]
        out.append((state * q[t][..., None]).sum(-2))
    return torch.stack(out)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert g.shape == k.shape
    found = locals()
    return chunk_gated_delta_rule(**{**found, **found.pop("kwargs")})


FUNCTIONS = {
    CONVOLUTION: ("causal_conv1d", causal_conv1d_fn),
    SCAN: ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
    FUSED: ("mamba_ssm.ops.triton.ssd_combined", mamba_split_conv1d_scan_combined),
    GATED_DELTA: ("fla.ops.gated_delta_rule", chunk_gated_delta_rule),
    KDA: ("fla.ops.kda", chunk_kda),
}
