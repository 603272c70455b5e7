"""Whatever is changed in a YAML, `deft doctor` and Axolotl's validation say what is wrong with it; neither fails itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given

from tests.fuzz.anything import changed
from tests.fuzz.test_yaml import BASE_MODEL, check, unhurried

AXOLOTL = {
    "plugins": [
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
        "deft_plugin.axolotl.DEFTPlugin",
        "axolotl.integrations.liger.LigerPlugin",
    ],
    "base_model": str(BASE_MODEL),
    "deft_objective": "cayley_trans",
    "deft": {"floor_coefficient": 0.3},
    "datasets": [{"path": "some/data", "type": "alpaca"}],
    "output_dir": "unused",
    "micro_batch_size": 1,
    "num_epochs": 1,
    "learning_rate": 0.001,
    "sequence_len": 64,
}
AXOLOTL_KEYS = [
    *("cut_cross_entropy", "rl", "use_eaft", "label_smoothing_factor", "lora_target_modules"),
    *("lora_modules_to_save", "adapter", "trainer_cls", "deft_objectiv", "tensor_parallel_size"),
    *("chunked_cross_entropy", "liger_fused_linear_cross_entropy", "reward_model", "kd_trainer"),
    *("liger_use_token_scaling", "do_causal_lm_eval", "eval_causal_lm_metrics", "peft_use_dora"),
    *("qat", "context_parallel_size", "lora_target_parameters", "test_datasets", "processor_type"),
]


@unhurried
@given(configuration=changed(AXOLOTL, AXOLOTL_KEYS))
def test_changed_yaml_of_axolotl(tmp_path: Path, configuration: dict[str, Any]) -> None:
    check(tmp_path / "axolotl.yaml", yaml.safe_dump(configuration))
