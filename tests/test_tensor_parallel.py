"""Tensor parallelism (`tp_plan="auto"`): a pack equals its documents on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from packed_attn import patch_model
from packed_attn.audit import leaks_between_documents
from tests.exactness import alone, close, documents, gradients, packed, relative, token_mean
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_data_parallel import as_launched

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
