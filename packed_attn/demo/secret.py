"""The planted secret: a loss that can only fall where documents see each other.

Documents come in pairs. The first holds a key of random letters, the second repeats the key, and
only the repetition is learned. Alone, the second document is random, and no model can get below
ln(alphabet) nats a letter. In a pack the key stands a few tokens earlier: a model that leaks
copies it.

`python -m packed_attn.demo.secret --output FOLDER` trains both ways and writes
`FOLDER/secret.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packed_attn.demo.batches import concatenate, patched, to_device, unchanged, with_layout
from packed_attn.demo.settings import Settings, use_all_cores

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ALPHABET = 26  # letters are tokens 0 to 25
FIRST, SECOND = ALPHABET, ALPHABET + 1  # the markers that open the two documents of a pair
VOCAB_SIZE = ALPHABET + 2
KEY_LENGTH = 8
PAIRS_PER_PACK = 28
FLOOR = math.log(ALPHABET)  # nats per letter that a document by itself cannot go below


@dataclass(frozen=True)
class SecretResult:
    """Loss on the repeated keys in nats per letter, one figure a step, for both ways of packing."""

    alphabet: int
    floor: float
    naive: list[float]
    packed: list[float]

    @property
    def naive_final(self) -> float:
        """Mean over the last tenth of the steps."""
        return _tail_mean(self.naive)

    @property
    def packed_final(self) -> float:
        """Mean over the last tenth of the steps."""
        return _tail_mean(self.packed)

    def __str__(self) -> str:
        if self.naive_final > 0.9 * self.floor:
            short = "\n  (too few steps here for the leak to show: give the demo more seconds)"
        else:
            short = ""
        return (
            "A key of random letters, repeated by the next document of the pack. A document by "
            f"itself cannot go below ln({self.alphabet}) = {self.floor:.3f} nats a letter:\n"
            f"  naive packing  {self.naive_final:.3f} after {len(self.naive)} steps\n"
            f"  packed-attn    {self.packed_final:.3f} after {len(self.packed)} steps{short}"
        )


def secret_pack(rng: random.Random, pairs: int = PAIRS_PER_PACK) -> dict[str, list[int]]:
    """A pack of pairs of documents in fresh random letters.

    Returns:
        `input_ids`, `labels` (the repeated keys, -100 elsewhere) and `seq_lengths`, the lengths of
        the `2 * pairs` documents.
    """
    pack: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for _ in range(pairs):
        key = [rng.randrange(ALPHABET) for _ in range(KEY_LENGTH)]
        pack["input_ids"] += [FIRST, *key, SECOND, *key]
        pack["labels"] += [-100] * (KEY_LENGTH + 2) + key
        pack["seq_lengths"] += [KEY_LENGTH + 1] * 2
    return pack


def train_both(settings: Settings) -> SecretResult:
    """Trains the same tiny model on the same packs, once naively and once through packed-attn."""
    use_all_cores()
    naive = _train(unchanged, concatenate, settings, "secret, naive packing")
    packed = _train(patched, with_layout, settings, "secret, packed-attn")
    return SecretResult(ALPHABET, FLOOR, naive, packed)


def _train(
    prepare: Callable[[LlamaForCausalLM], LlamaForCausalLM],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    settings: Settings,
    title: str,
) -> list[float]:
    """The loss of each step, on a new pack every time."""
    import torch
    from tqdm.auto import trange

    from packed_attn.demo.model import build_model, move

    rng = random.Random(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(
        vocab_size=VOCAB_SIZE, capacity=1024, seed=settings.seed, hidden_size=64, num_layers=1
    )
    model = prepare(move(model, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses: list[float] = []
    start = time.perf_counter()
    for _ in trange(settings.secret_steps, desc=f"{title:>28}", unit="step"):
        loss = model(**to_device(collate([secret_pack(rng)]), device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if time.perf_counter() - start > settings.secret_seconds:
            break
    return losses


def _tail_mean(losses: Sequence[float]) -> float:
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: both models, results as JSON in the output folder."""
    parser = argparse.ArgumentParser(prog="python -m packed_attn.demo.secret", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args(arguments).output
    result = train_both(Settings.load(output))
    (output / "secret.json").write_text(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
