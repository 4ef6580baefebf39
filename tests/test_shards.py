"""FSDP2 where ranks run unlike numbers of batches: as exact as one process, and none waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from packed_attn_patches import tiny
from packed_attn_patches.shards import tied
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from packed_attn import patch_model
from packed_attn.audit import OneDocument, leaks_between_documents
from tests.exactness import alone, close, documents, gradients, packed, relative
from tests.models import tiny_model
from tests.processes import in_processes
from tests.test_data_parallel import RANKS, _wrapped, as_launched, need, sharded
from tests.test_seq2seq import collate, pairs, tiny_seq2seq

# By rank, of unlike numbers of batches; a mesh has four.
LENGTHS = ((5, 1, 37, 22), (40, 3, 12), (9, 2), (2, 2, 30, 7, 1))


def batch_of(rank: int, shift: int = 0) -> dict[str, Any]:
    """This rank's pack; shifted, its first document has other tokens."""
    docs = documents(seed=rank + 1, lengths=LENGTHS[rank])
    docs[0] = (docs[0] + shift - 3) % 147 + 3
    return packed(docs)


def targets(ranks: int = RANKS) -> int:
    return sum(int((batch_of(rank)["labels"] != -100).sum()) for rank in range(ranks))


def calls_of(model: Any) -> list[int]:
    """Filled with the tokens of each call of a layer."""
    calls: list[int] = []
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("Block", "Layer")))
    layer.register_forward_pre_hook(lambda _, args: calls.append(args[0][..., 0].numel()))
    return calls


def tiny_model_of(family: str) -> Any:
    auto = AutoModelForImageTextToText if family.endswith("_vl") else AutoModelForCausalLM
    return tiny.tiny_model(family, auto_class=auto)


def in_half_precision(family: str) -> dict[str, Any]:
    """Loss and gradients by the usual policy, and whether another document changes anything."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(patch_model(tiny_model_of(family)).train(), mp_policy=policy)
    rank = dist.get_rank()
    output = model(**batch_of(rank), num_items_in_batch=targets())
    (output.loss * RANKS).backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        other = model(**batch_of(rank, shift=7)).logits
    same = torch.equal(other[0, LENGTHS[rank][0] :], output.logits[0, LENGTHS[rank][0] :])
    return {"loss": output.loss.detach().float(), "gradients": gradients, "isolated": same}


def summed(family: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The same packs on one process."""
    model, total = patch_model(tiny_model_of(family).to(dtype)).train(), 0.0
    gradients: dict[str, Tensor] = {}
    for rank in range(RANKS):
        model.zero_grad()
        loss = model(**batch_of(rank), num_items_in_batch=targets()).loss
        loss.backward()
        total += loss.item()
        for name, p in model.named_parameters():
            if p.grad is not None:
                gradients[name] = gradients.get(name, 0) + p.grad.float()
    return total, gradients


@pytest.mark.parametrize(
    "family",
    [
        "mamba2",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in (
                "mixtral",
                "lfm2",
                "qwen3_next",
                "recurrent_gemma",
                "jamba",
                "qwen2_5_vl",
            )
        ),
    ],
)
def test_half_precision(family: str) -> None:
    """As near to float32 as one process in bfloat16 is; isolated to the bit."""
    exact_loss, exact = summed(family, torch.float32)
    plain_loss, plain = summed(family, torch.bfloat16)
    found = in_processes(RANKS, in_half_precision, family)
    loss = sum(rank["loss"].item() for rank in found)
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 2**-9 * exact_loss
    for rank in found:
        assert rank["isolated"]
        assert relative(rank["gradients"], exact) <= 2 * relative(plain, exact)


def evaluation() -> None:
    """Without gradients, and where one rank has no pack at all."""
    model = patch_model(tiny_model("mamba"))
    rank = dist.get_rank()
    batches = [batch_of(rank), batch_of(rank) if rank else {"input_ids": documents()[2][None]}]
    want = [alone(model, d) for d in (documents(rank + 1, LENGTHS[rank]), [documents()[2]])]
    calls, model = calls_of(model), sharded(model)
    for batch, wanted in zip(batches, (want[0], want[0] if rank else want[1]), strict=True):
        with torch.no_grad():
            assert close(model(**batch).logits[0], wanted)
        counts = [0] * RANKS
        dist.all_gather_object(counts, len(calls))
        assert counts[0] == counts[1]
    made = model.generate(documents()[0][None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9)


def pairs_of_rank(rank: int) -> dict[str, Any]:
    return collate(pairs()[: 2 if rank else None])


def encoder_decoder() -> None:
    """Pairs on both ranks, then on one alone."""
    stock, rank = patch_model(tiny_seq2seq()).train(), dist.get_rank()
    for of_rank in range(RANKS):
        (stock(**pairs_of_rank(of_rank)).loss / RANKS).backward()
    want = gradients(stock)
    model = sharded(patch_model(tiny_seq2seq()).train())
    model(**pairs_of_rank(rank)).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert relative(found, want) <= 1e-5
    one = {name: value[None] for name, value in pairs()[0].items()}
    with torch.no_grad():
        wanted = stock(**(one if rank else pairs_of_rank(0))).logits
        assert close(model(**(one if rank else pairs_of_rank(0))).logits, wanted)


def watched() -> None:
    """The probe of IsolationCallback, which runs as often on ranks of unlike documents."""
    rank = dist.get_rank()
    unlike = packed(documents(lengths=((5, 9), (4, 8, 3))[rank]))
    single = packed(documents(lengths=((30,), (4, 8, 3))[rank]))
    for family in ("llama", "mamba"):
        model = sharded(patch_model(tiny_model(family)).train())
        assert leaks_between_documents(model, unlike) is None
        with pytest.raises(OneDocument):
            leaks_between_documents(model, single)
        model(**single).loss.backward()
    stock = sharded(tiny_model("llama").train())
    leaking = {**unlike, "attention_mask": torch.ones_like(unlike["input_ids"])}
    leak = leaks_between_documents(stock, leaking)
    assert leak is not None
    assert leak.module == "model.layers.0.self_attn"


@pytest.mark.parametrize("work", [evaluation, encoder_decoder, watched])
def test_ranks_run_as_often_as_each_other(work: Any) -> None:
    in_processes(RANKS, work)


def test_what_is_tied_brings_nothing() -> None:
    """Neither its numbers nor their gradients, whatever they are."""
    x = torch.ones(2, 3, requires_grad=True)
    y = torch.full((2, 3), float("nan"), requires_grad=True)
    output = tied({"loss": (2 * x).sum(), "logits": 2 * x}, [{"loss": y.sum(), "logits": y * 1}])
    output["loss"].backward()
    assert torch.equal(output["logits"], torch.full((2, 3), 2.0))
    assert torch.equal(x.grad, torch.full((2, 3), 2.0))  # type: ignore[arg-type]
    assert torch.equal(y.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    output["loss"] *= 3.0  # as Trainer scales it, which a view would forbid


def refused(wrapper: str) -> None:
    model: Any = patch_model(tiny_model("mamba")).train()
    if wrapper == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        block = FullyShardedDataParallel(model.backbone.layers[0], device_id=torch.device("cpu"))
        model.backbone.layers[0] = block
    else:
        as_launched()
        model = _wrapped(model, wrapper)
    with pytest.raises(NotImplementedError, match=r"MambaForCausalLM runs packs .* use FSDP2"):
        model(**batch_of(dist.get_rank()))


@pytest.mark.parametrize("wrapper", ["fsdp1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_other_shards_are_refused(wrapper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks would wait for each other without end."""
    need(wrapper, monkeypatch)
    in_processes(RANKS, refused, wrapper)
