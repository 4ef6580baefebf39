"""Trainer callbacks: a watch over isolation while training runs, and what packing gives.

    trainer.add_callback(IsolationCallback(trainer, every=500))
    trainer.add_callback(PackingCallback(trainer))

Both hand their figures to `trainer.log`, so every logger that the trainer reports to gets them;
Trainer gives its callbacks no way of their own to do so, hence the argument.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from packed_attn.audit import OneDocument, leaks_between_documents
from packed_attn.facts import peak_flops
from packed_attn.layout import DocumentLayout


class IsolationError(RuntimeError):
    """Documents of a training batch saw each other, or nothing told them apart."""


class IsolationCallback(TrainerCallback):
    """Proves on the live model and batch, every so many steps, that documents stay apart.

    The gradient probe of `audit.leaks_between_documents` costs about two training steps. The batch
    is taken as the data loader made it, before any hook of the model reads it, so boundaries that
    are lost, or contradict each other, on their way into the model are found too. Logs
    `isolation/largest_gradient`, 0.0 where documents are apart.

    Args:
        trainer: whose run is watched.
        every: steps between probes; the first step is always probed.

    Raises (from the run):
        IsolationError: a leak, boundaries that contradict each other, or a packed data set whose
            batches carry no boundaries.
    """

    def __init__(self, trainer: Trainer, *, every: int = 500) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        self._trainer, self._every = trainer, every
        self._batch = Watch()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watches the model of this run."""
        self._batch.follow(self._trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probes on the first step and every `every` steps."""
        if state.global_step != 1 and state.global_step % self._every:
            return
        batch = self._batch.latest
        if batch is None:
            raise IsolationError(
                f"step {state.global_step}: the model was trained past the forward that is watched"
            )
        if not _carries_boundaries(batch):
            if not _is_packed(kwargs.get("train_dataloader")):
                return  # one document a row: nothing to keep apart
            raise IsolationError(
                f"step {state.global_step}: the data set is packed, but its batches carry no "
                f"boundaries, only {sorted(batch)}: its documents see each other"
            )
        found = self._largest(state.global_step, batch)
        _log(self._trainer, control, {"isolation/largest_gradient": found})

    def _largest(self, step: int, batch: Mapping[str, Any]) -> float:
        model: nn.Module = self._trainer.model  # type: ignore[assignment]
        try:
            with _uncounted(self._trainer):
                leak = leaks_between_documents(model, batch)
        except OneDocument:
            return 0.0
        except ValueError as error:
            raise IsolationError(f"step {step}: {error}") from error
        if leak is not None:
            raise IsolationError(f"step {step}: {leak}")
        return 0.0


class PackingCallback(TrainerCallback):
    """Logs, whenever the trainer logs, what packing gave since the last time:

        packing/tokens_per_second        real tokens of this process, padding not counted
        packing/fill                     real tokens / tokens in the rows
        packing/padding_saved            share of a padded batch of the same documents that would
                                         have been padding, or copies of shared prefixes
        packing/documents_per_step
        packing/attention_teraflop       of attention alone in one step, forward and backward
        packing/mfu                      model FLOPs / peak FLOPs, on a GPU whose peak is known

    The probes of an `IsolationCallback` count neither as tokens nor as time.

    Args:
        trainer: whose run is measured.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batch = Watch(self._count)
        self._counts = True
        self._reset()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watches the model of this run and starts the clock."""
        self._batch.follow(self._trainer)
        self._reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs what the steps since the last log add up to."""
        self._steps += 1
        if control.should_log and self._real:
            _log(self._trainer, control, self._figures())
            self._reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, neither tokens nor time count."""
        device: Any = self._trainer.model.device  # type: ignore[union-attr]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the step that is still running does count
        began, self._counts = time.perf_counter(), False
        try:
            yield
        finally:
            self._counts = True
            self._since += time.perf_counter() - began

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._steps = self._real = self._tokens = self._documents = self._padded = self._squares = 0
        # Of batches that share prefixes, what their documents are made of: on the device, where
        # reading it at every step would be a wait.
        self._shared: list[tuple[Tensor, tuple[int, ...]]] = []

    def _count(self, batch: Mapping[str, Any]) -> None:
        layout = batch.get("layout")
        if not self._counts or not isinstance(layout, DocumentLayout):
            return
        padding = (False,) * layout.num_documents
        if layout.padding is not None:
            padding = tuple(layout.to("cpu").padding.tolist())  # type: ignore[union-attr]
        lengths = [n for n, pads in zip(layout.lengths, padding) if n and not pads]
        self._real += sum(lengths)
        self._tokens += layout.total_tokens
        self._squares += sum(n * n for n in lengths)
        if layout.is_forest:
            before = layout.to("cpu").forest_tensors().path_offset.tolist()
            self._squares += sum(2 * n * k for n, k in zip(layout.lengths, before))
            self._shared.append((batch["document_paths"][0], layout.lengths))
        else:
            self._add(lengths)

    def _add(self, documents: list[int]) -> None:
        """Whole documents of a batch."""
        self._documents += len(documents)
        self._padded += len(documents) * max(documents, default=0)

    def _figures(self) -> dict[str, float]:
        for paths, lengths in self._shared:
            self._add(_whole_lengths(paths, lengths))
        seconds = time.perf_counter() - self._since
        attention = self._squares * self._attention_flops_per_square()
        figures = {
            "packing/tokens_per_second": self._real / seconds,
            "packing/fill": self._real / self._tokens,
            "packing/padding_saved": 1.0 - self._real / self._padded,
            "packing/documents_per_step": self._documents / self._steps,
            "packing/attention_teraflop": attention / self._steps / 1e12,
        }
        model: Any = self._trainer.model
        peak = peak_flops(model.device, model.dtype)
        if peak is not None:
            parameters = sum(p.numel() for p in model.parameters())
            figures["packing/mfu"] = (6 * parameters * self._real + attention) / seconds / peak
        return figures

    def _attention_flops_per_square(self) -> float:
        """Of a document of n tokens, over n^2, forward and backward: two and four products on the
        half of the square that a causal mask leaves."""
        config: Any = self._trainer.model.config.get_text_config()  # type: ignore[union-attr]
        heads = getattr(config, "num_attention_heads", 0) or 0
        width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        products = 2 + 4
        return products * 2 * heads * width * config.num_hidden_layers / 2


@contextmanager
def _uncounted(trainer: Trainer) -> Iterator[None]:
    """What runs inside is not the training that this trainer's callbacks measure."""
    with ExitStack() as stack:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PackingCallback):
                stack.enter_context(callback.paused())
        yield


def _whole_lengths(paths: Tensor, pieces: tuple[int, ...]) -> list[int]:
    """Tokens of each document whose pieces, of these lengths, are shared."""
    lengths: dict[int, int] = {}
    for document, piece in paths.t().tolist():
        lengths[document] = lengths.get(document, 0) + pieces[piece]
    return list(lengths.values())


def _log(trainer: Trainer, control: Any, figures: dict[str, float]) -> None:
    """Logs beside what the trainer is about to log itself: a log takes its order to do so back."""
    should_log = control.should_log
    trainer.log(figures)
    control.should_log = should_log


class Watch:
    """A forward pre-hook that keeps the latest training batch, as the data loader made it."""

    def __init__(self, then: Any = None) -> None:
        self.latest: dict[str, Any] | None = None
        self._then = then

    def follow(self, trainer: Trainer) -> None:
        """Keeps the batches of the trainer's model, which with `model_init` is another in each run.

        Before any other hook, as those of a patch read the batch and hand on another.
        """
        model: Any = trainer.model
        if self not in model._forward_pre_hooks.values():
            self.latest = None
            model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training:
            self.latest = {k: v for k, v in kwargs.items() if _is_of_the_batch(v)}
            if self._then is not None:
                self._then(self.latest)

    def __getstate__(self) -> dict[str, Any]:
        return {"latest": None, "_then": None}


def _is_of_the_batch(value: Any) -> bool:
    return isinstance(value, Tensor | DocumentLayout | int | float | bool) or value is None


def _carries_boundaries(batch: Mapping[str, Any]) -> bool:
    """Whether anything in the batch can tell documents of a row apart."""
    for name in ("layout", "cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx"):
        if batch.get(name) is not None:
            return True
    mask, position_ids = batch.get("attention_mask"), batch.get("position_ids")
    segments = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask > 1).any())
    restarts = isinstance(position_ids, Tensor) and bool(
        (position_ids[..., 1:] != position_ids[..., :-1] + 1).any()
    )
    return segments or restarts


def _is_packed(loader: Any) -> bool:
    """Whether a data loader's rows hold several documents, as far as its data set tells."""
    dataset = getattr(loader, "dataset", None)
    names = getattr(dataset, "column_names", None) or ()
    if "seq_lengths" in names:
        return True
    try:
        feature = dataset[0]  # type: ignore[index]
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return False
    if not isinstance(feature, Mapping):
        return False
    positions = feature.get("position_ids")
    restarts = positions is not None and bool((torch.as_tensor(positions)[1:] == 0).any())
    return "seq_lengths" in feature or restarts
