"""Context parallelism: a pack over 2 and 4 processes equals the pack in one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForTokenClassification

from packed_attn import DocumentLayout, PackedCollator, PackedLoss, attention, patch_model
from packed_attn.audit import leaks_between_documents
from packed_attn.distributed import ShardedLayout, context_parallel
from tests.exactness import gradients, relative
from tests.models import tiny_config, tiny_model
from tests.processes import in_processes

LENGTHS = (5, 1, 37, 22, 9, 3)
CAPACITY = 96


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    docs = [torch.randint(3, 150, (n,), generator=generator) for n in LENGTHS]
    collator = PackedCollator("documents", pad_to_multiple_of=16)
    return collator([{"input_ids": d} for d in docs])


def model_share(family: str, method: Any, checkpointing: bool) -> dict[str, Any]:
    """One rank's loss and gradients; logits with the rows that they belong to."""
    model = patch_model(tiny_model(family)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    share = context_parallel(batch(), dist.group.WORLD, method=method)
    output = model(**share)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "rows": share["layout"].rows,
        "logits": output.logits.detach()[0],
        "loss": output.loss.detach(),
        "gradients": gradients,
    }


@pytest.mark.parametrize(
    ("ranks", "family", "method", "checkpointing"),
    [
        (2, "llama", "heads", False),
        (2, "gpt_oss", "keys", True),
        (4, "mistral", "keys", False),
        (4, "gemma2", "auto", True),
    ],
)
def test_a_model_on_several_ranks_equals_one(
    ranks: int, family: str, method: str, checkpointing: bool
) -> None:
    """Losses and gradients of the ranks add up to the whole batch's; windows and sinks included."""
    whole = batch()
    model = patch_model(tiny_model(family)).train()
    output = model(**whole)
    output.loss.backward()

    shares = in_processes(ranks, model_share, family, method, checkpointing)
    logits = torch.empty_like(output.logits[0])
    for share in shares:
        logits[share["rows"]] = share["logits"]
    real = ~whole["layout"].padding_tokens
    torch.testing.assert_close(logits[real], output.logits[0][real], rtol=1e-4, atol=1e-5)
    total = sum(share["loss"].item() for share in shares)
    assert total == pytest.approx(output.loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            got = sum(share["gradients"][name] for share in shares)
            torch.testing.assert_close(got, parameter.grad, msg=name, rtol=1e-4, atol=1e-6)


def of_the_training_page() -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's loss and gradients after what the page shows."""
    page = (Path(__file__).parent.parent / "docs/training.md").read_text()
    (block,) = re.findall(r"```python torchrun\n(.*?)```", page, re.DOTALL)
    model = patch_model(tiny_model("llama")).train()
    names: dict[str, Any] = {"model": model, "batch": batch(), "dp": 1, "cp": 2}
    exec(compile(block.replace('"cuda"', '"cpu"'), "docs/training.md", "exec"), names)
    return names["loss"].detach(), gradients(model)


def test_the_training_page() -> None:
    model = patch_model(tiny_model("llama")).train()
    loss = model(**batch()).loss
    loss.backward()
    (one, some), (other, rest) = in_processes(2, of_the_training_page)
    assert (one + other).item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative({n: some[n] + rest[n] for n in some}, gradients(model)) <= 1e-5


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window_size": (7, 0)},
    "chunk": {"chunk_size": 10},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
    "bidirectional": {"causal": False},
    "window both": {"causal": False, "window_size": (4, 3)},
}


def _tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(CAPACITY, heads, dim, generator=generator, dtype=torch.float64)

    return draw(4, 16), draw(2, 16), draw(2, 8), draw(4, 8)


def _layout() -> DocumentLayout:
    lengths = (*LENGTHS, CAPACITY - sum(LENGTHS))
    return DocumentLayout.from_lengths(lengths, padding=[False] * len(LENGTHS) + [True])


def _options(mask: str) -> dict[str, Any]:
    options = dict(MASKS[mask])
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    return options


def attention_shares(methods: tuple[Any, ...]) -> dict[tuple[str, str], list[Tensor]]:
    """out, lse and gradients of q, k and v on this rank's rows, for every mask and method."""
    results = {}
    for method in methods:
        layout = ShardedLayout.of(_layout(), dist.group.WORLD, method)
        for mask in MASKS:
            q, k, v, grad = (x[layout.rows].requires_grad_() for x in _tensors())
            if method == "keys" and not MASKS[mask].get("causal", True):
                with pytest.raises(NotImplementedError, match="use method='heads'"):
                    attention(q, k, v, layout, **_options(mask))
                continue
            out, lse = attention(q, k, v, layout, return_lse=True, **_options(mask))
            out.backward(grad)
            found = [out.detach(), lse.detach().t(), q.grad, k.grad, v.grad]
            results[mask, method] = [layout.rows, *found]
    return results


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_mask_equals_one_process(ranks: int) -> None:
    shares = in_processes(ranks, attention_shares, ("heads", "keys"))
    for key in shares[0]:
        q, k, v, grad = (x.requires_grad_() for x in _tensors())
        out, lse = attention(q, k, v, _layout(), return_lse=True, **_options(key[0]))
        out.backward(grad)
        want = [out, lse.t(), q.grad, k.grad, v.grad]
        for i, expected in enumerate(want):
            got = torch.empty_like(expected)
            for share in shares:
                got[share[key][0]] = share[key][1 + i]
            torch.testing.assert_close(got, expected, msg=f"{key} {i}", rtol=1e-9, atol=1e-9)


def refusals() -> None:
    whole = batch()
    share = context_parallel(whole, dist.group.WORLD)
    layout = share["layout"]
    q = torch.randn(layout.total_tokens, 3, 16)
    with pytest.raises(ValueError, match="needs heads that 2 ranks can share, but there are 3"):
        attention(q, q, q, ShardedLayout.of(whole["layout"], dist.group.WORLD, "heads"))
    with pytest.raises(NotImplementedError, match="context parallelism has no dropout_p"):
        attention(q, q, q, layout, dropout_p=0.1)
    with pytest.raises(ValueError, match="must carry the layout of the whole pack"):
        context_parallel(share, dist.group.WORLD)
    with pytest.raises(ValueError, match="method must be 'auto', 'heads' or 'keys', got 'ring'"):
        context_parallel(whole, dist.group.WORLD, method="ring")  # type: ignore[arg-type]
    odd = PackedCollator("documents")([{"input_ids": [5] * 7}])
    with pytest.raises(ValueError, match="must be a multiple of 4 for 2 ranks, but it has 7"):
        context_parallel(odd, dist.group.WORLD)
    forest = DocumentLayout.from_lengths([4, 4], parents=[-1, 0])
    with pytest.raises(NotImplementedError, match="no forests"):
        context_parallel({"input_ids": torch.ones(1, 8), "layout": forest}, dist.group.WORLD)


def test_refusals() -> None:
    in_processes(2, refusals)


def models_refuse_shares() -> None:
    share = context_parallel(batch(), dist.group.WORLD)
    whole_only = tiny_model("lfm2", layer_types=["conv", "full_attention"])
    for model in (whole_only, *(tiny_model(family) for family in ("mamba", "bloom"))):
        with pytest.raises(NotImplementedError, match="layers that take whole documents only"):
            patch_model(model)(**share)
    balanced = patch_model(tiny_model("mixtral", output_router_logits=True))
    with pytest.raises(NotImplementedError, match="set output_router_logits=False"):
        balanced(**share)
    config = tiny_config("llama", num_labels=199)
    tokens = patch_model(AutoModelForTokenClassification.from_config(config))
    with pytest.raises(NotImplementedError, match="a token predicts its own label"):
        tokens(**share)


def test_models_refuse_shares_that_they_would_take_for_documents() -> None:
    in_processes(2, models_refuse_shares)


def losses_refuse_shares() -> None:
    whole, model = batch(), patch_model(tiny_model("llama"))
    loss = PackedLoss(model)
    share = context_parallel(whole, dist.group.WORLD)
    output = model(**{k: v for k, v in share.items() if k != "labels"})
    with pytest.raises(NotImplementedError, match="may be on another rank"):
        loss(output, share["labels"], share["num_items_in_batch"])
    by_document = whole | {"shift_labels": torch.ones(1, 1, len(LENGTHS), dtype=torch.long)}
    with pytest.raises(NotImplementedError, match="no mean over documents"):
        context_parallel(by_document, dist.group.WORLD)
    with pytest.raises(NotImplementedError, match="no encoder-decoders"):
        context_parallel(whole | {"decoder_layout": whole["layout"]}, dist.group.WORLD)
    with pytest.raises(ValueError, match="the batch is a share of a pack"):
        leaks_between_documents(model, share)


def test_losses_and_probes_refuse_shares() -> None:
    in_processes(2, losses_refuse_shares)


def work_of_one_long_document() -> tuple[int, int]:
    """(tokens, keys seen by them) of this rank."""
    layout = ShardedLayout.of(DocumentLayout.from_lengths([4096]), dist.group.WORLD, "keys")
    return layout.total_tokens, int((layout.position_ids + 1).sum())


def test_ranks_get_the_same_tokens_and_work() -> None:
    found = in_processes(4, work_of_one_long_document)
    assert {tokens for tokens, _ in found} == {1024}
    work = [cost for _, cost in found]
    assert max(work) <= 1.001 * min(work)
