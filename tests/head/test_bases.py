"""LoRA over quantised models and beside other people's kernels: the formula on the model's own logits.

Every base is quantised here, by its own library. Libraries that a test environment has not got are skipped.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import finegrained_fp8
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deft_plugin import add_gated_head, gated_head_of, keep_cpu_weights_unpacked

from ..tiny import tiny_model
from .oracle import Batch, assert_like_formula, formula_loss, gradients, make_batch

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4


@pytest.fixture
def batch() -> Batch:
    return make_batch()


def base() -> PreTrainedModel:
    return tiny_model("llama", hidden_size=64, intermediate_size=128, initializer_range=0.1)


def with_lora(model: PreTrainedModel, *targets: str) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=[*(targets or LAYERS)], init_lora_weights=False
    )
    return get_peft_model(model, config)


def linear_layers(model: PreTrainedModel, lm_head: bool) -> dict[str, nn.Linear]:
    """All that are quantised, by name."""
    modules = model.named_modules()
    linear = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if lm_head or name != "lm_head"}


def replace_layers(
    model: PreTrainedModel, lm_head: bool, make: Callable[[nn.Linear], nn.Module]
) -> PreTrainedModel:
    for name, layer in linear_layers(model, lm_head).items():
        model.set_submodule(name, make(layer))
    return model


def assert_equals_formula(model: Any, batch: Batch, objective: str = "deft") -> None:
    loss = formula_loss(model, batch, objective)
    expected = gradients(model, loss)
    add_gated_head(model, objective)
    assert_like_formula(model, loss, expected, batch, TOLERANCE)


# Where LoRA is, and whether the lm_head is quantised.
places = pytest.mark.parametrize(
    ("lm_head", "targets"),
    [(False, ()), (True, ()), (True, ("q_proj", "lm_head"))],
    ids=["plain lm_head", "quantised lm_head", "LoRA on a quantised lm_head"],
)


# --- bitsandbytes ---


@places
def test_8_bits_of_bitsandbytes(
    lm_head: bool, targets: tuple[str, ...], batch: Batch, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_skip_modules=["nothing"] if lm_head else ["lm_head"]
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    assert (type(model.lm_head) is nn.Linear) != lm_head
    assert_equals_formula(with_lora(model.train(), *targets), batch)


# --- HQQ, quanto ---


@places
def test_hqq(lm_head: bool, targets: tuple[str, ...], batch: Batch) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    model = replace_layers(
        base(),
        lm_head,
        lambda layer: hqq.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu"),
    )
    assert_equals_formula(with_lora(model, *targets), batch)


@places
@pytest.mark.parametrize("bits", ["qint8", "qint4", "qfloat8"])
def test_quanto(bits: str, lm_head: bool, targets: tuple[str, ...], batch: Batch) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = base()
    quanto.quantize(model, weights=getattr(quanto, bits), exclude=None if lm_head else "lm_head")
    quanto.freeze(model)
    assert (type(model.lm_head) is nn.Linear) != lm_head
    assert_equals_formula(with_lora(model, *targets), batch)


# --- GPTQ, AWQ ---

GROUP_SIZE = 32


def gptqmodel_layer(module_name: str, class_name: str) -> Callable[[nn.Linear], nn.Module]:
    """How GPT-QModel, which transformers and PEFT use for both, packs a layer of 4 bits."""
    pytest.importorskip("gptqmodel")
    kind = getattr(
        importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module_name}"), class_name
    )

    def make(layer: nn.Linear) -> nn.Module:
        groups = layer.weight.detach().unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).half().float()
        packed = kind(
            bits=4,
            group_size=GROUP_SIZE,
            sym=False,
            desc_act=False,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=False,
            register_buffers=True,
        )
        pack = getattr(packed, "pack_original", packed.pack)
        groups_of_columns = torch.arange(layer.in_features, dtype=torch.int32) // GROUP_SIZE
        pack(layer, scales, (-low / scales).round().clamp(0, 15), groups_of_columns)
        packed.post_init()
        return packed

    return make


@places
def test_gptq(lm_head: bool, targets: tuple[str, ...], batch: Batch) -> None:
    model = replace_layers(base(), lm_head, gptqmodel_layer("torch", "TorchLinear"))
    assert_equals_formula(with_lora(model, *targets), batch)


def test_an_awq_lm_head(batch: Batch) -> None:
    """Its layer computes in float16."""
    model = base()
    model.lm_head = gptqmodel_layer("torch_awq", "AwqTorchLinear")(model.lm_head)
    loss = formula_loss(model, batch)
    add_gated_head(model)
    torch.testing.assert_close(model(**batch).loss.double(), loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize("evaluated", [False, True])
def test_gptqs_layers_for_a_cpu_keep_their_gradients(evaluated: bool, batch: Batch) -> None:
    """Their first forward without gradients would pack them, and lose the gradients of all that follow."""
    make = gptqmodel_layer("torch_aten_kernel", "TorchAtenLinear")
    packed = replace_layers(base(), False, make).bfloat16()
    expected = gradients(model := with_lora(packed), formula_loss(model, batch))
    model = with_lora(replace_layers(base(), False, make).bfloat16())
    add_gated_head(model)
    if evaluated:
        keep_cpu_weights_unpacked(model)
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train()
    for name, gradient in gradients(model, model(**batch).loss).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0.1 * scale, msg=name)


# --- FP8 ---

BLOCK = (32, 32)


def fp8_layer(layer: nn.Linear) -> nn.Module:
    """A layer of transformers' fine-grained FP8, its weight rounded in blocks."""
    blocks = layer.weight.detach().unflatten(0, (-1, BLOCK[0])).unflatten(-1, (-1, BLOCK[1]))
    scales = blocks.abs().amax((1, 3)) / 448
    rounded = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    new = finegrained_fp8.FP8Linear(layer.in_features, layer.out_features, block_size=BLOCK)
    new.weight = nn.Parameter(rounded.flatten(2).flatten(0, 1), requires_grad=False)
    new.weight_scale_inv = nn.Parameter(scales, requires_grad=False)
    return new


def dequantised_fp8(weight: Tensor, scales: Tensor) -> Tensor:
    blocks = weight.float().unflatten(0, (-1, BLOCK[0])).unflatten(-1, (-1, BLOCK[1]))
    return (blocks * scales[:, None, :, None]).flatten(2).flatten(0, 1)


@pytest.fixture
def fp8_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU's kernel computes: it rounds its input as the weight has been, a block of a row at a time."""

    def fp8_linear(
        input: Tensor, weight: Tensor, weight_scale_inv: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        blocks = input.float().unflatten(-1, (-1, BLOCK[1]))
        scales = (blocks.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
        rounded = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
        return (rounded.flatten(-2) @ dequantised_fp8(weight, weight_scale_inv).t()).to(input.dtype)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)


@pytest.mark.usefixtures("fp8_kernel")
def test_fp8_under_lora(batch: Batch) -> None:
    if not hasattr(finegrained_fp8, "FP8LinearFunction"):
        pytest.skip("this transformers has no gradient through FP8 layers")
    assert_equals_formula(with_lora(replace_layers(base(), False, fp8_layer)), batch)


@pytest.mark.usefixtures("fp8_kernel")
def test_an_fp8_lm_head_is_scored_without_rounding_hidden_states(batch: Batch) -> None:
    model = base()
    weight = model.lm_head
    layer: Any = fp8_layer(weight)
    weight.weight = nn.Parameter(dequantised_fp8(layer.weight, layer.weight_scale_inv), False)
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    model.lm_head = layer
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch, TOLERANCE)


# --- torchao ---


def torchao_config(name: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("torchao.quantization"), name)(**options)


@places
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Int8WeightOnlyConfig", {}),
        ("Int8WeightOnlyConfig", {"version": 2}),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}),
        ("Float8WeightOnlyConfig", {}),
    ],
    ids=["int8", "int8 version 2", "int4", "float8"],
)
def test_torchao(
    name: str, options: dict[str, Any], lm_head: bool, targets: tuple[str, ...], batch: Batch
) -> None:
    config = torchao_config(name, **options)
    quantize = sys.modules["torchao.quantization"].quantize_
    model = base()
    names = linear_layers(model, lm_head)
    quantize(model, config, filter_fn=lambda module, name: name in names)
    assert_equals_formula(with_lora(model, *targets), batch)


@pytest.mark.parametrize("version", [1, 2])
def test_torchaos_quantised_activations(version: int, batch: Batch) -> None:
    """Such an lm_head passes no gradient on in torchao's own forward; in the gated head it does."""
    config = torchao_config("Int8DynamicActivationInt8WeightConfig", version=version)
    quantize = sys.modules["torchao.quantization"].quantize_
    model, quantised = base(), base()
    quantize(quantised, config, filter_fn=lambda module, name: name == "lm_head")
    weight: Any = quantised.lm_head.weight
    whole = getattr(weight, "original_weight_tensor", weight).dequantize()
    model.lm_head.weight = nn.Parameter(whole, requires_grad=False)
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    quantised.lm_head.requires_grad_(False)
    add_gated_head(quantised)
    assert_like_formula(quantised, loss, expected, batch, TOLERANCE)


# --- forwards and kernels of others ---


class InPlace(LlamaForCausalLM):
    """Scales logits as Unsloth's forwards do."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        kwargs.pop("return_dict", None)
        output = super().forward(input_ids, **kwargs)
        output.logits = (
            output.logits.mul(0.5) if output.logits.requires_grad else output.logits.mul_(0.5)
        )
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, output.logits.size(-1))
        return output


def test_logits_that_are_scaled_in_place(batch: Batch) -> None:
    model = InPlace(base().config).train()
    loss = formula_loss(model, batch)
    expected = gradients(model, loss)
    add_gated_head(model)
    assert_like_formula(model, loss, expected, batch, TOLERANCE)
    assert gated_head_of(model).own_forward.measured.transform.scale == pytest.approx(0.5)


try:
    import triton
    import triton.language as tl

    @triton.jit
    def _rsqrt(x):  # type: ignore[no-untyped-def]
        return tl.math.rsqrt(x)

    @triton.jit
    def _tanh(x):  # type: ignore[no-untyped-def]
        return 2 * tl.sigmoid(2 * x) - 1
except ImportError:
    pass


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Liger's patches, its Triton kernels in Triton's interpreter, and transformers as it was after them."""
    # Liger imports flash-linear-attention, which registers models of its own under transformers' names.
    registered = dict(CONFIG_MAPPING._extra_content)
    patches = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    CONFIG_MAPPING._extra_content = registered
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels have been compiled for the GPU")
    # What the interpreter has not got: functions of CUDA's library.
    for module in [m for name, m in sys.modules.items() if name.startswith("liger_kernel.ops")]:
        for name, function in (("rsqrt", _rsqrt), ("tanh", _tanh)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    names = ("llama", "gemma2", "mixtral")
    modules = [importlib.import_module(f"transformers.models.{n}.modeling_{n}") for n in names]
    before = {module: dict(vars(module)) for module in modules}
    classes = [
        (cls, cls.forward)
        for attributes in before.values()
        for cls in attributes.values()
        if inspect.isclass(cls) and "forward" in vars(cls)
    ]
    cross_entropy = nn.functional.cross_entropy
    yield patches
    nn.functional.cross_entropy = cross_entropy
    for module, attributes in before.items():
        vars(module).update(attributes)
    for cls, forward in classes:
        cls.forward = forward


@pytest.mark.parametrize(
    ("architecture", "where", "loss"),
    [
        ("llama", "class", "fused"),
        ("llama", "instance", "fused"),
        ("llama", "class", "cross_entropy"),
        ("llama", "instance", "none"),
        ("gemma2", "class", "fused"),
        ("mixtral", "class", "fused"),
    ],
)
def test_ligers_kernels(architecture: str, where: str, loss: str, liger: Any) -> None:
    apply = liger.MODEL_TYPE_TO_APPLY_LIGER_FN[architecture]
    options = {
        "fused_linear_cross_entropy": loss == "fused",
        "cross_entropy": loss == "cross_entropy",
    }
    if architecture == "mixtral":
        options["swiglu"] = False  # Its experts sort tokens: minutes in the interpreter.
    if where == "class":
        apply(**options)
    model = tiny_model(architecture, num_hidden_layers=1)
    if where == "instance":
        apply(model=model, **options)
    assert_equals_formula(model, make_batch(rows=2, length=7))


def test_liger_put_on_by_trainer_after_the_head(
    batch: Batch, liger: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    add_gated_head(model)
    expected = model(**batch).loss.item()
    rows = Dataset.from_list(
        [{name: value[row].tolist() for name, value in batch.items()} for row in range(3)]
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_liger_kernel=True,
        use_cpu=True,
        report_to="none",
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=3,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    assert "with labels the gated head stays" in caplog.text
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    # Without labels it is Liger's forward that runs.
    assert "logits" in model(input_ids=batch["input_ids"])
