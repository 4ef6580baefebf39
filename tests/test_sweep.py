"""Every model type: exact under every convention or refused by name (see `sweep.py`)."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import pytest
import torch
import transformers
from packed_attn_patches import interface
from packed_attn_patches.children import GIGABYTE, ChildFailed, in_children
from packed_attn_patches.tiny import tiny_config, tiny_model
from torch import nn

from benchmarks.sweep_models import quiet_sweep
from tests.sweep import HEADS, Outcome, _Stock, model_types, sweep_type
from tests.sweep_precision import FLOAT32, Alone, Expected, Precision

# What is special about each is in another place: positions, masks, state, shapes, losses, heads.
REPRESENTATIVES = (
    ("causal", "roberta"),
    ("causal", "xlnet"),
    ("causal", "bart"),
    ("causal", "gpt2"),
    ("causal", "llama4_text"),
    ("causal", "deepseek_v3"),
    ("causal", "qwen3_next"),
    ("causal", "recurrent_gemma"),
    ("causal", "mamba2"),
    ("causal", "lfm2"),
    ("causal", "prophetnet"),
    ("masked", "bert"),
    ("masked", "distilbert"),
    ("masked", "luke"),
    ("token", "modernbert"),
    ("token", "llama"),
    ("token", "biogpt"),
    ("vision", "qwen2_5_vl"),
    ("sequence", "llama"),
    ("sequence", "electra"),
    ("sequence", "bart"),
)


@pytest.mark.parametrize(("head", "model_type"), REPRESENTATIVES)
def test_exact_under_every_convention(head: str, model_type: str) -> None:
    outcome = sweep_type(head, model_type)
    assert outcome.status == "exact", outcome


HALF = Precision(torch.bfloat16)
AUTOCAST = Precision(autocast=torch.bfloat16)


@pytest.mark.parametrize(
    ("head", "model_type", "precision"),
    [
        ("causal", "llama", HALF),
        ("causal", "llama", Precision(torch.float16)),
        ("causal", "llama", AUTOCAST),
        ("causal", "llama", Precision(torch.bfloat16, lora=True)),
        ("causal", "mamba", Precision(torch.bfloat16, torch.bfloat16, lora=True)),
        ("causal", "mixtral", HALF),
        ("causal", "lfm2", AUTOCAST),
        ("causal", "mamba2", HALF),
        ("sequence", "bert", HALF),
        ("seq2seq", "t5", HALF),
    ],
)
def test_no_less_accurate_in_half_precision(
    head: str, model_type: str, precision: Precision
) -> None:
    outcome = sweep_type(head, model_type, precision=precision)
    assert outcome.status == "exact", outcome


def test_a_pack_less_accurate_than_its_documents_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs).to(torch.float8_e5m2).to(torch.bfloat16)

    attention = interface.attention
    monkeypatch.setattr(interface, "attention", coarse)
    outcome = sweep_type("causal", "llama", precision=HALF)
    assert outcome.status == "wrong"
    assert "differs" in outcome.checks["default cache"]
    assert outcome.checks["isolation"] == "exact"


def test_documents_alone_that_are_not_finite_are_no_measure() -> None:
    """Nor are those whose gradients are not: an infinite error would allow any."""
    exact = Alone(torch.ones(3, 2), torch.ones(()), {"weight": torch.ones(2)})
    Expected(HALF, exact, exact)
    for change in ({"rows": exact.rows / 0}, {"gradients": {"weight": torch.ones(2) / 0}}):
        with pytest.raises(RuntimeError, match="not finite"):
            Expected(HALF, dataclasses.replace(exact, **change), exact)


@pytest.mark.parametrize("head", ["causal", "sequence"])
def test_a_model_in_which_no_leak_could_be_seen_is_no_proof(head: str) -> None:
    model: Any = tiny_model("gpt2", auto_class=getattr(transformers, HEADS[head].auto_class))
    for block in model.base_model.h:
        nn.init.zeros_(block.attn.c_proj.weight)
    with pytest.raises(RuntimeError, match="no output depends on another token"):
        _Stock(model, HEADS[head])


@pytest.mark.slow
@pytest.mark.parametrize("precision", [FLOAT32, HALF, AUTOCAST], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_every_type_is_exact_or_refused(head: str, precision: Precision) -> None:
    """None that stock transformers builds and trains is wrong, and few are refused."""
    types = model_types(head)
    found = list(in_children(quiet_sweep, [(head, t, precision) for t in types], seconds=600))
    # A type whose stock model takes all memory or time has no outcome.
    built = [o for o in found if isinstance(o, Outcome) and o.status != "not built"]
    assert not [o for o in built if o.status == "wrong"]
    exact = [o for o in built if o.status == "exact"]
    assert len(exact) >= 0.95 * len(built)


def test_a_tiny_config_is_the_same_whatever_was_built_before() -> None:
    """Config classes write into the dictionaries that they are given."""
    first = tiny_config("glm_ocr").to_dict()
    tiny_config("glm4v_moe")
    assert tiny_config("glm_ocr").to_dict() == first


def test_no_branch_of_a_tiny_model_begins_at_zero() -> None:
    """AFMoE's routers do, and so would choose no expert by a token."""
    assert all(p.any() for p in tiny_model("afmoe").parameters() if p.ndim > 1)


@pytest.mark.slow  # starting the server costs more than the rest of this file
def test_children_that_raise_die_or_hang_are_reported() -> None:
    items = [("raise",), ("allocate",), ("exit",), ("answer",)]
    raised, starved, died, answered = in_children(misbehave, items)
    assert "ValueError: as asked" in str(raised)
    assert "MemoryError" in str(starved)
    assert "without a word" in str(died)
    assert answered == 42
    (hung,) = in_children(misbehave, [("hang",)], seconds=1)
    assert isinstance(hung, ChildFailed)
    assert "no result after 1 s" in str(hung)


def misbehave(how: str) -> int:
    if how == "raise":
        raise ValueError("as asked")
    if how == "allocate":
        return len(bytearray(80 * GIGABYTE))
    if how == "exit":
        os._exit(3)
    if how == "hang":
        time.sleep(600)
    return 42
