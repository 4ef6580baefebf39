"""The table's four rows: how each turns documents into batches, and what training that way gives.

`python -m packed_attn.demo.rows ROW --output FOLDER` trains one row in this process and writes
`FOLDER/row-ROW.json`; a process of its own keeps one row's memory out of another's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packed_attn.demo.settings import Settings, use_all_cores

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

    import datasets

Feature = Mapping[str, Any]
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


def train_row(name: str, settings: Settings) -> RowResult:
    """Trains one row for `settings.train_seconds` and measures every column."""
    import datasets
    import torch

    from packed_attn.demo import measure
    from packed_attn.demo.training import train

    threads = use_all_cores()
    row = ROWS[name]
    train_set = datasets.load_from_disk(str(settings.train_folder))
    heldout = datasets.load_from_disk(str(settings.heldout_folder))
    assert isinstance(train_set, datasets.Dataset)
    features = _features(row, train_set, settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = row.prepare(_fresh_model(settings).to(device))
    trained = train(
        model,
        features,
        collate=row.collate,
        batch_size=1 if row.packs else settings.batch_size,
        settings=settings,
        title=row.title,
    )
    evaluated = _fresh_model(settings).to(device)
    evaluated.load_state_dict(model.state_dict())
    probe = _probe(row, settings, device)
    return RowResult(
        row=name,
        title=row.title,
        device=device.type,
        threads=threads,
        **asdict(trained),
        loss=measure.mean_loss(evaluated, heldout),
        **probe,
    )


def probe_documents(settings: Settings) -> list[Feature]:
    """The first documents that together fit one pack and one padded batch: the fixed ones on
    which every row's gradient and isolation are measured."""
    import datasets

    chosen, tokens = [], 0
    for document in datasets.load_from_disk(str(settings.train_folder)):
        length = len(document["input_ids"])
        if len(chosen) < PROBE_DOCUMENTS and tokens + length <= settings.capacity:
            chosen.append(document)
            tokens += length
        if len(chosen) == PROBE_DOCUMENTS:
            break
    return chosen


def token_owners(features: Sequence[Feature], batch: Mapping[str, Any]) -> Tensor:
    """The document of each token, int64 `[B, T]` on the CPU, -1 for padding."""
    import torch

    owners = torch.full(batch["input_ids"].shape, -1)
    document = 0
    for row, feature in enumerate(features):
        at = 0
        for length in feature.get("seq_lengths", [len(feature["input_ids"])]):
            owners[row, at : at + length] = document
            at, document = at + length, document + 1
    return owners


def pad_documents(features: Sequence[Feature]) -> dict[str, Tensor]:
    """A padded batch: one document a row, an attention mask for the rest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from packed_attn.demo.model import PAD_ID

    ids = [torch.as_tensor(f["input_ids"]) for f in features]
    labels = [torch.as_tensor(f["labels"]) for f in features]
    ones = [torch.ones_like(i) for i in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence(ones, batch_first=True, padding_value=0),
    }


def concatenate(features: Sequence[Feature]) -> dict[str, Tensor]:
    """Naive packing: the tokens of packs, with nothing said about documents."""
    return _stacked(features, "input_ids", "labels")


def with_position_ids(features: Sequence[Feature]) -> dict[str, Tensor]:
    """Stock transformers packing: positions that restart, from which it makes a T x T mask."""
    return _stacked(features, "input_ids", "labels", "position_ids")


def with_layout(features: Sequence[Feature]) -> dict[str, Any]:
    """packed-attn's collator, called as a user would."""
    from packed_attn import PackedCollator

    return PackedCollator()(features)


def patched(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """packed-attn's model patch, called as a user would."""
    from packed_attn import patch_model

    return patch_model(model)


def unchanged(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as transformers makes it."""
    return model


ROWS = {
    "padded": Row("padded, batch of 8", False, pad_documents, unchanged),
    "naive": Row("naive packing", True, concatenate, unchanged),
    "stock": Row("stock transformers packing", True, with_position_ids, unchanged),
    "packed": Row("packed-attn", True, with_layout, patched),
}


def _features(row: Row, documents: datasets.Dataset, settings: Settings) -> datasets.Dataset:
    from packed_attn import pack_dataset

    return pack_dataset(documents, settings.capacity) if row.packs else documents


def _fresh_model(settings: Settings) -> LlamaForCausalLM:
    from packed_attn.demo.model import build_model

    return build_model(
        vocab_size=settings.vocab_size, capacity=settings.capacity, seed=settings.seed
    )


def _probe(row: Row, settings: Settings, device: Any) -> dict[str, Any]:
    """Gradient error and leaks of the untrained model on the probe documents."""
    import datasets

    from packed_attn.demo import measure

    documents = probe_documents(settings)
    features = list(_features(row, datasets.Dataset.from_list(documents), settings))
    batch = _to_device(row.collate(features), device)
    owners = token_owners(features, batch)
    alone, model = _fresh_model(settings).to(device), row.prepare(_fresh_model(settings).to(device))
    completion_tokens = measure.count_completion_tokens(documents)
    return {
        "gradient_error": measure.relative_error(
            measure.gradient(model, batch, completion_tokens),
            measure.gradient_alone(alone, documents),
        ),
        "leaked_tokens": measure.count_leaked_tokens(model, batch, owners, settings.seed),
        "probe_tokens": int((owners >= 0).sum()),
    }


def _stacked(features: Sequence[Feature], *names: str) -> dict[str, Tensor]:
    import torch

    return {name: torch.tensor([f[name] for f in features]) for name in names}


def _to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: one row, results as JSON in the output folder."""
    parser = argparse.ArgumentParser(prog="python -m packed_attn.demo.rows", description=__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(arguments)
    result = train_row(parsed.row, Settings.load(parsed.output))
    (parsed.output / f"row-{parsed.row}.json").write_text(json.dumps(asdict(result), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
