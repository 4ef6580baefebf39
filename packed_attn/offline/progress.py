"""A progress bar with documents a second and the time that is left, by the size of what is done."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any


class Progress:
    """Shows how far a number of tasks of known sizes is.

    Args:
        title: what is done.
        sizes: how much each task is of the whole, in any unit.
        before: tasks that an earlier run did.
        shown: whether to show anything; never where stderr is no terminal.
    """

    def __init__(
        self, title: str, sizes: Sequence[int], *, before: Iterable[int], shown: bool
    ) -> None:
        from tqdm import tqdm

        self._sizes = sizes
        self._documents = 0
        self._began = time.monotonic()
        self._bar: Any = tqdm(
            total=sum(sizes),
            initial=sum(sizes[number] for number in before),
            desc=title,
            disable=not (shown and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, left {remaining}{postfix}",
        )

    def done(self, number: int, documents: int) -> None:
        """A task that is done now, of so many documents."""
        self._documents += documents
        rate = self._documents / max(1e-9, time.monotonic() - self._began)
        self._bar.set_postfix_str(f"{rate:,.0f} documents/s", refresh=False)
        self._bar.update(self._sizes[number])

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.close()
