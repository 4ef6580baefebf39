"""Hopper's own words: barriers, copies by descriptor (TMA) and products of warpgroups."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.gluon.language import Value, View, plain, value
from tests.gluon.machine import Barrier, Event, Fault, Product, current

# Rows of a warpgroup's product.
ROWS = 64


class Descriptor:
    """A matrix or line in global memory, and the blocks of it that are copied."""

    def __init__(self, host: Any) -> None:
        base = host.base
        self.matrix = torch.as_strided(base, host.shape, host.strides, base.storage_offset())
        self.dtype, self.layout = base.dtype, host.layout
        size = math.prod(host.block_shape) * base.itemsize
        self.block_type = SimpleNamespace(nbytes=size, shape=list(host.block_shape))

    def inside(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the block at `corner` is inside: in the matrix, and in the block."""
        ours, theirs = [], []
        for at, size, length in zip(corner, self.block_type.shape, self.matrix.shape, strict=True):
            start, stop = max(at, 0), max(min(at + size, length), 0)
            ours.append(slice(start, max(stop, start)))
            theirs.append(slice(start - at, max(stop, start) - at))
        return tuple(ours), tuple(theirs)

    def read(self, corner: list[int]) -> Tensor:
        """The block, with zeros outside of the matrix."""
        block = torch.zeros(self.block_type.shape, dtype=self.dtype)
        ours, theirs = self.inside(corner)
        block[theirs] = self.matrix[ours]
        return block

    def add(self, corner: list[int], block: Tensor) -> None:
        ours, theirs = self.inside(corner)
        self.matrix[ours] += block[theirs]


def async_copy_global_to_shared(
    descriptor: Descriptor, corner: list[Any], barrier: View, to: View
) -> None:
    """Starts a copy; until it is there, nobody may count on the place's old or new contents."""
    if to.shape != descriptor.block_type.shape or to.layout != descriptor.layout:
        raise Fault(f"a block {descriptor.block_type.shape} copied to {to.shape}, {to.layout}")
    place = [int(x) for x in corner]
    access = to.touch("a copy", writes=True, goes_on=True)
    to.put(math.nan if to.dtype.is_floating_point else -(2**30))
    clock = current().clock | {access.key: access.time}

    def action() -> None:
        to.put(descriptor.read(place))
        _barrier(barrier).come(descriptor.block_type.nbytes, clock)

    current().machine.events.append(Event(f"copy to {to.memory.name}", action))


def async_add(descriptor: Descriptor, corner: list[Any], source: View) -> None:
    """Starts to add a block in shared memory to global memory."""
    place = [int(x) for x in corner]
    access = source.touch("an addition", goes_on=True)

    def action() -> None:
        descriptor.add(place, source.elements)

    event = Event(f"addition of {source.memory.name}", action, access)
    current().additions.append(event)
    current().machine.events.append(event)


def store_wait(pendings: int) -> None:
    """Until all but the last stores have read shared memory."""
    task = current()
    task.pause()
    while len(task.additions) > pendings:
        task.additions.pop(0).end()


def _init(at: View, count: int) -> None:
    name = f"barrier {at.start} in {at.memory.name}"
    at.memory.barriers[at.start] = Barrier(name, int(count))


def _barrier(at: View) -> Barrier:
    return at.memory.barriers[at.start]


def _arrive(at: View) -> None:
    current().pause()
    _barrier(at).arrive()


def _expect(at: View, size: int) -> None:
    current().pause()
    _barrier(at).expect(int(size))


def _wait(at: View, phase: Any) -> None:
    _barrier(at).wait(int(phase))


mbarrier = SimpleNamespace(
    init=_init, arrive=_arrive, expect=_expect, wait=_wait, MBarrierLayout=lambda: "barriers"
)
tma = SimpleNamespace(
    async_copy_global_to_shared=async_copy_global_to_shared, store_wait=store_wait
)


def fence_async_shared() -> None:
    current().fence()


def warpgroup_mma(
    a: View | Tensor, b: View, acc: Tensor | Product, *, use_acc: bool = True, is_async: bool
) -> Product:
    """Starts acc + a @ b."""
    if a.shape[0] != ROWS or list(acc.shape) != [ROWS, _columns(b)]:
        raise Fault(f"a product {list(acc.shape)} of {list(a.shape)} and {b.shape}")
    views = [x for x in (a, b) if isinstance(x, View)]
    accesses = [x.touch("a product", goes_on=True) for x in views]

    def compute() -> Tensor:
        before = acc.value if isinstance(acc, Product) else acc
        if before is None:
            raise Fault("a product on top of one that has not ended")
        left, right = (x.elements if isinstance(x, View) else plain(x) for x in (a, b))
        product = left.float() @ right.float()
        return value(plain(before) + product if use_acc else product)

    product = Product(f"product of {current().name}", [ROWS, _columns(b)], compute, accesses)
    current().products.append(product)
    return product


def _columns(b: View) -> int:
    return b.shape[0] if b.turned else b.shape[1]


def warpgroup_mma_wait(pendings: int, deps: list[Product]) -> Value:
    """Until all but the last `pendings` products have ended; the value of the one that is asked."""
    task = current()
    task.pause()
    while len(task.products) > pendings:
        task.products.pop(0).end()
    (wanted,) = deps
    if wanted.value is None:
        raise Fault(f"{wanted.name} is taken before it has ended")
    return wanted.value
