"""What each attention backend can do on this machine, and why not, found by asking and by running.

The request that is asked about is that of a Llama 3 8B layer in training: bfloat16, causal, 32
query heads over 8 of k and v, head_dim 128, forward and backward, on a pack of a few tokens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packed_attn.backends import BACKENDS, load
from packed_attn.errors import first_line
from packed_attn.facts import machine_facts
from packed_attn.layout import DocumentLayout
from packed_attn.request import AttentionRequest, checked_request

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "trl",
    "peft",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "flash-linear-attention",
    "mamba-ssm",
    "causal-conv1d",
    "liger-kernel",
)
LENGTHS = (9, 1, 6)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
# Sixteen roundings of bfloat16: kernels sum in other orders, and a wrong mask is off by far more.
LARGEST_ERROR = 2.0**-4


@dataclass(frozen=True)
class Verdict:
    """One backend on this machine.

    Attributes:
        reasons: against the typical request; empty where it can be run.
        failure: what went wrong when it was run all the same, or None.
        error: largest difference from the reference over the reference's largest value, out and
            gradients; None where it was not run.
        features: those that add no reason of their own, so what the backend has where it can run.
    """

    name: str
    reasons: tuple[str, ...]
    failure: str | None
    error: float | None
    features: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether it can run the typical request, and did if it was tried."""
        return not self.reasons and self.failure is None


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. `findings` are things to mend; `notes` are not."""

    machine: dict[str, str]
    device: str
    verdicts: tuple[Verdict, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def auto(self) -> str:
        """The backend that `backend="auto"` takes for the typical request."""
        return next(v.name for v in self.verdicts if not v.reasons)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "auto": self.auto, "feature_names": list(FEATURES)}


def examine(*, run: bool = True) -> Diagnosis:
    """Asks every backend about the typical request and each feature on top of it.

    Args:
        run: also run those that can, forward and backward, and compare them with the reference.
            On a GPU this compiles kernels, which takes up to a minute.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = _gpu_facts()
    findings, notes = gpu_findings(gpu)
    verdicts = tuple(_verdict(name, device, run) for name in BACKENDS)
    findings += [f"{v.name} can run here but {v.failure}" for v in verdicts if v.failure]
    if device == "cuda" and not any(v.works for v in verdicts if v.name != "reference"):
        findings.append("no backend but the reference runs on this GPU")
    facts = machine_facts(*PACKAGES)
    return Diagnosis(facts | gpu.described(), device, verdicts, tuple(findings), tuple(notes))


@dataclass(frozen=True)
class Gpu:
    """What torch and the system say about a GPU."""

    usable: bool
    torch_version: str
    cuda_of_torch: str | None
    hip_of_torch: str | None
    driver: bool
    hidden_by: str | None
    error: str | None
    devices: tuple[str, ...]

    def described(self) -> dict[str, str]:
        """As facts of the machine."""
        return {
            "CUDA of torch": self.cuda_of_torch or "none",
            "NVIDIA driver": "found" if self.driver else "not found",
            **{f"cuda:{n}": device for n, device in enumerate(self.devices)},
        }


def gpu_findings(gpu: Gpu) -> tuple[list[str], list[str]]:
    """What to mend where torch finds no GPU, and what is only good to know."""
    if gpu.hip_of_torch is not None:
        return [], [f"this is torch for ROCm {gpu.hip_of_torch}: no kernel was matched to it"]
    if gpu.usable:
        return [], []
    if not gpu.driver:
        return [], [
            "no NVIDIA driver was found (no nvidia-smi, no /dev/nvidia0), so attention runs on "
            "the CPU; in a container, it must be started with its GPUs (docker run --gpus all)"
        ]
    if gpu.cuda_of_torch is None:
        return [
            f"there is an NVIDIA driver, but torch {gpu.torch_version} is built for the CPU: "
            "install a torch for CUDA (pytorch.org/get-started/locally)"
        ], []
    if gpu.hidden_by is not None:
        return [f"{gpu.hidden_by} hides every GPU from torch"], []
    return [f"there is an NVIDIA driver, but torch cannot use it: {gpu.error}"], []


def _gpu_facts() -> Gpu:
    usable = torch.cuda.is_available()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and visible.strip() in ("", "-1")
    return Gpu(
        usable,
        torch.__version__,
        torch.version.cuda,
        torch.version.hip,
        shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists(),
        f"CUDA_VISIBLE_DEVICES={visible!r}" if hidden else None,
        None if usable else _cuda_error(),
        tuple(_described(n) for n in range(torch.cuda.device_count())) if usable else (),
    )


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        return first_line(error)
    return "torch.cuda.is_available() is False, yet CUDA starts"


def _described(device: int) -> str:
    found = torch.cuda.get_device_properties(device)
    memory = found.total_memory / 2**30
    return f"{found.name}, compute capability {found.major}.{found.minor}, {memory:.0f} GiB"


def _verdict(name: str, device: str, run: bool) -> Verdict:
    backend = load(name)
    reasons = backend.reasons_against(_request(device))
    features = tuple(
        feature
        for feature, change in FEATURES.items()
        if set(backend.reasons_against(change(_request(device)))) <= set(reasons)
    )
    failure, error = None, None
    if run and not reasons:
        try:
            error = _error(name, device)
        except Exception as raised:  # whatever a kernel raises is what the user must see
            failure = f"fails: {type(raised).__name__}: {first_line(raised)}"
        else:
            if not error <= LARGEST_ERROR:
                failure = f"is wrong: off by {error:.1e} of the largest value"
    return Verdict(name, tuple(reasons), failure, error, features)


def _error(name: str, device: str) -> float:
    """Largest difference from the reference, of out and gradients, over its largest value."""
    got, want = _results(name, device), _results("reference", device)
    errors = [(g - w).abs().max() / w.abs().max() for g, w in zip(got, want)]
    return float(torch.stack(errors).max())  # which is NaN where one of them is


def _results(name: str, device: str) -> list[Tensor]:
    """out and the gradients of q, k and v, float32."""
    request = _request(device)
    leaves = [x.detach().requires_grad_() for x in (request.q, request.k, request.v)]
    q, k, v = leaves
    out, _ = load(name).run(replace(request, q=q, k=k, v=v))
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    return [x.detach().float() for x in (out, *grads)]


def _request(device: str) -> AttentionRequest:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(device, torch.bfloat16)

    return checked_request(
        draw(HEADS),
        draw(KV_HEADS),
        draw(KV_HEADS),
        DocumentLayout.from_lengths(LENGTHS, device=device),
        key_layout=None,
        causal=True,
        window_size=(-1, -1),
        chunk_size=None,
        prefix_lengths=None,
        softmax_scale=None,
        softcap=None,
        sinks=None,
        alibi_slopes=None,
        dropout_p=0.0,
        deterministic=False,
        return_lse=False,
        confine_nonfinite=False,
    )


def _per_head(request: AttentionRequest) -> Tensor:
    return torch.ones(request.num_heads, device=request.q.device)


def _seed(request: AttentionRequest) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=request.q.device)


def _forest(request: AttentionRequest) -> DocumentLayout:
    return DocumentLayout.from_lengths(LENGTHS, parents=(-1, 0, 0), device=request.q.device)


def _other_documents(request: AttentionRequest) -> DocumentLayout:
    return DocumentLayout.from_lengths(LENGTHS[::-1], device=request.q.device)


def _single(request: AttentionRequest) -> AttentionRequest:
    return replace(request, q=request.q.float(), k=request.k.float(), v=request.v.float())


# What a request may have on top of the typical one, in the order of the table's columns.
FEATURES: Mapping[str, Any] = {
    "window": lambda r: replace(r, window_size=(4, 0)),
    "chunk": lambda r: replace(r, chunk_size=4),
    "prefix": lambda r: replace(r, prefix_lengths=(2, 0, 1)),
    "forest": lambda r: replace(r, layout=_forest(r)),
    "cross": lambda r: replace(r, key_layout=_other_documents(r)),
    "softcap": lambda r: replace(r, softcap=30.0),
    "sinks": lambda r: replace(r, sinks=_per_head(r)),
    "ALiBi": lambda r: replace(r, alibi_slopes=_per_head(r)),
    "bias": lambda r: replace(r, bias=_per_head(r)[:, None]),
    "key sets": lambda r: replace(r, key_indices=r.layout.document_ids[:, None]),
    "dropout": lambda r: replace(r, dropout_p=0.1, dropout_seed=_seed(r)),
    "determ.": lambda r: replace(r, deterministic=True),
    "confine": lambda r: replace(r, confine_nonfinite=True),
    "fp32": _single,
}
