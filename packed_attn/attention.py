"""Attention over packed documents: checks its arguments, selects a backend, calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from packed_attn import backends
from packed_attn.distributed import ShardedLayout
from packed_attn.layout import DocumentLayout
from packed_attn.request import checked_request

# A compiler traces a look-up but no import, so all of them are there before the first call.
for _name in backends.BACKENDS:
    backends.load(_name)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    key_layout: DocumentLayout | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    chunk_size: int | None = ...,
    prefix_lengths: Sequence[int] | Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    key_indices: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    deterministic: bool = ...,
    backend: str = ...,
    return_lse: Literal[False] = ...,
    confine_nonfinite: bool = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    key_layout: DocumentLayout | None = ...,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    chunk_size: int | None = ...,
    prefix_lengths: Sequence[int] | Tensor | None = ...,
    softmax_scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    bias: Tensor | None = ...,
    key_indices: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    deterministic: bool = ...,
    backend: str = ...,
    return_lse: Literal[True],
    confine_nonfinite: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout,
    *,
    key_layout: DocumentLayout | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    chunk_size: int | None = None,
    prefix_lengths: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    key_indices: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
    confine_nonfinite: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which every document sees itself alone.

    Args:
        q: `[total_tokens, num_heads, head_dim]`, float64, float32, bfloat16 or float16.
        k: `[total_keys, num_kv_heads, head_dim]`; num_heads is a multiple of num_kv_heads.
        v: `[total_keys, num_kv_heads, value_head_dim]`.
        layout: where the documents of q (and of k and v, without `key_layout`) begin and end.
        key_layout: cross attention: the documents of k and v. Causal is bottom-right aligned.
        causal: a query sees no later position.
        window_size: (left, right) positions seen besides the query's own, inclusive; -1 is
            unlimited, as in flash-attn. A Hugging Face `sliding_window=W` is `(W - 1, 0)`.
        chunk_size: a query sees only its own chunk of its document (llama4).
        prefix_lengths: `[num_documents]`: first tokens of each document that all of it sees.
        softmax_scale: `head_dim ** -0.5` by default.
        softcap: scores become `softcap * tanh(scores / softcap)` (gemma2); None is off.
        sinks: `[num_heads]`: a learned logit per head with no value (gpt-oss).
        alibi_slopes: `[num_heads]`: `-slope * distance` is added to the scores.
        bias: `[num_heads, 2 * R + 1]`: `bias[h, R + clamp(j - i, -R, R)]` is added to the score of
            query position i and key position j (T5's relative bias, which ends at a distance).
        key_indices: int32 or int64 `[total_queries, num_selected]`: a query sees these tokens of k
            alone, of those that the mask shows it (sparse indexers, DeepSeek V3.2). In any order;
            an index below 0 or past the keys names none.
        dropout_p: dropout of the attention weights; lse is without it.
        dropout_seed: int64 `[1]` on q's device: which weights are dropped, the same on every
            backend (`packed_attn.dropout`). None draws one from torch's generator.
        deterministic: gradients equal to the bit from run to run; on the triton backend also where
            torch.use_deterministic_algorithms(True) is on.
        backend: "auto" for the first that can, or a name of `packed_attn.backends.BACKENDS`,
            which is never replaced by another.
        return_lse: also return the log of the sum of exponentials.
        confine_nonfinite: refuse a backend that lets a NaN or Inf of one document reach another.

    Returns:
        out `[total_tokens, num_heads, value_head_dim]` in q's dtype; with `return_lse` also lse
        `[num_heads, total_tokens]`, float32 (float64 for float64), natural log, sinks counted.
        A token that sees nothing, such as padding, has out 0, gradient 0 and lse -inf. Second
        derivatives and torch.func's transforms are the reference's alone; others raise.

    Raises:
        ValueError: arguments that disagree; the message names argument, rule and value.
        NotImplementedError: no backend, or not the named one, can run this, with the reasons.
    """
    options = {
        "key_layout": key_layout,
        "causal": causal,
        "window_size": window_size,
        "chunk_size": chunk_size,
        "prefix_lengths": prefix_lengths,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "key_indices": key_indices,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "deterministic": deterministic,
        "return_lse": return_lse,
        "confine_nonfinite": confine_nonfinite,
    }
    if isinstance(layout, ShardedLayout):
        # This rank's tokens of a pack over several: the exchange calls back with whole documents.
        return layout.attention(q, k, v, {**options, "backend": backend})
    request = checked_request(q, k, v, layout, **options)
    out, lse = backends.run(backend, request)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse
