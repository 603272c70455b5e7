"""What comes of the gated head on any language model class: equal to its own forward, or refused for a known reason.

A class that is in no table here is expected to be equal.
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from deft_plugin import add_gated_head, build_objective, gated_head_of, gated_loss

from .media import media_batch, takes_media, text_batch
from .oracle import Batch
from .smallest import small_config, small_model, torch_kernels

INSTALLED = Version(transformers.__version__)

# (model_type, class), each once.
CLASSES = list(
    dict.fromkeys(
        (model_type, name)
        for mapping in (
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            # Image-text-to-text, and the audio language models.
            modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        )
        for model_type, names in mapping.items()
        for name in ([names] if isinstance(names, str) else names)
    )
)


# --- what is not equal, and why ---


@dataclass(frozen=True)
class Refusal:
    """Why a class is refused, what the message says, and the first version that this is not true of any more."""

    reason: str
    message: str
    until: str = "1000"


_UNSHIFTED = Refusal(
    "its loss is of the token itself, not of the next one: a decoder's half of an encoder-decoder, or a masked LM",
    "another loss than cross-entropy on the next token",
)
_ENCODER_DECODER = Refusal(
    "an encoder-decoder: its labels are not the next tokens of its input",
    "not a decoder-only causal LM",
)
_CODEBOOKS = Refusal("an lm_head for each codebook of its audio", "ModuleList")

REFUSED: dict[str, Refusal] = {
    "BartForCausalLM": _UNSHIFTED,
    "BigBirdPegasusForCausalLM": _UNSHIFTED,
    "BlenderbotForCausalLM": _UNSHIFTED,
    "BlenderbotSmallForCausalLM": _UNSHIFTED,
    "BlipForConditionalGeneration": Refusal(
        "a captioning encoder-decoder, its lm_head inside a text decoder", "no lm_head"
    ),
    "ChameleonForConditionalGeneration": Refusal(
        "its forward takes images' tokens out of the logits", "another logits"
    ),
    "CpmAntForCausalLM": _UNSHIFTED,
    "DoryForCausalLM": Refusal(
        "its lm_head scales each token's logit with a number that is trained", "gives other logits"
    ),
    "Florence2ForConditionalGeneration": _ENCODER_DECODER,
    "GitForCausalLM": Refusal(
        "a captioning model: images' positions are in front of the text's, in logits alone",
        "of logits of shape",
    ),
    "MBartForCausalLM": _UNSHIFTED,
    "MarianForCausalLM": _UNSHIFTED,
    "MoshiForCausalLM": Refusal(
        "its forward shifts the labels twice", "of logits of shape", until="5.23"
    ),
    "MusicgenForCausalLM": _CODEBOOKS,
    "MusicgenMelodyForCausalLM": _CODEBOOKS,
    "MvpForCausalLM": _UNSHIFTED,
    "PLBartForCausalLM": _UNSHIFTED,
    "PPFormulaNetForConditionalGeneration": _ENCODER_DECODER,
    "PegasusForCausalLM": _UNSHIFTED,
    "Pix2StructForConditionalGeneration": _ENCODER_DECODER,
    "ProphetNetForCausalLM": Refusal(
        "predicts several tokens at each position", "does not have the form"
    ),
    "T5Gemma2ForConditionalGeneration": _ENCODER_DECODER,
    "TrOCRForCausalLM": _UNSHIFTED,
    "UdopForConditionalGeneration": _ENCODER_DECODER,
    "VisionEncoderDecoderModel": _ENCODER_DECODER,
    "WhisperForCausalLM": _UNSHIFTED,
    "XLMWithLMHeadModel": _UNSHIFTED,
    "XLNetLMHeadModel": _UNSHIFTED,
}

# Their forwards take no labels.
WITHOUT_LABELS = {
    "DiffusionGemmaForBlockDiffusion": "a diffusion model",
    "Gemma4AssistantForCausalLM": "drafts tokens for another model",
    "Gemma4UnifiedAssistantForCausalLM": "drafts tokens for another model",
    "PI0ForConditionalGeneration": "predicts a robot's actions",
    "Qwen2_5OmniForConditionalGeneration": "generates only; its thinker is what is trained",
    "Qwen3OmniMoeForConditionalGeneration": "generates only; its thinker is what is trained",
}

# Not built where a package is not installed.
PACKAGES = {
    "FastVlmForConditionalGeneration": "timm",
    "Gemma3nForConditionalGeneration": "timm",
    "InklingForConditionalGeneration": "scipy",
    "PerceptionLMForConditionalGeneration": "timm",
}

# Their own forward fails in some versions, and what it says.
OWN_FORWARD_FAILS = {"Llama4ForConditionalGeneration": "image_outputs"}
# ... when it is asked for the router's loss.
ROUTER_LOSS_FAILS = {
    "DbrxForCausalLM",
    "DogeForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "GraniteMoeSWAForCausalLM",
    "GraniteMoeSharedForCausalLM",
}

# Never without images or audio. Others for which there is no rule are tried with text alone.
WITH_MEDIA = {
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Glm4vForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "Lfm2VlForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
    "VoxtralForConditionalGeneration",
}

# No gradient reaches their images or audio, which become tokens or are read without gradients.
WITHOUT_GRADIENT = {
    "Apertus1p5ForConditionalGeneration",
    "ChameleonForConditionalGeneration",
    "Emu3ForConditionalGeneration",
    "VibeVoiceAsrForConditionalGeneration",
}


# --- what is compared ---


@dataclass
class Verdict:
    """What came of a class: "equal", "refused" or "not compared", and what it was tried with."""

    result: str
    tried_with: str = ""
    reason: str = ""


@dataclass
class Pass:
    """A forward pass and its gradients, by all parameters and by images or audio."""

    loss: Tensor
    logits: Tensor | None
    gradients: dict[str, Tensor]


def verdict_on(model_type: str, class_name: str) -> Verdict:
    """Try a class.

    Raises:
        AssertionError: it is neither equal nor refused as it is expected to be.
    """
    model_class = getattr(transformers, class_name)
    if class_name in WITHOUT_LABELS:
        assert "labels" not in inspect.signature(model_class.forward).parameters
        return Verdict("not compared", reason=f"{WITHOUT_LABELS[class_name]}: no loss of tokens")
    config = small_config(model_type, model_class)
    package = PACKAGES.get(class_name)
    if package and not importlib.util.find_spec(package):
        assert package in failure_of(lambda: small_model(model_class, config))
        return Verdict("not compared", reason=f"needs {package}")
    model = small_model(model_class, config)
    with torch_kernels(model):
        refusal = REFUSED.get(class_name)
        if refusal and Version(refusal.until) > INSTALLED:
            message = failure_of(lambda: add_gated_head(model, "nll")) or failure_of(
                lambda: run(model, batch_for(model)[0])
            )
            assert refusal.message in message, message or "not refused"
            return Verdict("refused", reason=refusal.reason)
        return compare(model)


def compare(model: PreTrainedModel) -> Verdict:
    """The gated head's loss and gradients with the model's own, also with the router's loss."""
    name = type(model).__name__
    batch, tried_with = batch_for(model)
    assert tried_with != "text" or name not in WITH_MEDIA
    for value in media_in(batch).values():
        value.requires_grad_()
    failure = failure_of(lambda: run(model, batch))
    if failure and OWN_FORWARD_FAILS.get(name, failure + "?") in failure:
        return Verdict("not compared", reason=f"its own forward fails: {failure}")
    own, with_router = run(model, batch), None
    if hasattr(model.config.get_text_config(), "output_router_logits"):
        failure = failure_of(lambda: run(model, batch, output_router_logits=True))
        if not failure or name not in ROUTER_LOSS_FAILS:
            with_router = run(model, batch, output_router_logits=True)
    for medium in media_in(batch):
        assert own.gradients[medium].any() == (name not in WITHOUT_GRADIENT), medium

    add_gated_head(model, "nll")
    assert_equal(run(model, batch), own)
    count = int((batch["labels"][:, 1:] != -100).sum())
    scaled = run(model, batch, num_items_in_batch=torch.tensor(2 * count))
    torch.testing.assert_close(scaled.loss, own.loss / 2, rtol=1e-4, atol=0)
    if with_router is not None:
        assert_equal(run(model, batch, output_router_logits=True), with_router)
        if not torch.equal(own.loss, with_router.loss):
            tried_with += ", router's loss"

    gated_head_of(model).objective = build_objective("deft", None)
    expected = gated_loss(own.logits[:, :-1], batch["labels"][:, 1:], "deft").loss
    torch.testing.assert_close(run(model, batch).loss, expected, rtol=1e-4, atol=0)
    return Verdict("equal", tried_with)


def failure_of(action: Callable[[], Any]) -> str:
    """What an exception in it says; empty without one."""
    try:
        action()
    except Exception as error:
        return str(error)
    return ""


def batch_for(model: PreTrainedModel) -> tuple[Batch, str]:
    """A batch and what is in it."""
    if not takes_media(model):
        return text_batch(model), "text"
    try:
        batch = media_batch(model)
    except Exception as error:
        warnings.warn(f"{type(model).__name__} with text alone: {error}", stacklevel=2)
        return text_batch(model), "text"
    audio = any(name in batch for name in ("input_features", "input_values"))
    return batch, "text and audio" if audio else "text and images"


def media_in(batch: Batch) -> dict[str, Tensor]:
    """The batch's images or audio."""
    return {name: value for name, value in batch.items() if value.is_floating_point()}


def run(model: PreTrainedModel, batch: Batch, **arguments: bool | Tensor) -> Pass:
    """A forward pass and its gradients. Seeded, since a few models add noise to their audio."""
    torch.manual_seed(0)
    output = model(**batch, use_cache=False, **arguments)
    inputs = {**dict(model.named_parameters()), **media_in(batch)}
    inputs = {name: value for name, value in inputs.items() if value.requires_grad}
    found = torch.autograd.grad(output.loss, list(inputs.values()), allow_unused=True)
    gradients = {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), found, strict=True)
    }
    logits = output.logits.detach() if "logits" in output else None
    return Pass(output.loss.detach(), logits, gradients)


def assert_equal(gated: Pass, own: Pass) -> None:
    """Loss to 1e-4, every gradient to 1 % of its largest number, where that is not rounding alone."""
    torch.testing.assert_close(gated.loss, own.loss, rtol=1e-4, atol=0)
    assert gated.gradients.keys() == own.gradients.keys()
    largest = max(value.abs().max().item() for value in own.gradients.values() if value.numel())
    for name, expected in own.gradients.items():
        if expected.numel():
            # A key's bias has no gradient but what rounding leaves.
            tolerance = 0.01 * max(expected.abs().max().item(), 1e-4 * largest)
            torch.testing.assert_close(
                gated.gradients[name], expected, rtol=0, atol=tolerance, msg=name
            )
