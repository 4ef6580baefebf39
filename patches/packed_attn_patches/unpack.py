"""Exact by construction for any model: run it on documents batched by length, put the rows back.

For models whose token mixers do not take a layout (recurrences, convolutions, attention code of
their own). Documents of like length form right-padded batches: a causal model's outputs cannot
depend on what comes later, so padding reaches no document. Models that look both ways get batches
of one length and no padding. Costs a few smaller forwards instead of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.buckets import Bucket, plan_buckets
from packed_attn.collator import IGNORE_INDEX
from packed_attn.layout import DocumentLayout
from packed_attn_patches.inputs import CACHE_NAMES

# Tokens in one forward: beyond it a batch is as efficient as it gets, and only memory grows.
CALL_TOKENS = 1 << 16


class UnpackedForward:
    """A model's forward that runs packed batches document by document, in batches by length.

    Set as the instance's `forward`; picklable, and a deepcopy of the model holds a copy of it.

    Args:
        model: the model whose class's forward does the work.
        causal: whether outputs never depend on later tokens.
    """

    def __init__(self, model: nn.Module, causal: bool) -> None:
        self.model = model
        self.causal = causal
        # Trainer reads the names of a model's columns from here.
        self.__signature__ = inspect.signature(type(model).forward.__get__(model))

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "causal": self.causal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__signature__ = inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, layout: DocumentLayout | None = None, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = type(self.model).forward
        if layout is None:
            return forward(self.model, *args, **kwargs)
        batch = _Unpacked.of(layout, kwargs)
        if batch is None:
            raise ValueError("a packed forward needs input_ids or inputs_embeds")
        parts = [
            (bucket, forward(self.model, **inputs)) for bucket, inputs in batch.calls(self.causal)
        ]
        return batch.joined(parts)


@dataclass(frozen=True)
class _Unpacked:
    """One packed forward: the layout, keyword arguments per token, and all others."""

    layout: DocumentLayout
    rows: int
    tokens: int
    per_token: dict[str, Tensor]
    others: dict[str, Any]
    num_items: Any

    @staticmethod
    def of(layout: DocumentLayout, kwargs: Mapping[str, Any]) -> _Unpacked | None:
        shaped = kwargs.get("input_ids")
        shaped = kwargs.get("inputs_embeds") if shaped is None else shaped
        if shaped is None:
            return None
        rows, tokens = shaped.shape[:2]
        others: dict[str, Any] = {"use_cache": False}
        per_token = {}
        for name, value in kwargs.items():
            # Each document counts its own positions and sees all of itself.
            if name in ("position_ids", "attention_mask", "use_cache", *CACHE_NAMES):
                continue
            if name == "num_items_in_batch":
                continue
            if isinstance(value, Tensor) and value.shape[:2] == (rows, tokens):
                per_token[name] = value.flatten(0, 1)
            else:
                others[name] = value
        return _Unpacked(layout, rows, tokens, per_token, others, kwargs.get("num_items_in_batch"))

    def calls(self, causal: bool) -> Iterator[tuple[Bucket, dict[str, Any]]]:
        """The keyword arguments of each forward."""
        layout = self.layout.to("cpu")
        plan = plan_buckets(
            layout.cu_seqlens,
            layout.padding,
            pad_lengths=causal,
            view_tokens=1,
            call_tokens=CALL_TOKENS,
        )
        for bucket in plan.buckets:
            bucket = bucket.to(self.layout.device)
            inputs = {name: bucket.rows(value) for name, value in self.per_token.items()}
            if "labels" in inputs and bucket.pads is not None:
                inputs["labels"].view(-1)[bucket.pads] = IGNORE_INDEX
            yield bucket, {**self.others, **inputs}

    def joined(self, parts: list[tuple[Bucket, Any]]) -> Any:
        """The output of one forward over all documents, in stream order.

        Tokens of padding get zeros.
        """
        if not parts:
            raise ValueError("a packed forward needs a document that is not padding")
        joined = {}
        for name, value in parts[0][1].items():
            if name == "loss":
                joined[name] = self._loss(parts)
            elif isinstance(value, Tensor):
                joined[name] = self._stream([(b, o[name]) for b, o in parts])
            elif isinstance(value, tuple) and name == "hidden_states":
                layers = range(len(value))
                joined[name] = tuple(
                    self._stream([(b, o[name][i]) for b, o in parts]) for i in layers
                )
            elif isinstance(value, tuple):
                raise NotImplementedError(
                    f"the output {name} has no rows per token to put back: do not ask for it in a "
                    "packed forward"
                )
        return type(parts[0][1])(**joined)

    def _stream(self, parts: list[tuple[Bucket, Tensor]]) -> Tensor:
        """Bucket rows `[batch, length, width]` -> `[B, T, width]`."""
        first = parts[0][1]
        if first.ndim < 2 or first.shape[:2] != (parts[0][0].batch, parts[0][0].length):
            raise NotImplementedError(
                f"an output of shape {list(first.shape)} has no rows per token to put back"
            )
        rows, tokens = [], []
        for bucket, value in parts:
            real, of_tokens = bucket.real(value.device)
            rows.append(value.flatten(0, 1).index_select(0, real))
            tokens.append(of_tokens)
        token = torch.cat(tokens)
        source = token.new_full((self.layout.total_tokens,), token.numel())
        source[token] = torch.arange(token.numel(), device=token.device)
        zeros = first.new_zeros(1, *first.shape[2:])
        stream = torch.cat([*rows, zeros]).index_select(0, source)
        return stream.view(self.rows, self.tokens, *first.shape[2:])

    def _loss(self, parts: list[tuple[Bucket, Any]]) -> Tensor:
        """The token mean over all documents, from the means of the batches."""
        labels = self.per_token["labels"]
        total, loss = 0, torch.zeros((), device=labels.device)
        for bucket, output in parts:
            _, tokens = bucket.real(labels.device)
            targets = (labels.index_select(0, tokens) != IGNORE_INDEX).sum()
            total = total + targets
            # A batch without targets has a mean of NaN, and no part in the sum.
            loss = loss + torch.where(targets > 0, output.loss * targets, 0.0)
        return loss / (total if self.num_items is None else self.num_items)
