"""Which GPU a tensor is on, and whose rows of the table of configurations that GPU takes."""

from __future__ import annotations

import torch

from packed_attn_kernels.configurations import Architecture
from packed_attn_kernels.rules import INTERPRETED


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, such as (8, 9); (0, 0) of anything else."""
    is_nvidia = device.type == "cuda" and not INTERPRETED and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else (0, 0)


def architecture(device: torch.device) -> Architecture:
    """Hopper's rows go to data centers' Blackwell too, which has as much shared memory; consumers'
    has no more than Ampere's. The interpreter takes Hopper's."""
    return "ampere" if capability(device)[0] in (8, 12) else "hopper"


# A compiler cannot trace a look at the device, which never changes; as
# torch.compiler.assume_constant_result says it, without its import of the compiler.
architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]
