"""The manifest of packed shards: what is in them, from what they were made, and their hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from packed_attn.offline.files import read_json, write_json
from packed_attn.offline.job import MANIFEST, WORK
from packed_attn.packing.report import PackingReport

FORMAT = "packed-attn shards 1"


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest with a hash of itself; returns it."""
    manifest = {"format": FORMAT, **content}
    manifest["manifest_sha256"] = _own_hash(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, or it is not one of ours.
    """
    path = folder / MANIFEST
    if not path.exists():
        state = "its run has not ended" if (folder / WORK).exists() else "nothing was packed there"
        raise ValueError(f"{folder} has no {MANIFEST}: {state}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} must be a manifest of {FORMAT!r}")
    return manifest


def is_unaltered(manifest: dict[str, Any]) -> bool:
    """Whether a manifest is as it was written."""
    return manifest.get("manifest_sha256") == _own_hash(manifest)


def report_of(manifest: dict[str, Any]) -> PackingReport:
    """The packing report in a manifest."""
    return PackingReport.from_dict(manifest["report"])


def _own_hash(manifest: dict[str, Any]) -> str:
    content = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
