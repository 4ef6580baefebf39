"""A patched model compiled whole: no graph breaks, and one more graph for any boundaries."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from packed_attn import PackedCollator, patch_model
from tests.exactness import gradients
from tests.models import tiny_model


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
