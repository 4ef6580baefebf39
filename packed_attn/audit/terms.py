"""Terms of a model that mix documents by design: named beside the verdict, never hidden."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packed_attn.audit.conventions import CONVENTIONS
from packed_attn.audit.subject import Subject, kwargs_alone


def mixing_terms(subject: Subject) -> list[str]:
    """A sentence for each term, with what it measures on the audit's documents.

    A router's load-balancing loss is a mean over all tokens of a batch, so it is not the mean of
    the documents' own; tokens over an expert's capacity are dropped, and which ones depends on
    every token before them. The first leaves logits alone; the checks see the second.
    """
    if subject.terms is None:
        subject.terms = [*_balancing(subject), *_capacity(subject)]
    return subject.terms


def _balancing(subject: Subject) -> list[str]:
    """The router's auxiliary loss, packed and as the mean of the documents alone."""
    config = _text_config(subject)
    if not _has_router(subject, config):
        return []
    name = "packed batch" if subject.patched else "position_ids, no cache"
    batch = subject.batch(subject.documents, CONVENTIONS[name])
    try:
        packed = _aux_loss(subject, batch.kwargs)
        alone = [_aux_loss(subject, kwargs_alone(d)) for d in subject.documents]
    except Exception as error:  # named, whatever the model says
        return [f"its router's loss was not measured: {type(error).__name__}: {error}"]
    if packed is None or any(x is None for x in alone):
        return []
    shapes = [kwargs_alone(d)["input_ids"].shape for d in subject.documents]
    lengths = torch.tensor([float(tokens) for _, tokens in shapes])
    mean = float((torch.tensor(alone) * lengths).sum() / lengths.sum())
    coefficient = getattr(config, "router_aux_loss_coef", None)
    return [
        "aux_loss, the router's load-balancing loss, mixes documents by design: it is taken over "
        f"all tokens of a batch ({packed:.4g} packed, {mean:.4g} as the mean of the documents "
        f"alone; router_aux_loss_coef={coefficient}, part of the loss where "
        "output_router_logits=True)"
    ]


def _capacity(subject: Subject) -> list[str]:
    config = _text_config(subject)
    return [
        f"{name}={value}: tokens over an expert's capacity are dropped, and which ones depends on "
        "the other documents of the batch, by design"
        for name, value in (vars(config) if config is not None else {}).items()
        if "capacity" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _has_router(subject: Subject, config: Any) -> bool:
    named = "output_router_logits" in inspect.signature(subject.model.forward).parameters
    return named or hasattr(config, "output_router_logits")


def _aux_loss(subject: Subject, kwargs: Mapping[str, Any]) -> float | None:
    value = getattr(subject.model(**kwargs, output_router_logits=True), "aux_loss", None)
    return float(value) if isinstance(value, Tensor) else None


def _text_config(subject: Subject) -> Any:
    config: Any = getattr(subject.model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
