"""The offline packer: files of any size to shards of packs, safe against being killed."""

from packed_attn.offline.manifest import read_manifest, report_of
from packed_attn.offline.pack import pack_files
from packed_attn.offline.verify import verify

__all__ = ["pack_files", "read_manifest", "report_of", "verify"]
