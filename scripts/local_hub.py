"""Tiny random models, processors and data sets under names of the hub, for tests of others that ask the hub for them.

`make_hub(directory)` writes what TRL's tests of supervised fine-tuning load into a cache of the hub's layout, where
transformers finds it offline; `load_dataset` takes the place of that of datasets. Everything is made here: random
weights, a tokenizer trained on the text of the data sets, and images of noise.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib.util
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

ORGANIZATION = "trl-internal-testing"


def import_torchvision() -> None:
    """Let processors import torchvision, also a build for CUDA beside a torch for the CPU.

    Such a one cannot load its compiled operators, and refuses to be imported without the names of two. Its
    transforms of images, which processors use, are written in Python.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        importlib.import_module("torchvision")


import_torchvision()

# --- data sets ---


def _sentences() -> list[str]:
    """Nineteen sentences: the Zen of Python, out of Python itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]


def _halves(sentence: str) -> tuple[str, str]:
    words = sentence.split(" ")
    middle = max(1, len(words) // 2)
    return " ".join(words[:middle]), " " + " ".join(words[middle:])


def _message(role: str, content: Any, **fields: str) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _text_sets() -> dict[str, list[dict[str, Any]]]:
    """By name of the configuration, as TRL's documentation of formats calls them."""
    sentences = _sentences()
    pairs = [_halves(sentence) for sentence in sentences]
    asked = [[_message("user", f"How does it go on: {start}?")] for start, _ in pairs]
    answers = [[_message("assistant", end.strip())] for _, end in pairs]
    return {
        "standard_language_modeling": [{"text": text} for text in sentences],
        "standard_prompt_completion": [{"prompt": p, "completion": c} for p, c in pairs],
        "standard_implicit_prompt_preference": [
            {"chosen": start + end, "rejected": start} for start, end in pairs
        ],
        "conversational_language_modeling": [
            {"messages": q + a} for q, a in zip(asked, answers, strict=True)
        ],
        "conversational_prompt_completion": [
            {"prompt": q, "completion": a} for q, a in zip(asked, answers, strict=True)
        ],
    }


def _harmony_sets() -> dict[str, list[dict[str, Any]]]:
    rows = []
    for index, row in enumerate(_text_sets()["conversational_prompt_completion"]):
        (answer,) = row["completion"]
        kwargs = {"reasoning_effort": ("low", "medium", "high")[index % 3]}
        thought = {**answer, "thinking": "That is how it goes on."}
        rows.append((row["prompt"], [thought], {**kwargs, "model_identity": "You are tiny."}))
    return {
        "language_modeling": [
            {"messages": q + a, "chat_template_kwargs": kwargs} for q, a, kwargs in rows
        ],
        "prompt_completion": [
            {"prompt": q, "completion": a, "chat_template_kwargs": kwargs} for q, a, kwargs in rows
        ],
    }


def _tool_sets() -> dict[str, list[dict[str, Any]]]:
    def tool(name: str, argument: str) -> dict[str, Any]:
        properties = {argument: {"type": "string", "description": f"The {argument}."}}
        parameters = {"type": "object", "properties": properties, "required": [argument]}
        description = f"{name} of a {argument}"
        return {
            "type": "function",
            "function": {"name": name, "description": description, "parameters": parameters},
        }

    tools = [tool("time", "place"), tool("weather", "town")]
    rows = []
    for index in range(19):
        called = tools[index % 2]["function"]
        (argument,) = called["parameters"]["properties"]
        call = {"name": called["name"], "arguments": {argument: f"number {index}"}}
        messages = [
            _message("user", f"What is the {called['name']} in number {index}?"),
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": call}],
            },
            {"role": "tool", "name": called["name"], "content": "Fine."},
            _message("assistant", "It is fine."),
        ]
        rows.append({"messages": messages, "tools": json.dumps(tools)})
    return {"language_modeling": rows}


def _picture(generator: np.random.Generator) -> np.ndarray[Any, Any]:
    height, width = generator.integers(32, 64, size=2)
    return generator.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def _image_sets() -> dict[str, list[dict[str, Any]]]:
    """One picture a row, under the name `image`; content as text."""
    generator = np.random.default_rng(0)
    return {
        name: [{**row, "image": _picture(generator)} for row in rows]
        for name, rows in _text_sets().items()
        if name.startswith("conversational")
    }


def _multi_image_sets() -> dict[str, list[dict[str, Any]]]:
    """None to three pictures a row, between parts of the text."""
    generator = np.random.default_rng(0)
    sets: dict[str, list[dict[str, Any]]] = {}
    for index, row in enumerate(_text_sets()["conversational_prompt_completion"]):
        (question,), (answer,) = row["prompt"], row["completion"]
        parts = [{"type": "text", "text": question["content"]}]
        for place in range(index % 4):
            parts.insert(place, {"type": "image"})
        prompt = [_message("user", parts)]
        completion = [_message("assistant", [{"type": "text", "text": answer["content"]}])]
        images = [_picture(generator) for _ in range(index % 4)]
        for name, columns in (
            ("conversational_language_modeling", {"messages": prompt + completion}),
            ("conversational_prompt_completion", {"prompt": prompt, "completion": completion}),
        ):
            sets.setdefault(name, []).append({**columns, "images": images})
    return sets


SETS: dict[str, Callable[[], dict[str, list[dict[str, Any]]]]] = {
    "zen": _text_sets,
    "harmony": _harmony_sets,
    "toolcall": _tool_sets,
    "zen-image": _image_sets,
    "zen-multi-image": _multi_image_sets,
}


def features_of(rows: list[dict[str, Any]], several: bool) -> Features | None:
    """Of columns with pictures; other columns' are inferred."""
    if not {"image", "images"} & set(rows[0]):
        return None
    content = [{"type": Value("string"), "text": Value("string")}] if several else Value("string")
    features = {name: [{"role": Value("string"), "content": content}] for name in rows[0]}
    pictures = {"images": List(Image())} if several else {"image": Image()}
    return Features({**features, **pictures})


def load_dataset(
    path: str, name: str | None = None, split: str | None = None, streaming: bool = False, **_: Any
) -> Any:
    """A data set made here, by the arguments of `datasets.load_dataset`; the last two rows are for testing."""
    folder, _, own_name = path.partition("/")
    if folder != ORGANIZATION or own_name not in SETS:
        raise FileNotFoundError(f"{path} is none of {', '.join(SETS)} of {ORGANIZATION}.")
    rows = SETS[own_name]()[name or "default"]
    dataset = Dataset.from_list(rows, features=features_of(rows, own_name == "zen-multi-image"))
    splits = dataset.train_test_split(test_size=2, shuffle=False)
    if split is not None and "[" in split:
        split, _, cut = split.rstrip("]").partition("[")
        start, _, stop = cut.partition(":")
        splits[split] = splits[split].select(range(int(start or 0), int(stop)))
    if streaming:
        streams = {key: part.to_iterable_dataset() for key, part in splits.items()}
        return IterableDatasetDict(streams) if split is None else streams[split]
    return DatasetDict(splits) if split is None else splits[split]


# --- tokenizer ---

_SPECIAL = (
    "<pad> <unk> <s> </s> <|im_start|> <|im_end|> <|endoftext|> <|start|> <|message|> <|channel|> <|end|> <|return|> "
    "<|call|> <|constrain|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <image> <start_of_image> "
    "<end_of_image> <image_soft_token> <bos> <eos> <start_of_turn> <end_of_turn> <|image|> <|image> <image|> <|audio|> "
    "<|audio> <audio|> <|video|> <|turn> <turn|> <|user|> <|assistant|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> "
    "<|USER_TOKEN|> <|CHATBOT_TOKEN|> <|startoftext|>"
)
VOCAB_SIZE = 1024
_PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None, eos: str, **attributes: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which most words of the data sets are one token.

    Args:
        template: the name of one of TRL's chat templates, or None for none. A plain one where this version of TRL
            does not have it.
        eos: the end-of-text token.
        attributes: special tokens that a processor asks for, by name: `image_token`, ...
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 8,
        special_tokens=_SPECIAL.split(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    asked = [
        row["messages"][0]["content"] for row in _text_sets()["conversational_language_modeling"]
    ]
    tokenizer.train_from_iterator(_sentences() + asked, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=eos,
        **({"extra_special_tokens": attributes} if attributes else {}),
    )
    if template is not None:
        file = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
        plain = _PLAIN_TEMPLATE.replace("IMAGE", attributes.get("image_token", "<image>"))
        fast.chat_template = file.read_text() if file.exists() else plain
    return fast


# --- models ---

# What makes a configuration small, where it has a field of that name.
_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
_QWEN_EOS = "<|im_end|>"

# model_type, chat template of TRL's, end-of-text token, and fields beside the small ones.
TEXT_MODELS: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "tiny-Cohere2ForCausalLM": ("cohere2", "cohere2", "<|END_OF_TURN_TOKEN|>", {}),
    "tiny-CohereForCausalLM": ("cohere", "cohere", "<|END_OF_TURN_TOKEN|>", {}),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        "glm4moe",
        "<|endoftext|>",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    ),
    "tiny-GptOssForCausalLM": (
        "gpt_oss",
        "gptoss",
        "<|return|>",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "qwen2_5", _QWEN_EOS, {}),
    "tiny-Qwen3ForCausalLM": ("qwen3", "qwen3", _QWEN_EOS, {}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3", _QWEN_EOS, _EXPERTS),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        "nemotron_3_nano",
        _QWEN_EOS,
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "tiny-Olmo3ForCausalLM": ("olmo3", "qwen2_5", _QWEN_EOS, {}),
    "tiny-Lfm2ForCausalLM": (
        "lfm2",
        "lfm2",
        _QWEN_EOS,
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "tiny-Lfm2ForCausalLM-2.5": (
        "lfm2",
        "lfm2_2_5",
        _QWEN_EOS,
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "tiny-LlamaForCausalLM-3.2": ("llama", "llama3_2", "</s>", {}),
    "tiny-MistralForCausalLM-0.2": ("mistral", None, "</s>", {}),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", None, "<|endoftext|>", {}),
}

_REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def small_config(model_type: str, **fields: Any) -> Any:
    """A configuration with small sizes wherever it has a field of that name."""
    known = vars(AutoConfig.for_model(model_type))
    small = {name: value for name, value in _SMALL.items() if name in known}
    return AutoConfig.for_model(model_type, **{**small, **fields})


def _fields(model_type: str, **fields: Any) -> dict[str, Any]:
    """As `small_config`, of a part of a configuration."""
    known = vars(AutoConfig.for_model(model_type))
    small = {name: value for name, value in _SMALL.items() if name in known}
    return {"model_type": model_type, **small, **fields}


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 16,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_QWEN_PIXELS = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}


def _image_processor(name: str, **options: Any) -> Any:
    """The image processor itself, or the one that does without torchvision."""
    kind = name if transformers.utils.is_torchvision_available() else f"{name}Pil"
    return getattr(transformers, kind)(**options)


def _llava(tokenizer: Any, next_: bool) -> tuple[Any, Any]:
    token = tokenizer.convert_tokens_to_ids("<image>")
    vision = {"model_type": "clip_vision_model", **_VISION, "image_size": 32, "patch_size": 8}
    size = {"shortest_edge": 32}
    options: dict[str, Any] = {"size": size, "crop_size": {"height": 32, "width": 32}}
    pinpoints = {"image_grid_pinpoints": [[32, 64], [64, 32]]} if next_ else {}
    config = AutoConfig.for_model(
        "llava_next" if next_ else "llava",
        text_config=_fields("mistral" if next_ else "llama"),
        vision_config=vision,
        image_token_index=token,
        **({} if next_ else {"image_seq_length": 16}),
        **pinpoints,
    )
    name = "LlavaNext" if next_ else "Llava"
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=_image_processor(
            "LlavaNextImageProcessor" if next_ else "CLIPImageProcessor", **options, **pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_index", "<image_soft_token>"),
            ("boi_token_index", "<start_of_image>"),
            ("eoi_token_index", "<end_of_image>"),
        )
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config=_fields("gemma3_text", query_pre_attn_scalar=8),
        vision_config={
            "model_type": "siglip_vision_model",
            **_VISION,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        **ids,
    )
    image_processor = _image_processor("Gemma3ImageProcessor", size={"height": 32, "width": 32})
    return config, transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4)


def _gemma4(tokenizer: Any) -> tuple[Any, Any]:
    ids = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token)
        for kind, token in (
            ("image", "<|image|>"),
            ("video", "<|video|>"),
            ("audio", "<|audio|>"),
            ("boi", "<|image>"),
            ("eoi", "<image|>"),
        )
    }
    text = _fields(
        "gemma4_text",
        global_head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB_SIZE,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
    )
    vision = {
        **_VISION,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "patch_size": 8,
        "pooling_kernel_size": 2,
    }
    config = AutoConfig.for_model(
        "gemma4",
        text_config=text,
        vision_config={"model_type": "gemma4_vision", **vision, "default_output_length": 16},
        audio_config=None,
        **ids,
    )
    pictures = {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    processor = transformers.Gemma4Processor(
        feature_extractor=transformers.Gemma4AudioFeatureExtractor(),
        image_processor=_image_processor("Gemma4ImageProcessor", **pictures),
        tokenizer=tokenizer,
        video_processor=transformers.Gemma4VideoProcessor(**pictures),
    )
    return config, processor


def _qwen(tokenizer: Any, name: str, **text: Any) -> tuple[Any, Any]:
    """Qwen2-VL and what came after it, by the prefix of their classes."""
    model_type = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}.get(
        name, name.lower().replace("3_5m", "3_5_m")
    )
    ids = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for kind, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    vision: dict[str, Any] = {**_QWEN_VISION, "patch_size": 8}
    if name == "Qwen2VL":
        vision.update(embed_dim=16, hidden_size=16, mlp_ratio=2)
        del vision["out_hidden_size"], vision["intermediate_size"]
    elif name == "Qwen2_5_VL":
        vision.update(fullatt_block_indexes=[1], window_size=32)
    else:
        vision.update(num_position_embeddings=64)
    if name == "Qwen3VL":
        vision.update(deepstack_visual_indexes=[0])
    section = {"mrope_section": [1, 1, 2]}
    if "3" not in name:  # Its heads' size is what divides the hidden size.
        text.update(num_attention_heads=2, num_key_value_heads=1)
    fields = _fields(f"{model_type}_text", rope_parameters={**_ROPE, **section}, **text)
    if "3_5" in name:
        fields["rope_parameters"] = {**_ROPE, "partial_rotary_factor": 1.0, **section}
    config = AutoConfig.for_model(
        model_type, text_config=fields, vision_config=vision, tie_word_embeddings=False, **ids
    )
    family = "Qwen3VL" if "3" in name else name
    pixels = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    video = "Qwen3VLVideoProcessor" if "3" in name else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{family}Processor")(
        image_processor=_image_processor("Qwen2VLImageProcessor", **pixels),
        tokenizer=tokenizer,
        video_processor=getattr(transformers, video)(patch_size=8),
    )
    return config, processor


_GEMMA3_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
_GEMMA4_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}

# Chat template of TRL's, end-of-text token, tokens that the processor asks for, configuration and processor.
VISION_MODELS: dict[str, tuple[str, str, dict[str, str], Callable[[Any], tuple[Any, Any]]]] = {
    "tiny-LlavaForConditionalGeneration": ("llava_next", "</s>", {}, lambda t: _llava(t, False)),
    "tiny-LlavaNextForConditionalGeneration": ("llava_next", "</s>", {}, lambda t: _llava(t, True)),
    "tiny-Gemma3ForConditionalGeneration": ("gemma3", "<end_of_turn>", _GEMMA3_TOKENS, _gemma3),
    "tiny-Gemma4ForConditionalGeneration": ("gemma4", "<turn|>", _GEMMA4_TOKENS, _gemma4),
    "tiny-Qwen2VLForConditionalGeneration": (
        "qwen2_5_vl",
        _QWEN_EOS,
        {},
        lambda t: _qwen(t, "Qwen2VL"),
    ),
    "tiny-Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        _QWEN_EOS,
        {},
        lambda t: _qwen(t, "Qwen2_5_VL"),
    ),
    "tiny-Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        _QWEN_EOS,
        {},
        lambda t: _qwen(t, "Qwen3VL"),
    ),
    "tiny-Qwen3_5ForConditionalGeneration-NoThink": (
        "qwen3_5_nothink",
        _QWEN_EOS,
        {},
        lambda t: _qwen(t, "Qwen3_5", **_LINEAR),
    ),
    "tiny-Qwen3_5MoeForConditionalGeneration-3.6": (
        "qwen3_6",
        _QWEN_EOS,
        {},
        lambda t: _qwen(t, "Qwen3_5Moe", **_LINEAR, **_EXPERTS),
    ),
}


def make_text_model(name: str, directory: Path) -> None:
    """Save a model of `TEXT_MODELS` and its tokenizer."""
    model_type, template, eos, fields = TEXT_MODELS[name]
    config = small_config(model_type, **fields)
    _save(transformers.AutoModelForCausalLM.from_config(config), directory)
    make_tokenizer(template, eos).save_pretrained(directory)


def make_vision_model(name: str, directory: Path) -> None:
    """Save a model of `VISION_MODELS` and its processor.

    Raises:
        ImportError: the processor needs torchvision.
    """
    template, eos, attributes, make = VISION_MODELS[name]
    tokenizer = make_tokenizer(template, eos, **attributes)
    config, processor = make(tokenizer)
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(directory)
    _save(transformers.AutoModelForImageTextToText.from_config(config), directory)


def _make_remote_model(directory: Path) -> None:
    make_text_model("tiny-LlamaForCausalLM-3.2", directory)
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    names = {"AutoConfig": "RemoteConfig", "AutoModelForCausalLM": "RemoteForCausalLM"}
    fields["auto_map"] = {kind: f"modeling_remote.{name}" for kind, name in names.items()}
    fields.update(model_type="remote", architectures=["RemoteForCausalLM"])
    file.write_text(json.dumps(fields))
    (directory / "modeling_remote.py").write_text(_REMOTE)


def _save(model: Any, directory: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            # What begins as zeros or ones would leave others without a gradient.
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def make_hub(cache: Path) -> dict[str, str]:
    """Write all models into `cache`, a hub's cache folder, and return why some could not be made, by name."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[Path], None]] = {}
    for name in TEXT_MODELS:
        makers[f"{ORGANIZATION}/{name}"] = lambda path, name=name: make_text_model(name, path)  # type: ignore[misc]
    for name in VISION_MODELS:
        makers[f"{ORGANIZATION}/{name}"] = lambda path, name=name: make_vision_model(name, path)  # type: ignore[misc]
    makers[f"{ORGANIZATION}/tiny-RemoteForCausalLM"] = _make_remote_model
    # Whose chat template a test takes.
    makers["Qwen/Qwen3-4B"] = lambda path: make_text_model("tiny-Qwen3ForCausalLM", path)
    missing = {}
    for name, make in makers.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("0" * 40)
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot.mkdir(parents=True)
        try:
            make(snapshot)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            shutil.rmtree(folder)
    return missing
