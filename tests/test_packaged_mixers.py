"""Token mixers by flash-linear-attention's and mamba_ssm's own kernels: on a GPU, or interpreted.

Documents alone run on the same device by transformers' way of calling the same kernels. What is in
one document may change no bit of another; equality is up to rounding, as kernels multiply float32
in tf32 on a GPU and may sum in another order. `make packaged-mixers` runs one type of each kernel
in triton's interpreter, which takes minutes.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from packed_attn_patches.fast_mixers import FAST_TYPES, MixerForward, mixers_of, reason_against
from packed_attn_patches.tiny import tiny_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from packed_attn import DocumentLayout, patch_model
from packed_attn.audit import leaks_between_documents
from tests.exactness import alone, documents, gradients, packed, relative, token_mean

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.interpreted_packages import prepare

    prepare()
else:
    pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"

# More than a block of the kernels in one; interpreted, a token takes long.
LENGTHS = (5, 1, 70, 9) if INTERPRETED else (5, 1, 150, 37, 64)
_GATED = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
_FLA, _MAMBA, _NONE = "fla", "mamba_ssm", ""
# The package of each type's recurrence, the kernel that it calls, and sizes as kernels have them.
TYPES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_next": (_FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _GATED),
    "qwen3_5_text": (_FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _GATED),
    "olmo_hybrid": (_FLA, "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _GATED),
    "kimi_linear": (_FLA, "fla.ops.kda", "chunk_kda", {"linear_head_dim": 64}),
    "bamba": (_MAMBA, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", {}),
    "mamba2": (_MAMBA, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", {}),
    "nemotron_h": (_MAMBA, "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", {}),
    "lfm2": (_NONE, "", "", {}),
}
if INTERPRETED:  # one of each kernel, with few heads
    FEW: dict[str, dict[str, Any]] = {
        "mamba2": {},
        "qwen3_next": {"linear_num_key_heads": 1, "linear_num_value_heads": 1},
        "kimi_linear": {"linear_num_heads": 1},
    }
    TYPES = {name: (*TYPES[name][:3], TYPES[name][3] | few) for name, few in FEW.items()}
# Which expert a token goes to is a matter of rounding.
ROUTED = frozenset({"qwen3_next", "kimi_linear"})


@pytest.fixture(params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    name = request.param
    package = TYPES[name][0]
    if package and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    _take_names_back()
    if name not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if not mixers_of(_model(name, torch.float32, "cpu")):
        pytest.skip(f"transformers {transformers.__version__} passes nothing on to {name}'s mixers")
    refusal = _refusal(name) if package and not INTERPRETED else None
    if refusal is not None:
        pytest.skip(f"{package} refuses this machine: {refusal}")
    return name


@functools.cache
def _take_names_back() -> None:
    """flash-linear-attention puts models of its own in the place of some of transformers': Mamba 2
    would be another model, without a mixer that is known, and skipped."""
    if find_spec("fla") is not None:
        import_module("fla")
        mapping: Any = CONFIG_MAPPING
        for name in mapping._mapping.keys() & mapping._extra_content.keys():
            del mapping._extra_content[name]


@functools.cache
def _refusal(model_type: str) -> str | None:
    """What a package says where its own kernels cannot train a document alone, as fla does of some
    versions of triton on Hopper."""
    model = _model(model_type, torch.float32, DEVICE).train()
    ids = torch.arange(3, 67, device=DEVICE)[None]
    try:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN multiplies convolutions of float32 in tf32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _model(model_type: str, dtype: torch.dtype, device: str) -> Any:
    return tiny_model(model_type, dtype=dtype, **TYPES[model_type][3]).to(device)


def _counted(model_type: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a packed forward's kernel is called with."""
    _, module, name, _ = TYPES[model_type]
    calls: list[Any] = []
    if not module:
        return calls
    function = getattr(import_module(module), name)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("cu_seqlens", kwargs.get("seq_idx")))
        return function(*args, **kwargs)

    monkeypatch.setattr(sys.modules[module], name, run)
    return calls


@pytest.mark.parametrize("checkpointing", [False] if INTERPRETED else [False, True])
def test_training_equals_the_documents_alone(
    model_type: str, checkpointing: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With `training` mamba_ssm calls causal_conv1d, which no interpreter runs.
    training = not (INTERPRETED and TYPES[model_type][0] == _MAMBA)
    model = _model(model_type, torch.float32, device).train(training)
    docs = [d.to(device) for d in documents(lengths=LENGTHS)]
    loss = token_mean(model, docs)
    loss.backward()
    want = gradients(model)
    patch_model(model)
    model.zero_grad()
    batch = packed(docs)
    assert reason_against(model, batch["layout"]) is None
    calls = _counted(model_type, monkeypatch)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got = model(**batch).loss
    got.backward()
    difference = relative(gradients(model), want)
    print(f"\n{model_type}: loss {float(got - loss):.1e}, gradients {difference:.1e}")
    assert abs(float(got - loss)) <= 1e-3 * float(loss)
    assert difference <= (5e-2 if model_type in ROUTED else 1e-2)
    if TYPES[model_type][1]:
        # Mamba's one fused kernel runs in training where causal_conv1d is there too.
        fused = TYPES[model_type][0] == _MAMBA and find_spec("causal_conv1d") is not None
        mixers = sum(isinstance(vars(m).get("forward"), MixerForward) for m in model.modules())
        assert len(calls) == (0 if fused else mixers * (1 + checkpointing))
        assert all(boundaries is not None for boundaries in calls)


@pytest.mark.parametrize(
    "dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
)
def test_logits_and_isolation(
    model_type: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(model_type, dtype, device)
    docs = [d.to(device) for d in documents(lengths=LENGTHS)]
    want = alone(model, docs).float()
    patch_model(model)
    batch = packed(docs)
    assert reason_against(model, batch["layout"]) is None
    calls = _counted(model_type, monkeypatch)
    with torch.no_grad():
        got = model(**batch).logits[0].float()
    assert bool(calls) == bool(TYPES[model_type][1])
    error = (got - want).norm(dim=-1) / want.norm(dim=-1).mean()
    print(
        f"\n{model_type} {dtype}: median {float(error.median()):.1e}, max {float(error.max()):.1e}"
    )
    bound = 2.0**-10 if dtype == torch.float32 else 2.0**-5
    assert float(error.median()) <= bound
    if model_type not in ROUTED:
        assert float(error.max()) <= 4 * bound
    _assert_isolated(model, batch, routed=model_type in ROUTED)


def _assert_isolated(model: nn.Module, batch: dict[str, Any], *, routed: bool) -> None:
    """Other tokens in the longest document change no bit of the others, nor does a gradient reach
    them. Experts compute in groups that depend on all tokens: there only most bits stay."""
    start = LENGTHS[0] + LENGTHS[1]
    place = slice(start, start + LENGTHS[2])
    ids = batch["input_ids"].clone()
    ids[0, place] = 3 + (ids[0, place] - 2) % 147
    with torch.no_grad():
        moved = _rows(model(**{**batch, "input_ids": ids}).logits - model(**batch).logits)
    assert moved[place].min() > 0, "a document does not see itself"
    moved[place] = 0
    unmoved = float((moved == 0).float().mean())
    assert unmoved > 0.9 if routed else unmoved == 1, f"{int((moved > 0).sum())} tokens moved"
    leak = leaks_between_documents(model)
    assert leak is None, str(leak)


def _rows(logits: Tensor) -> Tensor:
    return logits[0].abs().amax(-1)


def test_a_nan_stays_in_its_document(model_type: str, device: str) -> None:
    """With cu_seqlens each document is computed by itself; inside it a chunk's NaN reaches back."""
    if TYPES[model_type][0] == _MAMBA:
        pytest.skip("mamba_ssm's kernels hide other documents by a product with 0")
    model = patch_model(_model(model_type, torch.float32, device))
    layout = DocumentLayout.from_lengths(LENGTHS).to(device)
    assert reason_against(model, layout) is None
    mixer = next(m for m in model.modules() if isinstance(vars(m).get("forward"), MixerForward))
    hidden_states = torch.randn(1, sum(LENGTHS), 64, device=device)
    start = LENGTHS[0] + LENGTHS[1]
    hidden_states[0, start + 4] = torch.nan
    with torch.no_grad():
        finite = mixer(hidden_states=hidden_states, layout=layout)[0].isfinite().all(-1)
    assert finite[:start].all()
    assert finite[start + LENGTHS[2] :].all()
    assert not finite[start + 4]


def test_the_types_are_among_the_fast_ones() -> None:
    assert FAST_TYPES.issuperset(TYPES)
