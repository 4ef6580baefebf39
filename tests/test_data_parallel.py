"""DDP, FSDP2 and DeepSpeed ZeRO-3 on two processes: losses and gradients of one process on the same
packs."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    backward = run.backward if wrapper.startswith("zero") else torch.Tensor.backward
    backward(loss)
    gradients = {name: _whole_gradient(p, wrapper) for name, p in model.named_parameters()}
    return {"loss": loss.detach() / RANKS, "gradients": gradients}


def as_launched() -> None:
    """What accelerate and DeepSpeed read of a process that torchrun has started."""
    rank = str(dist.get_rank())
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # the processes have met already
    os.environ |= {**address, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}


def _whole_gradient(parameter: Any, wrapper: str) -> Tensor:
    if wrapper.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad  # pyright: ignore[reportMissingImports]

        return safe_get_full_grad(parameter)
    gradient = parameter.grad
    return (gradient.full_tensor() if wrapper == "fsdp2" else gradient).detach()


def _wrapped(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper.startswith("zero"):
        as_launched()
        import deepspeed  # pyright: ignore[reportMissingImports]

        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(wrapper[-1])},
        }
        optimizer = torch.optim.SGD(model.parameters())
        settings["zero_allow_untested_optimizer"] = True
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    return sharded(model)


def sharded(model: Any, **policy: Any) -> Any:
    """By FSDP2, each layer and what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    layers = [layer for layers in lists for layer in layers]
    parts = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    for layer in (layer for layer in layers if id(layer) not in parts):
        fully_shard(layer, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    return model


@pytest.mark.parametrize(
    ("family", "wrapper", "checkpointing"),
    [
        ("llama", "ddp", False),
        pytest.param("mamba", "ddp", False, marks=pytest.mark.slow),
        ("llama", "fsdp2", True),
        ("gpt_oss", "fsdp2", False),
        # Batched by length: more batches on one rank than on the other.
        ("mamba", "fsdp2", True),
        pytest.param("mamba", "fsdp2", False, marks=pytest.mark.slow),
        pytest.param("bloom", "fsdp2", True, marks=pytest.mark.slow),
        pytest.param("llama", "zero3", True, marks=pytest.mark.slow),
        pytest.param("gpt_oss", "zero3", False, marks=pytest.mark.slow),
        pytest.param("mamba", "zero2", False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_process(
    family: str, wrapper: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(wrapper, monkeypatch)
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


def need(wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where it is not installed."""
    if wrapper.startswith("zero"):
        if find_spec("deepspeed") is None:
            pytest.skip("deepspeed is not installed")
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def batches_of_rank(dispatch: bool | None, **ranks: int) -> list[tuple[int, ...]]:
    """Lengths of the documents of each batch that accelerate gives this rank from a stream."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration
    from torch.utils.data import DataLoader

    # A Trainer of an earlier test has left its state of one process.
    AcceleratorState._reset_state(reset_partial_state=True)
    as_launched()
    stream = PackedIterableDataset(documents(), CAPACITY, **ranks)
    loader = DataLoader(stream, batch_size=1, collate_fn=PackedCollator(capacity=CAPACITY))
    config = DataLoaderConfiguration(dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    assert accelerator.num_processes == RANKS
    prepared: Any = accelerator.prepare_data_loader(loader)
    return [batch["layout"].lengths for batch in prepared]


@pytest.mark.slow
def test_every_rank_fetches_its_own_packs() -> None:
    """With dispatch_batches off, accelerate divides a stream's packs and loses none."""
    dispatch = packed_sft_arguments()["accelerator_config"]["dispatch_batches"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = in_processes(RANKS, rows_of_all, dispatch)
    collate = PackedCollator(capacity=CAPACITY)
    every = [
        collate([row])["layout"].lengths for row in PackedIterableDataset(documents(), CAPACITY)
    ]
    assert found == [every[::2], every[1::2]]


def rows_of_all(dispatch: bool) -> list[tuple[int, ...]]:
    """The division is left to accelerate."""
    return batches_of_rank(dispatch, rank=0, world_size=1)


def refusals() -> None:
    """In every rank, before the first batch: none waits for another."""
    with pytest.raises(ValueError, match=r"let every process fetch its own, .*dispatch_batches"):
        batches_of_rank(None, rank=0, world_size=1)
    with pytest.raises(ValueError, match=r"divided among ranks once, .* use rank=0, world_size=1"):
        batches_of_rank(False, rank=dist.get_rank(), world_size=RANKS)


def test_packs_are_neither_stacked_nor_divided_twice() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        in_processes(RANKS, refusals)
