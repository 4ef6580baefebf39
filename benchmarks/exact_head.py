"""Attention of one key head and its query heads, written out: what a timed result is checked by.

The specification computes all heads with dense masks, too much for 32k tokens; one head, in blocks
of rows, needs seconds. The last one is taken: an index that overflows shows there first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packed_attn.visibility import Visibility
from tests.cases import Case, Inputs

ROWS = 1024
NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True, eq=False)
class Wanted:
    """`last_head` in float64, and as plain torch computes it at the case's precision."""

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]


def wanted(case: Case, inputs: Inputs, seen: Visibility) -> Wanted:
    """What every candidate for a case is held against; `seen` is the mask of the case."""
    return Wanted(
        last_head(case, inputs, seen, torch.float64), last_head(case, inputs, seen, case.dtype)
    )


def faults(case: Case, got: tuple[Tensor, ...], wanted: Wanted) -> list[str]:
    """Why a result is wrong, in sentences; empty where it is right.

    Twice (gradients three times) the error of plain torch at the case's precision is allowed, plus
    one rounding, at the worst element and on average.

    Args:
        got: out and the gradients of q, k and v for `inputs.grad_out`.
    """
    group = case.num_heads // case.num_kv_heads
    exact, plain = wanted.exact, wanted.plain
    eps, wrong = torch.finfo(case.dtype).eps, []
    for name, whole in zip(NAMES, got):
        want = exact[name]
        result = whole[:, -(1 if name in ("dk", "dv") else group) :].double()
        # One rounding of the result, and of the delta that kernels take from the rounded out.
        rounding = eps * (want.abs() + exact.get(f"{name} by delta", torch.zeros_like(want)))
        for kind, norm in (("largest", _largest), ("rms", _rms)):
            factor = 2 if name == "out" else 3
            allowed = factor * (norm(plain[name].double() - want) + norm(rounding))
            error = norm(result - want)
            if not error <= allowed:
                wrong.append(f"{kind} error of {name} is {error:.3g}, over {allowed:.3g}")
    return wrong


def last_head(
    case: Case, inputs: Inputs, seen: Visibility, dtype: torch.dtype
) -> dict[str, Tensor]:
    """out and dq of the last group of query heads, dk and dv of the last key head.

    Shapes: `[total_tokens, group, dim]` and `[total_tokens, 1, dim]`; "dq by delta" and "dk by
    delta" are the size of what a relative error of 1 in every term of delta would change.

    Raises:
        ValueError: ALiBi, dropout or cross attention, which no benchmark has.
    """
    if case.alibi or case.dropout_p or case.key_lengths is not None:
        raise ValueError(f"{case.name}: ALiBi, dropout and cross attention are not written out")
    group = case.num_heads // case.num_kv_heads
    k, v = inputs.k[:, -1].to(dtype), inputs.v[:, -1].to(dtype)
    heads = []
    for head in range(case.num_heads - group, case.num_heads):
        sink = None if inputs.sinks is None else inputs.sinks[head].to(dtype)
        q, dout = inputs.q[:, head].to(dtype), inputs.grad_out[:, head].to(dtype)
        heads.append(_one_head(case, q, k, v, dout, sink, seen))
    of_queries, of_keys = ("out", "dq", "dq by delta"), ("dk", "dv", "dk by delta")
    found = {name: torch.stack([head[name] for head in heads], 1) for name in of_queries}
    return found | {
        name: torch.stack([head[name] for head in heads]).sum(0)[:, None] for name in of_keys
    }


def _one_head(
    case: Case,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    sink: Tensor | None,
    seen: Visibility,
) -> dict[str, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = case.softmax_scale or case.head_dim**-0.5
    found = {"out": torch.zeros_like(dout), "dq": torch.zeros_like(q)}
    found |= {"dk": torch.zeros_like(k, dtype=wide), "dv": torch.zeros_like(v, dtype=wide)}
    found |= {"dq by delta": torch.zeros_like(q), "dk by delta": torch.zeros_like(k, dtype=wide)}
    for first in range(0, q.shape[0], ROWS):
        i = slice(first, min(first + ROWS, q.shape[0]))
        j = slice(int(seen.key_start[i].min()), int(seen.key_stop[i].max()))
        visible = _visible(seen, i, j)
        x, slope = _scores((q[i] @ k[j].T).to(wide) * scale, case.softcap)
        x = x.masked_fill(~visible, -torch.inf)
        lse = x.logsumexp(-1)
        if sink is not None:
            lse = torch.logaddexp(lse, sink.to(wide))
        p = torch.where(visible, (x - lse[:, None]).exp(), 0.0)
        out = p.to(q.dtype) @ v[j]
        dp = (dout[i] @ v[j].T).to(wide)
        ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * slope * scale).to(q.dtype)
        delta = (scale * (dout[i] * out).abs().sum(-1, keepdim=True)).to(q.dtype)
        p = p.to(q.dtype)
        found["out"][i], found["dq"][i] = out, ds @ k[j]
        found["dk"][j] += ds.T @ q[i]
        found["dv"][j] += p.T @ dout[i]
        found["dq by delta"][i] = (delta * (p @ k[j])).abs()
        found["dk by delta"][j] += (p.T @ (delta * q[i])).abs()
    return found


def _scores(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Capped scores and the derivative of the cap."""
    if softcap is None:
        return x, 1.0
    tanh = torch.tanh(x / softcap)
    return softcap * tanh, 1 - tanh.square()


def _visible(seen: Visibility, rows: slice, columns: slice) -> Tensor:
    """The mask rule for a block of queries and a block of keys."""
    device = seen.key_start.device
    i = torch.arange(rows.start, rows.stop, device=device)[:, None]
    j = torch.arange(columns.start, columns.stop, device=device)[None, :]
    by_query = (seen.key_start[rows, None] <= j) & (j < seen.key_stop[rows, None])
    return by_query & (seen.query_start[None, columns] <= i) & (i < seen.query_stop[None, columns])


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
