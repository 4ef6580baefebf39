"""The machine that interpreted Gluon kernels run on: warps with roles, barriers, what is async.

Every program of the grid, and every role of `warp_specialize`, is a task. One task runs at a time
and hands over wherever hardware could run another: a seed decides which goes on, and when a copy
or an addition that was started takes place. Whether a task may touch shared memory is no matter of
luck: each has a vector clock (Lamport, "Time, clocks, and the ordering of events", 1978; Mattern,
"Virtual time and global states", 1989), which barriers pass on, and an access that is not ordered
after those that it must not meet is a fault in every schedule. Where no task can go on,
`Deadlock` says what each waits for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_LOCAL = threading.local()

# What has happened before, as a count for each task and for each place that is copied to.
Clock = dict[Hashable, int]


class Fault(Exception):
    """The kernel did what no run on hardware may do, or what would differ from run to run."""


class Deadlock(Fault):
    """No task can go on."""


class _Stopped(BaseException):
    """Another task has failed."""


@dataclass(eq=False)
class Task:
    """One role of a program, in a thread of its own."""

    name: str
    program: Program
    body: Callable[[], None]
    machine: Machine
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    waits_for: Callable[[], bool] | None = None
    what: str = ""
    done: bool = False
    products: list[Any] = field(default_factory=list)  # started and not waited for, oldest first
    additions: list[Event] = field(default_factory=list)  # the same of shares that are stored
    clock: Clock = field(default_factory=dict)

    def run(self) -> None:
        _LOCAL.task = self
        self.turn.acquire()
        try:
            if not self.machine.failure:
                with torch.no_grad():
                    self.body()
                if self.products:
                    raise Fault(f"{self.name} ends before its products")
                if self.additions:
                    raise Fault(f"{self.name} ends before its stores have read shared memory")
        except _Stopped:
            pass
        except BaseException as error:
            self.machine.failure = self.machine.failure or error
        self.done = True
        self.machine.turn.release()

    def tick(self) -> int:
        """One more access of its own."""
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def fence(self) -> None:
        """What this task wrote goes before asynchronous work of those that it meets from here."""
        for mark in self._marks():
            mark.fenced = True

    def meet(self) -> None:
        """The threads of this task wait for each other."""
        for memory in self.program.memories:
            memory.marks = [x for x in memory.marks if not (x.task is self and x.fenced)]

    def _marks(self) -> list[Mark]:
        marks = [mark for memory in self.program.memories for mark in memory.marks]
        return [mark for mark in marks if mark.task is self]

    def pause(self, until: Callable[[], bool] | None = None, what: str = "") -> None:
        """Lets other tasks and events go first, and goes on only where `until` holds."""
        self.waits_for, self.what = until, what
        self.machine.turn.release()
        self.turn.acquire()
        if self.machine.failure:
            raise _Stopped


@dataclass(eq=False)
class Program:
    """One program of the grid."""

    ids: tuple[int, ...]
    grid: tuple[int, ...]
    memories: list[Memory] = field(default_factory=list)


@dataclass(eq=False)
class Event:
    """What hardware does at a time of its own."""

    name: str
    action: Callable[[], None]
    access: Access | None = None
    done: bool = False

    def run(self) -> None:
        if not self.done:
            self.done = True
            self.action()

    def end(self) -> None:
        """A task has waited for it."""
        self.run()
        if self.access is not None:
            self.access.time = current().tick()


class Machine:
    """Runs a grid of programs under one schedule."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turn = threading.Semaphore(0)
        self.tasks: list[Task] = []
        self.events: list[Event] = []
        self.failure: BaseException | None = None

    def start(
        self, name: str, program: Program, body: Callable[[], None], clock: Clock | None = None
    ) -> Task:
        """A task that what is in `clock` has happened before."""
        task = Task(f"program {program.ids}, {name}", program, body, self)
        task.clock.update(clock or {})
        self.tasks.append(task)
        threading.Thread(target=task.run, daemon=True).start()
        return task

    def run(self) -> None:
        """Until every task has ended; raises the first failure."""
        while not self.failure:
            self.tasks = [task for task in self.tasks if not task.done]
            able: list[Task | Event] = [x for x in self.tasks if not x.waits_for or x.waits_for()]
            self.events = [event for event in self.events if not event.done]
            if not able and not self.events:
                if self.tasks:
                    stuck = "; ".join(f"{task.name} waits for {task.what}" for task in self.tasks)
                    self.failure = Deadlock(stuck)
                break
            chosen = self.random.choice([*able, *self.events])
            if isinstance(chosen, Event):
                chosen.run()
            else:
                chosen.turn.release()
                self.turn.acquire()
        if self.failure:
            for task in self.tasks:
                task.turn.release()
            raise self.failure


def current() -> Task:
    """The task that asks."""
    return _LOCAL.task


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    name: str
    count: int
    arrivals: int = 0
    bytes: int = 0
    phase: int = 0
    coming: Clock = field(default_factory=dict)  # what has happened before this phase's end
    before: Clock = field(default_factory=dict)  # the same of the phases that have ended

    def arrive(self) -> None:
        current().meet()
        join(self.coming, current().clock)
        if self.arrivals == self.count:
            raise Fault(f"{self.name}: more than {self.count} arrivals in a phase")
        self.arrivals += 1
        self._end()

    def expect(self, size: int) -> None:
        self.bytes += size
        self.arrive()

    def come(self, size: int, clock: Clock) -> None:
        join(self.coming, clock)
        self.bytes -= size
        if self.bytes < 0:
            raise Fault(f"{self.name}: {-self.bytes} bytes more than expected")
        self._end()

    def wait(self, phase: int) -> None:
        current().pause(lambda: self.phase & 1 != phase, f"phase {phase} of {self.name}")
        current().meet()
        join(current().clock, self.before)

    def _end(self) -> None:
        if self.arrivals == self.count and self.bytes == 0:
            self.arrivals = 0
            self.phase += 1
            join(self.before, self.coming)
            self.coming = {}


def join(clock: Clock, other: Clock) -> None:
    """What has happened before either."""
    for key, count in other.items():
        clock[key] = max(clock.get(key, 0), count)


@dataclass(eq=False)
class Access:
    """Elements that were read or written; `time` is that of `key`, None while it goes on."""

    start: int
    stop: int
    writes: bool
    key: Hashable
    what: str
    time: int | None


@dataclass(eq=False)
class Mark:
    """Elements that a task wrote, and that asynchronous work must not meet yet."""

    start: int
    stop: int
    task: Task
    fenced: bool = False


@dataclass(eq=False)
class Memory:
    """One allocation of shared memory, flat.

    A read must be ordered after every write of its elements, and a write after every access.
    Besides, what a task writes is marked until it has made a fence and then met the others: a
    barrier of its warps, an arrival or a wait. Asynchronous work on marked elements is a fault.
    """

    name: str
    data: Tensor
    marks: list[Mark] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)

    def touch(self, start: int, stop: int, what: str, *, writes: bool, goes_on: bool) -> Access:
        """Begins an access by the current task, which ends at once unless it `goes_on`."""
        task = current()
        for access in self.accesses:
            if access.start < stop and start < access.stop and (writes or access.writes):
                time = access.time
                if time is None or task.clock.get(access.key, 0) < time:
                    raise Fault(f"{self.name}: {what} may meet {access.what}")
        if writes:
            inside = [x for x in self.accesses if start <= x.start and x.stop <= stop]
            self.accesses = [x for x in self.accesses if x not in inside]
        what = f"{what} by {task.name}"
        if writes and goes_on:  # a copy, which whoever waits for its barrier is ordered after
            key = (id(self), start)
            return self._add(Access(start, stop, writes, key, what, task.clock.get(key, 0) + 1))
        return self._add(Access(start, stop, writes, task, what, None if goes_on else task.tick()))

    def _add(self, access: Access) -> Access:
        self.accesses.append(access)
        return access

    def written(self, start: int, stop: int) -> None:
        self.marks.append(Mark(start, stop, current()))

    def check(self, start: int, stop: int, by: str) -> None:
        for mark in self.marks:
            if mark.start < stop and start < mark.stop:
                raise Fault(f"{by} of {self.name} before a fence and a barrier by {mark.task.name}")


@dataclass(eq=False)
class Product:
    """A wgmma: a value once it was waited for; until then it reads its operands."""

    name: str
    shape: list[int]
    compute: Callable[[], Tensor]
    accesses: Sequence[Access]
    value: Tensor | None = None

    def end(self) -> None:
        self.value = self.compute()
        for access in self.accesses:
            access.time = current().tick()
