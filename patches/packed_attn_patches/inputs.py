"""The forward pre-hook of a patched model: keyword arguments in, one DocumentLayout out.

`boundaries.py` reads what a batch says of its documents. One that says nothing (padded batches,
generation, one document a row) passes through untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.layout import DocumentLayout
from packed_attn.logps import IGNORE_INDEX, without_first_labels
from packed_attn_patches import fast_mixers
from packed_attn_patches.adapters import refuse_adapters, refuse_calls_with_learned_tokens
from packed_attn_patches.boundaries import (
    BOUNDARY_NAMES,
    CACHE_NAMES,
    NO_PAST,
    BatchShape,
    packed_layout,
    traced_layout,
)
from packed_attn_patches.families import MAKES_ITS_CACHE
from packed_attn_patches.foreign import CodeWatch
from packed_attn_patches.interface import empty_mask, is_empty_mask, is_ours
from packed_attn_patches.noise import tell
from packed_attn_patches.rope import Watch, marked, refuse_long_forest
from packed_attn_patches.routers import asks_for

# Asks the forward that TRL's trainers put over a model's own for log-probabilities of the labels.
# It hands all else to the backbone, which has a hook and a forward of its own.
FUSED_HEAD = "fused_lm_head"


@dataclass(frozen=True)
class LayoutHook:
    """Registered on a patched model and its inner models; module-level and picklable.

    Attributes:
        backend: handed to `packed_attn.attention`.
        unpacked: the model's forward takes the layout itself (see `unpack.py`); otherwise it goes
            down to the attention layers.
        mixers: its token mixers may take the layout instead (see `fast_mixers.py`).
        shifts: the loss takes a token's label for a prediction of the token before.
        first_position: where the model's own positions begin; a batch may count from it or from 0.
        outer: an inner model with a hook of its own does the attention.
        rope: of a model whose rotary embeddings have to be told the documents (see `rope.py`).
        code: what was in the module when it was patched.
    """

    backend: str = "auto"
    unpacked: bool = False
    mixers: bool = False
    shifts: bool = True
    first_position: int = 0
    outer: bool = False
    rope: Watch | None = None
    code: CodeWatch | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        mask: Any = kwargs.get("attention_mask")
        if is_empty_mask(mask) and kwargs.get("layout") is not None:
            return None  # an outer model's hook has done it
        if is_empty_mask(mask) and self.mixers:
            # Mamba2's head passes nothing on but the mask, which carries the layout too.
            layout, backend = mask.packed_attn
            return args, {**kwargs, "layout": layout, "packed_attn_backend": backend}
        if self.rope is not None:
            self.rope.begin(None)
        given = named(module, args, kwargs)
        if given is None:
            return None
        kwargs = given
        cached = any(kwargs.get(name) is not None for name in CACHE_NAMES)
        if cached or kwargs.get("input_ids") is None:
            refuse_calls_with_learned_tokens()
        batch = BatchShape.of(kwargs)
        if batch is None:
            return (), kwargs
        # Unpacking reads lengths, so a compiler breaks the graph there in any case.
        recorded = _is_recorded(batch.device)
        traced = recorded and not self.unpacked and kwargs.get("layout") is not None
        read = traced_layout if traced else packed_layout
        layout = read(batch, self._counted_from_0(kwargs))
        if layout is None:
            tell(module, kwargs.get("input_ids"), None)
            return (), kwargs
        if self.unpacked:
            _refuse_replaced_forward(module)
        if self.code is not None and not recorded:
            self.code.see(module)
        if layout.is_share:
            self._refuse_share(module, kwargs)
        layout = layout.to(batch.device)
        # A layout that came with the batch says what is padding, and is not read on the host.
        told = recorded or kwargs.get("layout") is not None
        if self.outer and not told and asks_for(module, kwargs, "router_logits"):
            layout = _with_padding_known(module, layout, kwargs.get("input_ids"))
        tell(module, kwargs.get("input_ids"), layout)
        if self.rope is not None:
            refuse_long_forest(module, layout)
        # Documents in other rows: known where the forward runs, or inside the one of a fused head.
        same_rows = not (self.unpacked and kwargs.get(FUSED_HEAD))
        refuse_adapters(module, same_rows=same_rows)
        return (), self._packed(module, kwargs, layout)

    def mixers_take(self, module: nn.Module, layout: DocumentLayout) -> bool:
        """Whether this pack goes down to the model's token mixers.

        Asked where the forward runs, as whatever wraps it may put autocast there.
        """
        # Mixers read lengths too, and their proof is not to be recorded.
        recorded = _is_recorded(layout.device)
        return self.mixers and not recorded and fast_mixers.takes_layout(module, layout)

    def _refuse_share(self, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Of a pack over several ranks, which hold documents in pieces."""
        reason = None
        if self.unpacked:
            reason = "has layers that take whole documents only"
        elif not self.shifts and kwargs.get("labels") is not None:
            reason = "has a loss in which a token predicts its own label"
        elif asks_for(module, kwargs, "attentions"):
            reason = "returns weights of a row's tokens, of which a rank has a part"
            reason += ": set output_attentions=False"
        elif asks_for(module, kwargs, "router_logits"):
            reason = "adds a loss over its routers' choices, whose summands are no part of a whole"
            reason += ": set output_router_logits=False"
        if reason is not None:
            raise NotImplementedError(f"context parallelism: {type(module).__name__} {reason}")

    def _counted_from_0(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with position_ids that begin where others' begin."""
        ids = kwargs.get("position_ids")
        if not self.first_position or ids is None or ids.ndim != 2:
            return kwargs
        counts_on = ids[:1, :1] == self.first_position
        return {**kwargs, "position_ids": (ids - counts_on * self.first_position).clamp(min=0)}

    def _packed(
        self,
        module: nn.Module,
        kwargs: dict[str, Any],
        layout: DocumentLayout,
    ) -> dict[str, Any]:
        if layout.is_forest and kwargs.get("labels") is not None:
            way_out = "pass compute_loss_func=PackedLoss(model) to the Trainer"
            if kwargs.get(FUSED_HEAD):
                way_out = "SFTTrainer does so for its metrics, so train with transformers' Trainer "
                way_out += "and compute_loss_func=PackedLoss(model), or leave share_prefixes out"
            raise ValueError(
                "the batch shares prefixes, whose last token predicts the first of each document "
                "that continues it, but the model was given labels to compute a loss with one "
                f"target a token: {way_out}"
            )
        config: Any = module.config
        if kwargs.get("use_cache") and config.model_type in MAKES_ITS_CACHE:
            raise ValueError(f"use_cache=True was given with packed documents, and {NO_PAST}")
        packed = {k: v for k, v in kwargs.items() if k not in BOUNDARY_NAMES}
        packed["layout"] = layout
        packed["use_cache"] = False
        if self.shifts and not _is_recorded(layout.device):
            _refuse_miscounted(module, kwargs, layout)
        if not self.unpacked:
            packed = self.in_stream(module, packed)
        elif packed.get(FUSED_HEAD):
            self._for_stream(module, packed)
        if packed.get("shift_labels") is not None:
            counts = layout.is_forest or packed["shift_labels"].ndim == 3
            if counts and (module.training or packed.get("labels") is not None):
                raise ValueError(_UNTAKEN_COUNTS)
            shifted = None if counts else _without_last_labels(packed["shift_labels"], layout)
            packed["shift_labels"] = shifted
        return packed

    def in_stream(self, module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with which a packed forward's layout goes down to the layers."""
        _refuse_prefixes(module, kwargs)
        _refuse_other_attention(module)
        layout, batch = kwargs["layout"], BatchShape.of(kwargs)
        assert batch is not None
        packed = {**kwargs, "packed_attn_backend": self.backend}
        packed["attention_mask"] = empty_mask(
            batch.rows, layout, self.backend, weights=asks_for(module, kwargs, "attentions")
        )
        packed.update((name, None) for name in CACHE_NAMES if name in packed)
        if packed.get("position_ids") is None:
            packed["position_ids"] = layout.position_ids.view(batch.rows, batch.tokens)
        if self.rope is not None:
            self.rope.begin(layout)
            packed["position_ids"] = marked(packed["position_ids"], batch.rows, layout)
        self._for_stream(module, packed)
        return packed

    def _for_stream(self, module: nn.Module, packed: dict[str, Any]) -> None:
        """What a head needs to know that computes its losses on the stream."""
        layout, batch = packed["layout"], BatchShape.of(packed)
        if batch is not None and self.outer and asks_for(module, packed, "router_logits"):
            # The auxiliary loss is over the real tokens of all rows, and this mask says which.
            packed["attention_mask"] = _real_mask(batch, layout)
        # A document's first label has another document before it; unpacked it has nothing that
        # could predict it.
        if packed.get("labels") is not None and self.shifts:
            packed["labels"] = without_first_labels(packed["labels"], layout)


def _refuse_miscounted(
    module: nn.Module, kwargs: Mapping[str, Any], layout: DocumentLayout
) -> None:
    """Labels of documents' first tokens, which nothing predicts, where Trainer has counted them."""
    labels, count = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if kwargs.get("layout") is not None or labels is None or count is None or not module.training:
        return  # the collator that writes layouts leaves them out
    first = (without_first_labels(labels, layout) != labels)[:, 1:]
    if bool(first.any()):
        raise ValueError(
            "the batch has labels of documents' first tokens, which nothing predicts, and Trainer "
            "counted them in num_items_in_batch: its loss would be too small. Use PackedCollator, "
            "or set them to -100 (DataCollatorForLanguageModeling makes labels of all tokens)"
        )


def _refuse_prefixes(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Tokens that see each other both ways by their type: only a mask could say so (HRM)."""
    if kwargs.get("token_type_ids") is not None and getattr(module.config, "prefix_lm", False):
        raise NotImplementedError(
            f"{type(module).__name__} takes token_type_ids for prefixes that see themselves both "
            "ways (prefix_lm=True), which packs do not serve: leave token_type_ids out, or load "
            "it with prefix_lm=False"
        )


def _refuse_other_attention(module: nn.Module) -> None:
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation is not None and not is_ours(implementation):
        raise RuntimeError(
            f"the attention implementation of {type(module).__name__} was set to "
            f"{implementation!r} after patch_model, which takes no layout: call "
            "patch_model(model) once more"
        )


def _refuse_replaced_forward(module: nn.Module) -> None:
    function = replacement_of(module)
    if function is not None:
        raise NotImplementedError(
            f"the forward of {type(module).__name__} was replaced by {function.__module__}."
            f"{function.__qualname__} after patch_model, which would run documents together: call "
            "patch_model(model) once more, and documents run through what is there now"
        )


def replacement_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that runs in place of the forward that unpacks, where one was put over it.

    What wraps that forward (autocast, a device hook) is no method of the module. TRL's, which has a
    fused head, is in its place too: it hands boundaries on to that forward or to the backbone's.
    """
    own = module.forward
    function: Any = own.__func__ if isinstance(own, MethodType) else None
    while hasattr(function, "__wrapped__") and not _is_of_trl(function):
        function = function.__wrapped__
    return function if inspect.isfunction(function) and not _is_of_trl(function) else None


def _is_of_trl(function: Any) -> bool:
    """Whether TRL has made it, under whatever name."""
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("trl.")


def _is_recorded(device: torch.device) -> bool:
    """Whether this forward is made into a graph that runs again on other boundaries: by a compiler,
    or by the capture of a CUDA graph. Nothing may be read to the host then, nor kept from before.
    """
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _real_mask(batch: BatchShape, layout: DocumentLayout) -> Tensor | None:
    """A 0/1 mask `[rows, tokens]` of the tokens that are not padding; None where all are real."""
    padding = layout.padding_tokens
    return None if padding is None else (~padding).long().view(batch.rows, batch.tokens)


def _with_padding_known(
    module: nn.Module, layout: DocumentLayout, ids: Tensor | None
) -> DocumentLayout:
    """TRL's collator pads a stream (`pad_to_multiple_of`) by documents of one padding id each,
    which a loss over the router's choices would count: here they are marked."""
    config: Any = module.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if layout.padding is not None or layout.is_forest or ids is None or pad is None:
        return layout
    lone = next((i for i, n in enumerate(reversed(layout.lengths)) if n != 1), len(layout.lengths))
    last = ids.flatten()[ids.numel() - lone :].tolist()
    padding = next((i for i, token in enumerate(reversed(last)) if token != pad), lone)
    if not padding:
        return layout
    flags = [False] * (layout.num_documents - padding) + [True] * padding
    return DocumentLayout.from_lengths(layout.lengths, padding=flags, device=layout.device)


# Every other loss, a model's own or that of a Trainer with label_smoothing_factor, would divide by
# the counts what is no sum over them.
_UNTAKEN_COUNTS = (
    "the batch has counts for PackedLoss in shift_labels, as it shares prefixes or its collator "
    "has loss_weighting='document', but no PackedLoss of this model takes them: pass "
    "compute_loss_func=PackedLoss(model) to the Trainer, with 'document' where the collator has "
    "it (with model_init=, in on_train_begin of a callback); for a loss of your own, leave "
    "shift_labels out of the model's arguments"
)


def _without_last_labels(shift_labels: Tensor, layout: DocumentLayout) -> Tensor:
    """Labels that were shifted already: a document's last token predicts nothing."""
    last = layout.document_ends.view(shift_labels.shape)
    return shift_labels.masked_fill(last, IGNORE_INDEX)


def named(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """Positional arguments under the names that forward gives them.

    None for a call of another method, which TRL's distillation leads through forward so that what
    wraps the model sees it, and which calls the model itself.
    """
    if not args:
        return dict(kwargs)
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(args) <= len(names):
        return {**dict(zip(names, args)), **kwargs}
    if isinstance(args[0], Tensor):
        raise NotImplementedError(
            f"the forward of {type(module).__name__} has no names for {len(args)} positional "
            "arguments, so that documents cannot be told: give them by keyword"
        )
    return None
