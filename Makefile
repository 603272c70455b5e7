# Two commands do all the set-up, each in its own virtual environment:
#   make demo    QLoRA fine-tune with DEFT on the shipped base model (no hub, no GPU needed)
#                (make demo-real: the same on SmolLM2-135M and word problems, out of packages)
#   make test    lint, types, and the tests under the three lines of versions: newest, Axolotl's, lowest
# make package builds and tests what goes to a package index. make benchmark measures the loss against the public ones that can
# run here; on a GPU make test-gpu runs the core's tests, and make measure-gpu both and what else is measured there.

PYTHON ?= python3
TRL := .venv
AXOLOTL := .venv-axolotl
FLOOR := .venv-floor
BENCHMARK := .venv-benchmark
DOCS := .venv-docs
WORKERS ?= 2

.PHONY: demo demo-real test test-trl test-axolotl test-floor test-benchmark test-kernels test-gpu lint package dist benchmark measure-gpu docs clean

demo: $(TRL)/.ready
	$(TRL)/bin/python scripts/train.py

demo-real: $(TRL)/.ready
	$(TRL)/bin/python scripts/train.py --model smollm2 --dataset asdiv --steps 60 --batch-size 16 --learning-rate 1e-3 \
		--held-out-rows 128 --output runs/demo-real $(ARGUMENTS)

# Installing is mostly writing: what is not needed yet is installed while tests run.
test:
	$(MAKE) -j 3 $(TRL)/.ready $(AXOLOTL)/.examples docs
	$(MAKE) -j 4 test-axolotl $(FLOOR)/.ready $(BENCHMARK)/.ready lint
	$(MAKE) test-trl test-floor test-benchmark

# A worker goes through the files that it was dealt, so that what a file's tests share is made once, and then takes from another.
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal
test-trl test-axolotl test-floor test-benchmark test-kernels package: export OMP_NUM_THREADS := 1
# Tests are compiled once, for all workers, lines and processes that they start.
test-trl test-axolotl test-floor test-benchmark test-kernels package: export PYTHONDONTWRITEBYTECODE :=

# With the public losses on top, in the environment that has all of the TRL line.
BENCHMARK_TESTS := tests/benchmark tests/scripts/test_benchmark.py
test-trl: $(TRL)/.ready dist
	$(TRL)/bin/python $(PYTEST) $(addprefix --ignore ,$(BENCHMARK_TESTS))

# Axolotl changes transformers' classes where it is imported, which the other tests are not to see. Its trl, transformers, peft and
# accelerate are the floor's, whose run has the tests of head and trainers; here are those that need a package beside them.
BESIDE_AXOLOTL := $(addprefix tests/,distributed/test_parallelism.py distributed/test_trl.py doctor fuzz report head/test_bases.py head/test_quantised_weight.py \
	ops/test_triton.py transformers/test_parallelism.py trl/test_liger.py trl/test_vision.py) $(wildcard tests/test_*.py)
# Whole reports, in newest versions alone.
WHOLE_REPORTS := tests/report/test_command.py tests/report/test_page.py
test-axolotl: $(AXOLOTL)/.ready $(AXOLOTL)/.examples
	$(AXOLOTL)/bin/python $(PYTEST) tests/axolotl
	$(AXOLOTL)/bin/python $(PYTEST) -m "not slow" $(BESIDE_AXOLOTL) $(addprefix --ignore ,$(WHOLE_REPORTS))

# How exact and how dear the core is, in newest versions alone.
MEASURES := $(addprefix tests/ops/test_,costs.py low_rank.py precision.py quack.py skipping.py)
test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python $(PYTEST) -m "not slow" $(addprefix tests/,objectives ops head trl transformers) $(addprefix --ignore ,$(MEASURES))

test-benchmark: $(BENCHMARK)/.ready
	$(BENCHMARK)/bin/python $(PYTEST) $(BENCHMARK_TESTS)

# The kernels, compiled for GPUs that need not be here. make test does this too.
test-kernels: $(TRL)/.ready
	$(TRL)/bin/python $(PYTEST) tests/ops/test_ahead_of_time.py tests/ops/test_quack_ahead_of_time.py

test-gpu: $(TRL)/.ready
	$(TRL)/bin/python -m pytest -q tests/ops

lint: $(TRL)/.ready
	$(TRL)/bin/ruff check .
	$(TRL)/bin/ruff format --check .
	$(TRL)/bin/mypy

# What dist/ holds after it has been built, installed and tried out.
package: dist
	$(TRL)/bin/python -m pytest -q tests/packaging

dist: $(TRL)/.ready
	rm -rf build dist
	$(TRL)/bin/python -m build -q
	$(TRL)/bin/python -m twine check --strict dist/*

benchmark: $(BENCHMARK)/.ready
	$(BENCHMARK)/bin/python scripts/benchmark.py loss $(ARGUMENTS)

measure-gpu: $(BENCHMARK)/.ready
	$(BENCHMARK)/bin/python scripts/measure_gpu.py $(ARGUMENTS)

# Strict: a broken link, an anchor that is not there or a page outside the navigation is an error.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

# What is imported is compiled then.
INSTALL = $(@D)/bin/python -m pip install -q --no-compile

$(TRL)/.ready: pyproject.toml constraints/trl.txt
	$(PYTHON) -m venv $(TRL)
	$(INSTALL) -c constraints/trl.txt -e ".[qlora,deepspeed,paper,vision,quack,dev]"
	touch $@

# Everything of the TRL line, with the public losses on top, which its own tests are not to see.
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
HAS_GPU = -c 'import torch; raise SystemExit(not torch.cuda.is_available() or torch.version.hip is not None)'
$(BENCHMARK)/.ready: $(TRL)/.ready
	$(PYTHON) -m venv $(BENCHMARK)
	$(TRL)/bin/python $(PURELIB) > "$$($(BENCHMARK)/bin/python $(PURELIB))/trl-line.pth"
	if $(BENCHMARK)/bin/python $(HAS_GPU); then extra=benchmark-gpu; else extra=benchmark; fi; \
	$(INSTALL) -c constraints/trl.txt -e ".[$$extra]"
	touch $@

$(AXOLOTL)/.ready: pyproject.toml constraints/axolotl.txt
	$(PYTHON) -m venv $(AXOLOTL)
	$(INSTALL) -c constraints/axolotl.txt -e ".[qlora,axolotl,deepspeed,dev]"
	touch $@

# Axolotl's example YAMLs are in its source archive alone.
$(AXOLOTL)/.examples: $(AXOLOTL)/.ready
	$(AXOLOTL)/bin/python -m pip download -q --no-deps --no-binary axolotl -c constraints/axolotl.txt -d $(AXOLOTL) axolotl
	tar -xzf $(AXOLOTL)/axolotl-*.tar.gz -C $(AXOLOTL)
	touch $@

$(FLOOR)/.ready: pyproject.toml constraints/floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(INSTALL) -c constraints/floor.txt -e ".[qlora,dev]"
	touch $@

# The extra alone: the site is made from the sources' text, without torch.
$(DOCS)/.ready: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'from pip._vendor import tomli; print(*tomli.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(DOCS)/requirements.txt
	$(INSTALL) -r $(DOCS)/requirements.txt
	touch $@

clean:
	rm -rf $(TRL) $(AXOLOTL) $(FLOOR) $(BENCHMARK) $(DOCS) build dist runs *.egg-info
