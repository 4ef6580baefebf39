"""A few steps of Trainer on packs, as `accelerate launch tests/launched.py FOLDER` runs them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from packed_attn import PackedCollator, pack_dataset, patch_model
from packed_attn.callbacks import IsolationCallback
from tests.models import tiny_model
from tests.test_trainer import CAPACITY, arguments, documents

STEPS = 3
PACKS = 2  # of each step, over all processes


def trained(folder: Path, processes: int) -> dict[str, Any]:
    """What is logged; the wrapped model's class."""
    # Before the arguments, after which transformers builds shards of other random numbers.
    model = patch_model(tiny_model("llama"))
    settings = {"learning_rate": 1e-2, "max_grad_norm": 0.1, "max_steps": STEPS}
    trainer = Trainer(
        model,
        arguments(folder, per_device_train_batch_size=PACKS // processes, **settings),
        train_dataset=pack_dataset(documents(), CAPACITY, overflow="error"),
        data_collator=PackedCollator(),
    )
    trainer.add_callback(IsolationCallback(trainer, every=2))
    trainer.train()
    logged = trainer.state.log_history
    names = ("loss", "grad_norm", "isolation/largest_gradient")
    found = {name: [float(e[name]) for e in logged if name in e] for name in names}
    return {**found, "model": type(trainer.model_wrapped).__name__}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = trained(folder, int(os.environ["WORLD_SIZE"]))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
