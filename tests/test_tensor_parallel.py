"""Models that transformers itself spreads over processes: packs equal their documents on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

from packed_attn import PackedCollator, PackedDataset, patch_model
from packed_attn.audit import leaks_between_documents
from tests.exactness import alone, close, documents, gradients, packed, relative, token_mean
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_data_parallel import as_launched
from tests.test_shards import LENGTHS, batch_of, targets
from tests.test_trainer import arguments

RANKS = 2


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def share(folder: str) -> dict[str, Any]:
    """What this rank computes, each projection holding some of its heads."""
    as_launched()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    heads: Any = model.model.layers[0].self_attn.q_proj.weight
    patch_model(model)
    output = model(**packed(documents()))
    output.loss.backward()
    return {
        "logits": whole(output.logits).detach(),
        "gradients": {n: whole(g) for n, g in gradients(model).items()},
        "local": tuple(heads.to_local().shape),
        "leak": leaks_between_documents(model),
    }


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_sharded_heads(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, vocab_size=200)  # transformers 5.17 divides the head evenly
    model.save_pretrained(tmp_path)
    docs = documents()
    want = alone(model, docs)
    token_mean(model, docs).backward()
    shares = in_processes(RANKS, share, str(tmp_path))
    for part in shares:
        assert part["local"] == (64 // RANKS, 64)
        assert part["leak"] is None
        assert close(part["logits"][0], want)
        assert relative(part["gradients"], gradients(model)) <= 1e-5


def load(folder: str, sizes: dict[str, Any] | None) -> Any:
    """A patched model over a mesh of such sizes, or on this process alone."""
    from transformers.distributed.configuration_utils import DistributedConfig

    options: dict[str, Any] = {"dtype": torch.float32}
    if sizes is not None:
        as_launched()
        options["distributed_config"] = DistributedConfig(**sizes)
    return patch_model(AutoModelForCausalLM.from_pretrained(folder, **options))


def need_meshes() -> None:
    config: Any = pytest.importorskip("transformers.distributed").DistributedConfig
    if not hasattr(config, "dp_size"):
        pytest.skip("transformers loads by such a mesh from 5.23 on")


def share_of_mesh(folder: str, sizes: dict[str, int], batches: int) -> dict[str, Any]:
    """What this rank computes of its batch, in evaluation where it holds some of the layers."""
    model = load(folder, sizes)
    rank = dist.get_rank() // sizes.get("tp_size", 1) % batches
    if "pp_size" in sizes:
        with torch.no_grad():
            logits = model(**{**batch_of(rank), "labels": None}).logits
        return {"rank": rank, "logits": logits, "gradients": None}
    output = model(**batch_of(rank), num_items_in_batch=targets(batches))
    (output.loss * batches).backward()
    return {
        "rank": rank,
        "logits": whole(output.logits).detach(),
        "gradients": {n: whole(g) for n, g in gradients(model).items()},
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"tp_size": 2, "fsdp_size": 2}),
        ("llama", {"fsdp_size": 2, "dp_replicate_size": 2}),
        ("qwen3_next", {"fsdp_size": 2, "dp_replicate_size": 2}),
        ("qwen3_moe", {"fsdp_size": 2, "ep_size": 2}),
        ("qwen3_next", {"fsdp_size": 2, "ep_size": 2}),
        ("gemma2", {"pp_size": 2}),
    ],
    ids=str,
)
def test_meshes(family: str, sizes: dict[str, int], tmp_path: Path) -> None:
    need_meshes()
    batches = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    ranks = batches * sizes.get("tp_size", 1) * sizes.get("pp_size", 1)
    layers: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
    model = tiny_model(family, vocab_size=200, **(layers if family == "qwen3_next" else {}))
    model.save_pretrained(tmp_path)
    want = [alone(model, documents(seed=r + 1, lengths=LENGTHS[r])) for r in range(batches)]
    patch_model(model.train())
    for rank in range(batches):
        model(**batch_of(rank), num_items_in_batch=targets(batches)).loss.backward()
    for part in in_processes(ranks, share_of_mesh, str(tmp_path), sizes, batches):
        assert close(part["logits"][0], want[part["rank"]])
        if part["gradients"] is not None:
            assert relative(part["gradients"], gradients(model)) <= 1e-5


def trained(folder: str, sizes: dict[str, Any] | None, steps: int) -> dict[str, Tensor]:
    """Losses and weights of a Trainer's run, on two processes or on one with their batches."""
    model = load(folder, sizes)
    lengths = (5, 9, 30, 12, 22, 7, 3, 40, 16, 8, 31, 2, 19, 20, 33)
    settings = arguments(
        Path(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1 if sizes else RANKS,
        max_steps=steps,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
    )
    packs = PackedDataset([{"input_ids": d} for d in documents(lengths=lengths)], 64, multiple=2)
    run = Trainer(model, settings, train_dataset=packs, data_collator=PackedCollator())
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    weights = {name: whole(p).detach() for name, p in model.named_parameters()}
    return {"losses": torch.tensor(losses), **weights}


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_trainer_on_a_mesh(family: str, tmp_path: Path) -> None:
    """Whose batches are moved to the device, so that layouts know their copies."""
    need_meshes()
    tiny_model(family, vocab_size=200).save_pretrained(tmp_path)
    found = in_processes(RANKS, trained, str(tmp_path), {"fsdp_size": RANKS}, 2)
    want = trained(str(tmp_path), None, 2)
    for name, value in want.items():
        for of_rank in found:
            torch.testing.assert_close(of_rank[name], value, rtol=1e-5, atol=1e-6, msg=name)
