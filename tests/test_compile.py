"""A patched model compiled whole: no graph breaks, two recompilations for any boundaries."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import Trainer

from packed_attn import PackedCollator, pack_dataset, patch_model
from tests import exactness
from tests.exactness import close, gradients, packed, relative, token_mean
from tests.models import tiny_model
from tests.test_trainer import arguments, documents

CAPACITY = 64
# Full and not, one document, only documents of one token, and a batch of padding but for a token.
BOUNDARIES: list[tuple[int, ...]] = [
    (24, 40), (5, 9, 50), (3, 60), (64,), (1,) * 64, (63,), (1,), (30, 1, 1, 20)
]  # fmt: skip
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch_of(lengths: tuple[int, ...], generator: torch.Generator) -> dict[str, Any]:
    ids = torch.randint(3, 150, (sum(lengths),), generator=generator).tolist()
    return PackedCollator(capacity=CAPACITY)([{"input_ids": ids, "seq_lengths": lengths}])


def results(forward: Any, model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = forward(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "eager"),
        pytest.param("llama", "aot_eager", marks=slow),
        pytest.param("gemma2", "eager", marks=slow),
        pytest.param("gemma3_text", "eager", marks=slow),
        pytest.param("qwen3", "eager", marks=slow),
        pytest.param("mistral", "eager", marks=slow),
    ],
)
def test_boundaries_compile_nothing_new(family: str, backend: str) -> None:
    """The hook that reads the batch is compiled with the model; results are eager's to the bit."""
    layers = {} if family.startswith("gemma") else {"num_hidden_layers": 1}
    model = patch_model(tiny_model(family, **layers).train())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    compilations = []
    for lengths in BOUNDARIES:
        batch = batch_of(lengths, generator)
        got, want = results(compiled, model, batch), results(model, model, batch)
        compilations.append(counter.frame_count)
        for name, value in want.items():
            assert torch.equal(got[name], value) or value.isnan().any(), name
    assert_few(compilations)


def assert_few(compilations: list[int]) -> None:
    """Hook and model are a graph each: for the first shapes, for any, and for one thing more (with
    padding or without for the hook, a single document for the model)."""
    assert compilations[-1] <= 3 * compilations[0]
    assert not counters["graph_break"]


@slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "mistral", "phi3"])
def test_inductor_is_exact(family: str) -> None:
    """Code made by torch's own compiler: loss and gradients of the documents one by one, for any
    boundaries."""
    model = tiny_model(family, num_hidden_layers=2 if family == "gemma2" else 1).train()
    stock = copy.deepcopy(model)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(patch_model(model), backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    compilations = []
    for lengths in BOUNDARIES:
        batch = batch_of(lengths, generator)
        got = results(compiled, model, batch)
        compilations.append(counter.frame_count)
        if max(lengths) == 1:
            continue  # nothing to learn
        stock.zero_grad()
        loss = token_mean(stock, list(batch["input_ids"][0, : sum(lengths)].split(lengths)))
        loss.backward()
        assert got.pop("loss").item() == pytest.approx(loss.item(), rel=1e-6)
        assert relative(got, gradients(stock)) <= 1e-5
    assert_few(compilations)


@slow
def test_a_thousand_batches() -> None:
    model = patch_model(tiny_model("llama").train())
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    compilations = []
    for step in range(1000):
        lengths: list[int] = []
        longest = int(torch.randint(1, CAPACITY + 1, (), generator=generator))
        while sum(lengths) < CAPACITY - step % 3:
            drawn = int(torch.randint(1, longest + 1, (), generator=generator))
            lengths.append(min(drawn, CAPACITY - sum(lengths)))
        compiled(**batch_of(tuple(lengths), generator))
        compilations.append(counter.frame_count)
    assert_few(compilations)


@slow
def test_the_trainer_compiles(tmp_path: Path) -> None:
    """torch_compile=True: the losses of the same run without it, to the bit."""
    packs = pack_dataset(documents(), CAPACITY, overflow="error")
    losses = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = Trainer(
            patch_model(tiny_model("llama")),
            arguments(tmp_path, max_steps=4, per_device_train_batch_size=1, **settings),
            train_dataset=packs,
            data_collator=PackedCollator(capacity=CAPACITY),
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert not counters["graph_break"]


def test_contradictions_are_found_in_compiled_code() -> None:
    """Nothing is read to the host, but what does not agree raises."""
    model = patch_model(tiny_model("llama", num_hidden_layers=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    batch = batch_of((24, 40), torch.Generator())
    other = batch_of((40, 24), torch.Generator())
    with pytest.raises(RuntimeError, match="position_ids contradict layout"):
        compiled(**{**batch, "position_ids": other["position_ids"]})
    rows = {name: batch[name].view(2, 32) for name in ("input_ids", "labels", "position_ids")}
    with pytest.raises(RuntimeError, match="crosses from one row to the next"):
        compiled(**rows, layout=batch["layout"])
    hiding = torch.ones(1, CAPACITY, dtype=torch.long)
    hiding[0, 5] = 0
    with pytest.raises(RuntimeError, match="hides tokens that are no padding"):
        compiled(**batch, attention_mask=hiding)


@pytest.mark.slow
def test_other_boundaries_compile_nothing_new() -> None:
    """The model's forward alone is compiled, on layouts that are prepared."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = patch_model(tiny_model("llama").train(), backend="cpu")
    stock = model.forward
    compiled = torch.compile(stock, backend=counter, fullgraph=True)
    for lengths in [(24, 40), (5, 9, 50), (64,), (1,) * 64, (3, 61)]:
        generator = torch.Generator().manual_seed(len(lengths))
        ids = [torch.randint(3, 150, (n,), generator=generator) for n in lengths]
        batch = PackedCollator("documents")([{"input_ids": x} for x in ids])
        batch = {name: batch[name] for name in ("input_ids", "labels", "layout")}
        batch["layout"].prepare()
        results = []
        for forward in (compiled, stock):
            model.forward = forward
            model.zero_grad()
            model(**batch).loss.backward()
            results.append(gradients(model))
        for name, gradient in results[1].items():
            assert torch.equal(results[0][name], gradient), name
    assert counter.frame_count == 2


# Plain attention, its norms, softcap and windows, sinks, experts, and a model that is unpacked.
COMPILED = ("llama", "qwen3", "gemma2", "gpt_oss", "qwen3_moe", "mamba")


@slow  # `test_compiled_after_patching` is the fast member
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_families_are_exact(family: str) -> None:
    """Logits, loss and gradients of a compiled pack are those of the documents alone."""
    torch._dynamo.reset()
    implementation = "eager" if family == "gemma2" else None
    model: Any = tiny.tiny_model(family, attn_implementation=implementation).train()
    docs = exactness.documents(lengths=(5, 1, 20))
    want = torch.cat([model(input_ids=d[None]).logits[0] for d in docs]).detach()
    loss = token_mean(model, docs)
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    patch_model(model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    output = compiled(**packed(docs))
    output.loss.backward()
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert close(output.logits[0].detach(), want)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(gradients(model), wanted) <= 1e-4
