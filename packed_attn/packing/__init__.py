"""The packer: lengths to packs, data sets to packed data sets, and truncation to compare with."""

from packed_attn.packing.comparison import Comparison, compare
from packed_attn.packing.dataset import pack_dataset
from packed_attn.packing.packed_dataset import PackedDataset, PackPart
from packed_attn.packing.picture import draw_packs
from packed_attn.packing.plan import Packs, pack_lengths
from packed_attn.packing.report import PackingLossError, PackingReport, TruncationReport
from packed_attn.packing.sampler import PackedBatchSampler
from packed_attn.packing.sources import TokenFile
from packed_attn.packing.streaming import PackedIterableDataset
from packed_attn.packing.truncation import truncate

__all__ = [
    "Comparison",
    "PackPart",
    "PackedBatchSampler",
    "PackedDataset",
    "PackedIterableDataset",
    "PackingLossError",
    "PackingReport",
    "Packs",
    "TokenFile",
    "TruncationReport",
    "compare",
    "draw_packs",
    "pack_dataset",
    "pack_lengths",
    "truncate",
]
