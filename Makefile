# `make train` and `make test` install what they need in .venv. PYTHON selects the interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN_DIR ?= runs/phantom
BIN := $(VENV)/bin

.PHONY: train test slow flower check smoke clean

train: $(VENV)/installed
	$(BIN)/python -m experiments.train_federated --run_dir=$(RUN_DIR) $(FLAGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not flower" $(TESTS)

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow $(TESTS)

flower: $(VENV)/installed-test
	$(BIN)/python -m pytest -m flower tests/flower_trial_test.py tests/flower_evaluation_test.py

check: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules primia_jax --ignore=primia_jax/flower # imports grpc first

smoke: $(VENV)/installed-test
	PYTHON=$(BIN)/python bash .ci/smoke

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-test: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
