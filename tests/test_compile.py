"""A patched model compiled: as exact as it is uncompiled, and other boundaries compile nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_attn_patches import tiny
from torch._dynamo.testing import CompileCounterWithBackend

from packed_attn import PackedCollator, patch_model
from tests.exactness import close, documents, gradients, packed, relative, token_mean
from tests.models import tiny_model

# Plain attention, its norms, softcap and windows, sinks, experts, and a model that is unpacked.
COMPILED = ("llama", "qwen3", "gemma2", "gpt_oss", "qwen3_moe", "mamba")


@pytest.mark.slow  # `test_compiled_after_patching` is the fast member
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_families_are_exact(family: str) -> None:
    """Logits, loss and gradients of a compiled pack are those of the documents alone."""
    torch._dynamo.reset()
    implementation = "eager" if family == "gemma2" else None
    model: Any = tiny.tiny_model(family, attn_implementation=implementation).train()
    docs = documents(lengths=(5, 1, 20))
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


@pytest.mark.slow
def test_other_boundaries_compile_nothing_new() -> None:
    """The model's forward is compiled and the hook that reads the batch stays outside of it."""
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
