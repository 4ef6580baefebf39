"""Padded batches computed without their padding: rows in, one packed stream inside, rows out.

A trainer that pads (DPO, reward, GRPO) hands `[B, T]` rows and a 0/1 mask to the model. Two hooks
on the model's backbone take the real tokens out, run them as documents of one pack, and put the
backbone's outputs back at the rows' places. Heads, losses and trainers see the shapes that they
made, so none of them changes.

Only the backbone packs: labels, pooling and log-probabilities stay with the code that owns them.

Rows that begin alike (a prompt with its chosen and rejected answer, a group of rollouts) can share
that beginning: the pack is then a forest, and every row that goes through a token gets its output,
so gradients of all of them add up in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from packed_attn.derived import sent
from packed_attn.layout import DocumentLayout
from packed_attn.packing.forest import plan_forest
from packed_attn_patches.adapters import refuse_adapters
from packed_attn_patches.boundaries import CACHE_NAMES, BatchShape, packed_layout
from packed_attn_patches.inputs import named

ROWS = "packed_attn_rows"
# Tokens that sharing a beginning must save: every document costs edge tiles of its own.
MIN_SHARED = 16


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Where the tokens of padded rows stand in the stream, and back.

    Attributes:
        layout: the documents, `num_tokens` tokens: one a row, or a forest of shared beginnings.
        tokens: int64 `[num_tokens]`: the place in the flattened rows that each token is read from.
        source: int64 `[B * T]`: the token that each place gets back; `num_tokens` is padding.
        rows, width: B and T.
    """

    layout: DocumentLayout
    tokens: Tensor
    source: Tensor
    rows: int
    width: int

    @staticmethod
    def of(mask: Tensor) -> PaddedRows:
        """One document a row.

        Args:
            mask: `[B, T]`, nonzero where a token is real, on the CPU.

        Raises:
            ValueError: a row whose real tokens have a gap: they would be one document in two
                places.
        """
        real = mask != 0
        tokens = real.flatten().nonzero().flatten()
        _check_no_gaps(real)
        layout = DocumentLayout.from_lengths(real.sum(1).tolist())
        source = torch.full((mask.numel(),), tokens.numel())
        source[tokens] = torch.arange(tokens.numel())
        return PaddedRows(layout, tokens, source, *mask.shape)

    @staticmethod
    def sharing(mask: Tensor, input_ids: Tensor, min_shared: int) -> PaddedRows:
        """A forest in which rows share the tokens that they begin with.

        Args:
            mask: as for `of`.
            input_ids: `[B, T]`, on the CPU.
            min_shared: tokens that sharing a beginning must save.
        """
        alone = PaddedRows.of(mask)
        host = input_ids.flatten()[alone.tokens].numpy()
        begins = np.array(alone.layout.starts)
        plan = plan_forest(np.split(host, begins[1:]), min_shared=min_shared)
        # Of each document: its place among all rows' tokens, and in the forest.
        read = np.repeat(begins[plan.lists] + plan.starts, plan.lengths) + _counted(plan.lengths)
        document_starts = np.cumsum(plan.lengths) - plan.lengths
        token_of = np.empty(host.size, dtype=np.int64)
        for row, begin in enumerate(begins):
            for d in plan.path(row):
                at = begin + plan.starts[d] + np.arange(plan.lengths[d])
                token_of[at] = document_starts[d] + np.arange(plan.lengths[d])
        layout = DocumentLayout.from_lengths(plan.lengths.tolist(), parents=plan.parents.tolist())
        source = torch.full((mask.numel(),), layout.total_tokens)
        source[alone.tokens] = torch.from_numpy(token_of)
        tokens = alone.tokens[torch.from_numpy(read)]
        return PaddedRows(layout, tokens, source, *mask.shape)

    def to(self, device: torch.device) -> PaddedRows:
        """The same rows on `device`; nothing waits for it."""
        both = sent(torch.cat([self.tokens, self.source]), device)
        tokens, source = both.split([self.tokens.numel(), self.source.numel()])
        return replace(self, layout=self.layout.to(device), tokens=tokens, source=source)

    def packed(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` -> `[1, num_tokens, ...]`."""
        return x.flatten(0, 1).index_select(0, self.tokens)[None]

    def padded(self, x: Any) -> Any:
        """Outputs per token back in rows; zeros at padding. Other values stay as they are."""
        if isinstance(x, tuple | list):
            return type(x)(self.padded(part) for part in x)
        if not isinstance(x, Tensor):
            return x
        tokens = self.layout.total_tokens
        if x.shape[:2] == (1, tokens):
            return self._at_places(x[0]).unflatten(0, (self.rows, self.width))
        if x.ndim == 2 and x.shape[0] == tokens:  # router logits: rows times tokens in one
            return self._at_places(x)
        return x

    def require_shared(self, name: str, x: Tensor) -> None:
        """Raises a ValueError unless rows that share tokens agree in x `[B, T, ...]` there."""
        real = self.source < self.layout.total_tokens
        agree = self._at_places(self.packed(x)[0])[real] == x.flatten(0, 1)[real]
        if not bool(agree.all()):
            raise ValueError(f"{name} differs between rows that share a prefix of input_ids")

    def _at_places(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)


@dataclass(frozen=True)
class PackRows:
    """Forward pre-hook of a backbone: padded rows become one packed stream.

    Attributes:
        share_prefixes: whether rows share the tokens that they begin with.
    """

    share_prefixes: bool = False

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = named(module, args, kwargs)
        if given is None:
            return None
        kwargs = given
        mask = _rows_in_training(module, kwargs)
        if mask is None:
            return None
        if not self.share_prefixes and not bool((mask == 0).any()):
            return None  # nothing to leave out
        rows = self._rows(mask, kwargs)
        if not rows.tokens.numel():
            return None
        packed = {
            name: rows.packed(value) if _is_per_token(value, mask) else value
            for name, value in kwargs.items()
            if name != "attention_mask"
        }
        if packed.get("position_ids") is None:
            packed["position_ids"] = rows.layout.position_ids[None]
        return (), {**packed, "layout": rows.layout, "use_cache": False, ROWS: rows}

    def _rows(self, mask: Tensor, kwargs: Mapping[str, Any]) -> PaddedRows:
        device = kwargs["attention_mask"].device
        if not self.share_prefixes or kwargs.get("input_ids") is None:
            return PaddedRows.of(mask).to(device)
        rows = PaddedRows.sharing(mask, kwargs["input_ids"].cpu(), MIN_SHARED).to(device)
        for name, value in kwargs.items():
            if _is_per_token(value, mask) and name not in ("attention_mask", "input_ids"):
                rows.require_shared(name, value)
        return rows


@dataclass(frozen=True)
class CheckAdapters:
    """Forward pre-hook of the whole model, on which PEFT writes what its adapters are."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = named(module, args, kwargs)
        try:
            refuse_adapters(module, same_rows=False)
        except NotImplementedError:
            if given is not None and _rows_in_training(module, given) is not None:
                raise


@dataclass(frozen=True)
class PadRows:
    """Forward hook of a backbone: its outputs go back to the rows that they came from."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        rows = kwargs.get(ROWS)
        if rows is None:
            return None
        if isinstance(output, ModelOutput):
            return type(output)(**{name: rows.padded(value) for name, value in output.items()})
        return rows.padded(output)


def _rows_in_training(module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask of 0 and 1 beside rows, `[B, T]`, on the CPU, where no cache is to be filled:
    generation stays as it is."""
    mask, shape = kwargs.get("attention_mask"), BatchShape.of(kwargs)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or shape is None:
        return None
    fills_a_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
    fills_a_cache |= not module.training and kwargs.get("use_cache") is not False
    if fills_a_cache:
        return None
    host = mask.cpu()
    if not bool((host <= 1).all()):
        return None
    # Boundaries inside rows say more than real or not; the layout hook reads them.
    is_packed = packed_layout(shape, {**kwargs, "attention_mask": host}) is not None
    return None if is_packed else host


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... inside each document."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _is_per_token(value: Any, mask: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == mask.shape


def _check_no_gaps(real: Tensor) -> None:
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    runs = begins.sum(1)
    if bool((runs > 1).any()):
        row = int((runs > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask must have its ones side by side, but row {row} has them in "
            f"{int(runs[row])} places: padding_free=True takes padding at the ends of rows alone"
        )
