"""RoPE whose frequencies depend on the length of the input: every document gets its own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from packed_attn_patches import tiny
from packed_attn_patches.foreign import unwatched
from packed_attn_patches.rope import Watch, marked, ropes_of
from torch import Tensor, nn

from packed_attn import DocumentLayout, patch_model, unpatch_model
from packed_attn.audit import audit
from tests.exactness import (
    alone,
    close,
    compile_and_compare,
    documents,
    gradients,
    packed,
    relative,
    stock_results,
    token_mean,
)
from tests.models import tiny_model

LIMIT = 16
HALF = 8  # of SMALL's head_dim
# On both sides of the limit, at it, and two beyond it.
LENGTHS = (5, 1, 37, 16, 22, 17)

DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": LIMIT,
    "short_factor": [1 + i / 10 for i in range(HALF)],
    "long_factor": [2 + i / 3 for i in range(HALF)],
    "factor": 4.0,
    "long_mscale": 1.3,  # of phimoe
    "short_mscale": 1.1,
}
WINDOWED = ("sliding_attention", "full_attention")
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def model_of(family: str, kind: dict[str, Any]) -> nn.Module:
    parameters: dict[str, Any] = kind
    if family in ("gemma3_text", "cohere_compass_text"):
        parameters = {"full_attention": kind, "sliding_attention": PLAIN}
    options: dict[str, Any] = {
        "rope_parameters": copy.deepcopy(parameters),
        "max_position_embeddings": LIMIT if kind["rope_type"] == "dynamic" else 128,
    }
    if family == "cohere_compass_text":
        for one in options["rope_parameters"].values():
            one["mrope_section"] = [2, 3, 3]
    if family in ("falcon", "cohere_compass_text"):
        return tiny.tiny_model(family, **options)
    return tiny_model(family, **options, original_max_position_embeddings=LIMIT)


def skip_where_stock_fails(family: str, kind: dict[str, Any]) -> None:
    if OLD and family in ("gemma3_text", "cohere_compass_text") and kind is LONGROPE:
        pytest.skip("this transformers fails on its second long input")


def one_by_one(family: str, kind: dict[str, Any], docs: list[Tensor]) -> Tensor:
    """Each in a model that has seen no other: `dynamic` remembers what it saw."""
    return torch.cat([alone(model_of(family, kind), [doc]) for doc in docs])


# transformers 5.17 fails on the second long input where types of layers differ, and its longrope
# branches on a tensor, so no compiler takes it whole.
OLD = Version(transformers.__version__) < Version("5.23")
KINDS = pytest.mark.parametrize("kind", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
# By the attention interface, with a RoPE for each type of layer, with axes of positions, on
# documents batched by length.
COMPASS = pytest.param(
    "cohere_compass_text",
    marks=pytest.mark.skipif(
        "cohere_compass_text" not in transformers.CONFIG_MAPPING,
        reason="this transformers has no Cohere Compass",
    ),
)
FAMILIES = pytest.mark.parametrize(
    "family", ["llama", "phi3", "phimoe", "gemma3_text", COMPASS, "falcon"]
)


@KINDS
@FAMILIES
def test_every_document_has_the_frequencies_of_its_length(
    family: str, kind: dict[str, Any]
) -> None:
    if family in ("phi3", "phimoe") and kind is DYNAMIC:
        pytest.skip(f"{family} takes longrope alone")
    skip_where_stock_fails(family, kind)
    model = model_of(family, kind)
    docs = documents(lengths=LENGTHS)
    patch_model(model)
    for order in (docs, docs[::-1], docs):
        assert close(model(**packed(order)).logits[0], one_by_one(family, kind, order))


@KINDS
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_a_neighbours_length_changes_no_bit(family: str, kind: dict[str, Any]) -> None:
    model = patch_model(model_of(family, kind))
    first, second = documents(lengths=(20, 9)), documents(lengths=(20, 9, 41))
    with torch.no_grad():
        before, after = model(**packed(first)).logits, model(**packed(second)).logits
    assert torch.equal(before[0], after[0, :29])


@KINDS
@pytest.mark.parametrize("family", ["llama", COMPASS, "falcon"])
def test_loss_and_gradients(family: str, kind: dict[str, Any]) -> None:
    docs = documents(lengths=(5, 37, 16))
    targets = sum(len(d) - 1 for d in docs)
    want: dict[str, Tensor] = {}
    for doc in docs:
        one = model_of(family, kind).train()
        (token_mean(one, [doc]) * (len(doc) - 1) / targets).backward()
        for name, value in gradients(one).items():
            want[name] = want.get(name, torch.zeros(())) + value
    model = patch_model(model_of(family, kind).train())
    model.gradient_checkpointing_enable()
    model(**packed(docs)).loss.backward()
    assert relative(gradients(model), want) <= 1e-5


@KINDS
def test_two_rows(kind: dict[str, Any]) -> None:
    docs = documents(lengths=(5, 25, 17, 13))
    model = patch_model(model_of("llama", kind))
    layout = DocumentLayout.from_lengths([len(d) for d in docs])
    logits = model(input_ids=torch.cat(docs).view(2, 30), layout=layout).logits
    assert close(logits.flatten(0, 1), one_by_one("llama", kind, docs))


@KINDS
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon"])
def test_everything_else_is_untouched(family: str, kind: dict[str, Any]) -> None:
    """Before, beside and after packed forwards, which leave nothing behind."""
    skip_where_stock_fails(family, kind)
    want = stock_results(model_of(family, kind))
    model = patch_model(model_of(family, kind))
    model(**packed(documents(lengths=LENGTHS)))
    assert all(torch.equal(a, b) for a, b in zip(want, stock_results(model)))
    again = model_of(family, kind)
    patch_model(again)(**packed(documents(lengths=LENGTHS)))
    unpatch_model(again)
    assert all("forward" not in vars(module) for module in again.modules())
    assert all(torch.equal(a, b) for a, b in zip(want, stock_results(again)))


@KINDS
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(kind: dict[str, Any], clone: Any) -> None:
    model = patch_model(model_of("llama", kind))
    twin = clone(model)
    docs = documents(lengths=LENGTHS)
    batch = packed(docs)
    unpatch_model(model)
    assert close(twin(**batch).logits[0], one_by_one("llama", kind, docs))


@KINDS
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_shared_prefixes_up_to_the_limit(family: str, kind: dict[str, Any]) -> None:
    """Beyond it a prompt would need other frequencies for each length of what goes on from it."""
    model = patch_model(model_of(family, kind))
    prompt, one, other = documents(lengths=(7, 9, 4))
    layout = DocumentLayout.from_lengths([7, 9, 4], parents=[-1, 0, 0])
    logits = model(input_ids=torch.cat([prompt, one, other])[None], layout=layout).logits[0]
    paths = [torch.cat([prompt, one]), torch.cat([prompt, other])]
    want = one_by_one(family, kind, paths)
    assert close(logits, torch.cat([want[:16], want[23:]]))
    long = DocumentLayout.from_lengths([7, 10, 3], parents=[-1, 0, 0])
    with pytest.raises(NotImplementedError, match=r"more than 16 tokens.*continued to 17"):
        model(input_ids=torch.cat([prompt, one, other])[None], layout=long)


def test_position_ids_that_lose_the_layout_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that computed with its position ids first would rotate by the longest document."""
    model = patch_model(model_of("llama", LONGROPE))
    rope = model.model.rotary_emb
    own = rope.forward
    monkeypatch.setitem(vars(rope), "forward", lambda x, position_ids: own(x, position_ids + 0))
    lost = pytest.raises(RuntimeError, match="position ids that have lost the layout")
    with unwatched(), lost:
        model(**packed(documents(lengths=LENGTHS)))


def test_a_rank_may_hold_the_beginning_of_a_long_document() -> None:
    """Context parallelism: which frequencies is a question of the whole document."""
    model = patch_model(model_of("llama", LONGROPE))
    rope = model.model.rotary_emb
    layout = DocumentLayout.from_lengths([40])
    x, ids = torch.zeros(1, 40, 64), layout.position_ids[None]
    whole = rope(x, marked(ids, 1, layout))
    share = DocumentLayout.from_lengths([4])
    share._derived["lengths_alone"] = layout.lengths_alone[:4]
    assert all(
        torch.equal(a[:, :4], b) for a, b in zip(whole, rope(x, marked(ids[:, :4], 1, share)))
    )


@pytest.mark.skipif(OLD, reason="transformers' own longrope breaks the graph")
def test_longrope_compiles_once_for_any_boundaries() -> None:
    model = patch_model(model_of("llama", LONGROPE))
    compile_and_compare(model, lambda docs: one_by_one("llama", LONGROPE, docs))


def test_an_audit_says_which_lengths_it_has_not_seen() -> None:
    """And finds, at those, what stock models do: frequencies by the longest document."""
    model = model_of("llama", LONGROPE)
    for rope in ropes_of(model):
        rope.config.rope_parameters["original_max_position_embeddings"] = 40
    (note,) = audit(model, convention="position_ids, no cache").notes
    assert "more than 40 tokens, and the longest one here has 37" in note
    report = audit(model, convention="position_ids, no cache", lengths=(5, 1, 37, 41))
    assert not report.notes
    assert [check.verdict for check in report.checks[:2]] == ["fails", "holds"]
    assert audit(patch_model(model), lengths=(5, 1, 37, 41)).isolated


def test_the_watch_is_shared_with_the_hooks() -> None:
    model = copy.deepcopy(patch_model(model_of("llama", DYNAMIC)))
    watches = {
        id(hook.rope)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(getattr(hook, "rope", None), Watch)
    }
    assert watches == {id(model.model.rotary_emb.forward.watch)}
