"""A whole training step: packed-attn, and stock transformers packed, padded and contaminated.

    python -m benchmarks.bench_training_step [--model NAME ...] [--capacities N ...] [--json FILE]

Log-normal documents; forward, backward and an AdamW step on the same ones. Stock packing is shown
at its best: position_ids and no cache, which keeps documents apart. The contaminated step takes the
pack as one document: the speed and the memory of attending wrongly, for scale. Candidates take
turns; figures are medians over rounds of the ratio inside a round. Losses of the exact candidates
are compared before anything is timed.

Models: `demo` in float32, and at real sizes in bfloat16 `llama3-8b-layers` (four layers of Llama 3
8B under a small vocabulary) and `qwen3-0.6b` (whole). On a GPU there are also MFU, memory, kernel
launches and host waits of a step, and our step as one CUDA graph, whose loss on other documents is
first held against the eager one: not yet run on one. All models stay in memory, so that steps can
take turns: at capacity 8192 `qwen3-0.6b` needs some 50 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.graphed_step import Capturing, GraphedStep
from benchmarks.graphs import Capture
from benchmarks.timing import median_ratio, paired_milliseconds
from packed_attn import PackedCollator, patch_model
from packed_attn.demo.batches import pad_documents, to_device
from packed_attn.demo.model import build_model
from packed_attn.demo.settings import use_all_cores
from packed_attn.errors import first_line
from packed_attn.facts import gpu_facts, machine_facts, peak_flops
from tests.cases import log_normal_lengths

VOCABULARY = 2048
PADDED_ROWS = 8
OURS, CONTAMINATED = "packed-attn", "contaminated"
GRAPH = "packed-attn, CUDA graph"
# Relative to the loss: exact candidates sum in other orders, and half precision rounds at each.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# A graph runs the same kernels on the same numbers. Boundaries of the wrong documents would hide
# other targets than the batch's, one a document, and change the loss by some 1e-3.
GRAPH_TOLERANCE = 1e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Times every model at every capacity and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["demo"])
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="one tiny step, to see that it runs")
    parser.add_argument("--json", type=Path, default=None)
    parsed = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = use_all_cores()
    capacities = [128] if parsed.toy else parsed.capacities
    rounds = 1 if parsed.toy else parsed.rounds
    facts = machine_facts("torch", "transformers") | gpu_facts() | {"threads": str(threads)}
    rows = []
    for name in parsed.model:
        for capacity in capacities:
            rows.append(measure(capacity, rounds, device, name, toy=parsed.toy))
            print(_line(rows[-1]), flush=True)
            if parsed.json is not None:  # at once: a run may be ended
                text = json.dumps({"machine": facts, "steps": rows}, indent=2)
                parsed.json.write_text(text + "\n")
    return 0


def measure(
    capacity: int, rounds: int, device: str, name: str = "demo", *, toy: bool = False
) -> dict[str, Any]:
    """One step of each candidate on one pack of `capacity` tokens, `rounds` times in turns."""
    documents = _documents(capacity)
    lengths = [document.numel() for document in documents]
    batches = {
        OURS: [_packed(documents)],
        "stock packing": [_stock(documents)],
        "padded": _padded(documents, PADDED_ROWS),
        CONTAMINATED: [_contaminated(documents)],
    }
    steps = {
        key: Step(_built(name, capacity, toy, device), device, batch, patched=key == OURS)
        for key, batch in batches.items()
    }
    # The others take memory for their gradients and optimizers first: what is left must do.
    for key in (OURS, "stock packing", CONTAMINATED):
        steps[key](-1)
    padded_rows = _make_fit(steps["padded"], documents)
    losses = {key: step(-1).item() for key, step in steps.items()}
    error = max(abs(loss - losses[OURS]) for key, loss in losses.items() if key != CONTAMINATED)
    if error > LOSS_TOLERANCE[steps[OURS].dtype] * losses[OURS]:
        raise RuntimeError(f"losses differ, so nothing is timed: {losses}")
    times = paired_milliseconds(steps, device, runs=rounds, warmup=1)
    seconds = statistics.median(times[OURS]) / 1e3
    over = {key: median_ratio(times[key], times[OURS]) for key in steps if key != OURS}
    row = {
        "model": name,
        "capacity": capacity,
        "documents": len(lengths),
        "tokens_per_second": capacity / seconds,
        "over_stock": over["stock packing"],
        "over_padded": over["padded"],
        "over_contaminated": over[CONTAMINATED],
        "padded_rows": padded_rows,
        "loss_error": error,
        **_utilisation(steps[OURS], lengths, seconds, device),
    }
    if device == "cuda":
        row |= {key: step.on_gpu() for key, step in steps.items()}
        step = steps.pop(OURS)
        steps.clear()  # the graph keeps the memory of its step for itself
        torch.cuda.empty_cache()
        row[GRAPH] = graphed(step, capacity, rounds, device, Capture)
    return row


def graphed(
    step: Step, capacity: int, rounds: int, device: str, capture: Callable[[], Capturing]
) -> dict[str, Any]:
    """The step as one CUDA graph beside the eager one, or the reason why there is none."""
    packs = [
        to_device(_packed(_documents(capacity, seed)), torch.device(device)) for seed in (0, 1)
    ]
    most = 2 * max(pack["layout"].num_documents for pack in packs)
    try:
        graph = GraphedStep(step.run, packs[0], most, capture())
        errors = []
        for pack in reversed(packs):
            eager = step.run([pack], _targets(pack["labels"])).item()
            errors.append(abs(graph(pack).item() - eager) / eager)
        if max(errors) > GRAPH_TOLERANCE:
            return {"reason": f"its losses differ by {max(errors):.1e}, so it is not timed"}
        candidates = {
            OURS: lambda n: step.run([packs[n % 2]], _targets(packs[n % 2]["labels"])),
            GRAPH: lambda n: graph(packs[n % 2]),
        }
        times = paired_milliseconds(candidates, device, runs=rounds, warmup=1)
        found = {
            "tokens_per_second": 1e3 * capacity / statistics.median(times[GRAPH]),
            "eager_over_graph": median_ratio(times[OURS], times[GRAPH]),
            "loss_error": max(errors),
        }
        return found | (launches(lambda: graph(packs[0])) if device == "cuda" else {})
    except Exception as error:  # whatever a capture stumbles over
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}


def packed_pack(capacity: int) -> dict[str, Any]:
    """The batch of one pack of `capacity` tokens."""
    return _packed(_documents(capacity))


class Step:
    """One optimizer step over the batches; a call returns the token mean of the loss."""

    def __init__(
        self, model: nn.Module, device: str, batches: list[dict[str, Any]], *, patched: bool
    ) -> None:
        self.model: Any = model.to(device).train()
        if patched:
            patch_model(self.model)
        self.dtype = next(self.model.parameters()).dtype
        options: dict[str, Any] = {"fused": True, "capturable": True} if device == "cuda" else {}
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, **options)
        self._device = torch.device(device)
        self.take(batches)

    def take(self, batches: list[dict[str, Any]]) -> None:
        """Makes these the batches of a step."""
        self._batches = [to_device(batch, self._device) for batch in batches]
        self._number = torch.stack([_targets(batch["labels"]) for batch in self._batches]).sum()

    def __call__(self, _: int) -> Tensor:
        return self.run(self._batches, self._number)

    def run(self, batches: list[dict[str, Any]], number: Tensor) -> Tensor:
        """A step over other batches, on the device, with this number of targets in all."""
        self._optimizer.zero_grad()
        losses = []
        for batch in batches:
            loss = self.model(**batch, num_items_in_batch=number).loss
            loss.backward()
            losses.append(loss.detach())
        self._optimizer.step()
        return torch.stack(losses).sum()

    def on_gpu(self) -> dict[str, int]:
        """Bytes above what the model holds anyway, kernels launched, waits of the host; a step."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        self(0)
        peak = torch.cuda.max_memory_allocated() - resident
        return {"step_bytes": peak, **launches(lambda: self(0))}


def launches(call: Callable[[], object]) -> dict[str, int]:
    """Kernels that a call runs on the GPU, and waits of the host for it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    kernels = sum(e.device_type.name == "CUDA" for e in profile.events() or ())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call()
        torch.cuda.set_sync_debug_mode("default")
    # torch also warns, once, that the mode is a prototype.
    waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
    return {"kernels": kernels, "host_waits": waits}


def _built(name: str, capacity: int, toy: bool, device: str) -> nn.Module:
    """The model with weights drawn where it runs: a processor would need a minute for them."""
    with torch.device(device):
        return MODELS[name](capacity, toy)


def _make_fit(step: Step, documents: list[Tensor], rows: int = PADDED_ROWS) -> int:
    """Halves the padded batches until their logits fit in memory; the rows of a batch."""
    while True:
        step.take(_padded(documents, rows))
        try:
            step(-1)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        torch.cuda.empty_cache()


def _utilisation(
    step: Step, lengths: Sequence[int], seconds: float, device: str
) -> dict[str, float]:
    """MFU: 6 operations a parameter and token, and 6 products on each document's half square."""
    peak = peak_flops(torch.device(device), step.dtype)
    if peak is None:
        return {}
    config = step.model.config
    width = config.num_attention_heads * config.head_dim
    attention = 6 * width * config.num_hidden_layers * sum(n * n for n in lengths)
    parameters = sum(p.numel() for p in step.model.parameters())
    return {"mfu": (6 * parameters * sum(lengths) + attention) / seconds / peak}


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['model']}, capacity {row['capacity']:>6}, {row['documents']:>3} documents: "
        f"{row['tokens_per_second']:>9,.0f} real tokens/s, {row['over_stock']:.2f}x stock packing, "
        f"{row['over_padded']:.2f}x padded, {row['over_contaminated']:.2f}x contaminated; losses "
        f"differ by {row['loss_error']:.1e}"
    )
    for key in (OURS, "stock packing", "padded", CONTAMINATED):
        if key in row:
            text += f"\n  {key}: " + ", ".join(f"{k} {v:,}" for k, v in row[key].items())
    if GRAPH in row:
        text += f"\n  {GRAPH}: {row[GRAPH]}"
    return text + (f"\n  MFU {row['mfu']:.3f}" if "mfu" in row else "")


def _demo(capacity: int, toy: bool) -> nn.Module:
    return build_model(vocab_size=VOCABULARY, capacity=capacity, seed=0)


def _released(kind: str, sizes: dict[str, int], capacity: int, toy: bool) -> nn.Module:
    """A released model's shape with random weights; toys are narrow and two layers deep."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if toy:
        narrow = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        sizes = sizes | narrow | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(
        kind, **sizes, max_position_embeddings=capacity, use_cache=False, dtype="bfloat16"
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


_HEADS = {"head_dim": 128, "num_key_value_heads": 8}
LLAMA3_8B_LAYERS = _HEADS | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "vocab_size": VOCABULARY,
}
QWEN3_0_6B = _HEADS | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
MODELS: dict[str, Callable[[int, bool], nn.Module]] = {
    "demo": _demo,
    "llama3-8b-layers": partial(_released, "llama", LLAMA3_8B_LAYERS),
    "qwen3-0.6b": partial(_released, "qwen3", QWEN3_0_6B),
}


def _documents(capacity: int, seed: int = 0) -> list[Tensor]:
    lengths = log_normal_lengths(capacity, median=capacity / 16, sigma=1.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (n,), generator=generator) for n in lengths]


def _packed(documents: list[Tensor]) -> dict[str, Any]:
    return PackedCollator("documents")([{"input_ids": d} for d in documents])


def _stock(documents: list[Tensor]) -> dict[str, Any]:
    batch = _packed(documents)
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def _contaminated(documents: list[Tensor]) -> dict[str, Any]:
    batch = _packed(documents)
    return {name: batch[name] for name in ("input_ids", "labels")}


def _padded(documents: list[Tensor], rows: int) -> list[dict[str, Any]]:
    features = [{"input_ids": d, "labels": d.clone()} for d in documents]
    return [pad_documents(features[at : at + rows]) for at in range(0, len(features), rows)]


def _targets(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != -100).sum()


if __name__ == "__main__":
    raise SystemExit(main())
