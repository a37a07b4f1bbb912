# `make demo` and `make test` need Python 3.11 or newer, and nothing installed before them.
# Another interpreter: make test PYTHON=/path/to/python3.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Each process takes up to 4 GB. There is one more than cores, since some wait for commands.
PARALLEL ?= -n $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 5)))
# A file's tests share what they set up and compile; the slow ones are few and long, and a process
# without work takes another's.
QUICK := $(BIN)/python -m pytest $(PARALLEL) --dist loadfile -m 'not slow'
SLOW := $(BIN)/python -m pytest $(PARALLEL) --dist worksteal -m slow

.PHONY: demo test check lint clean

# Trains on embedded images and inspects others.
demo: $(STAMP)
	@$(BIN)/python scripts/demo.py

# Both parts run, whatever the first one ends with: it tells most of what is wrong, and soon.
test: $(STAMP)
	@$(QUICK); quick=$$?; $(SLOW); slow=$$?; \
	for part in "quick $$quick" "slow $$slow"; do \
	  if [ "$${part#* }" = 0 ]; then echo "$${part% *} tests: passed"; \
	  else echo "$${part% *} tests: FAILED (pytest's exit status $${part#* })"; fi; \
	done; \
	[ $$quick = 0 ] && [ $$slow = 0 ]

# What tells soonest that something is wrong: lint, and the tests that compile next to nothing.
CHECKED := check checkpoint data decision defects demo figures fuzz gpu layouts losses main metrics
CHECKED += overlays predict predictor reading readme report run sampling supervision sweep synthetic
CHECKED += torch_archives trust weights
check: lint
	@$(QUICK) $(CHECKED:%=tests/test_%.py)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The environment, made anew whenever what it holds changes. A command such as python3.12 may exist
# and still not run, hence the trial. -qq: pip is heard only when it fails.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.12 python3.11 python3.13 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$python; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'error: no Python 3.11 or newer found: install one, or name it with PYTHON=' >&2; \
	  exit 1; \
	fi; \
	echo "Installing into $(VENV) with $$($$found --version): takes a minute or two."; \
	$$found -m venv --clear $(VENV) && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[test]' && \
	touch $@

# Whatever can be made again; trained runs stay.
clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
