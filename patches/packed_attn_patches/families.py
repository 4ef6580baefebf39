"""Which model types are accepted and by which route, and the reason against every other model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from packed_attn_patches.interface import NAMES, stock_of


class UnknownModelType(NotImplementedError):
    """A model of a type that no table names."""


class Route(Enum):
    """How a model is made exact."""

    INTERFACE = "its attention layers take the layout"
    UNPACK_CAUSAL = "it runs on documents batched by length, right-padded"
    UNPACK_MASKED = "it runs on documents batched by length, right-padded and masked"
    UNPACK = "it runs on documents batched by equal length"
    UNPACK_SINGLE = "it runs on one document at a time"


@dataclass(frozen=True)
class Head:
    """What a model's outputs and loss are of.

    Attributes:
        per_document: logits are one row a document, as of sequence classifiers and reward models.
        shifts: the loss takes a token's label for a prediction of the token before.
    """

    per_document: bool = False
    shifts: bool = True


# Heads by the ending of their class's name; what ends otherwise shifts its labels.
_SEQUENCE = ("ForSequenceClassification",)
_UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")
_CLASSIFIERS = (*_SEQUENCE, "ForTokenClassification")
# Heads whose outputs or losses are of a whole row, and that no unpacking was made for.
_REFUSED = (
    "ForQuestionAnswering",
    "ForQuestionAnsweringSimple",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
    "DoubleHeadsModel",
)
# Decoders whose language-modelling loss does not shift its labels.
UNSHIFTED_TYPES = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "cpmant",
        "flaubert",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
        "prophetnet",
        "trocr",
        "whisper",
        "xlm",
        "xlnet",
    }
)

# Token heads that count their loss where the attention_mask is 1, and so read the empty mask.
_LOSS_READS_MASK = frozenset({"biogpt"})

# Types that hide padding ids of a text where they are given no mask, and not where they are.
HIDES_PADDING_IDS = frozenset({"t5gemma"})

# Types whose forward makes the cache that generation goes on from, and is handed none to fill.
MAKES_ITS_CACHE = frozenset({"minimax", "rwkv"})

# Sequence heads that pool the last place of a row, padding or not.
_POOLS_LAST_PLACE = frozenset({"xlnet"})

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
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3",
    "iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "llama", "llama4_text",
    "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral",
    "ministral3", "mistral", "mistral4", "mixtral", "modernbert-decoder", "nanochat",
    "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "openai_privacy_filter", "opt",
    "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_asr",
    "qwen3_moe", "roc_bert", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2",
    "vaultgemma", "youtu",
})
# Proven exact unpacked: outputs never depend on later tokens, so right padding reaches nothing.
UNPACK_CAUSAL = frozenset({
    "apertus1p5_text", "aria", "axk2", "aya_vision", "bailing_hybrid", "bamba", "bart",
    "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "chameleon", "codegen",
    "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "ctrl",
    "deepseek_ocr2", "deepseek_v32", "deepseek_v4", "deepseek_vl", "deepseek_vl_hybrid",
    "dory", "dots3_note", "dots3_note_text", "emu3", "emu3_text_model",
    "ernie4_5_vl_moe", "exaone", "exaone4_5", "falcon", "falcon_h1", "falcon_mamba", "fuyu",
    "gemma3", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm46v",
    "glm4v", "glm4v_moe", "glm5_next", "glm_moe_dsa", "glm_ocr", "glmga", "got_ocr2",
    "gpt_neo", "gpt_neox_japanese", "gptj", "granite4_vision", "granite_docling",
    "granitemoehybrid", "hunyuan_vl", "hy_v4", "hy_v4_vl", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "inkling2", "inkling2_loop", "inkling2_loop_text",
    "inkling2_text", "inkling_mm_model", "inkling_text", "internvl", "jamba", "janus",
    "kimi_k25", "kimi_linear", "kosmos-2.5", "lara_mini", "lfm2", "lfm2_moe", "lfm2_vl",
    "lfm3", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "mamba", "mamba2", "marian", "mbart", "minicpm_ocr", "minicpmv4_6",
    "minicpmv4_7", "minimax", "minimax_m3_vl", "minimax_m3_vl_text", "mistral3",
    "mistral_large4", "mllama", "mllama_text_model", "moshi", "moss_transcribe_diarize",
    "mpt", "muse_glimmer", "muse_spark", "mvp", "nemotron_h", "nemotron_h_omni",
    "olmo_hybrid", "openai-gpt", "ovis2", "paddleocr_vl", "pegasus", "phi4_multimodal",
    "plbart", "pp_chart2table", "qianfan_ocr", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp",
    "qwen4_exp_text", "recurrent_gemma", "rwkv", "sarvam_mla", "sarvam_moe", "shieldgemma2",
    "smolvlm", "step3p7", "trocr", "unlimited_ocr", "video_llama_3", "video_llava",
    "vipllava", "whisper", "xglm", "zamba", "zamba2", "zaya",
})
# Proven exact unpacked with a mask: encoders, and decoders that may be loaded as encoders.
UNPACK_MASKED = frozenset({
    "albert", "big_bird", "camembert", "data2vec-text", "deberta", "deberta-v2",
    "distilbert", "esm", "esmc", "eurobert", "gte", "ibert", "jina_embeddings_v3",
    "layoutlm", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "megatron-bert",
    "modernbert", "modernvbert", "mpnet", "mt5", "neomme", "nomic_bert", "rembert",
    "roberta", "roberta-prelayernorm", "roformer", "squeezebert", "t5", "tapas",
    "ultrabert", "ultravbert", "umt5", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
})
# Proven exact unpacked without any padding: what mixes tokens takes no mask, or lets later tokens
# change it (doge with transformers 5.17; ProphetNet's relative positions are read from other tokens
# of the row than they are of; MobileBERT embeds a token with the next one, padding or not; XLM and
# FlauBERT count a document's tokens by their ids, and their heads may pool any place of a row).
UNPACK_EQUAL = frozenset({
    "convbert", "cpmant", "doge", "flaubert", "fnet", "mobilebert", "nystromformer",
    "paligemma", "prophetnet", "xlm", "yoso",
})
# Encoder-decoders: source and target documents, unpacked in pairs. Proven exact right-padded and
# masked, in batches of equal lengths, or one pair at a time: rows of one batch share the capacity
# of NLLB's experts. ProphetNet's relative positions reach later tokens (see above), and with sdpa
# and transformers 5.17 UMT5's decoder does, so no padding may stand there.
PAIRS_MASKED = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5",
    "m2m_100", "marian", "mbart", "mt5", "mvp", "pegasus", "pegasus_x", "plbart",
    "seamless_m4t", "seamless_m4t_v2", "switch_transformers", "t5", "t5gemma", "t5gemma2",
})
PAIRS_EQUAL = frozenset({"encoder-decoder", "prophetnet", "umt5"})
PAIRS_SINGLE = frozenset({"nllb-moe"})
# Types whose positions begin behind the padding id.
POSITIONS_AFTER_PADDING = frozenset({
    "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
})
# fmt: on
# Settings with which no document alone has certain outputs, and why.
_BLOCK_SPARSE = (
    "its block-sparse attention depends on the length of the row, and becomes full, for good, with "
    "the first short row that it sees; load it with attention_type='original_full'"
)
# Kernels of flash-attn get no masks.
_CAUSAL_MASKS: tuple[Callable[[Any], bool], str] = (
    lambda model: (
        getattr(model.config, "use_bidirectional_attention", False)
        and "flash" not in (stock_of(model.config._attn_implementation) or "")
    ),
    "with use_bidirectional_attention its masks stay causal, and implementation, padding and "
    "length decide whether they are heeded; load it with attn_implementation='flash_attention_2'",
)
_UNCERTAIN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bamba": (
        lambda model: bool(model.config.z_loss_coefficient),
        "its loss has a term over all logits of a batch, those of padding too; load it with "
        "z_loss_coefficient=0",
    ),
    "big_bird": (lambda model: model.config.attention_type != "original_full", _BLOCK_SPARSE),
    # Its decoder alone has no blocks.
    "bigbird_pegasus": (
        lambda model: is_encoder_decoder(model) and model.config.attention_type != "original_full",
        _BLOCK_SPARSE,
    ),
    "fsmt": (
        lambda model: model.config.use_cache,
        "with a cache its decoder sees later tokens in training; load it with use_cache=False",
    ),
    "gemma": _CAUSAL_MASKS,
    "gemma2": _CAUSAL_MASKS,
    "ibert": (
        lambda model: model.config.quant_mode,
        "with quant_mode it rounds by the range that a whole batch has, and those before it; load "
        "it with quant_mode=False",
    ),
    "llama4_text": (
        lambda model: (
            getattr(model.config, "is_causal", None) is False
            and "chunked_attention" in model.config.layer_types
        ),
        "with is_causal=False its chunks stay causal, and the length decides which of the two its "
        "masks heed; load it without is_causal",
    ),
    "nllb-moe": (
        lambda model: model.config.moe_eval_capacity_token_fraction > 0,
        "each evaluation changes the capacity that its experts have in training; load it with "
        "moe_eval_capacity_token_fraction=-1.0",
    ),
}


def route(model: nn.Module, on_unknown: str) -> Route:
    """How to make `model` exact.

    Raises:
        NotImplementedError: it is not known to be exact, with the reason and the ways out.
    """
    if not isinstance(model, PreTrainedModel):
        raise _refused(
            model, "it is not a transformers PreTrainedModel; patch the model inside its wrapper"
        )
    if "input_ids" not in inspect.signature(type(model).forward).parameters:
        raise _refused(model, f"it has no text path, its forward takes {model.main_input_name}")
    if _without_weights(model):
        raise _refused(model, "its weights are on the meta device: load them first")
    refused = next((e for e in _REFUSED if _ends(model, (e,))), None)
    if refused is not None:
        raise _refused(
            model, f"the outputs of a {refused} head are of a row and not of its documents"
        )
    model_type = model.config.model_type
    _refuse_uncertain(model)
    if is_encoder_decoder(model):
        return _pair_route(model, on_unknown)
    # XLNet makes a causal mask that takes no other beside it.
    if model_type in UNPACK_EQUAL or getattr(model.config, "attn_type", None) == "uni":
        return _equal_route(model)
    known = model_type in INTERFACE | UNPACK_CAUSAL | UNPACK_MASKED
    if known and head_of(model).per_document:
        decodes = model_type not in UNPACK_MASKED
        both_ways = decodes and _looks_both_ways(model, model.config.get_text_config())
        alike = both_ways or _pools_padding(model) or _selects_keys(model)
        return Route.UNPACK if alike else Route.UNPACK_MASKED
    if model_type in UNPACK_MASKED:
        return Route.UNPACK_MASKED
    if model_type in UNPACK_CAUSAL:
        return _decoder_route(model)
    if model_type in _LOSS_READS_MASK and _ends(model, ("ForTokenClassification",)):
        return _decoder_route(model)
    if model_type in INTERFACE:
        _check_implementation(model)
        return Route.INTERFACE
    if on_unknown == "unpack":
        return Route.UNPACK
    raise UnknownModelType(
        f"patch_model refuses {type(model).__name__}: model type {model_type!r} is not among those "
        "proven exact. on_unknown='unpack' runs it on documents batched by equal length, exact and "
        "slower; a line in the tables of packed_attn_patches/families.py, or an issue that asks "
        "for one, makes the type known"
    )


def _refuse_uncertain(model: PreTrainedModel) -> None:
    uncertain, reason = _UNCERTAIN.get(model.config.model_type, (lambda _: False, ""))
    if uncertain(model):
        raise _refused(model, reason)


def _pair_route(model: PreTrainedModel, on_unknown: str) -> Route:
    """How to make a model of source and target documents exact."""
    model_type = model.config.model_type
    for route, types in {
        Route.UNPACK_MASKED: PAIRS_MASKED,
        Route.UNPACK: PAIRS_EQUAL,
        Route.UNPACK_SINGLE: PAIRS_SINGLE,
    }.items():
        if model_type in types:
            # Heads of a sequence want as many end tokens in all rows of a batch.
            if head_of(model).per_document:
                return Route.UNPACK_SINGLE
            # Targets are padded behind what causal masks let them see.
            alike = route is Route.UNPACK_MASKED and _decoder_looks_both_ways(model)
            return Route.UNPACK if alike else route
    if on_unknown == "unpack":
        return Route.UNPACK
    raise _refused(
        model,
        f"encoder-decoders of model type {model_type!r} are not among those proven exact. "
        "on_unknown='unpack' runs pairs of source and target documents batched by equal lengths, "
        "exact and slower; its decoder alone (AutoModelForCausalLM) may be known",
    )


def backbone_route(model: PreTrainedModel, chosen: Route) -> Route:
    """How the model under a head of a sequence is made exact where it runs by itself."""
    if not head_of(model).per_document:
        return chosen
    if model.config.model_type in INTERFACE:
        _check_implementation(model)
        return Route.INTERFACE
    return _decoder_route(model) if model.config.model_type in UNPACK_CAUSAL else chosen


def _decoder_route(model: PreTrainedModel) -> Route:
    """Of a type whose outputs never depend on later tokens, unless its config makes it an encoder
    (Gemma 3 and 4; "vision" is of images alone; `is_causal=False` of any type), or it selects keys.
    """
    alike = _looks_both_ways(model, model.config.get_text_config()) or _selects_keys(model)
    return Route.UNPACK if alike else Route.UNPACK_CAUSAL


def _looks_both_ways(model: PreTrainedModel, decoder: Any) -> bool:
    """Whether masks of a decoder, made by the model's config or by its own, are made not causal."""
    return any(
        getattr(config, "use_bidirectional_attention", None) in (True, "all")
        or getattr(config, "is_causal", None) is False
        for config in (model.config, decoder)
    )


def _decoder_looks_both_ways(model: PreTrainedModel) -> bool:
    decoder: Any = model.get_decoder()
    return _looks_both_ways(model, getattr(decoder, "config", model.config))


def _selects_keys(model: nn.Module) -> bool:
    """Whether its attention keeps the highest-scored keys of a row (DeepSeek V3.2 and others).

    Scores tie, at zero after a ReLU or in half precision, and which of them top-k takes depends on
    the length of the row, later tokens and padding with it.
    """
    return any("Indexer" in type(module).__name__ for module in model.modules())


def _pools_padding(model: PreTrainedModel) -> bool:
    """Whether a sequence head pools other places of a row than a document alone has, masked or not:
    XLNet's the last one, Cohere's mean all but padding ids in the text."""
    config: Any = model.config.get_text_config()
    return config.model_type in _POOLS_LAST_PLACE or getattr(config, "pooling", None) == "mean"


def _equal_route(model: PreTrainedModel) -> Route:
    """Of a type that takes no padding; Doge's experts mix the rows of a batch too."""
    return Route.UNPACK_SINGLE if getattr(model.config, "is_moe", False) else Route.UNPACK


def reason_against_forests(model: nn.Module, route: Route) -> str | None:
    """Why no document of a model's pack can go on from another, as a predicate of the model.

    None where one can; attention layers of the interface, which say themselves whether they look
    both ways, refuse a forest when they run.
    """
    if route in (Route.INTERFACE, Route.UNPACK_CAUSAL):
        return None
    if head_of(model).per_document:
        return "gives one row a document, and a shared prefix is none"
    if _selects_keys(model):
        return "selects keys by the length of a row, and a shared prefix is in rows of several"
    return "may look both ways, and a shared prefix would see what follows it"


def head_of(model: nn.Module) -> Head:
    """What the outputs of `model` are of."""
    if _ends(model, _SEQUENCE):
        return Head(per_document=True, shifts=False)
    if is_encoder_decoder(model):
        return Head(shifts=False)
    config: Any = model.config
    return Head(shifts=not _ends(model, _UNSHIFTED) and config.model_type not in UNSHIFTED_TYPES)


def first_position(model: nn.Module) -> int:
    """The position id of a document's first token, in the model's own count."""
    config: Any = model.config
    return config.pad_token_id + 1 if config.model_type in POSITIONS_AFTER_PADDING else 0


def _ends(model: nn.Module, endings: tuple[str, ...]) -> bool:
    """Whether the model's class or one that it derives from has a name with such an ending."""
    return any(cls.__name__.endswith(endings) for cls in type(model).__mro__)


def _without_weights(model: nn.Module) -> bool:
    """Weights on the meta device that no hook of accelerate brings in when they are needed."""
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not offloaded and any(parameter.is_meta for parameter in model.parameters())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether forward takes source and target; a decoder alone keeps the config of both."""
    return "decoder_input_ids" in inspect.signature(type(model).forward).parameters


def runs_on_pairs(model: nn.Module) -> bool:
    """Whether a batch packs targets beside sources; a classifier makes targets of its sources."""
    return is_encoder_decoder(model) and not _ends(model, _CLASSIFIERS)


def _check_implementation(model: PreTrainedModel) -> None:
    """An attention implementation that has documents alone to be equal to."""
    config: Any = model.config
    stock = stock_of(config._attn_implementation)
    if stock not in NAMES:
        known = ", ".join(NAMES)
        raise _refused(model, f"its attention implementation {stock!r} is not one of {known}")
    if stock == "sdpa" and getattr(config, "attn_logit_softcapping", None) is not None:
        raise _refused(
            model,
            "sdpa leaves out its softcap, so no document alone has the logits that it should; "
            "load it with attn_implementation='eager'",
        )


def _refused(model: nn.Module, reason: str) -> NotImplementedError:
    return NotImplementedError(f"patch_model refuses {type(model).__name__}: {reason}")
