"""The smallest random model of any class of transformers, made of its default configuration, without the hub.

General rules first: what a configuration's fields are called says what is small for them. What a model type wants
besides is in `PARTICULARS`. Batches for the models are in `media`.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
LARGEST_MODEL = 3_000_000  # Parameters.
FIRST_SPECIAL_TOKEN = 100  # Text is below; what stands for images and audio is not.

# --- configurations ---

_SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group pretraining_tp num_nextn_predict_layers n_shared_experts "
    "num_shared_experts moe_num_shared_experts mamba_n_groups mamba_ngroups resampler_depth n_groups "
    "num_res_blocks num_dense_layers first_k_dense_replace",
    2: "num_hidden_layers num_layers n_layer n_layers num_blocks depth layers encoder_layers decoder_layers "
    "num_encoder_layers num_decoder_layers num_global_layers "
    "num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_sliding_attention_heads "
    "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads index_n_heads "
    "linear_num_key_heads linear_num_value_heads linear_num_heads resampler_n_heads resampler_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts index_topk "
    "num_query_groups num_timestamp_prediction_layers pooling_kernel_size index_kpool n_mamba_heads aligner_num_add_layers",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "patch_size num_query_tokens zero_expert_num state_size mamba_d_state ssm_state_size latent_channels "
    "resampler_n_latents resampler_num_latents latent_query_num n_window mm_tokens_per_image "
    "pos_emb_height pos_emb_width posemb_grid_size o_groups hc_lowrank canvas_length",
    8: "qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim sliding_window attention_window_size "
    "sliding_window_size rotary_dim num_mel_bins n_mel_bins mel_vocab_size laurel_rank "
    "hidden_size_per_layer_input chunk_size mamba_chunk_size window_size context_size conv_kernel_size "
    "relative_attention_num_buckets rel_extent",
    16: "head_dim d_kv kv_lora_rank q_lora_rank linear_head_dim linear_key_head_dim linear_value_head_dim "
    "swa_head_dim image_size crop_size attention_head_dim mamba_d_head mamba_head_dim mamba_headdim kv_channels "
    "attention_head_size dim_head o_lora_rank d_head qk_head_dim query_pre_attn_scalar resolution "
    "codebook_size num_embeddings num_image_tokens resampler_head_dim resampler_dim_head input_dim "
    "n_window_infer num_centroids encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size codebook_dim max_pos_emb",
    32: "hidden_size d_model n_embd embed_dim dim embedding_dim emb_dim embedding_size encoder_hidden_size "
    "word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size lru_width "
    "out_hidden_size projection_dim projector_hidden_size text_hidden_size output_dim lora_rank "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size "
    "shared_experts_intermediate_size input_embedding_size output_embedding_size adapter_rank "
    "image_text_hidden_size output_channels base_channels num_filters hidden_dim adapter_out_dim "
    "adapter_in_dim projector_input_dim projector_output_dim vision_hidden_size moe_hidden_size "
    "pronunciation_embed_dim shape_embed_dim share_expert_dim projection_hidden_dim projection_hidden_size "
    "backbone_hidden_size hidden_size_global downsample_hidden_size decoder_hidden_size audio_hidden_size "
    "post_conv_in_channels post_conv_mid_channels post_conv_out_channels patch_embed_hidden_size "
    "image_token_embed_dim vector_quantization_hidden_dimension upsample_groups ple_embed_dim "
    "prompt_mid_dim thinker_hidden_size adapter_input_size conv_dim scale mm_embed_dim output_proj_dims audio_embed_dim",
    64: "intermediate_size d_ff dff dim_ff d_inner ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim "
    "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size attention_hidden_size "
    "shared_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "max_source_positions num_position_embeddings position_embedding_size alignment_intermediate_size "
    "projection_intermediate_size vision_output_dim max_img_size max_2d_position_embeddings seq_len max_image_size "
    "merged_hidden_size mm_posemb_size",
    VOCAB_SIZE: "vocab_size vocab_size_per_layer_input decoder_vocab_size codebook_vocab_size",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}

# Some have no default, or one that the class itself cannot work with.
WITHOUT_DEFAULT = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}

# Which layers do something; the last of two does.
LAYER_LISTS = {
    "cross_attention_layers",
    "deepstack_visual_indexes",
    "fullatt_block_indexes",
    "global_attn_indexes",
    "intermediate_layers_indices",
    "spatial_target_layers",
}

# What forwards do to logits and add to losses: far from nothing.
FAR_FROM_DEFAULT = {
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logit_scale": 0.25,
    "logits_scaling": 4.0,
    "lm_head_multiplier": 0.3,
    "logits_mup_width_multiplier": 2.0,
    "output_multiplier": 0.3,
    "router_aux_loss_coef": 0.3,
    "aux_loss_coef": 0.3,
    "moe_loss_weight": 0.3,
    "unpadded_vocab_size": 120,
}


def _is_token(name: str) -> bool:
    """Whether a configuration's field of this name holds the id of a token."""
    return "layer" not in name and name.endswith(("_id", "_token_index", "_token_ids"))


class _Tokens:
    """Ids of the special tokens in a tiny vocabulary, the same for the same id in the large one."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {0: 0, 1: 1, 2: 2}

    def __call__(self, token: Any) -> Any:
        if isinstance(token, list | tuple):
            return type(token)(self(one) for one in token)
        if not isinstance(token, int):
            return token
        if token not in self._of:
            self._of[token] = FIRST_SPECIAL_TOKEN + len(self._of) - 3
        return self._of[token]


_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer")


def _kept_layers(config: PretrainedConfig) -> tuple[list[int], dict[str, Any]]:
    """One layer of each kind, at least two, and the lists with an element for each layer cut to them."""
    depths = (getattr(config, name, None) for name in _DEPTHS)
    depth = next((depth for depth in depths if isinstance(depth, int)), 0)
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) == depth > 2
        and not name.startswith("_")
        and not _is_token(name)
    }
    first: dict[str, int] = {}
    for layer in range(depth):
        first.setdefault(repr([value[layer] for value in lists.values()]), layer)
    layers = sorted(first.values())[:4]
    if len(layers) == 1 or getattr(config, "num_kv_shared_layers", 0):
        layers = layers * 2
    cut = {name: type(value)(value[layer] for layer in layers) for name, value in lists.items()}
    return layers, cut


def _small_rope(value: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters whose sections fit a head."""
    small = dict(value)
    section = value.get("mrope_section")
    if section:
        half = int(head_dim * value.get("partial_rotary_factor", 1)) // 2
        parts = [max(1, part * half // sum(section)) for part in section]
        parts[-1] += half - sum(parts)
        small["mrope_section"] = type(section)(parts)
    for name, inner in value.items():
        if isinstance(inner, dict):
            small[name] = _small_rope(inner, head_dim)
    return small


def _absent_part(config: PretrainedConfig, name: str, value: Any) -> PretrainedConfig | None:
    """A tower that a model may have, and has not by default."""
    part = type(config).sub_configs.get(name) if value is None else None
    return part() if inspect.isclass(part) and issubclass(part, PretrainedConfig) else None


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(one, int) and one > 0 for one in value
    )


def small_fields(config: PretrainedConfig, tokens: _Tokens | None = None) -> dict[str, Any]:
    """What to give the configuration's class so that it describes a small model of the same form."""
    tokens = tokens or _Tokens()
    layers, fields = _kept_layers(config)
    for name, value in vars(config).items():
        part = value if isinstance(value, PretrainedConfig) else _absent_part(config, name, value)
        if part is not None:
            fields[name] = small_fields(part, tokens)
            if part.model_type:
                fields[name]["model_type"] = part.model_type
        elif not name.startswith("_"):
            small = _small_value(name, fields.get(name, value), tokens)
            if small is not None:
                fields[name] = small
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(vars(config).get(name), dict):
            head_dim = fields.get("qk_rope_head_dim", SIZES["head_dim"])
            fields[name] = _small_rope(vars(config)[name], head_dim)
    if "qk_rope_head_dim" in fields and vars(config).get("head_dim") == config.qk_rope_head_dim:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    if getattr(config, "num_kv_shared_layers", 0):
        fields["num_kv_shared_layers"] = len(layers) // 2
    if len(layers) > 2:
        fields.update((name, len(layers)) for name in _DEPTHS if name in fields)
    _merge(fields, copy.deepcopy(PARTICULARS.get(config.model_type, {})))
    return fields


def _small_value(name: str, value: Any, tokens: _Tokens) -> Any:
    """A field's small value; None where it stays as it is."""
    if isinstance(value, bool):
        return None
    if _is_token(name):
        # Some have no token for images by default.
        media = name.startswith(("image_token", "video_token", "audio_token"))
        return tokens(-len(name) if value is None and media else value)
    if name in FAR_FROM_DEFAULT:
        return FAR_FROM_DEFAULT[name]
    if value is None:
        return WITHOUT_DEFAULT.get(name)
    if name in SIZES and isinstance(value, int) and value > 0:
        return min(value, SIZES[name])
    if name in SIZES and _are_sizes(value):
        return type(value)(min(one, SIZES[name]) for one in value)
    if name in LAYER_LISTS and value:
        return type(value)([1])
    if name == "image_grid_pinpoints":
        return [[16, 32], [32, 16]]
    return None


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}

# By model_type, of a part or of the whole: what the rules above do not give.
PARTICULARS: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 96,
        "audio_token_offset": 112,
        "vision_config": {"channel_multiplier": (1, 1), "spatial_scale_factor": 2},
    },
    "aria": {
        "projector_patch_to_query_dict": {16: 4},
        "max_value_projector_patch_to_query_dict": 4,
    },
    "chameleon": {
        "vocabulary_map": {
            "<image>": 127,
            **{
                "IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(code)) + "Z": 104 + code
                for code in range(16)
            },
        },
        "image_token_id": 127,
    },
    "codegen": {"n_head": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [2, 3, 3]}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 32]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "emu3": {
        "vocabulary_map": {
            "<image>": 127,
            "<|extra_200|>": 126,
            **{f"<|visual token {code:06d}|>": 104 + code for code in range(16)},
        },
        "image_token_id": 127,
        "vq_config": {"channel_multiplier": (1, 1)},
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "fast_vlm": {"vision_config": {"architecture": "test_efficientnet", "hidden_size": 256}},
    "flint": {"mlp_only_layers": [0]},
    "fun_asr_nano_encoder": {"max_position_embeddings": 129},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3n": {
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256},
        "vision_soft_tokens_per_image": 4,
    },
    "gemma3n_audio": {
        "hidden_size": 32,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1,
        "sscp_conv_channel_size": (8, 8),
        "input_feat_size": 16,
    },
    "gemma4_text": {
        "global_head_dim": 16,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_text": _MROPE,
    "glm46v_text": _MROPE,
    "glm4v_moe_text": {
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
    },
    "glm_ocr_text": _MROPE,
    "glmasr_encoder": {"intermediate_size": 128},
    "granite_speech": {"window_size": 15},
    "granite_speech_plus": {"window_size": 15},
    "granite4_vision": {
        # In 5.16 another by default, which cannot work.
        "text_config": {
            "model_type": "granite",
            "attention_multiplier": 0.25,
            "logits_scaling": 4.0,
        },
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 64},
        "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64, "num_attention_heads": 1},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 1, 0, 1],
    },
    "hunyuan_vl_text": _MROPE,
    "inkling2_vision": {"hidden_size": 32},
    "janus_vqgan": {"channel_multiplier": (1, 1)},
    "kyutai_speech_to_text": {"num_codebooks": 2, "codec_config": {"upsampling_ratios": [2, 2]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "llama4_vision_model": {"intermediate_size": 128, "vision_output_dim": 32},
    "mimo_v2_flash": {
        "num_key_value_heads": 1,
        "v_head_dim": 16,
        "rope_parameters": {
            "full_attention": {**_ROPE, "partial_rotary_factor": 0.5},
            "sliding_attention": {**_ROPE, "partial_rotary_factor": 0.5},
        },
    },
    "minicpmv4_6_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minimax_m3_vl": {"merged_hidden_size": 128},
    "molmo2_vision": {"num_position_embeddings": 16},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "muse_spark_audio": {"hidden_sizes": (8, 16, 16, 32), "depths": (1, 1, 1, 1)},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl_text": _MROPE,
    "perception_lm": {
        "vision_config": {"architecture": "test_vit", "model_args": {"embed_dim": 64}},
    },
    "qwen2_5_omni_text": _MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 3},
    "qwen3_asr_encoder": {"n_window": 50, "n_window_infer": 100},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "hash_seed": 0,
        "axial_pos_embds": False,
        "attn_layers": ("local", "lsh"),
        "num_buckets": 4,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "step3p5": {"sliding_window": 8},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": (32, 32)},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4,
        "downsampling_ratios": (2, 2),
        "depths": (1, 1, 1),
        "hidden_size": 32,
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral_encoder": {"intermediate_size": 128},
    "wavtokenizer_encoder": {"codebook_dim": 32, "num_filters": 8, "upsampling_ratios": (2, 2)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
    },
}

# Made of parts of one's choice, and without a default of them.
COMPOSED = {"vision-encoder-decoder": {"encoder": "vit", "decoder": "bert"}}


def _merge(fields: dict[str, Any], others: dict[str, Any]) -> None:
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _merge(fields[name], value)
        else:
            fields[name] = value


def small_config(model_type: str, model_class: type[PreTrainedModel]) -> PretrainedConfig:
    """A small configuration of `model_type`, or of the part of it that `model_class` is of."""
    if model_type in COMPOSED:
        parts = COMPOSED[model_type].items()
        fields = {
            name: {**small_fields(CONFIG_MAPPING[part]()), "model_type": part}
            for name, part in parts
        }
        return CONFIG_MAPPING[model_type](**fields)
    config_class = CONFIG_MAPPING[model_type]
    if model_class.config_class in config_class.sub_configs.values():
        config_class = model_class.config_class
    config = config_class()
    fields = small_fields(config)
    if "is_decoder" in vars(config) and not config.is_encoder_decoder:
        fields["is_decoder"] = True
    return config_class(**fields)


# --- models ---


def small_model(
    model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int = 0
) -> PreTrainedModel:
    """A random model in float32 of which every parameter does something.

    The rows of its lm_head have very unequal norms, and its logits are of some units.

    Raises:
        ValueError: it would not be small.
    """
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    if sum(parameter.numel() for parameter in parameters.values()) > LARGEST_MODEL:
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        largest = sorted(shapes.items(), key=lambda item: -math.prod(item[1]))[:4]
        raise ValueError(f"{model_class.__name__} is not small: {largest}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config).float()
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                # Gates that are closed at first, norms that do nothing.
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() > 1 and parameter.std() < 0.05:
                # In few layers of small width nothing would be left of what these carry.
                inputs = parameter[0].numel() if parameter.dim() > 3 else parameter.size(-1)
                parameter.mul_(inputs**-0.5 / parameter.std())
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if isinstance(weight, Tensor):
            weight.copy_(torch.randn_like(weight) * 0.15 * torch.randn(weight.size(0), 1).exp())
    # Without dropout two passes are the same. Reformer has gradients in training only.
    return model.train(model.config.model_type == "reformer")


@contextmanager
def torch_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Have the model use the kernels written in torch, also where fla or mamba-ssm is installed: those need a GPU."""
    files = {sys.modules[type(part).__module__] for part in model.modules()}
    with ExitStack() as stack:
        for file in files:
            for name, value in list(vars(file).items()):
                chosen = _nonlocals(getattr(type(value), "forward", None)).get("func", value)
                if "is_new_implementation" in _nonlocals(chosen):
                    stack.enter_context(patch.object(file, name, chosen.__wrapped__))
        yield


def _nonlocals(function: Any) -> dict[str, Any]:
    if not inspect.isfunction(function):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)
