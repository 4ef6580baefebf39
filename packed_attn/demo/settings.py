"""What every part of the demo agrees on: sizes, seeds and where a run keeps its files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """One demo run. Child processes read it back from `settings.json` in the output folder.

    Attributes:
        output: folder that receives the table, the picture and the tokenized documents.
        train_seconds: seconds that each row trains.
        secret_steps: steps that each of the two planted-secret models trains.
        secret_seconds: where a machine is slow, the steps end after so many seconds.
        capacity: tokens a pack holds; longer documents are left out for every row alike.
        batch_size: documents in a padded batch.
        vocab_size: of the byte-level BPE.
        heldout_documents: documents kept back from training; the loss column is theirs.
        max_files: read only the first so many files of the library, for tests.
        seed: fixes the order of documents, the weights and the perturbations.
    """

    output: Path
    train_seconds: float = 8.0
    secret_steps: int = 190
    secret_seconds: float = 10.0
    capacity: int = 2048
    batch_size: int = 8
    vocab_size: int = 2048
    heldout_documents: int = 48
    max_files: int | None = None
    seed: int = 0

    @property
    def train_folder(self) -> Path:
        """The tokenized documents that the rows train on, as `datasets` stores them."""
        return self.output / "documents" / "train"

    @property
    def heldout_folder(self) -> Path:
        """The tokenized documents kept back."""
        return self.output / "documents" / "heldout"

    def save(self) -> None:
        """Writes `settings.json` for the child processes."""
        fields = {**asdict(self), "output": str(self.output)}
        (self.output / "settings.json").write_text(json.dumps(fields, indent=2))

    @staticmethod
    def load(output: Path) -> Settings:
        """The settings that `save` wrote into `output`."""
        fields = json.loads((output / "settings.json").read_text())
        return Settings(**{**fields, "output": output})


def use_all_cores() -> int:
    """Lets torch use the cores this process may run on, at most 16, unless OMP_NUM_THREADS is set.

    Returns the number of threads.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        torch.set_num_threads(min(cores, 16))
    return torch.get_num_threads()
