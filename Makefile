# Two commands matter: `make demo` and `make test`. Both set everything up on a bare machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# More than the cores of a small machine: tests with real processes mostly wait.
WORKERS ?= 3
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test check format fast fasttest nativetest bench lock clean

help: ## Show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 to 3.13 is needed: set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); sys.exit(0 if ok else "Python 3.11 to 3.13 is needed, this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3")'
	@echo "setting up $(VENV) (about 1.5 GB, a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

setup: $(STAMP) ## Make the virtual environment

demo: $(STAMP) ## Train a model from pictures and generate with it, end to end, on this machine
	$(BIN)/aigc demo --output demo-output

test: $(STAMP) ## All tests, in parallel, with branch coverage of engine/
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --cov --cov-report=term --cov-report=json:.coverage.json $(PYTEST_ARGS)

check: $(STAMP) ## Format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fast: $(STAMP) ## Build the hot modules natively (mypyc, needs a C compiler) into build/fast
	rm -rf build/fast
	mkdir -p build/fast
	cp -r engine predictors executors sim api benchmarks setup.py mypyc.ini pyproject.toml README.md LICENSE build/fast/
	if [ -d ../shared ]; then ln -sfn ../../shared build/shared; fi
	cd build/fast && AIGC_COMPILE=1 ../../$(BIN)/python setup.py -q build_ext --inplace

fasttest: fast nativetest ## Build natively, then test the engine and the simulator against it

nativetest: ## The engine's and the simulator's tests against what `make fast` built
	cd build/fast && PYTHONPATH=. ../../$(BIN)/python -P -c 'import engine.state, sim.world; files = [engine.state.__file__, sim.world.__file__]; raise SystemExit(None if all(f.endswith(".so") for f in files) else f"no native build: {files}; run `make fast`")'
	cd build/fast && PYTHONPATH=. ../../$(BIN)/python -P -m pytest -q -n $(WORKERS) -p no:cacheprovider -c ../../pyproject.toml --rootdir ../.. ../../tests/engine ../../tests/sim/test_simulate.py ../../tests/sim/test_jobs_core.py

bench: $(STAMP) ## Every benchmark, tables to the terminal
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.simulate
	$(BIN)/python -m benchmarks.predict
	$(BIN)/python -m benchmarks.dispatch
	$(BIN)/python -m benchmarks.sensing
	$(BIN)/python -m benchmarks.jobs
	$(BIN)/python -m benchmarks.packing
	$(BIN)/python -m benchmarks.executors
	$(BIN)/python -m benchmarks.ahead

lock: $(STAMP) ## Write requirements.lock from what is installed
	{ sed -n '/^#/p' requirements.lock; $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/^torch( @|==).*/torch==2.13.0/'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean: ## Remove what was built (the state of `aigc up` stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output
