PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check docs clean

quickstart: $(VENV)/.installed
	$(BIN)/distill quickstart

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

check: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check

docs: $(VENV)/.tested
	$(BIN)/python docs/make_cli.py

clean:
	rm -rf $(VENV)

# torch and torchvision are resolved together: apart, they may not be built for each other.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("distill needs Python 3.11 or newer, not %d.%d; name one with make PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test]'
	touch $@
