"""packed-attn: exact packing of documents for LLM fine-tuning."""

from packed_attn.attention import attention
from packed_attn.audit import IsolationReport, audit
from packed_attn.collator import PackedCollator
from packed_attn.layout import DocumentLayout, Visibility
from packed_attn.packing import PackedIterableDataset, Packs, pack_dataset, pack_lengths, truncate
from packed_attn.patching import patch_model, unpatch_model
from packed_attn.varlen import flash_attn_varlen_func

__version__ = "0.1.0"

__all__ = [
    "DocumentLayout",
    "IsolationReport",
    "PackedCollator",
    "PackedIterableDataset",
    "Packs",
    "Visibility",
    "attention",
    "audit",
    "flash_attn_varlen_func",
    "pack_dataset",
    "pack_lengths",
    "patch_model",
    "truncate",
    "unpatch_model",
]
