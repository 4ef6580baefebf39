"""What Gluon's words mean on the machine: names as `triton.experimental.gluon.language` has them.

Tensors in registers are torch tensors, layouts are ignored (the compiler checks them), but for
the order of a matrix in shared memory, which reinterpreting it as another shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as real

from tests.gluon.machine import Access, Fault, Memory, current, join

int32, int64, float32 = torch.int32, torch.int64, torch.float32
float16, bfloat16 = torch.float16, torch.bfloat16
BlockedLayout, SliceLayout = real.BlockedLayout, real.SliceLayout
SwizzledSharedLayout = real.SwizzledSharedLayout


class constexpr(int):
    """A constant; only whole numbers are made in a kernel's module."""

    @property
    def value(self) -> int:
        return int(self)


class Value(torch.Tensor):
    """A tensor in registers: assignments with an operator make a new one, as in Triton."""

    def __iadd__(self, other: Any) -> Any:
        return self + other

    def __isub__(self, other: Any) -> Any:
        return self - other

    def __imul__(self, other: Any) -> Any:
        return self * other


def value(x: Any, dtype: torch.dtype | None = None) -> Value:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Value)


class NVMMASharedLayout:
    """The real layouts, which know their defaults by triton's dtypes."""

    def __new__(cls, *arguments: Any, **named: Any) -> Any:
        return real.NVMMASharedLayout(*arguments, **named)

    @staticmethod
    def get_default_for(shape: list[int], dtype: torch.dtype) -> Any:
        kind = getattr(real, str(dtype).removeprefix("torch."))
        return real.NVMMASharedLayout.get_default_for(list(map(int, shape)), kind)


def NVMMADistributedLayout(version: list[int], warps: list[int], shape: list[int]) -> Any:
    return ("wgmma", shape)


def DotOperandLayout(index: int, parent: Any, width: int) -> Any:
    return ("operand", parent)


class Pointer:
    """An address in a tensor's storage, or a tensor of them."""

    def __init__(self, data: Tensor, offset: Tensor) -> None:
        self.data, self.offset = data, offset

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.itemsize
        return cls(torch.as_strided(x, (size,), (1,), 0), torch.tensor(x.storage_offset()))

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.data, self.offset + torch.as_tensor(steps).to(torch.int64))

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """The offsets of all lanes, 0 where they are off, and which lanes are on."""
        on = torch.as_tensor(True if mask is None else mask)
        offset, on = torch.broadcast_tensors(plain(self.offset), plain(on))
        outside = on & ((offset < 0) | (offset >= self.data.numel()))
        if outside.any():
            raise Fault(f"address {int(offset[outside][0])} of {self.data.numel()} elements")
        return torch.where(on, offset, 0), on


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(torch.Tensor)


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    places, on = pointer.places(mask)
    current().pause()
    return value(torch.where(on, pointer.data[places], other))


def store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    places, on = pointer.places(mask)
    x = plain(torch.as_tensor(x)).to(pointer.data.dtype).expand(places.shape)
    current().pause()
    pointer.data[places[on]] = x[on]


def atomic_add(pointer: Pointer, x: Any, mask: Any = None, sem: str = "") -> Value:
    places, on = pointer.places(mask)
    current().pause()
    before = torch.zeros(places.shape, dtype=pointer.data.dtype)
    for lane in on.nonzero():
        before[tuple(lane)] = pointer.data[places[tuple(lane)]]
        pointer.data[places[tuple(lane)]] += plain(x)[tuple(lane)]
    return value(before)


def program_id(axis: int) -> Value:
    return value(current().program.ids[axis], torch.int32)


def num_programs(axis: int) -> int:
    return current().program.grid[axis]


def num_warps() -> int:
    return 4


def arange(start: int, stop: int, layout: Any = None) -> Value:
    return value(torch.arange(start, stop, dtype=torch.int32))


def full(shape: list[int], x: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return value(torch.full(tuple(map(int, shape)), float(x) if dtype.is_floating_point else int(x),
                            dtype=dtype))  # fmt: skip


def where(condition: Any, x: Any, y: Any) -> Value:
    return value(torch.where(torch.as_tensor(condition), x, y))


def maximum(x: Any, y: Any) -> Value:
    return value(torch.fmax(*_two(x, y)))


def minimum(x: Any, y: Any) -> Value:
    return value(torch.fmin(*_two(x, y)))


def _two(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    dtype = next((z.dtype for z in (x, y) if isinstance(z, Tensor)), torch.int32)
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)


def max(x: Tensor, axis: int) -> Value:
    return _extreme(x, axis, torch.amax, -math.inf)


def min(x: Tensor, axis: int) -> Value:
    return _extreme(x, axis, torch.amin, math.inf)


def _extreme(x: Tensor, axis: int, reduce: Callable[..., Tensor], last: float) -> Value:
    """As the hardware's: NaNs count only where there is nothing else."""
    if not x.is_floating_point():
        return value(reduce(x, axis))
    found = reduce(torch.where(x != x, last, x), axis)
    return value(torch.where((x != x).all(axis), math.nan, found))


def sum(x: Tensor, axis: int) -> Value:
    return value(torch.sum(x, axis, dtype=x.dtype))


def abs(x: Tensor) -> Value:
    return value(torch.abs(x))


def exp2(x: Tensor) -> Value:
    return value(torch.exp2(x))


def log2(x: Tensor) -> Value:
    return value(torch.log2(x))


def convert_layout(x: Tensor, layout: Any) -> Tensor:
    return x


def inline_asm_elementwise(asm: str, *arguments: Any, **named: Any) -> Value:
    if asm != "mov.b32 $0, 0;":
        raise NotImplementedError(asm)
    return value(0, torch.int32)


def static_assert(condition: Any, message: str = "") -> None:
    if not condition:
        raise Fault(message)


static_range = range


class View:
    """A part of shared memory `[..., rows, columns]`, in the order that its layout gives.

    Columns stand in groups as wide as the layout's swizzling, each group with all of its rows.
    """

    def __init__(
        self, memory: Memory, start: int, shape: Sequence[int], layout: Any, turned: bool = False
    ) -> None:
        self.memory, self.start, self.shape = memory, start, [int(size) for size in shape]
        self.layout, self.turned = layout, turned

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.data.dtype

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def index(self, at: Any) -> View:
        at = int(at)
        if not 0 <= at < self.shape[0]:
            raise Fault(f"place {at} of {self.shape[0]} in {self.memory.name}")
        size = math.prod(self.shape[1:])
        return View(self.memory, self.start + at * size, self.shape[1:], self.layout)

    def permute(self, order: tuple[int, int]) -> View:
        return View(self.memory, self.start, self.shape, self.layout, turned=order == (1, 0))

    @property
    def places(self) -> Tensor:
        """Where the elements stand in memory."""
        swizzled = getattr(self.layout, "swizzle_byte_width", 0) // self.dtype.itemsize
        return self.start + _order(tuple(self.shape), swizzled, self.turned)

    @property
    def elements(self) -> Tensor:
        """A copy of what stands there now."""
        return self.memory.data[self.places]

    def put(self, x: Any) -> None:
        self.memory.data[self.places] = x

    def touch(self, what: str, *, writes: bool = False, goes_on: bool = False) -> Access:
        """Begins an access, which whoever is not ordered before or after it must not meet."""
        if goes_on:
            self.memory.check(self.start, self.stop, what)
        return self.memory.touch(self.start, self.stop, what, writes=writes, goes_on=goes_on)

    def load(self, layout: Any = None) -> Value:
        current().pause()
        self.touch("a load")
        return value(self.elements)

    def store(self, x: Tensor) -> None:
        if list(x.shape) != self.shape or x.dtype != self.dtype:
            raise Fault(f"{list(x.shape)} of {x.dtype} into {self.shape} of {self.dtype}")
        current().pause()
        self.touch("a store", writes=True)
        self.put(plain(x))
        self.memory.written(self.start, self.stop)


@lru_cache
def _order(shape: tuple[int, ...], swizzled: int, turned: bool) -> Tensor:
    index = torch.arange(math.prod(shape))
    if len(shape) < 2:
        return index
    rows, columns = shape
    width = columns if swizzled == 0 or swizzled > columns else swizzled
    index = index.view(columns // width, rows, width).permute(1, 0, 2).reshape(rows, columns)
    return index.T if turned else index


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> View:
    """Memory full of what nobody wrote: NaN, or a number that no index is."""
    shape = [int(size) for size in shape]
    nothing = math.nan if dtype.is_floating_point else -(2**30)
    program = current().program
    name = f"shared memory {len(program.memories)} of program {program.ids}"
    data = torch.full((math.prod(shape),), nothing, dtype=dtype)
    program.memories.append(Memory(name, data))
    return View(program.memories[-1], 0, shape, layout)


def view(memory: View, shape: list[int], layout: Any) -> View:
    """The same memory in another shape; both orders must be those of groups as wide."""
    if memory.layout.swizzle_byte_width != layout.swizzle_byte_width:
        raise Fault(f"{memory.layout} seen as {layout}")
    return View(memory.memory, memory.start, shape, layout)


def barrier() -> None:
    """All threads of the role meet."""
    task = current()
    task.meet()
    task.pause()


def warp_specialize(roles: list[Any], warps: list[int], registers: list[int]) -> None:
    """Runs each role beside the others; the first one is the caller's."""
    if not len(roles) - 1 == len(warps) == len(registers):
        raise Fault("each role but the first has its warps and registers")
    task = current()
    others = [
        task.machine.start(body.__name__, task.program, partial(body, *arguments), task.clock)
        for body, arguments in roles[1:]
    ]
    body, arguments = roles[0]
    body(*arguments)
    task.pause(lambda: all(other.done for other in others), "the other roles")
    for other in others:
        join(task.clock, other.clock)
