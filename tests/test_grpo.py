"""TRL's GRPO on given rollouts: a patched model gives what padding gives, in fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from packed_attn import patch_model
from tests.exactness import relative
from tests.models import tiny_config
from tests.small_tokenizer import save_tokenizer

pytest.importorskip("trl", reason="TRL is not installed")

from trl import GRPOConfig, GRPOTrainer

GROUP = 4
# Of the two prompts of each step, and of the eight completions.
PROMPTS = {"a": 40, "b": 23, "c": 31, "d": 18}
COMPLETIONS = (1, 6, 11, 4, 9, 2, 7, 12)
# Tokens of the first micro-batch: eight rows of the longest prompt and the longest completion, the
# real ones, and those with each prompt once.
PADDED, REAL, SHARED = 8 * (40 + 12), 4 * (40 + 23) + 52, 40 + 23 + 52
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
FOREST = {"padding_free": True, "share_prefixes": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return PreTrainedTokenizerFast.from_pretrained(folder, pad_token="<s>", eos_token="</s>")


def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """The same completions in every run, drawn anew in every step."""
    generator = torch.Generator().manual_seed(trainer.state.global_step)

    def draw(n: int) -> list[int]:
        return torch.randint(5, 150, (n,), generator=generator).tolist()

    drawn = {name: draw(length) for name, length in PROMPTS.items()}
    completions = [draw(n) for n in COMPLETIONS]
    return {
        "prompt_ids": [drawn[name] for name in prompts],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(c) for c in completions],
    }


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


@dataclass(frozen=True)
class Run:
    """Figures of each step, weights, and the tokens of each forward of policy and reference."""

    logged: list[dict[str, float]]
    weights: dict[str, Tensor]
    policy_tokens: list[int]
    reference_tokens: list[int]


def run(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    path: str,
    patch: dict[str, bool] | None,
    **settings: Any,
) -> Run:
    """Four optimizer steps of GRPO on a patched or an unpatched model."""
    model = AutoModelForCausalLM.from_pretrained(path)
    if patch is not None:
        patch_model(model, **patch)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments(folder, **settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": list(PROMPTS)}),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )
    if patch is not None and trainer.ref_model is not None:
        patch_model(trainer.ref_model, **patch)
    policy_tokens, reference_tokens = counted(model), counted(trainer.ref_model)
    trainer.train()
    logged = [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return Run(logged, weights, policy_tokens, reference_tokens)


def arguments(folder: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        learning_rate=1e-3,
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_completion_length=max(COMPLETIONS),
        shuffle_dataset=False,
        **settings,
    )


def counted(model: Any) -> list[int]:
    """Tokens of each forward of a model's layers, filled while it runs."""
    tokens: list[int] = []
    if model is not None:
        layer = model.base_model.layers[0]
        layer.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
    return tokens


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize(
    ("family", "patch", "tokens", "settings"),
    [
        # Rollouts that are used twice have log-probs of the old policy and clipped ratios.
        ("llama", FOREST, SHARED, {"num_iterations": 2, "beta": 0.1, "epsilon": 1e-3}),
        pytest.param(
            "llama", {"padding_free": True}, REAL, {"loss_type": "cispo"}, marks=pytest.mark.slow
        ),
        pytest.param(
            "qwen3",
            FOREST,
            SHARED,
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gemma2", FOREST, SHARED, {"top_entropy_quantile": 0.5}, marks=pytest.mark.slow
        ),
        # With a loss over the router's choices.
        pytest.param(
            "gpt_oss",
            FOREST,
            SHARED,
            {"loss_type": "bnpo", "entropy_coef": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_grpo_equals_its_padded_run(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    patch: dict[str, bool],
    tokens: int,
    settings: dict[str, Any],
) -> None:
    """Every figure that the trainer logs, and the way that the weights go."""
    torch.manual_seed(0)
    start = AutoModelForCausalLM.from_config(tiny_config(family))
    start.save_pretrained(tmp_path / family)  # GRPO loads its reference from disk
    want = run(tmp_path, tokenizer, str(tmp_path / family), None, **settings)
    got = run(tmp_path, tokenizer, str(tmp_path / family), patch, **settings)

    for ours, theirs in zip(got.logged, want.logged, strict=True):
        assert theirs["grad_norm"] > 0
        assert ours == pytest.approx(theirs, rel=5e-5, abs=1e-6)
    begun = dict(start.named_parameters())
    ways = [{n: w - begun[n].detach() for n, w in r.weights.items()} for r in (got, want)]
    assert relative(ways[0], ways[1]) <= 1e-4

    assert (want.policy_tokens[0], got.policy_tokens[0]) == (PADDED, tokens)
    assert sum(got.policy_tokens) < sum(want.policy_tokens)
    assert (
        len(want.reference_tokens) == len(got.reference_tokens) == (2 if "beta" in settings else 0)
    )
    assert sum(got.reference_tokens) <= sum(want.reference_tokens)
