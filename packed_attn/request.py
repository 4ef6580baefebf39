"""One call of attention as a value: its tensors, its mask and its score modifiers, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packed_attn.dropout import drawn_seed
from packed_attn.host_values import host_prefix
from packed_attn.layout import DocumentLayout
from packed_attn.visibility import Visibility, check_window


@dataclass(frozen=True, eq=False)
class AttentionRequest:
    """What `attention` was asked for, after its checks. Backends read it and nothing else.

    Shapes: q `[total_queries, num_heads, head_dim]`, k `[total_keys, num_kv_heads, head_dim]`,
    v `[total_keys, num_kv_heads, value_head_dim]`; sinks and alibi_slopes `[num_heads]`;
    dropout_seed int64 `[1]`, there if and only if dropout_p > 0 (see `packed_attn.dropout`);
    bias `[num_heads, 2 * R + 1]`, key_indices `[total_queries, num_selected]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: DocumentLayout
    key_layout: DocumentLayout | None
    causal: bool
    window_size: tuple[int, int]
    chunk_size: int | None
    prefix_lengths: Sequence[int] | Tensor | None
    softmax_scale: float
    softcap: float | None
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    dropout_p: float
    dropout_seed: Tensor | None
    deterministic: bool
    return_lse: bool
    confine_nonfinite: bool
    bias: Tensor | None = None
    key_indices: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def keys(self) -> DocumentLayout:
        """The layout of the key side."""
        return self.layout if self.key_layout is None else self.key_layout

    def visibility(self) -> Visibility:
        """The mask as intervals, cached in the layout."""
        return self.layout.visibility(
            self.causal,
            self.window_size,
            chunk_size=self.chunk_size,
            prefix_lengths=self.prefix_lengths,
            key_layout=self.key_layout,
        )


def checked_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    key_layout: DocumentLayout | None,
    causal: bool,
    window_size: tuple[int, int],
    chunk_size: int | None,
    prefix_lengths: Sequence[int] | Tensor | None,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    dropout_p: float,
    deterministic: bool,
    return_lse: bool,
    confine_nonfinite: bool,
    dropout_seed: Tensor | None = None,
    bias: Tensor | None = None,
    key_indices: Tensor | None = None,
) -> AttentionRequest:
    """A request whose arguments agree with each other.

    Raises:
        ValueError: names the argument, the rule and the value.
    """
    flags = {
        "causal": causal,
        "deterministic": deterministic,
        "return_lse": return_lse,
        "confine_nonfinite": confine_nonfinite,
    }
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r}")
    _check_tensors(q, k, v)
    _check_layout("layout", layout, "q", q)
    if key_layout is None:
        _check_layout("layout", layout, "k", k)
    else:
        _check_layout("key_layout", key_layout, "k", k)
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        _check_per_head(name, per_head, q)
    _check_bias(bias, q)
    _check_key_indices(key_indices, q)
    softmax_scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    softmax_scale = _positive("softmax_scale", softmax_scale, "")
    if softcap is not None:
        softcap = _positive("softcap", softcap, ", or None for off")
    if not _is_number(dropout_p) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
    _check_seed(dropout_seed, q)
    request = AttentionRequest(
        q,
        k,
        v,
        layout,
        key_layout,
        causal,
        check_window(window_size),
        chunk_size,
        host_prefix(prefix_lengths),
        softmax_scale,
        softcap,
        sinks,
        alibi_slopes,
        dropout_p,
        _seed(dropout_p, dropout_seed, q),
        deterministic,
        return_lse,
        confine_nonfinite,
        bias,
        key_indices,
    )
    request.visibility()  # checks window, chunk and prefix, and is needed by most backends anyway
    return request


def beyond_intervals(request: AttentionRequest) -> list[str]:
    """What of a request is neither an interval nor a modifier that kernels by intervals know."""
    reasons = []
    if request.bias is not None:
        reasons.append("has no bias by position difference (bias)")
    if request.key_indices is not None:
        reasons.append("has no key sets (key_indices)")
    return reasons


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(name: str, value: object, otherwise: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number{otherwise}, got {value!r}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be positive and finite{otherwise}, got {value}")
    return float(value)


def _check_per_head(name: str, per_head: Tensor | None, q: Tensor) -> None:
    if per_head is None:
        return
    _check_floating(name, per_head, q)
    if list(per_head.shape) != [q.shape[1]]:
        raise ValueError(
            f"{name} must have shape [num_heads] = [{q.shape[1]}], got {list(per_head.shape)}"
        )


def _check_bias(bias: Tensor | None, q: Tensor) -> None:
    if bias is None:
        return
    _check_floating("bias", bias, q)
    if bias.ndim != 2 or bias.shape[0] != q.shape[1] or bias.shape[1] % 2 == 0:
        raise ValueError(
            "bias must have shape [num_heads, 2 * R + 1], one value for each position difference "
            f"from -R to R, with num_heads {q.shape[1]}, got {list(bias.shape)}"
        )


def _check_floating(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating point tensor, got {got}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")


def _check_key_indices(indices: Tensor | None, q: Tensor) -> None:
    """Shape, dtype and device; the values stay on the device, where any integer has a meaning."""
    if indices is None:
        return
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"key_indices must be an int32 or int64 tensor, got {got}")
    if indices.ndim != 2 or indices.shape[0] != q.shape[0]:
        raise ValueError(
            "key_indices must have shape [total_queries, num_selected] with total_queries "
            f"{q.shape[0]}, got {list(indices.shape)}"
        )
    if indices.device != q.device:
        raise ValueError(f"key_indices is on {indices.device}, but q is on {q.device}")


def _check_seed(seed: Tensor | None, q: Tensor) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or list(seed.shape) != [1]:
        got = f"{seed.dtype} of shape {list(seed.shape)}" if isinstance(seed, Tensor) else seed
        raise ValueError(f"dropout_seed must be an int64 tensor of shape [1], got {got}")
    if seed.device != q.device:
        raise ValueError(f"dropout_seed is on {seed.device}, but q is on {q.device}")


def _seed(dropout_p: float, seed: Tensor | None, q: Tensor) -> Tensor | None:
    if dropout_p == 0.0:
        return None
    return drawn_seed(q.device) if seed is None else seed


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 3:
            raise ValueError(
                f"{name} must have shape [total_tokens, heads, head_dim], got {list(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"q, k and v must share a dtype, but {name} is {x.dtype} and q {q.dtype}"
            )
        if x.device != q.device:
            raise ValueError(
                f"q, k and v must share a device, but {name} is on {x.device} and q on {q.device}"
            )
    if not q.dtype.is_floating_point or q.itemsize < 2:
        raise ValueError(f"q must be floating point of at least 16 bits, got {q.dtype}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"head_dim must be at least 1, but q has {q.shape[-1]} and v {v.shape[-1]}"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head_dim {k.shape[-1]}, but q has {q.shape[-1]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            "k and v must agree in tokens and heads, "
            f"but k is {list(k.shape)} and v {list(v.shape)}"
        )
    if q.shape[1] == 0 or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            "num_heads must be a positive multiple of num_kv_heads, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )


def _check_layout(name: str, layout: DocumentLayout, tensor_name: str, x: Tensor) -> None:
    if not isinstance(layout, DocumentLayout):
        raise ValueError(f"{name} must be a DocumentLayout, got {type(layout).__name__}")
    if layout.total_tokens != x.shape[0]:
        raise ValueError(
            f"{name} covers {layout.total_tokens} tokens, but {tensor_name} has {x.shape[0]}"
        )
    if layout.device != x.device:
        raise ValueError(
            f"{name} is on {layout.device}, but {tensor_name} is on {x.device}: "
            "use layout.to(device)"
        )
