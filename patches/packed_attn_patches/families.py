"""Which model types are accepted and by which route, and the reason against every other model."""

from __future__ import annotations

from enum import Enum

from torch import nn
from transformers import PreTrainedModel

from packed_attn_patches.interface import NAMES


class Route(Enum):
    """How a model is made exact."""

    INTERFACE = "its attention layers take the layout"
    UNPACK_CAUSAL = "it runs on documents batched by length, right-padded"
    UNPACK = "it runs on documents batched by equal length"


# fmt: off
# Proven exact through the attention interface.
INTERFACE = frozenset({
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bert", "bert-generation",
    "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm",
    "dbrx", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "electra", "ernie",
    "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma",
    "gemma2", "gemma3_text", "gemma3n_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "jetmoe", "kolibri1", "laguna", "llama", "llama4_text", "longcat_flash",
    "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral",
    "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "roc_bert", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu",
})
# Proven exact unpacked: outputs never depend on later tokens, so right padding reaches nothing.
UNPACK_CAUSAL = frozenset({
    "axk2", "bailing_hybrid", "bamba", "bart", "big_bird", "bigbird_pegasus", "blenderbot",
    "blenderbot-small", "bloom", "camembert", "codegen", "data2vec-text", "deepseek_v32",
    "deepseek_v4", "doge", "dots3_note_text", "falcon", "falcon_h1", "gemma4_text",
    "gemma4_unified_text", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gptj",
    "granitemoehybrid", "hy_v4", "inkling2_text", "inkling_text", "jamba", "kimi_linear",
    "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2", "marian", "mbart", "megatron-bert",
    "minimax", "minimax_m3_vl_text", "mpt", "mvp", "nemotron_h", "olmo_hybrid", "openai-gpt",
    "pegasus", "plbart", "qwen3_5_text",
})
# fmt: on


def route(model: nn.Module, on_unknown: str) -> Route:
    """How to make `model` exact.

    Raises:
        NotImplementedError: it is not known to be exact, with the reason and the ways out.
    """
    if not isinstance(model, PreTrainedModel):
        raise _refused(
            model, "it is not a transformers PreTrainedModel; patch the model inside its wrapper"
        )
    model_type = model.config.model_type
    if model_type in INTERFACE:
        stock = model.config._attn_implementation
        if stock not in NAMES:
            known = ", ".join(NAMES)
            raise _refused(model, f"its attention implementation {stock!r} is not one of {known}")
        if stock == "sdpa" and getattr(model.config, "attn_logit_softcapping", None) is not None:
            raise _refused(
                model,
                "sdpa leaves out its softcap, so no document alone has the logits that it should; "
                "load it with attn_implementation='eager'",
            )
        return Route.INTERFACE
    if model_type in UNPACK_CAUSAL:
        return Route.UNPACK_CAUSAL
    if on_unknown == "unpack":
        return Route.UNPACK
    raise _refused(
        model,
        f"model type {model_type!r} is not among those proven exact. on_unknown='unpack' runs it "
        "on documents batched by equal length, exact and slower; audit(model) shows what leaks",
    )


def _refused(model: nn.Module, reason: str) -> NotImplementedError:
    return NotImplementedError(f"patch_model refuses {type(model).__name__}: {reason}")
