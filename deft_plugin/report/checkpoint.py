"""Loading what is measured: a model's folder or name, with a LoRA adapter on it or not."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checks import check_has_tokens
from ..model_config import config_of_model
from .choices import DTYPES


@dataclass(frozen=True)
class Checkpoint:
    """A model, or an adapter on one.

    Args:
        model: a folder or a name on the hub.
        adapter: the folder of a LoRA adapter, or its name on the hub; None for the model itself.
        option: what the user named it with, for messages.
    """

    model: str
    adapter: str | None = None
    option: str = "MODEL"

    @property
    def option_of_model(self) -> str:
        """What the user named the model itself with."""
        return self.option if self.adapter is None else "MODEL"

    @property
    def label(self) -> str:
        """A short name for tables and titles."""
        parts = [self.model] if self.adapter is None else [self.model, self.adapter]
        return " + ".join(_short(part) for part in parts)


@dataclass(frozen=True)
class Placement:
    """Where and in which numbers a model is loaded.

    Args:
        device: of torch; None for the GPUs where there are any, else the CPU.
        dtype: one of `DTYPES`; None for bfloat16 on a GPU and float32 elsewhere.
        four_bit: load the base model in 4 bit (NF4), as QLoRA trains on it.

    Raises:
        ValueError: an unknown dtype, or a device that is not there.
    """

    device: str | None = None
    dtype: str | None = None
    four_bit: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} is unknown. Choices: {', '.join(DTYPES)}.")
        if self.device is None:
            return
        if self.device.startswith("meta"):
            raise ValueError(f"--device {self.device!r} cannot be used: it computes nothing.")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            found = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}, " * torch.cuda.is_available()
            raise ValueError(
                f"--device {self.device!r} cannot be used ({textwrap.shorten(str(error), 120)}). Choices: {found}cpu."
            ) from None

    def load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """The checkpoint, for measuring.

        Raises:
            ValueError: there is no such model or adapter, or it does not fit.
        """
        on_gpu = (
            torch.cuda.is_available() if self.device is None else self.device.startswith("cuda")
        )
        dtype = getattr(torch, self.dtype or ("bfloat16" if on_gpu else "float32"))
        device_map = "auto" if self.device is None and on_gpu else {"": self.device or "cpu"}
        quantization = (
            BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
            if self.four_bit
            else None
        )
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                checkpoint.model,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization,
                output_loading_info=True,
            )
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"{checkpoint.option_of_model} {checkpoint.model!r} cannot be loaded as a causal language model: "
                f"{textwrap.shorten(str(error), 300)}"
            ) from None
        missing = sorted(loading["missing_keys"])
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{checkpoint.option_of_model} {checkpoint.model!r} lacks {len(missing)} of its weights ({some}), which would be "
                "random: it is no whole causal language model."
            )
        if checkpoint.adapter is not None:
            try:
                model = PeftModel.from_pretrained(model, checkpoint.adapter)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                RuntimeError,
                SafetensorError,
            ) as error:
                raise ValueError(
                    f"{checkpoint.option} {checkpoint.adapter!r} is no adapter for {checkpoint.model!r}: "
                    f"{textwrap.shorten(str(error), 300)}"
                ) from None
            kind = model.active_peft_config
            # Virtual tokens before a row would move its positions.
            if kind.is_prompt_learning:
                raise ValueError(
                    f"{checkpoint.option} {checkpoint.adapter!r} is no LoRA adapter but of the kind "
                    f"{kind.peft_type.value}, which puts tokens of its own before each row. Only adapters on a model's "
                    "layers are measured."
                )
        return model.eval()


def checkpoint_with(model: str, adapter: str | None) -> Checkpoint:
    """MODEL, with what --adapter names.

    Raises:
        ValueError: that is no adapter, or MODEL none that predicts the next token.
    """
    if adapter is not None and not _is_adapter(adapter):
        raise ValueError(
            f"--adapter {adapter!r} is no adapter: it has no adapter_config.json. Name the folder that PEFT saved, or "
            "a name on the hub."
        )
    if adapter is not None:
        _check_adapter(adapter, "--adapter")
    _check_is_decoder_only(model, "MODEL")
    return Checkpoint(model, adapter, "MODEL" if adapter is None else "--adapter")


def checkpoint_after(model: str, after: str) -> Checkpoint:
    """What --after names: an adapter for `model`, or a model of its own.

    Raises:
        ValueError: it is neither, or the model none that predicts the next token.
    """
    if _is_adapter(after):
        _check_adapter(after, "--after")
        return Checkpoint(model, after, "--after")
    _check_is_decoder_only(after, "--after", or_adapter=True)
    return Checkpoint(after, None, "--after")


def load_tokenizer(
    name: str, chat_template: Path | None = None, *, option: str = "MODEL"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ValueError: there is none, it has no tokens, or the template cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        # Where there is no model at all, that says more.
        config_of_model(name, option)
        raise ValueError(
            f"{option} {name!r} has no tokenizer that can be loaded. Expected: tokenizer.json and tokenizer_config.json beside "
            f"its config.json ({textwrap.shorten(str(error), 120)})."
        ) from None
    try:
        check_has_tokens(tokenizer)
    except ValueError as error:
        raise ValueError(f"{option} {name!r}: {error}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"--chat-template {str(chat_template)!r}: {reason}.") from None
    return tokenizer


def check_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: str, after: Checkpoint
) -> None:
    """Raise `ValueError` where the second checkpoint counts its tokens in another way than `model` does."""
    if after.adapter is not None:
        return
    try:
        second = AutoTokenizer.from_pretrained(after.model)
        check_has_tokens(second)
        own, others = tokenizer.get_vocab(), second.get_vocab()
        is_same, sizes = own == others, (len(others), len(own))
    except (OSError, ValueError, KeyError):  # A checkpoint without a tokenizer.
        configs = [
            config_of_model(*named) for named in ((after.model, after.option), (model, "MODEL"))
        ]
        sizes = tuple(config.get_text_config().vocab_size for config in configs)
        is_same = sizes[0] == sizes[1]
    if not is_same:
        raise ValueError(
            f"{after.option} {after.model!r} has another vocabulary ({sizes[0]:,} tokens) than MODEL ({sizes[1]:,} "
            "tokens), so that they cannot be measured on the same rows. Name a checkpoint of MODEL."
        )


def trained_on_another(checkpoint: Checkpoint) -> str | None:
    """The base model that an adapter names as its own where that goes by another name than the checkpoint's, else None."""
    if checkpoint.adapter is None:
        return None
    try:
        base: str | None = PeftConfig.from_pretrained(checkpoint.adapter).base_model_name_or_path
    except (OSError, ValueError, KeyError, TypeError):  # Of a damaged one loading tells.
        return None
    if not isinstance(base, str) or Path(base).name in ("", Path(checkpoint.model).resolve().name):
        return None
    return base


def _check_is_decoder_only(name: str, option: str, *, or_adapter: bool = False) -> None:
    """Raise `ValueError` where there is no such model, or it is not one that predicts the next token."""
    try:
        config = config_of_model(name, option, or_adapter=or_adapter)
    except ValueError:
        # An adapter's folder as the model itself: transformers loads it on its base model.
        if _is_adapter(name):
            return
        raise
    kind = type(config).__name__
    way_out = "Name a decoder-only model (Llama, Qwen, Gemma, SmolLM, ...)."
    if config.is_encoder_decoder:
        raise ValueError(
            f"{option} {name!r} is an encoder-decoder ({kind}), which the objectives here do not cover: its labels are not the "
            f"next tokens of its input. {way_out}"
        )
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own_code:
        raise ValueError(
            f"{option} {name!r} is no causal language model: transformers has none with its configuration, {kind}. {way_out}"
        )


def _short(name: str) -> str:
    """The end of a path that says something: not "adapter" or "checkpoint-500" alone."""
    path = Path(name)
    if not path.exists():
        return name
    generic = path.name == "adapter" or path.name.startswith("checkpoint-")
    return f"{path.parent.name}/{path.name}" if generic and path.parent.name else path.name


def _is_adapter(name: str) -> bool:
    if Path(name).exists():
        return (Path(name) / CONFIG_NAME).is_file()
    try:
        PeftConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _check_adapter(name: str, option: str) -> None:
    """Raise `ValueError` where a folder's adapter is none that PEFT can load; the hub's are looked at when they are loaded."""
    folder = Path(name)
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{option} {name!r}: its {CONFIG_NAME} cannot be read: {error}.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in [each.value for each in PeftType]:
        raise ValueError(
            f"{option} {name!r}: the peft_type in its {CONFIG_NAME} is {kind!r}, and PEFT {peft.__version__} has no such kind. "
            "Name a folder that PEFT saved."
        )
    if not any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise ValueError(
            f"{option} {name!r} has no weights: {SAFETENSORS_WEIGHTS_NAME} is not in the folder."
        )
