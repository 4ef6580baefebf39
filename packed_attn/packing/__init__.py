"""The packer: lengths to packs, data sets to packed data sets, and truncation to compare with."""

from packed_attn.packing.dataset import pack_dataset
from packed_attn.packing.plan import Packs, pack_lengths
from packed_attn.packing.report import PackingLossError, PackingReport, TruncationReport
from packed_attn.packing.streaming import PackedIterableDataset
from packed_attn.packing.truncation import truncate

__all__ = [
    "PackedIterableDataset",
    "PackingLossError",
    "PackingReport",
    "Packs",
    "TruncationReport",
    "pack_dataset",
    "pack_lengths",
    "truncate",
]
