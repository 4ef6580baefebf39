"""One rank on its device: `python -m tests.fake_gpu.ranks WORK FAMILY FOLDER` in the environment of
torchrun. Writes what it found to FOLDER/RANK.pt."""

from __future__ import annotations

from tests.fake_gpu import plugin  # before torch

# isort: split
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer
from transformers.distributed.configuration_utils import DistributedConfig

from packed_attn import PackedCollator, PackedDataset, PackedLoss, patch_model
from packed_attn.callbacks import IsolationCallback, PackingCallback
from packed_attn.distributed import context_parallel
from tests.exactness import documents, gradients, on_device
from tests.models import tiny_model
from tests.test_distributed import batch as long_pack
from tests.test_shards import batch_of, targets, tiny_model_of
from tests.test_trainer import arguments

RANKS = 2
LENGTHS = (5, 9, 30, 12, 22, 7, 3, 40, 16, 8, 31, 2, 19, 20, 33)
# How each work spreads a model that a Trainer trains.
MESHES: dict[str, dict[str, int] | None] = {
    "trainer": None,
    "trainer, fsdp": {"fsdp_size": RANKS},
    "trainer, tp": {"tp_size": RANKS},
}


def device() -> str:
    return f"cuda:{plugin.native.current_device()}"


def whole(x: Any) -> Any:
    """On the CPU, of all ranks where each has a part."""
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().cpu()


def stepped(family: str, spread: Any) -> dict[str, Any]:
    """Loss of this rank's pack, and gradients that ranks have averaged."""
    model = spread(patch_model(tiny_model_of(family)).train().to(device()))
    count = torch.tensor(targets(RANKS), device=device())
    output = model(**on_device(batch_of(dist.get_rank()), device()), num_items_in_batch=count)
    (output.loss * RANKS).backward()
    grads = {n.removeprefix("module."): whole(g) for n, g in gradients(model).items()}
    return {"loss": whole(output.loss), "gradients": grads}


def ddp(family: str) -> dict[str, Any]:
    return stepped(family, nn.parallel.DistributedDataParallel)


def fsdp(family: str) -> dict[str, Any]:
    def spread(model: Any) -> Any:
        mesh = init_device_mesh("cuda", (RANKS,))
        for layers in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
            for layer in (m for m in layers if type(m).__name__.endswith(("Layer", "Block"))):
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return stepped(family, spread)


def context(family: str) -> dict[str, Any]:
    """One pack over the ranks; losses and gradients add up."""
    model = patch_model(tiny_model(family)).train().to(device())
    output = model(**context_parallel(on_device(long_pack(), device()), dist.group.WORLD))
    output.loss.backward()
    found = gradients(model)
    for grad in found.values():
        dist.all_reduce(grad)
    return {"loss": whole(output.loss), "gradients": {n: whole(g) for n, g in found.items()}}


def trained(work: str, family: str, folder: Path, *, packs: int) -> dict[str, Any]:
    """Losses, of an evaluation too, and weights after a run with both callbacks.

    Args:
        packs: of a step on this process.
    """
    saved = folder / "model"
    if not saved.exists() and (not dist.is_initialized() or dist.get_rank() == 0):
        tiny_model(family, vocab_size=200).save_pretrained(saved)
    if dist.is_initialized():
        dist.barrier()
    mesh = MESHES[work]
    options = {} if mesh is None else {"distributed_config": DistributedConfig(**mesh)}
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **options)
    model = patch_model(loaded)
    rows = PackedDataset([{"input_ids": d} for d in documents(lengths=LENGTHS)], 64, multiple=2)
    loss = PackedLoss(model, weighting="document")
    settings = arguments(
        folder,
        use_cpu=False,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=packs,
        max_steps=3,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
    )
    settings._n_gpu = 1
    run = Trainer(
        model,
        settings,
        train_dataset=rows,  # type: ignore[arg-type]
        eval_dataset=rows,  # type: ignore[arg-type]
        data_collator=PackedCollator(loss_weighting="document"),
        compute_loss_func=loss,
        compute_metrics=loss.compute_metrics,
        preprocess_logits_for_metrics=loss.preprocess_logits_for_metrics,
    )
    run.add_callback(IsolationCallback(run, every=2))
    run.add_callback(PackingCallback(run))
    run.train()
    logged = run.state.log_history
    assert any("packing/tokens_per_second" in entry for entry in logged)
    leaks = [e["isolation/largest_gradient"] for e in logged if "isolation/largest_gradient" in e]
    assert leaks
    assert not any(leaks)
    assert next(model.parameters()).is_cuda
    losses = [entry["loss"] for entry in logged if "loss" in entry]
    losses.append(run.evaluate()["eval_loss_per_document"])
    weights = {name: whole(p) for name, p in model.named_parameters()}
    return {"losses": torch.tensor(losses), "weights": weights}


def main(work: str, family: str, folder: Path) -> None:
    torch.set_num_threads(1)
    plugin.native.exchange_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    if work in MESHES:
        found = trained(work, family, folder, packs=2 if work == "trainer, tp" else 1)
    else:
        found = {"ddp": ddp, "fsdp": fsdp, "context": context}[work](family)
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
