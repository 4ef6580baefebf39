"""Packs to ranks and micro-steps, so that ranks finish together, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from packed_attn.packing.arguments import check_choice, checked_whole
from packed_attn.packing.evened import Rows, cut_to_multiple
from packed_attn.packing.packed_dataset import PackedDataset, PackPart
from packed_attn.packing.plan import Packs

Remainder = Literal["split", "drop", "repeat"]
HIDDEN_SIZE = 4096  # of the model that the default cost is of
WINDOW_STEPS = 256


class PackedBatchSampler(Sampler[list[int | PackPart]]):
    """Batches of packs for one rank, as a DataLoader's `batch_sampler`.

        rows = PackedDataset(dataset, 32768, seed=0)
        sampler = PackedBatchSampler(rows, rank=rank, world_size=world_size, seed=0)
        loader = DataLoader(rows, batch_sampler=sampler, collate_fn=PackedCollator())

    In a micro-step every rank runs `batch_size` packs, and the slowest makes the others wait. A
    pack costs `linear * length + quadratic * length^2`, summed over its documents. Packs are
    shuffled, cut into windows of `window_steps` micro-steps and sorted by cost inside each;
    neighbours share a micro-step, and the micro-steps of a window are shuffled again. O(n log n).

    Every rank gets the same number of micro-steps, and no batch is empty. Where world_size *
    batch_size does not divide the packs, `remainder` says what happens to the rest:

        "split"   (default) packs with several documents are cut in two, between documents, until
                  it divides: every document is run once
        "drop"    the last packs of the shuffled order are left out: `sampler.dropped` has them
        "repeat"  packs are run twice, in the last micro-step: `sampler.repeated` has them

    `state_dict` holds settings and how many micro-steps were run, under which world sizes;
    `load_state_dict` on any number of ranks continues with the packs that are left, none lost and
    none run twice.

    Hand its DataLoader to the training loop as it is: accelerate's `prepare` would divide the
    batches among ranks again, which is refused.

    Args:
        packs: a `PackedDataset`, or the `Packs` of one.
        rank, world_size: this process among those that train.
        batch_size: packs that a rank runs in a micro-step.
        linear, quadratic: the cost of a document. By default that of a transformer of hidden size
            4096, where attention costs length / (12 x hidden size) of what the rest does.
        seed, epoch: of the shuffling; all ranks need the same.
        window_steps: micro-steps in a window. More balance better; fewer mix costs more.
        remainder: see above.

    Raises:
        ValueError: a rank outside the world, settings below 1, or under `remainder="split"` fewer
            documents than batches need.
    """

    def __init__(
        self,
        packs: Packs | PackedDataset,
        *,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        linear: float = 1.0,
        quadratic: float = 1 / (12 * HIDDEN_SIZE),
        seed: int = 0,
        epoch: int = 0,
        window_steps: int = WINDOW_STEPS,
        remainder: Remainder = "split",
    ) -> None:
        self.world_size = checked_whole("world_size", world_size)
        self.rank = checked_whole("rank", rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size, got {rank} and {world_size}")
        self.batch_size = checked_whole("batch_size", batch_size)
        self.window_steps = checked_whole("window_steps", window_steps)
        check_choice("remainder", remainder, Remainder)
        if not (linear >= 0 and quadratic >= 0 and linear + quadratic > 0):
            raise ValueError(
                f"linear and quadratic must be at least 0 and not both 0, got {linear}, {quadratic}"
            )
        self.remainder: Remainder = remainder
        self.seed = checked_whole("seed", seed, 0)
        self._cost = float(linear), float(quadratic)
        self._given = packs
        self._start(checked_whole("epoch", epoch, 0))

    def __len__(self) -> int:
        """Micro-steps that are left in this epoch, the same on every rank."""
        return len(self._steps) - self._step

    def __iter__(self) -> Iterator[list[int | PackPart]]:
        """Goes on from the cursor; a finished epoch needs `set_epoch` before the next."""
        if self._step and self._step == len(self._steps):
            raise RuntimeError(
                f"epoch {self.epoch} is finished: call set_epoch before iterating again"
            )
        while self._step < len(self._steps):
            self._step += 1
            yield self.batch(self._step - 1, self.rank)

    @property
    def drop_last(self) -> bool:
        """False: every batch is full. Who asks is about to divide the batches among ranks.

        Raises:
            ValueError: where they are those of one rank already. A second division would lose
                packs without a word.
        """
        if self.world_size > 1:
            raise ValueError(
                f"batches must be divided among ranks once, but these are those of rank {self.rank}"
                f" of {self.world_size} already: do not hand the DataLoader to accelerate's prepare"
            )
        return False

    def batch(self, step: int, rank: int) -> list[int | PackPart]:
        """What a rank runs in a micro-step, counted from the last start or resume."""
        return [self._index(row) for row in self._steps[step, rank]]

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch from its beginning, with its plan where the packs are a data set.

        Called with the epoch that `load_state_dict` has just restored, it changes nothing, so the
        usual loop over epochs may call it after resuming too.
        """
        epoch = checked_whole("epoch", epoch, 0)
        if self._history and not self._step and epoch == self.epoch:
            return
        if isinstance(self._given, PackedDataset):
            self._given.set_epoch(epoch)
        self._start(epoch)

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """Where training stands, of types that JSON has; the same on every rank.

        Args:
            steps: micro-steps trained since the last start or resume. None is those handed out: a
                DataLoader with workers asks for batches ahead of training, so there say it.
        """
        done = self._step if steps is None else checked_whole("steps", steps, 0)
        if done > len(self._steps):
            raise ValueError(f"steps must be at most {len(self._steps)}, got {done}")
        return {
            "epoch": self.epoch,
            "seed": self.seed,
            "window_steps": self.window_steps,
            "cost": list(self._cost),
            "plan": self._packs.digest(),
            "history": [*map(list, self._history), [*self._setting(), done]],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` stood, on this sampler's number of ranks.

        Raises:
            ValueError: the state of another plan (other data, capacity, options or seed).
        """
        self.seed, self.window_steps = state["seed"], state["window_steps"]
        self._cost = tuple(state["cost"])
        if isinstance(self._given, PackedDataset):
            self._given.set_epoch(state["epoch"])
        self._start(state["epoch"], [tuple(part) for part in state["history"]], state["plan"])

    def _start(
        self, epoch: int, history: Sequence[tuple[Any, ...]] = (), digest: str | None = None
    ) -> None:
        """Schedules what `history` leaves of an epoch."""
        packs = self._given.packs if isinstance(self._given, PackedDataset) else self._given
        if digest is not None and packs.digest() != digest:
            raise ValueError(
                "state must be of the same plan, but its packs are others: the data, the capacity, "
                "an option or a seed has changed"
            )
        self.epoch, self._packs, self._history, self._step = epoch, packs, list(history), 0
        pieces = np.diff(packs.offsets)
        rows = np.stack([np.arange(pieces.size), np.zeros_like(pieces), pieces], axis=1)
        for number, (world_size, batch_size, remainder, done) in enumerate(history):
            steps, left_over, _ = self._schedule(rows, world_size, batch_size, remainder, number)
            undone = steps[done:].reshape(-1, 3)
            if remainder == "repeat":  # rows that ran before, or that stand here twice
                undone = _without(np.unique(undone, axis=0), steps[:done].reshape(-1, 3))
            rows = np.concatenate([undone, left_over])
        setting = self._setting()
        self._steps, dropped, repeated = self._schedule(rows, *setting, len(history))
        self.dropped = [self._index(row) for row in dropped]
        self.repeated = [self._index(row) for row in repeated]

    def _setting(self) -> tuple[int, int, Remainder]:
        return self.world_size, self.batch_size, self.remainder

    def _schedule(
        self, rows: Rows, world_size: int, batch_size: int, remainder: Remainder, number: int
    ) -> tuple[NDArray[np.int64], Rows, Rows]:
        """Micro-steps `[steps, world_size, batch_size, 3]`, rows left out, and rows run twice."""
        random = np.random.default_rng([self.seed, self.epoch, number])
        together = world_size * batch_size
        rows = rows[np.lexsort(rows.T[::-1])]  # the same order whatever came before
        dropped = repeated = rows[:0]
        if remainder == "split" and self._packs.trees is not None and len(rows) % together:
            raise NotImplementedError(
                f"remainder='split' would cut packs with shared prefixes, and {len(rows)} packs "
                f"are no multiple of {together}: pack with multiple={together}, or use 'drop' or "
                "'repeat'"
            )
        if remainder == "split":
            advice = "use 'drop' or 'repeat'"
            rows = cut_to_multiple(rows, together, "remainder='split'", advice)
        rows = random.permutation(rows)
        rows, rest = np.split(rows, [len(rows) - len(rows) % together])
        if len(rest) and remainder == "repeat":
            repeated = np.resize(np.concatenate([rows, rest]), (together - len(rest), 3))
        elif len(rest):
            dropped = rest
        windows = [self._balanced(window, together) for window in self._windows(rows, together)]
        order = self._shuffled_in_windows(len(rows) // together, random)
        steps = np.concatenate([rows[:0].reshape(-1, together, 3), *windows])[order]
        if len(repeated):  # last: whoever resumes before has run nothing twice
            steps = np.concatenate([steps, np.concatenate([rest, repeated])[None]])
        return self._dealt(steps, world_size, batch_size, random), dropped, repeated

    def _dealt(
        self, steps: NDArray[np.int64], world_size: int, batch_size: int, random: Any
    ) -> NDArray[np.int64]:
        """Rows of each micro-step, sorted by cost, to `[steps, world_size, batch_size, 3]`.

        They go to and fro over the ranks, so that sums are alike; then ranks change places from
        step to step, so that none always has the most.
        """
        steps = steps.reshape(-1, batch_size, world_size, 3)
        steps[:, 1::2] = steps[:, 1::2, ::-1].copy()
        ranks = random.permuted(np.tile(np.arange(world_size), (len(steps), 1)), axis=1)
        steps = np.take_along_axis(steps, ranks[:, None, :, None], axis=2)
        return steps.transpose(0, 2, 1, 3)

    def _windows(self, rows: Rows, together: int) -> list[Rows]:
        size = self.window_steps * together
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _balanced(self, window: Rows, together: int) -> NDArray[np.int64]:
        """A window's rows by falling cost, `[steps, together, 3]`."""
        order = np.argsort(-self.costs(window), kind="stable")
        return window[order].reshape(-1, together, 3)

    def _shuffled_in_windows(self, steps: int, random: np.random.Generator) -> NDArray[np.int64]:
        windows = np.arange(steps) // self.window_steps
        return np.lexsort((random.permutation(steps), windows))

    def costs(self, rows: Rows) -> NDArray[np.float64]:
        """The modelled cost of rows (pack, first piece, stop), float64 `[num_rows]`."""
        linear, quadratic = self._cost
        lengths, pairs = self._packs.lengths, self._packs.attention_pairs
        before = np.append(0.0, np.cumsum(linear * lengths + quadratic * pairs))
        begin = self._packs.offsets[rows[:, 0]]
        return before[begin + rows[:, 2]] - before[begin + rows[:, 1]]

    def stretch(self) -> float:
        """How much longer than the average rank a micro-step takes: the mean over micro-steps of
        (cost of the slowest rank) / (mean cost of a rank), weighted by the mean cost."""
        if not len(self._steps):
            return 1.0
        steps, world_size, batch_size, _ = self._steps.shape
        costs = self.costs(self._steps.reshape(-1, 3)).reshape(steps, world_size, batch_size)
        ranks = costs.sum(axis=2)
        return float(ranks.max(axis=1).sum() / ranks.mean(axis=1).sum())

    def _index(self, row: NDArray[np.int64]) -> int | PackPart:
        pack, first, stop = row.tolist()
        whole = stop - first == self._packs.offsets[pack + 1] - self._packs.offsets[pack]
        return pack if whole else PackPart(pack, first, stop)


def _without(rows: Rows, others: Rows) -> Rows:
    """The rows that are not among others."""
    gone = set(map(tuple, others.tolist()))
    return np.array([r for r in rows.tolist() if tuple(r) not in gone], np.int64).reshape(-1, 3)
