# make run    the seed's grid on this machine
# make test   linters, types and tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# On a CPU a choice of backends, for some eight minutes on two cores (sdpa is the fused one there, the same as sdpa-flash);
# all of them take longer: make run ARGS=
ifeq ($(shell command -v nvidia-smi),)
ARGS ?= --backend naive --backend eager --backend sdpa
endif

# The browser tests need one of these; as root, or with sudo, on Debian it is installed where there is none
BROWSERS := chromium chromium-browser google-chrome
SUDO     := $(if $(filter-out 0,$(shell id -u)),sudo --non-interactive)

.PHONY: run test browser clean

run: $(VENV)/run.stamp
	$(BIN)/attnbench run $(ARGS)

test: $(VENV)/test.stamp browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2 -m "not alone"
	$(BIN)/pytest -m alone

$(VENV)/run.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dataframe,report]'
	@touch $@

$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dataframe,report,dev]'
	@touch $@ $(VENV)/run.stamp

browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	  command -v apt-get >/dev/null && $(SUDO) apt-get update --quiet && \
	  $(SUDO) apt-get install --quiet --yes --no-install-recommends chromium || \
	  echo "the browser tests need one of $(BROWSERS): install one" >&2

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "attnbench needs Python 3.11 or newer; name one by: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV)
