"""Training one row for a fixed time with Hugging Face's Trainer, counting real tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from packed_attn.demo.measure import PeakMemory, device_of
from packed_attn.demo.settings import Settings

WARMUP_STEPS = 2


@dataclass(frozen=True)
class Trained:
    """What training gave: steps, real tokens and seconds after the warm-up, and peak memory."""

    steps: int
    real_tokens: int
    seconds: float
    peak_mib: float


def train(
    model: nn.Module,
    features: datasets.Dataset,
    *,
    collate: Callable[[Any], dict[str, Any]],
    batch_size: int,
    settings: Settings,
    title: str,
) -> Trained:
    """Trains `model` in place for `settings.train_seconds`, warm-up steps not counted.

    Every row gets the same arguments; only batch, collator and model patch differ.
    """
    device = device_of(model)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock(settings.train_seconds, device, title)
        trainer = _CountingTrainer(
            clock,
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                num_train_epochs=10_000,
                learning_rate=3e-3,
                lr_scheduler_type="constant",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device.type == "cpu",
                seed=settings.seed,
            ),
            train_dataset=features,
            data_collator=collate,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        memory = PeakMemory(device)
        trainer.train()
        return Trained(clock.steps, clock.real_tokens, clock.seconds, memory.mib())


class _CountingTrainer(Trainer):
    """A Trainer that tells the clock how many real tokens each step has."""

    def __init__(self, clock: _Clock, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._clock = clock

    def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Any:
        mask = inputs.get("attention_mask")
        self._clock.step_tokens = int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *rest, **options)


class _Clock(TrainerCallback):
    """Stops training when the time is up, and draws the progress bar."""

    def __init__(self, limit: float, device: torch.device, title: str) -> None:
        self._limit, self._device = limit, device
        bar_format = "{desc} {bar} {n:.0f}/{total:.0f} s"
        self._bar = tqdm(total=limit, desc=f"{title:>28}", bar_format=bar_format)
        self._start = 0.0
        self.step_tokens = self.real_tokens = self.steps = 0
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= WARMUP_STEPS:
            self._start = self._now()
            return
        self.steps += 1
        self.real_tokens += self.step_tokens
        self.seconds = self._now() - self._start
        self._bar.update(min(self.seconds, self._limit) - self._bar.n)
        if self.seconds >= self._limit:
            self._bar.close()
            control.should_training_stop = True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
