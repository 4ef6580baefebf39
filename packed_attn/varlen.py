"""flash-attn's varlen call, answered by packed-attn: switch by changing an import."""

from __future__ import annotations

import torch
from torch import Tensor

from packed_attn.attention import attention
from packed_attn.layout import DocumentLayout


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn.flash_attn_varlen_func` with its signature and meaning.

    Args:
        q: `[total_q, num_heads, head_dim]`.
        k, v: `[total_k, num_kv_heads, head_dim]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[num_documents + 1]`. Tokens past the last entry belong
            to no document: their output and gradients are 0.
        max_seqlen_q, max_seqlen_k: accepted for compatibility; not needed.
        softcap: 0.0 is off, as in flash-attn.
        window_size, causal, deterministic, dropout_p, softmax_scale: see `attention`.
        alibi_slopes: `[num_heads]`; slopes of their own for each document are refused.
        return_attn_probs: also return lse `[num_heads, total_q]` and None; lse is differentiable,
            and -inf where nothing is seen (+inf in flash-attn 2).

    Returns:
        out `[total_q, num_heads, head_dim]`, or `(out, lse, None)`.

    Raises:
        ValueError: arguments that disagree. On a GPU the values of cu_seqlens are asserted there
            (a device-side assertion), so that no call waits for the device.
        NotImplementedError: a `block_table` (paged keys and values are for inference).
    """
    if block_table is not None:
        raise NotImplementedError("block_table: paged keys and values are not supported")
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(cu, Tensor) or cu.dtype != torch.int32:
            got = cu.dtype if isinstance(cu, Tensor) else type(cu).__name__
            raise ValueError(f"{name} must be int32, got {got}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have one shape, "
            f"got {list(cu_seqlens_q.shape)} and {list(cu_seqlens_k.shape)}"
        )
    layout = _layout("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    key_layout = None
    if q.shape[0] != k.shape[0] or not _same(cu_seqlens_q, cu_seqlens_k):
        key_layout = _layout("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    out, lse = attention(
        q,
        k,
        v,
        layout,
        key_layout=key_layout,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        return_lse=True,
    )
    return (out, lse, None) if return_attn_probs else out


def _same(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> bool:
    """Whether these are known to be the same documents. Values on a device are not read: taken as
    cross attention, equal documents give what self attention gives."""
    if cu_seqlens_q is cu_seqlens_k:
        return True
    if cu_seqlens_q.device.type != "cpu":
        return cu_seqlens_q.device == cu_seqlens_k.device and (
            cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr()
        )
    return torch.equal(cu_seqlens_q, cu_seqlens_k)


def _layout(name: str, cu_seqlens: Tensor, total_tokens: int) -> DocumentLayout:
    """Documents of `cu_seqlens`; one document of padding for the tokens past its end."""
    if cu_seqlens.device.type != "cpu":
        return _layout_on_device(name, cu_seqlens, total_tokens)
    layout = DocumentLayout.from_cu_seqlens(cu_seqlens)
    beyond = total_tokens - layout.total_tokens
    if beyond < 0:
        raise ValueError(
            f"{name} ends at {layout.total_tokens}, but there are only {total_tokens} tokens"
        )
    lengths = [*layout.lengths, beyond]
    padding = [False] * layout.num_documents + [beyond > 0]
    return DocumentLayout.from_lengths(lengths, padding=padding)


def _layout_on_device(name: str, cu_seqlens: Tensor, total_tokens: int) -> DocumentLayout:
    """The same without reading a value, which would make the host wait for the device at every
    layer: the rules are asserted on the device, which stops the program there and leaks nothing.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(
            f"{name} must have shape [num_documents + 1], got {list(cu_seqlens.shape)}"
        )
    ends = torch.cat([cu_seqlens, cu_seqlens.new_full((1,), total_tokens)])
    torch.ops.aten._assert_async.msg(
        (ends[0] == 0) & (ends.diff() >= 0).all(),
        f"{name} must start at 0, never decrease, and not pass the number of tokens",
    )
    documents = cu_seqlens.numel()
    padding = torch.arange(documents, device=cu_seqlens.device) == documents - 1
    return DocumentLayout(ends, total_tokens, None, padding)
