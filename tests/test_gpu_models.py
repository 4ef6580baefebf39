"""Patched models on a GPU: exact by every convention in float32, no worse than stock in bfloat16.

One tiny type stands for each kind of attention and each kind of mixer. Documents alone run on the
same GPU, so that packed and alone differ in rounding only.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packed_attn_patches import route_of
from packed_attn_patches.families import Route
from packed_attn_patches.fast_mixers import reason_against
from packed_attn_patches.tiny import tiny_model
from torch import Tensor, nn

from packed_attn import patch_model
from packed_attn.backends import BACKENDS, load
from tests.exactness import alone, documents, packed, token_mean
from tests.sweep import HEADS, LENGTHS, sweep_type

pytestmark = pytest.mark.gpu

# The backend that runs on a GPU wherever attention takes the layout.
KERNELS = "triton"
# Of 5.17 on: what is special about each is in another place.
CAUSAL = (
    "bamba",
    "bloom",
    "deepseek_v3",
    "deepseek_v32",
    "falcon",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "jamba",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "mixtral",
    "olmo3",
    "opt",
    "phi3",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
)
TYPES = (
    *(("causal", model_type) for model_type in CAUSAL),
    ("masked", "bert"),
    ("masked", "modernbert"),
    ("sequence", "llama"),
    ("seq2seq", "t5"),
)
# Which expert a token goes to is a matter of rounding in half precision.
ROUTED = frozenset(
    {
        "deepseek_v3",
        "deepseek_v32",
        "gpt_oss",
        "jamba",
        "llama4_text",
        "mixtral",
        "qwen3_moe",
        "qwen3_next",
    }
)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN multiplies convolutions of float32 in tf32 by default, which is no float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the backends that ran."""
    names: set[str] = set()
    for name in BACKENDS:
        backend: Any = load(name)

        def run(request: Any, name: str = name, run: Any = backend.run) -> Any:
            names.add(name)
            return run(request)

        monkeypatch.setattr(backend, "run", run)
    return names


def implementation(model_type: str) -> str | None:
    """transformers 5.17 takes sdpa for gemma2, which leaves its softcap out."""
    return "eager" if model_type == "gemma2" else None


@pytest.mark.parametrize(("head", "model_type"), TYPES)
def test_exact_under_every_convention(
    head: str, model_type: str, device: str, ran: set[str]
) -> None:
    outcome = sweep_type(
        head, model_type, device=device, attn_implementation=implementation(model_type)
    )
    assert outcome.status == "exact", outcome
    # Attention that takes the layout is the kernels' work on a GPU, and nothing else's.
    assert ran == ({KERNELS} if outcome.route in ("interface", "fast_mixers") else set())


@pytest.mark.parametrize("model_type", CAUSAL)
def test_bfloat16(model_type: str, device: str, ran: set[str]) -> None:
    """No further from float32 than documents alone are in bfloat16; loss and isolation likewise."""
    docs = [d.to(device) for d in documents(lengths=LENGTHS)]
    single = _model(model_type, torch.float32, device)
    half = _model(model_type, torch.bfloat16, device)
    half.load_state_dict(single.state_dict())
    want, stock = alone(single, docs), alone(half, docs).float()
    loss, stock_loss = (float(token_mean(model, docs)) for model in (single, half))
    patch_model(half)
    batch = packed(docs)
    with torch.no_grad():
        output = half(**batch)
    got = output.logits[0].float()
    assert got.isfinite().all()
    typical, largest = (x(_errors(got, want)) for x in (torch.median, torch.amax))
    bound, most = (x(_errors(stock, want)) for x in (torch.median, torch.amax))
    assert typical <= 2 * bound, f"typical error {typical:.1e}, of stock alone {bound:.1e}"
    if model_type not in ROUTED:
        assert largest <= 3 * most, f"largest error {largest:.1e}, of stock alone {most:.1e}"
        assert abs(float(output.loss) - loss) <= 2 * abs(stock_loss - loss) + 2**-7 * loss
    _assert_isolated(half, batch, routed=model_type in ROUTED)
    fast = reason_against(half, batch["layout"]) is None
    assert ran == ({KERNELS} if fast or route_of(half) is Route.INTERFACE else set())


def _model(model_type: str, dtype: torch.dtype, device: str) -> Any:
    model = tiny_model(
        model_type,
        auto_class=getattr(transformers, HEADS["causal"].auto_class),
        attn_implementation=implementation(model_type),
        dtype=dtype,
    )
    return model.to(device)


def _errors(got: Tensor, want: Tensor) -> Tensor:
    """Of each token, relative to the typical size of logits: `[tokens]`."""
    return (got - want).norm(dim=-1) / want.norm(dim=-1).mean()


def _assert_isolated(model: nn.Module, batch: dict[str, Any], *, routed: bool) -> None:
    """Other tokens in the longest document change no bit of the others, nor does their gradient
    reach it. Experts compute in groups that depend on all tokens: there only most bits stay."""
    start = LENGTHS[0] + LENGTHS[1]
    place = slice(start, start + LENGTHS[2])
    ids = batch["input_ids"].clone()
    ids[0, place] = 3 + (ids[0, place] - 2) % 147
    changed = {**batch, "input_ids": ids}
    with torch.no_grad():
        moved = (model(**changed).logits - model(**batch).logits)[0].abs().amax(-1)
    assert moved[place].min() > 0, "a document does not see itself"
    moved[place] = 0
    unmoved = (moved == 0).float().mean()
    assert unmoved > 0.9 if routed else unmoved == 1, f"{int((moved > 0).sum())} tokens moved"
    assert _largest_gradient(model, batch, place) == 0
    assert _largest_gradient(model, batch, slice(0, LENGTHS[0])) > 0


def _largest_gradient(model: Any, batch: dict[str, Any], place: slice) -> float:
    """Of the first document's outputs in the embeddings of the tokens at `place`.

    These tokens have ids of their own, so the gradient of the table's rows tells.
    """
    ids = batch["input_ids"] % 90 + 3
    ids[0, place] += 95
    table = model.get_input_embeddings().weight
    logits = model(**{**batch, "input_ids": ids, "labels": None}).logits[0, : LENGTHS[0]]
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), table)
    return float(gradient[98:].abs().max())
