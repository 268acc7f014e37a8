# make run    the seed's grid on this machine
# make test   linters, types and tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# On a CPU a choice of backends, for some eight minutes on two cores; all of them take thirteen: make run ARGS=
ifeq ($(shell command -v nvidia-smi),)
ARGS ?= --backend naive --backend eager --backend sdpa --backend sdpa-flash
endif

.PHONY: run test clean

run: $(VENV)/run.stamp
	$(BIN)/attnbench run $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dataframe,report]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dataframe,report,dev]'
	@touch $@ $(VENV)/run.stamp

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attnbench needs Python 3.11 or newer; name one by: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV)
