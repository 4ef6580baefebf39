"""Tiny random models of any model type that the installed transformers has, without a download.

Every width, depth and count that a config class has becomes small, windows and chunks become short
enough to matter beside an audit's documents, each kind of layer appears once, and dropout is off.
Some types have sizes that no table knows, and a library default may ask for 23 GB: build a type
that was never tried in a child process with a memory limit (`children.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 199
LAYERS = 2

_DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
    "depth"
)
# Values, and the names of what has this size, in any config class.
# fmt: off
_SIZES: tuple[tuple[Any, str], ...] = (
    (VOCABULARY,
     "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (64,
     "hidden_size d_model n_embd emb_dim dim_model embed_dim embedding_size embedding_dim "
     "word_embed_proj_dim lru_width dim backbone_hidden_size out_hidden_size "
     "vision_output_dim adapter_in_dim adapter_out_dim adapter_input_size "
     "encoder_hash_byte_group_vocab projection_dim input_embedding_size "
     "output_embedding_size"),
    (LAYERS, _DEPTHS),
    (1,
     "encoder_layers num_encoder_layers n_shared_experts num_shared_experts "
     "moe_num_shared_experts n_group topk_group first_k_dense_replace num_dense_layers "
     "index_local_blocks indexer_kv_heads conf_num_hidden_layers"),
    (4,
     "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
     "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
     "attention_heads num_local_experts num_experts "
     "n_routed_experts moe_num_experts mamba_d_conv mamba_dt_rank time_step_rank "
     "linear_num_value_heads linear_num_heads index_block_size indexer_compress_ratio "
     "mm_tokens_per_image hc_sinkhorn_iters"),
    (2,
     "num_key_value_heads num_kv_heads num_experts_per_tok "
     "moe_topk moe_k top_k_experts zero_expert_num mamba_expand mamba_n_groups n_groups "
     "mamba_ngroups expand linear_num_key_heads index_topk_blocks max_window_layers "
     "type_vocab_size"),
    (16,
     "head_dim d_head dim_head d_kv kv_channels attention_head_size attention_head_dim "
     "v_head_dim qk_nope_head_dim o_lora_rank index_head_dim index_n_heads "
     "indexer_head_dim indexer_n_heads mamba_d_state mamba_d_head mamba_head_dim "
     "ssm_state_size state_size mamba_chunk_size chunk_size linear_key_head_dim "
     "linear_value_head_dim linear_head_dim hidden_size_per_layer_input "
     "attention_chunk_size block_size query_pre_attn_scalar num_position_embeddings "
     "rel_extent ngram_vocab_size_base split_ngram_parts hc_lowrank adapter_rank "
     "loop_gate_rank gated_norm_rank"),
    (8,
     "qk_rope_head_dim index_topk indexer_budget mamba_n_heads mamba_num_heads "
     "n_mamba_heads sliding_window sliding_window_size attention_window_size window_size "
     "local_attention rotary_dim num_buckets laurel_rank local_attn_chunk_length "
     "lsh_attn_chunk_length"),
    (24,
     "q_lora_rank kv_lora_rank qk_head_dim"),
    (32,
     "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size "
     "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
     "expert_ffn_hidden_size router_hidden_size pronunciation_embed_dim shape_embed_dim"),
    (96,
     "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner "
     "d_ff hidden_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size "
     "feed_forward_size"),
    (128,
     "max_position_embeddings n_positions n_ctx max_seq_len context_length "
     "original_max_position_embeddings mamba_d_ssm max_target_positions "
     "max_source_positions position_bias_max_distance"),
    (14,
     "patch_size"),
    (28,
     "image_size"),
    (0,
     "num_kv_shared_layers num_mtp_layers num_nextn_predict_layers pad_token_id"),
    (3,
     "bos_token_id eos_token_id decoder_start_token_id cls_token_id sep_token_id "
     "conv_L_cache"),
    (195,
     "image_token_id image_token_index"),
    (196,
     "video_token_id video_token_index audio_token_id"),
    (197,
     "vision_start_token_id vision_end_token_id boi_token_id eoi_token_id boi_token_index "
     "eoi_token_index boa_token_id eoa_token_id eoa_token_index"),
    (True,
     "use_sliding_window"),
    (False,
     "use_mamba_kernels use_mambapy tie_word_embeddings output_router_logits"),
    # Larger weights than a fresh model's: attention that is near uniform would hide a leak.
    (0.08,
     "initializer_range init_std init_scale"),
)
# fmt: on
_VALUES = {name: value for value, names in _SIZES for name in names.split()}
_DEFAULT: Any = ...

_WINDOWED = ["sliding_attention", "full_attention"]
_ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_ROPE_3D_HALF = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MIXED = ["linear_attention", "full_attention"]

# What is special about a type, after the table of sizes; `_DEFAULT` leaves a field to its class.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "layer_types": _DEFAULT},
    "chameleon": {"vocabulary_map": {"<image>": 195}},
    "cosmos3_edge_text": {"rope_parameters": _ROPE_3D},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_WINDOWED, _ROPE_3D)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dory": {
        "layer_types": _WINDOWED * 2,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    # Block-sparse attention becomes full, for good, with the first short row that it sees.
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "emu3": {"vocabulary_map": {"<image>": 195, "<|extra_200|>": 194}},
    "emu3_vqgan": {"base_channels": 32, "channel_multiplier": [1, 1]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**_ROPE_3D, "mrope_section": [3, 3, 2]},
    },
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"layer_types": _DEFAULT},
    "glm4v_moe_text": {"rope_parameters": _ROPE_3D_HALF},
    "fsmt": {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "use_cache": False},
    "glm4v_text": {"rope_parameters": _ROPE_3D},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "glm_ocr_text": {"rope_parameters": _ROPE_3D},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": _MIXED},
    "hunyuan_vl_text": {"rope_parameters": _ROPE_3D},
    "hy_v4_vl_text": {"rope_parameters": _ROPE_3D_HALF},
    "inkling2_vision": {"text_hidden_size": 64},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "layer_types": _DEFAULT,
    },
    "layoutlmv3": {"coordinate_size": 11, "shape_size": 10},
    "led": {
        "attention_window": 8,
        "max_encoder_position_embeddings": 128,
        "max_decoder_position_embeddings": 128,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},  # boxes have six parts
    # One layer of each kind, where published models have RoPE in three of four.
    "llama4_text": {"no_rope_layers": [1, 0]},
    "longcat_flash": {"head_dim": 8},
    "longt5": {
        "decoder_start_token_id": 3,
        "local_radius": 5,
        "global_block_size": 4,
        "encoder_attention_type": "transient-global",
    },
    "luke": {"entity_vocab_size": 50, "entity_emb_size": 16},
    "mamba2": {"num_heads": 8},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    "minimax_m3_vl_text": {
        "index_n_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "nllb-moe": {
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "expert_capacity": 4,
        "moe_eval_capacity_token_fraction": -1.0,
    },
    "muse_spark_audio": {"patch_sizes": (2, 2), "hidden_sizes": (32, 64), "depths": (1, 1)},
    "paddleocr_vl_text": {"rope_parameters": _ROPE_3D},
    "perceiver": {"num_latents": 16, "d_latents": 64, "num_self_attends_per_block": 2},
    "prophetnet": {"num_encoder_layers": LAYERS},
    "qwen2_5_omni_text": {"rope_parameters": _ROPE_3D},
    "qwen2_5_vl_text": {"rope_parameters": _ROPE_3D},
    "qwen2_vl_text": {"rope_parameters": _ROPE_3D},
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"layer_types": _DEFAULT, "num_hidden_layers": 3, "head_dim": _DEFAULT},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "switch_transformers": {
        "decoder_start_token_id": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 4,
    },
    "t5": {"decoder_start_token_id": 3},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"], "layer_types": _DEFAULT},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "layer_types": _DEFAULT,
        "num_mem_blocks": 1,
        "attention_head_dim": _DEFAULT,
        "head_dim": _DEFAULT,
        "use_mem_rope": True,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}

# Parts that are of another type by default in transformers 5.17, and then build no model.
_PARTS = {("granite4_vision", "text_config"): "granite4_vision_text"}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a tiny model of `model_type`.

    Args:
        overrides: fields to set as they are, last.

    Raises:
        KeyError: transformers has no such model type.
    """
    return _tiny(CONFIG_MAPPING[model_type], {**_special(model_type), **overrides})


def tiny_model(
    model_type: str,
    *,
    auto_class: Any = AutoModelForCausalLM,
    attn_implementation: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model in evaluation mode, float32 on the CPU, the same for the same seed.

    Args:
        auto_class: the auto class that knows the head.
        attn_implementation: as for `from_pretrained`; None takes the model's own choice.
        overrides: fields of the config.
    """
    # Encoders look both ways unless they are used as decoders.
    decoder = {"is_decoder": True} if auto_class is AutoModelForCausalLM else {}
    config = tiny_config(model_type, **{**decoder, **overrides})
    torch.manual_seed(seed)
    model = auto_class.from_config(config, attn_implementation=attn_implementation).eval()
    # A branch whose projection begins at zero says nothing, and would hide a leak.
    for weight in model.parameters():
        if weight.ndim > 1 and weight.numel() and not weight.any():
            nn.init.normal_(weight, std=_VALUES["initializer_range"])
    # So would padding whose embedding is zero, which it need not be in a model that was loaded.
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.normal_(module.weight[module.padding_idx], std=_VALUES["initializer_range"])
    return model


def _tiny(cls: type[Any], special: dict[str, Any]) -> PreTrainedConfig:
    if cls.model_type == "encoder-decoder":
        # Its default has no parts in transformers 5.17, and says elsewhere that one is a decoder.
        encoder, decoder = (_tiny(CONFIG_MAPPING["bert"], {}) for _ in range(2))
        parts = cls.from_encoder_decoder_configs(encoder, decoder)
        return cls(**{**parts.to_dict(), "pad_token_id": 0, "decoder_start_token_id": 3, **special})
    default: Any = cls()
    known = {**{n: getattr(default, n, None) for n in cls.attribute_map}, **vars(default)}
    # Where a default is a list, the table's single size would be of another kind.
    values: dict[str, Any] = {
        name: _VALUES[name]
        for name, value in known.items()
        if name in _VALUES and not isinstance(value, list | tuple)
    }
    # Token heads read it from configs that do not declare it, and take 0.1.
    values["classifier_dropout"] = 0.0
    values |= {name: 0.0 for name, value in known.items() if _is_noise(name, value)}
    values |= _layer_types(known)
    for name in cls.sub_configs:
        part = known.get(name)
        if isinstance(part, PreTrainedConfig) and name not in special:
            kind = _PARTS.get((cls.model_type, name))
            part_cls = type(part) if kind is None else CONFIG_MAPPING[kind]
            values[name] = _tiny(part_cls, _special(part_cls.model_type))
    if "qk_rope_head_dim" in known:  # latent attention: a key of its own for every query head
        values["num_key_value_heads"] = values["num_attention_heads"]
        values.pop("head_dim", None)
    values |= special
    return cls(**{name: value for name, value in values.items() if value is not _DEFAULT})


def _special(model_type: str) -> dict[str, Any]:
    """A copy: config classes write into the dictionaries that they are given."""
    return copy.deepcopy(_SPECIAL.get(model_type, {}))


def _is_noise(name: str, value: Any) -> bool:
    noisy = "drop" in name.lower() or "jitter" in name.lower()
    return noisy and isinstance(value, float)


def _layer_types(known: dict[str, Any]) -> dict[str, Any]:
    """Every kind of layer of the default config in turn, one layer for each."""
    names = ("layer_types", "mlp_layer_types")
    kinds = {n: list(dict.fromkeys(known[n])) for n in names if known.get(n)}
    if not kinds:
        return {}
    if kinds.get("layer_types") == ["full_attention"] and "sliding_window" in known:
        kinds["layer_types"] = _WINDOWED
    count = max(LAYERS, *map(len, kinds.values()))
    layers = {name: (found * count)[:count] for name, found in kinds.items()}
    depths = [n for n in _DEPTHS.split() if n in known]
    return {**layers, **dict.fromkeys(depths, count)}
