"""What `make fake-gpu` runs: models on a device that is not the current one, over two, on ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from packed_attn_patches.families import HIDES_PADDING_IDS
from torch import nn
from torch.nn import functional as F

from packed_attn import (
    DocumentLayout,
    PackedCollator,
    PackedDataset,
    PackedLoss,
    backends,
    patch_model,
)
from packed_attn.callbacks import PackingCallback
from tests.exactness import close, documents, gradients, on_device, packed, relative
from tests.fake_gpu import dense
from tests.fake_gpu.graphs import BOUNDARIES, NotCaptured, errors_of_replays
from tests.fake_gpu.ranks import RANKS, trained
from tests.fake_gpu.waits import OURS, observed, own_waits, waits
from tests.models import tiny_model
from tests.sweep import HEADS, model_types, sweep_type
from tests.test_distributed import batch as long_pack
from tests.test_shards import batch_of, targets, tiny_model_of

OTHER = "cuda:1"
BATCHED = ("bloom", "mamba", "qwen3_next")


@pytest.fixture
def reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that reads nothing on the host, in place of the kernels."""
    monkeypatch.setitem(backends._LOADED, "triton", dense)


def test_devices_may_not_meet() -> None:
    """Of the device itself: what it is for."""
    a, b, host = torch.ones(3, device="cuda"), torch.ones(3, device=OTHER), torch.ones(3)
    assert a.device == torch.device("cuda:0")
    assert torch.cuda.current_device() == 0
    for x, y in ((a, b), (a, host), (host, b)):
        with pytest.raises(RuntimeError, match=r"on the same device|are on cuda"):
            torch.mul(x, y)
    with pytest.raises(RuntimeError, match=r"on the same device|are on cuda"):
        nn.functional.embedding(torch.zeros(2, dtype=torch.long), a[:, None])
    assert torch.empty(9, device=OTHER).isnan().all()
    assert torch.equal((a.to(OTHER) + b).cpu(), host + 1)


@pytest.mark.parametrize(
    ("head", "model_type"), [(head, kind) for head in HEADS for kind in model_types(head)]
)
def test_every_type(head: str, model_type: str) -> None:
    outcome = sweep_type(head, model_type, device=OTHER)
    if outcome.status == "not built":
        pytest.skip(outcome.reason[:200])
    assert outcome.status in ("exact", "refused"), outcome


def test_waits_are_seen() -> None:
    """Of the device itself, as CUDA has them."""
    x, i = torch.arange(6.0, device="cuda"), torch.tensor([1, 2], device="cuda")
    host, mask = torch.ones(6), x > 2
    assert waits(x.sum().item)
    assert waits(x.cpu)
    assert waits(lambda: host.to("cuda"))
    assert waits(lambda: torch.tensor([1], device="cuda"))
    assert waits(mask.nonzero)
    assert waits(lambda: x[mask])
    assert waits(lambda: x[i.cpu()])
    assert waits(lambda: x.index_put_((i,), torch.tensor(0.0)))
    assert waits(lambda: i.repeat_interleave(i))
    assert not waits(lambda: host.to("cuda", non_blocking=True))
    assert not waits(lambda: x[i])
    assert not waits(lambda: x.masked_fill_(mask, 0))
    assert not waits(lambda: x.__setitem__(mask, 0.0))
    assert not waits(lambda: x.index_fill_(0, i, 0))
    assert not waits(lambda: i.repeat_interleave(i, output_size=3))
    assert not waits(lambda: torch.where(mask, x, 0.0).sum())


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize(
    ("head", "model_type"), [(head, kind) for head in HEADS for kind in model_types(head)]
)
def test_a_step_waits_for_nothing(
    head: str, model_type: str, padding: int, reads_nothing: None
) -> None:
    """Not by code of this package: what a model does by itself is its own. Of ids, what is hidden
    for being the padding id has to be read."""
    try:
        found = own_waits(head, model_type, OTHER, padding)
    except NotImplementedError as error:
        pytest.skip(str(error)[:200])
    except Exception as error:  # what stock does not run is the sweep's to tell
        pytest.skip(f"{type(error).__name__}: {str(error)[:200]}")
    assert not found or model_type in HIDES_PADDING_IDS


@pytest.mark.parametrize(
    ("head", "model_type"),
    [
        (h, kind)
        for h, head in HEADS.items()
        if not head.per_document and not head.pairs
        for kind in model_types(h)
    ],
)
def test_a_captured_step_takes_other_boundaries(
    head: str, model_type: str, reads_nothing: None
) -> None:
    """Nothing of the batch that a step was captured on is in its graph."""
    try:
        found = errors_of_replays(head, model_type, "cuda:0")
    except (NotCaptured, NotImplementedError) as error:
        pytest.skip(str(error)[:200])
    assert max(outputs for outputs, _ in found) <= 1e-5
    assert max(gradients for _, gradients in found) <= 1e-4


def test_a_graph_that_keeps_boundaries_is_found(
    reads_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is captured on is copied to the device beforehand, and never again."""
    made = DocumentLayout.from_lengths(BOUNDARIES[0]).to("cuda:0")
    monkeypatch.setattr(DocumentLayout, "traced", lambda self: made)
    found = errors_of_replays("causal", "llama", "cuda:0")
    assert found[0][0] <= 1e-5
    assert min(outputs for outputs, _ in found[1:]) > 1e-2


@pytest.mark.parametrize(
    ("names", "copies"),
    [
        (["layout", "position_ids"], 0),
        (["position_ids"], 1),
        (["seq_idx"], 1),
        (["cu_seq_lens_q"], 1),
        (["position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"], 4),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_boundaries_are_read_at_once(
    family: str, names: list[str], copies: int, reads_nothing: None
) -> None:
    """A tensor that tells them is copied, and nothing else is waited for."""
    model = patch_model(tiny_model(family)).train().to(OTHER)
    batch = on_device(packed(documents()), OTHER)
    seen: list[str] = []
    with observed(seen.append):
        model(**{name: batch[name] for name in ("input_ids", "labels", *names)}).loss.backward()
    assert sum(place.startswith(OURS) for place in seen) == copies, seen


@pytest.mark.parametrize("family", ["llama", "bloom", "mamba"])
def test_shared_prefixes_wait_for_nothing(family: str, reads_nothing: None) -> None:
    """Forward, the loss outside the model, and what is counted for the log."""
    model = patch_model(tiny_model(family)).to(OTHER).train()
    loss, counted = PackedLoss(model), PackingCallback(SimpleNamespace())  # type: ignore[arg-type]
    for seed in (0, 1):
        prompt, *answers = documents(seed, (20, 7, 12, 3))
        rows = [{"input_ids": torch.cat([prompt, answer]).tolist()} for answer in answers]
        packs = PackedDataset(rows, capacity=64, share_prefixes=True)
        batch = on_device(PackedCollator(capacity=64)([packs[0]]), OTHER)
        assert batch["layout"].is_forest
        seen: list[str] = []
        with observed(seen.append):
            counted._count(batch)
            labels = batch.pop("labels")
            loss(model(**batch), labels).backward()
    assert not [place for place in seen if place.startswith(OURS)]


@pytest.mark.parametrize(("shared", "copies"), [(False, 2), (True, 3)])
def test_padded_rows_are_read_at_once(shared: bool, copies: int, reads_nothing: None) -> None:
    """The mask, by the model's hook and its backbone's; ids where their beginnings are shared."""
    model = patch_model(tiny_model("llama"), padding_free=True, share_prefixes=shared).to(OTHER)
    ids = torch.stack([F.pad(d, (0, 40 - len(d))) for d in documents(lengths=(40, 23, 31))])
    given = on_device({"input_ids": ids, "attention_mask": (ids != 0).long()}, OTHER)
    seen: list[str] = []
    with observed(seen.append):
        model.train()(**given).logits.sum().backward()
    assert sum(place.startswith(OURS) for place in seen) == copies, seen


@pytest.mark.parametrize("first", ["patch", "device_map"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2", "mixtral", *BATCHED])
def test_over_two_devices(family: str, first: str) -> None:
    """The first layers on one and the last on another; the batch may still be on the CPU."""
    alone, batch = patch_model(tiny_model(family)).train(), packed(documents())
    want = alone(**batch)
    want.loss.backward()
    model = tiny_model(family).train()
    if first == "patch":
        patch_model(model)
    model = accelerate.dispatch_model(model, _halves(model), main_device=0, force_hooks=True)
    patch_model(model)
    for given in (batch, on_device(batch, "cuda:0"), on_device(batch, OTHER)):
        model.zero_grad()
        output = model(**given)
        output.loss.backward()
        assert close(output.logits.detach().cpu(), want.logits.detach())
        assert relative({n: g.cpu() for n, g in gradients(model).items()}, gradients(alone)) <= 1e-5


def _halves(model: nn.Module, path: str = "") -> dict[str, int]:
    """A device_map."""
    found: dict[str, int] = {}
    for name, part in model.named_children():
        here = f"{path}{name}"
        if isinstance(part, nn.ModuleList):
            found |= {f"{here}.{i}": int(i >= len(part) // 2) for i in range(len(part))}
        elif any(isinstance(m, nn.ModuleList) for m in part.modules()):
            found |= _halves(part, f"{here}.")
        else:
            found[here] = int("norm" in name or name == "ln_f")
    return found


def on_ranks(work: str, family: str, folder: Path) -> list[Any]:
    """What each rank found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(RANKS),
    }
    command = [sys.executable, "-m", "tests.fake_gpu.ranks", work, family, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{rank}.txt").open("w"),
        )
        for rank in range(RANKS)
    ]
    for rank, process in enumerate(started):
        assert process.wait(timeout=900) == 0, (folder / f"{rank}.txt").read_text()[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("family", ["llama", "gpt_oss", *BATCHED])
@pytest.mark.parametrize("work", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(work: str, family: str, tmp_path: Path) -> None:
    """Of unlike numbers of documents, and of batches where they are batched by length."""
    model, total = patch_model(tiny_model_of(family)).train(), 0.0
    for rank in range(RANKS):
        loss = model(**batch_of(rank), num_items_in_batch=targets(RANKS)).loss
        loss.backward()
        total += loss.item()
    found = on_ranks(work, family, tmp_path)
    assert sum(rank["loss"].item() for rank in found) == pytest.approx(total, rel=1e-6)
    for rank in found:
        assert relative(rank["gradients"], gradients(model)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_a_pack_over_two_ranks(family: str, tmp_path: Path) -> None:
    model = patch_model(tiny_model(family)).train()
    loss = model(**long_pack()).loss
    loss.backward()
    found = on_ranks("context", family, tmp_path)
    assert sum(rank["loss"].item() for rank in found) == pytest.approx(loss.item(), rel=1e-6)
    assert relative(found[0]["gradients"], gradients(model)) <= 1e-5


@pytest.mark.parametrize(
    ("work", "family"),
    [
        ("trainer", "llama"),
        ("trainer", "mamba"),
        ("trainer, fsdp", "llama"),
        ("trainer, fsdp", "mamba"),
        ("trainer, tp", "llama"),
        ("trainer, tp", "qwen3_moe"),
    ],
)
def test_a_trainer_on_two_ranks_equals_one(work: str, family: str, tmp_path: Path) -> None:
    """Both callbacks, the loss by document and its evaluation included."""
    want = trained("trainer", family, tmp_path, packs=RANKS)
    for rank in on_ranks(work, family, tmp_path):
        torch.testing.assert_close(rank["losses"], want["losses"], rtol=1e-5, atol=0)
        assert relative(rank["weights"], want["weights"]) <= 1e-5
