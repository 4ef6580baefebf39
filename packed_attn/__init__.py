"""packed-attn: exact packing of documents for LLM fine-tuning."""

from packed_attn.attention import attention
from packed_attn.audit import IsolationReport, audit
from packed_attn.collator import PackedCollator
from packed_attn.layout import DocumentLayout, Visibility
from packed_attn.logps import unpack_logps
from packed_attn.loss import PackedLoss
from packed_attn.packing import (
    PackedBatchSampler,
    PackedDataset,
    PackedIterableDataset,
    Packs,
    TokenFile,
    pack_dataset,
    pack_lengths,
    truncate,
)
from packed_attn.patching import patch_model, unpatch_model
from packed_attn.varlen import flash_attn_varlen_func

__version__ = "0.1.0"

__all__ = [
    "DocumentLayout",
    "IsolationReport",
    "PackedBatchSampler",
    "PackedCollator",
    "PackedDataset",
    "PackedIterableDataset",
    "PackedLoss",
    "Packs",
    "TokenFile",
    "Visibility",
    "attention",
    "audit",
    "flash_attn_varlen_func",
    "pack_dataset",
    "pack_lengths",
    "patch_model",
    "truncate",
    "unpack_logps",
    "unpatch_model",
]
