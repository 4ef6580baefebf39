"""The table's four rows: how each turns documents into batches, and what training that way gives.

`python -m packed_attn.demo.rows ROW --output FOLDER` trains one row in this process and writes
`FOLDER/rows-ROW.json`; a process of its own keeps one row's memory out of another's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packed_attn.demo.batches import (
    Feature,
    concatenate,
    pad_documents,
    patched,
    to_device,
    token_owners,
    unchanged,
    with_layout,
    with_position_ids,
)
from packed_attn.demo.settings import Settings, use_all_cores

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import LlamaForCausalLM

PROBE_DOCUMENTS = 8


@dataclass(frozen=True)
class RowResult:
    """One row of the table.

    Attributes:
        steps, real_tokens, seconds: trained after the warm-up steps; padding is no real token.
        peak_mib: peak memory of training, less the peak after import and model build.
        loss: nats per completion token on documents kept back, each run by itself.
        gradient_error: the probe documents' gradient against that of the documents run one by
            one, as the norm of the difference over the norm.
        leaked_tokens: probe tokens whose logits another document changed, of `probe_tokens`.
    """

    row: str
    title: str
    device: str
    threads: int
    steps: int
    real_tokens: int
    seconds: float
    peak_mib: float
    loss: float
    gradient_error: float
    leaked_tokens: int
    probe_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Real tokens trained per second."""
        return self.real_tokens / self.seconds


@dataclass(frozen=True)
class Row:
    """One way of batching documents.

    Attributes:
        packs: whether a feature is a pack of `pack_dataset`, or one document.
        collate: features to what the model is called with.
        prepare: what is done to the model before training.
    """

    title: str
    packs: bool
    collate: Callable[[Sequence[Feature]], dict[str, Any]]
    prepare: Callable[[LlamaForCausalLM], LlamaForCausalLM]


ROWS = {
    "padded": Row("padded (batch 8)", False, pad_documents, unchanged),
    "naive": Row("naive packing", True, concatenate, unchanged),
    "stock": Row("stock transformers packing", True, with_position_ids, unchanged),
    "packed": Row("packed-attn", True, with_layout, patched),
}


def train_row(name: str, settings: Settings) -> RowResult:
    """Trains one row for `settings.train_seconds`, then measures the other columns.

    Loss, gradient error and leaks come after the training, whose peak memory is read first.
    """
    import datasets
    import torch

    from packed_attn.demo.measure import mean_loss
    from packed_attn.demo.training import train

    datasets.disable_progress_bars()
    threads, row = use_all_cores(), ROWS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = row.prepare(_fresh_model(settings, device))
    trained = train(
        model,
        _features(row, _documents(settings.train_folder), settings),
        collate=row.collate,
        batch_size=1 if row.packs else settings.batch_size,
        settings=settings,
        title=row.title,
    )
    plain = _fresh_model(settings, device)
    plain.load_state_dict(model.state_dict())
    loss = mean_loss(plain, _documents(settings.heldout_folder).to_list())
    gradient_error, leaked_tokens, probe_tokens = probe_row(row, settings, device)
    return RowResult(
        name,
        row.title,
        device.type,
        threads,
        **asdict(trained),
        loss=loss,
        gradient_error=gradient_error,
        leaked_tokens=leaked_tokens,
        probe_tokens=probe_tokens,
    )


def probe_documents(documents: datasets.Dataset, capacity: int) -> datasets.Dataset:
    """The first documents that together fit one pack and one padded batch, the same for every
    row: gradient error and leaks are measured on them."""
    chosen: list[int] = []
    room = capacity
    for index, ids in enumerate(documents["input_ids"]):
        if len(ids) <= room:
            chosen.append(index)
            room -= len(ids)
        if len(chosen) == PROBE_DOCUMENTS:
            break
    return documents.select(chosen)


def probe_row(row: Row, settings: Settings, device: torch.device) -> tuple[float, int, int]:
    """Gradient error, leaked tokens and all tokens of the untrained model's probe batch."""
    from packed_attn.demo import measure

    chosen = probe_documents(_documents(settings.train_folder), settings.capacity)
    documents = chosen.to_list()
    features = _features(row, chosen, settings).to_list()
    batch = to_device(row.collate(features), device)
    owners = token_owners(features, batch)
    model = row.prepare(_fresh_model(settings, device))
    completion_tokens = measure.count_completion_tokens(documents)
    gradient_error = measure.relative_error(
        measure.gradient(model, batch, completion_tokens),
        measure.gradient_alone(_fresh_model(settings, device), documents),
    )
    leaked_tokens = measure.count_leaked_tokens(model, batch, owners, settings.seed)
    return gradient_error, leaked_tokens, int((owners >= 0).sum())


def _documents(folder: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.load_from_disk(str(folder))


def _features(row: Row, documents: datasets.Dataset, settings: Settings) -> datasets.Dataset:
    from packed_attn import pack_dataset

    return pack_dataset(documents, settings.capacity) if row.packs else documents


def _fresh_model(settings: Settings, device: torch.device) -> LlamaForCausalLM:
    from packed_attn.demo.model import build_model, move

    model = build_model(
        vocab_size=settings.vocab_size, capacity=settings.capacity, seed=settings.seed
    )
    return move(model, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: one row, results as JSON in the output folder."""
    parser = argparse.ArgumentParser(prog="python -m packed_attn.demo.rows", description=__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    result = train_row(parsed.row, Settings.load(parsed.output))
    (parsed.output / f"rows-{parsed.row}.json").write_text(json.dumps(asdict(result), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
