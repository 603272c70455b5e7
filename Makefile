# Two commands do all the set-up, each in its own virtual environment:
#   make demo    QLoRA fine-tune with DEFT on the shipped base model (no hub, no GPU needed)
#   make test    lint, types, and the tests under the three lines of versions: newest, Axolotl's, lowest
# On a GPU, make test-gpu runs the core's tests there, and make benchmark measures it.

PYTHON ?= python3
TRL := .venv
AXOLOTL := .venv-axolotl
FLOOR := .venv-floor
WORKERS ?= 2

.PHONY: demo test test-gpu lint benchmark clean

demo: $(TRL)/.ready
	$(TRL)/bin/python scripts/train.py

test: $(TRL)/.ready $(AXOLOTL)/.ready $(AXOLOTL)/.examples $(FLOOR)/.ready lint
	OMP_NUM_THREADS=1 $(AXOLOTL)/bin/python -m pytest -q -n $(WORKERS) tests/axolotl_adapter
	OMP_NUM_THREADS=1 $(AXOLOTL)/bin/python -m pytest -q -n $(WORKERS) -m "not slow" --ignore tests/axolotl_adapter
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -q -n $(WORKERS) -m "not slow" tests/objectives tests/ops tests/head tests/trl_adapter
	OMP_NUM_THREADS=1 $(TRL)/bin/python -m pytest -q -n $(WORKERS)

test-gpu: $(TRL)/.ready
	$(TRL)/bin/python -m pytest -q tests/ops

lint: $(TRL)/.ready
	$(TRL)/bin/ruff check .
	$(TRL)/bin/ruff format --check .
	$(TRL)/bin/mypy

benchmark: $(TRL)/.ready
	$(TRL)/bin/python scripts/benchmark.py loss

$(TRL)/.ready: pyproject.toml constraints/trl.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install -q -c constraints/trl.txt -e ".[qlora,deepspeed,scripts,vision,quack,dev]"
	touch $@

$(AXOLOTL)/.ready: pyproject.toml constraints/axolotl.txt
	$(PYTHON) -m venv $(AXOLOTL)
	$(AXOLOTL)/bin/python -m pip install -q -c constraints/axolotl.txt -e ".[qlora,axolotl,deepspeed,dev]"
	touch $@

# Axolotl's example YAMLs are in its source archive alone.
$(AXOLOTL)/.examples: $(AXOLOTL)/.ready
	$(AXOLOTL)/bin/python -m pip download -q --no-deps --no-binary axolotl -c constraints/axolotl.txt -d $(AXOLOTL) axolotl
	tar -xzf $(AXOLOTL)/axolotl-*.tar.gz -C $(AXOLOTL)
	touch $@

$(FLOOR)/.ready: pyproject.toml constraints/floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install -q -c constraints/floor.txt -e ".[qlora,dev]"
	touch $@

clean:
	rm -rf $(TRL) $(AXOLOTL) $(FLOOR) build runs *.egg-info
