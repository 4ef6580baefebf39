"""The ways of turning documents into batches that the demo compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM

Feature = Mapping[str, Any]


def pad_documents(features: Sequence[Feature]) -> dict[str, Tensor]:
    """A padded batch: one document a row, an attention mask for the rest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from packed_attn.demo.model import PAD_ID

    ids = [torch.as_tensor(f["input_ids"]) for f in features]
    labels = [torch.as_tensor(f["labels"]) for f in features]
    ones = [torch.ones_like(i) for i in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(ones, batch_first=True, padding_value=0),
    }


def concatenate(features: Sequence[Feature]) -> dict[str, Tensor]:
    """Naive packing: the tokens of a pack, with nothing said about documents."""
    return _stacked(features, "input_ids", "labels")


def with_position_ids(features: Sequence[Feature]) -> dict[str, Tensor]:
    """Stock transformers packing: positions that restart, from which it makes a T x T mask."""
    return _stacked(features, "input_ids", "labels", "position_ids")


def with_layout(features: Sequence[Feature]) -> dict[str, Any]:
    """packed-attn's collator, called as a user would."""
    from packed_attn import PackedCollator

    return PackedCollator()(features)


def patched(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """packed-attn's model patch, called as a user would."""
    from packed_attn import patch_model

    return patch_model(model)


def unchanged(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as transformers makes it."""
    return model


def token_owners(features: Sequence[Feature], batch: Mapping[str, Any]) -> Tensor:
    """The document of each token, int64 `[B, T]` on the CPU, -1 for padding."""
    import torch

    owners = torch.full(batch["input_ids"].shape, -1)
    document = 0
    for row, feature in enumerate(features):
        at = 0
        for length in feature.get("seq_lengths", [len(feature["input_ids"])]):
            owners[row, at : at + length] = document
            at, document = at + length, document + 1
    return owners


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors and layouts moved, plain numbers kept."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def _stacked(features: Sequence[Feature], *names: str) -> dict[str, Tensor]:
    import torch

    return {name: torch.tensor([f[name] for f in features]) for name in names}
