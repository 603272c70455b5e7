"""What runs each command of README and docs, or why nothing here can.

A new command fails tests/docs/test_commands.py until it has an entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Test:
    """A test runs it: the same command, with a smaller model, other files or fewer steps."""

    __test__ = False
    name: str


@dataclass(frozen=True)
class Target:
    """`make` runs it: it is this target, or in its recipe with other extras or arguments."""

    name: str


@dataclass(frozen=True)
class CannotRun:
    """Nothing here can run it. Its options and files are looked at all the same."""

    reason: str


@dataclass(frozen=True)
class Form:
    """No command but the form of some, which are entries of their own or in a page's table."""

    of: str


RunBy = Test | Target | CannotRun | Form

A_GPU = CannotRun("needs a GPU")
GPUS = CannotRun("needs several GPUs, a hub, and hours")
A_RELEASE = CannotRun("needs an index that has a release")
HOURS = CannotRun("takes hours")

TESTED_AS_TRAINING = Test("test_any_model_and_data_set_are_trained_on")
STUDY = Test("test_a_study_goes_on_where_it_was_left")
BENCHMARK = Test("test_the_command_measures_and_compares")
SETTINGS = Test("test_losses_and_options_reach_the_trainer")

BENCHMARK_OF_TWO = 'deft benchmark --vocab 32000 --hidden 2048 --head frozen --only "deft_plugin deft" --only "torch cross_entropy"'

RUN_BY: dict[str, RunBy] = {
    # README, installation, quickstart
    'pip install "deft_plugin[qlora]"': A_RELEASE,
    'pip install "deft_plugin[report]"': A_RELEASE,
    'pip install "deft_plugin[qlora,report]"': A_RELEASE,
    'pip install ".[qlora,report]"': Target("$(TRL)/.ready"),
    'pip install -c constraints/trl.txt -e ".[qlora]"': Target("$(TRL)/.ready"),
    'pip install -c constraints/trl.txt -e ".[qlora,vision]"': Target("$(TRL)/.ready"),
    "deft sft --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name data --use_peft --lora_target_modules all-linear "
    "--learning_rate 2e-4 --eval_strategy epoch --eval_on_start true --loss_type deft --output_dir runs/deft": Test("test_deft_against_nll"),
    "deft sft --model_name_or_path Qwen/Qwen3-0.6B-Base --dataset_name data --use_peft --lora_target_modules all-linear "
    "--learning_rate 2e-4 --eval_strategy epoch --eval_on_start true --loss_type alpha --loss_kwargs '{\"a\": 0}' --output_dir runs/nll": Test("test_deft_against_nll"),
    "deft plot runs/nll runs/deft": Test("test_deft_against_nll"),
    "deft plot out": Test("test_deft_against_nll"),
    "deft report MODEL --data data/train.jsonl": Test("test_data_in_a_file_or_a_folder"),
    "make test": Target("test"),
    "make demo": Test("test_the_demo_in_miniature"),
    "make demo-real": CannotRun("takes a quarter of an hour; test_the_demo_in_miniature is the demo in small"),
    "make docs": Target("docs"),
    "deft doctor": Test("test_the_environment_of_the_tests_is_fit"),
    "deft doctor run.yaml": Test("test_a_trl_file_with_an_objective_is_fine"),
    "deft objectives": Test("test_list_of_objectives"),
    "deft sft --config run.yaml --resume_from_checkpoint true": Test("test_a_run_goes_on_from_its_last_checkpoint"),
    "deft sft --config run.yaml": Test("test_yaml_and_a_flag_over_it_as_accelerate_launch_runs_them"),
    "python scripts/train.py --model Qwen/Qwen3-0.6B-Base --dataset trl-lib/Capybara --learning-rate 2e-4 "
    "--batch-size 4 --accumulation 8 --max-length 1024": TESTED_AS_TRAINING,
    "scripts/train.py --loss-type ... --seed ...": SETTINGS,
    # Names of commands
    "deft sft": Form("deft sft --config run.yaml"),
    "deft sft --loss_type deft ...": Form("deft sft --config run.yaml"),
    "deft report": Form("deft report MODEL --data DATA --output FOLDER"),
    "deft plot": Form("deft plot out"),
    "deft plot RUN...": Form("deft plot out"),
    "deft benchmark": Form(BENCHMARK_OF_TWO),
    BENCHMARK_OF_TWO: Test("test_the_loss_is_measured"),
    "deft plot runs/nll runs/deft --metric nll --metric mean_token_accuracy --output compared.png": Test(
        "test_deft_against_nll"
    ),
    "deft COMMAND --help": Test("test_help_of_every_command_names_its_options"),
    "trl sft": CannotRun("TRL's own"),
    "axolotl train": Form("axolotl train axolotl_configs/local.yaml"),
    "axolotl merge-lora": Form("axolotl merge-lora axolotl_configs/local.yaml"),
    "accelerate launch": Form("accelerate launch -m deft_plugin.trl.sft --config run.yaml"),
    # TRL, many GPUs
    "accelerate launch -m deft_plugin.trl.sft --config run.yaml": Test(
        "test_yaml_and_a_flag_over_it_as_accelerate_launch_runs_them"
    ),
    "torchrun --nproc_per_node 8": Test("test_torchrun_with_zero2_logs_what_one_process_logs"),
    # Axolotl
    "make .venv-axolotl/.ready": Target("$(AXOLOTL)/.ready"),
    "make .venv-axolotl/.examples": Target("$(AXOLOTL)/.examples"),
    'pip install -c constraints/axolotl.txt -e ".[axolotl,qlora]"': Target("$(AXOLOTL)/.ready"),
    'pip install -c constraints/axolotl.txt -e ".[axolotl,qlora,vision]"': Target("$(AXOLOTL)/.ready"),
    "axolotl train axolotl_configs/local.yaml": Test("test_it_trains_saves_merges_and_generates"),
    "axolotl merge-lora axolotl_configs/local.yaml": Test("test_it_trains_saves_merges_and_generates"),
    ".venv-axolotl/bin/python scripts/axolotl_examples.py": Test(
        "test_97_of_100_are_accepted_and_the_documentation_has_the_figures"
    ),
    # Report
    "deft report MODEL --data DATA --output FOLDER": Test("test_the_shipped_model_and_data"),
    "deft report runs/models/SmolLM2-135M-Instruct --data gsm8k/train.jsonl --columns question,answer "
    "--after runs/demo/adapter --run runs/demo --output reports/gsm8k": Test("test_everything_at_once"),
    "deft report --compare RUN RUN --output FOLDER": Test("test_runs_alone_need_no_model"),
    # Figures
    "make benchmark": BENCHMARK,
    "python scripts/benchmark.py loss --device cpu --repetitions 5": BENCHMARK,
    "python scripts/benchmark.py loss --shape N,V,H": BENCHMARK,
    "python scripts/benchmark.py step": A_GPU,
    "python scripts/benchmark.py summary runs/gpu/*/benchmark.csv": Test("test_the_summary_has_a_line_for_each_job"),
    '.venv/bin/python scripts/benchmark.py loss --shape 8192,128256,4096 --only "deft_plugin deft" '
    '--only "deft_plugin deft, quack" --only "QuACK scaled exp"': A_GPU,
    "make test-gpu": Target("test-gpu"),
    "make measure-gpu": A_GPU,
    'make measure-gpu ARGUMENTS="--only loss"': Test("test_a_rehearsal_on_a_cpu_fills_the_folder"),
    "python -m pytest tests/ops": Target("test-gpu"),
    "pytest tests/ops": Target("test-gpu"),
    "python -m tests.ops.ahead_of_time": Test("test_it_compiles_for_nvidia"),
    "python -m tests.ops.quack_ahead_of_time": Test("test_every_product_compiles"),
    "python scripts/growth.py measure --device cpu": Test("test_a_sharded_vocabulary_reduces_what_the_plan_says"),
    "python scripts/growth.py plan --ranks 16 --tokens 8192 --bandwidth 50 --rate 400": Test("test_a_plan_is_printed"),
    "python scripts/compare_scopes.py": Test("test_scopes_are_compared_with_the_whole_step"),
    "python scripts/train.py --loss-type cayley_trans --loss-kwargs '{\"scope\": \"ema\"}' --batch-size 4 "
    "--accumulation 8": SETTINGS,
    "python scripts/histogram_cost.py": Test("test_steps_and_metrics_are_measured_with_and_without"),
    "python scripts/get_real.py model": Test("test_what_is_there_is_not_fetched_again"),
    "python scripts/hidden_states.py runs/models/SmolLM2-135M-Instruct --output "
    "runs/hidden_states/plain_text.safetensors": Test("test_states_of_plain_text_give_the_models_own_loss"),
    "python scripts/hidden_states.py runs/models/SmolLM2-135M-Instruct --dataset gsm8k.jsonl --columns question,answer "
    "--output runs/hidden_states/gsm8k.safetensors": Test("test_states_of_a_data_set_are_of_its_completions"),
    "python scripts/skipping.py runs/hidden_states/plain_text.safetensors runs/hidden_states/gsm8k.safetensors random": Test(
        "test_the_sweep_writes_a_row_for_every_share_and_head"
    ),
    "python scripts/skipping.py random FILE...": Test("test_the_sweep_writes_a_row_for_every_share_and_head"),
    # Models
    "python -m tests.head.model_table docs/models.md": Test(
        "test_loss_and_gradients_are_the_classs_own_or_it_is_refused"
    ),
    "pip install --no-deps hqq einops termcolor optimum-quanto ninja": CannotRun("packages beside the tested lines"),
    "pytest tests/head/test_bases.py": Target("test"),
    # Testing
    "make test-trl": Target("test-trl"),
    "make test-axolotl": Target("test-axolotl"),
    "make test-floor": Target("test-floor"),
    "make test-benchmark": Target("test-benchmark"),
    # The study
    "python scripts/study.py small": STUDY,
    "python scripts/study.py real": STUDY,
    "python scripts/study.py tables": Test("test_the_docs_say_what_the_results_files_say"),
    "python scripts/study.py real --all-objectives --seeds 5 --output runs/study/smollm2.csv": HOURS,
    "python scripts/study.py real --all-objectives --seeds 5 --model Qwen/Qwen3-0.6B-Base --train-rows 1500 "
    "--output runs/study/qwen3.csv": A_GPU,
    # The paper's experiments
    'pip install -c constraints/trl.txt -e ".[paper,deepspeed]"': Target("$(TRL)/.ready"),
    "python scripts/paper/prepare.py math": Test("test_math_draws_rows_of_numinamath_in_their_order"),
    "python scripts/paper/prepare.py medical": Test("test_medical_leaves_out_the_reasoning_and_rows_without_an_answer"),
    "python scripts/paper/prepare.py figfont": Test("test_figfont_is_what_make_figfont_writes"),
    "for experiment in math medical figfont; do for objective in nll p eaft cayley_trans deft; do accelerate launch "
    "--num_processes 8 scripts/paper/train.py $experiment --objective $objective --deepspeed "
    "deepspeed_configs/zero3.json done done": Test("test_two_ranks_train_what_one_does"),
    "axolotl train axolotl_configs/paper-math-deft.yaml": GPUS,
    "mkdir -p runs/paper && for objective in nll p eaft; do for experiment in math medical figfont; do sed "
    r'"s/deft_objective: deft/deft_objective: $objective/; s/^\(output_dir: .*\)-deft$/\1-$objective/" '
    "axolotl_configs/paper-$experiment-deft.yaml > runs/paper/$experiment-$objective.yaml done; done": Test(
        "test_the_documented_command_makes_the_other_objectives_yamls"
    ),
    "python scripts/paper/evaluate.py meta-llama/Llama-3.1-8B --suite math --objective base": Test(
        "test_from_problems_to_the_table"
    ),
    "python scripts/paper/evaluate.py runs/paper/math-deft/model --suite math": Test("test_from_problems_to_the_table"),
    "python scripts/paper/evaluate.py runs/paper-math-deft --suite math --objective deft --base-model "
    "meta-llama/Llama-3.1-8B": Test("test_every_suite_on_a_tiny_model"),
    "python scripts/paper/table.py runs/paper/results/*.jsonl --output runs/paper/table": Test("test_files_are_written_too"),
    "pytest -m gpu tests/scripts/test_paper_generation.py": A_GPU,
}  # fmt: skip
