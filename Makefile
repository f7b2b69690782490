# make run    set everything up and run the whole chain on the embedded default
# make test   set everything up and pass the tests, file by file on two cores
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: run test test-slow lint bench figures clean

run: $(READY)
	$(BIN)/rlhf run configs/quickstart.yaml

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for name in core sft generate ppo rloo reward dpo scaling safety estimate memory; do $(BIN)/python -m tests.benchmarks $$name || exit 1; done

figures: $(READY)
	for seed in 0 1 2 3; do $(BIN)/rlhf run configs/figures.yaml --set seed=$$seed --set sources.world.seed=$$seed --name figures-$$seed || exit 1; done
	$(BIN)/rlhf report figures-0 figures-1 figures-2 figures-3

clean:
	rm -rf $(VENV) store runs

$(READY): pyproject.toml constraints.txt pipeline/llama/kernel.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
