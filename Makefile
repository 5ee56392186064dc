# `make demo` and `make test` do all the set-up themselves, in .venv.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint

demo: $(VENV)/ready
	$(BIN)/hope demo

test: $(VENV)/ready $(VENV)/quantized
	PYTHONPATH=$(VENV)/quantized $(BIN)/pytest -q -n 2

slow: $(VENV)/ready
	$(BIN)/pytest -q -m slow

# mypy reads the layout of the wheel: the folders beside modeling_hope/ are installed inside it.
lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/wheel .
	cd build/wheel && MYPYPATH=. $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p modeling_hope

# torch comes first and by name: whatever else asks for it would bring gigabytes of CUDA libraries.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[demo,test,lint]'
	touch $@

# Wherever these are installed, Transformers imports them and they print warnings: only the tests see them.
$(VENV)/quantized: pyproject.toml | $(VENV)/ready
	rm -rf $@
	$(BIN)/pip install --quiet --no-deps --target $@ 'bitsandbytes>=0.50' 'torchao>=0.18'
