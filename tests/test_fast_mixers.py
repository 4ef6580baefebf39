"""Token mixers on packed streams: boundaries reach every kernel, or documents run in batches."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from packed_attn_patches import fast_mixers, mixer_proof
from packed_attn_patches.fast_mixers import (
    FAST_TYPES,
    MixerForward,
    Room,
    mixers_of,
    reason_against,
)
from packed_attn_patches.foreign import unwatched
from packed_attn_patches.tiny import tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from packed_attn import DocumentLayout, PackedCollator, audit, patch_model, unpatch_model
from packed_attn.backends import machine
from tests import mixer_standins as standins
from tests.exactness import (
    alone,
    close,
    documents,
    gradients,
    packed,
    relative,
    token_mean,
)
from tests.standins import Recorder
from tests.sweep import sweep_type

# One of each kind of kernel, with one group: transformers 5.17 norms several groups as one.
KINDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_groups": 1},
    "kimi_linear": {},
    "mamba2": {"n_groups": 1, "num_hidden_layers": 1},
    "qwen3_next": {},
}
# What their one mixer calls in training.
TRAINED_BY = {
    "bamba": [standins.FUSED],
    "kimi_linear": [standins.CONVOLUTION, standins.KDA],
    "mamba2": [standins.FUSED],
    "qwen3_next": [standins.CONVOLUTION, standins.GATED_DELTA],
}
LENGTHS = (5, 1, 18, 9)


@lru_cache
def _load_types() -> None:
    """Loads transformers' modules, which look for the packages when they are loaded."""
    for model_type in FAST_TYPES & set(CONFIG_MAPPING):
        AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Stand-ins for all packages, and nothing proven before or after."""
    _load_types()
    monkeypatch.setattr(mixer_proof, "_found", {})
    return standins.install(monkeypatch, *standins.FUNCTIONS)


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixer_proof, "_found", {})
    monkeypatch.setattr(fast_mixers, "_said", set())


def calls(kernels: dict[str, Recorder]) -> dict[str, int]:
    return {name: len(r.calls) for name, r in kernels.items() if r.calls}


def forget(kernels: dict[str, Recorder]) -> None:
    for recorder in kernels.values():
        recorder.calls.clear()


@pytest.mark.parametrize("model_type", KINDS)
def test_training_equals_the_documents_alone(model_type: str, kernels: dict[str, Recorder]) -> None:
    model = tiny_model(model_type, **KINDS[model_type]).train()
    docs = documents(lengths=LENGTHS)
    loss = token_mean(model, docs)
    loss.backward()
    want = gradients(model)
    patch_model(model)
    model.zero_grad()
    model(**packed(docs))  # proves the mixers
    forget(kernels)
    got = model(**packed(docs)).loss
    got.backward()
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative(gradients(model), want) <= 5e-6
    assert calls(kernels) == dict.fromkeys(TRAINED_BY[model_type], 1)


@pytest.mark.parametrize("model_type", KINDS)
def test_audited_on_the_kernels(model_type: str, kernels: dict[str, Recorder]) -> None:
    model = patch_model(tiny_model(model_type, **KINDS[model_type]))
    model(**packed(documents(lengths=LENGTHS)))
    forget(kernels)
    report = audit(model, lengths=(5, 1, 9))
    assert report.isolated, str(report)
    assert len(calls(kernels)) == 2


def test_every_kernel_gets_the_documents(kernels: dict[str, Recorder]) -> None:
    model = patch_model(tiny_model("bamba", **KINDS["bamba"])).train()
    rows = torch.randint(3, 150, (2, 40))
    layout = DocumentLayout.from_lengths((5, 0, 1, 34, 17, 23))
    model(input_ids=rows, layout=layout)
    forget(kernels)
    model(input_ids=rows, layout=layout)
    model.eval()
    model(input_ids=rows, layout=layout)
    last = {name: r.calls[-1] for name, r in kernels.items() if r.calls}
    assert set(last) == {standins.FUSED, standins.SCAN, standins.CONVOLUTION}
    convolved = last[standins.CONVOLUTION]["seq_idx"]
    assert torch.equal(convolved, layout.document_ids.view(2, 40))
    for name in (standins.FUSED, standins.SCAN):
        call = last[name]
        assert call["chunk_size"] == 16
        chunks = call["seq_idx"].unflatten(1, (-1, 16))
        assert (chunks == chunks[..., :1]).all(), "a chunk spans documents"
        counts = call["seq_idx"].unique_consecutive(return_counts=True)[1]
        assert counts.tolist() == [16, 16, 48, 32, 32]


def test_rows_are_one_stream_of_documents(kernels: dict[str, Recorder]) -> None:
    model = patch_model(tiny_model("qwen3_next"))
    a, b = documents(lengths=(5, 22))
    rows = torch.stack([torch.cat([a, b]), torch.cat([b, a])])
    seq_idx = torch.tensor([[0] * 5 + [1] * 22, [0] * 22 + [1] * 5])
    with torch.no_grad():
        logits = model(input_ids=rows, seq_idx=seq_idx).logits
    assert close(logits[0], alone(model, [a, b]))
    assert close(logits[1], alone(model, [b, a]))
    call = kernels[standins.GATED_DELTA].calls[-1]
    assert call["q"].shape[:2] == (1, 54)
    assert call["cu_seqlens"].tolist() == [0, 5, 27, 49, 54]


def test_a_short_convolution_needs_no_package(unproven: None) -> None:
    """LFM2's only mixer: zeros between documents are what a document alone has before it."""
    model = tiny_model("lfm2")
    docs = documents(lengths=(5, 1, 37, 2))
    want = alone(model, docs)
    patch_model(model)
    batch = PackedCollator("documents", pad_to_multiple_of=64)([{"input_ids": d} for d in docs])
    if not mixers_of(tiny_model("lfm2")):
        pytest.skip("this transformers passes nothing on to LFM2's convolution")
    seen = []
    model.get_decoder().layers[0].register_forward_hook(lambda *a: seen.append(a[1][0].shape))
    got = model(**batch).logits[0]
    assert close(got[: len(want)], want)
    assert seen == [(1, 64, 64)]


@pytest.mark.parametrize("offload_first", [False, True])
def test_offloaded_weights(offload_first: bool, unproven: None) -> None:
    """A convolution reads its weights past the hook that brings them: the mixer's forward asks."""
    from accelerate import cpu_offload

    model = tiny_model("lfm2")
    docs = documents(lengths=LENGTHS)
    want = alone(model, docs)
    steps: list[Any] = [patch_model, lambda m: cpu_offload(m, torch.device("cpu"))]
    for step in reversed(steps) if offload_first else steps:
        model = step(model)
    assert next(model.parameters()).is_meta
    with torch.no_grad():
        assert close(model(**packed(docs)).logits[0], want)
    assert all(f is None for m in _mixers(model) for f in m.proofs.values())


def _mixers(model: nn.Module) -> list[MixerForward]:
    found = (vars(m).get(name) for m in model.modules() for name in ("forward", "_old_forward"))
    return [forward for forward in found if isinstance(forward, MixerForward)]


@pytest.mark.parametrize("missing", ["fla", "mamba_ssm"])
def test_without_its_package_documents_run_in_batches(
    missing: str, unproven: None, caplog: pytest.LogCaptureFixture
) -> None:
    model_type, package = {
        "fla": ("qwen3_next", "flash-linear-attention is not installed"),
        "mamba_ssm": ("bamba", "mamba_ssm is not installed"),
    }[missing]
    model = patch_model(tiny_model(model_type))
    docs = documents(lengths=LENGTHS)
    batch = packed(docs)
    if not machine.package_reasons(missing, missing):
        pytest.skip(f"{missing} is installed")
    with caplog.at_level(logging.INFO, "packed_attn.mixers"):
        got = [model(**batch).logits[0] for _ in range(2)]
    assert close(got[0], alone(model, docs))
    assert package in str(reason_against(model, batch["layout"]))
    assert len([r for r in caplog.records if package in r.getMessage()]) == 1


def _without(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that takes boundaries and looks away."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, name: None})

    run.__wrapped__ = function  # type: ignore[attr-defined]
    return run


def _leaks_backward(*args: Any, **kwargs: Any) -> Any:
    """Right outputs, and a gradient from each of them in all values."""
    out, state = standins.chunk_gated_delta_rule(*args, **kwargs)
    value = args[2]
    return out + (value - value.detach()).sum() * 1e-12, state


_leaks_backward.__wrapped__ = standins.chunk_gated_delta_rule  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("model_type", "module", "broken", "found"),
    [
        (
            "qwen3_next",
            "fla.ops.gated_delta_rule",
            _without("cu_seqlens", standins.chunk_gated_delta_rule),
            "outputs that differ from documents alone",
        ),
        (
            "qwen3_next",
            "causal_conv1d",
            _without("seq_idx", standins.causal_conv1d_fn),
            "outputs that differ from documents alone",
        ),
        (
            "bamba",
            "mamba_ssm.ops.triton.ssd_combined",
            _without("seq_idx", standins.mamba_chunk_scan_combined),
            "outputs that differ from documents alone",
        ),
        (
            "qwen3_next",
            "fla.ops.gated_delta_rule",
            _leaks_backward,
            "lets a document's gradient reach others",
        ),
    ],
)
def test_a_kernel_that_is_not_exact_is_found_and_not_used(
    model_type: str,
    module: str,
    broken: Any,
    found: str,
    kernels: dict[str, Recorder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = broken.__wrapped__.__name__
    monkeypatch.setattr(sys.modules[module], name, broken)
    model = patch_model(tiny_model(model_type))
    docs = documents(lengths=LENGTHS)
    batch = packed(docs)
    assert found in str(reason_against(model, batch["layout"]))
    assert close(model(**batch).logits[0], alone(model, docs))


def test_a_kernel_that_raises_is_not_used(
    kernels: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(sys.modules["fla.ops.kda"], "chunk_kda", raises)
    model = patch_model(tiny_model("kimi_linear"))
    docs = documents(lengths=LENGTHS)
    assert close(model(**packed(docs)).logits[0], alone(model, docs))
    reason = str(reason_against(model, packed(docs)["layout"]))
    assert reason.endswith("raises RuntimeError: no kernel image is available")


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """The first of a process decides for all."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
@pytest.mark.parametrize("right", [False, True])
def test_mixers_are_proven_in_the_autocast_that_a_trainer_puts_on_a_forward(
    right: bool, kernels: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate wraps a forward in it, behind the hooks that run before: a kernel that takes
    boundaries under autocast alone is used there, one that takes them elsewhere is not."""
    rule = standins.chunk_gated_delta_rule

    def kernel(*args: Any, cu_seqlens: Any = None, **kwargs: Any) -> Any:
        taken = torch.is_autocast_enabled("cpu") == right
        return rule(*args, cu_seqlens=cu_seqlens if taken else None, **kwargs)

    kernel.__wrapped__ = rule  # type: ignore[attr-defined]
    recorded = kernels[standins.GATED_DELTA](kernel)
    monkeypatch.setattr(sys.modules["fla.ops.gated_delta_rule"], rule.__name__, recorded)
    autocast = Accelerator(cpu=True, mixed_precision="bf16").autocast
    model, docs = tiny_model("qwen3_next"), documents(lengths=LENGTHS)
    with autocast():
        want = alone(model, docs)
    patch_model(model)
    model.forward = autocast()(model.forward)
    with torch.no_grad():
        model(**packed(docs))
        forget(kernels)
        got = model(**packed(docs)).logits[0]
    assert close(got, want, 0.05)
    assert (standins.GATED_DELTA in calls(kernels)) == right


def test_a_forest_does_not_take_the_kernels(kernels: dict[str, Recorder]) -> None:
    model = patch_model(tiny_model("qwen3_next"))
    forest = DocumentLayout.from_lengths((4, 3), parents=(-1, 0))
    assert "another document's end" in str(reason_against(model, forest))


def test_a_mixer_that_lost_the_layout_raises(kernels: dict[str, Recorder]) -> None:
    """As a decoder layer of a user's own would lose it."""
    model = patch_model(tiny_model("qwen3_next"))
    layer: Any = model.get_decoder().layers[0]
    mixer = layer.linear_attn

    class Drops(nn.Module):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return mixer(hidden_states=hidden_states)

    layer.linear_attn = Drops()
    layer.linear_attn.kept = mixer
    lost = pytest.raises(RuntimeError, match="GatedDeltaNet ran in a packed forward without its")
    with unwatched(), lost:
        model(**packed(documents(lengths=LENGTHS)))
    ids = torch.arange(3, 9)[None]
    assert model(input_ids=ids).logits.isfinite().all()


def test_only_mixers_whose_every_call_is_known() -> None:
    assert not mixers_of(tiny_model("mamba"))
    assert not mixers_of(tiny_model("jamba"))
    model: Any = tiny_model("qwen3_next")
    assert len(mixers_of(model)) == 1
    mixer = model.get_decoder().layers[0].linear_attn

    class Elsewhere(type(mixer)):
        def more(self, x: Tensor) -> Tensor:
            return causal_conv1d_fn(x)  # type: ignore[name-defined]  # noqa: F821

    mixer.__class__ = Elsewhere
    assert not mixers_of(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_patched_and_independent(clone: Any, kernels: dict[str, Recorder]) -> None:
    model = patch_model(tiny_model("qwen3_next"))
    twin = clone(model)
    docs = documents(lengths=LENGTHS)
    want = alone(model, docs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    forget(kernels)
    assert close(twin(**packed(docs)).logits[0], want)
    assert calls(kernels)
    unpatch_model(twin)
    assert not any("forward" in vars(m) for m in twin.modules())
    assert any(isinstance(vars(m).get("forward"), MixerForward) for m in model.modules())


def test_the_modules_of_transformers_stay_as_they_are(kernels: dict[str, Recorder]) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    before = dict(vars(module))
    other = tiny_model("qwen3_next")
    docs = documents(lengths=LENGTHS)
    want = alone(other, docs)
    model = patch_model(tiny_model("qwen3_next"))
    model(**packed(docs))
    assert dict(vars(module)) == before
    assert torch.equal(alone(other, docs), want)


def test_room_between_documents() -> None:
    layout = DocumentLayout.from_lengths((3, 0, 1, 2))
    room = Room.of(layout, multiple=4)
    assert room.places.tolist() == [0, 1, 2, 4, 8, 9]
    assert room.seq_idx.tolist() == [[0] * 4 + [2] * 4 + [3] * 4]
    x = torch.arange(1.0, 7.0)[:, None]
    wide = room.spread(x)
    assert wide[0, :, 0].tolist() == [1, 2, 3, 0, 4, 0, 0, 0, 5, 6, 0, 0]
    assert torch.equal(room.taken(wide), x)
    gaps = Room.of(layout, gap=2).places.diff().tolist()
    assert gaps == [1, 1, 5, 3, 1]  # the empty document has room of its own


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAST_TYPES))
def test_every_fast_type_is_exact_by_every_convention(
    model_type: str, kernels: dict[str, Recorder]
) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    outcome = sweep_type("causal", model_type)
    assert outcome.status == "exact", outcome
    if mixers_of(tiny_model(model_type)):
        assert calls(kernels)
