VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# What an install depends on: with an unchanged pyproject.toml the stamp is newer and nothing is installed again.
RECIPE := pyproject.toml constraints.txt optimum_rmtkd/commands/register_rmtkd.py

.PHONY: help demo test slow_tests faults quality style docs families benchmark clean

help:
	@echo "make demo        install into $(VENV) and run the demonstration (no network once installed)"
	@echo "make test        install the development extras and run the quick tests"
	@echo "make slow_tests  the tests marked slow"
	@echo "make faults      the tests that kill runs all over, and let them go on"
	@echo "make quality     ruff check and ruff format --check"
	@echo "make style       let ruff repair what it can"
	@echo "make docs        build the documentation into build/site; a warning is an error"
	@echo "make families    write the table of docs/guides/families.md from the registry"
	@echo "make benchmark   the measurements of docs/results.md and docs/peers.md"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(RECIPE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.installed-dev: $(RECIPE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: $(RECIPE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[docs]"
	@touch $@

$(VENV)/.installed-peers: $(RECIPE) | $(BIN)/python
	$(PIP) install -c constraints.txt -e ".[peers]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/optimum-cli rmtkd demo -o rmtkd-demo --overwrite

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadfile

slow_tests: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m slow

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/faults -m faults

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

families: $(VENV)/.installed-dev
	$(BIN)/python -m tests.surgery.families_page

benchmark: $(VENV)/.installed-dev $(VENV)/.installed-peers
	$(BIN)/python examples/benchmarks/surgery.py
	$(BIN)/python examples/benchmarks/surgery.py speed
	$(BIN)/python examples/benchmarks/digits.py
	$(BIN)/python examples/benchmarks/text.py all --task sst2 -o results
	$(BIN)/python examples/benchmarks/text.py latency --task sst2 -o results
	$(BIN)/python examples/benchmarks/text.py teacher --task ag_news -o results
	$(BIN)/python examples/benchmarks/text.py all --task ag_news -o results
	for task in sst2 rte; do for action in sweep seeds once; do \
		$(BIN)/python examples/benchmarks/distillation.py $$action --task $$task --output results || exit 1; \
	done; done
	for task in sst2 ag_news; do \
		$(BIN)/python examples/benchmarks/peers.py run --tasks $$task --targets 0.3 0.5 -o results || exit 1; \
		$(BIN)/python examples/benchmarks/peers.py run --tasks $$task --targets 0.63 0.8 0.9 --steps 384 \
			--rates 3e-5 1e-4 3e-4 --seeds 0 1 2 --latency False -o results || exit 1; \
	done
	$(BIN)/python examples/benchmarks/paper_parity.py run --tasks sst2 ag_news cifar10 bert_base resnet50 -o results
	$(BIN)/python examples/benchmarks/ternary.py all -o results
	$(BIN)/python examples/benchmarks/ternary.py latency -o results

clean:
	rm -rf build dist .pytest_cache .ruff_cache
