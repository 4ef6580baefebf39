"""What may stand around a transformers model or in it: taken off, probed, or refused by name.

DistributedDataParallel, FSDP, torch.compile, PEFT adapters    the model inside is patched
fully_shard, accelerate's hooks, quantised layers              the model itself is patched
DataParallel, prompt and prefix tuning                         refused
code that is not transformers' own                             refused, or audited (`foreign.py`)
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

from packed_attn_patches.adapters import refuse_learned_tokens
from packed_attn_patches.forwards import EntranceForward, ModuleForward, forward_of

# Trainer wraps a model so by itself where one process sees several GPUs.
NO_DATA_PARALLEL = (
    "packed-attn refuses DataParallel, by which one process, and a Trainer in it, uses several "
    "GPUs: it scatters boundaries along the batch, and a Trainer multiplies the loss of a pack by "
    "the number of GPUs. Start a process for each (torchrun --nproc-per-node N, accelerate "
    "launch), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside any wrappers.

    Raises:
        NotImplementedError: a wrapper that cannot be exact, with what to use instead.
    """
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def put_forward(module: nn.Module, forward: ModuleForward) -> None:
    """Makes `forward` the module's own, inside the hook by which accelerate places it on a device.

    A method that something else has given the instance (Liger's forward with a fused loss) is what
    it then runs.

    Raises:
        NotImplementedError: the module's forward was replaced by what is no method of its own.
    """
    place = "_old_forward" if _hooked_by_accelerate(module) else "forward"
    found = vars(module).get(place)
    if found is not None and getattr(found, "__self__", None) is not module:
        if type(forward) is EntranceForward:
            return  # wrapped already (autocast): hooks read boundaries wherever a call is one
        raise NotImplementedError(
            f"patch_model refuses {type(module).__name__}: its forward was replaced by {found!r}; "
            "patch the model before it is prepared"
        )
    if isinstance(forward, EntranceForward) and found is not None:
        function = found.__func__
        forward.replaced = None if function is type(module).forward else function
    vars(module)[place] = forward


def take_forward(module: nn.Module) -> None:
    """Undoes `put_forward`, also where accelerate's hook came after it or went since."""
    for place in ("forward", "_old_forward"):
        ours = forward_of(vars(module).get(place))
        if ours is None:
            continue
        if place == "forward" and ours.replaced is None:
            del module.forward
        else:
            vars(module)[place] = ours.function.__get__(module)


def forget_compiled(model: nn.Module) -> None:
    """Lets code that was compiled before the patch be compiled anew.

    torch.compile does not look at hooks again once it has compiled a module, so a patch would be
    passed over in silence.
    """
    from torch._dynamo.eval_frame import OptimizedModule

    for module in model.modules():
        compiled = isinstance(module, OptimizedModule)
        if compiled or getattr(module, "_compiled_call_impl", None) is not None:
            torch.compiler.reset()
            return


def _inside(model: nn.Module) -> nn.Module | None:
    """What one wrapper wraps; None where there is no wrapper."""
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(model, nn.DataParallel):
        raise NotImplementedError(NO_DATA_PARALLEL)
    if isinstance(model, (nn.parallel.DistributedDataParallel, *_fsdp())):
        return cast(nn.Module, model.module)
    if isinstance(model, OptimizedModule):
        return cast(nn.Module, model._orig_mod)
    return _inside_peft(model)


def _inside_peft(model: nn.Module) -> nn.Module | None:
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return None
    refuse_learned_tokens(model)
    wrapper: Any = model
    return wrapper.base_model.model


def _fsdp() -> tuple[type[nn.Module], ...]:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed.fsdp import FullyShardedDataParallel

    return (FullyShardedDataParallel,)


def _hooked_by_accelerate(module: nn.Module) -> bool:
    return "_hf_hook" in vars(module) and "_old_forward" in vars(module)
