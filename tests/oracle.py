"""What every backend must hold, against a float64 oracle: exact, isolated, confined.

Three assertions, each for a named backend, a case and a device:

    assert_exact      out and lse within twice, gradients within three times what plain torch at
                      the same precision is off by, plus one rounding
    assert_isolated   other documents' content changes no bit; no gradient reaches them
    assert_confined   NaN and Inf stay in the document that has them
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from packed_attn import DocumentLayout, attention, backends, dropout
from packed_attn.request import AttentionRequest, checked_request
from tests.cases import Case, Inputs


@dataclass(frozen=True, eq=False)
class Results:
    """Forward and backward of one call. Shapes as in `attention` and `Inputs`."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor]  # of q, k, v and, where there are any, sinks


def assert_exact(backend: str, case: Case, device: str) -> None:
    """Forward and gradients agree with float64."""
    got = _clean(backend, case, device)
    plain = _clean("reference", case, device)
    exact = _oracle(case, device)
    inputs = case.inputs(device=device)
    assert got.out.dtype == inputs.q.dtype
    assert got.lse.dtype == torch.promote_types(inputs.q.dtype, torch.float32)

    _assert_close("out", got.out, plain.out, exact.out, factor=2)
    blind = exact.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, blind), "lse is -inf where nothing is seen"
    _assert_close(
        "lse",
        got.lse.masked_fill(blind, 0),
        plain.lse.masked_fill(blind, 0),
        exact.lse.masked_fill(blind, 0),
        factor=2,
    )
    assert got.grads.keys() == exact.grads.keys()
    roundings = _roundings(case, device)
    for name, gradient in got.grads.items():
        _assert_close(
            f"gradient of {name}",
            gradient,
            plain.grads[name],
            exact.grads[name],
            factor=3,
            rounding=roundings[name],
        )


def assert_isolated(backend: str, case: Case, device: str) -> None:
    """Another document's content changes no bit, and no gradient reaches another document."""
    clean = _clean(backend, case, device)
    documents = _Documents(case, device)
    inputs = case.inputs(device=device)
    fresh = case.inputs(seed=1, device=device)
    for document in documents.to_change():
        queries, keys = documents.tokens([document])
        changed = replace(
            inputs,
            q=_mixed(inputs.q, fresh.q, queries),
            k=_mixed(inputs.k, fresh.k, keys),
            v=_mixed(inputs.v, fresh.v, keys),
            grad_out=_mixed(inputs.grad_out, fresh.grad_out, queries),
        )
        others = documents.unrelated([document])
        _assert_same_bits(run(backend, case, changed, device), clean, documents.tokens(others))

        only = torch.zeros_like(inputs.grad_out)
        alone = replace(inputs, grad_out=_mixed(only, inputs.grad_out, queries), grad_lse=None)
        grads = run(backend, case, alone, device).grads
        other_queries, other_keys = documents.tokens(others)
        for name, rows in (("q", other_queries), ("k", other_keys), ("v", other_keys)):
            assert not grads[name][rows].any(), (
                f"the loss of document {document} has a gradient in {name} of another"
            )


def assert_confined(backend: str, case: Case, device: str) -> None:
    """NaN and Inf in q, k, v or the gradient of out stay in their document, and show up there."""
    clean = _clean(backend, case, device, confine_nonfinite=True)
    documents = _Documents(case, device)
    poisoned = documents.to_poison()
    kinds = ("q", "k", "v", "grad_out")
    # Rounds, until every kind has had its document; padding is poisoned in all of them.
    for first in range(0, len(kinds), len(poisoned) or len(kinds)):
        inputs = case.inputs(device=device)
        spots: list[tuple[str, int]] = []
        for n, document in enumerate(poisoned, start=first):
            kind = kinds[n % len(kinds)]
            token = documents.middle(document, kind)
            if token is not None:
                value = (torch.nan, torch.inf, -torch.inf)[n % 3]
                inputs = replace(inputs, **{kind: _with_value(getattr(inputs, kind), token, value)})
                spots.append((kind, token))
        inputs = _with_poisoned_padding(inputs, documents)
        got = run(backend, case, inputs, device, confine_nonfinite=True)
        clean_tokens = documents.tokens(documents.unrelated(poisoned))
        _assert_same_bits(got, clean, clean_tokens)
        for spot in spots:
            _assert_shows(got, documents, *spot)


def assert_refused(backend: str, case: Case, device: str, **flags: bool) -> None:
    """The named backend raises with each of its reasons, and nothing runs in its place."""
    reasons = reasons_against(backend, case, device, **flags)
    with pytest.raises(NotImplementedError) as raised:
        run(backend, case, case.inputs(device=device), device, **flags)
    for part in (repr(backend), *reasons):
        assert part in str(raised.value)


def documents_to_isolate(case: Case) -> list[int]:
    """Documents whose content can be changed while another one is watched."""
    return _Documents(case, "cpu").to_change()


def reasons_against(backend: str, case: Case, device: str, **flags: bool) -> list[str]:
    """Why this backend cannot run the case; empty when it can."""
    return backends.load(backend).reasons_against(_request(case, device, **flags))


def run(
    backend: str, case: Case, inputs: Inputs, device: str, *, confine_nonfinite: bool = False
) -> Results:
    """Forward and backward, with fresh memory poisoned so that nothing is left unwritten."""
    leaves = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    with _uninitialized_memory_is_nan():
        out, lse = attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            case.layout(device),
            key_layout=case.key_layout(device),
            sinks=leaves.get("sinks"),
            dropout_seed=case.dropout_seed(device),
            backend=backend,
            return_lse=True,
            confine_nonfinite=confine_nonfinite,
            **inputs.kwargs(),
            **case.kwargs(),
        )
        outputs, grads = [out], [inputs.grad_out]
        if inputs.grad_lse is not None:
            outputs.append(lse)
            grads.append(inputs.grad_lse)
        # Raises where an input got no gradient: 0 is asked for, not None.
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return Results(out.detach(), lse.detach(), dict(zip(leaves, gradients)))


@lru_cache(maxsize=8)
def _clean(backend: str, case: Case, device: str, confine_nonfinite: bool = False) -> Results:
    inputs = case.inputs(device=device)
    return run(backend, case, inputs, device, confine_nonfinite=confine_nonfinite)


@lru_cache(maxsize=8)
def _oracle(case: Case, device: str) -> Results:
    """The specification in float64."""
    inputs = case.inputs(dtype=torch.float64, device=device)
    sinks = None if inputs.sinks is None else inputs.sinks.double()
    return run("reference", case, replace(inputs, sinks=sinks), device)


def _request(case: Case, device: str, *, confine_nonfinite: bool = False) -> AttentionRequest:
    inputs = case.inputs(device=device)
    return checked_request(
        inputs.q,
        inputs.k,
        inputs.v,
        case.layout(device),
        key_layout=case.key_layout(device),
        sinks=inputs.sinks,
        dropout_seed=case.dropout_seed(device),
        deterministic=False,
        return_lse=True,
        confine_nonfinite=confine_nonfinite,
        **inputs.kwargs(),
        **case.kwargs(),
    )


def _assert_close(
    name: str,
    got: Tensor,
    plain: Tensor,
    exact: Tensor,
    factor: float,
    rounding: Tensor | None = None,
) -> None:
    """error <= factor * (error of plain torch + one rounding), at the worst element and on average.

    Args:
        got, plain: the backend's result, and the reference's at the same precision.
        exact: the reference's in float64.
        rounding: size of one rounding, by element; that of the result by default.
    """
    assert got.shape == exact.shape, f"{name} has shape {list(got.shape)}"
    assert got.dtype == plain.dtype, f"{name} is {got.dtype}"
    if exact.numel() == 0:
        return
    if rounding is None:
        rounding = torch.finfo(plain.dtype).eps * exact
    for kind, norm in (("largest", _largest), ("rms", _rms)):
        allowed = factor * (norm(plain.double() - exact) + norm(rounding))
        error = norm(got.double() - exact)
        assert error <= allowed, f"{name}: {kind} error {error:.3g} is over {allowed:.3g}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@lru_cache(maxsize=8)
def _roundings(case: Case, device: str) -> dict[str, Tensor]:
    """Size of one rounding in the case's dtype for each gradient, by element, float64.

    Every kernel that does not keep the weights P computes dS = P * (dP - delta) with
    delta = rowsum(grad_out * out) from the rounded out, where plain torch has delta from dP
    itself: exactly dP where one key is seen. So one rounding of delta's terms is counted too: in
    dq it is scale * delta * (P @ k), in dk scale * P^T @ (delta * q), and it is all there is in
    the gradient of a sink, which is -P * delta summed.
    """
    exact, inputs = _oracle(case, device), case.inputs(dtype=torch.float64, device=device)
    eps = torch.finfo(case.dtype).eps
    if case.heavy_tailed:
        # Recomputed scores are off by eps * |score|, and the weights by as much relatively.
        seen = exact.lse[exact.lse.isfinite()]
        eps *= 1.0 + seen.abs().max().item()
    scale = case.softmax_scale or case.head_dim**-0.5
    delta = scale * (inputs.grad_out * exact.out).abs().sum(-1, keepdim=True)
    weighted = run(
        "reference",
        replace(case, dropout_p=0.0),  # delta is multiplied by the weights before dropout
        replace(inputs, v=inputs.k, grad_out=delta * inputs.q, grad_lse=None),
        device,
    )
    sizes = {
        "q": exact.grads["q"].abs() + (delta * weighted.out).abs(),
        "k": exact.grads["k"].abs() + weighted.grads["v"].abs(),
        "v": exact.grads["v"],
    }
    if "sinks" in exact.grads:
        sizes["sinks"] = exact.grads["sinks"]
    return {name: eps * size for name, size in sizes.items()}


def _assert_same_bits(got: Results, clean: Results, tokens: tuple[Tensor, Tensor]) -> None:
    queries, keys = tokens
    assert torch.equal(got.out[queries], clean.out[queries]), "out of another document changed"
    assert torch.equal(got.lse[:, queries], clean.lse[:, queries]), "lse of another one changed"
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        same = torch.equal(got.grads[name][rows], clean.grads[name][rows])
        assert same, f"the gradient of {name} in another document changed"


def _assert_shows(got: Results, documents: _Documents, kind: str, token: int) -> None:
    """A poisoned value or gradient is not swallowed: what it is summed into is not finite. Weights
    that dropout takes out need not carry it."""
    if kind == "v":
        hit, weights = got.out, documents.kept(keys=[token])[..., 0]
    elif kind == "grad_out":
        hit, weights = got.grads["v"], documents.kept(queries=[token])[:, 0]
    else:
        # An infinite score is a weight of 0 or 1, finite and right; and torch's fused CPU
        # attention, alone on one document too, turns a row of NaN scores into zeros.
        return
    # Query heads on the way to the heads of `hit`.
    weights = weights.unflatten(0, (hit.shape[1], -1)).any(1).t()
    assert not hit.isfinite().all(dim=-1)[weights].any(), f"a poisoned {kind} does not show"


class _Documents:
    """Which tokens belong to which document, and which documents may depend on each other."""

    def __init__(self, case: Case, device: str) -> None:
        self.device = device
        self.queries: DocumentLayout = case.layout()
        self.keys: DocumentLayout = case.key_layout() or self.queries
        self.padding = case.padding or (False,) * len(case.lengths)
        self.case = case

    @cached_property
    def visible(self) -> Tensor:
        """bool `[total_queries, total_keys]`."""
        request = _request(self.case, "cpu")
        seen = request.visibility().dense()
        if request.key_indices is not None:
            keys = torch.arange(seen.shape[1])
            seen = seen & (request.key_indices[..., None] == keys).any(1)
        return seen.to(self.device)

    def kept(
        self,
        queries: Sequence[int] | slice = slice(None),
        keys: Sequence[int] | slice = slice(None),
    ) -> Tensor:
        """bool `[num_heads, queries, keys]`: weights that are seen and not dropped."""
        seen = self.visible[queries][:, keys]
        seed = self.case.dropout_seed(self.device)
        if seed is None:
            return seen.expand(self.case.num_heads, *seen.shape)
        i, j, h = (
            torch.arange(n, device=self.device) for n in (*self.visible.shape, self.case.num_heads)
        )
        i, j = i[queries][:, None], j[keys][None, :]
        return seen & dropout.keep(seed, i, j, h[:, None, None], self.case.dropout_p)

    def unrelated(self, documents: list[int]) -> list[int]:
        """Documents that neither continue one of `documents` nor are continued by one."""
        paths = [set(self.queries.path(d)) for d in range(self.queries.num_documents)]
        return [
            d
            for d in range(self.queries.num_documents)
            if not any(d in paths[a] or a in paths[d] for a in documents)
        ]

    def filled(self, documents: list[int] | None = None) -> list[int]:
        """Documents that have a token on some side."""
        documents = list(range(self.queries.num_documents)) if documents is None else documents
        return [d for d in documents if self.queries.lengths[d] + self.keys.lengths[d] > 0]

    def to_change(self) -> list[int]:
        """One document in the middle, and one of padding: each with others to leave alone."""
        able = [d for d in self.filled() if self.filled(self.unrelated([d]))]
        return [*able[len(able) // 2 :][:1], *[d for d in able if self.padding[d]][:1]]

    def to_poison(self) -> list[int]:
        """About every third document; some others stay clean."""
        poisoned: list[int] = []
        for d in self.filled():
            rest = self.filled(self.unrelated([*poisoned, d]))
            room = 3 * len(poisoned) <= d
            if rest and room and not self.padding[d]:
                poisoned.append(d)
        return poisoned

    def tokens(self, documents: list[int]) -> tuple[Tensor, Tensor]:
        """bool `[total_queries]` and `[total_keys]`."""
        wanted = torch.zeros(self.queries.num_documents, dtype=torch.bool)
        wanted[documents] = True
        queries, keys = self.queries.per_token(wanted), self.keys.per_token(wanted)
        return queries.to(self.device), keys.to(self.device)

    def middle(self, document: int, kind: str) -> int | None:
        """The middle token of a document on the side of `kind`; None when it is empty there."""
        side = self.keys if kind in ("k", "v") else self.queries
        length = side.lengths[document]
        return side.starts[document] + length // 2 if length else None


def _mixed(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """y in `rows`, else x; strides are x's."""
    mixed = torch.empty_like(x)
    mixed.copy_(torch.where(rows[:, None, None], y, x))
    return mixed


def _with_value(x: Tensor, token: int, value: float) -> Tensor:
    x = x.clone()
    x[token, :, 0] = value
    return x


def _with_poisoned_padding(inputs: Inputs, documents: _Documents) -> Inputs:
    """Whatever padding holds, its output and gradients are 0."""
    queries, keys = documents.tokens([d for d, is_pad in enumerate(documents.padding) if is_pad])

    def filled(x: Tensor, rows: Tensor) -> Tensor:
        return x.masked_fill(rows[:, None, None], torch.nan)

    return replace(
        inputs,
        q=filled(inputs.q, queries),
        k=filled(inputs.k, keys),
        v=filled(inputs.v, keys),
        grad_out=filled(inputs.grad_out, queries),
    )


@contextmanager
def _uninitialized_memory_is_nan() -> Iterator[None]:
    """torch.empty gives NaN: a result that nobody wrote is seen."""
    before: dict[str, Any] = {
        "mode": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(**before)
