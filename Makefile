# make run and make test install what they need. Only Python 3.11 or newer and make are required.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Test processes; each file of tests runs in one of them, since tests of a file share sweeps and clusters.
PROCESSES ?= 2

.PHONY: install run test test-all test-fast fuzz check bench record ui schema lock audit licences clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "raysweep needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: install
	$(BIN)/python -m raysweep.run experiments/quickstart.yaml

PYTEST := $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow"

# With the tests that kill processes in the middle of a sweep; CI runs these.
test-all: install
	$(PYTEST)

# What reads experiment files and tables, with 10,000 random inputs of each kind; a quarter of an hour.
fuzz: install
	RAYSWEEP_FUZZ_EXAMPLES=10000 $(PYTEST) tests/experiment/test_fuzz.py tests/images/test_fuzz_tables.py

# What needs neither Ray nor other processes: for every change while one works on the code.
test-fast: install
	$(PYTEST) -m "not ray and not end_to_end and not process and not slow"

check: install
	$(BIN)/ruff check raysweep tests benchmarks docs/licences.py
	$(BIN)/ruff format --check raysweep tests benchmarks docs/licences.py
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python -m benchmarks

# From images to leaderboard, one table: make record RECORD="--images 1300 10000 --encoder dinov2-small --price 0.5"
record: install
	$(BIN)/python -m benchmarks.record $(RECORD)

# Without the seven processes of 250 MB for jobs that MLflow starts otherwise.
ui: install
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

schema: install
	$(BIN)/python -m raysweep.run --print-schema > experiments/schema.json

# Tools that raysweep itself does not need, in an environment of their own.
TOOLS := $(VENV)/tools/bin

$(TOOLS)/pip-audit: Makefile
	$(PYTHON) -m venv $(VENV)/tools
	$(TOOLS)/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1
	@touch $@

# Writes the requirements of raysweep with their hashes: for images, and for whoever installs from PyPI (docs/security.md).
lock: $(TOOLS)/pip-audit
	$(TOOLS)/uv pip compile pyproject.toml --constraint constraints.txt --generate-hashes --no-annotate --universal \
		--python-version 3.11 --custom-compile-command "make lock" --quiet --output-file requirements.lock

# Looks up each version in PyPI's advisories. --strict: a version that cannot be looked up is an error too.
audit: $(TOOLS)/pip-audit
	$(TOOLS)/pip-audit --strict --disable-pip --requirement requirements.lock || \
		{ echo "an advisory, or no network: the list made by hand is in docs/security.md, 'Advisories'"; exit 1; }

licences: install
	$(BIN)/python docs/licences.py > docs/licences.md

clean:
	rm -rf runs mlflow.db .mlflow.db.lock mlruns
