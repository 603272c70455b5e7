"""Tiny random causal LMs of many architectures, and a tokenizer built in code: no hub is needed."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 128

_EXPERTS = {
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.3,
    "experts_implementation": "eager",  # The default has no float64.
}

# Keyword arguments that differ from `_COMMON`; the transforms of the logits are far from 1.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "final_logit_softcapping": 8.0,
    },
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "mixtral": {"num_local_experts": 4, **_EXPERTS},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS},
}

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM in float32 and training mode, the same for the same arguments.

    Rows of its lm_head have very unequal norms, so that its predictions range from nearly uniform to
    nearly certain. (With tied embeddings that holds for the embeddings.)

    Args:
        architecture: a key of `ARCHITECTURES`, or another causal LM's `model_type` with what makes it tiny.
        seed: of the weights.
        overrides: fields of the configuration, for example `tie_word_embeddings=True`.
    """
    fields = {**_COMMON, **ARCHITECTURES.get(architecture, {}), **overrides}
    config = AutoConfig.for_model(architecture, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            weight = model.get_output_embeddings().weight
            weight.mul_(torch.randn(weight.size(0), 1).exp())
    # Dropout, where an architecture has it by default, would make two forward passes differ.
    return model.train()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; pad 0, bos 1, eos 2, a chat template with generation marks.

    Its ids fit `tiny_model`'s vocabulary, which is padded to `VOCAB_SIZE` as real ones are.
    """
    special = ["<pad>", "<bos>", "<|im_end|>", "<unk>", "<|im_start|>"]
    characters = [*special, *sorted(set(string.printable))]
    vocabulary = {token: index for index, token in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
