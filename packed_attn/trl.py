"""TRL: a packed data set into SFTTrainer untouched, its `wrapped` strategy with boundaries kept.

    packs = pack_dataset(tokenised, 2048)                # or pack_wrapped(tokenised, 2048)
    SFTTrainer(patch_model(model), SFTConfig(**packed_sft_arguments(), ...), train_dataset=packs)

SFTTrainer's own `packing=True` (bfd, bfd_split) and `padding_free=True` need nothing of this: a
patched model reads the boundaries that TRL's collator writes. TRL's `wrapped` throws them away
before the model sees anything, and no patch can bring them back. DPO, reward and GRPO trainers pad
their rows: `patch_model(model, padding_free=True, share_prefixes=True)` runs those without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from packed_attn.packing import PackingReport, pack_dataset
from packed_attn.packing.report import log_report

if TYPE_CHECKING:
    from datasets import Dataset


def packed_sft_arguments(**dataset_kwargs: Any) -> dict[str, Any]:
    """Arguments of `SFTConfig` with which SFTTrainer takes packs of `pack_dataset` as they are.

    TRL's collator flattens a batch of packs and writes their boundaries from `seq_lengths`;
    `max_length` must be off, since TRL would cut packs and not documents. Every process fetches its
    own batches: accelerate's dispatching, its default for streams, would stack packs of unlike
    lengths.

    Args:
        dataset_kwargs: more entries of `SFTConfig(dataset_kwargs=...)`.
    """
    return {
        "padding_free": True,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True, **dataset_kwargs},
        "accelerator_config": {"dispatch_batches": False},
    }


def pack_wrapped(
    dataset: Dataset | Sequence[Any],
    max_length: int,
    *,
    on_report: Callable[[PackingReport], object] = log_report,
) -> Dataset:
    """The rows of `SFTConfig(packing=True, packing_strategy="wrapped")`, boundaries kept.

    The same tokens in the same rows, over the whole set and not in runs of 1000 documents, with
    `seq_lengths` that say where documents end, and no label for a token that a cut left without
    the token before it. Takes what `pack_dataset` takes.

    Args:
        dataset: tokenised documents.
        max_length: tokens a row holds; TRL's name.
        on_report: as in `pack_dataset`.
    """
    return pack_dataset(dataset, max_length, strategy="wrapped", on_report=on_report)
