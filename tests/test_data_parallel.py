"""DDP and FSDP2 on two processes: losses and gradients of one process on the same packs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from packed_attn import PackedCollator, PackedIterableDataset, pack_dataset, patch_model
from packed_attn.trl import packed_sft_arguments
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_trainer import CAPACITY, documents

RANKS = 2


def batches() -> list[dict[str, Any]]:
    """One packed batch for each rank, of unlike numbers of targets."""
    packs = pack_dataset(documents(), CAPACITY, overflow="error")
    return [PackedCollator()([packs[i], packs[i + 1]]) for i in range(0, 2 * RANKS, 2)]


def targets() -> int:
    return sum(int((batch["labels"] != -100).sum()) for batch in batches())


def gradients_of_rank(family: str, wrapper: str, checkpointing: bool) -> dict[str, Any]:
    """Loss and gradients after one backward on this rank's batch."""
    model: Any = patch_model(tiny_model(family)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = _wrapped(model, wrapper)
    batch = batches()[dist.get_rank()]
    # Gradients are averaged over ranks.
    loss = run(**batch, num_items_in_batch=targets()).loss * RANKS
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[name] = full.detach()
    return {"loss": loss.detach() / RANKS, "gradients": gradients}


def _wrapped(model: Any, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize(
    ("family", "wrapper", "checkpointing"),
    [("llama", "ddp", False), ("llama", "fsdp2", True), ("gpt_oss", "fsdp2", False)],
)
def test_two_ranks_equal_one_process(family: str, wrapper: str, checkpointing: bool) -> None:
    model = patch_model(tiny_model(family)).train()
    total = torch.zeros(())
    for batch in batches():
        loss = model(**batch, num_items_in_batch=targets()).loss
        loss.backward()
        total += loss.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = in_processes(RANKS, gradients_of_rank, family, wrapper, checkpointing)
    assert sum(rank["loss"].item() for rank in found) == pytest.approx(total.item(), rel=1e-6)
    for rank in found:
        for name, parameter in model.named_parameters():
            got = rank["gradients"][name]
            torch.testing.assert_close(got, parameter.grad, msg=name, rtol=1e-4, atol=1e-6)


def batches_of_rank() -> list[tuple[int, ...]]:
    """Lengths of the documents of each batch that accelerate gives this rank from a stream."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import DataLoader

    loader = DataLoader(stream(), batch_size=1, collate_fn=PackedCollator(capacity=CAPACITY))
    config = DataLoaderConfiguration(**packed_sft_arguments()["accelerator_config"])
    prepared: Any = Accelerator(cpu=True, dataloader_config=config).prepare_data_loader(loader)
    return [batch["layout"].lengths for batch in prepared]


def stream() -> PackedIterableDataset:
    """One that leaves the division among ranks to accelerate."""
    return PackedIterableDataset(documents(), CAPACITY, rank=0, world_size=1)


@pytest.mark.slow
def test_every_rank_fetches_its_own_packs() -> None:
    """With dispatch_batches off, accelerate divides a stream's packs and loses none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = in_processes(RANKS, batches_of_rank)
    collate = PackedCollator(capacity=CAPACITY)
    assert {n for rank in found for n in rank} == {
        collate([row])["layout"].lengths for row in stream()
    }
    assert len(found[0]) == len(found[1])


def test_packs_are_never_stacked() -> None:
    """accelerate stacks the batches that it dispatches; those of packs stop it."""
    from accelerate.utils import concatenate

    batch = batches()[0]
    with pytest.raises(TypeError, match="Can only concatenate tensors"):
        concatenate([batch, batch])
