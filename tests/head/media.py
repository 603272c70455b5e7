"""Batches of text, with images or audio where a model reads them, for the models of `smallest`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from .oracle import Batch
from .smallest import FIRST_SPECIAL_TOKEN

ROWS, LENGTH = 2, 16
SIDE = 4  # Patches along an image's side.
FRAMES = 128  # Of audio features.


_MEDIA = {
    "flattened_patches",
    "image_pixel_values",
    "input_features",
    "input_values",
    "pixel_values",
    "pixel_values_images",
}


def takes_media(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes images or audio."""
    return bool(_arguments_of(model.forward) & _MEDIA)


def text_batch(model: PreTrainedModel, seed: int = 0) -> Batch:
    """Two rows of text, with prompts of unequal length without labels."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, FIRST_SPECIAL_TOKEN, (ROWS, LENGTH), generator=generator)
    labels = input_ids.clone()
    labels[0, :3], labels[1, :5] = -100, -100
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    arguments = _arguments_of(model.forward)
    if "protein_input_ids" in arguments:
        batch["protein_input_ids"] = torch.randint(5, 20, (ROWS, 8), generator=generator)
        batch["protein_attention_mask"] = torch.ones(ROWS, 8, dtype=torch.long)
    if model.config.model_type == "kyutai_speech_to_text":
        # Beside each token the codes of its audio.
        shape = (ROWS, LENGTH, model.config.num_codebooks)
        codes = torch.randint(0, 16, shape, generator=generator)
        batch["input_ids"] = torch.cat([input_ids[..., None], codes], dim=-1)
    return batch


def media_batch(model: PreTrainedModel, seed: int = 0) -> Batch:
    """`text_batch` with an image or a clip of audio in each row, as the model's own forward takes it.

    Raises:
        NotImplementedError, and whatever the model raises: no rule here says how.
    """
    batch = text_batch(model, seed)
    arguments = _arguments_of(model.forward)
    kind = "audio" if {"input_features", "input_values"} & arguments else "image"
    if {"pixel_values", "image_pixel_values"} & arguments:
        kind = "video" if model.config.model_type == "instructblipvideo" else "image"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        media = _audio(model, arguments) if kind == "audio" else _images(model, arguments)
    batch.update(media)
    if model.config.model_type in BESIDE_TEXT:
        return {**batch, **_beside_text(model.config.model_type, batch["input_ids"])}
    token = _token_of(model.config, kind)
    _make_room(batch, _places_of(model, media, kind) // ROWS, token)
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in arguments:
            batch[name] = (batch["input_ids"] == token).long()
    return batch


# Models whose images or audio take no tokens' places: they are attended to, in front, or added to embeddings.
BESIDE_TEXT = {"git", "idefics", "kosmos-2", "kosmos-2.5", "mllama", "voxtral_realtime"}


def _beside_text(model_type: str, input_ids: Tensor) -> Batch:
    """What says which text goes with them."""
    if model_type == "idefics":
        return {"image_attention_mask": torch.ones(*input_ids.shape, 1, dtype=torch.long)}
    if model_type == "mllama":  # Four tiles.
        return {"cross_attention_mask": torch.ones(*input_ids.shape, 1, 4, dtype=torch.long)}
    if model_type.startswith("kosmos"):
        mask = torch.zeros_like(input_ids)
        mask[:, 1:5] = 1
        return {"image_embeds_position_mask": mask}
    return {}


def _make_room(batch: Batch, places: int, token: int) -> None:
    """Put `places` tokens without labels after the second of each row."""
    for name, filling in (("input_ids", token), ("attention_mask", 1), ("labels", -100)):
        before, after = batch[name][:, :2], batch[name][:, 2:]
        batch[name] = torch.cat([before, before.new_full((ROWS, places), filling), after], dim=1)


# --- how models are asked ---


def _arguments_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _field(config: PretrainedConfig, *names: str) -> Any:
    """The first of the fields that the configuration, or a part of it, has."""
    parts = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    found = (getattr(part, name, None) for part in (config, *parts) for name in names)
    return next((value for value in found if value is not None), None)


def _token_of(config: PretrainedConfig, kind: str) -> int:
    names = [f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id"]
    token = _field(config, *names)
    if token is None:
        raise NotImplementedError(f"no {kind} token")
    return int(token)


def _places_of(model: PreTrainedModel, media: Batch, kind: str) -> int:
    """How many tokens of text the media take the place of."""
    name = f"get_{kind}_features"
    owners = [owner for owner in (model, model.base_model) if hasattr(owner, name)]
    if (
        "image_pixel_values" in media
    ):  # Every second patch of the two, an end of each line, one between.
        return ROWS * (2 * (SIDE // 2) * (SIDE // 2 + 1) + 1)
    if not owners and kind == "audio" and hasattr(model.base_model, "audio_tower"):
        lengths = media["feature_attention_mask"].sum(-1)
        _, lengths = model.base_model.audio_tower._get_feat_extract_output_lengths(lengths)
        return int(lengths.sum())
    if not owners:
        raise NotImplementedError(f"no {name}")
    wanted = set().union(*(_arguments_of(getattr(owner, name)) for owner in owners))
    # Some have no defaults for what else their forward takes from the configuration.
    given = {
        key: _field(model.config, key)
        for key in wanted
        if "vision_feature" in key and _field(model.config, key) is not None
    }
    given.update((key, value) for key, value in media.items() if key in wanted)
    with torch.no_grad():
        output = getattr(owners[0], name)(**given)
    features = getattr(output, "pooler_output", output)
    if features is None and hasattr(output, "deepstack_features"):
        _, features = output.deepstack_features[0]
    elif features is None:
        features = output.last_hidden_state
    tensors = list(features) if isinstance(features, list | tuple) else [features]
    return sum(tensor.numel() // tensor.size(-1) for tensor in tensors)


# --- images ---


def _images(model: PreTrainedModel, arguments: set[str]) -> Batch:
    """An image in each row. The forms follow from the names of the forward's arguments."""
    config = model.config
    vision = next(
        (
            part
            for part in vars(config).values()
            if isinstance(part, PretrainedConfig) and hasattr(part, "patch_size")
        ),
        config,
    )
    patch = getattr(vision, "patch_size", None) or 4
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    size = getattr(vision, "image_size", None) or SIDE * patch
    if _field(config, "architecture") is not None:  # A tower of timm's.
        size = 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _field(vision, "num_channels", "in_channels") or 3
    patches, numbers = SIDE * SIDE, channels * patch * patch
    whole = torch.randn(ROWS, channels, height, width)
    if "image_grid_thw" in arguments:
        frames = _field(vision, "temporal_patch_size", "patch_temporal") or 1
        batch = {
            "pixel_values": torch.randn(ROWS * patches, numbers * frames),
            "image_grid_thw": torch.tensor([[1, SIDE, SIDE]] * ROWS),
        }
        if config.model_type in ("kimi_k25", "paddleocr_vl"):
            batch["pixel_values"] = torch.randn(ROWS * patches, channels, patch, patch)
        if config.model_type.startswith("inkling2"):  # Squares of two by two patches.
            batch["pixel_values"] = torch.randn(ROWS * 4, 2 * patch, 2 * patch, channels)
            batch["image_grid_thw"] = torch.tensor([[1, 2, 2]] * ROWS)
        if "image_merge_sizes" in arguments:
            batch["image_merge_sizes"] = torch.tensor([2] * ROWS)
        return batch
    if config.model_type == "inkling_mm_model":  # A token for each patch.
        return {
            "pixel_values": torch.randn(ROWS, vision.temporal_patch_size, patch, patch, channels)
        }
    if "image_pixel_values" in arguments:  # The whole of each, and one crop of it.
        return {
            "image_pixel_values": torch.randn(ROWS, 2, channels, height, width),
            "image_sizes": torch.tensor([[height, width]] * ROWS),
            "image_attention_mask": torch.ones(ROWS, 2, SIDE, SIDE, dtype=torch.long),
        }
    if "spatial_shapes" in arguments:
        return {
            "pixel_values": torch.randn(ROWS, patches, numbers),
            "spatial_shapes": torch.tensor([[SIDE, SIDE]] * ROWS),
            "pixel_attention_mask": torch.ones(ROWS, patches, dtype=torch.long),
        }
    if "target_sizes" in arguments:
        return {
            "pixel_values": torch.randn(1, channels, patch, ROWS * patches * patch),
            "target_sizes": torch.tensor([[SIDE, SIDE]] * ROWS),
        }
    if "image_position_ids" in arguments:
        if config.model_type == "gemma4_unified":  # Already pooled.
            numbers *= vision.pooling_kernel_size**2
        grid = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        return {
            "pixel_values": torch.randn(ROWS, patches, numbers),
            "image_position_ids": grid.repeat(ROWS, 1, 1),
        }
    if "image_token_pooling" in arguments:
        squares = torch.arange(ROWS * patches).view(ROWS, 2, 2, 2, 2).transpose(2, 3)
        return {
            "pixel_values": torch.randn(ROWS, patches, numbers),
            "image_token_pooling": squares.reshape(-1, 4),
            "image_grids": torch.tensor([[2, 2, 0, 0]] * ROWS),
            "image_num_crops": torch.tensor([1] * ROWS),
        }
    if "image_grid_hw" in arguments:
        return {
            "pixel_values": torch.randn(ROWS * patches, numbers),
            "image_grid_hw": torch.tensor([[SIDE, SIDE]] * ROWS),
        }
    if "image_patches" in arguments:
        return {"pixel_values": torch.randn(ROWS, patches, numbers)}
    if "pixel_attention_mask" in arguments:
        batch = {"pixel_values": whole[:, None]}
        if config.model_type == "granite_docling":  # A mask of tiles, not of pixels.
            batch["pixel_attention_mask"] = torch.ones(ROWS, 1, dtype=torch.bool)
        return batch
    if "aspect_ratio_ids" in arguments:
        tiles = vision.max_num_tiles
        return {
            "pixel_values": torch.randn(ROWS, 1, tiles, channels, height, width),
            "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(ROWS, 1, tiles, dtype=torch.long),
        }
    if "image_attention_mask" in arguments and "image_encoder_embeddings" in arguments:
        return {"pixel_values": whole[:, None]}
    if "flattened_patches" in arguments:
        places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)) + 1
        numbers = model.vision_model.embeddings.patch_projection.in_features
        return {
            "flattened_patches": torch.cat(
                [places.repeat(ROWS, 1, 1), torch.randn(ROWS, patches, numbers)], dim=-1
            )
        }
    if _field(config, "image_grid_pinpoints"):  # A tile for the whole and two for its halves.
        return {
            "pixel_values": torch.randn(ROWS, 3, channels, height, width),
            "image_sizes": torch.tensor([[height, 2 * width]] * ROWS),
        }
    if "pixel_values" not in arguments:
        return {"pixel_values_images": whole}
    batch = {"pixel_values": whole}
    if config.model_type == "perception_lm":
        batch["pixel_values"] = whole[:, None]
    if config.model_type == "instructblipvideo":
        batch["pixel_values"] = torch.randn(ROWS, 2, channels, height, width)
    if "high_res_pixel_values" in arguments:
        batch["high_res_pixel_values"] = torch.randn_like(whole)
    if "qformer_input_ids" in arguments:
        batch["qformer_input_ids"] = torch.randint(5, FIRST_SPECIAL_TOKEN, (ROWS, 4))
    owner = model if hasattr(model, "get_image_features") else model.base_model
    if hasattr(owner, "get_image_features") and "image_sizes" in _arguments_of(
        owner.get_image_features
    ):
        batch["image_sizes"] = torch.tensor([[height, width]] * ROWS)
    return batch


# --- audio ---

TIME_FIRST = ("granite_speech", "granite_speech_plus", "fun_asr_nano", "nemo_speechlm")


def _audio(model: PreTrainedModel, arguments: set[str]) -> Batch:
    """A clip in each row, its features (rows, bins, frames) or, in a few models, (rows, frames, bins)."""
    config = model.config
    if "input_values" in arguments:
        samples = 1600 if config.model_type == "omniasr" else FRAMES
        return {"input_values": torch.randn(ROWS, 1, samples)}
    bins = _field(_field(config, "audio_config", "encoder_config"), "num_mel_bins", "input_dim")
    bins *= _field(config, "num_stacked_frames") or 1
    frames = 100 if config.model_type == "qwen3_asr" else FRAMES
    if config.model_type == "voxtral_realtime":
        frames = LENGTH * config.audio_length_per_tok
    features = torch.randn(ROWS, bins, frames)
    batch = {"input_features": features}
    if config.model_type in TIME_FIRST:
        batch["input_features"] = features.transpose(1, 2).contiguous()
    for name in ("feature_attention_mask", "input_features_mask"):
        if name in arguments and not config.model_type.startswith("granite_speech"):
            batch[name] = torch.ones(ROWS, frames, dtype=torch.long)
    if "padding_mask" in arguments and config.model_type == "moss_transcribe_diarize":
        batch["padding_mask"] = torch.ones(ROWS, config.audio_chunk_size, dtype=torch.long)
    return batch
