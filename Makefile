# Every target makes and reuses .venv by itself; nothing has to be installed first but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-browser test-docs test-engines test-wheel lint format bench docs clean

# torch first and by itself: its range admits the CPU build where one is offered, and no newer CUDA build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longrope needs Python 3.11 or newer; give it as make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.9,<2.14"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/longrope demo

# One thread a worker: the tests' models are too small to share.
test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The page in a real Chromium: Debian's where it is or may be installed, else playwright's own.
test-browser: $(VENV)/installed
	command -v chromium || command -v chromium-browser \
		|| { test "$$(id -u)" = 0 && command -v apt-get && apt-get update && apt-get install --yes chromium; } \
		|| $(BIN)/python -m playwright install chromium \
		|| { echo "no Chromium here, and none can be installed: install one, or run as root on Debian" >&2; exit 1; }
	$(BIN)/python -m pytest tests/browser

# The engines themselves. llama.cpp is built from its source package, which takes minutes once: pip keeps the wheel.
$(VENV)/engines: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,engines]"
	touch $@

test-engines: $(VENV)/engines
	$(BIN)/python -m pytest tests/engines

# What a user gets: the wheel alone, in a clean environment and a folder that is not this one.
test-wheel: $(VENV)/installed
	set -eu; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$$folder" .; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch>=2.9,<2.14" "$$folder"/*.whl; \
	cd "$$folder"; env -u PYTHONPATH venv/bin/longrope demo --evaluations 60 --out demo; \
	test -s demo/report.html; test -s demo/factors.json

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/measures.py

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,docs]"
	touch $@

# The pages, into site/. The commands' reference is generated from --help, the pictures from the package's formulas.
docs: $(VENV)/docs
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/pictures.py --check
	$(BIN)/python -m mkdocs build --strict --quiet --clean

# Every code block of the pages is run.
test-docs: $(VENV)/docs
	$(BIN)/python -m pytest tests/docs --numprocesses 2 --dist worksteal

clean:
	rm -rf $(VENV) build dist site
