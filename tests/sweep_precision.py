"""The precision that a swept model runs in, and how near a pack has to be to its documents alone.

In float32 and wider a pack is held to the documents alone, within `LOGITS` and `GRADIENTS`. In half
precision, and under autocast, both are held to the documents alone in float32, whose own error is
thousands of times below a rounding of theirs: a pack may be no further off than `ROWS` and
`STEPS` times as far as its documents are alone, and a rounding.

A router's choice of experts is no continuous function: where two scores are within a rounding, a
document alone may be sent elsewhere than in float32, and a bound that allowed it would allow
anything. In half precision every token therefore goes to the experts of its id
(`HeldRouting`), by which scores it weighs them is the model's own.
"""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.audit.routing import HeldRouting

LOGITS = 1e-5  # relative to the largest logit, float32
GRADIENTS = 1e-4  # of a parameter, relative to the sum over the documents alone
ROWS, STEPS = 2, 3  # times the error of the documents alone: of outputs and losses, of gradients
# Types whose choice is not held: of their numbers in half precision nothing is said.
NOT_HELD = {"phimoe": "it chooses experts by a maximum and not by topk"}
WIDE = (torch.float32, torch.float64)
# Types whose out_proj PEFT refuses to adapt: kernels take its weight past its forward.
OUT_PROJ_REFUSED = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


@dataclass(frozen=True)
class Precision:
    """What a model's weights are in, what autocast computes in, if it is on, and whether it trains
    adapters (LoRA, in float32) on weights that are frozen."""

    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    lora: bool = False

    @property
    def computes(self) -> torch.dtype:
        return self.dtype if self.autocast is None else self.autocast

    @property
    def is_wide(self) -> bool:
        return self.computes in WIDE

    def loaded(self, model: Any) -> Any:
        """The model as `from_pretrained(dtype=...)` gives it, and under autocast in its calls."""
        if self.dtype != torch.float32:
            model = type(model).from_pretrained(
                None, config=model.config, state_dict=model.state_dict(), dtype=self.dtype
            )
        if self.lora:
            model = _adapted(model)
        if self.autocast is not None:
            calls = _Autocast(next(model.parameters()).device.type, self.autocast)
            model.register_forward_pre_hook(calls.enter, prepend=True)
            model.register_forward_hook(calls.leave, always_call=True)
        return model.eval()

    def in_float32(self, model: nn.Module) -> nn.Module:
        """A copy of a loaded model whose weights are the same numbers, without autocast."""
        exact = copy.deepcopy(model).float()
        exact._forward_pre_hooks.clear()
        exact._forward_hooks.clear()
        return exact

    def held(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Where the same experts serve a token in any precision, if there are any."""
        routing = HeldRouting(model)
        return routing if routing.experts and not self.is_wide else nullcontext()


FLOAT32 = Precision()


def _adapted(model: Any) -> Any:
    """With adapters on all linear layers that do something, and inputs that gradients reach through
    a checkpointed layer."""
    import peft

    refused = ["out_proj"] if model.config.model_type in OUT_PROJ_REFUSED else None
    config = peft.LoraConfig(target_modules="all-linear", exclude_modules=refused, r=4)
    adapted: Any = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    adapted.enable_input_require_grads()
    return adapted


class _Autocast:
    """Hooks between which a forward runs as under `with torch.autocast(...)`."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.entered: list[torch.autocast] = []

    def enter(self, *_: Any) -> None:
        self.entered.append(torch.autocast(self.device, self.dtype))
        self.entered[-1].__enter__()

    def leave(self, *_: Any) -> None:
        self.entered.pop().__exit__(None, None, None)


@dataclass(frozen=True)
class Alone:
    """What documents one by one give: outputs `[rows, width]`, the loss over all of them, and its
    gradients by parameter."""

    rows: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


class Expected:
    """What a pack has to give, and how nearly.

    Attributes:
        alone: what documents alone give, in the model's precision.
        exact: what they are compared with: the same in float32.
        scale: the largest output.
    """

    def __init__(self, precision: Precision, alone: Alone, exact: Alone) -> None:
        # An error that is not finite would allow any.
        for run in (exact, alone):
            if not all(map(_is_finite, (run.rows, run.loss, *run.gradients.values()))):
                raise RuntimeError("what documents alone give is not finite")
        self.alone, self.exact = alone, exact
        self.scale = _largest(exact.rows)
        self.wide = precision.is_wide
        self.rounding = torch.finfo(precision.computes).eps
        self.row_bound, self.loss_bound = LOGITS, LOGITS
        if not self.wide:
            error = _largest(alone.rows.float() - exact.rows) / self.scale
            self.row_bound = ROWS * (error + self.rounding)
            self.loss_bound = ROWS * (_apart(alone.loss, exact.loss) + self.rounding)

    @staticmethod
    def of(precision: Precision, model: nn.Module, run: Callable[[nn.Module], Alone]) -> Expected:
        """`run` gives what the documents alone do."""
        # Copied first: what some keep of a forward is part of a graph, and not to be copied.
        exact = None if precision.is_wide else precision.in_float32(model)
        alone = run(model)
        return Expected(precision, alone, alone if exact is None else run(exact))

    def outputs(self, got: Tensor, repeats: int = 1, keep: Any = ...) -> str:
        """The verdict on outputs of a pack, in `repeats` rows; `keep` are those that count."""
        if got.dtype != self.alone.rows.dtype:
            return f"outputs are {got.dtype} and not {self.alone.rows.dtype}"
        want = self.exact.rows.repeat(repeats, 1)
        if got.shape != want.shape:
            return f"outputs of shape {list(got.shape)} and not {list(want.shape)}"
        moved = (got.to(want.dtype) - want)[keep]
        return _within(_largest(moved) / self.scale, self.row_bound)

    def trained(self, loss: Tensor, gradients: Mapping[str, Tensor]) -> str:
        """The verdict on a step."""
        if loss.dtype != self.alone.loss.dtype:
            return f"the loss is {loss.dtype} and not {self.alone.loss.dtype}"
        if not _apart(loss, self.exact.loss) <= self.loss_bound:
            return f"loss differs: {float(loss):.7g} and not {float(self.exact.loss):.7g}"
        return self.of_gradients(gradients)

    def of_gradients(self, gradients: Mapping[str, Tensor]) -> str:
        """In half precision a parameter has the bound of the largest error alone of its kind in
        any layer, or of the median parameter's where that is less: one sum may be near by chance.
        """
        found = _relative(gradients, self.exact.gradients)
        if self.wide:
            return _within(max(found.values()), GRADIENTS)
        errors = _relative(self.alone.gradients, self.exact.gradients)
        usual = statistics.median(errors.values())
        largest = dict.fromkeys(map(_kind, errors), usual)
        for name, error in errors.items():
            largest[_kind(name)] = max(largest[_kind(name)], error)
        for name, error in found.items():
            bound = STEPS * (largest[_kind(name)] + self.rounding)
            if not error <= bound:
                return f"gradient of {name} differs by {error:.1e} (bound {bound:.1e})"
        return "exact"


def is_of_rounding(verdict: str) -> bool:
    """Whether a verdict is of a number that passed its bound, finite, and of nothing else."""
    return "differs" in verdict and "inf" not in verdict and "nan" not in verdict


def _kind(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return re.sub(r"\d+", "", name)


def _apart(got: Tensor, want: Tensor) -> float:
    return abs(float(got.detach()) - float(want)) / abs(float(want))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _relative(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each parameter's gradient.

    A gradient that is nothing but rounding (a thousandth of the largest) is measured by that.
    """
    floor = 1e-3 * max(float(w.double().norm()) for w in want.values())
    zero = torch.zeros(())
    return {
        n: float((got.get(n, zero).double() - want.get(n, zero).double()).norm())
        / max(float(want.get(n, zero).norm()), floor)
        for n in got.keys() | want.keys()
    }


def _within(error: float, bound: float) -> str:
    return "exact" if error <= bound else f"differs by {error:.1e} (bound {bound:.1e})"


def _is_finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def _largest(x: Tensor) -> float:
    """The largest magnitude; a NaN counts as infinite."""
    return float(torch.nan_to_num(x.abs(), nan=torch.inf).max()) if x.numel() else 0.0
