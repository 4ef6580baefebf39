"""The proof of a token mixer's packed forward, on the device at hand, before it is used there.

A copy of the mixer with random weights of the same shapes runs two rows of a few documents, packed
and one by one as transformers runs it: (1) outputs and gradients, of inputs and weights, agree;
(2) other tokens in one document change no bit of the others; (3) the gradient of one document's
outputs in the others is exactly 0; (4) the mixer does mix tokens inside a document, or (2) and (3)
would prove nothing. A copy, because weights may be sharded or on their way; small, because it
happens inside a training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from packed_attn.layout import DocumentLayout

# Two rows of 80: single tokens, and documents that end inside a kernel's chunk of 64 or pass one.
LENGTHS = (5, 1, 70, 4, 67, 1, 12)
ROWS = 2
# The document whose tokens change.
CHANGED = 2

# Relative errors that rounding explains: kernels sum in another order, and multiply float32 in tf32
# on a GPU. A lost boundary is off by a good part of the whole, and (2) and (3) find a single bit.
BOUNDS = {torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
_FLOAT32_ON_GPU, _FLOAT32 = 2.0**-7, 2.0**-14

# What was found, by class, device, dtypes and shapes: facts about this machine, not about a model.
_found: dict[Any, str | None] = {}

WithLayout = Callable[[Callable[..., Any], DocumentLayout], Callable[..., Any]]


def proven(
    mixer: nn.Module, hidden_size: int, device: torch.device, with_boundaries: WithLayout
) -> str | None:
    """None where the mixer's packed forward equals its documents alone, otherwise what does not.

    Args:
        hidden_size: of the hidden states that it takes.
        with_boundaries: (forward, layout) -> the forward that takes the layout.
    """
    shapes = tuple((n, p.dtype, tuple(p.shape)) for n, p in mixer.named_parameters())
    key = type(mixer), circumstances(mixer, device), shapes
    if key not in _found:
        name = type(mixer).__name__
        try:
            failure = _failure(mixer, hidden_size, device, with_boundaries)
        except Exception as error:
            failure = f"raises {type(error).__name__}: {error}"
        _found[key] = None if failure is None else f"with boundaries {name} {failure}"
    return _found[key]


def circumstances(mixer: nn.Module, device: torch.device) -> Any:
    """What a proof depends on besides the mixer's class and shapes."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return device, autocast, mixer.training


def _failure(
    mixer: nn.Module, hidden_size: int, device: torch.device, with_boundaries: WithLayout
) -> str | None:
    with torch.inference_mode(False), torch.enable_grad():
        generator = torch.Generator(device).manual_seed(0)
        twin, layout = _twin(mixer, generator), DocumentLayout.from_lengths(LENGTHS).to(device)
        stock: Callable[..., Tensor] = type(mixer).forward
        packed = with_boundaries(stock, layout)
        x = _random((layout.total_tokens, hidden_size), _dtype(twin), generator)
        x.requires_grad_()
        weights = list(twin.parameters())

        def run(x: Tensor) -> Tensor:
            return packed(twin, x.unflatten(0, (ROWS, -1))).flatten(0, 1)

        parts = x.split(LENGTHS)
        want = torch.cat([stock(twin, part[None])[0] for part in parts])
        got = run(x)
        direction = _random(tuple(got.shape), got.dtype, generator)
        found, alone = (_gradients(y, direction, [x, *weights]) for y in (got, want))
        for name, error in {
            "outputs": _error([got.detach()], [want.detach()]),
            "gradients": _error(found, alone),
        }.items():
            if not error <= _bound(got):
                return f"has {name} that differ from documents alone by {error:.1e}"
        return _mixing(run, x, direction)


def _mixing(run: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> str | None:
    """Whether one document changes another, or nothing changes at all."""
    start = sum(LENGTHS[:CHANGED])
    place = slice(start, start + LENGTHS[CHANGED])
    last = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    last[place.stop - 1] = True
    inside = torch.zeros_like(last)
    inside[place] = True
    with torch.no_grad():
        changed = x.clone()
        changed[place.start : place.stop - 1] = x[place.start : place.stop - 1].flip(0)
        moved = (run(changed) != run(x)).any(-1)
    if bool((moved & ~inside).any()):
        return "lets a document change others"
    if not bool((moved & last).any()):
        return "shows no document changing its own last token"
    for of in (inside, ~inside):
        out = run(x)[of]
        (gradient,) = torch.autograd.grad((out * direction[of]).sum(), x)
        if bool((gradient[~of] != 0).any()):
            return "lets a document's gradient reach others"
    return None


def _twin(mixer: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy on the generator's device with random weights of the same shapes and no dropout."""
    memo: dict[int, Any] = {}
    for parameter in mixer.parameters():
        if not parameter.is_floating_point():
            raise TypeError(f"its weights are stored as {parameter.dtype}")
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        drawn = _random(tuple(parameter.shape), parameter.dtype, generator) * scale
        memo[id(parameter)] = nn.Parameter(drawn)
    for buffer in mixer.buffers():
        memo[id(buffer)] = buffer.detach().to(generator.device, copy=True)
    twin = copy.deepcopy(mixer, memo)
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return twin


def _gradients(out: Tensor, direction: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the inputs that the output depends on."""
    loss = (out * direction).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
    return [g for g in found if g is not None]


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error of one of them; infinite where one has a gradient alone.

    A gradient that is nearly 0 beside the others is a difference of large numbers.
    """
    if len(got) != len(want):
        return float("inf")
    norms = torch.stack([x.float().norm() for x in want])
    errors = torch.stack([(a.float() - b.float()).norm() for a, b in zip(got, want)])
    return float((errors / (norms + 0.01 * norms.max())).max())


def _dtype(mixer: nn.Module) -> torch.dtype:
    return next(m.weight.dtype for m in mixer.modules() if isinstance(m, nn.Linear))


def _bound(x: Tensor) -> float:
    return BOUNDS.get(x.dtype, _FLOAT32_ON_GPU if x.is_cuda else _FLOAT32)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
