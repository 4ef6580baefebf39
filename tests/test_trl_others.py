"""TRL's other trainers, stable and experimental: a patched model gives what the unpatched one does,
with its padding and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packed_attn import patch_model
from tests.test_trl import model_for, pairs, settings, texts
from tests.test_trl import tokenizer as tokenizer  # a fixture

pytest.importorskip("trl.trainer.distillation_trainer", reason="TRL has no DistillationTrainer")

GENERATED = 9
ROLLOUTS = {
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": GENERATED,
}
# Times, and means of logits that count padding, which is zero in a pack.
UNLIKE = ("time", "per_second", "logits/")


def prompts() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [t[: 12 + i % 7] for i, t in enumerate(texts())]})


def chats(column: str = "messages") -> datasets.Dataset:
    rows = [
        [{"role": "user", "content": t[: 12 + i % 7]}, {"role": "assistant", "content": t[12:40]}]
        for i, t in enumerate(texts())
    ]
    return datasets.Dataset.from_dict(
        {column: rows if column == "messages" else [r[:1] for r in rows]}
    )


def judged() -> datasets.Dataset:
    rows = [
        {"prompt": t[:20], "completion": t[20 : 35 + 5 * (i % 4)], "label": bool(i % 2)}
        for i, t in enumerate(texts())
    ]
    return datasets.Dataset.from_list(rows)


def triples() -> datasets.Dataset:
    return pairs().map(lambda row: {"reference": row["chosen"][::-1]})


def hinted() -> datasets.Dataset:
    return prompts().add_column("privileged_context", [t[20:50] for t in texts()])  # type: ignore[call-arg]


def reward(completion_ids: Any = None, completions: Any = (), **_: Any) -> list[float]:
    found = completions if completion_ids is None else completion_ids
    return [float(sum(map(ord, str(x))) % 2) for x in found]


class Case:
    """One trainer: where it is, its data, settings, and which models it is given beside its own.

    Args:
        where: module of TRL, and the trainer's name without "Trainer".
        data: makes the data set.
        others: argument by which it gets a second model, patched likewise.
        rewards: whether it takes a reward function.
        options: of its config.
    """

    def __init__(
        self,
        where: str,
        data: Callable[[], datasets.Dataset],
        *,
        others: str = "",
        rewards: bool = False,
        **options: Any,
    ) -> None:
        self.module, self.name = where.split(":")
        self.data, self.others, self.rewards, self.options = data, others, rewards, options

    def trainer(
        self, folder: Path, model: Any, tokenizer: Any, patched: Callable[[Any], Any]
    ) -> Any:
        module = import_module(self.module)
        given: dict[str, Any] = {"reward_funcs": reward} if self.rewards else {}
        if self.others:
            other = str(folder / "other")  # some load a tokenizer from its path
            model_for(tokenizer, seed=1).save_pretrained(other)
            tokenizer.save_pretrained(other)
            given[self.others] = patched(AutoModelForCausalLM.from_pretrained(other))
        trainer = getattr(module, f"{self.name}Trainer")(
            model,
            args=getattr(module, f"{self.name}Config")(**settings(folder, **self.options)),
            train_dataset=self.data(),
            processing_class=tokenizer,
            **given,
        )
        loaded = getattr(trainer, "ref_model", None)
        if loaded is not None and not self.others:
            patched(loaded)
        return trainer


CASES = {
    "distillation": Case(
        "trl:Distillation",
        lambda: chats("prompt"),
        others="teacher_model",
        max_completion_length=GENERATED,
    ),
    "kto": Case("trl:KTO", judged, others="ref_model", per_device_train_batch_size=4),
    "rloo": Case("trl:RLOO", prompts, rewards=True, beta=0.1, **ROLLOUTS),
    "orpo": Case("trl.experimental.orpo:ORPO", pairs),
    "cpo": Case("trl.experimental.cpo:CPO", pairs),
    "tpo": Case("trl.experimental.tpo:TPO", triples),
    "gkd": Case("trl.experimental.gkd:GKD", chats, others="teacher_model", lmbda=0.0),
    "gkd, on policy": Case(
        "trl.experimental.gkd:GKD",
        chats,
        others="teacher_model",
        lmbda=1.0,
        max_new_tokens=GENERATED,
    ),
    "gold": Case("trl.experimental.gold:GOLD", chats, others="teacher_model", lmbda=0.0),
    "iw-opd": Case(
        "trl.experimental.iw_opd:IWOPD",
        chats,
        others="teacher_model",
        max_completion_length=GENERATED,
    ),
    "online dpo": Case(
        "trl.experimental.online_dpo:OnlineDPO",
        prompts,
        others="ref_model",
        rewards=True,
        max_new_tokens=GENERATED,
    ),
    "gmpo": Case("trl.experimental.gmpo:GMPO", prompts, rewards=True, **ROLLOUTS),
    "sdpo": Case("trl.experimental.sdpo:SDPO", prompts, rewards=True, **ROLLOUTS),
    "sdft": Case("trl.experimental.sdft:SDFT", hinted, **ROLLOUTS),
}
FAST = ("distillation", "kto", "orpo")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in FAST else [pytest.mark.slow])
        for name, case in CASES.items()
    ],
)
def test_a_run_equals_that_of_the_unpatched_model(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every figure that the trainer logs in two steps, patched plainly and with shared prompts."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    model_for(tokenizer).save_pretrained(tmp_path / "model")  # some load a reference from disk
    talking: Any = copy.deepcopy(tokenizer)
    talking.bos_token = "<s>"
    talking.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"

    def run(patched: Callable[[Any], Any]) -> list[dict[str, float]]:
        model = patched(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
        trainer = case.trainer(tmp_path, model, talking, patched)
        trainer.train()
        return [
            {k: v for k, v in entry.items() if not any(word in k for word in UNLIKE)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]

    want = run(lambda model: model)
    assert all(entry["grad_norm"] > 0 for entry in want)
    for options in ({}, {"padding_free": True, "share_prefixes": True}):
        for ours, theirs in zip(run(partial(patch_model, **options)), want, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5, nan_ok=True)
