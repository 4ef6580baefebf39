"""The attention and mask functions that transformers calls by name on a patched model.

A packed forward carries two things: `layout=`, a keyword argument that transformers hands from the
model to every attention layer, and an *empty mask*, a 4-D attention_mask without elements, which
transformers passes on as it is and no kernel can use. The mask carries the layout once more, for
models that do not hand keyword arguments on. A layer that gets the mask and finds no layout raises,
and so does one that lost the mask: boundaries are never lost silently.

A forward without a layout is not ours: it runs the implementation that the model had before, with
that implementation's own mask.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packed_attn.attention import attention
from packed_attn.layout import DocumentLayout

# The name on a patched model for each implementation it may have had. transformers branches on
# names that contain "flash", "sdpa" or "flex_attention", so these contain none of them; the mask
# interface is told nothing but the name, so there is one for each.
NAMES = {
    "sdpa": "packed_attn",
    "eager": "packed_attn_on_eager",
    "flash_attention_2": "packed_attn_on_fa2",
    "flash_attention_3": "packed_attn_on_fa3",
    "flash_attention_4": "packed_attn_on_fa4",
    "flex_attention": "packed_attn_on_flex",
}

# What code that makes masks with windows or chunks imports by name, from masking_utils.
_LOCAL = (
    "create_sliding_window_causal_mask",
    "create_bidirectional_sliding_window_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)
_MODELS = "transformers.models."

# Keyword arguments that change which keys a layer sees or their scores, and that we do not serve.
UNSERVED = ("position_bias", "indices", "block_indices", "key_indices", "bias")

# Model types without layer_types whose masks are windowed while their layers do not say so.
WINDOWED_BY_CONFIG = frozenset({"phimoe"})

# Model types whose eager attention returns weights to which a sink has not been added.
WEIGHTS_WITHOUT_SINKS = frozenset({"granite_swa", "granitemoe_swa"})


def empty_mask(
    batch_size: int, layout: DocumentLayout, backend: str, *, weights: bool = False
) -> Tensor:
    """The 4-D mask without elements that marks a packed forward and carries its layout.

    Args:
        weights: whether attention layers are to return their weights (`output_attentions`).
    """
    mask = torch.empty(batch_size, 1, 0, 0, dtype=torch.bool, device=layout.device)
    mask.packed_attn = (layout, backend)  # type: ignore[attr-defined]
    if weights:
        mask.packed_attn_weights = True  # type: ignore[attr-defined]
    return mask


def stock_of(implementation: str | None) -> str | None:
    """The stock implementation behind one of our names, or the name as it is.

    A trainer that builds a reference model "like the policy" hands it the policy's name, so a model
    may have ours before it is patched.
    """
    ours = {name: stock for stock, name in NAMES.items()}
    return implementation if implementation is None else ours.get(implementation, implementation)


def is_ours(implementation: str | None) -> bool:
    """Whether it is an implementation that takes a layout."""
    return implementation in NAMES.values()


def is_empty_mask(mask: Any) -> bool:
    """Whether `mask` marks a packed forward."""
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.numel() == 0


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    stock: str,
    layout: DocumentLayout | None = None,
    packed_attn_backend: str = "auto",
    packed_attn_query_scale: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function.

    Args:
        query: `[B, num_heads, T, head_dim]`; key and value `[B, num_kv_heads, T, head_dim]`.
        stock: the implementation that the model had before it was patched.
        layout: the documents of the `B * T` tokens; None runs `stock`.
        packed_attn_query_scale: float32 `[B * T]`, what multiplies a token's query in a packed
            forward, where the layer itself would ask for its place in the row.

    Returns:
        `[B, T, num_heads, value_head_dim]`, and `[B, num_heads, T, T]`, the weights as eager
        attention returns them, 0 between documents, where `output_attentions` asks for them.
    """
    if layout is None:
        carried = getattr(attention_mask, "packed_attn", (None, packed_attn_backend))
        layout, packed_attn_backend = carried
    if layout is None and not is_empty_mask(attention_mask):
        function = _stock_attention(stock, module)
        return function(module, query, key, value, attention_mask, **kwargs)
    if layout is None or not is_empty_mask(attention_mask):
        lost = "layout" if layout is None else "empty mask"
        raise RuntimeError(
            f"packed-attn: {type(module).__name__} ran in a packed forward without its {lost}: "
            "this model does not pass it on to its attention layers"
        )
    batch, num_heads, tokens, head_dim = query.shape
    if head_dim == 0:
        raise NotImplementedError(
            f"packed-attn: {type(module).__name__} has queries of no numbers, as RoPE leaves them "
            "of head_dim=1: load it with a larger head_dim"
        )
    options = _translated(module, kwargs, stock)
    if layout.is_forest and not options["causal"]:
        raise NotImplementedError(
            f"packed-attn: {type(module).__name__} looks both ways, so a shared prefix would see "
            "what follows it: it takes plain packs, but no forest (parents)"
        )
    if packed_attn_query_scale is not None:
        scale = packed_attn_query_scale.view(batch, 1, tokens, 1).to(query.device)
        query = (query * scale).to(query.dtype)
    dtype = _compute_dtype(value)
    wanted = getattr(attention_mask, "packed_attn_weights", False)
    if wanted:
        value = _with_places(value)
        packed_attn_backend = "reference"  # the one that takes values of any width
    out = attention(
        _stream(query.to(dtype)),
        _stream(key.to(dtype)),
        _stream(value.to(dtype)),
        layout,
        backend=packed_attn_backend,
        **options,
    )
    out = out.view(batch, tokens, num_heads, out.shape[-1])
    if not wanted:
        return out, None
    out, weights = out.split((out.shape[-1] - tokens, tokens), dim=-1)
    if getattr(getattr(module, "config", None), "model_type", None) in WEIGHTS_WITHOUT_SINKS:
        weights = _without_sinks(module, weights, options["dropout_p"])
    return out.contiguous(), weights.transpose(1, 2)


def packed_mask(*args: Any, stock: str, **kwargs: Any) -> Any:
    """transformers' mask function: only forwards without a layout reach it."""
    return ALL_MASK_ATTENTION_FUNCTIONS[stock](*args, **kwargs)


def _stream(x: Tensor) -> Tensor:
    """`[B, heads, T, head_dim]` -> `[B * T, heads, head_dim]`, a view where strides allow."""
    return x.transpose(1, 2).flatten(0, 1)


def _with_places(value: Tensor) -> Tensor:
    """Values with one number more for each token of the row, 1 at its own: what attention makes of
    those are its weights, after dropout and with their gradients, as eager attention has them."""
    batch, heads, tokens, _ = value.shape
    places = torch.eye(tokens, dtype=value.dtype, device=value.device)
    return torch.cat([value, places.expand(batch, heads, tokens, tokens)], dim=-1)


def _without_sinks(module: nn.Module, weights: Tensor, dropout_p: float) -> Tensor:
    """Weights of rows that add up to 1, or are 0 where a token sees nothing."""
    if dropout_p:
        raise NotImplementedError(
            f"packed-attn: {type(module).__name__} returns weights without its sinks, which packs "
            "do not under dropout: call it in eval mode, or without output_attentions"
        )
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _compute_dtype(value: Tensor) -> torch.dtype:
    """The dtype of attention where rotary embeddings and norms in float32 leave q and k in another
    than v: autocast's, as torch's own attention does; without it v's, which comes straight from a
    projection as the output goes straight into one."""
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return value.dtype


def _translated(module: nn.Module, kwargs: dict[str, Any], stock: str) -> dict[str, Any]:
    """transformers' keyword arguments in our names."""
    for name in UNSERVED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"packed-attn: {type(module).__name__} passes {name}=, which is not supported"
            )
    config: Any = getattr(module, "config", None)
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
        if stock == "eager" and getattr(config, "is_causal", None) is False:
            causal = False  # eager attention sees the mask alone, which is made by the config
    window, chunk = _local(module, kwargs, stock)
    if chunk is not None and not causal:
        raise NotImplementedError(
            f"packed-attn: {type(module).__name__} is called with is_causal=False, but its chunks "
            "are causal: at some lengths stock masks heed one, at others the other"
        )
    sinks = kwargs.get("s_aux")
    # Masks that is_causal=False turns both ways reach as far as the config's window says: a token
    # further than causal ones, and than those of a layer that looks both ways by itself.
    told = kwargs.get("is_causal") is False or getattr(module, "is_causal", True)
    turned = not causal and told and "flash" not in stock
    left = -1 if window is None else int(config.sliding_window if turned else window - 1)
    return {
        "causal": bool(causal),
        "window_size": (left, -1 if causal else left),
        "chunk_size": chunk,
        "softmax_scale": kwargs.get("scaling"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("sinks") if sinks is None else sinks,
        "dropout_p": kwargs.get("dropout") or 0.0,
    }


def _local(module: nn.Module, kwargs: dict[str, Any], stock: str) -> tuple[int | None, int | None]:
    """(sliding window, chunk) of a layer: as it says, or as its config says where its mask alone
    would have told. flash-attn's kernels get what a layer says, and no mask; all others get the
    mask, so a config's window is none where the type's code makes no such mask."""
    said = kwargs.get("sliding_window")
    if "flash" in stock and "sliding_window" in kwargs:
        return said, None
    if not _masks_are_local(type(module)):
        return None, None
    if said is not None:
        return said, None
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if config is None or getattr(config, "model_type", None) in WINDOWED_BY_CONFIG:
        return getattr(config, "sliding_window", None), None
    if not layer_types or layer is None:
        return None, None
    if layer_types[layer] == "sliding_attention":
        return config.sliding_window, None
    if layer_types[layer] == "chunked_attention":
        return None, config.attention_chunk_size
    return None, None


def _masks_are_local(layer: type[nn.Module]) -> bool:
    """Whether transformers' code of a layer's type makes masks with windows or chunks; code that is
    not transformers' is taken at its config's word."""
    names = [cls.__module__ for cls in layer.__mro__ if cls.__module__.startswith(_MODELS)]
    return not names or any(hasattr(sys.modules[name], mask) for name in names for mask in _LOCAL)


def _stock_attention(stock: str, module: nn.Module) -> Any:
    if stock == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[stock]


for _stock, _name in NAMES.items():
    AttentionInterface.register(_name, partial(packed_attention_forward, stock=_stock))
    AttentionMaskInterface.register(_name, partial(packed_mask, stock=_stock))
