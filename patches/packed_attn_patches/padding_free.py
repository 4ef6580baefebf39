"""Padded batches computed without their padding: rows in, one packed stream inside, rows out.

A trainer that pads (DPO, reward, GRPO) hands `[B, T]` rows and a 0/1 mask to the model. Two hooks
on the model's backbone take the real tokens out, run them as documents of one pack, and put the
backbone's outputs back at the rows' places. Heads, losses and trainers see the shapes that they
made, so none of them changes.

Only the backbone packs: labels, pooling and log-probabilities stay with the code that owns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from packed_attn.layout import DocumentLayout
from packed_attn_patches.inputs import CACHE_NAMES, named

ROWS = "packed_attn_rows"


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Where the tokens of padded rows stand in the stream, and back.

    Attributes:
        layout: the documents, one a row, of `num_tokens` tokens.
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
            mask: `[B, T]`, nonzero where a token is real.

        Raises:
            ValueError: a row whose real tokens have a gap: they would be one document in two
                places.
        """
        real = mask != 0
        tokens = real.flatten().nonzero().flatten()
        _check_no_gaps(real)
        layout = DocumentLayout.from_lengths(real.sum(1).tolist(), device=mask.device)
        source = torch.full((mask.numel(),), tokens.numel(), device=mask.device)
        source[tokens] = torch.arange(tokens.numel(), device=mask.device)
        return PaddedRows(layout, tokens, source, *mask.shape)

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

    def _at_places(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.source)


@dataclass(frozen=True)
class PackRows:
    """Forward pre-hook of a backbone: padded rows become one packed stream."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = named(module, args, kwargs)
        mask = kwargs.get("attention_mask")
        if not _is_padded_training(module, kwargs) or not isinstance(mask, Tensor):
            return None
        rows = PaddedRows.of(mask)
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


def _is_padded_training(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Rows beside a 2-D mask with zeros, and no cache to fill: generation stays as it is."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or kwargs.get("layout") is not None:
        return False
    fills_a_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
    fills_a_cache |= not module.training and kwargs.get("use_cache") is not False
    # A mask of integer segments says more than real or not; the layout hook reads it.
    return not fills_a_cache and bool((mask == 0).any()) and bool((mask <= 1).all())


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
            f"{int(runs[row])} places"
        )
